"""A merged export in 4 bits: transformers and qvera open it, and its error is measured."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qvera.cli.main import main
from qvera.config.schema import load_recipe
from qvera.config.sections import ExportSection, ModelSection
from qvera.evaluation.load import open_run
from qvera.exporting import merged
from qvera.exporting.merged import export_merged, export_quantized
from qvera.models.loader import load_base, notes, rounded_note
from qvera.utils.errors import InputError, Interrupted
from tests.exporting.helpers import trained_adapter

pytestmark = pytest.mark.process

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSection, Path]:
    return trained_adapter(tiny_model_dir, tmp_path_factory.mktemp("quantized") / "adapter")[1:]


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_transformers_and_qvera_open_the_merge_in_4_bits(adapter: tuple[ModelSection, Path], tmp_path: Path) -> None:
    section, directory = adapter
    options = ExportSection(dtype="float32")
    certificate = export_quantized(directory, section, tmp_path / "out", options, "fp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no merge in 16 bits is left
    export_merged(directory, section, tmp_path / "merged", options)
    dense = load_file(tmp_path / "merged" / "model.safetensors")

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    errors = certificate["quantized"]["relative_errors"]
    assert len(errors) == 14
    for name, error in errors.items():  # by bitsandbytes' own dequantization, in what transformers has loaded
        module = stock.get_submodule(name.removesuffix(".weight"))
        found = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        expected = (found - dense[name]).norm() / dense[name].norm()
        assert error == pytest.approx(expected.item(), rel=1e-3)
        assert 0.02 < error < 0.3
    stock.train()  # in evaluation mode stock Linear4bit would repack its weights
    with torch.no_grad():
        logits = stock(IDS).logits
        ours = open_run(tmp_path / "out").model(IDS).logits
        base = load_base(section.replace(path=str(tmp_path / "out"), quantization="fp4")).model(IDS).logits
    torch.testing.assert_close(ours, logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(base, ours, rtol=1e-5, atol=1e-5)
    assert main(["quantize", str(tmp_path / "merged"), str(tmp_path / "again")]) == 0
    assert (tmp_path / "merged" / "qvera_export.json").is_file()
    assert not (tmp_path / "again" / "qvera_export.json").exists()  # it is the certificate of other files


def test_the_command_measures_what_is_lost(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained_run), str(tmp_path / "out"), "--quantize", "nf4"]) == 0
    said = capsys.readouterr().out
    certificate = json.loads((tmp_path / "out" / "qvera_export.json").read_text())
    assert "nf4: relative error of W + ΔW (Frobenius)" in said and "KL" in said
    assert set(certificate["files"]) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert certificate["difference"]["kl_mean"] > 1e-7
    assert certificate["base"]["weights"] == "original"  # others would become the base's again, without ΔW
    assert "lose nearly all" not in said
    assert main(["eval", str(tmp_path / "out"), "--json", str(tmp_path / "eval.json")]) == 0
    scores = json.loads((tmp_path / "eval.json").read_text())["scores"]
    assert scores["loss"] == pytest.approx(certificate["difference"]["loss_exported"], rel=0.01)
    assert main(["export", str(trained_run), str(tmp_path / "x"), "--to", "lora", "--quantize", "nf4"]) == 2
    assert "--quantize: goes with --to merged only" in capsys.readouterr().err
    assert main(["export", str(trained_run), str(tmp_path / "out"), "--quantize", "nf4"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_weights_that_were_in_4_bits_before_lose_what_was_trained_and_it_is_said(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounded again, they become the base's own; `qvera quantize` and a training on such a merge say it too."""
    lost, kept, whole = (str(tmp_path / name) for name in ("lost", "kept", "whole"))
    export = ["export", str(trained_run), "--no-compare"]
    assert main([*export, lost, "--quantize", "nf4", "--base", "dequantized"]) == 0
    assert "Rounded again, they lose nearly all of what was trained." in capsys.readouterr().out
    assert main([*export, kept, "--quantize", "nf4"]) == main([*export, whole]) == 0
    section = load_recipe(trained_run / "recipe.yaml").model
    with torch.no_grad():
        base = load_base(section).model(IDS).logits
        trained, from_lost = (open_run(Path(name)).model(IDS).logits - base for name in (trained_run, lost))
    assert abs((from_lost * trained).sum() / trained.square().sum()) < 0.2

    assert main(["quantize", whole, str(tmp_path / "again")]) == 0
    assert "Export the run with --base original" in capsys.readouterr().out
    assert rounded_note(Path(whole), "none") is None
    assert rounded_note(Path(kept), "nf4") is None
    for path, is_told in ((whole, True), (kept, False)):  # what a training on it says
        told = " ".join(notes(load_base(section.replace(path=path)).facts))
        assert ("Export the run with --base original" in told) == is_told


def test_an_interrupted_one_goes_on_from_the_finished_merge_of_the_same_base(
    tiny_model_dir: Path, adapter: tuple[ModelSection, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = Path(shutil.copytree(tiny_model_dir, tmp_path / "base")), tmp_path / "out"

    def export(**options: Any) -> dict[str, Any]:
        section = adapter[0].replace(path=str(base))
        return export_quantized(adapter[1], section, out, ExportSection(**options), "nf4")

    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(InputError, match="is not empty"):
        export()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]  # nothing is merged
    (out / "notes.txt").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merged, "quantize_checkpoint", interrupted)
        export()
    with pytest.raises(InputError, match="holds the merge of another export"):
        export(dtype="bfloat16")
    file = base / "model.safetensors"
    before = file.read_bytes()
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="holds the merge of another export"):
        export()
    file.write_bytes(before)
    monkeypatch.setattr(merged, "export_merged", interrupted)  # it is not made again
    assert len(export()["quantized"]["relative_errors"]) == 14


def test_one_that_was_stopped_while_it_was_measured_goes_on_with_that(
    adapter: tuple[ModelSection, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, directory = adapter
    out, options = tmp_path / "out", ExportSection()
    measured: list[str] = []

    def stopping(stage: str, done: int, total: int, name: str) -> None:
        if stage == "measuring":
            measured.append(name)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="The same command goes on from there"):
        export_quantized(directory, section, out, options, "nf4", progress=stopping)
    assert len(measured) == 1
    assert (out / "config.json").is_file() and not (out / "qvera_export.json").exists()
    monkeypatch.setattr(merged, "quantize_checkpoint", lambda *_, **__: pytest.fail("it was quantized again"))
    certificate = export_quantized(directory, section, out, options, "nf4")
    assert len(certificate["quantized"]["relative_errors"]) == 14
    assert json.loads((out / "qvera_export.json").read_text()) == certificate
    assert not (tmp_path / ".out.merged").exists()
    with pytest.raises(InputError, match="is not empty"):  # it is finished
        export_quantized(directory, section, out, options, "nf4")
