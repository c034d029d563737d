"""One client of FZooS: its queries, its surrogate, and its part of a round."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adam import Adam
from .box import Box
from .evaluate import Objective, finite
from .gaussian_process import GaussianProcess
from .random_features import RandomFeatures
from .settings import FZooSSettings

_REPEATS = 5  # evaluations that noise="auto" measures the noise with
_LENGTHSCALES = tuple(2.0**k for k in range(-3, 5))  # times the first one, for lengthscale="fit"


@dataclasses.dataclass(frozen=True)
class Move:
    """What made a client move.

    Attributes:
        gradient_uncertainty: Of the surrogate, where it moved from.
        correction_norm: The norm of what the clients' mean surrogate added to the gradient.
    """

    gradient_uncertainty: float
    correction_norm: float


class Client:
    """One client's half of FZooS (arXiv:2308.04077); the server's is the mean over clients of two messages a round.

    :meth:`step` until ``round_is_over``, then, with ``mean`` over all clients:

        new = mean(client.point_message())
        weights = mean(client.weights_message(new, objective))
        client.end_round(weights)

    Points are in the coordinates of the box, except for the objective: it takes several in the user's coordinates,
    ``[m, d]``, and returns their values ``[m]``, finite numbers.

    Args:
        x0: Start ``[d]`` in the coordinates of the box, the same for all clients.
        settings: The same for all clients.
        index: The number of this client: it draws other candidates than the others.
        box: To stay in.
        name: What an error calls it; default ``client <index>``.

    Attributes:
        x: Where the client is, float64 ``[d]``.
        queries: Evaluations so far.
        num_bytes: Bytes of the messages sent and received so far.
        rounds: Rounds that have ended.
        objective: The mean of all clients' values at the server's last point; NaN before the first round has ended.
        first_objective: The same at the start.

    Cost:
        A step takes ``1 + active`` evaluations, a round's last step 1, its end ``1 + sync_active``; a step besides
        O(max_local^2 (max_local + active_pool + d)) operations. Memory: 8 (d + 1) bytes a query.
    """

    def __init__(self, x0: Tensor, settings: FZooSSettings, index: int, box: Box, name: str = "") -> None:
        self.settings = settings
        self.index = index
        self.box = box
        self.name = name or f"client {index}"
        self.x = x0.detach().to(torch.float64).clone()
        dim = len(self.x)
        self.points = torch.zeros(0, dim, dtype=torch.float64)
        self.values = torch.zeros(0, dtype=torch.float64)
        self.queries = self.num_bytes = self.rounds = 0
        self.objective = self.first_objective = math.nan
        self.noise_variance = 0.0  # measured, in the units of the objective
        self.features = RandomFeatures(
            dim, settings.n_features, lengthscale=settings.first_lengthscale(dim), seed=_mixed(settings.seed, 0)
        )
        self.generator = torch.Generator().manual_seed(_mixed(settings.seed, 1 + index))
        self._to_measure = _REPEATS if settings.noise == "auto" else 0
        self._first_value = math.nan
        self._own_weights = self._mean_weights = torch.zeros(0, dtype=torch.float64)  # [M] after the first round
        self._begin_round()

    @property
    def measures_noise(self) -> bool:
        """Whether the next step evaluates the start once more and does not move."""
        return self._to_measure > 0

    @property
    def steps(self) -> int:
        """Steps of this round, with those that measured the noise before the first."""
        return self._t + (_REPEATS - self._to_measure if self.settings.noise == "auto" else 0)

    @property
    def round_is_over(self) -> bool:
        """Whether the messages are due."""
        return self._t == self.settings.local_steps

    @property
    def point_size(self) -> int:
        """Of the :meth:`point_message`."""
        extras = 1 + (len(_LENGTHSCALES) if self.settings.lengthscale == "fit" else 0)
        return len(self.x) + (0 if self.rounds else extras)

    @property
    def weights_size(self) -> int:
        """Of the :meth:`weights_message`."""
        return self.settings.n_features + 1

    def step(self, objective: Objective) -> None:
        """Move once, and evaluate there and near by; or evaluate where it is, while the noise is measured.

        Raises:
            NonFiniteObjectiveError: If a value is NaN or infinite.
        """
        if self.begin(objective):
            self.move()
        self.look(objective)

    def skip(self) -> None:
        """Count a step, but take none: for a client that has failed while others go on."""
        if self.measures_noise:
            self._to_measure -= 1
        else:
            self._t += 1

    def begin(self, objective: Objective) -> bool:
        """Evaluate the start and points near by before the first move; returns whether it is time to move."""
        if self.measures_noise:
            return False
        if self.rounds == self._t == 0:
            if not self.queries:
                self._query(self.x[None], objective)
            self._first_value = float(self.values.mean())
            self._query(self._candidates(self.settings.init, self.settings.radius), objective)
        return True

    def move(self) -> Move:
        """Take one step along the surrogates' gradient; costs no evaluation."""
        self._t += 1
        surrogate = self._surrogate()
        gradient, correction = surrogate.gradient(self.x), torch.zeros_like(self.x)
        if len(self._mean_weights):
            correction = self.features.gradient(self.x, self._mean_weights - self._own_weights)
            correction *= self.settings.gamma / self._t
        uncertainty = float(surrogate.gradient_uncertainty(self.x[None]))
        self.x = self.box.clip(self.x - self._adam.step(gradient + correction))
        return Move(uncertainty, float(correction.norm()))

    def look(self, objective: Objective, value: Tensor | None = None) -> None:
        """Evaluate where it is and, except in a round's last step, near by where the gradient is unsure.

        Args:
            objective: As above.
            value: Of the objective where it is, 0-dim, if that is known; it is counted as an evaluation.
        """
        self._query(self.x[None], objective if value is None else lambda _: value.reshape(1))
        if self.measures_noise:
            self._to_measure -= 1
            self.noise_variance = 0.0 if self._to_measure else float(self.values.var())
        elif not self.round_is_over:  # from the last point the server moves away
            self._query_unsure(self.settings.active, self.settings.active_pool, self.settings.radius, objective)

    def point_message(self) -> Tensor:
        """What the server averages first: the point, and after the first round what only that one needs."""
        return torch.cat([self.x, *self._first_round_extras()])

    def weights_message(self, mean: Tensor, objective: Objective) -> Tensor:
        """Move to the server's point, evaluate there and near by; what the server averages next.

        Args:
            mean: Of the clients' :meth:`point_message`.
            objective: As for :meth:`step`.

        Returns:
            The weights of the random features and the value at the server's point, ``[M + 1]``.
        """
        self.num_bytes += 2 * 8 * len(mean)
        new, extras = mean[: len(self.x)], mean[len(self.x) :]
        if len(extras):
            self.first_objective = self.objective = float(extras[0])
            if self.settings.lengthscale == "fit":
                self.features.lengthscale *= _LENGTHSCALES[int(extras[1:].argmax())]
        moved = float((new - self.x).abs().mean())
        self.x = new.clone()
        value = self._query(self.x[None], objective)
        radius = moved / 2 or self.settings.radius  # one client stays where it is
        self._query_unsure(self.settings.sync_active, self.settings.sync_pool, radius, objective)
        self._own_weights = self.features.fit(
            *self._nearest(self.settings.max_global), noise=self._noise(), least_variance=self.noise_variance
        )
        return torch.cat([self._own_weights, value])

    def end_round(self, mean: Tensor) -> None:
        """Take the server's weights, and begin the next round.

        Args:
            mean: Of the clients' :meth:`weights_message`.
        """
        self.num_bytes += 2 * 8 * len(mean)
        self._mean_weights, objective = mean[:-1].clone(), float(mean[-1])
        if self.settings.keep_best and objective >= self.objective:
            self.x = self._round_start
        else:
            self.objective = objective
        self.rounds += 1
        self._begin_round()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on besides arguments: tensors and builtins."""
        state = {name: getattr(self, name) for name in _STATE}
        return {
            **state,
            "seed": self.settings.seed,
            "lengthscale": self.features.lengthscale,
            "generator": self.generator.get_state(),
            "moments": [self._adam.first, self._adam.second],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the arguments must be the same."""
        for name in _STATE:
            value = state[name]
            setattr(self, name, value.to("cpu", copy=True) if isinstance(value, Tensor) else value)
        self.features.lengthscale = state["lengthscale"]
        self.generator.set_state(state["generator"].cpu())
        self._adam.first, self._adam.second = (moment.to("cpu", copy=True) for moment in state["moments"])
        self._adam.steps = self._t

    def _begin_round(self) -> None:
        self._t = 0
        self._round_start = self.x
        self._adam = Adam(self.settings.lr, self.x)

    def _query(self, points: Tensor, objective: Objective) -> Tensor:
        """Evaluate points ``[m, d]``, remember them all, and return their values."""
        values = finite(objective(self.box.from_unit(points)), self.name) if len(points) else self.values[:0]
        self.points = torch.cat([self.points, points])
        self.values = torch.cat([self.values, values])
        self.queries += len(values)
        return values

    def _query_unsure(self, count: int, pool: int, radius: float, objective: Objective) -> None:
        """Evaluate those of a random pool where the gradient of the surrogate is least sure."""
        if count:
            candidates = self._candidates(pool, radius)
            uncertainty = self._surrogate().gradient_uncertainty(candidates)
            self._query(candidates[uncertainty.argsort(descending=True, stable=True)[:count]], objective)

    def _candidates(self, count: int, radius: float) -> Tensor:
        """Random points ``[count, d]`` of the box around the point."""
        offsets = 2 * torch.rand(count, len(self.x), generator=self.generator, dtype=torch.float64) - 1
        return self.box.clip(self.x + radius * offsets)

    def _surrogate(self, lengthscale: float | None = None) -> GaussianProcess:
        return GaussianProcess(
            *self._nearest(self.settings.max_local),
            lengthscale=lengthscale or self.features.lengthscale,
            noise=self._noise(),
            least_variance=self.noise_variance,
        )

    def _nearest(self, count: int) -> tuple[Tensor, Tensor]:
        """The nearest queries, as many as there are or fewer."""
        nearest = (self.points - self.x).square().sum(1).argsort(stable=True)[:count]
        return self.points[nearest], self.values[nearest]

    def _noise(self) -> float:
        return 1e-6 if isinstance(self.settings.noise, str) else float(self.settings.noise)

    def _first_round_extras(self) -> list[Tensor]:
        """The value at the start and, to choose a lengthscale, the likelihood of each; nothing after later rounds."""
        if self.rounds:
            return []
        extras = [self._first_value]
        if self.settings.lengthscale == "fit":
            for factor in _LENGTHSCALES:
                extras.append(self._surrogate(factor * self.features.lengthscale).log_marginal_likelihood())
        return [torch.tensor(extras, dtype=torch.float64)]


_STATE = (
    "x",
    "points",
    "values",
    "queries",
    "num_bytes",
    "rounds",
    "objective",
    "first_objective",
    "noise_variance",
    "_to_measure",
    "_first_value",
    "_own_weights",
    "_mean_weights",
    "_t",
    "_round_start",
)


def _mixed(*key: int) -> int:
    """A seed of 63 bits from several numbers, without the overlaps of adding them."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
