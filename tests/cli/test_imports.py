"""What is imported when: `import qvera` and the light commands without torch, and PEFT knows QVERA in every order of imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    """Here in the middle of the import of transformers' trainer. PEFT's module keeps its own loader, which tools ask.

    All of it goes without setuptools: it is no dependency, and where distutils is imported its import fails.
    """
    code = """
import importlib.util, inspect, sys
sys.modules["setuptools"] = None
import qvera
assert importlib.util.find_spec("peft").origin.endswith("__init__.py") and "peft" not in sys.modules
from transformers import Trainer
import peft
assert "PeftModel" in inspect.getsource(peft)
assert type(peft.__spec__.loader).__name__ == "SourceFileLoader"
import qvera.training.trainer, qvera.training.plan.timing
"""
    run_python(f"{code}{KNOWS_QVERA}")


def test_light_commands_import_no_torch_and_set_its_allocator_unless_the_user_has(
    trained_run: Path, tmp_path: Path
) -> None:
    """One process runs them all; compare reads two finished runs."""
    other = shutil.copytree(trained_run, tmp_path / "other")
    page = tmp_path / "page.html"
    lines = ["--help", "--version", "train --help", "schema", "cache ls", "ui --help", f"info {trained_run}"]
    lines.append(f"compare {trained_run} {other} --html {page}")
    code = f"""
import os, sys
import qvera
qvera.__version__
assert "QveraConfig" in dir(qvera)
heavy = {{"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "deepspeed", "triton"}}
assert not (heavy | {{"numpy"}}) & set(sys.modules)
from qvera.cli.main import main
assert [main(line.split()) for line in {lines}] == [0] * {len(lines)}
assert not heavy & set(sys.modules)
def after(**given):
    for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
        del os.environ[name]
    os.environ.update(given)
    assert main(["--version"]) == 0 and "torch" not in sys.modules
    return {{name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}}
for own in ({{"PYTORCH_ALLOC_CONF": ""}}, {{"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}}):
    assert after(**own) == own
assert after() == {{"PYTORCH_ALLOC_CONF": "expandable_segments:True"}}
import torch
torch.zeros(3) + 1  # a CPU takes no notice
"""
    run_python(code)
