"""What a solve of torchsde shows of itself to the two things it is given: the equation and the Brownian motion.

torchsde's adaptive loop returns the states and nothing else. But a step of any of its solvers asks for one increment
of the Brownian motion, and the adaptive loop asks for three an attempt: over the step, and over its two halves. So the
times asked for tell each attempt, and the next attempt tells whether the one before was accepted: it starts at its
end, not at its start. The state at the start of a step is that of the drift's first evaluation in it.
"""

import dataclasses
from collections import deque
from typing import Any

import torch
import torchsde
from torch import Tensor, nn

from .solve_error import SolveError
from .solve_record import SolveRecord, kept


@dataclasses.dataclass
class SDESolveRecord(SolveRecord):
    """One solve, as :attr:`NeuralSDE.last_solve` keeps it: ``nfe_forward`` and ``nfe_backward`` count the drift.

    Attributes:
        diffusion_forward: Evaluations of the diffusion in the solve.
        diffusion_backward: Evaluations in the backward pass of the stochastic adjoint; grows while that runs.
    """

    diffusion_forward: int = 0
    diffusion_backward: int = 0


@dataclasses.dataclass
class Attempt:
    """A step that a solver tries."""

    start: float
    end: float
    state: Tensor | None = None


class Trace:
    """Follows one solve, forward and in the stochastic adjoint, into its record.

    Args:
        record: Of the solve.
        adaptive: Whether the solver takes three steps an attempt, forward and backward.
        keep_states: Whether the states at the starts are wanted.
        keep_graph: Whether they are wanted with their graph.
        max_steps: Attempts, in either direction.
        reversible: Whether the solver is the reversible Heun method, whose drift is evaluated at the end of a step, at
            an auxiliary state beside the solution.
    """

    def __init__(
        self,
        record: SDESolveRecord,
        *,
        adaptive: bool,
        keep_states: bool,
        keep_graph: bool,
        max_steps: int,
        reversible: bool,
    ) -> None:
        self.record = record
        self.parts = 3 if adaptive else 1
        self.keep_states, self.keep_graph = keep_states, keep_graph
        self.max_steps, self.reversible = max_steps, reversible
        self.backward = False
        self.segment_end = record.t1
        self._asked = 0
        self._current: Attempt | None = None
        self._last_drift: tuple[float, Tensor] | None = None

    def increment_asked(self, start: float, end: float) -> None:
        """The solver takes a step from ``start`` to ``end``."""
        first = self._asked % self.parts == 0
        self._asked += 1
        if start == end and not (self.backward or self._at_segment_end()):
            raise SolveError.too_small(self.record)
        if self._asked > self.parts * self.max_steps:
            if self.backward:
                raise SolveError(
                    f"the stochastic adjoint of the solve from {self.record.t0} to {self.record.t1} took"
                    f" {self.max_steps} steps and went back to t = {end:.6g}: raise max_steps or the tolerances, or"
                    " regularize the dynamics"
                )
            raise SolveError.too_many(self.record, self.max_steps)
        if self.backward or not first:
            return
        if self._current is not None and start == self._current.start:
            self.record.rejected += 1
            self._current = Attempt(start, end, self._current.state)
        else:
            self.segment_done()
            self._current = Attempt(start, end)
        if self.reversible and self._last_drift is not None and self._last_drift[0] == start:
            self._current.state = self._last_drift[1]

    def _at_segment_end(self) -> bool:
        """Whether the attempt is what rounding left of the segment: its halves may then be of no length."""
        return self._current is not None and self._asked % self.parts != 1 and self._current.end == self.segment_end

    def drift_asked(self, t: float, y: Tensor) -> None:
        """The solver asks for the drift."""
        if not self.keep_states or self.backward:
            return
        y = kept(y, self.keep_graph)
        self._last_drift = (t, y)
        current = self._current
        if current is not None and current.state is None and t == current.start and not self.reversible:
            current.state = y

    def segment_done(self) -> None:
        """The last attempt reached its end, so that it was accepted."""
        if self._current is not None:
            self.record.t.append(self._current.start)
            self.record.dt.append(self._current.end - self._current.start)
            if self._current.state is not None:
                self.record.states.append(self._current.state)
            self._current = None

    def forward_done(self) -> None:
        """What comes now is the stochastic adjoint's."""
        self._last_drift = None
        self.backward, self._asked = True, 0

    def count(self, name: str) -> None:
        """One evaluation of ``"drift"`` or ``"diffusion"``."""
        field = {"drift": "nfe", "diffusion": "diffusion"}[name] + ("_backward" if self.backward else "_forward")
        setattr(self.record, field, getattr(self.record, field) + 1)


class TracedSDE:
    """The equation as torchsde takes it; counts its evaluations and makes none twice.

    torchsde's step doubling asks for drift and diffusion at the start of an attempt twice and before a solve once
    more, and its stochastic Runge-Kutta step asks for every stage again and again: always with the same tensor. So an
    answer is given again where the same tensor comes back at the same time.
    """

    def __init__(
        self, drift: nn.Module, diffusion: nn.Module, noise_type: str, sde_type: str, trace: Trace | None = None
    ) -> None:
        self.noise_type, self.sde_type = noise_type, sde_type
        self.trace = trace
        self._parts = {"drift": drift, "diffusion": diffusion}
        self._recent: dict[str, deque[tuple[Tensor, float, bool, Tensor]]] = {
            name: deque(maxlen=_RECENT) for name in self._parts
        }

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """The drift."""
        if self.trace is not None:
            self.trace.drift_asked(float(t), y)
        return self._evaluate("drift", t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """The diffusion."""
        return self._evaluate("diffusion", t, y)

    def forget(self) -> None:
        """Let go of the answers, which hold graphs."""
        for recent in self._recent.values():
            recent.clear()

    def _evaluate(self, name: str, t: Tensor, y: Tensor) -> Tensor:
        time, graph = float(t), torch.is_grad_enabled()
        for state, when, with_graph, answer in self._recent[name]:
            if state is y and when == time and with_graph == graph:
                return answer
        answer = self._parts[name](t, y).to(y.dtype)
        if self.trace is not None:
            self.trace.count(name)
        if self.trace is None or not self.trace.backward:
            self._recent[name].appendleft((y, time, graph, answer))
        return answer


class TracedNoise(torchsde.BaseBrownian):
    """A Brownian motion that tells a trace what it is asked."""

    def __init__(self, noise: Any, trace: Trace) -> None:
        self._noise, self._trace = noise, trace

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        self._trace.increment_asked(float(ta), float(tb))
        wanted = {"return_U": return_U, "return_A": return_A}
        return self._noise(ta, tb, **{name: True for name, value in wanted.items() if value})

    def __repr__(self) -> str:
        return f"TracedNoise({self._noise!r})"

    dtype = property(lambda self: self._noise.dtype)
    device = property(lambda self: self._noise.device)
    shape = property(lambda self: self._noise.shape)
    levy_area_approximation = property(lambda self: self._noise.levy_area_approximation)


_RECENT = 24  # twice what an attempt of srk evaluates: a rejected one gives its start to the next
