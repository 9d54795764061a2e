"""The examples run: each as a user runs it, on the tiny model."""

from __future__ import annotations

import json
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from qvera.adapters.files.save_load import named_vectors
from qvera.evaluation.load import open_run

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run_script(name: str, arguments: list[str], monkeypatch: Any, directory: Path) -> None:
    monkeypatch.chdir(directory)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_finetune(tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert len((EXAMPLES / "finetune.py").read_text(encoding="utf-8").splitlines()) <= 40
    run_script("finetune.py", [str(tiny_model_dir), str(tiny_rows), "out", "--steps", "4"], monkeypatch, tmp_path)
    before, after = map(float, re.search(r"held-out loss (\S+) → (\S+)", capsys.readouterr().out).groups())
    assert after < before
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("trl_sft.py", ["--steps", "3"], "'loss':"),
        ("trl_grpo.py", ["--steps", "3", "--answer-tokens", "6"], "'rewards/likeness/mean':"),
    ],
)
def test_with_trl(
    script: str,
    options: list[str],
    said: str,
    tiny_model_dir: Path,
    tiny_rows: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    """The trained adapter is one that qvera's own commands take, and its vectors have moved."""
    pytest.importorskip("trl", reason="pip install 'qvera[trl]'")
    arguments = [str(tiny_model_dir), str(tiny_rows), "out", *options, "--learning-rate", "0.1"]
    run_script(script, arguments, monkeypatch, tmp_path)
    assert capsys.readouterr().out.count(said) == 3
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "QVERA"
    vectors = named_vectors(open_run(tmp_path / "out").model)
    assert any(vector.abs().max() > 0 for name, vector in vectors.items() if name.endswith("qvera_b"))


@pytest.mark.slow
def test_the_notebook(tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    settings = {"MODEL": tiny_model_dir, "ROWS": tiny_rows, "OUT": tmp_path / "out", "STEPS": 2}
    for name, value in settings.items():
        monkeypatch.setenv(f"QVERA_EXAMPLE_{name}", str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "out" / "run" / "report.html").is_file()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "reference: " in printed
    assert "model.safetensors" in str(notebook.cells[-1]["outputs"])


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert not [cell for cell in notebook["cells"] if cell.get("outputs")]
