"""Time of one optimizer step: the fused kernels beside torch's fused Adam and beside other packages.

Run with ``python benchmarks/optimizer_step.py``; writes ``benchmarks/results/optimizer_step.json``, and where there is
a GPU also ``optimizer_step_cuda.json``. Every comparison alternates the two optimizers in one process and reports the
median of the paired ratios. "Per byte" divides the times by the bytes that the update must read and write.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _runner import paired_times, ratio_summary, write_result
from torch import Tensor

from lightning_opt.optim import AdaBelief, DiffGrad, ExponentiatedAdamW, ExponentiatedSGD, Lion

# float32 numbers read and written for a parameter, and the largest acceptable time per byte beside Adam
OURS: dict[str, tuple[Callable[..., Any], int, float]] = {
    "AdaBelief": (AdaBelief, 7, 1.05),
    "DiffGrad": (DiffGrad, 9, 1.10),
    "Lion": (Lion, 5, 1.10),
    "ExponentiatedSGD": (lambda p: ExponentiatedSGD(p, lr=1e-3), 3, 1.10),
    "ExponentiatedSGD, momentum": (lambda p: ExponentiatedSGD(p, lr=1e-3, momentum=0.9), 5, 1.10),
    "ExponentiatedAdamW": (ExponentiatedAdamW, 7, 1.10),
}
ADAM_NUMBERS = 7

FIRST_STEP = """
import time, torch
from lightning_opt.optim import {name}
p = torch.nn.Parameter(torch.ones(10))
p.grad = torch.ones(10)
optimizer = {name}([p], lr=1e-3)
start = time.perf_counter()
optimizer.step()
print(time.perf_counter() - start)
"""


def transformer(width: int, layers: int, words: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a GPT."""
    layer = [(3 * width, width), (3 * width,), (width, width), (4 * width, width), (4 * width,), (width, 4 * width)]
    return [(words, width), (1024, width)] + layers * (layer + 6 * [(width,)])


def draw(shapes: list[tuple[int, ...]], device: str = "cpu") -> list[Tensor]:
    """The parameters with their gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    params = [(0.02 * normal(shape)).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = 0.01 * normal(tuple(p.shape))
    return params


def beside_adam(shapes: list[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """Each of our optimizers and torch's fused Adam in turns."""
    adam = torch.optim.Adam(draw(shapes), fused=True)
    size = sum(torch.Size(shape).numel() for shape in shapes)
    rows = {}
    print(f"\n{len(shapes)} tensors, {size / 1e6:.2f} M parameters, beside torch.optim.Adam(fused=True)")
    print(
        f"{'':28}{'ms':>8}{'Adam ms':>9}{'GB/s':>7}{'time ratio':>12}{'per byte':>10}{'  10% - 90%':>14}{'at most':>9}"
    )
    for name, (make, numbers, target) in OURS.items():
        optimizer = make(draw(shapes))
        times = paired_times({"ours": optimizer.step, "adam": adam.step}, rounds)
        ratio = ratio_summary(times, "ours", "adam")
        per_byte = {quantile: value * ADAM_NUMBERS / numbers for quantile, value in ratio.items()}
        median = statistics.median(times["ours"])
        rows[name] = {
            "median_s": median,
            "adam_median_s": statistics.median(times["adam"]),
            "bytes_a_parameter": 4 * numbers,
            "gb_per_s": 4e-9 * numbers * size / median,
            "time_ratio": ratio,
            "per_byte_ratio": per_byte,
            "target_per_byte": target,
        }
        row = rows[name]
        print(
            f"{name:28}{1e3 * median:8.2f}{1e3 * row['adam_median_s']:9.2f}{row['gb_per_s']:7.1f}",
            f"{ratio['median']:11.3f}{per_byte['median']:10.3f}{per_byte['q10']:8.3f} -{per_byte['q90']:6.3f}",
            f"{target:6.2f}",
        )
    return {"tensors": len(shapes), "parameters": size, "rounds": rounds, "rows": rows}


def peers() -> dict[str, tuple[float, dict[str, Callable[..., Any]]]]:
    """Other packages' optimizers of the same update in every setting they offer; how much slower they should be."""
    import adabelief_pytorch
    import lion_pytorch
    import pytorch_optimizer as po
    import torch_optimizer
    from lion_pytorch import foreach as lion_foreach

    def both(name: str) -> dict[str, Callable[..., Any]]:
        cls = getattr(po, name)
        return {f"pytorch_optimizer, foreach={on}": partial(cls, foreach=on) for on in (True, False)}

    adabelief = partial(adabelief_pytorch.AdaBelief, rectify=False, print_change_log=False)
    return {
        "AdaBelief": (4.0, {**both("AdaBelief"), "adabelief_pytorch": adabelief}),
        "DiffGrad": (4.0, {**both("DiffGrad"), "torch_optimizer": torch_optimizer.DiffGrad}),
        "Lion": (
            2.0,
            {**both("Lion"), "lion_pytorch": lion_pytorch.Lion, "lion_pytorch, foreach": lion_foreach.Lion},
        ),
    }


