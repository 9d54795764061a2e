"""Rows and answers that are longer than a model's table of positions, its context, or its rotary embeddings' first length."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM, MambaConfig, OPTConfig, OPTForCausalLM, XLNetConfig

from qvera.cli.main import main
from qvera.cli.serve import start_engine
from qvera.config.schema import parse_recipe
from qvera.data import Example
from qvera.evaluation.generate import generate, generate_tokens, require_context
from qvera.evaluation.held_out import held_out_loss
from qvera.models.structure import context_limit, context_tokens, position_limit
from qvera.serve.opening import open_served
from qvera.serve.requests import EngineSettings
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.conftest import small_llama, small_tokenizer
from tests.data.rows import rows_of
from tests.families import FAMILIES
from tests.serve.helpers import request, submit
from tests.tasks.encoders import save_family


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 64 positions."""
    return save_family("gpt2", tmp_path_factory.mktemp("gpt2"))


def test_the_limit_is_the_length_of_the_table(gpt2: Path, tmp_path: Path) -> None:
    """RoBERTa begins behind the padding's id, which is 0 here: one of its 66 rows stays unused; OPT at its offset."""
    assert position_limit(AutoModel.from_pretrained(gpt2)) == 64
    assert position_limit(AutoModel.from_pretrained(save_family("roberta", tmp_path))) == 65
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    opt = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32))
    assert position_limit(opt) == 32
    assert position_limit(small_llama()) is None
    assert context_limit(small_llama(max_position_embeddings=48)) == 48
    assert context_limit(AutoModel.from_pretrained(save_family("roberta", tmp_path / "again"))) == 65


def test_rows_beyond_the_table_are_refused_before_the_first_step(gpt2: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"say {n} " * 60}) + "\n" for n in range(8)))
    tree: dict[str, Any] = {
        "model": {"path": str(gpt2), "compute_dtype": "float32"},
        "data": {"path": str(rows), "max_length": 100, "eval_fraction": 0.2},
        "training": {"max_steps": 1, "output_dir": str(tmp_path / "run"), "report_to": [], "sample_count": 0},
    }
    with pytest.raises(InputError, match="data.max_length: a row has 100 tokens, and the model has positions for 64"):
        train(parse_recipe(tree, "t"), tmp_path / "run")
    with pytest.raises(InputError, match="positions for 64"):
        train(parse_recipe(tree, "t"), tmp_path / "dry", dry_run=True)
    tree["data"]["max_length"] = 64
    result = train(parse_recipe(tree, "t"), tmp_path / "again")
    assert result is not None and result.run["status"] == "done"


def test_a_context_that_is_not_named_is_without_end() -> None:
    assert context_tokens(small_llama().config) == 256
    assert context_tokens(MambaConfig()) == context_tokens(XLNetConfig()) == 2**31


def test_an_answer_ends_where_the_positions_do(gpt2: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2), small_tokenizer()
    prompt = [5] * 60
    answers = generate(model, tokenizer, [prompt, prompt[:30]], max_new_tokens=1000, batch_size=2)
    assert len(answers) == 2
    with pytest.raises(InputError, match="a prompt has 64 tokens, and the model has positions for 64"):
        generate(model, tokenizer, [[5] * 64], max_new_tokens=1)


def test_a_longer_prompt_beside_it_cuts_no_answer() -> None:
    """Both models end answers where their context does, though this one has no table of positions."""
    model, tokenizer = small_llama(max_position_embeddings=64).eval(), small_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    prompts = [[5] * 60, [7] * 30, [9] * 30]
    answers = generate_tokens(model, tokenizer, prompts, max_new_tokens=1000, batch_size=3)
    assert [len(answer) for answer in answers] == [4, 34, 34]
    with pytest.raises(InputError, match="^p.txt:2: the prompt has 3,000 tokens, and the model's context 64, the"):
        require_context(model, [("p.txt:1", [5] * 63), ("p.txt:2", [5] * 3000)])


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi-3 whose rotary embeddings change for all rows of a pass with more than 16 tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0] * 8}
    rope |= {"long_factor": [4.0] * 8, "original_max_position_embeddings": 16}
    changes = {"sliding_window": None, "original_max_position_embeddings": 16, "rope_parameters": rope}
    directory = tmp_path_factory.mktemp("models") / "longrope"
    dataclasses.replace(FAMILIES["phi3"], changes=changes).write(directory)
    return directory


def test_a_long_prompt_does_not_change_the_rotary_embeddings_of_a_short_one(longrope: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(longrope).eval(), small_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    crossing = [list(range(40, 52)), list(range(60, 72)), list(range(80, 90)), list(range(90, 106))]
    prompts = [[5, 6, 7], *crossing, list(range(100, 117)), list(range(60, 100))]

    def alone(prompt: list[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(9):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    with torch.no_grad():
        expected = [alone(prompt) for prompt in prompts]
    assert generate_tokens(model, tokenizer, prompts, max_new_tokens=9) == expected
    assert generate_tokens(model, tokenizer, prompts[::6], max_new_tokens=9) == expected[::6]
    prefixed = [[*range(100, 116), *end] for end in ([7] * 6, [9] * 3)]  # what they have in common is short enough
    with torch.no_grad():
        expected = [alone(prompt) for prompt in prefixed]
    assert generate_tokens(model, tokenizer, prefixed, max_new_tokens=9) == expected


def test_a_long_held_out_row_does_not_change_the_loss_of_a_short_one(longrope: Path) -> None:
    model, rows = AutoModelForCausalLM.from_pretrained(longrope).eval(), rows_of(10, 40, 16, 17)

    def loss(examples: list[Example]) -> float:
        found = held_out_loss(model, examples, pad_id=0, batch_size=8, chunk_tokens=64)
        return float(found["loss"]) * int(found["trained_tokens"])

    assert loss(rows) == pytest.approx(sum(loss([row]) for row in rows), rel=1e-5)


def test_rows_that_change_each_other_s_rotary_embeddings_are_told(
    longrope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    rows.write_text("".join(json.dumps({"text": "say red " * n}) + "\n" for n in (1, 2, 30)))
    data = {"path": str(rows), "max_length": 64}
    for pass_rows, told in ((2, True), (1, False)):
        training = {"max_steps": 1, "global_batch_size": 2, "per_device_train_batch_size": pass_rows}
        recipe.write_text(yaml.safe_dump({"model": str(longrope), "data": data, "training": training}))
        assert main(["plan", "--no-timing", str(recipe)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("1 of 3 rows have more than 16 tokens, where this base's rotary embeddings change" in said) == told


def test_a_server_takes_no_request_that_changes_the_rotary_embeddings_of_others(
    longrope: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So it can also keep answers to the bit (``batch_invariant``)."""
    static = EngineSettings(cache_tokens=512, batching="static")
    for settings in (static, EngineSettings(cache_tokens=512, batch_invariant=True)):
        engine = start_engine(open_served(str(longrope)), settings)
        try:
            asked = [lambda: request([5, 6, 7], None, 6), lambda: request([9] * 12, None, 4)]
            alone = [submit(engine, one()).tokens for one in asked]
            together = [submit(engine, one()) for one in asked]
            assert [answer.tokens for answer in together] == alone
            with pytest.raises(InputError, match="12 and 5 tokens are more than the 16 that fit"):
                submit(engine, request([9] * 12, None, 5))
        finally:
            engine.close()
        assert "A prompt and its answer may have 16 tokens: a longer one" in " ".join(capsys.readouterr().err.split())
