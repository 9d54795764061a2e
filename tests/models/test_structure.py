"""Models with a learned table of positions: rows and answers that are longer than it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoModelForCausalLM, MambaConfig, OPTConfig, OPTForCausalLM, XLNetConfig

from qvera.config.schema import parse_recipe
from qvera.evaluation.generate import generate, generate_tokens, require_context
from qvera.models.structure import context_limit, context_tokens, position_limit
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.conftest import small_llama, small_tokenizer
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
