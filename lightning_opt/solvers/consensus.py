"""Consensus-based optimization and consensus hopping: minimizing from values alone (arXiv:2306.09778)."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

Scheme = Literal["cbo", "hopping"]
Noise = Literal["anisotropic", "isotropic"]
AlphaSchedule = Literal["constant", "double_per_epoch", "ess"]
SigmaSchedule = Literal["constant", "log2", "decay"]

BLOCK = 4096  # normal numbers drawn with one seed, about; part of what a run repeats bit for bit
ROWS = 2**24  # numbers of candidates that are drawn, or added up, at a time
INITIAL, MOVE, KICK, ORDER = range(4)  # streams of random numbers


class ConsensusResult(NamedTuple):
    """What :func:`cbo_minimize` found.

    Attributes:
        consensus: The consensus of the last step, ``[d]``.
        best: The candidate of the least value ever seen, ``[d]``.
        best_value: Its value.
        path: The consensus after each step, ``[steps, d]``.
        evaluations: How often the function was evaluated at a point.
    """

    consensus: Tensor
    best: Tensor
    best_value: float
    path: Tensor
    evaluations: int


@register(
    "solver",
    summary="Minimizes a function from its values by consensus of particles",
    paper="2306.09778",
    card="consensus-based-optimization",
)
def cbo_minimize(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    steps: int,
    scheme: Scheme = "cbo",
    n_particles: int = 100,
    dt: float = 0.1,
    lam: float = 1.0,
    sigma: float = math.sqrt(0.4),
    alpha: float = 50.0,
    noise: Noise = "anisotropic",
    particle_batch: int | None = None,
    update: Literal["full", "partial"] = "full",
    alpha_schedule: AlphaSchedule = "constant",
    sigma_schedule: SigmaSchedule = "constant",
    stagnation_tol: float = 0.0,
    init_std: float = 1.0,
    epoch_length: int = 100,
    seed: int = 0,
) -> ConsensusResult:
    """Minimize a function of a vector without its gradient.

    Args:
        f: Maps points ``[n, d]`` to values ``[n]``. Values that are not finite count as infinite.
        x0: A point ``[d]``, around which particles begin normally distributed, or the particles ``[n_particles, d]``.
            Its dtype and device are those of the search. For ``scheme="hopping"`` the point where it begins.
        steps: Each evaluates every particle once.
        scheme: "cbo" moves particles; "hopping" draws them anew around the consensus in every step, with the
            standard deviation ``sigma``, and then ``dt``, ``lam``, ``noise``, ``update``, ``particle_batch``,
            ``stagnation_tol`` and ``init_std`` have no effect.
        n_particles: N.
        dt: Step of time.
        lam: Drift towards the consensus.
        sigma: Noise, in units of the distance to the consensus.
        alpha: Sharpness of the weights ``exp(-alpha f)``.
        noise: "anisotropic" scales each coordinate by its own distance, "isotropic" all by the length.
        particle_batch: Particles from which a consensus is made; None for all. N / particle_batch moves are a step.
        update: Whether a batch of particles moves all of them, or only itself.
        alpha_schedule: "double_per_epoch" doubles alpha after every epoch. "ess" chooses alpha in every step so that
            the weights are worth half of the particles.
        sigma_schedule: "log2" divides sigma by ``log2(e + 2)`` after e epochs; "decay" multiplies it by 0.98 every
            100 steps.
        stagnation_tol: Where the consensus moved by less in every coordinate, each particle gets additive noise
            ``sigma sqrt(dt)``. 0 for never. The authors use 1e-5 to train networks.
        init_std: Standard deviation of the particles around ``x0``.
        epoch_length: Steps that the schedules count as an epoch.
        seed: Of all random numbers; the global random state is not used.

    Raises:
        ValueError: If an argument is out of range, ``x0`` has the wrong shape, ``f`` returns another number of values
            than it was asked for, or no value is finite.

    Cost:
        ``steps * n_particles`` evaluations; memory for the particles, or with hopping for ``x0`` and a few candidates.

    Example:
        >>> def rastrigin(x):
        ...     return (x**2 - 10 * (2 * torch.pi * x).cos() + 10).sum(dim=1)
        >>> found = cbo_minimize(rastrigin, torch.full((2,), 3.0), steps=200, n_particles=50, init_std=3.0)
        >>> bool(found.best_value < 0.01)
        True
    """
    check_interval("steps", steps, 1)
    check_interval("epoch_length", epoch_length, 1)
    settings = ConsensusSettings(
        scheme=scheme,
        n_particles=n_particles,
        dt=dt,
        lam=lam,
        sigma=sigma,
        alpha=alpha,
        noise=noise,
        particle_batch=particle_batch,
        update=update,
        alpha_schedule=alpha_schedule,
        sigma_schedule=sigma_schedule,
        stagnation_tol=stagnation_tol,
        init_std=init_std,
        seed=seed,
    )
    start, particles = x0, None
    if x0.ndim == 2 and scheme == "cbo":
        if len(x0) != n_particles:
            raise ValueError(f"x0 must hold n_particles={n_particles} particles, got {len(x0)}")
        start, particles = x0.mean(dim=0), x0.clone()
    elif x0.ndim != 1:
        raise ValueError(f"x0 must be a point [d]{' or particles [n, d]' * (scheme == 'cbo')}, got {tuple(x0.shape)}")
    swarm = Swarm(settings, start)
    if particles is not None:
        swarm.particles = particles
    best, best_value, evaluations, path = start.clone(), math.inf, 0, []

    def evaluate(points: Tensor) -> Tensor:
        nonlocal best, best_value, evaluations
        values = f(points)
        if values.shape != (len(points),):
            raise ValueError(f"f must return one value for each of {len(points)} points, got {tuple(values.shape)}")
        evaluations += len(points)
        finite = torch.where(values.isfinite(), values, math.inf)
        if (least := finite.min().item()) < best_value:
            best_value, best = least, points[finite.argmin()].clone()
        return values

    for step in range(steps):
        swarm.step(evaluate, epoch=step // epoch_length)
        path.append(swarm.consensus.clone())
    return ConsensusResult(swarm.consensus, best, best_value, torch.stack(path), evaluations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsensusSettings:
    """The arguments of :func:`cbo_minimize` that describe the dynamics, checked.

    Raises:
        ValueError: If a value is out of range.
    """

    scheme: Scheme = "cbo"
    n_particles: int = 100
    dt: float = 0.1
    lam: float = 1.0
    sigma: float = math.sqrt(0.4)
    alpha: float = 50.0
    noise: Noise = "anisotropic"
    particle_batch: int | None = None
    update: Literal["full", "partial"] = "full"
    alpha_schedule: AlphaSchedule = "constant"
    sigma_schedule: SigmaSchedule = "constant"
    stagnation_tol: float = 0.0
    init: Literal["around", "normal"] = "around"
    init_std: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("scheme", self.scheme, ["cbo", "hopping"])
        check_choice("noise", self.noise, ["anisotropic", "isotropic"])
        check_choice("update", self.update, ["full", "partial"])
        check_choice("alpha_schedule", self.alpha_schedule, ["constant", "double_per_epoch", "ess"])
        check_choice("sigma_schedule", self.sigma_schedule, ["constant", "log2", "decay"])
        check_choice("init", self.init, ["around", "normal"])
        check_interval("n_particles", self.n_particles, 2)
        check_interval("seed", self.seed, 0)
        for name in ("n_particles", "seed"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be an integer, got {getattr(self, name)!r}")
        check_interval("dt", self.dt, 0, closed="(]")
        check_interval("lam", self.lam, 0)
        check_interval("sigma", self.sigma, 0)
        check_interval("alpha", self.alpha, 0, closed="(]")
        check_interval("stagnation_tol", self.stagnation_tol, 0)
        check_interval("init_std", self.init_std, 0, closed="(]")
        if self.particle_batch is not None and (
            self.particle_batch not in range(2, self.n_particles + 1) or self.n_particles % self.particle_batch
        ):
            raise ValueError(
                f"particle_batch must be >= 2 and divide n_particles={self.n_particles}, got {self.particle_batch}"
            )
        if self.scheme == "hopping" and self.particle_batch is not None:
            raise ValueError(f"particle_batch must be None for scheme='hopping', got {self.particle_batch}")
        if self.scheme == "cbo" and self.lam * self.dt > 1:
            warnings.warn(
                f"lam * dt = {self.lam * self.dt:g} is above 1: particles jump over the consensus", stacklevel=4
            )

    def check_dimension(self, dimension: int) -> None:
        """Warn if the distances to the consensus grow on average.

        A move multiplies the expected square of a distance by ``(1 - lam dt)^2 + k sigma^2 dt``, where k is the
        dimension with isotropic noise and 1 with anisotropic noise.
        """
        k = dimension if self.noise == "isotropic" else 1
        if self.scheme == "cbo" and k * self.sigma**2 > 2 * self.lam - self.lam**2 * self.dt:
            bound = math.sqrt(max(2 * self.lam - self.lam**2 * self.dt, 0) / k)
            warnings.warn(
                f"with {self.noise} noise in {dimension} dimensions particles drift apart on average for sigma above"
                f" {bound:.3g}, got {self.sigma:g}",
                stacklevel=4,
            )

    def alpha_in(self, epoch: int) -> float:
        """Alpha after so many epochs; without meaning for "ess"."""
        return self.alpha * 2.0 ** min(epoch, 900) if self.alpha_schedule == "double_per_epoch" else self.alpha

    def sigma_in(self, epoch: int, step: int) -> float:
        """Sigma after so many epochs and steps."""
        if self.sigma_schedule == "log2":  # the product of log2(j + 1) / log2(j + 2) for j = 1 .. epoch
            return self.sigma / math.log2(epoch + 2)
        return self.sigma * 0.98 ** (step // 100) if self.sigma_schedule == "decay" else self.sigma


class Swarm:
    """Particles, or one point, that seek the minimum of a function; one part of them on each of several ranks.

    Every random number is a function of the seed, the step and the particle, so the parts of several ranks are
    together what one rank would have. Only :attr:`particles`, :attr:`consensus` and the two counters are state.

    Args:
        settings: The dynamics.
        start: Where to begin, ``[d]``.
        own: The particles that are held and evaluated here.
        gather: ``gather(values, own, n)`` puts together values of all ranks; see
            :meth:`lightning_opt.strategies.CBOStrategy.gather`.
        sum_over_ranks: Adds up a tensor over ranks, in place.

    Attributes:
        particles: Those held here, ``[len(own), d]``; empty with hopping.
        consensus: ``[d]``, the same on all ranks; at first ``start``.
        steps: Made so far.
        moves: Made so far: several a step if consensus is made from batches of particles.
        statistics: Of the last move: "best_loss", "alpha", "sigma", "ess", "moved" (largest coordinate) and "lost"
            (candidates whose value is not finite, in the last step).
    """

    def __init__(
        self,
        settings: ConsensusSettings,
        start: Tensor,
        own: range | None = None,
        gather: Callable[[Tensor, list[int], int], Tensor] = lambda values, own, n: values,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        settings.check_dimension(len(start))
        self.settings = settings
        self.own = range(settings.n_particles) if own is None else own
        self.consensus = start.clone()
        self.particles = start.new_empty(0, len(start))
        self.steps = 0
        self.moves = 0
        self.statistics: dict[str, float] = {}
        self._gather = gather
        self._sum_over_ranks = sum_over_ranks
        if settings.scheme == "cbo":
            center = start if settings.init == "around" else 0.0
            self.particles = center + settings.init_std * self._noise(self.own, INITIAL)

    def step(self, evaluate: Callable[[Tensor], Tensor], epoch: int = 0) -> None:
        """Evaluate every candidate once, on one objective, and find a new consensus.

        Args:
            evaluate: Maps points ``[n, d]`` to values ``[n]``.
            epoch: Epochs that are over, for the schedules.

        Raises:
            ValueError: If no value is finite; nothing has moved then.
        """
        lost = self._hop(evaluate, epoch) if self.settings.scheme == "hopping" else self._move(evaluate, epoch)
        self.statistics["lost"] = lost
        self.steps += 1

    def spread(self) -> dict[str, float]:
        """How far the particles are from the consensus: "diameter" (the largest distance) and "variance" (mean square).

        Nothing for hopping. One pass over the particles, and two sums over ranks.
        """
        if self.settings.scheme == "hopping":
            return {}
        squares = (self.particles - self.consensus).square().sum(dim=1)
        squares = self._gather(squares, list(self.own), self.settings.n_particles)
        return {"diameter": squares.max().sqrt().item(), "variance": squares.mean().item()}

    def _move(self, evaluate: Callable[[Tensor], Tensor], epoch: int) -> int:
        s, lost = self.settings, 0
        sigma = s.sigma_in(epoch, self.steps)
        order = torch.arange(s.n_particles)
        if s.particle_batch is not None:
            order = torch.randperm(s.n_particles, generator=self._generator(torch.device("cpu"), ORDER, self.steps))
        for batch in order.split(s.particle_batch or s.n_particles):
            places = [k for k, i in enumerate(batch.tolist()) if i in self.own]  # in the batch, of those held here
            rows = batch[places].to(self.particles.device) - self.own.start
            everyone = len(rows) == len(self.particles) and s.particle_batch is None
            points = self.particles if everyone else self.particles[rows]
            values = self._gather(evaluate(points).double(), places, len(batch))
            weights, lost_now = self._weigh(values, epoch)
            consensus = self._sum_over_ranks(_weighted_sum(weights[places], points)).to(points.dtype)
            moved = (consensus - self.consensus).abs().max().item()
            stagnates = self.moves > 0 and moved < s.stagnation_tol
            self.consensus, lost = consensus, lost + lost_now
            self.statistics.update(sigma=sigma, moved=moved)

            noise = self._noise(self.own, MOVE)
            if s.update == "full" or everyone:
                cbo_move_(self.particles, consensus, noise, dt=s.dt, lam=s.lam, sigma=sigma, kind=s.noise)
            else:
                points = points.clone()
                self.particles[rows] = cbo_move_(
                    points, consensus, noise[rows], dt=s.dt, lam=s.lam, sigma=sigma, kind=s.noise
                )
            if stagnates:
                self.particles += sigma * math.sqrt(s.dt) * self._noise(self.own, KICK)
            self.moves += 1
        return lost

    def _hop(self, evaluate: Callable[[Tensor], Tensor], epoch: int) -> int:
        n, d = self.settings.n_particles, len(self.consensus)
        sigma = self.settings.sigma_in(epoch, self.steps)
        values = [
            evaluate(self.consensus + sigma * self._noise(some, MOVE)) for some in _pieces(self.own, max(1, ROWS // d))
        ]
        own = torch.cat([self.consensus.new_empty(0, dtype=torch.float64), *values])
        weights, lost = self._weigh(self._gather(own, list(self.own), n), epoch)
        # every rank draws the candidates of all again, those that count, and adds in one order
        hop = torch.zeros_like(self.consensus)
        for some in _pieces(range(n), _block(d)):
            part = weights[some.start : some.stop]
            if part.any():
                hop += part.to(hop.dtype) @ self._noise(some, MOVE)
        self.statistics.update(sigma=sigma, moved=sigma * hop.abs().max().item())
        self.consensus = self.consensus + sigma * hop
        self.moves += 1
        return lost

    def _weigh(self, values: Tensor, epoch: int) -> tuple[Tensor, int]:
        s = self.settings
        alpha = alpha_for_ess(values) if s.alpha_schedule == "ess" else s.alpha_in(epoch)
        weights = consensus_weights(values, alpha)
        finite = values.isfinite()
        self.statistics.update(
            best_loss=values[finite].min().item(), alpha=alpha, ess=1 / weights.square().sum().item()
        )
        return weights, int((~finite).sum())

    def _noise(self, particles: range, stream: int) -> Tensor:
        """Normal numbers ``[len(particles), d]`` of some particles in this move."""
        like, d = self.consensus, len(self.consensus)
        block = _block(d)
        drawn = like.new_empty(len(particles), d)
        for number in range(particles.start // block, -(-particles.stop // block)):
            generator = self._generator(like.device, stream, self.moves, number)
            numbers = torch.randn(block, d, generator=generator, dtype=like.dtype, device=like.device)
            first = number * block
            some = range(max(first, particles.start), min(first + block, particles.stop))
            drawn[some.start - particles.start : some.stop - particles.start] = numbers[
                some.start - first : some.stop - first
            ]
        return drawn

    def _generator(self, device: torch.device, *key: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(_mix(self.settings.seed, *key))


def consensus_point(points: Tensor, values: Tensor, alpha: float) -> Tensor:
    """The mean of points with the weights ``exp(-alpha value)``.

    Args:
        points: ``[n, d]``.
        values: ``[n]``; those that are not finite have no weight.
        alpha: Sharpness.

    Returns:
        ``[d]``.

    Raises:
        ValueError: If no value is finite.

    Example:
        >>> consensus_point(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, torch.inf]), alpha=1.0)
        tensor([0.])
    """
    return _weighted_sum(consensus_weights(values, alpha), points).to(points.dtype)


def consensus_weights(values: Tensor, alpha: float) -> Tensor:
    """The weights ``exp(-alpha value)``, float64, with sum 1.

    The least value is subtracted first, so a constant added to all of them changes nothing.

    Raises:
        ValueError: If no value is finite.

    Example:
        >>> consensus_weights(torch.tensor([1e6, 1e6, torch.nan]), alpha=1e3)
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    values = _finite_or_infinite(values)
    weights = torch.exp(-alpha * (values - values.min()))
    return weights / weights.sum()


