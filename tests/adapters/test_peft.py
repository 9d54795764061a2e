"""The PEFT side: registration, save and load, several adapters, one pair of projections, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, mapping
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qvera
from qvera.adapters import QveraConfig, QveraLinear, save_load
from qvera.adapters.adapter_file import read_adapter
from qvera.adapters.save_load import load_adapter, load_vectors, named_vectors, save_adapter
from qvera.config.sections import ModelSection
from qvera.models.loader import load_base
from qvera.utils.errors import InputError
from qvera.utils.files import flush
from tests.adapters.helpers import edit_config, logits, perturb
from tests.conftest import small_llama
from tests.helpers import start_process


def section(path: Path, quantization: str = "none", **changes: Any) -> ModelSection:
    return ModelSection(path=str(path), quantization=quantization, **{"compute_dtype": "float32", **changes})  # type: ignore[arg-type]


def adapted(model: Any = None, adapter: str = "default", **settings: Any) -> PeftModel:
    config = QveraConfig(**{"rank": 8, "task_type": "CAUSAL_LM", **settings})
    peft_model = get_peft_model(small_llama() if model is None else model, config, adapter_name=adapter)
    perturb(peft_model, adapter=adapter)
    return peft_model


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def layers(model: nn.Module) -> list[QveraLinear]:
    return [m for m in model.modules() if isinstance(m, QveraLinear)]


def test_register_is_idempotent_and_leaves_pefts_enum_alone() -> None:
    before = [dict(m) for m in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING)]
    qvera.adapters.register()
    qvera.adapters.register()
    assert before == [mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING]
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["QVERA"] == "qvera_"
    assert "QVERA" not in peft.PeftType.__members__
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.VERA] is peft.VeraConfig


def stock_logits(base: Path, adapter: Path, out: Path) -> None:
    """By stock PEFT's calls alone, dense and 4-bit, with and without low_cpu_mem_usage."""
    found = {}
    for quantized in (False, True):
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, **({"quantization_config": four_bit} if quantized else {})
        )
        found[str(quantized)] = logits(PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=quantized))
    save_file(found, out)


