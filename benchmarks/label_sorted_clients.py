"""How far error feedback stays from the optimum where ten clients hold the digits in the order of their labels.

Softmax regression on scikit-learn's digits, 650 numbers, full gradients, Top-7, a rate of 1; all in one process, in
float64, so that the figures are the same everywhere. The problem is that of ``tests/compression``.

    python benchmarks/label_sorted_clients.py             one minute
"""

import sys
from pathlib import Path

import torch
from _runner import write_result

from lightning_opt.compression import CompressionState, TopK

sys.path.append(str(Path(__file__).parents[1]))
from tests.compression.label_sorted_clients import CLIENTS, SIZE, LabelSortedClients

K, STEPS = 7, (600, 1800)
METHODS = {
    "dense": None,
    "naive": ("naive", None),
    "EF14": ("ef14", None),
    "EF21": ("ef21", None),
    "EControl, eta = delta / 2": ("econtrol", K / SIZE / 2),
    "EControl, eta = delta": ("econtrol", None),
}


def main() -> None:
    torch.set_num_threads(1)
    problem = LabelSortedClients()
    best = problem.minimum()
    rows: dict[str, dict[str, float]] = {}
    for name, method in METHODS.items():
        rows[name] = {}
        for steps in STEPS:
            states = []
            if method is not None:
                algorithm, eta = method
                states = [
                    CompressionState(algorithm, TopK(k=K), eta=eta, min_numel=1, rank=i, world_size=CLIENTS)
                    for i in range(CLIENTS)
                ]
            rows[name][f"gap_after_{steps}"] = float(problem.loss(problem.train(states, steps))) - best
        print(f"{name:<28}", *(f"{gap:.2e}" for gap in rows[name].values()), flush=True)
    write_result("label_sorted_clients", {"k": K, "rate": 1.0, "minimum": best, "gaps": rows})


if __name__ == "__main__":
    main()
