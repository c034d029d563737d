"""Selection by NSGA-II (Deb and others, 2002): non-dominated fronts, and crowding inside the last one taken."""

import numpy as np


def non_dominated_fronts(objectives: np.ndarray) -> list[np.ndarray]:
    """Sort points into fronts: the first is dominated by no point, the second by points of the first only, and so on.

    Args:
        objectives: ``[n, objectives]``, each to be minimized. A point dominates another if it is nowhere worse and
            somewhere better.

    Returns:
        The indices of each front, ascending.

    Cost:
        n^2 comparisons.

    Example:
        >>> fronts = non_dominated_fronts(np.array([[1, 4], [2, 2], [4, 1], [3, 3], [4, 4]]))
        >>> [front.tolist() for front in fronts]
        [[0, 1, 2], [3], [4]]
    """
    worse: np.ndarray = np.all(objectives[:, None] <= objectives, axis=2) & np.any(
        objectives[:, None] < objectives, axis=2
    )
    dominators = worse.sum(0)
    left = np.ones(len(objectives), dtype=bool)
    fronts = []
    while left.any():
        front = np.flatnonzero(left & (dominators == 0))
        fronts.append(front)
        left[front] = False
        dominators = dominators - worse[front].sum(0)
    return fronts


def crowding_distance(objectives: np.ndarray) -> np.ndarray:
    """How far the neighbors of each point of a front are apart: summed over the objectives, each scaled to its range.

    The ends of the front get the number of objectives, as in the paper's code, not infinity.

    Example:
        >>> crowding_distance(np.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0]])).tolist()
        [2.0, 2.0, 2.0]
    """
    n, count = objectives.shape
    distance = np.zeros(n)
    ends = np.zeros(n, dtype=bool)
    for values in objectives.T:
        order = np.argsort(values, kind="stable")
        ends[order[[0, -1]]] = True
        extent = values[order[-1]] - values[order[0]]
        if n > 2 and extent > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / extent
    distance[ends] = count
    return distance


def survivors(objectives: np.ndarray, count: int) -> np.ndarray:
    """The indices of the ``count`` points to keep: whole fronts first, the least crowded of the one that does not fit.

    Example:
        >>> survivors(np.array([[1, 4], [2, 2], [4, 1], [3, 3], [4, 4]]), 4).tolist()
        [0, 1, 2, 3]
    """
    chosen: list[int] = []
    for front in non_dominated_fronts(objectives):
        if len(chosen) + len(front) > count:
            order = np.argsort(-crowding_distance(objectives[front]), kind="stable")
            front = front[order[: count - len(chosen)]]
        chosen += front.tolist()
        if len(chosen) == count:
            break
    return np.array(chosen, dtype=np.int64)
