from collections.abc import Callable
from typing import Any

import gymnasium
import lightning.pytorch as pl
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

Act = Callable[[Tensor], Tensor]


@register("module", summary="A policy that plays gymnasium environments; its loss is minus the return")
class GymnasiumPolicy(pl.LightningModule):
    """Plays episodes of a gymnasium environment with a network; the loss is minus the mean episodic return.

    The loss has no gradient: train it with a strategy that needs none, such as ``--trainer.strategy=deep_ga``. A batch
    is int64 ``[B]``, one seed an episode, as :class:`lightning_opt.data.Episodes` gives them. In training a number from
    torch's global generator is added to the seeds, so that an evaluation with other random numbers is one on other
    episodes. The policy takes the action of the largest output. Episodes of a batch, and of a population
    (:meth:`population_losses`), run side by side in a vectorized environment, and so does the network.

    Observations of bytes are divided by 255. Environments of ``ale-py`` (``"ALE/..."``) are its own vectorized ones:
    grey frames of ``img_height`` x ``img_width``, the last ``stack_num`` of them as channels, four frames an action, up
    to 30 random idle actions first; rewards are the game's, not clipped.

    Logs ``train/return`` by step, and ``val/return``, ``test/return`` and their losses as means over episodes.
    Prediction gives the returns ``[B]``.

    Args:
        env: An environment of gymnasium with discrete actions. A class that is not registered is reached as
            ``"module:id"``.
        net: Maps observations ``[B, ...]`` to one number an action ``[B, actions]``.
        max_steps: Ends an episode after so many actions; None where the environment ends by itself.
        env_options: Further arguments of the environment.

    Raises:
        ValueError: If the environment has no discrete actions or ``max_steps`` is below 1.

    Cost: a step of the environment an action; environments stay open until the stage is over.

    Example:
        >>> policy = GymnasiumPolicy("CartPole-v1", nn.Linear(4, 2))
        >>> returns = policy.returns(torch.arange(3))
        >>> returns.shape, bool((returns >= 1).all())
        (torch.Size([3]), True)
    """

    def __init__(
        self,
        env: str,
        net: nn.Module,
        max_steps: int | None = None,
        env_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if max_steps is not None:
            check_interval("max_steps", max_steps, 1)
        self.net = net
        self.max_steps = max_steps
        self.environments = _Environments(env, env_options or {})

    def forward(self, observations: Tensor) -> Tensor:
        """One number an action, ``[B, actions]``."""
        return self.net(observations)

    def training_step(self, batch: Tensor) -> Tensor:
        """Minus the mean return of the episodes of a batch."""
        mean = self.returns(self._fresh(batch)).mean()
        self.log("train/return", mean, prog_bar=True, batch_size=len(batch))
        return -mean

    def validation_step(self, batch: Tensor) -> None:
        """Returns of a batch of episodes."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Tensor) -> None:
        """Returns of a batch of episodes."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Tensor) -> Tensor:
        """Returns ``[B]`` of the episodes of a batch."""
        return self.returns(batch)

    def population_losses(self, parameters: dict[str, Tensor], batch: Tensor) -> Tensor:
        """The losses of several policies on the same episodes, which all run side by side.

        Args:
            parameters: By their names in this module, each ``[n, *shape]``.
            batch: Seeds ``[B]``.

        Returns:
            ``[n]``.
        """
        n = len(next(iter(parameters.values())))
        own = {name.removeprefix("net."): value for name, value in parameters.items()}
        each = torch.vmap(lambda values, seen: torch.func.functional_call(self.net, values, (seen,)), randomness="same")

        def act(observations: Tensor) -> Tensor:
            return each(own, observations.unflatten(0, (n, len(batch)))).flatten(0, 1)

        return -self._play(act, self._fresh(batch).repeat(n)).view(n, len(batch)).mean(dim=1)

    def returns(self, seeds: Tensor) -> Tensor:
        """The returns of episodes, float32 ``[B]``.

        Args:
            seeds: ``[B]``.
        """
        return self._play(self.net, seeds)

    @torch.no_grad()
    def film(self, seed: int, count: int = 8) -> np.ndarray:
        """Pictures of one episode of an Atari game, evenly spread over it.

        Args:
            seed: Of the episode.
            count: Number of pictures.

        Returns:
            uint8 ``[count, 210, 160, 3]``.

        Raises:
            ValueError: If the environment is not one of ``ale-py``.
        """
        frames: list[np.ndarray] = []
        screen = self.environments.screen()
        frames.append(screen.reset(seed=np.array([seed]))[0][0])

        def act(observations: Tensor) -> Tensor:
            scores = self.net(observations)
            frames.append(screen.step(scores.argmax(dim=1).cpu().numpy())[0][0])
            return scores

        self._play(act, torch.tensor([seed]))
        screen.close()
        chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
        return np.stack([frames[i].reshape(-1, *frames[i].shape[-3:])[-1] for i in chosen])

    def teardown(self, stage: str) -> None:
        """Close the environments."""
        self.environments.close()

    def _fresh(self, batch: Tensor) -> Tensor:
        return (batch + torch.randint(2**31, (), device="cpu").to(batch.device)) % 2**31

    def _evaluate(self, batch: Tensor, stage: str) -> None:
        mean = self.returns(batch).mean()
        self.log(f"{stage}/return", mean, prog_bar=True, batch_size=len(batch), sync_dist=True)
        self.log(f"{stage}/loss", -mean, batch_size=len(batch), sync_dist=True)

    @torch.no_grad()
    def _play(self, act: Act, seeds: Tensor) -> Tensor:
        """Returns of episodes whose observations, side by side, ``act`` answers with scores of actions."""
        environment = self.environments.of(len(seeds))
        seen = environment.reset(seeds)
        returns, running, steps = np.zeros(len(seeds)), np.ones(len(seeds), dtype=bool), 0
        while running.any() and (self.max_steps is None or steps < self.max_steps):
            observations = torch.from_numpy(seen).to(self.device)
            observations = observations / 255 if observations.dtype == torch.uint8 else observations
            actions = act(observations.to(self.dtype)).argmax(dim=1).cpu().numpy()
            seen, rewards, ended = environment.step(actions)
            returns += np.where(running, rewards, 0.0)
            running &= ~ended
            steps += 1
        return torch.from_numpy(returns).float().to(self.device)


class _Environments:
    """Vectorized environments by the number of episodes that they run side by side, made when they are needed."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, options
        self.atari = name.startswith("ALE/")
        if self.atari:
            import ale_py

            gymnasium.register_envs(ale_py)
            self.options = {"reward_clipping": False, **options}
        self._open: dict[int, _Environment] = {}
        single = self._make(1)
        space = single.single_action_space
        single.close()
        if not isinstance(space, gymnasium.spaces.Discrete) or space.start != 0:
            raise ValueError(f"env must have discrete actions, got {name} with {space}")

    def of(self, count: int) -> "_Environment":
        if count not in self._open:
            self._open[count] = _Environment(self._make(count), self.atari)
        return self._open[count]

    def screen(self) -> VectorEnv:
        """One more environment of the game, seen as a player sees it."""
        if not self.atari:
            raise ValueError(f"env must be one of ale-py, got {self.name}")
        options = {**self.options, "img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1}
        return self._make(1, options)

    def close(self) -> None:
        for environment in self._open.values():
            environment.vector.close()
        self._open.clear()

    def _make(self, count: int, options: dict[str, Any] | None = None) -> VectorEnv:
        given = self.options if options is None else options
        if self.atari:
            return gymnasium.make_vec(self.name, count, vectorization_mode="vector_entry_point", **given)
        vector = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        return gymnasium.make_vec(self.name, count, vectorization_mode="sync", vector_kwargs=vector, **given)


class _Environment:
    """One vectorized environment: each episode has a seed of its own."""

    def __init__(self, vector: VectorEnv, atari: bool) -> None:
        self.vector, self.atari = vector, atari

    def reset(self, seeds: Tensor) -> np.ndarray:
        numbers = seeds.cpu().numpy()
        return self.vector.reset(seed=numbers if self.atari else numbers.tolist())[0]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observations, rewards, and which episodes ended; what follows an end is another episode."""
        seen, rewards, terminated, truncated, _ = self.vector.step(actions)
        return seen, rewards, terminated | truncated
