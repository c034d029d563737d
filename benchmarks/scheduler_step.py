"""Time of a sampler outside the network, beside diffusers' DDPM and DEIS schedulers.

Run with ``python benchmarks/scheduler_step.py``; writes ``benchmarks/results/scheduler_step.json`` (with ``_cuda`` on a
GPU). A turn is a whole schedule with a fixed tensor for the network's output: ``set_timesteps``, and
``scale_model_input`` and ``step`` for each of its steps. Every comparison alternates the two schedulers in one process
and reports the median of the paired ratios. ``--clock cpu`` takes the processor time of the process, which other work
on the machine disturbs less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from _runner import paired_times, ratio_summary, write_result
from diffusers import DDPMScheduler, DEISMultistepScheduler

from lightning_opt.diffusion import GBMDEISScheduler, GBMScheduler

TARGET = 0.5
STEPS = 50
SHAPES = [(1, 1, 8, 8), (1, 1, 28, 28), (16, 1, 28, 28), (64, 1, 28, 28), (64, 3, 32, 32)]
MODEL = {"rho_max": 4.0, "log_mean": 0.1, "log_std": 0.25}

# name: (of whom, beside whom, what the pair has in common)
Make = Callable[[], Any]
PAIRS: dict[str, tuple[Make, Make, str]] = {
    "dale / DDPM": (lambda: GBMScheduler(sampler="dale", **MODEL), DDPMScheduler, "stochastic"),
    "dale, fused / DDPM": (lambda: GBMScheduler(sampler="dale", fused=True, **MODEL), DDPMScheduler, "stochastic"),
    "exp_euler / DDPM": (lambda: GBMScheduler(sampler="exp_euler", **MODEL), DDPMScheduler, "stochastic"),
    "ambient / DDPM": (lambda: GBMScheduler(sampler="ambient", **MODEL), DDPMScheduler, "stochastic"),
    "ode / DEIS": (lambda: GBMScheduler(sampler="ode", **MODEL), DEISMultistepScheduler, "deterministic"),
    "log-rho AB 2 / DEIS": (
        lambda: GBMDEISScheduler(algorithm_type="logrho_ab", solver_order=2, **MODEL),
        DEISMultistepScheduler,
        "one method",
    ),
    "iPNDM 4 / DEIS": (lambda: GBMDEISScheduler(**MODEL), DEISMultistepScheduler, "the defaults"),
}


def schedule(scheduler: Any, shape: tuple[int, ...], device: str) -> Callable[[], None]:
    """A whole schedule with a fixed output of the network."""
    generator = torch.Generator(device).manual_seed(0)
    start, output = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    draws = {} if isinstance(scheduler, DEISMultistepScheduler) else {"generator": generator}

    def turn() -> None:
        scheduler.set_timesteps(STEPS, device=device)
        sample = start
        for t in scheduler.timesteps:
            scheduler.scale_model_input(sample, t)
            sample = scheduler.step(output, t, sample, **draws).prev_sample

    return turn


def noise_time(shape: tuple[int, ...], device: str, rounds: int, clock: Callable[[], float]) -> float:
    """Seconds of drawing the noise of a step: what every stochastic scheduler pays."""
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> None:
        for _ in range(STEPS):
            torch.randn(shape, generator=generator, device=device)

    return statistics.median(paired_times({"noise": draw}, rounds, clock=clock)["noise"]) / STEPS


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="pairs of timed schedules")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    rows = []
    print(
        f"{'microseconds a step':24}{'sample':>16}{'ours':>9}{'theirs':>9}{'noise':>8}{'ratio':>8}{'  10% - 90%':>15}"
    )
    for shape in SHAPES:
        noise = noise_time(shape, options.device, options.rounds, clock)
        for name, (ours, theirs, kind) in PAIRS.items():
            turns = {
                "ours": schedule(ours(), shape, options.device),
                "theirs": schedule(theirs(), shape, options.device),
            }
            times = paired_times(turns, options.rounds, warmup=2, clock=clock)
            ratio = ratio_summary(times, "ours", "theirs")
            row = {
                "pair": name,
                "kind": kind,
                "shape": list(shape),
                "us_a_step": 1e6 * statistics.median(times["ours"]) / STEPS,
                "theirs_us_a_step": 1e6 * statistics.median(times["theirs"]) / STEPS,
                "noise_us_a_step": 1e6 * noise if kind == "stochastic" else 0.0,
                "ratio": ratio,
            }
            rows.append(row)
            print(
                f"{name:24}{'x'.join(map(str, shape)):>16}{row['us_a_step']:9.1f}{row['theirs_us_a_step']:9.1f}"
                f"{row['noise_us_a_step']:8.1f}{ratio['median']:8.3f}{ratio['q10']:8.3f} -{ratio['q90']:6.3f}"
            )
    result = {
        "diffusers": metadata.version("diffusers"),
        "steps": STEPS,
        "rounds": options.rounds,
        "clock": options.clock,
        "target": TARGET,
        "rows": rows,
    }
    print(write_result("scheduler_step" + ("_cuda" if options.device == "cuda" else ""), result))


if __name__ == "__main__":
    main()
