"""A vision transformer learns classes of images, resumes to the bit, and gives the same logits wherever it goes."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from qvera.adapters.save_load import named_vectors
from qvera.cli.main import main
from qvera.config.sections import ModelSection
from qvera.data import Datasets, build_datasets
from qvera.distributed.group import Group
from qvera.evaluation.load import OpenRun, find_target, open_run, open_target
from qvera.models.structure import causal_model
from qvera.models.tokenizer import load_image_processor
from qvera.tasks.classification import ImageClassification
from qvera.training.plan import make_plan
from qvera.training.session import TrainingSession
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.tasks.images import COLOURS
from tests.tasks.sessions import gradients, loop_of, rows_of
from tests.training.runs import cut_off, same, vectors

TASK = ImageClassification()
FP32 = ["--dtype", "float32"]


@pytest.fixture(scope="module")
def finished(see: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few epochs. Read it, never change it."""
    run_dir = tmp_path_factory.mktemp("runs") / "colours"
    train(see(training={"max_steps": 20}), run_dir)
    return run_dir


def logits(opened: OpenRun) -> torch.Tensor:
    with torch.no_grad():
        return TASK.row_logits(opened.model, list(rows_of(opened).eval), 0)


def plain_logits(model: Any, processor: Any, datasets: Datasets) -> torch.Tensor:
    """Of transformers alone, from the image files."""
    files = [Image.open(row.source).convert("RGB") for row in datasets.eval]
    with torch.no_grad():
        return model(**processor(images=files, return_tensors="pt")).logits


def test_a_run_learns_its_classes_and_says_what_it_trained(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text())
    before, after = run["result"]["eval_before"], run["result"]["eval_after"]
    assert after["accuracy"] >= 0.9 > before["accuracy"]
    assert run["data"]["labels"]["names"] == sorted(COLOURS)
    assert run["plan"]["batch"]["tokens"] == 17  # 16 patches and the class
    assert run["model"]["four_bit_modules"] == 12
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert config["labels"] == sorted(COLOURS)
    tensors = vectors(finished)
    assert tensors["base_model.model.classifier.weight"].shape == (3, 32)
    assert run["adapter"]["head_parameters"] == 3 * 32 + 3
    assert not any("projection" in name for name in tensors)  # the patches' convolution is not adapted
    assert "accuracy" in (finished / "report.html").read_text().lower()


@pytest.mark.parametrize("adapter", [{"rank": 8}, {"method": "lora-xs", "rank": 4}], ids=["vera", "lora-xs"])
def test_every_gradient_is_that_of_a_dense_model_in_fp64(see: Any, tmp_path: Path, adapter: dict[str, Any]) -> None:
    loop = loop_of(see(adapter=adapter, model={"quantization": "none"}), tmp_path)
    found = gradients(loop, list(range(7)))
    inner = causal_model(loop.model.double())
    loop.model.zero_grad()
    examples = [loop.datasets.train[i] for i in range(7)]
    pixels = [torch.from_numpy(example.image.pixels())[None].double() for example in examples]
    logits = torch.cat([inner(pixel_values=one).logits for one in pixels])
    F.cross_entropy(logits, torch.from_numpy(loop.datasets.labels.targets(examples))).backward()
    expected = {name: vector.grad for name, vector in named_vectors(loop.model).items()}
    assert "base_model.model.classifier.weight" in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[name].double(), rtol=5e-4, atol=2e-6, msg=name)


def test_a_step_depends_neither_on_passes_nor_on_what_came_before(see: Any, tmp_path: Path) -> None:
    def augmented_gradients(passes: int) -> dict[str, torch.Tensor]:
        loop = loop_of(see(training={"per_device_train_batch_size": passes}), tmp_path / str(passes))
        train_rows, step = loop.datasets.train, 3
        rows = [loop.task.training_row(train_rows[i], i, step) for i in range(8)]
        plain = [train_rows[i] for i in range(8)]
        assert any((a.image.pixels() != b.image.pixels()).any() for a, b in zip(rows, plain, strict=True))
        for start in range(0, 8, passes):
            loss, _ = loop.nll(rows[start : start + passes])
            (loss / 8).backward()
        return {name: vector.grad.clone() for name, vector in named_vectors(loop.model).items()}

    one, other = augmented_gradients(8), augmented_gradients(2)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(see: Any, tmp_path: Path) -> None:
    recipe = see(adapter={"dropout": 0.1}, training={"head_learning_rate": 1e-2, "max_steps": 4, "save_steps": 2})
    train(recipe, tmp_path / "whole")
    train(recipe, cut_off(tmp_path / "whole", tmp_path / "cut", after=2), resume=True)
    assert same(vectors(tmp_path / "whole"), vectors(tmp_path / "cut"))


