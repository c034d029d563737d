"""The deceptive task on which novelty search is measured."""

import torch
from torch import Tensor

from lightning_opt._checks import check_interval


class DeceptiveMaze:
    """A robot in a maze whose walls lie where a greedy search wants to go; it is steered by a small network.

    The room is 10 x 10. The robot starts at (5, 1); the goal is at (5, 9), straight ahead. Between them are a wall from
    the left, at y = 6 up to x = 8.5, from whose end another goes down to y = 2, and a wall from the right, at y = 7.5
    down to x = 1.5. Who goes towards the goal ends below the first wall, at a distance of 3. The way leads down around
    the hook, up on the right, and between the walls to the far left.

    At each of its steps the robot sees six distances to the nearest wall (rays at -90, -45, 0, 45, 90 and 180 degrees
    from its heading) and in which of four quadrants the goal lies. A network with 16 tanh units gives a turn and a
    speed.

    Source: after the hard maze of Lehman and Stanley (2011), which arXiv:1712.06567, section 4.2 takes up; this room
    is ours.

    Args:
        steps: Steps of an episode.
        hidden: Units of the hidden layer.

    Attributes:
        n_params: Weights of the network.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> maze = DeceptiveMaze(steps=20)
        >>> fitness, behavior = maze(torch.zeros(4, maze.n_params))
        >>> fitness.shape, behavior.shape
        (torch.Size([4]), torch.Size([4, 2]))
    """

    start = (5.0, 1.0)
    goal = (5.0, 9.0)
    reached = 0.5  # distance at which the goal counts as found
    walls = (
        ((0.0, 0.0), (10.0, 0.0)),
        ((10.0, 0.0), (10.0, 10.0)),
        ((10.0, 10.0), (0.0, 10.0)),
        ((0.0, 10.0), (0.0, 0.0)),
        ((0.0, 6.0), (8.5, 6.0)),
        ((8.5, 6.0), (8.5, 2.0)),
        ((10.0, 7.5), (1.5, 7.5)),
    )

    def __init__(self, steps: int = 100, hidden: int = 16) -> None:
        check_interval("steps", steps, 1)
        check_interval("hidden", hidden, 1)
        self.steps, self.hidden = steps, hidden
        self.n_params = (_INPUTS + 1) * hidden + (hidden + 1) * 2

    def __call__(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Fitness and behavior of networks.

        Args:
            weights: ``[n, n_params]``.

        Returns:
            Minus the distance from the goal at the end, ``[n]``, 0 for who came within ``reached`` of it at any time;
            and the last place ``[n, 2]``.
        """
        trail = self.trails(weights)
        goal = trail.new_tensor(self.goal)
        distance = (trail - goal).norm(dim=-1)
        found = (distance < self.reached).any(dim=1)
        return torch.where(found, 0.0, -distance[:, -1]), trail[:, -1]

    @torch.no_grad()
    def trails(self, weights: Tensor) -> Tensor:
        """The places ``[n, steps + 1, 2]`` that the robots come through; they stay at the goal."""
        n, split = len(weights), (_INPUTS + 1) * self.hidden
        first = weights[:, :split].reshape(n, self.hidden, _INPUTS + 1)
        second = weights[:, split:].reshape(n, 2, self.hidden + 1)
        walls = weights.new_tensor(self.walls)
        place = weights.new_tensor(self.start).expand(n, 2)
        heading = weights.new_full((n,), torch.pi / 2)
        goal = weights.new_tensor(self.goal)
        trail = [place]
        for _ in range(self.steps):
            hidden = torch.tanh(_affine(first, self._sensors(place, heading, goal, walls)))
            turn, speed = torch.tanh(_affine(second, hidden)).unbind(-1)
            heading = heading + 0.5 * turn
            step = 0.25 * (1 + speed)  # up to 0.5
            free = _ray(place, heading, walls) - 0.05  # it stops before a wall
            step = torch.minimum(step, free.clamp(min=0))
            there = (place - goal).norm(dim=1) < self.reached
            step = torch.where(there, 0.0, step)
            place = place + step[:, None] * torch.stack([heading.cos(), heading.sin()], dim=1)
            trail.append(place)
        return torch.stack(trail, dim=1)

    def _sensors(self, place: Tensor, heading: Tensor, goal: Tensor, walls: Tensor) -> Tensor:
        angles = heading[:, None] + heading.new_tensor(_RAYS) * torch.pi / 180
        rays = _ray(place[:, None].expand(-1, len(_RAYS), 2), angles, walls)
        bearing = torch.atan2(goal[1] - place[:, 1], goal[0] - place[:, 0]) - heading
        quadrant = torch.floor((bearing + torch.pi / 4) / (torch.pi / 2)).long() % 4
        return torch.cat([rays / 10, torch.nn.functional.one_hot(quadrant, 4).to(rays)], dim=1)


_RAYS = (-90.0, -45.0, 0.0, 45.0, 90.0, 180.0)
_INPUTS = len(_RAYS) + 4


def _affine(layer: Tensor, x: Tensor) -> Tensor:
    return (layer[..., :-1] @ x[..., None])[..., 0] + layer[..., -1]


def _ray(origin: Tensor, angle: Tensor, walls: Tensor) -> Tensor:
    """Distance from points ``[..., 2]`` along directions ``[...]`` to the nearest of the walls ``[W, 2, 2]``."""
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)[..., None, :]
    begin, along = walls[:, 0], walls[:, 1] - walls[:, 0]
    offset = begin - origin[..., None, :]
    cross = _cross(direction, along)
    distance = _cross(offset, along) / cross
    share = _cross(offset, direction) / cross
    hit = (distance >= 0) & (share >= 0) & (share <= 1) & (cross != 0)
    return torch.where(hit, distance, torch.inf).amin(dim=-1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
