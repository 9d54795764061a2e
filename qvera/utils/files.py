"""Files: where they are, how content that may be wrong is read, and how a kill leaves whole ones. Imports no torch.

    with OutputDirectory.open(out, identity, what="export") as work:
        for name in planned:
            if not work.has(name):
                work.finished(name, write_shard(out / name, ...))      # its SHA-256
        ...the small files; what makes the directory a model (config.json) last, with `replace_text`
        work.complete()

A hidden state file lists the finished shards and the ``identity``: all that the bytes depend on. A directory with
another identity is refused. A lock lets one process at a time work there; the kernel drops that of a killed process.
"""

import codecs
import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from pydantic_core import to_jsonable_python

from qvera.utils import formatting
from qvera.utils.errors import InputError, RunFailed, did_you_mean_path


def existing_parent(path: Path) -> Path:
    """Return the path itself, or the nearest directory above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def is_recipe_of_run(file: Path) -> bool:
    """Whether a recipe is the one that a run has written into its directory."""
    return file.name == RECIPE_FILE and (file.parent / "run.json").exists()


def no_directory(path: Path) -> str:
    """Say that a path should be a directory and is not, with a directory beside it that may be meant."""
    if path.suffix in (".yaml", ".yml") and path.is_file():
        place = path.parent if is_recipe_of_run(path) else f"runs/{path.stem}, or its training.output_dir"
        return f"{path}: is a recipe. Name the directory of its run ({place})."
    if path.exists():
        return f"{path}: is a file, not a directory."
    run = Path("runs", path.name)  # where a training writes it, if the recipe does not say
    others = [run] if run.is_dir() else path.parent.glob("*/")
    return f"{path}: no such directory{did_you_mean_path(path, others)}"


def refuse_runs(directory: Path) -> None:
    """Raise InputError for a directory of runs that is no run and no model, a checkpoint, and a run's beginning."""
    if (directory / RUN_OWNER).is_file() and not (directory / RECIPE_FILE).is_file():
        raise InputError(f"{directory}: a training has just begun here, and has written no file yet. Wait for it.")
    run = directory.parent.parent
    if directory.parent.name == "checkpoints" and (run / RECIPE_FILE).is_file():
        advice = f"Name the run {run}."
        if not (run / "adapter").is_dir() and not (run / ADAPTERS).is_dir():
            advice = f"The run has no adapter yet: `qvera train {run / RECIPE_FILE} --resume` finishes it."
        raise InputError(f"{directory}: is a checkpoint from which `qvera train --resume` goes on. {advice}")
    if runs := runs_in(directory):
        raise InputError(
            f"{directory}: is a directory of runs. Name one of them: {formatting.first_of([*map(str, runs)], 8)}."
        )


def runs_in(directory: Path) -> list[Path]:
    """Return the runs in a directory that is no run and no model itself."""
    if any((directory / name).exists() for name in (RECIPE_FILE, "config.json")):
        return []
    return sorted(file.parent for file in directory.glob(f"*/{RECIPE_FILE}"))


def refuse_file_name(prompt: str, where: str) -> None:
    """Raise InputError where a prompt is the name of a file of prompts that is here: those were meant."""
    name = prompt.removeprefix("@")
    if name.lower().endswith((".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")) and os.path.isfile(name):
        raise InputError(
            f"{where}: {prompt!r} names a file here. `qvera generate RUN {name}` answers the prompts in it."
        )


def read_json(path: Path, what: str, keys: Collection[str] = (), fix: str = "") -> dict[str, Any]:
    """Read a JSON file that has to hold an object with these ``keys``; InputError if it does not.

    Messages say ``what`` was expected ("the adapter's config") and end with ``fix``, a sentence on what to do.
    """
    end = f" {fix}" if fix else ""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; expected {what}.{end}") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error}); expected {what}.{end}") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno}, column {error.colno} is not JSON ({error.msg}); expected {what}.{end}"
        ) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, thousands of brackets
        raise InputError(f"{path}: can't be read as JSON ({error}); expected {what}.{end}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a {type(document).__name__}; expected {what} as a JSON object.{end}")
    missing = [key for key in keys if key not in document]
    if missing:
        raise InputError(f"{path}: has no key {missing[0]!r}; expected {what}.{end}")
    return document


def try_read_json(path: Path) -> dict[str, Any] | None:
    """Do what `read_json` does, but return None where it would raise: for records that can be made again."""
    try:
        return read_json(path, "a JSON object")
    except InputError:
        return None


