"""``lightning-opt refine``: from the gradient norms of one run to the schedule and the config of the next."""

import argparse
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lightning_opt.registry import register_command
from lightning_opt.schedules import NormRecord, RefinedLR, refine_schedule, smooth_norms
from lightning_opt.schedules.refined import save_schedule

from .errors import UserError, sentence

if TYPE_CHECKING:
    from torch import Tensor

FILENAME = "gradnorms.npz"
OUTPUTS = ("refined.npz", "refined.png", "refined.yaml")


@register_command("refine", summary="make the next run's learning-rate schedule of a run's gradient norms")
def refine(arguments: list[str]) -> int:
    """Run ``lightning-opt refine RUN``.

    Args:
        arguments: The words after ``refine``.

    Returns:
        The exit status.

    Raises:
        UserError: If the run has no record or it cannot be used, or files would be overwritten.
    """
    parser = argparse.ArgumentParser(
        "lightning-opt refine",
        allow_abbrev=False,
        description="Make the next run's learning-rate schedule of the gradient norms that GradNormRecorder wrote.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or the record itself")
    parser.add_argument("--out", type=Path, help="folder for refined.npz, .png and .yaml; default: the run folder")
    parser.add_argument(
        "--method", choices=["auto", "sgd", "adam", "numeric"], default="auto", help="default: by the recorded norm"
    )
    parser.add_argument("--tau", type=float, default=0.1, help="width of the median filter, a share of the run")
    parser.add_argument("--floor", type=float, default=1e-3, help="smallest norm, a share of the median")
    parser.add_argument("--allow_incomplete", action="store_true", help="use the record of a crashed or shorter run")
    parser.add_argument("--force", action="store_true", help="overwrite refined.npz, .png and .yaml")
    options = parser.parse_args(arguments)

    path = find_record(options.run)
    record = _load(path, allow_incomplete=options.allow_incomplete)
    out = options.out or _run_folder(path)
    taken = [out / name for name in OUTPUTS if (out / name).exists()]
    if taken and not options.force:
        raise UserError(f"{taken[0]} exists; --force overwrites it.")
    schedule, smooth, clamped = _refine(path, record, options.method, options.tau, options.floor)

    files = [out / name for name in OUTPUTS]
    try:
        out.mkdir(parents=True, exist_ok=True)
        runnable = write_config(files[2], _run_folder(path) / "config.yaml", files[0])
        save_schedule(files[0], schedule)
        draw(files[1], record, smooth, schedule)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); choose another folder with --out.") from error
    print(_report(path, record, summarize(schedule), clamped))
    for name, file in zip(("schedule", "picture", "config"), files, strict=True):
        print(f"{name + ':':<10}{file}")
    base = "" if runnable else " --config BASE"
    print(f"run it:   lightning-opt fit{base} --config {files[2]} (tune --optimizer.lr again, on a coarse grid)")
    return 0


def find_record(run: Path) -> Path:
    """The record of a run.

    Args:
        run: The record itself; a run folder, where it lies beside ``config.yaml`` or the checkpoints; or the folder of
            a name, whose newest run with a record is taken.

    Raises:
        UserError: If there is none.
    """
    if run.is_file():
        return run
    versions = [path for path in run.glob("version_*") if re.fullmatch(r"version_\d+", path.name)]
    versions.sort(key=lambda path: int(path.name.removeprefix("version_")), reverse=True)
    for folder in (run, run / "checkpoints", *(place for v in versions for place in (v, v / "checkpoints"))):
        if (folder / FILENAME).is_file():
            return folder / FILENAME
    what = f"{run} holds no {FILENAME}" if run.is_dir() else f"there is no run folder {run}"
    raise UserError(f"{what}. Train with --trainer.callbacks+=GradNormRecorder to record the gradient norms of a run.")


class Summary(NamedTuple):
    """A schedule in four numbers.

    Attributes:
        start: Its first value, as a share of the peak.
        peak: Where the peak is, as a share of the run: the length of the warm-up.
        half: Where it falls below half of the peak for good, as a share of the run.
        late: Its value at 90% of the run, as a share of the peak; 0.1 for linear decay.
    """

    start: float
    peak: float
    half: float
    late: float


def summarize(schedule: "Tensor") -> Summary:
    """The shape of a schedule with maximum 1.

    Example:
        >>> import torch
        >>> summarize(torch.tensor([0.5, 1.0, 0.8, 0.6, 0.0]))
        Summary(start=0.5, peak=0.25, half=0.75, late=0.6...)
    """
    last = len(schedule) - 1
    above = int((schedule >= 0.5).nonzero().max())
    return Summary(
        round(schedule[0].item(), 6), int(schedule.argmax()) / last, above / last,
        round(schedule[int(0.9 * last)].item(), 6),
    )  # fmt: skip


