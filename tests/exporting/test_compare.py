"""What the certificate of an export measures: tokens, answers, and in which precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qvera.config.sections import ExportSection
from qvera.data import Example
from qvera.exporting import compare
from qvera.exporting.compare import difference_text, measure_difference
from qvera.exporting.merged import export_merged
from tests.exporting.helpers import trained_adapter

LENGTHS = (4, 30, 5, 6, 19, 7)  # the short rows have one trained token, the others half of theirs


def rows() -> list[Example]:
    draw, nothing = np.random.default_rng(0), np.empty(0, np.int32)
    drawn = [(n, draw.integers(3, 300, size=n).astype(np.int32)) for n in LENGTHS]
    return [Example(ids, np.arange(n) >= (n - 1 if n < 8 else n // 2), "", nothing, "", None) for n, ids in drawn]


@pytest.fixture(scope="module")
def exported(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A trained model over an NF4 base, and its fp16 export onto the original weights."""
    out = tmp_path_factory.mktemp("compare")
    model, section, adapter = trained_adapter(tiny_model_dir, out / "adapter")
    export_merged(adapter, section, out / "merged", ExportSection(base="original"))
    return model, out / "merged"


def test_tokens_and_answers_are_counted(exported: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, merged = exported
    examples = rows()
    found = measure_difference(model, merged, examples, 0)
    assert (found["rows"], found["tokens"]) == (6, sum(e.trained_tokens for e in examples))
    plain = compare.load_exported(merged, torch.device("cpu"))
    agree, losses = [], [0.0, 0.0]
    for example in examples:
        ids = torch.from_numpy(np.asarray(example.input_ids, dtype=np.int64))[None]
        kept = torch.from_numpy(np.asarray(example.trained))[1:]
        with torch.no_grad():
            both = [m(input_ids=ids).logits[0, :-1][kept] for m in (model, plain)]
        assert both[1].dtype == torch.float32  # a CPU without 16-bit instructions would take minutes in float16
        agree.append(both[0].argmax(-1) == both[1].argmax(-1))
        for i, logits in enumerate(both):
            losses[i] += torch.nn.functional.cross_entropy(logits, ids[0, 1:][kept], reduction="sum").item()
    assert found["top1_agreement"] == pytest.approx(torch.cat(agree).double().mean().item())
    assert found["answers_agree"] == sum(bool(row.all()) for row in agree)
    assert found["loss_trained"] == pytest.approx(losses[0] / found["tokens"], rel=1e-5)
    assert found["loss_exported"] == pytest.approx(losses[1] / found["tokens"], rel=1e-5)
    assert 0 < found["answers_agree"] < 6, "the comparison has to have both kinds of answers to show anything"
    monkeypatch.setattr(compare, "BATCH_TOKENS", 1)  # each row alone
    alone = measure_difference(model, merged, examples, 0)
    assert alone.pop("unit") == found.pop("unit") == "token"
    assert alone == pytest.approx(found, rel=1e-4, abs=1e-6)


def test_an_export_has_the_code_of_a_base_that_needs_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (base / "config.json").write_text(json.dumps(config))
    own = "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    is_own = True\n"
    (base / "own.py").write_text(own)
    model, section, adapter = trained_adapter(base, tmp_path / "adapter", {"trust_remote_code": True})
    export_merged(adapter, section, tmp_path / "merged", ExportSection(base="original"))
    found = measure_difference(model, tmp_path / "merged", rows(), 0, trust_remote_code=True)
    assert found["rows"] == len(LENGTHS)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).is_own


def test_the_text_says_answers_and_which_base_is_nearer() -> None:
    found = {"rows": 12, "loss_trained": 0.2, "loss_exported": 0.3, "kl_mean": 0.01, "top1_agreement": 0.929}
    some, whole = ({**found, "answers_agree": n} for n in (8, 12))
    assert "92.9% of the tokens and throughout 8 of 12 answers" in difference_text(some, "original")
    assert "--base dequantized merges onto the base it was trained on" in difference_text(some, "original")
    assert "--base" not in difference_text(whole, "original") + difference_text(some, "dequantized")
    assert difference_text({"not_measured": "the data is gone"}, "original") == "not measured: the data is gone"
