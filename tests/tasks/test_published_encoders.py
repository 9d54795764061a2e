"""Encoders, GPT-2 and ViT, loaded from checkpoints as they are published: exact in 4 bits, forward and backward."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification

from qvera.adapters import QveraConfig, QveraLinear
from qvera.adapters.files.save_load import named_vectors, put_on
from qvera.config.schema import ExportSection, ModelSection
from qvera.evaluation.load import open_run
from qvera.exporting.merged import export_merged
from qvera.models.attention import needs_padding_mask, rows_joined
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.loader import load_base
from qvera.models.model_class import ModelClass, classification_class, image_class
from qvera.models.quantization import Linear4bit
from qvera.models.quantize_checkpoint import find_base
from qvera.training.trainer import train
from tests.adapters.helpers import dense_weight, perturb, relative
from tests.families import ENCODERS, Encoder
from tests.training.runs import cut_off

LABELS = ("colour", "fruit", "pet")
TEXTS = classification_class(LABELS)
IMAGES = image_class(LABELS)
_TEXT_MODELS = [name for name, encoder in ENCODERS.items() if not encoder.takes_images]
_FAST = ("roberta", "gpt2")


@pytest.fixture(scope="module", params=ENCODERS)
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Path]:
    """A family, and the directory of its tiny checkpoint."""
    directory = tmp_path_factory.mktemp("encoders") / request.param
    ENCODERS[request.param].write(directory)
    return ENCODERS[request.param], directory


def inputs_of(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Two rows, the second of which is padded; or two images."""
    generator = torch.Generator().manual_seed(1)
    if encoder.takes_images:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids, mask = torch.randint(3, 300, (2, 11), generator=generator), torch.ones(2, 11, dtype=torch.int64)
    ids[1, 7:] = mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class DenseVera(nn.Module):
    """W x + s b ⊙ (B (d ⊙ (A x))) in fp64, of an adapted layer."""

    def __init__(self, layer: QveraLinear) -> None:
        super().__init__()
        base, pair = layer.base_layer, layer.pair("default")
        assert pair is not None
        self.weight, self.A, self.B = dense_weight(base), *(x.double() for x in pair)
        self.bias = None if base.bias is None else base.bias.double()
        vectors, self.scale = layer.vectors("default"), layer.parts("default").scale
        self.d, self.b = (nn.Parameter(vectors[f"qvera_{name}"].detach().double()) for name in "db")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * self.b * F.linear(
            self.d * F.linear(x, self.A), self.B
        )


def dense_reference(model: Any, model_class: ModelClass) -> Any:
    """The adapted model in fp64, by transformers' own modules around `DenseVera`."""
    reference = model_class.from_config(copy.deepcopy(model.config)).double()
    adapted = {name for name, module in model.named_modules() if isinstance(module, QveraLinear)}
    for name, module in model.named_modules():
        if name in adapted:
            reference.set_submodule(name, DenseVera(module))
        elif not name.startswith(tuple(f"{one}." for one in adapted)):
            for key, parameter in module.named_parameters(recurse=False):
                is_packed = isinstance(module, Linear4bit) and key == "weight"
                value = dense_weight(module) if is_packed else parameter.detach().double()
                getattr(reference.get_submodule(name), key).data = value
    return reference


