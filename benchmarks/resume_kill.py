"""Kills the quickstart with SIGKILL at random steps, resumes it, and compares with the run that was left alone.

A trial starts ``lightning-opt fit`` with one option more than the quickstart, a logged row every step. As soon as a row
of the drawn step is in its CSV file, the process is killed, wherever it then is: in a step, in a validation, while a
checkpoint is written. ``--ckpt_path=last`` resumes it to its end. Equal means bit for bit:

- parameters, optimizer state, schedulers and random state in the last checkpoint, and the loops' counters;
- every logged value of the killed and the resumed run together, test results included: none missing, none different.

    python benchmarks/resume_kill.py                      # 10 trials of the quickstart, about 5 minutes on 2 cores
    python benchmarks/resume_kill.py --trials 3 fit --config fashion_mnist/lion
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from _runner import write_result

Values = dict[tuple[str, str], str]  # (step, name) -> value as written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="chooses the steps")
    parser.add_argument(
        "--folder", type=Path, help="keep the runs here; default: a temporary folder, removed at the end"
    )
    parser.add_argument("--output", default="resume_kill", help="name of the result file")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="what to run; default: fit")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="resume-kill-"))
    words = options.words or ["fit"]
    try:
        rows = run_trials(folder, words, options.trials, random.Random(options.seed))
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    exact = sum(row["equal"] for row in rows)
    payload = {"fit": ["lightning-opt", *words], "seed": options.seed, "exact": exact, "trials": rows}
    print(f"{exact} of {len(rows)} bit for bit; written to {write_result(options.output, payload)}")
    return int(exact < len(rows))


def run_trials(folder: Path, words: list[str], trials: int, draw: random.Random) -> list[dict[str, Any]]:
    """One row a trial."""
    start = time.monotonic()
    run(command(words, folder / "whole"), folder / "whole.log")
    print(f"uninterrupted run: {time.monotonic() - start:.0f} s")
    whole, expected = newest_checkpoint(folder / "whole"), logged(folder / "whole")
    steps = whole["global_step"]
    first = first_checkpoint_step(folder / "whole")
    print(f"{steps} steps, {len(expected)} logged values, first checkpoint after step {first}")
    print("trial  drawn  killed  resumed  state  values  missing  different")
    rows = []
    for trial in range(trials):
        place = folder / f"trial_{trial}"
        drawn = draw.randrange(first + 1, steps)
        killed_after = kill_at(command(words, place), place, drawn)
        resumed_from = newest_checkpoint(place)["global_step"]
        run([*command(words, place), "--ckpt_path=last"], folder / f"trial_{trial}.log")
        values, conflicts = merged(place)
        wrong = conflicts | {key for key, value in values.items() if expected.get(key) != value}
        row = {
            "drawn_step": drawn,
            "last_row_before_kill": killed_after,
            "resumed_from_step": resumed_from,
            "same_state": same(newest_checkpoint(place), whole),
            "values": len(values),
            "missing": len(expected.keys() - values.keys()),
            "different": len(wrong),
        }
        row["equal"] = row["same_state"] and not row["missing"] and not row["different"]
        rows.append(row)
        print(
            f"{trial:>5} {drawn:>6} {killed_after:>7} {resumed_from:>8} {'same' if row['same_state'] else 'OTHER':>6}"
            f" {row['values']:>7} {row['missing']:>8} {row['different']:>10}",
            flush=True,
        )
    return rows


def command(words: list[str], root: Path) -> list[str]:
    own = [f"--trainer.default_root_dir={root}", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    return [sys.executable, "-m", "lightning_opt.cli", *words, *own]


def run(words: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        if subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False).returncode != 0:
            raise SystemExit(f"failed: {' '.join(words)}\n{log.read_text()[-3000:]}")


def kill_at(words: list[str], root: Path, step: int) -> int:
    """Start a run and kill it with SIGKILL when a row of ``step`` is logged; the last step seen."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
    seen = -1
    while seen < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with status {process.returncode} before step {step}")
        seen = max((int(key[0]) for key in logged(root)), default=-1)
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)  # its worker processes too
    process.wait()
    return seen


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
    parts = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")
    random_states = [checkpoint["callbacks"]["ResumeState"]["ranks"][0]["random"] for checkpoint in (a, b)]
    return equal(*random_states) and all(equal(a[part], b[part]) for part in parts)


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