@pytest.mark.process
def test_a_fresh_process_gives_the_same_logits_to_the_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    wanted = {}
    for quantized in (False, True):
        base = load_base(section(tiny_model_dir, "nf4" if quantized else "none", compute_dtype="bfloat16"))
        model = adapted(base.model, dropout=0.1)
        wanted[str(quantized)] = logits(model)
        model.save_pretrained(str(tmp_path / "adapter"))
    process = start_process(stock_logits, tiny_model_dir, tmp_path / "adapter", tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    results = load_file(tmp_path / "out")
    assert all(torch.equal(results[name], expected) for name, expected in wanted.items())
    assert not torch.equal(wanted["True"], wanted["False"])


@pytest.mark.parametrize(("dtype", "low_cpu_mem_usage"), [(torch.float32, True), (torch.bfloat16, False)])
def test_round_trip_in_one_process(dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted(small_llama().to(dtype), rank=11, projection_seed=4)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(
        small_llama().to(dtype), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    for name, vector in named_vectors(loaded).items():
        assert vector.dtype == torch.float32 and vector.requires_grad
        assert torch.equal(vector, named_vectors(model)[name])
    assert torch.equal(logits(loaded), logits(model))
    assert {layer.parts("default")[0].dtype for layer in layers(loaded)} == {dtype}


def test_the_file_holds_fp32_vectors_and_no_projections(tmp_path: Path) -> None:
    model = adapted(small_llama().to(torch.bfloat16))
    size = save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors.keys() == named_vectors(model).keys()
    assert size == sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["peft_type"], config["format_version"]) == ("QVERA", 1)
    assert config["projection_shapes"] == {"A": [8, 192], "B": [192, 8]}
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["projection_generator"] == "philox4x64-10/u24" and len(config["projection_sha256"]) == 64


def test_saving_twice_gives_the_same_bytes_and_leaves_no_temporary_files(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    first = {f.name: f.read_bytes() for f in (tmp_path / "adapter").iterdir()}
    save_adapter(model, tmp_path / "adapter")
    assert {f.name: f.read_bytes() for f in (tmp_path / "adapter").iterdir()} == first
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_another_process_that_saves_here_meanwhile_is_left_alone_and_a_dead_one_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, alive = 2**22 + 1, os.getppid()
    leftovers = [tmp_path / f".adapter.{what}-{pid}" for what in ("partial", "old") for pid in (dead, alive)]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "adapter_config.json").write_text("{}")
    save_adapter(adapted(), tmp_path / "adapter")
    assert [leftover.exists() for leftover in leftovers] == [False, True, False, True]

    def other_process(file: Path) -> None:
        monkeypatch.setattr(save_load, "flush", flush)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: alive)
            save_adapter(adapted(d_initial=0.7), tmp_path / "adapter")
        flush(file)

    monkeypatch.setattr(save_load, "flush", other_process)
    save_adapter(adapted(d_initial=0.3), tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter")[0].d_initial == 0.3
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_behind_a_link_is_replaced_and_what_the_link_names_stays(tmp_path: Path) -> None:
    save_adapter(adapted(d_initial=0.3), tmp_path / "elsewhere")
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        save_adapter(adapted(d_initial=0.7), run / "adapter")
        assert read_adapter(run / "adapter")[0].d_initial == 0.7
        assert [path.name for path in run.iterdir()] == ["adapter"]
    assert read_adapter(tmp_path / "elsewhere")[0].d_initial == 0.3


def storages(model: nn.Module) -> tuple[int, int]:
    """How many different A and B all layers and adapters together read."""
    pairs = [layer.parts(name)[:2] for layer in layers(model) for name in layer.qvera_settings]
    a, b = ({t.untyped_storage().data_ptr() for t in side} for side in zip(*pairs, strict=True))
    return len(a), len(b)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_one_pair_in_memory_whatever_the_number_of_adapters(quantization: str, tiny_model_dir: Path) -> None:
    model = adapted(load_base(section(tiny_model_dir, quantization)).model, rank=8)
    assert len(layers(model)) == 14
    assert storages(model) == (1, 1)
    first = logits(model)
    for name, rank in (("larger", 21), ("smaller", 3)):
        model.add_adapter(name, QveraConfig(rank=rank, task_type="CAUSAL_LM"))
        perturb(model, seed=rank, adapter=name)
    assert storages(model) == (1, 1)
    assert layers(model)[0].parts("default")[0].shape == (8, 64)
    assert torch.equal(logits(model), first)
    model.set_adapter("larger")
    assert not torch.allclose(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.to(torch.bfloat16)
    assert storages(model) == (1, 1)


def test_another_seed_has_a_pair_of_its_own_and_both_answer_as_alone() -> None:
    alone = []
    for rank, seed in ((8, 0), (5, 9)):
        model = get_peft_model(small_llama(), QveraConfig(rank=rank, projection_seed=seed))
        perturb(model, seed=seed)
        alone.append(logits(model))
    model = get_peft_model(small_llama(), QveraConfig(rank=8, projection_seed=0))
    perturb(model, seed=0)
    model.add_adapter("second", QveraConfig(rank=5, projection_seed=9))
    perturb(model, seed=9, adapter="second")
    assert storages(model) == (2, 2)
    assert torch.equal(logits(model), alone[0])
    model.set_adapter("second")
    assert torch.equal(logits(model), alone[1])
    assert not torch.allclose(alone[0], alone[1])


def test_a_further_adapter_is_not_trained_until_it_is_active() -> None:
    def is_trained(model: PeftModel, adapter: str) -> bool:
        (answer,) = {v.requires_grad for v in named_vectors(model, adapter).values()}
        return answer

    model = adapted()
    model.add_adapter("second", QveraConfig(rank=4))
    assert is_trained(model, "default") and not is_trained(model, "second")
    model.set_adapter("second")
    assert is_trained(model, "second") and not is_trained(model, "default")
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("elsewhere", QveraConfig(rank=4, target_modules=["down_proj"]))
    assert not is_trained(model, "elsewhere")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "qvera" not in n)


def test_two_adapters_of_one_model_are_saved_and_loaded_apart(tmp_path: Path) -> None:
    model = adapted(rank=8)
    model.add_adapter("second", QveraConfig(rank=5, projection_seed=9, target_modules=["q_proj", "down_proj"]))
    perturb(model, seed=3, adapter="second")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(small_llama(), str(tmp_path))
    loaded.load_adapter(str(tmp_path / "second"), adapter_name="second")
    assert torch.equal(logits(loaded), logits(model))
    for one in (model, loaded):
        one.set_adapter("second")
    assert torch.equal(logits(loaded), logits(model))


def test_unload_gives_the_base_back_and_merge_and_unload_the_merged_model() -> None:
    model = adapted()
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert not layers(merged)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(adapted().unload()), logits(small_llama()))


def test_all_linear_leaves_out_the_head_names_match_last_parts_and_expressions_full_names() -> None:
    def names(**settings: Any) -> set[str]:
        model = adapted(**settings)
        return {
            n.removeprefix("base_model.model.model.layers.") for n, m in model.named_modules() if m in layers(model)
        }

    seven = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model = adapted()
    assert set(model.peft_config["default"].target_modules) == seven
    assert len(names()) == 14 and {name.rpartition(".")[2] for name in names()} == seven
    listed = names(target_modules=["v_proj", "layers.1.mlp.down_proj"])
    assert listed == {"0.self_attn.v_proj", "1.self_attn.v_proj", "1.mlp.down_proj"}
    assert names(target_modules=r".*layers\.1\.self_attn\.(q|v)_proj") == {"1.self_attn.q_proj", "1.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj", "query"], ["named query", "q_proj", "lm_head"]),
        (["wq", "wk"], ["named wk, wq", "down_proj"]),
        (["proj"], ["named proj"]),
        ("nothing_like_it", ["that 'nothing_like_it' matches as a whole", "in a list"]),
        ("q_proj, v_proj", ["names are written in a list: ['q_proj', 'v_proj']"]),
        (["q_proj", "input_layernorm"], ["these are none", "input_layernorm (LlamaRMSNorm)"]),
        (["embed_tokens"], ["these are none", "embed_tokens (Embedding)"]),
        (None, ["takes `all-linear` or a list"]),
    ],
)
def test_each_named_target_must_be_a_linear_that_exists(targets: Any, words: list[str]) -> None:
    model = small_llama()
    with pytest.raises(InputError, match="target") as caught:
        get_peft_model(model, QveraConfig(rank=4, target_modules=targets))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not layers(model)


