"""Token ids → text as it comes, in pieces that later tokens do not change, up to a stop string. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a SentencePiece token that is one byte
_HALF = "\ufffd"  # what decoders write for an incomplete character


class TokenTexts:
    """The texts and bytes of a vocabulary's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        decoders = json.loads(decoder.__getstate__()) if decoder is not None else {}
        self._byte_level = "ByteLevel" in json.dumps(decoders)  # it may stand within a sequence of decoders
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self.size = len(tokenizer)  # tokens that it knows

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones before or after it."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of these tokens, with or without special ones."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def is_byte(self, token: int) -> bool:
        """Whether a token is one of SentencePiece's bytes, which decoders join with their neighbours."""
        return not self._byte_level and _BYTE.fullmatch(self._name(token)) is not None

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token in the middle of a text. A special token gives its name."""
        name = self._name(token)
        if token in self._added:
            return name.encode()
        if self._byte_level:
            known = all(character in _BYTE_OF for character in name)
            return bytes(_BYTE_OF[character] for character in name) if known else name.encode()
        if (byte := _BYTE.fullmatch(name)) is not None:
            return bytes.fromhex(byte[1])
        return name.replace("▁", " ").encode()

    def shown(self, token: int) -> str:
        """A token as text. Bytes that are no whole character are escaped in hex, as in OpenAI's API."""
        return self.bytes_of(token).decode("utf-8", "backslashreplace")

    def _name(self, token: int) -> str:
        name = self._tokenizer.convert_ids_to_tokens(token)
        return name if isinstance(name, str) else ""  # a row of the head that the tokenizer has no token for


_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
"""Characters of byte-level BPE (GPT-2) → bytes."""


class TextStream:
    """The text of one answer while its tokens come.

    The pieces join to the decoded answer, up to the stop string that is complete first, even if it spans tokens.
    """

    def __init__(
        self, texts: TokenTexts, stop: Sequence[str] = (), context: Sequence[int] = (), special: bool = False
    ) -> None:
        """``context``: the last tokens of a prompt that the answer continues. ``special``: shows special tokens too.

        Some tokenizers drop the space before a text's first word, which a continuation must keep.
        """
        self._special = special
        self._texts, self._stop = texts, tuple(text for text in stop if text)
        # a window: the tokens of the last piece, on which the text of the next ones may depend, and those after them
        self._ids = [token for token in context if token not in texts.special]
        self._shown = texts.decode(self._ids).rstrip(_HALF) if self._ids else ""
        self._read = len(self._ids)  # tokens of the window whose text has come
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self.length, self.stopped = 0, False  # characters decoded before a stop string; whether one was found

    def add(self, token: int) -> str:
        """The piece of text that is certain now: often that of this token, or nothing."""
        if self.stopped or (token in self._texts.special and not self._special):
            return ""
        self._ids.append(token)
        if self._texts.is_byte(token):
            return ""  # the character that it may begin, and a run of bytes that may be none, are not known yet
        return self._take(self._decode(whole=False))

    def finish(self) -> str:
        """The text that was held back, after the last token."""
        if self.stopped:
            return ""
        piece = self._take(self._decode(whole=True))
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _decode(self, whole: bool) -> str:
        """New text of the window. A half character at its end is held back unless the answer is ``whole``."""
        text = self._texts.decode(self._ids, self._special)
        certain = text if whole or not text.endswith(_HALF) else text[:-1]
        new = certain[len(self._shown) :]
        if certain is text and new:
            # the tokens of this piece are the context of the next one
            self._ids = self._ids[self._read :]
            self._read, self._shown = len(self._ids), self._texts.decode(self._ids, self._special)
        elif new:
            self._shown = certain
        return new

    def _take(self, text: str) -> str:
        """Add text to what is held, and return what can't be part of a stop string any more."""
        self.length += len(text)
        text = self._held + text
        # by their ends: the stop string that is complete first counts
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at = min(found)
            self.length -= len(text) - at
            self.stopped, self._held = True, ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that begins ``stop``, as a number of characters. All of ``stop`` does not count."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
