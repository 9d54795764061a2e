"""Experts in 4 bits and with adapters, on fourteen classes of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from qvera.adapters.bank import AdapterBank
from qvera.adapters.layer import adapted_layers
from qvera.adapters.methods import method_of
from qvera.adapters.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.adapters.tuner import QveraExperts
from qvera.config.sections import AdapterSection, ExportSection, ModelSection
from qvera.exporting.deltas import read_deltas
from qvera.exporting.lora import export_lora, export_stock_vera, require_kept_by_peft, write_lora
from qvera.exporting.merged import export_merged, export_quantized
from qvera.models import linear, quantization
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.experts import (
    ExpertStack,
    Routing,
    StackSpec,
    expert_specs,
    route,
    run_experts,
    stack_product,
    stacks,
)
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.models.quantize_checkpoint import cached_base
from qvera.models.stream import stream_layers
from qvera.models.structure import expert_weights
from qvera.training.plan.plan import make_plan
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import perturb, relative
from tests.families import FAMILIES
from tests.models.experts import CLASSES, delta, dense_twin, write
from tests.training.runs import cut_off

IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
_FAST = ("mixtral", "gpt_oss", "nemotron_h", "llama4_text")
"""Experts that are single in the file, with biases and transposed weights, without a gate, and run by code of their own."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a class's tiny checkpoint, made when it is first asked for."""
    root = tmp_path_factory.mktemp("experts")
    return lambda name: root / name if (root / name).is_dir() else write(name, root / name)


@pytest.fixture(params=[pytest.param(n, marks=() if n in _FAST else pytest.mark.slow) for n in CLASSES])
def base(request: Any, bases: Any) -> Path:
    return bases(request.param)


def section(base: Path, **more: Any) -> ModelSection:
    return ModelSection(path=str(base), **{"compute_dtype": "float32", **more})


def adapted(base: Path, seed: int = 1, experts: str = "each", model: Any = None, **keys: Any) -> Any:
    model = model or load_base(section(base)).model
    return perturb(attach(model, AdapterSection(rank=8, experts=experts, **keys), str(base)), seed)


@pytest.fixture
def peft_has_the_experts(request: Any, base: Path) -> None:
    if request.getfixturevalue("keys") is LORA and base.name in ("llama4_text", "dbrx"):
        pytest.skip("refused by name")


@pytest.mark.parametrize("double_quant", [True, False])
def test_each_expert_has_the_bytes_that_bitsandbytes_gives_its_matrix(base: Path, double_quant: bool) -> None:
    model = load_base(section(base, double_quant=double_quant)).model
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = expert_specs(plain)
    assert names
    for name, spec in names.items():
        stack, weight = model.get_submodule(name), plain.get_parameter(name).view(spec.shape)
        assert isinstance(stack, ExpertStack)
        for expert in range(spec.experts):
            packed, state = bnb_functional.quantize_4bit(
                weight[expert].contiguous(), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
            )
            own = stack.weight.data.view(torch.uint8).view(spec.experts, -1)[expert]
            assert torch.equal(own, packed.view(-1))
            dense = stack.dense(expert, expert + 1, torch.float32)[0]
            assert torch.equal(dense, quantization.dequantized_packed(packed, state))
            assert torch.equal(torch.cat([rows for _, rows in stack.blocks(expert, torch.float32)]), dense)
    facts = load_base(section(base, double_quant=double_quant)).facts
    assert not [kind for kind in facts["dense_matrices"] if "experts" in kind]
    assert facts["expert_bytes"] == sum(map(quantization.storage_bytes, stacks(model)))


LORA = {"method": "lora", "alpha": 12}
_GRADIENTS = [
    ("each", {}), ("shared", {}), ("each", {"b_groups": 2}), ("each", {"input_scale": True}), ("none", {}),
    ("each", LORA),
]  # fmt: skip