def alpha_for_ess(values: Tensor, share: float = 0.5) -> float:
    """The sharpness at which the weights are worth a share of the candidates.

    Args:
        values: ``[n]``.
        share: The effective sample size ``1 / sum(w^2)`` divided by n, in (1/n, 1).

    Returns:
        Alpha, by bisection. Where the share is out of reach, since many values are equal or few finite, the nearest.

    Raises:
        ValueError: If no value is finite.

    Example:
        >>> values = torch.arange(10.0)
        >>> alpha = alpha_for_ess(values)
        >>> round(1 / consensus_weights(values, alpha).square().sum().item(), 6)
        5.0
    """
    finite = _finite_or_infinite(values)
    above = finite[finite.isfinite()] - finite.min()
    scale = above.max().item()
    if scale == 0:
        return 1.0
    low, high = 1e-9 / scale, 1e12 / scale
    for _ in range(100):
        alpha = math.sqrt(low * high)
        enough = 1 / consensus_weights(values, alpha).square().sum().item() > share * len(values)
        low, high = (alpha, high) if enough else (low, alpha)
    return math.sqrt(low * high)


def cbo_move_(
    points: Tensor, consensus: Tensor, noise: Tensor, *, dt: float, lam: float, sigma: float, kind: Noise
) -> Tensor:
    """One step of Euler and Maruyama of the particles' dynamics, in place (arXiv:2306.09778).

    ``v <- v - lam dt D + sigma sqrt(dt) |D| xi`` with ``D = v - consensus``; for anisotropic noise coordinate by
    coordinate, with D itself for its absolute value, which has the same law.

    Args:
        points: ``[n, d]``, changed.
        consensus: ``[d]``.
        noise: xi, ``[n, d]``, used up.
        dt: Step of time.
        lam: Drift.
        sigma: Noise.
        kind: Of noise.

    Returns:
        ``points``.

    Example:
        >>> cbo_move_(torch.ones(1, 2), torch.zeros(2), torch.ones(1, 2), dt=0.25, lam=1.0, sigma=0.5, kind="isotropic")
        tensor([[1.1036, 1.1036]])
    """
    distance = points - consensus
    if kind == "isotropic":
        noise.mul_(sigma * math.sqrt(dt) * distance.norm(dim=1, keepdim=True)).sub_(distance, alpha=lam * dt)
        return points.add_(noise)
    return points.addcmul_(noise.mul_(sigma * math.sqrt(dt)).sub_(lam * dt), distance)


