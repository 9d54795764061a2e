"""Six adapters of the tiny model, what each of them answers alone, and a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest

from qvera.serve.store import AdapterStore
from tests.serve.helpers import Alone, engine_of, expected_of, store_of, write_adapters

NAMES = [f"a{i}" for i in range(6)]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def adapters_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of six adapters. Read it, never change it."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapters(root, tiny_model_dir, {name: i for i, name in enumerate(NAMES)})
    return root


@pytest.fixture(scope="session")
def alone(tiny_model_dir: Path) -> Any:
    """``alone(adapter directory)`` answers as that adapter does by itself; None: the base."""
    return lru_cache(maxsize=None)(lambda adapter: Alone(tiny_model_dir, adapter))


@pytest.fixture
def store(adapters_dir: Path) -> AdapterStore:
    """The adapters of `adapters_dir`, and the base."""
    return store_of(adapters_dir)


@pytest.fixture
def expected(alone: Any, adapters_dir: Path) -> Any:
    """``expected(requests)``: what each gets alone. To be called before an engine runs."""
    return lambda asked: expected_of(alone, adapters_dir, asked)


@pytest.fixture
def engine_with(tiny_model_dir: Path) -> Any:
    """``engine_with(kind, **settings)`` is a running engine on the tiny model."""
    return partial(engine_of, tiny_model_dir)


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium; the test is skipped where that or playwright is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield found
        found.close()
