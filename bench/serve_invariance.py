"""What `qvera serve --batch-invariant` costs: tokens per second with and without it, by turns in one process.

    python bench/serve_invariance.py [--rounds 2] [--result serve_invariance]

SmolLM2-135M in NF4, computing in bf16, on one thread. 1, 16 and 64 requests at a time share four adapters (two of VeRA
r=256, two of LoRA r=16, all linears) and get 16, 12 and 6 tokens each after prompts of 8; ``prompt`` is one prompt of 240
tokens, whose tokens are counted there. Seconds are the CPU time of this process, so other load on the machine counts little; medians of rounds in which
the two engines take turns. ``ratio`` is seconds with over seconds without, of the same round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.adapters import write_adapters
from bench.common import header, smollm2, write_result
from qvera.config.schema import AdapterSection, ModelSection
from qvera.models.loader import load_base
from qvera.serve.batches import PagedBatches
from qvera.serve.engine import Engine
from qvera.serve.requests import EndEvent, EngineSettings, Event, GenerationRequest, Sampling
from qvera.serve.store import AdapterStore

CASES = {"1": (1, 8, 16), "16": (16, 8, 12), "64": (64, 8, 6), "prompt": (1, 240, 1)}
"""Name → requests, tokens of a prompt, new tokens."""


def cpu_seconds(engine: Engine, asked: list[GenerationRequest]) -> float:
    """Of this process, until all are answered."""
    left, done = [len(asked)], threading.Event()

    def take(event: Event) -> None:
        if isinstance(event, EndEvent):
            assert event.reason == "length", event
            left[0] -= 1
            if not left[0]:
                done.set()

    began = time.process_time()
    for one in asked:
        engine.submit(one, take)
    assert done.wait(3600)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--result", default="serve_invariance")
    args = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {**header(), "rounds": args.rounds}
    section, chooser = ModelSection(path=smollm2(), compute_dtype="bfloat16"), random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        directories = list(write_adapters(Path(scratch) / "vera", section, 2).values())
        lora = AdapterSection(method="lora", rank=16)
        directories += write_adapters(Path(scratch) / "lora", section, 2, adapter=lora).values()
        store = AdapterStore(None, base_names=["base"])
        for i, directory in enumerate(directories):
            store.add(f"a{i}", directory)
        engines = []
        for is_invariant in (False, True):
            settings = EngineSettings(max_running=64, cache_tokens=8192, slots=4, batch_invariant=is_invariant)
            engines.append(Engine(load_base(section), settings))
        for engine in engines:  # no model is loaded while another thread runs one
            engine.start()
            for name in store.names():
                adapter = store.resolve(name)
                assert adapter is not None
                engine.load(adapter)
        batches = engines[1]._batches
        assert isinstance(batches, PagedBatches)  # static ones can't keep the promise
        document["rows"] = batches.pass_tokens
        for case, (requests, prompt_tokens, new_tokens) in CASES.items():
            seconds: list[list[float]] = []
            for round_number in range(args.rounds + 1):
                seconds.append([])
                for engine in engines[:: 1 if round_number % 2 else -1]:
                    asked = []
                    for i in range(requests):
                        prompt = tuple(chooser.randrange(100, 40_000) for _ in range(prompt_tokens))
                        sampling, name = Sampling(new_tokens, temperature=0.0), f"a{i % 4}"
                        asked.append(
                            GenerationRequest(f"{case} {round_number} {i}", prompt, store.resolve(name), sampling)
                        )
                    seconds[-1].append(cpu_seconds(engine, asked))
                if not round_number % 2:
                    seconds[-1].reverse()
            seconds = seconds[1:]  # the first one warms up
            tokens = requests * new_tokens if case != "prompt" else prompt_tokens
            rates = [statistics.median(tokens / one[i] for one in seconds) for i in range(2)]
            ratios = sorted(invariant / plain for plain, invariant in seconds)
            document[case] = {
                "tokens_per_cpu_second": rates[0],
                "with_batch_invariant": rates[1],
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
            print(case, document[case], flush=True)
        for engine in engines:
            engine.close()
    print(write_result(args.result, document))


if __name__ == "__main__":
    main()
