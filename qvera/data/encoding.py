"""Text → token ids, with the token at which a given character starts; one way of doing it for every tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

HEADER, START, END = "header", "start", "end"


@dataclass(frozen=True, slots=True)
class Cut:
    """A place between two characters.

    Attributes:
        at: characters before it.
        kind: ``start`` of an answer, its ``end``, or where the ``header`` that opens it starts. A token that lies
            across the start or the end of an answer belongs to the answer.
    """

    at: int
    kind: str


class Encoder:
    """A tokenizer, and what it does about BOS, EOS and padding.

    Attributes:
        bos_id: the token that every row starts with, or None where the model wants none.
        eos_id: ends a row that has no end-of-turn token of its own.
        pad_id: fills up a batch. It is the tokenizer's, or eos where it has none: padding is masked, so any will do.
        pads_with_eos: that second case.
        splits: a text may be encoded in pieces. SentencePiece tokenizers that put a space in front of whatever they
            are given can't do that.

    Raises:
        InputError: the tokenizer has no eos token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path or "this model"
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"The tokenizer of {name} has no eos_token, so an answer could never end. Set eos_token in its "
                "tokenizer_config.json to the token that ends a text (</s>, <|endoftext|>, ...), or name another "
                "model.tokenizer."
            )
        self.tokenizer = tokenizer
        self.eos_id = int(tokenizer.eos_token_id)
        self.pads_with_eos = tokenizer.pad_token_id is None
        self.pad_id = self.eos_id if self.pads_with_eos else int(tokenizer.pad_token_id)
        self.bos_id: int | None = None
        bos = tokenizer.bos_token_id
        if bos is not None:
            # The attribute says what a config file wished for, the first id what is really done. Either is a wish.
            first = tokenizer("a")["input_ids"][:1]
            if first == [bos] or getattr(tokenizer, "add_bos_token", False) is True:
                self.bos_id = int(bos)
        probe = self._encode_batch(["a", "b"])
        ids = [token for piece in probe["input_ids"] for token in piece]
        self.splits = bool(getattr(probe, "encodings", None)) and self._decode(ids) == "ab"

    def with_bos(self, ids: list[int]) -> list[int]:
        """``ids`` with exactly one BOS in front where the model wants one; a template may have written it already."""
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def starts_with_bos(self, ids: Sequence[int] | np.ndarray) -> bool:
        """Whether the model wants a BOS and these ids have it in front."""
        return self.bos_id is not None and len(ids) > 0 and int(ids[0]) == self.bos_id

    def encode_prompt(self, text: str, starts: Sequence[int] = ()) -> list[int]:
        """The ids of a prompt, as in training: markers become their tokens, one BOS where the model wants one.

        Args:
            text: the prompt, from `ChatTemplate.prompt`.
            starts: where earlier answers start in it, from the same place.
        """
        (ids, _) = self.encode([text], [[Cut(at, START) for at in starts]])[0]
        return self.with_bos(ids)

    def encode(self, texts: Sequence[str], cuts: Sequence[Sequence[Cut]]) -> list[tuple[list[int], list[int]]]:
        """Encode texts without adding special tokens; markers written in a text become their tokens.

        Where the tokenizer `splits`, a text is encoded in pieces that begin at its answers. A prompt then has the ids
        that it has when it is generated from: in one piece, a line break before an answer can be one token when it
        ends the text and another when a word follows.

        Args:
            texts: N texts.
            cuts: for each text its cuts, in the order of ``at``.

        Returns:
            For each text its ids, and for each cut the number of tokens that lie before it.
        """
        bounds = []
        for text, row_cuts in zip(texts, cuts, strict=True):
            starts = {cut.at for cut in row_cuts if cut.kind == START} if self.splits else set()
            bounds.append(sorted({0, len(text)} | starts) if text else [0, 0])
        pieces = [
            text[low:high] for text, edges in zip(texts, bounds, strict=True) for low, high in itertools.pairwise(edges)
        ]
        batch = self._encode_batch(pieces)
        encodings = getattr(batch, "encodings", None)
        if not encodings:
            return [
                self._locate_by_prefix(text, row_cuts, list(ids))
                for text, row_cuts, ids in zip(texts, cuts, batch["input_ids"], strict=True)
            ]
        out = []
        following = iter(encodings)
        for row_cuts, edges in zip(cuts, bounds, strict=True):
            ids: list[int] = []
            positions: list[int] = []
            for low, high in itertools.pairwise(edges):
                encoding = next(following)
                while len(positions) < len(row_cuts) and row_cuts[len(positions)].at <= high:
                    cut = row_cuts[len(positions)]
                    positions.append(len(ids) + _tokens_before(encoding, cut.at - low, high - low, cut.kind))
                ids += encoding.ids
            out.append((ids, positions))
        return out

    def _encode_batch(self, texts: list[str]) -> BatchEncoding:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _locate_by_prefix(self, text: str, cuts: Sequence[Cut], ids: list[int]) -> tuple[list[int], list[int]]:
        """For tokenizers written in Python, which keep no offsets: tokens that a prefix of the text has in common."""
        positions = []
        for cut in cuts:
            if cut.at >= len(text):
                positions.append(len(ids))
                continue
            prefix = self.tokenizer(text[: cut.at], add_special_tokens=False)["input_ids"] if cut.at else []
            common = 0
            while common < min(len(prefix), len(ids)) and prefix[common] == ids[common]:
                common += 1
            positions.append(common)
        return ids, positions


def _tokens_before(encoding: _Encoding, at: int, length: int, kind: str) -> int:
    """How many tokens of a piece lie before character ``at``; see `Cut` for a token that lies across."""
    if at >= length:
        return len(encoding.ids)
    token = encoding.char_to_token(at)
    if token is None:  # no token holds this character (a normalizer dropped it, or offsets are trimmed)
        ends = (index for index, (_, end) in enumerate(encoding.offsets) if end > at)
        token = next(ends, len(encoding.ids))
    while kind == END and token < len(encoding.ids) and encoding.token_to_chars(token)[0] < at:
        token += 1
    return token


class _Encoding(Protocol):
    """What `_tokens_before` reads of a ``tokenizers.Encoding``, which has no types of its own."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def char_to_token(self, char_pos: int) -> int | None: ...

    def token_to_chars(self, token_index: int) -> tuple[int, int]: ...


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A hash of all that tokenizing depends on in a tokenizer; None for one written in Python, whose code is not compared."""
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
        "chat_template": tokenizer.chat_template,
        "probe": tokenizer("a")["input_ids"],
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
