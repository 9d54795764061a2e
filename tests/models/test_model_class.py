"""A base's class, config and weights: heads of its own; configs of no possible model and weights of another are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    ConvNextConfig,
    LlamaForSequenceClassification,
    SiglipConfig,
)

from qvera.config.sections import ModelSection
from qvera.models.loader import Base, load_base, notes
from qvera.models.model_class import classification_class, empty_model, image_class
from qvera.models.quantization import bnb_functional
from qvera.models.quantize_checkpoint import quantized_copy
from qvera.utils.errors import InputError
from tests.conftest import small_llama, small_tokenizer
from tests.families import ENCODERS

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 9], [8, 4, 0, 0]])


def section(directory: Path, quantization: Any = "nf4") -> ModelSection:
    return ModelSection(path=str(directory), quantization=quantization, compute_dtype="float32")


def classifier(directory: Path, *labels: str, seed: int = 0, **settings: str) -> Base:
    section = ModelSection(path=str(directory), **{"compute_dtype": "float32", **settings})
    return load_base(section, CPU, model_class=classification_class(labels, seed=seed))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_head_is_drawn_from_the_seed_and_the_rest_is_the_language_models(
    tiny_model_dir: Path, quantization: str
) -> None:
    language_model = load_base(section(tiny_model_dir, quantization), CPU).model
    torch.manual_seed(5)  # of no effect
    one, same, other = (classifier(tiny_model_dir, "a", "b", "c", seed=s, quantization=quantization) for s in (1, 1, 2))
    assert one.model.score.weight.dtype == torch.float32
    assert torch.equal(one.model.score.weight, same.model.score.weight)
    assert not torch.equal(one.model.score.weight, other.model.score.weight)
    hidden = language_model.model(IDS).last_hidden_state
    logits = one.model(IDS, use_cache=False).logits
    expected = torch.stack([hidden[0, 3], hidden[1, 1]]) @ one.model.score.weight.T  # the last token that is no padding
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert one.model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_all_tasks_share_one_quantized_copy(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path))
    load_base(ModelSection(path=str(tiny_model_dir)), CPU)
    classifier(tiny_model_dir, "a", "b", compute_dtype="bfloat16")
    assert len(list((tmp_path / "bases").glob("nf4-*/"))) == 1


def save_classifier(directory: Path, dtype: torch.dtype) -> Any:
    config = small_llama().config
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    model = LlamaForSequenceClassification(config).to(dtype)
    model.save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return model


@pytest.mark.parametrize(("dtype", "compute"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_checkpoint_with_a_head_of_the_same_labels_starts_from_it_in_fp32(
    tmp_path: Path, quantization: str, dtype: str, compute: str
) -> None:
    stored, settings = save_classifier(tmp_path, getattr(torch, dtype)), {"compute_dtype": compute}
    kept = classifier(tmp_path, "no", "yes", quantization=quantization, **settings).model
    assert kept.score.weight.dtype == torch.float32 and torch.equal(kept.score.weight, stored.score.weight.float())
    for labels in (("yes", "no"), ("a", "b", "c")):  # outputs of another meaning, of another number
        fresh = classifier(tmp_path, *labels, quantization=quantization).model
        assert fresh.score.weight.shape == (len(labels), 64)
        assert not torch.equal(fresh.score.weight[:2], stored.score.weight)
    embedding = kept.model.embed_tokens.weight
    assert torch.equal(embedding, stored.model.embed_tokens.weight.to(embedding.dtype))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_head_of_another_shape_than_the_configs_is_refused(tmp_path: Path, quantization: str) -> None:
    save_classifier(tmp_path, torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    weights["score.weight"] = weights["score.weight"][:1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"score\.weight .*shape"):
        classifier(tmp_path, "no", "yes", quantization=quantization)


@pytest.mark.parametrize(("quantization", "compute"), [("nf4", "float32"), ("none", "bfloat16")])
def test_the_layers_of_a_head_that_come_from_pretraining_are_kept(
    tmp_path: Path, quantization: str, compute: str
) -> None:
    ENCODERS["modernbert"].write(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = classifier(tmp_path, "a", "b", quantization=quantization, compute_dtype=compute).model
    for name in ("head.dense.weight", "head.norm.weight"):
        assert torch.equal(model.get_parameter(name), stored[name])
    assert model.classifier.weight.dtype == torch.float32 and model.classifier.weight.norm() > 0


def test_a_head_with_the_labels_in_another_order_is_told_with_the_order_that_keeps_it(tmp_path: Path) -> None:
    save_classifier(tmp_path, torch.float32)
    (note,) = notes(classifier(tmp_path, "yes", "no").facts)
    assert "labels in another order" in note and 'data.label_names: ["no", "yes"]' in note
    assert not [*notes(classifier(tmp_path, "no", "yes").facts), *notes(classifier(tmp_path, "a", "b").facts)]


def test_a_head_that_is_stored_in_4_bits_is_dequantized_to_be_trained(tmp_path: Path) -> None:
    ENCODERS["roberta"].write(tmp_path / "base")
    model_class: Any = AutoModelForSequenceClassification
    model_class.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "dense")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = model_class.from_pretrained(tmp_path / "dense", quantization_config=settings)
    model.save_pretrained(tmp_path / "packed")
    small_tokenizer().save_pretrained(tmp_path / "packed")
    head: Any = classifier(tmp_path / "packed", "LABEL_0", "LABEL_1").model.classifier
    for name in ("dense", "out_proj"):
        packed = getattr(model.classifier, name).weight
        wanted = bnb_functional.dequantize_4bit(packed.data, packed.quant_state).float()
        torch.testing.assert_close(getattr(head, name).weight, wanted, rtol=1e-2, atol=1e-3)


def test_a_stored_head_is_not_sharded(tmp_path: Path) -> None:
    class Recorder:
        expect = staticmethod(lambda *sizes: None)

        def __init__(self) -> None:
            self.shapes: list[tuple[int, ...]] = []

        def __call__(self, weight: torch.Tensor, table: bool) -> None:
            self.shapes.append(tuple(weight.shape))

    save_classifier(tmp_path, torch.bfloat16)
    sharder: Any = Recorder()
    load_base(section(tmp_path), CPU, sharder=sharder, model_class=classification_class(["no", "yes"]))
    assert (304, 64) in sharder.shapes and (2, 64) not in sharder.shapes


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture
def edited(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model with changed config values and tensors."""

    def edit(change: Change | None = None, tied: bool = False, **config: Any) -> Path:
        directory = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
        if tied:
            small_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(directory)
        document = json.loads((directory / "config.json").read_text()) | config
        document = {key: value for key, value in document.items() if value != "absent"}
        (directory / "config.json").write_text(json.dumps(document))
        if change is not None:
            weights = directory / "model.safetensors"
            save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
        return directory

    return edit


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, r"hidden size \(64\) is not a multiple"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": "absent"}, "64, not a multiple of .*heads 7"),
        ({"num_attention_heads": -4}, "num_attention_heads -4, expected a whole number from 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4, not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 10**12}, "hidden_size 1000000000000, expected a whole number from 1 to 1,048,576"),
        ({"vocab_size": "abc"}, "vocab_size 'abc', expected a whole number"),
        ({"intermediate_size": 2.5}, r"intermediate_size 2\.5, expected a whole number"),
        ({"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM', expected a list of names"),
        ({"architectures": [5]}, r"architectures \[5\], expected a list of names"),
        ({"id2label": ["good", "bad"]}, r"id2label \['good', 'bad'\], expected a name for each number"),
        ({"quantization_config": 4}, "quantization_config 4, expected settings by their names"),
    ],
)
def test_absurd_values_are_refused_by_name(edited: Any, config: dict[str, Any], message: str) -> None:
    directory = edited(**config)
    with pytest.raises(InputError, match=rf"config\.json.*{message}"):
        load_base(section(directory))


