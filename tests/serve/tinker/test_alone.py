"""A hundred tenants who share a server's passes each get what they get alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import httpx
import numpy as np
import pytest

from bench.serving import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.process]
pytest.importorskip("tinker")
TENANTS, STEPS = 100, 2


def test_a_hundred_interleaved_tenants_each_equal_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    from bench.tinkering import Link, Trained, random_rows, write_keys
    from tests.stress.tinker_soak import make_fp32_run

    make_fp32_run(str(tiny_model_dir), tmp_path / "run")
    keys = write_keys(tmp_path / "keys.json", TENANTS)
    name = tiny_model_dir.name
    shapes = [(name, 4), (f"{name}:vera-8", 4), (name, 1), (name, 32)]

    async def train(link: Link, number: int) -> list[np.ndarray]:
        """All log-probabilities of a tenant; the first and the last are of the same row, before and after training."""
        model = await Trained.create(link, *shapes[number % len(shapes)], seed=number)
        chooser = random.Random(number)
        probe = random_rows(chooser, 1, 20, 20, 300)
        found = await model.logprobs(await model.begin_rows(probe, forward_only=True))
        for _ in range(STEPS):
            for _ in range(chooser.randint(1, 2)):
                rows = random_rows(chooser, chooser.randint(1, 3), 2, 20, 300)
                found += await model.logprobs(await model.begin_rows(rows))
            await link.result(await model.begin_step(1e-3))
        found += await model.logprobs(await model.begin_rows(probe, forward_only=True))
        await model.finish()
        return found

    async def both(url: str) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            links = [Link(http, key) for key in keys]
            together = await asyncio.gather(*(train(link, number) for number, link in enumerate(links)))
            return together, [await train(link, number) for number, link in enumerate(links)]

    options = ["--tinker", "--training-dir", str(tmp_path / "training"), "--keys", str(tmp_path / "keys.json")]
    with ServerProcess(str(tmp_path / "run"), *options) as server:
        together, alone = asyncio.run(both(server.url))
    for one, other in zip(together, alone, strict=True):
        assert len(one) == len(other)
        assert max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True)) < 1e-5
        assert float(np.abs(one[0] - one[-1]).max()) > 1e-3  # a lost step would show