@pytest.mark.parametrize(("experts", "keys"), _GRADIENTS, ids=lambda value: "-".join(value) if value else "plain")
@pytest.mark.usefixtures("peft_has_the_experts")
def test_logits_and_gradients_are_those_of_dense_experts_in_fp64(
    base: Path, experts: str, keys: dict[str, Any]
) -> None:
    model = adapted(base, experts=experts, **keys)
    if model.get_base_model().supports_gradient_checkpointing:  # JetMoE has no layers that transformers can recompute
        enable_checkpointing(model)
    model.train()
    twin, leaves = dense_twin(model, base)
    found, expected = model(input_ids=IDS, use_cache=False).logits, twin(input_ids=IDS).logits
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    expected.square().sum().backward()
    vectors = named_vectors(model)
    assert len(vectors) == sum(map(len, leaves.values()))
    for name, own in leaves.items():
        for kind, leaf in own.items():
            # of LongCat-Flash, whose router is fp32 in transformers too, 3e-4 at this seed and 2e-5 at others
            assert relative(vectors[f"base_model.model.{name}.{kind}"].grad, leaf.grad) < 5e-4


def loop(stack: ExpertStack, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Row by row, in fp64."""
    weights = stack.dense(0, stack.spec.experts, torch.float32).double()
    each = [weights[e] for e in routing.experts.tolist()]
    return torch.stack(
        [w.t() @ v if stack.spec.is_transposed else w @ v for w, v in zip(each, x.double(), strict=True)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chosen", [[[0], [0], [0]], [[2, 0], [2, 3], [0, 3]]], ids=["one gets all", "one gets none"])
def test_the_product_is_that_of_each_row_with_its_expert(
    chosen: list[list[int]], transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an expert is dequantized in blocks."""
    monkeypatch.setattr("qvera.models.experts.BLOCK_WEIGHTS", 64 * 24)
    spec = StackSpec(4, 96, 64, transposed)
    generator = torch.Generator().manual_seed(0)
    stack = ExpertStack(spec, torch.randn(spec.shape, generator=generator).to(dtype))
    routing, _ = route(torch.tensor(chosen), 4)
    x = torch.randn(len(routing.experts), stack.in_features, generator=generator, dtype=dtype, requires_grad=True)
    y = stack(x, routing)
    assert relative(y, loop(stack, x.detach(), routing)) < (1e-6 if dtype == torch.float32 else 1e-2)
    upstream = torch.randn(y.shape, generator=generator, dtype=dtype)
    y.backward(upstream)
    back = ExpertStack(spec._replace(is_transposed=not transposed), stack.weight.data)
    assert relative(x.grad, loop(back, upstream, routing)) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_only_experts_that_a_token_was_sent_to_are_dequantized(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stacks(load_base(section(bases("mixtral"))).model)[0]
    read: list[int] = []
    blocks = ExpertStack.blocks

    def noted(self: ExpertStack, expert: int, dtype: torch.dtype) -> Any:
        read.append(expert)
        return blocks(self, expert, dtype)

    monkeypatch.setattr(ExpertStack, "blocks", noted)
    routing, _ = route(torch.tensor([[3], [1], [3]]), 4)
    stack_product(stack, torch.randn(3, stack.in_features), routing, by_columns=False)
    assert read == [1, 3]


def test_saved_loaded_and_merged_it_gives_the_same_logits(base: Path, tmp_path: Path) -> None:
    """Merged into the 16-bit files, where experts are single or stacked, and into the 4-bit copy."""
    model = adapted(base)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_base(section(base)).model, tmp_path / "adapter")
    options = ExportSection(dtype="float32", base="dequantized")
    sections = {"files": section(base), "copy": section(base).replace(path=str(cached_base(section(base))))}
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        assert torch.equal(again(input_ids=IDS).logits, trained)
        for name, each in sections.items():
            export_merged(tmp_path / "adapter", each, tmp_path / name, options)
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
            torch.testing.assert_close(merged(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-4)


def test_a_merged_export_in_4_bits_says_the_error_of_experts_that_are_single_in_the_files(
    bases: Any, tmp_path: Path
) -> None:
    base = section(bases("mixtral"))
    save_adapter(adapted(bases("mixtral")), tmp_path / "adapter")
    options = ExportSection(dtype="float32")
    found = export_quantized(tmp_path / "adapter", base, tmp_path / "4 bits", options, "nf4")
    export_merged(tmp_path / "adapter", base, tmp_path / "merged", options)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    made = load_base(base.replace(path=str(tmp_path / "4 bits"))).model
    for name, spec in expert_specs(merged).items():
        stack: Any = made.get_submodule(name)
        off = relative(stack.dense(0, spec.experts, torch.float32), merged.get_parameter(name))
        assert found["quantized"]["relative_errors"][name] == pytest.approx(off, rel=1e-4)


def on_experts(base: Path) -> list[str]:
    """Targets: the routed experts, and attention's last linear. PEFT has no place for dense MLPs beside experts."""
    empty = empty_model(section(base))
    stacked = {".".join(name.split(".")[-2:]) for name in expert_specs(empty)}
    return sorted(stacked | {"o_proj" for name, _ in empty.named_modules() if name.endswith(".o_proj")})


@pytest.mark.parametrize("experts", ["each", "shared"])
def test_peft_opens_the_exported_lora_of_experts_with_the_same_logits(base: Path, experts: str, tmp_path: Path) -> None:
    """Whole, and cut to a rank."""
    plain = section(base, quantization="none")
    model = adapted(base, experts=experts, model=load_base(plain).model, targets=on_experts(base))
    save_adapter(model, tmp_path / "adapter")
    empty = empty_model(plain)
    deltas = read_deltas(tmp_path / "adapter", empty)
    if base.name == "dbrx":
        with pytest.raises(InputError, match=r"PEFT takes .*experts\.mlp\.v1 \(and 5 more\) for one matrix"):
            require_kept_by_peft(deltas, empty)
        return
    with pytest.raises(
        InputError, match=r"has vectors of experts .* Export it with --to lora \(exact\) or --to merged"
    ):
        export_stock_vera(deltas, tmp_path / "peft")
    places = require_kept_by_peft(deltas, empty)
    assert places.keys() == expert_specs(empty_model(plain)).keys()
    for rank in (None, 7):
        errors = write_lora(deltas, tmp_path / str(rank), torch.float32, rank, None, None, print, places)
    assert len(errors or {}) == sum(max(delta.experts, 1) for delta in deltas.layers.values())
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        for rank, bound in ((None, 1e-5), (7, 0.5)):
            stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / str(rank)).eval()
            found = relative(stock(input_ids=IDS).logits, trained)
            assert found < bound
    assert found > 1e-4


def test_rows_of_a_batch_use_the_experts_of_their_own_adapters(bases: Any, tmp_path: Path) -> None:
    base, names = bases("gpt_oss"), ["a", "b", "shared"]
    alone = []
    for seed, name in enumerate(names):
        model = adapted(base, seed, "shared" if name == "shared" else "each")
        save_adapter(model, tmp_path / name)
        with torch.no_grad():
            alone.append(model(input_ids=IDS[:1]).logits[0])
    model = load_adapters(load_base(section(base)).model, {name: tmp_path / name for name in names})
    with torch.no_grad():
        mixed = model.eval()(input_ids=IDS[:1].repeat(4, 1), adapter_names=["b", "shared", "a", "b"]).logits
    for row, expected in zip(mixed, [alone[1], alone[2], alone[0], alone[1]], strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_a_lora_of_experts_is_a_file_that_peft_opens(bases: Any, tmp_path: Path, capsys: Any) -> None:
    """And qvera again, alone and beside others in a batch; exported and merged it gives the same logits."""
    for name in _FAST[:3]:
        base, alone = bases(name), []
        plain, directory = section(base, quantization="none"), tmp_path / name
        for seed in (1, 2):
            model = adapted(base, seed, model=load_base(plain).model, targets=on_experts(base), **LORA)
            save_adapter(model, directory / str(seed))
            with torch.no_grad():
                alone.append(model(input_ids=IDS).logits)
        deltas = read_deltas(directory / "1", empty_model(plain))
        with pytest.raises(InputError, match=r"method is lora, which PEFT's VeRA is not\. Export it with --to lora"):
            export_stock_vera(deltas, directory / "peft")
        export_lora(
            deltas, directory / "export", torch.float32, places=require_kept_by_peft(deltas, empty_model(plain))
        )
        export_merged(directory / "1", plain, directory / "merged", ExportSection(dtype="float32"))
        dense = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # noqa: E731
        opened = [PeftModel.from_pretrained(dense(base), directory / file).eval() for file in ("1", "export")]
        opened += [load_adapter(load_base(plain).model, directory / "1"), dense(directory / "merged")]
        together = load_adapters(load_base(plain).model, {seed: directory / seed for seed in ("1", "2")}).eval()
        with torch.no_grad():
            for found in opened:
                torch.testing.assert_close(found(input_ids=IDS).logits, alone[0], rtol=1e-4, atol=1e-4)
            mixed = together(input_ids=IDS, adapter_names=["1", "2"]).logits
        for row, expected in enumerate(alone):
            torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-4)


def test_a_lora_of_experts_is_refused_where_peft_has_no_place_for_it(bases: Any) -> None:
    for name, family in (("llama4_text", "Llama 4"), ("dbrx", "DBRX")):
        with pytest.raises(InputError, match=rf"PEFT takes the matrices of {family}'s experts for others"):
            adapted(bases(name), **LORA)
    for keys, words in (({"experts": "shared"}, "shared is VeRA's"), ({"experts": "each", "dropout": 0.1}, "dropout")):
        with pytest.raises(InputError, match=words):
            method_of(AdapterSection.model_validate({"method": "lora", **keys}))


@pytest.mark.parametrize(("experts", "keys"), [("each", {}), ("shared", {}), ("each", LORA)])
def test_adapters_that_train_together_get_the_gradients_that_they_get_alone(
    bases: Any, experts: str, keys: dict[str, Any]
) -> None:
    base = bases("mixtral")
    model = adapted(base, experts=experts, **keys)
    bank = AdapterBank(model, 3)
    generator = torch.Generator().manual_seed(2)
    for slot in range(3):
        bank.vectors[slot].copy_(torch.randn(bank.numbers, generator=generator) * 0.3)
    rows = torch.randint(3, 300, (3, 6), generator=generator)

    def gradients(slots: list[int]) -> torch.Tensor:
        bank.gradients.zero_()
        with bank.rows(slots, [6] * len(slots)):
            model(input_ids=rows[slots], use_cache=False).logits.square().sum().backward()
        return bank.gradients.clone()

    together = gradients([0, 1, 2])
    for slot in range(3):
        assert relative(together[slot], gradients([slot])[slot]) < 1e-5


@pytest.mark.parametrize("keys", [{}, LORA], ids=["vera", "lora"])
def test_a_run_adapts_experts_resumes_to_the_bit_and_is_planned(
    bases: Any, make_recipe: Any, tmp_path: Path, keys: dict[str, Any]
) -> None:
    recipe = make_recipe(
        model={"path": str(bases("mixtral")), "quantization": "nf4", "compute_dtype": "float32"},
        adapter={"rank": 8, "experts": "each", **keys},
        training={"max_steps": 2, "save_steps": 1},
    )
    train(recipe, tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["result"]["eval_after"]["loss"] < run["result"]["eval_before"]["loss"]
    assert run["adapter"]["experts"] == "each"
    assert run["plan"]["trained_numbers"] == run["adapter"]["trainable_parameters"]
    standing = [part["bytes"] for part in run["plan"]["memory"]["moments"]["backward"] if part["kind"] == "base"]
    assert sum(standing) == pytest.approx(run["model"]["base_bytes"], rel=0.5)
    train(recipe, cut_off(tmp_path / "run", tmp_path / "cut", after=1), resume=True)
    written = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "cut")]
    assert written[0] == written[1]


