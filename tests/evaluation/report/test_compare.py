"""`qvera compare`: several runs' figures, curves and differing keys, and what of them can't be compared."""

from __future__ import annotations

import functools
import json
import os
import platform
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
        functools.reduce(dict.__getitem__, path, tree)[last] = value
    return tree


def test_every_figure_is_the_runs_own(build_run: Build) -> None:
    cheap = info(adapter__trainable_parameters=7, result__peak_bytes=5)
    found = compare_runs([build_run(name="one"), build_run(name="two", info=cheap)])
    assert list(found.runs) == ["one", "two"]
    assert found.gaps == []
    assert found.differing == {}
    one, two = found.figures.values()
    seconds = statistics.median(row["step_seconds"] for row in train_rows())
    losses = {"loss_before": 2.412, "loss_after": 0.0712, "loss_lowest": 0.0712, "lowest_step": 80}
    of_other_tasks = dict.fromkeys(("reward", "accuracy", "f1", "matthews", "pearson", "spearman"))
    sizes = {"trainable_parameters": 209_280, "adapter_bytes": 838_112, "peak_bytes": 1_182_000_000}
    work = {"seconds_a_step": seconds, "steps": 96, "tokens": 96 * 3200, "seconds": 192.4}
    assert one == {**losses, **of_other_tasks, "perplexity": 1.0738, "exact_match": 0.875, **sizes, **work}
    assert two == one | {"trainable_parameters": 7, "peak_bytes": 5}


def test_only_keys_that_differ_and_mean_something_are_shown(build_run: Build) -> None:
    first = recipe(output_dir="runs/a", learning_rate=1e-3)
    second = recipe(output_dir="runs/b", learning_rate=3e-3) | {"adapter": {"rank": 64}, "deepspeed": "zero2"}
    places = [build_run(name="a", recipe=first), build_run(name="b", recipe=second)]
    # a run from before a key ran with its default
    tree = yaml.safe_load((places[0] / "recipe.yaml").read_text())
    del tree["adapter"]["b_groups"], tree["adapter"]["input_scale"]
    (places[0] / "recipe.yaml").write_text(yaml.safe_dump(tree))
    found = compare_runs(places)
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


def test_what_is_missing_is_named_and_the_rest_is_shown(build_run: Build) -> None:
    """A killed run, one without held-out rows, one without a recipe, one whose log is cut off: each beside a good one."""
    good = build_run(name="good")
    killed = build_run(name="killed", info=None, train=train_rows(30), evals=None, tail='{"kind": "tr')
    bare = build_run(name="bare", info={"status": "failed"}, train=None, evals=None, recipe=None)
    found = compare_runs([good, killed, bare])
    output = "\n".join(found.gaps)
    for gap in ("has not finished", "The last line of metrics.jsonl is cut off", "has no held-out loss"):
        assert f"killed: {gap}" in output
    for gap in ("its status is failed", "recipe.yaml: can't be read (No such", "metrics.jsonl: can't be read (No such"):
        assert f"bare: {gap}" in output
    assert "good:" not in output
    assert found.figures["killed"]["steps"] == 30
    assert found.figures["killed"]["peak_bytes"] == max(r["peak_bytes"] for r in train_rows(30))
    assert set(found.figures["bare"].values()) == {None}
    html = unescape(compare_page(found))
    assert all(gap in html for gap in found.gaps)
    assert "–" in html


BASES = "not on the same base model"
TWO_BASES = f"{BASES} (one: HuggingFaceTB/SmolLM2-135M-Instruct in nf4; two: other"
ROWS = "not scored on the same held-out rows (one: 40 rows; two: 41 rows)"
INCOMPARABLE: list[tuple[dict[str, Any], str | None]] = [
    ({"model__path": "other/model"}, TWO_BASES),
    ({"model__quantization": "none"}, BASES),
    ({"result__eval_after": {"loss": 0.1, "rows": 41}}, ROWS),
    ({"result__eval_after": {"loss": 0.1, "rows": 40, "trained_tokens": 9}}, None),  # of one of them it is not known
    ({"device": "cuda: H100"}, "ran on different machines"),
    ({"processes": {}, "device": "cpu: AMD EPYC 9R14, 2 threads"}, None),
    ({"processes": {"count": 10}}, "numbers of processes (one: 1; two: 10)"),
]


@pytest.mark.parametrize(("change", "sentence"), INCOMPARABLE)
def test_what_cannot_be_compared_is_reported(build_run: Build, change: dict[str, Any], sentence: str | None) -> None:
    one, two = info(processes={"count": 1}), info(**{"processes": {"count": 1}, **change})
    gaps = compare_runs([build_run(name="one", info=one), build_run(name="two", info=two)]).gaps
    assert len(gaps) == (sentence is not None)
    assert sentence is None or sentence in gaps[0]


def test_a_killed_run_is_not_called_running_and_runs_of_two_tasks_are_named(build_run: Build) -> None:
    killed = info(status="running", processes={"pid": 2**22 + 1, "host": platform.node()})
    classes = {**RECIPE, "task": "sequence-classification"}
    found = compare_runs([build_run(name="one", info=killed), build_run(name="two", recipe=classes)])
    assert "one: its status is interrupted; its figures are those so far." in found.gaps
    assert found.to_dict()["runs"][0]["status"] == "interrupted"
    tasks = "The runs are of different tasks (one: causal-lm; two: sequence-classification)"
    assert [gap for gap in found.gaps if tasks in gap]


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
    other = build_run(name="two", recipe=recipe(learning_rate=1e-3), evals=eval_rows({5: 9.0}))
    places = [str(build_run(name="one")), str(other)]
    page = tmp_path / "page.html"
    assert main(["compare", *places, "--html", str(page)]) == 0
    output = capsys.readouterr().out
    for text in ("one", "two", "0.0712", "838 kB", "209 k", "1.18 GB"):
        assert text in output
    assert "training.learning_rate: 0.008 (one); 0.001 (two)" in output
    assert "one · two" in page.read_text()
    assert "qvera eval" not in page.read_text().replace("Written by", "") + output  # these were not evaluated
    assert main(["compare", *places, "--json"]) == 0
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
        tree = evaluation()
        for keys, value in changes.items():
            *path, last = keys.split("__")
            node = functools.reduce(dict.__getitem__, path, tree)
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