def version_of(package: str) -> str:
    """Return the version of an installed package, or that it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions of Python and of each package that a result can depend on."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "qvera")
    found = {"python": platform.python_version(), **{package: version_of(package) for package in packages}}
    with contextlib.suppress(metadata.PackageNotFoundError):  # an extra's: objectives on preferences
        found["trl"] = metadata.version("trl")
    return found


def other_writer(run_dir: Path) -> str:
    """Return a line for the end of an error, where run.json says that another version of qvera wrote the run; or ""."""
    versions, own = (try_read_json(run_dir / "run.json") or {}).get("versions"), version_of("qvera")
    writer = versions.get("qvera", own) if isinstance(versions, dict) else own
    line = f"\nqvera {writer} wrote this run, and this is {own}. If that is newer, update qvera."
    return "" if writer == own else line.encode(errors="replace").decode()  # JSON can hold half a character


def not_utf8(file: Path) -> InputError:
    """Return the error about a text file whose bytes are no UTF-8: the line, and how to convert the file."""
    # Read once more as bytes, since the error of a text stream does not tell the line.
    decoder, number = codecs.getincrementaldecoder("utf-8")(), 1
    with file.open("rb") as stream:
        head = stream.peek(2)[:2]
        for chunk in iter(functools.partial(stream.read, 2**20), b""):
            try:
                decoder.decode(chunk)
                number += chunk.count(b"\n")
            except UnicodeDecodeError as error:
                number += error.object[: error.start].count(b"\n")
                guess = "UTF-16" if head in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
                return InputError(
                    f"{file}:{number}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); the file looks like "
                    f"{guess}. Convert it, for example: iconv -f {guess} -t UTF-8 OLD > NEW."
                )
    return InputError(f"{file}: not UTF-8 text.")


def file_sha256(path: Path) -> str:
    """Hash a file's bytes by SHA-256, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_stamp(facts: os.stat_result) -> list[int]:
    """Return size, mtime_ns and inode: a cheap way to notice that a file (or a link's target) has changed."""
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def read_at(descriptor: int, into: memoryview, offset: int) -> bool:
    """Fill ``into`` from byte ``offset`` of an open file; False where the file ends too early."""
    done = 0
    while done < len(into):
        got = os.preadv(descriptor, [into[done:]], offset + done)
        if got == 0:
            return False
        done += got
    return True


def plain_json(value: Any) -> Any:
    """Copy a JSON value with null in place of NaN and Inf, which other parsers refuse."""
    return to_jsonable_python(value, inf_nan_mode="null")


RECIPE_FILE = "recipe.yaml"
"""The recipe of a run, in its directory."""
RUN_OWNER = ".qvera_run.owner"
"""In a run's directory: the process that trains there (host, pid, start in ISO format)."""
RUN_PROGRESS = ".qvera_run.progress"
"""In a run's directory: how far the present phase is (`qvera.utils.progress.Phase`)."""
ADAPTERS = "adapters"
"""In a run that trained many adapters: one directory for each."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"
"""transformers' file; beside an adapter of the hub, the template that it was trained with."""
TRAINING_FACTS = "qvera_training.json"
"""Beside an adapter's vectors: what a fine-tuning job trained it on."""
CERTIFICATE = "qvera_export.json"
"""Beside an exported checkpoint: what was merged onto what."""


def cache_root() -> Path:
    """Return the directory of all caches: ``$QVERA_CACHE``, else ``$XDG_CACHE_HOME/qvera``, else ``~/.cache/qvera``."""
    if own := os.environ.get("QVERA_CACHE"):
        return Path(resolve_path(own))
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qvera"


def resolve_path(path: str | Path) -> str:
    """Expand ``~`` in a path. A hub id stays as it is, and a ``~name`` of no user."""
    return os.path.expanduser(path)  # Path.expanduser raises for a user that is not known


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


