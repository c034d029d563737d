"""FZooS without a Trainer: clients simulated in one process, or one in each process of a group."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from .box import Bounds, Box
from .client import Client
from .evaluate import one_by_one
from .result import MinimizeResult
from .server import Rank, Simulated
from .settings import FZooSSettings


@register("solver", summary="federated minimization without gradients, by surrogates", paper="2308.04077", card="fzoos")
def fzoos_minimize(
    fns: Callable[[Tensor], float | Tensor] | Sequence[Callable[[Tensor], float | Tensor]],
    x0: Tensor,
    *,
    rounds: int,
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
    bounds: Bounds = (0.0, 1.0),
    keep_best: bool = False,
    max_dim: int = 5000,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> MinimizeResult:
    """Minimize the mean of functions that different clients can evaluate, and no one can differentiate.

    Each client fits a Gaussian process to all its evaluations and descends along the gradient of its mean; what the
    clients' functions have in common comes from a mean surrogate of random features that is exchanged once a round.

    Args:
        fns: A list, one function a client, all simulated here; or with ``group`` the function of this process. Each
            takes a point ``[d]``, float64, and returns a finite number.
        x0: The start ``[d]``; with ``group`` that of the first process counts.
        rounds: Rounds of ``local_steps`` steps.
        local_steps: See :class:`FZooSSettings`, as for the following ones.
        lr: Of the local Adam. All lengths are in units of the bounds: 0.01 is a hundredth of the box.
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
        bounds: Lowest and highest value, numbers or one for each coordinate; the search stays within. None: unbounded,
            and lengths are in the units of x.
        keep_best: Return to a round's start where its end is not better.
        max_dim: Most coordinates.
        seed: Of all random choices; the global random state is neither used nor changed.
        group: Processes that are one client each; ``torch.distributed.group.WORLD`` for all.
        progress: Show a progress bar, on the first process.

    Returns:
        The last point, and the server's points, their mean values, queries and bytes round by round.

    Raises:
        ValueError: If an argument is out of its range, the start is outside of the bounds, or there are more than
            ``max_dim`` coordinates.
        NonFiniteObjectiveError: If a function returns NaN or infinity; it names the client. With ``group`` at the end
            of the round, in all processes.

    Cost:
        A client evaluates ``local_steps + (local_steps - 1) * active + 1 + sync_active`` times a round (106), and sends
        and receives ``d + n_features + 1`` float64 numbers in two messages. Memory: 8 d bytes a query.

    Source: Shu, Lin, Dai and Low (2023), arXiv:2308.04077, with the constants of the authors' code.

    Example:
        >>> fns = [lambda x, c=c: ((x - c) ** 2).sum() for c in (0.3, 0.5)]
        >>> result = fzoos_minimize(fns, torch.full((4,), 0.6), rounds=6, lr=0.03)
        >>> result.x.round(decimals=1).tolist(), int(result.queries[-1])
        ([0.4, 0.4, 0.4, 0.4], 1294)
    """
    settings = FZooSSettings(
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
    check_interval("rounds", rounds, 0)
    functions = [fns] if callable(fns) else list(fns)
    check_fits(x0, len(functions), max_dim)
    first, size = 0, len(functions)
    if group is not None:
        if len(functions) != 1:
            raise ValueError(f"fns must be one function, that of this process, if group is given; got {len(functions)}")
        first, size = dist.get_rank(group), dist.get_world_size(group)
        x0 = x0.clone()
        dist.broadcast(x0, group_src=0, group=group)
    if size == 1:
        warnings.warn("fzoos_minimize: with one client there is nothing to correct by", stacklevel=2)
    box = Box(bounds, len(x0))
    objectives = [one_by_one(fn) for fn in functions]
    clients = [Client(box.to_unit(x0), settings, first + k, box) for k in range(len(functions))]
    if group is None:
        run_round = Simulated(clients, objectives).round
    else:
        run_round = partial(Rank(clients[0], partial(_sum, group=group), first, size).round, objectives[0])
    lead = clients[0]
    points, queries, num_bytes, values = [lead.x], [0], [0], list[float]()
    with tqdm(total=rounds, unit="round", disable=not progress or first > 0) as bar:
        for _ in range(rounds):
            run_round()
            values += [lead.objective] if values else [lead.first_objective, lead.objective]
            points.append(lead.x)
            queries.append(size * lead.queries)
            num_bytes.append(lead.num_bytes)
            bar.update()
            bar.set_postfix_str(f"objective {lead.objective:.4g}, {queries[-1]} queries")
    trajectory = torch.stack([box.from_unit(point) for point in points])
    return MinimizeResult(
        x=trajectory[-1],
        points=trajectory,
        objective=torch.tensor(values or [float("nan")], dtype=torch.float64),
        queries=torch.tensor(queries),
        num_bytes=torch.tensor(num_bytes),
    )


def _sum(vector: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(vector, group=group)
    return vector


def check_fits(x0: Tensor, count: int, max_dim: int) -> None:
    """Raise ``ValueError`` unless there are clients and a finite start of a size that can be searched."""
    if not count:
        raise ValueError("fns must hold at least one function, got none")
    if x0.ndim != 1 or not len(x0) or not bool(x0.isfinite().all()):
        raise ValueError(f"x0 must be a vector of finite numbers, got shape {tuple(x0.shape)}")
    check_dimension(len(x0), max_dim)


def check_dimension(dim: int, max_dim: int) -> None:
    """Raise ``ValueError`` if a surrogate of so many coordinates is out of reach."""
    check_interval("max_dim", max_dim, 1)
    if dim > max_dim:
        raise ValueError(
            f"there are {dim} coordinates to search, above max_dim={max_dim}: a client keeps every query, 8 bytes a"
            " coordinate, and needs more queries than coordinates to know a gradient. Search fewer coordinates, or"
            " raise max_dim"
        )
