"""`qvera ui` as a process: it prints its address, serves, and ends at once."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.cli.main import main
from qvera.serve.api.server import Server

pytestmark = pytest.mark.process

Build = Callable[..., Path]


def test_it_prints_its_address_serves_and_ends_at_once(build_run: Build, tmp_path: Path) -> None:
    build_run(name="mine")
    line = [sys.executable, "-m", "qvera", "ui", str(tmp_path), "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url), process.stderr.read()
        assert "mine" in httpx.get(url).text
        with httpx.stream("GET", f"{url}/events/run/mine") as stream:  # a reader that stays
            next(stream.iter_lines())
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            assert process.wait(10) == 0
            assert time.monotonic() - began < 5
        assert process.stderr.read() == ""


def test_it_opens_a_browser_and_warns_of_other_readers(
    build_run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    build_run(name="mine")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(Server, "run", lambda self, sockets: self._on_start())
    assert main(["ui", str(tmp_path), "--port", "0", "--open", "--host", "0.0.0.0"]) == 0
    said = capsys.readouterr()
    assert opened == [said.out.strip()]
    assert "Anyone who reaches this address" in said.err
    assert main(["ui", str(tmp_path), "--port", "0"]) == 0
    assert len(opened) == 1
    assert capsys.readouterr().err == ""


def test_bad_lines(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["ui", str(tmp_path / "nowhere")]) == 2
    assert "no such directory. Give a directory that holds runs" in capsys.readouterr().err
    assert main(["ui", str(tmp_path), "--host", "300.0.0.1"]) == 2
    assert "--host 300.0.0.1 --port 8001: can't be taken" in capsys.readouterr().err
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "starlette" else real(name, *a))
    assert main(["ui", str(tmp_path)]) == 2
    assert "pip install 'qvera[serve]'" in capsys.readouterr().err
