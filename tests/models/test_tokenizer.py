"""Tokens that a recipe adds: their rows, learning to say them, and every place that an adapter with such tokens goes to."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qvera.adapters.shared_model import load_adapters
from qvera.cli.main import main
from qvera.config.schema import load_recipe, parse_recipe
from qvera.config.sections import ModelSection
from qvera.data import build_datasets
from qvera.evaluation.generate import generate
from qvera.evaluation.load import open_run
from qvera.evaluation.run_info import directory_facts
from qvera.models.loader import Base, load_base
from qvera.models.tokenizer import ADDED_ROWS, load_tokenizer
from qvera.training.plan import make_plan
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.conftest import small_llama, small_tokenizer
from tests.data.conftest import _bpe_tokenizer

pytestmark = pytest.mark.process

TOOL, DONE = "<|tool|>", "<|done|>"


def write_model(kind: str, directory: Path) -> Path:
    """A checkpoint with rows to spare (304 for 300 tokens), or none; head and embedding apart, or one table."""
    tokenizer = small_tokenizer()
    changes: dict[str, Any] = {} if kind == "spare rows" else {"vocab_size": len(tokenizer)}
    if kind.startswith("tied"):
        changes["tie_word_embeddings"] = True
    small_llama(**changes).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(params=["spare rows", "more rows", "tied, more rows"], scope="module")
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(params=[pytest.param("spare rows", marks=pytest.mark.matrix), "tied, more rows"], scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a task that can't be done without the new tokens: call the tool by its token, end with another."""
    directory = tmp_path_factory.mktemp("trained")
    model = write_model(request.param, directory / "model")
    row = {"prompt": "say red", "completion": f"{TOOL}red{DONE}"}
    (directory / "rows.jsonl").write_text((json.dumps(row) + "\n") * 16, encoding="utf-8")
    tree = {
        "model": {"path": str(model), "compute_dtype": "float32", "added_tokens": [TOOL, DONE]},
        "adapter": {"rank": 32},
        "data": {"path": str(directory / "rows.jsonl"), "template": "plain", "eval_fraction": 0.25, "max_length": 64},
        "training": {
            "max_steps": 50, "global_batch_size": 4, "learning_rate": 4e-2, "save_steps": 40, "sample_count": 1,
            "sample_max_new_tokens": 8, "report_to": [], "gradient_checkpointing": False,
        },
    }  # fmt: skip
    train(parse_recipe(tree, "test recipe"), directory / "run")
    return directory / "run"


@pytest.fixture(scope="module")
def merged(trained: Path) -> Path:
    out = trained.parent / "merged"
    options = ["--to", "merged", "--dtype", "float32", "--base", "dequantized"]
    assert main(["export", str(trained), str(out), *options]) == 0
    return out


@pytest.fixture
def own_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def ask(opened: Any) -> str:
    tokenizer = opened.base.tokenizer
    ids = tokenizer("say red", add_special_tokens=False)["input_ids"]
    out = opened.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
    return tokenizer.decode(out[0, len(ids) :])


