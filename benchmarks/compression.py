"""Loss, bytes on the wire and time of compressed data-parallel training beside dense DDP and torch's PowerSGD hook.

Two ranks with gloo in two network namespaces joined by an unlimited virtual link. One rank holds the digits 0 to 4 of
scikit-learn's images, the other 5 to 9; a network of 64-256-10, 128 images a rank and step, SGD at a rate of 0.5, 400
steps; plain DDP without a Trainer. Bytes are those that the interfaces of both ranks have sent, headers and
acknowledgments included, over all 400 steps, with the first gradients that EF21 and EControl send in full.

Behind it the time of a step, in rounds of each method in turn, for that network and for a large one.

    python benchmarks/compression.py                      # as root; 5 minutes on 2 cores
    python benchmarks/compression.py --rounds 2 --seeds 0 # a first look
    python benchmarks/compression.py --picture            # draws docs/methods/img/compression.png from the result
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _hosts import end, interface_bytes, two_namespaces, why_no_namespaces
from _runner import ratio_summary, read_result, write_result
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lightning_opt.compression import (
    CompressionState,
    QuantizeInt8,
    RandK,
    ScaledSign,
    TopK,
    compressed_allreduce_hook,
)

STEPS, BATCH, RATE, EVERY = 400, 128, 0.5, 10
PICTURE = Path(__file__).parents[1] / "docs/methods/img/compression.png"
DENSE, CHOSEN = "dense DDP", "EControl TopK 1%, eta 0.02"
Register = Callable[[DistributedDataParallel], None]


def ours(algorithm: str, compressor: Any, **options: Any) -> Register:
    def register(model: DistributedDataParallel) -> None:
        state = CompressionState(
            algorithm, compressor, rank=dist.get_rank(), world_size=dist.get_world_size(), **options
        )
        state.name_parameters(model.module)
        model.register_comm_hook(state, compressed_allreduce_hook)

    return register


def power_sgd(model: DistributedDataParallel) -> None:
    model.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook)


def buckets(register: Register) -> dict[str, float]:
    """One for PowerSGD: with several, the ranks' chains of collectives overtake each other on gloo."""
    return {"bucket_cap_mb": 1000} if register is power_sgd else {}


METHODS: dict[str, Register] = {
    DENSE: lambda model: None,
    "PowerSGD rank 1": power_sgd,
    "naive TopK 1%": ours("naive", TopK(0.01)),
    "EF14 TopK 1%": ours("ef14", TopK(0.01)),
    "EF21 TopK 1%": ours("ef21", TopK(0.01)),
    "EF21-SGDM TopK 1%": ours("ef21", TopK(0.01), momentum=0.1),
    "EControl TopK 1%": ours("econtrol", TopK(0.01)),
    CHOSEN: ours("econtrol", TopK(0.01), eta=0.02),
    "EF14 RandK 1%": ours("ef14", RandK(0.01)),
    "EF14 ScaledSign": ours("ef14", ScaledSign()),
    "EF21 QuantizeInt8": ours("ef21", QuantizeInt8()),
}
TIMED = [DENSE, "PowerSGD rank 1", "EF14 TopK 1%", "EF21 TopK 1%", "EControl TopK 1%"]
NETS = {"64-256-10, batch 128": ([64, 256, 10], 128), "784-1024-1024-10, batch 256": ([784, 1024, 1024, 10], 256)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=21, help="of timing")
    parser.add_argument("--picture", action="store_true", help="draw the result that is on file")
    parser.add_argument("--rank", type=Path, help="be one of the ranks, and write the measurements here")
    options = parser.parse_args()
    if options.picture:
        draw(read_result("compression"))
        return 0
    if options.rank:
        options.rank.write_text(json.dumps(measure(options.seeds, options.rounds)))
        return 0
    reason = why_no_namespaces()
    if reason:
        raise SystemExit(f"needs network namespaces: {reason}")
    payload = summary(*run_ranks(options.seeds, options.rounds), options.seeds)
    print(f"written to {write_result('compression', payload)}")
    draw(payload)
    return 0


