import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt._lightning.log_rows import write_row
from lightning_opt.curvature import (
    CurvatureOperator,
    Guards,
    LanczosResult,
    NonFiniteCurvatureError,
    curvature_range,
    guarded,
    lanczos,
    step_rule,
)
from lightning_opt.curvature.step_rules import RULES, LowerEnd, Rule
from lightning_opt.registry import register

from ._learning_rate import largest_lr, momentum_of, only_optimizer, scale_lr, set_lr
from ._log_values import is_wanted
from ._loss_curvature import Products, check_has_curvature, completes_step, loss_curvature, part_of
from ._ownership import Possession, check_no_scheduler, check_sole_owner
from ._refresh_schedule import RefreshSchedule
from ._report_curves import COLORS
from ._report_history import Curve
from ._report_panel import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@register(
    "callback",
    summary="Sets learning rate and momentum from the curvature of the loss, without a search",
    paper="2006.09092",
    card="lanczos-lr-learner",
    log_prefix="lanczos_lr",
)
class LanczosLRLearner(pl.Callback):
    r"""Sets learning rate and momentum from a few Lanczos steps on the Hessian of the batch about to be trained on.

    At a refresh, ``num_steps`` products of the Hessian with vectors give Ritz values; from the largest, :math:`L`, and
    from their lower end, :math:`\mu`, a rule (:func:`lightning_opt.curvature.step_rule`) computes rate and momentum,
    which guards keep within limits and which hold until the next refresh. With gradient accumulation the batch is all
    micro-batches of the step; with several ranks the products are averaged over them, and all decide alike.

    The default rule does not depend on the scale of the loss: a loss ten times as large gives rates ten times smaller,
    and the same run. With optimizers of Adam's family the curvature is the preconditioned one (arXiv:2207.14484), and
    betas stay as they are.

    When: at steps 0, 1, 2, 4, 8, ... until refreshes are as far apart as ``max_overhead`` allows, or every
    ``refresh_every_n_steps``. The interval is chosen once, at step 16, from times measured until then; it is saved, so
    a run that is killed later resumes exactly. One that is killed before chooses it then.

    Parameter groups keep the ratios of their rates. Nothing else may set the rate: a scheduler is refused, unless
    ``on_scheduler="rebase"`` multiplies what the scheduler starts from, so that the learned rate takes its shape
    (schedulers with an absolute floor or ceiling do not scale).

    Logs at each refresh ``lanczos_lr/lr`` (before decay), ``/momentum``, ``/L``, ``/mu``, ``/lambda_min``,
    ``/residual`` (an eigenvalue lies within it of :math:`L`), ``/matvecs`` (products so far), ``/rejected`` (refreshes
    so far that came to nothing) and ``/guard_active`` (0 or 1). A :class:`RunReport` shows the rate beside the largest
    stable one, the momentum and the Ritz values.

    Args:
        rule: ``"nesterov"`` (for ``SGD(nesterov=True)``), ``"polyak"``, ``"gd"`` (leaves the momentum alone), or the
            authors' ``"ssgdmn"``, which depends on the scale of the loss.
        mu: Lower end of the curvature: ``"median"`` or ``"min"``; see :func:`lightning_opt.curvature.curvature_range`.
        num_steps: Lanczos steps of a refresh.
        refresh_every_n_steps: Optimizer steps between refreshes; None chooses them by ``max_overhead``.
        max_overhead: Share of the time of the training steps that refreshes may take over the whole run.
        curvature_samples: Take so many samples of each micro-batch only: faster, and the curvature of a smaller batch,
            which is larger.
        products: ``"autograd"``, or ``"finite_difference"`` for losses that cannot be differentiated twice.
        weight_threshold: For ``mu="min"``.
        safety: The rate is at most this share of the largest stable one, :math:`2 (1 + \beta) / L`.
        growth: The rate is at most this multiple of the one before the refresh; None for no limit.
        momentum_max: Largest momentum.
        lr_min: Smallest rate.
        lr_max: Largest rate; None for no limit.
        decay: ``"linear"`` multiplies the learned rate by 1 - t/T over the run.
        on_scheduler: ``"error"`` or ``"rebase"``.
        loss_fn: Computes the loss from module and batch, in the place of ``training_step``.
        seed: Of the start vectors.
        paper_bug: The momentum of ``"polyak"`` as the authors' script has it.

    Raises:
        ValueError: If a value is out of its range.
        MisconfigurationException: Before the first step, with several optimizers, one that is neither SGD nor of Adam's
            family, a scheduler, another callback that sets the rate, a strategy that shards the module, manual
            optimization without ``loss_fn``, parameters of 16 bits, ``decay`` without a known number of steps.

    A curvature that is not finite, or zero, is refused: rate and momentum stay, the refresh counts as rejected, and a
    warning says so once.

    Cost: a refresh is one forward pass, one backward pass with its graph, and ``num_steps`` passes of about two
    backward passes each; memory of the double graph of one micro-batch and ``num_steps`` vectors of the parameters'
    size. Nothing between refreshes, except that the first 16 steps are timed.

    Source: arXiv:2006.09092 and its authors' scripts; guards, default rule and cadence are ours.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[LanczosLRLearner(decay="linear")], logger=False, enable_checkpointing=False)
    """

    owns: ClassVar[frozenset[Possession]] = frozenset({"learning rate"})

    def __init__(
        self,
        *,
        rule: Rule = "nesterov",
        mu: LowerEnd = "median",
        num_steps: int = 10,
        refresh_every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        curvature_samples: int | None = None,
        products: Products = "autograd",
        weight_threshold: float = 0.5,
        safety: float = 1.0,
        growth: float | None = 2.0,
        momentum_max: float = 0.99,
        lr_min: float = 0.0,
        lr_max: float | None = None,
        decay: Literal["linear"] | None = None,
        on_scheduler: Literal["error", "rebase"] = "error",
        loss_fn: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        seed: int = 0,
        paper_bug: bool = False,
    ) -> None:
        check_choice("rule", rule, RULES)
        check_choice("mu", mu, ("median", "min"))
        check_interval("num_steps", num_steps, 2)
        if refresh_every_n_steps is not None:
            check_interval("refresh_every_n_steps", refresh_every_n_steps, 1)
        check_interval("max_overhead", max_overhead, 0, closed="()")
        if curvature_samples is not None:
            check_interval("curvature_samples", curvature_samples, 1)
        check_choice("products", products, ("autograd", "finite_difference"))
        check_interval("weight_threshold", weight_threshold, 0, 1)
        check_interval("safety", safety, 0, closed="()")
        if growth is not None:
            check_interval("growth", growth, 1, closed="()")
        check_interval("momentum_max", momentum_max, 0, 1, closed="[)")
        check_interval("lr_min", lr_min, 0)
        if lr_max is not None:
            check_interval("lr_max", lr_max, lr_min)
        check_choice("decay", decay, ("linear", None))
        check_choice("on_scheduler", on_scheduler, ("error", "rebase"))
        check_interval("seed", seed, 0)
        self.rule = rule
        self.mu = mu
        self.num_steps = num_steps
        self.refresh_every_n_steps = refresh_every_n_steps
        self.max_overhead = max_overhead
        self.curvature_samples = curvature_samples
        self.products = products
        self.weight_threshold = weight_threshold
        self.safety = safety
        self.growth = growth
        self.momentum_max = momentum_max
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.decay = decay
        self.on_scheduler = on_scheduler
        self.loss_fn = loss_fn
        self.seed = seed
        self.paper_bug = paper_bug
        self._begin()
