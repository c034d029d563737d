import gymnasium
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.data import Episodes
from lightning_opt.models import MLP, GymnasiumPolicy
from lightning_opt.solvers.deep_ga import fan_in_init, unflatten, write
from lightning_opt.strategies import CBOStrategy, DeepGAStrategy

pytestmark = pytest.mark.usefixtures("one_thread")


class CartPole(GymnasiumPolicy):
    def __init__(self, net=None, **options):
        super().__init__("CartPole-v1", net or MLP(4, (8,), 2), **options)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def played_alone(policy, seed, max_steps=10_000):
    """The return of an episode in an environment of its own."""
    environment = gymnasium.make("CartPole-v1")
    seen, _ = environment.reset(seed=seed)
    total = 0.0
    for _ in range(max_steps):
        action = policy(torch.from_numpy(seen)[None]).argmax().item()
        seen, reward, terminated, truncated, _ = environment.step(action)
        total += reward
        if terminated or truncated:
            break
    return total


def leaning(policy):
    """Pushes to the side that the pole leans to: too simple to last."""
    weights = torch.zeros(10)
    weights[2], weights[6] = -1.0, 1.0
    write(policy, weights)
    return policy


def policies(count, policy, seed=0):
    init = fan_in_init(policy)
    return torch.stack([init(seed + i) for i in range(count)])


def test_episodes_side_by_side_are_those_played_alone():
    policy = leaning(CartPole(MLP(4, (), 2)))
    seeds = torch.tensor([3, 8, 3, 2**31 - 1])
    expected = [played_alone(policy, int(seed)) for seed in seeds]
    assert policy.returns(seeds).tolist() == expected
    assert len(set(expected)) == 3
    short = leaning(CartPole(MLP(4, (), 2), max_steps=30))
    assert short.returns(seeds).tolist() == [min(30.0, value) for value in expected]
    policy.teardown("fit")


def test_a_population_plays_as_its_members_do():
    policy, batch = CartPole(), torch.arange(3)
    weights = policies(6, policy)
    torch.manual_seed(5)
    losses = policy.population_losses(unflatten(policy, weights), batch)
    alone = []
    for vector in weights:
        write(policy, vector)
        torch.manual_seed(5)
        seeds = (batch + torch.randint(2**31, ())) % 2**31
        alone.append(-policy.returns(seeds).mean())
    assert losses.tolist() == torch.stack(alone).tolist()
    assert len(set(losses.tolist())) > 3
    torch.manual_seed(6)  # other episodes
    assert policy.population_losses(unflatten(policy, weights), batch).tolist() != losses.tolist()


def test_seeds_of_the_stages_are_different():
    data = Episodes(batch_size=4, batches=3, val_episodes=5, test_episodes=6)
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    seeds = [sorted(torch.cat(list(loader)).tolist()) for loader in loaders]
    assert seeds == [list(range(11, 23)), list(range(5)), list(range(5, 11))]
    with pytest.raises(ValueError, match="batches"):
        Episodes(batches=0)


def trained(strategy, module, data, steps):
    trainer = pl.Trainer(
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    return trainer


def test_the_pole_is_balanced():
    strategy = DeepGAStrategy(population=40, truncation=8, mutation_power=0.5, init="fan_in", chunk=20)
    policy, data = CartPole(max_steps=200), Episodes(batch_size=2, batches=4, val_episodes=5, test_episodes=10)
    trainer = trained(strategy, policy, data, steps=4)
    assert trainer.callback_metrics["ga/best"] == trainer.callback_metrics["train/return"]
    assert trainer.callback_metrics["val/return"] > 100  # untrained ones fall after some 10 to 60 steps
    result = trainer.test(policy, data, verbose=False)[0]
    assert result["test/return"] == -result["test/loss"] > 100
    predicted = torch.cat(trainer.predict(policy, data))
    assert predicted.mean() == result["test/return"]


def test_a_strategy_that_knows_nothing_of_populations_plays_too():
    policy = CartPole(max_steps=20)
    trainer = trained(CBOStrategy(n_particles=3), policy, Episodes(batch_size=2, val_episodes=2), steps=1)
    assert 1 <= trainer.callback_metrics["train/return"] <= 20


class Frames(nn.Module):
    """Remembers what it sees, and does nothing, or walks down."""

    def __init__(self, action):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.action = action
        self.seen = []

    def forward(self, observations):
        self.seen.append(observations.clone())
        scores = torch.zeros(len(observations), 18)
        scores[:, self.action] = self.scale
        return scores


def test_atari_points_are_those_of_the_game():
    options = {"noop_max": 0, "repeat_action_probability": 0.0, "img_height": 28, "img_width": 30, "stack_num": 2}
    policy = GymnasiumPolicy("ALE/Frostbite-v5", Frames(action=5), max_steps=60, env_options=options)
    returns = policy.returns(torch.tensor([1, 2]))
    game = gymnasium.make("ALE/Frostbite-v5", frameskip=4, repeat_action_probability=0.0)
    game.reset()
    points = [game.step(5)[1] for _ in range(60)]
    assert returns.tolist() == [sum(points)] * 2  # without sticky actions and idle ones, episodes are the same
    assert sum(points) > 0
    seen = policy.net.seen
    assert len(seen) == 60
    assert seen[0].shape == (2, 2, 28, 30)
    assert 0 <= seen[5].min() < 0.5 < seen[5].max() <= 1
    film = policy.film(seed=1, count=5)
    assert film.shape == (5, 210, 160, 3)
    assert film.dtype == np.uint8
    last = game.unwrapped.ale.getScreenRGB()
    same = [(frame == last).mean() for frame in film]
    assert same[-1] == max(same) > 0.95  # the film shows the brighter of two frames
    policy.teardown("fit")


def test_bad_input():
    with pytest.raises(ValueError, match="discrete actions"):
        GymnasiumPolicy("Pendulum-v1", nn.Linear(3, 1))
    with pytest.raises(ValueError, match="max_steps"):
        CartPole(max_steps=0)
    with pytest.raises(ValueError, match="one of ale-py, got CartPole-v1"):
        CartPole().film(0)
    with pytest.raises(gymnasium.error.Error, match="CartPle"):
        GymnasiumPolicy("CartPle-v1", nn.Linear(3, 1))
