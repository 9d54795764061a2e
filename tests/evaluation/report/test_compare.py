"""`qvera compare`: several runs' figures, curves and differing keys, and what of them can't be compared."""

from __future__ import annotations

import copy
import json
import os
import re
import statistics
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvera.cli.main import main
from qvera.evaluation.report.compare import MAX_RUNS, compare_runs
from qvera.evaluation.report.pages import compare_page
from qvera.utils.errors import InputError
from tests.evaluation.report.conftest import ADAPTER, RECIPE, eval_rows, evaluation, run_info, train_rows
from tests.evaluation.report.pages import Build


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
    found = compare_runs(places)
    assert list(found.runs) == ["one", "two"]
    assert found.gaps == []
    assert found.differing == {}
    one, two = found.figures.values()
    rows = train_rows()
    assert one == {
        "loss_before": 2.412,
        "loss_after": 0.0712,
        "loss_lowest": 0.0712,
        "lowest_step": 80,
        "perplexity": 1.0738,
        **dict.fromkeys(("accuracy", "f1", "matthews", "pearson", "spearman")),  # of a classifier
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
    found = compare_runs([build_run(name="a", recipe=first), build_run(name="b", recipe=second)])
    assert found.differing == {
        "training.learning_rate": [1e-3, 3e-3],
        "adapter.rank": [256, 64],
        "deepspeed": [None, "zero2"],
    }
    html = unescape(compare_page(found))
    for text in ("training.learning_rate", "0.003", "adapter.rank", "zero2"):
        assert text in html
    assert "output_dir" not in html
    assert "weight_decay" not in html


def test_a_run_from_before_a_key_ran_with_its_default(build_run: Build) -> None:
    runs = [build_run(name="old"), build_run(name="new")]
    file = runs[0] / "recipe.yaml"
    tree = yaml.safe_load(file.read_text())
    del tree["adapter"]["b_groups"], tree["adapter"]["input_scale"]
    file.write_text(yaml.safe_dump(tree))
    assert compare_runs(runs).differing == {}


def test_four_charts_by_steps_and_by_tokens(build_run: Build) -> None:
    double = [{**row, "input_tokens": 2 * row["input_tokens"]} for row in train_rows()]
    html = compare_page(compare_runs([build_run(name="slow"), build_run(name="fast", train=double)]))
    charts = re.findall(r'data-sync="(\w+)"[^>]*data-tips="([^"]*)"', html)
    assert [sync for sync, _ in charts] == ["steps", "steps", "tokens", "tokens"]
    steps, _, tokens, _ = (json.loads(unescape(tips)) for _, tips in charts)
    assert steps["x"] == [0, 20, 40, 60, 80, 96]
    # at each evaluation one of them has seen twice as many tokens as the other
    wanted = {3200 * step for step in steps["x"]} | {6400 * step for step in steps["x"]}
    assert set(tokens["x"]) == wanted
    assert html.count("c1")
    assert html.count("c2")
    assert "http" not in html.replace("http-equiv", "")
    assert "default-src 'none'" in html


def test_what_is_missing_is_named_and_the_rest_is_shown(build_run: Build) -> None:
    """A killed run, one without held-out rows, one without a recipe, one whose log is cut off: each beside a good one."""
    good = build_run(name="good")
    killed = build_run(name="killed", info=None, train=train_rows(30), evals=None, tail='{"kind": "tr')
    bare = build_run(name="bare", info={"status": "failed"}, train=None, evals=None, recipe=None)
    found = compare_runs([good, killed, bare])
    output = "\n".join(found.gaps)
    assert "killed: has not finished" in output
    assert "bare: its status is failed" in output
    assert "killed: The last line of metrics.jsonl is cut off" in output
    assert "killed: has no held-out loss" in output
    assert "good:" not in output
    assert "bare: recipe.yaml: can't be read (No such file" in output
    assert "bare: metrics.jsonl: can't be read (No such file" in output
    assert found.figures["killed"]["steps"] == 30
    assert found.figures["killed"]["peak_bytes"] == max(r["peak_bytes"] for r in train_rows(30))
    assert set(found.figures["bare"].values()) == {None}
    html = unescape(compare_page(found))
    assert all(gap in html for gap in found.gaps)
    assert "–" in html


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
def test_what_cannot_be_compared_is_reported(build_run: Build, change: dict[str, Any], sentence: str | None) -> None:
    gaps = compare_runs([build_run(name="one"), build_run(name="two", info=info(**change))]).gaps
    assert len(gaps) == (sentence is not None)
    assert sentence is None or sentence in gaps[0]


def test_runs_of_the_same_name_are_told_apart(build_run: Build, tmp_path: Path) -> None:
    places = []
    for parent in ("first", "second"):
        (tmp_path / parent).mkdir()
        places.append(build_run(name=f"{parent}/quickstart"))
    assert list(compare_runs(places).runs) == ["first/quickstart", "second/quickstart"]
    with pytest.raises(InputError, match="takes two runs or more, got 1"):
        compare_runs(places[:1])
    with pytest.raises(InputError, match="is named twice"):
        compare_runs([places[0], places[1] / ".." / "quickstart"] + places[1:])
    with pytest.raises(InputError, match=f"at most {MAX_RUNS} runs, got 9"):
        compare_runs(places * 4 + places[:1])


def test_the_command(build_run: Build, tmp_path: Path, capsys: Any) -> None:
    places = [
        build_run(name="one"),
        build_run(name="two", recipe=recipe(learning_rate=1e-3), evals=eval_rows({5: 9.0})),
    ]
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, places), "--html", str(page)]) == 0
    output = capsys.readouterr().out
    for text in (
        "one",
        "two",
        "0.0712",
        "838 kB",
        "209 k",
        "1.18 GB",
        "training.learning_rate: 0.008 (one); 0.001 (two)",
    ):
        assert text in output
    assert "one · two" in page.read_text()
    assert main(["compare", *map(str, places), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in document["runs"]] == ["one", "two"]
    assert document["differing"] == {"training.learning_rate": [8e-3, 1e-3]}


@pytest.fixture
def build_scored(build_run: Build) -> Build:
    """Write a run that was evaluated: ``build_scored(name, key__of__eval_json=value)``; a value of None removes the key."""

    def build(name: str, **changes: Any) -> Path:
        place = build_run(name=name)
        (place / "adapter").mkdir()
        (place / "adapter" / "adapter_model.safetensors").write_bytes(ADAPTER)
        tree = copy.deepcopy(evaluation())
        for keys, value in changes.items():
            *path, last = keys.split("__")
            node = tree
            for key in path:
                node = node[key]
            node.pop(last) if value is None else node.update({last: value})
        (place / "eval.json").write_text(json.dumps(tree))
        return place

    return build


def test_what_eval_scored_is_in_table_page_and_json(
    build_run: Build, build_scored: Build, tmp_path: Path, capsys: Any
) -> None:
    ter = {"name": "ter", "label": "TER", "signature": "sacrebleu", "lower_is_better": True}
    two = build_scored(
        "two", metrics=[*evaluation()["metrics"], ter], scores={"scored_rows": 2, "bleu": 7.5, "ter": 31.25}
    )
    places = [build_scored("one"), two, build_run(name="none")]
    found = compare_runs(places)
    assert found.gaps == []
    assert main(["compare", *map(str, places), "--html", str(tmp_path / "page.html")]) == 0
    output = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(output) if "bleu" in line)
    assert [line.split() for line in output[head : head + 4]] == [
        ["run", "scored_rows", "exact_match", "bleu", "ter"],
        ["one", "2", "50", "%", "82.10", "–"],
        ["two", "2", "–", "7.500", "31.25"],
        ["none", "–", "–", "–", "–"],
    ]
    page = unescape((tmp_path / "page.html").read_text())
    table = page[page.index("Scores by qvera eval") : page.index("Cost</h2>")]
    cells = re.findall(r"<t[hd][^>]*>(?:<i[^>]*></i>)?([^<]*)</t[hd]>", table)
    assert cells[:10] == ["Run", "Rows", "Exact match", "BLEU", "TER", "one", "2", "50 %", "82.10", "–"]
    assert main(["compare", *map(str, places), "--json"]) == 0
    one, two_, none = (run["evaluation"] for run in json.loads(capsys.readouterr().out)["runs"])
    assert one["scores"] == {"exact_match": 0.5, "bleu": 82.1}
    assert one["scored_rows"] == 2
    assert two_["signatures"]["ter"] == "sacrebleu"
    assert two_["scores"] == {"bleu": 7.5, "ter": 31.25}
    assert none is None


