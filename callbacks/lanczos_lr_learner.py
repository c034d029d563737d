import math
import time
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.curvature import (
    Guards,
    LanczosResult,
    NonFiniteCurvatureError,
    Step,
    curvature_range,
    guarded,
    lanczos,
    step_rule,
)
from lightning_opt.curvature.step_rules import RULES, LowerEnd, Rule
from lightning_opt.registry import register

from ._lanczos_panels import lanczos_panels
from ._learning_rate import only_optimizer, scale_lr, set_lr
from ._loss_curvature import (
    Curvature,
    Products,
    check_has_curvature,
    check_has_outputs,
    completes_step,
    loss_curvature,
    module_probe,
    part_of,
)
from ._name_patterns import matches
from ._optimizer_metric import ADAM_FAMILY, heavy_ball_unit, in_metric, momentum_of
from ._ownership import Possession, check_no_scheduler, check_sole_owner
from ._refresh_schedule import DENSE, RefreshSchedule
from ._report_history import Curve
from ._report_panel import Panel
from ._step_probe import StepProbe

EFFECTIVE = {None: 4.0, "linear": 10.0}
"""Rate / (1 - momentum) times sharpness. With a rate that falls, a larger one does no harm at the end of the run."""
RECENT = 4
"""Refreshes of which the rule "effective" takes the largest sharpness."""
TINY = torch.finfo(torch.float32).tiny
NEVER = 2**62  # steps


