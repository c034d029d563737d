"""Write the generated parts of README.md: the table of methods and the table of speeds.

Run with ``make readme``. The methods come from the registry, their evidence from the line ``**Evidence:** ...`` of each
card, the speeds from the committed results of ``benchmarks/optimizer_step.py``.
"""

import json
import re
import sys
from pathlib import Path

from lightning_opt import registry

ROOT = Path(__file__).parents[1]


def methods_table() -> str:
    """A Markdown table with a row for each registered method that has a card."""
    registry.load_all()
    rows = ["| method | kind | paper | what it does | backends | evidence |", "| --- | --- | --- | --- | --- | --- |"]
    for entry in registry.entries():
        if not entry.card:
            continue
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})"
        backends = "torch, fused CPU, Triton" if "fused" in entry.capabilities else "torch"
        name = f"[`{entry.name}`](docs/methods/{entry.card}.md)"
        rows.append(f"| {name} | {entry.kind} | {paper} | {entry.summary} | {backends} | {evidence(entry.card)} |")
    return "\n".join(rows)


def evidence(card: str) -> str:
    """The one-line evidence of a card.

    Raises:
        ValueError: If the card has none: a method without its proof is not listed.
    """
    path = ROOT / "docs" / "methods" / f"{card}.md"
    match = re.search(r"^\*\*Evidence:\*\* (.+)$", path.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{path} needs a line '**Evidence:** ...'")
    return match[1]


def speed_table() -> str:
    """A Markdown table of the fused CPU step times."""
    result = json.loads((ROOT / "benchmarks" / "results" / "optimizer_step.json").read_text())
    rows = [
        "| fused CPU step | beside | time ratio (median of paired runs) | 10% to 90% |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["beside_adam"]["rows"].items():
        ratio = row["per_byte_ratio"]
        beside = f"`torch.optim.Adam(fused=True)`, per byte ({row['bytes_a_parameter']} against 28 a parameter)"
        rows.append(f"| {name} | {beside} | {ratio['median']:.2f} | {ratio['q10']:.2f} to {ratio['q90']:.2f} |")
    machine = result["machine"]
    return "\n".join(rows) + f"\n\n{machine['cpu']}, {machine['cores']} cores; `{result['command']}`."


def render(text: str) -> str:
    """README.md with its generated parts written anew."""
    for name, table in {"methods": methods_table(), "speed": speed_table()}.items():
        text = re.sub(
            rf"(<!-- {name}:[^>]*-->\n).*?(<!-- /{name} -->)",
            lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    old, new = readme.read_text(), render(readme.read_text())
    readme.write_text(new)
    sys.exit("--check" in sys.argv and old != new)
