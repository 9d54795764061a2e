"""A classifier learns, and gives the same logits wherever it goes; what its rows and keys may not be is said by name."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import qvera
from qvera.adapters.save_load import named_vectors
from qvera.cli.main import main
from qvera.config.schema import Recipe
from qvera.config.sections import ModelSection
from qvera.data import Datasets, Example, Labels, build_datasets, data_warnings, print_preflight
from qvera.distributed.group import Group
from qvera.evaluation.load import OpenRun, find_target, open_run, open_target
from qvera.evaluation.metrics import class_scores
from qvera.models.structure import causal_model
from qvera.models.tokenizer import load_tokenizer
from qvera.tasks.classification import SequenceClassification, label_scores
from qvera.training.loop import AloneLoop
from qvera.training.plan import make_plan
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.evaluation.judges import serving as judge_server
from tests.tasks.encoders import save_family, word_tokenizer
from tests.tasks.sessions import gradients, loop_of, rows_of

CPU = torch.device("cpu")
NAMES = ["colour", "fruit", "pet"]
FP32 = ["--dtype", "float32"]
METHODS = {"vera": {}, "lora": {"method": "lora", "rank": 4}, "lora-xs": {"method": "lora-xs", "rank": 4}}


@pytest.fixture(scope="module")
def finished(classify: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few epochs. Read it, never change it."""
    run_dir = tmp_path_factory.mktemp("runs") / "classes"
    train(classify(training={"max_steps": 30, "eval_steps": 10, "save_steps": 10}), run_dir)
    return run_dir


def built(recipe: Recipe, **more: Any) -> Datasets:
    return build_datasets(recipe.data, load_tokenizer(recipe.model), **more)


def logits(opened: OpenRun) -> torch.Tensor:
    """Of the held-out rows, in their order, whatever batches their lengths make."""
    task, rows = SequenceClassification(opened.target.recipe), rows_of(opened)
    task.prepare(opened.model, opened.base.tokenizer, rows)
    with torch.no_grad():
        return task.held_out_logits(opened.model, list(rows.eval))


