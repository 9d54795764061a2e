"""Which of the known formats the rows of a data set have, and which columns are its fields."""

from collections.abc import Mapping
from dataclasses import dataclass

from qvera.data.readers import RawRow
from qvera.utils.errors import InputError, did_you_mean

# The fields of each format: those that every row must have, then those it may have. Detection tries them in this order.
_FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "prompt-completion": (("prompt", "completion"), ("system", "tools")),
    "text": (("text",), ()),
    "classification": (("text", "label"), ("text_pair",)),
    "image": (("image", "label"), ()),
    "preference": (("chosen", "rejected"), ("prompt", "system", "tools")),
    "unpaired-preference": (("prompt", "completion", "label"), ("system", "tools")),
}
PREFERENCES = ("preference", "unpaired-preference")
"""Formats whose rows say which answers are better (`qvera.data.preferences`)."""
LABELLED = ("classification", "image")
"""Formats whose rows have a label."""
UNRENDERED = ("text", *LABELLED)
"""Formats whose texts are taken as they are: no template has a part in them."""
_DETECTED = [name for name in _FORMATS if name not in (*LABELLED, *PREFERENCES)]
"""Rows have labels, or preferences, only where the recipe's task or objective says so."""
_USUAL_TEXTS = (
    ("text", "text_pair"), ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("sentence",), ("question",),
)  # fmt: skip
"""Columns that labelled texts usually have, GLUE's among them."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What the rows of a data set look like.

    Attributes:
        name: the name of a format, as ``data.format`` has it.
        columns: our field name → the data set's column name, for the fields that this format reads.
        unused: columns of the first row that nothing reads.
    """

    name: str
    columns: dict[str, str]
    unused: list[str]

    def column(self, name: str) -> str:
        """The data set's column for one of our field names."""
        return self.columns.get(name, name)


class UnknownFormat(InputError):
    """The columns of the rows match no format; the recipe can name them."""


class MissingColumn(InputError):
    """The rows lack a column of the format that was asked for; the recipe can name it."""


class UnaskedPreferences(InputError):
    """The rows are pairs of answers, and the recipe has no objective for them."""


def detect_format(row: RawRow, format: str = "auto", columns: dict[str, str] | None = None) -> RowFormat:
    """Decide from the first row what the rows are.

    Args:
        format: ``data.format``; ``auto`` goes by the column names.
        columns: ``data.columns``, our field name → the column's name in the file.

    Raises:
        InputError: an unknown field, or a column that is not there.
        UnknownFormat, MissingColumn, UnaskedPreferences: see there.
    """
    columns = columns or {}
    if format in LABELLED:
        columns = {**_usual_columns(format, row.fields, columns), **columns}
    known = sorted({name for required, optional in _FORMATS.values() for name in required + optional})
    found = ", ".join(map(str, row.fields)) or "none"
    for ours, theirs in columns.items():
        if ours not in known:
            hint = did_you_mean(ours, known)
            raise InputError(f"data.columns: {ours!r} is not a field that rows have{hint} Fields: {', '.join(known)}.")
        if theirs not in row.fields:
            hint = did_you_mean(theirs, row.fields)
            raise InputError(f"{row.source}: no column {theirs!r} (data.columns.{ours}){hint} Columns found: {found}.")
    present = {name for name in known if name in columns or name in row.fields}
    if format == "auto":
        matches = [name for name in _DETECTED if present.issuperset(_FORMATS[name][0])]
        # A column that the recipe names is meant to be read: formats that read it come first.
        matches.sort(key=lambda name: not set(columns) & {*_FORMATS[name][0], *_FORMATS[name][1]})
        if not matches:
            shapes = "; ".join(f"{name} ({', '.join(_FORMATS[name][0])})" for name in _DETECTED)
            if present.issuperset(_FORMATS["preference"][0]):
                raise UnaskedPreferences(
                    f"{row.source}: has a chosen and a rejected answer. Set training.objective: dpo (or orpo) to train "
                    "on such pairs."
                )
            raise UnknownFormat(
                f"{row.source}: the columns match no known format. Columns found: {found}. Known: {shapes}. "
                "Name yours in the recipe, for example data.columns: {prompt: question, completion: answer}."
            )
        format = matches[0]
    required, optional = _FORMATS[format]
    missing = [name for name in required if name not in present]
    if missing:
        raise MissingColumn(
            f"{row.source}: format {format} needs the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
            f"Columns found: {found}. Name yours in data.columns ({{{missing[0]}: YOUR_COLUMN}}) or set another "
            "data.format."
        )
    # optional columns are read wherever a row has them, though the first row may not
    read = {name: columns.get(name, name) for name in required + optional}
    for ours in columns:
        if ours not in read:
            raise InputError(
                f"data.columns: format {format} does not read {ours!r}; it reads {', '.join(required + optional)}."
            )
    unused = [str(name) for name in row.fields if name not in read.values()]
    return RowFormat(format, read, unused)


def _usual_columns(format: str, fields: Mapping[str, object], named: Mapping[str, str]) -> dict[str, str]:
    """The columns of a labelled row that go by a usual name; none for the texts where the recipe names one."""
    found: dict[str, str] = {}
    if format == "image":
        found = {"image": "img"} if "image" not in fields and "img" in fields else {}
    elif not named.keys() & {"text", "text_pair"}:
        texts = next((names for names in _USUAL_TEXTS if all(name in fields for name in names)), ())
        found = dict(zip(("text", "text_pair"), texts, strict=False))
    return found | ({"label": "labels"} if "label" not in fields and "labels" in fields else {})
