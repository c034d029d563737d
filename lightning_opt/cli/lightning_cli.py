"""LightningCLI with the promises of this package: run folders, resume, named parameters, clear errors."""

import argparse
import logging
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import lightning
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.cli import SaveConfigCallback as LightningSaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.enums import StrEnum
from torch.optim import Optimizer

from lightning_opt import __version__, registry
from lightning_opt.callbacks import ResumeState, RunReport, ScheduleCheck

from . import arguments, runs, schedules
from .checkpoint import PeriodicCheckpoint
from .errors import UserError, culprit, explain, import_class

# Defaults such as that of lightning's Timer(interval=Interval.step) would otherwise make saving the config fail.
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, value: dumper.represent_str(value.value))


class LightningOptCLI(LightningCLI):
    """``lightning-opt fit | validate | test | predict``; from Python, ``LightningOptCLI(["fit", ...])``.

    On top of LightningCLI:

    - Every class of this package works under its short name; ``--config`` takes a recipe's name too, and without one
      the recipe ``digits/quickstart`` is the base that the other options override.
    - The optimizer is built from the module's named parameters, through its own ``param_groups_for(module)`` where it
      has that. A scheduler's attributes ``interval`` and ``monitor`` are honored, and a ``total_steps`` that is null is
      the number of optimizer steps of the run.
    - Every fit writes into a run folder of its own, ``<trainer.default_root_dir>/<name>/version_<N>``: ``config.yaml``,
      ``checkpoints/``, metrics and report. ``--ckpt_path=last`` takes the newest checkpoint of these folders.
    - ``ResumeState``, ``ScheduleCheck``, ``PeriodicCheckpoint`` and ``RunReport`` are added to the Trainer.
    - After a fit the test set is evaluated, with the best weights where a ``ModelCheckpoint`` monitors a metric and
      with the final ones otherwise.

    Args:
        args: Words of a command line; ``None`` takes those of the process.

    Attributes:
        run_folder: Where this fit writes; ``None`` for the other subcommands and under ``fast_dev_run``.
        test_results: What ``Trainer.test`` returned after the fit, or ``[]``.

    Raises:
        UserError: For a mistake in the arguments or a config.
    """

    run_folder: Path | None = None
    test_results: list[Mapping[str, float]]

    def __init__(self, args: ArgsType = None) -> None:
        registry.load_all()
        self.test_results = []
        self._words = list(sys.argv[1:] if args is None else args) if not isinstance(args, (dict, Namespace)) else []
        self._subparsers: list[LightningArgumentParser] = []
        header = [f"lightning-opt=={__version__}, lightning=={lightning.__version__}, torch=={torch.__version__}"]
        settings = {"exit_on_error": False, "allow_abbrev": False, "dump_header": header}
        with _quiet():
            super().__init__(
                args=args,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                trainer_defaults={"default_root_dir": "runs"},
                seed_everything_default=0,
                parser_kwargs={**settings, **{name: dict(settings) for name in self.subcommands()}},
                auto_configure_optimizers=False,
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in the base, called on self
        """The one at hand: the parsers of the others would cost a tenth of a second each."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in self._words[:1] if name in every} or every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the optimizer, the scheduler and this package's own options."""
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        parser.add_argument(
            "--lr_scheduler_interval",
            type=Literal["step", "epoch"] | None,
            help="When the scheduler steps; default: what its class says, else every epoch.",
        )
        parser.add_argument(
            "--name", type=str | None, help="Name of the run, its folder below default_root_dir; default: the recipe's."
        )
        parser.add_argument("--test_after_fit", type=bool, default=True, help="Evaluate the test set after fit.")
        parser.add_argument("--report", type=bool, default=True, help="Write the run picture at the end of fit.")
        parser.add_class_arguments(PeriodicCheckpoint, "checkpoint")
        self._subparsers.append(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then settle the run's name and the checkpoint to resume from."""
        recipe = None
        try:
            if isinstance(args, (dict, Namespace)):
                self.config = parser.parse_object(args)
            else:
                subcommand, rest = self._words[:1], self._words[1:]
                words, recipe = arguments.arrange(rest, _registered_paths())
                self.config = parser.parse_args([*subcommand, *words])
                _say_what_changed(self.config[self.config.subcommand], words)
        except argparse.ArgumentError as error:
            raise UserError(explain(str(error), list(self._subparsers[0].get_defaults().keys()))) from error
        config = self.config[self.config.subcommand]
        config.name = config.name or recipe or "fit"
        if config.ckpt_path is None and self.config.subcommand != "fit":
            _say("No --ckpt_path, so the weights are untrained; --ckpt_path=last takes the newest checkpoint.")
        elif config.ckpt_path is not None:
            config.ckpt_path = _checkpoint_path(config, resume=self.config.subcommand == "fit")

    def instantiate_classes(self) -> None:
        """Build the model, the data module and the Trainer; a value that a constructor refuses is a user's mistake."""
        try:
            super().instantiate_classes()
        except Exception as error:
            self._remove_empty_run_folder()
            if isinstance(error, UserError):
                raise
            mistake = culprit(error)
            raise mistake from (error if isinstance(mistake, UserError) else None)

    def after_instantiate_classes(self) -> None:
        """Give the model the optimizer and the scheduler of the config."""
        config = self.config_init[self.subcommand]
        if config.optimizer is None:
            return
        if self.subcommand == "fit" and is_overridden("configure_optimizers", self.model):
            _say(
                f"{type(self.model).__name__}.configure_optimizers gives way to"
                f" {config.optimizer.class_path.rpartition('.')[2]}; --optimizer=null keeps it."
            )

        def configure_optimizers(module: LightningModule) -> dict[str, Any]:
            built = build_optimizers(
                module,
                config.optimizer,
                config.lr_scheduler,
                config.lr_scheduler_interval,
                lambda: module.trainer.estimated_stepping_batches,
            )
            schedule = built.get("lr_scheduler")
            if schedule and (text := schedules.remark(schedule["scheduler"], config.lr_scheduler_interval)):
                _say(text)
            return built

        self.model.configure_optimizers = MethodType(configure_optimizers, self.model)  # type: ignore[method-assign]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, for a fit with its run folder, logger and callbacks."""
        config = self.config_init[self.subcommand]
        trainer = config.trainer
        fit = self.subcommand == "fit"
        if fit:
            self._check_optimizer(config)
        else:
            warnings.filterwarnings("ignore", "Be aware that when using .ckpt_path., callbacks")  # of no use here
        if fit and not trainer.fast_dev_run:
            self.run_folder = runs.new_run_folder(str(trainer.default_root_dir), config.name)
            kwargs["default_root_dir"] = str(self.run_folder)
        if fit and (trainer.max_epochs or 0) >= (trainer.log_every_n_steps or 50):  # there are that many steps then
            warnings.filterwarnings("ignore", "The number of training batches .* smaller than the logging interval")
        if trainer.logger in (None, True):
            kwargs["logger"] = self._default_logger(str(trainer.default_root_dir), config.name)
        given = trainer.callbacks or []
        given = list(given) if isinstance(given, list) else [given]
        kwargs["callbacks"] = given + self._own_callbacks(config, given)  # evaluation needs them to read a checkpoint
        return super().instantiate_trainer(**kwargs)

    def fit(self, **kwargs: Any) -> None:
        """Run ``Trainer.fit``; when interrupted, say how to go on."""
        try:
            self.trainer.fit(**kwargs)
        except SystemExit as error:  # what Lightning makes of Ctrl-C and SIGTERM
            if not self.trainer.interrupted:
                raise
            if self.run_folder is not None:
                _say(self._how_to_resume(self.run_folder))
            number = signal.SIGTERM if isinstance(error, SIGTERMException) else signal.SIGINT
            raise SystemExit(128 + number) from error
        except Exception:
            self._remove_empty_run_folder()
            raise

    def after_fit(self) -> None:
        """Evaluate the test set and say where everything lies."""
        try:
            if self.config_init[self.subcommand].test_after_fit and self._has_test_data():
                best = self._best_checkpoint()
                self.test_results = list(self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best))
        finally:
            self._say_where()

    def predict(self, **kwargs: Any) -> None:
        """Run ``Trainer.predict`` and save what it returns in a new run folder."""
        predictions = self.trainer.predict(**kwargs)
        if predictions is not None and self.trainer.is_global_zero:
            config = self.config_init[self.subcommand]
            path = runs.new_run_folder(str(config.trainer.default_root_dir), config.name) / "predictions.pt"
            torch.save(predictions, path)
            _result(f"predictions: {runs.shown_path(path)}")

    def _remove_empty_run_folder(self) -> None:
        """After a mistake that ended the run before anything was written."""
        if self.run_folder is not None:
            with suppress(OSError):  # not empty
                self.run_folder.rmdir()

    def _check_optimizer(self, config: Namespace) -> None:
        """Refuse a wrong learning rate before anything is fetched or written, where the parameters exist already."""
        if config.optimizer is not None and any(p.requires_grad for p in self.model.parameters()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said when the fit builds its own
                build_optimizers(self.model, config.optimizer, config.lr_scheduler)

    def _default_logger(self, root: str, name: str) -> CSVLogger | bool:
        if self.run_folder is None:
            return False
        return CSVLogger(root, name=name, version=int(self.run_folder.name.removeprefix("version_")))

    def _own_callbacks(self, config: Namespace, given: list[Callback]) -> list[Callback]:
        own: list[Callback] = []
        if not any(isinstance(callback, ResumeState) for callback in given):
            own.append(ResumeState())
        if not any(isinstance(callback, ScheduleCheck) for callback in given):
            own.append(ScheduleCheck())
        if config.report and not any(isinstance(callback, RunReport) for callback in given):
            own.append(RunReport())
        if config.trainer.enable_checkpointing is not False:
            if self.run_folder is not None:
                config.checkpoint.dirpath = str(self.run_folder.absolute() / "checkpoints")
            own.append(config.checkpoint)
        return own

    def _checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        return [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]

    def _best_checkpoint(self) -> str | None:
        monitoring = (c for c in self._checkpoint_callbacks() if c.monitor is not None and c.best_model_path)
        return next((c.best_model_path for c in monitoring), None)

    def _say_where(self) -> None:
        newest = next((c for c in self._checkpoint_callbacks() if isinstance(c, PeriodicCheckpoint)), None)
        if newest is not None and newest.best_model_path:
            _result(f"checkpoint: {runs.shown_path(newest.best_model_path)}")
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunReport) and callback.path:
                _result(f"picture: {runs.shown_path(Path(callback.path).with_suffix('.png'))}")

    def _has_test_data(self) -> bool:
        if not is_overridden("test_step", self.model):
            return False
        if self.datamodule is None:
            return is_overridden("test_dataloader", self.model)
        return is_overridden("test_dataloader", self.datamodule, LightningDataModule)

    def _how_to_resume(self, run_folder: Path) -> str:
        config = self.config[self.subcommand]
        if config.ckpt_path is None and not any(run_folder.glob("checkpoints/*.ckpt")):
            steps = config.checkpoint.every_n_train_steps
            return f"Interrupted before the first checkpoint; checkpoint.every_n_train_steps is {steps}."
        words = arguments.without(self._words, "--ckpt_path")
        return f"Interrupted. Resume with: lightning-opt {shlex.join([*words, '--ckpt_path=last'])}"


class SaveConfig(LightningSaveConfigCallback):
    """Saves the config of a fit as ``config.yaml`` in its run folder."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        if stage == "fit":
            self.parser.save(self.config, str(Path(trainer.default_root_dir) / self.config_filename), skip_unset=False)


def build_optimizers(
    module: LightningModule,
    optimizer: Namespace,
    lr_scheduler: Namespace | None,
    interval: schedules.Interval | None = None,
    total_steps: Callable[[], float] = lambda: 10**9,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for classes given as ``class_path`` and ``init_args``.

    Args:
        module: Its trainable parameters are optimized, under their names.
        optimizer: Class and arguments.
        lr_scheduler: Class and arguments.
        interval: ``"step"`` or ``"epoch"``; by default the scheduler's attribute ``interval``, else ``"step"`` for
            ``OneCycleLR`` and ``CyclicLR`` and ``"epoch"`` for others.
        total_steps: Called for the optimizer steps of the run where the scheduler takes ``total_steps`` and it is null;
            by default any large number, to check the other arguments with.

    Raises:
        UserError: If the module has nothing to train, a class refuses its arguments, or ``total_steps`` is needed and
            the run has no known end.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not named:
        raise UserError(f"{type(module).__name__} has no trainable parameters for {optimizer.class_path}.")
    groups_for = getattr(import_class(optimizer.class_path), "param_groups_for", None)
    built = _build(optimizer, groups_for(module) if groups_for else named)
    if lr_scheduler is None:
        return {"optimizer": built}
    given = dict(lr_scheduler.get("init_args") or {})
    given = schedules.with_total_steps(import_class(lr_scheduler.class_path), given, total_steps)
    scheduler = _build(Namespace({**vars(lr_scheduler), "init_args": Namespace(given)}), built)
    schedule = {"scheduler": scheduler, "interval": schedules.interval_of(scheduler, interval)}
    if getattr(scheduler, "monitor", None) is not None:
        schedule["monitor"] = scheduler.monitor
    return {"optimizer": built, "lr_scheduler": schedule}


def _build(init: Namespace, argument: Any) -> Any:
    cls = import_class(init.class_path)
    try:
        return cls(argument, **dict(init.get("init_args") or {}), **dict(init.get("dict_kwargs") or {}))
    except ValueError as error:
        raise UserError(f"{cls.__name__}: {error}") from error


def _checkpoint_path(config: Namespace, *, resume: bool) -> str:
    """The file that ``--ckpt_path`` means, checked as far as that is cheap."""
    given = str(config.ckpt_path)
    if "://" in given:
        return given
    if given == "best":
        raise UserError("--ckpt_path=best is known only within the fit that chose it; give the file's path, or last.")
    if given == "last":
        path = runs.newest_checkpoint(str(config.trainer.default_root_dir), config.name)
        _say(f"{'resuming from' if resume else 'checkpoint:'} {runs.shown_path(path)}")
    else:
        path = Path(given)
        runs.check_checkpoint(path)
    if resume and config.optimizer is not None:
        runs.check_same_optimizer(path, config.optimizer.class_path)
    return str(path)


def _registered_paths() -> dict[str, str]:
    """Short name to full path: another package's class of the same name must not make ours ambiguous."""
    return {entry.name: _public_path(entry.target) for entry in registry.entries() if isinstance(entry.target, type)}


def _public_path(cls: type) -> str:
    package = cls.__module__.rpartition(".")[0]
    exported = getattr(import_module(package), cls.__name__, None) is cls
    return f"{package if exported else cls.__module__}.{cls.__name__}"


def _say_what_changed(config: Namespace, words: list[str]) -> None:
    """Where the command line swaps a class of the config, say what became of the old one's arguments."""
    for key, _ in arguments.chosen_classes(words).items():
        base: dict[str, Any] = {}
        for path in config.config:
            given = arguments.load_config(str(path)).get(key)
            base = {"class_path": given} if isinstance(given, str) else {**base, **(given or {})}
        now = config[key]
        old_name = base.get("class_path", "").rpartition(".")[2]
        if now is None or not old_name or old_name == now.class_path.rpartition(".")[2]:
            continue
        new = now.get("init_args") or Namespace()
        before = base.get("init_args") or {}
        kept = ", ".join(f"{name}={new[name]}" for name in before if name in new)
        dropped = ", ".join(f"{name}={value}" for name, value in before.items() if name not in new)
        parts = [f"{key}: {now.class_path.rpartition('.')[2]} instead of {old_name}"]
        parts += [f"with {kept}"] if kept else []
        parts += [f"without {dropped}"] if dropped else []
        _say("; ".join(parts) + ".")


@rank_zero_only
def _say(message: str) -> None:
    print(message, file=sys.stderr)


@rank_zero_only
def _result(message: str) -> None:
    print(message)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what Lightning says about things that are as they should be here."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def is_news(record: logging.LogRecord) -> bool:
        advertisement, asked_for = "Tip: For seamless", "Loading `train_dataloader` to estimate number of"
        return advertisement not in record.getMessage() and asked_for not in record.getMessage()

    log.addFilter(is_news)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The dirpath has changed from")  # every fit has its own run folder
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.|jsonargparse")
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.* is deprecated")  # Lightning 2.6 with torch 2.13
        try:
            yield
        finally:
            log.removeFilter(is_news)