def test_streamed_experts_give_the_same_logits(bases: Any) -> None:
    base = bases("mixtral")
    resident, streamed = (load_base(section(base)).model for _ in range(2))
    stream_layers(streamed, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(streamed(input_ids=IDS).logits, resident(input_ids=IDS).logits)


def test_dense_experts_are_adapted_too(bases: Any) -> None:
    base = bases("qwen3_moe")
    model = adapted(base, model=load_base(section(base, quantization="none")).model)
    twin, _ = dense_twin(model, base)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=IDS).logits.double(), twin(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )


def test_peft_s_delta_weight_of_experts_is_that_of_each_expert(bases: Any) -> None:
    layers = [layer for layer in adapted_layers(adapted(bases("mixtral"))) if isinstance(layer, QveraExperts)]
    assert layers
    for layer in layers:
        expected = delta(layer, {k: v.detach().double() for k, v in layer.vectors("default").items()})
        torch.testing.assert_close(layer.get_delta_weight("default"), expected.float())


def test_a_target_names_experts_only_where_they_are_adapted(bases: Any) -> None:
    base = bases("qwen3_5_moe_text")
    for experts, expected in (("none", False), ("each", True)):
        keys = {"targets": ["down_proj", "q_proj"], "experts": experts}
        model = attach(load_base(section(base)).model, AdapterSection(rank=8, **keys), str(base))
        assert any(".experts." in name for name in named_vectors(model)) == expected
        assert any(".shared_expert." in name for name in named_vectors(model))


