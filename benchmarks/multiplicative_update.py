"""Time of the fused updates of the multiplicative model beside the same torch expressions, noise included.

Run with ``python benchmarks/multiplicative_update.py``; writes ``benchmarks/results/multiplicative_update.json``, and
where there is a GPU also ``multiplicative_update_cuda.json``, in shares of the bandwidth of a copy. On the CPU every
comparison alternates the two in one process and reports the median of the paired ratios. Torch is timed as one writes
it, and in place, as nobody wants to.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _runner import paired_times, ratio_summary, write_result
from optimizer_step import copy_bandwidth, cuda_times
from torch import Tensor

from lightning_opt.diffusion import log_step, multiplicative_update, noise_with_target

SHAPES = {
    "64 x 1 x 28 x 28": (64, 1, 28, 28),
    "64 x 3 x 32 x 32": (64, 3, 32, 32),
    "64 x 3 x 128 x 128": (64, 3, 128, 128),
}
A, B, C = -0.1, 0.2, 0.3
TARGET, SHARE = 2.0, 0.85  # times as fast on the CPU; of the copy bandwidth on a GPU


def contests(shape: tuple[int, ...]) -> dict[str, tuple[Callable[[], Any], dict[str, Callable[[], Any]]]]:
    """For each function ours, and what it is compared with."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator)

    x, p, given, rho = normal().exp(), normal(), normal(), torch.rand(shape[0], generator=generator) + 0.1
    level = rho.reshape(-1, 1, 1, 1)

    def plain() -> Tensor:
        return x * torch.exp(A + B * p + C * normal())

    def in_place() -> Tensor:
        return normal().mul_(C).add_(p, alpha=B).add_(A).exp_().mul_(x)

    def plain_step() -> tuple[Tensor, Tensor]:
        denoised = 0.5 * x + B * p + A
        return torch.lerp(x, denoised, 0.4) + 0.1 + C * normal(), denoised

    def plain_noising() -> tuple[Tensor, Tensor]:
        noise = normal()
        total = level * level + 1
        z, c_in = p + level * noise, total**-0.5
        return c_in * z, (p - z / total) / (level * c_in)

    def update(**options: Any) -> Callable[[], Tensor]:
        return lambda: multiplicative_update(x, p, a=A, b=B, c=C, **{"noise": generator, "fused": True, **options})

    step = {"skip": 0.5, "gain": B, "constant": A, "pull": 0.4, "shift": 0.1, "scale": C}
    ours, torchs = update(), {"torch": plain, "torch, in place": in_place}
    return {
        "update": (ours, torchs),
        "update, exp_impl='native'": (update(exp_impl="native"), {**torchs, "ours": ours}),
        "update, noise given": (update(noise=given), {"torch": lambda: x * torch.exp(A + B * p + C * given)}),
        "update of logarithms": (update(log_state=True), {"torch": lambda: x + A + B * p + C * normal()}),
        "step with denoised": (lambda: log_step(x, p, generator, **step, fused=True), {"torch": plain_step}),
        "noising with target": (lambda: noise_with_target(p, generator, rho=rho, fused=True), {"torch": plain_noising}),
    }


def on_cpu(rounds: int) -> dict[str, Any]:
    """Every contest at every size: how many times as long the other takes."""
    sizes: dict[str, Any] = {}
    for label, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        print(f"\n{label}: {count:,} elements, {torch.get_num_threads()} threads, {rounds} pairs")
        sizes[label] = {"elements": count, "rows": {}}
        for name, (ours, others) in contests(shape).items():
            row: dict[str, Any] = {}
            for other, function in others.items():
                times = paired_times({"other": function, "ours": ours}, rounds)
                ratio = ratio_summary(times, "other", "ours")
                nanoseconds = {k: 1e9 * statistics.median(v) / count for k, v in times.items()}
                row[other] = {"ours_ns": nanoseconds["ours"], "other_ns": nanoseconds["other"], "ratio": ratio}
                print(
                    f"  {name:28}{nanoseconds['ours']:7.2f} ns/element  {other:16}{nanoseconds['other']:7.2f}"
                    f"{ratio['median']:8.2f} x  ({ratio['q10']:.2f} - {ratio['q90']:.2f})"
                )
            sizes[label]["rows"][name] = row
    return {"rounds": rounds, "target_ratio": TARGET, "sizes": sizes}


def on_cuda(rounds: int) -> dict[str, Any]:
    """Bytes that the functions must move, over their time, as shares of the bandwidth of a copy."""
    bandwidth = copy_bandwidth(rounds)
    print(f"\n{torch.cuda.get_device_name()}: a copy moves {1e-9 * bandwidth:.0f} GB/s; at least {SHARE:.0%} of it")
    rows = {}
    for dtype in ("float32", "bfloat16"):
        x, functions = on_device(getattr(torch, dtype))
        times = cuda_times({name: function for name, (_, function) in functions.items()}, rounds)
        for name, (tensors, _) in functions.items():
            median = statistics.median(times[name])
            share = tensors * x.numel() * x.element_size() / median / bandwidth
            rows[f"{name}, {dtype}"] = {"median_s": median, "share_of_copy": share}
            print(f"  {name:28}{dtype:10}{1e3 * median:8.3f} ms{share:8.1%} of copy")
    return {"rounds": rounds, "copy_gb_per_s": 1e-9 * bandwidth, "target_share": SHARE, "rows": rows}


def on_device(dtype: torch.dtype) -> tuple[Tensor, dict[str, tuple[int, Callable[[], Any]]]]:
    """A tensor, and for each function how many of its size it must read or write, and a call."""
    x, p, noise = (torch.randn(256, 3, 256, 256, device="cuda", dtype=dtype) for _ in range(3))
    rho, out = torch.rand(256, device="cuda") + 0.1, torch.empty_like(x)
    generator = torch.Generator("cuda").manual_seed(0)

    def update(noise: Any, **options: Any) -> Callable[[], Tensor]:
        return lambda: multiplicative_update(x, p, noise, a=A, b=B, c=C, out=out, fused=True, **options)

    return x, {
        "update": (3, update(generator)),
        "update, exp_impl='poly'": (3, update(generator, exp_impl="poly")),
        "update, noise given": (4, update(noise)),
        "update of logarithms": (3, update(generator, log_state=True)),
        "step with denoised": (4, lambda: log_step(x, p, generator, pull=0.4, gain=B, scale=C, fused=True)),
        "noising with target": (3, lambda: noise_with_target(p, generator, rho=rho, fused=True)),
        "torch": (3, lambda: x * torch.exp(A + B * p + C * torch.randn_like(x))),
    }


def main() -> None:
    """Measure, print tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="pairs of timed calls")
    parser.add_argument("--only", choices=["cpu", "cuda"], help="leave the other device out")
    options = parser.parse_args()
    if options.only != "cuda":
        start = time.perf_counter()
        result = on_cpu(options.rounds)
        print(f"\n{time.perf_counter() - start:.0f} s; {write_result('multiplicative_update', result)}")
    if torch.cuda.is_available() and options.only != "cpu":
        print(write_result("multiplicative_update_cuda", on_cuda(options.rounds)))


if __name__ == "__main__":
    main()
