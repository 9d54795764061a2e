"""Text → token ids, with the token at which a given character starts; one way of doing it for every tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "start", "end"


@dataclass(frozen=True, slots=True)
class Cut:
    """A place between two characters that separates trained text from other text.

    Attributes:
        at: characters before it.
        side: ``start`` of a span or its ``end``: a token that lies across belongs to the span either way.
    """

    at: int
    side: str


class Encoder:
    """A tokenizer, and what it does about BOS, EOS and padding.

    Attributes:
        bos_id: the token that every row starts with, or None where the model wants none.
        eos_id: ends a row that has no end-of-turn token of its own.
        pad_id: fills up a batch. It is the tokenizer's, or eos where it has none: padding is masked, so any will do.
        pads_with_eos: that second case.

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

    def with_bos(self, ids: list[int]) -> list[int]:
        """``ids`` with exactly one BOS in front where the model wants one; a template may have written it already."""
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, as in training: markers become their tokens, one BOS where the model wants one."""
        return self.with_bos(list(self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    def encode(self, texts: Sequence[str], cuts: Sequence[Sequence[Cut]]) -> list[tuple[list[int], list[int]]]:
        """Encode texts without adding special tokens; markers written in a text become their tokens.

        Args:
            texts: N texts.
            cuts: for each text its cuts, in the order of ``at``.

        Returns:
            For each text its ids, and for each cut the number of tokens that lie before it.
        """
        batch = self._encode_batch(list(texts))
        encodings = getattr(batch, "encodings", None)
        out = []
        for row, (text, row_cuts) in enumerate(zip(texts, cuts, strict=True)):
            if encodings:
                out.append(self._locate(text, row_cuts, encodings[row]))
            else:
                out.append(self._locate_by_prefix(text, row_cuts, list(batch["input_ids"][row])))
        return out

    def _encode_batch(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )

    def _locate(self, text: str, cuts: Sequence[Cut], encoding: Any) -> tuple[list[int], list[int]]:
        ids = encoding.ids
        positions = []
        across = []
        for cut in cuts:
            token = _token_at(encoding, cut.at, len(text))
            if token < len(ids):
                begin = encoding.offsets[token][0] if cut.side == END else encoding.token_to_chars(token)[0]
                if begin < cut.at or self._hides_space(text, cut.at, ids[token]):
                    if cut.side == START:
                        across.append(cut.at)
                    else:
                        while token < len(ids) and encoding.offsets[token][0] < cut.at:
                            token += 1
            positions.append(token)
        if across:
            # One token would hold the end of the prompt and the start of the answer. When the model generates, the
            # prompt ends exactly here, so the row is encoded in two pieces where the tokenizer can do that.
            split = self._split(text, cuts, sorted(set(across)))
            if split is not None and self._same_text(split[0], ids):
                return split
        return ids, positions

    def _hides_space(self, text: str, at: int, token_id: int) -> bool:
        # Tokenizers that trim offsets leave a token's leading space out of them.
        if not 0 < at < len(text) or not text[at - 1].isspace() or text[at].isspace():
            return False
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return isinstance(token, str) and token[:1] in ("Ġ", "▁", "Ċ")

    def _split(self, text: str, cuts: Sequence[Cut], places: list[int]) -> tuple[list[int], list[int]] | None:
        bounds = [0, *places, len(text)]
        pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        batch = self._encode_batch(pieces)
        ids: list[int] = []
        positions: dict[int, int] = {}
        for piece, (begin, encoding) in enumerate(zip(bounds, batch.encodings, strict=False)):
            for number, cut in enumerate(cuts):
                last = piece == len(pieces) - 1
                if begin <= cut.at < bounds[piece + 1] or (last and cut.at == bounds[-1]):
                    positions[number] = len(ids) + _token_at(encoding, cut.at - begin, len(pieces[piece]))
            ids += encoding.ids
        return ids, [positions[number] for number in range(len(cuts))]

    def _same_text(self, a: list[int], b: list[int]) -> bool:
        # SentencePiece puts a space in front of every piece it is given; such a split is a different text.
        return self._decode(a) == self._decode(b)

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


def _token_at(encoding: Any, at: int, length: int) -> int:
    """The first token that ends after character ``at``."""
    if at >= length:
        return len(encoding.ids)
    token = encoding.char_to_token(at)
    if token is not None:
        return token
    # No token holds this character (a normalizer dropped it, or offsets are trimmed).
    for token, (_, end) in enumerate(encoding.offsets):
        if end > at:
            return token
    return len(encoding.ids)