def test_a_lora_whose_dense_mlps_peft_takes_for_experts_is_refused(bases: Any, tmp_path: Path) -> None:
    base = bases("glm4_moe")
    for name, targets in (("all", "all-linear"), ("attention", ["q_proj", "o_proj"])):
        save_adapter(adapted(base, experts="none", targets=targets), tmp_path / name)
    empty = empty_model(section(base))
    with pytest.raises(
        InputError, match=r"PEFT would not adapt model\.layers\.0\.mlp\.down_proj .* takes the name for that of"
    ):
        require_kept_by_peft(read_deltas(tmp_path / "all", empty), empty)
    empty = empty_model(section(base))
    kept = read_deltas(tmp_path / "attention", empty)
    require_kept_by_peft(kept, empty)
    export_lora(kept, tmp_path / "lora", torch.float32)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
    model = load_adapter(load_base(section(base, quantization="none")).model, tmp_path / "attention")
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_what_peft_would_drop_or_refuse_is_said_before_the_training(make_recipe: Any, tmp_path: Path) -> None:
    """Of a LoRA that a run would save, and of the export of a VeRA."""
    for name, words in (("glm4_moe", "PEFT would not adapt"), ("falcon_h1", "PEFT refuses a LoRA")):
        FAMILIES[name].write(tmp_path / name)
        for keys, begins in ((LORA, "This run's LoRA is qvera's alone: "), ({}, "--to lora will be refused: ")):
            for targets, is_said in (("all-linear", True), (["q_proj", "o_proj"], False)):
                recipe = make_recipe(
                    model=section(tmp_path / name).to_dict(), adapter={"rank": 8, "targets": targets, **keys}
                )
                plan = make_plan(recipe, torch.device("cpu"))
                assert any(line.startswith(begins + words) for line in plan.warnings) == is_said


