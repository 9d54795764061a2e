"""Conversations and texts → examples: their ids, which of them are trained, and what was cut off."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from qvera.config.sections import DataSection
from qvera.data.chat_template import MARKERS, OWN, AnswerSpan, ChatTemplate, resolve_template, shared
from qvera.data.conversations import PREFERENCES, Conversation, RowFormat, Text, Turn, parse_row
from qvera.data.images import StoredImage, images_of
from qvera.data.readers import RawRow
from qvera.data.rows import Example, record_batch
from qvera.utils.errors import InputError
from qvera.utils.formatting import counted, first_of

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Bounds = tuple[int, int, int]
"""The start of an answer's header, the start of the answer, and its end, in characters or in tokens."""


class Encoder:
    """A tokenizer, with its BOS, EOS and padding. ``has_answers``: rows have answers, which end with eos.

    Raises InputError: there is no eos token although rows have answers, or neither an eos nor a pad token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, has_answers: bool = True) -> None:
        if has_answers:
            require_eos(tokenizer)
        self.tokenizer, self.images = tokenizer, images_of(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id  # ends a row without an end-of-turn token of its own
        self.pads_with_eos = tokenizer.pad_token_id is None  # padding is masked, so any token will do
        self.pad_id = pad_id_of(tokenizer)
        self.opening: list[int] = []  # what the model wants in front of a row: BOS, two tokens in GLM-4, or nothing
        bos, ids = tokenizer.bos_token_id, tokenizer("a")["input_ids"]
        if bos is None:
            plain = tokenizer("a", add_special_tokens=False)["input_ids"]
            self.opening = ids[: -len(plain)] if plain and ids[-len(plain) :] == plain else []
        # The attribute says what a config file wished for, the first id what is really done. Either is a wish.
        elif ids[:1] == [bos] or getattr(tokenizer, "add_bos_token", False) is True:
            self.opening = [int(bos)]
        probe = self._encode_batch(["a", "b"])
        ids = list(itertools.chain(*probe["input_ids"]))
        # whether a text may be encoded in parts: some SentencePiece tokenizers put a space in front of each
        self.splits = bool(getattr(probe, "encodings", None)) and decode(tokenizer, ids) == "ab"

    def sha256(self) -> str | None:
        """A hash of everything in the tokenizer that tokenizing depends on.

        None for a tokenizer written in Python, whose code is not compared.
        """
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not getattr(tokenizer, "is_fast", False) or backend is None:
            return None
        model = json.loads(backend.to_str())
        model["truncation"] = model["padding"] = None  # of the last call, not of the tokenizer
        state = {
            "model": json.dumps(model, ensure_ascii=False),
            "special": tokenizer.special_tokens_map,  # by name: what templates can write, a model's own names included
            "all_special": sorted(tokenizer.all_special_tokens),
            "add_bos_token": getattr(tokenizer, "add_bos_token", None),
            "split_special_tokens": getattr(tokenizer, "split_special_tokens", None),
            "model_max_length": tokenizer.model_max_length,  # this and the next one: of labelled texts
            "model_input_names": tokenizer.model_input_names,
            "chat_template": tokenizer.chat_template,
            "probe": tokenizer("a")["input_ids"],
            "images": None if self.images is None else self.images.sha256(),
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def with_bos(self, ids: list[int]) -> list[int]:
        """``ids`` with exactly one BOS in front if the model wants one. A template may have written it already."""
        return ids if ids[: len(self.opening)] == self.opening else [*self.opening, *ids]

    def encode_prompt(self, text: str, starts: Sequence[int] = (), images: Sequence[StoredImage] = ()) -> list[int]:
        """The ids of a prompt as in training; ``text`` and ``starts`` are from `ChatTemplate.prompt`."""
        whole, places = self.expand(text, [(at, at, at) for at in starts], images, "the prompt")
        ((ids, _),) = self.encode([whole], [places])
        return self.with_bos(ids)

    def images_in(self, turns: Sequence[Turn], source: str) -> tuple[StoredImage, ...]:
        """The images of a conversation, in order. Raises InputError where the model reads none."""
        found = tuple(StoredImage(image, source, self.images) for turn in turns for image in turn.images)
        if found and self.images is None:
            raise InputError(
                f"{source}: holds an image, and this base is taken for text: it would not see it. Take one that reads "
                "images (Gemma 3 and 4, Qwen2.5-VL, Qwen3-VL, Qwen3.5, Idefics 3, SmolVLM, LFM2-VL), or remove it."
            )
        return found

    def expand(
        self, text: str, answers: Sequence[Bounds], images: Sequence[StoredImage], source: str
    ) -> tuple[str, list[Bounds]]:
        """Put the tokens of each image into its place. Returns the longer text, and the answers' bounds in it.

        Raises InputError as `ImageTextProcessor.expand`.
        """
        if self.images is None:
            return text, list(answers)
        whole, ends = self.images.expand(text, images, source)

        def moved(at: int) -> int:
            return next((at - old + new for old, new in reversed(ends) if old <= at), at)

        return whole, [(moved(header), moved(start), moved(end)) for header, start, end in answers]

    def encode(self, texts: Sequence[str], answers: Sequence[Sequence[Bounds]]) -> list[tuple[list[int], list[Bounds]]]:
        """Encode texts without adding special tokens. Markers written in a text become their tokens.

        If the tokenizer `splits`, each answer starts a part that is encoded by itself. So a prompt has the same ids
        here as in generation: encoded together, a line break before an answer could become another token. A token
        across the start or the end of an answer belongs to the answer.

        Args:
            answers: for each text, the bounds of its answers in characters, in order.

        Returns:
            For each text its ids, and the bounds of its answers in tokens.
        """
        # Where each text is cut into parts: at its two ends, and where an answer starts.
        edges = []
        for text, bounds in zip(texts, answers, strict=True):
            starts = {start for _, start, _ in bounds} if self.splits else set()
            edges.append([*sorted({0} | starts - {len(text)}), len(text)])
        parts = [
            text[a:b] for text, row_edges in zip(texts, edges, strict=True) for a, b in itertools.pairwise(row_edges)
        ]
        batch = self._encode_batch(parts)
        encodings = getattr(batch, "encodings", None)
        if not encodings:
            rows = zip(texts, answers, batch["input_ids"], strict=True)
            return [(list(ids), self._bounds_by_prefix(text, bounds, ids)) for text, bounds, ids in rows]
        # Join the parts of each text again. Offsets count from the start of a part, so ``low`` is added to them.
        following = iter(encodings)
        out = []
        for bounds, row_edges in zip(answers, edges, strict=True):
            ids: list[int] = []
            spans: list[tuple[int, int]] = []  # of each token, in characters of the text
            for low, encoding in zip(row_edges[:-1], following, strict=False):
                ids += encoding.ids
                # a space that trimmed offsets put at its own beginning still belongs to this part
                spans += [(low + start, low + max(end, 1)) for start, end in encoding.offsets]
            out.append((ids, [_in_tokens(spans, answer) for answer in bounds]))
        return out

    def _encode_batch(self, texts: list[str]) -> BatchEncoding:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )

    def _bounds_by_prefix(self, text: str, answers: Sequence[Bounds], ids: Sequence[int]) -> list[Bounds]:
        """Find bounds without offsets, which Python tokenizers lack: count the tokens that a prefix has in common."""

        def tokens_before(at: int) -> int:
            if at >= len(text):
                return len(ids)
            return shared(self.tokenizer(text[:at], add_special_tokens=False)["input_ids"], ids) if at else 0

        return [(tokens_before(header), tokens_before(start), tokens_before(end)) for header, start, end in answers]


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without an end-of-sequence token (InputError), for models that answer."""
    if tokenizer.eos_token_id is None and tokenizer.mask_token is not None:
        raise InputError(
            f"{tokenizer.name_or_path or 'The model'}: is an encoder, as its mask token shows, and writes no text. Set "
            "task: sequence-classification (`qvera init --task`), or take a language model."
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} has no end-of-sequence token, so no answer "
            "could ever end. Set eos_token in its tokenizer_config.json to the token that ends a text (</s>, "
            "<|endoftext|>, ...), or name another model.tokenizer."
        )


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up a batch: pad, or else eos. InputError if the tokenizer has neither."""
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if found is None:
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} has no pad_token and no eos_token, so rows of "
            "different lengths can't stand in one batch. Set model.pad_token to one of its tokens."
        )
    return int(found)


def own_turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The token that ends an answer in the tokenizer's own chat template; empty if it has none, or ends no answer.

    In a base model it may be another one than eos, which ends a text: Qwen2.5's are <|im_end|> and <|endoftext|>.
    """
    if not tokenizer.chat_template:
        return set()
    with contextlib.suppress(InputError):  # it is not made for this conversation
        template = resolve_template(OWN, tokenizer)
        text, (answer,) = template.lay_out(Conversation([Turn("user", "x"), Turn("assistant", "x")], "a probe"), [1])
        if answer.marked:
            return {tokenizer(text[answer.start : answer.end], add_special_tokens=False)["input_ids"][-1]}
    return set()


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer in templates that the tokenizer may be used with: its own, and the named ones."""
    named = tokenizer.convert_tokens_to_ids([markers[-1] for markers in MARKERS.values()])
    return own_turn_end(tokenizer) | set(named) - {None, tokenizer.unk_token_id}


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of these tokens, special ones included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _in_tokens(spans: list[tuple[int, int]], answer: Bounds) -> Bounds:
    """An answer's bounds in tokens. ``spans``: each token's place in the text, in order."""
    header, start, end = (bisect.bisect_right(spans, at, key=itemgetter(1)) for at in answer)  # tokens that end by then
    return header, start, max(end, bisect.bisect_left(spans, answer[2], key=itemgetter(0)))


@dataclass(slots=True)
class RowCounts:
    """Counts of raw rows that were cut, split or dropped. ``dropped`` maps each reason to the rows' sources."""

    truncated_rows: int = 0
    truncated_tokens: int = 0
    truncated_targets: int = 0  # of these tokens, those that would have been trained
    split_rows: int = 0
    split_parts: int = 0
    special_token_rows: int = 0
    own_system_rows: int = 0  # rows with a system prompt of their own, though data.system is set
    unwritten_reasoning_rows: int = 0  # rows whose reasoning the template leaves out, though all text is trained
    unanswered_rows: int = 0  # conversations that end with a user's or system turn, which is not trained
    silent: dict[str, list[str]] = field(default_factory=dict)  # role → sources of rows in which it says nothing
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: RowCounts) -> None:
        """Add the counts of ``other``, whose rows come after these."""
        for one in fields(RowCounts):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, int):
                setattr(self, one.name, mine + theirs)
            else:
                for reason, sources in theirs.items():
                    mine.setdefault(reason, []).extend(sources)


