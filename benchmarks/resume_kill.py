"""Kills the quickstart with SIGKILL at random steps, resumes it, and compares with the run that was left alone.

A trial starts ``lightning-opt fit`` with one option more than the quickstart, a logged row every step. As soon as a row
of the drawn step is in its CSV file, the process is killed, wherever it then is: in a step, in a validation, while a
checkpoint is written. ``--ckpt_path=last`` resumes it to its end. Equal means bit for bit:

- parameters, optimizer state, schedulers, random state of every rank and what a strategy adds in the last checkpoint;
- every logged value of the killed and the resumed run together, test results included: none missing, none different.

With ``--ranks 2`` there is one process a rank, as torchrun starts them. Trials kill all ranks, rank 0 alone and the
last rank alone in turn; those that are left must end by themselves, with an error, in ``--timeout`` seconds.

    python benchmarks/resume_kill.py                      # 10 trials of the quickstart, about 5 minutes on 2 cores
    python benchmarks/resume_kill.py --trials 3 fit --config fashion_mnist/lion
    python benchmarks/resume_kill.py --ranks 2 fit --config digits/ef21
"""

import argparse
import csv
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from _runner import write_result

from lightning_opt.cli import main as lightning_opt

Values = dict[tuple[str, str], str]  # (step, name) -> value as written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="chooses the steps")
    parser.add_argument(
        "--folder", type=Path, help="keep the runs here; default: a temporary folder, removed at the end"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run")
    parser.add_argument("--timeout", type=float, default=60, help="seconds in which ranks must notice that one is gone")
    parser.add_argument("--output", default="resume_kill", help="name of the result file")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="what to run; default: fit")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="resume-kill-"))
    words = options.words or ["fit"]
    try:
        job = Job(words, options.ranks, options.timeout)
        rows = run_trials(folder, job, options.trials, random.Random(options.seed))
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    exact = sum(row["equal"] for row in rows)
    payload = {
        "fit": ["lightning-opt", *words],
        "ranks": options.ranks,
        "seed": options.seed,
        "exact": exact,
        "trials": rows,
    }
    print(f"{exact} of {len(rows)} bit for bit; written to {write_result(options.output, payload)}")
    return int(exact < len(rows))


def run_trials(folder: Path, job: "Job", trials: int, draw: random.Random) -> list[dict[str, Any]]:
    """One row a trial."""
    start = time.monotonic()
    job.run(folder / "whole")
    print(f"uninterrupted run: {time.monotonic() - start:.0f} s")
    whole, expected = newest_checkpoint(folder / "whole"), logged(folder / "whole")
    steps = whole["global_step"]
    first = first_checkpoint_step(folder / "whole")
    print(f"{steps} steps, {len(expected)} logged values, first checkpoint after step {first}")
    print("trial  victim  drawn  killed  resumed  state  values  missing  different  others gone after")
    rows = []
    for trial in range(trials):
        place = folder / f"trial_{trial}"
        drawn = draw.randrange(first + 1, steps)
        victims = [list(range(job.ranks)), [0], [job.ranks - 1]][trial % 3 if job.ranks > 1 else 0]
        killed_after, gone = job.kill_at(place, drawn, victims)
        resumed_from = newest_checkpoint(place)["global_step"]
        job.run(place, "--ckpt_path=last")
        values, conflicts = merged(place)
        wrong = conflicts | {key for key, value in values.items() if expected.get(key) != value}
        row = {
            "killed_ranks": victims,
            "drawn_step": drawn,
            "last_row_before_kill": killed_after,
            "resumed_from_step": resumed_from,
            "same_state": same(newest_checkpoint(place), whole),
            "values": len(values),
            "missing": len(expected.keys() - values.keys()),
            "different": len(wrong),
        }
        if gone is not None:
            row |= gone
        row["equal"] = row["same_state"] and not row["missing"] and not row["different"]
        rows.append(row)
        victim = "all" if len(victims) == job.ranks else f"rank {victims[0]}"
        after = f"{gone['others_gone_after_seconds']:.1f} s: {gone['error']}" if gone else ""
        print(
            f"{trial:>5} {victim:>7} {drawn:>6} {killed_after:>7} {resumed_from:>8}"
            f" {'same' if row['same_state'] else 'OTHER':>6} {row['values']:>7} {row['missing']:>8}"
            f" {row['different']:>10}  {after}",
            flush=True,
        )
    return rows


