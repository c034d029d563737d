"""What a federated minimization returns."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class MinimizeResult:
    """The end of a federated minimization and how it got there.

    Attributes:
        x: The last server's point, float64 ``[d]``.
        points: The start and the server's point after each round, float64 ``[rounds + 1, d]``.
        objective: The mean of the clients' values at these points, as the clients evaluated them, float64; NaN where
            they did not.
        queries: Evaluations of all clients together up to each of these points, int64 ``[rounds + 1]``.
        num_bytes: Payload that one client has sent and received up to each of them, int64 ``[rounds + 1]``.
    """

    x: Tensor
    points: Tensor
    objective: Tensor
    queries: Tensor
    num_bytes: Tensor
