"""Sampling by Tinker's API: samplers, samples, and how their results are fetched.

A call is a promise in the database, and waits there. The thread of `Tinker` hands its samples to the engine, as many
as run at a time and a few more. The next one is of the key that was given the fewest tokens. So neither many calls nor
long ones of a key hold up another, and memory does not depend on how many wait. What has no result at a restart begins
again.
"""

import hashlib
import itertools
import logging
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from qvera.serve.api.access import Access
from qvera.serve.api.errors import ApiError, require_room
from qvera.serve.api.service import Service
from qvera.serve.engine import NOT_FINITE
from qvera.serve.requests import (
    AdapterChanged,
    Busy,
    EngineDead,
    Event,
    GenerationRequest,
    PromptScores,
    PromptScoring,
    ResolvedAdapter,
    Sampling,
    TokenEvent,
    require_fits,
)
from qvera.serve.text import TextStream
from qvera.serve.tinker.calls import Form, parsed
from qvera.serve.tinker.database import SAMPLE
from qvera.serve.tinker.messages import FLOAT32, INT32, INT64, MESSAGES, dense_of, packed
from qvera.serve.tinker.tenancy import Tinker
from qvera.utils.errors import InputError, RunFailed, first_line

_logger = logging.getLogger(__name__)
CLONE = 1_000_000_000
"""The seq_ids of a joined client begin at its number times this."""
_MOST_TOP = 64  # tokens in one place: likely, drawn, or given
_NO_LOGPROB = -99999.0  # where there is no likely token
_SAMPLE_BYTES = 128 << 10  # a call whose body has more bytes for each sample counts as more of them
_BUSY_SECONDS = 0.05  # until an engine with a full queue is asked again
Int32 = Annotated[int, Field(ge=-1, lt=2**31)]
Top = Annotated[int, Field(ge=0, le=_MOST_TOP)]


class NewSampler(Form):
    session_id: str
    sampling_session_seq_id: Annotated[int, Field(ge=0)]
    model_path: str | None = None
    base_model: str | None = None


class Chunk(BaseModel):
    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[Int32] = []


class Prompt(BaseModel):
    chunks: list[Chunk]


class Params(BaseModel):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[Int32] | Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Int32 = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Targets(BaseModel):
    """Token ids, perhaps as CSR. -1: nothing is asked."""

    data: list[Int32]
    shape: Annotated[list[Int32], Field(min_length=2, max_length=2)]
    sparse_crow_indices: list[Int32] | None = None
    sparse_col_indices: list[Int32] = []


class SampleBody(BaseModel):
    sampling_session_id: str
    seq_id: Annotated[int, Field(ge=0, lt=2**63)]
    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt: Prompt
    sampling_params: Params = Params()
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Top = 0
    topk_sample_logprobs: Top = 0
    target_prompt_logprobs: Targets | None = None
    prompt_alt_tokens_k: Top = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool | None = None


@dataclass
class Sample:
    """One answer of a call, as far as it has come."""

    id: str
    stream: TextStream  # looks for stop texts
    events: list[TokenEvent] = field(default_factory=list)
    is_stopped: bool = False  # by a token or text; else by its length


