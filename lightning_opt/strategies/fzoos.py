"""FZooS over ranks: each minimizes on its own data, and all together, without gradients."""

import dataclasses
import re
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_opt.registry import register
from lightning_opt.solvers.fzoos import Box, Client, FZooSSettings
from lightning_opt.solvers.fzoos.fzoos import check_dimension
from lightning_opt.solvers.fzoos.server import Rank

from ._candidates import Vectorize
from ._gradient_free import GradientFreeStrategy
from ._uses import changes_of


@register(
    "strategy",
    summary="Ranks with their own data search without gradients, by surrogates of all that they evaluated",
    paper="2308.04077",
    card="fzoos",
    log_prefix="fzoos",
    aliases={"fzoos": {}},
)
class FZooSStrategy(GradientFreeStrategy):
    """Minimizes the mean over ranks of what ``training_step`` returns, with each rank on its own data.

    For an objective without useful gradients, such as one less the F1 score of predictions, over up to some thousand
    parameters. Each rank is a client of FZooS: it fits a Gaussian process to all its evaluations and follows the
    gradient of its mean. Once a round the ranks average their parameters, and a surrogate of random features that
    tells each rank from then on what the others' objectives are like. Data never leave a rank.

    One batch is one local step: ``1 + active`` evaluations of ``training_step``, the first of which logs as usual.
    Every ``local_steps`` batches a round ends: two all-reduces, of d and of ``n_features + 1`` numbers, and
    ``1 + sync_active`` evaluations. Within a round each rank has parameters of its own, so validate and save models at
    the ends of rounds; rank 0's are saved. The objective must be finite, and is best one without noise: full batches
    and no dropout. Where batches differ, take ``noise="auto"``: the first 5 batches then only measure the noise.

    Logs, of rank 0: ``fzoos/f_local``, the objective where it is; ``fzoos/objective``, the mean over ranks at the end
    of the last round; ``fzoos/queries``, evaluations of all ranks so far; ``fzoos/rounds``;
    ``fzoos/gradient_uncertainty``; ``fzoos/correction_norm``; ``fzoos/bytes_per_round``, payload that a rank sends and
    receives.

    Args:
        param_filter: A regular expression; parameters are searched whose whole names it matches. None: all that the
            optimizer holds and that require a gradient.
        bounds: Lowest and highest value of a searched parameter; the search stays within, and lengths (``lr``,
            ``radius``, ``lengthscale``) are in units of the box. None: unbounded, and lengths are in units of the
            parameters.
        local_steps: See :class:`lightning_opt.solvers.fzoos.FZooSSettings`, as for the following ones.
        lr: Of the local Adam; about the largest change of a parameter in one step.
        gamma: Of the correction; 0 leaves it out.
        n_features: Numbers that carry a surrogate.
        lengthscale: Of the kernel.
        noise: Of a value.
        max_local: Queries in a local surrogate.
        max_global: Queries in a message.
        active: More queries a step.
        active_pool: Candidates for them.
        sync_active: More queries at the end of a round.
        sync_pool: Candidates for them.
        init: Queries before the first step.
        radius: Where candidates are.
        keep_best: Return to a round's start where its end is not better.
        seed: Of features and candidates, the same on all ranks; the global random state is neither used nor changed.
        max_dim: Most parameters to search.
        vectorize: Whether candidates are evaluated at once: see :class:`GradientFreeStrategy`.
        chunk: Candidates evaluated at once.
        ddp: What :class:`lightning.pytorch.strategies.DDPStrategy` takes, ``process_group_backend`` and
            ``start_method`` among it.

    Raises:
        ValueError: If a value is out of range.
        MisconfigurationException: In ``setup``, for what :class:`GradientFreeStrategy` refuses, gradient accumulation
            among it; before the first step, if there are more than ``max_dim`` parameters or one is outside of the
            bounds, or the checkpoint is of another number of ranks.
        NonFiniteObjectiveError: If an evaluation is NaN, infinite or missing; at the end of the round, on all ranks. It
            names the rank.

    Cost: evaluations as said, and one for each parameter tensor at the start, to refuse those that are not used. A
        step besides solves a system of ``max_local`` unknowns and scores ``active_pool`` candidates, on the CPU in
        float64, some 5 ms. A rank keeps 8 bytes a parameter and query, which go into every checkpoint.

    Source: Shu, Lin, Dai and Low (2023), arXiv:2308.04077, with the constants of the authors' code.

    Example:
        >>> import lightning.pytorch as pl
        >>> strategy = FZooSStrategy(param_filter=".*bias", lr=0.05, process_group_backend="gloo")
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=20, logger=False)
    """

    same_batch = False
    log_prefix = "fzoos"

    def __init__(
        self,
        *,
        param_filter: str | None = None,
        bounds: tuple[float, float] | None = None,
        local_steps: int = 10,
        lr: float = 0.01,
        gamma: float = 1.0,
        n_features: int = 1000,
        lengthscale: float | Literal["auto", "fit"] = "auto",
        noise: float | Literal["auto"] = 1e-6,
        max_local: int = 150,
        max_global: int = 500,
        active: int = 5,
        active_pool: int = 100,
        sync_active: int = 50,
        sync_pool: int = 200,
        init: int = 10,
        radius: float = 0.01,
        keep_best: bool = False,
        seed: int = 0,
        max_dim: int = 5000,
        vectorize: Vectorize = "auto",
        chunk: int | None = None,
        **ddp: Any,
    ) -> None:
        super().__init__(vectorize=vectorize, chunk=chunk, **ddp)
        self.settings = FZooSSettings(
            local_steps=local_steps,
            lr=lr,
            gamma=gamma,
            n_features=n_features,
            lengthscale=lengthscale,
            noise=noise,
            max_local=max_local,
            max_global=max_global,
            active=active,
            active_pool=active_pool,
            sync_active=sync_active,
            sync_pool=sync_pool,
            init=init,
            radius=radius,
            keep_best=keep_best,
            seed=seed,
        )
        check_dimension(1, max_dim)
        Box(bounds, dim=1)
        try:
            self._searched = re.compile(".*" if param_filter is None else param_filter)
        except re.error as error:
            raise ValueError(f"param_filter must be a regular expression, got {param_filter!r}: {error}") from error
        self._bounds = bounds
        self._max_dim = max_dim

    def is_searched(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter is trained and matches the filter."""
        return super().is_searched(name, parameter) and self._searched.fullmatch(name) is not None

    def start(self, point: Tensor) -> None:
        """Make this rank's client."""
        try:
            check_dimension(len(point), self._max_dim)
            box = Box(self._bounds, len(point))
            unit = box.to_unit(point.cpu())
        except ValueError as error:
            raise MisconfigurationException(f"FZooSStrategy: {error}") from error
        if self.world_size == 1:
            rank_zero_warn("FZooSStrategy: with one rank there is nothing to correct by; the search is local.")
        self.client = Client(unit, self.settings, self.global_rank, box, name=f"rank {self.global_rank}")
        self._ranks = Rank(self.client, self._sum, self.global_rank, self.world_size)
        self._uses_checked = False

    def search(self) -> tuple[Tensor, dict[str, float]]:
        """Move this rank's client."""
        client, logs = self.client, dict[str, float]()
        move = self._ranks.attempt(lambda: client.move() if client.begin(self.evaluate) else None)
        if move is not None:
            logs = dataclasses.asdict(move)
        if client.rounds:
            logs["objective"] = client.objective
            logs["bytes_per_round"] = client.num_bytes / client.rounds
        logs["rounds"] = client.rounds
        logs["queries"] = self.world_size * client.queries
        return self._parameters(), logs

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Move, let ``training_step`` evaluate there, evaluate near by, and end a round that is over."""
        batch, before = self._batch, self.client.steps
        if not self.client.queries and not self._uses_checked:
            self._check_uses()
        loss = super().optimizer_step(optimizer, closure, model, **kwargs)
        value = torch.tensor(torch.nan) if loss is None else loss
        self._batch = batch
        with torch.no_grad():
            self._ranks.attempt(lambda: self.client.look(self.evaluate, value))
            self._ranks.count(before)
            if self.client.round_is_over:
                self._ranks.end_round(self.evaluate)
                self.flat.write(self._parameters())
        self._batch = None
        return loss

    def on_train_end(self) -> None:
        """Where training ends within a round, leave the mean of the ranks' parameters."""
        if self.client.steps:
            client = self.client
            mean = self._ranks.mean(self._ranks.attempt(lambda: client.x), len(client.x))
            self.flat.write(client.box.from_unit(mean))
        super().on_train_end()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The evaluation that logs; its loss is the objective of this rank."""
        output = super().training_step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is not None:
            assert self.lightning_module is not None
            self.lightning_module.log(f"{self.log_prefix}/f_local", loss.detach(), on_step=True, on_epoch=False)
        return output

    def search_state(self) -> dict[str, Any]:
        """This rank's client."""
        return self.client.state_dict()

    def load_search_state(self, states: list[dict[str, Any]]) -> None:
        """Go on as the client that this rank was.

        Raises:
            MisconfigurationException: If the checkpoint is of other ranks, parameters or features.
        """
        if len(states) != self.world_size:
            raise MisconfigurationException(
                f"FZooSStrategy: the checkpoint holds what {len(states)} ranks evaluated on their data, and this run"
                f" has {self.world_size}; resume with as many, or start anew from its weights."
            )
        state = states[self.global_rank]
        for name, saved, own in (
            ("parameters are searched", len(state["x"]), len(self.client.x)),
            (
                "features carry a surrogate",
                len(state["_own_weights"]) or self.settings.n_features,
                self.settings.n_features,
            ),
            ("is the seed of the features", state["seed"], self.settings.seed),
        ):
            if saved != own:
                raise MisconfigurationException(f"FZooSStrategy: {own} {name}, in the checkpoint {saved}.")
        self.client.load_state_dict(state)
        self.flat.write(self._parameters())

    def _parameters(self) -> Tensor:
        """The client's point as the module's parameters."""
        return self.client.box.from_unit(self.client.x)

    def _sum(self, message: Tensor) -> Tensor:
        """The sum over ranks."""
        return self.sum_over_ranks(message.to(self.root_device)).cpu()

    def _check_uses(self) -> None:
        """Refuse to search over parameters that change the objective of no rank: they would drift.

        Raises:
            MisconfigurationException: With their names.
        """
        self._uses_checked = True
        changes = self._sum(changes_of(self.evaluate, self.flat, self.client.x, self.client.box))
        unused = [name for name, change in zip(self.flat.named, changes.tolist(), strict=True) if change == 0]
        if unused:
            raise MisconfigurationException(
                f"FZooSStrategy: training_step does not depend on {', '.join(unused)}, which are not used on any rank:"
                " there is nothing to find. Leave them out by param_filter, or freeze them."
            )
