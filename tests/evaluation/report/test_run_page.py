"""The page: what it says, what it survives, and that nothing in it runs or loads."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvera.evaluation.report.read import changed_settings, read_run
from qvera.evaluation.report.run_page import run_page, write_report
from qvera.utils.errors import InputError, RunFailed
from tests.evaluation.report.conftest import RECIPE, eval_rows, plan, run_info, train_rows

Build = Callable[..., Path]

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
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_an_adapter_with_more_vectors_says_so(build_run: Build) -> None:
    info = run_info()
    info["adapter"] |= {"rank": 96, "b_groups": 2, "input_scale": True}
    text = page(build_run(info)).text
    assert "VeRA of rank 96 with 2 b vectors and an input scale per layer on 210 linear layers over" in text
    info["adapter"] |= {"b_groups": "two", "input_scale": None}  # a damaged file is still a page
    assert "VeRA of rank 96 on 210 linear layers" in page(build_run(info, name="damaged")).text


def test_a_finished_run_says_what_run_json_says(build_run: Build) -> None:
    text = page(build_run()).text
    for fact in (
        "qvera run quickstart",
        "finished 24 November 2026, 15:16 UTC",
        "SmolLM2-135M-Instruct",
        "VeRA of rank 256 on 210 linear layers over an NF4 base, trained on repairs.jsonl.",
        "Exact match on 24 held-out rows",
        "2.5 %",
        "87.5 %",
        "Trainable parameters 209 k",
        "209,280. LoRA r=64 on the same layers: 19.5 M, 93 times as many",
        "Adapter file 838 kB",
        "beside a base of 112 MB",
        "Peak memory 1.18 GB",
        "Tokens per second 1,706",
        "Time 3 min 12 s",
        "96 steps, 2 epochs",
        "lowest held-out, step 80",
        "Tokens trained 39.0 k (25.8 %)",
        "Rows dropped 3",
        "Of these also trained on 2",
        "training.learning_rate 0.008",
        "AMD EPYC 9R14, 2 threads",
        "bitsandbytes 0.50.2",
    ):
        assert fact in text, fact
    assert "killed" not in text


def test_split_rows_are_shown_where_there_are_any(build_run: Build) -> None:
    info = run_info()
    info["data"] |= {"split_rows": 3, "split_parts": 1200}
    assert "Rows split 3 into 1,200" in page(build_run(info)).text
    info["data"] |= {"split_rows": 0, "split_parts": 0}
    assert "Rows split" not in page(build_run(info, name="none")).text
    info["data"] |= {"split_rows": 3, "split_parts": "many"}  # a damaged file is still a page
    assert "Rows split 3 Rows dropped" in page(build_run(info, name="damaged")).text


def test_before_and_after_stand_in_a_table(build_run: Build) -> None:
    source = write_report(build_run()).read_text()
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th><td>([^<]+)</td><td>([^<]+)</td></tr>', source)
    assert rows == [
        ("Exact match", "2.5 %", "87.5 %"),
        ("Loss", "2.41", "0.0712"),
        ("Perplexity", "11.2", "1.07"),
    ]


def test_sections_come_in_the_readers_order(build_run: Build) -> None:
    source = write_report(build_run()).read_text()
    assert re.findall(r"<h2>([^<]+)</h2>", source) == [
        "Training",
        "Held-out prompts",
        "Data",
        "Recipe",
        "Model and machine",
    ]
    titles = re.findall(r"<figcaption><h3>([^<]+)</h3>", source)
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory", "Length of rows"]


def test_charts_hold_the_metrics(build_run: Build) -> None:
    parsed = page(build_run())
    tips = [json.loads(attrs["data-tips"] or "") for tag, attrs in parsed.elements if attrs.get("class") == "plot"]
    assert len(tips) == 6
    loss = tips[0]
    assert loss["x"] == list(range(97))
    assert loss["text"][0] == ["step 0", "held-out loss 2.41"]
    assert loss["text"][80][3] == "held-out loss 0.0712"
    assert loss["text"][1][1] == f"training loss {train_rows()[0]['loss']:.2f}"
    assert parsed.count("circle", class_="ring") == 1
    assert parsed.count("circle", class_="dot held-out") == 6


def test_answers_show_where_they_differ(build_run: Build) -> None:
    source = write_report(build_run()).read_text()
    assert "<mark>July</mark>" in source
    assert "<mark>June</mark>" not in source
    text = Page(source).text
    assert '(missing: , "phone": null)' in text
    assert "After · equals the reference" in text
    assert "After · same JSON as the reference" in text
    assert "Before · empty" in text


def test_a_long_prompt_is_folded_and_whole(build_run: Build) -> None:
    info = run_info()
    info["samples"] = [
        {"prompt": "first words " + "x y " * 400 + "last words", "reference": None, "before": "a", "after": "b"}
    ]
    text = page(build_run(info=info)).text
    assert "The whole prompt, 1,622 characters" in text
    assert "first words" in text
    assert text.count("last words") == 2
    assert "Reference" not in text


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


def test_nothing_is_loaded_from_anywhere(build_run: Build) -> None:
    source = write_report(build_run()).read_text()
    parsed = Page(source)
    loads = [
        (tag, name, value)
        for tag, attrs in parsed.elements
        for name, value in attrs.items()
        if name in {"src", "href", "srcset", "xlink:href", "action", "data", "poster"}
    ]
    assert loads == [("link", "href", "data:,")]
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", source)
    (policy,) = [
        attrs["content"] for _, attrs in parsed.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


# --- what a killed, empty or odd run leaves ---------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out_and_reported(build_run: Build) -> None:
    run_dir = build_run(
        info=None, train=train_rows()[:41], evals=eval_rows({20: 0.6, 40: 0.17}), tail='{"kind":"train","st'
    )
    assert [row["step"] for row in read_run(run_dir).train] == list(range(1, 42))
    text = page(run_dir).text
    assert "The last line of metrics.jsonl is cut off" in text
    assert "run.json: is missing" in text
    assert "killed or is still going after step 41" in text
    assert "Held-out loss, step 20 to step 40" in text
    assert "0.600" in text
    assert "0.170" in text
    assert "Peak memory 1.18 GB" in text
    assert "41 steps" in text


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
    """One odd value for each key, each of them several times."""
    run_dir = build_run(train=train_rows(12))
    for number, variant in enumerate(zip(*(variants(run_info(), odd) for odd in ODD), strict=True)):
        survives(run_dir, variant[number % len(ODD)])


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


def test_a_page_has_one_measured_peak(build_run: Build) -> None:
    """Tile, line in the plan's bars and sentence say the same, whatever the file says in two places."""
    text = page(build_run(run_info() | {"plan": plan(1.0e9)})).text
    assert "Peak memory 1.18 GB CPU, and 100 MB of memory-mapped weights" in text
    assert "Predicted peak 1.30 GB, measured 1.28 GB (1.18 GB and 100 MB of memory-mapped weights)" in text
    assert "the plan was off by +1.4 %. Planned for the longest batch." in text
    assert "1.00 GB" not in text
    assert "1.10 GB" not in text


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
