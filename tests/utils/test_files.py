"""JSON files that people or other programs wrote: read, or refused with the file, the place and what was expected."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors import SafetensorError

import qvera
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import (
    OutputDirectory,
    disk_errors,
    new_directory,
    place_files,
    read_json,
    replace_text,
    require_space,
    try_read_json,
)
from tests.conftest import small_tokenizer
from tests.helpers import start_process, wait_until


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n  "b" 2}', "line 2, column 7 is not JSON"),
        (b"\xff\xfe", "can't be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "can't be read as JSON"),
        (b"[" * 200_000, "can't be read as JSON"),
        (b"[1]", "holds a list; expected the run's record as a JSON object"),
        (b'{"b": 1}', "has no key 'a'"),
        (None, "is missing; expected the run's record"),
    ],
)
def test_bad_json_is_refused_with_its_place(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_json(file, "the run's record", keys=("a",), fix="Run again.")
    assert str(caught.value).startswith(str(file))
    assert str(caught.value).endswith("Run again.")


def test_a_record_that_can_be_made_again_is_read_or_none(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    assert try_read_json(file) is None
    file.write_text('{"a": 1')
    assert try_read_json(file) is None
    file.write_text('{"a": 1}')
    assert try_read_json(file) == {"a": 1}


def test_the_utilities_but_those_of_devices_and_the_cache_of_bases_import_no_torch() -> None:
    code = f"""
import importlib, pkgutil, sys, types
package = sys.modules["qvera"] = types.ModuleType("qvera")  # its packages alone, whatever the package itself imports
package.__path__ = [{str(Path(qvera.__file__).parent)!r}]
for module in pkgutil.iter_modules(importlib.import_module("qvera.utils").__path__):
    if module.name not in ("accelerator", "memory"):
        importlib.import_module("qvera.utils." + module.name)
import qvera.models.quantized_record  # what `qvera cache ls` reads
print(len(sys.modules), sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["[]"]


IDENTITY = {"source": ["a", 1], "dtype": "float16"}


def shard(out: Path, name: str, data: bytes = b"data") -> str:
    (out / name).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def test_the_same_work_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with OutputDirectory.open(out, {"source": ("a", 1), "dtype": "float16"}, "export") as work:
        assert not work.has("one")
        work.facts["layers"] = {"x": 0.5}
        work.finished("one", shard(out, "one"))
    with pytest.raises(InputError, match="unfinished export of something else"):
        OutputDirectory.open(out, {**IDENTITY, "dtype": "bfloat16"}, "export")
    with OutputDirectory.open(out, IDENTITY, "export") as work:
        assert work.has("one")
        assert not work.has("two")
        assert work.facts == {"layers": {"x": 0.5}}
        (out / "one").write_bytes(b"dat!")
        assert not work.has("one"), "a shard that was changed since is not finished"
        (out / ".two.partial").write_bytes(b"x")
        work.complete()
    assert [p.name for p in out.iterdir()] == ["one"]
    with pytest.raises(InputError, match="is not empty"):
        OutputDirectory.open(out, IDENTITY, "export")


def test_a_file_a_full_directory_and_a_damaged_state_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, file in (("full", "mine"), ("bad", ".qvera_export_state.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{")
    for out, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "is not empty"),
        (tmp_path / "bad", "something else"),
        (Path("/proc/nowhere/out"), "can't be written"),
    ):
        with pytest.raises(InputError, match=words):
            OutputDirectory.open(out, IDENTITY, "export")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]


def hold(out: Path, mark: Path) -> None:
    with OutputDirectory.open(out, IDENTITY, "export"):
        mark.touch()
        time.sleep(600)


def test_the_directory_that_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), Path("../here"), tmp_path / "link"):
        with pytest.raises(InputError, match="is the directory that this command runs in"), new_directory(out):
            pytest.fail("it was opened")
    with new_directory(Path("below")) as partial:
        (partial / "file").touch()
    assert [p.name for p in (tmp_path / "here").rglob("*")] == ["below", "file"]


def test_a_link_to_an_empty_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with new_directory(tmp_path / "out") as partial:
        (partial / "file").touch()
    assert (tmp_path / "out").is_symlink() and [p.name for p in (tmp_path / "disk").iterdir()] == ["file"]


def test_one_process_at_a_time_and_the_lock_of_a_killed_one_is_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = start_process(hold, out, tmp_path / "mark")
    wait_until((tmp_path / "mark").exists)
    with pytest.raises(InputError, match="another process is writing this export"):
        OutputDirectory.open(out, IDENTITY, "export")
    holder.kill()
    holder.join()
    with OutputDirectory.open(out, IDENTITY, "export") as work:
        work.complete()
    assert list(out.iterdir()) == []


def test_who_waits_for_the_lock_finds_what_was_finished_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    work = OutputDirectory.open(out, IDENTITY, "export")

    class LateLock(FileLock):
        """Another process ends between a look at the directory and the lock on it."""

        def acquire(self, *args: Any, **kwargs: Any) -> Any:
            shard(out, "one")
            work.complete()
            work.__exit__()
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr("qvera.utils.files.FileLock", LateLock)
    with pytest.raises(InputError, match="is not empty"):
        OutputDirectory.open(out, IDENTITY, "export")
    assert [p.name for p in out.iterdir()] == ["one"], "neither a state nor a lock is left in it"


def test_small_files_are_whole_or_as_they_were(tmp_path: Path) -> None:
    replace_text(tmp_path / "a.json", json.dumps({"a": 1}))

    def dying(where: Path) -> None:
        (where / "a.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place_files(tmp_path, dying)
    for text in "{}", "[]":

        def two(where: Path, text: str = text) -> None:
            (where / "chat_templates").mkdir()  # as a tokenizer with several writes them
            for name in "b.json", "chat_templates/c.json":
                (where / name).write_text(text)

        place_files(tmp_path, two)
    written = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.json")}
    assert written == {"a.json": '{"a": 1}', "b.json": "[]", "chat_templates/c.json": "[]"}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_or_read_only_disk_is_reported_and_other_errors_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the export needs 1e6 TB, and .* are free"):
        require_space(tmp_path / "not" / "yet", 10**18, "the export")
    require_space(tmp_path, 1, "the export")
    for number, words in (
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, r"it can't be written \(Read-only file system\)"),
        (errno.EFBIG, r"it can't be written \(File too large\), since .* `ulimit -f`"),
    ):
        text = os.strerror(number)
        of_rust = SafetensorError(f"Error while serializing: I/O error: {text} (os error {number})")
        for error in (OSError(number, text, "shard.bin"), of_rust):
            with pytest.raises(RunFailed, match=rf"^shard 3: {words}.* Kept: 2\.$"), disk_errors("shard 3", "Kept: 2."):
                raise error
    with pytest.raises(RunFailed, match="^merged: the disk is full"), disk_errors("merged", ""):
        small_tokenizer().backend_tokenizer.save("/dev/full")
    for other in (FileNotFoundError(errno.ENOENT, "gone"), SafetensorError("InvalidHeaderDeserialization")):
        with pytest.raises(type(other)), disk_errors("shard 3", ""):
            raise other
