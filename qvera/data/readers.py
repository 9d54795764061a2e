"""Files, directories and hub datasets → raw rows, each with the place it came from."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qvera.config.sections import MOST_ROW_CHARACTERS
from qvera.data.images import IMAGE_EXTENSIONS, OTHER_IMAGES
from qvera.utils.errors import InputError, near_path, one_line
from qvera.utils.files import not_utf8, resolve_path
from qvera.utils.formatting import describe, shortened
from qvera.utils.hub import hub_hint, leave_silent_hub

if TYPE_CHECKING:
    import datasets

_logger = logging.getLogger(__name__)
EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_BATCH_BYTES = 16 * 2**20
ACCEPTED = ".jsonl, .json, .csv, .tsv or .parquet"
_NO_ROWS = {
    b"PK\x03\x04": "is a zip, such as an Excel workbook. Save it as CSV.",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself. Fetch that: git lfs pull.",
    b"\x1f\x8b": "is compressed. Unpack it: gunzip.",
    b"\xff\xff\xff\xff": "is Arrow. Convert it: datasets.Dataset.from_file(NAME).to_parquet('rows.parquet').",
}
"""The first bytes of a file that holds no rows, whatever its name → what it is, and what to do."""
_TRAIN_NAME = re.compile(r"(^|[^a-z])train", re.IGNORECASE)
_HELD_OUT_NAME = re.compile(r"(^|[^a-z])(test|valid|validation|val|eval|dev|held[-_]?out)([^a-z]|$)", re.IGNORECASE)

_TRAIN_FOLDERS = ("train", "training")
_HELD_OUT_FOLDERS = ("test", "testing", "valid", "validation", "val", "eval", "dev")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read.

    ``source`` is ``train.jsonl:17`` (the line) for JSONL and CSV. For JSON, Parquet and hub datasets it is
    ``train.json row 17``, because lines mean nothing there. Both count from 1.
    """

    fields: dict[str, Any]  # column name → value
    source: str
    owner: str | None = None  # its task or adapter, if the recipe has any
    file: Path | None = field(default=None, compare=False)  # None: a hub dataset


def read_rows(
    path: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    most_characters: int = MOST_ROW_CHARACTERS,
) -> Iterator[RawRow]:
    """Yield the rows of a file, a directory (its files in name order) or a hub dataset.

    Args:
        path: a .jsonl, .json, .csv, .tsv or .parquet file, a directory of them or of folders of images, or a hub id.
        split, config_name, revision: for hub datasets only.
        most_characters: as for `read_file`.

    Raises:
        InputError: nothing of that name, an unknown extension, or a file that is empty, not UTF-8 or malformed.
    """
    files, local = local_files(path), Path(resolve_path(path))
    if files is None:
        number = 0
        for number, fields in enumerate(load_hub(path, split, config_name, revision), start=1):
            yield RawRow(dict(fields), f"{path}[{split}] row {number}")
        if not number:
            raise InputError(f"{path}: the split {split!r} holds no rows. Set data.split to another one.")
        return
    for name, value in (("config_name", config_name), ("revision", revision)):
        if value is not None:
            raise InputError(
                f"data.{name}: {value!r} has a meaning for hub datasets only, and {path} is a local "
                f"{'directory' if local.is_dir() else 'file'}. Remove the key."
            )
    for file in files:
        if file.suffix.lower() in IMAGE_EXTENSIONS and local.is_dir():
            yield RawRow({"image": str(file.absolute()), "label": file.parent.name}, str(file))
        else:
            yield from read_file(file, most_characters=most_characters)


def read_file(
    file: Path, reader: Callable[[Path], Iterator[RawRow]] | None = None, most_characters: int = MOST_ROW_CHARACTERS
) -> Iterator[RawRow]:
    """Yield the rows of one file. Raises as `read_rows`.

    Args:
        reader: None: by the file's extension.
        most_characters: of a row of JSONL or CSV. A longer one is an InputError, and is not read as a whole.
    """
    of_lines = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv}
    readers: dict[str, Callable[[Path], Iterator[RawRow]]] = {
        ".json": _read_json,
        ".parquet": _read_parquet,
        **{suffix: functools.partial(read, most_characters=most_characters) for suffix, read in of_lines.items()},
    }
    reader = reader or readers.get(file.suffix.lower())
    empty = True
    try:
        with file.open("rb") as stream:
            head = stream.read(max(map(len, _NO_ROWS)))
        for first, what in _NO_ROWS.items():
            if head.startswith(first):
                raise InputError(f"{file}: {what}")
        if reader is None:
            raise InputError(
                f"{file}: can't read a file that ends in {file.suffix or 'nothing'!r}. Expected {ACCEPTED}; "
                'convert the file, or rename it if it is one of these. Of a plain text a row is {"text": "..."}.'
            )
        for row in reader(file):
            empty = False
            yield row
    except UnicodeDecodeError:
        raise not_utf8(file) from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{file}: can't be read: {reason}. Check that it is a file you may read.") from None
    if empty:
        raise InputError(f"{file}: holds no rows. Expected at least one; is it the right file?")


