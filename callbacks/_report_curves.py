import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._report_history import Curve
from ._report_panel import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES = {
    "": "train",
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
COLORS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#e0a000", "#2ea3a3", "#9c6b4e", "#e5679f")
OF_STAGE = {"train": COLORS[0], "val": COLORS[1], "test": COLORS[2]}
MOST_PANELS = 40  # beyond, the quantities of a prefix share an axis
MOST_LABELS = 8
NOISY_FROM = 40  # points, from which a training curve is smoothed


class Key(NamedTuple):
    """What the name of a logged value says: ``train/loss_step`` is the quantity ``loss`` of the stage ``train``."""

    quantity: str
    stage: str
    label: str


def parse(name: str) -> Key:
    """Split a name into quantity and stage.

    Example:
        >>> parse("train/loss_step").quantity, parse("val_loss").quantity, parse("val/loss/dataloader_idx_1").label
        ('loss', 'loss', 'val 1')
        >>> parse("opt/median_step")
        Key(quantity='opt/median_step', stage='', label='')
    """
    name, _, loader = name.partition("/dataloader_idx_")
    match = re.fullmatch(r"(train|training|val|valid|validation|test)[/_](.+?)(?:_(step|epoch))?", name)
    match = match or re.fullmatch(r"()(loss)(?:_(step|epoch))?", name)
    if match is None:
        return Key(name, "", loader)
    stage = STAGES[match[1]]
    detail = "epoch" if match[3] == "epoch" and stage == "train" else ""
    return Key(match[2], stage, " ".join(part for part in (stage, detail, loader) if part))


def better_is(name: str) -> str:
    """``"low"``, ``"high"``, or ``""`` where the name of a quantity does not tell."""
    words = set(re.split(r"[^a-z0-9]+", parse(name).quantity.lower()))
    if words & {"loss", "error", "err", "perplexity", "ppl", "mse", "mae", "rmse", "nll", "fid", "bpd", "wer", "cer"}:
        return "low"
    if words & {
        "accuracy",
        "acc",
        "top1",
        "top5",
        "f1",
        "auc",
        "auroc",
        "ap",
        "map",
        "iou",
        "bleu",
        "psnr",
        "ssim",
        "reward",
    }:
        return "high"
    return ""


def curve_panels(metrics: Mapping[str, Curve], rates: Mapping[str, Curve]) -> list[Panel]:
    """The panels of everything logged: losses first, other quantities with stages, learning rate, the rest by name."""
    quantities: dict[str, list[str]] = defaultdict(list)
    for name in sorted(metrics, key=lambda name: (list(OF_STAGE).index(parse(name).stage or "train"), name)):
        quantities[parse(name).quantity].append(name)
    staged = [q for q, names in quantities.items() if parse(names[0]).stage]
    staged.sort(key=lambda q: ("loss" not in q.lower(), q != "loss"))
    others = sorted(q for q in quantities if q not in staged)
    last_step = max((curve.last[0] for curve in [*metrics.values(), *rates.values()]), default=1.0)
    panels = [_panel(q, {parse(name).label: metrics[name] for name in quantities[q]}, last_step) for q in staged]
    if rates:
        panels.append(_panel("learning rate", _distinct(rates), last_step))
    together: dict[str, list[str]] = defaultdict(list)
    for quantity in others:
        prefix = quantity.rpartition("/")[0] if len(quantities) > MOST_PANELS else ""
        together[prefix or quantity].append(quantity)
    for title, members in together.items():
        curves = {name.removeprefix(f"{title}/"): metrics[name] for q in members for name in quantities[q]}
        panels.append(_panel(title, {"": next(iter(curves.values()))} if len(curves) == 1 else curves, last_step))
    return panels


def _panel(title: str, curves: Mapping[str, Curve], last_step: float) -> Panel:
    arrays = {label: tuple(map(np.asarray, curve.points())) for label, curve in curves.items()}
    return Panel(title, lambda axes: _draw(axes, arrays, last_step))


def _distinct(rates: Mapping[str, Curve]) -> dict[str, Curve]:
    """Groups with the same learning rate at every step share a line; a single line needs no name."""
    same: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, curve in rates.items():
        same[tuple(map(tuple, curve.points()))].append(name)
    distinct = {", ".join(names): rates[names[0]] for names in same.values()}
    return distinct if len(distinct) > 1 else {"": next(iter(distinct.values()))}


def _draw(axes: "Axes", curves: Mapping[str, tuple[np.ndarray, ...]], last_step: float) -> None:
    """Lines with their names and last values written at their right ends."""
    finite = [values[np.isfinite(values)] for _, values in curves.values()]
    if _spans_decades(np.concatenate(finite)):
        axes.set_yscale("log")
        axes.minorticks_off()
    ends = []
    for index, (label, (steps, values)) in enumerate(curves.items()):
        color = OF_STAGE.get(label.partition(" ")[0], COLORS[index % len(COLORS)])
        end = _draw_line(axes, steps, values, color, smooth=not label.startswith(("val", "test")))
        ends.append((end, label, color))
    axes.set_xlabel("step")
    if all(values.size == 0 for values in finite):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center")
        return
    low, high = (
        min(values.min() for values in finite if values.size),
        max(values.max() for values in finite if values.size),
    )
    if low == high:
        axes.set_ylim(*(sorted((0.0, 2 * low)) if low else (-0.05, 1.0)))
    axes.set_xlim(0.0, 1.01 * last_step)
    _label_ends(axes, ends[:MOST_LABELS])


def _draw_line(axes: "Axes", steps: np.ndarray, values: np.ndarray, color: str, *, smooth: bool) -> float:
    """Draw one curve, noisy ones under their running mean; returns the height of its end."""
    shown = np.where(np.isfinite(values), values, np.nan)
    if not smooth or not _is_noisy(shown):
        marker = "o" if np.isfinite(shown).sum() <= 25 else None
        axes.plot(steps, shown, color=color, linewidth=1.6, marker=marker, markersize=3.2, markeredgewidth=0)
    else:
        axes.plot(steps, shown, color=color, linewidth=0.7, alpha=0.3)
        shown = running_mean(shown, max(3, len(shown) // 40))
        axes.plot(steps, shown, color=color, linewidth=1.8)
    bad = steps[~np.isfinite(values)]
    if bad.size:
        axes.plot(bad, np.full_like(bad, 0.02), "x", color=color, transform=axes.get_xaxis_transform(), markersize=4)
    return next((float(value) for value in shown[::-1] if np.isfinite(value)), math.nan)


def running_mean(values: np.ndarray, half_width: int) -> np.ndarray:
    """Centered mean with triangular weights, shorter at the ends, NaN left out.

    Example:
        >>> running_mean(np.array([0.0, 0.0, 4.0, np.nan, 0.0]), 1).tolist()
        [0.0, 1.0, 2.6666666666666665, 2.0, 0.0]
    """
    weights = np.concatenate([np.arange(1, half_width + 2), np.arange(half_width, 0, -1)]).astype(float)
    known = np.isfinite(values).astype(float)
    total = np.convolve(np.where(known > 0, values, 0.0), weights)[half_width : half_width + len(values)]
    share = np.convolve(known, weights)[half_width : half_width + len(values)]
    return np.where(share > 0, total / np.maximum(share, 1e-300), np.nan)


def _is_noisy(values: np.ndarray) -> bool:
    """Whether neighbors differ by more than a smooth curve of these points would."""
    known = values[np.isfinite(values)]
    if len(known) < NOISY_FROM:
        return False
    turns = np.diff(known)
    return bool((turns[1:] * turns[:-1] < 0).mean() > 0.2)


def _spans_decades(values: np.ndarray) -> bool:
    """Whether a logarithmic axis shows the values better."""
    if values.size == 0 or values.min() <= 0:
        return False
    low, high = np.quantile(values, [0.02, 0.98])
    return bool(high / low > 30)


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Write names and last values beside the right ends, kept apart."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    heights = sorted(
        (float(to_axes.transform((x, height))[1]), f"{label}  {height:.4g}".strip(), color)
        for height, label, color in ends
        if math.isfinite(height)
    )
    gap = 0.085
    placed: list[float] = []
    for height, _, _ in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    excess = max(0.0, placed[-1] - 1.0) if placed else 0.0
    for position, (_, text, color) in zip(placed, heights, strict=True):
        axes.annotate(
            text,
            (1.0, position - excess),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize="small",
            parse_math=False,
            annotation_clip=False,
        )
