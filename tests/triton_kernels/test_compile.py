"""Every kernel compiled for a GPU, from the arguments of real steps, without a GPU: the interpreter cannot tell.

Run as a script, this file prints what the compiler made of each case; it needs a process of its own, since Triton
decides when a kernel is defined whether to interpret it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# optimizer, options, dtype of parameters and gradients, number of states
CASES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "adabelief": ("AdaBelief", {}, "float32", 2),
    "adabelief amsgrad": ("AdaBelief", {"amsgrad": True}, "float32", 3),
    "adabelief capturable": ("AdaBelief", {"capturable": True, "rectify": True}, "float32", 2),
    "diffgrad": ("DiffGrad", {}, "float32", 3),
    "diffgrad relative amsgrad": ("DiffGrad", {"friction": "relative", "amsgrad": True}, "float32", 4),
    "lion": ("Lion", {}, "float32", 1),
    "lion soft": ("LionK", {"kernel": "soft", "kernel_args": {"e": 0.1}}, "float32", 1),
    "lion huber": ("LionK", {"kernel": "huber", "kernel_args": {"e": 0.1}}, "float32", 1),
    "lion relativistic": ("LionK", {"kernel": "relativistic", "kernel_args": {"e": 0.1}}, "float32", 1),
    "lion quadratic": ("LionK", {"kernel": "quadratic"}, "float32", 1),
    "eg": ("ExponentiatedSGD", {}, "float32", 0),
    "eg nesterov": ("ExponentiatedSGD", {"momentum": 0.9, "nesterov": True}, "float32", 1),
    "eg gd_sign": ("ExponentiatedSGD", {"variant": "gd_sign"}, "float32", 0),
    "eg hyper": ("ExponentiatedSGD", {"variant": "hyper", "momentum": 0.9}, "float32", 1),
    "eg additive": ("ExponentiatedSGD", {"additive": True, "maximize": True}, "float32", 0),
    "eg adamw": ("ExponentiatedAdamW", {}, "float32", 2),
    "eg adamw amsgrad additive": ("ExponentiatedAdamW", {"amsgrad": True, "additive": True}, "float32", 3),
    "bfloat16": ("AdaBelief", {}, "bfloat16", 2),
    "float16": ("AdaBelief", {}, "float16", 2),
    "bfloat16 state": ("AdaBelief", {"state_dtype": "bfloat16"}, "bfloat16", 2),
    "stochastic": ("DiffGrad", {"state_dtype": "bfloat16", "stochastic_rounding": True}, "bfloat16", 3),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return report_of(__file__, tmp_path_factory.mktemp("triton"))


def report_of(script: str, cache: Path) -> dict[str, Any]:
    """What a script prints in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [case for case, (_, _, dtype, _) in CASES.items() if dtype == "float32"])
def test_aligned_tensors_of_float32_are_moved_16_bytes_at_a_time(case, compiled):
    states, accesses = CASES[case][3], compiled[case]["accesses"]
    assert accesses["ld.global.v4.b32"] == 2 + states
    assert accesses["st.global.v4.b32"] == 1 + states


@pytest.mark.parametrize("case", CASES)
def test_others_are_moved_one_by_one_under_a_mask(case, compiled):
    """Four elements a thread and tensor; 4 numbers of int32 or int64 come from the tables before."""
    states, accesses = CASES[case][3], compiled[case]["accesses"]
    single = sum(count for name, count in accesses.items() if re.fullmatch(r"st\.global\.b(16|32)", name))
    assert single == 4 * (1 + states)


@pytest.mark.parametrize("case", CASES)
def test_registers_leave_room_for_six_programs_and_none_is_spilled(case, compiled):
    assert compiled[case]["spilled"] == 0
    # 65536 registers over 128 threads, given in eights; the random bits need the most
    assert compiled[case]["registers"] <= 65536 // (6 * 128) // 8 * 8
    if "stochastic" not in case:
        assert compiled[case]["registers"] <= 65536 // (9 * 128) // 8 * 8


def test_low_precision_is_moved_8_bytes_at_a_time(compiled):
    for case, narrow, wide in [("bfloat16", 2, 2), ("float16", 2, 2), ("bfloat16 state", 4, 0), ("stochastic", 5, 0)]:
        accesses = compiled[case]["accesses"]
        assert accesses["ld.global.v2.b32"] == narrow
        assert accesses.get("ld.global.v4.b32", 0) == wide


def test_bfloat16_is_rounded_to_nearest(compiled):
    for case in ("bfloat16", "bfloat16 state"):
        assert "cvt.rn.bf16x2.f32" in compiled[case]["conversions"]
    for case in CASES:
        assert not [name for name in compiled[case]["conversions"] if ".rz." in name and "bf16" in name]


def test_roots_and_quotients_are_rounded_to_nearest(compiled):
    for case in ("adabelief", "diffgrad", "eg adamw"):
        assert {"sqrt.rn.f32", "div.rn.f32"} <= set(compiled[case]["functions"])


def test_one_kernel_serves_any_number_of_tensors_and_any_rate(compiled):
    assert compiled["counts and rates"] == {"kernels": 1}


class Driver:
    """As much of a driver as the compiler asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """In the place of a kernel: compiles for the arguments of a launch, and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        from triton.runtime import driver

        driver.set_active(Driver())
        self.kernel, self.results = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile(*args: Any, **kwargs: Any) -> None:
            self.results.append(self.kernel.run(*args, grid=grid, warmup=True, **kwargs))

        return compile


def main() -> None:
    import torch

    from lightning_opt import optim, triton_kernels
    from lightning_opt.triton_kernels import _launch

    compiler = _launch.multi_tensor = Compiler(_launch.multi_tensor)
    report = {}
    for case, (name, options, dtype, _) in CASES.items():
        parameter = torch.nn.Parameter(torch.ones(1000, dtype=getattr(torch, dtype)))
        if name.startswith("Exponentiated") and dtype != "float32":
            options = {**options, "min_abs": 1e-4}
        optimizer = getattr(optim, name)([parameter], **options)
        optimizer._kernels = lambda group, p: triton_kernels
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ptx = compiler.results[-1].asm["ptx"]
        report[case] = {
            "accesses": Counter(re.findall(r"(?:ld|st)\.global(?:\.v\d)?\.b\d+", ptx)),
            "conversions": Counter(re.findall(r"cvt\.r\w(?:\.\w+)+", ptx)),
            "functions": Counter(re.findall(r"(?:sqrt|div)(?:\.\w+)+", ptx)),
            **resources(ptx),
        }
    compiler.results.clear()
    for count in (1, 2, 3, 16, 17):
        parameters = [torch.nn.Parameter(torch.ones(10)) for _ in range(count)]
        optimizer = optim.Lion(parameters, lr=1 / count)
        optimizer._kernels = lambda group, p: triton_kernels
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    report["counts and rates"] = {"kernels": len({kernel.hash for kernel in compiler.results})}
    print(json.dumps(report))


def resources(ptx: str) -> dict[str, int]:
    """What the assembler says about a kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
        command = [knobs.nvidia.ptxas.path, "-v", f"-arch={architecture}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
    }


if __name__ == "__main__":
    main()
