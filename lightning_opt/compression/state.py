"""Error feedback: what one rank remembers of each parameter, what it sends, and what it makes of what all have sent.

Compressing gradients loses something at every step, and what is lost must come back later. The methods differ in two
things only: whether a rank compresses the difference to a running estimate of its gradient, and whether it keeps the
error that compression made.

    method       message of rank i             kept                             averaged gradient
    naive        C(g)                          nothing                          mean C(g)
    ef14         C(g + e)                      e += g - message                 mean message
    ef21         C(g - h)                      h += message                     H += mean message
    econtrol     C(g - h + eta e)              e += g - h - message, then h     H += mean message

Here h is the estimate of the rank, H the mean of all estimates, which every rank holds, and e the error.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from .compressor import Backend, Compressor, Draw, from_words, to_words, words_for

Algorithm = Literal["naive", "ef14", "ef21", "econtrol"]
Init = Literal["dense", "compressed", "zeros"]
ErrorDtype = Literal["float32", "bfloat16"]


class _Method(NamedTuple):
    estimate: bool  # whether it keeps h and H
    error: bool  # whether it keeps e


_METHODS: dict[str, _Method] = {
    "naive": _Method(False, False),
    "ef14": _Method(False, True),
    "ef21": _Method(True, False),
    "econtrol": _Method(True, True),
}


class Memory:
    """What a rank remembers of one parameter, flat; what its method does not keep is None.

    Attributes:
        estimate: h, the estimate of this rank's gradient.
        mean_estimate: H, the mean of the estimates of all ranks; bit for bit the same on each.
        error: e, what compression has kept back.
        average: v, the moving average of this rank's gradients.
    """

    LOCAL = ("estimate", "error", "average")

    def __init__(self) -> None:
        self.estimate: Tensor | None = None
        self.mean_estimate: Tensor | None = None
        self.error: Tensor | None = None
        self.average: Tensor | None = None


@register("tool", summary="Error feedback for compressed gradients: what a rank remembers and sends", log_prefix="comm")
class CompressionState:
    r"""The state of :func:`compressed_allreduce_hook` on one rank, keyed by the names of the parameters.

    It needs no process group: :meth:`encode` makes the message of a tensor, :meth:`decode` the averaged gradient of the
    messages of all ranks, and several states in one process are as many ranks.

    Args:
        algorithm: ``"ef14"`` (arXiv:1901.09847), ``"ef21"`` (arXiv:2106.05203), ``"econtrol"`` (arXiv:2311.05645), or
            ``"naive"``, without any error feedback, for comparison: it may diverge.
        compressor: What makes messages of vectors.
        eta: Of EControl: how much of the error each message carries; by default the compressor's contraction for each
            tensor. 0 is EF21.
        momentum: Average the gradients first, ``v = (1 - momentum) v + momentum g`` (EF21-SGDM, arXiv:2305.15155):
            needed with small batches. None takes each gradient as it is.
        weights: Of the ranks, positive, of sum 1: EF21-W (arXiv:2402.10774) compresses ``g / (n w)`` and weighs the
            messages. By default all ranks weigh the same.
        init: The first estimate: the gradient itself, sent in full once; what is left of it after compression; or zero.
        min_numel: Tensors with fewer elements are sent in full at every step.
        error_dtype: What the error is stored in. ``"bfloat16"`` halves its memory and loses small errors.
        backend: ``"triton"`` computes what is compressed, and the error, of float32 gradients on a CUDA device in one
            pass each. No GPU has timed it yet, so ``"torch"`` is the default.
        rank: Of this process.
        world_size: How many ranks there are.

    Attributes:
        step: How many steps were made.
        skipped: How often some rank had a gradient in a bucket that was not finite; nothing changed then.
        process_group: Where the hook communicates; None is the world.
        loss_scale: Called for the factor that the gradients carry, which is taken out of what is remembered, and put
            back. None without one.
        measure: Let the hook note the norms of gradients and errors for :meth:`metrics`; three passes over them.

    Raises:
        ValueError: If a value is out of range, or ``eta`` is None and the compressor has no known contraction.

    Cost:
        In memory two copies of the gradient a rank for EF21 (h, H), three for EControl, one for EF14, one more with
        momentum. On the wire ``(n - 1)`` messages a step are sent by each of n ranks.

    Example:
        >>> import torch
        >>> from lightning_opt.compression import CompressionState, TopK
        >>> ranks = [CompressionState("ef14", TopK(k=1), min_numel=1, rank=i, world_size=2) for i in range(2)]
        >>> gradients = [torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0])]
        >>> words = torch.stack([state.encode("w", g) for state, g in zip(ranks, gradients)])
        >>> [state.decode("w", g, words).tolist() for state, g in zip(ranks, gradients)]
        [[1.5, 1.0], [1.5, 1.0]]
        >>> ranks[0].memory["w"].error
        tensor([0., 1.])
    """

    def __init__(
        self,
        algorithm: Algorithm,
        compressor: Compressor,
        *,
        eta: float | None = None,
        momentum: float | None = None,
        weights: Sequence[float] | None = None,
        init: Init = "dense",
        min_numel: int = 256,
        error_dtype: ErrorDtype = "float32",
        backend: Backend = "torch",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_choice("algorithm", algorithm, _METHODS)
        if not isinstance(compressor, Compressor):
            raise ValueError(f"compressor must be a Compressor such as TopK(ratio=0.01), got {compressor!r}")
        check_eta(algorithm, compressor, eta)
        if momentum is not None:
            check_interval("momentum", momentum, 0, 1, closed="(]")
        check_choice("init", init, ["dense", "compressed", "zeros"])
        check_interval("min_numel", min_numel, 0)
        check_choice("error_dtype", error_dtype, ["float32", "bfloat16"])
        check_choice("backend", backend, ["torch", "triton"])
        check_interval("world_size", world_size, 1)
        check_interval("rank", rank, 0, world_size - 1)
        self.algorithm, self.compressor, self.eta, self.momentum = algorithm, compressor, eta, momentum
        self.init, self.error_dtype, self.backend = init, error_dtype, backend
        self.min_numel = max(min_numel, 1)  # of nothing, nothing is compressed
        self.rank, self.world_size = rank, world_size
        self.method = _METHODS[algorithm]
        self.weights: list[float] | None = None
        self.set_weights(weights)
        self.memory: dict[str, Memory] = {}
        self.step = 0
        self.skipped = torch.zeros((), dtype=torch.int64)
        self.names: dict[int, str] = {}
        self.process_group: Any = None
        self.loss_scale: Callable[[], Tensor] | None = None
        self.measure = False
        self._norms: dict[str, Tensor] = {}
        self._bytes = [0, 0]  # of the step under way: sent, and what dense gradients would take
        self._bytes_per_step = (0, 0)
        self._lock = threading.Lock()  # messages of several buckets may arrive at once, each in a thread

    def __repr__(self) -> str:
        return f"CompressionState({self.algorithm!r}, {self.compressor!r}, rank={self.rank}/{self.world_size})"

    def name_parameters(self, module: nn.Module) -> None:
        """Learn the names under which the parameters of a module are remembered.

        Args:
            module: Not the DDP wrapper, whose names begin with ``module.``.
        """
        self.names = {id(p): name for name, p in module.named_parameters()}

    def set_weights(self, weights: Sequence[float] | None) -> None:
        """Weigh the ranks, from the next step on.

        Raises:
            ValueError: If there is not one positive weight a rank, or their sum is not 1.
        """
        if weights is not None:
            check_weights(weights, self.world_size)
        self.weights = None if weights is None else [float(w) for w in weights]

    # --- one tensor of one step ------------------------------------------------------------------------------------

    def average(self, name: str, gradient: Tensor) -> Tensor:
        """What is compressed in the place of the gradient: with momentum its moving average, not stored yet."""
        memory = self.memory.get(name)
        if self.momentum is None or memory is None or memory.average is None:
            return gradient
        return torch.lerp(memory.average, gradient, self.momentum)

    def encode(self, name: str, gradient: Tensor) -> Tensor:
        """The message of this rank. Changes nothing.

        Args:
            name: Of the parameter.
            gradient: Flat, float32 or float64; with momentum what :meth:`average` returned.

        Returns:
            32-bit words, as many as :meth:`nwords` says.
        """
        if self._in_full(name, gradient.numel()):
            return to_words(gradient)
        return self.compressor.compress(self._difference(name, gradient), Draw(self.step, name, self.rank))

    def decode(
        self, name: str, gradient: Tensor, words: Tensor, finite: Tensor | None = None, step: int | None = None
    ) -> Tensor:
        """The averaged gradient, the same on every rank; updates what is remembered.

        Args:
            name: Of the parameter.
            gradient: As it was given to :meth:`encode`.
            words: (ranks, words): the messages of all ranks.
            finite: 0-dim, bool: whether all gradients are finite. If not, the words are all zero and nothing changes.
            step: The value of ``step`` at the time of :meth:`encode`, if it has changed.

        Returns:
            Flat; do not write to it.
        """
        memory = self.memory.get(name)
        if memory is None and finite is not None and not bool(finite):  # waits for the device, before the first step
            return torch.zeros_like(gradient)
        if self._in_full(name, gradient.numel()):
            mean = torch.zeros_like(gradient)
            for row in words:
                mean.add_(from_words(row, gradient.dtype, gradient.numel()), alpha=1 / self.world_size)
            if memory is None:
                self._remember(name, gradient, mean)
        else:
            first = memory is None
            memory = self._remember(name, gradient, None) if memory is None else memory
            draws = [Draw(self.step if step is None else step, name, rank) for rank in range(self.world_size)]
            own = words[self.rank], draws[self.rank]
            if memory.error is not None and not (first and self.init == "compressed"):
                self._add_residual(memory, memory.error, gradient, finite)
                self._add(memory.error, -1.0, *own)
            if memory.estimate is not None:
                self._add(memory.estimate, 1.0, *own)
            mean = torch.zeros_like(gradient) if memory.mean_estimate is None else memory.mean_estimate
            shares = self.weights or [1 / self.world_size] * self.world_size
            self.compressor.add_all_(mean, words, shares, draws)
        if memory is not None and self.momentum is not None:
            if memory.average is None:  # the checkpoint was written without momentum
                memory.average = gradient.clone()
            memory.average.copy_(gradient if finite is None else torch.where(finite, gradient, memory.average))
        return mean

    def nwords(self, name: str, numel: int, dtype: torch.dtype = torch.float32) -> int:
        """How many words the next message about a tensor has."""
        if self._in_full(name, numel):
            return words_for(numel, dtype)
        return self.compressor.nwords(numel, dtype)

    def tensor_eta(self, numel: int) -> float:
        """How much of the error a message of so many elements carries."""
        if self.algorithm != "econtrol":
            return 1.0
        delta = self.eta if self.eta is not None else self.compressor.delta(numel)
        assert delta is not None  # refused before
        return delta

    def _in_full(self, name: str, numel: int) -> bool:
        if numel < self.min_numel:
            return True
        return self.method.estimate and self.init == "dense" and name not in self.memory

    def _difference(self, name: str, gradient: Tensor) -> Tensor:
        """What is compressed."""
        memory = self.memory.get(name)
        if memory is None:
            return self._weighted(gradient)
        if memory.error is None:
            return self._residual(memory, gradient)
        eta = self.tensor_eta(gradient.numel())
        if self._fused(memory, gradient):
            return self._fused_pass(memory, gradient, torch.empty_like(gradient), eta, True)
        return self._residual(memory, gradient).add(memory.error, alpha=eta)

    def _add_residual(self, memory: Memory, error: Tensor, gradient: Tensor, finite: Tensor | None) -> None:
        """To the error, unless something is not finite."""
        if self._fused(memory, gradient):
            self._fused_pass(memory, gradient, error, 1.0 if finite is None else finite.float().reshape(1), False)
        else:
            residual = self._residual(memory, gradient)
            error.add_(residual if finite is None else torch.where(finite, residual, 0))

    def _fused(self, memory: Memory, gradient: Tensor) -> bool:
        tensors = gradient, memory.estimate, memory.error
        return self.backend == "triton" and all(t is not None and t.dtype == torch.float32 for t in tensors)

    def _fused_pass(
        self, memory: Memory, gradient: Tensor, out: Tensor, coefficient: float | Tensor, message: bool
    ) -> Tensor:
        from lightning_opt.triton_kernels import launch_map  # needs the extra

        assert memory.estimate is not None
        assert memory.error is not None
        inputs = {"gradient": self._weighted(gradient), "estimate": memory.estimate, "error": memory.error}
        launch_map("error_update", inputs, [out], {"coefficient": coefficient}, flags={"message": message})
        return out

    def _residual(self, memory: Memory, gradient: Tensor) -> Tensor:
        gradient = self._weighted(gradient)
        return gradient if memory.estimate is None else gradient - memory.estimate

    def _weighted(self, gradient: Tensor) -> Tensor:
        return gradient if self.weights is None else gradient / (self.world_size * self.weights[self.rank])

    def _add(self, target: Tensor, weight: float, words: Tensor, draw: Draw) -> None:
        if target.dtype == torch.bfloat16:  # a compressor adds in the precision of the gradient
            target.copy_(self.compressor.add_(target.float(), words, weight, draw))
        else:
            self.compressor.add_(target, words, weight, draw)

    def _remember(self, name: str, gradient: Tensor, mean: Tensor | None) -> Memory:
        """Begin to remember a parameter; ``mean`` is that of the gradients, where they were sent in full."""
        memory = self.memory[name] = Memory()
        small = gradient.numel() < self.min_numel
        if self.method.estimate and not small:
            memory.estimate = torch.zeros_like(gradient) if mean is None else self._weighted(gradient).clone()
            memory.mean_estimate = torch.zeros_like(gradient) if mean is None else mean.clone()
        if self.method.error and not small:
            low = self.error_dtype == "bfloat16"
            memory.error = torch.zeros_like(gradient, dtype=torch.bfloat16 if low else gradient.dtype)
        if self.momentum is not None:
            memory.average = gradient.clone()
        return memory

    # --- counts ----------------------------------------------------------------------------------------------------

    def count(self, sent: int, dense: int, last: bool) -> None:
        """Count the bytes of one bucket: of the message, and of the gradients; ``last`` is that of a step."""
        others = self.world_size - 1
        self._bytes[0] += sent * others  # each rank hands on each message but one, however gathering goes about it
        self._bytes[1] += dense * 2 * others // self.world_size  # of a ring
        if last:
            self._bytes_per_step, self._bytes = (self._bytes[0], self._bytes[1]), [0, 0]
            self.step += 1

    def observe(self, name: str, gradient: Tensor) -> None:
        """Note the norms of one tensor, behind :meth:`decode`, if ``measure`` is set."""
        memory = self.memory.get(name)
        if self.measure and memory is not None:
            gradient = self._weighted(gradient)
            gap = torch.zeros_like(gradient) if memory.estimate is None else gradient - memory.estimate
            error = torch.zeros_like(gradient) if memory.error is None else memory.error.to(gradient.dtype)
            norms = torch.stack([torch.linalg.vector_norm(x) for x in (gradient, gap, error)])
            with self._lock:
                self._norms[name] = norms

    def skip(self, finite: Tensor) -> None:
        """Count a bucket, unless it is finite."""
        with self._lock:
            self.skipped = self.skipped.to(finite.device) + ~finite

    def metrics(self) -> dict[str, Tensor]:
        r"""What to log of the last step, under the prefix ``comm``.

        Returns:
            ``comm/bytes_per_step`` that this rank sent, ``comm/compression_x`` how many times fewer than a ring would
            have sent of dense gradients; where ``measure`` was set, and the method keeps them,
            ``comm/estimate_gap``, which is :math:`\|g - h\| / \|g\|`, and ``comm/error_norm``,
            :math:`\|e\| / \|g\|`; where there were any, ``comm/skipped``.
        """
        sent, dense = self._bytes_per_step
        values = {"comm/bytes_per_step": torch.tensor(float(sent))}
        if sent:
            values["comm/compression_x"] = torch.tensor(dense / sent)
        with self._lock:
            norms, self._norms = self._norms, {}
        if norms:
            # in the order of the names, which does not change: buckets come in another order after a resume
            rows = torch.stack([norms[name] for name in sorted(norms)])
            gradient, gap, error = torch.linalg.vector_norm(rows, dim=0)
            if self.method.estimate:
                values["comm/estimate_gap"] = gap / gradient
            if self.method.error:
                values["comm/error_norm"] = error / gradient
        if int(self.skipped):
            values["comm/skipped"] = self.skipped.float()
        return values

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def local_state(self) -> dict[str, dict[str, Tensor]]:
        """What this rank alone knows, by the name of the parameter."""
        return {
            name: {key: value for key in Memory.LOCAL if (value := getattr(memory, key)) is not None}
            for name, memory in self.memory.items()
        }

    def shared_state(self) -> dict[str, Any]:
        """What every rank knows."""
        mean = {name: m.mean_estimate for name, m in self.memory.items() if m.mean_estimate is not None}
        return {
            "algorithm": self.algorithm,
            "world_size": self.world_size,
            "weights": self.weights,
            "step": self.step,
            "skipped": int(self.skipped),
            "mean_estimate": mean,
        }

    def load(self, shared: Mapping[str, Any], local: Mapping[str, Mapping[str, Tensor]], like: Iterable[Any]) -> None:
        """Take back what the two others returned.

        Args:
            shared: Of any rank.
            local: Of this rank, or :func:`mean_local_state`.
            like: (name, parameter), to know the devices; what is remembered of other names is dropped.

        Raises:
            ValueError: If it is the state of another algorithm, or of tensors of another size.
        """
        if shared["algorithm"] != self.algorithm:
            raise ValueError(
                f"the state is one of {shared['algorithm']!r}, which remembers other things than {self.algorithm!r}"
            )
        parameters = dict(like)
        self.memory = {}
        for name, tensors in local.items():
            if name not in parameters:
                continue
            memory = self.memory[name] = Memory()
            everything = dict(tensors)
            if name in shared["mean_estimate"]:
                everything["mean_estimate"] = shared["mean_estimate"][name]
            for key, tensor in everything.items():
                if tensor.numel() != parameters[name].numel():
                    raise ValueError(
                        f"the state of {name} has {tensor.numel()} elements, the parameter {parameters[name].numel()}"
                    )
                setattr(memory, key, tensor.to(parameters[name].device, copy=True))
            lacks = (self.method.estimate and memory.estimate is None) or (self.method.error and memory.error is None)
            if lacks and parameters[name].numel() >= self.min_numel:  # it was below min_numel, and begins now
                del self.memory[name]
        self.step = shared["step"]
        self.skipped = torch.tensor(shared["skipped"])
        if shared["world_size"] == self.world_size:  # H is the mean by the weights that it was made with
            self.set_weights(shared["weights"])


def mean_local_state(
    shared: Mapping[str, Any], ranks: Sequence[Mapping[str, Mapping[str, Tensor]]]
) -> dict[str, dict[str, Tensor]]:
    """What each rank of another number of ranks begins with: the mean estimate, and the means of all else.

    The mean of the estimates stays H, and the error that is due stays the same on average.
    """
    mean: dict[str, dict[str, Tensor]] = {}
    for name, tensors in ranks[0].items():
        mean[name] = {
            key: torch.stack([rank[name][key].double() for rank in ranks]).mean(0).to(value.dtype)
            for key, value in tensors.items()
        }
        if "estimate" in mean[name]:
            mean[name]["estimate"] = shared["mean_estimate"][name]
    return mean


def check_eta(algorithm: str, compressor: Compressor, eta: float | None) -> None:
    """Refuse an eta that EControl cannot use.

    Raises:
        ValueError: If it is not in [0, 1], or None for a compressor without known contraction.
    """
    if eta is not None:
        check_interval("eta", eta, 0, 1)
    elif algorithm == "econtrol" and compressor.delta(2**20) is None:
        raise ValueError(
            f"eta=None takes the contraction of the compressor, and that of {compressor!r} is not known for every"
            " vector; give eta in [0, 1]"
        )


def check_weights(weights: Sequence[float], world_size: int) -> None:
    """Refuse what is not one positive weight a rank, of sum 1.

    Raises:
        ValueError: Then.
    """
    if len(weights) != world_size:
        raise ValueError(f"weights must have one value for each of {world_size} ranks, got {len(weights)}")
    for weight in weights:
        check_interval("weights", weight, 0, closed="()")
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights must sum to 1, got {sum(weights)}")
