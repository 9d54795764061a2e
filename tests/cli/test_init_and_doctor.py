"""`qvera init` writes a recipe that trains, `qvera doctor` says what would stop a run, `qvera schema` prints the schema."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from qvera.cli import doctor
from qvera.cli.main import main
from qvera.config.load import load_recipe
from qvera.config.schema import json_schema
from tests.tasks.images import save_vit, write_folders

Capture = pytest.CaptureFixture[str]
SYSTEM = 'Say "it" 🙂: # \\ \u2028 \x85 \n.'


@pytest.fixture
def csv_rows(tmp_path: Path) -> Path:
    file = tmp_path / "my rows.csv"
    file.write_text("topic,label\n" + "".join(f"say red {i},red {i}\n" for i in range(30)))
    return file


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_new_recipe_knows_the_rows_and_passes_preview(
    tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "new.yaml"
    line = ["init", str(out), "--model", str(tiny_model_dir), "--data", str(tiny_rows)]
    assert main([*line, "--system", SYSTEM]) == 0
    recipe = load_recipe(out)
    assert (recipe.model.path, recipe.data.path) == (str(tiny_model_dir), str(tiny_rows))
    assert (recipe.data.format, recipe.data.system) == ("prompt-completion", SYSTEM)
    assert recipe.data.max_length == 64
    assert recipe.data.eval_fraction == 0.1
    assert f"qvera preview {out}" in capsys.readouterr().out
    assert main(["preview", str(out)]) == 0
    text = out.read_text()
    assert text.startswith("# yaml-language-server: $schema=")
    assert Path(text.splitlines()[0].partition("=")[2]).is_file()
    assert main(["init", str(out), "--model", str(tiny_model_dir), "--data", str(tiny_rows)]) == 2
    assert "exists; nothing is overwritten" in capsys.readouterr().err
    assert out.read_text() == text


def test_columns_of_no_known_format_are_asked_for(
    tiny_model_dir: Path, csv_rows: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new.yaml"
    line = ["init", str(out), "--data", str(csv_rows)]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(line) == 2
    assert "--model: is missing" in capsys.readouterr().err
    assert main([*line, "--model", str(tiny_model_dir)]) == 2
    assert "--prompt-column NAME --answer-column NAME" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(sys, "stdin", Terminal(f"{tiny_model_dir}\ntopic\nlabel\n"))
    assert main(line) == 0
    assert load_recipe(out).data.columns == {"prompt": "topic", "completion": "label"}
    assert main(["preview", str(out)]) == 0
    asked = out.read_text()
    out.unlink()
    flags = ["--model", str(tiny_model_dir), "--prompt-column", "topic", "--answer-column", "label"]
    assert main([*line, *flags]) == 0
    assert out.read_text() == asked


def test_columns_that_are_not_read_are_named(tiny_model_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mails.csv"
    file.write_text("text,label\nwhere is it,shipping\nmoney back,refund\n")
    assert main(["init", str(tmp_path / "new.yaml"), "--model", str(tiny_model_dir), "--data", str(file)]) == 0
    said = capsys.readouterr().out
    assert "not read          label. To train on other columns" in said
    assert "To train a classifier of these labels: --task sequence-classification" in said


def test_the_new_recipe_of_a_classifier_knows_its_classes(
    tiny_model_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, out = tmp_path / "mails.csv", tmp_path / "new.yaml"
    file.write_text("mail,about\n" + "where is it,shipping\nmoney back,refund\n" * 6)
    line = ["init", str(out), "--model", str(tiny_model_dir), "--data", str(file), "--task", "sequence-classification"]
    assert main(line) == 2
    assert "needs the columns text, label" in (said := capsys.readouterr().err)
    assert "Here: --prompt-column NAME --answer-column NAME" in said
    assert main([*line, "--prompt-column", "mail", "--answer-column", "about"]) == 0
    assert "12 rows, format classification" in (said := capsys.readouterr().out)
    assert "2 classes (refund: 6, shipping: 6)" in said
    recipe = load_recipe(out)
    assert (recipe.task, recipe.data.columns) == ("sequence-classification", {"text": "mail", "label": "about"})
    assert main(["preview", str(out)]) == 0


def test_the_new_recipe_of_preferences_has_their_objective(
    tiny_model_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, out = tmp_path / "pairs.jsonl", tmp_path / "new.yaml"
    file.write_text(json.dumps({"prompt": "say", "chosen": "red", "rejected": "blue"}) + "\n")
    line = ["init", str(out), "--model", str(tiny_model_dir), "--data", str(file)]
    assert main(line) == 2
    assert "Here: --objective dpo" in capsys.readouterr().err
    assert main([*line, "--objective", "orpo"]) == 0
    assert (load_recipe(out).training.objective, load_recipe(out).data.format) == ("orpo", "preference")
    file.write_text(7 * (json.dumps({"prompt": "say", "completion": "red", "label": True}) + "\n"))
    assert main(["init", str(tmp_path / "kto.yaml"), *line[2:], "--objective", "kto"]) == 0
    assert load_recipe(tmp_path / "kto.yaml").training.per_device_train_batch_size > 1


def test_the_new_recipe_of_a_classifier_of_images_has_no_lengths(tmp_path: Path, capsys: Capture) -> None:
    out, pictures = tmp_path / "new.yaml", write_folders(tmp_path / "pictures")
    line = ["init", str(out), "--model", str(save_vit(tmp_path / "vit")), "--data", str(pictures)]
    assert main([*line, "--task", "image-classification"]) == 0
    assert "max_length" not in out.read_text()
    assert load_recipe(out).task == "image-classification"
    assert main(["preview", str(out), "--rows", "0"]) == 0
    capsys.readouterr()
    assert main(["init", str(tmp_path / "b.yaml"), "--task", "images", *line[2:]]) == 2
    assert "task: should be 'causal-lm'" in capsys.readouterr().err


def test_doctor_reports_a_working_machine(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for what in ("versions", "device", "compute dtype", "4-bit kernels", "C++ compiler", "disk here", "cache"):
        assert f"  {what}" in said
    assert "A run can start" in said


def test_doctor_says_what_would_stop_a_run(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "! cache" in said
    assert "A run would fail: cache." in said
    assert "apt install g++" in said  # missed by NVMe offload alone, so it stops nothing


def test_doctor_finds_a_torch_that_cannot_be_imported(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 1
    assert "! torch             can't be imported" in capsys.readouterr().out


def test_doctor_finds_broken_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes
    import torch

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available\nfor this GPU")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    found = doctor.four_bit_kernels(torch.device("cpu"))
    assert found.stops
    assert found.found == "fail (no kernel image is available)"


def test_schema_prints_the_recipes_schema(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
