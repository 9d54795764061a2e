"""A run learns, resumes to the bit, stops when asked, and refuses what would spoil it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pty
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from qvera.adapters import QveraLinear
from qvera.adapters.save_load import check_start
from qvera.cli.main import main
from qvera.config.schema import Recipe, load_recipe
from qvera.data import build_datasets, data_sha256
from qvera.evaluation.load import open_run
from qvera.models import forward
from qvera.models.tokenizer import load_tokenizer
from qvera.training import checkpoint, session, trainer
from qvera.training.alone import Trainer
from qvera.training.loop import AloneLoop
from qvera.training.run_dir import Trackers, run_lock
from qvera.training.trainer import train
from qvera.utils.errors import InputError, NotFinite, RunFailed
from tests.conftest import small_llama
from tests.disk import fill, read_only, small_disk
from tests.training.runs import (
    assert_close_run,
    assert_same_run,
    cut_off,
    losses,
    records,
    run_json,
    same,
    stop_after,
    vectors,
    vouch_for,
)

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def six_steps(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and its finished run, with checkpoints of steps 2, 4 and 6. Copy it before you change it."""
    recipe = make_recipe(training={"max_steps": 6, "save_steps": 2, "save_total_limit": 3})
    run_dir = tmp_path_factory.mktemp("runs") / "six-steps"
    train(recipe, run_dir)
    return recipe, run_dir


