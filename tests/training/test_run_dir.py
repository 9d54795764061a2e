"""The lock on a run directory: one training at a time, and a process that died does not keep it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from qvera.config.schema import Recipe
from qvera.training.run_dir import MetricsLog, join_records, read_records, run_lock
from qvera.training.trainer import run_directory
from qvera.utils.errors import InputError, RunFailed
from tests.disk import fill, small_disk

pytestmark = pytest.mark.process


def hold_lock_in_another_process(run_dir: Path, seconds: float) -> int:
    """Process id of a fork that holds the lock, and exits without cleaning up after that time."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with run_lock(run_dir):
            os.write(tell, b"x")
            time.sleep(seconds)
            os._exit(1)
    os.read(ready, 1)
    return pid


def test_the_second_process_is_told_of_the_first_and_a_dead_one_is_succeeded(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run"
    pid = hold_lock_in_another_process(run_dir, seconds=600)
    try:
        with (
            pytest.raises(InputError, match=rf"process {pid} on .* \(since 20.*\) trains in this directory"),
            run_lock(run_dir),
        ):
            pytest.fail("two processes hold one run directory")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert any(run_dir.iterdir())  # it could not clean up
    with run_lock(run_dir):
        assert str(os.getpid()) in "".join(f.read_text() for f in run_dir.glob(".qvera_run.owner"))
    assert not list(run_dir.iterdir())


def test_a_restarted_run_waits_for_the_one_whose_place_it_takes(tmp_path: Path) -> None:
    pid = hold_lock_in_another_process(tmp_path / "run", seconds=0.5)
    with run_lock(tmp_path / "run", wait_seconds=60):
        assert os.waitpid(pid, os.WNOHANG)[0] == pid  # the one that held it has ended


def test_directories_made_for_the_lock_alone_are_removed(tmp_path: Path) -> None:
    with run_lock(tmp_path / "runs" / "run"):
        pass
    assert not (tmp_path / "runs").exists()
    with run_lock(tmp_path / "runs" / "run"):
        (tmp_path / "runs" / "run" / "recipe.yaml").write_text("")
    assert [p.name for p in (tmp_path / "runs" / "run").iterdir()] == ["recipe.yaml"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for where, text in (("file", "is a file"), ("file/run", "nothing can be written")):
        with pytest.raises(InputError, match=text), run_lock(tmp_path / where):
            pytest.fail("locked")


def test_the_recipe_in_a_runs_directory_is_one_of_that_directory(tmp_path: Path) -> None:
    recipe, file = Recipe(model="base", data="rows.jsonl"), tmp_path / "recipe.yaml"
    assert run_directory(recipe, file) == Path("runs/recipe"), "a recipe of that name that no run has written"
    (tmp_path / "run.json").write_text("{}")
    file.write_text(recipe.to_yaml())
    assert run_directory(recipe, file) == tmp_path
    assert run_directory(recipe, tmp_path / "other.yaml") == Path("runs/other")
    elsewhere = recipe.replace(training={"output_dir": "out"})
    assert run_directory(elsewhere, file) == Path("out")
    file.write_text(elsewhere.to_yaml())
    assert run_directory(elsewhere, file) == tmp_path, "a copy of the run in out"


def test_damaged_lines_of_the_log_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n7\n{"loss": 2}\n[]\n{"step": 2}\n{"step": 3}\n{"ste')
    MetricsLog(path, last_step=2).write({"step": 3, "loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5},
    ]  # fmt: skip
    assert list(read_records(tmp_path / "nothing")) == []


def test_records_that_were_joined_before_a_kill_are_not_joined_twice(tmp_path: Path) -> None:
    first, other = tmp_path / "metrics.jsonl", tmp_path / "metrics.rank-00001.jsonl"
    first.write_text('{"round": 1, "rank": 0}\n')
    other.write_text('{"round": 1, "rank": 1}\n')
    left = other.read_bytes()
    join_records(tmp_path, 2)
    other.write_bytes(left)  # the process was killed before it removed the file
    join_records(tmp_path, 2)
    assert first.read_text() == '{"round": 1, "rank": 0}\n{"round": 1, "rank": 1}\n' and not other.exists()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400_000) as disk:
        log = MetricsLog(disk / "metrics.jsonl", last_step=0)
        fill(disk)
        with pytest.raises(RunFailed, match=r"metrics\.jsonl: the disk is full.*--resume"):
            for step in range(1000):
                log.write({"step": step})