class OutputDirectory(contextlib.AbstractContextManager["OutputDirectory"]):
    """A directory that is being filled, and the lock on it.

    ``shards`` is file name → SHA-256 of the finished ones. ``facts`` are the caller's JSON values, saved by `finished`.
    """

    def __init__(self, out: Path, state: Path, document: dict[str, Any], lock: FileLock) -> None:
        self.out, self._state, self._document, self._lock = out, state, document, lock
        self.shards: dict[str, str] = document["shards"]
        self.facts: dict[str, Any] = document["facts"]

    @classmethod
    def open(cls, out: Path, identity: dict[str, Any], what: str) -> Self:
        """Take a directory that is new or empty, or was left by a killed process with the same ``identity``.

        ``what`` is one word for the state file's name and for messages: ``export``, ``quantize``.

        Raises:
            InputError: it holds something else, is not writable, or another process works in it.
        """
        state = require_new_or_unfinished(out, what)
        # As it reads back from the file (tuples become lists), so that both can be compared.
        fresh = {"identity": json.loads(json.dumps(identity)), "shards": {}, "facts": {}}
        lock = FileLock(out / f".qvera_{what}.lock", timeout=0)
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            require_new_or_unfinished(out, what)  # again: meanwhile another process may have finished here
            if not state.is_file():
                replace_text(state, json.dumps(fresh))
        except Timeout:
            raise InputError(f"{out}: another process is writing this {what} now. Wait for it.") from None
        except InputError:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            raise
        except OSError as error:
            lock.release()
            raise InputError(f"{out}: can't be written ({error.strerror or error}). Name another directory.") from None
        found = try_read_json(state)
        if found is None or found.get("identity") != fresh["identity"]:
            lock.release()
            raise InputError(
                f"{out}: holds an unfinished {what} of something else. Delete it, or name another directory."
            )
        return cls(out, state, found, lock)

    def has(self, name: str) -> bool:
        """Whether a shard is finished. Its bytes are hashed and compared."""
        target = self.out / name
        return name in self.shards and target.is_file() and file_sha256(target) == self.shards[name]

    def finished(self, name: str, sha256: str) -> None:
        """Note that this shard is whole and on disk."""
        self.shards[name] = sha256
        replace_text(self._state, json.dumps(self._document))

    def complete(self) -> None:
        """Remove state, lock and partial files."""
        for leftover in self.out.glob(".*.partial"):
            leftover.unlink()
        self._state.unlink()
        # While it is held: after the release, another process may hold this very file, and a third one make a new one.
        # Who has opened it by now gets a lock without a name, and finds that all is finished.
        Path(self._lock.lock_file).unlink(missing_ok=True)
        flush(self.out)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def require_new_or_unfinished(out: Path, what: str) -> Path:
    """Raise InputError where `OutputDirectory.open` would, for what is in the directory; return its state file."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a directory that is new or empty.")
    state = out / f".qvera_{what}_state.json"
    # killed in its first moment, an export leaves a lock or half a state file: nothing of anyone's
    if out.is_dir() and not state.is_file() and any(not p.name.startswith(f".qvera_{what}") for p in out.iterdir()):
        raise InputError(f"{out}: is not empty. Nothing is overwritten; name a directory that is new or empty.")
    return state


def require_empty(out: Path) -> None:
    """Raise InputError where a directory holds something, or `new_directory` can't put another one in its place."""
    if out.resolve() == Path.cwd():  # an empty one too: who is in it would be in a directory that is gone
        raise InputError(
            f"{out}: is the directory that this command runs in, and what is written takes the place of a directory as "
            "a whole. Name another one."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out}: is not an empty directory. Nothing is overwritten; name a directory that is new or empty."
        )


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``out``, or is deleted after an error; InputError as `require_empty`."""
    require_empty(out)
    out = out.resolve()  # a link to an empty directory stays one
    # Beside ``out``, because a rename is one step only within a file system.
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out}: can't be written ({error}). Name another directory.") from None
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Fsync a file or a directory: a rename must not reach the disk before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two files or directories in one step, so no name is ever missing; False where that can't be done."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


def take_place(written: Path, directory: Path) -> None:
    """Rename a directory to ``directory``, on the disk, and delete what had that name, or only the link that it was.

    Where the system can exchange two names in one step, ``directory`` is there at any moment.
    """
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    if not (directory.exists() and exchange(written, directory)):
        if directory.exists():
            discard(old)
            directory.rename(old)
        written.rename(directory)
    flush(directory.parent)
    for replaced in (written, old):
        discard(replaced)


def discard(directory: Path) -> None:
    """Delete a directory, if there is one. What a link leads to stays."""
    if directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file's text: after a kill it has the new text or the old one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write a whole file to; then it takes the place of ``path``, on the disk."""
    partial = path.with_name(f".{path.name.lstrip('.')}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a write to a full disk names no file
        raise
    finally:
        partial.unlink(missing_ok=True)  # after a failure, such as a full disk
    flush(path.parent)


def place_files(out: Path, save: Callable[[Path], Any]) -> None:
    """Let a library save small files (``save_pretrained``) to a scratch directory, then move each to ``out`` whole."""
    scratch = out / ".small.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        save(scratch)
        for file in sorted(scratch.iterdir()):
            flush(file)
            if file.is_dir():  # a directory takes the place of an empty one only
                shutil.rmtree(out / file.name, ignore_errors=True)
            file.replace(out / file.name)
        flush(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_space(out: Path, needed_bytes: int, what: str) -> None:
    """Raise InputError where less than ``needed_bytes`` are free."""
    free = shutil.disk_usage(existing_parent(out)).free
    if free < needed_bytes:
        raise InputError(
            f"{out}: {what} needs {formatting.size(needed_bytes)}, and {formatting.size(free)} are free on this disk. "
            "Make room, or choose another disk (for the cache: QVERA_CACHE)."
        )


@contextlib.contextmanager
def disk_errors(what: str, kept: str) -> Iterator[None]:
    """Turn a full or unwritable disk, met by Python, safetensors or tokenizers, into RunFailed.

    ``what`` is being written. ``kept`` ends the message: what is not lost, and what to do.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises this very class
        in_text = re.search(r"\(os error (\d+)\)", str(error))  # where safetensors and tokenizers have the number
        number = getattr(error, "errno", None) or (int(in_text[1]) if in_text else 0)
        if number not in (*NO_SPACE, *_UNWRITABLE):
            raise
        reason = "the disk is full" if number in NO_SPACE else f"it can't be written ({os.strerror(number)})"
        if number == errno.EFBIG:
            reason += ", since a file may not become so large here: see `ulimit -f`, or the limit of the file system"
        file = error.filename if isinstance(error, OSError) else None
        where = f" ({file})" if file and file != what else ""
        raise RunFailed(f"{what}: {reason}{where}. {kept}") from None
