"""Charts of a run on preferences: rewards of chosen and rejected answers, the margin between them, and accuracy."""

from qvera.evaluation.report.charts import Chart, Line, line_chart
from qvera.evaluation.report.read import Point, Run, get_number, series
from qvera.evaluation.report.smoothing import thin
from qvera.utils.formatting import percent

MARGIN, ACCURACY = "rewards/margins", "rewards/accuracies"


def reward_charts(run: Run) -> list[Chart]:
    """The charts that the run has numbers for; none of another kind of run."""
    margin = Line("margin", thin(series(run.train, MARGIN)))
    chosen = Line("chosen", thin(series(run.train, "rewards/chosen")), "dashed")
    rejected = Line("rejected", thin(series(run.train, "rewards/rejected")), "faint")
    held_out = Line("held-out margin", _held_out(run, MARGIN), "held-out")
    share = Line("training", thin(series(run.train, ACCURACY)), format=percent)
    held_out_share = Line("held out", _held_out(run, ACCURACY), "held-out", percent)
    charts = [
        _chart("Reward margin", [margin, held_out], "chosen less rejected"),
        _chart("Rewards", [chosen, rejected], "β log of the ratio to the reference"),
        _chart("Reward accuracy", [share, held_out_share], "chosen above rejected"),
    ]
    return [chart for chart in charts if chart is not None]


def _chart(title: str, lines: list[Line], note: str) -> Chart | None:
    shown = [line for line in lines if line.values]
    return line_chart(title, shown, note=note, legend=[(line.style, line.label) for line in shown])


def _held_out(run: Run, key: str) -> list[Point]:
    """By step: from metrics.jsonl, and before and after training from run.json."""
    points = dict(series(run.evals, key))
    before, after = (get_number(run.info, "result", when, key) for when in ("eval_before", "eval_after"))
    steps = run.number("result", "steps")
    if before is not None:
        points.setdefault(0.0, before)
    if after is not None and steps and run.setting("training", "load_best_model_at_end") != "True":
        points.setdefault(steps, after)
    return sorted(points.items())
