"""bench/metamathqa: PEFT's answers, rows and sweep, and the whole command on a small model."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.common import best_rate, read_lines, smollm2
from bench.metamathqa import rows, run
from bench.metamathqa.answers import accuracy, is_right, parse_answer, parse_number
from bench.metamathqa.published import PUBLISHED
from qvera.adapters.methods import LinearSpec, check_recipe, method_of, names
from qvera.config.load import load_recipe
from qvera.config.schema import AdapterSection
from qvera.training.loop import AloneLoop
from tests.conftest import small_tokenizer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is $4^2 = \\boxed{16}$.The answer is: 16", "16"),
        ("The answer is: 5. No, wait. The answer is: 7.", "7"),
        ("The final answer is 12 apples!\nQuestion: and now?", "12 apples"),
        ("so 3*4=<<3*4=12>>12\n#### 12", "12"),
        ("The answer is: $50%.", "50"),
        ("#### 3\nThe answer is: 4", "4"),  # MetaMathQA's ways come before GSM8K's
        ("The answer is:16", None),
        ("twelve", None),
        ("", None),
    ],
)
def test_the_answer_is_what_follows_the_last_opening(text: str, answer: str | None) -> None:
    assert parse_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [("13", 13.0), (" -65.33 ", -65.33), ("20/35", 20 / 35), ("3/0", None), ("0/0", None), ("1/2/3", None),
     ("1,000", None), ("x", None), ("nan", None), ("sNaN", None), ("1e999", math.inf), ("", None)],
)  # fmt: skip
def test_numbers_and_fractions_are_numbers(text: str, number: float | None) -> None:
    assert parse_number(text) == number


def test_answers_are_right_as_numbers_or_as_equal_texts() -> None:
    assert is_right("The answer is: 18.0", "#### 18")
    assert is_right("The answer is: 1/2", "The answer is: 0.5")
    assert is_right("The answer is: x+1", "The answer is: x+1")
    assert not is_right("The answer is: 19", "#### 18")
    assert not is_right("18", "#### 18")
    assert not is_right("The answer is: 1000", "#### 1,000")  # as with PEFT
    with pytest.raises(ValueError, match="no answer in the solution"):
        is_right("The answer is: 1", "one")
    assert accuracy(["The answer is: 1", "#### 2", "?"], ["#### 1", "#### 2", "#### 3"]) == pytest.approx(200 / 3)


def maths_rows(directory: Path, train: int = 60, test: int = 3) -> list[Path]:
    """Own-written rows as MetaMathQA and GSM8K have them, in two files."""
    chooser, files = random.Random(0), [directory / "metamathqa.jsonl", directory / "gsm8k_test.jsonl"]
    found: list[list[dict[str, str]]] = [[], []]
    for number in range(train + test):
        a, b, c = (chooser.randint(2, 9) for _ in range(3))
        query = f"Ida has {a} boxes of {b} pens and finds {c} more. How many pens are there?"
        steps = f"{a} * {b} = {a * b}, and {a * b} + {c} = {a * b + c}. " * chooser.randint(1, 3)
        if number < train:
            found[0].append({"query": query, "response": f"{steps}The answer is: {a * b + c}", "type": "own"})
        else:
            found[1].append({"question": query, "answer": f"{steps}\n#### {a * b + c}"})
    for file, part in zip(files, found, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return files


def test_rows_are_the_first_short_ones_in_buckets_by_length(tmp_path: Path) -> None:
    train = [{"query": f"{i}", "response": "a" * (i % 7)} for i in range(400)]
    train[3]["response"] = "a" * 1299  # with the query and a space 1,301 characters
    train[4]["response"] = "a" * 1298
    data = rows.prepare(tmp_path, train, [{"question": "q", "answer": "#### 1"}], small_tokenizer(), steps=30)
    texts = [row["text"] for row in rows.file_rows(Path(data["path"]))]
    held = [row["text"] for row in rows.file_rows(Path(data["eval_path"]))]
    assert len(texts) == 120 and len(held) == 200
    kept = [row for i, row in enumerate(train) if i != 3]
    wanted = [f"Question: {row['query']} Think step by step.\nAnswer:{row['response']}" for row in kept]
    assert sorted(texts[:80]) == sorted(wanted[:80]) and sorted(texts[80:]) == sorted(wanted[80:120])
    assert held == wanted[120:320]
    lengths = [len(small_tokenizer()(text)["input_ids"]) for text in texts]
    assert lengths[:80] == sorted(lengths[:80], reverse=True) and lengths[80:] == sorted(lengths[80:], reverse=True)
    assert rows.questions(tmp_path) == [("Question: q Think step by step.\nAnswer:", "#### 1")]
    with pytest.raises(ValueError, match="need more than 400 rows; there are 399"):
        rows.prepare(tmp_path, train, [], small_tokenizer(), steps=100)


def settings(tmp_path: Path, **more: Any) -> run.Settings:
    given: dict[str, Any] = {
        "model": "some/base", "quantizations": ("none", "nf4"), "methods": ("vera r=256", "lora r=1"), "steps": 50,
        "sweep_steps": 10, "seeds": (0, 1), "lines": tmp_path / "lines.jsonl", "runs": tmp_path, "local_rows": None,
    }  # fmt: skip
    return run.Settings(**{**given, **more})


def test_a_method_is_trained_with_the_best_rate_of_its_own_sweep(tmp_path: Path) -> None:
    at = settings(tmp_path)

    def write(trial: run.Trial, loss: float) -> None:
        with at.lines.open("a") as file:
            file.write(json.dumps({**vars(trial), "held_out_loss": loss}) + "\n")

    sweep = list(run.plan(at))
    assert len(sweep) == 2 * 2 * 4 and not any(trial.final for trial in sweep)
    first = [trial for trial in sweep if trial.method == "vera r=256" and trial.quantization == "none"]
    assert [trial.learning_rate for trial in first] == run.rates("vera r=256")
    assert first[0].learning_rate < run.METHODS["vera r=256"][1] < first[-1].learning_rate
    for trial, loss in zip(first[:3], (2.0, 1.0, 3.0), strict=True):
        write(trial, loss)
    assert run.best_rate(at, "vera r=256", "none") is None, "a rate is not tried yet"
    write(run.Trial("vera r=256", "another/base", "none", first[3].learning_rate, 10), 0.1)
    assert run.best_rate(at, "vera r=256", "none") is None, "that was another base"
    write(first[3], 4.0)
    finals = [trial for trial in run.plan(at) if trial.final]
    assert [(t.learning_rate, t.steps, t.seed, t.quantization) for t in finals] == [
        (first[1].learning_rate, 50, 0, "none"),
        (first[1].learning_rate, 50, 1, "none"),
    ]


def test_every_method_has_a_recipe_that_is_accepted(tmp_path: Path) -> None:
    compared = {run.METHODS[label][0].get("method", "vera") for label in run.known_methods()}
    assert compared == set(names()) - {"bilora"}  # which is for two levels and small data
    for label in run.known_methods():
        trial = settings(tmp_path).trial(label, "nf4", 1e-3, seed=0)
        recipe = run.recipe_of(trial, {"path": "rows.jsonl", "format": "text"}, tmp_path)
        check_recipe(recipe)
        assert recipe.adapter.targets == "all-linear" and recipe.training.max_steps == 50


@pytest.mark.parametrize(
    ("label", "trained"),
    [("vera r=256", 824_320), ("vera r=1024", 974_848), ("lora-xs r=64", 802_816), ("lora r=1", 1_519_616)],
)
def test_the_numbers_that_a_recipe_trains_on_llama_3b(label: str, trained: int) -> None:
    hidden, inner, keys = 3072, 8192, 1024
    shapes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden),
              (hidden, inner), (hidden, inner), (inner, hidden)]  # fmt: skip
    adapter = AdapterSection(**run.METHODS[label][0])
    tensors = [method_of(adapter).tensors(adapter, LinearSpec("", *shape)) for shape in shapes]
    assert 28 * sum(math.prod(shape) for one in tensors for shape in one.values()) == trained


def whole_command(
    tmp_path: Path, model: Path | str, steps: int = 10, sweep: int = 2, method: str = "lora r=1"
) -> list[dict[str, Any]]:
    """Run the command on own rows: ``sweep`` steps for each rate of the sweep, then ``steps``; returns the lines."""
    train, test = maths_rows(tmp_path)
    out = tmp_path / "lines.jsonl"
    run.main(
        ["--model", str(model), "--quantization", "nf4", "--methods", method, "--steps", str(steps), "--sweep-steps",
         str(sweep), "--local-rows", str(train), str(test), "--runs", str(tmp_path / "runs"), "--out", str(out)]
    )  # fmt: skip
    return read_lines(out)


def test_the_whole_command_on_a_tiny_model(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "NEW_TOKENS", 4)
    monkeypatch.setattr(run, "RATES", (0.5, 1.0))
    found = whole_command(tmp_path, tiny_model_dir)
    *sweep, final = found
    assert [line["learning_rate"] for line in sweep] == run.rates("lora r=1")
    assert not any(line["final"] or line["scores"] for line in sweep)
    best = min(sweep, key=lambda line: line["held_out_loss"])
    assert final["final"] and final["learning_rate"] == best["learning_rate"]
    assert final["held_out_loss"] < best["held_out_loss"], "ten steps are better than two"
    assert final["versions"]["torch"] and final["device"] and final["command"] and final["peak_bytes"] > 0
    (answers,) = (tmp_path / "runs").glob("*/*/answers.jsonl")
    texts = [row["text"] for row in read_lines(answers)]
    assert len(texts) == 3 and all(text.startswith("Question: Ida has") for text in texts)
    assert all(" Think step by step.\nAnswer:" in text for text in texts)
    shown = capsys.readouterr().out
    assert "| lora r=1 | tiny-llama, nf4 |" in shown
    assert all(one.source in shown for one in PUBLISHED)
    # nothing is done twice; a line that is lost comes from the finished run
    assert whole_command(tmp_path, tiny_model_dir) == found
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(line) + "\n" for line in sweep))
    monkeypatch.setattr("qvera.training.loop.AloneLoop.train_step", None)
    (again,) = whole_command(tmp_path, tiny_model_dir)[2:]
    assert {**again, "date": ""} == {**final, "date": "", "cpu_seconds": None}


def test_the_recipes_are_written_for_training_by_hand(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows_files = [str(file) for file in maths_rows(tmp_path)]
    to = tmp_path / "recipes"
    run.main(
        ["--model", str(tiny_model_dir), "--quantization", "nf4", "none", "--local-rows", *rows_files, "--runs",
         str(tmp_path / "runs"), "--steps", "10", "--sweep-steps", "2", "--write-recipes", str(to)]
    )  # fmt: skip
    written = {file.stem: load_recipe(file) for file in to.glob("*.yaml")}
    assert len(written) == 2 * len(run.known_methods())
    for recipe in written.values():
        check_recipe(recipe)
        assert recipe.training.max_steps == 10 and Path(str(recipe.data.path)).is_file()
    assert written["vera_r=256-nf4"].adapter.rank == 256 and written["vera_r=256-none"].model.quantization == "none"


def test_another_model_of_the_same_name_is_trained_itself(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "NEW_TOKENS", 1)
    monkeypatch.setattr(run, "RATES", (1.0,))
    other = shutil.copytree(tiny_model_dir, tmp_path / "other" / tiny_model_dir.name)
    steps: list[str] = []
    real = AloneLoop.train_step
    monkeypatch.setattr(AloneLoop, "train_step", lambda it: (steps.append(it.recipe.model.path), real(it))[1])
    for model in (tiny_model_dir, other):
        whole_command(tmp_path, model, steps=2, sweep=1)
    assert steps == [str(tiny_model_dir)] * 3 + [str(other)] * 3
    assert len(list((tmp_path / "runs").glob("*/rows-2/train.jsonl"))) == 2


def test_a_rate_that_diverges_is_a_line_without_a_loss_and_the_sweep_goes_on(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "NEW_TOKENS", 1)
    monkeypatch.setattr(run, "RATES", (1e36, 1.0))
    bad, good, final = whole_command(tmp_path, tiny_model_dir, steps=3)
    assert (bad["held_out_loss"], bad["scores"], bad["learning_rate"]) == (None, None, 1e33)
    assert bad["trained"] == good["trained"]
    assert final["learning_rate"] == good["learning_rate"]
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", (tmp_path / "lines.jsonl").read_text()))
    final_line = {**final, "scores": None, "held_out_loss": None, "seed": 1}
    assert "(1 more diverged)" in run.table([final, final_line])
    assert "| diverged |" in run.table([final_line])


def test_the_best_rate_is_one_that_did_not_diverge() -> None:
    losses = {0.1: math.nan, 0.2: 3.0, 0.3: 2.0, 0.4: math.inf, 0.5: None}
    lines = [{"learning_rate": rate, "held_out_loss": loss} for rate, loss in losses.items()]
    assert best_rate(lines, 5) == 0.3
    assert best_rate(lines, 6) is None
    assert best_rate([lines[0], *lines[3:]], 3) is None


@pytest.mark.matrix
def test_the_whole_command_on_smollm2(tmp_path: Path) -> None:
    *sweep, final = whole_command(tmp_path, smollm2(), method="vera r=256")
    assert len(sweep) == 4
    assert final["held_out_loss"] < min(line["held_out_loss"] for line in sweep)
    assert 0 <= final["scores"]["gsm8k"] <= 100