def draw(path: Path, record: NormRecord, smooth: "Tensor", schedule: "Tensor") -> None:
    """A picture of the norms, recorded and smoothed, and of the schedule beside linear decay."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    norms = record.norms.clamp_min(float(smooth.min()) / 10)
    steps = [i * record.every_n_steps for i in range(len(norms))]
    left.plot(steps, norms.tolist(), color="#9498a0", linewidth=0.6, label="recorded")
    left.plot(steps[: len(smooth)], smooth.tolist(), color="#4269d0", linewidth=1.6, label="smoothed")
    left.set(yscale="log", xlabel="optimizer step", title=f"{record.norm} norm of the gradient")
    left.legend(frameon=False)
    share = [i / (len(schedule) - 1) for i in range(len(schedule))]
    right.plot([0, 1], [1, 0], color="#9498a0", linewidth=1.2, linestyle="--", label="linear decay")
    right.plot(share, schedule.tolist(), color="#ff725c", linewidth=1.6, label="refined")
    right.set(xlabel="share of the run", title="learning rate / peak", ylim=(0, 1.05), xlim=(0, 1))
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)


def write_config(path: Path, base: Path, schedule: Path) -> bool:
    """Write a config that trains with the schedule.

    Args:
        path: Where to.
        base: The config of the recorded run, which is repeated with the new schedule, if there is one.
        schedule: The schedule's file.

    Returns:
        Whether it can be run alone; otherwise it holds the scheduler only, for use on top of another.

    Raises:
        UserError: If the base is there and is no config.
    """
    scheduler = {
        "class_path": f"lightning_opt.schedules.{RefinedLR.__name__}",
        "init_args": {"schedule": str(schedule.resolve()), "total_steps": None},
    }
    config: dict[str, Any] = {"lr_scheduler": scheduler, "lr_scheduler_interval": None}
    runnable = base.is_file()
    if runnable:
        try:
            old = yaml.safe_load(base.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"{base} is not valid YAML, so it cannot be repeated: {error}") from error
        if not isinstance(old, dict):
            raise UserError(f"{base} holds no config to repeat; mend it, or move it away for a config to go on top.")
        config = {**old, **config, "ckpt_path": None, "name": f"{old.get('name') or 'fit'}_refined"}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return runnable


def _load(path: Path, *, allow_incomplete: bool) -> NormRecord:
    try:
        record = NormRecord.load(path)
    except (ValueError, OSError) as error:
        raise UserError(sentence(error)) from error
    if not record.complete and not allow_incomplete:
        planned = record.total_steps if record.total_steps >= 0 else "an unknown number of"
        raise UserError(
            f"{path} is of a run that crashed, was stopped or was recorded in part, and holds {record.steps} of"
            f" {planned} steps: where its end is missing, that is where the schedule matters most. Resume the run, or"
            " take the record for that of a shorter run with --allow_incomplete."
        )
    return record


def _refine(path: Path, record: NormRecord, method: str, tau: float, floor: float) -> "tuple[Tensor, Tensor, float]":
    fitting = {"l1": ("adam",), "l2": ("sgd", "numeric")}[record.norm]
    method = fitting[0] if method == "auto" else method
    if method not in fitting:
        raise UserError(
            f"--method={method} needs the other norm: {path} holds {record.norm} norms, of {record.optimizer}. Norms"
            " are not exchangeable between optimizers."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about clamped norms: the report says so
            schedule = refine_schedule(record.norms, method, tau, floor, total_steps=record.steps)  # type: ignore[arg-type]
            return schedule, *smooth_norms(record.norms, tau, floor)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error


def _report(path: Path, record: NormRecord, shape: Summary, clamped: float) -> str:
    lines = [
        f"record:   {path}",
        f"          {record.norm} norms of {record.optimizer} with lr={record.lr:g}, {record.steps} steps",
        f"refined:  starts at {shape.start:.0%} of the peak, peaks at {shape.peak:.0%} of the run",
        f"          is down to half of the peak at {shape.half:.0%},"
        f" to {shape.late:.0%} of it at 90% (linear decay: 10%)",
    ]
    if clamped:
        lines.append(f"          {clamped:.1%} of the smoothed norms were raised to the floor")
    if clamped > 0.01:
        lines.append("          the norms vanish, so the floor decides a part of the schedule: see --floor")
    return "\n".join(lines)


def _run_folder(record: Path) -> Path:
    return record.parent.parent if record.parent.name == "checkpoints" else record.parent
