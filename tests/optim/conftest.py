"""What the optimizers' tests share."""

from typing import Any

import pytest

BACKENDS = {"loop": {"fused": False, "foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The keyword arguments that choose one way to compute the update."""
    return BACKENDS[request.param]