class Job:
    """A run of ``lightning-opt``, in one process a rank.

    The processes are forks of one that has imported torch and Lightning, so that a trial takes little longer than its
    training.
    """

    def __init__(self, words: list[str], ranks: int, timeout: float) -> None:
        self.words, self.ranks, self.timeout = words, ranks, timeout
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["lightning_opt.cli.lightning_cli", "resume_kill"])

    def run(self, root: Path, *more: str) -> None:
        """From its start to its end."""
        processes = self.start(root, more)
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"failed: {' '.join(self.words)}\n{log_of(root, 0)[-3000:]}")

    def kill_at(self, root: Path, step: int, victims: list[int]) -> tuple[int, dict[str, Any] | None]:
        """Start a run and kill ranks with SIGKILL when a row of ``step`` is logged.

        Returns:
            The last step seen, and how the ranks that were left ended, if there were any.
        """
        processes = self.start(root, ())
        seen = -1
        while seen < step:
            if not all(process.is_alive() for process in processes):
                raise SystemExit(f"the run ended before step {step}\n{log_of(root, 0)[-3000:]}")
            seen = max((int(key[0]) for key in logged(root)), default=-1)
            time.sleep(0.001)
        for rank in victims:
            os.killpg(processes[rank].pid, signal.SIGKILL)  # its worker processes too
        start = time.monotonic()
        left = [rank for rank in range(self.ranks) if rank not in victims]
        for rank in left:
            processes[rank].join(self.timeout - (time.monotonic() - start))
            if processes[rank].exitcode is None:
                os.killpg(processes[rank].pid, signal.SIGKILL)
                raise SystemExit(f"rank {rank} still waits {self.timeout} s after the kill")
            if processes[rank].exitcode == 0:
                raise SystemExit(f"rank {rank} ended as if nothing had happened")
        for rank in victims:
            processes[rank].join()
        if not left:
            return seen, None
        errors = [line for line in log_of(root, left[0]).splitlines() if line.strip()]
        return seen, {"others_gone_after_seconds": round(time.monotonic() - start, 2), "error": errors[-1]}

    def start(self, root: Path, more: tuple[str, ...]) -> list[Any]:
        own = [f"--trainer.default_root_dir={root}", "--trainer.log_every_n_steps=1"]
        words = [*self.words, *own, "--trainer.enable_progress_bar=false", *more]
        if self.ranks > 1:
            words += [f"--trainer.devices={self.ranks}"]
        root.mkdir(parents=True, exist_ok=True)
        environments = [{}] if self.ranks == 1 else rank_environments(self.ranks)
        processes = [
            self.context.Process(target=run_rank, args=(words, environment, root / f"rank_{rank}.log"))
            for rank, environment in enumerate(environments)
        ]
        for process in processes:
            process.start()
        return processes


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    return [{**shared, "LOCAL_RANK": str(rank), "RANK": str(rank)} for rank in range(ranks)]


def run_rank(words: list[str], environment: dict[str, str], log: Path) -> None:
    """One rank, in a process group of its own."""
    os.setsid()
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(lightning_opt(words))


def log_of(root: Path, rank: int) -> str:
    return (root / f"rank_{rank}.log").read_text()


def logged(root: Path) -> Values:
    """What the runs below a folder have logged; a later run's value for the same step and name wins."""
    values: Values = {}
    for run_values in (read(file) for file in metric_files(root)):
        values.update(run_values)
    return values


def merged(root: Path) -> tuple[Values, set[tuple[str, str]]]:
    """The same, and where a later run logged another value than an earlier one."""
    values: Values = {}
    conflicts: set[tuple[str, str]] = set()
    for run_values in (read(file) for file in metric_files(root)):
        conflicts |= {key for key in values.keys() & run_values.keys() if values[key] != run_values[key]}
        values.update(run_values)
    return values, conflicts


def metric_files(root: Path) -> list[Path]:
    """In the order of the runs."""
    return sorted(root.glob("**/version_*/metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2]))


def read(file: Path) -> Values:
    """The complete lines of a CSV file, which may be cut off or about to be rewritten.

    One step has rows of its own for training, validation and the epoch, with different columns; ``epoch`` is in all.
    """
    try:
        lines = file.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    values: Values = {}
    for row in rows:
        if row.get("step"):
            kind = ",".join(sorted(name for name, value in row.items() if value and name not in ("step", "epoch")))
            for name, value in row.items():
                if value and name != "step":
                    values[row["step"], f"{name} ({kind})" if name == "epoch" else name] = value
    return values


def newest_checkpoint(root: Path) -> dict[str, Any]:
    """The checkpoint that ``--ckpt_path=last`` means."""
    found = [torch.load(path, weights_only=True) for path in root.glob("**/checkpoints/*.ckpt") if path.is_file()]
    return max(found, key=lambda checkpoint: checkpoint["global_step"])


def first_checkpoint_step(root: Path) -> int:
    """After how many steps the first checkpoint is written, from the config that the run saved."""
    config = yaml.safe_load(next(root.glob("**/config.yaml")).read_text())
    return config["checkpoint"]["every_n_train_steps"]


def same(a: Any, b: Any) -> bool:
    """Whether the parts of two checkpoints that a run depends on are equal to the last bit."""
    apart = {
        "loops",
        "callbacks",
        "hparams_name",
        "hyper_parameters",
        "datamodule_hparams_name",
        "datamodule_hyper_parameters",
    }
    random_states = [[rank["random"] for rank in c["callbacks"]["ResumeState"]["ranks"]] for c in (a, b)]
    return equal(*random_states) and all(equal(a.get(part), b.get(part)) for part in (a.keys() | b.keys()) - apart)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(to_bytes(a), to_bytes(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
