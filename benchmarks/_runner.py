"""What every benchmark shares: the record of the machine, the result file, and paired timing."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine_record() -> dict[str, Any]:
    """The machine and the versions that a measurement holds for."""
    record: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "lightning", "numba", "triton", "lightning-opt")},
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
    return record


def write_result(name: str, payload: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json``: the payload under the command, the date and the machine.

    Returns:
        The file's path.
    """
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    head = {"command": command, "date": datetime.now(UTC).date().isoformat(), "machine": machine_record()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**head, **payload}, indent=2, allow_nan=False) + "\n")
    return path


def paired_times(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time callables in one process, one call of each a round, so that a disturbance hits all of them alike.

    The order turns by one every round, so that none always runs behind the same neighbor. With CUDA in use, the device
    is synchronized around every call.

    Args:
        functions: Name to callable.
        rounds: Timed calls of each.
        warmup: Untimed calls of each before.
        clock: What is read before and behind a call; ``time.process_time`` where others use the processor.

    Returns:
        For each name the seconds of its calls; entry i of all lists belongs to round i.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    names = list(functions)
    for _ in range(warmup):
        for name in names:
            functions[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            function = functions[name]
            synchronize()
            begin = clock()
            function()
            synchronize()
            times[name].append(clock() - begin)
    return times


def ratio_summary(times: dict[str, list[float]], of: str, beside: str) -> dict[str, float]:
    """The paired ratios ``times[of] / times[beside]``: median, 10% and 90% quantile.

    Example:
        >>> ratio_summary({"a": [2.0, 2.0, 4.0], "b": [1.0, 1.0, 1.0]}, "a", "b")["median"]
        2.0
    """
    ratios = [a / b for a, b in zip(times[of], times[beside], strict=True)]
    deciles = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios * 9
    return {"median": statistics.median(ratios), "q10": deciles[0], "q90": deciles[8]}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