class Asked:
    """The question in a body, checked. Raises InputError that names the field."""

    def __init__(self, body: SampleBody, service: Service, vocabulary: int) -> None:
        self.body, params, longest = body, body.sampling_params, service.engine.longest_tokens
        if body.record_stability_info:
            raise InputError("record_stability_info: is not supported, and neither is the loss that needs it.")
        self.prompt = tuple(itertools.chain.from_iterable(chunk.tokens for chunk in body.prompt.chunks))
        size = len(self.prompt)
        require_fits(size, params.max_tokens or 1, longest)
        self.targets = _targets(body.target_prompt_logprobs, size - 1)
        if min(self.prompt) < 0 or max(max(self.prompt), self.targets.max(initial=0)) >= vocabulary:
            raise InputError(f"prompt, target_prompt_logprobs: token ids of this model are 0 to {vocabulary - 1:,}.")
        self.last = body.prompt_logprobs_last_n or size - 1  # tokens of the prompt to score
        if body.prompt_logprobs_last_n is not None and not (body.prompt_logprobs and self.last < size):
            raise InputError(
                f"prompt_logprobs_last_n: is {self.last:,}; expected 1 to {size - 1:,}, and prompt_logprobs: true."
            )
        # A text that is a token of its own ends the answer as a token; other texts are looked for in what is written.
        # Without any the base's stop tokens count, and an empty list asks for none at all.
        added, ends = service.prompts.encoder.tokenizer.get_added_vocab(), service.stop_tokens
        given = [params.stop] if isinstance(params.stop, str) else params.stop
        if given is not None:
            ids = [added.get(one, -1) if isinstance(one, str) else one for one in given]
            ends = frozenset(ids) | ends if given else frozenset()
        self.stops = [one for one in given or () if isinstance(one, str) and one not in added]
        if any(not 1 <= len(text) <= service.limits.stop_characters for text in self.stops):
            raise InputError(f"stop: expected texts of 1 to {service.limits.stop_characters} characters.")
        self.sampling = Sampling(
            params.max_tokens or longest - size,
            params.temperature,
            params.top_p,
            max(params.top_k, 0),
            params.seed,
            body.topk_sample_logprobs,
            tempered=True,
            stop_tokens=ends,
            keeps_stop=True,
        )
        self.scoring: PromptScoring | None = None
        # targets and drawn tokens are asked for in all places, likely ones and the prompt's own in the last ones
        for_all = self.targets.size or body.prompt_alt_tokens_k
        if size > 1 and (for_all or body.prompt_logprobs or body.topk_prompt_logprobs):
            self.scoring = PromptScoring(
                size - 1 if for_all else self.last,
                body.topk_prompt_logprobs,
                np.maximum(self.targets, 0) if self.targets.size else None,
                body.prompt_alt_tokens_k,
                params.temperature,
                self.seed(-1),
            )

    def seed(self, number: int) -> int | None:
        """Return the seed of a call's sample; number -1 is that of the tokens drawn in its prompt.

        It is hashed, so that samples of a call have other seeds than those of a call with a neighbouring seed.
        """
        if (seed := self.body.sampling_params.seed) is None:
            return None
        return int.from_bytes(hashlib.sha256(f"{seed % 2**64}/{number}".encode()).digest()[:8])

    def encoded(self, samples: Sequence[Sample], scores: PromptScores | None) -> bytes:
        """Return the result of a call, the bytes of a SampleResponse."""
        body, size = self.body, len(self.prompt)
        top, draws = body.topk_prompt_logprobs, body.prompt_alt_tokens_k
        response = MESSAGES["SampleResponse"](prompt_cache_hit_tokens=samples[0].events[0].cached_tokens)
        for sample in samples:
            sequence = response.sequences.add(
                stop_reason=0 if sample.is_stopped else 1,
                tokens=packed(INT32, [one.token for one in sample.events]),
                logprobs=packed(FLOAT32, [one.logprob or 0.0 for one in sample.events]),
            )
            if body.topk_sample_logprobs:
                likely = np.array([one.top for one in sample.events])  # [n, k, 2]
                _write_top(sequence.topk_sampled_logprobs, likely[..., 0], likely[..., 1])
        if scores is None:  # nothing was asked, or the prompt is one token, which has none
            scores = PromptScores(np.empty(0), self.targets, *[np.empty((0, top))] * 2, *[np.empty((0, draws))] * 2)

        def in_whole(part: np.ndarray, fill: float) -> np.ndarray:  # more places may be scored than were asked for
            return np.concatenate([np.full((size - self.last, *part.shape[1:]), fill), part[len(part) - self.last :]])

        if body.prompt_logprobs:
            response.prompt_logprobs = packed(FLOAT32, in_whole(scores.own, np.nan))
        if top:
            tokens, logprobs = in_whole(scores.top_tokens, 0), in_whole(scores.top, _NO_LOGPROB)
            _write_top(response.topk_prompt_logprobs, tokens, logprobs)
        if body.target_prompt_logprobs is not None:
            given = np.where(self.targets < 0, 0.0, scores.targets)
            _write_tensor(response.target_prompt_logprobs, FLOAT32, given)
        if draws:
            _write_tensor(response.prompt_alt_tokens.tokens, INT64, scores.drawn_tokens)
            _write_tensor(response.prompt_alt_tokens.logprobs, FLOAT32, scores.drawn)
        return bytes(response.SerializeToString())


