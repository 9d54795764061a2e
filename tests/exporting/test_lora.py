"""Exported adapters: stock PEFT loads them, without qvera's classes, and gives the trained model's logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.vera import VeraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qvera import __version__
from qvera.adapters import QveraLinear
from qvera.adapters.adapter_file import read_config
from qvera.adapters.save_load import attach, load_adapter, save_adapter
from qvera.cli.main import main
from qvera.config.sections import AdapterSection, ModelSection
from qvera.data import Turn
from qvera.evaluation.generate import PromptWriter
from qvera.evaluation.load import find_target, open_run
from qvera.exporting import lora
from qvera.exporting.deltas import read_deltas
from qvera.exporting.lora import export_lora, export_stock_vera
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256
from tests.adapters.helpers import relative
from tests.exporting.helpers import deltas, stock_base, trained_adapter

IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3], [8, 8, 30, 1, 99, 4, 250, 6]])
RANK = 8
PLAIN: dict[str, Any] = {"rank": RANK}
MORE: dict[str, Any] = {"rank": RANK, "b_groups": 2, "input_scale": True}


@pytest.fixture(scope="module", params=[("none", PLAIN), ("nf4", MORE)], ids=["none", "nf4-more"])
def trained(request: Any, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model, its section, the directory of the adapter, and what it changes."""
    quantization, adapter = request.param
    directory = tmp_path_factory.mktemp("lora") / "adapter"
    found = trained_adapter(tiny_model_dir, directory, {"quantization": quantization}, **adapter)
    return *found, lambda: read_deltas(directory, empty_model(found[1]))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.train()(IDS).logits  # in evaluation mode stock Linear4bit would repack its weights


def test_the_exact_lora_gives_the_trained_logits_in_stock_peft(trained: Any, tmp_path: Path) -> None:
    model, section, _, read = trained
    adapter = read()
    size = export_lora(adapter, tmp_path / "lora", torch.float32)
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert size == sum(file.stat().st_size for file in (tmp_path / "lora").iterdir())
    stock = PeftModel.from_pretrained(stock_base(Path(section.path), section.quantization), tmp_path / "lora")
    assert sum(isinstance(m, LoraLayer) for m in stock.modules()) == 14
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)
    with stock.disable_adapter():
        assert (logits(stock) - logits(model)).abs().max() > 0.05


def test_peft_vera_gives_the_trained_logits_in_stock_peft(trained: Any, tmp_path: Path) -> None:
    model, section, _, read = trained
    adapter, out = read(), tmp_path / "vera"
    if adapter.groups > 1:
        said = "2 vectors b for each linear .adapter.b_groups. and a vector a for.*--to lora"
        with pytest.raises(InputError, match=said):
            export_stock_vera(adapter, out)
        assert not out.exists()
        return
    export_stock_vera(adapter, out)
    stock = PeftModel.from_pretrained(stock_base(Path(section.path), section.quantization), out)
    assert not any(isinstance(m, QveraLinear) for m in stock.modules())
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)
    # and back again: what stock PEFT would load, loads here, and exports to the same LoRA
    ours = load_adapter(load_base(section).model, out)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-4)
    again = read_deltas(out, empty_model(section)).layers
    for name, delta in adapter.layers.items():
        torch.testing.assert_close(again[name].rows(), delta.rows())


@pytest.mark.parametrize("save_projection", [True, False])
def test_adapters_that_peft_wrote_are_read(
    save_projection: bool, tiny_model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    config = VeraConfig(
        r=RANK, target_modules=["q_proj", "down_proj"], projection_prng_key=7, save_projection=save_projection
    )
    stock = get_peft_model(stock_base(tiny_model_dir, "none"), config)
    for name, parameter in stock.named_parameters():
        if "vera_lambda" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    stock.save_pretrained(tmp_path / "stock")
    section = ModelSection(path=str(tiny_model_dir), compute_dtype="float32", quantization="none")
    ours = load_adapter(load_base(section).model, tmp_path / "stock")
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-4, atol=1e-4)
    read = read_deltas(tmp_path / "stock", empty_model(section))
    changes = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in stock.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(changes) == 4
    torch.testing.assert_close({name: delta.rows() for name, delta in read.layers.items()}, changes)
    for options, is_told in (([], True), (["--base", "original"], False)):  # no recipe says what it was trained on
        assert main(["export", str(tmp_path / "stock"), str(tmp_path / f"merged {is_told}"), *options]) == 0
        assert ("trained on 16-bit weights add --base original." in capsys.readouterr().out) == is_told


@pytest.mark.parametrize("k", [1, 7])
def test_truncation_is_the_best_of_its_rank_and_says_its_error(trained: Any, k: int) -> None:
    model, _, _, read = trained
    adapter = read()
    for name, change in deltas(model).items():
        whole_A, whole_B = adapter.layers[name.removesuffix(".weight")].lora()
        A, B, error = lora.truncate(whole_A, whole_B, k)
        singular = torch.linalg.svdvals(change.double())
        difference = change.double() - B.double() @ A.double()
        assert (A.shape, B.shape) == ((k, change.shape[1]), (change.shape[0], k))
        # Eckart and Young: no matrix of rank k is nearer
        torch.testing.assert_close(difference.norm(), singular[k:].norm(), rtol=1e-4, atol=1e-6)
        assert error == pytest.approx((singular[k:].norm() / singular.norm()).item(), rel=1e-4)


