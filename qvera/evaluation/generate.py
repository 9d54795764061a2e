"""Generate answers to prompts in batches, greedy or sampled, at the speed of stock 4-bit generation."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationMixin

from qvera.adapters import AdaptedForward
from qvera.data import ChatTemplate, Encoder, Turn, microbatches, resolve_template
from qvera.distributed.zero_params import any_sharded, is_sharded
from qvera.evaluation.load import template_of
from qvera.models import linear, quantization
from qvera.models.loader import causal_model, takes_prefix_once
from qvera.models.structure import decoder_of, position_limit
from qvera.utils import accelerator, memory
from qvera.utils.errors import InputError
from qvera.utils.out_of_memory import each_in_halves

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from qvera.evaluation.load import OpenRun


@contextlib.contextmanager
def generating(model: nn.Module, base_only: bool = False) -> Iterator[None]:
    """For the time of the block: evaluation mode, the KV cache on, linears in their fastest layout for answers.

    Where there is memory to spare, adapted layers hold W + ΔW in the compute dtype. On a CPU, 4-bit layers without it
    hold a copy in the layout of bitsandbytes' fused kernel. Everything is put back afterwards; weights and later
    gradients are bit-unchanged. Blocks may be nested: the inner ones change nothing. ``base_only``: layers hold W
    alone, for batches whose rows use different adapters.
    """
    inner = causal_model(model)
    was_training, used_cache = model.training, getattr(inner.config, "use_cache", None)  # an encoder may have none
    layers = [m for m in model.modules() if isinstance(m, AdaptedForward) and not m.disable_adapters]
    layers = [m for m in layers if not is_sharded(m.base_layer.weight)]
    if any(layer.holds_inference_weight for layer in layers) or not _dense_fits(layers):
        layers = []
    model.eval()
    inner.config.use_cache = True
    try:
        with torch.no_grad():
            for layer in layers:
                layer.cache_merged_weight(True, base_only)
            with linear.inference_layout(model, skip=[layer.base_layer for layer in layers]):
                yield
    finally:
        for layer in layers:
            layer.cache_merged_weight(False)
        if used_cache is None:
            del inner.config.use_cache
        else:
            inner.config.use_cache = used_cache
        model.train(was_training)


def _dense_fits(layers: list[Any]) -> bool:
    """Whether dense copies of these layers' weights leave most of the memory that is free: to keys, values, and others.

    They may take a quarter of a CPU's, and half of an accelerator's. There a layer and token then takes 16 kernels in
    place of 41 (tests/gpu/test_decoding.py). An accelerator on which a model is trained keeps its memory for the steps,
    and one that streams its base has none to spare.
    """
    if not layers:
        return False
    device = layers[0].base_layer.weight.device
    if on_accelerator := accelerator.is_accelerator(device):
        trains = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
        if trains or any(quantization.is_streamed(layer.base_layer) for layer in layers):
            return False
    size_bytes = sum(layer.in_features * layer.out_features * layer.held_dtype().itemsize for layer in layers)
    return size_bytes <= memory.available_bytes(device) // (2 if on_accelerator else 4)


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    adapters: Sequence[str] | None = None,
    static_cache: bool = False,
    streamer: BaseStreamer | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Complete each prompt, in batches of similar length, and return the texts in the order of the prompts.

    Where memory runs out, batches are halved. Greedy answers do not depend on it, up to rounding; sampled ones do.

    Args:
        prompts: token ids, BOS included where the model wants one.
        max_new_tokens: tokens at most per answer; an end-of-turn token ends it earlier, and so does the end of the
            model's positions (`position_limit`).
        temperature: 0: greedy, else sampled with ``top_p`` from a generator seeded with ``seed``.
        adapters: which adapter answers each prompt, where the model has several (`qvera.adapters.shared_model`);
        ``__base__`` for none.
        static_cache: keys and values in tensors of a fixed size, with which transformers compiles a step and records
        it as a CUDA graph. That takes a minute for each new size of a batch, so it is for many long answers.
        streamer: a transformers streamer, for one prompt.
        progress: called with the number of prompts finished after each batch.

    Returns:
        The decoded answers, without prompt and special tokens.

    Raises:
        InputError: one of the settings is out of its range, or the model has no positions for a prompt and an answer.
        RunFailed: memory ran out with a single prompt.
        ValueError: ``adapters`` does not name one adapter for each prompt.
    """
    for name, value, good, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or a positive number"),
        ("top_p", top_p, 0 < top_p <= 1, "a number above 0 and at most 1"),
    ):
        if not good:
            raise InputError(f"{name}: expected {expected}, got {value}.")
    if adapters is not None and len(adapters) != len(prompts):
        raise ValueError(f"{len(adapters)} adapters for {len(prompts)} prompts; need one for each")
    limit = position_limit(model)
    if limit is not None and (longest := max(map(len, prompts), default=0)) >= limit:
        raise InputError(
            f"a prompt has {longest:,} tokens, and the model has positions for {limit:,}, the answer's included. "
            "Shorten it."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer)
    # Under ZeRO-3 a rank whose answers have ended goes on, because the others still need its shards.
    together = any_sharded(model)
    answers: dict[int, str] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    # sampling must not move the training run's random state
    forked = accelerator.forked_random_state()
    with generating(model, base_only=adapters is not None), forked:
        torch.manual_seed(seed)
        joins = takes_prefix_once(model) and streamer is None and adapters is None and not static_cache
        prefix = _common_prefix(prompts) if joins else 0
        cache = _prefix_cache(model, prompts[0][:prefix], device) if prefix else None

        def answer(rows: list[int]) -> list[str]:
            # padded on the left, so that every answer starts in the same column, and behind what all prompts share
            ids = padded([prompts[i][prefix:] for i in rows], pad)
            mask = padded([[1] * (len(prompts[i]) - prefix) for i in rows], 0)
            settings = dict(sampling)
            if cache is not None:
                shared = torch.tensor([prompts[0][:prefix]]).expand(len(rows), -1)
                ids, mask = torch.cat([shared, ids], 1), torch.cat([torch.ones_like(shared), mask], 1)
                settings[CACHE_ARGUMENT] = copy.deepcopy(cache)
                settings[CACHE_ARGUMENT].batch_repeat_interleave(len(rows))
            if static_cache:
                settings["cache_implementation"] = "static"
            if adapters is not None:
                settings["adapter_names"] = [adapters[i] for i in rows]
            most = max_new_tokens if limit is None else min(max_new_tokens, limit - max(len(prompts[i]) for i in rows))
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=most,
                pad_token_id=pad,
                eos_token_id=ends,
                streamer=streamer,
                synced_gpus=together,
                **settings,
            )
            return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

        batches = microbatches(by_length, batch_size)
        advice = "Lower the number of new tokens, or shorten the prompt."
        each = (
            ((rows, answer(rows)) for rows in batches)  # the ranks walk through the layers together
            if together
            else each_in_halves(batches, answer, device, "prompts", advice)
        )
        for rows, texts in each:
            answers.update(zip(rows, texts, strict=True))
            if progress is not None:
                progress(len(answers))
    return [answers[i] for i in range(len(prompts))]


CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What `generate` and a forward pass call a given cache: transformers renames it in 5.x and warns of the old name."""

_WORTH_TOKENS = 16
"""A shorter common prefix is not computed apart: that takes a forward pass of its own."""


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of numbers as int64 [rows, longest], filled up with ``value`` on the left."""
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all of at least two prompts begin with, each keeping one after them; 0 for a few tokens."""
    if len(prompts) < 2:
        return 0
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    shared = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
    return shared if shared >= _WORTH_TOKENS else 0


def _prefix_cache(model: nn.Module, prefix: Sequence[int], device: torch.device) -> DynamicCache:
    """The KV cache of one row after ``prefix``, to be repeated for every batch."""
    cache = DynamicCache(config=causal_model(model).config)
    ids = torch.as_tensor([list(prefix)], dtype=torch.long, device=device)
    decoder_of(causal_model(model))(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id}
    ends.update(configured if isinstance(configured, list) else [configured])
    return sorted(e for e in ends if e is not None)


@dataclass(frozen=True)
class PromptWriter:
    """A chat template with the encoder of its tokenizer.

    Attributes:
        system: the system prompt of the recipe; None where it has none.
    """

    template: ChatTemplate
    encoder: Encoder
    system: str | None = None

    @classmethod
    def of(cls, opened: OpenRun) -> PromptWriter:
        """With the chat template that a run was trained with; run.json resolves ``auto``.

        Raises:
            InputError: the template does not go with the tokenizer.
        """
        recipe = opened.target.recipe
        name = template_of(recipe, opened.target.run) if recipe is not None else "auto"
        template = resolve_template(name, opened.base.tokenizer)
        return cls(template, Encoder(opened.base.tokenizer), recipe.data.system if recipe is not None else None)

    def ids(self, turns: list[Turn], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        Raises:
            InputError: the template refuses the turns.
        """
        text, starts = self.template.prompt(turns, tools)
        return self.encoder.encode_prompt(text, starts)
