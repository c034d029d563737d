"""Seconds that importing the package adds to importing torch and lightning, in fresh processes.

Run with ``python benchmarks/import_time.py``; writes ``benchmarks/results/import_time.json``.
"""

import statistics
import subprocess
import sys

from _runner import machine_record, write_result

STATEMENTS = {
    "import lightning_opt": "import lightning_opt",
    "the optimizers": "from lightning_opt.optim import AdaBelief, DiffGrad, ExponentiatedSGD, Lion",
    "the callbacks": "from lightning_opt.callbacks import DaleLawMonitor, OptimizerMonitor, ResumeState, RunReport",
}
PROGRAM = """
import time, torch, lightning.pytorch
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
"""


def seconds(statement: str, repeats: int) -> list[float]:
    """Time one statement in ``repeats`` fresh processes; the first fills the file cache and does not count."""
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(repeats + 1)]
    return [float(run) for run in runs[1:]]


def main() -> None:
    """Measure, print a table, write the result."""
    rows = {}
    for name, statement in STATEMENTS.items():
        times = seconds(statement, repeats=7)
        rows[name] = {"statement": statement, "median_s": statistics.median(times), "all_s": times}
        print(f"{name:24} {1e3 * rows[name]['median_s']:7.1f} ms")
    write_result("import_time", {"machine": machine_record(), "rows": rows})


if __name__ == "__main__":
    main()
