"""The rows of PEFT's MetaMathQA comparison, with its prompt, its limits and its order.

From huggingface/peft, method_comparison/MetaMathQA (data.py, run.py, utils.py, default_training_params.json): rows of
MetaMathQA with at most 1,300 characters, in the order of the data set, each 80 of them sorted by length; a text is the
prompt and the response with nothing between; the test rows are those of GSM8K.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.common import write_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "Question: {query} Think step by step.\nAnswer:"
MOST_CHARACTERS = 1300
MOST_TOKENS = 768
BATCH_ROWS = 4
BUCKET_ROWS = 20 * BATCH_ROWS
HELD_OUT_ROWS = 200


class Question(NamedTuple):
    """A question of GSM8K as a prompt, and its solution, which ends with #### and the answer."""

    prompt: str
    solution: str


def hub_rows() -> tuple[Iterable[Mapping[str, str]], Iterable[Mapping[str, str]]]:
    """Rows of MetaMathQA (``query``, ``response``) and of GSM8K's test part (``question``, ``answer``)."""
    from datasets import load_dataset  # here: only where there is a hub

    return load_dataset("meta-math/MetaMathQA", split="train"), load_dataset("openai/gsm8k", "main", split="test")


def file_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def prepare(
    to: Path,
    train: Iterable[Mapping[str, str]],
    test: Iterable[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
) -> dict[str, Any]:
    """Write the rows of a run to ``to``.

    The steps take the first rows, as PEFT's do. The rows after them are held out, to choose learning rates with; PEFT
    has none, since it tries one rate.

    Args:
        to: is made where it does not exist.
        train: rows with ``query`` and ``response``.
        test: rows with ``question`` and ``answer``.
        tokenizer: the base model's; rows are sorted by its lengths.
        steps: of `BATCH_ROWS` rows.

    Returns:
        The data section of a recipe. The test rows are in ``test.jsonl``, for `questions`.

    Raises:
        ValueError: too few rows.
    """
    wanted = steps * BATCH_ROWS
    texts: list[str] = []
    for row in train:
        if len(f"{row['query']} {row['response']}") <= MOST_CHARACTERS:
            texts.append(PROMPT.format(query=row["query"]) + row["response"])
        if len(texts) == wanted + HELD_OUT_ROWS:
            break
    if len(texts) <= wanted:
        raise ValueError(f"{steps:,} steps and held-out rows need more than {wanted:,} rows; there are {len(texts):,}")
    ordered = in_buckets(texts[:wanted], tokenizer)
    to.mkdir(parents=True, exist_ok=True)
    write_rows(to / "test.jsonl", test)
    return {
        "path": write_rows(to / "train.jsonl", ({"text": text} for text in ordered)),
        "eval_path": write_rows(to / "held.jsonl", ({"text": text} for text in texts[wanted:])),
        "format": "text",
        "shuffle": False,
        "max_length": MOST_TOKENS,
    }


def in_buckets(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts with each `BUCKET_ROWS` of them sorted from the longest to the shortest, in tokens up to the limit."""
    ids = tokenizer(texts)["input_ids"] if texts else []
    lengths = [min(len(one), MOST_TOKENS) for one in ids]
    ordered: list[str] = []
    for start in range(0, len(texts), BUCKET_ROWS):
        bucket = range(start, min(start + BUCKET_ROWS, len(texts)))
        ordered += [texts[i] for i in sorted(bucket, key=lambda i: -lengths[i])]
    return ordered


def questions(directory: Path) -> list[Question]:
    """The test rows that `prepare` wrote."""
    rows = file_rows(directory / "test.jsonl")
    return [Question(PROMPT.format(query=row["question"]), row["answer"]) for row in rows]
