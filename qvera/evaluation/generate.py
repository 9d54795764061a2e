"""Generate answers to prompts in batches, greedy or sampled, at the speed of stock 4-bit generation."""

import contextlib
import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qvera.adapters import AdaptedForward
from qvera.data import ChatTemplate, Encoder, Turn, microbatches, resolve_template
from qvera.data.images import StoredImage
from qvera.data.tokenization import turn_ends
from qvera.distributed.zero import any_sharded, is_sharded
from qvera.evaluation.load import OpenRun, template_name
from qvera.models import linear, quantization
from qvera.models.attention import needs_equal_lengths, rows_joined
from qvera.models.forward import image_inputs
from qvera.models.structure import causal_model, context_limit, decoder_of, position_limit, rope_limit
from qvera.utils import accelerator, memory
from qvera.utils.errors import InputError
from qvera.utils.memory import each_in_halves


@contextlib.contextmanager
def generating(model: nn.Module, base_only: bool = False, fixed: bool = False) -> Iterator[None]:
    """Inside the block: evaluation mode, the KV cache on, linears in their fastest layout for answers.

    A checkpoint's settings for answers, such as a repetition penalty, do not count there: only its end tokens do.

    Where memory allows, adapted layers hold W + ΔW in the compute dtype; on a CPU, others have the layout of
    bitsandbytes' fused kernel. Afterwards all is as before, to the bit. Blocks may be nested. ``base_only``: layers
    hold W alone, for batches whose rows use different adapters. ``fixed``: a linear that is adapted within the block
    computes its base as before. So all 4-bit linears hold W, adapted or not, if it fits.
    """
    inner = causal_model(model)
    was_training, used_cache = model.training, getattr(inner.config, "use_cache", None)  # an encoder may have none
    layers = [m for m in model.modules() if isinstance(m, AdaptedForward) and not m.disable_adapters]
    layers = [m for m in layers if not is_sharded(m.base_layer.weight)]
    frozen = [m for m in model.modules() if fixed and isinstance(m, linear.FrozenLinear4bit)]
    # In a nested block, the outer one already holds W + ΔW and will drop it.
    if fixed or any(layer.holds_inference_weight for layer in layers) or not _dense_fits(layers):
        layers = []
    model.eval()
    inner.config.use_cache = True
    own = getattr(inner, "generation_config", None)  # a classifier may have none
    if own is not None:  # `generate` fills what it is not given from here
        inner.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        with torch.no_grad():
            for layer in layers:
                layer.cache_merged_weight(True, base_only)
            dense = frozen if _dense_fits(frozen) else []
            with linear.inference_layout(model, [layer.base_layer for layer in layers], dense):
                yield
    finally:
        for layer in layers:
            layer.cache_merged_weight(False)
        if own is not None:
            inner.generation_config = own
        if used_cache is None:
            del inner.config.use_cache
        else:
            inner.config.use_cache = used_cache
        model.train(was_training)


def _dense_fits(layers: list[Any]) -> bool:
    """Whether dense copies of these weights fit in a quarter of a CPU's free memory, or half of an accelerator's.

    A layer and token then takes 16 kernels instead of 41 on an accelerator (tests/gpu/test_decoding.py).
    """
    if not layers:
        return False
    linears = [getattr(layer, "base_layer", layer) for layer in layers]
    device = linears[0].weight.device
    if on_accelerator := accelerator.is_accelerator(device):
        # training needs the memory for its steps, and a streamed base has none to spare
        trains = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
        if trains or any(map(quantization.is_streamed, linears)):
            return False
    size_bytes = sum(layer.in_features * layer.out_features * layer.held_dtype().itemsize for layer in layers)
    return size_bytes <= memory.available_bytes(device) // (2 if on_accelerator else 4)


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    **settings: Any,
) -> list[str]:
    """Answer prompts as `generate_tokens` does, with the same arguments. Returns texts without special tokens."""
    return tokenizer.batch_decode(generate_tokens(model, tokenizer, prompts, **settings), skip_special_tokens=True)