def test_runs_that_were_not_evaluated_have_no_table_of_it(build_run: Build, capsys: Any) -> None:
    places = [build_run(name="one"), build_run(name="two")]
    assert "qvera eval" not in compare_page(compare_runs(places)).replace("Written by", "")
    assert main(["compare", *map(str, places)]) == 0
    assert "qvera eval" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"subject__inputs_sha256": "00ff"},
            "not of the same inputs (one: 2 rows of data/repairs_heldout.jsonl, SHA-256 ",
        ),
        ({"subject__data": "a/copy.jsonl"}, None),
        ({"subject__inputs_sha256": None}, None),  # the rows say it
        ({"subject__inputs_sha256": None, "answers": evaluation()["answers"][::-1]}, None),
        ({"subject__inputs_sha256": None, "answers": evaluation()["answers"][:2]}, "not of the same inputs"),
        ({"subject__inputs_sha256": None, "answers": None}, "SHA-256 unknown"),
        (
            {"metrics": [{"name": "bleu", "label": "BLEU", "signature": "{tok}:char"}]},
            "did not measure BLEU in the same way (one: sacrebleu nrefs:var|case:mixed|tok:13a; two: {tok}:char)",
        ),
        ({"metrics": [{"name": "bleu", "label": "{0}"}]}, "two: does not say"),
        ({"subject__max_new_tokens": 16}, "(one: 160 tokens; two: 16 tokens)"),
        ({"subject__column": "Export"}, "(one: Adapter; two: Export)"),
        ({"subject__adapter_sha256": "00ff"}, "two: eval.json is of another adapter than the run has now"),
        ({"subject": evaluation()["subject"] | {"adapter_sha256": None}}, "two: eval.json is of another adapter"),
    ],
)
def test_scores_that_are_not_of_one_kind_are_reported(
    build_scored: Build, changes: dict[str, Any], sentence: str | None
) -> None:
    places = [build_scored("one"), build_scored("two", **changes)]
    found = compare_runs(places)
    assert len(found.gaps) == (sentence is not None)
    assert sentence is None or sentence in found.gaps[0]
    assert all(run.evaluation is not None for run in found.runs.values())
    page = unescape(compare_page(found).replace("<code>", "`").replace("</code>", "`"))
    assert all(gap in page for gap in found.gaps)


