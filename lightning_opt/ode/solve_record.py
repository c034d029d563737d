"""What a block remembers of its last solve, and how it counts evaluations."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from .embedded_step import EmbeddedStep


@dataclasses.dataclass
class SolveRecord:
    """One solve, as :attr:`NeuralODE.last_solve` keeps it.

    Attributes:
        t0: Where it began.
        t1: Where it ended.
        t: Starts of the accepted steps.
        dt: Their sizes, negative where time decreases. A solver may step beyond ``t1`` and interpolate.
        states: The states at these starts; empty in evaluation and without gradients. Detached, unless the block is
            told to ``keep_graph``.
        steps: With ``keep_graph``: the accepted steps with their graph, where the solver has them.
        accepted: Number of accepted steps.
        rejected: Number of rejected steps.
        nfe_forward: Evaluations of the dynamics in the solve.
        nfe_backward: Evaluations in the backward pass of an adjoint; grows while that runs.
    """

    t0: float
    t1: float
    t: list[float] = dataclasses.field(default_factory=list)
    dt: list[float] = dataclasses.field(default_factory=list)
    states: list[Tensor] = dataclasses.field(default_factory=list)
    steps: list[EmbeddedStep] = dataclasses.field(default_factory=list)
    rejected: int = 0
    nfe_forward: int = 0
    nfe_backward: int = 0

    @property
    def accepted(self) -> int:
        """Number of accepted steps."""
        return len(self.t)

    def forget_states(self) -> None:
        """Let go of the states and the graph; the numbers stay."""
        self.states, self.steps = [], []


class Counted(nn.Module):
    """The dynamics of one solve, counting evaluations into its record.

    Args:
        func: The dynamics.
        record: Of the solve.
    """

    def __init__(self, func: nn.Module, record: SolveRecord) -> None:
        super().__init__()
        self.func = func
        self.record = record
        self.backward_pass = False

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The derivative of the state."""
        if self.backward_pass:
            self.record.nfe_backward += 1
        else:
            self.record.nfe_forward += 1
        return self.func(t, y)


def kept(state: Tensor, keep_graph: bool) -> Any:
    """A state as a record keeps it."""
    return state if keep_graph else state.detach()
