"""Rows longer than data.max_length, and preferences: what is trained, what is counted, what is said when none is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from qvera.config.sections import DataSection
from qvera.data import Datasets, Encoder, Example, Turn, build_datasets, decode, resolve_template
from qvera.data.conversations import parse_row
from qvera.data.detect import detect_format
from qvera.data.readers import RawRow
from qvera.data.tokenization import RowCounts, RowTokenizer
from qvera.utils.errors import InputError
from tests.conftest import small_tokenizer
from tests.data.conftest import MakeTokenizer, Write
from tests.data.rows import build, byte_tokenizer, decoded, messages_of

WORDS = st.lists(
    st.sampled_from(["say", "colour", "yes,", "calling\n\n", "é", "🙂", "#", "12"]), min_size=1, max_size=30
).map(" ".join)
CHATS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3).map(lambda pairs: sum(pairs, ()))
ROWS = CHATS.map(lambda texts: {"messages": messages_of(*texts)}) | WORDS.map(lambda text: {"text": text})
LENGTHS = st.none() | st.integers(1, 40)


@pytest.fixture(params=["BOS", "no BOS"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer() if request.param == "BOS" else make_tokenizer(bos=None)


def examples(row: dict[str, Any], tokenizer: Any, **keys: Any) -> tuple[list[Example], RowCounts]:
    """What one row becomes under these keys of ``data``."""
    raw, section = RawRow(row, "rows.jsonl:1"), DataSection(path="rows.jsonl", **keys)
    row_format = detect_format(raw)
    template = resolve_template("plain" if row_format.name == "text" else "chatml", tokenizer)
    encoder = RowTokenizer(section, Encoder(tokenizer), template, row_format)
    return encoder.encode([parse_row(raw, row_format)])


def targets(rows: list[Example]) -> list[int]:
    return [token for row in rows for token in row.input_ids[row.trained].tolist()]


def steps(rows: list[Example]) -> list[tuple[int, int]]:
    """Each trained token after the token that it is read from."""
    return [
        (int(row.input_ids[i - 1]), int(row.input_ids[i])) for row in rows for i in np.flatnonzero(row.trained).tolist()
    ]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=ROWS,
    size=st.integers(8, 40),
    source=LENGTHS,
    target=LENGTHS,
    train_on=st.sampled_from(["assistant", "last", "all"]),
)
def test_the_parts_of_a_split_row_train_each_of_its_tokens_once(
    row: Any, size: int, source: int | None, target: int | None, train_on: str, tokenizer: Any
) -> None:
    keys = {"max_source_length": source, "max_target_length": target, "train_on": train_on}
    (whole,), unsplit = examples(row, tokenizer, max_length=100_000, **keys)
    parts, counts = examples(row, tokenizer, max_length=size, too_long="split", **keys)
    assert targets(parts) == targets([whole])
    assert all(len(part.input_ids) <= size and part.trained.any() and not part.trained[0] for part in parts)
    if tokenizer.bos_token_id is not None and whole.input_ids[0] == tokenizer.bos_token_id:
        assert all(part.input_ids[0] == tokenizer.bos_token_id for part in parts)
    else:
        assert steps(parts) == steps([whole])
    is_split = len(whole.input_ids) > size
    assert all(part.reference is None and not len(part.prompt_ids) for part in parts) or not is_split
    assert (counts.split_rows, counts.split_parts) == ((1, len(parts)) if is_split else (0, 0))
    # the parts lose nothing beyond what the row does without a split
    assert (counts.truncated_rows, counts.truncated_tokens) == (unsplit.truncated_rows, unsplit.truncated_tokens)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=ROWS, size=st.integers(8, 40), source=LENGTHS, target=LENGTHS)
def test_a_row_that_is_cut_is_the_beginning_or_the_end_of_the_whole_one(
    row: Any, size: int, source: int | None, target: int | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    keys = {"max_source_length": source, "max_target_length": target}
    (whole,), uncut = examples(row, tokenizer, max_length=100_000, **keys)
    ids, lost = whole.input_ids.tolist(), max(0, len(whole.input_ids) - size)
    bos = int(ids[0] == tokenizer.bos_token_id)  # a cut at the start leaves it, if the source length has
    ways = {"cut-end": [*range(len(ids) - lost)], "cut-start": [*range(bos), *range(bos + lost, len(ids))]}
    for too_long, kept in ways.items():
        found, counts = examples(row, tokenizer, max_length=size, too_long=too_long, **keys)
        assert counts.truncated_tokens == uncut.truncated_tokens + lost
        trained = [i > 0 and bool(whole.trained[place]) for i, place in enumerate(kept)]
        if not any(trained):
            assert found == [] and counts.dropped == {"cut to length, without a trained token": [whole.source]}
            continue
        (cut,) = found
        assert cut.input_ids.tolist() == [ids[place] for place in kept]
        assert cut.trained.tolist() == trained
        gone = range(
            bos, bos + lost if too_long == "cut-start" else bos
        )  # a cut at the end leaves the last turn's prompt
        prompt = [token for place, token in enumerate(whole.prompt_ids.tolist()) if place not in gone]
        if len(prompt) <= bos:  # nothing to ask with: as text without a prompt
            assert (len(cut.prompt_ids), cut.prompt_text, cut.reference) == (0, "", None)
        else:
            assert (cut.prompt_ids.tolist(), cut.reference) == (prompt, whole.reference)


@pytest.mark.parametrize("too_long", ["split", "drop"])
def test_what_a_long_row_lost_to_its_source_and_target_length_is_counted(
    too_long: str, write: Write, tokenizer: Any
) -> None:
    long = {"prompt": "question " * 60, "completion": " yes" * 60}
    path = write([long, {"prompt": "q", "completion": " yes"}])
    whole, _short = build_datasets(DataSection(path=path, max_length=100_000), tokenizer).train
    first = int(np.argmax(whole.trained))
    after = len(whole.input_ids) - first
    for source, target in ((None, 12), (30, None), (30, 12), (25, 15), (None, None)):
        keys = {"max_source_length": source, "max_target_length": target}
        data = build_datasets(DataSection(path=path, max_length=40, too_long=too_long, **keys), tokenizer)
        left = [row for row in data.train if row.source == whole.source]
        lost = (first - source if source else 0) + (after - target if target else 0)
        assert (data.stats.truncated_tokens, data.stats.truncated_rows) == (lost, bool(lost))
        if (source, target) == (25, 15):  # which makes it short enough
            assert len(left[0].input_ids) == 40 and data.stats.split_rows == data.stats.dropped_rows == 0
        elif too_long == "drop":
            assert left == []
            assert data.stats.dropped == {"longer than data.max_length (40)": [whole.source]}
        else:
            assert sum(row.trained_tokens for row in left) == min(target or after, after)
            assert data.stats.split_rows == 1


@pytest.mark.parametrize("too_long", ["split", "cut-start"])
def test_each_part_of_a_row_begins_with_what_the_tokenizer_puts_in_front(too_long: str) -> None:
    """GLM-4's has two tokens there, and no BOS."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    front = [("<s>", 256), ("<|im_start|>", 258)]
    assert tokenizer.convert_tokens_to_ids([token for token, _ in front]) == [number for _, number in front]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <|im_start|> $A", pair="<s> <|im_start|> $A $B", special_tokens=front
    )
    rows = build([{"text": "abcdefghijklmn"}], tokenizer, max_length=8, too_long=too_long).train
    texts = [decoded(tokenizer, row.input_ids) for row in rows]
    opening = "<s><|im_start|>"
    cut = [f"{opening}jklmn</s>"]
    assert texts == (cut if too_long == "cut-start" else [f"{opening}abcdef", f"{opening}ghijkl", f"{opening}mn</s>"])
    assert [row.trained.tolist()[:3] for row in rows] == [[False, False, True]] * len(rows)
    prompted = build([{"prompt": "ab", "completion": "c"}], tokenizer).train[0]
    assert decoded(tokenizer, prompted.input_ids) == f"{opening}abc</s>"


