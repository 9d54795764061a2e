"""Encoders and GPT-2 are classified as decoders are: their own heads, pairs of texts, padding, merged exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from qvera.cli.main import main
from qvera.data import build_datasets
from qvera.evaluation.load import open_run
from qvera.tasks.classification import SequenceClassification
from qvera.training.trainer import train
from tests.tasks.conftest import WORDS
from tests.tasks.encoders import FAMILIES, save_family, word_tokenizer

HEADS = {
    "bert": ["classifier"], "roberta": ["classifier"], "deberta-v2": ["classifier", "pooler"], "gpt2": ["score"],
}  # fmt: skip


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_its_head_and_exports_its_logits(
    family: str, quantization: str, classify: Any, tmp_path: Path
) -> None:
    base = save_family(family, tmp_path / "base")
    recipe = classify(model={"path": str(base), "quantization": quantization}, training={"max_steps": 3})
    train(recipe, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    heads = {name.split(".")[2] for name in tensors if "qvera" not in name}
    assert sorted(heads) == HEADS[family]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["adapter"]["head_parameters"] == sum(t.numel() for name, t in tensors.items() if "qvera" not in name)
    assert (run["model"]["four_bit_modules"] > 0) == (quantization == "nf4")

    opened = open_run(tmp_path / "run")
    datasets = build_datasets(recipe.data, opened.base.tokenizer, labels=opened.labels)
    with torch.no_grad():
        together = SequenceClassification().row_logits(opened.model, list(datasets.eval), datasets.pad_id)
        alone = torch.cat(
            [SequenceClassification().row_logits(opened.model, [row], datasets.pad_id) for row in datasets.eval]
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    command = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float32", "--base", "dequantized"]
    assert main(command) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ids = [torch.tensor(row.input_ids[None], dtype=torch.int64) for row in datasets.eval]
        merged = torch.cat([model(input_ids=one).logits for one in ids])
    torch.testing.assert_close(merged, together, rtol=1e-4, atol=1e-5)


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
        found = SequenceClassification().row_logits(opened.model, list(datasets.train[:2]), datasets.pad_id)
        encoded = word_tokenizer()([row["premise"] for row in pairs[:2]], [row["hypothesis"] for row in pairs[:2]])
        expected = opened.model(**{key: torch.tensor(value) for key, value in encoded.items()}).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_row_is_no_longer_than_its_model_takes(classify: Any, tmp_path: Path) -> None:
    rows = [{"text": "red " * 100, "label": 1}, {"text": "hen", "label": 0}, {"text": "plum", "label": 1}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = classify(data={"path": str(tmp_path / "long.jsonl"), "eval_fraction": 0.0, "max_length": 512})
    datasets = build_datasets(recipe.data, word_tokenizer())
    assert datasets.train.lengths.tolist() == [64, 3, 3]  # the tokenizer's model_max_length
    assert datasets.train[0].input_ids[-1] == 3  # still ends with [SEP]
    assert (datasets.stats.truncated_rows, datasets.stats.truncated_tokens) == (1, 38)
    dropped = build_datasets(recipe.data.replace(too_long="drop"), word_tokenizer()).stats.dropped
    assert list(dropped) == ["longer than the tokenizer's model_max_length (64)"]


def test_an_empty_second_text_is_none(classify: Any, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("premise,hypothesis,label\nred,plum,1\nhen,,0\nhen, ,1\n")
    recipe = classify(data={"path": str(tmp_path / "pairs.csv"), "eval_fraction": 0.0})
    datasets = build_datasets(recipe.data, word_tokenizer())
    assert datasets.train.lengths.tolist() == [5, 3, 3]  # [CLS] hen [SEP], without another [SEP]
