"""VeRA's options: more than one b a linear, a vector on the input, a frozen d, d's start; and what their files hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from qvera.adapters import QveraConfig, QveraLinear, register
from qvera.adapters.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.cli.main import main
from qvera.config.sections import AdapterSection, ModelSection
from qvera.exporting.deltas import read_deltas
from qvera.exporting.sums import same_directions
from qvera.models.loader import Base, load_base
from qvera.models.model_class import empty_model
from qvera.utils.errors import InputError
from tests.adapters.helpers import IDS, edit_config, logits, perturb
from tests.conftest import small_llama

MORE: dict[str, Any] = {"rank": 8, "b_groups": 2, "input_scale": True}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def section(tiny_model_dir: Path) -> ModelSection:
    return ModelSection(path=str(tiny_model_dir), compute_dtype="float32")


@pytest.fixture(scope="module")
def saved(section: ModelSection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with two b a linear and an a, its vectors away from their start."""
    base = load_base(section)
    model = perturb(attach(base.model, AdapterSection(**MORE), section.path, base.facts.get("fingerprint")))
    directory = tmp_path_factory.mktemp("more") / "adapter"
    save_adapter(model, directory)
    return directory


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(saved, tmp_path / "adapter")


def test_every_vector_has_its_shape_and_start_and_is_trained(section: ModelSection) -> None:
    model = attach(load_base(section).model, AdapterSection(**MORE))
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, vector in named_vectors(model).items():
        shapes.setdefault(name.rpartition(".")[2], set()).add(tuple(vector.shape))
        start = {"qvera_b": 0.0, "qvera_d": 0.1, "qvera_a": 1.0}[name.rpartition(".")[2]]
        assert vector.dtype == torch.float32 and (vector == start).all(), name
    # tiny-llama: hidden 64, 4 heads and 2 key-value heads of 16, inside 192
    assert shapes == {"qvera_b": {(2, 64), (2, 32), (2, 192)}, "qvera_d": {(8,)}, "qvera_a": {(64,), (192,)}}
    assert len(named_vectors(model)) == 3 * 14
    perturb(model)
    model(IDS).logits.square().mean().backward()
    assert all(v.grad is not None and (v.grad != 0).float().mean() > 0.9 for v in named_vectors(model).values())


def test_info_says_what_it_consists_of(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(saved)]) == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert (said["rank"], said["b_groups"], said["input_scale"]) == ("8", "2", "yes")


def test_stock_peft_reads_it_and_another_adapter_comes_and_goes(saved: Path, section: ModelSection) -> None:
    register()
    wanted = logits(load_adapter(load_base(section).model, saved))
    model: Any = PeftModel.from_pretrained(load_base(section).model, saved)
    assert torch.equal(logits(model), wanted)
    layers = [m for m in model.modules() if isinstance(m, QveraLinear)]
    model.add_adapter("other", QveraConfig(rank=4, input_scale=True))
    assert all(m.carries(name) for m in layers for name in ("default", "other"))
    model.delete_adapter("other")
    assert not any(m.carries("other") for m in layers)
    assert torch.equal(logits(model), wanted)


def test_the_format_says_the_oldest_reader_that_can_read_it() -> None:
    versions = [QveraConfig(rank=8, **more).format_version for more in ({}, {"b_groups": 2}, {"input_scale": True})]
    assert versions == [1, 2, 2]


def test_starting_from_another_kind_is_refused(saved: Path, section: ModelSection) -> None:
    base = load_base(section)
    for key, value in (("b_groups", 1), ("input_scale", False)):
        other = AdapterSection(**{**MORE, key: value}, init_from=str(saved))
        with pytest.raises(InputError, match=rf"adapter.init_from: .* has {key}"):
            attach(base.model, other)
    start = AdapterSection(**MORE, init_from=str(saved))
    attached = attach(base.model, start, section.path, base.facts.get("fingerprint"))
    assert torch.equal(logits(attached), logits(load_adapter(load_base(section).model, saved)))