def test_a_run_learns_to_say_the_new_tokens_and_exports_them(trained: Path, merged: Path) -> None:
    opened = open_run(trained)
    said = ask(opened)
    assert said.startswith(f"{TOOL}red{DONE}"), said
    prompt = opened.base.tokenizer("say red", add_special_tokens=False)["input_ids"]
    (shown,) = generate(opened.model, opened.base.tokenizer, [prompt], max_new_tokens=8)
    assert shown == f"{TOOL}red{DONE}"  # the tokens are part of the answer, the end of it is not
    assert ask(open_run(trained, adapter=False)) != said, "the base alone has learnt nothing"
    assert ask(open_run(trained / "adapter")) == said  # an adapter directory that stands alone knows its tokens
    ids = directory_facts(trained)["added_tokens"]
    assert list(ids) == [TOOL, DONE]
    assert directory_facts(trained / "adapter")["added_tokens"] == ids
    exported, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    for one in (tokenizer, AutoTokenizer.from_pretrained(trained / "adapter")):
        assert one.convert_tokens_to_ids([TOOL, DONE]) == list(ids.values())
    assert exported.config.vocab_size == exported.get_input_embeddings().weight.shape[0] > max(ids.values())
    batch = torch.tensor([tokenizer(f"say red{TOOL}", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(opened.model(batch).logits, exported(batch).logits, atol=1e-4, rtol=1e-5)
    certificate = json.loads((merged / "qvera_export.json").read_text())
    assert certificate["added_tokens"] == ids and "difference" in certificate


def test_eval_knows_the_tokens_of_an_adapter_alone_and_of_an_export(
    trained: Path, merged: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = trained.parent / "rows.jsonl"
    alone = Path(shutil.copytree(trained / "adapter", tmp_path / "alone"))
    assert main(["eval", str(alone), "--data", str(rows), "--json", str(tmp_path / "alone.json")]) == 0
    scores = json.loads((tmp_path / "alone.json").read_text())["scores"]
    tokens = len(open_run(trained).base.tokenizer(f"{TOOL}red{DONE}", add_special_tokens=False)["input_ids"])
    assert scores["rows"] == 16 and scores["trained_tokens"] == 16 * (tokens + 1), "a new token is one token"
    capsys.readouterr()
    for options, code in ((["--with-base"], 2), (["--html", str(tmp_path / "page.html"), "--max-new-tokens", "8"], 0)):
        assert main(["eval", str(merged), *options]) == code
        assert TOOL in capsys.readouterr().err


def test_a_token_of_the_model_that_is_named_eos_is_no_part_of_an_answer(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    tokenizer.add_tokens([AddedToken("<|end|>", special=False, normalized=False)])
    tokenizer.save_pretrained(tmp_path / "model")
    given = load_tokenizer(ModelSection(path=str(tmp_path / "model"), eos_token="<|end|>"))
    assert len(given) == len(tokenizer)
    ids = given("red<|end|>", add_special_tokens=False)["input_ids"]
    assert ids[-1] == given.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert given.decode(ids, skip_special_tokens=True) == "red"


def test_what_has_no_place_for_the_rows_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["export", str(trained), str(tmp_path / "out"), "--to", "lora"],
        ["export", str(trained), str(tmp_path / "out"), "--to", "peft"],
        ["merge-adapters", str(trained), str(trained), str(tmp_path / "out")],
    ):
        assert main(arguments) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"adds the tokens {TOOL}, {DONE}" in said
        assert "--to merged" in said
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="has token rows, trained modules or biases beside its vectors; load it alone"):
        load_adapters(small_llama(), {"one": trained / "adapter"})
    with pytest.raises(InputError, match=re.escape(TOOL)):  # by PEFT alone
        base = load_base(ModelSection(path=str(trained.parent / "model"))).model
        PeftModel.from_pretrained(base, str(trained / "adapter"))


def test_resume_is_to_the_bit(own_run: Path) -> None:
    files = [own_run / "adapter" / name for name in ("adapter_model.safetensors", ADDED_ROWS)]
    whole = [load_file(file) for file in files]
    shutil.rmtree(own_run / "checkpoints" / "step-00000050")
    shutil.rmtree(own_run / "adapter")
    train(load_recipe(own_run / "recipe.yaml"), own_run, resume=True)
    torch.testing.assert_close([load_file(file) for file in files], whole, rtol=0, atol=0)


def test_another_recipe_starts_from_its_vectors(own_run: Path, tmp_path: Path) -> None:
    changes = ["training.max_steps=1", f"adapter.init_from={own_run / 'adapter'}"]
    train(load_recipe(own_run / "recipe.yaml", changes), tmp_path / "again")
    first = load_recipe(own_run / "recipe.yaml", [*changes, f'model.added_tokens=["{DONE}"]'])
    said = r"was trained with the added tokens .*Set model\.added_tokens: \['<\|tool\|>', '<\|done\|>'\]"
    with pytest.raises(InputError, match=said):
        train(first, tmp_path / "other")


def loaded(directory: Path, *tokens: str, **model: Any) -> Base:
    return load_base(
        ModelSection(path=str(directory), added_tokens=list(tokens), **{"compute_dtype": "float32", **model})
    )


def test_rows_are_typical_belong_to_the_text_and_are_in_no_file_of_the_base(model_dir: Path) -> None:
    def rows_of(*tokens: str) -> dict[str, torch.Tensor]:
        base = loaded(model_dir, *tokens)
        weight = base.model.get_output_embeddings().weight
        assert weight.shape[0] == base.model.config.vocab_size
        return {token: weight[i].clone() for token, i in base.facts["added_tokens"].items()}

    files = {f.name: f.read_bytes() for f in model_dir.iterdir()}
    first, second = rows_of(TOOL, DONE), rows_of(DONE, TOOL)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first[TOOL], first[DONE])
    assert {f.name: f.read_bytes() for f in model_dir.iterdir()} == files
    plain = loaded(model_dir).model
    stored = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(plain.get_input_embeddings().weight, stored)
    tokens = len(load_tokenizer(ModelSection(path=str(model_dir))))
    known = plain.get_output_embeddings().weight[:tokens].float()
    for row in first.values():
        z = (row.float() - known.mean(0)) / known.std(0)
        assert z.abs().max() < 1.8
        assert 0.8 < z.square().mean() < 1.2
    # outside of the others' hull, so that it can have the highest logit: along its own direction it has
    row = first[TOOL].float()
    assert (row @ row) > (known @ row).max()


def test_bases_that_transformers_loads_grow_too(model_dir: Path) -> None:
    for quantization in ("none", "int8"):
        base = loaded(model_dir, TOOL, DONE, quantization=quantization, compute_dtype="bfloat16")
        with torch.no_grad():
            logits = base.model(torch.tensor([[5, *base.facts["added_tokens"].values()]])).logits
        assert logits.isfinite().all()
        assert logits.shape[-1] > max(base.facts["added_tokens"].values())


def written(tokenizer: Any, directory: Path) -> str:
    """A model of as many rows as the tokenizer has tokens."""
    small_llama(vocab_size=len(tokenizer)).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_a_model_without_a_pad_token_is_not_given_a_row(tmp_path: Path, make_recipe: Any) -> None:
    tokenizer = small_tokenizer()
    tokenizer.pad_token = None
    path = written(tokenizer, tmp_path / "model")
    recipe, padded = (make_recipe(model={"path": path, **more}) for more in ({}, {"pad_token": "<|endoftext|>"}))
    assert build_datasets(recipe.data, load_tokenizer(recipe.model)).stats.pads_with_eos
    assert load_base(recipe.model).model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    datasets = build_datasets(padded.data, load_tokenizer(padded.model))
    assert (datasets.stats.pads_with_eos, datasets.pad_id) == (False, 0)


def test_a_token_without_a_row_in_the_embedding_is_named(make_recipe: Any, tmp_path: Path) -> None:
    tokenizer, rows = small_tokenizer(), tmp_path / "rows.jsonl"
    known, path = len(tokenizer), written(tokenizer, tmp_path / "model")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(path)
    recipe = make_recipe(model={"path": path}, training={"max_steps": 1})
    train(recipe, tmp_path / "run")  # no row has such a token
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "<new>"}\n')
    with pytest.raises(InputError, match=rf"rows.jsonl:2: holds '<new>', token {known} of the .* has {known} tokens"):
        train(recipe.replace(data={"path": str(rows), "eval_fraction": 0.0}), tmp_path / "other")


def test_eos_token_ends_an_answer(make_recipe: Any) -> None:
    recipe = make_recipe(model={"added_tokens": [DONE], "eos_token": DONE}, data={"template": "plain"})
    tokenizer = load_tokenizer(recipe.model)
    rows = build_datasets(recipe.data, tokenizer).train
    assert all(row.input_ids[-1] == tokenizer.convert_tokens_to_ids(DONE) and row.trained[-1] for row in rows)


def test_chatml_s_markers_can_be_added(tmp_path: Path, make_recipe: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_bpe_tokenizer([], False), eos_token="</s>", bos_token="<s>")
    model: dict[str, Any] = {"path": written(tokenizer, tmp_path / "model")}
    without = make_recipe(model=model, data={"template": "chatml"})
    with pytest.raises(InputError, match=r"Or add them with model\.added_tokens"):
        build_datasets(without.data, load_tokenizer(without.model))
    model |= {"added_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    recipe = make_recipe(model=model, data={"template": "chatml"})
    given = load_tokenizer(recipe.model)
    row = build_datasets(recipe.data, given).train[0]
    assert given.eos_token == "<|im_end|>" and given.eos_token_id in row.input_ids[row.trained]


def test_a_damaged_or_foreign_file_of_rows_is_refused(own_run: Path) -> None:
    file = own_run / "adapter" / ADDED_ROWS

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_run(own_run)

    file.write_bytes(file.read_bytes()[:-100])
    refused(rf"{ADDED_ROWS}: can't be read")
    save_file({"embedding": torch.zeros(2, 8), "head": torch.zeros(2, 8)}, file)
    refused(r"holds \[2, 8\] as embedding, expected rows of shape \[2, 64\]")
    file.unlink()
    refused("copy the whole adapter directory")


def test_the_plan_counts_tables_that_are_no_longer_mapped(model_dir: Path, make_recipe: Any) -> None:
    def table(**model: Any) -> Any:
        recipe = make_recipe(model={"path": str(model_dir), **model})
        standing = make_plan(recipe, torch.device("cpu")).memory.standing
        return next((one for one in standing if one.name == "embedding and head with more rows"), None)

    assert table() is None
    grown, base = table(added_tokens=[TOOL, DONE]), loaded(model_dir, TOOL, DONE).model
    tables = {p.data_ptr(): p for p in (base.get_input_embeddings().weight, base.get_output_embeddings().weight)}
    if json.loads((model_dir / "config.json").read_text())["vocab_size"] < base.config.vocab_size:
        assert grown.bytes == sum(p.nbytes for p in tables.values()) and not grown.mapped
    else:
        assert grown is None
