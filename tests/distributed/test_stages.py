"""Two processes under every stage: the numbers of one process, a stage that is what it says, and nothing lost in between.

One spawn of two processes serves the whole file; what each rank found in its live objects comes back as JSON.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvera.adapters.files.save_load import load_adapter
from qvera.config.schema import parse_recipe
from qvera.models.loader import load_base
from qvera.training.trainer import train
from tests.distributed.ranks import run_worker
from tests.distributed.runs import (
    BARE,
    CUT,
    LAYERS,
    ONE_ROW,
    STEPS,
    UNEVEN,
    TinyRuns,
    close,
    losses,
    name_of,
    vectors,
)

pytestmark = pytest.mark.process

QUICK, SLOW = (None, "zero2", "zero3"), ("zero1", "zero3-offload-cpu")
RESUMED = (None, "zero3")
FLOAT16 = (None, "zero3")
SHARDED = ("zero3", "zero3-offload-cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    """Runs of one process, and of two processes under the quick stages."""
    place = TinyRuns(tmp_path_factory.mktemp("stages"), tiny_rows)
    root = place.root
    place.alone("alone")
    place.alone("alone-uneven", **UNEVEN)
    place.alone("alone-one-row", **ONE_ROW)
    train(parse_recipe(place.float16(), "alone-float16"), root / "alone-float16")
    place.alone("grown", max_steps=STEPS, save_steps=CUT)  # cut back to its step 4 below
    shutil.rmtree(root / "grown" / "checkpoints" / f"step-{STEPS:08d}")
    tied = TinyRuns(root / "tied", tiny_rows, tie_word_embeddings=True)
    tied.alone("alone")
    # ZeRO-3 first: what it needs must not be there from an easier stage
    tasks = [place.task(name_of(stage), stage) for stage in reversed(QUICK)]
    for stage in RESUMED:
        word = name_of(stage)
        tasks.append(place.task(f"{word}-cut", stage, {"stop_after": CUT}, **BARE))
        tasks.append(place.task(f"{word}-resumed", stage, {"of": f"{word}-cut", "resume": True}, **BARE))
    tasks.append(place.task("zero3-uneven", "zero3", **UNEVEN))
    tasks.append(place.task("zero3-one-row", "zero3", **ONE_ROW))
    short = {"out_of_memory": {"rank": 1, "step": 2, "rows": 1}}
    tasks.append(place.task("halved", None, short, on_oom="halve", **BARE))
    tasks.append(place.task("short", None, {**short, "fails": True}, **BARE))
    for stage in FLOAT16:
        tasks.append(place.task(f"{name_of(stage)}-float16", stage, {"recipe": place.float16(stage)}))
    tasks.append(place.task("grown-on", "zero3", {"of": "grown", "resume": True}, save_steps=CUT))
    tasks.append(place.task("shrunk", "zero3", {"stop_after": CUT}, **BARE))
    tasks.append(place.task("tied-on-two", "zero3", {"recipe": tied.recipe("zero3"), "of": "tied/zero3"}))
    other = place.recipe(None, learning_rate=1e-3)
    tasks.append(place.task("unlike", None, {"fails": True, "other_recipe": other}))
    place.found = run_worker(tasks, 2, root / "spawn", limit_seconds=600)
    return place


@pytest.fixture(scope="module")
def slow_stages(place: TinyRuns) -> None:
    """The same of the other stages, in a second spawn, added to what ``place`` has."""
    tasks = [place.task(name_of(stage), stage) for stage in SLOW]
    ahead = place.root / "ahead.json"  # as on a GPU
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 10**6, "stage3_max_live_parameters": 10**6}
    ahead.write_text(json.dumps({"zero_optimization": zero}))
    tasks.append(place.task("zero3-ahead", str(ahead)))
    tasks.append(place.task("zero2-uneven", "zero2", **UNEVEN))
    tasks.append(place.task("none-one-row", None, **ONE_ROW))
    for mine, more in zip(place.found, run_worker(tasks, 2, place.root / "slow", limit_seconds=600), strict=True):
        mine.update(more)


@pytest.fixture(params=[*QUICK, *(pytest.param(stage, marks=pytest.mark.matrix) for stage in SLOW)], ids=name_of)
def stage(request: pytest.FixtureRequest) -> str | None:
    if request.param in SLOW:
        request.getfixturevalue("slow_stages")
    return request.param


def test_two_processes_give_the_numbers_of_one(place: TinyRuns, stage: str | None) -> None:
    run = place.root / name_of(stage)
    assert len(losses(run)) == STEPS
    close(run, place.root / "alone")
    assert losses(run, "eval") == pytest.approx(losses(place.root / "alone", "eval"), rel=1e-5)


def test_memory_that_runs_out_on_one_rank_halves_the_passes_of_all(place: TinyRuns) -> None:
    close(place.root / "halved", place.root / "alone")
    result = json.loads((place.root / "halved" / "run.json").read_text())["result"]
    assert result["halvings"] == [{"step": 2, "pass_rows": 1}]


def test_memory_that_runs_out_on_one_rank_saves_and_ends_all(place: TinyRuns) -> None:
    for found in place.found:
        assert found["short"]["error"] == "OutOfMemory"
        assert "Step 2: memory ran out in a forward and backward pass (rank 1, 2 rows," in found["short"]["text"]
        assert "Step 1 is saved" in found["short"]["text"]
    assert (place.root / "short" / "checkpoints" / "step-00000001").is_dir()


@pytest.mark.parametrize("stage", FLOAT16, ids=name_of)
def test_all_ranks_skip_a_step_whose_gradient_overflows(place: TinyRuns, stage: str | None) -> None:
    """And then take it: the numbers of one process in float16."""
    run = place.root / f"{name_of(stage)}-float16"
    assert json.loads((run / "run.json").read_text())["result"]["skipped_steps"] >= 1
    assert len(losses(run)) == 3
    close(run, place.root / "alone-float16", rtol=5e-3)  # rounding in float16, which AdamW's first steps magnify


@pytest.mark.parametrize("stage", QUICK, ids=name_of)
def test_hooks_are_called_around_each_step_that_is_taken(place: TinyRuns, stage: str | None) -> None:
    """All ranks call them in the same order. `before_step` is called again for a step whose gradient overflowed."""
    if stage in FLOAT16:
        word = f"{name_of(stage)}-float16"
        skipped = json.loads((place.root / word / "run.json").read_text())["result"]["skipped_steps"]
        for found in place.found:
            assert found[word]["hook_calls"] == place.found[0][word]["hook_calls"]
            assert [step for name, step in found[word]["hook_calls"] if name == "after"] == [1, 2, 3]
            assert len([step for name, step in found[word]["hook_calls"] if name == "before"]) == 3 + skipped
    plain = [[name, step] for step in range(1, STEPS + 1) for name in ("before", "after")]
    assert [found[name_of(stage)]["hook_calls"] for found in place.found] == [plain, plain]
    if stage in RESUMED:
        loaded = [["loaded", CUT], *plain[2 * CUT :]]
        assert [found[f"{name_of(stage)}-resumed"]["hook_calls"] for found in place.found] == [loaded, loaded]


def test_scores_and_answers_are_those_of_one(place: TinyRuns, stage: str | None) -> None:
    mine, alone = (json.loads((place.root / d / "run.json").read_text()) for d in (name_of(stage), "alone"))
    for when in ("eval_before", "eval_after"):
        assert mine["result"][when]["loss"] == pytest.approx(alone["result"][when]["loss"], rel=1e-5)
        assert mine["result"][when]["trained_tokens"] == alone["result"][when]["trained_tokens"]
        assert mine["result"][when]["exact_match_rows"] == 2
    assert mine["samples"] == alone["samples"]
    assert len(mine["samples"]) == 2
    assert mine["result"]["eval_after"]["loss"] < mine["result"]["eval_before"]["loss"]
    assert mine["processes"]["count"] == 2
    assert mine["processes"]["deepspeed"] == stage
    assert len(mine["processes"]["ranks"]) == 2
    assert all(r["peak_bytes"] > 0 for r in mine["processes"]["ranks"])


def test_a_stage_is_what_it_says(place: TinyRuns, stage: str | None) -> None:
    trained = sum(t.numel() for t in vectors(place.root / "alone").values())
    for found in (rank[name_of(stage)] for rank in place.found):
        assert found["engine"] == ("LocalEngine" if stage is None else "ZeroEngine")
        assert found["stage"] == (None if stage is None else int(stage[4]))
        moments, whole = 2 * 4 * trained, found["packed_whole_bytes"]
        if stage is None:
            assert moments <= found["optimizer_bytes"] < moments * 1.05  # and a step counter for each vector
        else:
            assert moments / 2 <= found["optimizer_bytes"] < moments / 2 * 1.05  # half of it, up to padding
        assert found["packed_modules"] == found["states_kept"] == LAYERS * 7
        if stage in SHARDED:
            assert whole / 2 <= found["packed_held_bytes"] <= whole / 2 + 2 * LAYERS * 7
            # weights are whole one after the other; in no phase more of them than a layer has
            assert 0 < found["packed_live_bytes"] <= whole / LAYERS
        else:
            assert found["packed_held_bytes"] == whole
    kinds = {"zero1": "DeepSpeedZeroOptimizer", "zero2": "DeepSpeedZeroOptimizer"}
    wanted = None if stage is None else kinds.get(stage, "DeepSpeedZeroOptimizer_Stage3")
    assert place.found[0][name_of(stage)]["zero_optimizer"] == wanted


def test_every_stage_is_planned_and_tries_its_longest_batch_once(place: TinyRuns, stage: str | None) -> None:
    """Whose numbers are those of a run alone, so it leaves no trace (`test_two_processes_give_the_numbers_of_one`)."""
    word = name_of(stage)
    assert [rank[word]["longest_batch_tries"] for rank in place.found] == [1, 1]
    if stage in RESUMED:
        assert [rank[f"{word}-resumed"]["longest_batch_tries"] for rank in place.found] == [0, 0]
    plan = json.loads((place.root / word / "run.json").read_text())["plan"]
    assert plan["fits"]
    assert plan["measured"]["predicted_bytes"] == plan["memory"]["total_bytes"]


@pytest.mark.parametrize("stage", RESUMED, ids=name_of)
def test_a_signal_to_one_rank_stops_all_at_one_step_and_resume_is_exact(place: TinyRuns, stage: str | None) -> None:
    word = name_of(stage)
    for found in (rank[f"{word}-cut"] for rank in place.found):
        assert (found["error"], found["exit_code"]) == ("Interrupted", 75)
        assert "Stopped by SIGTERM at rank 1 on " in found["text"]
        assert f"after step {CUT} of {STEPS}" in found["text"]
        assert len(found["rows"]) == CUT
    run = place.root / f"{word}-cut"
    assert losses(run) == losses(place.root / word)  # to the bit
    mine, whole = vectors(run), vectors(place.root / word)
    assert all(torch.equal(mine[name], tensor) for name, tensor in whole.items())
    assert json.loads((run / "run.json").read_text())["status"] == "done"


def test_checkpoints_hold_whole_vectors_and_state_and_no_base(place: TinyRuns, stage: str | None) -> None:
    mine, alone = (place.root / d / "checkpoints" / f"step-{STEPS:08d}" for d in (name_of(stage), "alone"))
    for file in ("vectors.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(mine / file), load_file(alone / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.shape == theirs[name].shape
            largest = float(theirs[name].abs().max())  # ranks add in another order, and some elements nearly cancel
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-4 * largest)
        assert {name.partition("/")[0].rpartition(".")[2] for name in ours} == {"qvera_a", "qvera_b", "qvera_d"}
    # the random states of both ranks beside the same files as ever; no other kind of file
    assert sorted(load_file(mine / "random.safetensors")) == ["cpu", "cpu.1"]
    assert {path.suffix for path in mine.iterdir()} == {".safetensors", ".json"}
    packed = place.found[0][name_of(stage)]["packed_whole_bytes"]
    sizes = [sum(path.stat().st_size for path in one.iterdir()) for one in (mine, alone)]
    assert abs(sizes[0] - sizes[1]) < packed / 8  # the second rank's random state


def test_every_row_is_trained_once_an_epoch_by_one_rank(place: TinyRuns) -> None:
    """Five steps of seven rows are an epoch of 32, the last with four; the ranks' shares are the batch of one process."""
    word = "zero3-uneven"
    by_step = [[row for rank in place.found for row in rank[word]["rows"][step]] for step in range(STEPS)]
    epoch = [row for rows in by_step[:5] for row in rows]
    assert sorted(epoch) == list(range(32))
    assert [len(rows) for rows in by_step] == [7, 7, 7, 7, 4, 7]
    assert [[len(rank[word]["rows"][s]) for rank in place.found] for s in (0, 4)] == [[4, 3], [2, 2]]
    for stage in map(name_of, RESUMED):  # and across a resume: the cut run's steps, then the resumed one's
        for rank in place.found:
            assert rank[f"{stage}-cut"]["rows"] + rank[f"{stage}-resumed"]["rows"] == rank[stage]["rows"]


