"""The Dockerfile: what it is built from is enough, and what it installs works without root's files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def in_the_context() -> list[str]:
    """What .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    return [line[1:] for line in lines if line.startswith("!")]


def test_the_image_has_every_extra_that_a_user_can_need() -> None:
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", DOCKERFILE, re.MULTILINE)
    left_out = {"dev", "docs", "test", "tinker-cookbook", "harness"}  # of developers, and lm-eval, which is large
    nested = {"classification"}  # vision has it
    assert set(extras.split(",")) | left_out | nested == set(PROJECT["optional-dependencies"])


def test_the_page_shows_the_arguments_and_their_defaults() -> None:
    page = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    for name, value in re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE):
        assert f"| `{name}` | " in page
        assert value.startswith("https://") or f"| `{value}` |" in page
    assert "USER 1001" in DOCKERFILE and "with number 1001" in page


@pytest.mark.slow
def test_the_wheel_made_from_the_context_works_alone(tmp_path: Path) -> None:
    """As the image does it; with this environment's own libraries. pip fetches hatchling from the registry."""
    source, installed, home = tmp_path / "src", tmp_path / "installed", tmp_path / "home"
    source.mkdir()
    home.mkdir()
    for name in in_the_context():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    (build,) = re.findall(r"^RUN (pip wheel .*)$", DOCKERFILE, re.MULTILINE)
    build = build.replace("/dist", str(tmp_path / "dist")).replace("/src", str(source))
    subprocess.run([sys.executable, "-m", *build.split()], check=True)
    (wheel,) = (tmp_path / "dist").glob("qvera-*.whl")
    install = ["pip", "install", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(installed)}
    code = "import sys, qvera; from qvera.cli.main import main; print(qvera.__file__); sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=environment, check=True, capture_output=True)
    assert done.stdout.decode().startswith(str(installed))
    assert f"free in {home}" in done.stdout.decode()
    assert list((installed / "qvera" / "recipes").rglob("*.yaml"))
