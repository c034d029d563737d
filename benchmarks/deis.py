"""DEIS on problems whose flow is known, beside first order and beside the few-call samplers of diffusers.

    python benchmarks/deis.py        # a minute on one thread

1. The multiplicative model with two modes (log x0 = 0.35 N(-0.3, 0.15^2) + 0.65 N(0.9, 0.25^2), exact noise
   prediction, noise 1.6 down to 0.025, 4,000 particles): RMS error of log x against the number of network calls, for
   every method of GBMDEISScheduler on one grid, uniform in the cube root of the noise level, and on its best of six;
   and the observed orders of convergence, from 40 to 80 and from 80 to 160 steps.
2. The same data under a variance-preserving model (linear betas of DDPM, noise 157 down to 0.01): DEISScheduler beside
   DEISMultistepScheduler, DPMSolverMultistepScheduler and UniPCMultistepScheduler of diffusers, each at its best order
   and grid of one family (times, Karras, exponential) for each number of calls.

Errors are to the flow itself, by 2,000 classical Runge-Kutta steps, at the noise level where the sampler ends. Writes
``benchmarks/results/deis.json`` and ``docs/methods/img/deis.png``.
"""

import itertools
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _runner import write_result
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from lightning_opt.diffusion import DEISScheduler, GBMDEISScheduler
from lightning_opt.diffusion.deis import TABLEAUS

PICTURE = Path(__file__).parents[1] / "docs" / "methods" / "img" / "deis.png"
CALLS = (5, 10, 20, 40)
POWERS = (1.0, 2.0, 3.0, 5.0, 7.0, None)  # of the grid in rho; None is the logarithmic one
WEIGHTS, MEANS, DEVIATIONS = (
    torch.tensor(numbers, dtype=torch.float64) for numbers in ((0.35, 0.65), (-0.3, 0.9), (0.15, 0.25))
)
METHODS: dict[str, dict[str, Any]] = {
    **{
        f"{name}{order}": {"algorithm_type": name, "solver_order": order}
        for name, order in itertools.product(("t_ab", "rho_ab", "logrho_ab", "ipndm"), (1, 2, 3, 4))
        if name != "ipndm" or order > 1
    },
    **{f"rk_{name}": {"algorithm_type": f"rk_{name}"} for name in TABLEAUS if name != "1euler"},
}
ORDERS: dict[str, dict[str, Any]] = {
    **METHODS,
    **{
        f"{name}{order}, start by {warmup}": {"algorithm_type": name, "solver_order": order, "warmup": warmup}
        for name in ("t_ab", "rho_ab", "logrho_ab")
        for order, warmup in ((3, "heun"), (4, "kutta"))
    },
}


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    problem = TwoModes(1.6, 0.025)
    table = {name: row(problem, options) for name, options in METHODS.items()}
    print(
        f"{'two modes, RMS log error':<28}"
        + "".join(f"{f'{n} calls':>12}" for n in CALLS)
        + "   beside first order at 10"
    )
    for name, entry in table.items():
        errors = entry["grid of power 3"]
        ratio = errors["10"] / table["rho_ab1"]["grid of power 3"]["10"]
        print(f"{name:<28}" + "".join(f"{errors[str(n)]:>12.2e}" for n in CALLS) + f"{ratio:>12.3f}")
    orders = {name: observed_orders(problem, options) for name, options in ORDERS.items()}
    for name, entry in orders.items():
        print(f"order of {name:<28}{entry['40 to 80']:>6.2f}{entry['80 to 160']:>6.2f}")
    peers = vp_table()
    print("\nVP, RMS error, each at its best order and grid")
    for name, entry in peers.items():
        print(
            f"{name:<34}"
            + "".join(f"{entry[str(n)]['error']:>10.2e} {entry[str(n)]['setting']:<36}" for n in CALLS[:3])
        )
    write_result("deis", {"two_modes": table, "orders": orders, "vp": peers})
    draw(table, peers)


