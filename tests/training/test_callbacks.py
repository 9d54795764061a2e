"""transformers' callbacks in a run: the events that its own Trainer would give them, in its order, and what they ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from qvera.config.schema import Recipe
from qvera.training import checkpoint
from qvera.training.callbacks import EVENTS
from qvera.training.trainer import train
from qvera.utils.errors import InputError, Interrupted
from tests.conftest import small_llama
from tests.training.runs import assert_same_run, cut_off, losses, run_json

pytestmark = pytest.mark.process


class Recorder(TrainerCallback):
    """Notes each event with its step, epoch and flags, and what it was given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.logs: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        self.args = TrainingArguments("unused", report_to=[])


def _recording(event: str) -> Any:
    def note(
        self: Recorder, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        flags = control.should_evaluate, control.should_save, control.should_log
        last = event == "on_train_end"  # transformers logs what it took before that
        self.seen.append((event, state.global_step, state.epoch, state.max_steps, *(() if last else flags)))
        self.logs += [dict(more["logs"])] if "logs" in more else []
        self.metrics += [more["metrics"]] if "metrics" in more else []
        self.args = args
        if event != "on_init_end":
            assert more["model"] is not None and more["optimizer"].param_groups and more["lr_scheduler"].get_last_lr()

    return note


for _event in EVENTS:
    setattr(Recorder, _event, _recording(_event))


def test_events_are_those_of_transformers_trainer_in_its_order(make_recipe: Any, tmp_path: Path) -> None:
    """32 rows are four steps of an epoch; an epoch and a half. A new best step, which qvera saves at once, is saved too."""
    settings: dict[str, Any] = {"max_steps": 6, "eval_steps": 3, "save_steps": 3, "learning_rate": 1e-2}
    mine, theirs = Recorder(), Recorder()
    train(make_recipe(training={**settings, "sample_count": 0}), tmp_path / "run", callbacks=[mine])
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 32
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
    more: dict[str, Any] = {"eval_strategy": "steps", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "theirs"), **settings, **sizes, **more)
    trainer = transformers.Trainer(
        small_llama(), arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[theirs]
    )
    trainer.train()
    after_training = theirs.logs.pop()
    assert "train_loss" in after_training
    del theirs.seen[-2]
    theirs.seen[0] = (*theirs.seen[0][:3], 6, *theirs.seen[0][4:])  # on_init_end, before it knows its steps
    assert [seen for seen in mine.seen if seen[0] != "on_init_end"] == [s for s in theirs.seen if s[0] != "on_init_end"]
    assert mine.seen[0][0] == theirs.seen[0][0] == "on_init_end"
    for ours, other in zip(mine.logs, theirs.logs, strict=True):
        speed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
        assert set(other) - speed <= set(ours)
    assert mine.metrics[0].keys() >= {"eval_loss"}
    trained = [record["loss"] for record in mine.logs if "loss" in record]
    assert trained == losses(tmp_path / "run")
    for name in ("learning_rate", "max_steps", "save_steps", "eval_steps", "gradient_accumulation_steps"):
        assert getattr(mine.args, name) == getattr(arguments, name), name