OTHER_BLEU = {"metrics": [{"name": "bleu", "label": "BLEU", "signature": "{tok}:char"}]}
TWO_BLEUS = "did not measure BLEU in the same way (one: sacrebleu nrefs:var|case:mixed|tok:13a; two: {tok}:char)"
NO_ADAPTER = {"subject": evaluation()["subject"] | {"adapter_sha256": None}}
ANSWERS = evaluation()["answers"]
TWO_INPUTS = "not of the same inputs (one: 2 rows of data/repairs_heldout.jsonl, SHA-256 "
OF_TWO_KINDS: list[tuple[dict[str, Any], str | None]] = [
    ({"subject__inputs_sha256": "00ff"}, TWO_INPUTS),
    ({"subject__data": "a/copy.jsonl"}, None),
    ({"subject__inputs_sha256": None}, None),  # the rows say it
    ({"subject__inputs_sha256": None, "answers": ANSWERS[::-1]}, None),
    ({"subject__inputs_sha256": None, "answers": ANSWERS[:2]}, "not of the same inputs"),
    ({"subject__inputs_sha256": None, "answers": None}, "SHA-256 unknown"),
    (OTHER_BLEU, TWO_BLEUS),
    ({"metrics": [{"name": "bleu", "label": "{0}"}]}, "two: does not say"),
    ({"subject__max_new_tokens": 16}, "(one: 160 tokens; two: 16 tokens)"),
    ({"subject__column": "Export"}, "(one: Adapter; two: Export)"),
    ({"subject__adapter_sha256": "00ff"}, "two: eval.json is of another adapter than the run has now"),
    (NO_ADAPTER, "two: eval.json is of another adapter"),
]


@pytest.mark.parametrize(("changes", "sentence"), OF_TWO_KINDS)
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
    places = [build_scored("one"), build_scored("two", subject__adapter_sha256=None)]

    def gap() -> str:
        (found,) = compare_runs(places).gaps
        return found

    assert compare_runs(places).gaps == []
    os.utime(places[1] / "eval.json", (1, 1))  # without a hash the files' times say it
    assert gap().startswith("two: eval.json is older than the run's adapter")
    places[1] = build_scored("three")
    weights = places[0] / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"more of the same")
    advice = f"Remove it; `qvera eval ... --json {places[0]}/eval.json` writes it anew."
    assert gap().startswith("one: eval.json is of another adapter") and gap().endswith(advice)
    weights.unlink()
    assert gap().startswith("one: eval.json can't be checked against the run's adapter (No such file")


NO_EVALUATION = {
    "{": "eval.json: line 1, column 2 is not JSON",
    "[" * 100_000: "eval.json: can't be read as JSON",
    "[]": "eval.json: holds a list; expected what `qvera eval --json` writes",
    "{}": "eval.json: has no key 'subject'; expected what `qvera eval --json` writes",
    '{"results": {"arc_easy": {}}}': "expected what `qvera eval --json` writes",
    '{"subject": {}, "scores": 3, "metrics": [4, null, {"name": []}]}': "has no scores of answers",
    '{"subject": {}, "scores": {"bleu": 1}, "metrics": null}': "has no scores of answers",
    '{"subject": {}, "scores": {"bleu": NaN}, "metrics": [{"name": "bleu"}]}': "has no scores of answers",
    '{"subject": {"column": "Base"}, "scores": {"bleu": 1}, "metrics": [{"name": "bleu"}]}': "the base alone",
    "": "eval.json: can't be read (Is a directory)",
}


@pytest.mark.parametrize("text", NO_EVALUATION, ids=lambda text: text[:40])
def test_a_file_that_is_no_evaluation_becomes_a_note(build_scored: Build, text: str) -> None:
    places = [build_scored("one"), build_scored("two")]
    file = places[1] / "eval.json"
    file.unlink()
    file.write_text(text) if text else file.mkdir()
    found = compare_runs(places)
    (gap,) = found.gaps
    assert gap.startswith("two: ") and NO_EVALUATION[text] in gap
    assert found.runs["two"].evaluation is None
    assert "82.10" in compare_page(found)


def test_half_an_evaluation_is_shown_as_far_as_it_goes(build_scored: Build, tmp_path: Path, capsys: Any) -> None:
    """Hardly more than a score, and text that no terminal can print."""
    places = [build_scored("one"), build_scored("two")]
    metric = {"name": "bl\ud800", "label": "\udfff", "signature": 5}
    foreign = {"subject": {"adapter_sha256": []}, "scores": {"bl?": 3}, "answers": [1, {"prompt": []}]}
    (places[1] / "eval.json").write_text(json.dumps(foreign | {"metrics": [metric]}))
    assert main(["compare", *map(str, places), "--html", str(tmp_path / "page.html")]) == 0
    output = capsys.readouterr().out
    for text in ("bl?", "two: eval.json is of another adapter", "not of the same inputs"):
        assert text in output
    assert main(["compare", *map(str, places), "--json"]) == 0
