from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.ode.coefficient import Decay
from lightning_opt.ode.local_error import Norm
from lightning_opt.ode.local_regularization import (
    Estimate,
    Sampling,
    check_adaptive,
    check_dt,
    check_estimate,
    local_term,
    sample_place,
)
from lightning_opt.ode.tableau import find_tableau
from lightning_opt.registry import register

from ._ode_regularizer import ODERegularizer


@register(
    "callback",
    summary="Neural ODEs and SDEs that need fewer function evaluations, by a term at one random time",
    paper="2303.02262",
    card="local-ode-regularization",
    log_prefix="local_reg",
    capabilities=("ode",),
)
class LocalODERegularization(ODERegularizer):
    r"""Adds to the training loss how hard one step of the solver is at a random time (arXiv:2303.02262).

    The dynamics learn to be cheap to integrate: predictions take fewer evaluations of the network. Any solver and any
    adjoint stay as they are, because the term differentiates one Runge-Kutta step from a constant state, and nothing of
    the solve. The step is the one that the solver accepted at that time.

    It finds the blocks of any LightningModule that have the protocol of :class:`lightning_opt.ode.NeuralODE`, and logs

    - ``local_reg/value``: local error (in tolerances) times step size, or stiffness; and ``/coeff``;
    - ``local_reg/nfe_forward``, ``/nfe_backward``: evaluations of the dynamics in the last solve and in its adjoint;
    - ``local_reg/accepted``, ``/rejected``: its steps; ``/time``, ``/dt``: where the term was taken, and its step.

    With several blocks the name of the block follows. A :class:`RunReport` shows evaluations and steps over training.
    With ``coeff=0`` it only watches: gradients are bit for bit those without it.

    In manual optimization the module adds :func:`lightning_opt.callbacks.ode_regularization` to its loss. Under DDP
    every rank draws its own time; in gradient accumulation every micro-batch does, and the terms are averaged as the
    losses are. A term that is not finite is left out, counted in ``local_reg/skipped``, and warned about once.

    BatchNorm in the dynamics sees the step with the statistics of its own states, and keeps none of them. Dropout there
    is refused: it draws a mask at every evaluation, so that there is no equation to solve.

    Args:
        block: The name of a block in the module, a block itself, or None for all blocks.
        coeff: Of the term, at the beginning of training.
        coeff_end: At its end.
        decay: ``"exponential"`` from one to the other; ``"constant"`` stays at ``coeff``.
        estimate: ``"error"``: the local error times the step size; ``"stiffness"``: the stiffness, for which the
            authors take a constant 0.1.
        sampling: ``"unbiased"``: the time is uniform over the time span; ``"biased"``: over the accepted steps, so that
            short steps are seen more often, and the state costs nothing.
        dt: The step: ``"accepted"``, the solver's; ``"initial"``, what a solver would begin with there (as the authors'
            code; at tight tolerances the term then vanishes); or a number.
        tableau: The Runge-Kutta pair of the term; None takes that of the block's method.
        rtol: By which the error is measured; None takes the block's.
        atol: Likewise.
        norm: ``"batch"``: the error of the whole batch, as the solver sees it; ``"sample"``: the mean of the samples'.
        every_n_steps: Add the term in every so many steps, unscaled.
        decay_steps: Optimizer steps over which the coefficient decays; None takes the length of training.
        seed: Of the random times.
        sync_time: Take the same time on all ranks, so that none waits for another's harder step.

    Raises:
        ValueError: If a value is out of its range.
        MisconfigurationException: Before the first step: without such a block; for a solver of fixed steps, which
            accepts none; for an estimate that a block does not have; in manual optimization where the module never
            calls ``ode_regularization``; for a decay over a training of unknown length.

    Cost: a step of 7 evaluations forward and backward, and 7 forward for the state of ``"unbiased"`` sampling. While
        training the states at the accepted steps are kept until the step ends.

    Example:
        >>> LocalODERegularization(coeff=0.1, decay="constant", estimate="stiffness").coeff
        0.1
    """

    prefix = "local_reg"
    _warned: bool

    def __init__(
        self,
        block: str | nn.Module | None = None,
        *,
        coeff: float = 2.5,
        coeff_end: float = 1.0,
        decay: Decay = "exponential",
        estimate: Estimate = "error",
        sampling: Sampling = "unbiased",
        dt: Literal["accepted", "initial"] | float = "accepted",
        tableau: str | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        norm: Norm = "batch",
        every_n_steps: int = 1,
        decay_steps: int | None = None,
        seed: int = 0,
        sync_time: bool = False,
    ) -> None:
        super().__init__(block, coeff, coeff_end, decay, decay_steps, every_n_steps, seed)
        check_choice("estimate", estimate, ("error", "stiffness"))
        check_choice("sampling", sampling, ("unbiased", "biased"))
        check_dt(dt)
        check_choice("norm", norm, ("batch", "sample"))
        for name, tolerance in (("rtol", rtol), ("atol", atol)):
            if tolerance is not None:
                check_interval(name, tolerance, 0, closed="[]" if name == "rtol" else "()")
        self.estimate, self.sampling, self.dt = estimate, sampling, dt
        self.tableau, self.rtol, self.atol, self.norm, self.sync_time = tableau, rtol, atol, norm, sync_time
        self._pair = None if tableau is None else find_tableau(tableau)

    @override
    def check_block(self, block: Any) -> None:
        check_estimate(block, self.estimate, self._pair)
        if self.dt == "accepted":
            check_adaptive(block)

    @override
    def value_of(self, block: Any, draw: float, generator: torch.Generator) -> Tensor:
        place = sample_place(
            block,
            sampling=self.sampling,
            dt=self.dt,
            draw=draw,
            generator=generator,
            rtol=self.rtol,
            atol=self.atol,
        )
        self._row |= {"time": place.t, "dt": place.dt}
        self._warn_of_rounding(block, place.y.dtype)
        return local_term(
            block,
            place,
            estimate=self.estimate,
            tableau=self._pair,
            rtol=self.rtol,
            atol=self.atol,
            norm=self.norm,
            generator=generator,
        )

    def _warn_of_rounding(self, block: Any, dtype: torch.dtype) -> None:
        rtol, atol = (block.rtol if self.rtol is None else self.rtol), (block.atol if self.atol is None else self.atol)
        if rtol + atol < 10 * torch.finfo(dtype).eps and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"LocalODERegularization: tolerances of {max(rtol, atol):g} are below ten roundings of {dtype}, so that"
                " the local error is rounding noise; raise them, or train with precision='64-true'"
            )

    @override
    def _begin(self) -> None:
        super()._begin()
        self._warned = False

    @override
    def _rank(self) -> int:
        return 0 if self.sync_time else super()._rank()
