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
from transformers import AutoModelForCausalLM

from qvera.adapters import QveraLinear
from qvera.adapters.save_load import attach, load_adapter, save_adapter
from qvera.cli.serve import start_engine
from qvera.config.schema import Recipe
from qvera.config.sections import AdapterSection, ExportSection, ModelSection
from qvera.exporting.deltas import read_deltas
from qvera.exporting.lora import export_lora, require_kept_by_peft
from qvera.exporting.merged import export_merged
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.models.structure import decoder_of
from qvera.serve.opening import open_served
from qvera.serve.requests import EngineSettings
from qvera.training.plan import shape_of
from qvera.training.trainer import train
from qvera.utils.errors import InputError, RunFailed
from tests.adapters.helpers import perturb
from tests.architectures import STEPS, trial
from tests.families import FAMILIES, PAGE, RIGHT, Family, page, read_results
from tests.models.experts import published
from tests.serve.helpers import BASE, ENGINES, Alone, assert_same, engine_of, request, store_of, submit, write_adapters

IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
_FAST = ("llama4_text", "gpt2")
"""A decoder and router of its own, and Conv1D."""
_SLOW = ("mixtral", "llama", "gemma2", "gemma3", "qwen3_5", "phi", "cohere", "stablelm", "opt", "falcon", "gpt_oss")
"""What else differs: tensors that are fused while loading, scaled rotations, windows and caps, a vision tower, one with
recurrent layers beside it, biases, scaled logits, no paged attention, a table of positions, no 4 bits, and experts of
another form. The others are like one of these."""


def _marks(name: str) -> Any:
    return () if name in _FAST else pytest.mark.slow if name in _SLOW else pytest.mark.matrix


REFUSED = {"rwkv": "changes its weights", "cpmant": "takes token 0 for padding"}
_TRAINED = [name for name, found in read_results().items() if "lora" in found]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_marks(name)) for name in _TRAINED])
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


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in FAMILIES if name not in REFUSED])
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


def test_the_page_of_models_is_made_from_what_was_found() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.families"


def test_nothing_that_was_found_is_wrong_and_the_page_names_each_limit() -> None:
    for name, found in read_results().items():
        assert found.keys() == set(STEPS) or found["train"].startswith("refused"), name
        assert all(text.startswith((RIGHT, "refused: ")) for text in found.values()), name
        refused = {step for step, text in found.items() if text != RIGHT} - {"packing", "serve", "lora"}
        assert not refused or FAMILIES[name].limits != "–", (name, refused)


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in read_results()])
def test_an_architecture_does_what_the_page_says(name: str) -> None:
    found = trial(name)
    assert {step: text.partition(":")[0] for step, text in found.items()} == {
        step: text.partition(":")[0] for step, text in read_results()[name].items()
    }, found


def test_on_a_dense_base_what_is_saved_and_exported_gives_the_same_logits(
    checkpoint: tuple[Family, Path], tmp_path: Path
) -> None:
    family, directory = checkpoint
    section = ModelSection(path=str(directory), quantization="none", compute_dtype="float32")
    if family.four_bit == "no":
        with pytest.raises(InputError, match=r"no linear of .* is in 4 bits"):
            load_base(section.replace(quantization="nf4"))
    base = load_base(section).model
    with torch.no_grad():
        with_base = base(input_ids=IDS).logits
        model = perturb(attach(base, AdapterSection(rank=8), section.path))
        trained = model(input_ids=IDS).logits
        assert (trained - with_base).abs().max() > 0.01
        save_adapter(model, tmp_path / "adapter")
        again = load_adapter(load_base(section).model, tmp_path / "adapter")
        assert torch.equal(again(input_ids=IDS).logits, trained)
        export_merged(tmp_path / "adapter", section, tmp_path / "merged", ExportSection(dtype="float32"))
        merged = published(tmp_path / "merged")
        torch.testing.assert_close(merged(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-4)
        export_lora(read_deltas(tmp_path / "adapter", empty_model(section)), tmp_path / "lora", torch.float32)
        stock = PeftModel.from_pretrained(published(directory), tmp_path / "lora").eval()
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
        if kind == "continuous" and read_results()[family.model_type]["serve"] != RIGHT:
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
    settings = EngineSettings(cache_tokens=512, batch_invariant=True)
    with pytest.raises(RunFailed, match=r"can't run StableLmForCausalLM .* Leave out --batch-invariant"):
        start_engine(open_served(str(tmp_path / "stablelm")), settings)


def test_a_server_does_not_run_a_layer_twice_over_the_same_blocks(tmp_path: Path) -> None:
    FAMILIES["dory"].write(tmp_path / "dory")
    refused = pytest.raises(RunFailed, match=r"it runs a layer more than once for a token.* Use the static engine")
    with refused, engine_of(tmp_path / "dory"):
        pass


def test_a_server_refuses_a_model_that_keeps_no_keys_and_values(tmp_path: Path) -> None:
    FAMILIES["openai-gpt"].write(tmp_path / "gpt")
    with pytest.raises(RunFailed, match=r"it keeps nothing of earlier tokens. Use qvera generate"):
        with engine_of(tmp_path / "gpt", "static"):
            pass


def test_a_lora_whose_tensors_peft_would_rename_away_is_refused(tmp_path: Path) -> None:
    """PEFT applies transformers' rule for Laguna's shared experts to names that it fits by chance."""
    FAMILIES["laguna"].write(tmp_path / "laguna")
    section = ModelSection(path=str(tmp_path / "laguna"), quantization="none")
    save_adapter(attach(load_base(section).model, AdapterSection(rank=8), section.path), tmp_path / "adapter")
    empty = empty_model(section)
    with pytest.raises(InputError, match=r"PEFT would not adapt model\.layers\.1\.mlp\.shared_experts\.down_proj"):
        require_kept_by_peft(read_deltas(tmp_path / "adapter", empty), empty)


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_a_type_that_can_t_be_trained_is_refused_by_its_config(name: str, reason: str, tmp_path: Path) -> None:
    FAMILIES[name].config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"model.path: {name} {reason}"):
        empty_model(ModelSection(path=str(tmp_path)))


def test_the_decoder_is_what_holds_the_embedding_where_a_class_names_its_head_so() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["modernbert-decoder"].config())
    assert decoder_of(model) is model.model


def test_layers_that_transformers_can_t_recompute_are_named() -> None:
    with pytest.raises(InputError, match=r"can't recompute the layers of CTRLLMHeadModel. Set it to false"):
        enable_checkpointing(AutoModelForCausalLM.from_config(FAMILIES["ctrl"].config()))