class TwoModes:
    """Particles at the largest noise level, the exact noise prediction, and where the flow takes them."""

    def __init__(self, rho_max: float, rho_min: float, count: int = 4000) -> None:
        generator = torch.Generator().manual_seed(0)
        mode = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        self.start = MEANS[mode] + (DEVIATIONS[mode] ** 2 + rho_max**2).sqrt() * noise
        self.end = self.flow(self.start, rho_max, rho_min)
        self.data = self.end - rho_min * self.epsilon(self.end, rho_min)  # off by the square of rho_min, times 1e-2

    def epsilon(self, z: Tensor, rho: float) -> Tensor:
        variance = DEVIATIONS**2 + rho**2
        away = z[:, None] - MEANS
        share = (WEIGHTS.log() - variance.log() / 2 - away**2 / (2 * variance)).softmax(dim=1)
        return rho * (share * away / variance).sum(dim=1)

    def flow(self, z: Tensor, rho_from: float, rho_to: float, steps: int = 2000) -> Tensor:
        power = 5.0
        grid = torch.linspace(rho_from ** (1 / power), rho_to ** (1 / power), steps + 1, dtype=torch.float64) ** power
        for now, after in itertools.pairwise(grid.tolist()):
            h = after - now
            k1 = self.epsilon(z, now)
            k2 = self.epsilon(z + h / 2 * k1, now + h / 2)
            k3 = self.epsilon(z + h / 2 * k2, now + h / 2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + self.epsilon(z + h * k3, after))
        return z


def error(problem: TwoModes, options: dict[str, Any], steps: int, power: float | None = 3.0) -> float:
    """RMS error of the log state at noise 0.025."""
    scheduler = GBMDEISScheduler(
        **{"lower_order_final": False, **options},
        prediction_type="epsilon",
        rho_min=0.025,
        rho_max=1.6,
        timestep_spacing="log" if power is None else "rho",
        spacing_order=power or 1.0,
        denoise_final=False,
    )
    scheduler.set_timesteps(steps)
    y = problem.start
    for t, (_, rho) in zip(scheduler.timesteps, scheduler._levels, strict=True):  # not rounded, as timesteps are
        y = scheduler.step(problem.epsilon(y, rho), t, y, return_dict=False)[0]
    return (y - problem.end).square().mean().sqrt().item()