@pytest.mark.parametrize("config", [SiglipConfig(), ConvNextConfig()], ids=lambda config: config.model_type)
def test_a_classifier_without_a_base_model_or_an_embedding_is_refused(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ForImageClassification has no base model with an input embedding"):
        empty_model(section(tmp_path), model_class=image_class(["a", "b"]))


def without(name: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def as_integers(name: str) -> Change:
    return lambda tensors: {key: t.to(torch.int32) if key == name else t for key, t in tensors.items()}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (None, {"num_hidden_layers": 1}, "a model of 1 layers .*the weights hold 2"),
        (None, {"num_hidden_layers": 3}, "a model of 3 layers .*the weights hold 2"),
        (without("lm_head.weight"), {}, r"hold no lm_head\.weight.*random output head"),
        (without("model.layers.1.mlp.up_proj.weight"), {}, r"hold no model\.layers\.1\.mlp\.up_proj\.weight"),
        (as_integers("model.norm.weight"), {}, r"safetensors: model\.norm\.weight is torch\.int32, expected a float"),
        (as_integers("model.layers.1.mlp.up_proj.weight"), {}, r"up_proj\.weight is torch\.int32, expected a floating"),
    ],
)
def test_weights_that_are_not_the_configs_are_refused(
    edited: Any, change: Change | None, config: dict[str, Any], message: str, quantization: str
) -> None:
    directory = edited(change, **config)
    with pytest.raises(InputError, match=message):
        load_base(section(directory, quantization))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_tied_config_with_another_head_is_refused_and_with_the_same_one_taken(edited: Any, quantization: str) -> None:
    directory = edited(lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}, tied=True)
    assert load_base(section(directory, quantization)).facts["parameters"] > 0
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    said = r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_embeddings: false"
    with pytest.raises(InputError, match=said):
        load_base(section(directory, quantization))


def test_integers_in_a_quantized_checkpoint_are_refused(edited: Any, tmp_path: Path) -> None:
    quantized_copy(section(edited()), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    save_file(as_integers("model.norm.weight")(weights), tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight is torch\.int32"):
        load_base(section(tmp_path / "out"))