def local_files(path: str, accepted: str = ACCEPTED) -> list[Path] | None:
    """The data files of a local path, in name order; None for the id of a hub dataset. ``accepted`` is for messages.

    Raises InputError: no such path, no regular file, or a directory without data files or with several splits.
    """
    if re.search(r"[\x00-\x1f]", path):
        raise InputError(
            f"data.path: {path!r} holds a line end, a tab or the like. In double quotes a backslash begins such a "
            "character: use single quotes."
        )
    local = Path(resolve_path(path))
    if local.is_dir():
        return _data_files(local)
    if local.is_file():
        return [local]
    if local.exists():
        raise InputError(f"{path}: is a pipe or a device, and rows are read more than once. Save them to a file.")
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) and not path.lower().endswith(EXTENSIONS)
    # A name with a dot and without an owner (rows.txt) is a mistyped file rather than a hub dataset.
    if is_id and (path.count("/") == 1 or "." not in path):
        return None
    if local.is_symlink():
        raise InputError(f"{path}: is a link to {os.readlink(local)}, and no file can be reached by it. Mend the link.")
    if not local.parent.is_dir():
        advice = "Variables such as $HOME are not filled in; write ~ for it." if "$" in path else "Check data.path."
        if "://" in path:
            advice = "Addresses are not read: download the file, or write owner/name of a dataset on the hub."
        raise InputError(f"{path}: no such file, and no directory {local.parent} either. {advice}")
    near = near_path(local, (beside for beside in local.parent.iterdir() if beside.is_file() or not local.suffix))
    hint = f"Did you mean {near}?" if near else f"Expected a {accepted} file or a directory of them."
    if not near and not local.is_absolute():
        hint += f" A relative path begins where the command runs, here {Path.cwd()}."
    if "*" in path:
        hint = "Patterns are not filled in: name a directory of these files."
    raise InputError(f"{path}: no such file or directory. {hint}")


def _data_files(directory: Path) -> list[Path]:
    if (directory / "dataset_dict.json").is_file() or any(directory.glob("*.arrow")):
        raise InputError(
            f"{directory}: was written by save_to_disk of datasets, whose Arrow files are not read. Convert it: "
            f"datasets.load_from_disk({str(directory)!r}), of that one split, and its to_parquet('rows.parquet')."
        )
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS)
    if not files and (images := _image_files(directory)):
        return images
    if not files:
        others = sorted(p.name for p in directory.iterdir())[:5]
        found = f"it holds {', '.join(others)}" if others else "it is empty"
        raise InputError(
            f"{directory}: no data files in this directory ({found}). Expected {ACCEPTED} in it, or a folder of "
            "images for each class."
        )
    train = [p.name for p in files if _TRAIN_NAME.search(p.stem)]
    held_out = [p.name for p in files if _HELD_OUT_NAME.search(p.stem) and p.name not in train]
    train = train or [p.name for p in files if p.name not in held_out]
    if train and held_out:
        # Reading them all would train on what the person means to test with.
        advice = f"Set data.path to {directory / train[0]} and data.eval_path to the other."
        if len(train) > 1 or len(held_out) > 1:
            advice = "Put each split into a directory of its own, and set data.path and data.eval_path to the two."
        raise InputError(
            f"{directory}: holds files of different splits ({train[0]} and {held_out[0]}), and all files of a "
            f"directory are read. {advice}"
        )
    return files