def require_context(model: PreTrainedModel | PeftModel, prompts: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Raise InputError where the model's context holds no answer to a prompt. ``prompts``: a source and token ids."""
    limit = context_limit(model)
    for source, ids in prompts:
        if len(ids) >= limit:
            raise InputError(
                f"{source}: the prompt has {len(ids):,} tokens, and the model's context {limit:,}, the answer's "
                "included. Shorten the prompt."
            )


def generate_tokens(
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
    streamer: BaseStreamer | None = None,
    progress: Callable[[int], None] | None = None,
    on_answer: Callable[[int, list[int]], None] | None = None,
    images: Sequence[Sequence[StoredImage]] | None = None,
) -> list[list[int]]:
    """Complete each prompt, in batches of similar length, and return the answers alone, in the order of the prompts.

    An answer includes the token that ends it, if there is one.

    Where memory runs out, batches are halved. This changes sampled answers, and greedy ones only by rounding.

    Args:
        prompts: token ids, BOS included where the model wants one.
        max_new_tokens: answers also end at an end-of-turn token, and where the model's context does.
        temperature: 0 is greedy; else answers are sampled with ``top_p`` and ``seed``.
        adapters: which adapter answers each prompt (`qvera.adapters.shared_model`); ``__base__`` for none.
        streamer: for one prompt only.
        progress: called after each batch with the number of finished prompts.
        on_answer: called after each batch with the number of each of its prompts, from 0, and the answer.
        images: the images of each prompt, whose ids hold their places (`PromptWriter`).

    InputError: a setting is out of its range, or a prompt and its answer need more positions than the model has.
    RunFailed: memory ran out with a single prompt.
    ValueError: ``adapters`` does not have one name for each prompt.
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
    context, unchanged = context_limit(model), rope_limit(causal_model(model).config)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer)
    # Under ZeRO-3 a rank whose answers have ended goes on, because the others still need its shards.
    together = any_sharded(model)
    answers: dict[int, list[int]] = {}
    # Prompts of similar length are padded least.
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    # sampling must not move the training run's random state
    forked = accelerator.forked_random_state()
    with generating(model, base_only=adapters is not None), forked:
        torch.manual_seed(seed)
        joins = streamer is None and adapters is None
        joins = joins and max(map(len, prompts), default=0) + max_new_tokens <= unchanged
        # Of the models whose rows may be joined none reads images, so a common prefix holds none.
        joins = joins and rows_joined(model, prefix_once=True, packing=False) is not None
        prefix, cache = _common_prefix(prompts) if joins else 0, None
        # What all prompts share is computed once; each batch starts from a copy of its keys and values.
        if prefix:
            cache = DynamicCache(config=causal_model(model).config)
            shared_ids = torch.tensor([prompts[0][:prefix]], device=device)
            decoder_of(causal_model(model))(input_ids=shared_ids, use_cache=True, **{CACHE_ARGUMENT: cache})

        def answer(rows: list[int]) -> list[list[int]]:
            # padded on the left, so that every answer starts in the same column, and behind what all prompts share
            ids = padded([prompts[i][prefix:] for i in rows], pad)
            mask = padded([[1] * (len(prompts[i]) - prefix) for i in rows], 0)
            settings = dict(sampling)
            if cache is not None:
                shared = torch.tensor([prompts[0][:prefix]]).expand(len(rows), -1)
                ids, mask = torch.cat([shared, ids], 1), torch.cat([torch.ones_like(shared), mask], 1)
                settings[CACHE_ARGUMENT] = copy.deepcopy(cache)
                settings[CACHE_ARGUMENT].batch_repeat_interleave(len(rows))
            if adapters is not None:
                settings["adapter_names"] = [adapters[i] for i in rows]
            if images is not None:
                shown = [image for i in rows for image in images[i]]
                settings |= image_inputs(model, [prompts[i] for i in rows], shown, ids.shape[1], left=True)
            # training may have prompts beyond the context, where the model computes its positions
            left = context - max(len(prompts[i]) for i in rows)
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=min(max_new_tokens, left) if left > 0 else max_new_tokens,
                pad_token_id=pad,
                eos_token_id=ends,
                streamer=streamer,
                synced_gpus=together,
                **settings,
            )
            return [_ended(row, ends) for row in out[:, ids.shape[1] :].tolist()]

        # Models whose tokens would see the padding get batches of equal lengths.
        is_unpadded = needs_equal_lengths(causal_model(model))

        def group(i: int) -> tuple[bool, int]:
            # So do prompts whose answers the context cuts: none is cut for a longer prompt beside it. And those whose
            # answers change the rotary embeddings, where transformers computes a batch anew; longer ones stay among
            # themselves. Not under ZeRO-3, where all ranks need as many batches.
            length = len(prompts[i])
            is_long = length > unchanged
            is_cut = length + max_new_tokens > (context if is_long else min(context, unchanged))
            return is_long and not together, length if is_unpadded or (is_cut and not together) else 0

        groups = itertools.groupby(by_length, group)
        batches = (batch for _, rows in groups for batch in microbatches(list(rows), batch_size))
        advice = "Lower the number of new tokens, or shorten the prompt."
        for rows, found in each_in_halves(batches, answer, device, "prompts", advice, together):
            for i, tokens in zip(rows, found, strict=True):
                answers[i] = tokens
                if on_answer is not None:
                    on_answer(i, tokens)
            if progress is not None:
                progress(len(answers))
    return [answers[i] for i in range(len(prompts))]


CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""The name of the argument that takes a KV cache. transformers 5.x renames it, and warns of the old name."""


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Cut off the padding behind the end of an answer."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


_WORTH_TOKENS = 16  # a shorter common prefix is not computed separately, because that takes a forward pass of its own


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """The rows as int64 [rows, longest], padded with ``value`` on the left."""
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix, which leaves a token of each prompt; 0 if it is too short to help."""
    if len(prompts) < 2:
        return 0
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    shared = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
    return shared if shared >= _WORTH_TOKENS else 0


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end an answer: the tokenizer's, those of the generation config, and chat templates' ends of turn.

    So answers end as in training, where the template's end of turn is trained.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return sorted((ends | turn_ends(tokenizer)) - {None})


@dataclass(frozen=True)
class PromptWriter:
    """Turns conversations into token ids; ``system`` is the recipe's system prompt."""

    template: ChatTemplate
    encoder: Encoder
    system: str | None = None

    @classmethod
    def of(cls, opened: OpenRun) -> Self:
        """Make a writer with the chat template of a run. InputError: it does not go with the tokenizer."""
        recipe = opened.target.recipe
        name = template_name(recipe, opened.target.run) if recipe is not None else "auto"
        template = resolve_template(name, opened.base.tokenizer)
        return cls(template, Encoder(opened.base.tokenizer), recipe.data.system if recipe is not None else None)

    def ids(self, turns: list[Turn], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Return the token ids up to where the assistant's answer begins, with those of images.

        InputError: the template refuses the turns, or an image can't be read.
        """
        text, starts = self.template.prompt(turns, tools)
        return self.encoder.encode_prompt(text, starts, self.images(turns))

    def images(self, turns: list[Turn]) -> tuple[StoredImage, ...]:
        """The images of the turns. InputError: the base takes none."""
        return self.encoder.images_in(turns, "the prompt")
