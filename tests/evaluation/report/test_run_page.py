"""The page: what it says, what it survives, and that nothing in it runs or loads."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvera.evaluation.report.compare import compare_runs
from qvera.evaluation.report.read import AdapterEntry, changed_settings, read_many, read_run
from qvera.evaluation.report.run_page import many_page, run_page, write_report
from qvera.utils.errors import InputError, RunFailed
from tests.evaluation.report.conftest import (
    RECIPE,
    adapter_entry,
    eval_rows,
    many_info,
    many_rows,
    plan,
    run_info,
    train_rows,
)
from tests.evaluation.report.pages import MANY_RECIPE, Build, Page, page


def test_odd_settings_of_vectors_and_rows_are_left_out(build_run: Build) -> None:
    info = run_info()
    info["adapter"] |= {"rank": 96, "b_groups": "two", "input_scale": None}
    info["data"] |= {"split_rows": 3, "split_parts": "many"}
    text = page(build_run(info)).text
    assert "VeRA of rank 96 on 210 linear layers" in text
    assert "Rows split 3 Rows dropped" in text
    info["data"] |= {"split_rows": 0, "split_parts": 0}
    assert "Rows split" not in page(build_run(info, name="none")).text


def test_the_recipe_is_there_word_for_word(build_run: Build) -> None:
    run_dir = build_run()
    parsed = page(run_dir)
    assert (run_dir / "recipe.yaml").read_text() in "".join(parsed.words)
    changed = changed_settings(yaml.safe_load((run_dir / "recipe.yaml").read_text()))
    assert changed == {
        "model.path": RECIPE["model"]["path"],
        "data.path": "data/repairs.jsonl",
        "data.eval_path": "data/repairs_heldout.jsonl",
        "training.num_train_epochs": 2.0,
        "training.max_steps": 96,
        "training.learning_rate": 8e-3,
        "training.eval_steps": 20,
    }


def test_settings_of_a_later_version_count_as_changed() -> None:
    assert changed_settings({"adapter": {"rank": 256, "chain": [1]}, "later": {"key": 1}, "odd": 3}) == {
        "adapter.chain": [1],
        "later.key": 1,
        "odd": 3,
    }


# --- nothing runs, nothing loads ------------------------------------------------------------------------------------

HOSTILE = (
    "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;b onclick=alert(3) \u202e\x00\ud800"
)


def poison(tree: Any) -> Any:
    """The same tree with every string hostile."""
    if isinstance(tree, dict):
        return {key: poison(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [poison(value) for value in tree]
    return tree + HOSTILE if isinstance(tree, str) else tree


def test_text_from_outside_is_inert(build_run: Build) -> None:
    clean = page(build_run(name="clean"))
    info = poison(run_info())
    info["status"] = "done"
    info["versions"] = {HOSTILE: HOSTILE}
    run_dir = build_run(info=info, name="hostile")
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(poison(RECIPE) | {HOSTILE: {HOSTILE: HOSTILE}}))
    parsed = page(run_dir)
    kinds = {tag for tag, _ in parsed.elements}
    assert kinds <= {tag for tag, _ in clean.elements} | {"mark"}
    assert parsed.count("script") == 1
    handlers = [name for _, attrs in parsed.elements for name in attrs if name.startswith("on")]
    assert handlers == []
    assert parsed.text.count("<script>alert(1)</script>") >= 20
    assert "\x00" not in "".join(parsed.words)


# --- what a killed, empty or odd run leaves ---------------------------------------------------------------------------


def test_a_last_line_torn_inside_a_character(build_run: Build) -> None:
    run_dir = build_run(evals=None)
    with (run_dir / "metrics.jsonl").open("ab") as stream:
        stream.write('{"kind":"é'.encode()[:-1])
    run = read_run(run_dir)
    assert len(run.train) == 96
    assert run.notes == ["The last line of metrics.jsonl is cut off (the run was killed while writing): ignored."]


def test_unreadable_lines_in_the_middle_are_counted(build_run: Build) -> None:
    tail = 'oops\n[1]\n{"kind":"train"}\n{"kind":"train","step":"x"}\n{"kind":"other","step":1}\n\n'
    run = read_run(build_run(tail=tail))
    assert run.notes == ["metrics.jsonl: 4 lines can't be read and are left out (line 102, 103, 104, 105)."]


def test_the_later_line_of_a_step_counts(build_run: Build) -> None:
    again = train_rows()[49] | {"loss": 123.0}
    run = read_run(build_run(tail=json.dumps(again) + "\n"))
    assert [row["step"] for row in run.train] == list(range(1, 97))
    assert run.train[49]["loss"] == 123.0


def test_losses_that_are_no_numbers(build_run: Build) -> None:
    rows = train_rows()
    rows[10]["loss"], rows[11]["loss"], rows[12]["loss"] = math.nan, math.inf, None
    rows[13]["grad_norm"] = math.nan
    source = write_report(build_run(train=rows)).read_text()
    parsed = Page(source)
    assert "not a finite number at step 11 and 2 more" in parsed.text
    for tag, attrs in parsed.elements:
        if tag in {"path", "circle", "line", "text", "rect"}:
            assert not re.search(r"nan|inf", " ".join(str(v) for k, v in attrs.items() if k != "class"), re.IGNORECASE)


@pytest.mark.parametrize("steps", [0, 1, 2, 9, 10, 11])
def test_short_runs(build_run: Build, steps: int) -> None:
    parsed = page(build_run(info=None, train=train_rows()[:steps], evals=[]))
    assert parsed.count("figure") == (5 if steps else 0)
    assert ("No step has been recorded." in parsed.text) == (steps == 0)
    assert ("→" in parsed.text) == (steps > 1)


def test_a_long_run_makes_a_small_page(build_run: Build) -> None:
    path = write_report(build_run(train=train_rows(5_000)))
    assert path.stat().st_size < 400_000
    assert "means of 10 steps" in Page(path.read_text()).text


def test_interrupted_and_failed_runs_say_how_to_go_on(build_run: Build) -> None:
    info = run_info() | {"status": "interrupted"}
    info["result"] = {"steps": 63, "eval_before": {"loss": 2.4, "rows": 40}, "eval_after": None}
    text = page(build_run(info=info, train=train_rows()[:63], evals=[], name="a")).text
    assert "Interrupted after step 63, and saved." in text
    assert "--resume" in text
    assert "Training loss, first and last step (no held-out score)" in text
    text = page(build_run(info=run_info() | {"status": "failed"}, name="b")).text
    assert "This run failed after step 96." in text
    text = page(build_run(info=None, train=train_rows(9), evals=eval_rows({4: 0.6, 8: 0.17}), name="c")).text
    assert "This run has not finished: it was killed or is still going after step 9." in text
    assert "Held-out loss, step 4 to step 8" in text


def test_a_run_that_evaluates_only_around_training(build_run: Build) -> None:
    info = run_info()
    info["result"]["best_step"] = None
    parsed = page(build_run(info=info, evals=[]))
    assert parsed.count("circle", class_="dot held-out") == 2
    assert "at step 0 to 0.0712 at step 96" in next(
        a["aria-label"] or "" for t, a in parsed.elements if a.get("role") == "img"
    )


@pytest.mark.parametrize(("load_best", "steps"), [(False, [0, 40, 80, 96]), (True, [0, 40, 80])])
def test_the_score_after_training_stands_at_its_step(build_run: Build, load_best: bool, steps: list[int]) -> None:
    recipe = RECIPE | {"training": RECIPE["training"] | {"load_best_model_at_end": load_best}}
    run = read_run(build_run(evals=eval_rows({40: 0.17, 80: 0.07}), recipe=recipe))
    assert [step for step, _ in run.held_out()] == steps


@pytest.mark.parametrize("left", ["recipe.yaml", "metrics.jsonl", "run.json"])
def test_any_one_file_makes_a_page(build_run: Build, left: str) -> None:
    run_dir = build_run()
    for name in {"recipe.yaml", "metrics.jsonl", "run.json"} - {left}:
        (run_dir / name).unlink()
    text = page(run_dir).text
    missing = re.findall(r"(\S+): (?:is missing|can't be read)", text)
    assert sorted([*missing, left]) == ["metrics.jsonl", "recipe.yaml", "run.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": 3, "adapter": [], "samples": {}}']
)
def test_a_broken_run_json_is_survived(build_run: Build, content: bytes) -> None:
    run_dir = build_run()
    (run_dir / "run.json").write_bytes(content)
    assert "Held-out loss, step 20 to step 96" in page(run_dir).text


def test_a_broken_recipe_is_shown_as_it_is(build_run: Build) -> None:
    run_dir = build_run()
    (run_dir / "recipe.yaml").write_text("model: [unclosed")
    text = page(run_dir).text
    assert "recipe.yaml is not valid YAML: it is shown as it is." in text
    assert "model: [unclosed" in text
    assert "Settings that are not the defaults" not in text


ODD = [None, True, "text", -1, 1e308, 10**400, math.nan, [], {}, [None], {"a": 1}]


def variants(tree: dict[str, Any], odd: Any) -> Iterator[dict[str, Any]]:
    """The tree with one of its values replaced, for each of them."""
    for key, value in tree.items():
        yield tree | {key: odd}
        if isinstance(value, dict):
            yield from (tree | {key: inner} for inner in variants(value, odd))


def survives(run_dir: Path, info: dict[str, Any]) -> None:
    (run_dir / "run.json").write_text(json.dumps(info))
    Page(run_page(read_run(run_dir)))


def test_an_odd_value_anywhere_in_run_json_is_survived(build_run: Build) -> None:
    """One odd value for every second key, each of them several times; the slow test below has all for all."""
    run_dir = build_run(train=train_rows(2))
    for number, variant in enumerate(zip(*(variants(run_info(), odd) for odd in ODD), strict=True)):
        if number % 2 == 0:
            survives(run_dir, variant[number // 2 % len(ODD)])


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:12])
def test_every_odd_value_anywhere_in_run_json_is_survived(build_run: Build, odd: Any) -> None:
    run_dir = build_run(train=train_rows(12))
    for variant in variants(run_info(), odd):
        survives(run_dir, variant)


def test_odd_values_in_metrics_are_survived(build_run: Build) -> None:
    for number, odd in enumerate(ODD):
        rows = [row | {key: odd} for row in (train_rows(1) + eval_rows({7: 1.0})) for key in row]
        Page(run_page(read_run(build_run(train=rows, evals=None, name=f"run-{number}"))))


def test_a_run_without_a_measured_plan_has_no_line_in_its_bars(build_run: Build) -> None:
    info = run_info() | {"plan": {"memory": plan(1.0)["memory"]}}
    parsed = page(build_run(info))
    assert "Planned memory, by moment" in parsed.text
    assert "measured peak" not in parsed.text


# --- writing ----------------------------------------------------------------------------------------------------------


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="not a run directory.*recipe.yaml, metrics.jsonl, run.json"):
        write_report(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt"]


def test_an_older_page_is_replaced_whole(build_run: Build) -> None:
    run_dir = build_run()
    (run_dir / "report.html").write_text("old")
    before = set(os.listdir(run_dir))
    write_report(str(run_dir))
    assert set(os.listdir(run_dir)) == before
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("failure", [PermissionError(13, "denied"), OSError(28, "full")])
def test_a_write_that_fails_keeps_the_older_page(
    build_run: Build, monkeypatch: pytest.MonkeyPatch, failure: OSError
) -> None:
    run_dir = build_run()
    (run_dir / "report.html").write_text("old")

    def refuse(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunFailed, match=r"report\.html"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "old"
    assert not list(run_dir.glob(".report*"))


def test_the_size_of_the_adapter_is_read_where_run_json_lacks_it(build_run: Build) -> None:
    run_dir = build_run(info=None)
    (run_dir / "adapter").mkdir()
    (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 838_112)
    assert "Adapter file 838 kB" in page(run_dir).text


def test_sample_text_survives_word_for_word(build_run: Build) -> None:
    """Also a newline at its start: browsers drop the first one after ``<pre>``, so the page writes one of its own."""
    info = run_info()
    info["samples"][0]["before"] = "\n" + info["samples"][0]["before"]
    source = write_report(build_run(info)).read_text()
    shown = [
        html.unescape(re.sub(r"<[^>]+>", "", body))
        for body in re.findall(r'<pre dir="auto">\n(.*?)</pre>', source, re.S)
    ]
    assert info["samples"][0]["before"] in shown


# --- many adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def many_run(build_run: Build) -> Path:
    return build_run(many_info(), many_rows(), None, MANY_RECIPE)


def test_every_adapter_that_has_files_has_a_page_to_which_its_name_leads(many_run: Path) -> None:
    links = [attributes["href"] for tag, attributes in page(many_run).elements if tag == "a"]
    # in the notices, then in the table; dan has no page
    assert links[-3:] == ["report/Anna%3D27s%3D20Bakery.html", "report/ben.html", "report/chloe.html"]
    names = ["Anna=27s=20Bakery.html", "ben.html", "chloe.html"]
    assert sorted(path.name for path in (many_run / "report").iterdir()) == names
    lost = Page((many_run / "report" / "chloe.html").read_text(encoding="utf-8")).text
    assert "not finite" in lost and "Stopped: step 3: the loss is NaN." in lost


def test_a_killed_run_has_its_adapters_from_the_metrics(build_run: Build) -> None:
    found = page(build_run(None, many_rows(), None, MANY_RECIPE, tail='{"kind": "tra')).text
    assert "2 adapters trained together" in found
    assert "Anna's Bakery – – – – – unfinished" in found
    assert "The last line of metrics.jsonl is cut off" in found
    assert "still going after step 12" in found


def test_rounds_are_those_of_the_first_process_and_steps_are_read_once(many_run: Path) -> None:
    with open(many_run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "adapter": "chloe", "step": 12, "loss": 0.5}) + "\n")
    many = read_many(many_run)
    assert [row["adapters"] for row in many.run.train] == [2] * 12
    train = many.curves["chloe"].rows("train")
    assert [row["step"] for row in train] == list(range(1, 13))
    assert train[-1]["loss"] == 0.5


def test_a_damaged_run_json_is_still_a_page_and_writes_nowhere_else(build_run: Build, tmp_path: Path) -> None:
    info = many_info()
    info["adapters"] = [
        *("text", None, {"name": ""}, {"name": "up", "directory": "../../up", "rows": "many", "flags": "odd"}),
        {"name": "here", "directory": ".", "eval_after": [1], "status": ["done"]},
        adapter_entry("\ud800 </table><script>", "good", flags=[3, None]),
    ]
    run = build_run(info, many_rows(), None, MANY_RECIPE)
    found = page(run)
    assert "5 adapters trained together" in found.text  # two of them from metrics.jsonl
    assert [path.name for path in (run / "report").iterdir()] == ["good.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart"]
    assert found.count("script") == 1


def test_a_page_of_an_adapter_is_written_again_only_for_new_vectors(many_run: Path) -> None:
    weights = many_run / "adapters" / "ben" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"vectors")
    write_report(many_run)
    pages = {path: path.stat().st_ino for path in (many_run / "report").iterdir()}
    (many_run / "report" / "ben.html").write_text("kept")
    write_report(many_run)
    assert (many_run / "report" / "ben.html").read_text() == "kept"
    weights.write_bytes(b"others")
    write_report(many_run)
    assert "kept" not in (many_run / "report" / "ben.html").read_text()
    assert len(pages) == 3


def test_a_page_of_many_stays_small(many_run: Path) -> None:
    many = read_many(many_run)
    more = [
        AdapterEntry(f"customer {n}", f"customer=20{n}", "done", 20, 4, 30, 20, 2.5, 0.5, 2.4, 0.6)
        for n in range(2_000)
    ]
    many.entries.extend(more)
    assert len(many_page(many).encode()) < 600_000


def test_adapters_are_compared_within_a_run_and_between_runs(many_run: Path, build_run: Build) -> None:
    within = compare_runs([many_run], ["Anna's Bakery", "ben <b>"])
    assert list(within.runs) == ["Anna's Bakery", "ben <b>"]
    assert [figures["loss_after"] for figures in within.figures.values()] == [1.5, 2.6]
    assert within.figures["Anna's Bakery"]["loss_lowest"] == 1.4
    other = build_run(many_info(), many_rows(), None, MANY_RECIPE, name="other")
    assert list(compare_runs([many_run, other], ["chloe"]).runs) == ["quickstart", "other"]
    assert list(compare_runs([many_run, other], ["chloe", "dan"]).runs)[1] == "quickstart: dan"
    with pytest.raises(InputError, match=r"--adapter chlo: .* has no adapter of this name; did you mean 'chloe'\?"):
        compare_runs([many_run, other], ["chlo"])
    plain = build_run(name="plain")
    with pytest.raises(InputError, match="did not train many adapters"):
        compare_runs([many_run, plain], ["chloe"])