def test_an_evaluation_from_before_the_run_went_on_is_reported(build_scored: Build) -> None:
    places = [build_scored("one"), build_scored("two")]
    assert compare_runs(places).gaps == []
    weights = places[0] / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"more of the same")
    (gap,) = compare_runs(places).gaps
    assert gap.startswith("one: eval.json is of another adapter")
    assert "run `qvera eval` again" in gap
    weights.unlink()
    (gap,) = compare_runs(places).gaps
    assert gap.startswith("one: eval.json can't be checked against the run's adapter (No such file")


def test_without_a_hash_the_files_times_say_it(build_scored: Build) -> None:
    places = [build_scored("one"), build_scored("two", subject__adapter_sha256=None)]
    assert compare_runs(places).gaps == []
    os.utime(places[1] / "eval.json", (1, 1))
    (gap,) = compare_runs(places).gaps
    assert gap.startswith("two: eval.json is older than the run's adapter")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "eval.json: line 1, column 2 is not JSON"),
        ("[" * 100_000, "eval.json: can't be read as JSON"),
        ("[]", "eval.json: holds a list; expected what `qvera eval --json` writes"),
        ("{}", "eval.json: has no key 'subject'; expected what `qvera eval --json` writes"),
        ('{"results": {"arc_easy": {}}}', "expected what `qvera eval --json` writes"),
        ('{"subject": {}, "scores": 3, "metrics": [4, null, {"name": []}]}', "has no scores of answers"),
        ('{"subject": {}, "scores": {"bleu": 1}, "metrics": null}', "has no scores of answers"),
        ('{"subject": {}, "scores": {"bleu": NaN}, "metrics": [{"name": "bleu"}]}', "has no scores of answers"),
        ('{"subject": {"column": "Base"}, "scores": {"bleu": 1}, "metrics": [{"name": "bleu"}]}', "the base alone"),
        (None, "eval.json: can't be read (Is a directory)"),
    ],
)
def test_a_file_that_is_no_evaluation_becomes_a_note(build_scored: Build, text: str | None, sentence: str) -> None:
    places = [build_scored("one"), build_scored("two")]
    file = places[1] / "eval.json"
    file.unlink()
    file.mkdir() if text is None else file.write_text(text)
    found = compare_runs(places)
    (gap,) = found.gaps
    assert gap.startswith("two: ")
    assert sentence in gap
    assert found.runs["two"].evaluation is None
    assert "82.10" in compare_page(found)


def test_half_an_evaluation_is_shown_as_far_as_it_goes(build_scored: Build, tmp_path: Path, capsys: Any) -> None:
    """Hardly more than a score, and text that no terminal can print."""
    places = [build_scored("one"), build_scored("two")]
    metric = {"name": "bl\ud800", "label": "\udfff", "signature": 5}
    foreign = {
        "subject": {"adapter_sha256": []},
        "scores": {"bl?": 3},
        "metrics": [metric],
        "answers": [1, {"prompt": []}],
    }
    (places[1] / "eval.json").write_text(json.dumps(foreign))
    assert main(["compare", *map(str, places), "--html", str(tmp_path / "page.html")]) == 0
    output = capsys.readouterr().out
    assert "bl?" in output
    assert "two: eval.json is of another adapter" in output
    assert "not of the same inputs" in output
    assert main(["compare", *map(str, places), "--json"]) == 0
