"""Two processes under the stages: the numbers of one process, a stage that is what it says, and nothing lost in between.

One spawn of two processes serves the whole file; what each rank found in its live objects comes back as JSON. The other
stages: `test_matrix.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvera.adapters.save_load import load_adapter
from qvera.config.schema import parse_recipe
from qvera.models.loader import load_base
from tests.distributed.ranks import run_worker
from tests.distributed.runs import BARE, CUT, FLOAT16, LAYERS, STEPS, UNEVEN, TinyRuns, close, name_of
from tests.training.runs import losses, run_json, vectors

pytestmark = pytest.mark.process

STAGES = ("zero3", "zero2", None)  # ZeRO-3 first: what it needs must not be there from an easier stage
TWO_ENGINES = ("zero3", None)
every_stage = pytest.mark.parametrize("stage", STAGES, ids=name_of)
both_engines = pytest.mark.parametrize("stage", TWO_ENGINES, ids=name_of)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    tied = TinyRuns(tmp_path_factory.mktemp("tied"), tiny_rows, tie_word_embeddings=True)
    tied.alone("alone", tied.recipe(max_steps=1))
    return tied


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path, tied: TinyRuns) -> TinyRuns:
    place = TinyRuns(tmp_path_factory.mktemp("stages"), tiny_rows)
    place.alone("alone", place.recipe())
    place.alone("alone-uneven", place.recipe(**UNEVEN))
    place.alone("alone-float16", place.recipe(dtype="float16", **FLOAT16))
    for stage in STAGES:
        place.task(name_of(stage), place.recipe(stage))
    for stage in TWO_ENGINES:
        place.cut_and_resumed(name_of(stage), place.recipe(stage, **BARE))
        place.task(f"{name_of(stage)}-float16", place.recipe(stage, "float16", **FLOAT16))
    place.task("uneven", place.recipe("zero3", **UNEVEN))
    short = {"rank": 1, "step": 2, "rows": 1}
    place.task("halved", place.recipe(on_oom="halve", **BARE), out_of_memory=short)
    place.task("short", place.recipe(**BARE), out_of_memory=short, fails=True)
    place.task("grown", place.recipe("zero3"), copy_of="alone", damaged=True, resume=True)
    tied.task("tied", tied.recipe("zero3", max_steps=1))
    tied.task("tied-as-stored", tied.recipe("zero3", "bfloat16", max_steps=1, **BARE))
    place.task("unlike", place.recipe(), other_recipe=place.recipe(learning_rate=1e-3), fails=True)
    place.found = run_worker([*place.tasks, *tied.tasks], 2, place.root / "spawn", limit_seconds=600)
    return place


@every_stage
def test_two_processes_give_the_numbers_scores_and_answers_of_one(place: TinyRuns, stage: str | None) -> None:
    run, other = place.root / name_of(stage), place.root / "alone"
    assert len(losses(run)) == STEPS
    close(run, other)
    assert losses(run, "eval") == pytest.approx(losses(other, "eval"), rel=1e-5)
    mine, alone = run_json(run), run_json(other)
    for when in ("eval_before", "eval_after"):
        assert mine["result"][when]["loss"] == pytest.approx(alone["result"][when]["loss"], rel=1e-5)
        assert mine["result"][when]["trained_tokens"] == alone["result"][when]["trained_tokens"]
        assert mine["result"][when]["exact_match_rows"] == 2
    assert mine["samples"] == alone["samples"] and len(mine["samples"]) == 1
    assert mine["result"]["eval_after"]["loss"] < mine["result"]["eval_before"]["loss"]
    assert (mine["processes"]["count"], mine["processes"]["deepspeed"]) == (2, stage)
    assert [rank["peak_bytes"] > 0 for rank in mine["processes"]["ranks"]] == [True, True]
    # the plan's trial of the longest batch leaves no trace in these numbers
    assert mine["plan"]["fits"]
    assert mine["plan"]["measured"]["predicted_bytes"] == mine["plan"]["memory"]["total_bytes"]
    assert [rank[name_of(stage)]["longest_batch_tries"] for rank in place.found] == [1, 1]


@every_stage
def test_a_stage_is_what_it_says(place: TinyRuns, stage: str | None) -> None:
    moments = 2 * 4 * sum(t.numel() for t in vectors(place.root / "alone").values())
    for found in (rank[name_of(stage)] for rank in place.found):
        assert found["stage"] == (None if stage is None else int(stage[4]))
        share = moments if stage is None else moments / 2
        assert share <= found["optimizer_bytes"] < share * 1.05  # up to padding, and a step counter for each vector
        held, whole = found["packed_held_bytes"], found["packed_whole_bytes"]
        if stage == "zero3":
            assert whole / 2 <= held <= whole / 2 + 2 * LAYERS * 7
            # weights are whole one after the other; in no phase more of them than a layer has
            assert 0 < found["packed_live_bytes"] <= whole / LAYERS
        else:
            assert held == whole


@every_stage
def test_checkpoints_hold_whole_vectors_and_state_and_no_base(place: TinyRuns, stage: str | None) -> None:
    mine, alone = (place.root / d / "checkpoints" / f"step-{STEPS:08d}" for d in (name_of(stage), "alone"))
    for file in ("vectors.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(mine / file), load_file(alone / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            largest = float(theirs[name].abs().max())  # ranks add in another order, and some elements nearly cancel
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-4 * largest)
        assert {name.partition("/")[0].rpartition(".")[2] for name in ours} == {"qvera_a", "qvera_b", "qvera_d"}
    # the random states of both ranks beside the same files as ever
    assert sorted(load_file(mine / "random.safetensors")) == ["cpu", "cpu.1"]
    assert {path.name for path in mine.iterdir()} == {path.name for path in alone.iterdir()} | {"hooks.safetensors"}


def test_memory_that_runs_out_on_one_rank_halves_the_passes_of_all(place: TinyRuns) -> None:
    close(place.root / "halved", place.root / "alone")
    assert run_json(place.root / "halved")["result"]["halvings"] == [{"step": 2, "pass_rows": 1}]


def test_memory_that_runs_out_on_one_rank_saves_and_ends_all(place: TinyRuns) -> None:
    for found in (rank["short"] for rank in place.found):
        assert found["error"] == "OutOfMemory"
        assert "Step 2: memory ran out in a forward and backward pass (rank 1, 2 rows," in found["text"]
        assert "Step 1 is saved" in found["text"]
    assert (place.root / "short" / "checkpoints" / "step-00000001").is_dir()


@both_engines
def test_all_ranks_skip_a_step_whose_gradient_overflows(place: TinyRuns, stage: str | None) -> None:
    """And then take it: the numbers of one process in float16. Hooks learn of each try and of each step."""
    word = f"{name_of(stage)}-float16"
    skipped = run_json(place.root / word)["result"]["skipped_steps"]
    assert skipped >= 1
    close(place.root / word, place.root / "alone-float16", rtol=5e-3)  # which AdamW's first steps magnify
    calls, others = (rank[word]["hook_calls"] for rank in place.found)
    assert calls == others
    assert calls == [["before", 1]] * (skipped + 1) + [["after", 1]]


@both_engines
def test_a_signal_to_one_rank_stops_all_at_one_step_and_resume_is_exact(place: TinyRuns, stage: str | None) -> None:
    word = name_of(stage)
    plain = [[name, step] for step in range(1, STEPS + 1) for name in ("before", "after")]
    for rank in place.found:
        whole, cut, resumed = rank[word], rank[f"{word}-cut"], rank[f"{word}-resumed"]
        assert (cut["error"], cut["exit_code"]) == ("Interrupted", 75)
        assert "Stopped by SIGTERM at rank 1 on " in cut["text"]
        assert f"after step {CUT} of {STEPS}" in cut["text"]
        assert len(cut["rows"]) == CUT and cut["rows"] + resumed["rows"] == whole["rows"]
        assert whole["hook_calls"] == plain
        assert resumed["hook_calls"] == [["loaded", CUT], *plain[2 * CUT :]]
        assert resumed["longest_batch_tries"] == 0
    place.same_to_the_bit(f"{word}-resumed", word)
    assert run_json(place.root / f"{word}-resumed")["status"] == "done"


def test_uneven_shares_and_a_rank_without_rows_change_nothing(place: TinyRuns) -> None:
    """31 of 32 rows, then the last one: every row once an epoch, and all in the same number of passes."""
    by_step = [[rank["uneven"]["rows"][step] for rank in place.found] for step in range(STEPS)]
    assert [[len(rows) for rows in ranks] for ranks in by_step] == [[16, 15], [1, 0]] * 2
    assert sorted(row for ranks in by_step[:2] for rows in ranks for row in rows) == list(range(32))
    close(place.root / "uneven", place.root / "alone-uneven", rtol=1e-4)  # of one row, gradients nearly cancel


def test_a_run_of_one_goes_on_with_two_under_zero3_past_a_damaged_checkpoint(place: TinyRuns) -> None:
    """Rank 0 sees the damage, and both go on from the checkpoint before."""
    close(place.root / "grown", place.root / "alone")
    assert [len(rank["grown"]["rows"]) for rank in place.found] == [STEPS - CUT] * 2
    said = "".join((place.root / "spawn" / "rank0.log").read_text().split())  # lines are broken anywhere
    assert f"step-{STEPS:08d}/optimizer.safetensors:ismissingornotwhatthemanifestsays" in said
    assert "Itispassedover." in said


def test_a_run_of_two_under_zero3_goes_on_with_one(place: TinyRuns) -> None:
    shutil.copytree(place.root / "zero3-cut", place.root / "shrunk")
    place.alone("shrunk", place.recipe(**BARE), resume=True)
    close(place.root / "shrunk", place.root / "alone")


def test_under_zero3_a_head_that_is_the_embedding_stays_whole_and_changes_nothing(
    place: TinyRuns, tied: TinyRuns
) -> None:
    """As in SmolLM2 and Llama-3.2. It is the mapped file's, so that on a CPU it takes no memory of a rank's own."""
    run, alone = tied.root / "tied", tied.root / "alone"
    close(run, alone)
    assert len(losses(tied.root / "tied-as-stored")) == 1  # computed in the dtype of the file
    assert losses(run, "eval") == pytest.approx(losses(alone, "eval"), rel=1e-5)
    assert run_json(run)["samples"] == run_json(alone)["samples"]
    for rank in place.found:
        assert rank["zero3"]["embedding"] == {"sharded": True, "is_the_head": False, "mapped": False}
        assert rank["tied"]["embedding"] == {"sharded": False, "is_the_head": True, "mapped": True}
        assert rank["tied"]["packed_held_bytes"] == rank["zero3"]["packed_held_bytes"]


def test_the_adapter_of_every_stage_is_an_ordinary_one(place: TinyRuns) -> None:
    for stage in STAGES:
        directory = place.root / name_of(stage) / "adapter"
        assert {path.name for path in directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = load_base(parse_recipe(place.recipe(), "x").model)
    model = load_adapter(base.model, place.root / "zero3" / "adapter", base)
    assert sum("qvera_d" in name for name, _ in model.named_parameters()) == LAYERS * 7


def test_processes_that_are_not_alike_are_refused_by_name(place: TinyRuns) -> None:
    for found in (rank["unlike"] for rank in place.found):
        assert found["error"] == "InputError"
        assert "training.learning_rate is 0.001 on rank 1 (" in found["text"]
        assert "version" not in found["text"]
    assert not (place.root / "unlike").exists()
