"""Jobs of a server that is killed, full disks, damaged databases: nothing is lost, and nothing comes twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import OPTConfig, OPTForCausalLM

from qvera.config.sections import ModelSection
from qvera.evaluation.load import Artifact
from qvera.serve.fine_tuning import jobs as jobs_module
from qvera.serve.fine_tuning import worker as worker_module
from qvera.serve.fine_tuning.database import OPEN, Job
from qvera.serve.fine_tuning.directory import DATABASE, TrainingDirectory, Upload
from qvera.serve.fine_tuning.jobs import Jobs
from qvera.training.failures import LOWER_RATE
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import ADAPTER_WEIGHTS, TRAINING_FACTS
from tests.helpers import wait_until
from tests.serve.scripted_training import ScriptedTrainer, chat_rows, jobs_of, target

STEPS = 5


class Killed(BaseException):
    """Where the process would end."""


@contextlib.contextmanager
def server(root: Path, trainer: ScriptedTrainer | None = None, served: Artifact | None = None) -> Iterator[Jobs]:
    """The jobs of a server over a directory. It ends as by SIGTERM: what is being trained is saved."""
    (root / "adapters").mkdir(parents=True, exist_ok=True)
    with (
        TrainingDirectory.open(root / "training") as directory,
        jobs_of(directory, root / "adapters", trainer or ScriptedTrainer(), served=served) as jobs,
    ):
        yield jobs


@pytest.fixture
def trainer() -> ScriptedTrainer:
    return ScriptedTrainer()


@pytest.fixture
def jobs(tmp_path: Path, trainer: ScriptedTrainer) -> Iterator[Jobs]:
    """Of a running server with this trainer."""
    with server(tmp_path, trainer) as jobs:
        yield jobs


@pytest.fixture
def clock(jobs: Jobs) -> list[float]:
    """The seconds of the worker's clock."""
    now = [0.0]
    jobs.worker._clock = lambda: now[0]
    return now


def send(jobs: Jobs, rows: bytes) -> str:
    upload = Upload(jobs.directory, "me", "rows.jsonl")
    upload.write(rows)
    return upload.finish("fine-tune").id


def create(
    jobs: Jobs, name: str = "anna", held_out: str | None = None, steps: int = STEPS, rows: bytes | None = None
) -> Job:
    asked = {"n_epochs": float(steps), "batch_size": 4, "learning_rate_multiplier": "auto"}
    job = Job("me", name, "tiny", send(jobs, rows or chat_rows(4)), held_out, None, asked, False, {})
    return jobs.create(job, lambda name: True, None)


def queued(jobs: Jobs, *names: str, steps: int = STEPS) -> list[Job]:
    """A job for each name, whose rows are read."""
    made = [create(jobs, name, steps=steps) for name in names]
    wait_until(lambda: jobs.worker.has_work() and all(jobs.database.job(job.id).status == "queued" for job in made))
    return made


def do_parts(jobs: Jobs) -> None:
    """As an engine would, while there is something to do."""
    while jobs.worker.has_work():
        jobs.worker.run_slice()


def run_all(jobs: Jobs) -> None:
    """Until nothing is left to do."""

    def nothing_left() -> bool:
        do_parts(jobs)
        return not [job for job in jobs.database.open_jobs() if job.status != "paused"]

    wait_until(nothing_left, 20)


def statuses(jobs: Jobs, *made: Job) -> list[str]:
    return [jobs.database.job(job.id).status for job in made]


def steps_of(jobs: Jobs, job: Job) -> list[int | None]:
    return [event.step for event in jobs.database.metrics(job.id)]


