"""The directory of adapters: names, what each means now, and known facts. Imports no torch.

An adapter is known by its content. Each request looks its name up again, and files are read again only if their size,
time or inode has changed. So a replaced file is another adapter under the same name.
"""

import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from qvera.evaluation.named_adapters import listed_directories, name_of, run_of
from qvera.evaluation.report.read import get, get_number, get_text, is_replaced
from qvera.serve.requests import AdapterPart, ResolvedAdapter, UnknownAdapter
from qvera.utils.adapter_names import directory_names, shown_name, unescape_name
from qvera.utils.errors import InputError, did_you_mean
from qvera.utils.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTERS,
    RECIPE_FILE,
    TRAINING_FACTS,
    file_stamp,
    read_json,
    try_read_json,
)
from qvera.utils.formatting import shortened

_SETTLED_NS = 2_000_000_000
"""A file that changed this shortly before it was read is read again: another change may have the same time stamp."""
_MOST_PARTS = 8  # of a blend
_MOST_KNOWN = 10_000  # directories whose hashes are kept
_ONLY = ""  # stands for the adapter's name in a run that trained one
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class AdapterStore:
    """The adapters that clients may name, for any thread. Methods raise UnknownAdapter for an unknown name.

    An adapter in the directory that is called like the base can't be asked for: the name means the base.
    """

    def __init__(self, path: Path | None, base_names: Collection[str] = ()) -> None:
        """``path``: a run of many adapters, or a directory of adapters, perhaps empty. ``base_names`` mean the base."""
        is_run = path is not None and (path / RECIPE_FILE).is_file()
        self.root = path / ADAPTERS if path is not None and is_run else path  # the directory that is listed
        self.base_names = frozenset(base_names)
        self._added: dict[str, Path] = {}
        self._removed: dict[str, Path] = {}
        self._listed: dict[str, Path] = {}
        self._listed_at: tuple[list[int], int] | None = None
        self._known: dict[Path, tuple[list[list[int]], str]] = {}
        """Directory → stamps and SHA-256 of its files, only for files that have settled."""
        self._visible: dict[str, Path] | None = None
        """Listed ones without removed ones, with added ones; None: to be made again."""
        self._run: tuple[Path, list[int], dict[str, dict[str, Any]]] | None = None
        """A run.json, its stamp, and its entries by the adapters' names."""
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """All names, sorted, without reading any adapter."""
        return sorted(self._directories())

    def hidden_names(self) -> list[str]:
        """Names in the directory that mean the base instead of the adapter."""
        self._directories()
        return sorted(self.base_names & set(self._listed))

    def resolve(self, model: str) -> ResolvedAdapter | None:
        """Return what a name, or a blend such as ``support*0.7+legal*0.3``, means now. None: the base.

        Raises:
            UnknownAdapter: no adapter has that name.
            InputError: its files can't be read, or a blend has too many parts.
        """
        if model in self.base_names:
            return None
        known = self._directories()
        weights = self._weights(model, known)
        parts = tuple(AdapterPart(w, known[name], self._sha256(known[name])) for name, w in weights.items())
        if len(parts) == 1 and parts[0].weight == 1:
            return ResolvedAdapter(model, parts[0].sha256, parts)
        # sorted, so that a blend is the same in whatever order its parts are named
        text = json.dumps(sorted((part.sha256, part.weight) for part in parts))
        return ResolvedAdapter(model, hashlib.sha256(text.encode()).hexdigest(), parts)

    def resolve_directory(self, directory: Path, name: str) -> ResolvedAdapter:
        """An adapter directory as it is now, wherever it is. Raises InputError if its files can't be read."""
        sha256 = self._sha256(directory)
        return ResolvedAdapter(name, sha256, (AdapterPart(1.0, directory, sha256),))

    def parts_of(self, model: str) -> list[str]:
        """Names of the adapters in a name or blend. Reads none. Raises as `resolve`; the base is unknown here."""
        return list(self._weights(model, self._directories()))

    def add(self, name: str, directory: Path, replace: bool = False) -> Path | None:
        """Name an adapter directory; ``replace`` takes the name from another. Returns the one that had it before.

        Raises InputError if it is no adapter directory, or another one has the name.
        """
        self._require_not_base(name)
        if not name.strip():
            raise InputError("an adapter's name is empty; expected a text to call it by.")
        directory = directory.absolute()
        read_json(directory / ADAPTER_CONFIG, "a PEFT adapter config", keys=["peft_type"])
        if not (directory / ADAPTER_WEIGHTS).is_file():
            raise InputError(f"{directory}: has no {ADAPTER_WEIGHTS}, so it is not an adapter directory.")
        with self._lock:
            other, listed = self._directories().get(name), self._listed.get(name)
            if other is not None and other.absolute() != directory and not replace:
                raise InputError(f"{shown_name(name)}: is the name of another adapter; unload that one first.")
            if listed is not None and listed.absolute() == directory:
                self._added.pop(name, None)
                self._removed.pop(name, None)
            else:
                self._added[name] = directory
            self._visible = None
        return other

    def remove(self, name: str) -> None:
        """Forget a name. Its files stay, and `add` brings it back."""
        with self._lock:
            self._directory(name)
            self._added.pop(name, None)
            if name in self._listed:
                self._removed[name] = self._listed[name]
            self._visible = None

    def directory_for(self, name: str) -> Path:
        """The directory of the adapter of this name, whether it exists or not.

        Raises InputError for an empty name, one of the base, a blend or an adapter elsewhere, or if there is no root.
        """
        self._require_not_base(name)
        if self.root is None:
            raise InputError("there is no directory of adapters; start the server with --adapters DIR.")
        known = self._directories()
        if name not in known:
            try:
                self._weights(name, known)
            except UnknownAdapter:
                return self.root / directory_names([*known, name])[name]
            raise InputError(f"{shown_name(name)}: means a sum of adapters that are there; expected a name of its own.")
        if known[name].parent.absolute() != self.root.absolute() or unescape_name(known[name].name) != name:
            raise InputError(
                f"{shown_name(name)}: is the name of an adapter in another directory, which stays as it is."
            )
        return known[name]

    def facts(self, name: str) -> dict[str, Any]:
        """Return what the files of an adapter and of its run say about it. Raises InputError if its own can't be read.

        ``name``, ``directory``, ``size_bytes`` of both files, ``base`` and ``rank`` as the config has them, ``changed``
        (when the vectors were written, in seconds since 1970), and, where its run or job says so, ``rows`` trained on
        and held-out losses of base and adapter (``loss_before``, ``loss``). What is not known is None.
        """
        directory = self._directory(name)
        config = read_json(directory / ADAPTER_CONFIG, "a PEFT adapter config")
        try:
            sizes = [(directory / file).stat() for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        except OSError as error:
            raise InputError(f"{directory}: can't be read ({error.strerror}).") from None
        entry = try_read_json(directory / TRAINING_FACTS) or {}
        if not entry or entry.get("adapter_sha256") != self._sha256(directory):  # other vectors are there now
            entry = self._run_entry(directory)
            if is_replaced(entry.get("sha256"), directory / ADAPTER_WEIGHTS):
                entry = {}
        rank, rows = config.get("rank"), get_number(entry, "rows")
        return {
            "name": name,
            "directory": directory,
            "size_bytes": sum(size.st_size for size in sizes),
            "base": get_text(config, "base_model_name_or_path") or None,
            "rank": rank if isinstance(rank, int) else None,
            "changed": sizes[1].st_mtime,
            "rows": None if rows is None else int(rows),
            "loss_before": get_number(entry, "eval_before", "loss"),
            "loss": get_number(entry, "eval_after", "loss"),
        }

    def _require_not_base(self, name: str) -> None:
        if name in self.base_names:
            raise InputError(f"{shown_name(name)}: is the name of the base; an adapter needs another one.")

    def _directories(self) -> dict[str, Path]:
        """Name → directory. The root is listed again only if it has changed."""
        with self._lock:
            if self.root is not None:
                try:
                    stamp = file_stamp(self.root.stat())
                    if self._listed_at is None or self._listed_at[0] != stamp or not _settled(*self._listed_at):
                        now = time.time_ns()  # before it is listed, so that a change meanwhile is seen the next time
                        self._listed = listed_directories(self.root)
                        self._listed_at, self._visible = (stamp, now), None
                except OSError:
                    self._listed, self._listed_at, self._visible = {}, None, None  # it may come, or come back
            if self._visible is None:
                self._visible = {
                    name: path
                    for name, path in self._listed.items()
                    if self._removed.get(name) != path and name not in self.base_names
                } | self._added
            return self._visible

    def _directory(self, name: str) -> Path:
        if (directory := self._directories().get(name)) is None:
            raise self._unknown(name)
        return directory

    def _sha256(self, directory: Path) -> str:
        try:
            stamps = [file_stamp((directory / file).stat()) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        except OSError as error:
            if (directory / RECIPE_FILE).is_file():
                text = "is a run, not an adapter. Serve the run itself, or a directory of adapters."
                raise InputError(f"{directory}: {text}") from None
            raise InputError(f"{error.filename}: can't be read ({error.strerror}).") from None
        with self._lock:
            known = self._known.get(directory)
        if known is not None and known[0] == stamps:
            return known[1]
        now = time.time_ns()  # before the files are read: a change meanwhile leaves them unsettled
        sha256 = read_content(directory).sha256
        with self._lock:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            if all(_settled(stamp, now) for stamp in stamps):
                self._known[directory] = stamps, sha256
            else:
                self._known.pop(directory, None)
        return sha256

    def _weights(self, model: str, known: Collection[str]) -> dict[str, float]:
        """The adapters in a name or blend, and the weight of each."""
        if model in known:  # first, as a name may have + and * in it
            return {model: 1.0}
        weights: dict[str, float] = {}
        for term in model.split("+"):
            name, star, number = term.strip().rpartition("*")
            if not star or not _NUMBER.fullmatch(number) or not math.isfinite(float(number)):
                raise self._unknown(model)
            if name not in known:
                raise self._unknown(name)
            weights[name] = weights.get(name, 0.0) + float(number)
        if len(weights) > _MOST_PARTS:
            raise InputError(f"model: a blend has at most {_MOST_PARTS} adapters, this one {len(weights)}.")
        return weights

    def _unknown(self, name: str) -> UnknownAdapter:
        shown = shown_name(shortened(name, 100))
        return UnknownAdapter(f"there is no adapter {shown}{did_you_mean(name[:100], self.names()[:1000])}")

    def _run_entry(self, directory: Path) -> dict[str, Any]:
        """The entry of an adapter in its run's run.json, if any."""
        if (run := run_of(directory)) is None:
            return {}
        try:
            stamp = file_stamp((run / "run.json").stat())
        except OSError:
            return {}
        with self._lock:
            if self._run is None or self._run[:2] != (run, stamp):
                document = try_read_json(run / "run.json") or {}
                listed = document.get("adapters")
                if isinstance(listed, list):
                    entries = {str(entry.get("name")): entry for entry in listed if isinstance(entry, dict)}
                else:
                    scores = {key: get(document, "result", key) for key in ("eval_before", "eval_after")}
                    facts = {"rows": get(document, "data", "train_rows"), "sha256": get(document, "adapter", "sha256")}
                    entries = {_ONLY: scores | facts}
                self._run = run, stamp, entries
            return self._run[2].get(name_of(directory) or _ONLY, {})


def _settled(stamp: list[int], read_ns: int) -> bool:
    return read_ns - stamp[1] > _SETTLED_NS


class Content(NamedTuple):
    """The bytes of ``adapter_config.json`` and ``adapter_model.safetensors``."""

    config: bytes
    vectors: bytes
    sha256: str  # hex, of both files: the same vectors under another config are another adapter


def read_content(directory: Path) -> Content:
    """Read both files of an adapter. Raises InputError as `read_adapter_file`."""
    config, vectors = read_adapter_file(directory / ADAPTER_CONFIG), read_adapter_file(directory / ADAPTER_WEIGHTS)
    both = hashlib.sha256(config).digest() + hashlib.sha256(vectors).digest()
    return Content(config, vectors, hashlib.sha256(both).hexdigest())


def read_adapter_file(path: Path) -> bytes:
    """A file's bytes. Raises InputError if it is missing or can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: can't be read ({error.strerror}); expected an adapter directory with {ADAPTER_CONFIG} and "
            f"{ADAPTER_WEIGHTS}."
        ) from None
