"""The package of docs/methods/adding.md, installed: its method ΔW = v uᵀ is found by its entry point."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qvera.adapters import QveraLinear, methods
from qvera.adapters.methods import check_recipe
from qvera.cli.main import main
from qvera.config import plugins
from qvera.config.schema import load_recipe, parse_recipe
from qvera.config.sections import AdapterSection
from qvera.evaluation.load import open_run
from qvera.training.trainer import train
from qvera.utils.errors import InputError

IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3]])


ROOT = Path(__file__).parents[3]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with the page's code and entry points, as pip installs it."""
    page = (ROOT / "docs" / "methods" / "adding.md").read_text(encoding="utf-8")
    (code,), (points,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "toml"))
    site = tmp_path / "site"
    (site / "my_methods-1.0.dist-info").mkdir(parents=True)
    (site / "my_methods.py").write_text(code, encoding="utf-8")
    groups = tomllib.loads(points)["project"]["entry-points"]
    lines = [f"[{group}]\n{name} = {value}\n" for group, named in groups.items() for name, value in named.items()]
    (site / "my_methods-1.0.dist-info" / "entry_points.txt").write_text("".join(lines), encoding="utf-8")
    (site / "my_methods-1.0.dist-info" / "METADATA").write_text("Name: my-methods\nVersion: 1.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    plugins.entry_points.cache_clear()
    assert "bottleneck" in methods.names()
    yield
    monkeypatch.undo()
    plugins.entry_points.cache_clear()


def test_a_package_that_cannot_be_imported_is_an_error_where_its_method_is_asked_for(installed: None) -> None:
    broken = EntryPoint("broken", "no_such_module:Method", "qvera.methods")
    plugins.entry_points()["qvera.methods"]["broken"] = broken
    assert "broken" in methods.names()
    assert methods.method_of(AdapterSection()).name == "vera"
    with pytest.raises(
        InputError, match="adapter.method: broken: no_such_module:Method can't be loaded: No module named"
    ):
        methods.method_of(AdapterSection(method="broken"))


@pytest.mark.usefixtures("installed")
def test_a_registered_method_trains_saves_and_loads(make_recipe: Any, tmp_path: Path) -> None:
    training = {"max_steps": 4, "learning_rate": 3e-2, "gradient_checkpointing": True}
    result = train(make_recipe(adapter={"method": "bottleneck", "rank": 1}, training=training), tmp_path / "run")
    assert result is not None
    facts, outcome = result.run["adapter"], result.run["result"]
    assert outcome["eval_after"]["loss"] < outcome["eval_before"]["loss"]
    assert result.run["plan"]["trained_numbers"] == facts["trainable_parameters"]
    assert "bottleneck of rank 1 on 14 linear layers" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    opened = open_run(tmp_path / "run")
    kinds = {kind for m in opened.model.modules() if isinstance(m, QveraLinear) for kind in m.vectors("default")}
    assert kinds == {"qvera_u", "qvera_v"}
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "lora"), "--to", "lora", "--dtype", "float32"]) == 0
    with torch.no_grad():
        trained = opened.model(input_ids=IDS).logits
        stock = PeftModel.from_pretrained(opened.model.unload(), tmp_path / "lora").eval()
        torch.testing.assert_close(stock(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-4)


def test_only_methods_that_a_bank_holds_train_many_adapters() -> None:
    data, training = {"path": "x", "adapter_column": "customer"}, {"learning_rate": 1e-3}
    tree = {"model": "m", "data": data, "adapter": {"method": "lora-xs", "rank": 4}, "training": training}
    with pytest.raises(
        InputError, match="adapter.method: only vera without magnitude and lora train many .*is lora-xs"
    ):
        check_recipe(parse_recipe(tree, "a test"))
    for adapter in ({"rank": 4}, {"method": "lora", "rank": 4}):
        check_recipe(parse_recipe({**tree, "adapter": adapter}, "a test"))


def test_no_code_outside_of_the_methods_asks_for_one_by_its_name() -> None:
    names = "|".join(methods.names())
    named = re.compile(rf"\bmethod\b\W{{1,3}}(==|!=|in|not in)\W{{1,3}}({names})\b")
    files = [f for kind in ("py", "html") for f in (ROOT / "qvera").rglob(f"*.{kind}")]
    outside = [file for file in files if file.parent.name not in ("methods", "lab")]
    assert len(outside) > 200
    assert [str(file) for file in outside if named.search(file.read_text(encoding="utf-8"))] == []
    assert named.search('if adapter.method == "vera":') and named.search("{% if method in ('vera', 'b') %}")


@pytest.mark.parametrize(
    ("adapter", "training", "words"),
    [
        ({"method": "verra"}, {}, "adapter.method: takes one of .*Did you mean 'vera'"),
        ({"method": "shared-core", "rank": 8, "b_groups": 2}, {"learning_rate": 1e-2}, "adapter.b_groups: is read by vera"),
        ({"method": "lora"}, {}, "(?s)adapter.rank: has no default .*\ntraining.learning_rate: has no default "),
        ({"method": "shared-core"}, {"learning_rate": 1e-2}, "adapter.rank: has no default .* 64 is a usual value"),
        ({"method": "shared-core", "rank": 8}, {}, "training.learning_rate: has no default .* 0.004 is"),
    ],
    ids=["unknown", "another method's key", "neither", "no rank", "no learning rate"],
)  # fmt: skip
def test_a_recipe_that_does_not_suit_its_method_is_refused(
    adapter: dict[str, Any], training: dict[str, Any], words: str
) -> None:
    recipe = parse_recipe({"model": "m", "data": {"path": "x"}, "adapter": adapter, "training": training}, "a test")
    with pytest.raises(InputError, match=words):
        check_recipe(recipe)


def test_an_override_of_the_method_does_not_take_the_rank_and_rate_of_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("{model: m, data: x.csv, adapter: {rank: 256}, training: {learning_rate: 0.05}}")
    words = r"(?s)adapter\.rank: .*Set it too\. 16 is .*\ntraining\.learning_rate: .*0\.0002 is"
    with pytest.raises(InputError, match=words):
        check_recipe(load_recipe(file, ["adapter.method=lora"]))
    own = load_recipe(file, ["adapter.rank=16", "training.learning_rate=0.002", "adapter.method=lora"])
    check_recipe(own)
    same = load_recipe(file, ["adapter.method=vera"])
    assert (own.adapter.rank, own.training.learning_rate) == (16, 0.002)
    assert (same.adapter.rank, same.training.learning_rate) == (256, 0.05)
