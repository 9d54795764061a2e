"""The picture and the table of `bench.quality`: the loss on test rows over the trained numbers, a panel for each task.

    python -m bench.quality_picture docs/methods

A dot is the mean difference of the test loss from LoRA r=16's, over the same rows and seeds, and its line the 95 %
bootstrap interval. Below zero a method is ahead. It reads results/quality.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import math
from html import escape
from pathlib import Path

from bench.common import RESULTS, read_lines, with_table
from bench.quality import REFERENCE, Result, searched, table
from qvera.evaluation.report.charts import nice_ticks

_LEFT, _TOP, _WIDTH, _HEIGHT, _BETWEEN = 64, 60, 380, 230, 110
_COLUMNS = 2
_FEWEST, _MOST = 10_000, 10_000_000  # trained numbers
_BASES = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1a1d20}.soft{fill:#555d66;font-size:12px}.grid{stroke:#d8dde0}"
    ".zero{stroke:#555d66;stroke-dasharray:4 3}.dot{fill:#00696f}.span{stroke:#00696f;stroke-width:2}"
    ".lora .dot{fill:#8a949b}.lora .span{stroke:#8a949b}"
    "@media(prefers-color-scheme:dark){text{fill:#e7e9ea}.soft{fill:#a1a9b1}.grid{stroke:#3c444a}.zero{stroke:#a1a9b1}"
    ".dot{fill:#5cc7c0}.span{stroke:#5cc7c0}.lora .dot{fill:#a1a9b1}.lora .span{stroke:#a1a9b1}}"
)


def picture(found: list[Result]) -> str:
    """A standalone SVG for light and dark pages, of the tasks where a method has a difference."""
    groups = [list(of) for _, of in itertools.groupby(found, lambda result: result.group)]
    groups = [of for of in groups if any(result.minus_reference for result in of)]
    width = _COLUMNS * (_LEFT + _WIDTH + 30)
    height = -(-len(groups) // _COLUMNS) * (_HEIGHT + _BETWEEN) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Test loss of each method minus that of {REFERENCE}, over trained parameters">',
        f"<style>{_STYLE}</style>",
    ]
    for number, of in enumerate(groups):
        row, column = divmod(number, _COLUMNS)
        parts += _panel(of, column * (_LEFT + _WIDTH + 30) + _LEFT, row * (_HEIGHT + _BETWEEN) + _TOP)
    parts.append(
        f'<text class="soft" x="12" y="{height - 10}">Dot: mean over rows and seeds; line: its 95 % interval. '
        f"Lower is better; dashed: {escape(REFERENCE)}.</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _panel(of: list[Result], left: int, top: int) -> list[str]:
    base, task, steps = of[0].group
    spans = {result.method: result.minus_reference.get("loss", (0.0, 0.0, 0.0)) for result in of}
    ticks = nice_ticks(min(low for _, low, _ in spans.values()), max(high for *_, high in spans.values()), about=5)

    def across(trained: float) -> float:
        share = math.log(trained / _FEWEST) / math.log(_MOST / _FEWEST)
        return round(left + share * _WIDTH, 1)

    def down(difference: float) -> float:
        return round(top + (ticks[-1] - difference) / (ticks[-1] - ticks[0]) * _HEIGHT, 1)

    parts = [
        f'<text x="{left}" y="{top - 34}">{_BASES[base]}, {escape(task.upper())}, {steps} steps</text>',
        f'<text class="soft" x="{left}" y="{top - 16}">test loss minus that of {escape(REFERENCE)}</text>',
        f'<text class="soft" x="{left + _WIDTH / 2}" y="{top + _HEIGHT + 34}" text-anchor="middle">'
        "trained parameters, without a head's</text>",
    ]
    for tick in ticks:
        kind = "zero" if abs(tick) < 1e-12 else "grid"
        y = down(tick)
        parts.append(f'<line class="{kind}" x1="{left}" x2="{left + _WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="soft" x="{left - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for power in range(int(math.log10(_FEWEST)), int(math.log10(_MOST)) + 1):
        x, said = across(10**power), {4: "10 k", 5: "100 k", 6: "1 M", 7: "10 M"}[power]
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{top + _HEIGHT}"/>')
        parts.append(f'<text class="soft" x="{x}" y="{top + _HEIGHT + 16}" text-anchor="middle">{said}</text>')
    dots, labels = [across(result.chosen["trained"]) for result in of], list[tuple[float, float]]()
    for result in sorted(of, key=lambda result: spans[result.method][0], reverse=True):  # from the top
        mean, low, high = spans[result.method]
        x, y = across(result.chosen["trained"]), down(mean)
        label_y = y - 6 if result.method == REFERENCE else y + 4
        while any(abs(x - other_x) < 110 and abs(label_y - other_y) < 14 for other_x, other_y in labels):
            label_y += 14
        labels.append((x, label_y))
        kind = ' class="lora"' if result.method.startswith("PEFT LoRA ") else ""
        said = f"{result.method}: {mean:+.4f} ({low:+.4f} to {high:+.4f}), {result.chosen['trained']:,} parameters"
        parts.append(f"<g{kind}><title>{escape(said)}</title>")
        parts.append(f'<line class="span" x1="{x}" x2="{x}" y1="{down(high)}" y2="{down(low)}"/>')
        parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="5"/>')
        parts.append(
            f'<text class="soft" x="{9 + max(dot for dot in dots if dot - x < 30)}" y="{label_y}">{escape(result.method.removeprefix("PEFT "))}</text></g>'
        )
    return parts


def main() -> None:
    """Write the picture, and the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of table.md")
    directory: Path = parser.parse_args().directory
    found = searched(read_lines(RESULTS / "quality.jsonl"))
    (directory / "quality.svg").write_text(picture(found), encoding="utf-8")
    page = directory / "table.md"
    page.write_text(with_table(page.read_text(encoding="utf-8"), "quality", table(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
