import pytest
import torch

from lightning_opt.solvers.deep_ga import DeceptiveMaze


@pytest.fixture
def steered():
    """The maze, and a network that gives a constant turn and speed."""
    maze = DeceptiveMaze(steps=60)

    def network(turn, speed):
        weights = torch.zeros(1, maze.n_params, dtype=torch.float64)
        weights[0, -maze.hidden - 2] = turn  # the last bias but one row: outputs are tanh of the biases
        weights[0, -1] = speed
        return weights

    return maze, network


def test_straight_ahead_is_the_trap(steered):
    maze, network = steered
    fitness, behavior = maze(network(0.0, 20.0))
    # at full speed 0.5 a step until 0.05 before the wall at y = 6
    torch.testing.assert_close(behavior, torch.tensor([[5.0, 5.95]], dtype=torch.float64))
    torch.testing.assert_close(fitness, torch.tensor([-3.05], dtype=torch.float64))
    trail = maze.trails(network(0.0, 0.0))[0]
    torch.testing.assert_close(trail[:, 0], torch.full((61,), 5.0, dtype=torch.float64))
    torch.testing.assert_close(trail[4], torch.tensor([5.0, 2.0], dtype=torch.float64))  # 0.25 a step at no output


def test_a_constant_turn_is_a_circle(steered):
    maze, network = steered
    trail = maze.trails(network(20.0, 0.0))[0]  # half a radian and a quarter of a unit a step
    center = torch.tensor([5.0, 1.0], dtype=torch.float64)
    steps = trail.diff(dim=0)
    headings = torch.pi / 2 + 0.5 * torch.arange(1, 61, dtype=torch.float64)
    torch.testing.assert_close(steps, 0.25 * torch.stack([headings.cos(), headings.sin()], dim=1))
    assert (trail - center).norm(dim=1).max() < 2 * 0.125 / torch.tensor(0.25).sin() + 1e-6  # its diameter


def test_nobody_walks_through_walls():
    maze = DeceptiveMaze(steps=50)
    weights = torch.randn(300, maze.n_params, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trail = maze.trails(weights)
    assert (trail > 0).all()
    assert (trail < 10).all()
    before, after = trail[:, :-1], trail[:, 1:]
    share = (6 - before[..., 1]) / (after[..., 1] - before[..., 1])
    x = before[..., 0] + share * (after[..., 0] - before[..., 0])
    assert not ((share >= 0) & (share <= 1) & (x < 8.5)).any()
    assert (trail[:, -1] - trail[:, 0]).norm(dim=1).max() > 3


def test_who_reaches_the_goal_stays(steered):
    maze, network = steered
    maze.start = (5.0, 8.0)
    fitness, behavior = maze(network(0.0, 0.0))
    assert fitness.item() == 0
    torch.testing.assert_close(behavior, torch.tensor([[5.0, 8.75]], dtype=torch.float64))  # the first below 0.5 away


def test_bad_input():
    with pytest.raises(ValueError, match="steps"):
        DeceptiveMaze(steps=0)
    with pytest.raises(ValueError, match="hidden"):
        DeceptiveMaze(hidden=0)
