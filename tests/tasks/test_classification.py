"""A classifier learns, resumes to the bit, and gives the same logits wherever it goes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from qvera.adapters.files.save_load import named_vectors
from qvera.cli.main import main
from qvera.config.schema import ModelSection, Recipe, parse_recipe
from qvera.data import Datasets, Labels, build_datasets, data_warnings
from qvera.evaluation.load import OpenRun, find_target, open_run, open_target
from qvera.evaluation.metrics import class_scores
from qvera.models.structure import causal_model
from qvera.models.tokenizer import load_tokenizer
from qvera.tasks.classification import SequenceClassification, label_scores
from qvera.training.plan import make_plan
from qvera.training.trainer import train
from qvera.utils.errors import InputError, NotFinite
from tests.evaluation.judges import serving as judge_server
from tests.tasks.encoders import save_family
from tests.tasks.sessions import gradients, loop_of

CPU = torch.device("cpu")
TASK = SequenceClassification()
METHODS = {"vera": {}, "lora": {"method": "lora", "rank": 4}, "lora-xs": {"method": "lora-xs", "rank": 4}}


@pytest.fixture(scope="module")
def finished(classify: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few epochs. Read it, never change it."""
    run_dir = tmp_path_factory.mktemp("runs") / "classes"
    train(classify(training={"max_steps": 30, "eval_steps": 10, "save_steps": 10}), run_dir)
    return run_dir


def rows_of(opened: OpenRun) -> Datasets:
    assert opened.target.recipe is not None
    return build_datasets(opened.target.recipe.data, opened.base.tokenizer, labels=opened.labels)


def logits(opened: OpenRun) -> torch.Tensor:
    datasets = rows_of(opened)
    with torch.no_grad():
        return TASK.row_logits(opened.model, list(datasets.eval), datasets.pad_id)