def test_a_summary_says_what_a_truncation_loses(trained: Any) -> None:
    layers = trained[3]().layers
    _, errors = lora.truncate_all(((name, d.lora()) for name, d in layers.items()), RANK, 3, torch.float32)
    text = lora.truncation_text(errors, RANK, 3)
    worst = max(errors, key=errors.__getitem__)
    assert len(errors) == 14 and f"to {errors[worst]:.2g} ({worst})" in text
    assert "is lost: the change is spread over all 8 directions" in text
    assert lora.truncation_text({"one": 0.01}, 8, 7).endswith("Little is lost.")
    for rank in (0, RANK, RANK + 1):
        with pytest.raises(InputError, match="from 1 to 7"):
            lora.truncate_all((), RANK, rank, torch.float32)


def test_the_precision_of_a_whole_lora_is_what_it_says(trained: Any, tmp_path: Path) -> None:
    adapter, found = trained[3](), {}
    for dtype in (torch.float32, torch.float16):
        export_lora(adapter, tmp_path / str(dtype), dtype)
        tensors = load_file(tmp_path / str(dtype) / "adapter_model.safetensors")
        found[dtype] = max(
            relative(tensors[f"base_model.model.{name}.lora_{side}.weight"], factor)
            for name, delta in adapter.layers.items()
            for side, factor in zip("AB", delta.lora(), strict=True)
        )
    assert found[torch.float32] == 0.0
    assert 1e-5 < found[torch.float16] < torch.finfo(torch.float16).eps / 2
    assert "exact" in lora.rounding_text(torch.float32)
    assert "float16 (relative 5e-04 each); --dtype float32" in lora.rounding_text(torch.float16)
    b = next(iter(adapter.layers.values())).factors.b
    b.fill_(1e9)
    with pytest.raises(InputError, match="bfloat16"):  # beyond the dtype
        export_lora(adapter, tmp_path / "out", torch.float16)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_base_is_named_so_that_other_tools_find_it(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(directory: Path) -> str | None:
        return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]

    adapter, directory = trained[3](), Path(trained[1].path)
    monkeypatch.setenv("HOME", str(directory.parent))
    for number, (written, expected) in enumerate(
        (("owner/model", "owner/model"), (None, None), (f"~/{directory.name}", str(directory)))
    ):
        adapter.config.base_model_name_or_path = written
        export_lora(adapter, tmp_path / str(number), torch.float32)
        assert named(tmp_path / str(number)) == expected
    if adapter.groups == 1:
        export_stock_vera(adapter, tmp_path / "vera")
        assert named(tmp_path / "vera") == str(directory)


