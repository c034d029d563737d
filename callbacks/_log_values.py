from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .run_report import RunReport


def is_wanted(trainer: Any) -> bool:
    """Whether anybody looks at logged values."""
    return bool(trainer.loggers) or any(isinstance(callback, RunReport) for callback in trainer.callbacks)


def to_floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Bring 0-dim tensors to the host, waiting for the device once."""
    if not values:
        return {}
    device = next(iter(values.values())).device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return dict(zip(values, torch.stack([v.detach().to(device, dtype) for v in values.values()]).tolist(), strict=True))