def kill_at(number: int, trainer: ScriptedTrainer, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process before the ``number``-th of all calls that write something: after the one before it."""
    calls = 0

    def killing(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed(f"move to {arguments[2]}" if name == "move" else name)
            return call(*arguments, **settings)

        return wrapped

    writing: dict[Any, tuple[str, ...]] = {
        trainer: ("begin", "run_slice", "save", "save_adapter", "end"),
        jobs.database: ("move", "add"),
        jobs.directory: ("write_results",),
        worker_module: ("write_facts",),
    }
    for owner, names in writing.items():
        for name in names:
            monkeypatch.setattr(owner, name, killing(getattr(owner, name), name))


def test_a_job_killed_at_any_call_goes_on_and_comes_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_SAVE_STEPS", 2)
    monkeypatch.setattr(worker_module, "_SAVE_PAUSE", 0)
    number, places = 0, set()
    while True:
        number += 1
        here, killed = tmp_path / str(number), None
        with monkeypatch.context() as patched:
            trainer = ScriptedTrainer()
            with server(here, trainer) as jobs:
                [job] = queued(jobs, "anna")
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
            assert (done.status, done.trained_tokens) == ("succeeded", 10 * STEPS), (killed, done.error)
            assert (here / "adapters" / "anna" / ADAPTER_WEIGHTS).read_text() == f"{job.id} after step {STEPS}"
            assert [path.name for path in (here / "adapters").iterdir()] == ["anna"]
            assert steps_of(jobs, job) == list(range(1, STEPS + 1)), killed
            assert {path.stem for path in jobs.directory.files.iterdir()} == {job.training_file, done.result_file}
            assert list(jobs.directory.states.iterdir()) == []
    assert {"save", "save_adapter", "write_facts", "write_results", "move to succeeded", "end"} <= places
    assert number > 15


def test_an_evaluation_that_a_killed_server_told_and_did_not_save_is_told_once(
    tmp_path: Path, trainer: ScriptedTrainer
) -> None:
    with server(tmp_path, trainer) as jobs:
        [job] = queued(jobs, "anna")
        for _ in range(2):
            jobs.worker.run_slice()
        trainer.in_flight[0].state.evaluation_due = True
    with server(tmp_path) as jobs:
        told = worker_module.metrics_event({"kind": "eval", "adapter": job.id, "step": 2, "loss": 0.7}, STEPS)
        jobs.database.add(told)
        run_all(jobs)
        assert steps_of(jobs, job) == list(range(1, STEPS + 1))


def test_a_job_goes_on_by_the_recipe_by_which_it_began_and_by_no_other(tmp_path: Path) -> None:
    with server(tmp_path) as jobs:
        begun, fresh = queued(jobs, "anna", "ben")
        jobs.change(fresh.id, "me", "pause")
        jobs.worker.run_slice()
        jobs.change(fresh.id, "me", "resume")
    for parts, status in ((3, "running"), (STEPS, "succeeded")):
        with server(tmp_path, served=target(max_length=99)) as jobs:
            wait_until(jobs.worker.has_work)
            for _ in range(parts):
                jobs.worker.run_slice()
            assert statuses(jobs, begun, fresh) == ["failed", status]
            assert "data.max_length" in str(jobs.database.job(begun.id).error)
            assert jobs.database.job(fresh.id).recipe["data"]["max_length"] == 99
            said = str(jobs.database.events(fresh.id, None, 100))
    assert "goes on after step 3" in said  # leaving a server saved it, as SIGTERM does


def test_a_job_goes_on_where_the_path_of_its_base_is_another(tmp_path: Path) -> None:
    with server(tmp_path) as jobs:
        [job] = queued(jobs, "anna")
        jobs.worker.run_slice()
    moved = dataclasses.replace(target(), section=ModelSection(path="/elsewhere/tiny/"))
    with server(tmp_path, served=moved) as jobs:
        run_all(jobs)
        assert statuses(jobs, job) == ["succeeded"]
        assert steps_of(jobs, job) == list(range(1, STEPS + 1))


def test_a_job_reads_the_columns_of_the_served_recipe_where_its_file_has_them(tmp_path: Path) -> None:
    row = '{"note": "say red", "reply": "red"}\n'
    with server(tmp_path, served=target(columns={"prompt": "note", "completion": "reply"})) as jobs:
        asked = {"n_epochs": float(STEPS), "batch_size": 4, "learning_rate_multiplier": "auto"}
        files = [row, row.replace("note", "prompt").replace("reply", "completion"), row.replace("note", "frage")]
        files.append('{"prompt": "x", "chosen": "a", "rejected": "b"}\n')
        made = []
        for number, rows in enumerate(files):
            job = Job("me", f"a{number}", "tiny", send(jobs, rows.encode() * 4), None, None, asked, False, {})
            made.append(jobs.create(job, lambda name: True, None))
        wait_until(lambda: statuses(jobs, *made) == ["queued", "queued", "failed", "failed"], 20)
        said = [str(jobs.database.job(job.id).error) for job in made[2:]]
    assert "Columns found: frage, reply." in said[0] and "No job trains on pairs: `qvera train` does." in said[1]


def test_step_and_losses_of_a_model_are_those_of_its_vectors(jobs: Jobs, trainer: ScriptedTrainer) -> None:
    [job] = queued(jobs, "anna")
    jobs.worker.run_slice()
    trainer.in_flight[0].state.best_step = 3
    run_all(jobs)
    done = jobs.database.job(job.id)
    facts = json.loads((jobs._store.directory_for("anna") / TRAINING_FACTS).read_text())
    assert done.step == facts["steps"] == 3
    assert jobs.database.last_losses(job.id, done.step) == {"train_loss": 1 / 3}


# Pauses that cross what the worker does


def test_a_job_that_is_resumed_before_it_was_saved_goes_on(jobs: Jobs, trainer: ScriptedTrainer) -> None:
    """The worker hears of the pause while it begins another job."""
    [first] = queued(jobs, "anna")
    jobs.worker.run_slice()
    second, resumed = create(jobs, "ben"), list[Job]()
    wait_until(lambda: second.id in jobs.worker._ready)

    def pause_and_resume(name: str) -> None:
        if name == "begin" and not resumed:
            resumed.append(jobs.change(first.id, "me", "pause"))
            jobs.change(first.id, "me", "resume")
            wait_until(lambda: first.id in jobs.worker._ready)

    trainer.before = pause_and_resume
    run_all(jobs)
    assert resumed
    assert statuses(jobs, first, second) == ["succeeded"] * 2
    assert steps_of(jobs, first) == list(range(1, STEPS + 1))


def test_a_pause_that_comes_late_to_the_worker_does_not_stop_the_resumed_job(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    [job] = queued(jobs, "anna")
    jobs.worker.run_slice()
    resuming = threading.Thread(target=lambda: jobs.change(job.id, "me", "resume"))
    stop = jobs.worker.stop

    def late(job_id: str, how: Any) -> None:
        resuming.start()
        resuming.join(0.3)
        if not resuming.is_alive():  # it did not wait
            wait_until(lambda: job_id in jobs.worker._ready)
        stop(job_id, how)

    monkeypatch.setattr(jobs.worker, "stop", late)
    jobs.change(job.id, "me", "pause")
    resuming.join(20)
    run_all(jobs)
    assert statuses(jobs, job) == ["succeeded"]


# Errors and full disks


def fail_where(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fails: Callable[..., Exception | None]) -> None:
    """Let a method raise what ``fails`` says of its arguments, if that is anything."""
    call = getattr(owner, name)

    def failing(*arguments: Any, **settings: Any) -> Any:
        if (error := fails(*arguments)) is not None:
            raise error
        return call(*arguments, **settings)

    monkeypatch.setattr(owner, name, failing)


def test_rows_that_can_t_be_read_and_those_without_room_hold_up_no_other_job_and_tell_no_place(
    jobs: Jobs, trainer: ScriptedTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full just when the error is to be noted, too."""
    monkeypatch.setattr(jobs_module, "_RETRY_SECONDS", 0.01)
    seen, full = list[str](), [RunFailed("the disk is full")]
    gone = FileNotFoundError(2, "No such file or directory", str(tmp_path / "secret"))
    errors = [gone, RunFailed("the disk for temporary files is full"), None]

    def cannot_be_read(id: str, *_: Any) -> Exception | None:
        if id not in seen:
            seen.append(id)
        return errors[seen.index(id)]

    fail_where(monkeypatch, trainer, "prepare", cannot_be_read)
    fail_where(monkeypatch, jobs.directory, "fail", lambda *_: full.pop() if full else None)
    made = [create(jobs, name) for name in ("anna", "ben", "chloe")]

    def done() -> bool:
        do_parts(jobs)
        return statuses(jobs, *made) == ["failed", "validating_files", "succeeded"]

    wait_until(done, 20)
    error = {"code": "server_error", "message": "The server failed; its log says why.", "param": None}
    assert jobs.database.job(made[0].id).error == error
    assert not full


@pytest.mark.parametrize("full", ["begin", "save", "move", "succeeded", "add", "write_results"])
def test_a_full_disk_is_waited_for_and_loses_nothing(
    full: str, jobs: Jobs, trainer: ScriptedTrainer, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [RunFailed("the disk is full")] * 2
    [job] = queued(jobs, "anna")
    name = "move" if full == "succeeded" else full
    owner = next(one for one in (trainer, jobs.directory, jobs.database) if hasattr(one, name))

    def is_full(*arguments: Any) -> Exception | None:
        return failures.pop() if failures and (full != "succeeded" or full in arguments) else None

    fail_where(monkeypatch, owner, name, is_full)
    waits = 0
    while statuses(jobs, job)[0] in OPEN:
        if not jobs.worker.has_work():
            clock[0] += 31
            waits += 1
            assert waits < 10
        jobs.worker.run_slice()
    assert waits == 2
    assert statuses(jobs, job) == ["succeeded"]
    assert steps_of(jobs, job) == list(range(1, STEPS + 1))
    kept = {job.training_file, jobs.database.job(job.id).result_file}
    assert {path.stem for path in jobs.directory.files.iterdir()} == kept


def test_an_adapter_that_can_not_be_written_holds_up_no_other_job(
    jobs: Jobs, trainer: ScriptedTrainer, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = queued(jobs, "anna", "ben")

    def read_only(run: Any, _: Path) -> Exception | None:
        return RunFailed("the directory is read-only") if run.id == first.id and clock[0] < 100 else None

    fail_where(monkeypatch, trainer, "save_adapter", read_only)
    do_parts(jobs)
    assert statuses(jobs, first, second) == ["finishing", "succeeded"]
    trainer.slots = 1  # the first has it
    third = create(jobs, "chloe")
    wait_until(lambda: third.id in jobs.worker._ready)
    assert not jobs.worker.has_work()  # nothing can be done yet, so the engine must not ask for a slice at once
    clock[0] = 200.0
    do_parts(jobs)
    assert statuses(jobs, first, third) == ["succeeded"] * 2


def test_a_paused_job_that_can_not_be_saved_holds_up_no_other_and_goes_on_from_what_it_had(
    jobs: Jobs, trainer: ScriptedTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = queued(jobs, "anna", "ben")
    jobs.worker.run_slice()
    jobs.change(first.id, "me", "pause")
    broken = [ValueError("not a number")]
    fail_where(monkeypatch, trainer, "save", lambda run, _: broken.pop() if run.id == first.id and broken else None)
    run_all(jobs)
    assert statuses(jobs, first, second) == ["paused", "succeeded"]
    said = jobs.database.events(first.id, None, 1)[0]
    assert said.level == "error"
    assert said.message == "Once resumed, it goes on from its last save, as it can't be saved now: not a number."
    jobs.change(first.id, "me", "resume")
    run_all(jobs)
    assert statuses(jobs, first) == ["succeeded"]
    assert steps_of(jobs, first) == list(range(1, STEPS + 1))


def test_saving_takes_a_twentieth_of_training_and_one_job_a_slice(
    jobs: Jobs, trainer: ScriptedTrainer, clock: list[float]
) -> None:
    """A step takes a second and a save three, as of large adapters; answers take most of the time."""
    calls, slices = list[str](), list[float]()

    def take_time(name: str) -> None:
        calls.append(name)
        clock[0] += {"run_slice": 1.0, "save": 3.0}.get(name, 0.0)

    trainer.slots, trainer.before = 3, take_time
    queued(jobs, "anna", "ben", "chloe", steps=900)
    while calls.count("run_slice") < 400:
        began = clock[0]
        jobs.worker.run_slice()
        slices.append(clock[0] - began)
        clock[0] += 60.0
    assert max(slices) == 3.0
    assert calls.count("save") == 7  # after 30 s of training, and every 60 s from then on
    assert len({trained.saved_at for trained in jobs.worker._trained.values()}) == 3  # in turn


def test_a_disk_that_fails_while_a_job_is_cancelled_is_waited_for(
    jobs: Jobs, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, missing_ok: bool = False) -> None:
        raise OSError(5, "Input/output error", str(path))

    [job] = queued(jobs, "anna")
    jobs.worker.run_slice()
    jobs.change(job.id, "me", "cancel")
    with monkeypatch.context() as failing:
        failing.setattr(Path, "unlink", broken)
        jobs.worker.run_slice()
    assert not jobs.worker.has_work()
    clock[0] += 31
    other = create(jobs, "ben")
    run_all(jobs)
    assert statuses(jobs, job, other) == ["cancelled", "succeeded"]
    # and no step that was not told yet
    assert jobs.database.events(job.id, None, 1)[0].message == "Fine-tuning job cancelled"


def test_an_error_of_the_trainer_ends_the_jobs_it_was_training_and_no_others(
    jobs: Jobs, trainer: ScriptedTrainer, clock: list[float]
) -> None:
    trainer.slots = 1
    first, second = queued(jobs, "anna", "ben")
    jobs.worker.run_slice()
    trainer.fails = RuntimeError("a kernel failed")
    run_all(jobs)
    failed = {"code": "server_error", "message": "Training failed: a kernel failed.", "param": None}
    assert jobs.database.job(first.id).error == failed
    assert [event.message for event in jobs.database.events(first.id, None, 2)] == [
        failed["message"],
        f"Step 1/{STEPS}: training loss=1.0000",
    ]
    assert statuses(jobs, second) == ["succeeded"]


def test_a_job_that_failed_names_its_owner_s_file_and_advises_what_a_job_can_do(
    jobs: Jobs, trainer: ScriptedTrainer
) -> None:
    made = queued(jobs, "anna", "ben")
    places = [jobs.directory.files / f"{job.training_file}.jsonl" for job in made]
    reasons = f"step 2: is not finite; rows: {places[0]}:3. {LOWER_RATE}", f"{places[1]}:4: Lower data.max_length."
    trainer.not_finite = dict(zip((job.id for job in made), reasons, strict=True))
    run_all(jobs)
    messages = [(jobs.database.job(job.id).error or {})["message"] for job in made]
    assert messages == [
        "step 2: is not finite; rows: rows.jsonl:3. Create the job anew with a lower learning_rate_multiplier.",
        "rows.jsonl:4: Lower data.max_length. A job sets no such key: the server's recipe does.",
    ]


# Files


def test_messages_have_no_place_of_the_server_and_all_of_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with server(Path()) as jobs:
        job = create(jobs, held_out=send(jobs, chat_rows(2)))
        run_all(jobs)
        said = [event.message for event in jobs.database.events(job.id, None, 100)]
        assert any(text.startswith("Held-out rows that are also training rows: 2.") for text in said), said


def test_files_of_something_else_are_not_removed_and_those_that_were_cut_off_are(tmp_path: Path) -> None:
    for part in ("files", "states"):
        here = tmp_path / part
        (here / part).mkdir(parents=True)
        (here / part / "precious").write_text("yes")
        with pytest.raises(InputError, match=f"{part}: is of something else"), TrainingDirectory.open(here):
            pass
        assert [file.name for file in here.rglob("*")] == [part, "precious"]
    with TrainingDirectory.open(tmp_path / "training") as directory:
        kept = create(jobs_of(directory, tmp_path, ScriptedTrainer()))
        Upload(directory, "me", "rows.jsonl").write(b"{}")
        (directory.files / "file-000.jsonl").write_text("written, and never noted")
        directory.state("ftjob-gone").write_text("{}")
    with TrainingDirectory.open(tmp_path / "training") as directory:
        assert [path.stem for path in directory.files.iterdir()] == [kept.training_file]
        assert list(directory.states.iterdir()) == []


@pytest.mark.parametrize("held_out", [False, True])
def test_a_row_beyond_the_positions_of_the_model_fails_its_job_before_it_joins_the_others(
    held_out: bool, jobs: Jobs
) -> None:
    sizes = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "word_embed_proj_dim": 8}
    jobs._model = OPTForCausalLM(OPTConfig(vocab_size=304, max_position_embeddings=64, **sizes))
    long = chat_rows(1, answer="red" * 40)
    job = create(jobs, held_out=send(jobs, long) if held_out else None, rows=None if held_out else long)
    wait_until(lambda: statuses(jobs, job) == ["failed"])
    error = jobs.database.job(job.id).error
    assert error is not None
    assert "tokens, and the model has positions for 64" in error["message"]


def test_a_job_with_rows_beyond_the_context_of_the_base_is_warned(jobs: Jobs) -> None:
    job = create(jobs, rows=chat_rows(1, answer="red" * 100))
    wait_until(lambda: statuses(jobs, job) == ["queued"])
    [said] = [event.message for event in jobs.database.events(job.id, None, 20) if event.level == "warn"]
    assert "the base's context ends at 256" in said


def test_a_model_whose_deletion_was_cut_off_is_gone_after_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with server(tmp_path) as jobs:
        queued(jobs, "anna", "ben")
        run_all(jobs)
        removed: list[Path] = []
        with monkeypatch.context() as patched, pytest.raises(Killed):
            # once for what an earlier deletion may have left, then for the adapter
            patched.setattr(jobs_module.shutil, "rmtree", lambda *a, **_: killed() if removed else removed.append(a[0]))
            jobs.delete_model("anna", "me")
        assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [".anna.deleted", "ben"]
    with server(tmp_path):
        assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["ben"]


def test_a_directory_is_for_one_server_and_a_database_that_can_t_be_read_is_named(tmp_path: Path) -> None:
    here = tmp_path / "training"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message), TrainingDirectory.open(here):
            pass

    with TrainingDirectory.open(here) as directory:
        create(jobs_of(directory, tmp_path, ScriptedTrainer()))
        refused("trains in this directory.*--training-dir")
    whole = (here / DATABASE).read_bytes()
    for damaged in (whole[:5000], b"no database at all" * 99, whole[:4096] + b"\xff" * (len(whole) - 4096)):
        (here / DATABASE).write_bytes(damaged)
        refused(f"{DATABASE}: is damaged")
    (here / DATABASE).write_bytes(whole)
    with contextlib.closing(sqlite3.connect(here / DATABASE)) as newer:
        newer.execute("PRAGMA user_version = 99")
    refused("newer version of qvera .its version is 99")
    (here / DATABASE).unlink()
    (here / DATABASE).mkdir()
    refused(f"{DATABASE}: can't be opened")
