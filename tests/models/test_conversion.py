"""Checkpoints in MXFP4 and FP8: decoded on their way into 4 bits, to the bytes of the checkpoint in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qvera.adapters.save_load import attach, save_adapter
from qvera.config.sections import AdapterSection, ExportSection, ModelSection
from qvera.exporting.deltas import read_deltas
from qvera.exporting.lora import export_lora, require_kept_by_peft
from qvera.exporting.merged import export_merged
from qvera.models.conversion import from_fp8
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.models.quantize_checkpoint import cached_base
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from qvera.utils.safetensors_io import checkpoint_tensors
from tests.adapters.helpers import perturb
from tests.conftest import small_llama, small_tokenizer
from tests.models.experts import write

IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))


def store(directory: Path, tensors: dict[str, torch.Tensor], method: dict[str, Any]) -> Path:
    """The checkpoint with other tensors, and a config that says how they are stored."""
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return directory


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A gpt-oss with random experts in MXFP4, and the same in 16 bits as transformers decodes it."""
    root, generator = tmp_path_factory.mktemp("mxfp4"), torch.Generator().manual_seed(1)
    plain = write("gpt_oss", root / "plain", dtype=torch.bfloat16)
    tensors = load_file(plain / "model.safetensors")
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, columns = packed.pop(name).transpose(1, 2).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    write("gpt_oss", root / "packed", dtype=torch.bfloat16)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    return store(root / "packed", packed, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}), plain


def stored_as_fp8(packed: Path, plain: Path) -> tuple[Path, Path]:
    """Two copies of a checkpoint: one gets linears in FP8 with a factor for each block of 128 x 128, one the same decoded."""
    tensors = load_file(plain / "model.safetensors")
    coded = dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj")):
            continue
        *stack, rows, columns = weight.shape
        blocks = *stack, -(-rows // 128), -(-columns // 128)
        factors = torch.rand(blocks, generator=torch.Generator().manual_seed(2)) * 1e-3 + 1e-3
        spread = factors.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., :rows, :columns]
        coded[name] = (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        coded[f"{name}_scale_inv"] = factors
        tensors[name] = (coded[name].float() * spread).to(torch.bfloat16)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    return store(packed, coded, {"quant_method": "fp8", "weight_block_size": [128, 128]}), plain


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama."""
    root = tmp_path_factory.mktemp("fp8")
    for name in ("packed", "plain"):
        small_llama(hidden_size=256, intermediate_size=320).to(torch.bfloat16).save_pretrained(root / name)
        small_tokenizer().save_pretrained(root / name)
    return stored_as_fp8(root / "packed", root / "plain")


@pytest.fixture(scope="module")
def fp8_experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Single experts, as Qwen3-30B-A3B-FP8 has them."""
    root, sizes = tmp_path_factory.mktemp("fp8_experts"), {"hidden_size": 256, "moe_intermediate_size": 192}
    made = (write("qwen3_moe", root / name, torch.bfloat16, **sizes) for name in ("packed", "plain"))
    return stored_as_fp8(*made)


@pytest.fixture(scope="module")
def fp8_stacks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stacked experts, the rows of which do not fill their blocks."""
    root, sizes = tmp_path_factory.mktemp("fp8_stacks"), {"hidden_size": 192, "intermediate_size": 64}
    made = (write("gpt_oss", root / name, torch.bfloat16, **sizes) for name in ("packed", "plain"))
    return stored_as_fp8(*made)


@pytest.fixture(params=["mxfp4", "fp8", "fp8_experts", "fp8_stacks"])
def pair(request: Any) -> tuple[Path, Path]:
    return request.getfixturevalue(request.param)


def section(directory: Path) -> ModelSection:
    return ModelSection(path=str(directory), compute_dtype="float32")


def test_the_quantized_copy_has_the_bytes_of_that_of_the_decoded_checkpoint(pair: tuple[Path, Path]) -> None:
    copies = [load_all(cached_base(section(directory))) for directory in pair]
    assert copies[0].keys() == copies[1].keys()
    for name, tensor in copies[0].items():
        assert torch.equal(tensor.view(torch.uint8), copies[1][name].view(torch.uint8)), name
    with torch.no_grad():
        ours, theirs = (load_base(section(directory)).model(input_ids=IDS).logits for directory in pair)
    assert torch.equal(ours, theirs)


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    files = {entry.file for entry in checkpoint_tensors(directory)}
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_a_run_on_it_is_planned_and_its_merged_export_opened(
    pair: tuple[Path, Path], make_recipe: Any, tmp_path: Path
) -> None:
    train(make_recipe(model=section(pair[0]).to_dict(), training={"max_steps": 1}), tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["plan"]["fits"] and run["model"]["quantization"] == "nf4"
    model = perturb(attach(load_base(section(pair[0])).model, AdapterSection(rank=8), str(pair[0])))
    save_adapter(model, tmp_path / "adapter")
    options = ExportSection(dtype="float32", base="dequantized")
    export_merged(tmp_path / "adapter", section(pair[0]), tmp_path / "merged", options)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_was_trained_on_the_decoded_weights_in_16_bits_is_exported_as_a_lora_alone(
    mxfp4: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = ModelSection(path=str(mxfp4[0]), quantization="none")
    base = load_base(whole)
    save_adapter(perturb(attach(base.model, AdapterSection(rank=8), whole.path)), tmp_path / "adapter")
    with pytest.raises(
        InputError, match=r"are in mxfp4, .* not with model.quantization: none. `qvera export --to lora`"
    ):
        export_merged(tmp_path / "adapter", whole, tmp_path / "merged", ExportSection())
    empty = empty_model(whole)
    adapter = read_deltas(tmp_path / "adapter", empty)
    export_lora(adapter, tmp_path / "lora", torch.float32, places=require_kept_by_peft(adapter, empty))
    assert PeftModel.from_pretrained(load_base(whole).model, str(tmp_path / "lora")).peft_config["default"].r == 8


@pytest.mark.parametrize(
    "factors", [torch.tensor(0.5), torch.rand(300, 1), torch.rand(3, 2)], ids=["one", "row", "block"]
)
def test_fp8_has_one_factor_or_one_a_row_or_one_a_block(factors: torch.Tensor) -> None:
    rows = torch.randn(300, 200).to(torch.float8_e4m3fn)
    spread = factors.view(1, 1) if factors.dim() == 0 else factors
    high, wide = {1: (300, 200), 300: (1, 200), 3: (128, 128)}[len(spread)]
    spread = spread.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:300, :200]
    expected = (rows.float() * spread).to(torch.bfloat16)
    assert torch.equal(from_fp8(rows, factors, 0, 300), expected)
    assert torch.equal(from_fp8(rows[100:250], factors, 100, 300), expected[100:250])
