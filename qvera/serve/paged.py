"""Paged attention: many requests run as one sequence [1, tokens], with keys and values in blocks.

It uses transformers' public interfaces only: an attention function and a mask function, registered under our own name,
and arguments that a model hands on to its attention. Each layer gets the *rule* of its mask (causal, within a window,
within a chunk) and applies it to the positions of each request. A query meets keys and values of its own request only,
so a request whose numbers are not finite spoils no other.

Models of untested types are tried before the first request: `PagedBatches._require_same_logits`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from qvera.serve.blocks import BLOCK_TOKENS, Blocks, CachedTokens, T
from qvera.utils import accelerator, memory
from qvera.utils.errors import RunFailed, first_line
from qvera.utils.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvera.serve.requests import EngineSettings

PAGED = "qvera_paged"  # the name of the attention
Rule = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers' mask function: batch, head, positions of queries and keys → which keys a query may see."""
_KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # each has a test, so it needs no trial
_TOLERANCES = {4: 1e-3, 2: 0.05}
"""Bytes per key → allowed difference of logits from those of an ordinary pass, relative to their norm."""


class _Layer(NamedTuple):
    """A layer's cache: keys and values [blocks, BLOCK_TOKENS, kv heads, size]."""

    keys: torch.Tensor
    values: torch.Tensor


class _Group(NamedTuple):
    """Requests that attend together: with equal numbers of queries, and about equal numbers of blocks."""

    table: torch.Tensor
    """int64 [requests, blocks]. Shorter rows are filled up with their own first block, which no query may see there."""
    positions: torch.Tensor  # int64 [requests, queries]


