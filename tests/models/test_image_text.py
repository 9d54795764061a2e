"""Models that take images among text: loss and gradients against their published classes in fp64."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import qvera
from qvera.adapters.layer import adapted_layers
from qvera.adapters.save_load import attach
from qvera.config.sections import AdapterSection, DataSection, ModelSection
from qvera.data import build_datasets, read_prompts
from qvera.data.images import images_of
from qvera.evaluation.load import open_run
from qvera.models import forward
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.loader import load_base
from qvera.models.structure import causal_model, decoder_of
from qvera.models.tokenizer import load_tokenizer
from qvera.training.plan import make_plan, shape_of
from qvera.training.trainer import train
from tests.adapters.helpers import perturb
from tests.image_text import IMAGE_FAMILIES, given_by_processor, image_rows, picture
from tests.live_bytes import PeakBytes
from tests.models.experts import dense_twin, published
from tests.training.runs import cut_off

_FAST = ("gemma3", "qwen2_5_vl", "qwen3_5")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in _FAST else pytest.mark.matrix) for n in IMAGE_FAMILIES]
)
def test_loss_and_gradients_are_those_of_the_published_class(name: str, tmp_path: Path) -> None:
    """Rows of one image, of two, of none and of another size, in one batch and each alone, in 4 bits."""
    for package in IMAGE_FAMILIES[name].needs:
        pytest.importorskip(package)
    directory = IMAGE_FAMILIES[name].write(tmp_path)
    section = ModelSection(path=str(directory), compute_dtype="float32")
    base = load_base(section)
    file = image_rows(tmp_path)
    datasets = build_datasets(DataSection(path=str(file), max_length=512), base.tokenizer)
    model = perturb(attach(base.model, AdapterSection(rank=4), section.path))
    twin, leaves = dense_twin(model, directory)
    images = images_of(base.tokenizer)
    assert images is not None
    expected = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for given, example in zip(given_by_processor(images.processor, file), datasets.train, strict=True):
        labels = torch.where(torch.from_numpy(example.trained.copy()), given["input_ids"], -100)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
        count = int(example.trained.sum())
        expected = expected + twin(**wide, labels=labels).loss * count
        tokens += count
    expected.backward()
    wanted = {(layer, kind): v.grad for layer, vectors in leaves.items() for kind, v in vectors.items()}
    for checkpointing in (False, True):
        enable_checkpointing(model, checkpointing)
        model.train()
        for rows in ([*datasets.train], *([row] for row in datasets.train)):
            batch = forward.make_batch(model, rows, datasets.pad_id)
            assert ("pixel_values" in batch) == any(row.images for row in rows)
            loss, counted = forward.batch_nll(model, batch, 16)
            if len(rows) > 1:
                torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
                assert counted == tokens
            loss.backward()
        for layer in adapted_layers(model):
            for kind, vector in layer.vectors("default").items():
                found = vector.grad.double() / 2  # all together, and each alone
                torch.testing.assert_close(found, wanted[layer.spec.name, kind], rtol=2e-4, atol=2e-5)
                vector.grad = None


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "qwen3_vl" else pytest.mark.matrix) for n in IMAGE_FAMILIES],
)
def test_a_run_on_images_is_resumed_and_exported_without_a_change_of_its_answers(
    name: str, make_recipe: Any, tmp_path: Path
) -> None:
    for package in IMAGE_FAMILIES[name].needs:
        pytest.importorskip(package)
    base, rows = IMAGE_FAMILIES[name].write(tmp_path / "base"), tmp_path / "rows"
    rows.mkdir()
    file = image_rows(rows, 12)
    recipe = make_recipe(
        model={"path": str(base), "quantization": "none"},
        data={"path": str(file), "max_length": 256},
        training={"max_steps": 2, "save_steps": 1, "exact_match_rows": 2, "sample_count": 2},
    )
    train(recipe, tmp_path / "run")
    train(recipe, cut_off(tmp_path / "run", tmp_path / "cut", after=1), resume=True)
    written = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "cut")]
    assert written[0] == written[1]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["result"]["eval_after"]["loss"] < run["result"]["eval_before"]["loss"]
    shown = [len(sample["images"]) for sample in run["samples"]]
    assert (tmp_path / "run" / "report.html").read_text().count("<img ") == sum(shown) > 0
    scored = qvera.evaluate(tmp_path / "run")
    assert [len(row.get("images", ())) for row in scored["answers"][:2]] == shown
    assert scored["scores"]["loss"] == pytest.approx(run["result"]["eval_after"]["loss"], rel=1e-5)
    prompts = read_prompts(file, DataSection(path=str(file)))
    answers = qvera.generate(tmp_path / "run", prompts, max_new_tokens=6)
    alone = [qvera.generate(tmp_path / "run", [prompt], max_new_tokens=6)[0] for prompt in prompts[:3]]
    assert answers[:3] == alone, "padding and the images of other rows change no answer"

    qvera.export(tmp_path / "run", tmp_path / "merged", dtype="float32")
    assert qvera.generate(tmp_path / "merged", prompts, max_new_tokens=6) == answers
    qvera.export(tmp_path / "run", tmp_path / "lora", to="lora", dtype="float32")
    images = images_of(load_tokenizer(ModelSection(path=str(tmp_path / "merged"))))
    assert images is not None, "the export has the base's processor"
    merged, plain = published(tmp_path / "merged"), published(base)
    stock = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    opened = open_run(tmp_path / "run")
    for given in given_by_processor(images.processor, file)[:3]:
        with torch.no_grad():
            wanted = opened.model(**given).logits
            torch.testing.assert_close(merged(**given).logits, wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(stock(**given).logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_plan_counts_the_images_of_the_longest_batch_and_no_layer_of_the_tower(
    make_recipe: Any, tmp_path: Path
) -> None:
    base = IMAGE_FAMILIES["qwen3_vl"].write(tmp_path)
    recipe = make_recipe(
        model={"path": str(base)},
        data={"path": str(image_rows(tmp_path, 6)), "eval_fraction": 0.0},
        training={"per_device_train_batch_size": 2},
    )
    datasets = build_datasets(recipe.data, load_tokenizer(recipe.model))
    plan = make_plan(recipe, torch.device("cpu"), datasets.train)
    assert plan.shape.layers == 2
    assert not any("visual" in x.name for x in plan.shape.linears if x.layer is not None or x.is_target)
    longest = datasets.train.take(np.argsort(-datasets.train.lengths)[:2])
    pixels = forward.make_batch(load_base(recipe.model).model, [*longest], datasets.pad_id)["pixel_values"]
    assert plan.memory.moments["images"][0].bytes > pixels.numel() * 4 > 0


def _qwen_images() -> Any:
    return Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 256, "longest_edge": 160 * 160})


def _tiles() -> Any:
    return SmolVLMImageProcessorPil(size={"longest_edge": 336}, max_image_size={"longest_edge": 112})


@pytest.mark.parametrize(
    ("name", "dtype", "processor", "tower", "settings"),
    [
        ("qwen3_vl", torch.bfloat16, _qwen_images, {"num_position_embeddings": 1024}, {}),
        ("gemma4", torch.float32, None, {"num_key_value_heads": 4, "head_dim": 48}, {}),
        pytest.param(
            "smolvlm", torch.float32, _tiles, {"image_size": 112}, {"image_seq_len": 16}, marks=pytest.mark.matrix
        ),
        pytest.param("qwen2_5_vl", torch.float32, _qwen_images, {}, {}, marks=pytest.mark.matrix),
    ],
)
@torch.no_grad()
def test_the_plan_of_the_tower_is_what_is_counted(
    name: str, dtype: torch.dtype, processor: Any, tower: dict[str, int], settings: dict[str, int], tmp_path: Path
) -> None:
    family = IMAGE_FAMILIES[name]
    for package in family.needs:
        pytest.importorskip(package)
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 4, "num_heads": 4, **tower}
    config = {**family.config, "vision_config": {**family.config["vision_config"], **sizes}}
    processor = processor or family.image_processor
    dataclasses.replace(
        family, config=config, image_processor=processor, settings={**family.settings, **settings}
    ).write(tmp_path)
    (tmp_path / "0.png").write_bytes(picture(0, 300, 300))
    asked = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "say"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "it"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    base = load_base(ModelSection(path=str(tmp_path), quantization="none", compute_dtype=str(dtype)[6:]))
    datasets = build_datasets(DataSection(path=str(tmp_path / "rows.jsonl"), max_length=2048), base.tokenizer)
    batch = forward.make_batch(base.model, [*datasets.train], datasets.pad_id)
    counted: list[int] = []
    layer = next(m for n, m in decoder_of(causal_model(base.model)).named_modules() if n.endswith("layers.0"))
    with PeakBytes() as peak, layer.register_forward_pre_hook(lambda *_: counted.append(peak.peak)):
        forward.hidden_states(base.model, batch)
    planned = shape_of(base.model).tower
    assert planned is not None
    found = planned.size_bytes(batch["pixel_values"].numel(), 2, dtype.itemsize)
    assert -0.1 < found / counted[0] - 1 < 0.12


@pytest.mark.slow
def test_adapters_that_share_passes_over_images_are_those_trained_alone(make_recipe: Any, tmp_path: Path) -> None:
    base = IMAGE_FAMILIES["qwen3_vl"].write(tmp_path)
    lines = [json.loads(line) for line in image_rows(tmp_path, 8).read_text().splitlines()]
    for number, line in enumerate(lines):
        line["owner"] = "ab"[number % 2]
    files = {"many": lines, "a": lines[::2], "b": lines[1::2]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def run(name: str, **data: Any) -> Path:
        recipe = make_recipe(
            model={"path": str(base)},
            data={"path": str(tmp_path / f"{name}.jsonl"), "max_length": 256, "eval_fraction": 0.0, **data},
            training={"max_steps": 2, "global_batch_size": 4, "sample_count": 0},
        )
        train(recipe, tmp_path / name)
        return tmp_path / name

    many = run("many", adapter_column="owner")
    for name in "ab":
        own = load_file(many / "adapters" / name / "adapter_model.safetensors")
        alone = load_file(run(name) / "adapter" / "adapter_model.safetensors")
        for key, vector in alone.items():
            torch.testing.assert_close(own[key], vector, rtol=1e-4, atol=1e-6)