@pytest.mark.parametrize("kind", ["merged", "lora", "peft", "as it is"])
def test_an_adapter_gives_the_trained_logits_as_it_is_and_exported(
    finished: Path, vit: Path, tmp_path: Path, kind: str
) -> None:
    options = {"merged": [*FP32, "--base", "dequantized"], "lora": FP32, "peft": []}
    out = finished / "adapter" if kind == "as it is" else tmp_path / "out"
    if kind in options:
        assert main(["export", str(finished), str(out), "--to", kind, *options[kind]]) == 0
    if kind == "merged":
        opened, processor = open_run(finished), AutoImageProcessor.from_pretrained(out, backend="pil")
        model = AutoModelForImageClassification.from_pretrained(out)
        assert model.config.id2label == dict(enumerate(sorted(COLOURS)))
        torch.testing.assert_close(logits(open_run(out)), logits(opened), rtol=1e-4, atol=1e-5)
    else:
        dense = ModelSection(path=str(vit), quantization="none", compute_dtype="float32")
        opened = open_target(dataclasses.replace(find_target(finished), section=dense))
        processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
        base = AutoModelForImageClassification.from_pretrained(vit, num_labels=3)
        model = PeftModel.from_pretrained(base, out).eval()
    torch.testing.assert_close(plain_logits(model, processor, rows_of(opened)), logits(opened), rtol=1e-4, atol=1e-5)


def test_the_code_of_the_card_gives_the_trained_logits_on_a_base_in_4_bits(
    finished: Path, vit: Path, tmp_path: Path
) -> None:
    assert main(["card", str(finished), "--repo", "anna/colours", "--out", str(tmp_path / "card.md")]) == 0
    code = (tmp_path / "card.md").read_text().partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace("'vit'", repr(str(vit))).replace("'anna/colours'", repr(str(finished / "adapter"))), found)
    opened, processor = open_run(finished), AutoImageProcessor.from_pretrained(vit, backend="pil")
    of_card = plain_logits(found["model"].eval(), processor, rows_of(opened))
    torch.testing.assert_close(of_card, logits(opened), rtol=1e-4, atol=1e-5)


def test_eval_writes_a_class_for_each_image(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(finished), "--data", str(pictures), "--rows", "40", "--predictions", str(tmp_path / "p")]
    assert main(command) == 0
    found = [json.loads(line) for line in (tmp_path / "p").read_text().splitlines()]
    assert len(found) == 40
    assert sum(row["label"] == row["prediction"] for row in found) >= 36
    assert found[0]["source"].endswith("blue/00.png")
    assert "accuracy" in capsys.readouterr().out


def test_a_plan_counts_images_with_and_without_the_rows(see: Any, tmp_path: Path, pictures: Path) -> None:
    recipe = see()
    rows = build_datasets(recipe.data, load_image_processor(recipe.model))
    for plan in (make_plan(recipe, torch.device("cpu")), make_plan(recipe, torch.device("cpu"), rows.train)):
        assert (plan.batch.rows, plan.batch.tokens, plan.batch.trained_tokens) == (4, 17, 4)
        parts = {part.name: part.bytes for part in plan.memory.at("loss")}
        assert parts["pixel values"] == 4 * 3 * 16 * 16 * 4


def test_preview_shows_small_images(see: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, page = tmp_path / "recipe.yaml", tmp_path / "page.html"
    recipe.write_text(yaml.safe_dump(see().to_dict()))
    assert main(["preview", str(recipe), "--rows", "2", "--html", str(page)]) == 0
    assert "label: blue" in capsys.readouterr().out
    text = page.read_text()
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="image 1"', text)
    assert text.count("label: ") == 2
    assert len(found) == 2
    assert Image.open(io.BytesIO(base64.b64decode(found[0]))).size == (12, 12)


def test_a_base_without_an_image_processor_is_refused(see: Any, vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    session = TrainingSession(see(model={"path": str(tmp_path / "bare")}), tmp_path / "run", Group())
    with pytest.raises(InputError, match=r"bare'.*Expected preprocessor_config\.json beside the weights"):
        session.load_data()


@pytest.mark.parametrize(
    "section",
    [
        {"data": {"packing": True}}, {"data": {"max_length": 64}}, {"data": {"template": "chatml"}},
        {"data": {"group_by_length": True}}, {"data": {"format": "classification"}}, {"data": {"regression": True}},
        {"model": {"tokenizer": "x"}}, {"model": {"pad_token": "x"}}, {"training": {"sample_count": 1}},
        {"data": {"adapter_column": "label"}},
    ],
    ids=lambda section: next(iter(next(iter(section.values())))),
)  # fmt: skip
def test_a_key_without_meaning_for_images_is_refused_by_name(see: Any, section: dict[str, Any]) -> None:
    ((name, keys),) = section.items()
    with pytest.raises(InputError, match=rf"{name}\.{next(iter(keys))}|task: many adapters"):
        see(**section)


def test_augmentation_is_for_images(make_recipe: Any) -> None:
    with pytest.raises(InputError, match=r"data\.augment: has no effect without task: image-classification"):
        make_recipe(data={"augment": "crop-flip"})
