from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class GroupGradients:
    r"""Mean gradients of groups of samples, as differences of ``p.grad`` between backward passes.

    The gradients of a window add up in ``p.grad``, each part divided by its divisor; the difference between two
    moments, multiplied by what the parts weigh, is the mean gradient :math:`h_j` of the samples between them. Only the
    sums that the variance needs are kept: :math:`\sum n_j \lVert h_j \rVert^2`, and the gradients themselves where a
    test asks for their inner products with the mean, which is known in the end only.

    Args:
        parameters: Those that are trained.
        parts: Backward passes of the window on this rank.
        groups: Into how many groups they are put together, evenly; at most ``parts``.
        keep: Keep every group's gradient.
        coordinates: Sum the squares of each coordinate.

    Cost:
        A copy of the gradients, ``groups`` more with ``keep``, one more with ``coordinates``; three passes over them a
        group.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], parts: int, groups: int, *, keep: bool, coordinates: bool
    ) -> None:
        self.parameters = list(parameters)
        self.parts, self.groups = parts, min(groups, parts)
        self.keep, self.coordinates = keep, coordinates
        self.done = 0  # parts
        self.found = 0  # groups
        self.sum_sq: Tensor = torch.zeros((), dtype=torch.float64)
        self.kept: list[list[Tensor]] = []
        self.kept_samples: list[int] = []
        self.squares: list[Tensor] = []
        self._before: list[Tensor] = []  # p.grad when the last group ended; empty before the first
        self._samples, self._weight = 0, 0.0  # of the group under way

    @contextmanager
    def backward(self, samples: int, divisor: float, *, communicates: bool) -> Iterator[None]:
        """Around one backward pass.

        Args:
            samples: It is the mean over so many.
            divisor: Of its loss.
            communicates: Ranks average their gradients in this pass; then this rank's own are read parameter by
                parameter, just before.
        """
        self._samples += samples
        self._weight += 1 / divisor
        ends = (self.done + 1) * self.groups // self.parts > self.done * self.groups // self.parts
        if communicates and ends:
            slots = {id(p): i for i, p in enumerate(self.parameters)}
            self._begin_group()
            hooks = [
                p.register_post_accumulate_grad_hook(lambda p: self._take([slots[id(p)]]))  # type: ignore[arg-type]
                for p in self.parameters
            ]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
            self._end_group()
        else:
            yield
            if ends:
                self._begin_group()
                self._take([i for i, p in enumerate(self.parameters) if p.grad is not None])
                self._end_group()
        self.done += 1

    def sums(self, mean: Sequence[Tensor], scale: float) -> Tensor:
        r"""Number of groups, :math:`\sum n_j \lVert h_j \rVert^2` and :math:`\sum n_j \langle h_j, \bar g \rangle^2`.

        Args:
            mean: The mean gradient of the whole window, on all ranks, one tensor a parameter.
            scale: What the losses were multiplied by (mixed precision).
        """
        dots = torch.zeros((), dtype=torch.float64, device=self.sum_sq.device)
        for h, n in zip(self.kept, self.kept_samples, strict=True):
            dot = torch.stack([(a.double() * b).sum() for a, b in zip(h, mean, strict=True)]).sum() / scale
            dots = dots + n * dot.square()
        return torch.stack([torch.as_tensor(float(self.found)).to(dots), self.sum_sq / scale**2, dots])

    def sum_of_squares(self, scale: float) -> Tensor:
        r""":math:`\sum n_j h_j^2` by coordinate, flat."""
        return torch.cat([s.reshape(-1) for s in self.squares]) / scale**2

    def state_dict(self) -> dict[str, Any]:
        """Of a window under way."""
        names = ("done", "found", "sum_sq", "kept", "kept_samples", "squares", "_before", "_samples", "_weight")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue the window."""
        for name, value in state.items():
            setattr(self, name, _to(value, device))

    @torch.no_grad()
    def _begin_group(self) -> None:
        if not self._before and not self.found:
            self.sum_sq = self.sum_sq.to(self.parameters[0].device)
            self.squares = [torch.zeros_like(p) for p in self.parameters] if self.coordinates else []
        if self.keep:
            self.kept.append([torch.zeros_like(p) for p in self.parameters])
            self.kept_samples.append(self._samples)

    @torch.no_grad()
    def _take(self, slots: Sequence[int]) -> None:
        """The gradients of the group in these parameters: p.grad less what it was."""
        if not slots:
            return
        grads: list[Tensor] = [self.parameters[i].grad for i in slots]  # type: ignore[misc]
        check_dense(grads)
        difference = grads
        if self._before:
            difference = [self._before[i] for i in slots]
            torch._foreach_sub_(difference, grads)  # minus the gradient of the group, in place
        mean_weight = self._samples / self._weight**2
        norms = torch._foreach_norm(difference, 2, torch.float64)
        self.sum_sq += torch.stack([norm.to(self.sum_sq) for norm in norms]).square_().sum() * mean_weight
        for i, d in zip(slots, difference, strict=True):
            if self.keep:
                torch.mul(d, (-1 if self._before else 1) / self._weight, out=self.kept[-1][i])
            if self.coordinates:
                self.squares[i].addcmul_(d, d, value=mean_weight)
        if self._before:
            torch._foreach_copy_(difference, grads)

    @torch.no_grad()
    def _end_group(self) -> None:
        self.found += 1
        if not self._before and self.found < self.groups:
            self._before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        self._samples, self._weight = 0, 0.0


def check_dense(gradients: Sequence[Tensor]) -> None:
    """Raise RuntimeError if one is sparse."""
    if any(g.layout is not torch.strided for g in gradients):
        raise RuntimeError(
            "AdaptiveBatchSize cannot compare sparse gradients: use sparse=False in the embedding, or eta=inf"
        )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, list):
        return [_to(entry, device) for entry in value]
    return value
