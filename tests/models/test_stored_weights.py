"""A base read from its mapped file: the same model, without a copy of what is big."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qvera.adapters.layer import adapted_layers
from qvera.adapters.save_load import attach, load_adapter, save_adapter
from qvera.config.sections import AdapterSection, ModelSection
from qvera.evaluation.generate import generate, generating
from qvera.models import linear
from qvera.models.loader import load_base
from qvera.models.stored_weights import NotMappable, load_mapped
from qvera.utils.errors import InputError
from tests.conftest import small_llama
from tests.models.helpers import stock_four_bit, stock_load

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42]])
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight")


@pytest.fixture(scope="module")
def packed_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "nf4"
    return stock_four_bit(tiny_model_dir, out, bnb_4bit_quant_storage=torch.bfloat16)


def section(path: Path, dtype: str = "float32", **changes: Any) -> ModelSection:
    return ModelSection(path=str(path), compute_dtype=dtype, **changes)  # type: ignore[arg-type]


def lies_in(tensor: torch.Tensor, directory: Path) -> bool:
    """Whether a tensor's memory is a mapping of a file in this directory, as the kernel says."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(None, 5)
        low, high = (int(x, 16) for x in span.split("-"))
        if low <= tensor.data_ptr() < high:
            return bool(path) and path[0].startswith(str(directory))
    return False


def test_what_is_big_stays_in_the_file_and_in_its_dtype(packed_dir: Path) -> None:
    model = load_base(section(packed_dir), CPU).model
    for name, parameter in model.named_parameters():
        small = name.endswith(NORMS)
        assert parameter.dtype == (torch.float32 if small else torch.bfloat16), name
        assert lies_in(parameter, packed_dir) != small, name
        assert not parameter.requires_grad
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, linear.FrozenLinear4bit)]
    assert len(states) == 14
    assert all(lies_in(x, packed_dir) for state in states for x in (state.absmax, state.state2.absmax))
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("dtype", "storage", "double_quant"),
    [(torch.float32, torch.bfloat16, True), (torch.bfloat16, torch.uint8, False), (torch.float32, torch.uint8, True)],
)
def test_the_same_logits_as_quantizing_while_loading(
    tiny_model_dir: Path, tmp_path: Path, dtype: torch.dtype, storage: torch.dtype, double_quant: bool
) -> None:
    settings: dict[str, Any] = {"bnb_4bit_use_double_quant": double_quant}
    packed = stock_four_bit(tiny_model_dir, tmp_path / "nf4", bnb_4bit_quant_storage=storage, **settings)
    mapped = load_base(section(packed, str(dtype).removeprefix("torch."), double_quant=double_quant), CPU)
    stock = stock_load(tiny_model_dir, dtype, **settings)
    linear.freeze_linears(stock)
    with torch.no_grad():
        ours, theirs = mapped.model(IDS).logits, stock.eval()(IDS).logits
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    assert mapped.facts["quant_storage"] == str(storage).removeprefix("torch.")


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    source = tmp_path / "tied"
    small_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(source)
    packed = stock_four_bit(source, tmp_path / "nf4")
    model = load_base(section(packed), CPU).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert lies_in(model.lm_head.weight, packed)
    with torch.no_grad():
        assert model(IDS).logits.dtype == torch.float32


def test_a_16_bit_checkpoint_can_be_mapped_too(tiny_model_dir: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_model_dir).config
    model = load_mapped(tiny_model_dir, config, torch.float32, CPU)
    assert lies_in(model.model.layers[0].mlp.up_proj.weight, tiny_model_dir)
    whole = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)


def test_a_layer_that_is_not_quantized_is_adapted_in_the_compute_dtype(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = "model.layers.0.mlp.down_proj"
    stock_four_bit(tiny_model_dir, tmp_path, llm_int8_skip_modules=["lm_head", whole])
    model = attach(load_base(section(tmp_path), CPU).model, AdapterSection(rank=8))
    layer: Any = next(one for one in adapted_layers(model) if one.spec.name == whole)
    layer.cache_merged_weight(True, base_only=True)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert {one.dtype for one in (*layer.pair("default"), layer._inference_weight)} == {torch.float32}


def test_answers_hold_the_head_in_the_compute_dtype_and_let_go_of_it(packed_dir: Path) -> None:
    base = load_base(section(packed_dir), CPU)
    head = base.model.lm_head
    with generating(base.model):
        assert head._inference_weight is not None
        assert head._inference_weight.dtype == torch.float32
        assert torch.equal(head._inference_weight, head.weight.float())
    assert head._inference_weight is None
    assert generate(base.model, base.tokenizer, [[5, 9, 20]], max_new_tokens=4)


def test_names_that_are_not_the_models_go_the_old_way(packed_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(packed_dir, tmp_path / "renamed"))
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.surplus.weight"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    config = load_base(section(packed_dir), CPU).model.config
    with pytest.raises(NotMappable, match="no model.surplus.weight"):
        load_mapped(directory, config, torch.float32, CPU)
    loaded = load_base(section(directory), CPU)  # transformers ignores what it has no use for
    assert loaded.facts["four_bit_modules"] == 14


def test_a_config_of_another_shape_is_refused(packed_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(packed_dir, tmp_path / "other"))
    config = json.loads((directory / "config.json").read_text())
    config["intermediate_size"] = 256
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"down_proj.weight is stored as \[64, 192\].* config.json says \[64, 256\]"):
        load_base(section(directory), CPU)


def test_a_model_from_the_cache_goes_by_the_name_of_its_source(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = load_base(section(tiny_model_dir), CPU)
    assert not lies_in(base.model.lm_head.weight, tiny_model_dir)  # it is the quantized copy that is mapped
    assert base.model.name_or_path == base.model.config.name_or_path == str(tiny_model_dir)
    save_adapter(attach(base.model, AdapterSection(rank=8), str(tiny_model_dir)), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_adapter(load_base(section(tiny_model_dir), CPU).model, tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tiny_model_dir)
