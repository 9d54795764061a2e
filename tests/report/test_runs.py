"""`qvera compare`: several runs' figures, curves and differing keys, and what of them can't be compared."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvera.cli import main
from qvera.errors import InputError
from qvera.report.runs import COLOURS, compared, runs_page

from .conftest import RECIPE, eval_rows, run_info, train_rows

Build = Callable[..., Path]


def recipe(**training: Any) -> dict[str, Any]:
    return {**RECIPE, "training": {**RECIPE["training"], **training}}


def info(**changes: Any) -> dict[str, Any]:
    """run.json with ``section__key=value`` changed."""
    tree = run_info()
    for name, value in changes.items():
        *path, last = name.split("__")
        node = tree
        for key in path:
            node = node[key]
        node[last] = value
    return tree


def test_every_figure_is_the_runs_own(build_run: Build) -> None:
    places = [
        build_run(name="one"),
        build_run(name="two", info=info(adapter__trainable_parameters=7, result__peak_bytes=5)),
    ]
    found = compared(places)
    assert found.labels == ["one", "two"] and found.gaps == [] and found.differing == {}
    one, two = found.facts
    rows = train_rows()
    assert one == {
        "loss_before": 2.412,
        "loss_after": 0.0712,
        "loss_lowest": 0.0712,
        "lowest_step": 80,
        "perplexity": 1.0738,
        "exact_match": 0.875,
        "trainable_parameters": 209_280,
        "adapter_bytes": 838_112,
        "peak_bytes": 1_182_000_000,
        "seconds_a_step": statistics.median(row["step_seconds"] for row in rows),
        "steps": 96,
        "tokens": 96 * 3200,
        "seconds": 192.4,
    }
    assert two == one | {"trainable_parameters": 7, "peak_bytes": 5}


def test_only_keys_that_differ_and_mean_something_are_shown(build_run: Build) -> None:
    first = recipe(output_dir="runs/a", learning_rate=1e-3)
    second = recipe(output_dir="runs/b", learning_rate=3e-3) | {"adapter": {"rank": 64}, "deepspeed": "zero2"}
    found = compared([build_run(name="a", recipe=first), build_run(name="b", recipe=second)])
    assert found.differing == {
        "training.learning_rate": [1e-3, 3e-3],
        "adapter.rank": [256, 64],
        "deepspeed": [None, "zero2"],
    }
    html = unescape(runs_page(found))
    for text in ("training.learning_rate", "0.003", "adapter.rank", "zero2"):
        assert text in html
    assert "output_dir" not in html and "weight_decay" not in html


def test_a_run_from_before_a_key_ran_with_its_default(build_run: Build) -> None:
    runs = [build_run(name="old"), build_run(name="new")]
    file = runs[0] / "recipe.yaml"
    tree = yaml.safe_load(file.read_text())
    del tree["adapter"]["b_groups"], tree["adapter"]["input_scale"]
    file.write_text(yaml.safe_dump(tree))
    assert compared(runs).differing == {}


def test_four_charts_by_steps_and_by_tokens(build_run: Build) -> None:
    double = [{**row, "input_tokens": 2 * row["input_tokens"]} for row in train_rows()]
    html = runs_page(compared([build_run(name="slow"), build_run(name="fast", train=double)]))
    charts = re.findall(r'data-sync="(\w+)"[^>]*data-tips="([^"]*)"', html)
    assert [sync for sync, _ in charts] == ["steps", "steps", "tokens", "tokens"]
    steps, _, tokens, _ = (json.loads(unescape(tips)) for _, tips in charts)
    assert steps["step"] == [0, 20, 40, 60, 80, 96]
    # at each evaluation one of them has seen twice as many tokens as the other
    wanted = {3200 * step for step in steps["step"]} | {6400 * step for step in steps["step"]}
    assert set(tokens["step"]) == wanted
    assert html.count("c1") and html.count("c2") and "http" not in html.replace("http-equiv", "")
    assert "default-src 'none'" in html


def test_what_is_missing_is_named_and_the_rest_is_shown(build_run: Build) -> None:
    """A killed run, one without held-out rows, one without a recipe, one whose log is cut off: each beside a good one."""
    good = build_run(name="good")
    killed = build_run(name="killed", info=None, train=train_rows(30), evals=None, tail='{"kind": "tr')
    bare = build_run(name="bare", info={"status": "failed"}, train=None, evals=None, recipe=None)
    found = compared([good, killed, bare])
    said = "\n".join(found.gaps)
    assert "killed: has not finished" in said and "bare: its status is failed" in said
    assert "killed: The last line of metrics.jsonl is cut off" in said
    assert "killed: has no held-out loss" in said and "good:" not in said
    assert "bare: There is no recipe.yaml" in said and "bare: There is no metrics.jsonl" in said
    assert found.facts[1]["steps"] == 30 and found.facts[1]["peak_bytes"] == max(
        r["peak_bytes"] for r in train_rows(30)
    )
    assert set(found.facts[2].values()) == {None}
    html = unescape(runs_page(found))
    assert all(gap in html for gap in found.gaps) and "–" in html


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model__path": "other/model"},
            "not on the same base model (one: HuggingFaceTB/SmolLM2-135M-Instruct in nf4; two: other",
        ),
        ({"model__quantization": "none"}, "not on the same base model"),
        (
            {"result__eval_after": {"loss": 0.1, "rows": 41}},
            "not scored on the same held-out rows (one: 40 rows; two: 41 rows)",
        ),
        (
            {"result__eval_after": {"loss": 0.1, "rows": 40, "trained_tokens": 9}},
            None,  # of one of them it is not known
        ),
        ({"device": "cuda: H100"}, "ran on different machines"),
        ({"processes": {"count": 4}, "device": "cpu: AMD EPYC 9R14, 2 threads"}, None),
    ],
)
def test_what_cannot_be_compared_is_said(build_run: Build, change: dict[str, Any], sentence: str | None) -> None:
    gaps = compared([build_run(name="one"), build_run(name="two", info=info(**change))]).gaps
    assert len(gaps) == (sentence is not None)
    assert sentence is None or sentence in gaps[0]


def test_runs_of_the_same_name_are_told_apart(build_run: Build, tmp_path: Path) -> None:
    places = []
    for parent in ("first", "second"):
        (tmp_path / parent).mkdir()
        places.append(build_run(name=f"{parent}/quickstart"))
    assert compared(places).labels == ["first/quickstart", "second/quickstart"]
    with pytest.raises(InputError, match="is named twice"):
        compared([places[0], places[1] / ".." / "quickstart"] + places[1:])
    with pytest.raises(InputError, match=f"at most {COLOURS} runs, got 9"):
        compared(places * 4 + places[:1])


def test_the_command(build_run: Build, tmp_path: Path, capsys: Any) -> None:
    places = [
        build_run(name="one"),
        build_run(name="two", recipe=recipe(learning_rate=1e-3), evals=eval_rows({5: 9.0})),
    ]
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, places), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    for text in (
        "one",
        "two",
        "0.0712",
        "838 kB",
        "209 k",
        "1.18 GB",
        "training.learning_rate: 0.008 (one); 0.001 (two)",
    ):
        assert text in said
    assert "one · two" in page.read_text()
    assert main(["compare", *map(str, places), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in document["runs"]] == ["one", "two"]
    assert document["differing"] == {"training.learning_rate": [8e-3, 1e-3]}
