"""A base made as another class than a causal language model: the same quantized weights, and a head of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from qvera.config.schema import ModelSection
from qvera.models.loader import Base, load_base
from qvera.models.model_class import classification_class
from tests.conftest import small_llama, small_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 9], [8, 4, 0, 0]])


def classifier(directory: Path, *labels: str, seed: int = 0, **settings: str) -> Base:
    section = ModelSection(path=str(directory), **{"compute_dtype": "float32", **settings})
    return load_base(section, CPU, model_class=classification_class(labels, seed=seed))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_head_is_drawn_from_the_seed_and_the_rest_is_the_language_models(
    tiny_model_dir: Path, quantization: str
) -> None:
    language_model = load_base(
        ModelSection(path=str(tiny_model_dir), compute_dtype="float32", quantization=quantization), CPU
    ).model
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
    assert len([path for path in (tmp_path / "bases").iterdir() if path.name.startswith("nf4-")]) == 1


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_checkpoint_with_a_head_of_the_same_labels_starts_from_it(tmp_path: Path, quantization: str) -> None:
    config = small_llama().config
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    stored = LlamaForSequenceClassification(config)
    stored.save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    kept = classifier(tmp_path, "no", "yes", quantization=quantization).model
    assert torch.equal(kept.score.weight, stored.score.weight)
    assert type(kept.score) is torch.nn.Linear
    for labels in (("yes", "no"), ("a", "b", "c")):  # outputs of another meaning, of another number
        fresh = classifier(tmp_path, *labels, quantization=quantization).model
        assert fresh.score.weight.shape == (len(labels), 64)
        assert not torch.equal(fresh.score.weight[:2], stored.score.weight)
    assert torch.equal(kept.model.embed_tokens.weight.float(), stored.model.embed_tokens.weight)
