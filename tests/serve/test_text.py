"""Text that comes token by token is the text of all tokens, whatever the tokenizer and wherever stop strings are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qvera.serve.text import TextStream, TokenTexts
from tests.conftest import small_tokenizer

SMALL = small_tokenizer()


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with ▁ and single bytes, and a decoder that takes the space from the front: as Llama-2's."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁word", "red", "s", "."]
    vocabulary = {word: n for n, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


both = pytest.mark.parametrize("tokenizer", [SMALL, sentencepiece_like()], ids=["bytes", "words"])


def streamed(texts: TokenTexts, ids: Sequence[int], stop: Sequence[str] = (), context: Sequence[int] = ()) -> list[str]:
    stream = TextStream(texts, stop, context)
    pieces = [stream.add(token) for token in ids] + [stream.finish()]
    assert stream.length == len("".join(pieces))
    return pieces


def letters_of(text: str) -> list[int]:
    """A token for each letter."""
    return [token for letter in text for token in SMALL(letter)["input_ids"]]


@both
def test_pieces_are_the_text_of_any_tokens_and_a_character_of_several_comes_whole(tokenizer: Any) -> None:
    """Random tokens: half characters, bytes that are none, and special tokens between them."""
    texts, chooser = TokenTexts(tokenizer), random.Random(0)
    for _ in range(300):
        ids = [chooser.randrange(len(tokenizer)) for _ in range(chooser.randint(0, 12))]
        assert "".join(streamed(texts, ids)) == texts.decode(ids)
    byte_ids = {texts.bytes_of(n): n for n in reversed(range(len(tokenizer))) if n not in texts.special}
    ids = [byte_ids[bytes([byte])] for byte in "é€😀".encode()]
    if tokenizer is not SMALL:
        ids.append(tokenizer.convert_tokens_to_ids("▁the"))
    pieces = [piece for piece in streamed(texts, ids) if piece]
    assert "".join(pieces) == texts.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    if tokenizer is SMALL:
        assert pieces == ["é", "€", "😀"]


@both
def test_a_token_is_shown_with_its_bytes(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    assert texts.shown(next(n for n in range(len(tokenizer)) if texts.bytes_of(n) == b"\xe2")) == "\\xe2"
    assert texts.bytes_of(tokenizer.eos_token_id).decode() == tokenizer.eos_token


def test_a_continuation_keeps_the_space_of_its_first_word() -> None:
    tokenizer = sentencepiece_like()
    texts = TokenTexts(tokenizer)
    the, word = tokenizer.convert_tokens_to_ids(["▁the", "▁word"])
    assert "".join(streamed(texts, [word, word])) == "word word"  # an answer of its own
    assert "".join(streamed(texts, [word, word], context=[the])) == " word word"


def test_text_waits_neither_for_the_end_nor_longer_than_it_may_begin_a_stop_string() -> None:
    texts, ids = TokenTexts(SMALL), SMALL("the word system")["input_ids"]
    assert streamed(texts, ids) == [*(texts.decode([token]) for token in ids), ""]
    assert streamed(texts, letters_of("xabay"), ["abc"]) == ["x", "", "", "ab", "ay", ""]


def test_the_answer_ends_before_the_first_stop_string_wherever_tokens_are_cut() -> None:
    texts, chooser, ends = TokenTexts(SMALL), random.Random(1), 0
    for _ in range(300):
        text = "".join(chooser.choice("ab c") for _ in range(chooser.randint(1, 12)))
        stop = ["".join(chooser.choice("ab c") for _ in range(chooser.randint(1, 3))) for _ in range(2)]
        complete = sorted((text.index(each) + len(each), text.index(each)) for each in stop if each in text)
        ends += bool(complete)
        expected = text[: complete[0][1]] if complete else text
        for ids in (SMALL(text)["input_ids"], letters_of(text)):
            assert "".join(streamed(texts, ids, stop)) == expected, (text, stop, ids)
    assert 60 < ends < 300
