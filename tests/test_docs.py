"""The documentation is true: the API example runs, the recipe reference is current, the README's commands exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from qvera.cli.main import build_parser

ROOT = Path(__file__).resolve().parent.parent


def test_the_api_example_runs(tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names = {"MODEL": str(tiny_model_dir), "ROWS": str(tiny_rows), "WHERE": str(tmp_path)}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert len(names["answers"]) == 8
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_recipe_reference_is_current() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["reference"]
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == reference()


@pytest.mark.parametrize(
    ("file", "least"),
    [
        ("README.md", {"train", "eval", "chat", "generate", "export", "info"}),
        ("docs/evaluation.md", {"train", "eval", "compare", "harness"}),
    ],
)
def test_every_command_of_the_documents_parses(file: str, least: set[str]) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    commands = [line.split("#")[0].split()[1:] for line in text.splitlines() if line.startswith("    qvera ")]
    assert {c[0] for c in commands} >= least
    for command in commands:
        assert build_parser().parse_args(command).command == command[0]


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "docs/api.md", "docs/multi-node.md", "docs/evaluation.md"]
)
def test_linked_files_exist(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / file).parent / target).exists(), target
