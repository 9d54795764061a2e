"""What is imported when: `import qvera` and the light commands without torch, and PEFT knows QVERA in every order of imports.

One fresh process forks for each order, so that what they share is imported once.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.process


def light_commands_import_no_torch(run: str, other: str, page: str) -> None:
    import qvera

    assert qvera.__version__ and "QveraConfig" in dir(qvera)
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "deepspeed", "triton"}
    assert not (heavy | {"numpy"}) & set(sys.modules)
    from qvera.cli.main import main

    assert main(["compare", run, other]) == 0
    assert not {"jinja2", "numpy"} & set(sys.modules), "a table needs no page"
    from qvera.evaluation.report.run_page import write_report

    write_report(other)
    light = ["--help", "train --help", "schema", "cache ls", "ui --help", f"info {run}"]
    for line in (*light, f"compare {run} {other} --html {page}"):
        assert main(line.split()) == 0, line

    def allocator(**given: str) -> dict[str, str]:
        for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
            del os.environ[name]
        os.environ.update(given)
        assert main(["--version"]) == 0
        return {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}

    for own in ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}):
        assert allocator(**own) == own
    assert allocator() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert not heavy & set(sys.modules)
    import torch

    _ = torch.zeros(3) + 1  # a CPU takes no notice


def wrong_starts_import_no_torch(recipe: str) -> None:
    """What the recipe alone shows, by each command that would compute for long."""
    import contextlib
    import io
    import time

    from qvera.cli.main import main
    from qvera.config.schema import load_recipe

    wrong = {
        "training.lr=1": "Did you mean `learning_rate`?",
        "model.path=/nowhere": "'/nowhere' is not a directory",
        "data.path=nowhere.jsonl": "nowhere.jsonl: no such file",
        "data.eval_path=nowhere.jsonl": "nowhere.jsonl: no such file",
        "training.output_dir=/proc/x": "nothing can be written in /proc",
    }
    adapter = Path(recipe).with_name("adapters") / "anna" / "adapter_config.json"
    adapter.parent.mkdir(parents=True)
    adapter.write_text("{}")
    began = time.process_time()
    for override, words in wrong.items():
        for command in ("train", "launch", *(["preview"] if "output" not in override else [])):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                assert main([command, recipe, "--set", override]) == 2, said.getvalue()
            assert words in said.getvalue(), said.getvalue()
    rows = Path(recipe).with_name("broken.jsonl")
    rows.write_text('{"prompt": "x", ')
    model = load_recipe(recipe).model.path
    for data, words in (("nowhere.csv", "no such file"), (str(rows), "broken.jsonl:1: not valid JSON")):
        with contextlib.redirect_stderr(said := io.StringIO()):
            assert main(["init", f"{recipe}.new.yaml", "--model", model, "--data", data]) == 2
        assert words in said.getvalue()
    for line in ("chat RUN", "eval RUN", "export RUN out", "generate RUN --prompt x"):
        with contextlib.redirect_stderr(said := io.StringIO()):
            assert main([*line.replace("RUN", str(adapter.parents[1])).split(), "--adapter", "ana"]) == 2
        assert "did you mean 'anna'?" in said.getvalue()
    for line in ("chat RUN", "eval RUN", "export RUN out", "generate RUN --prompt x"):
        for name in ("misspelt", f"{adapter.parents[2]}/misspelt"):
            with contextlib.redirect_stderr(said := io.StringIO()):
                assert main(line.replace("RUN", name).split()) == 2
            assert f"{name}: no such directory. Expected a run" in " ".join(said.getvalue().split())
    assert not {"torch", "transformers", "peft"} & set(sys.modules)
    assert time.process_time() - began < 8, "thirty starts"


def a_silent_hub_is_left(recipe: str, adapter: str) -> None:
    import contextlib
    import io
    import time

    from qvera.cli.main import main

    began = time.monotonic()
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody answers there
    unknown = "--set data.path=nobody/nothing --set model.path=nobody/no-model"
    for command, words in (
        (f"train {recipe} {unknown}", "or the hub did not answer"),
        (f"generate {adapter} --prompt x", "has no key 'peft_type'"),
    ):
        with contextlib.redirect_stderr(said := io.StringIO()):
            assert main(command.split()) == 2
        assert words in said.getvalue() and "Retrying" not in said.getvalue(), said.getvalue()
    assert time.monotonic() - began < 120, "imports, and no retries"


def peft_knows_qvera() -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    import qvera

    assert PEFT_TYPE_TO_CONFIG_MAPPING["QVERA"] is qvera.QveraConfig  # type: ignore[index]
    assert PEFT_TYPE_TO_TUNER_MAPPING["QVERA"] is qvera.QveraModel  # type: ignore[index]


def peft_is_imported_first() -> None:
    import peft  # noqa: F401

    assert "qvera" not in sys.modules
    peft_knows_qvera()


def qvera_is_imported_first() -> None:
    """PEFT is imported in the middle of transformers' trainer then, and keeps its own loader, which tools ask.

    All of it goes without setuptools (no dependency; where distutils is imported its import fails).
    """
    import importlib.util
    import inspect

    sys.modules["setuptools"] = None  # type: ignore[assignment]
    import qvera

    found = importlib.util.find_spec("peft")
    assert found is not None and str(found.origin).endswith("__init__.py") and "peft" not in sys.modules
    import peft
    from transformers import Trainer  # noqa: F401

    import qvera.training.alone
    import qvera.training.plan.plan  # noqa: F401

    assert "PeftModel" in inspect.getsource(peft)
    assert type(peft.__spec__.loader).__name__ == "SourceFileLoader"
    peft_knows_qvera()


def the_loader_is_imported_first() -> None:
    """As `qvera doctor` does. PEFT comes in the middle of it, and with PEFT the tuner."""
    import qvera.models.loader  # noqa: F401

    peft_knows_qvera()


def forked(check: Callable[..., None], *arguments: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=check, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, check.__name__


def test_commands_and_peft_in_every_order_of_imports(trained_run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(trained_run, tmp_path / "other")
    command = [sys.executable, "-m", __name__, str(trained_run), str(other), str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_start_that_the_recipe_shows_to_be_wrong_fails_before_torch(write_recipe: Any) -> None:
    command = [sys.executable, "-m", __name__, str(write_recipe("wrong.yaml"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    import qvera

    with pytest.raises(AttributeError, match="no attribute 'QveraConfigg'"):
        qvera.QveraConfigg  # noqa: B018


if __name__ == "__main__" and len(sys.argv) == 2:
    forked(wrong_starts_import_no_torch, sys.argv[1])
    config = Path(sys.argv[1]).with_name("of_the_hub") / "adapter_config.json"
    config.parent.mkdir()
    config.write_text('{"base_model_name_or_path": "nobody/no-model"}')
    forked(a_silent_hub_is_left, sys.argv[1], str(config.parent))
elif __name__ == "__main__":
    forked(light_commands_import_no_torch, *sys.argv[1:])
    import transformers.modeling_utils  # noqa: F401

    assert not {"qvera", "peft", "bitsandbytes"} & set(sys.modules)
    forked(peft_is_imported_first)
    forked(qvera_is_imported_first)
    forked(the_loader_is_imported_first)
