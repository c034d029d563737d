"""The errors of the kernels' float32 exponentials over every float32 number, beside the device's own.

Run with ``python benchmarks/exp_ulp.py``; writes ``benchmarks/results/exp_ulp.json``. Minutes on two cores;
``lightning-opt verify-exp`` is the same without the file.
"""

import argparse
import os
import time

import torch
from _runner import write_result

from lightning_opt.cli.verify_exp import verify_exp


def main() -> None:
    """Verify, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    rows = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for implementation in ("poly", "native"):
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
    print(write_result("exp_ulp", {"target_ulp": 1.0, "rows": rows}))


if __name__ == "__main__":
    main()
