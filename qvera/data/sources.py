"""A recipe's source: its files, what identifies their content, and which rows are trained on or held out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from qvera.config.schema import DataSection
from qvera.data.formats import Conversation, Text, Turn, detect_format, parse_row
from qvera.data.readers import RawRow, load_hub, local_files, read_rows
from qvera.data.sampler import philox_key
from qvera.utils.cache_dir import HashIndex
from qvera.utils.errors import InputError

TRAIN, EVAL = "train", "eval"
CHUNK_ROWS = 256
"""Raw rows that are tokenized together."""


def source_files(section: DataSection) -> list[Path] | None:
    """The local files that a source is read from, its held-out ones last; None where one of the two is a hub dataset.

    Raises:
        InputError: as `local_files`.
    """
    found: list[Path] = []
    for path in filter(None, (section.path, section.eval_path)):
        files = local_files(path)
        if files is None:
            return None
        found += files
    return found


def source_content(section: DataSection, hashes: HashIndex) -> list[list[str]] | None:
    """What identifies a source's content: names and SHA-256 of its files, or the fingerprint of a hub dataset.

    Args:
        hashes: the hashes of files that have not changed.

    Returns:
        None where nothing tells one content from another.
    """
    found: list[list[str]] = []
    for path in filter(None, (section.path, section.eval_path)):
        files = local_files(path)
        if files is not None:
            known = hashes.hashed(files, hashes.known(files), None)
            found += [[str(file), known[file]] for file in files]
            continue
        fingerprint = getattr(
            load_hub(path, section.split, section.config_name, section.revision), "_fingerprint", None
        )
        if fingerprint is None:
            return None
        found.append([path, str(fingerprint)])
    return found


def raw_rows(section: DataSection, path: str) -> Iterator[RawRow]:
    """The raw rows of ``data.path`` or ``data.eval_path``, one at a time."""
    if path == section.path or not Path(path).expanduser().exists():
        rows = read_rows(path, split=section.split, config_name=section.config_name, revision=section.revision)
    else:  # a local eval file beside a hub dataset: the hub's keys are not about it
        rows = read_rows(path)
    return itertools.islice(rows, section.limit if path == section.path else None)


def count_rows(section: DataSection, path: str) -> int:
    """How many rows `raw_rows` gives; the whole source is read for that."""
    return sum(1 for _ in raw_rows(section, path))


def hold_out(count: int, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out: bool [count], at least one of each kind where any are.

    Args:
        fraction: of them to hold out, 0 <= fraction < 1; 0 holds out none. Above 0 there must be two rows.
        seed: decides which.
    """
    held = np.zeros(count, dtype=bool)
    if fraction > 0:
        chosen = min(max(1, round(count * fraction)), count - 1)
        # The second key word keeps this stream apart from the epochs' (`sampler.order` counts them up from 0).
        words = np.random.Philox(key=philox_key(seed, -1)).random_raw(count)
        held[np.argsort(words, kind="stable")[:chosen]] = True
    return held


def chosen_rows(section: DataSection, part: str, count: int) -> Iterator[RawRow]:
    """The raw rows of the training or of the held-out part, in file order; ``count``: rows of ``data.path``."""
    limit = section.eval_limit if part == EVAL else None
    if section.eval_path is not None:
        return itertools.islice(raw_rows(section, section.path if part == TRAIN else section.eval_path), limit)
    held = hold_out(count, section.eval_fraction, section.seed)
    wanted = held if part == EVAL else ~held
    return itertools.islice(itertools.compress(raw_rows(section, section.path), wanted), limit)


def chunks_of(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """The rows in lists of `CHUNK_ROWS`."""
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


def read_prompts(path: Path, section: DataSection) -> list[Conversation]:
    """Read the prompts of a file; an answer at the end of a row is left out, the last turn is what is asked.

    Args:
        path: .txt (one prompt a line), or a data file with the columns of a training file, of which the answer's may be
            missing.
        section: says how columns are named, and the system prompt.

    Raises:
        InputError: no such file, no prompts in it, or a row that asks nothing; names file and line.
    """
    if path.suffix.lower() == ".txt":
        return _prompt_lines(path, section.system)
    conversations = []
    for row in read_rows(str(path)):
        fields = dict(row.fields)
        for question, answer in (("prompt", "completion"), ("instruction", "output")):
            asked, answered = (section.columns.get(name, name) for name in (question, answer))
            if asked in fields and not fields.get(answered):
                fields[answered] = "-"  # a row without its answer is read like a training row
        filled = replace(row, fields=fields)
        parsed = parse_row(filled, detect_format(filled, section.format, section.columns), section.system)
        if isinstance(parsed, Text):
            raise InputError(
                f"{row.source}: is plain text, which asks nothing. Expected prompts, instructions or messages."
            )
        turns = list(parsed.turns)
        while turns and turns[-1].role == "assistant":
            turns.pop()
        if not turns or turns[-1].role == "system":
            raise InputError(f"{row.source}: has no user turn to answer.")
        conversations.append(replace(parsed, turns=turns))
    return conversations


def _prompt_lines(path: Path, system: str | None) -> list[Conversation]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}).") from None
    opening = [Turn("system", system)] if system else []
    found = [
        Conversation([*opening, Turn("user", line)], f"{path.name}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise InputError(f"{path}: has no prompts in it (one a line).")
    return found