def test_dropping_every_row_for_its_length_is_said_as_that(write: Write, tokenizer: Any) -> None:
    section = DataSection(path=write([{"text": "word " * 99}, {"text": "more " * 99}]), max_length=8, too_long="drop")
    with pytest.raises(InputError) as failure:
        build_datasets(section, tokenizer)
    said = str(failure.value)
    assert said.startswith(f"{section.path}: no row is left: all 2 are left out: longer than data.max_length (8) (2).")
    assert said.endswith(" Fix the rows, raise data.max_length (8), or cut rows otherwise (data.too_long).")
    assert build_datasets(section.replace(too_long="cut-end"), tokenizer).train  # one of the ways out that it names


def test_a_row_with_an_empty_prompt_is_text_and_has_no_label(make_tokenizer: MakeTokenizer) -> None:
    (row,) = build([{"prompt": "", "completion": "some words"}], make_tokenizer(bos=None), template="plain").train
    assert (row.is_labelled, row.reference, len(row.prompt_ids)) == (False, None, 0)
    assert row.trained_tokens == len(row.input_ids) - 1


def read(rows: list[dict[str, Any]], format: str = "preference", **keys: Any) -> Datasets:
    return build(rows, small_tokenizer(), format=format, **keys)


def pair_texts(example: Example) -> list[str]:
    """Prompt, chosen and rejected as text."""
    tokenizer, start = small_tokenizer(), example.answer_start
    assert example.rejected_ids is not None
    parts = example.input_ids[:start], example.input_ids[start:], example.rejected_ids
    return [decode(tokenizer, ids.tolist()) for ids in parts]


