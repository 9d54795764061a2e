"""A recipe's source: its files, what identifies their content, and which rows are trained on or held out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from qvera.config.schema import DataSection
from qvera.data.formats import Conversation, Text, detect_format, parse_row
from qvera.data.readers import RawRow, load_hub, local_files, read_file, read_lines, read_rows
from qvera.data.sampler import philox_key
from qvera.utils.cache_dir import HashIndex
from qvera.utils.errors import InputError

TRAIN, EVAL = "train", "eval"


def source_bytes(section: DataSection) -> int | None:
    """Bytes of the local files that a source is read from; None where some of it is a hub dataset.

    Raises:
        InputError: as `local_files`.
    """
    files = [local_files(path) for path in (section.path, section.eval_path) if path]
    return None if None in files else sum(file.stat().st_size for found in files for file in found or [])


def source_content(section: DataSection, hashes: HashIndex) -> list[list[str]] | None:
    """What identifies a source's content: names and SHA-256 of its files, or the fingerprint of a hub dataset.

    Args:
        hashes: the hashes of files that have not changed.

    Returns:
        None where nothing tells one content from another.
    """
    content: list[list[str]] = []
    for path in filter(None, (section.path, section.eval_path)):
        files = local_files(path)
        if files is not None:
            sha256_of = hashes.hashed(files, hashes.known(files), None)
            content += [[str(file), sha256_of[file]] for file in files]
            continue
        dataset = load_hub(path, section.split, section.config_name, section.revision)
        fingerprint = getattr(dataset, "_fingerprint", None)
        if fingerprint is None:
            return None
        content.append([path, str(fingerprint)])
    return content


def raw_rows(section: DataSection, path: str) -> Iterator[RawRow]:
    """The raw rows of ``data.path`` or ``data.eval_path``, one at a time."""
    if path == section.path or not Path(path).expanduser().exists():
        rows = read_rows(path, split=section.split, config_name=section.config_name, revision=section.revision)
    else:  # a local eval file beside a hub dataset: the hub's keys are not about it
        rows = read_rows(path)
    return itertools.islice(rows, section.limit if path == section.path else None)


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


def read_prompts(path: Path, section: DataSection) -> list[Conversation]:
    """Read the prompts of a file; an answer at the end of a row is left out, the last turn is what is asked.

    Args:
        path: .txt (one prompt a line), or a data file with the columns of a training file, of which the answer's may be
            missing.
        section: says how columns are named, and the system prompt.

    Raises:
        InputError: no such file, no prompts in it, or a row that asks nothing; names file and line.
    """
    is_text = path.suffix.lower() == ".txt"
    format, columns = ("prompt-completion", {}) if is_text else (section.format, section.columns)
    conversations = []
    for row in read_file(path, read_lines) if is_text else read_rows(str(path)):
        fields = dict(row.fields)
        for question, answer in (("prompt", "completion"), ("instruction", "output")):
            asked, answered = (columns.get(name, name) for name in (question, answer))
            if asked in fields and not fields.get(answered):
                fields[answered] = "-"  # a row without its answer is read like a training row
        filled = replace(row, fields=fields)
        parsed = parse_row(filled, detect_format(filled, format, columns), section.system)
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
