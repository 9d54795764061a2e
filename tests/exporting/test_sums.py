"""Many adapters on one base, and arithmetic between them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file

from qvera.adapters import QveraLinear
from qvera.adapters.config import QveraConfig
from qvera.adapters.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.cli.main import main
from qvera.config.sections import AdapterSection, ModelSection
from qvera.evaluation.generate import generate, generating
from qvera.evaluation.load import find_target, template_beside
from qvera.exporting.deltas import AdapterDeltas, read_deltas
from qvera.exporting.lora import export_lora
from qvera.exporting.sums import same_directions, stacked_factors, union
from qvera.models.loader import load_base
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_WEIGHTS
from tests.adapters.helpers import perturb
from tests.conftest import small_llama

pytestmark = pytest.mark.process

IDS = torch.randint(3, 300, (6, 9), generator=torch.Generator().manual_seed(0))
SHAPES: dict[str, dict[str, Any]] = {
    "a": {"rank": 8},
    "b": {"rank": 8},
    "smaller": {"rank": 5},
    "seed": {"rank": 6, "seed": 9},
    "few": {"rank": 8, "targets": ["q_proj", "down_proj"]},
    "pairs": {"rank": 8, "b_groups": 4},
    "halves": {"rank": 6, "b_groups": 2, "input_scale": True},
    "scaled": {"rank": 7, "input_scale": True},
}


@pytest.fixture(scope="module")
def section(tiny_model_dir: Path) -> ModelSection:
    return ModelSection(path=str(tiny_model_dir), compute_dtype="float32")


@pytest.fixture(scope="module")
def directories(section: ModelSection, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for number, (name, changes) in enumerate(SHAPES.items()):
        save_adapter(perturb(attach(small_llama(), AdapterSection(**changes), section.path), number), root / name)
    return {name: root / name for name in SHAPES}


NAMES = ["a", "smaller", "seed", "few", "__base__", "pairs"]


class Mixed(NamedTuple):
    """A base with all adapters, its tokenizer, and the logits of each adapter alone and of the base."""

    model: Any
    tokenizer: Any
    alone: dict[str, torch.Tensor]

    def assert_rows(self, names: list[str], model: Any = None) -> None:
        """Row by row what the adapter of that name gives alone."""
        with torch.no_grad():
            found = (model or self.model)(input_ids=IDS, adapter_names=names).logits
        expected = torch.stack([self.alone[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def mixed(section: ModelSection, directories: dict[str, Path]) -> Mixed:
    base = load_base(section)
    with torch.no_grad():
        alone = {"__base__": base.model(IDS).logits}
        for name, directory in directories.items():
            alone[name] = load_adapter(load_base(section).model, directory).eval()(IDS).logits
    return Mixed(load_adapters(base.model, directories), base.tokenizer, alone)


def test_rows_of_one_batch_are_what_each_adapter_gives_alone(mixed: Mixed, directories: dict[str, Path]) -> None:
    others = ["halves", "pairs", "b", "scaled", "scaled", "a"]
    for names in (NAMES, ["a"] * 6, ["a", "b"] * 3, others, ["__base__"] * 6):
        mixed.assert_rows(names)
    assert (mixed.alone["a"] - mixed.alone["b"]).abs().max() > 0.05
    with torch.no_grad():  # nothing is named, nothing is on
        torch.testing.assert_close(mixed.model(IDS).logits, mixed.alone["__base__"], rtol=1e-4, atol=1e-4)
    # adapters of one shape share a bank, and those of one seed a pair
    users = mixed.model.base_model.banked
    assert users.keys() == directories.keys() and users["a"][0] is users["b"][0]
    assert len({id(bank) for bank, _ in users.values()}) == len(directories) - 1
    for name, (bank, slot) in users.items():
        torch.testing.assert_close(bank.take(slot), load_file(directories[name] / ADAPTER_WEIGHTS), rtol=0, atol=0)
    layers = [m for m in mixed.model.modules() if isinstance(m, QveraLinear)]
    assert len({id(pair) for layer in layers for pair in layer.qvera_projection.values()}) == 2


def test_ordinary_adapters_mix_too(section: ModelSection, directories: dict[str, Path], mixed: Mixed) -> None:
    model = PeftModel.from_pretrained(load_base(section).model, directories["a"], adapter_name="a")
    for name in ("seed", "halves"):
        model.load_adapter(directories[name], name)
    mixed.assert_rows(["a", "seed", "__base__", "halves", "a", "halves"], model.eval())


def test_wrong_names_are_refused_and_leave_the_model_usable(mixed: Mixed) -> None:
    for names, train, said in (
        (["nobody"] * 6, False, "non-existing adapter.*nobody"),
        (["a", "a"], False, "2 names for a batch of 6"),
        (["a"] * 6, True, "training mode"),
    ):
        with pytest.raises(ValueError, match=said):
            mixed.model.train(train)(input_ids=IDS, adapter_names=names)
    mixed.model.eval()
    mixed.assert_rows(["a"] * 6)


def test_answers_of_a_mixed_batch(section: ModelSection, directories: dict[str, Path], mixed: Mixed) -> None:
    prompts = [IDS[row, : 4 + row % 3].tolist() for row in range(6)]
    answers = generate(mixed.model, mixed.tokenizer, prompts, max_new_tokens=3, batch_size=4, adapters=NAMES)
    for prompt, name, answer in zip(prompts, NAMES, answers, strict=True):
        base = load_base(section).model
        single = base if name == "__base__" else load_adapter(base, directories[name])
        assert generate(single, mixed.tokenizer, [prompt], max_new_tokens=3) == [answer], name
    with pytest.raises(ValueError, match="one for each"):
        generate(mixed.model, mixed.tokenizer, prompts, max_new_tokens=1, adapters=["a"])
    with generating(mixed.model, base_only=True):
        assert all(m.holds_inference_weight for m in mixed.model.modules() if isinstance(m, QveraLinear))
        mixed.assert_rows(NAMES)


def test_what_is_no_qvera_adapter_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(attach(small_llama(intermediate_size=128), AdapterSection(rank=8), "other"), tmp_path / "other")
    for adapters, said in (
        ({}, "at least one"),
        ({"x": tmp_path / "x"}, "no such directory"),
        ({"a": directories["a"], "other": tmp_path / "other"}, "this base and the adapter's config need"),
    ):
        with pytest.raises(InputError, match=said):
            load_adapters(small_llama(), adapters)


# arithmetic


@pytest.fixture(scope="module")
def without_d(section: ModelSection, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one seed that did not train d."""
    root = tmp_path_factory.mktemp("without-d")
    for number in range(2):
        model = attach(small_llama(), AdapterSection(rank=8, train_d=False, b_groups=4), section.path)
        assert not any(v.requires_grad for name, v in named_vectors(model).items() if name.endswith("_d"))
        perturb(model, number)
        for name, vector in named_vectors(model).items():
            if name.endswith("_d"):
                vector.data.fill_(0.1)
        save_adapter(model, root / str(number))
    return [root / "0", root / "1"]


