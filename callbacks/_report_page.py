import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from ._report_curves import better_is
from ._report_facts import Facts
from ._report_history import Curve


@dataclasses.dataclass
class Page:
    """The content of ``report.html``; everything is text already."""

    title: str
    outcome: str
    cause: str
    numbers: Facts
    pictures: Sequence[tuple[str, str]]
    results: Sequence[tuple[str, str, str, str]]
    facts: Mapping[str, Facts]
    config: str
    tests: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def html(self) -> str:
        """The whole page: nothing in it is loaded from elsewhere."""
        facts = "".join(_section(title, _table((), rows)) for title, rows in self.facts.items() if rows)
        sections = [
            _header(self.title, self.outcome, self.cause),
            _tiles([*self.numbers, *((name, _number(value)) for name, value in self.tests.items())]),
            f'<section class="grid">{"".join(_picture(*picture) for picture in self.pictures)}</section>',
            _section("Metrics", _table(("", "last", "best", "at step"), self.results)) if self.results else "",
            f'<div class="pair">{facts}</div>',
            _folded("Configuration", f"<pre>{escape(self.config)}</pre>") if self.config else "",
        ]
        return _PAGE.format(title=escape(self.title), body="\n".join(filter(None, sections)))


def results(metrics: Mapping[str, Curve]) -> list[tuple[str, str, str, str]]:
    """Name, last value, best value and its step of every quantity; best is blank where the name does not tell."""
    rows = []
    for name, curve in sorted(metrics.items()):
        best = {"low": curve.lowest, "high": curve.highest}.get(better_is(name))
        value, step = (_number(best[1]), f"{best[0]:.0f}") if best else ("", "")
        rows.append((name, _number(curve.last[1]), value, step))
    return rows


def _number(value: float) -> str:
    return f"{value:.5g}"


def _header(title: str, outcome: str, cause: str) -> str:
    kind = "good" if outcome == "finished" else "bad"
    cause = f'<p class="cause">{escape(cause)}</p>' if cause else ""
    return f'<header><h1>{escape(title)}</h1><span class="badge {kind}">{escape(outcome)}</span></header>{cause}'


def _tiles(numbers: Facts) -> str:
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers)
    return f'<dl class="tiles">{tiles}</dl>'


def _picture(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _folded(title: str, content: str) -> str:
    return f"<section><details><summary>{escape(title)}</summary>{content}</details></section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = "numbers" if head else "facts"
    return f'<div class="scroll"><table class="{kind}">{f"<tr>{heads}</tr>" if head else ""}{body}</table></div>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{
  --paper: #ffffff; --back: #f5f6f8; --ink: #1f2430; --muted: #5b6472; --line: #e3e7ec;
  --good: #1a7f4b; --bad: #c0392b; --blue: #4269d0; --text: system-ui, -apple-system, "Segoe UI", sans-serif;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #191c22; --back: #101216; --ink: #e6e9ee; --muted: #98a1ae; --line: #2c313a;
    --good: #5fd39a; --bad: #ff8a7a; --blue: #7f9ff0;
  }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 var(--text); }}
main {{ max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }}
header {{ display: flex; flex-wrap: wrap; align-items: baseline; gap: 14px; }}
h1 {{ font-size: 24px; font-weight: 650; letter-spacing: -0.01em; margin: 0; }}
h2, summary {{ font-size: 16px; font-weight: 650; margin: 0 0 10px; }}
summary {{ margin: 0; cursor: pointer; }}
details[open] summary {{ margin-bottom: 10px; }}
.badge {{ font-size: 13px; font-weight: 600; }}
.good {{ color: var(--good); }}
.bad, .cause {{ color: var(--bad); }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 18px 0 26px; }}
.tiles dt {{ color: var(--muted); font-size: 13px; }}
.tiles dd {{ margin: 0; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 16px; }}
figure, section:not(.grid) {{
  margin: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
}}
figure {{ padding: 14px 14px 8px; }}
figcaption {{ font-weight: 600; font-size: 14px; margin: 0 0 6px 4px; overflow-wrap: anywhere; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figure svg text {{ font-family: var(--text) !important; font-variant-numeric: tabular-nums; }}
section:not(.grid) {{ margin-top: 16px; padding: 18px 20px; }}
.pair {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr));
  column-gap: 16px; align-items: start;
}}
.pair section:first-child {{ grid-column: 1 / -1; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
td, th {{ text-align: left; padding: 6px 16px 6px 0; border-top: 1px solid var(--line); vertical-align: top; }}
tr:first-child > * {{ border-top: 0; }}
th {{ color: var(--muted); font-weight: 500; font-size: 13px; }}
.numbers :is(td, th):not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums; }}
.facts td:first-child {{ color: var(--muted); white-space: nowrap; width: 1%; }}
pre {{ margin: 0; overflow-x: auto; font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
