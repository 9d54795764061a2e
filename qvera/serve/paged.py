"""transformers' continuous batching, taken apart: its scheduler, paged cache and inputs, with our loop and our tokens.

``ContinuousBatchingManager`` of `PreTrainedModel.init_continuous_batching` is public, and would do most: queue, cancel,
schedule, page. Four things that a server of many adapters needs are not in it:

- tokens of a request's own random numbers, and the likeliest tokens with theirs: its runner draws all rows by one
  ``torch.multinomial``, and a logits processor may change logits but learns neither the request nor the token;
- prefixes shared within one adapter: blocks are known by a hash of tokens alone, so that with
  ``allow_block_sharing=True`` one adapter answers from the keys and values of another;
- an error that ends the requests of a step and not the thread, after which the manager takes nothing any more;
- adapters whose slots are free again at a known moment: between two steps.

So a manager is made, which resolves settings and attention, and is never started. Its parts are put together as its own
``_create_batch_processor`` does, with `_Cache` and `_Runner` for two of them, and `PagedModel.step` runs a step.
No code of transformers is patched. `missing_internals` names what it takes that is not public.

CUDA graphs, compiled steps and asynchronous batches are off: they need tokens drawn without asking the host.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers import DynamicCache, GenerationConfig

from qvera.evaluation.generate import CACHE_ARGUMENT
from qvera.models.attention import takes_open_mask
from qvera.models.structure import decoder_of
from qvera.serve.cache_size import PAGE_TOKENS, cache_tokens
from qvera.serve.check_paged_logits import ordinary_logits, require_same
from qvera.serve.requests import EngineSettings
from qvera.utils import accelerator
from qvera.utils.errors import RunFailed, first_line
from qvera.utils.out_of_memory import is_out_of_memory

try:
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor, OutputRouter
    from transformers.generation.continuous_batching.model_runner import ModelRunner
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
    from transformers.generation.continuous_batching.scheduler import FIFOScheduler

    _imported = True
except ImportError:
    _imported = False

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TESTED_VERSIONS = ("5.24",)
"""Of transformers, major and minor: those whose internals `missing_internals` was written for."""
_KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that need not be tried before the first request."""

_PARAMETERS = {
    "continuous_api.ContinuousBatchProcessor.__init__": (
        "cache config generation_config continuous_batching_config logit_processor input_queue cancel_queue "
        "output_router background_thread_status model_device model_dtype scheduler distributed_helper"
    ),
    "continuous_api.ContinuousBatchProcessor.prepare_next_batch": "",
    "continuous_api.ContinuousBatchProcessor.update_batch": "",
    "continuous_api.ContinuousBatchProcessor._generation_step": "model",
    "continuous_api.ContinuousBatchProcessor.reset": "",
    "continuous_api.ContinuousBatchingManager.add_request": (
        "input_ids request_id max_new_tokens streaming record_timestamps eos_token_id logit_processor_kwargs"
    ),
    "continuous_api.ContinuousBatchingManager.cancel_request": "request_id",
    "continuous_api.OutputRouter.deliver": "output",
    "continuous_api.OutputRouter.deliver_batch": "outputs",
    "cache.PagedAttentionCache.__init__": (
        "config continuous_batching_config device distributed_helper dtype model_supports_logits_to_keep"
    ),
    "cache.PagedAttentionCache.search_prefix_match": "request_id prompt_ids",
    "cache.PagedAttentionCache.mark_complete_blocks": "state complete_blocks",
    "cache.PagedAttentionCache.reset": "",
    "model_runner.ModelRunner.__init__": "logit_processor cb_config inputs_and_outputs cache do_sample return_logprobs",
    "model_runner.ModelRunner._sample": "scores output_ids",
    "scheduler.FIFOScheduler.__init__": "cache safety_margin max_requests_per_batch",
    "requests.RequestState.create_equivalent_initial_request": "",
}
"""What is called or overridden, in ``transformers.generation.continuous_batching``, with its parameters."""
_FIELDS = {
    "requests.RequestState": "request_id initial_tokens generated_tokens",
    "requests.FutureRequestState": "state has_new_token query_length",
    "requests.GenerationOutput": "request_id error",
    "continuous_api.ContinuousBatchingConfig": (
        "page_size num_blocks max_batch_tokens max_requests_per_batch max_blocks_per_request allow_block_sharing "
        "use_async_batching use_cuda_graph auto_switch_to_flash"
    ),
}
_ATTRIBUTES = {
    "continuous_api.ContinuousBatchingManager": (
        "continuous_batching_config logit_processor distributed_helper background_thread_status input_queue "
        "cancel_queue"
    ),
    "continuous_api.ContinuousBatchProcessor": "model_runner inputs_and_outputs scheduler",
    "input_outputs.ContinuousBatchingIOs": "requests_in_batch",
    "cache.PagedAttentionCache": "num_blocks max_batch_tokens cache_allocators",
}
"""What instances set in ``__init__``."""