def test_routers_are_neither_adapted_nor_quantized(tmp_path: Path) -> None:
    """Also those that are linears of a module called gate."""
    sizes = {"num_experts": 4, "moe_topk": 2, "head_dim": 16, "moe_intermediate_size": 128}
    base = write("hunyuan_v1_moe", tmp_path, **sizes)
    model = adapted(base, experts="none").get_base_model()
    gates = {name: module for name, module in model.named_modules() if name.endswith("gate.wg")}
    assert gates
    assert all(type(module) in (torch.nn.Linear, linear.FrozenLinear) for module in gates.values())


def test_experts_of_two_dimensions_are_counted_as_experts() -> None:
    """DBRX has all experts of a projection one below the other."""
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}
    experts = {"hidden_size": 64, "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    config = AutoConfig.for_model("dbrx", **sizes, attn_config=attention, ffn_config=experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in expert_weights(model).values()) == 2 * 3 * 4 * 128 * 64


def test_run_experts_is_what_transformers_calls(bases: Any) -> None:
    model = load_base(section(bases("mixtral"))).model
    (module, *_) = [m for m in model.modules() if hasattr(m, "_apply_gate")]
    hidden, chosen, shares = torch.randn(5, 64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    assert torch.equal(module(hidden, chosen, shares), run_experts(module, hidden, chosen, shares))
