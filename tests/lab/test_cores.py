"""LoRA-XS, LoRA-SB and SARA beyond what holds for every method: authors' numbers, ranks, the router, factors of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from qvera.adapters import QveraConfig, QveraLinear
from qvera.adapters.config import PREFIX
from qvera.adapters.factors import Factors
from qvera.adapters.products.functional import project
from qvera.adapters.save_load import attach, check_start, load_adapter, named_vectors, save_adapter
from qvera.cli.main import main
from qvera.config.sections import AdapterSection, ModelSection
from qvera.data import batches_of, build_datasets, collate
from qvera.evaluation.load import open_run
from qvera.exporting.deltas import read_deltas
from qvera.lab import lora_sb
from qvera.lab.factor_record import FACTORS
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.models.tokenizer import load_tokenizer
from qvera.training.loop import AloneLoop
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import IDS, IN, OUT, base_layer, dense_weight, logits, perturb, relative
from tests.conftest import small_llama
from tests.lab.authors import numbers_of
from tests.training.runs import cut_off, same, vectors

SARA: dict[str, Any] = {"method": "sara", "rank": 16, "singular_share": 0.3}
MIXTURES: dict[str, dict[str, Any]] = {
    "seeded": {**SARA, "mixed_vectors": 3},
    "of the weights": {**SARA, "mixed_vectors": 3, "frozen_pair": "svd"},
}


# The authors' numbers.


@pytest.mark.parametrize(
    ("file", "parts", "suffix"),
    [
        ("lora_xs_tall", "sk0240_{}_tall", "_tall"),
        ("lora_xs_wide", "sk191_{}_wide", "_wide"),
        ("lora_sb", "q_proj_{}", None),
        ("lora_sb", "o_proj_{}", None),
    ],
)
def test_the_authors_numbers_with_their_factors(file: str, parts: str, suffix: str | None) -> None:
    theirs = numbers_of(file)

    def read(name: str) -> torch.Tensor:
        key = parts.format(name)
        return theirs[key if key in theirs else f"{name}{suffix}"].clone()

    R, x, g = read("R").requires_grad_(), read("x").requires_grad_(), read("g")
    factors = Factors(read("A"), read("B"), R=R, scale=float(theirs["scaling"]))
    y = factors.expand(nn.functional.linear(x, read("W"), read("bias")), project(x, factors.A))
    y.backward(g)
    assert R.grad is not None
    for found, name in ((y, "y"), (x.grad, "grad_x"), (R.grad, "grad_R")):
        torch.testing.assert_close(found, read(name), rtol=0, atol=1e-12)
    delta = factors.scale * factors.B @ R @ factors.A
    torch.testing.assert_close(delta, read("delta_weight"), rtol=0, atol=1e-12)
    if suffix == "_tall":
        rate, beta1, beta2, epsilon, decay = theirs["adamw"].tolist()
        torch.optim.AdamW([R], lr=rate, betas=(beta1, beta2), eps=epsilon, weight_decay=decay).step()
        torch.testing.assert_close(R, read("R_after_step"), rtol=0, atol=1e-12)


def mixture(kind: str, dtype: torch.dtype, settings: dict[str, Any]) -> QveraLinear:
    """A linear adapted with Mo-SARA, away from its start."""
    model = nn.ModuleDict({"linear": base_layer(kind, dtype)})
    peft_model: Any = get_peft_model(model, QveraConfig(target_modules=["linear"], **settings))  # type: ignore[arg-type]
    for number, vector in enumerate(named_vectors(peft_model).values()):
        torch.manual_seed(number)
        vector.data = torch.randn(vector.shape).mul_(0.3)
    return next(m for m in peft_model.modules() if isinstance(m, QveraLinear))


def routed(layer: QveraLinear, x: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output in fp64, from the definition."""
    pair, (method, config) = layer.pair("default"), layer.qvera_settings["default"]
    assert pair is not None
    A, B = (factor.double() for factor in pair)
    z = x @ A.t()
    score = (z / z.square().mean(-1, keepdim=True).sqrt()) @ vectors["qvera_router_in"]
    gates = torch.softmax(score.unsqueeze(-1) * vectors["qvera_router_out"], -1)
    scale = method.scale(config, layer.spec)  # type: ignore[attr-defined]
    delta = scale * vectors["qvera_b"] * ((z * (gates @ vectors["qvera_d"])) @ B.t())
    return nn.functional.linear(x, dense_weight(layer.base_layer), layer.base_layer.bias.double()) + delta


