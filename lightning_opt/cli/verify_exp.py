"""``lightning-opt verify-exp``: the float32 exponentials of the kernels, held to the true values over every float32."""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Literal

from lightning_opt.registry import register_command

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_opt.cpu_kernels.exp_errors import ExpErrors, ExpFunction

Implementation = Literal["poly", "native"]
_CHUNK = 1 << 22  # inputs: a tenth of a second of work


@register_command("verify-exp", summary="check the kernels' exponentials on every float32 number, on this machine")
def verify_exp_command(arguments: list[str]) -> int:
    """Run ``lightning-opt verify-exp``.

    Args:
        arguments: The words after ``verify-exp``.

    Returns:
        The exit status: 0 if every polynomial is below one unit in the last place, else 1.

    Raises:
        UserError: If there is no such device.
    """
    import torch

    parser = argparse.ArgumentParser(
        "lightning-opt verify-exp",
        allow_abbrev=False,
        description="Compare the exponentials of the fused kernels with the C library's double-precision functions on"
        " every float32 number, in units in the last place. About two minutes a function on two cores.",
    )
    parser.add_argument("--function", nargs="+", choices=["exp2", "exp"], default=["exp2", "exp"])
    parser.add_argument(
        "--implementation",
        nargs="+",
        choices=["poly", "native"],
        default=["poly"],
        help="poly: the polynomials of lightning_opt.fast_exp; native: the device's own. Default: poly",
    )
    parser.add_argument(
        "--device", nargs="+", choices=["cpu", "cuda"], help="default: cpu, and cuda where there is one"
    )
    parser.add_argument("--stride", type=int, default=1, help="take every so-manieth number only, for a quick look")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    options = parser.parse_args(arguments)
    if options.stride < 1 or options.threads < 1:
        raise UserError(f"--stride and --threads must be 1 or more, got {options.stride} and {options.threads}.")
    devices = options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if "cuda" in devices and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device.")

    failed = False
    print(f"{'':20}{'largest error':>14} ULP{'at input':>18}{'>= 1 ULP':>14}{'inputs':>14}")
    for device, implementation, function in itertools.product(devices, options.implementation, options.function):
        name = f"{device} {implementation} {function}"
        errors = verify_exp(
            function, implementation, device, stride=options.stride, threads=options.threads, progress=name
        )
        failed |= implementation == "poly" and errors.at_least_one > 0
        print(f"{name:20}{errors.largest:14.4f}    {errors.where:18.9g}{errors.at_least_one:14,}{errors.inputs:14,}")
    return int(failed)


def verify_exp(
    function: "ExpFunction",
    implementation: Implementation = "poly",
    device: str = "cpu",
    *,
    stride: int = 1,
    threads: int = 1,
    progress: str | None = None,
) -> "ExpErrors":
    """The errors of an exponential over every ``stride``-th float32 number, in the order of their bit patterns.

    Args:
        function: ``"exp2"`` or ``"exp"``.
        implementation: ``"poly"`` for :mod:`lightning_opt.fast_exp` as the CPU and Triton kernels compute it;
            ``"native"`` for torch's function on the CPU, and Triton's, which is the hardware's, on CUDA.
        device: ``"cpu"`` or ``"cuda"``.
        stride: 1 for all 2**32 numbers.
        threads: How many of them judge.
        progress: Name to show a progress bar under, on stderr; None shows none.

    Example:
        >>> errors = verify_exp("exp", stride=1_000_003)
        >>> errors.inputs, errors.at_least_one
        (4295, 0)
    """
    from tqdm import tqdm

    from lightning_opt.cpu_kernels.exp_errors import ExpErrors, exp_errors

    total = -(-(2**32) // stride)
    values = _values(function, implementation, device)

    def judge(start: int) -> ExpErrors:
        first, count = start * stride, min(_CHUNK, total - start)
        return exp_errors(function, first, count, stride=stride, values=values and values(first, count, stride))

    result = ExpErrors(0, -1.0, 0.0, 0)
    bar = tqdm(total=total, desc=progress, unit="", unit_scale=True, disable=progress is None)
    with bar, ThreadPoolExecutor(threads) as pool:
        try:
            for errors in _completed(pool, judge, range(0, total, _CHUNK), 2 * threads):
                result = result.joined(errors)
                bar.update(errors.inputs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return result


def _values(function: str, implementation: Implementation, device: str) -> "Callable[[int, int, int], Tensor] | None":
    """What computes the results to be judged, or None for those of the judge, the compiled polynomials."""
    import torch

    if device == "cuda":
        from lightning_opt.triton_kernels.exp_values import exp_values

        poly = implementation == "poly"
        return lambda first, count, stride: exp_values(function, first, count, stride=stride, poly=poly).cpu()
    if implementation == "poly":
        return None
    native = getattr(torch, function)
    sign = 1 << 32

    def evaluate(first: int, count: int, stride: int) -> "Tensor":
        patterns = torch.arange(first, first + count * stride, stride)
        return native((patterns - sign * (patterns >= sign // 2)).int().view(torch.float32))

    return evaluate


def _completed(
    pool: ThreadPoolExecutor, function: "Callable[[int], ExpErrors]", arguments: range, ahead: int
) -> "Iterator[ExpErrors]":
    """Results as they come, with few calls in the pool at a time, so that an interruption is answered at once."""
    waiting: set[Future[ExpErrors]] = set()
    for argument in arguments:
        waiting.add(pool.submit(function, argument))
        if len(waiting) >= ahead:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in waiting)