RED, BLUE = messages_of("say red", "red"), messages_of("say red", "blue")
EMPTY = {"role": "system", "content": ""}


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": "say red", "chosen": "red", "rejected": "blue"}, {}),
        ({"q": "say red", "good": "red", "rejected": "blue"}, {"columns": {"prompt": "q", "chosen": "good"}}),
        ({"prompt": RED[:1], "chosen": RED[1:], "rejected": BLUE[1:]}, {}),
        ({"chosen": RED, "rejected": BLUE}, {}),
        ({"prompt": "say red", "chosen": RED, "rejected": BLUE}, {}),
        ({"prompt": "say red", "chosen": [EMPTY, *RED], "rejected": [EMPTY, *BLUE]}, {}),
    ],
    ids=["texts", "renamed columns", "messages", "prompt within the messages", "UltraFeedback", "a system turn"],
)
def test_a_pair_has_the_prompt_that_chat_has(row: dict[str, Any], keys: dict[str, Any]) -> None:
    datasets = read([row], **keys)
    (pair,) = datasets.train
    prompt = "<|im_start|>user\nsay red<|im_end|>\n<|im_start|>assistant\n"
    assert pair_texts(pair) == [prompt, "red<|im_end|>", "blue<|im_end|>"]
    asked = Encoder(small_tokenizer()).encode_prompt(*datasets.template.prompt([Turn("user", "say red")]))
    assert pair.input_ids[: pair.answer_start].tolist() == pair.prompt_ids.tolist() == asked


def test_earlier_answers_of_a_prompt_are_not_compared() -> None:
    rows = [{"prompt": messages_of("a", "b", "c"), "chosen": "d", "rejected": "e"}]
    both = {"chosen": messages_of("a", "b", "c", "d"), "rejected": messages_of("a", "b", "c", "e")}
    rows += [{"prompt": asked, **both} for asked in ("a", "c")]  # Tulu's: the first of several texts
    for pair in read(rows, system="be kind").train:
        shown, chosen, rejected = pair_texts(pair)
        assert shown.startswith("<|im_start|>system\nbe kind<|im_end|>") and "assistant\nb<|im_end|>" in shown
        assert (chosen, rejected) == ("d<|im_end|>", "e<|im_end|>")
    with pytest.raises(InputError, match="chosen must be one assistant turn after the prompt"):
        read([{"prompt": "another question", **both}])
    with pytest.raises(InputError, match=r"are user, assistant\. Both lists must begin with the same turns"):
        read([{"chosen": messages_of("a", "b"), "rejected": messages_of("another question", "c")}])