def test_early_stopping_of_transformers_ends_a_run_as_done_and_is_resumed_to_the_bit(
    make_recipe: Any, tmp_path: Path
) -> None:
    """No gain is above the threshold, so it stops at the third evaluation."""
    recipe = make_recipe(
        training={"max_steps": 8, "eval_steps": 2, "save_steps": 2, "save_total_limit": 9, "sample_count": 0}
    )
    stopping = [EarlyStoppingCallback(2, 100.0), PrinterCallback, ProgressCallback()]
    result = train(recipe, tmp_path / "whole", callbacks=stopping)
    assert result is not None and result.run["status"] == "done"
    assert (result.run["result"]["steps"], result.run["result"]["stopped_early"]) == (6, True)
    assert (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").is_file()
    for step in (2, 4):
        again = cut_off(tmp_path / "whole", tmp_path / f"from-{step}", after=step)
        train(recipe, again, resume=True, callbacks=[EarlyStoppingCallback(2, 100.0)])
        assert_same_run(again, tmp_path / "whole")


def test_tensorboard_and_trls_callbacks_work_as_they_are(make_recipe: Any, tmp_path: Path) -> None:
    from trl import RichProgressCallback

    train(
        make_recipe(training={"max_steps": 2, "eval_steps": 1, "sample_count": 0}),
        tmp_path,
        callbacks=[TensorBoardCallback(), RichProgressCallback()],
    )
    assert [path.stat().st_size for path in tmp_path.rglob("events.out.tfevents*")]


class Asking(TrainerCallback):
    """Asks for what the recipe does not, and drops what it asks for."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        control.should_evaluate = state.global_step == 2
        control.should_save = state.global_step == 1
        control.should_log = state.global_step != 3
        return control

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        assert state.global_step != 3


def test_flags_of_the_control_are_honoured(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(
        training={"max_steps": 4, "eval_steps": 3, "save_steps": 3, "save_total_limit": 9, "sample_count": 0}
    )
    train(recipe, tmp_path, callbacks=[Asking])
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2]
    steps = sorted(int(path.name[-8:]) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [1, 2, 4]  # 2: a new best step; 4: the end


def test_what_a_callback_asks_for_before_a_step_is_done_after_it(make_recipe: Any, tmp_path: Path) -> None:
    class Ask(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            control.should_evaluate = control.should_save = state.global_step == 1

    recipe = make_recipe(training={"max_steps": 4, "save_steps": 9, "save_total_limit": 9, "sample_count": 0})
    train(recipe, tmp_path, callbacks=[Ask])
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2]
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


@pytest.fixture(scope="module")
def three_steps(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe and its run without callbacks."""
    recipe = make_recipe(training={"max_steps": 3, "eval_steps": 1, "save_steps": 2, "sample_count": 0})
    train(recipe, run_dir := tmp_path_factory.mktemp("runs") / "whole")
    return recipe, run_dir


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin", "on_log", "on_evaluate", "on_save"])
def test_a_callback_that_raises_ends_the_run_and_costs_no_step(
    three_steps: tuple[Recipe, Path], tmp_path: Path, event: str
) -> None:
    def fail(self: Any, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if event == "on_train_begin" or state.global_step >= 1:
            raise ZeroDivisionError("mine")

    recipe, whole = three_steps
    with pytest.raises(ZeroDivisionError, match="mine"):
        train(recipe, tmp_path / "run", callbacks=[type("Failing", (TrainerCallback,), {event: fail})])
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    taken = {"on_train_begin": 0, "on_step_begin": 2}.get(event, 1)
    assert (run["status"], run["result"]["steps"]) == ("interrupted", taken)
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


class _WithTrainer(TrainerCallback):
    trainer: Any = None

    def __init__(self) -> None:
        self.trainer = None


class _Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None: ...


class _Loader(TrainerCallback):
    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None: ...


class _SkipEpoch(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_epoch_stop = True


class _Evaluate(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_evaluate = True


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (_WithTrainer(), "_WithTrainer works on a transformers Trainer"),
        (_Gradients(), r"_Gradients\.on_pre_optimizer_step would never be called"),
        (_Loader(), r"_Loader\.on_epoch_begin asks for a train_dataloader"),
        (transformers.integrations.CometCallback, "CometCallback can't be made without arguments"),
        (3, "3 is neither a transformers callback nor a function"),
        (EarlyStoppingCallback(2), r"EarlyStoppingCallback needs evaluations .* set training\.eval_steps"),
        (_SkipEpoch(), "_SkipEpoch sets should_epoch_stop"),
        (_Evaluate(), "_Evaluate sets should_evaluate, and no rows are held out"),
    ],
)
def test_a_callback_that_needs_what_there_is_not_is_named(
    make_recipe: Any, tmp_path: Path, callback: Any, said: str
) -> None:
    recipe = make_recipe(training={"max_steps": 2, "sample_count": 0}, data={"eval_fraction": 0.0})
    with pytest.raises(InputError, match=said):
        train(recipe, tmp_path / "run", callbacks=[callback])
    if (metrics := tmp_path / "run" / "metrics.jsonl").exists():
        assert [json.loads(line)["kind"] for line in metrics.read_text().splitlines()] == ["train"]


def test_many_adapters_give_their_records_to_functions_only(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(data={"adapter_column": "who", "eval_fraction": 0.0}, training={"sample_count": 0})
    with pytest.raises(InputError, match="PrinterCallback follows the steps of one adapter"):
        train(recipe, tmp_path, callbacks=[PrinterCallback])


def test_stop_iteration_of_a_callback_stops_a_run_to_be_resumed(make_recipe: Any, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            raise StopIteration

    recipe = make_recipe(training={"max_steps": 2, "sample_count": 1})
    with pytest.raises(Interrupted, match="Stopped by Stop after step 1 of 2"):
        train(recipe, tmp_path, callbacks=[Stop()])
    stopped = run_json(tmp_path)
    (sample,) = stopped["samples"]  # of before, as while it ran
    assert "before" in sample and "after" not in sample
    going_on: list[dict[str, Any]] = []
    train(recipe, tmp_path, callbacks=[lambda _: going_on.append(run_json(tmp_path))], resume=True)
    assert going_on[0]["status"] == "running" and going_on[0]["samples"] == [sample]
    assert going_on[0]["result"] == {"eval_before": stopped["result"]["eval_before"]}


def test_a_stop_at_the_end_of_an_epoch_is_in_the_checkpoint_of_its_step(make_recipe: Any, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    recipe = make_recipe(training={"num_train_epochs": 2, "save_steps": 1, "sample_count": 0})
    result = train(recipe, tmp_path, callbacks=[Stop()])
    assert result is not None and result.run["result"]["stopped_early"]
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None and found.number == result.run["result"]["steps"]
    assert found.state["progressed"]["stopped_early"]


@pytest.mark.parametrize("kind", [np.bool_, torch.tensor])
def test_a_function_may_return_a_boolean_of_numpy_or_torch(make_recipe: Any, tmp_path: Path, kind: Any) -> None:
    def enough(record: dict[str, Any]) -> Any:
        return kind(record["step"] < 2)

    with pytest.raises(Interrupted, match="Stopped by enough after step 2 of 3"):
        train(make_recipe(training={"max_steps": 3, "sample_count": 0}), tmp_path, callbacks=[enough])


def test_ctrl_c_in_a_callback_costs_no_step(make_recipe: Any, tmp_path: Path) -> None:
    def interrupted(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="Stopped by interrupted after step 1 of 2, and saved"):
        train(make_recipe(training={"max_steps": 2, "sample_count": 0}), tmp_path, callbacks=[interrupted])
