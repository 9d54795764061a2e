"""Text → token ids, with the token at which a given character starts; one way of doing it for every tokenizer."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Bounds = tuple[int, int, int]
"""Where an answer's header starts, where the answer starts and where it ends: in characters of a text, or in tokens."""


class Encoder:
    """A tokenizer, and what it does about BOS, EOS and padding.

    Attributes:
        bos_id: the token that every row starts with, or None where the model wants none.
        eos_id: ends a row that has no end-of-turn token of its own.
        pad_id: fills up a batch. It is the tokenizer's, or eos where it has none: padding is masked, so any will do.
        pads_with_eos: that second case.
        splits: a text may be encoded in parts. SentencePiece tokenizers that put a space in front of whatever they
            are given can't do that.

    Args:
        has_answers: rows have answers, which end with eos.

    Raises:
        InputError: the tokenizer has no eos token and rows have answers, or it has neither eos nor a pad token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, has_answers: bool = True) -> None:
        if has_answers:
            require_eos(tokenizer)
        self.tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pads_with_eos = tokenizer.pad_token_id is None
        self.pad_id = pad_id_of(tokenizer)
        self.bos_id: int | None = None
        bos = tokenizer.bos_token_id
        if bos is not None:
            # The attribute says what a config file wished for, the first id what is really done. Either is a wish.
            first = tokenizer("a")["input_ids"][:1]
            if first == [bos] or getattr(tokenizer, "add_bos_token", False) is True:
                self.bos_id = int(bos)
        probe = self._encode_batch(["a", "b"])
        ids = list(itertools.chain(*probe["input_ids"]))
        self.splits = bool(getattr(probe, "encodings", None)) and decode(tokenizer, ids) == "ab"

    def sha256(self) -> str | None:
        """See `tokenizer_sha256`."""
        return tokenizer_sha256(self.tokenizer)

    def with_bos(self, ids: list[int]) -> list[int]:
        """``ids`` with exactly one BOS in front where the model wants one; a template may have written it already."""
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def starts_with_bos(self, ids: Sequence[int] | np.ndarray) -> bool:
        """Whether the model wants a BOS and these ids have it in front."""
        return self.bos_id is not None and len(ids) > 0 and int(ids[0]) == self.bos_id

    def encode_prompt(self, text: str, starts: Sequence[int] = ()) -> list[int]:
        """The ids of a prompt as in training; ``text`` and ``starts`` are what `ChatTemplate.prompt` returns."""
        ((ids, _),) = self.encode([text], [[(at, at, at) for at in starts]])
        return self.with_bos(ids)

    def encode(self, texts: Sequence[str], answers: Sequence[Sequence[Bounds]]) -> list[tuple[list[int], list[Bounds]]]:
        """Encode texts without adding special tokens; markers written in a text become their tokens.

        Where the tokenizer `splits`, each answer starts a part that is encoded by itself. A prompt then has the ids
        that it has when it is generated from: encoded together, a line break before an answer can be one token when it
        ends the text and another when a word follows. A token that lies across the start or the end of an answer
        belongs to the answer.

        Args:
            texts: N texts.
            answers: for each text the bounds of its answers in characters, in order.

        Returns:
            For each text its ids, and the bounds of its answers in tokens.
        """
        edges = []
        for text, bounds in zip(texts, answers, strict=True):
            starts = {start for _, start, _ in bounds} if self.splits else set()
            edges.append([*sorted({0} | starts - {len(text)}), len(text)])
        parts = [
            text[a:b] for text, row_edges in zip(texts, edges, strict=True) for a, b in itertools.pairwise(row_edges)
        ]
        batch = self._encode_batch(parts)
        encodings = getattr(batch, "encodings", None)
        if not encodings:
            rows = zip(texts, answers, batch["input_ids"], strict=True)
            return [(list(ids), self._bounds_by_prefix(text, bounds, ids)) for text, bounds, ids in rows]
        following = iter(encodings)
        out = []
        for bounds, row_edges in zip(answers, edges, strict=True):
            ids: list[int] = []
            spans: list[tuple[int, int]] = []  # of each token, in characters of the text
            for low, encoding in zip(row_edges[:-1], following, strict=False):
                ids += encoding.ids
                # a space that trimmed offsets put at its own beginning still belongs to this part
                spans += [(low + start, low + max(end, 1)) for start, end in encoding.offsets]
            out.append((ids, [_in_tokens(spans, answer) for answer in bounds]))
        return out

    def _encode_batch(self, texts: list[str]) -> BatchEncoding:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )

    def _bounds_by_prefix(self, text: str, answers: Sequence[Bounds], ids: Sequence[int]) -> list[Bounds]:
        """For tokenizers written in Python, which have no offsets: tokens that a prefix of the text has in common."""

        def tokens_before(at: int) -> int:
            if at >= len(text):
                return len(ids)
            prefix = self.tokenizer(text[:at], add_special_tokens=False)["input_ids"] if at else []
            pairs = zip(prefix, ids, strict=False)
            return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

        return [(tokens_before(header), tokens_before(start), tokens_before(end)) for header, start, end in answers]


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse (InputError) the tokenizer of a model that answers, if it has no end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} has no end-of-sequence token, so no answer "
            "could ever end. Set eos_token in its tokenizer_config.json to the token that ends a text (</s>, "
            "<|endoftext|>, ...), or name another model.tokenizer."
        )


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up a batch: the tokenizer's, or eos where it has none.

    Raises:
        InputError: it has neither.
    """
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if found is None:
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} has no pad_token and no eos_token, so rows of "
            "different lengths can't stand in one batch. Set model.pad_token to one of its tokens."
        )
    return int(found)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of these tokens, special ones included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _in_tokens(spans: list[tuple[int, int]], answer: Bounds) -> Bounds:
    """An answer's bounds in tokens, whose places in the text ``spans`` are in order."""
    header, start, end = (bisect.bisect_right(spans, at, key=itemgetter(1)) for at in answer)  # tokens that end by then
    return header, start, max(end, bisect.bisect_left(spans, answer[2], key=itemgetter(0)))


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A hash of all that tokenizing depends on in a tokenizer.

    None for one written in Python, whose code is not compared.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        return None
    model = json.loads(backend.to_str())
    model["truncation"] = model["padding"] = None  # of the last call, not of the tokenizer
    state = {
        "model": json.dumps(model, ensure_ascii=False),
        "special": tokenizer.special_tokens_map,  # by name: what templates can write, a model's own names included
        "all_special": sorted(tokenizer.all_special_tokens),
        "add_bos_token": getattr(tokenizer, "add_bos_token", None),
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", None),
        "model_max_length": tokenizer.model_max_length,  # this and the next one: of labelled texts
        "model_input_names": tokenizer.model_input_names,
        "chat_template": tokenizer.chat_template,
        "probe": tokenizer("a")["input_ids"],
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