# What must be refused when an adapter is loaded.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    """``change`` gets the tensors and the name of the first."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors, min(tensors))
    save_file(tensors, directory / WEIGHTS)


def shorten(t: dict[str, torch.Tensor], first: str) -> None:
    t[first] = t[first][:-1].clone()


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


DAMAGE: dict[str, tuple[Any, str]] = {
    "nan": (lambda d: edit_weights(d, lambda t, n: t[n].fill_(float("nan"))), "has NaN or Inf"),
    "inf": (lambda d: edit_weights(d, lambda t, n: t[n].fill_(float("-inf"))), "has NaN or Inf"),
    "missing key": (lambda d: edit_weights(d, lambda t, n: t.pop(n)), "1 missing (first: base_model.model."),
    "extra key": (
        lambda d: edit_weights(d, lambda t, n: t.update({"a.qvera_b": t[n].clone()})), "1 unknown (first: a.qvera_b)",
    ),
    "wrong shape": (lambda d: edit_weights(d, shorten), "has shape [63], this model needs [64]"),
    "whole numbers": (
        lambda d: edit_weights(d, lambda t, n: t.update({k: v.int() for k, v in t.items()})), "stored as torch.int32",
    ),
    "cut short": (lambda d: truncate(d / WEIGHTS, -40), "cut short"),
    "cut in the header": (lambda d: truncate(d / WEIGHTS, 20), "cut short"),
    "empty weights": (lambda d: truncate(d / WEIGHTS, 0), "cut short"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda d: (d / CONFIG).unlink(), "has no adapter_config.json"),
    "cut config": (lambda d: truncate(d / CONFIG, 30), "expected a PEFT adapter config"),
    "config is a list": (lambda d: (d / CONFIG).write_text("[1]"), "expected a PEFT adapter config"),
    "config not text": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\x00"), "expected a PEFT adapter config"),
    **{
        name: (lambda d, changes=changes: edit_config(d, **changes), words)
        for name, changes, words in (
            ("a LoHa", {"peft_type": "LOHA"}, "peft_type is LOHA, expected QVERA"),
            ("QVERA called VERA", {"peft_type": "VERA"}, "does not fit this base model"),
            ("hash", {"projection_sha256": "0" * 64}, "SHA-256"),
            ("seed", {"projection_seed": 1}, "SHA-256"),
            ("shapes", {"projection_shapes": {"A": [8, 64], "B": [64, 8]}}, "another base model"),
            ("rank", {"rank": 9}, "rank is 9, but base_model.model.model.layers.0.mlp.down_proj.qvera_d"),
            ("a huge rank", {"rank": 10**9}, "rank: should be less than or equal to 65536"),
            ("d_initial as text", {"d_initial": "abc"}, "d_initial: should be a valid number, got 'abc'"),
            ("rank as text", {"rank": "8"}, "rank: should be a whole number, got '8'"),
            ("negative dropout", {"dropout": -0.5}, "dropout: should be greater"),
            ("newer format", {"format_version": 99}, "update qvera"),
            ("magnitude", {"magnitude": True}, "14 missing"),
            ("seed chain", {"seed_chain": [1, 2]}, "seed_chain: takes the seeds of 1 phases"),
            ("generator", {"projection_generator": "mt19937"}, "mt19937"),
            ("fewer targets", {"target_modules": ["q_proj", "down_proj", "gate_proj"]}, "16 unknown"),
            ("a target that is not there", {"target_modules": ["c_attn"]}, "named c_attn"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused(damage: str, saved: Path) -> None:
    act, words = DAMAGE[damage]
    act(saved)
    with pytest.raises(InputError) as caught:
        load_adapter(small_llama(), saved)
    message = str(caught.value)
    assert words in message and str(saved) in message and "\n" not in message, message


def test_an_undamaged_adapter_is_not(saved: Path) -> None:
    model = load_adapter(small_llama(), saved)
    assert torch.equal(logits(model), logits(adapted()))
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        read_adapter(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32, "intermediate_size": 96}, "belongs to another base model"),
        ({"intermediate_size": 256}, "belongs to another base model"),
        ({"num_hidden_layers": 3}, "14 missing (first: base_model.model.model.layers.2"),
        ({"num_hidden_layers": 1}, "14 unknown (first: base_model.model.model.layers.1"),
        ({"num_key_value_heads": 4}, "has shape [32], this model needs [64]"),
    ],
)
def test_an_adapter_for_another_base_is_refused(changes: dict[str, int], words: str, saved: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_adapter(small_llama(**changes), saved)
    assert words in str(caught.value)


@pytest.mark.parametrize("damage", ["hash", "seed", "newer format", "generator"])
def test_stock_from_pretrained_refuses_other_projections_and_formats_too(damage: str, saved: Path) -> None:
    DAMAGE[damage][0](saved)
    with pytest.raises(InputError, match=r"SHA-256|update qvera"):
        PeftModel.from_pretrained(small_llama(), str(saved))


def test_nothing_is_copied_when_one_vector_does_not_fit(saved: Path) -> None:
    edit_weights(saved, shorten)
    model = get_peft_model(small_llama(), QveraConfig(rank=8))
    before = {n: v.detach().clone() for n, v in named_vectors(model).items()}
    with pytest.raises(InputError):
        load_vectors(model, read_adapter(saved)[1], "here")
    assert all(torch.equal(v, before[n]) for n, v in named_vectors(model).items())
