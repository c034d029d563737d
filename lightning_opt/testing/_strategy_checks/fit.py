"""What each of two ranks does with a strategy, and what it tells of it."""

import copy
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.callbacks import ResumeState
from lightning_opt.data import ResumableLoader

from .._callback_checks.subject import Rows, quiet, seed_everything
from .problem import Problem, WithoutLength, data

EPOCHS, BATCHES, BATCH_SIZE = 2, 6, 4
Strategies = tuple[type[Strategy], dict[str, Any]]


def fit(made_by: Strategies, options: dict[str, Any]) -> dict[str, Any]:
    """Fit the problem, and tell what came out.

    Args:
        made_by: The class of the strategy and its arguments.
        options: For the problem and for the Trainer, and

            - ``batch_size``, ``shuffle``, ``length``: of the data, whether in random order, whether they have one;
            - ``seed``: of the global random states;
            - ``folder``: save a checkpoint there behind each of the batches ``save_after``, and ``last.ckpt``;
            - ``ckpt_path``: resume from it;
            - ``fits``: fit this many new problems, one after the other, by one Trainer.
    """
    return _told(lambda module: _fit(module, made_by, dict(options)), options)


def fit_after_an_error(made_by: Strategies, options: dict[str, Any]) -> dict[str, Any]:
    """Fit a problem that fails, then one that does not; tell of the second, and what error came out of the first."""
    failed = fit(made_by, {**options, "fail_at": BATCHES + 1})
    return {**fit(made_by, options), "first": failed.get("error", "none")}


def evaluate_alone(made_by: Strategies, options: dict[str, Any]) -> dict[str, Any]:
    """Validate, test and predict with parameters that were never fitted."""

    def evaluate(module: Problem) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(made_by, Path(folder), {"logger": False, "callbacks": [], **options})
            loader = ResumableLoader(TensorDataset(*data()), 8)
            values = {"val/loss": trainer.validate(module, loader, verbose=False)[0]["val/loss"]}
            values["test/loss"] = trainer.test(module, loader, verbose=False)[0]["test/loss"]
            predicted = trainer.predict(module, loader)
            assert predicted is not None
            return {**_outcome(trainer, module), "values": values, "predicted": torch.cat(predicted)}  # type: ignore[arg-type]

    return _told(evaluate, {})


def _told(run: Callable[[Problem], dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    module = Problem(**{k: v for k, v in options.items() if k in Problem.options})
    try:
        with quiet():
            return run(module)
    except MisconfigurationException as error:
        return {"refused": str(error), "batches": module.batches}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "planted": error is module.error}


def _fit(module: Problem, made_by: Strategies, options: dict[str, Any]) -> dict[str, Any]:
    batch_size, length = options.pop("batch_size", BATCH_SIZE), options.pop("length", True)
    shuffle = options.pop("shuffle", True)
    seed, ckpt_path, fits = options.pop("seed", 0), options.pop("ckpt_path", None), options.pop("fits", 1)
    saves = Saver(options.pop("folder", None), options.pop("save_after", []))
    own = {name: options.pop(name) for name in Problem.options if name in options}
    rows = Rows()
    with tempfile.TemporaryDirectory() as root:
        callbacks = [ResumeState(), saves] if saves.folder else []
        trainer = _trainer(made_by, Path(root), {"logger": rows, "callbacks": callbacks, **options})
        train = (
            ResumableLoader(TensorDataset(*data()), batch_size, shuffle=shuffle, seed=1)
            if length
            else DataLoader(WithoutLength(), batch_size)
        )
        validate = ResumableLoader(TensorDataset(*data()), 8)
        seed_everything(seed)
        before = _random_states()
        trainer.fit(module, train, validate, ckpt_path=ckpt_path)
        for _ in range(fits - 1):
            module = Problem(**own)
            assert trainer.fit_loop.max_epochs is not None
            trainer.fit_loop.max_epochs += EPOCHS
            trainer.fit(module, train, validate)
        module.measure()
        if saves.folder:
            trainer.save_checkpoint(Path(saves.folder, "last.ckpt"))
        return {
            **_outcome(trainer, module),
            "rows": [[name, step, value] for (name, step), value in rows.values.items()],
            "random": [before, _random_states()],
            "files": sorted(str(path.relative_to(root)) for path in Path(root).rglob("*")),
        }


def _trainer(made_by: Strategies, root: Path, options: dict[str, Any]) -> pl.Trainer:
    cls, kwargs = made_by
    defaults = {
        "accelerator": "cpu",
        "devices": 2,
        "max_epochs": EPOCHS,
        "log_every_n_steps": 2,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in options["callbacks"]),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return pl.Trainer(**{**defaults, **options}, strategy=cls(**copy.deepcopy(kwargs)))


def _outcome(trainer: pl.Trainer, module: Problem) -> dict[str, Any]:
    assert dist.get_world_size() == 2
    return {
        "steps": trainer.global_step,
        "batches": module.batches,
        "moves": module.moves,
        "parameters": {name: p.detach().clone() for name, p in module.named_parameters()},
        "optimizers": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "hooks": sorted(
            f"{name} of {re.sub('^$', 'the module', where)}"
            for where, part in module.named_modules()
            for name in vars(part)
            if name.endswith("_hooks") and getattr(part, name)
        ),
    }


def _random_states() -> dict[str, Any]:
    _, key, position, *_ = np.random.get_state()
    words = torch.tensor(np.asarray(key).astype(np.int64))
    return {"torch": torch.get_rng_state(), "numpy": [words, position], "python": list(random.getstate()[1])}


class Saver(Checkpoint):
    """Writes ``<batch>.ckpt`` behind some batches, where ModelCheckpoint does."""

    def __init__(self, folder: str | None, after: list[int]) -> None:
        self.folder, self.after, self.batches = folder, after, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save."""
        self.batches += 1
        if self.folder and self.batches in self.after:
            trainer.save_checkpoint(Path(self.folder, f"{self.batches}.ckpt"))
