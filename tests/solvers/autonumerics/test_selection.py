"""NSGA-II against its definition."""

import numpy as np

from lightning_opt.solvers.autonumerics.selection import crowding_distance, non_dominated_fronts, survivors

POINTS = np.array([[1, 5], [2, 3], [4, 1], [2, 5], [3, 3], [5, 5], [4, 4], [1, 5]], dtype=float)


def test_fronts_of_a_known_set():
    """Drawn by hand; equal points do not dominate each other."""
    assert [front.tolist() for front in non_dominated_fronts(POINTS)] == [[0, 1, 2, 7], [3, 4], [6], [5]]


def test_fronts_are_those_of_the_definition():
    points = np.random.default_rng(0).integers(0, 12, (60, 3)).astype(float)
    left = set(range(len(points)))
    for front in non_dominated_fronts(points):
        expected = {
            i for i in left
            if not any((points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in left)
        }  # fmt: skip
        assert set(front.tolist()) == expected
        left -= expected
    assert not left


def test_crowding_of_a_known_front():
    """Neighbors' distances over the extent, summed; the ends get the number of objectives."""
    front = np.array([[0.0, 10.0], [10.0, 0.0], [2.0, 4.0], [4.0, 3.0]])
    expected = [2.0, 2.0, (4 - 0) / 10 + (10 - 3) / 10, (10 - 2) / 10 + (4 - 0) / 10]
    np.testing.assert_allclose(crowding_distance(front), expected)


def test_survivors_are_whole_fronts_and_then_the_least_crowded():
    front = np.array([[0.0, 10.0], [10.0, 0.0], [2.0, 4.0], [4.0, 3.0], [3.0, 3.9]])
    assert sorted(survivors(front, 4).tolist()) == [0, 1, 2, 3]  # the last has the closest neighbors
    points = np.vstack([front + 20, front])
    assert sorted(survivors(points, 5).tolist()) == [5, 6, 7, 8, 9]
    assert sorted(survivors(points, 7).tolist()) == [0, 1, 5, 6, 7, 8, 9]
