"""The page: what it says, what it survives, and that nothing in it runs or loads."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterator
from itertools import count
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


def info(**changes: Any) -> dict[str, Any]:
    """run.json with keys of its sections changed: ``info(adapter={"rank": 96})``."""
    tree = run_info()
    for section, values in changes.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return tree


def test_what_a_page_says(build_run: Build) -> None:
    numbers = count()

    def text(**made: Any) -> str:
        return page(build_run(name=str(next(numbers)), **made)).text

    odd = {"rank": 96, "b_groups": "two", "input_scale": None}
    said = text(info=info(adapter=odd, data={"split_rows": 3, "split_parts": "many"}))
    assert "VeRA of rank 96 on 210 linear layers" in said and "Rows split 3 Rows dropped" in said
    assert "Rows split" not in text(info=info(data={"split_rows": 0, "split_parts": 0}))
    result = {"steps": 63, "eval_before": {"loss": 2.4, "rows": 40}, "eval_after": None}
    stopped = build_run(run_info() | {"status": "interrupted", "result": result}, train_rows()[:63], [], name="stopped")
    partial = stopped / "checkpoints" / ".partial-step-00000050"  # the run was killed in its first save
    partial.mkdir(parents=True)
    said = page(stopped).text
    assert "Interrupted after step 63. No checkpoint was saved: the same command begins again." in said
    assert "Training loss, first and last step (no held-out score)" in said
    partial.rename(partial.with_name("step-00000050"))
    assert "Interrupted after step 63. The same command goes on from its last checkpoint." in page(stopped).text
    assert "This run failed after step 96. No checkpoint was saved." in text(info=info(status="failed"))
    said = text(info=None, train=train_rows(9), evals=eval_rows({4: 0.6, 8: 0.17}))
    assert "This run has not finished: it was killed or is still going after step 9." in said
    assert "Held-out loss, step 4 to step 8" in said
    for steps in (0, 1, 2, 10, 11):
        said = text(info=None, train=train_rows()[:steps], evals=[])
        assert ("No step has been recorded." in said, "→" in said) == (steps == 0, steps > 1)
    said = text(info=run_info() | {"plan": {"memory": plan(1.0)["memory"]}})
    assert "Planned memory, by moment" in said and "measured peak" not in said


def test_pages_of_long_runs_and_of_many_adapters_stay_small(build_run: Build, many_run: Path) -> None:
    path = write_report(build_run(train=train_rows(5_000), name="long"))
    assert path.stat().st_size < 400_000
    assert "means of 10 steps" in Page(path.read_text()).text
    many = read_many(many_run)
    numbers = (20, 4, 30, 20, 2.5, 0.5, 2.4, 0.6)
    many.entries.extend(AdapterEntry(f"customer {n}", f"customer=20{n}", "done", *numbers) for n in range(2_000))
    assert len(many_page(many).encode()) < 600_000


def test_the_recipe_is_there_word_for_word(build_run: Build) -> None:
    run_dir = build_run()
    text = (run_dir / "recipe.yaml").read_text()
    assert text in "".join(page(run_dir).words)
    section = RECIPE["training"]
    assert changed_settings(yaml.safe_load(text)) == {
        "model.path": RECIPE["model"]["path"],
        **{f"data.{key}": value for key, value in RECIPE["data"].items()},
        **{f"training.{key}": value for key, value in section.items()},
    }
    # settings of a later version count as changed
    later = {"adapter": {"rank": 256, "chain": [1]}, "later": {"key": 1}, "odd": 3}
    assert changed_settings(later) == {"adapter.chain": [1], "later.key": 1, "odd": 3}
    # what is no YAML is shown as it is
    (run_dir / "recipe.yaml").write_text("model: [unclosed")
    shown = page(run_dir).text
    assert "recipe.yaml is not valid YAML: it is shown as it is." in shown
    assert "model: [unclosed" in shown
    assert "Settings that are not the defaults" not in shown


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


def test_lines_of_metrics_that_are_torn_unreadable_or_repeated(build_run: Build) -> None:
    again = json.dumps(train_rows()[49] | {"loss": 123.0})
    tail = f'oops\n[1]\n{{"kind":"train"}}\n{{"kind":"train","step":"x"}}\n{{"kind":"other","step":1}}\n\n{again}\n'
    run_dir = build_run(tail=tail)
    with (run_dir / "metrics.jsonl").open("ab") as stream:
        stream.write('{"kind":"é'.encode()[:-1])  # torn inside a character
    run = read_run(run_dir)
    assert [row["step"] for row in run.train] == list(range(1, 97))
    assert run.train[49]["loss"] == 123.0  # the later line of a step counts
    assert sorted(run.notes) == [
        "The last line of metrics.jsonl is cut off (the run was killed while writing): ignored.",
        "metrics.jsonl: 4 lines can't be read and are left out (line 102, 103, 104, 105).",
    ]


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


def test_a_run_that_evaluates_only_around_training(build_run: Build) -> None:
    info = run_info()
    info["result"]["best_step"] = None
    parsed = page(build_run(info=info, evals=[]))
    assert parsed.count("circle", class_="dot held-out") == 2
    labels = [attributes["aria-label"] or "" for _, attributes in parsed.elements if attributes.get("role") == "img"]
    assert "at step 0 to 0.0712 at step 96" in labels[0]


def test_the_score_after_training_stands_at_its_step(build_run: Build) -> None:
    for load_best, steps in ((False, [0, 40, 80, 96]), (True, [0, 40, 80])):
        recipe = RECIPE | {"training": RECIPE["training"] | {"load_best_model_at_end": load_best}}
        run = read_run(build_run(evals=eval_rows({40: 0.17, 80: 0.07}), recipe=recipe, name=str(load_best)))
        assert [step for step, _ in run.held_out()] == steps


def test_any_one_file_makes_a_page(build_run: Build) -> None:
    files = ["metrics.jsonl", "recipe.yaml", "run.json"]
    for left in files:
        run_dir = build_run(name=f"with-{left}")
        for name in set(files) - {left}:
            (run_dir / name).unlink()
        missing = re.findall(r"(\S+): (?:is missing|can't be read)", page(run_dir).text)
        assert sorted([*missing, left]) == files


def test_a_broken_run_json_is_survived(build_run: Build) -> None:
    run_dir = build_run()
    for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": 3, "adapter": [], "samples": {}}'):
        (run_dir / "run.json").write_bytes(content)
        assert "Held-out loss, step 20 to step 96" in page(run_dir).text


ODD = [None, True, "text", -1, 1e308, 10**400, math.nan, [], {}, [None], {"a": 1}]


def variants(tree: dict[str, Any], odd: Any) -> Iterator[dict[str, Any]]:
    """The tree with one of its values replaced, for each of them."""
    for key, value in tree.items():
        yield tree | {key: odd}
        if isinstance(value, dict):
            yield from (tree | {key: inner} for inner in variants(value, odd))


def test_an_odd_value_anywhere_in_run_json_is_survived(build_run: Build) -> None:
    """One odd value for each key, each of them several times; all for all by hand: ``-m matrix``."""
    run_dir = build_run(train=train_rows(2))
    for number, variant in enumerate(zip(*(variants(run_info(), odd) for odd in ODD), strict=True)):
        (run_dir / "run.json").write_text(json.dumps(variant[number % len(ODD)]))
        Page(run_page(read_run(run_dir)))


@pytest.mark.matrix
def test_every_odd_value_anywhere_in_run_json_is_survived(build_run: Build) -> None:
    run_dir = build_run(train=train_rows(12))
    for odd in ODD:
        for variant in variants(run_info(), odd):
            (run_dir / "run.json").write_text(json.dumps(variant))
            Page(run_page(read_run(run_dir)))


def test_odd_values_in_metrics_are_survived(build_run: Build) -> None:
    for number, odd in enumerate(ODD):
        rows = [row | {key: odd} for row in (train_rows(1) + eval_rows({7: 1.0})) for key in row]
        Page(run_page(read_run(build_run(train=rows, evals=None, name=f"run-{number}"))))


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="not a run directory.*recipe.yaml, metrics.jsonl, run.json"):
        write_report(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt"]


def test_an_older_page_is_replaced_whole_or_kept(build_run: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = build_run()
    (run_dir / "report.html").write_text("old")
    before = set(os.listdir(run_dir))

    def refuse(*_: object) -> None:
        raise OSError(28, "full")

    with monkeypatch.context() as patch, pytest.raises(RunFailed, match=rf"report\.html.*`qvera ui {run_dir}` shows"):
        patch.setattr(os, "replace", refuse)
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "old"
    assert not list(run_dir.glob(".report*"))
    write_report(str(run_dir))
    assert set(os.listdir(run_dir)) == before
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")


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
    bodies = re.findall(r'<pre dir="auto">\n(.*?)</pre>', source, re.S)
    assert info["samples"][0]["before"] in [html.unescape(re.sub(r"<[^>]+>", "", body)) for body in bodies]


def test_a_sample_shows_the_images_that_run_json_has_and_nothing_else(build_run: Build) -> None:
    info, uri = run_info(), "data:image/jpeg;base64,/9j/4AAQ"
    info["samples"][0]["images"], info["samples"][1]["images"] = [uri, '"><script>alert(1)</script>'], 3
    source = write_report(build_run(info)).read_text()
    assert f'<img src="{uri}" alt="image 1">' in source
    assert source.count("<img ") == 2
    assert "<script>alert" not in source


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


def test_lines_of_many_adapters_without_their_own_number_are_left_out(many_run: Path) -> None:
    before = read_many(many_run)
    with open(many_run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "adapter": "chloe", "round": 9, "loss": 1.0}\n{"kind": "round", "step": 99}\n')
    after = read_many(many_run)
    assert after.run.train == before.run.train
    for name, curve in after.curves.items():
        assert [row["loss"] for row in curve.rows("train")][:11] == [
            row["loss"] for row in before.curves[name].rows("train")
        ][:11]
        assert len(curve.rows("train")) == 12


def test_an_adapter_has_its_curve_also_before_the_records_of_all_processes_are_joined(many_run: Path) -> None:
    steps = [{"kind": "train", "adapter": "ben <b>", "round": n, "step": n, "loss": 1.0 / n} for n in (1, 2, 3)]
    lines = [json.dumps(row) + "\n" for row in [*steps, {"kind": "round", "round": 1, "rank": 1, "adapters": 90}]]
    (many_run / "metrics.rank-00001.jsonl").write_text("".join(lines) + '{"kind')
    (many_run / "metrics.rank-00002.jsonl").symlink_to("/dev/zero")
    many = read_many(many_run)
    assert [row["step"] for row in many.curves["ben <b>"].rows("train")] == [1, 2, 3]
    assert [row["adapters"] for row in many.run.train] == [2] * 12
    assert any("last line of metrics.rank-00001.jsonl is cut off" in note for note in many.run.notes)


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
        adapter_entry("\ud800 </table><script>", "good", flags=[3, None, ""]),
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
    (many_run / "report" / "ben.html").write_text("kept")
    write_report(many_run)
    assert (many_run / "report" / "ben.html").read_text() == "kept"
    weights.write_bytes(b"others")
    write_report(many_run)
    assert "kept" not in (many_run / "report" / "ben.html").read_text()


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
    assert list(compare_runs([many_run, plain], ["chloe", "dan"]).runs) == [
        "quickstart: chloe", "quickstart: dan", "plain",
    ]  # fmt: skip
    with pytest.raises(InputError, match="did not train many adapters"):
        compare_runs([plain, build_run(name="bare")], ["chloe"])
