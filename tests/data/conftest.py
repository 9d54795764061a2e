"""Tokenizers of the kinds that Llama models use, trained here on a few lines, so that no test needs a network."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qvera.config.sections import DataSection
from qvera.data import Datasets, build_datasets
from tests.data.real_templates import SMOLLM2

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nSay it.\n\n### Input:\nthis\n\n### Response:\nThe answer is yes.\n\n",
    "system\nuser\nassistant\nHello there, how are you?\n\n\n\n  indented\n\n- a list\n\tand a tab",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nName a colour. [/INST] Blue. ",
] * 3
MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Write = Callable[..., str]
Read = Callable[..., Datasets]


def _bpe_tokenizer(markers: Sequence[str], trim_offsets: bool) -> Tokenizer:
    """Byte-level BPE, as GPT-2, SmolLM2 and Llama 3 have it."""
    return Tokenizer.from_str(_trained_bpe(tuple(markers), trim_offsets))


@functools.cache
def _trained_bpe(markers: tuple[str, ...], trim_offsets: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", *markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """A byte-level tokenizer; keyword arguments choose what it has."""

    def make(
        *,
        bos: str | None = "<s>",
        eos: str | None = "</s>",
        pad: str | None = "<pad>",
        adds_bos: bool = True,
        chat_template: str | None = None,
        markers: list[str] = MARKERS,
        trim_offsets: bool = False,
    ) -> PreTrainedTokenizerFast:
        backend = _bpe_tokenizer(markers, trim_offsets)
        if adds_bos and bos:
            template = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
            )
            level = processors.ByteLevel(trim_offsets=trim_offsets)
            backend.post_processor = processors.Sequence([level, template])
        special = {name: token for name, token in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad)) if token}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def base_tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """A base model's: BOS wanted, no chat template, every marker of the named templates in its vocabulary."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def smollm2_tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """As SmolLM2-Instruct's: BOS is <|im_start|> and not added, EOS and padding are <|im_end|>."""
    return make_tokenizer(bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>", adds_bos=False, chat_template=SMOLLM2)


@pytest.fixture(scope="session")
def llama2_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: SentencePiece BPE with byte fallback, a space put in front of every text."""
    vocabulary = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # SentencePiece learns no token across a word boundary, and then encodes without splitting into words first.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *vocabulary], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The bytes had to be in the vocabulary for training; as in the real one they are tokens, not special tokens.
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=AddedToken("<s>", normalized=False, special=True),
        eos_token=AddedToken("</s>", normalized=False, special=True),
        unk_token="<unk>",
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a data file: a list of rows as .jsonl or .json, or text as it is. Returns its path."""

    def write_file(content: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def read(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> Read:
    """What rows become with these keys of ``data``."""

    def read_rows(rows: Any, tokenizer: PreTrainedTokenizerFast = base_tokenizer, **keys: Any) -> Datasets:
        return build_datasets(DataSection(path=write(rows), **keys), tokenizer)

    return read_rows
