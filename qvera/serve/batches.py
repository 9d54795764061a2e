"""Batches of requests: continuous ones, whose keys and values stand in blocks of one cache, and static ones.

To `PagedBatches`, requests come and go at any step. `Blocks` says which block holds which tokens and what each step
computes. The tokens of a step run as one sequence [1, tokens] by transformers' public interfaces only: an attention
function and a mask function, registered under our own name, and arguments that a model hands on to its attention. Each
layer gets the *rule* of its mask (causal, within a window, within a chunk) and applies it to the positions of each
request. A query meets keys and values of its own request only, so a request whose numbers are not finite spoils no
other. Where torch has a kernel for it, attention takes the blocks as they are, and a step that gives each of its
requests a token is a graph (`qvera.serve.paged`).

Models of untested types are tried before the first request: `PagedBatches._require_same_logits`. `StaticBatches`, with
the same methods, are for those that can't run so.
"""

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from qvera.evaluation.generate import CACHE_ARGUMENT, padded
from qvera.models.attention import needs_equal_lengths
from qvera.models.forward import image_inputs
from qvera.models.loss import Head
from qvera.models.quantization import is_streamed
from qvera.models.structure import causal_model, decoder_of, engine_limit, image_model
from qvera.serve.blocks import BLOCK_TOKENS, Blocks, CachedTokens, T
from qvera.serve.invariance import PASS_TOKENS_ON_CARD, PASS_TOKENS_ON_CPU, computes_rows_alike, why_refused
from qvera.serve.paged import BlockTables, LayerShape, PagedKernel, StepGraphs, arrays_of, choose_kernel, power_of_two
from qvera.serve.requests import EngineSettings
from qvera.serve.slots import AdaptersInUse
from qvera.utils import accelerator, memory
from qvera.utils.errors import RunFailed, first_line
from qvera.utils.memory import is_out_of_memory

PAGED = "qvera_paged"  # the name of the attention
Rule = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers' mask function: batch, head, positions of queries and keys → which keys a query may see."""
_KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # each has a test, so it needs no trial
_TOLERANCES = {4: 1e-3, 2: 0.05}  # bytes per key → largest error of logits, relative to the norm of an ordinary pass's


