"""Runs a kernel on several threads: torch's own, which spin for a while after every operation, or else a pool.

A second team of threads would have to share the cores with those that spin: measured on two cores, an AdaBelief step
right after an operation of torch took 1.4 times as long on a pool.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PROCESS = os.getpid()


def run(work: Callable[[int], None], data: int, threads: int) -> None:
    """Call ``work(data)`` at the same time in each of ``threads`` threads, one of them the caller.

    Args:
        work: A C function of an address, which returns nothing.
        data: Its argument.
        threads: Their number.
    """
    if threads < 2:
        work(data)
    elif (parallel := _parallel()) is not None and os.getpid() == _PROCESS:  # OpenMP's threads survive no fork
        parallel(work, data, threads, 0)
    else:
        others = [_pool(os.getpid()).submit(work, data) for _ in range(threads - 1)]
        try:
            work(data)
        finally:  # also when interrupted: they read tables of the caller
            wait(others)
        for other in others:
            other.result()


@cache
def _parallel() -> Callable[..., Any] | None:
    """What a compiler makes of ``#pragma omp parallel``, from the OpenMP runtime that torch has loaded."""
    loaded_only = getattr(os, "RTLD_NOLOAD", None)
    if loaded_only is None:
        return None
    shipped = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    for library in [*map(str, shipped), "libgomp.so.1", "libiomp5.so", "libomp.so"]:
        try:
            function = ctypes.CDLL(library, mode=loaded_only | os.RTLD_LAZY).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process; those of its parent do not survive a fork."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="lightning_opt")
