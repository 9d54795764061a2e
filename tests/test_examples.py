"""The examples run: each as a user runs it, on the tiny model."""

from __future__ import annotations

import json
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from qvera.adapters.save_load import named_vectors
from qvera.evaluation.load import open_run

pytestmark = pytest.mark.process

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """``run(script, *options)`` is what the script prints; what it makes is in ``out``."""

    def run(script: str, *options: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [script, str(tiny_model_dir), str(tiny_rows), "out", *options])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_finetune(run: Any, tmp_path: Path) -> None:
    assert len((EXAMPLES / "finetune.py").read_text(encoding="utf-8").splitlines()) <= 40
    (losses,) = re.findall(r"held-out loss (\S+) → (\S+)", run("finetune.py", "--steps", "4"))
    assert float(losses[1]) < float(losses[0])
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [("trl_sft.py", [], "'loss':"), ("trl_grpo.py", ["--answer-tokens", "6"], "'rewards/likeness/mean':")],
)
def test_with_trl(script: str, options: list[str], said: str, run: Any, tmp_path: Path) -> None:
    """The trained adapter is one that qvera's own commands take, and its vectors have moved."""
    pytest.importorskip("trl", reason="pip install 'qvera[trl]'")
    assert run(script, "--steps", "3", *options, "--learning-rate", "0.1").count(said) == 3
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
    assert printed.count("exact match") == 3
    assert json.loads((tmp_path / "out" / "run" / "run.json").read_text(encoding="utf-8"))["result"]["steps"] == 3
    assert "adapter_model.safetensors" in str(notebook.cells[-1]["outputs"])


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert not [cell for cell in notebook["cells"] if cell.get("outputs")]