def row(problem: TwoModes, options: dict[str, Any]) -> dict[str, Any]:
    """Errors by number of calls; a method of s stages makes the largest multiple of s that is no more."""
    stages = GBMDEISScheduler(**options).order
    entry: dict[str, Any] = {"stages": stages, "grid of power 3": {}, "best": {}}
    for calls in CALLS:
        steps = max(1, calls // stages)
        entry["grid of power 3"][str(calls)] = error(problem, options, steps)
        tried = {
            (power, lower): error(problem, {**options, "lower_order_final": lower}, steps, power)
            for power in POWERS
            for lower in ((False, True) if stages == 1 else (False,))
        }
        (power, lower), least = min(tried.items(), key=lambda item: item[1])
        entry["best"][str(calls)] = {"error": least, "power": power, "lower_order_final": lower}
    return entry


def observed_orders(problem: TwoModes, options: dict[str, Any]) -> dict[str, float]:
    errors = {steps: error(problem, options, steps) for steps in (40, 80, 160)}
    return {f"{n} to {2 * n}": math.log2(errors[n] / errors[2 * n]) for n in (40, 80)}


def vp_table() -> dict[str, Any]:
    """For each sampler and number of calls the best of its orders and of the grids that all of them have."""
    ours = DEISScheduler()
    problem = TwoModes(ours.noise.largest_rho, ours.noise.rho_min)
    x = problem.start[:, None] * ours.noise.signal(ours.noise.largest_rho)
    rows: dict[str, dict[str, Any]] = {}
    for (name, setting, build), calls in itertools.product(list(candidates()), CALLS):
        scheduler = build()
        steps = calls // getattr(scheduler, "order", 1)
        scheduler.set_timesteps(steps)
        found = vp_error(problem, scheduler, x)
        best = rows.setdefault(name, {}).setdefault(str(calls), {"error": math.inf, "setting": ""})
        if found < best["error"]:
            best.update(error=found, setting=setting)
    return rows


def candidates() -> Iterable[tuple[str, str, Any]]:
    grids = {"times": {}, "karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
    finals = ("zero", "sigma_min")
    for (grid, g), order in itertools.product(grids.items(), (1, 2, 3)):
        label = f"order {order}, {grid}"
        yield "diffusers DEISMultistep", label, lambda g=g, order=order: DEISMultistepScheduler(solver_order=order, **g)
        for final in finals:
            more = {"final_sigmas_type": final, "solver_order": order, **g}
            yield (
                "diffusers DPMSolverMultistep",
                f"{label}, {final}",
                lambda more=more: DPMSolverMultistepScheduler(**more),
            )
            yield "diffusers UniPCMultistep", f"{label}, {final}", lambda more=more: UniPCMultistepScheduler(**more)
    for name, (grid, g), order, final in itertools.product(
        ("t_ab", "rho_ab", "logrho_ab", "ipndm"), grids.items(), (1, 2, 3, 4), finals
    ):
        more = {"deis_type": name, "final_sigmas_type": final, "solver_order": order, **g}
        label = f"order {order}, {grid}, {final}"
        yield f"ours {name}", label, lambda more=more: DEISScheduler(**more)
    for name, (grid, g) in itertools.product(("rk_2heun", "rk_3ral"), grids.items()):
        yield f"ours {name}", grid, lambda name=name, g=g: DEISScheduler(deis_type=name, **g)


def vp_error(problem: TwoModes, scheduler: Any, x: Tensor) -> float:
    """RMS error at the level where the sampler ends: the smallest, or the data."""
    levels = scheduler.sigmas.tolist()
    for t, rho in zip(scheduler.timesteps, levels, strict=False):
        epsilon = problem.epsilon(x[:, 0].double() * (1 + rho**2) ** 0.5, rho)[:, None]
        x = scheduler.step(epsilon, t, x, return_dict=False)[0]
    x = x[:, 0].double() * (1 + levels[-1] ** 2) ** 0.5
    return (x - (problem.end if levels[-1] > 0 else problem.data)).square().mean().sqrt().item()


def draw(table: dict[str, Any], peers: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    shown = {
        "rho_ab1": "first order (DDIM)",
        "rk_2heun": "rhoRK, Heun",
        "rk_3kutta": "rhoRK, Kutta",
        "t_ab4": "tAB, order 4",
        "rho_ab4": "rhoAB, order 4",
        "logrho_ab3": "log-rho AB, order 3",
        "ipndm4": "iPNDM, order 4",
    }
    for name, label in shown.items():
        stages = table[name]["stages"]
        made = [calls // stages * stages for calls in CALLS]
        left.plot(made, [table[name]["grid of power 3"][str(n)] for n in CALLS], marker="o", ms=4, label=label)
    left.set(title="Multiplicative model, two modes, one grid", ylabel="RMS error of log x")
    names = ["DEISMultistep", "DPMSolverMultistep", "UniPCMultistep"]
    for name in names:
        entry = peers[f"diffusers {name}"]
        right.plot(CALLS, [entry[str(n)]["error"] for n in CALLS], "--", marker="s", ms=4, label=f"diffusers {name}")
    for name in ("t_ab", "rho_ab", "logrho_ab", "ipndm"):
        entry = peers[f"ours {name}"]
        right.plot(CALLS, [entry[str(n)]["error"] for n in CALLS], marker="o", ms=4, label=f"DEISScheduler {name}")
    right.set(title="VP model, each at its best order and grid", ylabel="RMS error of x")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="network calls", xticks=CALLS, xticklabels=[str(n) for n in CALLS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
