"""Samples per second over a slow link: EControl and EF21 with TopK 1 % beside dense DDP and torch's PowerSGD hook.

Two network namespaces, one rank in each, joined by a virtual link that a token bucket (``tc tbf``) holds to ``--mbit``
in each direction. Model and batch are chosen so that sending dense gradients takes at least five times the computing.
All methods train in turn, round after round, in the same two processes, by Lightning's Trainer.

What a method could reach at best is what remains when only its bytes cross the link and nothing else changes:
``(t_comp + t_dense) / (t_comp + t_compressed)``, with

- ``t_comp``: a step with a hook that sends nothing;
- ``t_dense``, ``t_compressed``: the gradients, and what the method sends in their place, sent alone.

Bytes are those that the interface of host 1 has sent, headers and acknowledgments included.

    python benchmarks/limited_link.py                     # as root; 4 minutes on 2 cores
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from _fits import StepClock, paired_fits, quiet_trainer
from _hosts import end, interface_bytes, two_namespaces, why_no_namespaces
from _runner import ratio_summary, write_result
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from lightning_opt.data import Digits
from lightning_opt.models import MLP, Classifier
from lightning_opt.strategies import EControlStrategy, EF21Strategy

HIDDEN, BATCH, RATE = (1000, 1000), 336, 0.1  # two batches an epoch on each rank
WARMUP, STEPS = 5, 8  # EF21 sends the first gradients in full, PowerSGD the first two


class WithHook(DDPStrategy):
    """Lightning registers a communication hook on CUDA only."""

    def __init__(self, make_state: Any, hook: Any, **ddp: Any) -> None:
        super().__init__(process_group_backend="gloo", **ddp)
        self.make_state, self.hook = make_state, hook

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(self.make_state(), self.hook)  # type: ignore[union-attr]


def keep(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Send nothing."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


METHODS = {
    "no communication": partial(WithHook, lambda: None, keep),
    "dense DDP": partial(DDPStrategy, process_group_backend="gloo"),
    "EControl TopK 1%": partial(EControlStrategy, process_group_backend="gloo"),
    "EF21 TopK 1%": partial(EF21Strategy, process_group_backend="gloo"),
    # in one bucket: with several, the ranks' chains of collectives overtake each other on gloo, and the run breaks
    "PowerSGD rank 1": partial(
        WithHook,
        lambda: PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2),
        powerSGD_hook,
        bucket_cap_mb=1000,
    ),
}
COMPRESSED = ("EControl TopK 1%", "EF21 TopK 1%", "PowerSGD rank 1")


class Model(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE)


class LinkClock(StepClock):
    """Counts the bytes of the timed steps too."""

    def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step == self.first and not self.running:
            dist.barrier()
            self.bytes = -interface_bytes()
        super().on_train_batch_start(trainer, *rest)

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step == self.last and self.running:
            self.bytes = (self.bytes + interface_bytes()) // self.steps
        super().on_train_batch_end(trainer, *rest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mbit", type=float, default=20, help="of the link, each way, in millions of bits a second")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=Path, help="be one of the ranks, and write the times here")
    options = parser.parse_args()
    if options.rank:
        options.rank.write_text(json.dumps(measure(options.rounds)))
        return 0
    reason = why_no_namespaces()
    if reason:
        raise SystemExit(f"needs network namespaces: {reason}")
    first, second = run_ranks(options.mbit, options.rounds)
    payload = summary(first, second, options.mbit)
    print(f"written to {write_result('limited_link', payload)}")
    return 0


def run_ranks(mbit: float, rounds: int) -> list[dict[str, Any]]:
    """What both ranks measured."""
    with tempfile.TemporaryDirectory() as folder, two_namespaces(mbit) as hosts:
        logs = [Path(folder, f"{rank}.log") for rank in (0, 1)]
        told = [Path(folder, f"{rank}.json") for rank in (0, 1)]
        processes = []
        for rank, host in enumerate(hosts):
            command = [sys.executable, __file__, "--rounds", str(rounds), "--rank", str(told[rank])]
            environment = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29519", "WORLD_SIZE": "2"}
            environment |= {"NODE_RANK": str(rank), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
            with logs[rank].open("w") as log:
                processes.append(host.start(command, log, environment))
        codes = end(processes, 3600)
        if codes != [0, 0]:
            raise SystemExit("\n".join(log.read_text()[-3000:] for log in logs))
        return [json.loads(file.read_text()) for file in told]


def measure(rounds: int) -> dict[str, Any]:
    """Times and bytes on one rank."""
    torch.set_num_threads(1)
    sent: dict[str, int] = {}

    def fit(name: str, clock: LinkClock) -> None:
        trainer = quiet_trainer(
            strategy=METHODS[name](),
            num_nodes=2,
            devices=1,
            max_steps=clock.last + 1,
            max_epochs=-1,
            limit_val_batches=0,
            callbacks=[clock],
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = Model(MLP(64, HIDDEN))
        trainer.fit(module, Digits(batch_size=BATCH))
        sent[name] = clock.bytes

    fits = {name: partial(fit, name) for name in METHODS}
    times = paired_fits(fits, rounds, warmup=WARMUP, steps=STEPS, clock=LinkClock)
    parameters = sum(p.numel() for p in MLP(64, HIDDEN).parameters())
    alone = {"dense DDP": time_alone(torch.zeros(parameters), reduce=True)}
    for name in COMPRESSED:
        words = torch.tensor(sent[name] // 4)
        dist.broadcast(words, src=0)  # acknowledgments differ
        alone[name] = time_alone(torch.zeros(int(words)), reduce=name.startswith("PowerSGD"))
    return {"times": times, "bytes": sent, "alone": alone, "parameters": parameters}


def time_alone(tensor: torch.Tensor, *, reduce: bool, repeats: int = 7) -> float:
    """Seconds that a message takes, the median."""
    taken = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        if reduce:
            dist.all_reduce(tensor)
        else:
            dist.all_gather([torch.empty_like(tensor) for _ in range(2)], tensor)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[repeats // 2]


def summary(first: dict[str, Any], second: dict[str, Any], mbit: float) -> dict[str, Any]:
    """The step of a round ends when it has ended on both ranks."""
    wall = {
        name: [max(pair) for pair in zip(first["times"]["wall"][name], second["times"]["wall"][name], strict=True)]
        for name in METHODS
    }
    middle = {name: sorted(values)[len(values) // 2] for name, values in wall.items()}
    computing, dense = middle["no communication"], max(first["alone"]["dense DDP"], second["alone"]["dense DDP"])
    rows = {}
    for name in METHODS:
        rows[name] = {
            "samples_per_second": round(2 * BATCH / middle[name], 1),
            "step_ms": round(1e3 * middle[name], 1),
            "bytes_per_step": second["bytes"][name],
            "speed_up": ratio_summary(wall, "dense DDP", name),
        }
    for name in COMPRESSED:
        message = max(first["alone"][name], second["alone"][name])
        attainable = (computing + dense) / (computing + message)
        rows[name] |= {
            "message_alone_ms": round(1e3 * message, 1),
            "attainable_speed_up": attainable,
            "part_of_attainable": rows[name]["speed_up"]["median"] / attainable,
        }
    for name, row in rows.items():
        print(f"{name:<18} {row['samples_per_second']:>8} samples/s {row['bytes_per_step']:>10} bytes", end="")
        print(f"  {row['speed_up']['median']:.2f}x" + f" of {row.get('attainable_speed_up', 1):.2f}x")
    print(f"computing {1e3 * computing:.0f} ms, dense gradients alone {1e3 * dense:.0f} ms: {dense / computing:.1f}x")
    return {
        "link_mbit_per_second": mbit,
        "model": {"hidden": list(HIDDEN), "parameters": first["parameters"], "batch_per_rank": BATCH},
        "computing_ms": round(1e3 * computing, 1),
        "dense_alone_ms": round(1e3 * dense, 1),
        "dense_over_computing": dense / computing,
        "methods": rows,
        "step_seconds": wall,
    }


if __name__ == "__main__":
    sys.exit(main())