@pytest.mark.parametrize(
    ("variant", "kind", "dtype"),
    [
        ("seeded", "linear", torch.float32), ("of the weights", "conv1d", torch.float16),
        ("seeded", "nf4+dq-bfloat16", torch.bfloat16), ("of the weights", "int8", torch.bfloat16),
    ],
)  # fmt: skip
def test_the_router_and_every_gradient_against_dense_fp64(variant: str, kind: str, dtype: torch.dtype) -> None:
    layer = mixture(kind, dtype, MIXTURES[variant])
    torch.manual_seed(9)
    x, g = torch.randn(2, 7, IN).to(dtype).requires_grad_(), torch.randn(2, 7, OUT).to(dtype)
    y = layer(x)
    y.backward(g)
    wide = {name: p.detach().double().requires_grad_() for name, p in layer.vectors("default").items()}
    x_wide = x.detach().double().requires_grad_()
    expected = routed(layer, x_wide, wide)
    expected.backward(g.double())
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    assert relative(y.detach(), expected.detach()) < limit
    assert relative(x.grad, x_wide.grad) < limit
    for name, vector in layer.vectors("default").items():
        assert relative(vector.grad, wide[name].grad) < limit, name


def test_a_fresh_mixture_is_the_base_and_checkpointing_changes_no_bit() -> None:
    plain, grads = logits(small_llama()), []
    for checkpointed in (False, True):
        model = attach(small_llama(), AdapterSection(**MIXTURES["seeded"]))
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-5)
        perturb(model)
        if checkpointed:
            enable_checkpointing(model)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: v.grad for n, v in named_vectors(model).items()})
    for name, grad in grads[0].items():
        assert grad is not None
        assert torch.equal(grad, grads[1][name])


def test_sara_ranks_follow_the_spectrum() -> None:
    model = attach(
        small_llama(), AdapterSection.model_validate({"method": "sara", "rank": 1000, "singular_share": 0.4})
    )
    config: Any = model.peft_config["default"]
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, QveraLinear):
            values = torch.linalg.svdvals(layer.base_layer.weight.double())
            share = values.cumsum(0) / values.sum()
            k = config.ranks[name]
            assert share[k - 1] >= 0.4
            assert k == 1 or share[k - 2] < 0.4
            assert layer.vectors("default")["qvera_d"].shape == (k,)
    assert len(set(config.ranks.values())) > 2


def test_a_rank_above_the_smaller_side_is_refused_by_name() -> None:
    for method in ("lora-xs", "lora-sb"):
        with pytest.raises(InputError, match=r"self_attn.k_proj \[32, 64\] has 32 singular values, and the rank is 40"):
            attach(small_llama(), AdapterSection(method=method, rank=40, targets=["k_proj", "v_proj"]))