@dataclass
class _Call:
    """A call without a result. Its body is read when its first sample has its turn."""

    promise: str
    owner: str
    sampler: str
    asked: Asked | None = None
    adapter: ResolvedAdapter | None = None
    samples: list[Sample] = field(default_factory=list)  # that were handed to the engine
    scores: PromptScores | None = None


class Samples:
    """Samplers and samples. Public methods may block, and may be called from any thread."""

    def __init__(self, tinker: Tinker, service: Service) -> None:
        """Begin again with the calls that a server before this one has promised."""
        self._tinker, self._service, self._database = tinker, service, tinker.database
        self._most_sent = service.engine.settings.max_running * 5 // 4 + 1  # so that no place in the batch is free
        # of the thread
        self._calls: dict[str, _Call] = {}  # by promise
        self._waiting: dict[str, dict[str, _Call]] = {}  # by owner and promise: those with samples to hand over
        self._given: Counter[str] = Counter()  # tokens by owner
        self._sent: dict[str, tuple[_Call, Asked, Sample]] = {}  # by request
        self._is_busy = False  # the engine, whose queue is full
        self._asked: defaultdict[str, set[str]] = defaultdict(set)  # live session → identities of its adapters
        tinker.on_session_end = self._end_session
        left = "SELECT id, owner, target FROM promises WHERE state = 'pending' AND kind = ? ORDER BY number"
        for row in self._database.rows(left, (SAMPLE,)):
            self._put(partial(self._queue, _Call(*row)))

    def create(self, access: Access, asked: NewSampler) -> str:
        """Make a sampler of a saved adapter or of the base, and return its id.

        Raises ApiError, or InputError for another base.
        """
        owner = access.name
        self._tinker.hear(asked.session_id, owner)
        served, base, path = self._tinker.base, asked.base_model, asked.model_path
        if path is not None:
            base = self._tinker.checkpoints.find(path, owner, "sampler_weights").about["base"]
        elif base is None or base.partition(":vera-")[0] not in served.names or not access.covers(served.name):
            raise InputError(f"base_model: {str(base)[:200]!r} is not served here; expected {served.name!r}.")
        sampler = f"{asked.session_id}:sample:{asked.sampling_session_seq_id}"
        if not self._database.rows("SELECT 1 FROM samplers WHERE id = ?", (sampler,)):  # or it was sent again
            about = {"session": asked.session_id, "owner": owner, "base": base, "model_path": path}
            self._database.insert("samplers", id=sampler, created=time.time(), **about)
        return sampler

    def find(self, sampler: str, owner: str) -> sqlite3.Row:
        """Return a sampler's row. Raises ApiError: 410 if it or its session has ended, 404 if the owner has none."""
        found = self._database.own("samplers", sampler, owner)
        self._tinker.hear(found["session"], owner)
        if found["ended"] is not None:
            raise ApiError(410, f"The sampler {sampler} has ended: it was not asked for long. Save the weights anew.")
        return found

    def call(self, owner: str, body: bytes) -> tuple[str, int]:
        """Accept a call. Returns its promise, that of the first one for a repetition, and its number of samples.

        Raises InputError for a body that can't be used, and ApiError as `find`, or 429 if the key has too many open.
        """
        asked = parsed(SampleBody, body)
        sampler, count = asked.sampling_session_id, asked.num_samples
        self.find(sampler, owner)
        Asked(asked, self._service, self._tinker.base.vocabulary)  # for its errors; it is read anew when its turn comes
        with self._database.transaction():  # no other call is accepted meanwhile
            _, samples = self._database.open_of(owner, samples=True)
            size = max(count, -(-len(body) // _SAMPLE_BYTES))
            require_room("samples", samples, self._tinker.settings.open_samples, size)
            promise, is_new = self._database.begin(owner, sampler, asked.seq_id, SAMPLE, body, size=size)
        if is_new:
            self._put(partial(self._queue, _Call(promise, owner, sampler)))
        return promise, count

    def ended(self, owner: str, sampler: str, clone: int, cursor: int) -> dict[str, Any] | None:
        """Tell which calls of a sampler's client have ended since a cursor; None: no call has. Raises as `find`."""
        self.find(sampler, owner)
        query = "SELECT done_at, id, state, length(payload) FROM promises WHERE target = ? AND seq BETWEEN ? AND ?"
        query += " AND done_at > ? ORDER BY done_at"
        found = self._database.rows(query, (sampler, clone * CLONE, (clone + 1) * CLONE - 1, cursor))
        told = [
            {"state": "finished", "request_id": promise, "response_payload_uncompressed_size": size}
            if state == "proto"
            else {"state": "failed", "request_id": promise}
            for _, promise, state, size in found
        ]
        return {"completions": told, "cursor": found[-1][0]} if found else None

    def cancel(self, owner: str, promise: str) -> None:
        """Give up a call without a result, if the owner has such a one."""
        self._give_up(lambda one: (one.promise, one.owner) == (promise, owner), "The client has given the sample up.")

    def _end_session(self, session: str) -> None:
        def unload() -> None:  # nobody asks for most of them again, and the last one of a shape gives its bank up
            for identity in self._asked.pop(session, ()):
                self._service.engine.unload(identity)

        self._give_up(lambda one: one.sampler.startswith(f"{session}:"), "The session has ended.")
        self._put(unload)

    def _give_up(self, is_meant: Callable[[_Call], bool], why: str) -> None:
        def end() -> None:
            for call in [call for call in self._calls.values() if is_meant(call)]:
                self._end(call, "user", why.encode())

        self._put(end)

    # The thread

    def _put(self, work: Callable[[], None]) -> None:
        self._tinker.put(work)
        self._tinker.put(self._hand_over)  # apart: after an error of the database it is tried again, and the work not

    def _hand_over(self) -> None:
        """Hand over as many samples as the engine should have. Raises RunFailed as the database."""
        # the next one is of the key that was given the fewest tokens
        while self._waiting and len(self._sent) < self._most_sent and not self._is_busy:
            call = next(iter(self._waiting[min(self._waiting, key=self._given.__getitem__)].values()))
            try:
                self._send(call)
            except Busy:
                self._is_busy = True
                threading.Timer(_BUSY_SECONDS, self._put, (partial(setattr, self, "_is_busy", False),)).start()
            except AdapterChanged:  # newer weights were saved over those that were looked up
                call.asked = None
            except EngineDead:  # polls say so, and the next server begins again
                return
            except (ApiError, InputError) as error:
                self._end(call, "user", str(error).encode())
            except RunFailed:
                raise
            except Exception as error:
                _logger.exception("samples of %s", call.promise)
                self._end(call, "server", f"{type(error).__name__}: {first_line(error)}".encode())

    def _queue(self, call: _Call) -> None:
        self._calls[call.promise] = call
        # a key that has not asked for a while begins level with the others, and not with a right to all that time
        if call.owner not in self._waiting:
            least = min((self._given[owner] for owner in self._waiting), default=0)
            self._given[call.owner] = max(self._given[call.owner], least)
        self._waiting.setdefault(call.owner, {})[call.promise] = call

    def _send(self, call: _Call) -> None:
        """Hand a call's next sample to the engine."""
        if (asked := call.asked) is None:
            [row] = self._database.rows("SELECT body FROM promises WHERE id = ?", (call.promise,))
            asked = Asked(parsed(SampleBody, row["body"]), self._service, self._tinker.base.vocabulary)
            call.adapter, call.asked = self._adapter(call), asked
            if call.adapter is not None:
                self._asked[call.sampler.partition(":")[0]].add(call.adapter.identity)
        number, service = len(call.samples), self._service
        sample = Sample(f"{call.promise}:{number}", TextStream(service.texts, asked.stops))
        sampling, scoring = replace(asked.sampling, seed=asked.seed(number)), None if number else asked.scoring
        request = GenerationRequest(sample.id, asked.prompt, call.adapter, sampling, scoring=scoring)
        service.engine.submit(request, lambda event: self._put(partial(self._take, sample.id, event)))
        call.samples.append(sample)
        self._sent[sample.id] = call, asked, sample
        # as many as it may take; what it did not need is taken off at its end
        self._given[call.owner] += len(asked.prompt) + sampling.max_tokens
        if len(call.samples) == asked.body.num_samples:
            self._leave_queue(call)

    def _leave_sent(self, request: str) -> None:
        call, asked, sample = self._sent.pop(request)
        self._given[call.owner] -= asked.sampling.max_tokens - len(sample.events)

    def _leave_queue(self, call: _Call) -> None:
        calls = self._waiting.get(call.owner, {})
        calls.pop(call.promise, None)
        if not calls:
            self._waiting.pop(call.owner, None)

    def _adapter(self, call: _Call) -> ResolvedAdapter | None:
        """The weights of a call's sampler; None: the base. Raises ApiError or InputError if they are gone."""
        sampler = self.find(call.sampler, call.owner)
        directory = sampler["directory"]
        if sampler["model_path"] is not None:
            directory = self._tinker.checkpoints.find(sampler["model_path"], call.owner, "sampler_weights").directory
        if directory is None:
            return None
        return self._service.store.resolve_directory(self._tinker.directory / directory, call.sampler)

    def _take(self, request: str, event: Event) -> None:
        """Handle an event of a sample. Events of one that has ended do not count."""
        if request not in self._sent:
            return
        call, asked, sample = self._sent[request]
        stream = sample.stream
        if isinstance(event, PromptScores):
            call.scores = event
            return
        if isinstance(event, TokenEvent):
            sample.events.append(event)
            if asked.stops:
                stream.add(event.token)
            if not stream.stopped:
                return
            self._service.engine.cancel(request)
        elif event.reason == "error":
            return self._end(call, "user" if event.message == NOT_FINITE else "server", event.message.encode())
        elif event.reason == "cancelled":  # the server is stopping
            return
        else:
            stream.finish()
            sample.is_stopped = event.reason == "stop"
        if stream.stopped:
            sample.is_stopped = True
            tokens = [one.token for one in sample.events]
            while any(text in self._service.texts.decode(tokens[:-1]) for text in asked.stops):
                tokens.pop()  # the last token is the one that completes the text
            del sample.events[len(tokens) :]
        self._leave_sent(request)
        if len(call.samples) == asked.body.num_samples and not any(one.id in self._sent for one in call.samples):
            self._end(call, "proto", asked.encoded(call.samples, call.scores))

    def _end(self, call: _Call, state: Literal["proto", "user", "server"], payload: bytes) -> None:
        """Write down a call's result. A failed one's samples are given up."""
        for request in [sample.id for sample in call.samples if sample.id in self._sent]:
            self._leave_sent(request)
            self._service.engine.cancel(request)
        self._leave_queue(call)
        del self._calls[call.promise]
        self._tinker.put(partial(self._database.end, call.promise, state, payload))


def _write_top(message: Any, tokens: np.ndarray, logprobs: np.ndarray) -> None:
    message.length, message.k = tokens.shape
    message.token_ids, message.logprobs = packed(INT32, tokens), packed(FLOAT32, logprobs)


def _write_tensor(message: Any, dtype: int, values: np.ndarray) -> None:
    message.dtype, message.dense = dtype, packed(dtype, values)
    message.shape.extend(values.shape)


def _targets(given: Targets | None, rows: int) -> np.ndarray:
    """Return the target tokens, int64 [rows, K], -1 where nothing is asked; K is 0 without any. Raises InputError."""
    if given is None:
        return np.empty((rows, 0), np.int64)
    name, data, shape = "target_prompt_logprobs", np.array(given.data, np.int64), tuple(given.shape)
    if shape[0] != rows or not 1 <= shape[1] <= _MOST_TOP:
        raise InputError(f"{name}: has the shape {given.shape}; expected [{rows}, K], K from 1 to {_MOST_TOP}.")
    if given.sparse_crow_indices is not None:
        starts, columns = np.array(given.sparse_crow_indices), np.array(given.sparse_col_indices, np.int64)
        return dense_of(name, data, starts, columns, shape, -1)
    if len(data) != shape[0] * shape[1]:
        raise InputError(f"{name}: has {len(data):,} numbers, and the shape {given.shape}.")
    return data.reshape(shape)