def test_stock_vera_to_start_from_is_refused(tmp_path: Path) -> None:
    stock = get_peft_model(small_llama(), VeraConfig(r=8, target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path / "vera")
    with pytest.raises(InputError, match="adapter.init_from: .*PEFT's own VeRA"):
        attach(small_llama(), AdapterSection(rank=8, targets=["q_proj"], init_from=str(tmp_path / "vera")))


@pytest.fixture(scope="module")
def base(section: ModelSection) -> Base:
    """For adapters that are refused: nothing is left on it."""
    return load_base(section)


def test_a_vector_that_the_config_does_not_speak_of_is_refused(adapter: Path, section: ModelSection) -> None:
    edit_config(adapter, input_scale=False)
    with pytest.raises(InputError, match="qvera_a"):
        load_adapters(load_base(section).model, {"it": adapter})
    with pytest.raises(InputError, match="qvera_a"):
        load_adapter(load_base(section).model, adapter)


@pytest.mark.parametrize(
    ("key", "value"), [("input_scale", "false"), ("input_scale", None), ("b_groups", True), ("b_groups", 3)]
)
def test_a_config_of_another_type_is_refused_by_its_key(key: str, value: Any, adapter: Path, base: Base) -> None:
    edit_config(adapter, **{key: value})
    with pytest.raises(InputError, match=f"adapter_config.json: {key}: "):
        load_adapter(base.model, adapter)


@pytest.mark.parametrize("damage", ["no a", "short a", "flat b"])
def test_a_file_without_what_its_config_says_is_refused(
    damage: str, adapter: Path, section: ModelSection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = load_file(adapter / WEIGHTS)
    name = next(k for k in sorted(vectors) if k.endswith("qvera_b" if damage == "flat b" else "qvera_a"))
    if damage == "no a":
        del vectors[name]
    else:
        vectors[name] = vectors[name].flatten() if damage == "flat b" else vectors[name][:-1].clone()
    save_file(vectors, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=WEIGHTS):
        load_adapter(load_base(section).model, adapter)
    with pytest.raises(InputError, match=name.rpartition(".")[0]):
        load_adapters(load_base(section).model, {"it": adapter})
    assert main(["export", str(adapter), str(tmp_path / "lora"), "--to", "lora"]) == 2
    assert name.rpartition(".")[2].removeprefix("qvera_") in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_sums_where_d_and_a_agree(saved: Path, section: ModelSection, tmp_path: Path) -> None:
    other = shutil.copytree(saved, tmp_path / "other")
    vectors = {k: v * -0.5 if k.endswith("qvera_b") else v for k, v in load_file(other / WEIGHTS).items()}
    save_file(vectors, other / WEIGHTS, {"format": "pt"})
    one, two = (read_deltas(d, empty_model(section)) for d in (saved, other))
    assert main(["merge-adapters", str(saved), str(other), str(tmp_path / "sum")]) == 0
    for name, delta in read_deltas(tmp_path / "sum", empty_model(section)).layers.items():
        wanted = 0.5 * one.layers[name].rows() + 0.5 * two.layers[name].rows()
        torch.testing.assert_close(delta.rows(), wanted, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(delta.rows(3, 7), delta.rows()[3:10], rtol=1e-5, atol=1e-7)
    save_file({k: v + 0.1 if k.endswith("qvera_a") else v for k, v in vectors.items()}, other / WEIGHTS)
    assert "they differ in a (first at" in str(same_directions([one, read_deltas(other, empty_model(section))]))


def test_a_frozen_d_stays_frozen_in_a_file_and_when_the_adapter_is_chosen_again(tmp_path: Path) -> None:
    model = attach(small_llama(), AdapterSection(rank=4, train_d=False))
    model.set_adapter("default")
    save_adapter(model, tmp_path / "a")
    register()
    read = PeftModel.from_pretrained(small_llama(), str(tmp_path / "a"), is_trainable=True)
    for one in (model, read):
        trained = {name.rpartition(".")[2] for name, vector in named_vectors(one).items() if vector.requires_grad}
        assert trained == {"qvera_b"}


# d_initial is what a learning rate of its own for d would be: there is no second key for it.

IN, OUT, RANK, STEPS = 24, 40, 8, 6


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def output_after(d_initial: float, b_rate: float, d_rate: float) -> torch.Tensor:
    """Where AdamW is after a few steps. Its eps is next to nothing, as gradients scale with what they are taken by."""
    config = QveraConfig(rank=RANK, target_modules=["first", "second"], d_initial=d_initial)
    model: Any = get_peft_model(Two(), config)  # type: ignore[arg-type]
    vectors = named_vectors(model)
    groups = [
        {"params": [v for name, v in vectors.items() if ("qvera_b" in name) == first], "lr": rate}
        for first, rate in ((True, b_rate), (False, d_rate))
    ]
    assert all(len(group["params"]) == 2 for group in groups)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(groups, eps=1e-30, weight_decay=0.0)
    x, y = torch.randn(16, IN, generator=torch.Generator().manual_seed(1)), torch.ones(16, IN)
    for _ in range(STEPS):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("ratio", [0.25, 3.0])
def test_one_rate_with_another_d_initial_is_two_rates(ratio: float) -> None:
    one = output_after(0.1 * ratio, 0.02, 0.02)
    two = output_after(0.1, 0.02 * ratio, 0.02 / ratio)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    plain = output_after(0.1, 0.02, 0.02)
    assert (one - plain).abs().max() > 1e-3, "the ratio does nothing, so the comparison shows nothing"