def missing_internals() -> list[str]:
    """What this module takes from transformers and the installed one lacks, or has otherwise; empty if all is there."""
    root = "transformers.generation.continuous_batching"
    missing = []

    def look_up(path: str) -> Any:
        module, *names = path.split(".")
        found: Any = importlib.import_module(f"{root}.{module}")
        for name in names:
            found = getattr(found, name)
        return found

    for path, expected in _PARAMETERS.items():
        try:
            given = [name for name in inspect.signature(look_up(path)).parameters if name != "self"]
            if given != expected.split():
                missing.append(f"{path} takes {', '.join(given) or 'nothing'}, not {expected or 'nothing'}")
        except (ImportError, AttributeError):
            missing.append(path)
    for path, fields in {**_FIELDS, **_ATTRIBUTES}.items():
        try:
            text = inspect.getsource(look_up(path))
            missing += [f"{path}.{field}" for field in fields.split() if not re.search(rf"\b{field}\b", text)]
        except (ImportError, AttributeError):
            missing.append(path)
    return missing


class Scheduled(NamedTuple):
    """A request's share of the next step."""

    request_id: str
    tokens: int
    has_new_token: bool
    """False: its prompt goes on in the step after."""


@torch.no_grad()
def key_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of keys and values, which need not be that of any weight: a pass over one token tells."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    decoder_of(model)(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    dtype = cache.layers[0].keys.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


