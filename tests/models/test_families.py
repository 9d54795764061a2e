"""Families beyond Llama, from tiny random checkpoints: trained, resumed, saved, exported, answering and served.

tests/families.py has the list with what is expected of each; docs/models.md shows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qvera.adapters import QveraLinear
from qvera.adapters.files.save_load import attach, load_adapter, save_adapter
from qvera.cli.serve import start_engine
from qvera.config.schema import AdapterSection, ExportSection, ModelSection, Recipe
from qvera.evaluation.generate import generate
from qvera.evaluation.load import open_run
from qvera.exporting.deltas import read_deltas
from qvera.exporting.lora import export_lora
from qvera.exporting.merged import export_merged
from qvera.models.attention import rows_joined
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.models.quantize_checkpoint import find_base
from qvera.serve.opening import open_served
from qvera.serve.requests import EngineSettings
from qvera.training.plan import shape_of
from qvera.training.trainer import train
from qvera.utils.errors import InputError, RunFailed
from tests.adapters.helpers import perturb
from tests.families import FAMILIES, PAGE, Family, page
from tests.models.experts import published
from tests.serve.helpers import BASE, ENGINES, Alone, assert_same, engine_of, request, store_of, submit, write_adapters
from tests.training.runs import cut_off

IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
_FAST = ("llama4_text", "gpt2")
"""A decoder and router of its own, and Conv1D."""
_SLOW = ("mixtral", "llama", "gemma2", "gemma3", "qwen3_5", "phi", "cohere", "stablelm", "opt", "falcon", "gpt_oss")
"""What else differs: tensors that are fused while loading, scaled rotations, windows and caps, a vision tower, one with
recurrent layers beside it, biases, scaled logits, no paged attention, a table of positions, no 4 bits, and experts of
another form. The others are like one of these."""


def _marks(name: str) -> Any:
    return () if name in _FAST else pytest.mark.slow if name in _SLOW else pytest.mark.matrix


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_marks(name)) for name in FAMILIES])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    """A family, and the directory of its tiny checkpoint."""
    family, directory = FAMILIES[request.param], tmp_path_factory.mktemp("families") / request.param
    family.write(directory)
    return family, directory


def recipe_of(make_recipe: Any, family: Family, directory: Path, **data: Any) -> Recipe:
    return make_recipe(
        model={"path": str(directory), "quantization": family.quantization, "compute_dtype": "float32"},
        data=data,
        training={"max_steps": 2, "save_steps": 1},
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in FAMILIES])
def test_all_linear_is_every_linear_of_the_layers_but_the_routers(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.config().save_pretrained(tmp_path)
    model = empty_model(ModelSection(path=str(tmp_path)))
    shape = shape_of(model)
    adapted = attach(model, AdapterSection(rank=8), str(tmp_path))
    layers = {n for n, m in adapted.get_base_model().named_modules() if isinstance(m, QveraLinear)}
    assert {n.rpartition(".")[2] for n in layers} == set(family.targets.split())
    assert {x.name for x in shape.adapted("all-linear")} == layers
    assert bool(shape.expert_numbers) == (family.experts == "dense")
    assert bool(shape.experts) == (family.experts == "4 bits")


def test_the_page_of_models_is_made_from_what_is_tested() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.families"


def test_a_run_learns_and_resumes_to_the_same_bytes(
    checkpoint: tuple[Family, Path], make_recipe: Any, tmp_path: Path
) -> None:
    """With packed rows, where the family takes them."""
    family, directory = checkpoint
    if not family.joins:
        with pytest.raises(InputError, match=r"data\.packing: rows of one sequence would see each other in this model"):
            train(recipe_of(make_recipe, family, directory, packing=True), tmp_path / "refused")
    recipe = recipe_of(make_recipe, family, directory, packing=family.joins)
    train(recipe, tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["result"]["eval_after"]["loss"] < run["result"]["eval_before"]["loss"]
    assert run["model"]["quantization"] == family.quantization
    assert (find_base(recipe.model) is not None) == (family.four_bit == "mapped")
    assert bool(run["model"]["expert_bytes"]) == (family.experts == "4 bits")
    assert any("experts" in kind for kind in run["model"]["dense_matrices"]) == (family.experts == "dense")
    planned = run["plan"]["memory"]
    standing = [part["bytes"] for part in planned["moments"]["answers"] if part["kind"] == "base"]
    assert sum(standing) == pytest.approx(run["model"]["base_bytes"], rel=0.02)
    assert bool(planned["mapped_bytes"]) == (family.four_bit == "mapped")
    train(recipe, cut_off(tmp_path / "run", tmp_path / "cut", after=1), resume=True)
    written = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "cut")]
    assert written[0] == written[1]
    opened = open_run(tmp_path / "run")
    assert (rows_joined(opened.model, prefix_once=True, packing=False) is not None) == family.joins
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    together = generate(opened.model, opened.base.tokenizer, prompts, max_new_tokens=4)
    alone = [generate(opened.model, opened.base.tokenizer, [one], max_new_tokens=4)[0] for one in prompts]
    assert together == alone


def test_saved_and_exported_it_gives_the_same_logits(checkpoint: tuple[Family, Path], tmp_path: Path) -> None:
    """On a base in 4 bits and on one in 16."""
    family, directory = checkpoint
    in_4_bits, whole = (
        ModelSection(path=str(directory), quantization=q, compute_dtype="float32") for q in ("nf4", "none")
    )
    if family.four_bit == "no":
        with pytest.raises(InputError, match=r"no linear of .* is in 4 bits"):
            load_base(in_4_bits)
    for section in (whole,) if family.four_bit == "no" else (whole, in_4_bits):
        root = tmp_path / section.quantization
        base = load_base(section).model
        with torch.no_grad():
            with_base = base(input_ids=IDS).logits
            model = perturb(attach(base, AdapterSection(rank=8), section.path))
            trained = model(input_ids=IDS).logits
            assert (trained - with_base).abs().max() > 0.01
            save_adapter(model, root / "adapter")
            again = load_adapter(load_base(section).model, root / "adapter")
            assert torch.equal(again(input_ids=IDS).logits, trained)
            onto: Any = "original" if section is whole else "dequantized"
            export_merged(root / "adapter", section, root / "merged", ExportSection(dtype="float32", base=onto))
            merged = published(root / "merged")
            torch.testing.assert_close(merged(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-4)
            if section is whole:
                export_lora(read_deltas(root / "adapter", empty_model(section)), root / "lora", torch.float32)
                stock = PeftModel.from_pretrained(published(directory), root / "lora").eval()
                torch.testing.assert_close(stock(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-4)


def test_each_request_of_a_batch_gets_its_own_adapters_answer(checkpoint: tuple[Family, Path], tmp_path: Path) -> None:
    """The MLPs of OPT and Llama 4 get the tokens of all rows behind each other."""
    family, directory = checkpoint
    model: Any = {"quantization": family.quantization}
    write_adapters(tmp_path, directory, {"a": 1, "b": 2}, base=model)
    store, names = store_of(tmp_path), (BASE, "a", "b")
    prompts = [[5, 6, 7, 8][: 2 + i] for i in range(len(names))]
    adapters = [None if name == BASE else tmp_path / name for name in names]
    expected = [
        Alone(directory, adapter, **model).answer(request(prompt, None, 4, top_logprobs=1))
        for adapter, prompt in zip(adapters, prompts, strict=True)
    ]
    for kind in ENGINES:
        if kind == "continuous" and not family.continuous:
            refused = pytest.raises(RunFailed, match=r"continuous batching can't run .* Use the static engine")
            with refused, engine_of(directory, kind, model):
                pass
            continue
        asked = [request(p, store.resolve(name), 4, top_logprobs=1) for p, name in zip(prompts, names, strict=True)]
        with engine_of(directory, kind, model) as engine:
            for answer, events in zip([submit(engine, one) for one in asked], expected, strict=True):
                assert_same(answer, events)


def test_many_adapters_are_trained_together(checkpoint: tuple[Family, Path], make_recipe: Any, tmp_path: Path) -> None:
    family, directory = checkpoint
    rows = tmp_path / "rows.jsonl"
    lines = ({"who": "ab"[i % 2], "prompt": f"say red {i}", "completion": "red red"} for i in range(24))
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(recipe_of(make_recipe, family, directory, path=str(rows), adapter_column="who"), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "run.json").read_text())["adapters"]
    assert [one["name"] for one in found] == ["a", "b"]
    assert all(one["eval_after"]["loss"] < one["eval_before"]["loss"] for one in found)


def test_a_server_takes_static_batches_where_pages_are_not_known(tmp_path: Path, capsys: Any) -> None:
    FAMILIES["stablelm"].write(tmp_path / "stablelm")
    engine = start_engine(open_served(str(tmp_path / "stablelm")), EngineSettings(cache_tokens=512))
    try:
        assert submit(engine, request([5, 6, 7], None, 3)).end().reason == "length"
    finally:
        engine.close()
    said = " ".join(capsys.readouterr().err.split())
    assert "continuous batching can't run StableLmForCausalLM" in said
    assert "Answering in static batches." in said