def _image_files(directory: Path) -> list[Path]:
    """The images of all classes in name order; empty if the directory has no folders of images.

    Raises InputError: the folders are splits, not classes; an image stands beside the folders; or a folder has no
    image.
    """
    folders = [entry for entry in _entries(directory) if entry.is_dir()]
    names = {folder.name.lower(): folder for folder in folders}
    train, held_out = (
        next((names[name] for name in wanted if name in names), None) for wanted in (_TRAIN_FOLDERS, _HELD_OUT_FOLDERS)
    )
    if train is not None and held_out is not None:
        raise InputError(
            f"{directory}: holds the splits {train.name} and {held_out.name}, not classes. Set data.path to {train} "
            f"and data.eval_path to {held_out}."
        )
    # The images of the directory itself, and those of each folder in it.
    beside, *found = (
        [entry for entry in _entries(folder) if entry.suffix.lower() in IMAGE_EXTENSIONS and entry.is_file()]
        for folder in (directory, *folders)
    )
    if not any(found):
        return []
    for other in (entry for folder in folders for entry in _entries(folder) if entry.suffix.lower() in OTHER_IMAGES):
        raise InputError(
            f"{other}: {other.suffix} is not read. Convert it to one of {', '.join(IMAGE_EXTENSIONS)}, or remove it."
        )
    if beside:
        raise InputError(
            f"{beside[0]}: stands beside the folders of {directory}, and an image's folder is its class. Move it into "
            "one, or remove it."
        )
    if empty := [folder for folder, images in zip(folders, found, strict=True) if not images]:
        raise InputError(
            f"{empty[0]}: holds no images, and each folder of {directory} is a class. Expected files that end in "
            f"{', '.join(IMAGE_EXTENSIONS)}; add some, or remove the folder."
        )
    return [image for images in found for image in images]


def _entries(directory: Path) -> list[Path]:
    return [entry for entry in sorted(directory.iterdir()) if not entry.name.startswith(".")]


def adapter_files(path: str) -> list[Path]:
    """The files of a directory with one file for each adapter, in name order.

    Raises InputError: no such directory, a file in it that holds no rows, or two files of one name.
    """
    directory = Path(resolve_path(path))
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "is no directory here"
        raise InputError(
            f"{path}: data.adapter_files takes a directory with a file for each adapter, and this {found}. Name the "
            "directory, or use data.adapter_column, a column of the adapters' names."
        )
    files: dict[str, Path] = {}
    for file in _entries(directory):
        if not file.is_file() or file.suffix.lower() not in EXTENSIONS:
            what = "a directory" if file.is_dir() else "no data file"
            raise InputError(
                f"{file}: is {what}, and data.adapter_files reads every entry of {directory} as the rows of one "
                f"adapter. Expected {ACCEPTED}; move it elsewhere."
            )
        if file.stem in files:
            raise InputError(
                f"{file}: {files[file.stem].name} already has the rows of the adapter {file.stem!r} "
                "(data.adapter_files). Put them into one file, or rename one of the two."
            )
        files[file.stem] = file
    if not files:
        raise InputError(f"{directory}: is empty. Expected {ACCEPTED} in it, a file for each adapter.")
    return list(files.values())


@dataclass(slots=True)
class _Lines:
    """The lines of a file. Not more than ``most_characters`` of a row are in memory (InputError)."""

    stream: TextIO
    file: Path
    most_characters: int
    number: int = 0
    row_characters: int = 0  # of the row that the last line belongs to; set to 0 when a row is whole

    def __iter__(self) -> Iterator[str]:
        while line := self.stream.readline(self.most_characters + 1):
            self.number += 1
            self.row_characters += len(line)
            if self.row_characters > self.most_characters:
                raise InputError(
                    f"{self.file}:{self.number}: the row has more than {self.most_characters:,} characters. Divide it, "
                    "and look for a quote that is not closed; or raise data.max_row_characters."
                )
            if "\0" in line:
                raise InputError(
                    f"{self.file}:{self.number}: holds a NUL byte, which no text has. The file is damaged, or UTF-16 "
                    "without its mark; then convert it: iconv -f UTF-16LE -t UTF-8 OLD > NEW."
                )
            yield line


def read_lines(file: Path) -> Iterator[RawRow]:
    """Yield each line that is not blank, as a ``prompt``."""
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield RawRow({"prompt": line.rstrip("\n")}, f"{file.name}:{number}")


_Repeated = list[tuple[dict[str, Any], str]]
"""Objects that hold a key twice, with that key."""
_TOO_MANY_DIGITS = "a whole number of more than 4,300 digits"


def _parse_json(text: str) -> tuple[object, _Repeated]:
    """Parse JSON, and list its objects with a repeated key, of which Python's parser silently takes the last value."""
    repeated: _Repeated = []

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated.append((value, next(name for name, count in counts.items() if count > 1)))
        return value

    return json.loads(text, object_pairs_hook=as_object), repeated


def _require_unique_keys(repeated: _Repeated, where: str) -> None:
    if repeated:
        raise InputError(
            f"{where}: the key {repeated[0][1]!r} occurs twice in one object. Remove or rename one of them."
        )