@pytest.mark.matrix
@pytest.mark.usefixtures("slow_stages")
def test_layers_gathered_ahead_change_nothing(place: TinyRuns) -> None:
    close(place.root / "zero3-ahead", place.root / "alone")


@pytest.mark.parametrize("word", ["zero3-uneven", "zero3-one-row", *(
    pytest.param(word, marks=pytest.mark.matrix) for word in ("zero2-uneven", "none-one-row")
)])  # fmt: skip
def test_uneven_shares_and_a_rank_without_rows_change_nothing(
    place: TinyRuns, word: str, request: pytest.FixtureRequest
) -> None:
    if not word.startswith("zero3"):
        request.getfixturevalue("slow_stages")
    close(place.root / word, place.root / f"alone-{word.partition('-')[2]}")


def test_a_checkpoint_goes_on_with_another_number_of_processes(place: TinyRuns) -> None:
    close(place.root / "grown", place.root / "alone")  # 1 → 2, and into ZeRO-3
    assert [len(rank["grown-on"]["rows"]) for rank in place.found] == [STEPS - CUT] * 2
    place.alone("shrunk", resume=True, **BARE)  # 2 → 1, and out of ZeRO-3
    close(place.root / "shrunk", place.root / "alone")


def test_under_zero3_a_head_that_is_the_embedding_stays_whole_and_changes_nothing(place: TinyRuns) -> None:
    """As in SmolLM2 and Llama-3.2. It is the mapped file's, so that on a CPU it takes no memory of a rank's own."""
    run, alone = place.root / "tied" / "zero3", place.root / "tied" / "alone"
    close(run, alone)
    assert losses(run, "eval") == pytest.approx(losses(alone, "eval"), rel=1e-5)
    mine, theirs = (json.loads((d / "run.json").read_text()) for d in (run, alone))
    assert mine["samples"] == theirs["samples"]
    for rank in place.found:
        assert rank["zero3"]["embedding"] == {"sharded": True, "is_the_head": False, "mapped": False}
        assert rank["tied-on-two"]["embedding"] == {"sharded": False, "is_the_head": True, "mapped": True}
        assert rank["tied-on-two"]["packed_held_bytes"] == rank["zero3"]["packed_held_bytes"]


def test_the_adapter_of_every_stage_is_an_ordinary_one(place: TinyRuns) -> None:
    files = {"adapter_config.json", "adapter_model.safetensors"}
    base = load_base(parse_recipe(place.recipe(), "x").model)
    for stage in QUICK:
        directory = place.root / name_of(stage) / "adapter"
        assert {path.name for path in directory.iterdir()} == files
        assert directory.stat().st_size < 100_000
    model = load_adapter(base.model, place.root / "zero3" / "adapter", base)
    assert sum("qvera_d" in name for name, _ in model.named_parameters()) == LAYERS * 7


def test_processes_that_are_not_alike_are_refused_by_name(place: TinyRuns) -> None:
    for rank in place.found:
        found = rank["unlike"]
        assert found["error"] == "InputError"
        assert "the recipe's SHA-256 is" in found["text"]
        assert "on rank 1 (" in found["text"]
        assert "version" not in found["text"]
    assert not (place.root / "unlike").exists()