@dataclass
class _Step:
    """The facts of one step that the attention of every layer reads."""

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]  # keys and values [blocks, tokens of a block, kv heads, size]
    write: torch.Tensor  # int64 [tokens]: where keys and values go, as block · tokens of a block + place

    def put(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the step's keys and values into the layer's blocks, and return these."""
        keys, values = self.layers[layer]
        keys.flatten(0, 1).index_copy_(0, self.write, k)
        values.flatten(0, 1).index_copy_(0, self.write, v)
        return keys, values


@dataclass
class KernelStep(_Step):
    """A step whose attention takes the blocks as they are."""

    kernel: PagedKernel
    rows: BlockTables

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, scale: float | None, *_: object
    ) -> torch.Tensor:
        """Do as `GatheringStep.attend`, in causal order. `choose_kernel` refuses layers with more needs."""
        return self.kernel.attend(q, *self.put(layer, k, v), self.rows, scale)


@dataclass
class GatheringStep(_Step):
    """A step whose attention copies the keys and values of its requests, and makes masks."""

    groups: list[tuple[torch.Tensor, torch.Tensor]]
    """Blocks, int64 [requests, blocks], and positions, int64 [requests, queries], of requests with equal numbers of
    queries and about equal numbers of blocks. Shorter rows of blocks are filled up with their own first one, which no
    query may see there."""
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
        keys, values = self.put(layer, k, v)
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
            if softcap is None and sinks is None:  # sdpa knows neither
                out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
            else:
                scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
                if softcap is not None:
                    scores = (scores / softcap).tanh() * softcap
                scores = scores + mask
                if sinks is not None:
                    sink = sinks.float().view(1, kv_heads, shared, 1).expand(rows, -1, -1, queries)
                    scores = torch.cat([scores, sink.reshape(rows, kv_heads, -1, 1)], -1)
                out = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value  # the sink has no value
            out = out.view(rows, kv_heads, shared, queries, -1).permute(0, 3, 1, 2, 4)
            outputs.append(out.reshape(rows * queries, q.shape[1], -1))
            begin += rows * queries
        if begin < len(q):  # tokens that fill a pass up
            outputs.append(v.new_zeros(len(q) - begin, q.shape[1], v.shape[2]))
        return torch.cat(outputs)

    def _mask(self, number: int, rule: Rule, shared: int, dtype: torch.dtype) -> torch.Tensor:
        """The mask to add to a group's scores, [requests, 1, shared · queries, keys]. Layers of one rule share it."""
        if (number, rule, shared) not in self.masks:
            table, positions = self.groups[number]
            of_queries = positions.unsqueeze(2)
            tokens = table.shape[1] * next(iter(self.layers.values()))[0].shape[1]
            of_keys = torch.arange(tokens, device=table.device).view(1, 1, -1)
            seen = rule(0, 0, of_queries, of_keys) & (of_keys <= of_queries)  # not the blocks that fill a row up
            mask = torch.zeros(seen.shape, dtype=dtype, device=table.device).masked_fill_(~seen, float("-inf"))
            mask = mask.unsqueeze(1).expand(-1, shared, -1, -1).reshape(len(table), 1, -1, mask.shape[2])
            self.masks[number, rule, shared] = mask
        return self.masks[number, rule, shared]


class _Shapes(dict[int, LayerShape]):
    """Stands in for a step, to learn how each layer calls its attention."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, scale: float | None,
        softcap: float | None, sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        if layer in self:  # the second time would write over the first one's keys
            raise RuntimeError("it runs a layer more than once for a token")
        needs = {"soft caps": softcap is not None, "sinks": sinks is not None}
        needs["windows in blocks, or other masks than causal ones"] = rule is not causal_mask_function
        refused = next((name for name, is_needed in needs.items() if is_needed), None)
        self[layer] = LayerShape(q.shape[1], k.shape[1:], v.shape[1:], k.dtype, refused)
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
    paged_step: KernelStep | GatheringStep | _Shapes | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: [1, heads, tokens, size] → [1, tokens, heads, size]."""
    if paged_step is None or not callable(attention_mask) or position_bias is not None:
        raise RuntimeError("its layers do not pass on what paged attention needs")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = paged_step.attend(module.layer_idx, q, k, v, attention_mask, scaling, softcap, s_aux)
    return out.unsqueeze(0), None


AttentionInterface.register(PAGED, _attention)
# in place of a mask, layers get its rule
AttentionMaskInterface.register(PAGED, lambda *_, mask_function, **__: mask_function)


@dataclass
class StepOutput:
    """The results of one step of the model."""

    drawing: list[Any]  # requests that get a token now
    logits: torch.Tensor  # [drawing, vocabulary], to draw these tokens from
    scored: list[Any]  # the request of each place that is to be scored
    hidden: torch.Tensor | None  # [scored, hidden], last hidden states there


class PagedBatches:
    """Batches that requests join and leave at any step. For one thread."""

    by_rows = False

    def __init__(self, model: PreTrainedModel, settings: EngineSettings) -> None:
        """Make the cache, and switch the model's attention until `close`.

        Raises RunFailed if the model can't run from blocks, or memory is short.
        """
        self._model, self._step_tokens = model, settings.step_tokens
        self._attention = model.config._attn_implementation
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._kernel: PagedKernel | None = None
        self._graphs: StepGraphs | None = None
        self.pass_tokens = 0  # of each pass; 0: as many as come
        if settings.batch_invariant and (why := why_refused(model)) is not None:
            raise RunFailed(f"--batch-invariant can't be kept by {type(model).__name__}: {why}.")
        config = model.config.get_text_config()
        self.longest_tokens = engine_limit(model)
        try:
            with torch.no_grad():
                is_known = model.config.model_type in _KNOWN_TYPES
                # the first ids are often unused tokens, whose logits may be pure rounding error
                *prompts, [answer] = [[config.vocab_size // n for n in ns] for ns in ((7, 5, 3), (4, 2), (6,))]
                expected = [] if is_known else [self._ordinary_logits([*prompt, answer]) for prompt in prompts]
                model.set_attn_implementation(PAGED)  # `expected` had to be computed before
                shapes, zero = _Shapes(), torch.zeros(1, dtype=torch.long, device=model.device)
                self._forward(zero, zero, zero, shapes)  # one token, which shows how each layer calls its attention
                if model.config._attn_implementation != PAGED or not shapes:
                    raise RuntimeError("its attention is not made for other implementations")
                self._kernel = choose_kernel(model.device, shapes.values())
                block_tokens = BLOCK_TOKENS if self._kernel is None else self._kernel.block_tokens
                tokens = settings.cache_tokens
                if tokens is None:
                    token_bytes = [(of.key.numel() + of.value.numel()) * of.dtype.itemsize for of in shapes.values()]
                    share = 2 if accelerator.has_own_memory(model.device) else 8  # of the free memory
                    # without the kernel a layer gathers keys and values of all requests, and sdpa may copy them again
                    copied = 2 * max(token_bytes) if self._kernel is None else 0
                    fits = memory.available_bytes(model.device) // share // (sum(token_bytes) + copied)
                    tokens = min(fits, settings.max_running * self.longest_tokens)
                count = max(1, tokens // block_tokens)
                for layer, of in shapes.items():
                    keys, values = (  # and a block that no request has, where rows write that fill a graph up
                        torch.zeros(count + 1, block_tokens, *shape, dtype=of.dtype, device=model.device)
                        for shape in (of.key, of.value)
                    )
                    self._layers[layer] = keys, values
                self.longest_tokens = min(count * block_tokens, self.longest_tokens)  # the longest request fits
                self._blocks = Blocks(count, block_tokens)
                self._filler = CachedTokens([0])
                self._filler.blocks = [count]
                # a streamed weight is copied to the device at each use
                is_whole = not any(isinstance(m, torch.nn.Linear) and is_streamed(m) for m in model.modules())
                if self._kernel is not None and is_whole and accelerator.records_graphs(model.device):
                    self._graphs = StepGraphs(model.device, lambda sent: self._run(sent, 1)[0])
                if not is_known:
                    self._require_same_logits(prompts, answer, expected)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, MemoryError) as error:
            self.close()
            if is_out_of_memory(error):
                raise RunFailed(
                    f"the cache of keys and values does not fit into memory ({first_line(error)}) Lower "
                    "--cache-tokens or --running."
                ) from None
            way = "Use the static engine (--engine static)."
            if settings.batch_invariant:  # which the static engine has not
                way = "Leave out --batch-invariant."
            raise RunFailed(
                f"continuous batching can't run {type(model).__name__} ({type(error).__name__}: {first_line(error)}) "
                f"{way}"
            ) from None

    def may_begin(self) -> bool:
        """Requests may always join."""
        return True

    def schedule(self, running: Collection[T]) -> list[tuple[T, int]]:
        """The next step: requests and their numbers of tokens, in the order of the batch."""
        batch = self._blocks.schedule(running, self._step_tokens)
        return sorted(batch, key=lambda each: (each[1], len(each[0].blocks)))  # like ones beside each other

    def fix_pass_tokens(self) -> None:
        """Let each pass compute the same number of tokens from now on (`qvera.serve.invariance`).

        Call it in the layout of answers. Raises RunFailed if a token's logits depend on its place with every number.
        """
        linears = [module for module in self._model.modules() if isinstance(module, torch.nn.Linear)]
        widths = sorted({size for linear in linears for size in (linear.in_features, linear.out_features)})
        dtype, on_card = next(iter(self._layers.values()))[0].dtype, accelerator.is_accelerator(self._model.device)
        tokens = [self._model.config.get_text_config().vocab_size // n for n in (7, 5, 3)]
        for self.pass_tokens in PASS_TOKENS_ON_CARD if on_card else PASS_TOKENS_ON_CPU:
            is_alike = on_card or computes_rows_alike(self.pass_tokens, widths, dtype)
            if is_alike and all(map(self._is_same_in_all_places, tokens)):
                return
        raise RunFailed(
            f"--batch-invariant can't be kept here: with {torch.get_num_threads()} threads, the last bits of a token's "
            "logits depend on its place in a pass. Try another number of threads (OMP_NUM_THREADS)."
        )

    def _is_same_in_all_places(self, token: int) -> bool:
        """Whether a pass of the same token in all places gives the same logits everywhere, to the bit."""
        probes = [CachedTokens([token] * 2) for _ in range(self.pass_tokens)]
        for probe in probes:
            probe.blocks, probe.computed = self._filler.blocks, 1
        logits = self.run([(probe, 1) for probe in probes]).logits
        return bool((logits == logits[:1]).all())

    def passes(self, batch: list[tuple[T, int]]) -> list[list[tuple[T, int]]]:
        """Split a step into passes for `run`. Run them in order: a request may begin in one and go on in the next."""
        if not self.pass_tokens:
            return [batch]
        parts, room = list[list[tuple[T, int]]](), 0
        for request, count in batch:
            while count:
                if not room:
                    parts.append([])
                    room = self.pass_tokens
                parts[-1].append((request, taken := min(count, room)))
                count, room = count - taken, room - taken
        return parts

    def filled_tokens(self, batch: Sequence[tuple[T, int]]) -> int | None:
        """The number of tokens that a pass is filled up to; None: it is not filled up.

        Every pass is after `fix_pass_tokens`. Before, steps that can be a graph are filled up to a power of two.
        """
        if self.pass_tokens:
            return self.pass_tokens
        # each draws a token: one token of a longer prompt draws none, and a recording is of so many logits
        are_drawn = (count == 1 == len(one.tokens) - one.computed and not one.unscored for one, count in batch)
        return power_of_two(len(batch)) if self._graphs and all(are_drawn) else None

    def run(self, batch: Sequence[tuple[T, int]], adapters: AdaptersInUse | None = None) -> StepOutput:
        """Run one pass. ``adapters`` is what `ServingBank.use` returned: not None where there are `filled_tokens`."""
        filled: list[tuple[CachedTokens, int]] = list(batch)
        tokens = self.pass_tokens or (power_of_two(len(batch)) if adapters is not None else 0)
        filled += [(self._filler, 1)] * (tokens - sum(count for _, count in batch))
        size, counts = self._blocks.tokens, [count for _, count in filled]
        positions = [np.arange(request.computed, request.computed + count) for request, count in filled]
        blocks = [np.array(request.blocks)[of // size] for (request, _), of in zip(filled, positions, strict=True)]
        drawing = [i for i, (request, count) in enumerate(filled) if request.computed + count == len(request.tokens)]
        ends = np.cumsum(counts)
        scored = [(request, request.take_unscored(count)) for request, count in batch]
        # places to be scored, as indices of the tokens of this pass
        places = [
            end - count + np.array(asked) - request.computed
            for (request, asked), count, end in zip(scored, counts, ends, strict=False)
            if asked
        ]
        arrays = {
            "ids": np.concatenate([request.tokens[request.computed :][:count] for request, count in filled]),
            "positions": np.concatenate(positions),
            "write": np.concatenate(blocks) * size + np.concatenate(positions) % size,
            "kept": np.arange(self.pass_tokens) if self.pass_tokens else ends[drawing or [-1]] - 1,
        }
        if places:
            arrays["scored"] = np.concatenate(places)
        # blocks, keys and queries of those that attend by themselves: requests, or tokens
        attending = [(request.blocks, request.computed + count, count) for request, count in filled]
        width, groups = None, list[int]()
        if self.pass_tokens:  # one by one: with other company a prompt comes in other pieces
            owners = [request.blocks for request, count in filled for _ in range(count)]
            keys = [place + 1 for place in arrays["positions"].tolist()]
            attending = [(own[: -(-used // size)], used, 1) for own, used in zip(owners, keys, strict=True)]
            width = -(-self.longest_tokens // size)
        if self._kernel is not None:
            tables, used, queries = zip(*attending, strict=True)
            arrays |= arrays_of(tables, used, queries, size, self._blocks.count, width)
        else:
            groups = self._add_tables(
                arrays, attending[: sum(count for _, count in batch) if self.pass_tokens else None]
            )
        if fresh := self._blocks.take_fresh():
            # a masked key or value that is not finite would still make the output nan
            zeroed = accelerator.tensor_on(self._model.device, np.array(fresh))
            for tensor in itertools.chain.from_iterable(self._layers.values()):
                tensor.index_fill_(0, zeroed, 0)
        if adapters is not None and self._graphs is not None and not places:
            key = len(filled), arrays["table"].shape[1], adapters.key
            logits, hidden = self._graphs.logits(key, adapters.layers, arrays), None
        else:
            longest = 1 if self.pass_tokens else max(counts)
            logits, hidden = self._run(accelerator.tensors_on(self._model.device, arrays), longest, groups)
        for request, count in batch:
            self._blocks.note_computed(request, count)
        of_places = [request for request, asked in scored for _ in asked]
        drawing = [i for i in drawing if i < len(batch)]
        if self.pass_tokens:
            logits = torch.cat([logits[:0], *(logits[end - 1 : end] for end in ends[drawing])])
        return StepOutput([batch[i][0] for i in drawing], logits[: len(drawing)], of_places, hidden)

    def _add_tables(self, arrays: dict[str, np.ndarray], attending: Sequence[tuple[list[int], int, int]]) -> list[int]:
        """Add a table for each group that attends together to ``arrays``. Returns the number of tokens of each."""
        # neighbours attend together: equal numbers of tokens, and at most twice the first one's blocks
        groups: list[list[tuple[list[int], int]]] = []
        for blocks, _, count in attending:
            is_like = groups and groups[-1][0][1] == count and len(blocks) <= 2 * len(groups[-1][0][0])
            if is_like and not self.pass_tokens:  # else how many attend together depends on others
                groups[-1].append((blocks, count))
            else:
                groups.append([(blocks, count)])
        for number, group in enumerate(groups):
            longest = max(len(blocks) for blocks, _ in group)
            arrays[f"table {number}"] = np.array([own + own[:1] * (longest - len(own)) for own, _ in group])
        return [sum(count for _, count in group) for group in groups]

    def _run(
        self, sent: Mapping[str, torch.Tensor], longest: int, groups: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run `_forward` on a pass's tensors. ``longest``: the most queries that attend to one row of blocks."""
        step: KernelStep | GatheringStep
        if self._kernel is not None:
            rows = BlockTables(sent["table"], sent["used"], sent["ends"], sent["ends_k"], longest)
            step = KernelStep(self._layers, sent["write"], self._kernel, rows)
        else:
            tables = [sent[f"table {number}"] for number in range(len(groups))]
            parts = zip(tables, sent["positions"][: sum(groups)].split(list(groups)), strict=True)
            grouped = [(table, part.view(len(table), -1)) for table, part in parts]
            step = GatheringStep(self._layers, sent["write"], grouped)
        return self._forward(sent["ids"], sent["positions"], sent["kept"], step, sent.get("scored"))

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        kept: torch.Tensor,
        step: KernelStep | GatheringStep | _Shapes,
        scored: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits of the ``kept`` places, and last hidden states of the ``scored`` ones, if any."""
        inputs = {
            "input_ids": ids.unsqueeze(0),
            # without a mask transformers would look for rows in the positions
            "attention_mask": torch.ones_like(ids).unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
            "use_cache": False,
            "paged_step": step,
        }
        if scored is None and not self.pass_tokens:
            return self._model(**inputs, logits_to_keep=kept).logits[0], None
        hidden = decoder_of(self._model)(**inputs).last_hidden_state[0]
        head = Head.of(self._model)
        return head.logits(head.module(hidden[kept])), None if scored is None else hidden[scored]

    def end(self, request: CachedTokens) -> None:
        """Free a request's blocks."""
        self._blocks.release(request)

    def reset(self) -> None:
        """Forget all requests, keys and values."""
        self._blocks.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Give the model its own attention within the block."""
        self.close()
        try:
            yield
        finally:
            self._model.set_attn_implementation(PAGED)

    def close(self) -> None:
        """Give the model its own attention back."""
        self._model.set_attn_implementation(self._attention)

    def _ordinary_logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits [2, vocabulary] of the last two places, by the model's ordinary pass."""
        ids = torch.tensor([tokens], device=self._model.device)
        logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits[0, -2:].float()

    def _require_same_logits(self, prompts: list[list[int]], answer: int, expected: list[torch.Tensor]) -> None:
        """Run the prompts and the token after them from blocks, the second one beside the first, and compare."""
        requests = [CachedTokens(prompt) for prompt in prompts]
        running, found = requests[:1], [list[torch.Tensor]() for _ in requests]
        while running:
            output = self.run(self.schedule(running))
            for request, row in zip(output.drawing, output.logits, strict=True):
                found[requests.index(request)].append(row.float().clone())
                request.tokens.append(answer)
            running = [request for i, request in enumerate(requests) if len(found[i]) < 2]
            for request in output.drawing:
                if request not in running:
                    self.end(request)
        self.reset()
        for rows, wanted in zip(found, expected, strict=True):
            error = ((torch.stack(rows) - wanted).norm() / wanted.norm()).item()
            if not error < _TOLERANCES[min(4, next(iter(self._layers.values()))[0].itemsize)]:
                raise RuntimeError(f"its logits differ by {error:.1g} of their norm")


def _new_cache(config: PretrainedConfig) -> DynamicCache:
    if config.model_type != "minimax":
        return DynamicCache(config=config)
    from transformers.models.minimax.modeling_minimax import MiniMaxCache  # it takes no other

    return MiniMaxCache()


class StaticBatches:
    """Batches that begin and end together, by the model's ordinary pass and transformers' own cache. For one thread.

    Rows are padded on the left as in `qvera.evaluation.generate`. New requests wait for the end of the running batch.
    """

    by_rows = True
    """Whether each request is a row of the batch. A layer may then get fewer or more of its tokens than a step has."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        if not re.search("cache|past", str(inspect.signature(causal_model(model).forward))):
            raise RunFailed(
                f"qvera serve can't run {type(model).__name__}: it keeps nothing of earlier tokens. Use qvera generate."
            )
        self.longest_tokens = engine_limit(model)
        self._rows: list[Any] = []
        self._mask, self._has_images = torch.empty(0), False
        self._cache: DynamicCache | None = None

    def may_begin(self) -> bool:
        """Whether no batch runs."""
        return all(row.ended for row in self._rows)

    def schedule(self, running: Collection[T]) -> list[tuple[T, int]]:
        """All rows of the batch, ended ones too, each with the columns of the next step."""
        if self.may_begin():
            rows = list(running)
            if needs_equal_lengths(self._model):  # the others wait for the next batch
                rows = [row for row in rows if len(row.tokens) == len(rows[0].tokens)]
            self._rows, self._cache = rows, None
        width = 1 if self._cache is not None else max(len(row.tokens) for row in self._rows)
        return [(row, width) for row in self._rows]

    def passes(self, batch: list[tuple[T, int]]) -> list[list[tuple[T, int]]]:
        """A step is one pass."""
        return [batch]

    def filled_tokens(self, batch: Sequence[tuple[T, int]]) -> None:
        """No step is a graph: keys and values grow."""

    def run(self, batch: Sequence[tuple[T, int]], adapters: AdaptersInUse | None = None) -> StepOutput:
        """Run a step. All rows that have not ended get a token."""
        rows, device = [row for row, _ in batch], self._model.device
        config, begins, images = self._model.config.get_text_config(), self._cache is None, dict[str, torch.Tensor]()
        if begins:
            self._cache = _new_cache(config)
            ids = padded([row.tokens for row in rows], 0).to(device)
            self._mask = padded([[1] * len(row.tokens) for row in rows], 0).to(device)
            shown = [image for row in rows for image in row.images]
            images = image_inputs(self._model, [row.tokens for row in rows], shown, ids.shape[1], left=True)
            self._has_images = bool(images)
        else:
            ids = torch.tensor([row.tokens[-1:] for row in rows], device=device)
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], 1)
        positions: torch.Tensor | None = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        # Qwen's models give an image positions of three axes, and go on behind its largest one
        if self._has_images and hasattr(inner := image_model(self._model), "rope_deltas"):
            positions = None if images else positions + inner.rope_deltas
        # these have no attention: after the prompt they take any mask for one of the step's tokens alone
        is_masked = begins or config.model_type not in ("mamba", "falcon_mamba")
        inputs = {
            "input_ids": ids,
            "attention_mask": self._mask if is_masked else None,
            "position_ids": positions,
            **images,
            "use_cache": True,
            CACHE_ARGUMENT: self._cache,
        }
        places, hidden = [row.take_unscored(len(row.tokens)) for row in rows], None
        if any(places):
            states, head = decoder_of(self._model)(**inputs).last_hidden_state, Head.of(self._model)
            logits = head.logits(head.module(states[:, -1]))
            own = [of_row[-len(row.tokens) :] for row, of_row in zip(rows, states, strict=True)]  # without the padding
            hidden = torch.cat([of_row[asked.start : asked.stop] for of_row, asked in zip(own, places, strict=True)])
        else:
            logits = self._model(**inputs, logits_to_keep=1).logits[:, -1]
        scored = [row for row, asked in zip(rows, places, strict=True) for _ in asked]
        going = [i for i, row in enumerate(rows) if not row.ended]  # ended rows keep their place in the cache
        return StepOutput([rows[i] for i in going], logits[going], scored, hidden)

    def end(self, request: CachedTokens) -> None:
        """Let the row stay until the batch ends, and forget the batch then."""
        if self.may_begin():
            self.reset()

    def reset(self) -> None:
        """Forget the batch."""
        self._rows, self._cache = [], None

    def paused(self) -> contextlib.nullcontext[None]:
        """The model always has its own attention."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Do nothing: the model was not changed."""
