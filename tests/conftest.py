"""What every test runs in: the Triton interpreter where there is no GPU, and nothing left behind."""

import multiprocessing
import os
import random
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any test module is imported

import numpy as np
import pytest

# Lightning, scikit-learn and gymnasium set these while they run; they are put back after each test.
_SET_BY_LIBRARIES = {
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_MODULE_LOADING",
    "GLOO_SOCKET_IFNAME",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "OMP_NUM_THREADS",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "PYGAME_HIDE_SUPPORT_PROMPT",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "RANK",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TRITON_CACHE_DIR",
    "WORLD_SIZE",
}


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaks environment variables, processes or torch settings; give each the same random state.

    The processes of a ``TwoRanks`` may serve several tests; the fixture that holds it closes it.
    """
    environment = dict(os.environ)
    settings = _torch_settings()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    leaked = {
        name
        for name in environment.keys() | os.environ.keys()
        if environment.get(name) != os.environ.get(name)
        and name not in _SET_BY_LIBRARIES
        and not name.startswith("PYTEST_")
    }
    os.environ.clear()
    os.environ.update(environment)
    now = _torch_settings()
    changed = {name: (old, now[name]) for name, old in settings.items() if old != now[name]}
    torch.set_default_dtype(settings["default dtype"])
    torch.set_num_threads(settings["threads"])
    torch.use_deterministic_algorithms(settings["deterministic"])
    torch.set_grad_enabled(settings["gradients"])
    children = [child for child in multiprocessing.active_children() if not child.name.startswith("TwoRanks")]
    for child in children:
        child.kill()
    assert not leaked, f"the test changed environment variables: {sorted(leaked)}"
    assert not changed, f"the test changed torch settings (old, new): {changed}"
    assert not children, f"the test left processes running: {children}"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices are quicker on one thread, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _torch_settings() -> dict:
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
    }