@pytest.fixture(scope="module")
def xs(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The recipe and the directory of a run of LoRA-XS."""
    directory = tmp_path_factory.mktemp("runs") / "xs"
    recipe = make_recipe(adapter={"method": "lora-xs", "rank": 6}, training={"max_steps": 1})
    train(recipe, directory)
    return recipe, directory


def test_a_mixture_resumes_to_the_bit_and_its_router_refuses_to_be_merged(
    make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, cut = tmp_path / "run", tmp_path / "cut"
    recipe = make_recipe(adapter=MIXTURES["of the weights"], training={"save_steps": 1, "max_steps": 2})
    train(recipe, directory)
    train(recipe, cut_off(directory, cut, after=1), resume=True)
    assert same(vectors(cut), vectors(directory))
    for to in ("lora", "merged"):
        assert main(["export", str(directory), str(tmp_path / "out"), "--to", to]) == 2
        assert "adapter.mixed_vectors: the router mixes 3 sets of values for each token" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["serve", str(directory), "--port", "0"]) == 2
    assert "`qvera generate` and `qvera chat` take it." in capsys.readouterr().err
    assert main(["generate", str(directory), "--prompt", "say red", "--max-new-tokens", "2"]) == 0
    layer = next(m for m in open_run(directory).model.modules() if isinstance(m, QveraLinear))
    with pytest.raises(InputError, match="the router mixes 3 sets"):
        layer.merge()


def test_an_export_makes_the_factors_anew_where_the_cache_lost_them(xs: tuple[Any, Path]) -> None:
    recipe, directory = xs
    adapter, empty = directory / "adapter", empty_model(recipe.model)
    known = read_deltas(adapter, empty)
    for entry in FACTORS.listed():
        FACTORS.remove(entry.name)
    with pytest.raises(InputError, match="A and B are not in the cache"):
        read_deltas(adapter, empty)
    again = read_deltas(adapter, empty, recipe.model)
    for name, delta in known.layers.items():
        assert torch.equal(delta.rows(), again.layers[name].rows())


def test_a_base_stored_otherwise_has_other_factors_and_is_refused(xs: tuple[Any, Path], tmp_path: Path) -> None:
    recipe, directory = xs
    other = recipe.model.replace(quantization="none")
    base = load_base(other, torch.device("cpu"))
    refused = r"not those that the adapter was trained with .* and model.compute_dtype"
    with pytest.raises(InputError, match=refused):
        load_adapter(base.model, directory / "adapter", base)
    for name, adapter in (("xs", {"method": "lora-xs", "rank": 6}), ("sara", {**SARA, "frozen_pair": "svd"})):
        save_adapter(attach(small_llama(), AdapterSection.model_validate(adapter)), tmp_path / name)
        with pytest.raises(InputError, match=refused):  # weights of float32, which bfloat16 rounds
            load_adapter(small_llama().to(torch.bfloat16), tmp_path / name)


@pytest.fixture(scope="module")
def sb(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The recipe and the directory of a run of LoRA-SB whose only step moves next to nothing."""
    directory = tmp_path_factory.mktemp("runs") / "sb"
    recipe = make_recipe(
        adapter={"method": "lora-sb", "rank": 6, "gradient_rows": 8, "targets": ["k_proj", "down_proj"]},
        training={"max_steps": 1, "learning_rate": 1e-30, "warmup_ratio": 0.0, "try_longest_batch": False},
        model={"quantization": "none"},
    )
    train(recipe, directory)
    return recipe, directory


def test_lora_sb_starts_from_the_sign_of_the_gradient(sb: tuple[Any, Path]) -> None:
    """−η sign(G) at the first rate η, by the gradient that autograd takes of a dense copy of the base."""
    recipe, directory = sb
    datasets = build_datasets(recipe.data, load_tokenizer(recipe.model))
    rows = [datasets.train[i] for i in batches_of(recipe, datasets.train).epoch_order(0)[:8]]
    dense = load_base(recipe.model, torch.device("cpu")).model.float().requires_grad_(True)
    batch = collate(rows, datasets.pad_id, torch.device("cpu"))
    found = dense(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[:, :-1]
    nn.functional.cross_entropy(found.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").backward()
    for name, parts in by_linear(directory).items():
        sign = -dense.get_submodule(name).weight.grad.sign().double()
        A, B, R = (parts[key].double() for key in ("qvera_frozen_A", "qvera_frozen_B", "qvera_R"))
        best = torch.linalg.svdvals(sign)[6:].square().sum()
        error = (sign - B @ (R * 1e30) @ A).square().sum()
        step = 6 * 6  # the run's only step has moved each element of R by the rate
        assert error < best + 1.05 * step, name


def test_lora_sb_takes_as_many_weights_and_rows_at_a_time_as_memory_holds(
    sb: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole = sb
    real = AloneLoop.nll

    def nll(loop: AloneLoop, examples: Any, *rest: Any) -> Any:
        if not rest and len(examples) > 2:  # not a step's
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(loop, examples, *rest)

    monkeypatch.setattr(AloneLoop, "nll", nll)
    with pytest.raises(InputError, match="does not fit into memory"):
        train(recipe.replace(training=recipe.training.replace(on_oom="save")), tmp_path / "save")
    monkeypatch.setattr(lora_sb, "_SHARE_OF_FREE_MEMORY", 2**50)  # one weight at a time
    train(recipe.replace(training=recipe.training.replace(on_oom="halve")), tmp_path / "halved")
    one, other = vectors(whole), vectors(tmp_path / "halved")
    for name in (n for n in one if "frozen" in n):
        assert ((one[name] - other[name]).abs() < 0.02).float().mean() > 0.95, name  # a sign of almost 0 may differ


def test_a_sara_of_other_settings_is_no_start(tmp_path: Path) -> None:
    section = AdapterSection.model_validate({"method": "sara", "rank": 8, "singular_share": 0.5, "frozen_pair": "svd"})
    save_adapter(attach(small_llama(), section), tmp_path / "adapter")
    other = section.replace(singular_share=0.3, init_from=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=r"has singular_share 0\.5, the recipe 0\.3"):
        check_start(other, ModelSection(path="nowhere"))


def by_linear(run_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in vectors(run_dir).items():
        name, _, kind = key.removeprefix(PREFIX).rpartition(".")
        found.setdefault(name, {})[kind] = tensor
    return found


def test_adapters_of_several_methods_share_one_base() -> None:
    model = attach(small_llama(), AdapterSection(method="lora-xs", rank=6))
    perturb(model)
    alone = logits(model)
    for name, settings in (("sara", SARA), ("mo", MIXTURES["seeded"]), ("sb", {"method": "lora-sb", "rank": 6})):
        model.add_adapter(name, QveraConfig(**settings))
        perturb(model, adapter=name)
        model.set_adapter(name)
        assert (logits(model) - alone).abs().max() > 1e-3
        trained = {n.rpartition(".")[2] for n, v in named_vectors(model, name).items() if v.requires_grad}
        assert trained == {kind for kind in trained if "frozen" not in kind}
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
