"""Steps drawn over tasks and over two levels: functions of the step; held-out tasks are in no step."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from qvera.cli.main import main
from qvera.config.schema import parse_recipe
from qvera.config.sections import DataSection, DataSource
from qvera.data import batches_of, build_datasets, data_sha256
from qvera.data.dataset import print_preflight
from qvera.lab.bilora import BilevelBatches
from qvera.lab.tasks import TaskBatches, source_names, task_rows
from qvera.training.trainer import train
from qvera.utils.errors import InputError, OutOfMemory
from tests.training.runs import cut_off, losses, same, vectors

Write = Callable[..., str]
AUTHORS = Path(__file__).parent / "reference" / "mamf_tasks.npz"


def data_section(**keys: Any) -> DataSection:
    """With keys that a plug-in adds."""
    return DataSection(**keys)


def label_tasks(labels: int, count: int, size: int, seed: int) -> list[list[int]]:
    """The labels of each task, sorted, where each row has a label of its own."""
    keys = {"task_column": "label", "task_labels": size, "task_count": count, "seed": seed}
    section = data_section(path="-", sampling="task", **keys)
    return [rows.tolist() for rows in task_rows(section, np.arange(labels))]


@pytest.mark.parametrize("seed", [312, 313])
def test_tasks_of_labels_are_the_authors(seed: int) -> None:
    stored = np.load(AUTHORS)
    labels, drawn = stored["one_label_order_a"].tolist(), stored[f"one_seed{seed}_train_tasks_a"].tolist()
    found = label_tasks(len(labels), int(stored["K"]), int(stored["N"]), seed)
    assert [[labels[label] for label in task] for task in found] == [sorted(task, key=labels.index) for task in drawn]


def task_batches(sizes: list[int], size: int, **options: Any) -> TaskBatches:
    starts = np.cumsum([0, *sizes])
    tasks = [np.arange(low, high) for low, high in zip(starts[:-1], starts[1:], strict=True)]
    return TaskBatches(np.full(sum(sizes), 5), size, tasks=tasks, **options)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    size=st.integers(1, 5),
    seed=st.integers(0, 2**65),
    each=st.integers(1, 3),
    shuffle=st.booleans(),
)
def test_every_task_has_equally_many_steps_and_each_of_its_rows_once_an_epoch(
    sizes: list[int], size: int, seed: int, each: int, shuffle: bool
) -> None:
    found = task_batches(sizes, size, seed=seed, shuffle=shuffle, steps_each=each)
    visits = 8 * each  # of every task: a full epoch of the largest in batches of one row
    steps = visits * len(sizes)
    rows_of: dict[int, list[list[int]]] = {}
    for step in range(steps):
        task, before = found.turn(step)
        assert before == len(rows_of.setdefault(task, []))
        assert task == found.turn(step - step % each)[0], "a task keeps its turn"
        rows_of[task].append(found.rows(step))
    for task, batches in rows_of.items():
        assert len(batches) == visits
        per_epoch = -(-sizes[task] // size)
        assert sorted(row for batch in batches[:per_epoch] for row in batch) == found.tasks[task].tolist()
    stretches = [list(rows) for stretch in found.stretches(steps) for rows in stretch]
    assert stretches == [found.rows(step) for step in reversed(range(steps))][::-1]


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 40), share=st.floats(0, 0.99), lower=st.integers(1, 3), upper=st.integers(1, 3))
def test_the_levels_never_share_a_row(n: int, share: float, lower: int, upper: int) -> None:
    found = BilevelBatches(np.full(n, 5), 3, seed=4, upper_share=share, lower_steps=lower, upper_steps=upper)
    seen: dict[bool, set[int]] = {False: set(), True: set()}
    for step in range(40 * (lower + upper)):
        seen[found.is_upper(step)] |= set(found.rows(step))
    assert not seen[False] & seen[True]
    assert seen[False] | seen[True] == set(range(n))
    assert len(seen[True]) == min(max(round(n * share), 1), n - 1)


def test_retraining_takes_all_rows_for_the_lower_level() -> None:
    found = BilevelBatches(np.full(10, 5), 5, upper_share=0.3, retrain_from=4)
    assert [found.is_upper(step) for step in range(7)] == [False, True, False, True, False, False, False]
    assert sorted(found.rows(4) + found.rows(5)) == list(range(10))


@pytest.fixture
def three_sources(write: Write) -> DataSection:
    """Sources of 12, 5 and 3 rows."""
    paths = [
        write([{"prompt": f"{name} {i}", "completion": f" {name}"} for i in range(count)], f"{name}.jsonl")
        for name, count in (("add", 12), ("say", 5), ("ask", 3))
    ]
    more = [DataSource(path=path) for path in paths[1:]]
    return data_section(path=paths[0], mixture=more, sampling="task")


def recipe_of(data: DataSection, **training: Any) -> Any:
    training = {"global_batch_size": 4, "per_device_train_batch_size": 2, **training}
    return parse_recipe({"model": "m", "data": data.to_dict(), "training": training}, "test")


def test_sources_of_one_path_are_told_apart_by_what_else_they_are() -> None:
    glue = [data_section(path="nyu-mll/glue", config_name=name) for name in ("sst2", "rte")]
    file = data_section(path="a.jsonl")
    assert source_names([*glue, file]) == ["nyu-mll/glue sst2 train", "nyu-mll/glue rte train", "a.jsonl"]
    assert source_names([file, file]) == ["a.jsonl train 1", "a.jsonl train 2"]


def test_each_source_is_a_task_and_stays_one_in_a_selection(
    three_sources: DataSection, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = build_datasets(three_sources, base_tokenizer)
    batches = batches_of(recipe_of(three_sources), data.train)
    files = [{data.train[row].source.rpartition(":")[0] for row in batches.rows(step)} for step in range(9)]
    assert Counter(name for names in files for name in names) == dict.fromkeys(data.part_names, 3)
    assert data.train.cut(8).part_of.tolist() == data.train.part_of.tolist()
    assert data.train.take(np.array([19, 0])).part_of.tolist() == [2, 0]


def test_the_preview_says_of_which_source_no_row_is_trained(
    three_sources: DataSection, base_tokenizer: PreTrainedTokenizerFast
) -> None:
    path, shown = three_sources.mixture[0].path, io.StringIO()
    data = build_datasets(three_sources.model_copy(update={"held_out_tasks": [path]}), base_tokenizer)
    print_preflight(data, base_tokenizer, Console(file=shown, width=1000))
    assert f"0 from {path} (none is trained)" in shown.getvalue() and "(12 x 1)" in shown.getvalue()


@pytest.mark.parametrize("held_out", [1, ["say"]])
def test_held_out_tasks_are_in_no_step_and_in_no_evaluation(
    write: Write, base_tokenizer: PreTrainedTokenizerFast, held_out: Any
) -> None:
    rows = [{"prompt": f"{i}", "completion": "x", "skill": ("add", "say", "ask")[i % 3]} for i in range(30)]
    section = data_section(
        path=write(rows), sampling="task", task_column="skill", held_out_tasks=held_out, eval_fraction=0.3
    )
    data = build_datasets(section, base_tokenizer)
    [(name, kept)] = data.set_aside.items()
    assert name not in data.part_names
    assert (len(data.part_names), len(kept)) == (2, 10)
    assert {row.owner for row in kept} == {name}
    assert name not in {row.owner for rows in (data.train, data.eval) for row in rows}
    assert [data.part_names[number] for number in data.train.part_of] == [row.owner for row in data.train]
    assert data.stats.unused_columns == []
    assert data.stats.train_rows == len(data.train) == data.stats.sources[0].taken


def test_the_hash_of_the_rows_knows_their_tasks(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    def hash_of(*kinds: str) -> str:
        rows = [{"prompt": f"say {i}", "completion": " no", "kind": kind} for i, kind in enumerate(kinds)]
        section = data_section(path=write(rows, "kinds.jsonl"), sampling="task", task_column="kind")
        return data_sha256(build_datasets(section, base_tokenizer))

    assert hash_of("a", "b", "a", "b") == hash_of("a", "b", "a", "b")
    assert len({hash_of(*kinds) for kinds in ("abab", "baab", "acac")}) == 3


def test_a_task_may_be_several_labels(write: Write, base_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"{i}", "completion": "x", "label": i % 6} for i in range(24)]
    section = data_section(path=write(rows), sampling="task", task_column="label", task_labels=2, task_count=5, seed=9)
    data = build_datasets(section, base_tokenizer)
    batches = batches_of(recipe_of(section), data.train)
    assert isinstance(batches, TaskBatches)
    found = [sorted({data.train[row].owner for row in task}) for task in batches.tasks]
    assert found == [[data.part_names[label] for label in task] for task in label_tasks(len(data.part_names), 5, 2, 9)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "sampling: task needs several tasks; set data.task_column"),
        ({"task_column": "skill", "weight": 2.0}, "weight: data.sampling: task gives every task"),
        ({"mixture": [DataSource(path="b", weight=2.0)]}, "mixture.0.weight: data.sampling: task"),
        ({"task_column": "skill", "group_by_length": True}, "group_by_length: a step's rows"),
        ({"task_column": "skill", "task_labels": 2}, "task_labels: and data.task_count go together"),
        (
            {"task_column": "s", "task_labels": 2, "task_count": 2, "held_out_tasks": 1},
            "held_out_tasks: a value may be in many tasks",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        data_section(path="rows.jsonl", sampling="task", **keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"task_column": "skil"},
            "rows.jsonl:1: no column 'skil' .*did you mean 'skill'. .* prompt, completion, skill",
        ),
        ({"task_column": "prompt", "held_out_tasks": ["nine"]}, "no task is named 'nine'"),
        ({"task_column": "skill"}, "all rows are of 'add'"),
        ({"task_column": "prompt", "held_out_tasks": 4}, "holds out all 4 tasks"),
        ({"task_column": "prompt", "held_out_tasks": ["q1"]}, "q1: a single row, of which none would be left to score"),
        ({"task_column": "prompt", "task_labels": 5, "task_count": 1}, "5 values of the column 'prompt', which has 4"),
    ],
)
def test_tasks_that_are_not_there_are_refused(
    write: Write, base_tokenizer: PreTrainedTokenizerFast, keys: dict[str, Any], words: str
) -> None:
    path = write([{"prompt": f"q{i}", "completion": "x", "skill": "add"} for i in range(4)], "rows.jsonl")
    with pytest.raises(InputError, match=words):
        build_datasets(data_section(path=path, sampling="task", **keys), base_tokenizer)


pytestmark = pytest.mark.process

WORDS = ["red", "blue", "green", "grey"]
ADAPT = {"adapt_steps": 6, "adapt_rows": 4, "adapt_learning_rate": 8e-2}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four tasks, of 12 rows and of 24: answer any number with the task's word."""
    directory, found = tmp_path_factory.mktemp("tasks"), []
    for number, word in enumerate(WORDS):
        rows = [{"prompt": f"say {i}", "completion": f"{word} {word}"} for i in range(12 * (1 + number % 2))]
        (directory / f"{word}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(str(directory / f"{word}.jsonl"))
    return found


@pytest.fixture(scope="module")
def over_tasks(make_recipe: Any, task_files: list[str]) -> Any:
    path, *more = task_files
    data = {"path": path, "mixture": [{"path": one} for one in more], "eval_fraction": 0.0}
    data |= {"sampling": "task", "held_out_tasks": [task_files[2]]}
    return lambda **training: make_recipe(data=data, training={"save_total_limit": 9, **training})


@pytest.fixture(scope="module")
def adapted(over_tasks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    train(over_tasks(**ADAPT), run_dir)
    return run_dir


def test_a_held_out_task_is_learned_in_a_few_steps(adapted: Path, task_files: list[str]) -> None:
    [found] = json.loads((adapted / "run.json").read_text())["result"]["adaptation"]
    assert (found["task"], found["support_rows"], found["query_rows"]) == (task_files[2], 4, 8)
    assert found["loss_after"] < 0.8 * found["loss_before"]
    page = (adapted / "report.html").read_text()
    assert f'<th scope="row">{task_files[2]}</th><td>4</td><td>8</td>' in page[page.index("Held-out tasks") :]


def test_other_rows_are_scored_as_rows_not_as_tasks(adapted: Path, task_files: list[str], tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    assert main(["eval", str(adapted), "--data", task_files[1], "--no-generation", "--json", str(scores)]) == 0
    assert json.loads(scores.read_text())["scores"]["loss"] > 0


def test_a_run_over_tasks_is_resumed_to_the_bit(adapted: Path, over_tasks: Any, tmp_path: Path) -> None:
    again = cut_off(adapted, tmp_path / "again", after=3)
    train(over_tasks(**ADAPT), again, resume=True)
    assert losses(again) == losses(adapted)
    assert same(vectors(again), vectors(adapted))
    mine, first = (json.loads((run / "run.json").read_text())["result"]["adaptation"] for run in (again, adapted))
    assert mine == first


def test_a_task_whose_loss_is_not_finite_leaves_the_run_as_it_was(
    adapted: Path, over_tasks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(over_tasks(adapt_steps=3, adapt_learning_rate=1e30), tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "done"
    assert [task["loss_after"] for task in run["result"]["adaptation"]] == [None]
    assert "Lower training.adapt_learning_rate" in " ".join(capsys.readouterr().err.split())
    assert same(vectors(tmp_path / "run"), vectors(adapted))


def test_a_task_that_memory_does_not_suffice_for_ends_the_run_as_it_was_before(
    adapted: Path, over_tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapt(hook: Any, trainer: Any) -> Any:
        raise OutOfMemory("Step 1: memory ran out.")

    monkeypatch.setattr("qvera.lab.tasks.AdaptHook.finish", adapt)
    with pytest.raises(OutOfMemory, match="Step 6 is saved: the same command with --resume goes on"):
        train(over_tasks(adapt_steps=3), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    before = load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / "vectors.safetensors")
    assert same(before, vectors(adapted)), "adapting changes nothing that is kept"
