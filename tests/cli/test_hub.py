"""`qvera push`, and adapters by their hub id, with the real huggingface_hub against a hub on this computer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM

from qvera.adapters.adapter_file import read_adapter
from qvera.adapters.save_load import attach, check_start, named_vectors
from qvera.cli.main import main
from qvera.config.schema import load_recipe
from qvera.config.sections import AdapterSection, ModelSection
from qvera.evaluation.run_info import directory_facts
from qvera.models.hub import is_hub_id
from qvera.models.loader import load_base
from qvera.serve import opening
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.hub_server import Hub, hub_server

pytestmark = pytest.mark.process


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The only hub that huggingface_hub knows, as if its variables had been set before it was imported."""
    with hub_server() as hub:
        for name, value in vars(constants).items():
            if isinstance(value, str) and value.startswith(constants.ENDPOINT) and name != "ENDPOINT":
                monkeypatch.setattr(constants, name, value.replace(constants.ENDPOINT, hub.address))
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        # transformers keeps its client, with the address that it had first
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, of huggingface.co alone
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.chdir(tmp_path)
        yield hub


def commands(capsys: Any, *lines: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    capsys.readouterr()
    return [(main(line), *capsys.readouterr()) for line in lines]


def test_an_adapter_goes_to_the_hub_and_is_used_and_served_by_its_id(
    hub: Hub, trained_run: Path, tmp_path: Path, capsys: Any
) -> None:
    (pushed,) = commands(capsys, ["push", str(trained_run), "anna/orders", "--private"])
    assert pushed[0] == 0, pushed
    assert pushed[1].startswith(f"{hub.address}/anna/orders: ")
    assert hub.private == {"anna/orders"} and hub.messages == ["adapter by qvera"]
    files = hub.repositories["anna/orders"]
    adapter = {path.name: path.read_bytes() for path in (trained_run / "adapter").iterdir()}
    assert {name: data for name, data in files.items() if name != "README.md"} == adapter
    assert b"PeftModel.from_pretrained(base, 'anna/orders')" in files["README.md"]

    store = opening.open_served("anna/orders").store
    assert store.names() == ["orders"]
    assert not {"anna/orders", "orders"} & store.base_names  # none of them means the base

    files |= {"adapter_model.bin": b"pickle", "evil.py": b"raise SystemExit(9)", "old/adapter_model.safetensors": b""}
    by_recipe = ["--recipe", str(trained_run), "--no-generation", "--json"]
    used = commands(
        capsys,
        ["info", "anna/orders", "--json"],
        ["generate", "anna/orders", "--prompt", "say red 1", "--max-new-tokens", "4"],
        ["generate", str(trained_run), "--prompt", "say red 1", "--max-new-tokens", "4"],
        ["eval", "anna/orders", *by_recipe, "scores.json"],
        ["export", "anna/orders", "lora", "--to", "lora"],
        ["push", "lora", "anna/lora"],
        ["eval", "anna/lora", *by_recipe, "lora.json"],
    )
    assert [status for status, *_ in used] == [0] * 7, used
    own = directory_facts(trained_run / "adapter")
    assert json.loads(used[0][1])["adapter_sha256"] == own["adapter_sha256"]
    assert used[1][1] == used[2][1] != ""
    result = json.loads((trained_run / "run.json").read_text())["result"]
    for name, tolerance in (("scores.json", 1e-6), ("lora.json", 1e-3)):
        scores = json.loads((tmp_path / name).read_text())["scores"]
        assert scores["loss"] == pytest.approx(result["eval_after"]["loss"], rel=tolerance)
    asked = "\n".join(hub.requests)
    assert "adapter_model.bin" not in asked and "evil.py" not in asked and "old/" not in asked
    assert "qvera_export.json" not in hub.repositories["anna/lora"]  # it names directories of this computer
    assert "anna/lora" not in hub.private


def test_an_adapter_of_the_hub_is_asked_with_the_template_of_its_training(
    hub: Hub, make_recipe: Any, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "alpaca"
    train(make_recipe(data={"template": "alpaca", "max_length": 192}, training={"max_steps": 1}), run)
    ask = ["--prompt", "say red 1", "--max-new-tokens", "4", "--out"]
    done = commands(
        capsys,
        ["push", str(run), "anna/alpaca"],
        ["generate", str(run), *ask, "run.jsonl"],
        ["generate", "anna/alpaca", *ask, "hub.jsonl"],
        ["export", "anna/alpaca", "merged", "--no-compare"],
    )
    assert [status for status, *_ in done] == [0] * 4, done
    files = hub.repositories["anna/alpaca"]
    template = files["chat_template.jinja"].decode()
    assert "Prompts have the chat template in chat_template.jinja." in files["README.md"].decode()
    assert (tmp_path / "run.jsonl").read_text() == (tmp_path / "hub.jsonl").read_text()
    assert "alpaca" in template and (tmp_path / "merged" / "chat_template.jinja").read_text() == template


def test_a_push_leaves_of_an_earlier_one_only_what_is_not_read_with_it(
    hub: Hub, make_recipe: Any, trained_run: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "alpaca"
    train(make_recipe(data={"template": "alpaca", "max_length": 192}, training={"max_steps": 1}), run)
    own = {
        "notes.md": b"",
        "plot.png": b"",
        "embeddings.safetensors": b"",
        "tokenizer.png": b"",
        "old/config.json": b"",
    }
    hub.repositories["anna/orders"] = dict(own)
    score, ask = ["--recipe", str(run), "--no-generation", "--json"], ["--prompt", "say red 1", "--max-new-tokens", "4"]
    done = commands(
        capsys,
        ["push", str(run), "anna/orders"],
        ["push", str(trained_run), "anna/orders"],
        ["generate", str(trained_run), *ask, "--out", "run.jsonl"],
        ["generate", "anna/orders", *ask, "--out", "hub.jsonl"],
        ["export", str(run), "merged", "--no-compare"],
        ["push", "merged", "anna/orders"],
        ["eval", "merged", *score, "merged.json"],
        ["eval", "anna/orders", *score, "hub.json"],
        ["export", str(run), "gguf", "--to", "gguf", "--no-compare"],
        ["push", "gguf", "anna/orders"],
        ["push", str(run), "anna/orders"],
    )
    assert [status for status, *_ in done] == [0] * len(done), done
    assert "Deleted" not in done[0][1]
    assert done[1][1].endswith("Deleted there, from an earlier push: chat_template.jinja\n")
    assert (tmp_path / "run.jsonl").read_text() == (tmp_path / "hub.jsonl").read_text()
    assert done[5][1].endswith("earlier push: adapter_config.json, adapter_model.safetensors\n")
    merged, pushed = (json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in ("merged", "hub"))
    assert merged["loss"] == pushed["loss"]
    assert "Deleted" not in done[9][1], "files of GGUF stand beside others"
    adapter = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "README.md"}
    assert hub.repositories["anna/orders"].keys() == {*own, *adapter, "model-f16.gguf", "Modelfile"}


def test_nothing_is_sent_to_a_public_repository_that_should_be_private(
    hub: Hub, trained_run: Path, capsys: Any
) -> None:
    hub.repositories["anna/orders"] = {"notes.md": b""}
    push = ["push", str(trained_run), "anna/orders", "--private"]
    ((status, _, error),) = commands(capsys, push)
    assert status == 2 and "this repository is public" in error and f"{hub.address}/anna/orders/settings" in error
    assert hub.repositories["anna/orders"].keys() == {"notes.md"}
    hub.private.add("anna/orders")
    assert commands(capsys, push)[0][0] == 0 and hub.private == {"anna/orders"}


def test_what_the_hub_refuses_is_said_in_a_sentence(
    hub: Hub, trained_run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = ["push", str(trained_run), "anna/orders"]
    for token, words in (("hf_read", "this token may not do that"), ("", "Run `hf auth login`, or set HF_TOKEN")):
        monkeypatch.setenv("HF_TOKEN", token)
        refused, missing = commands(capsys, push, ["info", "anna/none"])
        assert refused[0] == 2 and words in refused[2] and "nothing was sent" in refused[2]
        assert missing[0] == 2 and "anna/none: no such directory here" in missing[2]
        assert "no such repository" in missing[2]
    assert hub.repositories.get("anna/orders", {}) == {}
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    misnamed, failed = commands(capsys, ["push", str(trained_run), "anna"], push)
    assert misnamed[0] == 2 and "Expected USER/NAME" in misnamed[2]
    assert failed[0] == 2 and "Look at the network, HF_ENDPOINT" in failed[2]


def test_of_a_base_only_the_weights_beside_its_config_are_fetched(hub: Hub, tiny_model_dir: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
    weights = files["model.safetensors"]
    others = ("checkpoint-500/model.safetensors", "original/model.safetensors", "consolidated.safetensors")
    hub.repositories["anna/base"] = files | dict.fromkeys(others, weights)
    base = load_base(ModelSection(path="anna/base"), torch.device("cpu"))
    assert base.facts["four_bit_modules"] and base.facts["fingerprint"]
    asked = "\n".join(hub.requests)
    assert "/model.safetensors" in asked and not any(name in asked for name in others)


def test_an_adapter_of_a_revision_does_not_warn_of_the_main_branch(hub: Hub, tiny_model_dir: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
    hub.repositories["anna/base"] = dict(files)
    section = ModelSection(path="anna/base", revision="v1")
    base = load_base(section, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained("anna/base", revision="v1")
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    hub.repositories["anna/base"]["model.safetensors"] = bytes(weights)
    snapshot_download("anna/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (base.model, plain):
            attach(model, AdapterSection(rank=4), "anna/base", base.facts["fingerprint"], base_section=section)
    main_branch = load_base(ModelSection(path="anna/base"), torch.device("cpu")).model
    with pytest.warns(UserWarning, match="trained on other weights than those of anna/base"):
        attach(main_branch, AdapterSection(rank=4), "anna/base", base.facts["fingerprint"], base_section=section)


def test_a_training_begins_with_an_adapter_of_the_hub(hub: Hub, trained_run: Path) -> None:
    hub.repositories["anna/orders"] = {path.name: path.read_bytes() for path in (trained_run / "adapter").iterdir()}
    recipe = load_recipe(trained_run / "recipe.yaml", of_a_run=True)
    model, start = load_base(recipe.model).model, recipe.adapter.replace(init_from="anna/orders")
    vectors = read_adapter(trained_run / "adapter")[1]
    hub.requests.clear()
    begun = named_vectors(attach(model, start, recipe.model.path, base_section=recipe.model))
    assert hub.requests.count("GET /api/models/anna/orders/revision/main") == 1, hub.requests
    assert begun.keys() == vectors.keys() and all(torch.equal(begun[name], vectors[name]) for name in vectors)
    check_start(start, recipe.model)
    with pytest.raises(InputError, match=r"adapter\.init_from: anna/none: no such directory here.* Nor has the hub"):
        check_start(recipe.adapter.replace(init_from="anna/none"), recipe.model)


def test_a_base_that_wants_a_token_or_leave_says_so_and_not_that_the_network_is_bad(
    hub: Hub, tiny_model_dir: Path, tiny_rows: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
    hub.repositories["anna/private"] = hub.repositories["meta/gated"] = files
    hub.private, hub.gated = {"anna/private"}, {"meta/gated"}
    monkeypatch.setenv("HF_TOKEN", "")
    recipe = Path("recipe.yaml")
    for name, words in (("anna/private", "or it is private"), ("meta/gated", "has to be asked for on its page")):
        recipe.write_text(f"model: {name}\ndata: {tiny_rows}\n")
        for status, _, error in commands(capsys, ["plan", str(recipe)], ["train", str(recipe)], ["quantize", name]):
            assert status == 2 and words in error and "hf auth login" in error, error
            assert "Look at the network" not in error


def test_a_misspelt_path_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    known: dict[Any, bool] = {"anna/orders": True, "anna/orders@v1.0": True, "runs/misspelt": False}
    known |= {"./anna/orders": False, "~/orders": False, "orders": False, "a/b/c": False, str(tmp_path / "x"): False}
    assert {name: is_hub_id(name) for name in known} == known
