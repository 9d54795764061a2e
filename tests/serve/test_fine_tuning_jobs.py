"""Jobs of a server that is killed, full disks, damaged databases: nothing is lost, and nothing comes twice."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvera.config.schema import Recipe
from qvera.evaluation.load import Artifact
from qvera.serve.fine_tuning import jobs as jobs_module
from qvera.serve.fine_tuning import worker as worker_module
from qvera.serve.fine_tuning.database import OPEN, Job
from qvera.serve.fine_tuning.directory import DATABASE, TrainingDirectory, Upload
from qvera.serve.fine_tuning.jobs import Jobs
from qvera.serve.fine_tuning.preparing import Recipes, require_short_rows
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.paths import ADAPTER_WEIGHTS
from tests.helpers import wait_until
from tests.serve.scripted_training import ScriptedTrainer, chat_rows, jobs_of, target

STEPS = 5


class Killed(BaseException):
    """Where the process would end."""


def send(jobs: Jobs, rows: bytes) -> str:
    upload = Upload(jobs.directory, "me", "rows.jsonl")
    upload.write(rows)
    return upload.finish("fine-tune").id


@contextlib.contextmanager
def server(root: Path, trainer: ScriptedTrainer | None = None, served: Artifact | None = None) -> Iterator[Jobs]:
    """The jobs of a server over a directory. It ends as by SIGTERM: what is being trained is saved."""
    (root / "adapters").mkdir(parents=True, exist_ok=True)
    with (
        TrainingDirectory.open(root / "training") as directory,
        jobs_of(directory, root / "adapters", trainer or ScriptedTrainer(), served=served) as jobs,
    ):
        yield jobs


def create(jobs: Jobs, suffix: str | None = "anna", held_out: str | None = None, **changes: Any) -> Job:
    """A job of `STEPS` steps."""
    file_id = send(jobs, chat_rows(4))
    hyperparameters = {"n_epochs": float(STEPS), "batch_size": 4, "learning_rate_multiplier": "auto"}
    wanted: dict[str, Any] = {"seed": None, "asked": hyperparameters, "metadata": {}, "replaces": False, **changes}
    job = Job("me", suffix or "", "tiny", file_id, held_out, **wanted)
    return jobs.create(job, lambda name: True, None)


def run_all(jobs: Jobs) -> None:
    """As an engine would, until nothing is left to do."""

    def nothing_left() -> bool:
        while jobs.worker.has_work():
            jobs.worker.run_slice()
        return not [job for job in jobs.database.open_jobs() if job.status != "paused"]

    wait_until(nothing_left, 20)


def wait_for_rows(jobs: Jobs, job: Job) -> None:
    wait_until(lambda: jobs.worker.has_work() and jobs.database.job(job.id).status == "queued")


def kill_at(number: int, trainer: ScriptedTrainer, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process at the ``number``-th of all calls that write something, before it or after it."""
    calls = 0

    def count(when: str) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Killed(when)

    def killing(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            what = f"move to {arguments[2]}" if name == "move" else name
            count(f"before {what}")
            result = call(*arguments, **settings)
            count(f"after {what}")
            return result

        return wrapped

    for owner, name in (
        (trainer, "begin"),
        (trainer, "run_slice"),
        (trainer, "save"),
        (trainer, "save_adapter"),
        (trainer, "end"),
        (jobs.database, "move"),
        (jobs.database, "add"),
        (jobs.directory, "write_results"),
        (worker_module, "write_facts"),
    ):
        monkeypatch.setattr(owner, name, killing(getattr(owner, name), name))


def test_a_job_killed_at_any_call_goes_on_and_comes_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_SAVE_STEPS", 2)
    number, places = 0, set()
    while True:
        number += 1
        here, killed = tmp_path / str(number), None
        root = here / "adapters"
        with monkeypatch.context() as patched:
            trainer = ScriptedTrainer()
            with server(here, trainer) as jobs:
                job = create(jobs)
                wait_for_rows(jobs, job)
                kill_at(number, trainer, jobs, patched)
                try:
                    run_all(jobs)
                except Killed as error:
                    killed = str(error)
                    jobs.worker.close = lambda: None  # type: ignore[method-assign]  # nothing is saved
        if killed is None:
            break
        places.add(killed)
        with server(here) as jobs:
            run_all(jobs)
            done = jobs.database.job(job.id)
            assert done.status == "succeeded", (killed, done.error)
            assert done.trained_tokens == 10 * STEPS
            assert (root / "anna" / ADAPTER_WEIGHTS).read_text() == f"{job.id} after step {STEPS}"
            assert [path.name for path in root.iterdir()] == ["anna"]
            steps = [event.step for event in jobs.database.metrics(job.id)]
            assert steps == list(range(1, STEPS + 1)), killed
            files = {path.stem for path in jobs.directory.files.iterdir()}
            assert files == {job.training_file, done.result_file}
            assert list(jobs.directory.states.iterdir()) == []
    assert {"after save_adapter", "after save", "after write_facts"} <= places
    assert {"before move to succeeded", "after move to succeeded"} <= places
    assert number > 30


def test_steps_after_the_last_saved_state_are_taken_again(tmp_path: Path) -> None:
    with server(tmp_path) as jobs:
        job = create(jobs)
        wait_until(lambda: jobs.worker.has_work())
        for _ in range(3):
            jobs.worker.run_slice()
    assert jobs.directory.state(job.id).exists()  # leaving it saved it, as SIGTERM does
    with server(tmp_path) as jobs:
        run_all(jobs)
        assert [event.step for event in jobs.database.metrics(job.id)] == [1, 2, 3, 4, 5]
        said = [event.message for event in jobs.database.events(job.id, None, 100)]
        assert any("goes on after step 3" in text for text in said)


def test_a_job_does_not_go_on_by_another_recipe(tmp_path: Path) -> None:
    with server(tmp_path) as jobs:
        begun, fresh = create(jobs), create(jobs, "ben")
        wait_until(lambda: jobs.database.job(fresh.id).status == "queued")
        jobs.change(fresh.id, "me", "pause")
        jobs.worker.run_slice()
        jobs.change(fresh.id, "me", "resume")
    with server(tmp_path, served=target(max_length=99)) as jobs:
        run_all(jobs)
        assert "data.max_length" in str(jobs.database.job(begun.id).error)
        assert jobs.database.job(fresh.id).status == "succeeded"  # it had not begun
        assert jobs.database.job(fresh.id).recipe["data"]["max_length"] == 99


def test_a_job_that_begins_by_the_recipe_of_a_later_server_goes_on_by_it(tmp_path: Path) -> None:
    with server(tmp_path) as jobs:
        job = create(jobs)
        wait_for_rows(jobs, job)
    for parts in (3, STEPS):
        with server(tmp_path, served=target(max_length=99)) as jobs:
            wait_until(jobs.worker.has_work)
            for _ in range(parts):
                jobs.worker.run_slice()
            ended = jobs.database.job(job.id)
            assert ended.recipe["data"]["max_length"] == 99
    assert ended.status == "succeeded", ended.error


def test_a_job_that_is_resumed_before_it_was_saved_goes_on(tmp_path: Path) -> None:
    """The worker hears of the pause while it begins another job."""
    trainer = ScriptedTrainer(slots=3)
    with server(tmp_path, trainer) as jobs:
        first = create(jobs)
        wait_for_rows(jobs, first)
        jobs.worker.run_slice()
        second = create(jobs, "ben")
        wait_until(lambda: second.id in jobs.worker._ready)

        def pause_and_resume(name: str) -> None:
            if name == "begin" and not resumed:
                resumed.append(jobs.change(first.id, "me", "pause"))
                jobs.change(first.id, "me", "resume")
                wait_until(lambda: first.id in jobs.worker._ready)

        resumed: list[Job] = []
        trainer.before = pause_and_resume
        run_all(jobs)
        assert resumed
        assert [jobs.database.job(one.id).status for one in (first, second)] == ["succeeded"] * 2
        assert [event.step for event in jobs.database.metrics(first.id)] == list(range(1, STEPS + 1))


def test_a_pause_that_comes_late_to_the_worker_does_not_stop_the_resumed_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(tmp_path) as jobs:
        job = create(jobs)
        wait_for_rows(jobs, job)
        jobs.worker.run_slice()
        resuming = threading.Thread(target=lambda: jobs.change(job.id, "me", "resume"))
        stop = jobs.worker.stop

        def late(job_id: str, how: Any) -> None:
            resuming.start()
            resuming.join(1)
            if not resuming.is_alive():  # it did not wait
                wait_until(lambda: job_id in jobs.worker._ready)
            stop(job_id, how)

        monkeypatch.setattr(jobs.worker, "stop", late)
        jobs.change(job.id, "me", "pause")
        resuming.join(20)
        run_all(jobs)
        assert jobs.database.job(job.id).status == "succeeded"


def test_an_error_with_the_rows_of_one_job_holds_up_no_other_and_tells_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full just then, too."""
    monkeypatch.setattr(jobs_module, "_RETRY_SECONDS", 0.01)
    trainer, failures = ScriptedTrainer(), [RunFailed("the disk is full")]
    with server(tmp_path, trainer) as jobs:
        prepare, fail = trainer.prepare, jobs.directory.fail

        def no_such_file(id: str, *others: Any) -> Any:
            bad[:] = bad or [id]  # the first
            if id == bad[0]:
                raise FileNotFoundError(2, "No such file or directory", str(tmp_path / "secret"))
            return prepare(id, *others)

        def or_full(*arguments: Any) -> None:
            if failures:
                raise failures.pop()
            fail(*arguments)

        monkeypatch.setattr(trainer, "prepare", no_such_file)
        monkeypatch.setattr(jobs.directory, "fail", or_full)
        bad: list[str] = []
        create(jobs)
        good = create(jobs, "ben")
        run_all(jobs)
        error = jobs.database.job(bad[0]).error
        assert error == {"code": "server_error", "message": "The server failed; its log says why.", "param": None}
        assert not failures
        assert jobs.database.job(good.id).status == "succeeded"


def test_rows_for_which_there_is_no_room_hold_up_no_other_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ScriptedTrainer()
    with server(tmp_path, trainer) as jobs:
        prepare, large = trainer.prepare, list[str]()

        def or_full(id: str, *others: Any) -> Any:
            if not large or id == large[0]:
                large[:] = [id]
                raise RunFailed("the disk for temporary files is full")
            return prepare(id, *others)

        monkeypatch.setattr(trainer, "prepare", or_full)
        first, second = create(jobs), create(jobs, "ben")

        def done() -> bool:
            while jobs.worker.has_work():
                jobs.worker.run_slice()
            return jobs.database.job(second.id).status == "succeeded"

        wait_until(done, 20)
        assert jobs.database.job(first.id).status == "validating_files"


def test_files_of_something_else_are_not_removed(tmp_path: Path) -> None:
    for part in ("files", "states"):
        here = tmp_path / part
        (here / part).mkdir(parents=True)
        (here / part / "precious").write_text("yes")
        with pytest.raises(InputError, match=f"{part}: is of something else"), TrainingDirectory.open(here):
            pass
        assert [file.name for file in here.rglob("*")] == [part, "precious"]


def test_messages_have_no_place_of_the_server_and_all_of_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with server(Path()) as jobs:
        job = create(jobs, held_out=send(jobs, chat_rows(2)))
        run_all(jobs)
        said = [event.message for event in jobs.database.events(job.id, None, 100)]
        assert any(text.startswith("Held-out rows that are also training rows: 2.") for text in said), said


@pytest.mark.parametrize("full", ["save", "save_adapter", "move", "succeeded", "add", "write_results"])
def test_a_full_disk_is_waited_for_and_loses_nothing(
    tmp_path: Path, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, failures = [0.0], [RunFailed("the disk is full")] * 2
    trainer = ScriptedTrainer()
    with server(tmp_path, trainer) as jobs:
        jobs.worker._clock = lambda: now[0]
        job = create(jobs)
        wait_for_rows(jobs, job)
        name = "move" if full == "succeeded" else full
        owner: Any = next(one for one in (trainer, jobs.directory, jobs.database) if hasattr(one, name))
        call = getattr(owner, name)

        def or_full(*arguments: Any, **changes: Any) -> Any:
            if failures and (full != "succeeded" or full in arguments):
                raise failures.pop()
            return call(*arguments, **changes)

        monkeypatch.setattr(owner, name, or_full)
        waits = 0
        while jobs.database.job(job.id).status in OPEN:
            if not jobs.worker.has_work():
                now[0] += 31
                waits += 1
                assert waits < 10
            jobs.worker.run_slice()
        assert waits == 2
        done = jobs.database.job(job.id)
        assert done.status == "succeeded"
        assert [event.step for event in jobs.database.metrics(job.id)] == [1, 2, 3, 4, 5]
        assert {path.stem for path in jobs.directory.files.iterdir()} == {job.training_file, done.result_file}


def test_an_adapter_that_can_not_be_written_holds_up_no_other_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    trainer = ScriptedTrainer()
    with server(tmp_path, trainer) as jobs:
        jobs.worker._clock = lambda: now[0]
        first, second = create(jobs), create(jobs, suffix="ben")
        for job in (first, second):
            wait_for_rows(jobs, job)
        real = trainer.save_adapter

        def not_the_first(run: Any, place: Path) -> None:
            if run.id == first.id and now[0] < 100:
                raise RunFailed("the directory is read-only")
            real(run, place)

        monkeypatch.setattr(trainer, "save_adapter", not_the_first)
        while jobs.worker.has_work():
            jobs.worker.run_slice()
        status = {job.id: jobs.database.job(job.id).status for job in (first, second)}
        assert status == {first.id: "finishing", second.id: "succeeded"}
        now[0] = 200.0
        while jobs.worker.has_work():
            jobs.worker.run_slice()
        assert jobs.database.job(first.id).status == "succeeded"


def test_a_field_in_quotes_does_not_pass_the_limit_of_a_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\n5" pipe,one\n"' + ("x" * 99 + "\n") * 42_000 + '",two\n')
    with pytest.raises(InputError, match=r"rows.csv:\d+: a row may have at most 4,194,304 characters"):
        require_short_rows(file)
    file.write_text("prompt,completion\n" + '5" pipe,"one\ntwo"\n' * 300_000)
    require_short_rows(file)


def test_a_disk_that_fails_while_a_job_is_cancelled_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def broken(path: Path, missing_ok: bool = False) -> None:
        raise OSError(5, "Input/output error", str(path))

    with server(tmp_path) as jobs:
        jobs.worker._clock = lambda: now[0]
        job = create(jobs)
        wait_for_rows(jobs, job)
        jobs.worker.run_slice()
        jobs.change(job.id, "me", "cancel")
        with monkeypatch.context() as failing:
            failing.setattr(Path, "unlink", broken)
            jobs.worker.run_slice()
        assert not jobs.worker.has_work()
        now[0] += 31
        other = create(jobs, "ben")
        run_all(jobs)
        assert jobs.database.job(job.id).status == "cancelled"
        assert jobs.database.job(other.id).status == "succeeded"


def test_an_error_of_the_trainer_ends_the_jobs_it_was_training_and_no_others(tmp_path: Path) -> None:
    trainer = ScriptedTrainer(slots=1)
    with server(tmp_path, trainer) as jobs:
        first, second = create(jobs), create(jobs, "ben")
        wait_until(lambda: jobs.database.job(second.id).status == "queued")
        trainer.fails = RuntimeError("a kernel failed")
        run_all(jobs)
        failed, done = jobs.database.job(first.id), jobs.database.job(second.id)
        assert failed.error == {"code": "server_error", "message": "Training failed: a kernel failed.", "param": None}
        assert done.status == "succeeded"


def test_a_directory_is_for_one_server(tmp_path: Path) -> None:
    with (
        TrainingDirectory.open(tmp_path / "training"),
        pytest.raises(InputError, match="trains in this directory.*--training-dir"),
        TrainingDirectory.open(tmp_path / "training"),
    ):
        pass
    with TrainingDirectory.open(tmp_path / "training"):
        pass


def test_a_database_that_can_t_be_read_is_named(tmp_path: Path) -> None:
    here = tmp_path / "training"
    with TrainingDirectory.open(here) as directory:
        create(jobs_of(directory, tmp_path, ScriptedTrainer()))
    whole = (here / DATABASE).read_bytes()
    for damaged in (whole[:5000], b"no database at all" * 99, whole[:4096] + b"\xff" * (len(whole) - 4096)):
        (here / DATABASE).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{DATABASE}: is damaged"), TrainingDirectory.open(here):
            pass
    (here / DATABASE).write_bytes(whole)
    with sqlite3.connect(here / DATABASE) as newer:
        newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(InputError, match="newer version of qvera .its version is 99"), TrainingDirectory.open(here):
        pass


def test_what_was_cut_off_is_removed(tmp_path: Path) -> None:
    with TrainingDirectory.open(tmp_path / "training") as directory:
        kept = create(jobs_of(directory, tmp_path, ScriptedTrainer()))
        half = Upload(directory, "me", "rows.jsonl")
        half.write(b"{}")
        (directory.files / "file-000.jsonl").write_text("written, and never noted")
        directory.state("ftjob-gone").write_text("{}")
    with TrainingDirectory.open(tmp_path / "training") as directory:
        assert [path.stem for path in directory.files.iterdir()] == [kept.training_file]
        assert list(directory.states.iterdir()) == []


def test_a_recipe_that_can_t_train_beside_others_is_refused(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": "tiny", "data": {"path": "x"}, "adapter": {"dropout": 0.1}})
    with pytest.raises(InputError, match="(?s)--training-dir: the recipe of .*adapter.dropout"):
        Recipes(Artifact(tmp_path, "a run", recipe.model, recipe=recipe, run=tmp_path))
