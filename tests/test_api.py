"""`import qvera`: a recipe in Python, a callback a step, and what `load` gives."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from rich.console import Console

import qvera
from qvera.cli.main import main
from tests.many_adapters import write_run

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def small(tiny_model_dir: Path, tiny_rows: Path) -> dict[str, Any]:
    """The sections of a short recipe."""
    return {
        "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
        "data": {"path": str(tiny_rows), "max_length": 64, "eval_fraction": 0.1},
        "adapter": {"rank": 8},
        "training": {"max_steps": 4, "global_batch_size": 4, "learning_rate": 2e-2, "sample_count": 0, "report_to": []},
    }


def test_a_recipe_is_as_short_as_in_yaml_and_checked_the_same_way() -> None:
    short = qvera.Recipe(model="some/model", data="rows.jsonl", training={"max_steps": 4})
    assert (short.model.path, short.data.path, short.training.max_steps) == ("some/model", "rows.jsonl", 4)
    assert qvera.Recipe(model=Path("some/model"), data=Path("rows.jsonl"), training={"max_steps": 4}) == short
    assert short.replace(data={"path": Path("rows.jsonl")}) == short
    assert qvera.Recipe(model={"path": Path("some/model")}, data="rows.jsonl", training={"max_steps": 4}) == short
    with pytest.raises(qvera.InputError, match=r"data: .* Write rows in memory into a \.jsonl file, and name that\."):
        qvera.Recipe(model="m", data=[{"text": "x"}])
    config: Any = LoraConfig(r=8)
    with pytest.raises(qvera.InputError, match=r"^adapter: .* got an object of the type LoraConfig\.$"):
        qvera.Recipe(model="m", data="rows.jsonl", adapter=config)
    with pytest.raises(
        qvera.InputError, match=r"^training\.max_steps: unknown key\. Write `max_steps` under `training`"
    ):
        short.replace(**{"training.max_steps": 3})
    with pytest.raises(qvera.InputError, match=r"Recipe: takes keys by name; .* write Recipe\(\*\*mapping\)\."):
        qvera.Recipe({"model": "m"})  # type: ignore[call-arg, misc]  # wrong on purpose
    labelled = qvera.Recipe(model="m", data="rows.csv", task="sequence-classification")
    assert labelled.data.format == "classification"
    assert labelled.replace(training={"max_steps": 3}).data.format == "classification"
    with pytest.raises(qvera.InputError, match=r"training\.max_step: unknown key\. Did you mean `max_steps`\?"):
        qvera.Recipe(model="m", data="rows.jsonl", training={"max_step": 4})


def test_the_callback_gets_each_record_and_false_stops_the_run_for_a_resume(
    small: dict[str, Any], tmp_path: Path
) -> None:
    """The resumed run ends as one that was never stopped."""
    records: list[dict[str, Any]] = []
    small = {**small, "training": {**small["training"], "eval_steps": 2}}
    whole = qvera.train(small, tmp_path / "whole", callbacks=[records.append])
    assert whole is not None
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == [record["kind"] for record in records]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]

    def stop(record: dict[str, Any]) -> bool:
        return record["step"] < 3

    with pytest.raises(qvera.Interrupted, match="Stopped by stop after step 3 of 4, and saved"):
        qvera.train(small, tmp_path / "stopped", callbacks=[stop])
    assert json.loads((tmp_path / "stopped" / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    resumed = qvera.train(small, tmp_path / "stopped", resume=True)
    assert resumed is not None
    with pytest.raises(qvera.InputError, match=r"already holds a run\. Add resume=True to go on with it"):
        qvera.train(small, tmp_path / "stopped")
    changed = {**small, "adapter": {**small["adapter"], "rank": 2}}
    with pytest.raises(qvera.InputError, match=r"by `qvera train \S+ --resume`, or"):  # a command is one
        qvera.train(changed, tmp_path / "stopped", resume=True)
    assert resumed.run["result"]["eval_after"]["loss"] == whole.run["result"]["eval_after"]["loss"]


@pytest.mark.parametrize("error", [StopIteration, ZeroDivisionError])
@pytest.mark.parametrize("last", [1, 2])
def test_an_error_of_the_callback_leaves_a_run_that_is_whole(
    small: dict[str, Any], tmp_path: Path, error: type[Exception], last: int
) -> None:
    """The step is saved; after the last one the run is done."""

    def fail(record: dict[str, Any]) -> None:
        if record["step"] == last:
            raise error

    small = {**small, "training": {**small["training"], "max_steps": 2}}
    if last == 2 and error is StopIteration:  # nothing is left to stop
        assert qvera.train(small, tmp_path, callbacks=[fail]) is not None
    else:
        with pytest.raises(qvera.Interrupted if error is StopIteration else error):
            qvera.train(small, tmp_path, callbacks=[fail])
    assert json.loads((tmp_path / "run.json").read_text())["status"] == ("done" if last == 2 else "interrupted")
    if last == 1 and error is StopIteration:
        assert qvera.train(small, tmp_path, resume=True) is not None


def test_load_answers_scores_and_exports_as_the_commands_do(
    trained_run: Path,
    tiny_rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = qvera.load(trained_run)
    assert run._opened is None  # nothing big is read before it is needed
    assert main(["eval", str(trained_run), "--json", str(tmp_path / "eval.json")]) == 0
    found, written = run.evaluate(), json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert found["scores"]["loss"] == written["scores"]["loss"]
    assert [row["answer"] for row in found["answers"]] == [row["answer"] for row in written["answers"]]
    opened = run.opened
    capsys.readouterr()
    assert main(["generate", str(trained_run), "--prompt", "say red 1", "--max-new-tokens", "6"]) == 0
    (answer,) = run.generate("say red 1", max_new_tokens=6)
    assert len(run.generate("say red 1", temperature=2, max_new_tokens=2)) == 1  # transformers takes no whole number
    assert capsys.readouterr().out.strip() == answer.strip()
    assert run.generate([[{"role": "user", "content": "say red 1"}]], max_new_tokens=6) == [answer]
    with pytest.raises(qvera.InputError, match="prompt 2: expected a text or a list of messages, got 3"):
        run.generate(["say red 1", 3])  # type: ignore[list-item]
    row: Any = {"prompt": "say red 1"}
    with pytest.raises(qvera.InputError, match=r"got \{'prompt': 'say red 1'\}\. Give the text itself\."):
        run.generate([row])
    with pytest.raises(
        qvera.InputError, match=r"^prompt 2: the prompt has [\d,]+ tokens, and the model's context 256, "
    ):
        run.generate(["say red 1", "say red 1 " * 300])
    with pytest.raises(qvera.InputError, match=r"^prompt 1: expected .* Put the messages .* into a list: \[\[...\]\]."):
        run.generate([{"role": "user", "content": "say red 1"}])  # type: ignore[list-item]  # wrong on purpose
    with pytest.raises(qvera.InputError, match=r"^rows: expected .* got 'prompt'. .* df.to_dict\('records'\)"):
        run.evaluate(["prompt", "completion"])  # type: ignore[list-item]  # as a DataFrame, which gives the names of its columns
    with pytest.raises(
        qvera.InputError, match=r"^rows: can't be written as lines of JSON \('utf-8' codec .* surrogates"
    ):
        run.evaluate([{"prompt": "say red 1", "completion": "\ud800"}])
    (tmp_path / "prompts.txt").write_text("say red 1\n", encoding="utf-8")
    with pytest.raises(qvera.InputError, match=r"^prompt 1: '.*prompts.txt' names a file here\. `qvera generate RUN"):
        run.generate(f"{tmp_path}/prompts.txt")
    with pytest.raises(qvera.InputError, match=f"^{tmp_path}/nothing: no such directory"):
        qvera.load("~/nothing")
    with pytest.raises(qvera.InputError, match="^~no-such-user/runs: no such directory"):
        qvera.load("~no-such-user/runs")  # no such user
    with pytest.raises(qvera.InputError, match="^rows:1: "):
        run.evaluate([{"question": "say red 1"}])
    rows = [{"prompt": "say red 1", "completion": "red red"}, {"prompt": "say blue 2", "completion": "blue blue"}]
    scored = run.evaluate(rows, with_base=True, max_new_tokens=4)
    assert scored["scores"]["rows"] == 2
    assert scored["base_scores"]["loss"] != scored["scores"]["loss"]
    assert scored["subject"]["data"] == "the given rows"
    assert [row["source"] for row in scored["answers"]] == ["rows:1", "rows:2"]  # and no file of ours
    assert run.opened is opened  # loaded once
    with pytest.raises(qvera.InputError, match="'anna' is not loaded; .* has one adapter"):
        run.generate("say red 1", adapter="anna")
    with pytest.raises(qvera.InputError, match="None asks for the base alone.* base=True"):
        run.generate(["say red 1"], adapter=[None])
    with pytest.raises(qvera.InputError, match="anna: is for a run that trained many adapters"):
        qvera.load(trained_run, ["anna"])
    with pytest.raises(qvera.InputError, match="^dtype: should be 'float16', 'bfloat16', .*, got torch.float16"):
        run.export(tmp_path / "lora", to="lora", dtype=torch.float16)  # type: ignore[arg-type]  # wrong on purpose
    certificate = run.export("~/lora", to="lora", dtype="float32")
    assert certificate is not None
    assert certificate == json.loads((tmp_path / "lora" / "qvera_export.json").read_text(encoding="utf-8"))
    trained = [json.loads(line) for line in tiny_rows.read_text(encoding="utf-8").splitlines()]
    with (console := Console(width=200)).capture() as shown:
        qvera.evaluate(trained_run, rows, max_new_tokens=1, console=console)
        qvera.evaluate(trained_run, trained, answers=False, console=console)
        merged = qvera.export(trained_run, tmp_path / "merged", compare=False, console=console)
    assert "2 of 2 references are longer" in shown.get()
    assert "the given rows: the run was trained on" in shown.get()
    assert "qvera-rows-" not in shown.get()
    assert merged is not None
    exported = qvera.load(tmp_path / "merged")
    assert exported.evaluate(rows, with_base=True, answers=False)["base_scores"] is not None
    assert len(exported.generate("say red 1", max_new_tokens=2)) == 1  # its weights are read again


def test_a_loaded_model_is_found_from_another_directory(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained_run.parent)
    model = qvera.load(trained_run.name)
    monkeypatch.chdir("/")
    assert len(model.generate("say red 1", max_new_tokens=2)) == 1


def test_calls_from_several_threads_wait_for_one_another(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a web server's endpoints. A call holds what its layers need for answers, and takes it off again."""
    prompts = [[f"say red {i}", "say blue 2"] for i in range(4)]
    one, together = qvera.load(trained_run), qvera.load(trained_run)
    expected = [one.generate(each, max_new_tokens=6) for each in prompts]
    loss = one.evaluate(answers=False)["scores"]["loss"]
    alone, real = threading.Lock(), qvera.api.answering.generate

    def generate(*given: Any, **named: Any) -> list[str]:
        assert alone.acquire(blocking=False), "another call answers now"
        try:
            return real(*given, **named)
        finally:
            alone.release()

    monkeypatch.setattr(qvera.api.answering, "generate", generate)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(together.generate, each, max_new_tokens=6) for each in prompts * 2]
        scored = [pool.submit(together.evaluate, answers=False) for _ in range(2)]
        assert [each.result() for each in answers] == expected * 2
        assert [each.result()["scores"]["loss"] for each in scored] == [loss] * 2


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("train", {"recipe": 5}, "a recipe is a mapping with at least `model` and `data`, got a number (5)"),
        ("train", {"recipe": {}, "run_dir": 5}, "run_dir: should be a valid string, got 5. Or: "),
        (
            "find_lr",
            {"recipe": {}, "steps": 3},
            "steps of a range test: takes a whole number >= 10 (a curve needs points), got 3.",
        ),
        ("load", {"adapter": 5}, "adapter: should be a valid string, got 5."),
        ("generate", {"prompts": 5}, "prompts: expected a text, or a list of texts or of lists of messages, got 5."),
        ("generate", {"prompts": {"role": "user", "content": "x"}}, "prompts: expected a text, or a list"),
        (
            "generate",
            {"prompts": b"x"},
            "prompts: expected a text, or a list of texts or of lists of messages, got b'x'.",
        ),
        ("generate", {"prompts": "x", "max_new_tokens": "8"}, "max_new_tokens: should be a whole number, got '8'."),
        ("generate", {"prompts": "x", "max_new_tokens": 2.5}, "max_new_tokens: should be a whole number, got 2.5."),
        ("generate", {"prompts": "x", "temperature": -1}, "temperature: should be greater than or equal to 0, got -1."),
        ("generate", {"prompts": "x", "temperature": 70}, "temperature: should be less than or equal to 2, got 70."),
        ("evaluate", {"rows": 1}, "rows: expected a file, or a list of mappings such as"),
        ("evaluate", {"max_new_tokens": 0}, "max_new_tokens: should be greater than or equal to 1, got 0."),
        ("evaluate", {"metrics": "bleu"}, "metrics: should be a list, got 'bleu'."),
        ("evaluate", {"metrics": ["blue"]}, "metrics: there is no metric 'blue'; known: exact, bleu"),
        ("export", {"out": "x", "to": "peftt"}, "to: should be 'merged', 'lora', 'peft', 'gguf' or 'gguf-lora', got"),
        ("export", {"out": "x", "quantize": "4bit"}, "quantize: should be 'nf4' or 'fp4', got '4bit'."),
        ("export", {"out": "x", "rank": 2.5, "to": "lora"}, "rank: should be a whole number, got 2.5."),
        ("export", {"out": "x", "rank": 2}, "rank: goes with to=lora and to=gguf-lora only."),
        ("export", {"out": "x", "compare": "no"}, "compare: should be true or false, got 'no'."),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(
    function: str, arguments: dict[str, Any], said: str, trained_run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run = {} if "recipe" in arguments else {"path": trained_run}
    with pytest.raises(qvera.InputError) as caught:
        getattr(qvera, function)(**run, **arguments)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_argument_that_a_function_does_not_take_is_named_with_what_is_near(trained_run: Path) -> None:
    wrong: dict[str, Any] = {"max_steps": 3}
    with pytest.raises(
        TypeError, match=r"^train\(\) takes no 'max_steps'\. A key of the recipe .* Its arguments: recipe, "
    ):
        qvera.train("recipe.yaml", **wrong)
    wrong = {"max_tokens": 3}
    with pytest.raises(
        TypeError, match=r"^generate\(\) takes no 'max_tokens'; did you mean 'max_new_tokens'\? Its .*: prompts, "
    ):
        qvera.generate(trained_run, "hello", **wrong)
    with pytest.raises(AttributeError, match=r"has no attribute 'eval'; did you mean 'evaluate'\?"):
        _ = qvera.eval


def test_each_prompt_may_have_an_adapter_of_its_own(small: dict[str, Any], tmp_path: Path) -> None:
    names = ["anna", "ben", "chloe"]
    tree = {**small, "data": {"path": "customers.csv", "adapter_column": "customer"}, "training": {}}
    run = write_run(tmp_path / "run", qvera.Recipe(**tree), names)
    model = qvera.load(run)
    assert sorted(model.names) == names
    prompts = ["say red 1"] * 4
    answers = model.generate(prompts, adapter=["anna", "ben", None, "anna"], max_new_tokens=6)
    assert answers[0] == answers[3] != answers[1]
    assert answers[:1] == qvera.generate(run, prompts[0], adapter="anna", max_new_tokens=6)
    assert answers[1:3] == qvera.generate(run, prompts[:2], adapter=["ben", None], max_new_tokens=6)
    assert answers[2:3] == qvera.load(run, base=True).generate(prompts[0], max_new_tokens=6)
    for adapter, said in (
        (None, "has 3 adapters; name one"),
        ("ana", "'ana' is not loaded; did you mean 'anna'"),
        (["anna"], "names 1 adapters for 4 prompts"),
    ):
        with pytest.raises(qvera.InputError, match=said):
            model.generate(prompts, adapter=adapter)
    with pytest.raises(qvera.InputError, match="3 adapters are loaded, and this takes one"):
        model.evaluate("rows.jsonl")
    with pytest.raises(qvera.InputError, match="name it in `load`"):
        qvera.load(run, "ben").generate(prompts, adapter="anna")