def test_lengths_and_counts_are_those_of_both_rows() -> None:
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b" * n} for n in (3, 40)]
    datasets = read(rows)
    for pair, length, both in zip(datasets.train, datasets.train.lengths, datasets.train.all_tokens, strict=True):
        ids = [example.input_ids for _, example in pair.shown()]
        assert length == max(map(len, ids)) and both == sum(map(len, ids)) == sum(pair.row_tokens)
        assert [word for word, _ in pair.shown()] == ["chosen", "rejected"]
    assert datasets.stats.tokens == sum(sum(pair.row_tokens) for pair in datasets.train)
    assert len(np.unique(datasets.train.ids_hash)) == 2  # they differ in the rejected answer only


def test_max_length_cuts_each_answer_and_leaves_out_a_pair_without_one() -> None:
    rows = [
        {"prompt": "x", "chosen": "a", "rejected": "b" * 70},  # the rejected answer alone is too long
        {"prompt": "x" * 90, "chosen": "a", "rejected": "b"},  # no answer is left
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "x", "chosen": "a", "rejected": "b"},
    ]
    cut = read(rows, max_length=60)
    assert [max(pair.row_tokens) for pair in cut.train] == [60, 12]
    dropped = {reason: [source.rsplit(":")[-1] for source in lost] for reason, lost in cut.stats.dropped.items()}
    assert dropped == {"cut to length, without a trained token": ["2"], "chosen and rejected are the same": ["3"]}
    both = [{"prompt": "a</s><|im_end|>", "chosen": "a" * 70, "rejected": "b" * 70}] * 2
    stats = read(both, max_length=60).stats
    assert (stats.truncated_rows, stats.special_token_rows) == (2, 2), "a pair is one row"
    whole = read(rows, max_length=60, too_long="drop")
    assert [pair.source[-1] for pair in whole.train] == ["4"]


def test_where_no_pair_is_left_the_error_says_why() -> None:
    rows = [{"prompt": "x", "chosen": "same", "rejected": "same"}] * 2
    with pytest.raises(InputError, match=r"all 2 are left out: chosen and rejected are the same \(2\)\. Fix the rows"):
        read(rows)


def test_judged_answers_keep_their_labels() -> None:
    rows = [{"prompt": "x", "completion": "a", "label": label} for label in (True, "0.0", 1, "False")]
    examples = list(read(rows, "unpaired-preference").train)
    assert [example.desirable for example in examples] == [True, False, True, False]
    assert [word for example in examples for word, _ in example.shown()] == ["good answer", "bad answer"] * 2
    assert [example.reference for example in examples] == ["a", None, "a", None]


PAIR = {"prompt": "x", "chosen": "a", "rejected": "b"}
JUDGED = {"prompt": "x", "completion": "a", "label": True}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (PAIR | {"chosen": None}, "rows.jsonl:2: chosen must be text"),
        (PAIR | {"rejected": " "}, "rows.jsonl:2: rejected is empty"),
        (PAIR | {"chosen": messages_of("a")}, "chosen must be one assistant turn"),
        (PAIR | {"prompt": messages_of("a", "b")}, "the prompt must end with a turn that asks"),
        ({"chosen": "a", "rejected": "b"}, "rows.jsonl:2: prompt is missing. Add it"),
        (JUDGED | {"label": "maybe"}, "rows.jsonl:2: label must be true (a good answer) or false"),
        ({"prompt": "x", "completion": "a"}, "the column 'label' is missing here"),
    ],
)
def test_a_row_that_can_not_be_used_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match="rows.jsonl:2") as error:
        read(*([JUDGED, row], "unpaired-preference") if "completion" in row else ([PAIR, row],))
    assert said in str(error.value)


def test_pairs_are_not_taken_for_rows_to_imitate() -> None:
    with pytest.raises(InputError, match=r"Set training.objective: dpo \(or orpo\)"):
        read([PAIR], "auto")
