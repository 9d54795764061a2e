"""A hundred tenants who share a server's passes each get what they get alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import httpx
import numpy as np
import pytest

from qvera.serve.api.access import KeyFile
from tests.serve.tinker.conftest import serving

pytestmark = pytest.mark.slow
pytest.importorskip("tinker")
TENANTS, STEPS = 100, 2
SHAPES = [("tiny", 4), ("tiny:vera-8", 4), ("tiny", 1), ("tiny", 32)]


def test_a_hundred_interleaved_tenants_each_equal_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The calls of a tenant are sent before its first result is asked for."""
    from bench.tinkering import Link, Trained, random_rows, write_keys

    async def train(link: Link, number: int) -> list[np.ndarray]:
        """All log-probabilities of a tenant; the first and the last are of the same row, before and after training."""
        model = await Trained.create(link, *SHAPES[number % len(SHAPES)], seed=number)
        chooser = random.Random(number)
        probe = random_rows(chooser, 1, 20, 20, 300)
        sent = [await model.begin_rows(probe, forward_only=True)]
        for _ in range(STEPS):
            for _ in range(chooser.randint(1, 2)):
                rows = random_rows(chooser, chooser.randint(1, 3), 2, 20, 300)
                sent.append(await model.begin_rows(rows))
            await model.begin_step(1e-3)
        sent.append(await model.begin_rows(probe, forward_only=True))
        found = [row for promise in sent for row in await model.logprobs(promise)]
        await model.finish()
        return found

    async def both(url: str) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as http:
            links = [Link(http, key) for key in keys]
            together = await asyncio.gather(*(train(link, number) for number, link in enumerate(links)))
            return together[::3], [await train(links[number], number) for number in range(0, TENANTS, 3)]

    keys = write_keys(tmp_path / "keys.json", TENANTS)
    with serving(tiny_model_dir, tmp_path, KeyFile(tmp_path / "keys.json")) as (url, _):
        together, alone = asyncio.run(both(url))
    for one, other in zip(together, alone, strict=True):
        assert len(one) == len(other)
        assert max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True)) < 1e-5
        assert float(np.abs(one[0] - one[-1]).max()) > 1e-3  # a lost step would show