@dataclass
class _Step:
    """What all layers' attention needs to know of a step."""

    layers: dict[int, _Layer]
    write: torch.Tensor
    """int64 [tokens]: where keys and values go, as block · BLOCK_TOKENS + place."""
    groups: list[_Group]
    masks: dict[tuple[int, Rule, int], torch.Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, scale: float | None,
        softcap: float | None, sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of the step's tokens in one layer; returns [tokens, heads, size of v].

        Args:
            q: [tokens, heads, size]; k and v: [tokens, kv heads, size].
            softcap: scores become softcap · tanh(score / softcap).
            sinks: [heads], scores of an extra key without a value.
        """
        keys, values = self.layers[layer]
        keys.flatten(0, 1).index_copy_(0, self.write, k)
        values.flatten(0, 1).index_copy_(0, self.write, v)
        kv_heads, shared = k.shape[1], q.shape[1] // k.shape[1]
        outputs, begin = [], 0
        for number, (table, positions) in enumerate(self.groups):
            rows, queries = positions.shape
            # heads that share keys stand beside each other, as more queries of one head
            query = q[begin : begin + rows * queries].reshape(rows, queries, kv_heads, shared, -1)
            query = query.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, shared * queries, -1)
            key, value = (
                x.flatten(1).index_select(0, table.flatten()).view(rows, -1, *x.shape[2:]).transpose(1, 2)
                for x in (keys, values)
            )
            mask = self._mask(number, rule, shared, q.dtype)
            if softcap is None and sinks is None:
                out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
            else:
                scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
                if softcap is not None:
                    scores = (scores / softcap).tanh() * softcap
                scores = scores + mask
                if sinks is not None:
                    sink = sinks.float().view(1, kv_heads, shared, 1).expand(rows, -1, -1, queries)
                    scores = torch.cat([scores, sink.reshape(rows, kv_heads, -1, 1)], -1)
                out = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value
            out = out.view(rows, kv_heads, shared, queries, -1).permute(0, 3, 1, 2, 4)
            outputs.append(out.reshape(rows * queries, q.shape[1], -1))
            begin += rows * queries
        return torch.cat(outputs)

    def _mask(self, number: int, rule: Rule, shared: int, dtype: torch.dtype) -> torch.Tensor:
        """What is added to a group's scores, [requests, 1, shared · queries, keys]. Most layers share it."""
        if (found := self.masks.get((number, rule, shared))) is not None:
            return found
        table, positions = self.groups[number]
        of_queries = positions.unsqueeze(2)
        of_keys = torch.arange(table.shape[1] * BLOCK_TOKENS, device=table.device).view(1, 1, -1)
        seen = rule(0, 0, of_queries, of_keys) & (of_keys <= of_queries)
        mask = torch.zeros(seen.shape, dtype=dtype, device=table.device).masked_fill_(~seen, float("-inf"))
        mask = mask.unsqueeze(1).expand(-1, shared, -1, -1).reshape(len(table), 1, -1, mask.shape[2])
        self.masks[number, rule, shared] = mask
        return mask


class _Shapes(dict[int, tuple[torch.Size, torch.Size, torch.dtype]]):
    """Stands in for a step, to learn each layer's kv heads and size of keys and values, and their dtype."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
        self[layer] = k.shape[1:], v.shape[1:], k.dtype
        return q.new_zeros(*q.shape[:2], v.shape[2])


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    paged_step: _Step | _Shapes | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: [1, heads, tokens, size] → [1, tokens, heads, size]."""
    if paged_step is None or not callable(attention_mask) or position_bias is not None:
        raise RuntimeError("its layers do not pass on what paged attention needs")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = paged_step.attend(module.layer_idx, q, k, v, attention_mask, scaling, softcap, s_aux)
    return out.unsqueeze(0), None


def _rule(*_: object, mask_function: Rule, **__: object) -> Rule:
    """transformers' mask function; it gives the rule in place of a mask."""
    return mask_function


AttentionInterface.register(PAGED, _attention)
AttentionMaskInterface.register(PAGED, _rule)


class PagedBatches:
    """Batches that requests join and leave at any step. For one thread."""

    def __init__(self, model: PreTrainedModel, settings: EngineSettings) -> None:
        """Make the cache, and switch the model's attention until `close`.

        Raises RunFailed if the model can't run from blocks, or memory is short.
        """
        self._model, self._step_tokens = model, settings.step_tokens
        self._attention = model.config._attn_implementation
        self._layers: dict[int, _Layer] = {}
        try:
            with torch.no_grad():
                is_known = model.config.model_type in _KNOWN_TYPES
                expected = [] if is_known else _ordinary_logits(model)
                model.set_attn_implementation(PAGED)
                shapes = _Shapes()
                self._forward([0], [0], [0], shapes)
                if model.config._attn_implementation != PAGED or not shapes:
                    raise RuntimeError("its attention is not made for other implementations")
                count = max(1, _cache_tokens(model, settings, shapes) // BLOCK_TOKENS)
                for layer, (key, value, dtype) in shapes.items():
                    empty = functools.partial(torch.zeros, dtype=dtype, device=model.device)
                    self._layers[layer] = _Layer(empty(count, BLOCK_TOKENS, *key), empty(count, BLOCK_TOKENS, *value))
                self._blocks = Blocks(count, settings.share_prefixes)
                if not is_known:
                    self._require_same_logits(expected)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, MemoryError) as error:
            self.close()
            if is_out_of_memory(error):
                raise RunFailed(
                    f"the cache of keys and values does not fit into memory ({first_line(error)}) Lower "
                    "--cache-tokens or --running."
                ) from None
            raise RunFailed(
                f"continuous batching can't run {type(model).__name__} ({type(error).__name__}: {first_line(error)}) "
                "Use the static engine (--engine static)."
            ) from None

    @property
    def longest_tokens(self) -> int:
        """The most tokens that one request may have in all."""
        most = int(self._model.config.get_text_config().max_position_embeddings)
        return min(self._blocks.count * BLOCK_TOKENS, most)

    def may_begin(self) -> bool:
        """Requests may always join."""
        return True

    def schedule(self, running: Collection[T]) -> list[tuple[T, int]]:
        """The next step: requests and their numbers of tokens, in the order of the batch."""
        batch = self._blocks.schedule(running, self._step_tokens)
        return sorted(batch, key=lambda share: (share[1], len(share[0].blocks)))  # like ones beside each other

    def run(self, batch: Sequence[tuple[T, int]]) -> tuple[list[T], torch.Tensor]:
        """Run a step. Returns the requests that get a token now, and their logits [requests, vocabulary]."""
        positions = [np.arange(request.computed, request.computed + count) for request, count in batch]
        blocks = [
            np.array(request.blocks)[of // BLOCK_TOKENS] for (request, _), of in zip(batch, positions, strict=True)
        ]
        drawing = [i for i, (request, count) in enumerate(batch) if request.computed + count == len(request.tokens)]
        fresh = self._blocks.take_fresh()
        arrays = {
            "ids": np.concatenate([request.tokens[request.computed :][:count] for request, count in batch]),
            "positions": np.concatenate(positions),
            "write": np.concatenate(blocks) * BLOCK_TOKENS + np.concatenate(positions) % BLOCK_TOKENS,
            "kept": np.cumsum([count for _, count in batch])[drawing or [-1]] - 1,
            "fresh": np.array(fresh, dtype=np.int64),
        }
        groups = _groups(batch)
        for number, group in enumerate(groups):
            longest = max(len(request.blocks) for request, _ in group)
            rows = [request.blocks + request.blocks[:1] * (longest - len(request.blocks)) for request, _ in group]
            arrays[f"table {number}"] = np.array(rows)
        sent = accelerator.tensors_on(self._model.device, arrays)
        if fresh:
            # a masked key or value that is not finite would still make the output nan
            for tensor in itertools.chain.from_iterable(self._layers.values()):
                tensor.index_fill_(0, sent["fresh"], 0)
        parts = sent["positions"].split([sum(count for _, count in group) for group in groups])
        tables = (sent[f"table {number}"] for number in range(len(groups)))
        step = _Step(
            self._layers, sent["write"], [_Group(t, p.view(len(t), -1)) for t, p in zip(tables, parts, strict=True)]
        )
        logits = self._forward(sent["ids"], sent["positions"], sent["kept"], step)
        for request, count in batch:
            self._blocks.note_computed(request, count)
        return [batch[i][0] for i in drawing], logits[: len(drawing)]

    def _forward(self, ids: Any, positions: Any, kept: Any, step: _Step | _Shapes) -> torch.Tensor:
        ids, positions, kept = (torch.as_tensor(x, device=self._model.device) for x in (ids, positions, kept))
        logits: torch.Tensor = self._model(
            input_ids=ids.unsqueeze(0),
            # without a mask transformers would look for rows in the positions
            attention_mask=torch.ones_like(ids).unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            logits_to_keep=kept,
            use_cache=False,
            paged_step=step,
        ).logits
        return logits[0]

    def end(self, request: CachedTokens) -> None:
        """Free a request's blocks."""
        self._blocks.release(request)

    def reset(self) -> None:
        """Forget all requests, keys and values."""
        self._blocks.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Give the model its own attention within the block."""
        self._model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            self._model.set_attn_implementation(PAGED)

    def close(self) -> None:
        """Give the model its own attention back."""
        self._model.set_attn_implementation(self._attention)

    def _require_same_logits(self, expected: Sequence[torch.Tensor]) -> None:
        """Run the prompts of `_ordinary_logits` from blocks, the second one beside the first, and compare."""
        *prompts, answer = _tried_tokens(self._model)
        requests = [CachedTokens(prompt) for prompt in prompts]
        running, found = requests[:1], [list[torch.Tensor]() for _ in requests]
        while running:
            drawing, logits = self.run(self.schedule(running))
            for request, row in zip(drawing, logits, strict=True):
                found[requests.index(request)].append(row.float().clone())
                request.tokens += answer
            running = [request for i, request in enumerate(requests) if len(found[i]) < 2]
            for request in drawing:
                if request not in running:
                    self.end(request)
        self.reset()
        for rows, wanted in zip(found, expected, strict=True):
            error = ((torch.stack(rows) - wanted).norm() / wanted.norm()).item()
            if not error < _TOLERANCES[min(4, next(iter(self._layers.values())).keys.itemsize)]:
                raise RuntimeError(f"its logits differ by {error:.1g} of their norm")


def _groups(batch: Sequence[tuple[T, int]]) -> list[list[tuple[T, int]]]:
    """Neighbours that attend together: equal numbers of tokens, and at most twice the first one's blocks."""
    groups: list[list[tuple[T, int]]] = []
    for request, count in batch:
        if groups and groups[-1][0][1] == count and len(request.blocks) <= 2 * len(groups[-1][0][0].blocks):
            groups[-1].append((request, count))
        else:
            groups.append([(request, count)])
    return groups


def _cache_tokens(model: PreTrainedModel, settings: EngineSettings, shapes: _Shapes) -> int:
    """As set, or what fits into an eighth of the free memory (half, if the device has its own).

    At most what all running requests can fill.
    """
    if settings.cache_tokens is not None:
        return settings.cache_tokens
    token_bytes = [(key.numel() + value.numel()) * dtype.itemsize for key, value, dtype in shapes.values()]
    share = 2 if accelerator.has_own_memory(model.device) else 8
    # a layer gathers the keys and values of all requests, and attention may copy them once more
    fits = memory.available_bytes(model.device) // share // (sum(token_bytes) + 2 * max(token_bytes))
    return max(BLOCK_TOKENS, min(fits, settings.max_running * model.config.get_text_config().max_position_embeddings))


def _tried_tokens(model: PreTrainedModel) -> tuple[list[int], list[int], list[int]]:
    """Two prompts and an answer. First ids are often unused tokens, whose logits may be pure rounding error."""
    size = model.config.get_text_config().vocab_size
    return [size // 7, size // 5, size // 3], [size // 4, size // 2], [size // 6]


def _ordinary_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits [2, vocabulary] of each prompt's last two places, by the model's ordinary pass."""
    *prompts, answer = _tried_tokens(model)
    ids = (torch.tensor([[*prompt, *answer]], device=model.device) for prompt in prompts)
    return [model(input_ids=each, use_cache=False).logits[0, -2:].float() for each in ids]