@register(
    "callback",
    summary="Sets learning rate and momentum from the curvature of the loss, without a search",
    paper="2006.09092",
    card="lanczos-lr-learner",
    log_prefix="lanczos_lr",
)
class LanczosLRLearner(StepProbe):
    r"""Sets learning rate and momentum from a few Lanczos steps on the curvature of the batch about to be trained on.

    At a refresh, ``num_steps`` products of the Hessian with vectors give Ritz values; from the largest, :math:`L`, and
    from their lower end, :math:`\mu`, a rule (:func:`lightning_opt.curvature.step_rule`) computes rate and momentum,
    which guards keep within limits and which hold until the next refresh. With gradient accumulation the batch is all
    micro-batches of the step; with several ranks the products are averaged over them, and all decide alike.

    The default rule does not depend on the scale of the loss: a loss ten times as large gives rates ten times smaller,
    and the same run. With optimizers of Adam's family the curvature is the preconditioned one (arXiv:2207.14484), and
    betas stay as they are.

    When: at steps 0, 1, 2, 4, 8, ... until refreshes are as far apart as ``max_overhead`` demands, or every
    ``refresh_every_n_steps``. The doubling goes on in any case, so a run of T steps has at least log2(T) + 2 refreshes,
    which in a short one are more than that share. The interval is chosen once, at step 16, from times measured until
    then; it is saved, so a run that is killed later resumes exactly. One that is killed before chooses it then.

    Parameter groups keep the ratios of their rates. Nothing else may set the rate: a scheduler is refused, unless
    ``on_scheduler="rebase"`` multiplies what the scheduler starts from, so that the learned rate takes its shape: the
    learned rate is the scheduler's base rate (an absolute floor, such as ``eta_min``, does not scale).

    Logs at each refresh ``lanczos_lr/lr`` (before decay), ``/momentum``, ``/L``, ``/mu``, ``/lambda_min``,
    ``/residual`` (an eigenvalue lies within it of :math:`L`), ``/matvecs`` (products so far), ``/rejected`` (refreshes
    so far that came to nothing) and ``/guard_active`` (0 or 1). A :class:`RunReport` shows the rate beside the largest
    stable one, the momentum and the Ritz values.

    Args:
        rule: ``"effective"``, which takes for :math:`L` the largest of the last four sharpnesses, since that of one
            batch is noisy and vanishes where the batch is fitted; ``"nesterov"`` (for ``SGD(nesterov=True)``);
            ``"polyak"``; ``"gd"`` (leaves the momentum alone); or the authors' ``"ssgdmn"``, which depends on the scale
            of the loss. See :func:`lightning_opt.curvature.step_rule`.
        mu: Lower end of the curvature: ``"median"`` or ``"min"``; see :func:`lightning_opt.curvature.curvature_range`.
        num_steps: Lanczos steps of a refresh.
        refresh_every_n_steps: Optimizer steps between refreshes.
        refresh_every_n_epochs: Epochs between refreshes, each before the epoch's first step. Without either,
            ``max_overhead`` decides.
        max_overhead: Share of the time of the training steps that refreshes may take over the whole run.
        curvature: ``"hessian"``, or ``"ggn"``: the generalized Gauss-Newton matrix, which leaves the curvature of the
            network out and has no negative eigenvalues. ``training_step`` (or ``loss_fn``) must then call the module
            once, as ``self(inputs)``; penalties that it adds to the loss are left out.
        curvature_batches: Measure on so many of the last batches, the one about to be trained on included: a mean over
            more samples, whose sharpness is less noisy and smaller, at as many times the cost. A step that begins a run
            has fewer behind it.
        curvature_samples: So many samples of each micro-batch are measured on, or ``"all"``. Fewer are faster, and
            their curvature is larger (:func:`lightning_opt.curvature.predict_max_lr`), so the rate is on the safe side.
        products: ``"autograd"``, or ``"finite_difference"`` for losses that cannot be differentiated twice.
        param_filter: Measure on the parameters whose names match one of these patterns (``"net.0.*"``), and none that
            begins with ``!`` (``"!embedding.*"``); None for all. Rates are set for all of them in any case.
        include_weight_decay: Count the optimizer's weight decay as part of the loss: it adds its coefficient to the
            eigenvalues. The authors leave it out.
        weight_threshold: For ``mu="min"``.
        safety: The rate is at most this share of the largest stable one, :math:`2 (1 + \beta) / L`; inf for no limit.
        start: ``"curvature"``: the first refresh takes the share ``initial`` of the rule's rate, and the rate that the
            optimizer was given does not matter. ``"optimizer"``: growth begins at that rate.
        initial: See ``start``. A network is flat where it begins, and soon is not.
        growth: The effective rate, rate / (1 - momentum), at most grows by this factor while the number of steps
            doubles; inf for no limit.
        momentum_max: Largest momentum.
        lr_min: Smallest rate.
        lr_max: Largest rate; None for no limit.
        decay: ``"linear"`` multiplies the learned rate by 1 - t/T over the run; a scheduler beside it is refused. The
            rule ``"effective"`` then begins
            2.5 times as high, since a rate that falls does no harm at the end.
        on_scheduler: ``"error"`` or ``"rebase"``.
        loss_fn: Computes the loss from module and batch, in the place of ``training_step``.
        seed: Of the start vectors.
        paper_bug: The momentum of ``"polyak"`` as the authors' script has it.

    Raises:
        ValueError: If a value is out of its range.
        MisconfigurationException: Before the first step, with several optimizers, one that is neither SGD nor of Adam's
            family, a scheduler, another callback that sets the rate, a strategy that shards the module, manual
            optimization without ``loss_fn``, parameters of 16 bits, sparse embeddings that ``param_filter`` does not
            leave out, a ``param_filter`` that nothing matches, ``"ggn"`` where the outputs are not known, ``decay``
            without a known number of steps.

    A curvature that is not finite, or zero, is refused: rate and momentum stay, the refresh counts as rejected, and a
    warning says so once.

    Cost: a refresh is one forward pass, one backward pass with its graph, and ``num_steps`` passes of about two
    backward passes each (with several micro-batches each of them goes through its own forward pass again); memory of
    the double graph of one micro-batch and ``num_steps`` vectors of the parameters' size. Nothing between refreshes,
    except that the first 16 steps are timed.

    Source: arXiv:2006.09092 and its authors' scripts; guards, default rule and cadence are ours.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[LanczosLRLearner(decay="linear")], logger=False, enable_checkpointing=False)
    """

    owns: ClassVar[frozenset[Possession]] = frozenset({"learning rate"})
    needs_gradients: ClassVar[bool] = True  # strategies without them refuse it
    _measured: list[Tensor]  # parameters
    _clock: float | None  # when the micro-batch under way began, in a step that is timed

    def __init__(
        self,
        *,
        rule: Rule = "effective",
        mu: LowerEnd = "median",
        num_steps: int = 10,
        refresh_every_n_steps: int | None = None,
        refresh_every_n_epochs: int | None = None,
        max_overhead: float = 0.05,
        curvature: Curvature = "hessian",
        curvature_batches: int = 1,
        curvature_samples: int | Literal["all"] = 32,
        products: Products = "autograd",
        param_filter: list[str] | None = None,
        include_weight_decay: bool = False,
        weight_threshold: float = 0.5,
        safety: float = 1.0,
        start: Literal["curvature", "optimizer"] = "curvature",
        initial: float = 0.1,
        growth: float = 2.0,
        momentum_max: float = 0.99,
        lr_min: float = 0.0,
        lr_max: float | None = None,
        decay: Literal["linear"] | None = None,
        on_scheduler: Literal["error", "rebase"] = "error",
        loss_fn: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        seed: int = 0,
        paper_bug: bool = False,
    ) -> None:
        super().__init__()
        check_choice("rule", rule, RULES)
        check_choice("mu", mu, ("median", "min"))
        check_interval("num_steps", num_steps, 2)
        if refresh_every_n_steps is not None:
            check_interval("refresh_every_n_steps", refresh_every_n_steps, 1)
        if refresh_every_n_epochs is not None:
            check_interval("refresh_every_n_epochs", refresh_every_n_epochs, 1)
            if refresh_every_n_steps is not None:
                raise ValueError("give refresh_every_n_steps or refresh_every_n_epochs, not both")
        check_interval("max_overhead", max_overhead, 0, closed="()")
        check_choice("curvature", curvature, ("hessian", "ggn"))
        check_interval("curvature_batches", curvature_batches, 1)
        if isinstance(curvature_samples, str):
            check_choice("curvature_samples", curvature_samples, ("all",))
        else:
            check_interval("curvature_samples", curvature_samples, 1)
        check_choice("products", products, ("autograd", "finite_difference"))
        if param_filter is not None and (isinstance(param_filter, str) or not all(param_filter)):
            raise ValueError(f"param_filter must be a list of patterns, none of them empty, got {param_filter!r}")
        check_interval("weight_threshold", weight_threshold, 0, 1)
        if safety != math.inf:
            check_interval("safety", safety, 0, closed="()")
        check_choice("start", start, ("curvature", "optimizer"))
        check_interval("initial", initial, 0, 1, closed="(]")
        if growth != math.inf:
            check_interval("growth", growth, 1, closed="()")
        check_interval("momentum_max", momentum_max, 0, 1)
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
        self.refresh_every_n_epochs = refresh_every_n_epochs
        self.max_overhead = max_overhead
        self.curvature = curvature
        self.curvature_batches = curvature_batches
        self.curvature_samples = curvature_samples
        self.products = products
        self.param_filter = param_filter
        self.include_weight_decay = include_weight_decay
        self.weight_threshold = weight_threshold
        self.safety = safety
        self.start = start
        self.initial = initial
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

    def _begin(self) -> None:
        interval = self.refresh_every_n_steps if self.refresh_every_n_epochs is None else NEVER
        self._schedule = RefreshSchedule(interval, self.max_overhead)
        self._let_go()
        self._lr: float | None = None  # learned so far, before decay
        self._learned_at: int | None = None  # step
        self._sharpnesses: list[float] = []  # of recent refreshes
        self._shares: list[float] = []  # of it, by group
        self._steps = math.inf  # of the whole run
        self._seconds = 0.0  # of the step under way
        self._products = self._rejected = 0
        self._warned = False
        self._curves: dict[str, Curve] = {}
        self._spectrum: tuple[list[float], list[float]] = ([], [])

    @classmethod
    def paper(cls) -> "LanczosLRLearner":
        """The authors' settings: rule ``ssgdmn``, 20 Lanczos steps on 32 samples, once an epoch, without guards.

        They took one fixed subset of the training data for all refreshes, and refreshed every 1, 10 or 20 epochs; here
        it is the first 32 samples of the batch at hand, every epoch.

        Example:
            >>> LanczosLRLearner.paper().rule
            'ssgdmn'
        """
        return cls(
            rule="ssgdmn",
            mu="min",
            num_steps=20,
            refresh_every_n_epochs=1,
            curvature_samples=32,
            safety=math.inf,
            start="optimizer",
            growth=math.inf,
            momentum_max=1.0,
        )

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_sole_owner(trainer, self)
            check_has_curvature(trainer, pl_module, type(self).__name__, self.loss_fn, self.param_filter)
            if self.curvature == "ggn" and not is_overridden("forward", pl_module):
                raise MisconfigurationException(
                    f"LanczosLRLearner(curvature='ggn') needs the outputs of the network: give"
                    f" {type(pl_module).__name__} a forward method, and call it in training_step as self(inputs)."
                )
            self._begin()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._optimizer = only_optimizer(trainer, self)
        if self.on_scheduler == "error" or self.decay is not None:  # a decay would write over the schedule's rates
            check_no_scheduler(trainer, self)
        _check_optimizer(self._optimizer, self.rule)
        self._measured = self._chosen_parameters(pl_module, self._optimizer)
        if self.decay is not None and math.isinf(trainer.estimated_stepping_batches):
            raise MisconfigurationException(
                "LanczosLRLearner(decay='linear') must know how long the run is; give the Trainer max_steps."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._optimizer is not None
        self._steps = trainer.estimated_stepping_batches
        if self._lr is None:  # a new run
            start = "initial_lr" if trainer.lr_scheduler_configs else "lr"  # a warm-up has lowered the other
            rates = [float(group.get(start, group["lr"])) for group in self._optimizer.param_groups]
            self._lr = max(rates)
            if trainer.lr_scheduler_configs and not self._lr > 0:
                raise MisconfigurationException(
                    "LanczosLRLearner(on_scheduler='rebase') multiplies the rates that the scheduler starts from, and"
                    f" they are {self._lr}; give the optimizer a positive lr."
                )
            self._shares = [lr / self._lr if self._lr else 1.0 for lr in rates]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        completes = completes_step(trainer, pl_module)
        epochs = self.refresh_every_n_epochs
        if epochs is not None and batch_idx == 0 and trainer.current_epoch % epochs == 0:
            self._schedule.next = step
        if self._is_near(step):
            samples = self.curvature_samples
            self._window = self._recent(step)
            self._window.append((step, batch if isinstance(samples, str) else part_of(batch, samples)))
        if completes and step >= self._schedule.next:
            self._refresh(trainer, pl_module, step, batch_idx)
        if completes and self.decay is not None:
            self._apply_decay(step)
        if self._schedule.is_timing:
            self._clock = _now(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is not None:
            self._seconds += _now(pl_module.device) - self._clock
            self._clock = None
            if completes_step(trainer, pl_module):
                self._schedule.step_seconds.append(self._seconds)
                self._seconds = 0.0
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def _let_go(self) -> None:
        super()._let_go()
        self._measured, self._clock = [], None

    def _chosen_parameters(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> list[Tensor]:
        """The trained parameters that the curvature is measured on."""
        names = {id(p): name for name, p in pl_module.named_parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        chosen = [p for p in trained if matches(names.get(id(p), ""), self.param_filter)]
        if not chosen:
            raise MisconfigurationException(
                f"LanczosLRLearner(param_filter={self.param_filter!r}) matches no trained parameter of"
                f" {type(pl_module).__name__}; the first ones are {', '.join(list(names.values())[:3])}."
            )
        return chosen

    def _is_near(self, step: int) -> bool:
        """Whether the next refresh measures on the batch of this step."""
        step_is_unknown = self.refresh_every_n_epochs is not None and self.curvature_batches > 1
        return step_is_unknown or step > self._schedule.next - self.curvature_batches

    def _recent(self, step: int) -> list[tuple[int, Any]]:
        """The micro-batches at hand that a refresh in front of this step measures on, with the steps they are of."""
        return [entry for entry in self._window if entry[0] > step - self.curvature_batches]

    # --- a refresh -------------------------------------------------------------------------------------------------

    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, batch_idx: int) -> None:
        begin = time.perf_counter()
        window = [batch for _, batch in self._recent(step)]
        result = self._measure(trainer, pl_module, window, step, batch_idx)
        if result is not None:
            self._products += result.products
            sharpness, mu = curvature_range(result.ritz_values, result.weights, self.mu, self.weight_threshold)
            if sharpness > TINY:
                self._learn(trainer, step, result, sharpness, mu)
                self._sharpnesses = [*self._sharpnesses, sharpness][-RECENT:]
            else:
                self._reject(f"the curvature of the loss is zero at step {step}")
        schedule = self._schedule
        if schedule.is_timing:
            schedule.refresh_seconds.append(time.perf_counter() - begin)
            if step >= DENSE and schedule.step_seconds:  # none if the run was resumed just now, without this callback
                schedule.interval = trainer.strategy.broadcast(schedule.chosen(self._steps))
        schedule.advance(step)
        self._window = [entry for entry in self._window if self._is_near(entry[0])]

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, window: list[Any], step: int, batch_idx: int
    ) -> LanczosResult | None:
        """Ritz values of the curvature; None where there are none."""
        assert self._optimizer is not None
        generator = torch.Generator().manual_seed(self.seed + step)
        with module_probe(trainer, pl_module, self.loss_fn, batch_idx) as loss:
            if self.curvature == "ggn" and self._products == 0:
                check_has_outputs(pl_module, loss, window[0])
            of_loss = loss_curvature(
                *(trainer, pl_module, loss, self._measured, window), curvature=self.curvature, products=self.products
            )
            operator = in_metric(of_loss, self._optimizer, weight_decay=self.include_weight_decay)
            if operator is None:
                return None
            try:
                return lanczos(operator, self.num_steps, generator=generator)
            except NonFiniteCurvatureError as error:
                self._reject(f"{error} at step {step}")
                return None

    def _learn(self, trainer: pl.Trainer, step: int, result: LanczosResult, sharpness: float, mu: float) -> None:
        assert self._optimizer is not None
        assert self._lr is not None
        adam = isinstance(self._optimizer, ADAM_FAMILY)
        momentum, unit = momentum_of(self._optimizer), heavy_ball_unit(self._optimizer)
        fixed = momentum if adam else None
        if self.rule == "effective":
            sharpness = max([*self._sharpnesses[1 - RECENT :], sharpness])
        asked = step_rule(
            self.rule,
            sharpness,
            mu,
            effective=EFFECTIVE[self.decay],
            fixed_momentum=fixed,
            paper_bug=self.paper_bug,
        )
        previous: Step | None = Step(self._lr * unit, momentum)
        if self._learned_at is None and self.start == "curvature":
            previous = None
            asked = Step(self.initial * asked.lr, asked.momentum)
        guards = Guards(
            safety=self.safety,
            growth=self.growth ** self._doublings(step),
            momentum_max=self.momentum_max,
            lr_min=self.lr_min * unit,
            lr_max=math.inf if self.lr_max is None else self.lr_max * unit,
        )
        taken = guarded(asked, sharpness, previous, momentum, guards)
        self._learned_at = step
        self._set(trainer, taken.lr / unit, taken.momentum)
        if taken.momentum is not None:
            momentum = taken.momentum
        self._row = {
            "lanczos_lr/lr": self._lr,
            "lanczos_lr/momentum": momentum,
            "lanczos_lr/L": sharpness,
            "lanczos_lr/mu": mu,
            "lanczos_lr/lambda_min": result.ritz_values[0].item(),
            "lanczos_lr/residual": result.residuals[result.ritz_values.abs().argmax()].item(),
            "lanczos_lr/matvecs": float(self._products),
            "lanczos_lr/rejected": float(self._rejected),
            "lanczos_lr/guard_active": float(bool(taken.guards)),
        }
        limit = 2 * (1 + momentum) / (unit * sharpness)
        for name, value in (("lr", self._lr), ("limit", limit), ("momentum", momentum)):
            self._curves.setdefault(name, Curve()).add(step, value)
        if taken.guards:
            self._curves.setdefault("guards", Curve()).add(step, self._lr)
        self._spectrum = (result.ritz_values.tolist(), result.weights.tolist())

    def _doublings(self, step: int) -> float:
        """How often the number of steps doubled since the last time that something was learned, at least once."""
        if self._learned_at is None:
            return 1.0
        return math.log2((step + 1) / (self._learned_at + 1))

    def _set(self, trainer: pl.Trainer, lr: float, momentum: float | None) -> None:
        assert self._optimizer is not None
        old, self._lr = self._lr, lr
        if trainer.lr_scheduler_configs:
            assert old is not None
            scale_lr(trainer, self._optimizer, lr / old)
        else:
            self._apply(lr)
        if momentum is not None:
            for group in self._optimizer.param_groups:
                group["momentum"] = momentum

    def _apply_decay(self, step: int) -> None:
        assert self._lr is not None
        factor = max(0.0, 1 - step / self._steps)
        self._apply(self._lr * factor)

    def _apply(self, lr: float) -> None:
        assert self._optimizer is not None
        for group, share in zip(self._optimizer.param_groups, self._shares, strict=True):
            set_lr(group, lr * share)

    def _reject(self, reason: str) -> None:
        self._rejected += 1
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"LanczosLRLearner: {reason}; rate and momentum stay as they are. Said once.")

    # --- state -----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": self._schedule.state_dict(),
            "lr": self._lr,
            "learned_at": self._learned_at,
            "sharpnesses": list(self._sharpnesses),
            "shares": list(self._shares),
            "products": self._products,
            "rejected": self._rejected,
            "warned": self._warned,
            "curves": {name: curve.state_dict() for name, curve in self._curves.items()},
            "ritz_values": list(self._spectrum[0]),
            "weights": list(self._spectrum[1]),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._schedule.load_state_dict(state_dict["schedule"])
        self._lr, self._shares = state_dict["lr"], list(state_dict["shares"])
        self._learned_at, self._sharpnesses = state_dict["learned_at"], list(state_dict["sharpnesses"])
        self._products, self._rejected = state_dict["products"], state_dict["rejected"]
        self._warned = state_dict["warned"]
        self._curves = {name: Curve.from_state_dict(curve) for name, curve in state_dict["curves"].items()}
        self._spectrum = list(state_dict["ritz_values"]), list(state_dict["weights"])

    # --- pictures --------------------------------------------------------------------------------------------------

    def report_panels(self) -> list[Panel]:
        """Rate and momentum over the run, and the last spectrum, for :class:`RunReport`."""
        return lanczos_panels(self._curves, self._spectrum)


def _check_optimizer(optimizer: Optimizer, rule: Rule) -> None:
    if isinstance(optimizer, ADAM_FAMILY):
        return
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.SGD):
        raise MisconfigurationException(
            f"LanczosLRLearner knows what curvature means for torch's SGD, Adam, AdamW and NAdam, not for {name}."
        )
    if any(group["dampening"] for group in optimizer.param_groups):
        raise MisconfigurationException("LanczosLRLearner computes rates for SGD with dampening=0.")
    if rule == "nesterov" and not all(group["nesterov"] for group in optimizer.param_groups):
        rank_zero_warn("LanczosLRLearner(rule='nesterov') is for SGD(nesterov=True); it goes on with the heavy ball.")


def _now(device: torch.device) -> float:
    """The time at which the device has done all that was asked."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()