def deltas(directory: Path) -> AdapterDeltas:
    return read_deltas(directory, small_llama())


def changes(directory: Path) -> dict[str, torch.Tensor]:
    return {name: delta.rows() for name, delta in deltas(directory).layers.items()}


@pytest.mark.parametrize("weights", [[-2.0], [0.3, 0.7], None])
def test_sums_of_adapters_that_share_d_are_exact_adapters(
    weights: list[float] | None, without_d: list[Path], section: ModelSection, tmp_path: Path
) -> None:
    used = without_d[: len(weights)] if weights else without_d
    flags = ["--weights", *map(str, weights)] if weights else []
    assert main(["merge-adapters", *map(str, used), str(tmp_path / "sum"), *flags]) == 0
    found = changes(tmp_path / "sum")
    parts = [changes(directory) for directory in used]
    for name, change in found.items():
        expected = sum(w * p[name] for w, p in zip(weights or [0.5, 0.5], parts, strict=True))
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-8)
    load_adapter(load_base(section).model, tmp_path / "sum")  # a whole adapter, hash of the projections and all


def test_a_sum_has_the_chat_template_of_its_adapters_if_they_share_one(
    without_d: list[Path], tmp_path: Path, capsys: Any
) -> None:
    for shared in (False, True):
        for number, directory in enumerate(without_d):
            file = shutil.copytree(directory, tmp_path / str(number), dirs_exist_ok=True) / "adapter_config.json"
            own = {"chat_template": "same" if shared else f"Be {number}."}  # with the run's system prompt
            file.write_text(json.dumps(json.loads(file.read_text()) | own))
        out = tmp_path / f"sum {shared}"
        assert main(["merge-adapters", str(tmp_path / "0"), str(tmp_path / "1"), str(out)]) == 0
        assert ("different chat templates, so none is written" in capsys.readouterr().out) is not shared
        assert template_beside(find_target(out)) == ("same" if shared else None)


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [("a", "b", "d (first at"), ("a", "seed", "seed"), ("a", "few", "set of layers"), ("pairs", "a", "b_groups")],
)
def test_any_two_add_up_exactly_to_a_lora(
    one: str, other: str, differ: str, directories: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    used, out = [directories[one], directories[other]], tmp_path / "sum"
    command = ["merge-adapters", *map(str, used), str(out), "--weights", "0.25,-2"]
    assert main([*command, "--to", "qvera"]) == 2  # not a VeRA adapter any more
    assert not out.exists()
    assert main(command) == 0
    rank, said = SHAPES[one]["rank"] + SHAPES[other]["rank"], capsys.readouterr().out
    assert f"they differ in {differ}" in said and f"So this writes a LoRA of rank {rank}." in said
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank
    tensors = load_file(out / "adapter_model.safetensors")
    first, second = (changes(directory) for directory in used)
    names = first.keys() | second.keys()
    assert len(tensors) == 2 * len(names)
    for name in names:
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        expected = 0.25 * first[name] - 2 * second.get(name, torch.zeros_like(first[name]))
        torch.testing.assert_close(B @ A, expected, rtol=1e-4, atol=1e-6)
    stock = PeftModel.from_pretrained(small_llama(), out)
    assert sum("lora_A" in n for n, _ in stock.named_parameters()) == len(names)


def test_a_sum_can_be_cut(directories: dict[str, Path], tmp_path: Path) -> None:
    used = [str(directories["a"]), str(directories["seed"])]
    assert main(["merge-adapters", *used, str(tmp_path / "cut"), "--to", "lora", "--rank", "4"]) == 0
    assert main(["merge-adapters", used[0], str(tmp_path / "cut2"), "--rank", "4"]) == 0  # a rank asks for a LoRA
    for name in ("cut", "cut2"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == 4


def test_refusals_say_what_is_wrong(directories: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    for options, said in (
        (["--weights", "1", "2"], "give one for each"),
        ([], "is one adapter, and this would copy it. Name others too, or scale it with --weights W."),
        (["--weights", "nan"], "--weights: expected numbers, got nan"),
        (["--rank", "4", "--to", "qvera"], "--rank: goes with --to lora only"),
        (["--dtype", "float16"], "--dtype: a QVERA adapter is written in float32. Leave it out, or add --to lora."),
    ):
        assert main(["merge-adapters", str(directories["a"]), str(tmp_path / "x"), *options]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    scaled = deltas(directories["scaled"])
    assert same_directions([scaled, scaled]) is None
    own_pairs = dataclasses.replace(scaled, pair=None)  # as sara's of the weights
    assert same_directions([own_pairs, own_pairs]) == "their linears have a pair of A and B each"


def test_adapters_of_pefts_own_vera_add_up_to_a_lora(section: ModelSection, tmp_path: Path) -> None:
    stock = get_peft_model(small_llama(), VeraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    stock.peft_config["default"].base_model_name_or_path = section.path
    stock.save_pretrained(str(tmp_path / "stock"))
    command = ["merge-adapters", *[str(tmp_path / "stock")] * 2, str(tmp_path / "sum"), "--weights", "1", "1"]
    assert main([*command, "--to", "qvera"]) == 2
    assert main(command) == 0
    doubled = {name: 2 * change for name, change in changes(tmp_path / "stock").items()}
    torch.testing.assert_close(changes(tmp_path / "sum"), doubled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "limits",
    [
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["model.layers.0.mlp.down_proj"]},
        {"target_modules": r".*layers\.1.*q_proj"},
    ],
    ids=["layers", "all but one", "a pattern"],
)
def test_a_lora_is_on_the_linears_that_limits_left(limits: dict[str, Any], tmp_path: Path) -> None:
    made = {"limited": get_peft_model(small_llama(), QveraConfig(rank=6, **limits, task_type="CAUSAL_LM"))}  # type: ignore[arg-type]
    made["others"] = attach(small_llama(), AdapterSection(rank=4, targets=["v_proj"]))
    for seed, (name, model) in enumerate(made.items()):
        perturb(model, seed)
        save_adapter(model, tmp_path / name)
    deltas = [read_deltas(tmp_path / name, small_llama()) for name in made]
    export_lora(deltas[0], tmp_path / "lora", torch.float32)
    export_lora(union(deltas), tmp_path / "sum", torch.float32, stacked_factors(deltas, [1.0, 0.5]))
    for name, expected in (("lora", deltas[:1]), ("sum", deltas)):
        loaded = load_adapter(small_llama(), tmp_path / name)  # refuses linears without values
        layers = {m.spec.name: m for m in loaded.modules() if isinstance(m, QveraLinear)}
        assert layers.keys() == {layer for one in expected for layer in one.layers}
        for layer, module in layers.items():
            parts = zip((1, 0.5), expected, strict=False)
            total = sum(w * d.layers[layer].rows() for w, d in parts if layer in d.layers)
            torch.testing.assert_close(module.delta_weight_fp32("default"), total, rtol=1e-4, atol=1e-6)
