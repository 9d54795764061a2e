"""PEFT's options beside the vectors: modules to save, biases, layers, exclusions, dtypes, as PEFT's own tuners have them.

The small models are those of PEFT's tests/test_custom_models.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig
from transformers.pytorch_utils import Conv1D

from qvera.adapters import QveraConfig, QveraLinear
from qvera.adapters.adapter_file import read_config
from qvera.adapters.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.config.sections import AdapterSection, ModelSection
from qvera.exporting.deltas import read_deltas
from qvera.models import linear
from qvera.serve.slots import require_served
from qvera.utils.errors import InputError
from tests.adapters.helpers import edit_config, perturb
from tests.conftest import small_llama


class MLP(nn.Module):
    """Two linears with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.relu(self.lin0(X))).log_softmax(-1)


class EmbeddingConv1D(nn.Module):
    """An embedding, transformers' Conv1D and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), Conv1D(1, 5), nn.Linear(10, 2)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.conv1d(self.emb(X)).reshape(len(X), -1))


class Stack(nn.Module):
    """Three numbered layers, twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(6, 6)}) for _ in range(3))
        self.blocks = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(6, 6)}) for _ in range(3))

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.blocks):
            X = torch.tanh(layer["lin"](X))
        return X


CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "one linear": (MLP, {"target_modules": "lin0"}),
    "modules to save": (MLP, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "a target that is saved whole": (MLP, {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    "all biases": (MLP, {"target_modules": ["lin0"], "bias": "all"}),
    "biases of adapted linears": (MLP, {"target_modules": ["lin0"], "bias": "qvera_only"}),
    "Conv1D and a saved embedding": (EmbeddingConv1D, {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
    "one layer": (Stack, {"target_modules": "all-linear", "layers_to_transform": 1, "layers_pattern": "layers"}),
    "layers and an exclusion": (
        Stack, {"target_modules": ["lin"], "layers_to_transform": [0, 2], "layers_pattern": ["layers", "blocks"],
                "exclude_modules": r"blocks\..*"},
    ),
}  # fmt: skip


def inputs(kind: type[nn.Module]) -> torch.Tensor:
    if kind is EmbeddingConv1D:
        return torch.arange(90).view(9, 10)
    width = 10 if kind is MLP else 6
    return torch.linspace(-1, 1, 9 * width).view(9, width)


def fresh(case: str, **settings: Any) -> Any:
    kind, options = CASES[case]
    torch.manual_seed(1)  # a saved module starts as the base has it, vectors without init_weights at random
    return get_peft_model(kind(), QveraConfig(rank=4, **options, **settings))  # type: ignore[arg-type]


def trained(case: str) -> Any:
    """Three steps of SGD from a random start."""
    model = fresh(case, init_weights=False).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs(CASES[case][0])).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_is_what_changes_and_what_is_saved(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    X = inputs(kind)
    model, before = trained(case), dict(fresh(case, init_weights=False).named_parameters())
    with torch.no_grad():
        assert torch.equal(fresh(case).eval()(X), kind().eval()(X))
        wanted = model(X)
        assert not torch.allclose(wanted, kind().eval()(X))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("qvera_b" in n for n in names)
    assert any("modules_to_save" in n for n in names) is ("modules_to_save" in options)
    biases = {n for n in names if n.endswith("bias") and "modules_to_save" not in n}
    count = {"all": 2, "qvera_only": 1}.get(options.get("bias", "none"), 0)
    assert len(biases) == count

    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(kind(), tmp_path / "adapter").eval()(X), wanted)
        # frozen biases let the layer take its product with W + ΔW, which rounds otherwise
        torch.testing.assert_close(load_adapter(kind(), tmp_path / "adapter")(X), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.merge_and_unload()(X), wanted, rtol=1e-4, atol=1e-5)


def test_layers_and_exclusions_pick_the_right_modules() -> None:
    for case, names in (("one layer", ["1"]), ("layers and an exclusion", ["0", "2"])):
        adapted = [n for n, m in fresh(case).named_modules() if isinstance(m, QveraLinear)]
        assert adapted == [f"base_model.model.layers.{name}.lin" for name in names]
    with pytest.raises(InputError, match="within layers_to_transform 7"):
        get_peft_model(Stack(), QveraConfig(rank=4, target_modules=["lin"], layers_to_transform=7))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layers_pattern: takes effect only with layers_to_transform"):
        QveraConfig(rank=4, layers_pattern="layers")
    with pytest.raises(InputError, match="bias: takes one of none, all, qvera_only, got 'vera_only'"):
        QveraConfig(rank=4, bias="vera_only")


def test_disabling_an_adapter_with_biases_warns_and_only_one_may_have_them() -> None:
    model = trained("biases of adapted linears")
    with pytest.warns(UserWarning, match="bias configured to be 'qvera_only'"), model.disable_adapter():
        model(inputs(MLP))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", QveraConfig(rank=4, target_modules=["lin0"], bias="all"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_without_autocast_vectors_have_the_dtype_of_their_layers(dtype: torch.dtype, tmp_path: Path) -> None:
    X = inputs(MLP).to(dtype)
    model = get_peft_model(
        MLP().to(dtype),  # type: ignore[arg-type]
        QveraConfig(rank=4, target_modules=["lin0"], init_weights=False),
        autocast_adapter_dtype=False,
    )
    assert {v.dtype for v in named_vectors(model).values()} == {dtype}
    wanted = model(X)
    assert wanted.dtype == dtype
    wanted.sum().backward()
    assert all(v.grad is not None and v.grad.dtype == dtype for v in named_vectors(model).values())
    model.save_pretrained(tmp_path)
    for autocast in (False, True):
        again = PeftModel.from_pretrained(MLP().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
        assert {v.dtype for v in named_vectors(again).values()} == {torch.float32 if autocast else dtype}
        assert torch.equal(again(X), wanted)


def classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=304, num_labels=3, pad_token_id=0)
    return AutoModelForSequenceClassification.from_config(config)


def test_a_classification_head_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    ids, labels = torch.tensor([[5, 9, 200, 31], [8, 8, 30, 1]]), torch.tensor([0, 2])
    model = get_peft_model(classifier(), QveraConfig(rank=8, task_type="SEQ_CLS"))
    head = model.base_model.model.score
    assert not isinstance(head, QveraLinear)
    perturb(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    start = head.modules_to_save["default"].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    assert not torch.equal(head.modules_to_save["default"].weight, start)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
    save_adapter(model, tmp_path / "adapter")
    base = classifier()
    base.score.weight.data.normal_()  # a head is drawn anew at each load of a base without one
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits, wanted)
        assert torch.equal(load_adapter(classifier(), tmp_path / "adapter")(input_ids=ids).logits, wanted)


def test_a_dense_layer_in_another_dtype_is_trained_where_it_is_saved_whole() -> None:
    """A head in bfloat16 that computes in fp32, as a mapped base has it; frozen it would get no gradient."""
    head = nn.Linear(8, 4).to(torch.bfloat16)
    head.__class__ = linear.FrozenLinear
    x = torch.randn(5, 8)
    head(x).square().sum().backward()
    y = nn.functional.linear(x, head.weight.float(), head.bias.float())
    assert head.weight.grad is not None
    torch.testing.assert_close(head.weight.grad.float(), 2 * y.t() @ x, rtol=2e-2, atol=2e-2)


def test_what_has_no_place_for_saved_modules_says_so(tmp_path: Path) -> None:
    model = get_peft_model(small_llama(), QveraConfig(rank=8, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="load it alone"):
        load_adapters(small_llama(), {"it": tmp_path / "adapter"})
    with pytest.raises(InputError, match=r"load it alone. `qvera generate` and `qvera chat` take it"):
        require_served(read_config(tmp_path / "adapter"), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"modules_to_save .*lm_head"):
        read_deltas(tmp_path / "adapter", small_llama())


def test_several_adapters_are_compared_with_their_projections(tmp_path: Path) -> None:
    save_adapter(get_peft_model(small_llama(), QveraConfig(rank=8)), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", projection_sha256="0" * 64)
    with pytest.raises(InputError, match=r"adapter: the projections of seed 0 have SHA-256 .* another generator"):
        load_adapters(small_llama(), {"it": tmp_path / "adapter"})


def test_a_rank_beyond_memory_is_refused_before_it_is_drawn(tmp_path: Path) -> None:
    save_adapter(get_peft_model(small_llama(), QveraConfig(rank=8)), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", rank=10**9, projection_shapes=None)
    for way in (
        lambda: QveraConfig(rank=10**9, target_modules=["lin0"]),
        lambda: PeftModel.from_pretrained(small_llama(), tmp_path / "adapter"),
        lambda: read_deltas(tmp_path / "adapter", small_llama()),
    ):
        with pytest.raises(InputError, match="rank: should be less than or equal to 65536, got 1000000000"):
            way()
    get_peft_model(small_llama(), VeraConfig(r=8, target_modules=["q_proj"])).save_pretrained(tmp_path / "vera")
    edit_config(tmp_path / "vera", r=10**9)
    with pytest.raises(InputError, match=r"r is 1000000000, but .*vera_lambda_d.*has 8 values"):
        load_adapter(small_llama(), tmp_path / "vera")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"r": 8}, r"PEFT's r is called rank here\. Write rank=8\."),
        ({"rank": 8, "lora_alpha": 16}, r"PEFT's lora_alpha is called alpha here\. Write alpha=16\."),
    ],
)
def test_a_field_of_pefts_own_configs_is_told_with_its_name_here(named: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        QveraConfig(**named)


def test_the_model_section_has_a_home_directory_as_an_absolute_path(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_model_dir.parent))
    monkeypatch.chdir(tiny_model_dir.parent)
    for written in (f"~/{tiny_model_dir.name}", tiny_model_dir.name, str(tiny_model_dir)):
        model = attach(small_llama(), AdapterSection(rank=8), ModelSection(path=written).path)
        assert model.peft_config["default"].base_model_name_or_path == str(tiny_model_dir)
    model = attach(small_llama(), AdapterSection(rank=8), "some-owner/some-model")
    assert model.peft_config["default"].base_model_name_or_path == "some-owner/some-model"


def test_an_adapter_put_on_beside_many_may_change_further_layers(tmp_path: Path) -> None:
    banked = get_peft_model(small_llama(), QveraConfig(rank=8, target_modules=["q_proj"]))
    perturb(banked)
    save_adapter(banked, tmp_path / "adapter")
    wider = QveraConfig(rank=8, target_modules=["q_proj", "v_proj"])
    model = load_adapters(small_llama(), {"banked": tmp_path / "adapter"})
    model.add_adapter("live", wider)
    alone = get_peft_model(small_llama(), wider, adapter_name="live")
    for changed in (model, alone):
        perturb(changed, adapter="live")
    rows = torch.tensor([[5, 9, 200, 31], [7, 150, 42, 3]])
    with torch.no_grad():
        logits = model.eval()(rows, adapter_names=["banked", "live"]).logits
        torch.testing.assert_close(logits[:1], banked.eval()(rows[:1]).logits)
        torch.testing.assert_close(logits[1:], alone.eval()(rows[1:]).logits)
