"""A config that describes no possible model, and weights that are not of the config's model, are refused with what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvera.config.schema import ModelSection
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.models.quantize_checkpoint import quantized_copy
from qvera.utils.errors import InputError
from tests.conftest import small_llama, small_tokenizer

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture
def edited(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model with changed config values and tensors."""

    def edit(change: Change | None = None, tied: bool = False, **config: Any) -> Path:
        directory = tmp_path / "model"
        if tied:
            small_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(directory)
            small_tokenizer().save_pretrained(directory)
        else:
            shutil.copytree(tiny_model_dir, directory)
        file = directory / "config.json"
        document = json.loads(file.read_text()) | config
        file.write_text(json.dumps({key: value for key, value in document.items() if value != "absent"}))
        if change is not None:
            weights = directory / "model.safetensors"
            save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
        return directory

    return edit


def section(directory: Path, quantization: str = "nf4") -> ModelSection:
    return ModelSection(path=str(directory), quantization=quantization, compute_dtype="float32")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 7}, "not a multiple of num_key_value_heads 2"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, r"hidden size \(64\) is not a multiple"),
        (
            {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": "absent"},
            "hidden_size 64, not a multiple of num_attention_heads 7",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads 0, expected a whole number from 1"),
        ({"num_attention_heads": -4}, "num_attention_heads -4, expected a whole number from 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4, not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 10**12}, "hidden_size 1000000000000, expected a whole number from 1 to 1,048,576"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, expected"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1, expected"),
        ({"vocab_size": "abc"}, "vocab_size 'abc', expected a whole number"),
        ({"intermediate_size": 2.5}, r"intermediate_size 2\.5, expected a whole number"),
    ],
)
def test_absurd_sizes_are_refused_by_name(edited: Any, config: dict[str, Any], message: str) -> None:
    directory = edited(**config)
    for refuse in (empty_model, load_base):
        with pytest.raises(InputError, match=rf"config\.json.*{message}"):
            refuse(section(directory))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_refused_with_both_counts(edited: Any, layers: int, quantization: str) -> None:
    directory = edited(num_hidden_layers=layers)
    with pytest.raises(InputError, match=rf"a model of {layers} layers .*the weights hold 2"):
        load_base(section(directory, quantization))
    with pytest.raises(InputError, match=rf"a model of {layers} layers .*the weights hold 2"):
        quantized_copy(section(directory), directory.parent / "out")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_untied_base_without_an_output_head_is_refused(edited: Any, quantization: str) -> None:
    directory = edited(lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(InputError, match=r"hold no lm_head\.weight.*random output head"):
        load_base(section(directory, quantization))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_tied_config_with_another_head_is_refused_and_with_the_same_one_taken(
    edited: Any, tmp_path: Path, quantization: str
) -> None:
    directory = edited(lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}, tied=True)
    assert load_base(section(directory, quantization)).facts["parameters"] > 0
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*tie_word_embeddings: false"
    ):
        load_base(section(directory, quantization))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_stored_as_integers_are_refused(edited: Any, name: str, quantization: str) -> None:
    directory = edited(lambda tensors: {k: v.to(torch.int32) if k == name else v for k, v in tensors.items()})
    with pytest.raises(
        InputError, match=rf"model\.safetensors: {name} is torch\.int32, expected a floating-point weight"
    ):
        load_base(section(directory, quantization))


def test_integers_in_a_quantized_checkpoint_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantized_copy(section(tiny_model_dir), out)
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int32)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight is torch\.int32"):
        load_base(section(out))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_weight_that_is_missing_from_the_middle_is_not_drawn_at_random(edited: Any, quantization: str) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    directory = edited(lambda tensors: {k: v for k, v in tensors.items() if k != gone})
    with pytest.raises(InputError, match=rf"hold no {gone}"):
        load_base(section(directory, quantization))
