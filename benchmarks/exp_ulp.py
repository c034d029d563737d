"""The errors of the kernels' float32 exponentials over every float32 number, beside the device's own.

Run with ``python benchmarks/exp_ulp.py``; writes ``benchmarks/results/exp_ulp.json``. Minutes on two cores;
``lightning-opt verify-exp`` is the same without the file. ``--implementation poly`` measures that alone and keeps the
other rows. The rows of programs compare the kernels' programs on the reduced range, where they were evolved, with the
minimax polynomials of a constant term 1 by Horner's rule in fused multiply-adds, over every float32 number there.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from _runner import read_result, write_result

from lightning_opt.cli.verify_exp import verify_exp
from lightning_opt.cpu_kernels.fast_exp import fast_exp, fast_exp2, fma
from lightning_opt.solvers.autonumerics.baselines import minimax_polynomial
from lightning_opt.solvers.autonumerics.problem import Problem

REDUCED = {"exp2": (0.5, math.log(2), fast_exp2, 6), "exp": (math.log(2) / 2, 1.0, fast_exp, 6)}
"""Half the range, the factor in the exponent, the kernels' function, and the operations of its program."""


def main() -> None:
    """Verify, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--implementation", nargs="+", choices=("poly", "native"), default=["poly", "native"])
    options = parser.parse_args()
    rows = read_result("exp_ulp").get("rows", {})
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for implementation in options.implementation:
            for function in ("exp2", "exp"):
                name = f"{device} {implementation} {function}"
                start = time.perf_counter()
                errors = verify_exp(function, implementation, device, threads=options.threads, progress=name)
                seconds = time.perf_counter() - start
                rows[name] = {
                    "largest_ulp": errors.largest,
                    "at_input": errors.where,
                    "at_least_1_ulp": errors.at_least_one,
                    "inputs": errors.inputs,
                    "seconds": round(seconds, 1),
                }
                print(f"{name:20}{errors.largest:9.4f} ULP{errors.at_least_one:14,} >= 1 ULP{seconds:8.0f} s")
    programs = {f"{function}, {name}": row for function in REDUCED for name, row in reduced(function).items()}
    for name, row in programs.items():
        print(f"{name:40}{row['operations']:3} operations{row['largest_ulp']:9.4f} ULP{row['at_least_1_ulp']:14,}")
    print(write_result("exp_ulp", {"target_ulp": 1.0, "rows": rows, "programs": programs}))


def reduced(function: str) -> dict[str, dict[str, Any]]:
    """The kernels' program and polynomials on the reduced range."""
    half, factor, ours, operations = REDUCED[function]
    problem = Problem(function, (-half, half))
    rows = {"evolved": {"operations": operations, **largest(ours, half, factor)}}
    for degree in (5, 6, 7):
        numerator = minimax_polynomial(problem, degree, constant=1.0).numerator
        rows[f"minimax, degree {degree}"] = {"operations": degree, **largest(horner(numerator), half, factor)}
    return rows


def horner(coefficients: tuple[float, ...]) -> Callable[[Any], Any]:
    """A polynomial, constant first, as one fused multiply-add a degree."""
    c = np.array(coefficients, dtype=np.float32)

    @numba.njit
    def polynomial(r):
        p = c[-1]
        for k in range(len(c) - 2, -1, -1):
            p = fma(p, r, c[k])
        return p

    return polynomial


def largest(function: Callable[[Any], Any], half: float, factor: float) -> dict[str, Any]:
    """The largest error from -half to half; below 2^-27 the result is 1 within half a unit of a constant term 1."""

    @numba.njit
    def run(first, last):
        worst, beyond = 0.0, 0
        for bits in range(first, last + 1):
            for sign in (0, 1):
                r = np.uint32(bits | (sign << 31)).view(np.float32)
                true = math.exp(factor * np.float64(r))
                unit = 2.0**-23 if true >= 1 else 2.0**-24
                error = abs(np.float64(function(r)) - true) / unit
                worst = max(worst, error)
                beyond += error >= 1
        return worst, beyond

    first, last = (int(np.float32(v).view(np.uint32)) for v in (2.0**-27, half))
    worst, beyond = run(first, last)
    return {"largest_ulp": worst, "at_least_1_ulp": beyond, "inputs": 2 * (last - first + 1)}


if __name__ == "__main__":
    main()