def _as_row(value: object) -> object:
    """A conversation may be written as the list of its messages alone."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        for key, name in (("role", "messages"), ("from", "conversations")):
            if all(key in turn for turn in value):
                return {name: value}
    return value


_ONE_A_LINE = "Write each object on one line, for example: jq -c . OLD > NEW.jsonl."


def _read_jsonl(file: Path, most_characters: int) -> Iterator[RawRow]:
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        lines = _Lines(stream, file, most_characters)
        for number, line in enumerate(map(str.strip, lines), start=1):
            lines.row_characters = 0
            if not line:
                continue
            source = f"{file}:{number}"
            try:
                value, repeated = _parse_json(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and (line == "{" or line.startswith("[")):
                    raise InputError(
                        f"{source}: the object is not on one line; the file looks like plain JSON. "
                        + ("Rename it to .json." if line != "{" else _ONE_A_LINE)
                    ) from None
                detail = "nested too deeply" if isinstance(error, RecursionError) else _TOO_MANY_DIGITS
                if isinstance(error, json.JSONDecodeError):
                    detail = f"{error.msg.removesuffix(' at')} at column {error.colno}"
                raise InputError(
                    f"{source}: not valid JSON: {detail}, in {shortened(line)!r}. Expected one complete JSON object "
                    "on each line; fix or remove the line."
                ) from None
            if not isinstance(value := _as_row(value), dict):
                hint = " It is JSON in a JSON text: parse it twice." if isinstance(value, str) else ""
                are_objects = isinstance(value, list) and all(isinstance(item, dict) for item in value)
                if number == 1 and are_objects and not any(map(str.strip, lines)):
                    hint = " The file is one JSON list: rename it to .json."
                raise InputError(
                    f"{source}: expected one JSON object on the line, such as "
                    f'{{"prompt": ..., "completion": ...}}, got {describe(value)}.{hint}'
                )
            _require_unique_keys(repeated, source)
            yield RawRow(value, source, file=file)


def _read_json(file: Path) -> Iterator[RawRow]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise InputError(f"{file}: the file is empty. Expected a JSON list of objects.")
    try:
        value, repeated = _parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[0] == "{":
            if "\n" in text[: error.pos].strip():
                raise InputError(
                    f"{file}:{error.lineno}: more than one JSON value in the file. {_ONE_A_LINE}"
                ) from None
            raise InputError(
                f"{file}:{error.lineno}: more than one JSON value in the file; it looks like JSON Lines. "
                "Rename it to .jsonl."
            ) from None
        where = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise InputError(f"{file}:{error.lineno}: not valid JSON: {where}. Fix it there.") from None
    except ValueError:
        raise InputError(f"{file}: not valid JSON: {_TOO_MANY_DIGITS}. Shorten it, or write it as text.") from None
    except RecursionError:
        raise InputError(f"{file}: the JSON is nested too deeply to be rows. Expected a list of objects.") from None
    if isinstance(value, dict):
        # {"data": [...]} is how several tools wrap a list; with two lists it would be a guess.
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        if len(lists) != 1 or "messages" in value or "conversations" in value:
            keys = ", ".join(map(str, list(value)[:8]))
            are_columns = all(isinstance(item, dict) for item in value.values())
            hint = ' From pandas: to_json("rows.jsonl", orient="records", lines=True).' if are_columns else ""
            raise InputError(f"{file}: expected a JSON list of objects, got one object with the keys {keys}.{hint}")
        value = lists[0]
    if not isinstance(value, list):
        raise InputError(f"{file}: expected a JSON list of objects, got {describe(value)}.")
    for number, row in enumerate(value, start=1):
        source = f"{file} row {number}"
        if not isinstance(fields := _as_row(row), dict):
            raise InputError(f"{source}: expected an object with named fields, got {describe(row)}.")
        _require_unique_keys([each for each in repeated[:1] if each[0] is row], source)
        yield RawRow(fields, source, file=file)
    _require_unique_keys(repeated, str(file))  # within a row


_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


@functools.cache  # a file is read twice
def _say_delimiter(file: Path, delimiter: str) -> None:
    _logger.warning("%s: columns are separated by a %s.", file, _DELIMITERS[delimiter])


def _delimiter(file: Path, stream: TextIO, most_characters: int) -> str:
    """Find the delimiter that divides the first line into most columns; one that the suffix does not say is logged."""
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    lines = iter(functools.partial(stream.readline, most_characters), "")
    header = next((line for line in lines if line.strip()), "")
    stream.seek(0)
    columns = {}
    for delimiter in _DELIMITERS:
        with contextlib.suppress(csv.Error):  # quotes that end in the middle of a field
            columns[delimiter] = len(next(csv.reader([header], delimiter=delimiter, strict=True), []))
    columns = columns or {usual: 1}
    found = max(columns, key=lambda delimiter: (columns[delimiter], delimiter == usual))
    if found != usual:
        _say_delimiter(file, found)
    return found


def _read_csv(file: Path, most_characters: int) -> Iterator[RawRow]:
    header: list[str] = []
    line = 1  # where a record starts: a quoted field may span lines
    # csv's default limit of 128 KiB a field is less than a long document. Process-wide, but larger is harmless
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = _Lines(stream, file, most_characters)
        try:
            delimiter = _delimiter(file, stream, most_characters)
            for record in (reader := csv.reader(lines, delimiter=delimiter, strict=True)):
                # csv takes several lines for a quoted field, so the count starts anew only when a record is whole.
                lines.row_characters = 0
                if record and not header:
                    # Excel's line `sep=;` above the header is no row
                    header = [] if record == ["sep=", ""] else _csv_header(file, line, record)
                elif record and len(record) != len(header):
                    raise InputError(
                        f"{file}:{line}: {len(record)} fields where the header has {len(header)} "
                        f"({', '.join(header)}). Fields that hold a {_DELIMITERS[delimiter]} or a "
                        "line break must be in double quotes."
                    )
                elif len(record) > 1 and [name.strip() for name in record] == header:
                    raise InputError(f"{file}:{line}: is the header again, as where files were joined. Remove it.")
                elif record:
                    yield RawRow(dict(zip(header, record, strict=True)), f"{file}:{line}", file=file)
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{file}:{line}: not valid CSV: {error}. Check the quotes there.") from None


def _csv_header(file: Path, line: int, record: list[str]) -> list[str]:
    header = [name.strip() for name in record]
    for name, count in Counter(header).items():
        if not name:
            raise InputError(
                f"{file}:{line}: a column of the header has no name. Expected a name for each column. The index of a "
                "pandas table is left out by to_csv(index=False)."
            )
        if count > 1:
            raise InputError(f"{file}:{line}: the column {name!r} occurs twice in the header. Rename one of them.")
    return header


def _read_parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        row_bytes = file.stat().st_size // max(parquet.metadata.num_rows, 1)  # large where rows hold images
        batches = parquet.iter_batches(batch_size=min(1024, _BATCH_BYTES // max(row_bytes, 1) + 1))
        rows = (fields for batch in batches for fields in batch.to_pylist())
        for number, fields in enumerate(rows, start=1):
            yield RawRow(fields, f"{file} row {number}", file=file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: can't be read as Parquet: {one_line(error)}. Is the file complete?") from None


def load_hub(path: str, split: str, config_name: str | None, revision: str | None) -> datasets.Dataset:
    """Load a hub dataset: memory-mapped Arrow files, images not decoded.

    Raises InputError: there is none of that name, or the hub can't be reached.
    """
    leave_silent_hub(path)
    import datasets

    try:
        dataset = datasets.load_dataset(path, name=config_name, split=split, revision=revision)
        stored = datasets.Image(decode=False)  # rows get them as they are stored
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, stored)
            elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of them
                dataset = dataset.cast_column(name, type(feature)(stored))
        return dataset
    except Exception as error:  # the hub's client raises many unrelated types, all of them about what was asked for
        hint = "Check data.path, data.config_name, data.split (--config-name and --split of init) and data.revision."
        if isinstance(error, ConnectionError) or "offline" in str(error).lower():
            hint = f"{hub_hint()} Or set data.path to a local file."
        raise InputError(
            f"{path}: no file or directory of that name here, and as a hub dataset it can't be loaded "
            f"(split {split!r}{f', configuration {config_name!r}' if config_name else ''}): {one_line(error)}. {hint}"
        ) from None


def from_json(value: object) -> object:
    """The list or object of a JSON text: CSV has no lists, and some Parquet exports write nested values as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def without_nulls(value: Any, whole: Collection[str] = ()) -> Any:
    """Drop keys whose value is null: Parquet gives every object the keys of all objects. Those ``whole`` stay so."""
    if isinstance(value, dict):
        parts = ((key, inner) for key, inner in value.items() if inner is not None)
        return {key: inner if key in whole else without_nulls(inner, whole) for key, inner in parts}
    return [without_nulls(inner, whole) for inner in value] if isinstance(value, list) else value


def require_whole_characters(value: object, where: str) -> None:
    r"""Refuse half a character: JSON can hold one ("\ud83d"), but no tokenizer takes it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds half a character, {text[error.start]!a}, behind {text[: error.start][-20:]!r}: a text was "
            "cut within a character, and that is no text. Write the whole character, or remove the half."
        ) from None
