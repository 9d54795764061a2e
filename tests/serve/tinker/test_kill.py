"""A loop of Tinker's own client whose server is killed and started again. The client only waits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvera.serve.api.server import bound
from tests.serve.command import Command
from tests.serve.tinker.test_client import datum

tinker = pytest.importorskip("tinker", reason="pip install 'qvera[test]'")
pytestmark = [pytest.mark.process, pytest.mark.slow]
STEPS = 6


def loop(url: str, after_step: Callable[[int], None] = lambda step: None) -> list[float]:
    """Losses of a loop with two calls before each step, and saved states on the way."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-x")
    training = service.create_lora_training_client("tiny-llama", rank=4, seed=1).result()
    losses = []
    for step in range(STEPS):
        calls = [training.forward_backward([datum([3 + i, 5, 7, 9])] * 2, "cross_entropy") for i in range(2)]
        losses += [calls[0].result().metrics["loss:sum"]]
        after_step(step)  # between a call whose gradients are pending and its step
        losses += [calls[1].result().metrics["loss:sum"]]
        training.optim_step(tinker.AdamParams(learning_rate=0.01)).result()
    training.save_state("last").result()
    return losses


def test_a_loop_goes_on_by_itself_after_its_server_was_killed(tiny_model_dir: Path, tmp_path: Path) -> None:
    with bound("127.0.0.1", 0) as (_, url):
        port = url.rpartition(":")[2]
    line = (str(tiny_model_dir), "--tinker", "--port", port, "--training-dir")
    with Command(*line, str(tmp_path / "whole")):
        expected = loop(url)
    servers: list[Command] = [Command(*line, str(tmp_path / "killed"))]
    reached, go_on = threading.Event(), threading.Event()

    def after_step(step: int) -> None:
        if step == STEPS // 2:
            reached.set()
            go_on.wait(60)

    got: list[Any] = []
    client = threading.Thread(target=lambda: got.extend(loop(url, after_step)))
    client.start()
    assert reached.wait(60)
    servers[0].stop(signal.SIGKILL)
    go_on.set()
    with Command(*line, str(tmp_path / "killed")):
        client.join(120)
        assert got == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