def beside_peers(shapes: list[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """Each of our optimizers and the same of other packages in turns."""
    rows: dict[str, Any] = {}
    print(f"\nThe same update in other packages: their time over ours, {rounds} pairs")
    for name, (target, makers) in peers().items():
        optimizer = OURS[name][0](draw(shapes))
        rows[name] = {"target": target, "peers": {}}
        for peer, make in makers.items():
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # some print, some warn
                warnings.simplefilter("ignore")
                times = paired_times({"peer": make(draw(shapes)).step, "ours": optimizer.step}, rounds, warmup=1)
            ratio = ratio_summary(times, "peer", "ours")
            rows[name]["peers"][peer] = {"median_s": statistics.median(times["peer"]), "ratio": ratio}
            print(
                f"{name:12}{peer:34}{1e3 * rows[name]['peers'][peer]['median_s']:8.1f} ms"
                f"{ratio['median']:7.1f} x  ({ratio['q10']:.1f} - {ratio['q90']:.1f}), at least {target:.0f}"
            )
    return {"rounds": rounds, "rows": rows}


def many_small_tensors(rounds: int) -> dict[str, Any]:
    """A step over 2,000 tensors of 64 elements, where the work around the kernel counts."""
    shapes: list[tuple[int, ...]] = [(64,)] * 2000
    times = paired_times(
        {"ours": AdaBelief(draw(shapes)).step, "adam": torch.optim.Adam(draw(shapes), fused=True).step}, rounds
    )
    row = {
        "median_s": statistics.median(times["ours"]),
        "adam_median_s": statistics.median(times["adam"]),
        "time_ratio": ratio_summary(times, "ours", "adam"),
        "target": 1.5,
        "rounds": rounds,
    }
    print(
        f"\n2,000 tensors of 64: AdaBelief {1e3 * row['median_s']:.2f} ms, Adam {1e3 * row['adam_median_s']:.2f} ms, "
        f"ratio {row['time_ratio']['median']:.2f}, at most 1.5"
    )
    return row


def first_steps(repeats: int) -> dict[str, float]:
    """Seconds of the first step in a fresh process: importing the compiler and compiling."""
    rows = {}
    for name in ("AdaBelief", "DiffGrad", "Lion", "ExponentiatedSGD"):
        command = [sys.executable, "-c", FIRST_STEP.format(name=name)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(repeats)]
        rows[name] = statistics.median(map(float, runs))
    print("\nfirst step, compilation included: " + ", ".join(f"{n} {s:.2f} s" for n, s in rows.items()))
    return rows


# --- CUDA --------------------------------------------------------------------------------------------------------


def cuda_times(functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 5) -> dict[str, list[float]]:
    """Seconds on the device of calls in turns, from CUDA events."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    events: dict[str, list[Any]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in sorted(functions, reverse=bool(turn % 2)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            functions[name]()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [1e-3 * begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}


def copy_bandwidth(rounds: int) -> float:
    """Bytes read and written a second by the fastest copy within the device: the median."""
    source = torch.ones(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    times = cuda_times({"copy": lambda: target.copy_(source)}, rounds)
    return 2 * source.numel() / statistics.median(times["copy"])


def on_cuda(shapes: list[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """The Triton kernels and torch's fused Adam in turns, as shares of the bandwidth of a copy."""
    bandwidth = copy_bandwidth(rounds)
    size = sum(torch.Size(shape).numel() for shape in shapes)
    adam = torch.optim.Adam(draw(shapes, "cuda"), fused=True)
    rows = {}
    print(f"\n{torch.cuda.get_device_name()}: a copy moves {1e-9 * bandwidth:.0f} GB/s")
    print(f"{len(shapes)} tensors, {size / 1e6:.0f} M parameters")
    print(f"{'':28}{'ms':>8}{'Adam ms':>9}{'of copy':>9}{'Adam of copy':>14}{'per byte':>10}")
    for name, (make, numbers, _) in OURS.items():
        optimizer = make(draw(shapes, "cuda"))
        times = cuda_times({"ours": optimizer.step, "adam": adam.step}, rounds)
        median, adam_median = (statistics.median(times[k]) for k in ("ours", "adam"))
        rows[name] = {
            "median_s": median,
            "adam_median_s": adam_median,
            "bytes_a_parameter": 4 * numbers,
            "share_of_copy": 4 * numbers * size / median / bandwidth,
            "adam_share_of_copy": 4 * ADAM_NUMBERS * size / adam_median / bandwidth,
            "per_byte_ratio": {
                quantile: value * ADAM_NUMBERS / numbers
                for quantile, value in ratio_summary(times, "ours", "adam").items()
            },
        }
        row = rows[name]
        print(
            f"{name:28}{1e3 * median:8.3f}{1e3 * adam_median:9.3f}{row['share_of_copy']:9.1%}"
            f"{row['adam_share_of_copy']:14.1%}{row['per_byte_ratio']['median']:10.3f}"
        )
        del optimizer
        torch.cuda.empty_cache()
    return {
        "tensors": len(shapes),
        "parameters": size,
        "rounds": rounds,
        "copy_gb_per_s": 1e-9 * bandwidth,
        "target_share": 0.9,
        "target_per_byte": 1.0,
        "rows": rows,
    }


def main() -> None:
    """Measure, print tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="pairs of timed steps")
    parser.add_argument("--only", choices=["cpu", "cuda"], help="leave the other device out")
    options = parser.parse_args()
    if options.only != "cuda":
        shapes = transformer(width=512, layers=4, words=12_800)
        start = time.perf_counter()
        result = {
            "beside_adam": beside_adam(shapes, options.rounds),
            "many_small_tensors": many_small_tensors(options.rounds),
            "beside_peers": beside_peers(shapes, max(3, options.rounds // 5)),
            "first_step_s": first_steps(3),
        }
        print(f"\n{time.perf_counter() - start:.0f} s; {write_result('optimizer_step', result)}")
    if torch.cuda.is_available() and options.only != "cpu":
        shapes = transformer(width=1024, layers=12, words=46_000)
        print(write_result("optimizer_step_cuda", on_cuda(shapes, options.rounds)))


if __name__ == "__main__":
    main()