def _weighted_sum(weights: Tensor, points: Tensor) -> Tensor:
    """In float64, so that it hardly matters how the points are shared out over ranks."""
    total = points.new_zeros(points.shape[1], dtype=torch.float64)
    counted = weights.nonzero()[:, 0].to(points.device)  # 0 times infinity would be NaN
    for some in counted.split(max(1, ROWS // points.shape[1])):
        total += weights[some] @ points[some].double()
    return total


def _finite_or_infinite(values: Tensor) -> Tensor:
    finite = values.isfinite()
    if not finite.any():
        raise ValueError(f"some value must be finite, got {values[:3].tolist()}{'...' * (len(values) > 3)}")
    return torch.where(finite, values.double(), math.inf)


def _block(dimension: int) -> int:
    """Particles that share the seed of their random numbers."""
    return max(1, BLOCK // dimension)


def _pieces(of: range, size: int) -> Iterator[range]:
    """A range in pieces that begin at multiples of ``size``, where ``of`` does not begin or end between them."""
    for first in range(of.start // size * size, of.stop, size):
        yield range(max(first, of.start), min(first + size, of.stop))


def _mix(*key: Any) -> int:
    """A seed of 63 bits from several numbers: splitmix64 of each on top of the others."""
    state = 0
    for number in key:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