def gradients(model: Any, encoder: Encoder) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the gradients of the vectors in the order of the layers."""
    inputs = inputs_of(encoder)
    model.train()
    out = model(**inputs, labels=torch.tensor([0, 2]))
    layers = [m for m in model.modules() if isinstance(m, (QveraLinear, DenseVera))]
    parameters = [
        p
        for m in layers
        for p in ((m.d, m.b) if isinstance(m, DenseVera) else (m.vectors("default")[f"qvera_{n}"] for n in "db"))
    ]
    return out.logits.detach(), list(torch.autograd.grad(out.loss, parameters))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_logits_and_gradients_are_those_of_a_dense_model_in_fp64(
    quantization: str, checkpoint: tuple[Encoder, Path]
) -> None:
    encoder, directory = checkpoint
    model_class = IMAGES if encoder.takes_images else TEXTS
    section = ModelSection(path=str(directory), quantization=quantization, compute_dtype="float32")
    base = load_base(section, model_class=model_class).model
    if quantization == "nf4":
        is_mapped = find_base(section, model_class=model_class) is not None
        assert is_mapped == (encoder.four_bit == "mapped")
    model: Any = put_on(base, QveraConfig(rank=8))
    adapted = {n for n, m in base.named_modules() if isinstance(m, QveraLinear)}
    assert {name.rpartition(".")[2] for name in adapted} == set(encoder.targets.split())
    assert not any("pooler" in name or "classifier" in name for name in adapted)
    perturb(model)
    wanted, wanted_gradients = gradients(dense_reference(base, model_class), encoder)
    logits, found = gradients(model, encoder)
    assert relative(logits, wanted) < 1e-5
    assert len(found) == len(wanted_gradients) == 2 * len(adapted)
    for one, other in zip(found, wanted_gradients, strict=True):
        assert other.norm() > 0
        assert relative(one, other) < 1e-3
    enable_checkpointing(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, encoder)[1], found, strict=True))


def test_named_targets_are_those_layers(checkpoint: tuple[Encoder, Path]) -> None:
    encoder, directory = checkpoint
    section = ModelSection(path=str(directory), compute_dtype="float32")
    base = load_base(section, model_class=IMAGES if encoder.takes_images else TEXTS).model
    first = encoder.targets.split()[0]
    model = put_on(base, QveraConfig(rank=8, target_modules=[first]))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in named_vectors(model)} == {first}
    assert needs_padding_mask(base) == (encoder.model_type != "gpt2")
    assert not rows_joined(base, prefix_once=True, packing=False)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _FAST else pytest.mark.slow) for name in _TEXT_MODELS]
)
def test_a_run_learns_resumes_and_exports_its_classifier(name: str, classify: Any, tmp_path: Path) -> None:
    ENCODERS[name].write(tmp_path / "base")
    rows, words = tmp_path / "rows.jsonl", ("red", "plum", "cat")
    lines = [{"text": f"say {words[i % 3]} {i}", "label": LABELS[i % 3]} for i in range(10)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = classify(
        model={"path": str(tmp_path / "base")},
        data={"path": str(rows)},  # 8 of them are trained on in every step
        training={"max_steps": 20, "save_steps": 10, "learning_rate": 1e-2},
    )
    train(recipe, tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["result"]["train_loss_last"] < 0.8 * run["result"]["train_loss_first"]
    train(recipe, cut_off(tmp_path / "run", tmp_path / "cut", after=10), resume=True)
    written = [(tmp_path / one / "adapter" / "adapter_model.safetensors").read_bytes() for one in ("run", "cut")]
    assert written[0] == written[1]
    options = ExportSection(dtype="float32", base="dequantized")
    export_merged(tmp_path / "run" / "adapter", recipe.model, tmp_path / "merged", options)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    opened = open_run(tmp_path / "run").model.eval()
    assert merged.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        inputs = inputs_of(ENCODERS[name])
        torch.testing.assert_close(merged(**inputs).logits, opened(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_an_old_checkpoint_is_found_by_the_names_that_its_norms_had(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ENCODERS["bert"].write(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    section = ModelSection(path=str(tmp_path), compute_dtype="float32")
    with torch.no_grad():
        wanted = load_base(section, model_class=TEXTS).model(**inputs_of(ENCODERS["bert"])).logits
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(new, before)
        renamed[name] = tensor
    assert any(name.endswith("gamma") for name in renamed)
    save_file({**renamed, "embeddings.position_ids": torch.arange(128)[None]}, file, {"format": "pt"})
    model = load_base(section, model_class=TEXTS).model
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(ENCODERS["bert"])).logits, wanted)
    assert find_base(section, model_class=TEXTS) is not None


def test_a_bert_without_its_pooler_is_refused(tmp_path: Path) -> None:
    from qvera.utils.errors import InputError

    Encoder("BERT", "bert", "AutoModelForMaskedLM", "").write(tmp_path)
    with pytest.raises(InputError, match=r"the weights hold no bert\.pooler\.dense\.weight"):
        load_base(ModelSection(path=str(tmp_path)), model_class=TEXTS)