class PagedModel:
    """A model with a paged cache, that runs one step of all its requests at a time. For one thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: EngineSettings,
        choose: Callable[[torch.Tensor, Sequence[Scheduled]], Sequence[int] | None],
        adapter_of: Callable[[str], str],
    ) -> None:
        """Make the cache.

        Args:
            model: the base; its attention is switched to a paged one where it has to be, until `close`.
            settings: the engine's.
            choose: called in a step with logits [rows, vocabulary], fp32, and one request for each of the first rows.
                It gives their tokens, or None where the step is not to count.
            adapter_of: request → the identity of its adapter; requests of one identity share prefixes.

        Raises:
            RunFailed: this transformers is another one than was tested, this model can't be run from pages, or memory
                is short.
        """
        if (missing := missing_internals()) or not _imported:
            raise RunFailed(
                f"transformers {transformers.__version__} has another continuous batching than qvera knows "
                f"(tested: {', '.join(TESTED_VERSIONS)}): {missing[0] if missing else 'it can not be imported'}. "
                "Install a tested version, or use the static engine."
            )
        self._model, self._dtype = model, key_dtype(model)
        self._attention = model.config._attn_implementation
        is_known = model.config.model_type in _KNOWN_TYPES
        wanted = {} if is_known else ordinary_logits(model)
        if takes_open_mask(self._attention):  # ours, of an accelerator: transformers pages its own only
            model.set_attn_implementation("sdpa")
        try:
            # the seed that a processor draws is torch's global one, which belongs to whoever called us
            with accelerator.forked_random_state():
                self._manager = self._make_manager(settings)
                self._processor = self._make_processor(choose, adapter_of)
                require_same(self, self._processor, wanted)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, MemoryError) as error:
            self.close()
            if is_out_of_memory(error):
                raise RunFailed(
                    f"the cache of keys and values does not fit into memory ({first_line(error)}) Lower "
                    "--cache-tokens or --running."
                ) from None
            if is_known:
                raise
            raise RunFailed(
                f"transformers' continuous batching can't run {type(model).__name__} ({type(error).__name__}: "
                f"{first_line(error)}) Use the static engine (--engine static)."
            ) from None

    def _make_manager(self, settings: EngineSettings) -> Any:
        model = self._model
        return model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=max(1, cache_tokens(model, settings, self._dtype) // PAGE_TOKENS),
                max_batch_tokens=settings.step_tokens,
                max_requests_per_batch=min(settings.max_running, settings.step_tokens),
                max_blocks_per_request=0,
                allow_block_sharing=settings.share_prefixes,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,  # it would look for kernels on the hub
            ),
        )

    def _make_processor(self, choose: Any, adapter_of: Callable[[str], str]) -> Any:
        manager, model = self._manager, self._model
        config = manager.continuous_batching_config
        text_config = model.config.get_text_config()
        cache = _Cache(
            config=text_config,
            continuous_batching_config=config,
            device=model.device,
            distributed_helper=manager.distributed_helper,
            dtype=self._dtype,
            model_supports_logits_to_keep=model._supports_logits_to_keep(),
        )
        cache.adapter_of = adapter_of
        cache.vocabulary = max(text_config.vocab_size, model.get_input_embeddings().weight.shape[0])
        processor = ContinuousBatchProcessor(
            cache=cache,
            config=text_config,
            generation_config=manager.generation_config,
            continuous_batching_config=config,
            logit_processor=manager.logit_processor,
            input_queue=manager.input_queue,
            cancel_queue=manager.cancel_queue,
            output_router=_NoOutputs(),
            background_thread_status=manager.background_thread_status,
            model_device=model.device,
            model_dtype=self._dtype,
            scheduler=FIFOScheduler(cache, config.safety_margin, config.max_requests_per_batch),
            distributed_helper=manager.distributed_helper,
        )
        runner = _Runner(
            logit_processor=manager.logit_processor,
            cb_config=config,
            cache=cache,
            inputs_and_outputs=processor.inputs_and_outputs,
            do_sample=False,
            return_logprobs=False,
        )
        runner.choose, runner.scheduled = choose, self.scheduled
        processor.model_runner = runner
        return processor

    @property
    def longest_tokens(self) -> int:
        """How many tokens one request may have in all."""
        tokens = self._processor.cache.num_blocks * PAGE_TOKENS
        return min(int(tokens), int(self._model.config.get_text_config().max_position_embeddings))

    def add(self, request_id: str, tokens: Sequence[int], max_tokens: int, stop_tokens: Sequence[int]) -> None:
        """Queue a request that has ``max_tokens`` to go."""
        self._manager.add_request(
            list(tokens), request_id=request_id, max_new_tokens=max_tokens, eos_token_id=list(stop_tokens)
        )

    def cancel(self, request_id: str) -> None:
        """Leave a request out of the next step, and free its pages."""
        self._manager.cancel_request(request_id)

    def prepare(self) -> list[Scheduled]:
        """What the next step runs; empty: nothing."""
        return self.scheduled() if self._processor.prepare_next_batch() else []

    def scheduled(self) -> list[Scheduled]:
        """The requests of the step that was prepared last, in the order of their tokens."""
        batch = self._processor.inputs_and_outputs.requests_in_batch
        return [Scheduled(one.state.request_id, one.query_length, one.has_new_token) for one in batch]

    def run(self) -> None:
        """Run the step that was prepared. ``choose`` is called in it; where that gave None, `reset` has to follow."""
        self._processor.model_runner.counts = True
        # transformers runs the step on a stream of its own; what the adapters' bank has sent comes on the default one
        if (stream := getattr(self._processor.inputs_and_outputs, "compute_stream", None)) is not None:
            stream.wait_stream(accelerator.computing_stream(self._model.device))
        self._processor._generation_step(self._model)
        if self._processor.model_runner.counts:
            self._processor.update_batch()

    def reset(self) -> None:
        """Forget all requests, and all keys and values."""
        manager, processor = self._manager, self._processor
        for queue in (manager.input_queue, manager.cancel_queue):
            while not queue.empty():
                queue.get_nowait()
        processor.reset()
        processor.cache.reset()

    def close(self) -> None:
        """Give the model its attention back."""
        self._model.set_attn_implementation(self._attention)


def marked(tokens: Sequence[int], number: int, vocabulary: int) -> list[int]:
    """Tokens with a number in the first four of them, as digits above the vocabulary.

    Two that differ in number or tokens differ afterwards too, and all stay 31-bit.
    """
    digits, found = 2**31 // vocabulary, list(tokens)
    if not 0 <= number < digits**4:
        raise ValueError(f"expected a number from 0 to {digits**4 - 1}, got {number}")
    for place in range(min(4, len(found))):
        number, digit = divmod(number, digits)
        found[place] += digit * vocabulary
    return found


if _imported:

    class _Cache(PagedAttentionCache):
        """Pages that are shared within one adapter.

        A block is found by a hash of its tokens and of its parent. What is hashed, and only that, has a mark of the
        adapter.
        """

        adapter_of: Callable[[str], str]
        """Request → identity."""
        vocabulary: int
        """How many token ids there are."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._numbers: dict[str, int] = {}

        def own_tokens(self, request_id: str, tokens: list[int]) -> list[int]:
            """The tokens of a request as they are hashed: with the number of its adapter."""
            number = self._numbers.setdefault(self.adapter_of(request_id), len(self._numbers))
            return marked(tokens, number, self.vocabulary)

        def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
            return super().search_prefix_match(request_id, self.own_tokens(request_id, prompt_ids))

        def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
            if not complete_blocks:
                return
            tokens = self.own_tokens(state.request_id, state.initial_tokens + state.generated_tokens)
            shown = RequestState(state.request_id, tokens, _status=state.status)
            super().mark_complete_blocks(shown, complete_blocks)

    class _Runner(ModelRunner):
        """Runs the model, and lets the engine choose the tokens."""

        choose: Callable[[torch.Tensor, Sequence[Scheduled]], Sequence[int] | None]
        scheduled: Callable[[], list[Scheduled]]
        counts = True

        def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
            new = [one for one in self.scheduled() if one.has_new_token]
            tokens = self.choose(scores[0], new)
            if tokens is None:
                self.counts = False
            elif tokens:
                output_ids[0, : len(tokens)].copy_(torch.tensor(tokens, dtype=output_ids.dtype))

    class _NoOutputs(OutputRouter):
        """The engine sees tokens as they are chosen; only a request that transformers refuses speaks here."""

        def deliver(self, output: GenerationOutput) -> None:
            if output.error is not None:
                raise RuntimeError(output.error)

        def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
            for output in outputs:
                self.deliver(output)