def plain_logits(model: Any, rows: Datasets) -> torch.Tensor:
    """Of transformers alone, each row by itself, without padding."""
    with torch.no_grad():
        found = [model(input_ids=torch.tensor(row.input_ids[None], dtype=torch.int64)).logits for row in rows.eval]
    return torch.cat(found)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_learns_its_labels_and_says_what_it_trained(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    before, after = run["result"]["eval_before"], run["result"]["eval_after"]
    assert after["accuracy"] >= 0.75 > before["accuracy"] + 0.2
    assert after["loss"] < 0.5 * before["loss"]
    assert run["data"]["labels"]["names"] == NAMES
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    head = tensors.pop("base_model.model.score.weight")
    assert head.dtype == torch.float32
    assert run["adapter"]["head_parameters"] == head.numel() == 3 * 64
    assert run["adapter"]["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    assert json.loads((finished / "adapter" / "adapter_config.json").read_text())["labels"] == NAMES
    assert "accuracy" in (finished / "report.html").read_text().lower()


@pytest.mark.parametrize(
    ("family", "method", "smoothing"), [("llama", "lora", 0.1), ("llama", "lora-xs", 0.0), ("bert", "vera", 0.1)]
)
def test_every_gradient_is_that_of_a_dense_model_in_fp64_in_any_number_of_passes(
    classify: Any, tiny_model_dir: Path, tmp_path: Path, family: str, method: str, smoothing: float
) -> None:
    base = tiny_model_dir if family == "llama" else save_family(family, tmp_path / "base")
    training = {"learning_rate": 1e-2, "label_smoothing": smoothing}
    model = {"path": str(base), "quantization": "none"}
    loop = loop_of(classify(adapter=METHODS[method], model=model, training=training), tmp_path)
    loop.model.eval()  # without BERT's dropout
    rows = list(range(7))
    found = gradients(loop, rows)
    loop.model.zero_grad()
    for name, gradient in gradients(loop, rows, passes=3).items():
        torch.testing.assert_close(gradient, found[name], rtol=1e-4, atol=1e-6)
    loop.model.zero_grad()
    reference = loop.model.double()
    inner = causal_model(reference)
    examples = [loop.datasets.train[i] for i in rows]
    targets = torch.from_numpy(loop.datasets.labels.targets(examples))
    alone = [inner(torch.tensor(e.input_ids[None], dtype=torch.int64)).logits for e in examples]
    F.cross_entropy(torch.cat(alone), targets, label_smoothing=smoothing).backward()
    expected = {name: vector.grad for name, vector in named_vectors(reference).items()}
    assert any("score" in name or "classifier" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[name].double(), rtol=2e-4, atol=2e-6, msg=name)


def test_the_head_has_a_rate_of_its_own_and_the_same_schedule(classify: Any, tmp_path: Path) -> None:
    loop = loop_of(classify(training={"head_learning_rate": 5e-3, "warmup_steps": 2}), tmp_path)
    first = loop.optimizer.param_groups[0]["lr"]
    head = next(t for name, t in named_vectors(loop.model).items() if name.endswith("score.weight"))
    own = next(g for g in loop.optimizer.param_groups if any(p is head for p in g["params"]))
    assert own["lr"] == pytest.approx(first / 4)
    assert len(own["params"]) == 1
    assert 0 < first < 2e-2  # the warmup's first step


@pytest.mark.parametrize("kind", ["merged", "lora", "peft", "as it is"])
def test_an_adapter_gives_the_trained_logits_as_it_is_and_exported(
    finished: Path, tiny_model_dir: Path, tmp_path: Path, kind: str
) -> None:
    options = {"merged": [*FP32, "--base", "dequantized"], "lora": FP32, "peft": []}
    out = finished / "adapter" if kind == "as it is" else tmp_path / "out"
    if kind in options:
        assert main(["export", str(finished), str(out), "--to", kind, *options[kind]]) == 0
    if kind == "merged":
        opened = open_run(finished)
        model = AutoModelForSequenceClassification.from_pretrained(out)
        assert model.config.id2label == dict(enumerate(NAMES))
        difference = json.loads((out / "qvera_export.json").read_text())["difference"]
        assert difference["answers_agree"] == difference["rows"] == 12
    else:
        dense = ModelSection(path=str(tiny_model_dir), quantization="none", compute_dtype="float32")
        opened = open_target(dataclasses.replace(find_target(finished), section=dense))
        plain = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=3, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, out).eval()
    rows = rows_of(opened)
    assert len({len(row.input_ids) for row in rows.eval}) > 2
    torch.testing.assert_close(plain_logits(model, rows), logits(opened), rtol=1e-4, atol=1e-5)


def test_another_method_trains_saves_and_merges_its_head(classify: Any, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    train(classify(adapter=METHODS["lora-xs"], training={"learning_rate": 1e-2, "max_steps": 2}), run)
    assert main(["export", str(run), str(out), *FP32, "--base", "dequantized"]) == 0
    opened = open_run(run)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(plain_logits(model, rows_of(opened)), logits(opened), rtol=1e-4, atol=1e-5)


def test_a_classifier_is_exported_in_4_bits_with_its_head(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(finished), str(out), "--quantize", "nf4", *FP32]) == 0
    certificate = json.loads((out / "qvera_export.json").read_text())
    assert all(error < 0.3 for error in certificate["quantized"]["relative_errors"].values())
    stored, trained = map(load_file, (out / "model.safetensors", finished / "adapter" / "adapter_model.safetensors"))
    assert torch.equal(stored["score.weight"], trained["base_model.model.score.weight"])
    assert main(["eval", str(out), "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["loss"] == pytest.approx(certificate["difference"]["loss_exported"], rel=1e-4)


def test_the_f1_of_two_classes_says_whose_it_is(
    classify: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", *[{"text": f"say {i}", "label": ("ok", "damage")[i % 2]} for i in range(20)])
    recipe = classify(data={"path": str(path), "eval_fraction": 0.2}, training={"max_steps": 1})
    qvera.train(recipe, tmp_path / "run")
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "f1 of ok" in capsys.readouterr().out


def test_the_card_says_how_the_classifier_is_used(finished: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")  # without its run: it says what it is
    assert main(["card", str(adapter), "--repo", "anna/topics"]) == 0
    text = (adapter / "README.md").read_text()
    assert "pipeline_tag: text-classification" in text and "qvera eval anna/topics" in text
    assert not any(word in text for word in ("qvera chat", "vllm", "ollama"))
    code = text.partition("```python\n")[2].partition("```")[0]
    base = find_target(finished).section.path
    names: dict[str, Any] = {}
    exec(code.replace(repr(Path(base).name), repr(base)).replace("'anna/topics'", repr(str(adapter))), names)
    stored = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    head = names["model"].get_base_model().score.modules_to_save["default"].weight
    torch.testing.assert_close(head.float(), stored, rtol=1e-2, atol=1e-3)  # plain PEFT has it in the base's bfloat16


def test_eval_writes_a_label_for_each_row(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "new.jsonl", *({"text": text, "label": "colour"} for text in ("say red", "say hen")))
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")  # without its run, on the same rows
    for target in (finished, adapter):
        out = tmp_path / f"{target.name}.jsonl"
        assert main(["eval", str(target), "--data", str(rows), "--predictions", str(out)]) == 0
        one, other = map(json.loads, out.read_text().splitlines())
        assert (one["prediction"], other["prediction"], other["label"]) == ("colour", "pet", "colour")
        assert sum(one["probabilities"].values()) == pytest.approx(1.0)
        assert "accuracy     0.5000" in capsys.readouterr().out


def test_the_base_of_a_classifier_is_not_scored(finished: Path) -> None:
    with pytest.raises(InputError, match=r"^with_base: .* is a classifier, and its base has no head"):
        qvera.load(finished).evaluate(with_base=True)
    with pytest.raises(InputError, match=r"^base: .* is a classifier"):
        qvera.load(finished, base=True).evaluate()
    assert main(["eval", str(finished), "--base"]) == 2


def test_eval_labels_rows_that_have_no_label_and_does_not_score_them(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("text\nsay red\nsay hen\n")
    out = tmp_path / "labels.jsonl"
    options = ["--data", str(tmp_path / "new.csv"), "--predictions", str(out), "--json", str(tmp_path / "scores.json")]
    assert main(["eval", str(finished), *options]) == 0
    one, other = map(json.loads, out.read_text().splitlines())
    assert (one["prediction"], other["prediction"]) == ("colour", "pet") and "label" not in one
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == {"rows": 2}
    said = capsys.readouterr()
    assert "has no labels, so its rows are labelled, and not scored" in " ".join(said.err.split())
    assert "accuracy" not in said.out
    (tmp_path / "new.csv").write_text("text,label\nsay red,\n")  # a cell that was forgotten
    assert main(["eval", str(finished), "--data", str(tmp_path / "new.csv")]) == 2
    assert "Each row needs its label" in capsys.readouterr().err


def test_a_regression_learns_numbers_and_they_are_not_smoothed(classify: Any, tmp_path: Path) -> None:
    rows = [{"sentence": "again " * n, "label": n / 2 + 0.25} for n in range(1, 9)] * 6
    data = {"path": str(write(tmp_path / "rows.jsonl", *rows))}
    train(classify(data=data, training={"max_steps": 25}), tmp_path / "run")
    after = json.loads((tmp_path / "run" / "run.json").read_text())["result"]["eval_after"]
    assert after["pearson"] > 0.8
    assert "accuracy" not in after
    export = ["export", str(tmp_path / "run"), str(tmp_path / "out"), *FP32, "--base", "dequantized", "--no-compare"]
    assert main(export) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)
    for regression in ("auto", True):
        recipe = classify(data={**data, "regression": regression}, training={"label_smoothing": 0.1})
        with pytest.raises(InputError, match=r"training\.label_smoothing: .* the labels are numbers"):
            train(recipe, tmp_path / "smoothed")


def test_a_score_that_the_labels_do_not_have_cannot_choose_the_best_step(classify: Any, tmp_path: Path) -> None:
    for score in ("top5", "pearson"):
        recipe = classify(training={"metric_for_best_model": score, "eval_steps": 1, "max_steps": 2})
        with pytest.raises(
            InputError, match=f"metric_for_best_model: .* 3 classes, .* no {score}.* loss, accuracy, f1"
        ):
            train(recipe, tmp_path / score)
    numbers = write(tmp_path / "numbers.jsonl", *({"text": f"a b {n}", "label": n / 2} for n in range(9)))
    data = {"path": str(numbers), "format": "classification", "regression": True}
    recipe = classify(data=data, training={"metric_for_best_model": "f1", "eval_steps": 1, "max_steps": 2})
    with pytest.raises(InputError, match=r"the labels are numbers, which have no f1. Take one of loss, pearson"):
        train(recipe, tmp_path / "numbers")


def labelled(label: str) -> Example:
    nothing = np.zeros(0, np.int32)
    return Example(np.arange(5, 8, dtype=np.int32), np.arange(3) == 2, "rows:1", nothing, "text", label)


def test_the_scores_of_labels_are_those_of_their_definitions() -> None:
    rows = [labelled("yes"), labelled("yes"), labelled("no"), labelled("no"), labelled("no")]
    found = torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    scores = label_scores(found, rows, Labels(("no", "yes")))
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(0.5)  # of "yes": 1 right, 1 missed, 1 wrong
    assert scores["matthews"] == pytest.approx((1 * 2 - 1 * 1) / (2 * 2 * 3 * 3) ** 0.5)
    numbers, value = [labelled(x) for x in ("1.5", "2", "3")], Labels(("v",), True)
    values = label_scores(torch.tensor([[1.0], [2.0], [9.0]]), numbers, value)
    assert values["spearman"] == pytest.approx(1.0)
    assert values["loss"] == pytest.approx((0.25 + 0 + 36) / 3)
    # of logits that are not finite there are none: scikit-learn refuses them
    spoilt = torch.zeros(3, 10)
    spoilt[1, 4] = torch.nan
    scores = label_scores(spoilt, [labelled(name) for name in "123"], Labels(tuple(map(str, range(10)))))
    assert scores.keys() == {"loss", "rows", "trained_tokens"}
    assert "pearson" not in label_scores(torch.tensor([[1.0], [torch.nan]]), numbers[:2], value)
    assert class_scores(np.zeros(0, int), np.zeros((0, 10))) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn's, where all rows have one label
        assert class_scores(np.zeros(3, int), np.array([[1.0, 0.0]] * 3))["accuracy"] == 1
    # five guesses count where there are ten classes
    guesses, targets = torch.stack([torch.randperm(10) for _ in range(40)]).float(), torch.arange(40) % 10
    expected = (guesses.topk(5).indices == targets[:, None]).any(1).double().mean()
    assert class_scores(targets.numpy(), guesses.numpy())["top5"] == pytest.approx(float(expected))
    assert "top5" not in class_scores((targets % 9).numpy(), guesses[:, :9].numpy())


def test_the_plan_counts_the_head_and_no_vocabulary(classify: Any) -> None:
    plan = make_plan(classify(), CPU)
    language = make_plan(classify(task="causal-lm", data={"format": "text"}), CPU)
    assert plan.shape.head_numbers == 2 * 64
    assert plan.trained_parameters == language.trained_parameters
    assert plan.adapter_bytes > language.adapter_bytes + 4 * 2 * 64
    names = {part.name for part in plan.memory.at("loss")}
    assert "logits of a classifier" in names and "logits of a chunk" not in names


def test_commands_for_text_refuse_a_classifier(
    finished: Path, labelled_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["generate", "--prompt", "x"], ["chat"], ["serve"], ["analyze", "--text", str(labelled_rows)]):
        assert main([command[0], str(finished), *command[1:]]) == 2
        assert "is a classifier" in capsys.readouterr().err
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")  # away from its run it has no rows of its own
    assert main(["chat", str(adapter)]) == 2
    assert f"`qvera eval {adapter} --data ROWS --predictions FILE` writes its labels." in capsys.readouterr().err
    assert main(f"eval {adapter} --data {labelled_rows} --predictions {tmp_path}/labels.jsonl".split()) == 0
    assert main(["analyze", str(adapter), "--top-k", "2"]) == 0
    assert "--text" not in capsys.readouterr().out
    assert main(["eval", str(finished), "--with-base"]) == 2
    assert "no head that was trained" in capsys.readouterr().err
    with judge_server(lambda text: "[[A]]") as server:
        assert main(["eval", str(finished), "--judge", server.url]) == 2
    assert "--judge: is for models that write text" in capsys.readouterr().err


BAD_ROWS = {
    "a missing label": ([{"text": "a", "label": "x"}, {"text": "b"}], r"rows\.jsonl:2: the column 'label' is missing"),
    "an empty label": ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], r"rows\.jsonl:2: label is empty"),
    "a label that is NaN": ([{"text": "a", "label": 1}, {"text": "b", "label": float("nan")}], r":2: label is empty"),
    "an empty text": ([{"text": "a", "label": 1}, {"text": " ", "label": 0}], r":2: the text is empty"),
    "one class": ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], "a classifier needs two labels"),
    "an id as label": ([{"text": "a", "label": f"n{i}"} for i in range(41)], r"41 labels in 41 .* Is the column an id"),
    "no such column": (
        [{"words": "a", "label": 1}],
        r"needs the column text.*YOUR_COLUMN\}\)\.$",
    ),  # no other format is one of labels
}


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=list(BAD_ROWS))
def test_bad_rows_are_named(rows: list[dict[str, Any]], message: str, classify: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(InputError, match=message):
        built(classify(data={"path": str(path), "eval_fraction": 0.0}))


def test_rows_that_are_all_too_long_are_kept_as_the_message_says(classify: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *[{"text": "word " * 99, "label": i % 2} for i in range(4)])
    data = {"path": str(path), "eval_fraction": 0.0, "max_length": 8, "too_long": "drop"}
    with pytest.raises(InputError, match=r"raise data\.max_length \(8\), or cut rows otherwise \(data\.too_long\)\.$"):
        built(classify(data=data))
    assert len(built(classify(data={**data, "too_long": "cut-end"})).train) == 4


def test_one_row_of_each_of_many_labels_may_be_asked_for(classify: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *[{"text": "a", "label": f"n{i % 45}"} for i in range(90)])
    data = {"path": str(path), "eval_fraction": 0.0, "rows_per_label": 1}
    assert len(built(classify(data=data)).train) == 45


def test_labels_that_differ_only_by_case_or_spaces_are_told(classify: Any, tmp_path: Path) -> None:
    labels = ["yes", "Yes", "no", "no ", "maybe"]
    rows = [{"text": f"{i}", "label": label} for i, label in enumerate(labels)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = classify(data={"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.0}).data
    found = "\n".join(data_warnings(build_datasets(section, word_tokenizer()).stats))
    assert "classes of their own: 'Yes' and 'yes', 'no' and 'no '. Is that meant?" in found
    for row, label in zip(rows, ["1,5", "2", "2,5", "-3", "1,5"], strict=True):
        row["label"] = label
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = "\n".join(data_warnings(build_datasets(section, word_tokenizer()).stats))
    assert "For numbers write 2.5, not 2,5, and data.regression: true." in found


def test_a_label_that_only_some_rows_have_is_named_before_training(classify: Any, tmp_path: Path) -> None:
    held = write(tmp_path / "eval.jsonl", {"text": "red", "label": "colour"}, {"text": "oak", "label": "tree"})
    with pytest.raises(InputError, match=r"eval\.jsonl:2: has the label 'tree'.*or without it of the training rows"):
        built(classify(data={"eval_path": str(held), "eval_fraction": 0.0}))
    tail = [{"text": "red", "label": "colour"}, {"text": "oak", "label": "tree"}] * 10 + [
        {"text": "ash", "label": "rare"}
    ]
    drawn: dict[str, Any] = {"path": str(write(tmp_path / "tail.jsonl", *tail)), "eval_fraction": 0.9}
    with pytest.raises(
        InputError, match=r"eval_fraction holds out all rows with the label \w+\. Set another data\.seed"
    ):
        built(classify(data=drawn))
    counts = [{"text": "red", "label": count} for count in (10, 20)]
    held = write(tmp_path / "held.jsonl", {"text": "oak", "label": "30,5"})
    data = {"path": str(write(tmp_path / "counts.jsonl", *counts)), "eval_path": str(held), "eval_fraction": 0.0}
    with pytest.raises(InputError, match=r"held\.jsonl:1: has the label '30,5'.* set data\.regression: true"):
        built(classify(data=data))
    with pytest.raises(InputError, match=r"no training row of .* has the label tree"):
        built(classify(data={"label_names": [*NAMES, "tree"]}))
    rows = write(tmp_path / "more.jsonl", {"text": "red", "label": 1}, {"text": "oak", "label": 0})
    more: dict[str, Any] = {"path": str(rows), "format": "classification"}
    message = r"more\.jsonl:\d: has the label '\d'.*data\.mixture has label_names of its own"
    with pytest.raises(InputError, match=message):
        built(classify(data={"label_names": NAMES, "mixture": [more]}))
    named = classify(data={"label_names": NAMES, "mixture": [{**more, "label_names": NAMES}]})
    assert built(named).labels == Labels(tuple(NAMES))
    # a number is no place among classes that are numbers
    with pytest.raises(InputError, match=r"more\.jsonl:2: label is a number \(0\).*Expected 1, 2, 3\. Fix the row"):
        built(classify(data={"path": str(rows), "eval_fraction": 0.0}), labels=Labels(("1", "2", "3")))


def hub_dataset(names: list[str], labels: list[int]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": [f"say {n}" for n in labels], "label": labels}, features=features)


@pytest.mark.parametrize(
    ("names", "own", "expected"),
    [
        (["neutral", "good", "bad"], [], [0, 2, 1]),  # in its order, one without rows
        (
            ["neutral", "good", "bad"],
            ["so-so", "fine", "awful"],
            "no training row of owner/reviews has the label so-so",
        ),
        (["neutral", "good", "bad"], ["bad", "good", "neutral"], "label_names or the trained model calls them bad"),
        (["1", "2", "3"], [], [2, 1]),  # the integer 1 is the name 2: integers they stay
    ],
    ids=["named by the dataset", "named by the recipe", "in another order", "names that are numbers"],
)
def test_a_hub_dataset_names_its_integer_labels(
    names: list[str], own: list[str], expected: list[int] | str, classify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: hub_dataset(names, [1, 2, 1]))
    recipe = classify(data={"path": "owner/reviews", "label_names": own, "eval_fraction": 0.0})
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            built(recipe)
        return
    found = built(recipe)
    assert found.labels == Labels(tuple(names[: len(expected)]))
    assert found.stats.label_rows == expected


def test_parts_of_hub_datasets_must_name_the_same_classes_and_have_two(
    classify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, **_: object) -> datasets.Dataset:
        return hub_dataset(["good", "bad"] if path == "owner/test" else ["bad", "good"], [0, int(path != "owner/one")])

    def found(**data: str) -> Datasets:
        return built(classify(data={"eval_fraction": 0.0, **data}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = "owner/test: calls its classes good, bad, and owner/train calls them bad, good"
    with pytest.raises(InputError, match=message):
        found(path="owner/train", eval_path="owner/test")
    assert found(path="owner/train", eval_split="test").labels == Labels(("bad", "good"))
    with pytest.raises(InputError, match="all 2 training rows have the label 'bad', and a classifier needs two"):
        found(path="owner/one")


@pytest.mark.parametrize(
    "section",
    [
        {"data": {"packing": True}}, {"data": {"prefix_once": False}}, {"data": {"train_on": "last"}},
        {"training": {"sample_count": 1}}, {"training": {"exact_match_rows": 4}}, {"data": {"format": "alpaca"}},
        {"data": {"too_long": "split"}}, {"data": {"adapter_column": "label", "eval_fraction": 0.2}},
        {"data": {"mixture": [{"path": "more.jsonl", "template": "alpaca"}]}},
    ],
    ids=lambda section: next(iter(next(iter(section.values())))),
)  # fmt: skip
def test_keys_without_a_meaning_are_refused_by_name(classify: Any, section: dict[str, Any]) -> None:
    key = next(iter(next(iter(section.values()))))
    with pytest.raises(InputError, match=key):
        classify(**section)


def test_what_a_classifier_can_t_train_is_refused(classify: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.added_tokens.*task: causal-lm"):
        train(classify(model={"added_tokens": ["<|x|>"]}), tmp_path / "run")
    with pytest.raises(InputError, match=r"task: is sequence-classification, and adapter\.method spiel"):
        train(classify(adapter={"method": "spiel", "rank": 2}), tmp_path / "run")


def test_passes_before_the_first_step_leave_the_head_no_gradient(
    classify: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA-SB's, which takes as many as the memory of the poorest rank asks for."""
    left: list[torch.nn.Parameter] = []
    phases: list[str] = []
    take, passes, gather = AloneLoop.train_step, AloneLoop.over_passes, Group.gather

    def train_step(loop: AloneLoop) -> Any:
        left.extend(vector for vector in loop.engine.vectors.values() if vector.grad is not None)
        return take(loop)

    def over_passes(loop: AloneLoop, rows: Any, do: Any, what: str) -> Any:
        phases.append(what)
        return passes(loop, rows, do, what)

    def gathered(group: Group, value: Any) -> list[Any]:
        return [value, 1000] if type(value) is int and value > 2**20 else gather(group, value)  # free bytes

    monkeypatch.setattr(AloneLoop, "train_step", train_step)
    monkeypatch.setattr(AloneLoop, "over_passes", over_passes)
    monkeypatch.setattr(Group, "gather", gathered)
    train(classify(adapter={"method": "lora-sb", "rank": 4}, training={"max_steps": 1}), tmp_path / "run")
    assert not left
    assert len(phases) == 14  # each linear by itself


def test_a_head_learns_before_factors_that_begin_at_zero(classify: Any, tmp_path: Path) -> None:
    keys = {"adapter": {"method": "bilora", "rank": 4, "alpha": 64}, "training": {"bilevel": True}}
    assert train(classify(**keys), tmp_path / "run").run["status"] == "done"


def test_a_classifier_is_in_no_sum(finished: Path, trained_run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["merge-adapters", str(trained_run), str(finished), str(tmp_path / "sum")]) == 2
    assert "classes/adapter: has a classification head, and heads can't be added" in capsys.readouterr().err


def test_a_head_of_labels_in_another_order_is_no_start(classify: Any, finished: Path, tmp_path: Path) -> None:
    def run(names: list[str]) -> None:
        adapter = {"init_from": str(finished / "adapter")}
        train(classify(data={"label_names": names}, adapter=adapter, training={"max_steps": 1}), tmp_path / "run")

    with pytest.raises(InputError, match=r"init_from: .* has labels \['colour', 'fruit', 'pet'\], the recipe \['pet',"):
        run(NAMES[::-1])
    run(NAMES)
    first, second = (json.loads((one / "run.json").read_text())["result"] for one in (finished, tmp_path / "run"))
    assert second["eval_before"]["loss"] == pytest.approx(first["eval_after"]["loss"])


def test_a_few_rows_of_each_label_are_chosen_by_the_seed(classify: Any, tmp_path: Path) -> None:
    def rows(**data: Any) -> Datasets:
        return built(classify(data={"rows_per_label": 4, **data}))

    found, again, other = rows(), rows(), rows(seed=1)
    assert found.stats.label_rows == [4, 4, 4]
    sources = [row.source for row in found.train]
    assert sources == [row.source for row in again.train] == sorted(sources, key=lambda s: int(s.rpartition(":")[2]))
    assert sources != [row.source for row in other.train]
    assert not set(sources) & {row.source for row in found.eval}
    assert len(rows(rows_per_label=1000).train) == 48
    numbers = write(tmp_path / "numbers.jsonl", *({"text": "say", "label": n / 2} for n in range(6)))
    with pytest.raises(InputError, match=r"data.rows_per_label: .*numbers.jsonl:\d has the label \d.5, a number"):
        rows(path=str(numbers))
    with pytest.raises(InputError, match=r"rows_per_label: counts the rows of classes, and data.regression has none"):
        rows(regression=True)


def test_few_rows_of_several_sources_keep_their_tasks_and_are_repeated_by_weight(
    classify: Any, tmp_path: Path, labelled_rows: Path
) -> None:
    other = shutil.copy(labelled_rows, tmp_path / "other.jsonl")

    def rows(weight: float = 1.0, **data: Any) -> Datasets:
        mixture = [{"path": str(other), "weight": weight}]
        return built(classify(data={"rows_per_label": 10, "eval_fraction": 0.0, "mixture": mixture, **data}))

    def file_of(row: Any) -> str:
        return row.source.rpartition(":")[0]

    by_task, repeated = rows(sampling="task"), rows(weight=2.0)
    assert by_task.train.part_of is not None
    assert [by_task.part_names[number] for number in by_task.train.part_of] == [*map(file_of, by_task.train)]
    for source in by_task.stats.sources:
        assert source.taken == sum(file_of(row) == source.path for row in by_task.train)
    assert {file_of(row) for row in by_task.first_rows(2)} == {str(labelled_rows), str(other)}
    assert len(by_task.first_rows(100)) == len(by_task.train) == 30
    assert sorted({row.source for row in repeated.train}) == sorted(row.source for row in by_task.train)
    assert len(repeated.train) == 30 + by_task.stats.sources[1].taken
    one = write(tmp_path / "one.jsonl", {"text": "say red", "label": "colour"})
    recipe = classify(data={"rows_per_label": 1, "eval_fraction": 0.0, "mixture": [{"path": str(one)}]})
    shown = io.StringIO()
    print_preflight(built(recipe), load_tokenizer(recipe.model), Console(file=shown, width=1000))
    assert f"0 from {one} (none is trained)" in shown.getvalue()


def test_held_out_rows_of_one_label_are_pointed_out(classify: Any, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / name, *({"text": f"say {name} {n}", "label": "pet" if n < 6 else "fruit"} for n in range(12)))
        for name in ("rows.jsonl", "held_out.jsonl")
    ]

    def said(limit: int) -> str:
        files = {"path": str(paths[0]), "eval_path": str(paths[1]), "eval_fraction": 0.0, "eval_limit": limit}
        return "\n".join(data_warnings(built(classify(data=files)).stats))

    assert "All 6 held-out rows have the label pet, so their scores say little." in said(6)
    assert "held-out rows have the label" not in said(7)
