"""A front beside what it must beat."""

from collections.abc import Sequence
from pathlib import Path

from .baselines import Baseline
from .front import ParetoFront

_AXES = {"relative": "largest relative error", "absolute": "largest absolute error", "ulp32": "largest error, ULP"}
_STYLES = {
    "taylor": ("Taylor polynomial", "#9498a0", ":", "v"),
    "minimax polynomial": ("minimax polynomial (Horner)", "#4269d0", "--", "s"),
    "minimax rational": ("minimax rational (Horner)", "#3ca951", "--", "D"),
    "fraction": ("minimax rational (continued fraction)", "#3ca951", "-", "d"),
}


def draw(path: str | Path, fronts: Sequence[ParetoFront], baselines: Sequence[Baseline] = ()) -> None:
    """Draw errors against operations, one line for each front and each kind of baseline.

    Args:
        path: A PNG or any other format of matplotlib.
        fronts: Of one function, domain and error.
        baselines: For the same; with ``"ulp32"`` they are left out, their errors being relative.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    first = fronts[0][0]
    most = max(item.ops for front in fronts for item in front)
    for kind, (label, color, line, marker) in _STYLES.items():
        points = sorted(
            (b.ops_as_fraction if kind == "fraction" else b.ops, b.max_error)
            for b in baselines
            if b.kind == ("minimax rational" if kind == "fraction" else kind) and first.error != "ulp32"
        )
        points = [point for point in points if point[0] <= most]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=marker, markersize=4, label=label)
    for k, front in enumerate(fronts):
        label = "evolved" if len(fronts) == 1 else f"evolved, seed {front.seed}"
        x, y = [item.ops for item in front], [item.max_error for item in front]
        color = ("#ff725c", "#a463f2", "#efb118")[k % 3]
        axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=6 - 1.5 * (k % 3), label=label)
    low, high = first.domain
    axes.set(yscale="log", xlabel="operations", ylabel=_AXES[first.error])
    axes.set_title(f"{first.function} on [{low:g}, {high:g}]")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
