"""Where the memory went: the plan of the run, moment by moment, against what was measured."""

from __future__ import annotations

from qvera.evaluation.report.charts import Stack, stacked_bars
from qvera.evaluation.report.markup import esc, section
from qvera.evaluation.report.read import Run, number, pick, words
from qvera.utils.formatting import size

_KINDS = (
    (1, "interpreter, libraries, rows", ("runtime",)),
    (2, "base", ("base",)),
    (3, "projections, vectors, optimizer", ("projections", "vectors")),
    (4, "checkpoints", ("checkpoints",)),
    (5, "transient", ("transient",)),
    (6, "loss", ("loss",)),
    (7, "answers", ("answers",)),
)
_MOMENTS = {"backward": "Backward pass", "loss": "Loss", "answers": "Answers"}


def memory_section(run: Run) -> str:
    """Stacked bars of the planned memory, and predicted beside measured; "" for a run without a plan."""
    stacks = _stacks(run)
    if not stacks:
        return ""
    predicted, measured = number(run.info, "plan", "measured", "predicted_bytes"), _measured(run, "total_bytes")
    mark = ("measured", measured) if measured else None
    said = "; ".join(f"{stack.label}: {size(sum(held for _, _, held in stack.parts))}" for stack in stacks)
    chart = stacked_bars(stacks, description=f"Planned memory by moment. {said}.", mark=mark)
    shown = {colour for stack in stacks for colour, _, held in stack.parts if held}
    keys = "".join(
        f'<span class="legend"><i class="part p{colour}"></i>{esc(name)}</span>'
        for colour, name, _ in _KINDS
        if colour in shown
    )
    if mark:
        keys += f'<span class="legend"><i class="dashed"></i>measured peak, {esc(size(measured or 0))}</span>'
    figure = f"<figure><figcaption><h3>Planned, by moment</h3>{keys}</figcaption>{chart}</figure>"
    return section("Memory", figure, _sentence(run, predicted, measured)) if chart else ""


def _measured(run: Run, key: str) -> float | None:
    return number(run.info, "plan", "measured", key)


def _sentence(run: Run, predicted: float | None, measured: float | None) -> str:
    if not predicted or not measured:
        return ""
    error = number(run.info, "plan", "measured", "relative_error") or 0.0
    mapped = _measured(run, "mapped_bytes")
    beside = f", {size(mapped)} of it mapped weights" if mapped else ""
    batch = words(run.info, "plan", "batch", "source")
    return (
        f'<p class="caption">Predicted peak {esc(size(predicted))}, measured {esc(size(measured))}{esc(beside)}: '
        f"the plan was off by {100 * error:+.1f} %. Planned for {esc(batch)}.</p>"
    )


def _stacks(run: Run) -> list[Stack]:
    moments = pick(run.info, "plan", "memory", "moments")
    stacks = []
    for name, parts in moments.items() if isinstance(moments, dict) else ():
        if not isinstance(parts, list):
            continue
        sizes = [(words(part, "kind"), number(part, "bytes") or 0.0) for part in parts]
        held = [
            (colour, label, sum(held for kind, held in sizes if kind in kinds and held > 0))
            for colour, label, kinds in _KINDS
        ]
        stacks.append(Stack(_MOMENTS.get(str(name), str(name)), held))
    return stacks
