"""Checkpoints of Tinker's clients: paths, owners, expiry, copies and downloads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvera.serve.api.errors import ApiError
from qvera.serve.tinker import checkpoints as module
from qvera.serve.tinker.checkpoints import Checkpoint, CheckpointKind, Checkpoints
from qvera.serve.tinker.database import Database
from qvera.utils.errors import InputError

RUN = "session-1:train:0"
ABOUT = {"base": "tiny", "method": "lora", "rank": 8, "targets": "all-linear", "user_metadata": {"a": "b"}}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `Checkpoints` sees, in its only element."""
    now = [1e9]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    return now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Checkpoints]:
    with contextlib.closing(Database(tmp_path / "tinker.sqlite")) as database:
        yield Checkpoints(database, tmp_path, most_bytes=1000)


def save(
    store: Checkpoints,
    name: str,
    kind: CheckpointKind = "weights",
    owner: str = "anna",
    ttl: int | None = None,
    **about: Any,
) -> Checkpoint:
    place, overwrite = store.place(RUN, kind, name), about.pop("overwrite", False)
    store.require_free(place, owner, overwrite, 1)
    written = write(place, about.get("text", "12345"))
    store.add(place, written, owner, overwrite, ttl, {**ABOUT, "call": 1, **about})
    return place


def write(place: Checkpoint, text: str = "12345", call: int = 1) -> Path:
    """Write the files of a save to a directory of its own."""
    written = place.directory.with_name(f".{call}")
    written.mkdir(parents=True)
    for file in ("a.json", "b.safetensors"):
        (written / file).write_text(text)
    return written


def test_a_path_has_three_parts_and_a_directory_of_its_own(store: Checkpoints, tmp_path: Path) -> None:
    place = save(store, "step-10.b")
    assert place.path == f"tinker://{RUN}/weights/step-10.b"
    assert place.directory == tmp_path / "runs/session-1_train_0/weights/step-10.b"
    found = store.find(place.path, "anna", "weights")
    assert found[:5] == place[:5] and (found.bytes, found.expires, found.public) == (10, None, False)
    assert found.about["user_metadata"] == {"a": "b"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "a b", "a?b", "a#b", "ü", "a" * 129, "a\n"])
def test_a_name_that_no_url_could_hold_is_refused(store: Checkpoints, name: str) -> None:
    with pytest.raises(InputError, match="is no name of a checkpoint"):
        store.place(RUN, "weights", name)


def test_a_moved_training_directory_keeps_its_checkpoints(store: Checkpoints, tmp_path: Path) -> None:
    path = save(store, "a").path
    store.database.close()
    (tmp_path / "moved").mkdir()
    for file in ("runs", "tinker.sqlite"):
        (tmp_path / file).rename(tmp_path / "moved" / file)
    with contextlib.closing(Database(tmp_path / "moved/tinker.sqlite")) as database:
        assert (Checkpoints(database, tmp_path / "moved", 1000).find(path, "anna").directory / "a.json").is_file()


def test_unknown_and_foreign_look_the_same_and_published_ones_can_be_read_by_all(store: Checkpoints) -> None:
    path = save(store, "a").path
    unknown = path.replace("/a", "/b")
    messages = []
    for asked, owner in ((path, "ben"), (unknown, "anna")):
        for call in (store.find, lambda path, owner: store.change(path, owner, "public", 1)):
            with pytest.raises(ApiError) as caught:
                call(asked, owner)
            assert caught.value.status == 404
            messages.append(caught.value.message.replace(asked, "PATH"))
    assert len(set(messages)) == 1
    store.change(path, "anna", "public", 1)
    assert store.find(path, "ben").path == path
    with pytest.raises(ApiError):
        store.change(path, "ben", "expires", 0)
    store.change(path, "anna", "public", 0)
    with pytest.raises(ApiError):
        store.find(path, "ben")


def test_a_name_is_taken_once_unless_overwritten_or_saved_again_by_the_same_call(store: Checkpoints) -> None:
    place = save(store, "a", text="first")
    with pytest.raises(InputError, match="exists"):
        store.require_free(place, "anna", False, 2)
    store.require_free(place, "anna", False, 1)  # after a restart
    save(store, "a", overwrite=True, text="second!")
    assert store.find(place.path, "anna").bytes == 14
    assert store.page("anna", None, 10, 0)[1] == 1


