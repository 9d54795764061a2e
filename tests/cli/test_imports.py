"""What is imported when: `import qvera` and the light commands without torch, and PEFT knows QVERA in every order of imports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "deepspeed", "numpy", "triton")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_modules_after(code: str) -> list[str]:
    """Which of the heavy packages a fresh process has imported after ``code``."""
    out = run_python(f"{code}\nimport json, sys\nprint()\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))")
    return json.loads(out.splitlines()[-1])


def test_import_qvera_is_light_and_names_its_api() -> None:
    assert heavy_modules_after("import qvera; qvera.__version__; assert 'QveraConfig' in dir(qvera)") == []


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    import qvera

    with pytest.raises(AttributeError, match="no attribute 'QveraConfigg'"):
        qvera.QveraConfigg  # noqa: B018


KNOWS_QVERA = """
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["QVERA"] is qvera.QveraConfig
assert PEFT_TYPE_TO_TUNER_MAPPING["QVERA"] is qvera.QveraModel
"""


def test_peft_knows_qvera_where_peft_is_imported_first() -> None:
    run_python(f"import peft; import qvera{KNOWS_QVERA}")


def test_peft_knows_qvera_where_qvera_is_imported_first() -> None:
    """Here in the middle of the import of transformers' trainer.

    PEFT's module keeps its own loader, which tools ask.
    """
    code = """
import importlib.util, inspect, sys, qvera
assert importlib.util.find_spec("peft").origin.endswith("__init__.py") and "peft" not in sys.modules
from transformers import Trainer
import peft
assert "PeftModel" in inspect.getsource(peft)
assert type(peft.__spec__.loader).__name__ == "SourceFileLoader"
"""
    run_python(f"{code}{KNOWS_QVERA}")


def test_training_imports_without_setuptools() -> None:
    """It is no dependency, and in a process that has imported distutils its import fails."""
    run_python(
        "import sys; sys.modules['setuptools'] = None; import qvera.training.trainer, qvera.training.plan.timing"
    )


def test_light_commands_import_no_torch(trained_run: Path, tmp_path: Path) -> None:
    """One process runs them all; compare reads two finished runs."""
    other = shutil.copytree(trained_run, tmp_path / "other")
    lines = [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["schema"],
        ["cache", "ls"],
        ["ui", "--help"],
        ["info", str(trained_run)],
        ["compare", str(trained_run), str(other), "--html", str(tmp_path / "page.html")],
    ]
    code = f"from qvera.cli.main import main\nassert [main(line) for line in {lines}] == [0] * {len(lines)}"
    assert set(heavy_modules_after(code)) <= {"numpy"}


def test_the_allocator_is_set_before_torch_unless_the_user_has_set_it() -> None:
    code = """
import os, sys
from qvera.cli.main import main
def after(**given):
    for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
        del os.environ[name]
    os.environ.update(given)
    assert main(["--version"]) == 0 and "torch" not in sys.modules
    return {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
for own in ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}):
    assert after(**own) == own
assert after() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
import torch
torch.zeros(3) + 1  # a CPU takes no notice
"""
    run_python(code)
