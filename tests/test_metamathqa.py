"""bench/metamathqa: PEFT's answers, rows and sweep, and the whole command on a small model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from bench.common import best_rate, read_lines
from bench.metamathqa import rows, run
from bench.metamathqa.answers import accuracy, is_right, parse_answer, parse_number
from bench.metamathqa.published import PUBLISHED
from qvera.adapters.methods import LinearSpec, check_recipe, method_of, names
from qvera.config.schema import load_recipe
from qvera.config.sections import AdapterSection
from tests.conftest import small_tokenizer

ANSWERS = {
    "It is $4^2 = \\boxed{16}$.The answer is: 16": "16",
    "The answer is: 5. No, wait. The answer is: 7.": "7",
    "The final answer is 12 apples!\nQuestion: and now?": "12 apples",
    "so 3*4=<<3*4=12>>12\n#### 12": "12",
    "The answer is: $50%.": "50",
    "#### 3\nThe answer is: 4": "4",  # MetaMathQA's ways come before GSM8K's
    "The answer is:16": None,
    "twelve": None,
}
NUMBERS = {
    " -65.33 ": -65.33,
    "20/35": 20 / 35,
    "3/0": None,
    "1/2/3": None,
    "1,000": None,
    "nan": None,
    "1e999": math.inf,
}


def test_answers_are_right_as_numbers_or_as_equal_texts() -> None:
    assert {text: parse_answer(text) for text in ANSWERS} == ANSWERS
    assert {text: parse_number(text) for text in NUMBERS} == NUMBERS
    assert is_right("The answer is: 18.0", "#### 18")
    assert is_right("The answer is: x+1", "The answer is: x+1")
    assert not is_right("18", "#### 18")
    assert not is_right("The answer is: 1000", "#### 1,000")  # as with PEFT
    with pytest.raises(ValueError, match="no answer in the solution"):
        is_right("The answer is: 1", "one")
    assert accuracy(["The answer is: 1", "#### 2", "?"], ["#### 1", "#### 2", "#### 3"]) == pytest.approx(200 / 3)


def maths_rows(directory: Path, train: int = 60, test: int = 3) -> list[str]:
    """Own-written rows as MetaMathQA and GSM8K have them, in two files."""
    chooser, files = random.Random(0), [directory / "metamathqa.jsonl", directory / "gsm8k_test.jsonl"]
    found: list[list[dict[str, str]]] = [[], []]
    for number in range(train + test):
        a, b, c = (chooser.randint(2, 9) for _ in range(3))
        query = f"Ida has {a} boxes of {b} pens and finds {c} more. How many pens are there?"
        if number < train:
            found[0].append({"query": query, "response": f"The answer is: {a * b + c}", "type": "own"})
        else:
            found[1].append({"question": query, "answer": f"#### {a * b + c}"})
    for file, part in zip(files, found, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return [str(file) for file in files]


def test_rows_are_the_first_short_ones_in_buckets_by_length(tmp_path: Path) -> None:
    train = [{"query": f"{i}", "response": "a" * (i % 7)} for i in range(400)]
    train[3]["response"] = "a" * 1299  # with the query and a space 1,301 characters
    train[4]["response"] = "a" * 1298
    data = rows.prepare(tmp_path, train, [{"question": "q", "answer": "#### 1"}], small_tokenizer(), steps=30)
    texts, held = ([row["text"] for row in rows.file_rows(Path(data[key]))] for key in ("path", "eval_path"))
    kept = [row for i, row in enumerate(train) if i != 3]
    wanted = [f"Question: {row['query']} Think step by step.\nAnswer:{row['response']}" for row in kept]
    assert sorted(texts[:80]) == sorted(wanted[:80]) and sorted(texts[80:]) == sorted(wanted[80:120])
    assert held == wanted[120:320]
    lengths = [len(small_tokenizer()(text)["input_ids"]) for text in texts]
    assert lengths[:80] == sorted(lengths[:80], reverse=True) and lengths[80:] == sorted(lengths[80:], reverse=True)
    assert rows.questions(tmp_path) == [("Question: q Think step by step.\nAnswer:", "#### 1")]


def test_the_best_rate_is_one_that_did_not_diverge() -> None:
    losses = {0.1: math.nan, 0.2: 3.0, 0.3: 2.0, 0.4: math.inf, 0.5: None}
    lines = [{"learning_rate": rate, "held_out_loss": loss} for rate, loss in losses.items()]
    assert best_rate(lines, 5) == 0.3
    assert best_rate(lines, 6) is None, "a rate is not tried yet"


def test_every_method_but_bilora_has_a_recipe_that_can_be_written(tmp_path: Path, tiny_model_dir: Path) -> None:
    to = tmp_path / "recipes"
    run.main(
        ["--model", str(tiny_model_dir), "--quantization", "nf4", "none", "--local-rows", *maths_rows(tmp_path),
         "--runs", str(tmp_path / "runs"), "--steps", "10", "--sweep-steps", "2", "--write-recipes", str(to)]
    )  # fmt: skip
    written = {file.stem: load_recipe(file) for file in to.glob("*.yaml")}
    assert len(written) == 2 * len(run.known_methods())
    assert {recipe.adapter.method for recipe in written.values()} == set(names()) - {
        "bilora"
    }  # which is for two levels
    for recipe in written.values():
        check_recipe(recipe)
        assert recipe.adapter.targets == "all-linear" and recipe.training.max_steps == 10
    assert written["vera_r=256-nf4"].adapter.rank == 256 and written["vera_r=256-none"].model.quantization == "none"


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


def test_the_whole_command_trains_with_the_best_rate_of_its_sweep(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rate of the sweep diverges: a line without a loss."""
    monkeypatch.setattr(run, "NEW_TOKENS", 4)
    monkeypatch.setattr(run, "RATES", (1e36, 1.0))
    lines = tmp_path / "lines.jsonl"

    def whole_command() -> list[dict[str, Any]]:
        run.main(
            ["--model", str(tiny_model_dir), "--quantization", "nf4", "--methods", "lora r=1", "--steps", "5",
             "--sweep-steps", "2", "--local-rows", *maths_rows(tmp_path), "--runs", str(tmp_path / "runs"),
             "--out", str(lines)]
        )  # fmt: skip
        return read_lines(lines)

    found = whole_command()
    bad, good, final = found
    assert (bad["held_out_loss"], bad["scores"], bad["learning_rate"]) == (None, None, 1e33)
    assert not bad["final"] and not good["final"] and bad["trained"] == good["trained"]
    assert final["final"] and final["learning_rate"] == good["learning_rate"]
    assert final["held_out_loss"] < good["held_out_loss"], "five steps are better than two"
    (answers,) = (tmp_path / "runs").glob("*/*/answers.jsonl")
    texts = [row["text"] for row in read_lines(answers)]
    assert len(texts) == 3 and all(" Think step by step.\nAnswer:" in text for text in texts)
    shown = capsys.readouterr().out
    assert "| lora r=1 | tiny-llama, nf4 |" in shown and all(one.source in shown for one in PUBLISHED)
    assert "(1 more diverged)" in run.table([final, {**final, "scores": None, "held_out_loss": None, "seed": 1}])
    # nothing is done twice; a line that is lost comes from the finished run
    lines.write_text("".join(json.dumps(line) + "\n" for line in (bad, good)))
    monkeypatch.setattr("qvera.training.loop.AloneLoop.train_step", None)
    (again,) = whole_command()[2:]
    assert {**again, "date": ""} == {**final, "date": "", "cpu_seconds": None}
