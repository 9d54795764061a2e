"""A merged export where the base itself is stored in 4 bits, by `qvera quantize` or by transformers."""

from __future__ import annotations

import json
from collections import ChainMap
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qvera.adapters.save_load import attach, save_adapter
from qvera.cli.main import main
from qvera.config.sections import AdapterSection, ExportSection, ModelSection
from qvera.exporting.merged import export_merged
from qvera.models import quantization, quantize_checkpoint, safetensors_stream
from qvera.models.loader import load_base
from qvera.utils.errors import InputError
from tests.adapters.helpers import perturb
from tests.exporting.helpers import deltas
from tests.models.helpers import stock_four_bit

pytestmark = pytest.mark.process

EXACT = ExportSection(dtype="float32", max_shard_size_bytes=60_000)


def quantized(base: Path, out: Path) -> ModelSection:
    """NF4, double quantized, in several shards."""
    section = ModelSection(path=str(base), compute_dtype="float32")
    with mock.patch.object(quantize_checkpoint, "SHARD_BYTES", 30_000):
        quantize_checkpoint.quantize_checkpoint(section, quantize_checkpoint.read_source(section, base), out)
    return section.replace(path=str(out))


def saved_by_transformers(base: Path, out: Path) -> ModelSection:
    """In another order: a weight's statistics are not right behind it."""
    settings: dict[str, Any] = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    stock_four_bit(base, out, dtype=torch.float32, **settings)
    return ModelSection(
        path=str(out), compute_dtype="float32", quantization="fp4", double_quant=False, quant_storage="uint8"
    )


@pytest.mark.parametrize("store", [quantized, saved_by_transformers])
def test_every_weight_is_what_the_stored_base_dequantizes_to_plus_delta(
    store: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_stream, "FILE_BLOCK_ELEMENTS", 5 * 64)
    section = store(tiny_model_dir, tmp_path / "stored")
    loaded = load_base(section)
    expected = {name: tensor.float() for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()}
    linears = {f"{n}.weight": m for n, m in loaded.model.named_modules() if isinstance(m, quantization.Linear4bit)}
    expected |= {name: quantization.dequantized_weight(module, torch.float32) for name, module in linears.items()}
    model = perturb(attach(loaded.model, AdapterSection(rank=8), section.path, loaded.facts["fingerprint"]))
    save_adapter(model, tmp_path / "adapter")
    certificate = export_merged(tmp_path / "adapter", section, tmp_path / "out", EXACT)
    change = deltas(model)
    assert change.keys() == linears.keys() and len(change) == 14
    expected |= {name: expected[name] + change[name] for name in change}
    found = [load_file(tmp_path / "out" / file) for file in certificate["files"]]
    assert len(found) > 1
    torch.testing.assert_close(dict(ChainMap(*found)), expected, rtol=0, atol=1e-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    ids = torch.arange(3, 43).view(2, 20)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert (certificate["base"]["weights"], certificate["base"]["stored_in_4_bits"]) == ("dequantized", True)
    assert list(certificate["trained_on"].values()) == [section.quantization, section.double_quant]
    assert set(certificate["base"]["sha256"]) == {f.name for f in (tmp_path / "stored").glob("*.safetensors")}


def test_it_has_the_bytes_of_an_export_of_the_16_bit_base(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantized while loading or before, the weights are the same; and an adapter of one goes with the other."""
    stored = quantized(tiny_model_dir, tmp_path / "stored").path
    section = ModelSection(path=str(tiny_model_dir))
    loaded = load_base(section)
    model = perturb(attach(loaded.model, AdapterSection(rank=8), stored, loaded.facts["fingerprint"]))
    save_adapter(model, tmp_path / "adapter")
    options = ExportSection(dtype="float32")
    whole = export_merged(tmp_path / "adapter", section, tmp_path / "whole", options)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert f"merged into the dequantized weights of {stored}, which is stored in 4 bits" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "qvera_export.json").read_text())
    assert found["trained_on"] == whole["trained_on"] == {"quantization": "nf4", "double_quant": True}
    source, out = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    torch.testing.assert_close(out, source, rtol=0, atol=0)


def test_what_a_stored_base_has_not_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    section = ModelSection(path=str(tiny_model_dir), compute_dtype="float32")
    save_adapter(attach(load_base(section).model, AdapterSection(rank=8), section.path), tmp_path / "adapter")
    section, stored = quantized(tiny_model_dir, tmp_path / "stored"), tmp_path / "stored"

    def export(message: str, base: str = "dequantized") -> None:
        with pytest.raises(InputError, match=message):
            export_merged(tmp_path / "adapter", section, tmp_path / "out", ExportSection(base=base))  # type: ignore[arg-type]
        assert not (tmp_path / "out" / "config.json").exists()

    export("--base original: .* is stored in 4 bits", base="original")
    file = next(file for file in stored.glob("*.safetensors") if any("absmax" in name for name in load_file(file)))
    tensors = load_file(file)
    absmax = next(name for name in tensors if name.endswith(".nested_absmax"))
    save_file({name: tensor for name, tensor in tensors.items() if name != absmax}, file)
    (stored / "model.safetensors.index.json").unlink()
    export("the 4-bit statistics of .* are not whole")
    state = next(name for name in tensors if "quant_state" in name)
    save_file({**tensors, state: torch.zeros_like(tensors[state])}, file)
    export("quant_state.* can't be read")
    for one in stored.glob("*.safetensors"):
        save_file({name: t for name, t in load_file(one).items() if "quant_" not in name and "absmax" not in name}, one)
    export("is stored quantized, and not in bitsandbytes' 4 bits")
