"""Encoders, GPT-2 and ViT from checkpoints as they are published: exact in 4 bits, with their own heads, pairs, exports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from qvera.adapters import QveraConfig, QveraLinear
from qvera.adapters.save_load import put_on
from qvera.cli.main import main
from qvera.config.sections import ModelSection
from qvera.data import build_datasets
from qvera.evaluation.load import open_run
from qvera.models.attention import needs_padding_mask, rows_joined
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.loader import load_base
from qvera.models.model_class import ModelClass, classification_class, image_class
from qvera.models.quantization import Linear4bit
from qvera.models.quantize_checkpoint import find_base
from qvera.tasks.classification import SequenceClassification
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import dense_weight, perturb, relative
from tests.families import ENCODERS, Encoder
from tests.tasks.conftest import WORDS
from tests.tasks.encoders import save_family, word_tokenizer

LABELS = ("colour", "fruit", "pet")
TEXTS, IMAGES = classification_class(LABELS), image_class(LABELS)
HEADS = {
    "bert": {"classifier"}, "roberta": {"classifier"}, "deberta-v2": {"classifier", "pooler"}, "gpt2": {"score"},
    "distilbert": {"classifier", "pre_classifier"}, "modernbert": {"classifier", "head"}, "gemma3": {"score"},
}  # fmt: skip
_SLOW = ("roberta", "distilbert", "gemma3")
"""The first two have their heads and layers as BERT; the last one has GPT-2's head."""
ROW_LOGITS = SequenceClassification().row_logits


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
        change = self.scale * self.b * F.linear(self.d * F.linear(x, self.A), self.B)
        return F.linear(x, self.weight, self.bias) + change


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
    out = model.train()(**inputs_of(encoder), labels=torch.tensor([0, 2]))
    parameters: list[Any] = []
    for module in model.modules():
        if isinstance(module, DenseVera):
            parameters += [module.d, module.b]
        elif isinstance(module, QveraLinear):
            parameters += [module.vectors("default")[f"qvera_{name}"] for name in "db"]
    return out.logits.detach(), list(torch.autograd.grad(out.loss, parameters))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=list(ENCODERS))
def test_logits_and_gradients_are_those_of_a_dense_model_in_fp64(
    quantization: str, encoder: Encoder, tmp_path: Path
) -> None:
    encoder.write(tmp_path)
    model_class = IMAGES if encoder.takes_images else TEXTS
    section = ModelSection(path=str(tmp_path), quantization=quantization, compute_dtype="float32")
    base = load_base(section, model_class=model_class).model
    if quantization == "nf4":
        is_mapped = find_base(section, model_class=model_class) is not None
        assert is_mapped == (encoder.four_bit == "mapped")
    assert needs_padding_mask(base) == (encoder.model_type != "gpt2")
    assert not rows_joined(base, prefix_once=True, packing=False)
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


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in _SLOW else ()) for n in HEADS])
def test_a_family_trains_its_head_and_exports_its_logits(name: str, classify: Any, tmp_path: Path) -> None:
    ENCODERS[name].write(tmp_path / "base")
    lines = [{"text": f"say {'again ' * (i % 4)}{i}", "label": LABELS[i % 3]} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = classify(
        model={"path": str(tmp_path / "base")},
        data={"path": str(tmp_path / "rows.jsonl")},  # 8 of them are trained on in every step
        training={"max_steps": 3, "learning_rate": 3e-3},
    )
    train(recipe, tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["result"]["train_loss_last"] < run["result"]["train_loss_first"]
    assert run["model"]["four_bit_modules"] > 0
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in tensors if "qvera" not in name} == HEADS[name]
    assert run["adapter"]["head_parameters"] == sum(t.numel() for name, t in tensors.items() if "qvera" not in name)

    opened = open_run(tmp_path / "run")
    rows = list(build_datasets(recipe.data, opened.base.tokenizer, labels=opened.labels).train)
    command = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float32", "--base", "dequantized"]
    assert main(command) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert merged.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        together = ROW_LOGITS(opened.model, rows, 0)
        by_row = [torch.tensor(row.input_ids[None], dtype=torch.int64) for row in rows]
        torch.testing.assert_close(
            torch.cat([merged(input_ids=one).logits for one in by_row]), together, rtol=1e-4, atol=1e-4
        )


def test_an_old_checkpoint_is_found_by_the_names_that_its_norms_had(tmp_path: Path) -> None:
    ENCODERS["bert"].write(tmp_path)
    file = tmp_path / "model.safetensors"
    section = ModelSection(path=str(tmp_path), compute_dtype="float32")
    with torch.no_grad():
        wanted = load_base(section, model_class=TEXTS).model(**inputs_of(ENCODERS["bert"])).logits
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(file).items()
    }
    assert any(name.endswith("gamma") for name in renamed)
    save_file({**renamed, "embeddings.position_ids": torch.arange(128)[None]}, file, {"format": "pt"})
    model = load_base(section, model_class=TEXTS).model
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(ENCODERS["bert"])).logits, wanted)
    assert find_base(section, model_class=TEXTS) is not None


def test_a_bert_without_its_pooler_is_refused(tmp_path: Path) -> None:
    Encoder("BERT", "bert", "AutoModelForMaskedLM", "").write(tmp_path)
    with pytest.raises(InputError, match=r"the weights hold no bert\.pooler\.dense\.weight"):
        load_base(ModelSection(path=str(tmp_path)), model_class=TEXTS)


def test_the_second_text_of_a_pair_has_its_token_type(classify: Any, tmp_path: Path) -> None:
    base = save_family("bert", tmp_path / "base")
    pairs = [{"premise": w, "hypothesis": f"say {w}", "label": name} for name, ws in WORDS.items() for w in ws]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    recipe = classify(
        model={"path": str(base), "quantization": "none"},
        data={"path": str(tmp_path / "pairs.jsonl"), "eval_fraction": 0.0},
        training={"max_steps": 1},
    )
    datasets = build_datasets(recipe.data, word_tokenizer())
    assert datasets.train[0].pair_start == 3  # [CLS] plum [SEP]
    train(recipe, tmp_path / "run")
    opened = open_run(tmp_path / "run")
    with torch.no_grad():
        found = ROW_LOGITS(opened.model, list(datasets.train[:2]), datasets.pad_id)
        encoded = word_tokenizer()([row["premise"] for row in pairs[:2]], [row["hypothesis"] for row in pairs[:2]])
        expected = opened.model(**{key: torch.tensor(value) for key, value in encoded.items()}).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_row_is_no_longer_than_its_model_takes_and_an_empty_second_text_is_none(
    classify: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label\n{'red ' * 100},1\nhen,0\nplum,1\n")
    section = classify(data={"path": str(path), "eval_fraction": 0.0, "max_length": 512}).data
    datasets = build_datasets(section, word_tokenizer())
    assert datasets.train.lengths.tolist() == [64, 3, 3]  # the tokenizer's model_max_length
    assert datasets.train[0].input_ids[-1] == 3  # still ends with [SEP]
    assert (datasets.stats.truncated_rows, datasets.stats.truncated_tokens) == (1, 38)
    dropped = build_datasets(section.replace(too_long="drop"), word_tokenizer()).stats.dropped
    assert list(dropped) == ["longer than the tokenizer's model_max_length (64)"]
    path.write_text("premise,hypothesis,label\nred,plum,1\nhen,,0\nhen, ,1\n")
    datasets = build_datasets(section, word_tokenizer())
    assert datasets.train.lengths.tolist() == [5, 3, 3]  # [CLS] hen [SEP], without another [SEP]