def run_ranks(seeds: list[int], rounds: int) -> list[dict[str, Any]]:
    """What both ranks measured."""
    with tempfile.TemporaryDirectory() as folder, two_namespaces() as hosts:
        logs = [Path(folder, f"{rank}.log") for rank in (0, 1)]
        told = [Path(folder, f"{rank}.json") for rank in (0, 1)]
        processes = []
        for rank, host in enumerate(hosts):
            words = [sys.executable, __file__, "--rounds", str(rounds), "--rank", str(told[rank]), "--seeds"]
            environment = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29521", "WORLD_SIZE": "2"}
            environment |= {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with logs[rank].open("w") as log:
                processes.append(host.start([*words, *map(str, seeds)], log, environment))
        codes = end(processes, 3600)
        if codes != [0, 0]:
            raise SystemExit("\n".join(log.read_text()[-3000:] for log in logs))
        return [json.loads(file.read_text()) for file in told]


def measure(seeds: list[int], rounds: int) -> dict[str, Any]:
    """On one rank: losses and bytes of every method and seed, and times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    runs = {name: [train(register, seed) for seed in seeds] for name, register in METHODS.items()}
    times = {net: time_steps(sizes, batch, rounds) for net, (sizes, batch) in NETS.items()}
    dist.barrier()
    dist.destroy_process_group()
    return {"runs": runs, "times": times}


def network(sizes: list[int]) -> nn.Sequential:
    layers = [layer for i, o in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def train(register: Register, seed: int) -> dict[str, Any]:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    own = (y // 5 == dist.get_rank()).nonzero().squeeze(1)
    torch.manual_seed(seed)
    net = network([64, 256, 10])
    model = DistributedDataParallel(net, **buckets(register))
    register(model)
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    curve: list[list[float]] = []
    dist.barrier()
    before = interface_bytes()
    for step in range(1, STEPS + 1):
        chosen = own[torch.randint(len(own), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        if step % EVERY == 0:
            curve.append([interface_bytes() - before, float(evaluate(net, x, y))])
    with torch.no_grad():
        accuracy = float((net(x).argmax(1) == y).float().mean())
    return {"bytes": interface_bytes() - before, "loss": curve[-1][1], "accuracy": accuracy, "curve": curve}


@torch.no_grad()
def evaluate(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss over the images of both ranks."""
    return cross_entropy(net(x), y)


def time_steps(sizes: list[int], batch: int, rounds: int, steps: int = 10) -> dict[str, list[float]]:
    """Seconds a step, of each method in turn, by round; ten steps of each a round."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(batch, sizes[0], generator=generator)
    y = torch.randint(sizes[-1], (batch,), generator=generator)
    steps_of: dict[str, Callable[[], None]] = {}
    for name in TIMED:
        torch.manual_seed(0)
        model = DistributedDataParallel(network(sizes), **buckets(METHODS[name]))
        METHODS[name](model)
        steps_of[name] = stepping(model, x, y)
    times: dict[str, list[float]] = {name: [] for name in TIMED}
    for turn in range(-1, rounds):
        start = turn % len(TIMED)
        for name in TIMED[start:] + TIMED[:start]:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                steps_of[name]()
            if turn >= 0:
                times[name].append((time.perf_counter() - began) / steps)
    return times


def stepping(model: DistributedDataParallel, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def summary(first: dict[str, Any], second: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in METHODS:
        pairs = list(zip(first["runs"][name], second["runs"][name], strict=True))
        sent = statistics.mean((a["bytes"] + b["bytes"]) / STEPS for a, b in pairs)
        losses = [a["loss"] for a, _ in pairs]
        rows[name] = {
            "kilobytes_per_step": round(sent / 1000, 2),
            "loss": statistics.mean(losses),
            "loss_std": statistics.stdev(losses) if len(losses) > 1 else 0.0,
            "accuracy": statistics.mean(a["accuracy"] for a, _ in pairs),
            "curve": [[a[0] + b[0], a[1]] for a, b in zip(pairs[0][0]["curve"], pairs[0][1]["curve"], strict=True)],
        }
    for row in rows.values():
        row["fewer_bytes"] = rows[DENSE]["kilobytes_per_step"] / row["kilobytes_per_step"]
        row["loss_beside_dense"] = row["loss"] / rows[DENSE]["loss"]
    steps: dict[str, Any] = {}
    for net in NETS:
        wall = {
            name: [max(pair) for pair in zip(first["times"][net][name], second["times"][net][name], strict=True)]
            for name in TIMED
        }
        steps[net] = {
            name: {
                "milliseconds": round(1e3 * statistics.median(wall[name]), 2),
                "beside_dense": ratio_summary(wall, name, DENSE),
            }
            for name in TIMED
        }
    for name, row in rows.items():
        print(
            f"{name:<28} {row['kilobytes_per_step']:>8.2f} KB a step {row['fewer_bytes']:>6.1f}x fewer"
            f"  loss {row['loss']:.4f} +- {row['loss_std']:.4f}, {row['loss_beside_dense']:.2f}x"
            f"  accuracy {row['accuracy']:.4f}"
        )
    for net, methods in steps.items():
        for name, row in methods.items():
            print(f"{net:<28} {name:<20} {row['milliseconds']:>8.2f} ms {row['beside_dense']['median']:.2f}x")
    setting = {"steps": STEPS, "batch_per_rank": BATCH, "rate": RATE, "seeds": seeds}
    return {**setting, "methods": rows, "step_times": steps}


def draw(result: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    shown = [DENSE, "PowerSGD rank 1", "naive TopK 1%", "EF14 TopK 1%", "EF21 TopK 1%", CHOSEN, "EF14 ScaledSign"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for name in shown:
        curve = result["methods"][name]["curve"]
        label = f"{name}, {result['methods'][name]['fewer_bytes']:.0f}x fewer bytes" if name != DENSE else name
        left.plot([sent / 1e6 for sent, _ in curve], [loss for _, loss in curve], label=label)
        right.plot([EVERY * (i + 1) for i in range(len(curve))], [loss for _, loss in curve])
    left.set(xscale="log", yscale="log", xlabel="megabytes sent by both ranks", ylabel="loss over all images")
    right.set(xlabel="steps")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle("Digits 0-4 on one rank, 5-9 on the other")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
