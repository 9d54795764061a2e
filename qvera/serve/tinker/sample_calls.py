"""What a call of Tinker's asample asks, and the message of its result."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from qvera.serve.api.service import Service
from qvera.serve.requests import PromptScores, PromptScoring, Sampling, TokenEvent
from qvera.serve.text import TextStream
from qvera.serve.tinker.messages import FLOAT32, INT32, INT64, MESSAGES, dense_of, packed
from qvera.utils.errors import InputError

_MOST_TOP = 64  # tokens in one place: likely, drawn, or given
_NO_LOGPROB = -99999.0  # where there is no likely token
Number = Annotated[int, Field(ge=-1, lt=2**31)]
Top = Annotated[int, Field(ge=0, le=_MOST_TOP)]


class Chunk(BaseModel):
    type: str = "encoded_text"
    tokens: list[Number] = []


class Prompt(BaseModel):
    chunks: list[Chunk]


class Params(BaseModel):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[Number] | Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Number = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Targets(BaseModel):
    """Token ids, perhaps as CSR. -1: nothing is asked."""

    data: list[Number]
    shape: Annotated[list[Number], Field(min_length=2, max_length=2)]
    sparse_crow_indices: list[Number] | None = None
    sparse_col_indices: list[Number] = []


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
    is_stopped: bool | None = None  # None: it has not ended


class Asked:
    """What a body asks. Raises InputError that names the field."""

    def __init__(self, body: SampleBody, service: Service, vocabulary: int) -> None:
        self.body, params, longest = body, body.sampling_params, service.engine.longest_tokens
        if other := [chunk.type for chunk in body.prompt.chunks if chunk.type != "encoded_text"]:
            raise InputError(f"prompt: a chunk of {other[0][:100]!r} is not supported; expected encoded_text.")
        if body.record_stability_info:
            raise InputError("record_stability_info: is not supported, and neither is the loss that needs it.")
        self.prompt = tuple(itertools.chain.from_iterable(chunk.tokens for chunk in body.prompt.chunks))
        size = len(self.prompt)
        if not size:
            raise InputError("prompt: has no tokens; expected at least one.")
        if size + (params.max_tokens or 1) > longest:
            raise InputError(
                f"prompt and max_tokens: {size:,} and {params.max_tokens or 1:,} tokens are more than the {longest:,} "
                "that fit; shorten the prompt or lower max_tokens."
            )
        self.targets = _targets(body.target_prompt_logprobs, size - 1)
        if min(self.prompt) < 0 or max(max(self.prompt), self.targets.max(initial=0)) >= vocabulary:
            raise InputError(f"prompt, target_prompt_logprobs: token ids of this model are 0 to {vocabulary - 1:,}.")
        self.last = body.prompt_logprobs_last_n or size - 1  # tokens of the prompt to score
        if body.prompt_logprobs_last_n is not None and not (body.prompt_logprobs and self.last < size):
            raise InputError(
                f"prompt_logprobs_last_n: is {self.last:,}; expected 1 to {size - 1:,}, and prompt_logprobs: true."
            )
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
        """That of a call's sample: another one for each, and none of a neighbouring seed's."""
        if (seed := self.body.sampling_params.seed) is None:
            return None
        return int.from_bytes(hashlib.sha256(f"{seed % 2**64}/{number}".encode()).digest()[:8])

    def encoded(self, samples: Sequence[Sample], scores: PromptScores | None) -> bytes:
        """The result: a SampleResponse."""
        body, size, top = self.body, len(self.prompt), self.body.topk_prompt_logprobs
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
        own, given = np.full(size, np.nan), np.zeros(self.targets.shape)
        top_tokens, top_logprobs = np.zeros((size, top)), np.full((size, top), _NO_LOGPROB)
        drawn_tokens = drawn = np.zeros((size - 1, body.prompt_alt_tokens_k))
        if scores is not None:
            for whole, part in ((own, scores.own), (top_tokens, scores.top_tokens), (top_logprobs, scores.top)):
                whole[size - self.last :] = part[len(part) - self.last :]
            given = np.where(self.targets < 0, 0.0, scores.targets) if given.size else given
            drawn_tokens, drawn = scores.drawn_tokens, scores.drawn
        if body.prompt_logprobs:
            response.prompt_logprobs = packed(FLOAT32, own)
        if top:
            _write_top(response.topk_prompt_logprobs, top_tokens, top_logprobs)
        if body.target_prompt_logprobs is not None:
            _write_tensor(response.target_prompt_logprobs, FLOAT32, given)
        if body.prompt_alt_tokens_k:
            _write_tensor(response.prompt_alt_tokens.tokens, INT64, drawn_tokens)
            _write_tensor(response.prompt_alt_tokens.logprobs, FLOAT32, drawn)
        return bytes(response.SerializeToString())


def _write_top(message: Any, tokens: np.ndarray, logprobs: np.ndarray) -> None:
    message.length, message.k = tokens.shape
    message.token_ids, message.logprobs = packed(INT32, tokens), packed(FLOAT32, logprobs)


def _write_tensor(message: Any, dtype: int, values: np.ndarray) -> None:
    message.dtype, message.dense = dtype, packed(dtype, values)
    message.shape.extend(values.shape)


def _targets(given: Targets | None, rows: int) -> np.ndarray:
    """Int64 [rows, K]; K is 0 where there are none. Raises InputError."""
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
