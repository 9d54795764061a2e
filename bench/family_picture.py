"""docs/methods/table.md: its table, and the picture of the scores of every method on every task.

    python bench/family_picture.py docs/methods

A row is a method and a column a task. A dot is the mean of the seeds, and a line goes from the lowest to the highest. A
mean far from the others (`_limits`) is a number at the column's edge, so that these can be told apart.
It reads results/family.jsonl, the lines of bench/family.py.
"""

from __future__ import annotations

import argparse
import statistics
from html import escape
from pathlib import Path

from bench.common import with_table
from bench.family import COLUMNS, e2e_table, final_scores, finals, table
from qvera.evaluation.report.charts import nice_ticks

_LEFT, _TOP, _ROW, _WIDTH, _GAP = 250, 58, 26, 190, 34
_LEAST_WIDTH = 620  # of the last line
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1a1d20}.soft{fill:#555d66;font-size:12px}.grid{stroke:#d8dde0}"
    ".dot{fill:#00696f}.span{stroke:#00696f;stroke-width:2}.lora .dot{fill:#8a949b}.lora .span{stroke:#8a949b}"
    "@media(prefers-color-scheme:dark){text{fill:#e7e9ea}.soft{fill:#a1a9b1}.grid{stroke:#3c444a}.dot{fill:#5cc7c0}"
    ".span{stroke:#5cc7c0}.lora .dot{fill:#a1a9b1}.lora .span{stroke:#a1a9b1}}"
)


def picture() -> str:
    """A standalone SVG for light and dark pages; tasks without a line are left out."""
    facts = finals()
    methods = sorted(facts, key=lambda method: facts[method]["trained"])
    tasks = {task: final_scores(task, score) for task, (score, _, _) in COLUMNS.items()}
    shown = [task for task, found in tasks.items() if found]
    width = max(_LEFT + (_WIDTH + _GAP) * len(shown), _LEAST_WIDTH)
    height = _TOP + _ROW * len(methods) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Scores of every method on every task, ordered by trained parameters">',
        f"<style>{_STYLE}</style>",
    ]
    for row, method in enumerate(methods):
        y = _TOP + _ROW * row + 18
        parts.append(f'<text x="12" y="{y}">{escape(method)}</text>')
        trained = f"{facts[method]['trained']:,}"
        parts.append(f'<text class="soft" x="{_LEFT - 24}" y="{y}" text-anchor="end">{trained}</text>')
    parts.append(f'<text class="soft" x="{_LEFT - 24}" y="{_TOP - 14}" text-anchor="end">parameters</text>')
    for column, task in enumerate(shown):
        parts += _panel(task, tasks[task], methods, _LEFT + (_WIDTH + _GAP) * column, height)
    parts.append(
        f'<text class="soft" x="12" y="{height - 8}">SmolLM2-135M in NF4, 150 steps of 8 rows. '
        "Dot: mean of the seeds; line: lowest to highest; number: a mean beyond the column.</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _limits(found: dict[str, list[float]]) -> tuple[float, float]:
    """The values of a column, without means that are more than 1.5 times the middle half's width away from it."""
    means = [statistics.mean(seeds) for seeds in found.values()]
    first, _, third = statistics.quantiles(means, method="inclusive") if len(means) > 1 else means * 3
    far = 1.5 * (third - first)
    near = [seeds for seeds in found.values() if first - far <= statistics.mean(seeds) <= third + far]
    values = [value for seeds in near or found.values() for value in seeds]
    return min(values), max(values)


def _panel(task: str, found: dict[str, list[float]], methods: list[str], left: int, height: int) -> list[str]:
    _, label, digits = COLUMNS[task]
    lowest, highest = _limits(found)
    spare = 0.05 * (highest - lowest) or 0.5
    low, high = lowest - spare, highest + spare

    def place(value: float) -> float:
        return round(left + (value - low) / (high - low) * _WIDTH, 1)

    parts = [f'<text x="{left}" y="22">{escape(label)}</text>']
    for tick in nice_ticks(low, high, about=4):
        at = place(tick)
        if left <= at <= left + _WIDTH:
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP - 6}" y2="{height - 34}"/>')
            parts.append(f'<text class="soft" x="{at}" y="{_TOP - 14}" text-anchor="middle">{tick:g}</text>')
    for row, method in enumerate(methods):
        if not (seeds := found.get(method)):
            continue
        y, mean = _TOP + _ROW * row + 13, statistics.mean(seeds)
        said = f"{method}: {mean:.{digits}f} ({min(seeds):.{digits}f} to {max(seeds):.{digits}f}), {len(seeds)} seeds"
        kind = ' class="lora"' if method.startswith("lora r=") else ""
        parts.append(f"<g{kind}><title>{escape(said)}</title>")
        if not lowest <= mean <= highest:
            at, anchor = (left, "start") if mean < lowest else (left + _WIDTH, "end")
            parts.append(f'<text class="soft" x="{at}" y="{y + 4}" text-anchor="{anchor}">{mean:.{digits}f}</text></g>')
            continue
        parts.append(f'<line class="span" x1="{place(min(seeds))}" x2="{place(max(seeds))}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{place(mean)}" cy="{y}" r="5"/></g>')
    return parts


def main() -> None:
    """Write the picture, and the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of table.md")
    directory: Path = parser.parse_args().directory
    (directory / "table.svg").write_text(picture(), encoding="utf-8")
    written = directory / "table.md"
    text = with_table(written.read_text(encoding="utf-8"), "table", table())
    written.write_text(with_table(text, "e2e", e2e_table()), encoding="utf-8")


if __name__ == "__main__":
    main()