def plain_logits(model: Any, datasets: Datasets) -> torch.Tensor:
    """Of transformers alone, each row by itself, without padding."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor(row.input_ids[None], dtype=torch.int64)) for row in datasets.eval]
    return torch.cat([row.logits for row in rows])


def test_a_run_learns_its_labels_and_says_what_it_trained(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    before, after = run["result"]["eval_before"], run["result"]["eval_after"]
    assert after["accuracy"] >= 0.75 > before["accuracy"] + 0.2
    assert after["loss"] < 0.5 * before["loss"]
    assert run["data"]["labels"]["names"] == ["colour", "fruit", "pet"]
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    head = tensors.pop("base_model.model.score.weight")
    assert head.dtype == torch.float32
    assert run["adapter"]["head_parameters"] == head.numel() == 3 * 64
    assert run["adapter"]["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    assert json.loads((finished / "adapter" / "adapter_config.json").read_text())["labels"] == [
        "colour",
        "fruit",
        "pet",
    ]
    assert "accuracy" in (finished / "report.html").read_text().lower()


@pytest.mark.parametrize(
    ("family", "method", "smoothing"),
    [("llama", "vera", 0.0), ("llama", "lora", 0.1), ("llama", "lora-xs", 0.0), ("bert", "vera", 0.1)],
)
def test_every_gradient_is_that_of_a_dense_model_in_fp64(
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
    reference = loop.model.double()
    inner = causal_model(reference)
    examples = [loop.datasets.train[i] for i in rows]
    targets = torch.from_numpy(loop.datasets.labels.targets(examples))
    logits = [inner(torch.tensor(e.input_ids[None], dtype=torch.int64)).logits for e in examples]
    F.cross_entropy(torch.cat(logits), targets, label_smoothing=smoothing).backward()
    expected = {name: vector.grad for name, vector in named_vectors(reference).items()}
    assert any("score" in name or "classifier" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[name].double(), rtol=2e-4, atol=2e-6, msg=name)


def test_the_loss_does_not_depend_on_accumulation(classify: Any, tmp_path: Path) -> None:
    loop = loop_of(classify(), tmp_path)
    whole = gradients(loop, list(range(8)))
    loop.model.zero_grad()
    for name, gradient in gradients(loop, list(range(8)), passes=3).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7)


def test_padding_changes_nothing(finished: Path) -> None:
    opened = open_run(finished)
    datasets = rows_of(opened)
    rows = list(datasets.eval)
    assert len({len(row.input_ids) for row in rows}) > 2
    torch.testing.assert_close(logits(opened), plain_logits(causal_model(opened.model), datasets), rtol=1e-4, atol=1e-5)


def test_the_head_has_a_rate_of_its_own_and_the_same_schedule(classify: Any, tmp_path: Path) -> None:
    recipe = classify(training={"head_learning_rate": 5e-3, "warmup_steps": 2})
    loop = loop_of(recipe, tmp_path)
    first = loop.optimizer.param_groups[0]["lr"]
    head = next(t for name, t in named_vectors(loop.model).items() if name.endswith("score.weight"))
    own = next(g for g in loop.optimizer.param_groups if any(p is head for p in g["params"]))
    assert own["lr"] == pytest.approx(first / 4)
    assert len(own["params"]) == 1
    assert 0 < first < 2e-2  # the warmup's first step


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(classify: Any, tmp_path: Path) -> None:
    recipe = classify(adapter={"dropout": 0.1}, training={"max_steps": 6, "save_steps": 3, "head_learning_rate": 1e-2})
    train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for left in ("adapter", "checkpoints/step-00000006"):
        shutil.rmtree(tmp_path / "cut" / left)
    (tmp_path / "cut" / "run.json").unlink()
    train(recipe, tmp_path / "cut", resume=True)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_adapter_gives_the_same_logits_in_plain_peft(finished: Path, tiny_model_dir: Path) -> None:
    opened = open_run(finished)
    assert torch.equal(logits(opened), logits(open_run(finished)))
    dense = ModelSection(path=str(tiny_model_dir), quantization="none", compute_dtype="float32")
    expected = open_target(dataclasses.replace(find_target(finished), section=dense))
    datasets = rows_of(expected)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=3, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, finished / "adapter").eval()
    torch.testing.assert_close(plain_logits(model, datasets), logits(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["merged", "lora", "peft"])
def test_an_export_gives_the_trained_logits(finished: Path, tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    fp32 = ["--dtype", "float32"]
    options = {"merged": [*fp32, "--base", "dequantized"], "lora": fp32, "peft": []}[kind]
    assert main(["export", str(finished), str(tmp_path / "out"), "--to", kind, *options]) == 0
    opened = open_run(finished)
    if kind == "merged":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert model.config.id2label == {0: "colour", 1: "fruit", 2: "pet"}
        difference = json.loads((tmp_path / "out" / "qvera_export.json").read_text())["difference"]
        assert difference["answers_agree"] == difference["rows"] == 12
    else:
        dense = ModelSection(path=str(tiny_model_dir), quantization="none", compute_dtype="float32")
        opened = open_target(dataclasses.replace(find_target(finished), section=dense))
        plain = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=3, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    torch.testing.assert_close(plain_logits(model, rows_of(opened)), logits(opened), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "lora-xs"])
def test_another_method_trains_saves_and_merges_its_head(classify: Any, tmp_path: Path, method: str) -> None:
    train(classify(adapter=METHODS[method], training={"learning_rate": 1e-2}), tmp_path / "run")
    assert (
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float32", "--base", "dequantized"])
        == 0
    )
    opened = open_run(tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(plain_logits(model, rows_of(opened)), logits(opened), rtol=1e-4, atol=1e-5)


def test_a_classifier_is_exported_in_4_bits_with_its_head(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), str(tmp_path / "out"), "--quantize", "nf4", "--dtype", "float32"]) == 0
    certificate = json.loads((tmp_path / "out" / "qvera_export.json").read_text())
    assert certificate["difference"]["rows"] and all(
        error < 0.3 for error in certificate["quantized"]["relative_errors"].values()
    )
    stored, trained = (
        load_file(f)
        for f in (tmp_path / "out" / "model.safetensors", finished / "adapter" / "adapter_model.safetensors")
    )
    assert torch.equal(stored["score.weight"], trained["base_model.model.score.weight"])
    assert main(["eval", str(tmp_path / "out"), "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["loss"] == pytest.approx(certificate["difference"]["loss_exported"], rel=1e-4)


def test_the_card_says_how_the_classifier_is_used(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "adapter", tmp_path / "adapter")  # without its run: the adapter says what it is
    assert main(["card", str(tmp_path / "adapter"), "--repo", "anna/topics"]) == 0
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in text and "qvera eval anna/topics" in text
    assert not any(word in text for word in ("qvera chat", "vllm", "ollama"))
    code = text.partition("```python\n")[2].partition("```")[0]
    opened = open_run(finished)
    base = opened.target.section.path
    names: dict[str, Any] = {}
    exec(
        code.replace(repr(Path(base).name), repr(base)).replace("'anna/topics'", repr(str(tmp_path / "adapter"))), names
    )
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    head = names["model"].get_base_model().score.modules_to_save["default"].weight
    torch.testing.assert_close(head.float(), stored, rtol=1e-2, atol=1e-3)  # plain PEFT has it in the base's bfloat16


def test_eval_writes_a_label_for_each_row(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.jsonl").write_text(
        '{"text": "say red", "label": "colour"}\n{"text": "say hen", "label": "colour"}\n'
    )
    command = ["eval", str(finished), "--data", str(tmp_path / "new.jsonl"), "--predictions", str(tmp_path / "p.jsonl")]
    assert main(command) == 0
    one, other = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    assert (one["prediction"], other["prediction"], other["label"]) == ("colour", "pet", "colour")
    assert sum(one["probabilities"].values()) == pytest.approx(1.0)
    assert "accuracy     0.5000" in capsys.readouterr().out
    shutil.copytree(finished / "adapter", tmp_path / "adapter")  # without its run, on the same rows
    assert main(["eval", str(tmp_path / "adapter"), *command[2:-1], str(tmp_path / "again.jsonl")]) == 0
    again = map(json.loads, (tmp_path / "again.jsonl").read_text().splitlines())
    assert [row["prediction"] for row in again] == ["colour", "pet"]


def test_a_regression_learns_numbers(classify: Any, tmp_path: Path) -> None:
    rows = [{"sentence": "again " * n, "label": n / 2 + 0.25} for n in range(1, 9)] * 6
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = classify(data={"path": str(tmp_path / "rows.jsonl")}, training={"max_steps": 40})
    train(recipe, tmp_path / "run")
    after = json.loads((tmp_path / "run" / "run.json").read_text())["result"]["eval_after"]
    assert after["pearson"] > 0.8
    assert "accuracy" not in after
    assert (
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float32", "--base", "dequantized"])
        == 0
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)


def test_the_scores_of_labels_are_those_of_their_definitions() -> None:
    from qvera.data import Labels
    from tests.tasks.rows import labelled

    labels = Labels(("no", "yes"))
    rows = [labelled("yes"), labelled("yes"), labelled("no"), labelled("no"), labelled("no")]
    found = torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    scores = label_scores(found, rows, labels)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(0.5)  # of "yes": 1 right, 1 missed, 1 wrong
    assert scores["matthews"] == pytest.approx((1 * 2 - 1 * 1) / (2 * 2 * 3 * 3) ** 0.5)
    values = label_scores(
        torch.tensor([[1.0], [2.0], [9.0]]), [labelled(x) for x in ("1.5", "2", "3")], Labels(("v",), True)
    )
    assert values["spearman"] == pytest.approx(1.0)
    assert values["loss"] == pytest.approx((0.25 + 0 + 36) / 3)


def test_logits_that_are_not_finite_have_no_scores_of_classes() -> None:
    """scikit-learn refuses them."""
    from tests.tasks.rows import labelled

    names = tuple(map(str, range(10)))
    found = torch.zeros(3, 10)
    found[1, 4] = torch.nan
    scores = label_scores(found, [labelled(name) for name in "123"], Labels(names))
    assert scores.keys() == {"loss", "rows", "trained_tokens"}
    assert scores["rows"] == 3
    assert class_scores(np.zeros(0, int), np.zeros((0, 10))) == {}
    values = label_scores(torch.tensor([[1.0], [torch.nan]]), [labelled("1.5"), labelled("2")], Labels(("v",), True))
    assert "pearson" not in values


def test_a_run_whose_logits_become_nan_ends_with_a_message_about_its_loss(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {n}", "label": f"c{n % 10}"}) + "\n" for n in range(40)))
    real, calls = SequenceClassification.held_out_logits, itertools.count()

    def spoilt_after_training(task: SequenceClassification, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = real(task, *args, **kwargs)
        return logits * torch.nan if next(calls) else logits

    monkeypatch.setattr(SequenceClassification, "held_out_logits", spoilt_after_training)
    tree = {
        "task": "sequence-classification",
        "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
        "adapter": {"rank": 8},
        "data": {"path": str(rows), "eval_fraction": 0.3},
        "training": {"max_steps": 1, "global_batch_size": 4, "report_to": []},
    }
    with pytest.raises(NotFinite, match=r"Step 1: its held-out loss is not finite"):
        train(parse_recipe(tree, "test recipe"), tmp_path / "run")


def test_the_plan_counts_the_head_and_no_vocabulary(classify: Any) -> None:
    recipe = classify()
    plan = make_plan(recipe, CPU)
    language = make_plan(classify(task="causal-lm", data={"format": "text"}), CPU)
    assert plan.shape.head_numbers == 2 * 64
    assert plan.trained_parameters == language.trained_parameters
    assert plan.adapter_bytes > language.adapter_bytes + 4 * 2 * 64
    names = {part.name for part in plan.memory.at("loss")}
    assert "logits of a classifier" in names
    assert "logits of a chunk" not in names


def test_commands_for_text_refuse_a_classifier(
    finished: Path, labelled_rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qvera.lab.analysis.analyze_adapter", lambda *_, **__: pytest.fail("it was analyzed"))
    for command in (["generate", "--prompt", "x"], ["chat"], ["serve"], ["analyze", "--text", str(labelled_rows)]):
        assert main([command[0], str(finished), *command[1:]]) == 2
        assert "is a classifier" in capsys.readouterr().err
    assert main(["eval", str(finished), "--with-base"]) == 2
    assert "no head that was trained" in capsys.readouterr().err
    with judge_server(lambda text: "[[A]]") as server:
        assert main(["eval", str(finished), "--judge", server.url]) == 2
    assert "--judge: is for models that write text" in capsys.readouterr().err


def test_held_out_rows_have_the_same_scores_on_any_number_of_ranks(finished: Path) -> None:
    opened = open_run(finished)
    datasets = rows_of(opened)
    rows = list(datasets.eval)
    whole = TASK.held_out_logits(opened.model, rows, datasets.pad_id, 5)
    assert whole.shape == (12, 3)
    for number, row in enumerate(rows):  # in the order of the rows, whatever their lengths
        alone = TASK.row_logits(opened.model, [row], datasets.pad_id)[0]
        torch.testing.assert_close(whole[number], alone, rtol=1e-4, atol=1e-5)


BAD_ROWS = {
    "a missing label": ([{"text": "a", "label": "x"}, {"text": "b"}], r"rows\.jsonl:2: the column 'label' is missing"),
    "an empty label": ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], r"rows\.jsonl:2: label is empty"),
    "a label that is NaN": ([{"text": "a", "label": 1}, {"text": "b", "label": float("nan")}], r":2: label is empty"),
    "an empty text": ([{"text": "a", "label": 1}, {"text": " ", "label": 0}], r":2: the text is empty"),
    "one class": ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], "a classifier needs two labels"),
    "no such column": ([{"words": "a", "label": 1}], r"needs the column text.*YOUR_COLUMN"),
}


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=list(BAD_ROWS))
def test_bad_rows_are_named(rows: list[dict[str, Any]], message: str, classify: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = classify(data={"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.0})
    with pytest.raises(InputError, match=message):
        build_datasets(recipe.data, open_tokenizer(recipe))


def open_tokenizer(recipe: Recipe) -> Any:
    from qvera.models.tokenizer import load_tokenizer

    return load_tokenizer(recipe.model)


def test_a_label_that_only_held_out_rows_have_is_named(classify: Any, labelled_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"text": "red", "label": "colour"}\n{"text": "oak", "label": "tree"}\n')
    recipe = classify(data={"eval_path": str(tmp_path / "eval.jsonl"), "eval_fraction": 0.0})
    with pytest.raises(InputError, match=r"eval\.jsonl:2: has the label 'tree'.*or without it of the training rows"):
        build_datasets(recipe.data, open_tokenizer(recipe))
    names = classify(data={"label_names": ["colour", "fruit", "pet", "tree"]})
    with pytest.raises(InputError, match=r"no training row of .* has the label tree"):
        build_datasets(names.data, open_tokenizer(names))


def test_a_training_label_that_is_no_class_is_named_before_training(classify: Any, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "red", "label": 0}\n{"text": "oak", "label": 1}\n')
    more: dict[str, Any] = {"path": str(tmp_path / "more.jsonl"), "format": "classification"}
    names = ["colour", "fruit", "pet"]
    recipe = classify(data={"label_names": names, "mixture": [more]})
    with pytest.raises(
        InputError, match=r"more\.jsonl:\d: has the label '\d'.*data\.mixture has label_names of its own"
    ):
        build_datasets(recipe.data, open_tokenizer(recipe))
    recipe = classify(data={"label_names": names, "mixture": [{**more, "label_names": names}]})
    assert build_datasets(recipe.data, open_tokenizer(recipe)).labels == Labels(tuple(names))


def test_a_number_is_no_place_among_classes_that_are_numbers(classify: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "red", "label": 1}\n{"text": "oak", "label": 0}\n')
    recipe = classify(data={"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.0})
    with pytest.raises(InputError, match=r"rows\.jsonl:2: label is a number \(0\).*Expected 1 \(and 2 more\)\.$"):
        build_datasets(recipe.data, open_tokenizer(recipe), labels=Labels(("1", "2", "3")))


@pytest.mark.parametrize(
    ("names", "own", "expected"),
    [
        (["neutral", "good", "bad"], [], ["neutral", "good", "bad"]),  # in its order, one without rows
        (
            ["neutral", "good", "bad"],
            ["so-so", "fine", "awful"],
            "no training row of owner/reviews has the label so-so",
        ),
        (
            ["neutral", "good", "bad"],
            ["bad", "good", "neutral"],
            "data.label_names or the trained model calls them bad",
        ),
        (["1", "2", "3"], [], ["1", "2"]),  # the integer 1 is the name 2: integers they stay
    ],
    ids=["named by the dataset", "named by the recipe", "in another order", "names that are numbers"],
)
def test_a_hub_dataset_names_its_integer_labels(
    names: list[str], own: list[str], expected: list[str] | str, classify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.ClassLabel(names=names)})
    rows = {"text": ["red", "plum", "oak"], "labels": [1, 2, 1]}
    hub = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kwargs: hub)
    recipe = classify(data={"path": "owner/reviews", "label_names": own, "eval_fraction": 0.0})
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            build_datasets(recipe.data, open_tokenizer(recipe))
        return
    found = build_datasets(recipe.data, open_tokenizer(recipe))
    assert found.labels == Labels(tuple(expected))
    assert found.stats.label_rows == ([0, 2, 1] if len(expected) == 3 else [2, 1])


def test_held_out_rows_of_a_hub_dataset_must_name_the_same_classes(
    classify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load_dataset(path: str, **_: object) -> datasets.Dataset:
        label = datasets.ClassLabel(names=["bad", "good"] if path == "owner/train" else ["good", "bad"])
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        return datasets.Dataset.from_dict({"text": ["red", "plum"], "label": [0, 1]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    recipe = classify(data={"path": "owner/train", "eval_path": "owner/test", "eval_fraction": 0.0})
    with pytest.raises(
        InputError, match="owner/test: calls its classes good, bad, and owner/train calls them bad, good"
    ):
        build_datasets(recipe.data, open_tokenizer(recipe))
    recipe = classify(data={"path": "owner/train", "eval_split": "test", "eval_fraction": 0.0})
    assert build_datasets(recipe.data, open_tokenizer(recipe)).labels == Labels(("bad", "good"))


def test_a_hub_dataset_of_one_label_is_refused_for_all_its_names(
    classify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    hub = datasets.Dataset.from_dict({"text": ["red", "plum"], "label": [0, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kwargs: hub)
    recipe = classify(data={"path": "owner/reviews", "eval_fraction": 0.0})
    with pytest.raises(InputError, match="all 2 training rows have the label 'bad', and a classifier needs two"):
        build_datasets(recipe.data, open_tokenizer(recipe))


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


@pytest.mark.parametrize("regression", ["auto", True])
def test_the_targets_of_a_regression_are_not_smoothed(classify: Any, tmp_path: Path, regression: Any) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "red", "label": 0.5}\n{"text": "plum", "label": 1}\n')
    data = {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.0, "regression": regression}
    recipe = classify(data=data, training={"label_smoothing": 0.1})
    with pytest.raises(InputError, match=r"training\.label_smoothing: .* the labels are numbers"):
        train(recipe, tmp_path / "run")


def test_a_head_of_labels_in_another_order_is_no_start(classify: Any, finished: Path, tmp_path: Path) -> None:
    def recipe(names: list[str]) -> Recipe:
        return classify(data={"label_names": names}, adapter={"init_from": str(finished / "adapter")})

    with pytest.raises(InputError, match=r"init_from: .* has labels \['colour', 'fruit', 'pet'\], the recipe \['pet',"):
        train(recipe(["pet", "fruit", "colour"]), tmp_path / "run")
    train(recipe(["colour", "fruit", "pet"]), tmp_path / "run")
    first, second = (json.loads((run / "run.json").read_text())["result"] for run in (finished, tmp_path / "run"))
    assert second["eval_before"]["loss"] == pytest.approx(first["eval_after"]["loss"])


def test_new_tokens_are_refused(classify: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.added_tokens.*task: causal-lm"):
        train(classify(model={"added_tokens": ["<|x|>"]}), tmp_path / "run")


def test_a_method_that_steps_its_own_tensors_only_is_refused(classify: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task: is sequence-classification, and adapter\.method spiel"):
        train(classify(adapter={"method": "spiel", "rank": 2}), tmp_path / "run")


def test_a_few_rows_of_each_label_are_chosen_by_the_seed(classify: Any) -> None:
    def rows(**data: Any) -> Datasets:
        recipe = classify(data={"rows_per_label": 4, **data})
        return build_datasets(recipe.data, load_tokenizer(recipe.model))

    found, again, other = rows(), rows(), rows(seed=1)
    assert found.stats.label_rows == [4, 4, 4]
    sources = [row.source for row in found.train]
    assert sources == [row.source for row in again.train] == sorted(sources, key=lambda s: int(s.rpartition(":")[2]))
    assert sources != [row.source for row in other.train]
    assert not set(sources) & {row.source for row in found.eval}
    assert len(rows(rows_per_label=1000).train) == 48


def test_few_rows_of_several_sources_keep_their_tasks_and_are_repeated_by_weight(
    classify: Any, tmp_path: Path, labelled_rows: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(labelled_rows.read_text())

    def rows(weight: float = 1.0, **data: Any) -> Datasets:
        mixture = [{"path": str(other), "weight": weight}]
        recipe = classify(data={"rows_per_label": 10, "eval_fraction": 0.0, "mixture": mixture, **data})
        return build_datasets(recipe.data, load_tokenizer(recipe.model))

    def file_of(row: Any) -> str:
        return row.source.rpartition(":")[0]

    by_task, repeated = rows(sampling="task"), rows(weight=2.0)
    assert by_task.train.part_of is not None
    assert [by_task.part_names[number] for number in by_task.train.part_of] == [*map(file_of, by_task.train)]
    assert [source.taken for source in by_task.stats.sources] == [
        sum(file_of(row) == source.path for row in by_task.train) for source in by_task.stats.sources
    ]
    assert {file_of(row) for row in by_task.first_rows(2)} == {str(labelled_rows), str(other)}
    assert len(by_task.first_rows(100)) == len(by_task.train) == 30
    assert sorted({row.source for row in repeated.train}) == sorted(row.source for row in by_task.train)
    assert len(repeated.train) == 30 + by_task.stats.sources[1].taken


def test_rows_of_numbers_are_not_counted_by_label(classify: Any, tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": "say", "label": n / 2}) + "\n" for n in range(6)))
    recipe = classify(data={"path": str(path), "rows_per_label": 2})
    with pytest.raises(InputError, match=r"data.rows_per_label: .*numbers.jsonl:\d has the label \d.5, a number"):
        build_datasets(recipe.data, load_tokenizer(recipe.model))
    with pytest.raises(InputError, match=r"rows_per_label: counts the rows of classes, and data.regression has none"):
        classify(data={"rows_per_label": 2, "regression": True})


def test_held_out_rows_of_one_label_are_pointed_out(classify: Any, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("rows.jsonl", "held_out.jsonl")]
    for path in paths:
        rows = [{"text": f"say {path.stem} {n}", "label": "pet" if n < 6 else "fruit"} for n in range(12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def said(**data: Any) -> str:
        files = {"path": str(paths[0]), "eval_path": str(paths[1]), "eval_fraction": 0.0}
        recipe = classify(data={**files, **data})
        return "\n".join(data_warnings(build_datasets(recipe.data, load_tokenizer(recipe.model)).stats))

    assert "All 6 held-out rows have the label pet, so their scores say little." in said(eval_limit=6)
    assert "held-out rows have the label" not in said(eval_limit=7)
