"""What GradNormRecorder costs at its defaults, as a share of the step of the Fashion-MNIST ResNet.

    python benchmarks/grad_norm_recorder.py                about 15 minutes on 2 cores that do nothing else
    python benchmarks/grad_norm_recorder.py --rounds 3     a first look

Random images in batches of 64, SGD with momentum 0.9 (2-norms) and Adam (1-norms). Two measures:

- fits with the callback and without, one after the other in one process, the order turning, timed over 40 steps each;
  beside the ratio stands that of two fits without the callback, which is what noise does. In wall time, and in CPU time
  of all threads, which other processes disturb less;
- within the fits with the callback, the time that passes in its own hooks, as a share of the rest. It is blind to what
  a hook leaves for later (a colder cache), and does not drown in noise.

The fits log nothing and end before a checkpoint: what a logged step and a checkpoint add is not in these figures.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial, wraps
from typing import Any

import torch
from _fits import StepClock, paired_fits, quiet_trainer
from _runner import ratio_summary, write_result
from torch.utils.data import TensorDataset

from lightning_opt.callbacks import GradNormRecorder
from lightning_opt.data import ResumableLoader
from lightning_opt.models import Classifier, ResNet

BATCH_SIZE = 64
OPTIMIZERS = {
    "SGD, l2": lambda net: torch.optim.SGD(net.parameters(), 0.01, momentum=0.9),
    "Adam, l1": lambda net: torch.optim.Adam(net.parameters(), 1e-4),
}
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "_after_step", "on_train_batch_end")


class Model(Classifier):
    def __init__(self, optimizer: str) -> None:
        super().__init__(ResNet())
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {name: measure(name, options.rounds) for name in OPTIMIZERS}
    write_result("grad_norm_recorder", {"batch_size": BATCH_SIZE, "rounds": options.rounds, "results": results})


def measure(optimizer: str, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH_SIZE * 50, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (len(images),), generator=generator)
    shares: dict[str, list[float]] = {"wall": [], "cpu": []}

    def fit(folder: str, recorded: bool, clock: StepClock) -> None:
        torch.manual_seed(0)
        recorder, hooks = GradNormRecorder(dirpath=folder), HookClock(clock)
        for name in HOOKS:
            setattr(recorder, name, hooks.timed(getattr(recorder, name)))
        callbacks = [recorder, clock] if recorded else [clock]
        trainer = quiet_trainer(max_steps=clock.last + 1, callbacks=callbacks)
        trainer.fit(Model(optimizer), ResumableLoader(TensorDataset(images, labels), BATCH_SIZE, shuffle=True))
        if recorded:
            shares["wall"].append(hooks.wall / (clock.wall * clock.steps - hooks.wall))
            shares["cpu"].append(hooks.cpu / (clock.cpu * clock.steps - hooks.cpu))

    with tempfile.TemporaryDirectory() as folder:
        recorded = {"without": False, "with": True, "again": False}
        times = paired_fits({name: partial(fit, folder, value) for name, value in recorded.items()}, rounds)
    row = {
        "step_ms": 1000 * statistics.median(times["wall"]["without"]),
        "with_over_without": {kind: ratio_summary(times[kind], "with", "without") for kind in times},
        "noise": {kind: ratio_summary(times[kind], "again", "without") for kind in times},
        "share_in_hooks": {
            kind: ratio_summary({"hooks": values[1:], "rest": [1.0] * rounds}, "hooks", "rest")  # without the warm-up's
            for kind, values in shares.items()
        },
    }
    print(optimizer, json.dumps(row), flush=True)
    return row


class HookClock:
    """Wall and CPU seconds that pass within functions while a StepClock runs."""

    def __init__(self, clock: StepClock) -> None:
        self.clock, self.wall, self.cpu = clock, 0.0, 0.0

    def timed(self, function: Any) -> Any:
        @wraps(function)
        def call(*arguments: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*arguments)
            if self.clock.running:
                self.wall += time.perf_counter() - wall
                self.cpu += time.process_time() - cpu
            return result

        return call


if __name__ == "__main__":
    main()
