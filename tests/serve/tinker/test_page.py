"""docs/tinker.md: its client code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.serve.command import Command

pytest.importorskip("tinker", reason="pip install 'qvera[test]'")


@pytest.mark.process
def test_the_client_code_of_the_page_trains_samples_and_saves(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "tinker.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with Command(str(tiny_model_dir), "--training-dir", str(tmp_path / "training"), "--tinker") as command:
        exec(code.replace("http://127.0.0.1:8000", command.url), {})
    said = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[0]) for line in said[:10]]
    assert losses[-1] < losses[0] - 0.1
    assert said[-1].startswith("tinker://session-") and said[-1].endswith("/weights/first")
