"""Pages of each kind, of made-up runs, and a page taken apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from qvera.config.schema import parse_recipe
from qvera.config.sections import LrRange
from qvera.evaluation.report.compare import compare_runs
from qvera.evaluation.report.pages import answers_page, compare_page
from qvera.evaluation.report.run_page import write_report
from qvera.training.lr_finder import RangeTestResult, range_page
from tests.evaluation.report.conftest import (
    ADAPTER,
    RECIPE,
    adapter_entry,
    eval_rows,
    evaluation,
    many_info,
    many_rows,
    plan,
    run_info,
    train_rows,
)

Build = Callable[..., Path]
MANY_RECIPE = {**RECIPE, "data": {"path": "data/rows.csv", "adapter_column": "customer", "eval_fraction": 0.2}}

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """A page taken apart: its visible text, its elements, and whether every element is closed where it should be."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(tag == name and wanted.items() <= attrs.items() for name, attrs in self.elements)


def page(run_dir: Path) -> Page:
    """The page of a run, written into its directory."""
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def finished(build_run: Build, root: Path) -> Path:
    """A run with all that a page can show, short."""
    info = run_info() | {"plan": plan(1.0e9)}
    info["adapter"] |= {"b_groups": 2, "input_scale": True}
    info["data"] |= {"split_rows": 3, "split_parts": 1200}
    long = "first words " + "x y " * 400 + "last words"
    info["samples"].append({"prompt": long, "reference": None, "before": "a", "after": "b"})
    evals = eval_rows({4: 0.61, 8: 0.0712, 12: 0.0735})
    recipe = RECIPE | {"adapter": {"rank": 256, "b_groups": 2, "input_scale": True}}
    return write_report(build_run(info, train_rows(12), evals, recipe))


def rewarded(build_run: Build, root: Path) -> Path:
    """A run on preferences."""
    rows, evals = train_rows(3), eval_rows({2: 0.5})
    for number, row in enumerate([*rows, *evals], start=1):
        row |= {"rewards/chosen": 0.1 * number, "rewards/rejected": -0.2, "rewards/margins": 0.1 * number + 0.2}
        row["rewards/accuracies"] = 0.25 * number
    info = run_info() | {"samples": []}
    info["result"] |= {"steps": 3, "best_step": None, "eval_before": {"loss": 0.7, "rewards/margins": 0.0, "rows": 8}}
    info["result"]["eval_after"] = {"loss": 0.4, "rewards/margins": 0.75, "rewards/accuracies": 0.875, "rows": 8}
    return write_report(build_run(info=info, train=rows, evals=evals))


def few(build_run: Build, root: Path) -> Path:
    """Four adapters, each with another end."""
    return write_report(build_run(many_info(), many_rows(), None, MANY_RECIPE))


def scored(build_run: Build, root: Path) -> Path:
    """Two runs and one that was killed, with scores of answers of one."""
    places = [build_run(name=name, train=train_rows(6), evals=eval_rows({3: 0.6})) for name in ("one", "two")]
    (places[0] / "adapter").mkdir()
    (places[0] / "adapter" / "adapter_model.safetensors").write_bytes(ADAPTER)
    (places[0] / "eval.json").write_text(json.dumps(evaluation()))
    recipe = RECIPE | {"adapter": {"rank": 64}}
    places.append(build_run(name="killed", info=None, train=train_rows(5), evals=None, recipe=recipe, tail='{"kind'))
    (root / "compared.html").write_text(compare_page(compare_runs(places)))
    return root / "compared.html"


def answers(build_run: Build, root: Path) -> Path:
    """What `qvera eval --html` writes."""
    (root / "answers.html").write_text(answers_page(evaluation()))
    return root / "answers.html"


def runs(build_run: Build, root: Path) -> Path:
    """Eight runs, one of them broken off, with names and values as long as they get."""
    places = []
    for number in range(8):
        data = {"path": f"data/{'x' * 40}{number}.jsonl"}
        recipe = {**RECIPE, "training": {"learning_rate": 10.0**-number}, "data": data}
        steps = train_rows(40 + 9 * number)
        info = run_info() if number else None
        places.append(build_run(info=info, recipe=recipe, train=steps, evals=None, name=f"a-run-of-rank-{number}"))
    (root / "runs.html").write_text(compare_page(compare_runs(places)))
    return root / "runs.html"


def ramp(build_run: Build, root: Path) -> Path:
    """A range test that diverged at its 45th step of 60."""
    points: list[dict[str, float]] = []
    for n in range(45):
        loss = 2.3 - n / 40 + (n > 40) * 2.0 ** (n - 40)
        points.append({"learning_rate": 10 ** (n / 12 - 5), "loss": loss, "grad_norm": 0.3 + n / 50})
        points[-1] |= {"step": n + 1, "smoothed_loss": loss, "step_seconds": 1.2}
    found = RangeTestResult(points, 1.9e-2, 3.2e-3, points[-1]["learning_rate"])
    tree = {"model": "SmolLM2-135M-Instruct", "data": {"path": "data/repairs.jsonl"}}
    page = range_page("repairs", parse_recipe(tree, "a test"), LrRange(steps=60), found)
    (root / "lr-range.html").write_text(page, encoding="utf-8")
    return root / "lr-range.html"


def many(build_run: Build, root: Path) -> Path:
    """Four adapters, with names as long as they get."""
    info = many_info()
    info["adapters"][0]["name"] = "a very long name " * 12
    info["adapters"][1]["name"] = "x" * 200
    info["adapters"] += [adapter_entry(f"customer {number}", f"c{number}") for number in range(9)]
    return write_report(build_run(info=info, train=many_rows(), evals=None, name=f"many-{root.name}"))


SNAPSHOTS: dict[str, Callable[[Build, Path], Path]] = {
    "finished": finished,
    "preferences": rewarded,
    "many": few,
    "adapter": lambda build_run, root: few(build_run, root).parent / "report" / "ben.html",
    "compare": scored,
    "eval": answers,
    "find-lr": ramp,
}
"""A page of each kind, whose text is stored in snapshots/."""