@dataclass(slots=True)
class TokenizedChunk:
    """Some consecutive raw rows, tokenized. ``batch`` is None if there are empty rows or an error."""

    batch: pa.RecordBatch | None = None
    counts: RowCounts = field(default_factory=RowCounts)
    empty_rows: list[str] = field(default_factory=list)
    """Sources of rows without a token to train on."""
    error: str = ""


class RowTokenizer:
    """Turns raw rows of one format into examples."""

    def __init__(self, section: DataSection, encoder: Encoder, template: ChatTemplate, row_format: RowFormat) -> None:
        self.section, self.encoder, self.template, self.row_format = section, encoder, template, row_format
        self._counts = RowCounts()
        self._counted: set[tuple[str, str]] = set()

    def tokenize_chunk(self, rows: Sequence[RawRow]) -> TokenizedChunk:
        """Check and tokenize consecutive rows."""
        chunk, section = TokenizedChunk(), self.section
        try:
            parsed: list[Any] = [parse_row(row, self.row_format, section.system, section.label_names) for row in rows]
            chunk.empty_rows = [row.source for row in parsed if self._is_empty(row)]
            if not chunk.empty_rows:
                examples, chunk.counts = self.encode(parsed)
                chunk.batch = record_batch(examples)
        except InputError as error:
            chunk.error = str(error)
        return chunk

    def encode(self, rows: Sequence[Any]) -> tuple[list[Example], RowCounts]:
        """The rows' examples in order, and what was cut, split and dropped.

        Raises InputError: the template refuses a row, or rewrites its answers.
        """
        self._counts, self._counted = RowCounts(), set()
        if self.row_format.name in PREFERENCES:
            if shown := next((row for row in rows if any(turn.images for turn in row.turns)), None):
                raise InputError(f"{shown.source}: holds an image; preferences are read as text only. Remove the row.")
            return self._preferences([row for row in rows if isinstance(row, Conversation)]), self._counts
        return list(itertools.chain(*self._encode(rows))), self._counts

    def _encode(self, rows: Sequence[Conversation | Text]) -> Iterator[list[Example]]:
        """Yields the examples of one row at a time: none, one or several."""
        rendered: list[tuple[str, list[AnswerSpan]]] = []
        shown: list[tuple[StoredImage, ...]] = []
        for row in rows:
            shown.append(() if isinstance(row, Text) else self.encoder.images_in(row.turns, row.source))
            if isinstance(row, Text):
                texts = [row.text]
                rendered.append((row.text, []))
            else:
                texts = [turn.text for turn in row.turns]
                if self.section.system not in (None, "", row.turns[0].content):
                    self._count("own_system_rows", row.source)
                for turn in row.turns:
                    if turn.role in ("user", "assistant") and not (turn.text.strip() or turn.images or turn.extra):
                        self._counts.silent.setdefault(turn.role, []).append(row.source)
                self._counts.unanswered_rows += (
                    row.turns[-1].role in ("user", "system") and self.section.train_on != "all"
                )
                needed = [] if self.section.train_on == "all" else self._trained_turns(row)
                text, answers = self.template.lay_out(row, needed)
                # where an answer alone is trained, a row whose reasoning is missing is refused
                if self.section.train_on == "all" and any(turn.reasoning not in text for turn in row.turns):
                    self._count("unwritten_reasoning_rows", row.source)
                rendered.append((text, answers))
            if any(map(self.template.special.search, texts)):
                self._count("special_token_rows", row.source)
        expanded = [
            self.encoder.expand(text, [(span.header, span.start, span.end) for span in answers], images, row.source)
            for row, (text, answers), images in zip(rows, rendered, shown, strict=True)
        ]
        encoded = self.encoder.encode([text for text, _ in expanded], [places for _, places in expanded])
        for row, (text, answers), images, (ids, bounds) in zip(rows, rendered, shown, encoded, strict=True):
            yield self._example(row, text, answers, images, ids, bounds)

    def _preferences(self, rows: Sequence[Conversation]) -> list[Example]:
        """A pair is encoded as two rows. It is left out if either of them is."""
        others = [replace(row, turns=[*row.turns[:-1], row.rejected]) for row in rows if row.rejected is not None]
        # One batch for both sides; the rejected ones come last, in the order of their pairs.
        encoded = self._encode([*rows, *others])
        own, rejected = list(itertools.islice(encoded, len(rows))), iter(list(encoded))
        found = []
        for row, examples in zip(rows, own, strict=True):
            if row.rejected is None:
                judged = [replace(_answered(example), desirable=row.desirable) for example in examples]
                # a bad answer is none that others are compared with
                found += judged if row.desirable else [replace(example, reference=None) for example in judged]
            elif both := [*examples, *next(rejected)]:
                found += self._pair(both)
        # both rows of a pair may have been left out, which is one row of the data
        self._counts.dropped = {why: list(dict.fromkeys(lost)) for why, lost in self._counts.dropped.items()}
        return found

    def _pair(self, both: list[Example]) -> list[Example]:
        """Join a pair's two rows; empty if one of them was dropped or both are the same."""
        if len(both) < 2:
            return []
        chosen, rejected = map(_answered, both)
        # tokens of the prompt that merge with an answer belong to that answer, as in TRL
        start = min(chosen.answer_start, rejected.answer_start)
        same = chosen.input_ids[:start] == rejected.input_ids[:start]
        start = start if same.all() else int(np.argmin(same))
        ids, rejected_ids = chosen.input_ids, rejected.input_ids[start:]
        if start == 0 or np.array_equal(ids[start:], rejected_ids):
            self._drop(chosen, "chosen and rejected are the same" if start else "without a common prompt")
            return []
        return [replace(chosen, trained=np.arange(len(ids)) >= start, rejected_ids=rejected_ids)]

    def empty_rows_message(self, sources: Sequence[str]) -> str:
        """The error text for rows without a token to train on."""
        what = "its answer (or text) is empty" if len(sources) == 1 else "their answers (or texts) are empty"
        if self.section.train_on == "last" or self.row_format.name in ("messages", "sharegpt"):
            what += ", or there is no assistant turn to train"
        rows = f"{first_of(sources, 5)}: {counted(len(sources), 'row')} with no token to train on"
        return f"{rows}: {what}. Fill in or remove them."

    def _trained_turns(self, conversation: Conversation) -> list[int]:
        answers = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        if self.section.train_on == "last" or self.row_format.name in PREFERENCES:
            answers = answers[-1:]
        turns = conversation.turns
        return [i for i in answers if turns[i].trained or (turns[i].trained is None and not turns[i].in_prompt)]

    def _is_empty(self, row: Any) -> bool:
        if isinstance(row, Text):
            return not row.text.strip()
        if self.section.train_on == "all":
            return not any(turn.content.strip() for turn in row.turns)
        turns = [row.turns[i] for i in self._trained_turns(row)]
        return not any(turn.content.strip() or turn.extra.get("tool_calls") for turn in turns)

    def _example(
        self,
        row: Conversation | Text,
        text: str,
        answers: list[AnswerSpan],
        images: tuple[StoredImage, ...],
        ids: list[int],
        bounds: list[Bounds],
    ) -> list[Example]:
        input_ids = self.encoder.with_bos(ids)
        # A BOS in front moves all bounds by one.
        shift = len(input_ids) - len(ids)
        prompt_ids: list[int] = []
        prompt_text, reference, header = "", None, 0
        if isinstance(row, Text):
            trained = np.ones(len(input_ids), dtype=bool)
            append_eos = input_ids[-1:] != [self.encoder.eos_id]
        else:
            train_all, wanted, last = self.section.train_on == "all", self._trained_turns(row), len(row.turns) - 1
            trained = np.full(len(input_ids), train_all)
            # behind an answer that is not trained an eos would teach nothing
            is_open = bool(answers) and answers[-1].turn == last and not answers[-1].marked
            append_eos = is_open and (last in wanted or (train_all and row.turns[last].trained is not False))
            # The prompt and the reference are those of the last turn; ``header`` is of the first trained answer.
            for answer, answer_bounds in zip(answers, bounds, strict=True):
                opening, start, end = (token + shift for token in answer_bounds)
                if answer.turn in wanted:
                    header = header if trained.any() else start - opening
                    trained[start:end] = True
                elif row.turns[answer.turn].trained is False:
                    trained[start:end] = False
                if answer.turn == last:
                    prompt_ids, prompt_text = input_ids[:start], text[: answer.start]
                    reference = row.turns[last].content if row.about is None else None
                    if reference is not None and row.turns[last].extra.get("tool_calls"):
                        written = input_ids[start:end]  # by the template, which writes calls in its own way
                        reference = self.encoder.tokenizer.decode(written, skip_special_tokens=True).strip()
            if not prompt_ids:  # nothing to ask with: as text without a prompt
                prompt_text, reference = "", None
        if append_eos:
            assert self.encoder.eos_id is not None  # rows with answers ask for one
            input_ids = [*input_ids, self.encoder.eos_id]
            trained = np.append(trained, True)
        # The first token has nothing before it that could predict it, and what opens every row is not to be learnt.
        trained[: max(1, shift)] = False
        if not trained.any():
            raise InputError(f"{row.source}: no token to train on: the row is a single token. Remove it.")
        whole, prompt = np.asarray(input_ids, np.int32), np.asarray(prompt_ids, np.int32)
        if images and self.encoder.images is not None:
            trained &= self.encoder.images.token_types(whole) == 0
        of_row = prompt_text, reference, row.owner
        about = None if isinstance(row, Text) else row.about
        example = Example(whole, trained, row.source, prompt, *of_row, images=images, about=about)
        return self._fitted(example, header)

    def _fitted(self, whole: Example, header: int) -> list[Example]:
        """The row at the lengths that the recipe allows: itself, shorter, in parts, or nothing.

        ``header``: tokens right before the first trained one that open the answer.
        """
        section, counts = self.section, self._counts
        limit, too_long = section.max_length, section.too_long
        source, target, first = section.max_source_length, section.max_target_length, whole.answer_start
        # First the limits of the prompt and of the answer, then the limit of the whole row.
        keep = np.ones(len(whole.trained), dtype=bool)
        if source is not None and first > source:
            # The opening of the answer ("### Response:") stays, or the model would learn to answer without being asked.
            header = min(header, source)
            keep[source - header : first - header] = False
        asked = keep.copy()  # what is left of the prompt to ask for an answer with; a cut at the start shortens it too
        if target is not None:
            keep[first + target :] = False
        kept = np.flatnonzero(keep)
        opening = self.encoder.opening
        is_long, bos = len(kept) > limit, len(opening) * (whole.input_ids[kept[: len(opening)]].tolist() == opening)
        if is_long and too_long == "cut-start":
            # The BOS stays in front.
            cut = kept[bos : len(kept) - limit + bos]
            keep[cut] = asked[cut] = False
        elif is_long and too_long == "cut-end":
            keep[kept[limit:]] = False
        if whole.images and (is_long or not keep.all()):
            over = f"data.max_length ({limit})" if is_long else "data.max_source_length or data.max_target_length"
            self._drop(whole, f"longer than {over}, and images are not cut")
            return []
        if not keep.all():  # a row that is split or dropped below has lost these too
            self._count("truncated_rows", whole.source)
            counts.truncated_tokens += int((~keep).sum())
            counts.truncated_targets += int(whole.trained[~keep].sum())
        elif not is_long:
            return [whole]
        if is_long and too_long == "drop":
            self._drop(whole, f"longer than data.max_length ({limit})")
            return []
        if is_long and too_long == "split":
            # each part stands after the row's BOS or the token before it, which is never a target
            parts, before = [], max(1, bos)
            for start in range(before, len(kept), limit - before):
                part = np.append(kept[:bos] if bos else kept[start - 1], kept[start : start + limit - before])
                trained = whole.trained[part]
                trained[:1] = False
                if trained.any():  # none can be answered as the row could, so parts have no prompt
                    nothing = np.zeros(0, np.int32)
                    parts.append(Example(whole.input_ids[part], trained, whole.source, nothing, "", None, whole.owner))
            counts.split_rows += 1
            counts.split_parts += len(parts)
            return parts
        trained = whole.trained[keep]
        trained[:1] = False  # nothing stands before it any more
        if not trained.any():
            self._drop(whole, "cut to length, without a trained token")
            return []
        prompt_ids = whole.prompt_ids[asked[: len(whole.prompt_ids)]]
        row = replace(whole, input_ids=whole.input_ids[keep], trained=trained, prompt_ids=prompt_ids)
        if len(prompt_ids) <= bos < len(whole.prompt_ids):  # nothing to ask with: as text without a prompt
            row = replace(row, prompt_ids=prompt_ids[:0], prompt_text="", reference=None)
        return [row]

    def _count(self, name: str, source: str) -> None:
        """Count a row of the data; a pair's two rows are one."""
        if (name, source) not in self._counted:
            self._counted.add((name, source))
            setattr(self._counts, name, getattr(self._counts, name) + 1)

    def _drop(self, row: Example, reason: str) -> None:
        self._counts.dropped.setdefault(reason, []).append(row.source)


def _answered(example: Example) -> Example:
    """Cut a row after its last target, so that it lacks what a template writes behind an answer."""
    end = int(np.flatnonzero(example.trained)[-1]) + 1
    return replace(example, input_ids=example.input_ids[:end], trained=example.trained[:end])
