"""A recipe's ``data`` → everything that a run reads: the tokenized rows of all sources, mixed and counted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qvera.config.schema import DataSection
from qvera.data.cache import tokenized
from qvera.data.chat_template import OWN, ChatTemplate, resolve_template
from qvera.data.encoding import Encoder
from qvera.data.rows import Rows, concatenated
from qvera.data.sampler import philox_key
from qvera.data.stats import DataStats, SourceStats
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Datasets:
    """Everything that a run reads from its data.

    Attributes:
        train, eval: rows in file order, one source after the other; ``eval`` is empty where the recipe holds none out.
        stats: counts for the preview and run.json.
        template: the template that was used (for the first source of a mixture), for generation and the adapter's
        directory.
        pad_id: for `collate`.
    """

    train: Rows
    eval: Rows
    stats: DataStats
    template: ChatTemplate
    pad_id: int

    def first_rows(self, count: int) -> Rows:
        """``count`` training rows to look at: the first of each source in turn, then the second of each, and so on.

        A mask goes wrong by format and template, so a source is seen as soon as there is a row for each. Rows that a
        weight repeats come last.

        Raises:
            InputError: ``count`` is negative.
        """
        if count < 0:
            raise InputError(f"--rows {count}: takes a whole number of rows to show, such as 3.")
        turns: list[tuple[int, int, int]] = []  # (pass over the source, place within it, place among all rows)
        start = 0
        for source in self.stats.sources:
            turns += [(at // source.rows, at, start + at) for at in range(min(count, source.taken))]
            start += source.taken
        return self.train.take(np.array([row for *_, row in sorted(turns)[:count]], dtype=np.int64))


def data_sha256(datasets: Datasets) -> str:
    """SHA-256 over the tokens and masks of all rows in order: equal where two machines read the same data the same way.

    It is taken over the hashes of each row's tokens and mask, which lie beside the rows, so no row is read.
    """
    digest = hashlib.sha256()
    for rows in (datasets.train, datasets.eval):
        for column in (rows.lengths, rows.ids_hash, rows.mask_hash):
            digest.update(len(column).to_bytes(8, "little") + np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def build_datasets(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, console: Console | None = None
) -> Datasets:
    """Read, check, render and tokenize the rows that a recipe names, or find them in the cache.

    Nothing is shuffled here.

    Args:
        section: the recipe's ``data``.
        tokenizer: the base model's.
        console: where warnings and the progress bar of a long run go (default: stderr).

    Raises:
        InputError: anything wrong with the recipe's ``data``, a file, a row or the tokenizer.
    """
    encoder = Encoder(tokenizer)
    stats = DataStats(pads_with_eos=encoder.pads_with_eos)
    sections = _sources(section)
    sources = [tokenized(each, encoder, console) for each in sections]
    for number, (about, source) in enumerate(zip(sections, sources, strict=True)):
        rows = len(source.train)
        if about.weight != 1:
            source.train = source.train.take(weighted(rows, about.weight, section.seed, number))
        looks = source.format, source.template
        stats.add_source(SourceStats(about.path, about.weight, rows, len(source.train), *looks), source)
        if about.template == "auto" and source.format != "text" and source.template != OWN:
            stats.default_templates.append(source.template)
    template = resolve_template(section.template, tokenizer, sources[0].format)
    train = concatenated([source.train for source in sources])
    held_out = concatenated([source.eval for source in sources])
    stats.count(train, held_out)
    return Datasets(train, held_out, stats, template, encoder.pad_id)


def _sources(section: DataSection) -> list[DataSection]:
    """``path`` and each part of the mixture as a section of its own; ``eval_path`` belongs to the first."""
    sources = [section.replace(mixture=[])]
    for part in section.mixture:
        fraction = section.eval_fraction if section.eval_path is None else 0.0
        sources.append(section.replace(mixture=[], eval_path=None, eval_fraction=fraction, **dict(part)))
    return sources


def weighted(count: int, weight: float, seed: int, number: int) -> np.ndarray:
    """Repeat each row as its source's weight says: whole passes, and a part drawn by ``seed``; at least one row.

    Args:
        count: the source's rows.
        number: the source's place in the mixture; each draws for itself.

    Returns:
        int64: the numbers of rows, pass after pass.
    """
    passes = int(weight)
    more = round((weight - passes) * count)
    if passes == 0:
        more = max(more, 1)
    # far from the streams of the epochs (from 0 up) and of hold_out and group_by_length (from -1 down)
    words = np.random.Philox(key=philox_key(seed, 2**63 + number)).random_raw(count)
    chosen = np.sort(np.argsort(words, kind="stable")[:more])
    return np.concatenate([np.tile(np.arange(count), passes), chosen])
