"""Sampler and trainer agree: the log-probabilities of sampled tokens and of prompts are those of a model in training."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvera.adapters.adapter_file import read_config
from qvera.serve.engine import Engine
from qvera.serve.opening import open_served
from qvera.serve.requests import EngineSettings, GenerationRequest, PromptScoring, Sampling
from qvera.serve.store import AdapterStore
from qvera.serve.tinker.tenancy import open_tinker
from qvera.training.optim import AdamSettings
from qvera.training.tenants import ModelShape, Tenants, TenantSettings
from qvera.training.token_rows import TokenRow
from tests.serve.helpers import SECONDS, Answer, submit, tiny_base

SHAPES = {
    "lora-1": ModelShape("lora", 1),
    "lora-8": ModelShape("lora", 8),
    "lora-8-too": ModelShape("lora", 8),
    "mlp": ModelShape("lora", 4, "mlp"),
    "vera": ModelShape("vera", 16),
}
STEP = AdamSettings(0.02, 0.9, 0.95, 1e-12, 0.0, 0.0)


class Training:
    """Calls to models that are trained beside answers."""

    def __init__(self, tenants: Tenants) -> None:
        self.tenants = tenants

    def ask(self, call: Any, *arguments: Any) -> Any:
        """The result of a call."""
        found, ended = list[Any](), threading.Event()
        call(*arguments, lambda result: (found.append(result), ended.set()))
        assert ended.wait(SECONDS)
        assert not isinstance(found[0], Exception), found[0]
        return found[0]

    def logprobs(self, name: str, tokens: list[int], keep: bool = True) -> np.ndarray:
        """Of each token but the first: fp32 [tokens - 1]. ``keep`` no gradient."""
        weights = np.ones((len(tokens) - 1, 1), np.float32)
        row = TokenRow(np.array(tokens[:-1]), np.array(tokens[1:])[:, None], {"weights": weights})
        result = self.ask(self.tenants.forward_backward, name, [row], "cross_entropy", {}, keep)
        return result.logprobs[0][:, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 0.005)])
def test_what_the_sampler_says_of_its_tokens_is_what_training_says_of_them(
    dtype: str, most: float, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """1,000 tokens of trained models in mixed batches, and the prompts."""
    base = tiny_base(tiny_model_dir, compute_dtype=dtype)
    engine = Engine(base, EngineSettings(cache_tokens=2048, step_tokens=64, max_running=8, training_share=0.5))
    training = Training(Tenants(base, TenantSettings(tmp_path / "paged"), engine.wake))
    engine.set_background(training.tenants)
    engine.start()
    try:
        chooser, store = np.random.default_rng(0), AdapterStore(None)
        adapters = {}
        for seed, (name, shape) in enumerate(SHAPES.items()):
            training.ask(training.tenants.create, name, "anna", shape, seed)
            lesson = chooser.integers(3, 300, 40).tolist()
            losses = []
            for _ in range(6):
                losses.append(-training.logprobs(name, lesson, keep=False).sum())
                step = STEP._replace(learning_rate=0.003) if name == "vera" else STEP  # whose vectors go farther
                training.ask(training.tenants.optim_step, name, step)
            assert losses[-1] < losses[0] - 20  # so that the adapters matter
            training.ask(training.tenants.save_adapter, name, tmp_path / name)
            adapters[name] = store.resolve_directory(tmp_path / name, name)
        asked: list[tuple[str, GenerationRequest, Answer]] = []
        for number in range(25):
            name = list(SHAPES)[number % len(SHAPES)]
            prompt = tuple(chooser.integers(3, 300, 5 + 3 * number).tolist())
            scoring = PromptScoring(len(prompt) - 1)
            sampling = Sampling(40, top_logprobs=0, seed=number, tempered=True)
            request = GenerationRequest(f"{number}", prompt, adapters[name], sampling, scoring=scoring)
            asked.append((name, request, submit(engine, request)))
        said, true, prompts_apart = list[float](), list[float](), list[np.ndarray]()
        for name, request, answer in asked:
            lps = training.logprobs(name, [*request.prompt, *answer.tokens])
            assert answer.scores is not None
            prompts_apart.append(answer.scores.own - lps[: len(request.prompt) - 1])
            said += [event.logprob or 0.0 for event in answer.events]
            true += lps[len(request.prompt) - 1 :].tolist()
    finally:
        engine.close()
    assert len(said) == 1000
    for apart in (np.array(said) - np.array(true), np.concatenate(prompts_apart)):
        assert abs(apart.mean()) < most and np.abs(apart).max() < 100 * most


def test_an_adapter_keeps_how_its_base_was_opened(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Without that, one of a base in 16 bits would be opened in 4 bits elsewhere."""
    served, results = open_served(str(tiny_model_dir)), list[Any]()
    engine = Engine(served.opened.base, EngineSettings(cache_tokens=64))
    with open_tinker(tmp_path / "tinker", served, engine, max_rank=8) as tinker:
        tinker.tenants.create("one", "anna", SHAPES["lora-1"], 0, results.append)
        tinker.tenants.save_adapter("one", tmp_path / "saved", results.append)
        while tinker.tenants.has_work():
            tinker.tenants.run_slice()
    assert results == [None, None]
    assert read_config(tmp_path / "saved").quantization == served.opened.target.section.quantization