def test_the_command_says_rank_size_and_error(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, adapter_dir, read = trained
    grouped, out = read().groups > 1, tmp_path / "small"
    assert main(["export", str(adapter_dir), str(out), "--to", "lora", "--rank", "3", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "rank 3 of 8: relative error of ΔW (Frobenius)" in said and "LoRA of rank 3 on 14 linears" in said
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    tensors = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {3}
    assert main(["export", str(adapter_dir), str(tmp_path / "x"), "--to", "peft", "--rank", "3"]) == 2
    assert "--to lora and --to gguf-lora only" in capsys.readouterr().err
    assert main(["export", str(adapter_dir), str(tmp_path / "x"), "--to", "peft"]) == (2 if grouped else 0)
    assert ("--to lora" in capsys.readouterr().err) if grouped else ("projections included" in capsys.readouterr().out)


def test_a_cut_is_measured_on_held_out_rows(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(name: str, *options: str) -> dict[str, Any]:
        assert main(["export", str(trained_run), str(tmp_path / name), "--to", "lora", *options]) == 0
        found: dict[str, Any] = json.loads((tmp_path / name / "qvera_export.json").read_text())
        assert found["adapter"]["sha256"] == file_sha256(trained_run / "adapter" / "adapter_model.safetensors")
        return found

    found = export("cut", "--rank", "1")
    said = capsys.readouterr().out
    scores = {}
    for path, options in ((trained_run, ()), (tmp_path / "cut", ("--recipe", str(trained_run)))):
        assert main(["eval", str(path), *options, "--json", str(tmp_path / f"{path.name}.json")]) == 0
        scores[path.name] = json.loads((tmp_path / f"{path.name}.json").read_text())["scores"]
    difference = found["difference"]
    for key, expected in (("trained", scores["run"]), ("exported", scores["cut"])):
        assert difference[key] == {name: pytest.approx(expected[name], rel=1e-5) for name in difference[key]}
        assert difference[key]["exact_match"] is not None
    assert difference["trained"]["loss"] != difference["exported"]["loss"]
    assert f"loss {difference['trained']['loss']:.4f} vs {difference['exported']['loss']:.4f}, right answers" in said
    assert "vLLM takes it with --max-lora-rank 1;" in said
    assert len(found["relative_errors"]) == 14 and max(found["relative_errors"].values()) > 0.1
    assert export("whole")["difference"] is None  # nothing is lost
    with safe_open(tmp_path / "whole" / "adapter_model.safetensors", "pt") as stored:
        header = stored.metadata()
    assert header["adapter_sha256"] == found["adapter"]["sha256"] and header["format"] == "pt"
    assert header["qvera_version"] == __version__ and "/" not in header["base"]


def test_what_is_no_vera_of_peft_and_what_is_not_for_vllm(tiny_model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """SARA, whose ranks differ, and a DoRA."""
    section = ModelSection(path=str(tiny_model_dir), compute_dtype="float32", quantization="none")
    for name, settings in (
        ("sara", {"method": "sara", "rank": 16, "singular_share": 0.5}),
        ("dora", {"rank": RANK, "magnitude": True}),
    ):
        model = attach(load_base(section).model, AdapterSection.model_validate(settings), section.path)
        save_adapter(model, tmp_path / name)
    with pytest.raises(InputError, match="method is sara, which PEFT's VeRA is not"):
        export_stock_vera(read_deltas(tmp_path / "sara", empty_model(section)), tmp_path / "out")
    assert main(["export", str(tmp_path / "dora"), str(tmp_path / "out"), "--to", "lora"]) == 0
    said = capsys.readouterr().out
    assert "vLLM takes no DoRA (adapter.magnitude): give it the whole model, by --to merged" in said
    assert "--max-lora-rank" not in said
    assert "--max-lora-rank 16;" in lora.serving_text(9) and "--max-lora-rank 320;" in lora.serving_text(300)
    assert "cut it with --rank" in lora.serving_text(1024)


def test_adapters_made_from_one_keep_its_template_its_tokens_and_its_base(
    alpaca_run: Path, tmp_path: Path, capsys: Any
) -> None:
    """Their run is not there any more; what they are asked with is beside them."""
    run = Path(shutil.copytree(alpaca_run, tmp_path / "run"))
    fingerprint = read_config(run / "adapter").base_fingerprint  # type: ignore[union-attr]
    assert fingerprint
    lines = {
        "lora": ["export", run, tmp_path / "lora", "--to", "lora", "--dtype", "float32"],
        "sum": ["merge-adapters", run, tmp_path / "sum", "--to", "lora", "--weights", "1"],
        "scaled": ["merge-adapters", run, tmp_path / "scaled", "--weights", "1"],
        "reduced": ["analyze", run, "--top-k", "2", "--reduce", "1", "--out", tmp_path / "reduced"],
        "vera": ["export", run, tmp_path / "vera", "--to", "peft"],
    }
    for line in lines.values():
        assert main([*map(str, line)]) == 0
    run.rename(tmp_path / "gone")
    for name in lines:
        assert "### Instruction:" in (tmp_path / name / "chat_template.jinja").read_text()
        if name != "vera":  # PEFT's VeRA has no place for them
            section = find_target(tmp_path / name).section
            assert (section.eos_token, section.pad_token) == ("<|endoftext|>", "<|im_start|>"), name
            assert read_config(tmp_path / name).base_fingerprint == fingerprint, name  # type: ignore[union-attr]
    assert main(["generate", str(tmp_path / "lora"), "--prompt", "say red 1", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "merged")]) == 0
    certificate = json.loads((tmp_path / "merged" / "qvera_export.json").read_text())
    assert certificate["trained_on"]["quantization"] == "none" and "NF4" not in capsys.readouterr().out


def test_what_is_taken_from_its_run_is_asked_with_the_system_prompt_of_the_run(
    make_recipe: Any, tmp_path: Path
) -> None:
    """Other programs read no recipe, so the chat template beside the weights begins with the prompt.

    An adapter that is mailed as its two files has it too.
    """
    run, asked = tmp_path / "run", [Turn("user", "say red 1")]
    system = 'Say "red".\n {{ always }} %} ü'
    train(make_recipe(data={"system": system, "max_length": 128}, training={"max_steps": 1}), run)
    expected = PromptWriter.of(open_run(run)).ids([Turn("system", system), *asked])
    places = {name: tmp_path / name for name in ("lora", "merged", "copy")}
    assert main(["export", str(run), str(places["lora"]), "--to", "lora"]) == 0
    assert main(["export", str(run), str(places["merged"]), "--no-compare"]) == 0
    shutil.copytree(run / "adapter", places["copy"])
    run.rename(tmp_path / "gone")
    for name in ("copy", "lora"):
        places[f"{name}, mailed"] = tmp_path / "mailed" / name
        places[f"{name}, mailed"].mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(places[name] / file, places[f"{name}, mailed"])
    for place in places.values():
        writer = PromptWriter.of(open_run(place))
        assert writer.ids(asked) == expected, place
        assert writer.ids([Turn("system", "Mine."), *asked]) != expected, place
    tokenizer = AutoTokenizer.from_pretrained(places["merged"])
    messages = [{"role": "user", "content": "say red 1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
