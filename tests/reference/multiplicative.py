"""The elementwise rules of the multiplicative model in numpy's doubles, and cases for every backend."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_opt import diffusion
from tests.reference import philox

KEY = (2**63 + 5, 2**32 - 100)  # its counters pass from one word to the next within the first 400 numbers


def update(v: dict[str, Any], c: dict[str, Any], log_state: bool = False, **_: Any) -> tuple[np.ndarray, ...]:
    """x exp(a + b prediction + c noise), or of logarithms the sum."""
    exponent = c["a"] + c["b"] * v.get("prediction", 0.0) + c["c"] * v.get("noise", 0.0)
    return (v["sample"] + exponent,) if log_state else (v["sample"] * np.exp(exponent),)


def step(v: dict[str, Any], c: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """A first-order step of the logarithm, and the denoised one."""
    denoised = c["skip"] * v["log_x"] + c["gain"] * v["output"] + c["constant"]
    moved = (1 - c["pull"]) * v["log_x"] + c["pull"] * denoised + c["shift"] + c["scale"] * v.get("noise", 0.0)
    return moved, denoised


def noised(v: dict[str, Any], c: dict[str, Any], state: str, target: str, log_input: bool) -> tuple[np.ndarray, ...]:
    """The noised state, and the target by the formulas of Karras et al. (2022): (z0 - c_skip z) / c_out."""
    y0 = v["clean"] if log_input else np.log(v["clean"])
    noise, rho, s = v["noise"], c["rho"], c["log_std"]
    y = y0 + c["mean_shift"] + rho * noise
    z = y - c["mean_shift"] - c["log_mean"]
    c_skip, c_out = s**2 / (rho**2 + s**2), rho * s / np.sqrt(rho**2 + s**2)
    states = {"log": y, "positive": np.exp(y), "scaled": z / np.sqrt(rho**2 + s**2)}
    targets = {"epsilon": noise, "hyvarinen": -1 - noise / rho, "edm": (y0 - c["log_mean"] - c_skip * z) / c_out}
    return states[state], targets[target]


class Case(NamedTuple):
    """A call: tensors of float32, coefficients, options."""

    function: str
    tensors: dict[str, Any]
    numbers: dict[str, Any]
    options: dict[str, Any]

    def run(self, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, ...]:
        """What the package's function makes of it."""
        tensors = {n: v.to(device, dtype) if isinstance(v, Tensor) else v for n, v in self.tensors.items()}
        numbers = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in self.numbers.items()}
        result = getattr(diffusion, self.function)(**tensors, **numbers, **self.options, **options)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def expected(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """What the formulas above give, for tensors rounded to the dtype."""
        first = next(iter(self.tensors.values()))
        values = {}
        for name, value in self.tensors.items():
            if isinstance(value, tuple):
                values[name] = philox.normal(first.numel(), *value).reshape(first.shape)
            else:
                values[name] = value.to(dtype).double().numpy()
        numbers = {
            n: v.double().numpy().reshape(v.shape if v.ndim > 1 else (-1, *[1] * (first.ndim - 1)))
            if isinstance(v, Tensor)
            else v
            for n, v in self.numbers.items()
        }
        formula = {"multiplicative_update": update, "log_step": step, "noise_with_target": noised}[self.function]
        return [torch.from_numpy(np.array(x)) for x in formula(values, numbers, **self.options)]


def cases() -> dict[str, Case]:
    """Every option once; rows shorter and longer than a block, of a size that no vector divides."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    short, long = (3, 2, 101), (2, 1, 587)
    x, p, z = normal(*short).exp(), normal(*short), normal(*short)
    rows = {"a": normal(3) / 4, "b": -0.3, "c": 0.5}
    plain = {"a": -0.1, "b": 0.2, "c": 0.7}
    step_numbers = {"skip": 0.7, "gain": normal(3), "constant": normal(2, 1), "pull": 0.4, "shift": 0.1, "scale": 0.3}
    levels = {"mean_shift": 0.1, "rho": torch.tensor([0.02, 0.5, 4.0]), "log_mean": normal(2, 1), "log_std": 0.7}
    update, step, noising = "multiplicative_update", "log_step", "noise_with_target"
    return {
        "update": Case(update, {"sample": x, "prediction": p, "noise": KEY}, plain, {}),
        "update rows": Case(update, {"sample": x, "prediction": p, "noise": KEY}, rows, {}),
        "update long rows": Case(update, {"sample": normal(*long), "noise": KEY}, {"a": normal(2), "b": 0, "c": 1}, {}),
        "update alone": Case(update, {"sample": x}, {"a": 0.5, "b": 0.0, "c": 0.0}, {}),
        "update given": Case(update, {"sample": x, "prediction": p, "noise": z}, rows, {}),
        "update poly": Case(update, {"sample": x, "prediction": p, "noise": z}, plain, {"exp_impl": "poly"}),
        "update native": Case(update, {"sample": x, "prediction": p, "noise": z}, plain, {"exp_impl": "native"}),
        "update log": Case(update, {"sample": x, "prediction": p, "noise": KEY}, rows, {"log_state": True}),
        "step": Case(step, {"log_x": p, "output": x, "noise": KEY}, step_numbers, {}),
        "step without noise": Case(step, {"log_x": p, "output": x}, step_numbers, {}),
        **{
            f"noising {state} {target}": Case(
                noising,
                {"clean": p if log_input else x, "noise": noise},
                levels,
                {"state": state, "target": target, "log_input": log_input},
            )
            for state, target, log_input, noise in [
                ("scaled", "edm", True, KEY),
                ("log", "hyvarinen", False, z),
                ("positive", "epsilon", True, KEY),
            ]
        },
    }
