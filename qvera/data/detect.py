"""The format of rows, found by the columns of the first one."""

from collections.abc import Collection, Sequence

from qvera.data.conversations import FORMATS, LABELLED, PREFERENCES, READ_KEYS, RowFormat
from qvera.data.readers import RawRow, from_json, without_nulls
from qvera.utils.errors import InputError, did_you_mean

_USUAL_TEXTS = (
    ("text", "text_pair"), ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("sentence",), ("question",),
)  # fmt: skip
"""Usual names of text columns, GLUE's among them."""


class UnknownFormat(InputError):
    """The columns match no format. The recipe can name them."""


class MissingColumn(InputError):
    """The rows lack a column of the chosen format. The recipe can name it."""


class UnaskedPreferences(InputError):
    """The rows are pairs of answers, but the recipe has no objective for them."""


def detect_format(row: RawRow, format: str = "auto", columns: dict[str, str] | None = None) -> RowFormat:
    """Find the rows' format from the first row. ``columns`` is ``data.columns``: our field name → the file's column.

    Raises InputError: an unknown field or a missing column; see also the three errors above.
    """
    columns = columns or {}
    if format in LABELLED:
        columns = {**_usual_columns(row, format, columns), **columns}
    elif format == "prompt" and "prompt" not in row.fields and "messages" in row.fields:
        columns = {"prompt": "messages", **columns}
    elif format in PREFERENCES and "prompt" not in row.fields and "conversations" in row.fields:  # LLaMA-Factory's
        columns = {"prompt": "conversations", **columns}
    elif format in ("auto", *PREFERENCES) and {"input", "preferred_output"} <= row.fields.keys():  # OpenAI's
        columns = {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output", **columns}
    elif format in ("auto", "alpaca") and not columns and "response" in row.fields and is_dolly(row.fields):
        columns = {"input": "context", "output": "response"}
    known = sorted({name for kind in FORMATS.values() for name in kind.fields})
    header = " in the header, line 1" if row.file is not None and row.file.suffix.lower() in (".csv", ".tsv") else ""
    no_header = " If line 1 is a row already, write a line of names above it." if header else ""
    found = f"Columns found{header}: {', '.join(map(str, row.fields)) or 'none'}."
    for ours, theirs in columns.items():
        if ours not in known:
            is_turned = ours in row.fields and theirs in known
            hint = f". Turn it around: {{{theirs}: {ours}}}." if is_turned else did_you_mean(ours, known)
            raise InputError(
                f"data.columns: {ours!r} is not a field that rows have{hint} A field stands before its column, as in "
                f"{{prompt: {theirs}}}. Fields: {', '.join(known)}."
            )
        if theirs not in row.fields and theirs:
            hint = f"{did_you_mean(theirs, row.fields)} {found} Rename the one that is meant, or change data.columns."
            raise MissingColumn(f"{row.source}: no column {theirs!r} (data.columns.{ours}){hint}{no_header}")
    # Our names of the fields that the row has, called so in the file or in data.columns.
    present = {name for name in known if name in columns or name in row.fields}
    detected = [name for name, kind in FORMATS.items() if kind.trains in ("answers", "texts")]
    matches = [name for name in detected if present.issuperset(FORMATS[name].required)]
    # A column that the recipe names is meant to be read: formats that read it come first.
    matches.sort(key=lambda name: not set(columns) & set(FORMATS[name].fields))
    if format == "auto":
        if not matches and present.issuperset(FORMATS["preference"].required):
            raise UnaskedPreferences(
                f"{row.source}: has a chosen and a rejected answer. Set training.objective: dpo (or orpo) to train "
                "on such pairs."
            )
        is_turn = not matches and {"role", "content"} <= row.fields.keys()
        # OpenAssistant's messages, whose text would be trained by itself
        is_turn = is_turn or (matches[:1] == ["text"] and row.fields.get("role") in ("prompter", "assistant"))
        if is_turn:
            raise InputError(
                f"{row.source}: is a single turn, and a row is a whole conversation: "
                '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.'
            )
        if not matches:
            shapes = "; ".join(f"{name} ({', '.join(FORMATS[name].required)})" for name in detected)
            raise UnknownFormat(
                f"{row.source}: the columns match no known format. {found} Known: {shapes}. "
                "Rename yours, or name them in a recipe: data.columns: {prompt: question, completion: answer}."
                f"{no_header}"
            )
        format = matches[0]
    missing = [name for name in FORMATS[format].required if name not in present]
    chosen = from_json(row.fields.get(columns.get("chosen", "chosen")))
    if format == "preference" and "prompt" not in present and isinstance(chosen, str):  # a list begins with it
        missing.insert(0, "prompt")
    if missing:
        auto = f": auto reads it as {matches[0]}" if matches else ""
        other = f" or set another data.format{auto}" if format in detected else ""  # no choice of a task or objective
        above = "" if present & set(FORMATS[format].fields) else no_header
        raise MissingColumn(
            f"{row.source}: format {format} needs the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
            f"{found} Name yours in data.columns ({{{missing[0]}: YOUR_COLUMN}}){other}.{above}"
        )
    # optional columns are read wherever a row has them, though the first row may not
    read = {name: columns.get(name, name) for name in FORMATS[format].fields}
    for ours, usual in (("images", "image"), ("tools", "functions")):  # the second as OpenAI had it before
        if ours in read and read[ours] not in row.fields and usual in row.fields:
            read[ours] = usual
    for ours in columns:
        if ours not in read:
            advice = "Leave it out, or the option --prompt-column or --answer-column that named it"
            advice = "To train a classifier, set task: sequence-classification" if ours == "label" else advice
            raise InputError(f"data.columns: format {format} reads {', '.join(read)}, not {ours!r}. {advice}.")
    # of a prompt, all of it is handed to the reward
    unused = [str(name) for name in row.fields if name not in read.values() and format != "prompt"]
    unused += _unread_keys(row, [column for name, column in read.items() if name not in ("tools", "images")])
    return RowFormat(format, read, unused)


def is_dolly(fields: Collection[str]) -> bool:
    """Whether these are Dolly's columns, but for ``response``: Alpaca's under other names."""
    return {"instruction", "context"}.issubset(fields) and {"input", "output"}.isdisjoint(fields)


def _unread_keys(row: RawRow, columns: Sequence[str]) -> list[str]:
    """Keys within the row's turns that nothing reads, as ``messages[].key``."""
    lists = {column: from_json(row.fields.get(column)) for column in columns}
    found = [(column, item) for column, items in lists.items() if isinstance(items, list) for item in items]
    turns = [(column, item) for column, item in found if isinstance(item, dict) and {"role", "from"} & item.keys()]
    return sorted({f"{column}[].{key}" for column, turn in turns for key in without_nulls(turn).keys() - READ_KEYS})


def _usual_columns(row: RawRow, format: str, named: dict[str, str]) -> dict[str, str]:
    """Columns of a labelled row with usual names. Text columns that the recipe names are left to it."""
    found: dict[str, str] = {}
    if format == "image":
        found = {"image": "img"} if "image" not in row.fields and "img" in row.fields else {}
    elif not named.keys() & {"text", "text_pair"}:
        texts = next((names for names in _USUAL_TEXTS if all(name in row.fields for name in names)), ())
        found = dict(zip(("text", "text_pair"), texts, strict=False))
    return found | ({"label": "labels"} if "label" not in row.fields and "labels" in row.fields else {})
