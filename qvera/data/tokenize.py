"""Conversations → examples: ids, which of them are trained, and what was cut off on the way."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..recipe import DataSection, Source
from .batches import philox_key
from .encode import END, HEADER, START, Cut, Encoder
from .examples import DataStats, Example, SourceStats, count
from .formats import Conversation, RowFormat, Text, detect_format, parse_row
from .sources import RawRow, read_rows
from .templates import ChatTemplate, Rendered, resolve_template

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

_CHUNK_ROWS = 256
_PROGRESS_ROWS = 2000


@dataclass(slots=True)
class Datasets:
    """Everything that a run reads from its data.

    Attributes:
        train, eval: rows in file order, one source after the other; ``eval`` is empty where the recipe holds none out.
        stats: counts for the preflight and run.json.
        template: the template that was used (for the first source of a mixture), for generation and the adapter's directory.
        pad_id: for `collate`.
    """

    train: list[Example]
    eval: list[Example]
    stats: DataStats
    template: ChatTemplate
    pad_id: int


def data_sha256(datasets: Datasets) -> str:
    """SHA-256 over the tokens and masks of all rows in order: equal where two machines read the same data the same way."""
    digest = hashlib.sha256()
    for example in [*datasets.train, *datasets.eval]:
        for array in (example.input_ids, example.trained):
            digest.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def build_datasets(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, console: Console | None = None
) -> Datasets:
    """Read, check, render and tokenize the rows that a recipe names. Nothing is shuffled here.

    Args:
        section: the recipe's ``data``.
        tokenizer: the base model's.
        console: where the progress bar of a long run goes (default: stderr).

    Raises:
        InputError: anything wrong with the recipe's ``data``, a file, a row or the tokenizer.
    """
    encoder = Encoder(tokenizer)
    stats = DataStats()
    train: list[Example] = []
    held_out: list[Example] = []
    first: ChatTemplate | None = None
    for number, source in enumerate(_sources(section)):
        rows, eval_rows, template = _read_source(source, encoder, stats, console)
        first = first or template
        taken = weighted(rows, source.weight, section.seed, number)
        stats.sources.append(SourceStats(source.path, source.weight, len(rows), len(taken)))
        train += taken
        held_out += eval_rows
    assert first is not None
    count(stats, train, held_out)
    return Datasets(train, held_out, stats, first, encoder.pad_id)


def _sources(section: DataSection) -> list[DataSection]:
    """``path`` and each part of the mixture as a section of its own; ``eval_path`` belongs to the first."""
    sources = [replace(section, mixture=[])]
    for part in section.mixture:
        own = {f.name: getattr(part, f.name) for f in fields(Source)}
        fraction = section.eval_fraction if section.eval_path is None else 0.0
        sources.append(replace(section, mixture=[], eval_path=None, eval_fraction=fraction, **own))
    return sources


def _read_source(
    section: DataSection, encoder: Encoder, stats: DataStats, console: Console | None
) -> tuple[list[Example], list[Example], ChatTemplate]:
    """The training and held-out rows of one source, and its template; counts into ``stats``."""
    rows = _read(section, section.path)
    row_format = detect_format(rows[0], section.format, section.columns)
    template = resolve_template(section.template, encoder.tokenizer, row_format.name)
    stats.add_source(row_format.name, template.name, row_format.unused, encoder.pads_with_eos)
    tokenize = _Tokenizer(section, encoder, template, stats, console)
    if section.eval_path is not None:
        if section.eval_path == section.path:
            raise InputError(
                f"data.eval_path: {section.path} is data.path too, so nothing would be held out. Name another file, or "
                "set data.eval_fraction instead."
            )
        train_rows, eval_rows = rows, _read(section, section.eval_path)
        eval_format = detect_format(eval_rows[0], section.format, section.columns)
    else:
        train_rows, eval_rows = hold_out(rows, section.eval_fraction, section.seed)
        eval_format = row_format
    eval_rows = eval_rows[: section.eval_limit]
    train = tokenize(train_rows, row_format, section.path, "training")
    held_out = tokenize(eval_rows, eval_format, section.eval_path or section.path, "held-out") if eval_rows else []
    return train, held_out, template


def weighted(rows: list[Example], weight: float, seed: int, number: int) -> list[Example]:
    """Each row as often as its source's weight says, at least one row in all: whole passes, and a part drawn by ``seed``.

    Args:
        number: the source's place in the mixture; each draws for itself.
    """
    passes = int(weight)
    more = round((weight - passes) * len(rows))
    if passes == 0:
        more = max(more, 1)
    # far from the streams of the epochs (from 0 up) and of hold_out and group_by_length (from -1 down)
    words = np.random.Philox(key=philox_key(seed, 2**63 + number)).random_raw(len(rows))
    chosen = np.sort(np.argsort(words, kind="stable")[:more])
    return rows * passes + [rows[i] for i in chosen]


def hold_out(rows: list[RawRow], fraction: float, seed: int) -> tuple[list[RawRow], list[RawRow]]:
    """Split rows into training and held-out ones; both keep file order, both have at least one row.

    Args:
        rows: all rows.
        fraction: of them to hold out, 0 <= fraction < 1; 0 holds out none.
        seed: decides which.

    Raises:
        InputError: there is only one row to split.
    """
    if fraction <= 0:
        return rows, []
    if len(rows) < 2:
        raise InputError(
            f"data.eval_fraction: {rows[0].source} is the only row, so none can be held out. Add rows, or set "
            "data.eval_path, or remove data.eval_fraction."
        )
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    # The second key word keeps this stream apart from the epochs' (batches.order counts them up from 0).
    words = np.random.Philox(key=philox_key(seed, -1)).random_raw(len(rows))
    chosen = set(np.argsort(words, kind="stable")[:count].tolist())
    return (
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )


def _read(section: DataSection, path: str) -> list[RawRow]:
    if path == section.path or not Path(path).expanduser().exists():
        rows = read_rows(path, split=section.split, config_name=section.config_name, revision=section.revision)
    else:  # a local eval file beside a hub dataset: the hub's keys are not about it
        rows = read_rows(path)
    return list(itertools.islice(rows, section.limit if path == section.path else None))


class _Tokenizer:
    """One pass over the rows of a data set; counts into ``stats``."""

    def __init__(
        self,
        section: DataSection,
        encoder: Encoder,
        template: ChatTemplate,
        stats: DataStats,
        console: Console | None,
    ) -> None:
        self.section = section
        self.encoder = encoder
        self.template = template
        self.stats = stats
        self.console = console

    def __call__(self, rows: list[RawRow], row_format: RowFormat, path: str, purpose: str) -> list[Example]:
        examples: list[Example] = []
        hollow: list[str] = []
        for chunk in self._chunks(rows, path):
            parsed = [parse_row(row, row_format, self.section.system) for row in chunk]
            full = []
            for row in parsed:
                if self._is_hollow(row):
                    hollow.append(row.source)
                else:
                    full.append(row)
            if not hollow:  # otherwise only the rest of the list of such rows is of interest
                examples += self._encode(full)
        if hollow:
            shown = ", ".join(hollow[:5]) + (f" and {len(hollow) - 5} more" if len(hollow) > 5 else "")
            what = "its answer (or text) is empty" if len(hollow) == 1 else "their answers (or texts) are empty"
            if self.section.train_on == "last" or row_format.name in ("messages", "sharegpt"):
                what += ", or there is no assistant turn to train"
            raise InputError(
                f"{shown}: {len(hollow)} row{'s' if len(hollow) > 1 else ''} with no token to train on: {what}. "
                "Fill in or remove them."
            )
        if not examples:
            raise InputError(
                f"{path}: no {purpose} row is left: none of all {len(rows)} has a trained token within data.max_length "
                f"({self.section.max_length}). Raise it, or set data.max_source_length below it, or change data.too_long."
            )
        return examples

    def _chunks(self, rows: list[RawRow], path: str) -> Iterator[list[RawRow]]:
        chunks = [rows[start : start + _CHUNK_ROWS] for start in range(0, len(rows), _CHUNK_ROWS)]
        if len(rows) <= _PROGRESS_ROWS:
            yield from chunks
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("Tokenizing {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console or Console(stderr=True), transient=True) as progress:
            task = progress.add_task(path, total=len(rows))
            for chunk in chunks:
                yield chunk
                progress.update(task, advance=len(chunk))

    def _trains(self, conversation: Conversation) -> list[int]:
        """The turns of a conversation that are trained."""
        answers = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        if self.section.train_on == "last":
            answers = answers[-1:]
        return [i for i in answers if conversation.turns[i].trained is not False]

    def _is_hollow(self, row: Conversation | Text) -> bool:
        if isinstance(row, Text):
            return not row.text.strip()
        if self.section.train_on == "all":
            return not any(turn.content.strip() for turn in row.turns)
        turns = [row.turns[i] for i in self._trains(row)]
        return not any(turn.content.strip() or turn.extra.get("tool_calls") for turn in turns)

    def _encode(self, rows: list[Conversation | Text]) -> list[Example]:
        layouts: list[tuple[str, list[Cut], Rendered | None]] = []
        for row in rows:
            self.stats.spelled_rows += self._spells(row)
            if isinstance(row, Text):
                layouts.append((row.text, [], None))
                continue
            needed = [] if self.section.train_on == "all" else self._trains(row)
            rendered = self.template.lay_out(row, needed)
            cuts = []
            for answer in rendered.answers:
                cuts += [Cut(answer.header, HEADER), Cut(answer.start, START), Cut(answer.end, END)]
            layouts.append((rendered.text, cuts, rendered))
        encoded = self.encoder.encode([text for text, _, _ in layouts], [cuts for _, cuts, _ in layouts])
        examples = []
        for row, (text, _, layout), (ids, positions) in zip(rows, layouts, encoded, strict=True):
            examples += self._example(row, text, layout, ids, positions)
        return examples

    def _spells(self, row: Conversation | Text) -> bool:
        texts = [row.text] if isinstance(row, Text) else [t.content + (t.context or "") for t in row.turns]
        return any(self.template.spells_marker(text) for text in texts)

    def _example(
        self, row: Conversation | Text, text: str, rendered: Rendered | None, ids: list[int], positions: list[int]
    ) -> list[Example]:
        with_bos = self.encoder.with_bos(ids)
        shift = len(with_bos) - len(ids)
        prompt_ids: list[int] = []
        prompt_text, reference, header = "", None, 0
        if rendered is None or self.section.train_on == "all":
            trained = np.ones(len(with_bos), dtype=bool)
            trained[:shift] = False
        else:
            trained = np.zeros(len(with_bos), dtype=bool)
        if rendered is None:
            append_eos = with_bos[-1:] != [self.encoder.eos_id]
        else:
            assert isinstance(row, Conversation)
            append_eos = rendered.append_eos
            wanted = self._trains(row)
            for number, answer in enumerate(rendered.answers):
                opening, start, end = (position + shift for position in positions[3 * number : 3 * number + 3])
                if answer.turn in wanted:
                    if not trained.any():
                        header = start - opening
                    trained[start:end] = True
                if answer.turn == len(row.turns) - 1:
                    prompt_ids, prompt_text = with_bos[:start], text[: answer.start]
                    reference = row.turns[answer.turn].content
            if append_eos and _answer_is_untrained(row, wanted, self.section.train_on):
                append_eos = False
        if append_eos:
            with_bos = [*with_bos, self.encoder.eos_id]
            trained = np.append(trained, True)
        trained[:1] = False
        if not trained.any():
            raise InputError(f"{row.source}: no token to train on: the row is a single token. Remove it.")
        whole, prompt = np.asarray(with_bos, np.int32), np.asarray(prompt_ids, np.int32)
        return self._fitted(Example(whole, trained, row.source, prompt, prompt_text, reference), header)

    def _fitted(self, whole: Example, header: int) -> list[Example]:
        """A tokenized row at the lengths that the recipe allows: itself, shorter, in several parts, or nothing.

        Args:
            header: tokens right before the first trained one that open the answer.
        """
        section = self.section
        first = int(np.argmax(whole.trained))
        keep = np.ones(len(whole.trained), dtype=bool)
        if section.max_source_length is not None and first > section.max_source_length:
            # The opening of the answer ("### Response:") stays, or the model would learn to answer without being asked.
            header = min(header, section.max_source_length)
            keep[section.max_source_length - header : first - header] = False
        if section.max_target_length is not None:
            keep[first + section.max_target_length :] = False
        asked = (
            keep.copy()
        )  # an answer is asked for with all of its prompt, unless that loses its start in training too
        kept, limit = np.flatnonzero(keep), section.max_length
        if len(kept) > limit:
            if section.too_long == "drop":
                self._drop(whole, f"longer than data.max_length ({limit})")
                return []
            if section.too_long == "split":
                return self._split(whole, kept)
            if section.too_long == "cut-start":
                bos = int(self.encoder.starts_with_bos(whole.input_ids))
                keep[kept[bos : len(kept) - limit + bos]] = False
                asked = keep
            else:
                keep[kept[limit:]] = False
        if keep.all():
            return [whole]
        self.stats.truncated_rows += 1
        self.stats.truncated_tokens += int((~keep).sum())
        trained = whole.trained[keep]
        trained[:1] = False  # nothing stands before it any more
        if not trained.any():
            self._drop(whole, "cut to length, without a trained token")
            return []
        prompt_ids = whole.prompt_ids[asked[: len(whole.prompt_ids)]]
        return [replace(whole, input_ids=whole.input_ids[keep], trained=trained, prompt_ids=prompt_ids)]

    def _drop(self, row: Example, reason: str) -> None:
        self.stats.dropped.setdefault(reason, []).append(row.source)

    def _split(self, whole: Example, kept: np.ndarray) -> list[Example]:
        """The tokens ``kept`` of a row in consecutive parts of max_length, each after the row's BOS if it has one.

        Only parts with a trained token are of use. None of them can be answered as the row could, so they have no prompt.
        """
        bos = kept[: int(self.encoder.starts_with_bos(whole.input_ids))]
        rest = kept[len(bos) :]
        size = self.section.max_length - len(bos)
        parts = [np.concatenate([bos, rest[start : start + size]]) for start in range(0, len(rest), size)]
        nothing = np.zeros(0, np.int32)
        found = []
        for part in parts:
            trained = whole.trained[part].copy()
            trained[:1] = False
            if trained.any():
                found.append(Example(whole.input_ids[part], trained, whole.source, nothing, "", None))
        self.stats.split_rows += 1
        self.stats.split_parts += len(found)
        return found


def _answer_is_untrained(row: Conversation, wanted: list[int], train_on: str) -> bool:
    """The last turn is not trained, so there is nothing for an appended eos to teach."""
    return train_on != "all" and len(row.turns) - 1 not in wanted