def test_of_two_saves_of_one_name_at_a_time_the_first_to_end_counts(store: Checkpoints) -> None:
    place = store.place(RUN, "weights", "a")
    for call in (1, 2):
        store.require_free(place, "anna", False, call)
    first, second = write(place, "first", 1), write(place, "second", 2)
    store.add(place, first, "anna", False, None, {**ABOUT, "call": 1})
    store.add(place, first, "anna", False, None, {**ABOUT, "call": 1})  # the database had refused it
    with pytest.raises(InputError, match="exists"):
        store.add(place, second, "anna", False, None, {**ABOUT, "call": 2})
    assert {file.read_text() for file in store.find(place.path, "anna").directory.iterdir()} == {"first"}
    assert list(place.directory.parent.iterdir()) == [place.directory]


def test_a_checkpoint_that_expires_while_it_is_saved_over_is_the_new_one(
    store: Checkpoints, clock: list[float]
) -> None:
    place = save(store, "a", text="old", ttl=3600)
    store.require_free(place, "anna", True, 2)
    written = write(place, "newer")
    clock[0] += 3601
    store.remove_expired()
    store.add(place, written, "anna", True, None, {**ABOUT, "call": 2})
    assert (store.find(place.path, "anna").directory / "a.json").read_text() == "newer"


def test_an_expired_checkpoint_is_gone_with_its_files(store: Checkpoints, clock: list[float]) -> None:
    path, kept = save(store, "a", ttl=3600).path, save(store, "b", ttl=3600).path
    store.change(kept, "anna", "expires", None)
    clock[0] += 3601
    with pytest.raises(ApiError):
        store.find(path, "anna")
    assert [one.path for one in store.page("anna", RUN, 10, 0)[0]] == [kept]
    store.remove_expired()
    assert not store.place(RUN, "weights", "a").directory.exists() and store.find(kept, "anna")
    assert store.database.rows("SELECT COUNT(*) FROM checkpoints")[0][0] == 1


def test_a_deleted_one_leaves_nothing_and_its_name_is_free(store: Checkpoints) -> None:
    place = save(store, "a")
    store.change(place.path, "anna", "expires", 0)
    assert not place.directory.exists()
    save(store, "a")


def test_a_key_has_no_more_bytes_than_allowed(store: Checkpoints) -> None:
    save(store, "a", text="x" * 500)
    with pytest.raises(InputError, match=r"take 1\.00 kB, and 1\.00 kB is the most; delete some"):
        store.require_free(store.place(RUN, "weights", "b"), "anna", False, None)
    store.require_free(store.place(RUN, "weights", "b"), "ben", False, None)


def test_a_copy_stays_when_its_source_changes_and_is_made_once_for_a_call(store: Checkpoints) -> None:
    source = save(store, "a", text="first")
    with pytest.raises(ApiError):
        store.copy(source.path, "ben", None, "key-1")
    store.change(source.path, "anna", "public", 1)
    place = store.copy(source.path, "ben", 3600, "key-1")
    assert store.copy(source.path, "ben", 3600, "key-1").path == place.path
    assert store.copy(source.path, "ben", 3600, "key-2").path != place.path
    assert (place.kind, place.name) == ("weights", "a") and place.run != RUN
    save(store, "a", overwrite=True, text="second")
    store.change(source.path, "anna", "expires", 0)
    assert (place.directory / "a.json").read_text() == "first"
    found = store.find(place.path, "ben")
    assert found.expires is not None and not found.public
    (run,) = store.database.rows("SELECT * FROM models WHERE id = ?", (place.run,))
    assert run["owner"] == "ben" and run["ended"] is not None


def test_two_who_ask_for_urls_at_one_time_get_one_token(store: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found, make = save(store, "a", "external_weights").path, list[str](), module.secrets.token_urlsafe
    other = threading.Thread(target=lambda: found.append(store.download_token(path, "anna")[1]))

    def making(size: int) -> str:
        monkeypatch.undo()
        other.start()
        other.join(0.5)
        return make(size)

    monkeypatch.setattr(module.secrets, "token_urlsafe", making)
    found.append(store.download_token(path, "anna")[1])
    other.join(20)
    assert found[0] == found[1] and store.download(found[0], "a.json").is_file()


def test_a_token_opens_the_files_of_one_export_for_an_hour(store: Checkpoints, clock: list[float]) -> None:
    place = save(store, "a", "external_weights")
    _, token, ends = store.download_token(place.path, "anna")
    assert ends == clock[0] + 3600
    assert store.download(token, "a.json") == place.directory / "a.json"
    for wrong, file in ((token, "../a/a.json"), (token, ".."), (token, "c.json"), ("", "a.json"), ("null", "a.json")):
        with pytest.raises(ApiError):
            store.download(wrong, file)
    clock[0] += 1800
    assert store.download_token(place.path, "anna")[1:] == (token, ends + 1800)
    clock[0] += 3601
    with pytest.raises(ApiError):
        store.download(token, "a.json")
    with pytest.raises(InputError, match="expected external_weights"):
        store.download_token(save(store, "a").path, "anna")
