import contextlib
import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._report_curves import COLORS
from ._report_panel import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, PAPER, ALERT = "#1f2430", "#5b6472", "#e3e7ec", "#ffffff", "#c0392b"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper", ALERT: "bad", COLORS[0]: "blue"}


def render_svg(panel: Panel) -> tuple[str, Panel]:
    """Draw one panel as inline SVG whose neutral colors are the CSS variables of the page.

    Returns:
        The SVG element and the panel; both show the error instead if drawing fails.
    """
    try:
        return _svg(panel), panel
    except Exception as error:
        failed = Panel(panel.title, _ErrorText(f"{type(error).__name__}: {error}"))
        return _svg(failed), failed


def render_png(panels: Sequence[Panel], title: str, subtitle: str, path: Path) -> None:
    """Draw all panels as one picture with a title above them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = 2 if len(panels) == 4 else max(1, min(3, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    with _style():
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.7), dpi=140, layout=layout)
        figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=13, fontweight="bold", parse_math=False)
        at = (0.012, 1 - 0.42 / figure.get_figheight())
        figure.text(*at, subtitle, fontsize=9.5, color=MUTED, va="top", parse_math=False).set_in_layout(False)
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw(panel, axes)
            axes.set_title(panel.title, parse_math=False)
        FigureCanvasAgg(figure).print_png(path)  # savefig would draw everything twice


class _ErrorText:
    def __init__(self, text: str) -> None:
        self.text = textwrap.fill(text, 48, max_lines=8)

    def __call__(self, axes: "Axes") -> None:
        axes.set_axis_off()
        axes.text(
            0.5, 0.5, self.text, transform=axes.transAxes, ha="center", va="center", parse_math=False, color=ALERT
        )


def _svg(panel: Panel) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(3.7, 2.5), layout="constrained")
        _draw(panel, figure.add_subplot())
        written = io.StringIO()
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg


def _draw(panel: Panel, axes: "Axes") -> None:
    panel.draw(axes)
    if axes.images:
        axes.grid(False)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's defaults with ours on top, whatever the user set; all is as before afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "lightning-opt",
                "font.size": 9,
                "font.family": "sans-serif",
                "text.color": INK,
                "axes.labelcolor": MUTED,
                "axes.edgecolor": MUTED,
                "axes.facecolor": "none",
                "figure.facecolor": PAPER,
                "axes.titlesize": 10,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                "axes.titlecolor": INK,
                "axes.labelsize": 8,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.spines.left": False,
                "axes.linewidth": 0.6,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "axes.axisbelow": True,
                "axes.formatter.limits": (-3, 5),
                "axes.formatter.use_mathtext": False,
                "grid.color": GRID,
                "grid.linewidth": 0.8,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.labelsize": 8,
                "ytick.labelsize": 8,
                "xtick.major.size": 3,
                "xtick.major.width": 0.6,
                "ytick.major.size": 0,
                "ytick.minor.size": 0,
                "legend.frameon": False,
                "lines.solid_capstyle": "round",
                "lines.solid_joinstyle": "round",
                "image.cmap": "viridis",
            }
        )
        yield