def files_of(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_run_does_not_go_on_with_other_inputs_under_the_same_paths(
    make_recipe: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_model_dir, model)
    shutil.copy(make_recipe().data.path, rows)
    recipe = make_recipe(model={"path": str(model)}, data={"path": str(rows)}, training={"max_steps": 1})
    train(recipe, tmp_path / "run")
    before = files_of(tmp_path / "run" / "adapter")
    text = rows.read_text()
    rows.write_text("".join(reversed(text.splitlines(keepends=True))))
    with pytest.raises(
        InputError, match=r"was saved with other rows \(data\.path or data\.eval_path\) than it has now"
    ):
        train(recipe, tmp_path / "run", resume=True, dry_run=True)  # before the base is loaded
    rows.write_text(text)
    small_llama(seed=5).save_pretrained(model)
    with pytest.raises(InputError, match=r"was saved with other weights of the base \(model\.path\) than it has"):
        train(recipe, tmp_path / "run", resume=True)
    assert files_of(tmp_path / "run" / "adapter") == before


def test_a_run_goes_on_where_its_base_tokenizer_and_rows_have_moved(
    make_recipe: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(tiny_model_dir, old / "model")
    shutil.copy(make_recipe().data.path, old / "rows.jsonl")
    rows = {"path": str(old / "rows.jsonl")}
    model = {"path": str(old / "model"), "tokenizer": str(old / "model")}
    places = {"model": model, "data": {**rows, "mixture": [{**rows, "limit": 3}]}}
    train(make_recipe(**places, training={"max_steps": 1}), old / "first")
    places["adapter"] = {"init_from": str(old / "first" / "adapter")}
    train(make_recipe(**places, training={"max_steps": 1}), tmp_path / "run")
    old.rename(new)
    own = tmp_path / "run" / "recipe.yaml"
    with pytest.raises(InputError, match=r"first.adapter: no such directory\. A run that goes on needs it too"):
        lost = load_recipe(own, of_a_run=True)
        check_start(lost.adapter, lost.model)
    own.write_text(own.read_text().replace(str(old), str(new)))
    result = train(load_recipe(own, ["training.max_steps=2"], of_a_run=True), tmp_path / "run", resume=True)
    assert result is not None and result.run["result"]["steps"] == 2


def test_a_run_goes_on_with_rows_that_another_data_path_has(make_recipe: Any, tmp_path: Path) -> None:
    """As by --set on --resume, without a change of the run's recipe.yaml. Other rows there are refused."""
    old, new, others = (tmp_path / f"{name}.jsonl" for name in ("old", "new", "others"))
    shutil.copy(make_recipe().data.path, old)
    train(make_recipe(data={"path": str(old)}, training={"max_steps": 1}), tmp_path / "run")
    old.rename(new)
    others.write_text("".join(reversed(new.read_text().splitlines(keepends=True))))
    with pytest.raises(InputError, match="was saved with other rows"):
        train(make_recipe(data={"path": str(others)}, training={"max_steps": 2}), tmp_path / "run", resume=True)
    result = train(make_recipe(data={"path": str(new)}, training={"max_steps": 2}), tmp_path / "run", resume=True)
    assert result is not None and result.run["result"]["steps"] == 2
    assert load_recipe(tmp_path / "run" / "recipe.yaml", of_a_run=True).data.path == str(new)


def test_a_run_that_goes_on_with_another_dtype_or_version_says_so(make_recipe: Any, tmp_path: Path) -> None:
    recipe, run_dir, told = make_recipe(training={"max_steps": 1}), tmp_path / "run", []
    train(recipe, run_dir)
    for _ in range(2):
        console = Console(record=True, width=1000)
        train(recipe, run_dir, resume=True, console=console)
        told.append(re.findall("The run had .*", console.export_text()))
        begun = run_json(run_dir)
        begun["model"]["compute_dtype"], begun["versions"]["trl"] = "float16", "0.9"
        (run_dir / "run.json").write_text(json.dumps(begun))
    assert told[0] == []
    assert re.match(
        r"The run had compute dtype float16, trl 0\.9 and goes on with compute dtype float32, trl ", *told[1]
    )


def test_a_run_of_no_steps_scores_the_rows_and_saves_the_adapter_as_it_begins(make_recipe: Any, tmp_path: Path) -> None:
    train(make_recipe(training={"max_steps": 0}), tmp_path / "run")
    result = run_json(tmp_path / "run")["result"]
    assert result["steps"] == 0 and result["eval_before"]["loss"] == result["eval_after"]["loss"]
    assert not any(vector.any() for name, vector in vectors(tmp_path / "run").items() if name.endswith("_b"))


def test_a_best_step_that_no_evaluation_can_choose_is_told(make_recipe: Any, tmp_path: Path) -> None:
    for eval_steps in (1, 3):
        training = {"max_steps": 2, "eval_steps": eval_steps, "load_best_model_at_end": True}
        console = Console(record=True, width=1000)
        train(make_recipe(training=training), tmp_path / str(eval_steps), console=console)
        told = "training.eval_steps: with 3 of 2 steps nothing is evaluated between, so no best step is chosen"
        assert (told in console.export_text()) == (eval_steps == 3)


def test_rows_too_long_to_be_packed_are_told(make_recipe: Any, tmp_path: Path) -> None:
    for max_length, is_told in ((64, False), (24, True)):
        console, data = Console(record=True, width=1000), {"packing": True, "max_length": max_length}
        train(make_recipe(data=data), tmp_path / "run", dry_run=True, console=console)
        assert ("data.packing: no two rows fit into data.max_length (24 tokens)" in console.export_text()) == is_told


def test_a_run_learns_and_leaves_its_files(make_recipe: Any, tmp_path: Path) -> None:
    training = {"max_steps": 20, "save_steps": 10, "eval_steps": 10, "exact_match_rows": 4}
    recipe = make_recipe(training=training, data={"max_length": 28})
    console, run_dir = Console(record=True, width=1000), tmp_path / "run"
    train(recipe, run_dir, console=console)
    text = console.export_text()
    assert re.search(r"Cut to length: \d+ rows lost \d+ tokens, .* Raise data\.max_length", text)
    assert re.search(r"Data: 32 rows to train on, 8 held out; the loss covers [\d,]+ of [\d,]+ tokens", text)
    assert re.search(r"20 steps in all: about [\d.]+ s to go, by the first 3 steps", text)
    assert "⟦" not in text  # the rows themselves are for `qvera preview`
    done = run_json(run_dir)
    assert done["result"]["eval_after"]["loss"] < done["result"]["eval_before"]["loss"] - 0.7
    assert done["status"] == "done"
    assert [r["step"] for r in records(run_dir)] == list(range(1, 21))
    assert [r["step"] for r in records(run_dir, "eval")] == [10, 20]
    names = ["adapter", "checkpoints", "metrics.jsonl", "recipe.yaml", "report.html", "run.json"]
    assert sorted(p.name for p in run_dir.iterdir()) == names
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (run_dir / "adapter").iterdir()) == names
    assert done["adapter"]["trainable_parameters"] == sum(t.numel() for t in vectors(run_dir).values())
    assert {str(t.dtype) for t in vectors(run_dir).values()} == {"torch.float32"}


def test_a_base_under_the_home_directory_is_named_so_that_other_programs_find_it(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    recipe = make_recipe(training={"max_steps": 1})
    monkeypatch.setenv("HOME", str(Path(recipe.model.path).parent))
    whole_path = recipe.model.path
    recipe = recipe.replace(model=recipe.model.replace(path=f"~/{Path(whole_path).name}"))
    train(recipe, tmp_path / "run")
    open_run(tmp_path / "run")
    assert not [w for w in recwarn if "base_model_name_or_path" in str(w.message)]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == whole_path


@pytest.mark.parametrize(
    ("data", "killed"),
    [({"packing": True}, False), ({"group_by_length": True}, True)],
    ids=["stopped by SIGTERM, packed rows", "killed, rows grouped by length"],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    make_recipe: Any, tmp_path: Path, data: dict[str, Any], killed: bool
) -> None:
    training = {"max_steps": 6, "save_steps": 2, "save_total_limit": 3, "eval_steps": 3, "sample_count": 0}
    recipe = make_recipe(adapter={"dropout": 0.2}, training=training, data=data)
    train(recipe, tmp_path / "whole")
    if killed:
        cut_off(tmp_path / "whole", tmp_path / "cut", after=4)
    else:
        stop_after(recipe, tmp_path / "cut", step=4)
    train(recipe, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    evaluations = [[(r["step"], r["loss"]) for r in records(tmp_path / name, "eval")] for name in ("cut", "whole")]
    assert evaluations[0] == evaluations[1]
    assert [step for step, _ in evaluations[0]] == [3, 6]


def test_a_damaged_checkpoint_and_one_of_another_run_are_passed_over(
    six_steps: tuple[Recipe, Path], tmp_path: Path
) -> None:
    """The other run's is whole, and of the same shapes: only its recipe says that it is not of this run."""
    recipe, whole = six_steps
    saved = cut_off(whole, tmp_path / "cut", after=6) / "checkpoints"
    damaged, foreign = saved / "step-00000006" / "vectors.safetensors", saved / "step-00000005"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    shutil.copytree(saved / "step-00000004", foreign)
    state = json.loads((foreign / "state.json").read_text())
    state["recipe"]["training"]["learning_rate"] = 1e-3
    (foreign / "state.json").write_text(json.dumps({**state, "step": 5}))
    vouch_for(foreign)
    console = Console(record=True, width=1000)
    train(recipe, tmp_path / "cut", resume=True, console=console)
    text = console.export_text()
    assert "vectors.safetensors: is missing or not what the manifest says" in text
    assert (
        "step-00000005: is of another run; training.learning_rate differ from this recipe. It is passed over." in text
    )
    assert "Going on from step 4 of 6" in text
    assert_same_run(tmp_path / "cut", whole)


def test_what_a_newer_qvera_wrote_ends_the_run_and_is_kept(six_steps: tuple[Recipe, Path], tmp_path: Path) -> None:
    """A run that went on from the checkpoint before it would delete it."""
    recipe, whole = six_steps
    run = cut_off(whole, tmp_path / "cut", after=6)
    (run / "run.json").write_text(json.dumps({"versions": {"qvera": "9.0.0"}}))
    newest = checkpoint.directories(run / "checkpoints")[-1]
    state, manifest = (json.loads((newest / name).read_text()) for name in ("state.json", "manifest.json"))
    writer = r"(.|\n)*qvera 9.0.0 wrote this run, and this is .* update qvera"
    for file, content, said in (
        ("manifest.json", {**manifest, "format": 2}, "has checkpoint format 2; this qvera reads format 1"),
        ("state.json", {**state, "progressed": {"later": 1}}, "was written by another version of qvera .*later"),
    ):
        (newest / file).write_text(json.dumps(content))
        if file == "state.json":
            vouch_for(newest)
        before = files_of(run)
        with pytest.raises(InputError, match=f"{newest}: {said}.*delete this checkpoint{writer}"):
            train(recipe, run, resume=True)
        assert files_of(run) == before
    with (run / "recipe.yaml").open("a") as handle:
        handle.write("later: 1\n")
    with pytest.raises(InputError, match=f"later: unknown key{writer}"):
        train(recipe, run, resume=True)


@pytest.mark.parametrize("has_recipe", [True, False], ids=["experts was a number", "no recipe in checkpoints"])
def test_a_run_of_an_earlier_version_goes_on(six_steps: tuple[Recipe, Path], tmp_path: Path, has_recipe: bool) -> None:
    recipe, whole = six_steps
    run = cut_off(whole, tmp_path / "cut", after=4)
    text = (run / "recipe.yaml").read_text()
    old = text.replace("experts: none", "experts: 1").replace("  mixed_vectors: 1\n", "")
    assert len(old) < len(text) - 20
    (run / "recipe.yaml").write_text(old)
    for saved in checkpoint.directories(run / "checkpoints"):
        state = json.loads((saved / "state.json").read_text())
        state["recipe"]["adapter"]["experts"] = state["recipe"]["adapter"].pop("mixed_vectors")
        if not has_recipe:
            del state["recipe"]
        (saved / "state.json").write_text(json.dumps(state))
        vouch_for(saved)
    train(load_recipe(run / "recipe.yaml", of_a_run=True), run, resume=True)
    assert_same_run(run, whole)


def test_a_run_that_lost_all_its_checkpoints_is_not_begun_again(six_steps: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, whole = six_steps
    cut = cut_off(whole, tmp_path / "cut", after=4)
    for lost in ("manifest.json", "."):
        for path in (cut / "checkpoints").iterdir():
            shutil.rmtree(path) if lost == "." else (path / lost).unlink()
        before = files_of(cut)
        message = r"holds no checkpoint that can be used, and the run has taken 6 steps\. Put.* adapter\.init_from"
        with pytest.raises(InputError, match=message):
            train(recipe, cut, resume=True)
        assert files_of(cut) == before
    # one that came to its end before its first `save_steps`
    ended = Path(shutil.copytree(whole, tmp_path / "ended"))
    shutil.rmtree(ended / "checkpoints")
    (ended / "metrics.jsonl").write_text(json.dumps(records(whole)[0]) + "\n")
    with pytest.raises(InputError, match=r"holds no checkpoint that can be used, and the run has taken 1 steps"):
        train(recipe, ended, resume=True)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    six_steps: tuple[Recipe, Path], tmp_path: Path, capsys: Any
) -> None:
    recipe, whole = six_steps
    cut = cut_off(whole, tmp_path / "cut", after=0)
    log = cut / "metrics.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:2]) + '{"kind": "tr')
    train(recipe, cut, resume=True)
    assert "starting from step 0" in " ".join(capsys.readouterr().err.split())
    assert losses(cut) == losses(whole)


def test_a_disk_that_becomes_read_only_ends_the_run_and_resume_goes_on(
    six_steps: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole = six_steps
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        original = checkpoint.save

        def failing(directory: Path, step: int, *more: Any) -> Path:
            with read_only(disk) if step == 4 else contextlib.nullcontext():
                return original(directory, step, *more)

        monkeypatch.setattr(checkpoint, "save", failing)
        # an administrator can't make a disk read-only while a file on it is open, as the lock is; a failing disk can
        monkeypatch.setattr(trainer, "run_lock", lambda *_: contextlib.nullcontext())
        with pytest.raises(RunFailed, match="the checkpoint of step 4 in .* can't be written .Read-only file system"):
            train(recipe, disk / "run")
        monkeypatch.undo()
        with read_only(disk), pytest.raises(InputError, match="nothing can be written in .*Read-only"):
            train(recipe, disk / "run", resume=True)
        train(recipe, disk / "run", resume=True)
        assert_same_run(disk / "run", whole)


def test_a_disk_that_fills_up_stops_the_run_and_resume_ends_where_it_would_have(
    six_steps: tuple[Recipe, Path], write_recipe: Any, tmp_path: Path, capsys: Any
) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        filler = fill(disk, leave_bytes=100_000)  # room for a checkpoint or two, not for six and an adapter
        training = {"output_dir": str(disk / "run"), "max_steps": 6, "save_steps": 1, "save_total_limit": 9}
        command = ["train", str(write_recipe(training=training))]
        assert main(command) == 1
        assert "the disk is full" in capsys.readouterr().err
        assert list((disk / "run" / "checkpoints").glob("step-*"))
        assert not (disk / "run" / "adapter").exists()
        filler.unlink()
        assert main([*command, "--resume"]) == 0
        assert_same_run(disk / "run", six_steps[1])


def test_stopping_where_a_damaged_checkpoint_stands_saves_a_whole_one(
    six_steps: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, whole = six_steps
    cut = cut_off(whole, tmp_path / "cut", after=2)
    damaged = cut / "checkpoints" / "step-00000003"
    damaged.mkdir()
    stop_after(recipe, cut, step=3, resume=True)  # from step 2; "and saved" has to be true
    assert checkpoint.load(damaged).number == 3


def test_each_step_is_saved_once_and_its_records_are_on_disk_before(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second save of one step would remove the first for a moment, and with a limit of one there is no other.

    After a power cut a run goes on behind its newest checkpoint: what was recorded before that is never run again.
    """
    order: list[str] = []
    original = checkpoint.save
    monkeypatch.setattr("qvera.training.run_dir.flush", lambda path: order.append(path.name))
    monkeypatch.setattr(checkpoint, "save", lambda d, step, *more: order.append(str(step)) or original(d, step, *more))
    train(make_recipe(training={"max_steps": 5, "save_steps": 2, "eval_steps": 2}), tmp_path / "run")
    saved = [int(name) for name in order if name != "metrics.jsonl"]
    assert saved == sorted(set(saved))
    assert {2, 4, 5} <= set(saved)
    assert order == [name for step in saved for name in ("metrics.jsonl", str(step))]


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_the_run_and_it_is_saved(write_recipe: Any, tmp_path: Path) -> None:
    """The system sends SIGHUP, and whatever is printed afterwards fails."""
    run_dir = tmp_path / "run"
    recipe = write_recipe(training={"output_dir": str(run_dir), "max_steps": 100_000, "save_steps": 100_000})
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="200")
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, and the test never end
        os.execv(sys.executable, [sys.executable, "-m", "qvera", "train", str(recipe)])
    shown = b""
    while b"tokens/s" not in shown:  # on the bar after the first step
        shown += os.read(terminal, 65_536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found is not None
    assert found.number == len(losses(run_dir)) > 0


@pytest.mark.parametrize(
    "keys", [{"training": {"per_device_train_batch_size": 2}}, {"data": {"packing": True, "prefix_once": False}}]
)
def test_how_rows_are_divided_into_passes_does_not_change_the_update(
    make_recipe: Any, six_steps: tuple[Recipe, Path], tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Not 2 x 4 rows but 4 x 2, or packed, though rows have different numbers of trained tokens."""
    train(make_recipe(**keys), tmp_path / "run")
    assert_close_run(tmp_path / "run", six_steps[1])


def test_nan_stops_the_run_and_names_step_and_rows(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = forward.batch_nll, itertools.count(1)

    def poisoned(*args: Any) -> Any:
        nll, count = real(*args)
        return (nll * math.nan if next(calls) == 8 else nll), count  # 2 held-out batches, then step 3's second

    monkeypatch.setattr(forward, "batch_nll", poisoned)
    with pytest.raises(RunFailed, match=r"Step 3: .*rows\.jsonl:\d+"):
        train(make_recipe(training={"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2]


def test_a_layer_that_the_model_does_not_call_is_named_before_the_first_step(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fused kernel does, which gets the weight alone."""
    forward_of = QveraLinear.forward

    def not_called(self: QveraLinear, x: Any, *rest: object) -> Any:
        return self.base_layer(x) if self.spec.name.endswith("up_proj") else forward_of(self, x, *rest)

    monkeypatch.setattr(QveraLinear, "forward", not_called)
    steps = {"max_steps": 1}
    with pytest.raises(
        RunFailed, match=r"gave 2 of 14 adapted layers no gradient: model\.layers\.0\.mlp\.up_proj"
    ) as found:
        train(make_recipe(training=steps), tmp_path / "run")
    assert not records(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    (others,) = re.findall(r"adapter\.targets: \[(.+)\]", str(found.value))
    assert train(make_recipe(training=steps, adapter={"targets": others.split(", ")}), tmp_path / "others")


@pytest.mark.parametrize("also_of_the_base", [False, True])
def test_an_adapter_whose_held_out_loss_is_not_finite_is_not_saved_unless_the_base_s_is_not_either(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, also_of_the_base: bool
) -> None:
    """And metrics are JSON that every parser reads, whatever the loss."""
    real, calls = AloneLoop.held_out_loss, itertools.count(int(also_of_the_base))

    def spoilt(run: AloneLoop, _: object) -> dict[str, Any]:
        return {**real(run), "loss": math.nan} if next(calls) else real(run)

    monkeypatch.setattr(AloneLoop, "held_out_loss", spoilt)
    run_dir = tmp_path / "run"
    advice = r"Begin again with a lower training\.learning_rate, in another training\.output_dir\."
    refused = pytest.raises(NotFinite, match=rf"Step 2: its held-out loss is not finite\. {advice}")
    with contextlib.nullcontext() if also_of_the_base else refused:
        train(make_recipe(training={"max_steps": 2, "eval_steps": 1}), run_dir)
    assert (run_dir / "adapter").exists() is also_of_the_base
    assert run_json(run_dir)["status"] == ("done" if also_of_the_base else "failed")
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found is not None and found.number == 2
    evals = [
        line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if json.loads(line)["kind"] == "eval"
    ]
    assert len(evals) == 2
    assert all('"loss": null' in line for line in evals)


def test_early_stopping_keeps_the_best_vectors(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = {"max_steps": 30, "eval_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True}
    recipe = make_recipe(training=stopping)
    real, calls = AloneLoop.held_out_loss, itertools.count()

    def worse_after_step_3(run: AloneLoop, _: object) -> dict[str, Any]:
        found = real(run)  # the first call is before training
        return {**found, "loss": found["loss"] + 10} if next(calls) in (4, 5) else found

    monkeypatch.setattr(AloneLoop, "held_out_loss", worse_after_step_3)
    run_dir = tmp_path / "run"
    result = train(recipe, run_dir)
    assert result is not None
    evals = records(run_dir, "eval")
    best = min(evals, key=lambda r: r["loss"])
    assert result.run["result"]["stopped_early"]
    assert len(evals) == best["step"] + 2 < 30
    assert result.run["result"]["best_step"] == best["step"]
    assert result.run["result"]["eval_after"]["loss"] == pytest.approx(best["loss"], rel=1e-6)
    saved = run_dir / "checkpoints"
    assert same(vectors(run_dir), load_file(saved / f"step-{best['step']:08d}" / "vectors.safetensors"))

    # killed before the adapter was written, and the best checkpoint is damaged: the last step's vectors, and a warning
    shutil.rmtree(run_dir / "adapter")
    (saved / f"step-{best['step']:08d}" / "vectors.safetensors").write_bytes(b"")
    console = Console(record=True, width=1000)
    again = train(recipe, run_dir, resume=True, console=console)
    assert again is not None
    assert again.run["result"]["steps"] == len(evals)
    text = console.export_text()
    assert "not what the manifest says" in text
    assert "It stopped early, so no step is left." in text
    assert "The adapter gets the last step's vectors, not the best." in text
    assert same(vectors(run_dir), load_file(saved / f"step-{len(evals):08d}" / "vectors.safetensors"))


def test_a_finished_run_is_not_overwritten(make_recipe: Any, six_steps: tuple[Recipe, Path]) -> None:
    recipe, run_dir = six_steps
    before = files_of(run_dir)
    with pytest.raises(InputError, match="already holds a run. Add --resume"):
        train(recipe, run_dir)
    for resume in (True, False):  # --resume is not advised where it would be refused
        with pytest.raises(InputError, match=r"another recipe; adapter\.rank changed"):
            train(make_recipe(adapter={"rank": 16}, training={"max_steps": 6}), run_dir, resume=resume)
    held = rf"process {os.getpid()} on .* \(since .* trains"
    with run_lock(run_dir), pytest.raises(InputError, match=held):
        train(recipe, run_dir, resume=True)
    assert files_of(run_dir) == before


def test_a_run_without_its_metrics_is_a_run(six_steps: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, whole = six_steps
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="already holds a run. Add --resume"):
        train(recipe, run_dir)
    assert train(recipe, run_dir, resume=True) is not None
    assert same(vectors(run_dir), vectors(whole))


def test_a_dry_run_writes_nothing_and_finds_what_a_run_would_be_refused_for(
    six_steps: tuple[Recipe, Path], make_recipe: Any, tmp_path: Path, capsys: Any
) -> None:
    assert train(make_recipe(training={"full_determinism": True}), tmp_path / "run", dry_run=True) is None
    assert not torch.are_deterministic_algorithms_enabled()  # as before
    assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().err
    assert "⟦" in shown  # rows, as `qvera preview` prints them
    assert "Fits: " in shown  # the plan
    assert train(make_recipe(training={"max_steps": 2, "warmup_steps": 2}), tmp_path / "run", dry_run=True) is None
    assert "training.warmup_steps: with 2 of 2 steps, learning_rate is never" in " ".join(
        capsys.readouterr().err.split()
    )
    begun = {"rank": 4, "init_from": str(six_steps[1] / "adapter")}
    for message, recipe, run_dir in (
        ("already holds a run", make_recipe(), six_steps[1]),
        ("adapter.targets: no linear .* is named no_proj", make_recipe(adapter={"targets": ["no_proj"]}), tmp_path),
        ("has rank 8, the recipe 4", make_recipe(adapter=begun), tmp_path),
    ):
        with pytest.raises(InputError, match=message):
            train(recipe, run_dir, dry_run=True)
    with pytest.raises(InputError, match="is a run of 6 steps, and now has 5"):
        train(make_recipe(training={"max_steps": 5}), six_steps[1], resume=True, dry_run=True)


def test_the_8_bit_optimizer_learns_and_says_what_it_really_saves(make_recipe: Any, tmp_path: Path) -> None:
    """bitsandbytes keeps fp32 state for small tensors, and VeRA's vectors are small: the printed bytes are counted."""
    console = Console(record=True, width=200)
    settings = {"max_steps": 8, "optim": "adamw_8bit", "learning_rate": 0.1}
    result = train(make_recipe(training=settings), tmp_path / "run", console=console)
    assert result is not None
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.3
    holds = r"adamw_8bit holds ([\d,]+) bytes of state; torch's adamw would hold ([\d,]+)"
    said = [int(number.replace(",", "")) for number in re.findall(holds, console.export_text())[0]]
    state = load_file(max((tmp_path / "run" / "checkpoints").glob("*/optimizer.safetensors")))
    held = sum(t.numel() * t.element_size() for t in state.values())
    assert said == [held, 8 * result.run["adapter"]["trainable_parameters"]]


def test_none_is_no_reporter(tmp_path: Path) -> None:
    assert not Trackers(["none"], tmp_path, {}).classes


def test_tensorboard_gets_every_step(make_recipe: Any, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(make_recipe(training={"max_steps": 2, "report_to": ["tensorboard"]}), tmp_path / "run")
    found = next((tmp_path / "run").rglob("events.out.tfevents.*"))
    reader = events.EventAccumulator(str(found.parent))
    reader.Reload()
    tags = reader.Tags()["scalars"]
    (tag,) = [t for t in tags if t.endswith("loss") and "eval" not in t]
    assert [(e.step, pytest.approx(e.value)) for e in reader.Scalars(tag)] == [
        (r["step"], r["loss"]) for r in records(tmp_path / "run")
    ]


def test_run_json_says_what_a_run_is_made_of_while_it_goes(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    log = Trainer.log

    def spy(self: Trainer, record: dict[str, Any]) -> None:
        seen.append(run_json(self.run_dir))
        log(self, record)

    monkeypatch.setattr(Trainer, "log", spy)
    recipe = make_recipe(training={"max_steps": 2, "sample_count": 1})
    result = train(recipe, tmp_path / "run")
    assert result is not None
    begun, done = seen[0], result.run
    read = build_datasets(recipe.data, load_tokenizer(recipe.model))
    assert begun["data"]["sha256"] == data_sha256(read)
    assert (begun["status"], begun["planned_steps"]) == ("running", 2)
    assert begun["result"] == {"eval_before": done["result"]["eval_before"]}
    assert [begun["samples"][0] | {"after": done["samples"][0]["after"]}] == done["samples"]
    assert [begun[key] for key in ("model", "data", "device")] == [done[key] for key in ("model", "data", "device")]


def test_flash_attention_needs_its_package(make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "find_spec", {"kernels": True}.get)  # whose kernels need a GPU
    recipe = make_recipe(model={"attn_implementation": "flash_attention_2"})
    with pytest.raises(InputError, match="needs the package flash-attn, which is not installed here"):
        train(recipe, tmp_path / "run")
