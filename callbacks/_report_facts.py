import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import GradClipAlgorithmType

Facts = list[tuple[str, str]]
PACKAGES = ("lightning-opt", "torch", "lightning", "torchmetrics", "numpy", "numba", "triton")


def optimizer_facts(trainer: pl.Trainer) -> Facts:
    """One line a parameter group: how many parameters, and the options."""
    facts = []
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        for index, group in enumerate(optimizer.param_groups):
            title = f"{name}, group {group.get('name', index)}" if len(optimizer.param_groups) > 1 else name
            facts.append((title, f"{_size(group['params'])}; {_options(optimizer, group)}"))
    facts += [
        (
            type(config.scheduler).__name__,
            f"every {config.interval if config.frequency == 1 else f'{config.frequency} {config.interval}s'}",
        )
        for config in trainer.lr_scheduler_configs
    ]
    return facts


def trainer_facts(trainer: Any) -> Facts:
    """How the Trainer was set up."""
    algorithm = GradClipAlgorithmType(trainer.gradient_clip_algorithm or "norm").value
    data = type(trainer.datamodule).__name__ if trainer.datamodule is not None else "loaders"
    return [
        ("module", type(trainer.lightning_module).__name__),
        ("data", data),
        ("devices", f"{trainer.world_size} x {trainer.strategy.root_device.type}, {type(trainer.strategy).__name__}"),
        ("precision", str(trainer.precision)),
        ("gradient accumulation", str(trainer.accumulate_grad_batches)),
        ("gradient clipping", f"{trainer.gradient_clip_val} ({algorithm})" if trainer.gradient_clip_val else "none"),
        ("callbacks", ", ".join(type(callback).__name__ for callback in trainer.callbacks)),
    ]


def machine_facts(device: torch.device) -> Facts:
    """The machine and the versions."""
    facts = [
        ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("processor", f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
    ]
    if device.type == "cuda":
        facts.append(("accelerator", torch.cuda.get_device_name(device)))
    return facts + list(_versions())


def config_text(trainer: Any, directory: Path) -> str:
    """The configuration that the command line saved beside the report, else hyper-parameters, else nothing."""
    for folder in (directory, Path(trainer.default_root_dir)):
        saved = folder / "config.yaml"
        if saved.is_file() and folder.resolve() != Path.cwd():  # there it may be anything
            return saved.read_text(encoding="utf-8")
    lines = []
    for part in (trainer.lightning_module, trainer.datamodule):
        hparams: Mapping[str, Any] = part.hparams if part is not None else {}
        if hparams:
            lines += [f"{type(part).__name__}:", *(f"  {name}: {value}" for name, value in hparams.items())]
    return "\n".join(lines)


def parameter_count(module: pl.LightningModule) -> str:
    """Number of parameters in words, for example ``118k``."""
    return _short(sum(p.numel() for p in module.parameters() if not isinstance(p, torch.nn.UninitializedParameter)))


def duration(seconds: float) -> str:
    """A time in words.

    Example:
        >>> duration(42.31), duration(90), duration(7265)
        ('42.3 s', '1 min 30 s', '2 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _size(parameters: Iterable[torch.Tensor]) -> str:
    parameters = list(parameters)
    return f"{_short(sum(p.numel() for p in parameters))} parameters in {len(parameters)} tensors"


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**4)):
        if count >= size:
            return f"{count / (1000 if unit == 'k' else size):.3g}{unit}"
    return str(count)


def _options(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> str:
    values = {name: group.get(name) for name in optimizer.defaults}
    values["lr"] = group.get("initial_lr", group["lr"])
    return ", ".join(f"{name}={_value(value)}" for name, value in values.items() if value not in (None, False))


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_value, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
