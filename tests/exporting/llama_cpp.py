"""llama.cpp, and what transformers gives for the same prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


class Answer(NamedTuple):
    """Greedy tokens, the log probability of each, and how many tokens the prompt had."""

    tokens: list[int]
    log_probabilities: list[float]
    prompt_tokens: int


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, model: Path, adapter: Path | None) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(model)
        settings.n_ctx, settings.n_parallel, settings.warmup = 512, 1, False
        settings.cpuparams.n_threads = 1
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server: Any = xllamacpp.Server(settings)

    def answer(self, prompt: str | list[int], banned: Sequence[int] = (), count: int = 8) -> Answer:
        """What follows the prompt, which is read as it is, special tokens included; ``banned`` tokens are not taken."""
        bias = [[token, False] for token in banned]
        asked = {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1, "cache_prompt": False}
        found = self.server.handle_completions({**asked, "logit_bias": bias})
        tokens = found["choices"][0]["logprobs"]["content"]
        ids, values = ([token[key] for token in tokens] for key in ("id", "logprob"))
        return Answer(ids, values, found["usage"]["prompt_tokens"])


def half_characters(tokenizer: Any, count: int) -> list[int]:
    """Ids whose text is no whole character: llama.cpp's answers do not name them one by one. And special tokens."""
    whole = [tokenizer.decode([number], skip_special_tokens=True) for number in range(count)]
    return [number for number, text in enumerate(whole) if not text or "\ufffd" in text]


@contextlib.contextmanager
def llama_cpp(model: Path, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    """Load a GGUF file, with a LoRA where there is one, for texts of up to 512 tokens."""
    loaded = LlamaCpp(model, adapter)
    try:
        yield loaded
    finally:
        del loaded.server


@torch.no_grad()
def transformers_answer(model: Any, ids: list[int], banned: Sequence[int] = (), count: int = 8) -> Answer:
    """The same of a transformers model, which ends where llama.cpp does: before the end token."""
    allowed = torch.zeros(model.config.get_text_config().vocab_size)
    allowed[list(banned)] = -torch.inf
    row, cache, tokens, values = torch.tensor([ids]), None, list[int](), list[float]()
    for _ in range(count):
        found = model(row, past_key_values=cache, use_cache=True)
        scores, cache = torch.log_softmax(found.logits[0, -1].float(), -1), found.past_key_values
        token = int((scores + allowed).argmax())
        if token == model.config.eos_token_id:
            break
        tokens.append(token)
        values.append(scores[token].item())
        row = torch.tensor([[token]])
    return Answer(tokens, values, len(ids))
