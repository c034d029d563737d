"""What the optimizers' tests share."""

from typing import Any

import pytest

BACKENDS = {"loop": {"fused": False, "foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The keyword arguments that choose one way to compute the update."""
    return BACKENDS[request.param]


@pytest.fixture(params=["loop", "foreach"])
def plain_backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The same without the fused kernels, where each case would compile one; their own tests cover it."""
    return BACKENDS[request.param]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
