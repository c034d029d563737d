"""The communication hook: one message a bucket, made of those of its parameters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_opt.registry import register

from .state import CompressionState


@register("tool", summary="DDP communication hook that averages compressed gradients")
def compressed_allreduce_hook(state: CompressionState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average the gradients of a bucket over the ranks by compressed messages.

    Each rank sends one tensor of 32-bit words a bucket: whether its gradients are finite, and behind it the message of
    every parameter. All ranks add the messages up in the order of ranks, so that they have the same gradients bit for
    bit. If any rank has a gradient that is not finite, no state changes and the averaged gradient is NaN everywhere.

    Register it with ``ddp_model.register_comm_hook(state, compressed_allreduce_hook)`` after
    ``state.name_parameters(model)``. Buckets may be rearranged at any time, for nothing depends on them.

    Args:
        state: Of this rank.
        bucket: From DistributedDataParallel.

    Returns:
        A future of the bucket's buffer with averaged gradients.

    Raises:
        TypeError: If it is called by anything but DistributedDataParallel, such as FSDP.
        ValueError: If a gradient is sparse or complex, or a parameter has no name.

    Cost: see :class:`CompressionState`. Compression runs in the backward pass; decompression when messages arrive.
    """
    if not isinstance(bucket, dist.GradBucket):
        raise TypeError(
            "compressed_allreduce_hook works on the buckets of DistributedDataParallel, and was called with"
            f" {type(bucket).__name__}; FSDP and others shard the gradients, so that no rank has its own whole gradient"
        )
    buffer = bucket.buffer()
    if buffer.is_sparse or buffer.is_complex():
        kind = "sparse" if buffer.is_sparse else "complex"
        raise ValueError(
            f"gradients must be dense and real to be compressed, and those of {_names(state, bucket)} are {kind}"
        )
    names = _names(state, bucket)
    sizes = [gradient.numel() for gradient in bucket.gradients()]
    step = state.step
    with torch.no_grad():
        scale = state.loss_scale() if state.loss_scale is not None else None
        flat = buffer.to(torch.float64 if buffer.dtype == torch.float64 else torch.float32)
        flat = flat if scale is None else flat / scale
        gradients = [state.average(*pair) for pair in zip(names, flat.split(sizes), strict=True)]
        finite = torch.linalg.vector_norm(flat, torch.inf).isfinite()
        messages = [state.encode(*pair) for pair in zip(names, gradients, strict=True)]
        payload = torch.cat([finite.to(torch.int32).reshape(1), *messages])
        gathered = payload.new_empty(state.world_size * len(payload))
    lengths = [len(message) for message in messages]
    state.count(len(payload) * 4, buffer.numel() * buffer.element_size(), bucket.is_last())

    def finish(future: torch.futures.Future[Any]) -> Tensor:
        future.value()  # raises if the communication failed
        with torch.no_grad():
            if gathered.is_cuda:  # this runs on a stream of its own, and the memory belongs to another
                for tensor in (gathered, flat, *gradients):
                    tensor.record_stream(torch.cuda.current_stream())
            rows = gathered.view(state.world_size, -1)
            finite = rows[:, 0].amin() > 0
            rows, factor = rows[:, 1:], scale
            unless: Tensor | None = None
            if not finite.is_cpu or not bool(finite):  # a device is not asked, which would be waiting for it
                unless = finite
                rows = rows * finite.to(torch.int32)  # a message of zeros says nothing, and NaN is gone
                factor = torch.where(finite, 1.0 if scale is None else scale, torch.nan)
                state.skip(finite)
            for name, gradient, words, out in zip(
                names, gradients, rows.split(lengths, 1), buffer.split(sizes), strict=True
            ):
                mean = state.decode(name, gradient, words, unless, step)
                state.observe(name, gradient)
                out.copy_(mean if factor is None else mean * factor)
        return buffer

    work = _all_gather(gathered, payload, group=state.process_group, async_op=True)
    assert work is not None
    return work.get_future().then(finish)


# torch 2.13 gave it a new name, and deprecates the old one
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _names(state: CompressionState, bucket: dist.GradBucket) -> list[str]:
    names = [state.names.get(id(parameter)) for parameter in bucket.parameters()]
    if None in names:
        raise ValueError("a parameter has no name: call state.name_parameters(model) before the first backward pass")
    return names  # type: ignore[return-value]
