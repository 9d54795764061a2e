"""Small data sets, and what becomes of a row."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qvera.config.sections import DataSection
from qvera.data import Datasets, Example, build_datasets, data_sha256


def build(rows: list[Any], tokenizer: PreTrainedTokenizerFast, **section: Any) -> Datasets:
    """What rows in a file become with these keys of ``data``."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "rows.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return build_datasets(DataSection(path=str(path), **section), tokenizer)


def messages_of(*turns: str) -> list[dict[str, Any]]:
    """A user's and an assistant's turns, by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def one(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **section: Any) -> Example:
    return build([{"messages": messages}], tokenizer, **section).train[0]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained_text(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    return decoded(tokenizer, example.input_ids[example.trained])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: nothing depends on what a version of `tokenizers` learns from a corpus."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write_rows(directory: Path, count: int = 300) -> tuple[str, str]:
    """Conversations of very different lengths, and Alpaca rows; the same names in every directory."""
    chooser = random.Random(5)
    chats, alpaca = directory / "chats.jsonl", directory / "alpaca.json"
    with open(chats, "w", encoding="utf-8") as handle:
        for number in range(count):
            turns = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
            for _ in range(chooser.randint(1, 3)):
                turns.append({"role": "user", "content": "é question " * chooser.randint(1, 12)})
                turns.append({"role": "assistant", "content": "answer 🙂 " * chooser.randint(1, 12)})
            handle.write(json.dumps({"messages": turns}) + "\n")
    rows = [{"instruction": f"do {i}", "input": "it" * (i % 3), "output": f"done {i}"} for i in range(count // 3)]
    alpaca.write_text(json.dumps(rows), encoding="utf-8")
    return str(chats), str(alpaca)


def rows_of(*lengths: int, prefix: int = 0) -> list[Example]:
    """Rows of these lengths whose last two thirds are trained; ``prefix`` tokens are the same in all."""
    draw = np.random.default_rng(0)
    found = []
    for length in lengths:
        ids = draw.integers(3, 300, length).astype(np.int32)
        ids[:prefix] = np.arange(3, 3 + prefix)
        trained = np.arange(length) >= max(prefix + 1, length // 3)
        found.append(Example(ids, trained, "a test", np.array([], np.int32), "", None))
    return found


def same(one: Datasets, other: Datasets) -> bool:
    def plain(row: Example) -> list[Any]:
        arrays = [row.input_ids, row.trained, row.prompt_ids]
        assert [str(a.dtype) for a in arrays] == ["int32", "bool", "int32"]
        return [*(a.tolist() for a in arrays), row.source, row.prompt_text, row.reference]

    rows = [[plain(row) for part in (data.train, data.eval) for row in part] for data in (one, other)]
    return (
        rows[0] == rows[1] and one.stats.to_dict() == other.stats.to_dict() and data_sha256(one) == data_sha256(other)
    )
