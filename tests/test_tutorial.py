"""The tutorial: its blocks run in order, as a reader runs them. On a tiny base always, on the page's own by hand."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from qvera.cli.main import main
from tests.helpers import ROOT, commands_of
from tests.serve.command import Command

pytestmark = pytest.mark.process

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BASE = "~/.cache/qvera/quickstart/smollm2-135m-instruct"
URL = "http://127.0.0.1:8000"
ELSEWHERE = ("pip", "qvera quickstart", "qvera ui", "qvera train recipes/customers.yaml")
"""Commands of the page that tests/test_docs.py says where they are run."""


def follow(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, epochs: tuple[str, str] = ("3", "8"), lr_steps: int = 40
) -> Any:
    """Do what the page says in the current directory. Returns what each command printed.

    ``epochs``: of the short runs and of the recipe.
    """
    said: dict[str, str] = {}
    names: dict[str, Any] = {}
    with contextlib.ExitStack() as servers:
        url = URL
        for kind, block in re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL):
            if kind == "python":
                exec(compile(block.replace(URL, url), "docs/tutorial.md", "exec"), names)
                said["the client"] = capsys.readouterr().out
                continue
            for command in commands_of(block):
                if command.startswith(ELSEWHERE):
                    continue
                command = command.replace(BASE, str(base)).replace("lr-steps 40", f"lr-steps {lr_steps}")
                command = command.replace("num_train_epochs=3", f"num_train_epochs={epochs[0]}")
                words = shlex.split(command)
                if words[1] == "serve":
                    url = servers.enter_context(Command(*words[2:])).url
                    continue
                monkeypatch.setattr("sys.stdin", io.StringIO("I forgot my password.\n/quit\n"))
                assert main(words[1:]) == 0, capsys.readouterr().err
                said[command] = capsys.readouterr().out
                if words[1] == "init":
                    recipe, text = Path(words[2]), Path(words[2]).read_text(encoding="utf-8")
                    recipe.write_text(
                        re.sub(r"num_train_epochs: \d+", f"num_train_epochs: {epochs[1]}", text), encoding="utf-8"
                    )
    return said


def test_the_blocks_run_in_order(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    said = follow(tiny_model_dir, monkeypatch, capsys, ("0.5", "1"), lr_steps=10)
    assert {words.split()[1] for words in said if words.startswith("qvera ")} == {
        "init", "preview", "plan", "train", "eval", "chat", "generate", "compare", "export",
    }  # fmt: skip
    assert said["the client"].strip()
    assert Path("lora/adapter_model.safetensors").is_file()
    assert Path("merged/model.safetensors").is_file()
    assert json.loads(Path("runs/mail/run.json").read_text(encoding="utf-8"))["result"]["steps"] == 20


@pytest.mark.matrix
def test_the_page_s_own_base_learns_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Some twelve minutes of two cores. The recipe is the one that the page shows, to the letter."""
    base = Path(BASE).expanduser()
    if not base.is_dir():
        pytest.skip("qvera quickstart --fetch-only")
    monkeypatch.chdir(tmp_path)
    follow(base, monkeypatch, capsys)
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert shown.replace(BASE, str(base)) in Path("mail.yaml").read_text(encoding="utf-8")
    result = json.loads(Path("runs/mail/run.json").read_text(encoding="utf-8"))["result"]
    before, after = (result[when]["exact_match"] for when in ("eval_before", "eval_after"))
    assert after > before + 0.5
