"""What is written from a model that takes images has the names of the published files, and all of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel

from qvera.adapters.save_load import attach, save_adapter
from qvera.config.sections import AdapterSection, DataSection, ExportSection, ModelSection
from qvera.data import build_datasets
from qvera.data.images import images_of
from qvera.exporting.compare import measure_difference
from qvera.exporting.deltas import read_deltas
from qvera.exporting.lora import export_lora, export_stock_vera
from qvera.exporting.merged import export_merged
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.models.quantization import Linear4bit
from qvera.models.quantize_checkpoint import quantized_copy
from qvera.models.tokenizer import load_tokenizer
from qvera.utils.errors import Interrupted
from qvera.utils.safetensors_io import checkpoint_tensors
from tests.adapters.helpers import perturb, relative
from tests.exporting.helpers import trained_adapter
from tests.families import FAMILIES
from tests.image_text import IMAGE_FAMILIES, given_by_processor, image_rows
from tests.models.experts import add_delta, dense_base, published

IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ["mistral3", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("gemma3", "qwen2_5_vl"))]
)
@torch.no_grad()
def test_all_that_is_written_has_the_names_of_the_published_files(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    FAMILIES[name].write(directory)
    (directory / "processor_config.json").write_text('{"image_seq_length": 4}')
    section = ModelSection(path=str(directory), compute_dtype="float32")
    model = perturb(attach(load_base(section).model, AdapterSection(rank=8), section.path))
    save_adapter(model, tmp_path / "adapter")
    twin = dense_base(model, directory)

    quantized_copy(section, tmp_path / "quantized")
    stock = published(tmp_path / "quantized")  # on a CPU bitsandbytes multiplies in 16 bits
    assert relative(stock(input_ids=IDS).logits, twin(input_ids=IDS).logits) < 0.02

    export_stock_vera(read_deltas(tmp_path / "adapter", empty_model(section)), tmp_path / "vera")
    add_delta(model, twin)
    expected = twin(input_ids=IDS).logits
    stock = PeftModel.from_pretrained(dense_base(model, directory).float(), tmp_path / "vera").eval()
    torch.testing.assert_close(stock(input_ids=IDS).logits.double(), expected, rtol=1e-4, atol=1e-4)

    export_merged(
        tmp_path / "adapter", section, tmp_path / "merged", ExportSection(dtype="float32", base="dequantized")
    )
    assert (tmp_path / "merged" / "processor_config.json").read_text() == '{"image_seq_length": 4}'
    names = [[entry.name for entry in checkpoint_tensors(place)] for place in (directory, tmp_path / "merged")]
    assert names[0] == names[1]
    merged: Any = published(tmp_path / "merged").state_dict()
    for key, tensor in twin.state_dict().items():  # the tower's too
        torch.testing.assert_close(merged[key].double(), tensor, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rows_that_transformers_splits_are_one_tensor_again_also_where_an_export_goes_on(tmp_path: Path) -> None:
    """Sarvam's files have q, k and v in one, and single experts."""
    FAMILIES["sarvam_moe"].write(tmp_path / "base")
    section = ModelSection(path=str(tmp_path / "base"), compute_dtype="float32")
    model = perturb(attach(load_base(section).model, AdapterSection(rank=8), section.path))
    save_adapter(model, tmp_path / "adapter")
    options = ExportSection(dtype="float32", base="dequantized", max_shard_size_bytes=100_000)

    def stop_after_three(done: int, _total: int, _name: str) -> None:
        if len(list((tmp_path / "merged").glob("*.safetensors"))) == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        export_merged(tmp_path / "adapter", section, tmp_path / "merged", options, progress=stop_after_three)
    export_merged(tmp_path / "adapter", section, tmp_path / "merged", options)
    written, of_base = ({e.name: e.shape for e in checkpoint_tensors(tmp_path / at)} for at in ("merged", "base"))
    assert written == of_base
    assert any("query_key_value" in name for name in written)
    expected = model(input_ids=IDS).logits
    torch.testing.assert_close(published(tmp_path / "merged")(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(name, marks=pytest.mark.matrix) for name in IMAGE_FAMILIES if name != "gemma3")]
)
@torch.no_grad()
def test_exports_onto_a_quantized_directory_answer_images_as_the_trained_model(name: str, tmp_path: Path) -> None:
    """Plain transformers opens the directory by the class that its config names, and every number of it is ours."""
    for package in IMAGE_FAMILIES[name].needs:
        pytest.importorskip(package)
    base, rows = IMAGE_FAMILIES[name].write(tmp_path / "base"), image_rows(tmp_path)
    quantized_copy(ModelSection(path=str(base)), tmp_path / "quantized")
    section = ModelSection(path=str(tmp_path / "quantized"), compute_dtype="float32")
    model, _, adapter = trained_adapter(tmp_path / "quantized", tmp_path / "adapter")
    if not name.endswith("_moe"):  # transformers reads no experts in 4 bits
        plain, ours = published(tmp_path / "quantized"), dict(load_base(section).model.named_modules())
        packed = {key: module for key, module in plain.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
        assert packed.keys() == {key for key, module in ours.items() if isinstance(module, Linear4bit)}
        for key, module in packed.items():
            state, own = (m.weight.quant_state.as_dict(packed=True) for m in (module, ours[key]))
            assert state.keys() == own.keys()
            assert all(torch.equal(state[part].flatten(), own[part].flatten()) for part in state)
            stored, own_stored = (m.weight.data.flatten().view(torch.uint8) for m in (module, ours[key]))
            assert torch.equal(stored, own_stored)

    export_merged(adapter, section, tmp_path / "merged", ExportSection(dtype="float32"))
    export_lora(read_deltas(adapter, empty_model(section)), tmp_path / "lora", torch.float32)
    dense = dense_base(model, base).float()
    merged, lora = published(tmp_path / "merged"), PeftModel.from_pretrained(dense, tmp_path / "lora").eval()
    tokenizer = load_tokenizer(section)
    images = images_of(tokenizer)
    assert images is not None
    for given in given_by_processor(images.processor, rows):  # with an image, with two, and without
        wanted = model(**given).logits
        torch.testing.assert_close(merged(**given).logits, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lora(**given).logits, wanted, rtol=1e-4, atol=1e-4)
        with lora.disable_adapter():
            assert (lora(**given).logits - wanted).abs().max() > 0.05
    datasets = build_datasets(DataSection(path=str(rows), max_length=512), tokenizer)
    found = measure_difference(model, tmp_path / "merged", [*datasets.train], datasets.pad_id)
    assert found["answers_agree"] == found["rows"] == 4
    assert found["kl_max"] < 1e-6


def test_a_chat_template_in_a_file_of_the_processor_is_the_models(tmp_path: Path) -> None:
    FAMILIES["idefics3"].write(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content[0].text }}"}')
    assert load_tokenizer(ModelSection(path=str(tmp_path))).chat_template == "{{ messages[0].content[0].text }}"
