"""Text that comes token by token is the text of all tokens, whatever the tokenizer and wherever stop strings are cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qvera.serve.text import TextStream, TokenTexts
from tests.conftest import small_tokenizer


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with ▁ and single bytes, and a decoder that takes the space from the front: as Llama-2's."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁word", "red", "s", "."]
    backend = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def streamed(texts: TokenTexts, ids: Sequence[int], stop: Sequence[str] = (), context: Sequence[int] = ()) -> list[str]:
    stream = TextStream(texts, stop, context)
    pieces = [stream.add(token) for token in ids] + [stream.finish()]
    assert stream.length == len("".join(pieces))
    return pieces


@pytest.mark.parametrize("make", [small_tokenizer, sentencepiece_like])
def test_pieces_are_the_text_of_any_tokens(make: Callable[[], Any]) -> None:
    """Random tokens: half characters, bytes that are none, and special tokens between them."""
    tokenizer = make()
    texts, chooser = TokenTexts(tokenizer), random.Random(0)
    for _ in range(300):
        ids = [chooser.randrange(len(tokenizer)) for _ in range(chooser.randint(0, 12))]
        assert "".join(streamed(texts, ids)) == texts.decode(ids)


@pytest.mark.parametrize("make", [small_tokenizer, sentencepiece_like])
def test_a_character_of_several_tokens_comes_whole(make: Callable[[], Any]) -> None:
    tokenizer = make()
    texts = TokenTexts(tokenizer)
    byte_ids = {texts.bytes_of(n): n for n in reversed(range(len(tokenizer))) if n not in texts.special}
    word = next(n for data, n in byte_ids.items() if data.strip() == b"the") if make is sentencepiece_like else None
    ids = [byte_ids[bytes([byte])] for byte in "é€😀".encode()] + ([word] if word is not None else [])
    pieces = [piece for piece in streamed(texts, ids) if piece]
    assert "".join(pieces) == texts.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    if make is small_tokenizer:
        assert pieces == ["é", "€", "😀"]


def test_text_does_not_wait_for_the_end() -> None:
    tokenizer = small_tokenizer()
    texts = TokenTexts(tokenizer)
    ids = tokenizer("the word system")["input_ids"]
    pieces = streamed(texts, ids)
    assert pieces == [texts.decode([token]) for token in ids] + [""]


def test_a_continuation_keeps_the_space_of_its_first_word() -> None:
    tokenizer = sentencepiece_like()
    texts = TokenTexts(tokenizer)
    the, word = tokenizer.convert_tokens_to_ids(["▁the", "▁word"])
    assert "".join(streamed(texts, [word, word])) == "word word"  # an answer of its own
    assert "".join(streamed(texts, [word, word], context=[the])) == " word word"


def test_the_answer_ends_before_the_first_stop_string_wherever_tokens_are_cut() -> None:
    tokenizer = small_tokenizer()
    texts, chooser = TokenTexts(tokenizer), random.Random(1)
    ends = 0
    for _ in range(500):
        text = "".join(chooser.choice("ab c") for _ in range(chooser.randint(1, 12)))
        stop = ["".join(chooser.choice("ab c") for _ in range(chooser.randint(1, 3))) for _ in range(2)]
        complete = [text.index(each) + len(each) for each in stop if each in text]
        if complete:
            ends += 1
            cut = min(
                text.index(each) for each in stop if each in text and text.index(each) + len(each) == min(complete)
            )
            expected = text[:cut]
        else:
            expected = text
        whole = tokenizer(text)["input_ids"]
        letters = [token for letter in text for token in tokenizer(letter)["input_ids"]]
        for ids in (whole, letters):
            assert "".join(streamed(texts, ids, stop)) == expected, (text, stop, ids)
    assert 100 < ends < 500


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_none() -> None:
    tokenizer = small_tokenizer()
    texts = TokenTexts(tokenizer)
    ids = [token for letter in "xabay" for token in tokenizer(letter)["input_ids"]]
    assert streamed(texts, ids, ["abc"]) == ["x", "", "", "ab", "ay", ""]


def test_a_token_is_shown_with_its_bytes() -> None:
    for tokenizer in (small_tokenizer(), sentencepiece_like()):
        texts = TokenTexts(tokenizer)
        ids = [n for n in range(len(tokenizer)) if texts.bytes_of(n) == b"\xe2"]
        assert ids
        assert texts.shown(ids[0]) == "\\xe2"
        assert texts.bytes_of(tokenizer.eos_token_id).decode() == tokenizer.eos_token
