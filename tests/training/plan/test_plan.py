"""`qvera plan` as a user meets it: files, batches, what fits, what would, and its refusals."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import plan_table as table
from qvera.cli.main import main
from qvera.config.schema import Recipe, load_recipe, parse_recipe
from qvera.data import batches_of, build_datasets
from qvera.data.rows import Joined
from qvera.models.tokenizer import load_tokenizer
from qvera.tasks import task_of
from qvera.training.plan import Machine, Plan, Sharing, make_plan, parse_size
from qvera.training.plan import plan as planning
from qvera.training.plan.decisions import batch_of, longest_batch, longest_rows
from qvera.training.plan.run import changed
from qvera.training.trainer import train
from qvera.utils.errors import InputError

ROOT = Path(__file__).resolve().parents[3]


def gpu(size_bytes: int) -> Machine:
    return Machine("a GPU", "cuda", torch.bfloat16, False, size_bytes, 0, 1000)


@pytest.fixture
def config_only(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A model directory without weights or tokenizer."""
    (tmp_path / "config-only").mkdir()
    shutil.copy(tiny_model_dir / "config.json", tmp_path / "config-only")
    return tmp_path / "config-only"


@pytest.fixture
def recipe_of(config_only: Path) -> Any:
    """A recipe over that directory, with these sections beside the model's."""

    def make(**sections: Any) -> Recipe:
        data = {"path": "some/hub-data", **sections.pop("data", {})}
        model = {"path": str(config_only), **sections.pop("model", {})}
        return parse_recipe({"model": model, "data": data, **sections}, "t")

    return make


@pytest.mark.parametrize("train_d", [True, False])
def test_file_sizes_are_those_of_a_run(make_recipe: Any, tmp_path: Path, train_d: bool) -> None:
    recipe = make_recipe(adapter={"rank": 96, "train_d": train_d}, training={"max_steps": 1})
    plan = make_plan(recipe, gpu(10**9))
    result = train(recipe, tmp_path / "run")
    assert result is not None
    adapter = sum(f.stat().st_size for f in (tmp_path / "run" / "adapter").iterdir())
    assert plan.adapter_bytes == pytest.approx(adapter, abs=400)  # adapter_config.json holds a path of any length
    assert plan.trained_parameters == result.run["adapter"]["trainable_parameters"]
    (step,) = (tmp_path / "run" / "checkpoints").iterdir()
    tensors = sum(f.stat().st_size for f in step.iterdir())
    # state.json also holds the run's own answers and scores, a few kB beside a few hundred
    assert plan.checkpoint_bytes == pytest.approx(tensors, rel=0.03)


def test_the_longest_batch_is_one_that_training_takes(make_recipe: Any) -> None:
    recipe = make_recipe(training={"max_steps": 7, "global_batch_size": 8, "per_device_train_batch_size": 2})
    rows = build_datasets(recipe.data, load_tokenizer(recipe.model)).train
    batches = batches_of(recipe, rows)
    taken = [micro for step in range(7) for micro in batches.passes(batches.rows(step))]
    for joined in (None, Joined.MASK, Joined.OFFSETS):
        chosen = longest_rows(recipe, rows, joined, 7)
        assert chosen in taken
        tokens = [batch_of([rows[i] for i in micro], joined).all_tokens for micro in taken]
        assert batch_of([rows[i] for i in chosen], joined).all_tokens == max(tokens)


def test_a_plan_of_grpo_counts_each_prompt_with_all_its_answers(
    make_recipe: Any, write_recipe: Any, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{"word " * n}"}}\n' for n in (1, 9, 2)))
    sections = {
        "data": {"path": f"{tmp_path}/rows.jsonl", "max_length": 64, "eval_fraction": 0.0, "prefix_once": False,
                 "shuffle": False},
        "training": {"objective": "grpo", "reward": "r.py:f", "sample_max_new_tokens": 50, "group_size": 4,
                     "global_batch_size": 2, "per_device_train_batch_size": 8, "max_steps": 2, "seed": 0},
    }  # fmt: skip
    recipe = make_recipe(**sections)
    datasets = build_datasets(recipe.data, load_tokenizer(recipe.model))
    task_of(recipe).prepare_rows(datasets)
    rows = datasets.train
    assert longest_rows(recipe, rows, None, 2) == [0] * 4 + [1] * 4
    longest = int(rows.lengths.max())
    assert main(["plan", str(write_recipe(**sections)), "--no-timing", "--json"]) == 0
    batch = json.loads(capsys.readouterr().out)["batch"]
    assert (batch["rows"], batch["tokens"]) == (8, longest)
    assert longest == len(rows[1].prompt_ids) + 50 > 64
    known = longest_batch(rows, None, False, False)
    assert known(recipe).trained_tokens == 8 * 50
    shorter = known(recipe.replace(data={"max_length": 20}))
    assert (shorter.tokens, shorter.trained_tokens) == (20 + 50, 8 * 50)
    plan = make_plan(recipe, gpu(10**9))  # its rows are not known
    assert (plan.batch.tokens, plan.batch.trained_tokens) == (64 + 50, 8 * 50)

    def cached(**keys: Any) -> int:
        parts = make_plan(recipe.replace(**keys), gpu(10**9)).memory.moments["answers"]
        return next(part.bytes for part in parts if part.name == "keys and values of answers")

    assert cached() == 2 * cached(training={"answer_batch_size": 4})  # a step has 8 answers, of 16 at a time
    assert cached(data={"eval_fraction": 0.5}) == 2 * cached()  # and any number of held-out prompts


def test_from_the_config_alone(recipe_of: Any) -> None:
    plan = make_plan(recipe_of(data={"max_length": 128}), gpu(10**9))
    assert (plan.batch.rows, plan.batch.tokens, plan.fits) == (4, 128, True)
    assert "data.max_length" in plan.batch.source


def test_what_a_gpu_held_is_compared_without_its_context_and_beside_its_tensors(recipe_of: Any) -> None:
    plan = make_plan(recipe_of(), gpu(10**9))
    tensors = plan.memory.total_bytes - plan.machine.context_bytes
    found = plan.measured(2 * tensors, 0, tensors)
    assert found["predicted_bytes"] == found["tensor_bytes"] == tensors
    assert (found["relative_error"], found["relative_error_of_tensors"]) == (-0.5, 0)


def test_a_rank_and_a_rate_far_above_any_that_was_measured_are_named(recipe_of: Any, write_recipe: Any) -> None:
    def warned(**keys: Any) -> str:
        adapter = {"method": keys.get("method", "vera"), "rank": keys["rank"]}
        training = {"learning_rate": keys["rate"]}
        return "\n".join(make_plan(recipe_of(adapter=adapter, training=training), gpu(10**12)).warnings)

    highest = 64  # of q_proj [64, 64] and gate_proj [128, 64]
    assert warned(rank=4 * highest, rate=2.9) == warned(method="lora", rank=highest, rate=0.19) == ""
    assert warned(rank=50_000, rate=0.05) == "adapter.rank: 50,000 is above what the layers hold, which is 64 at most."
    assert "adapter.rank: 65 is above" in warned(method="lora", rank=65, rate=2e-3)
    said = "training.learning_rate: 1e+06 is 33,333,333 times what is known for vera at this hidden size (0.03 at 64)"
    assert warned(rank=8, rate=1e6).startswith(said)
    assert "200 times what is known for lora" in warned(method="lora", rank=8, rate=0.4)
    with Console(file=io.StringIO(), width=300) as console:
        recipe = load_recipe(write_recipe(training={"learning_rate": 100.0}))
        train(recipe, Path("unused"), dry_run=True, console=console)
    assert "training.learning_rate: 100 is 3,333 times" in console.file.getvalue()  # type: ignore[attr-defined]


def test_adapted_weights_are_held_between_steps_where_a_cpu_has_the_memory(recipe_of: Any) -> None:
    training = {"gradient_checkpointing": False}
    recipe = recipe_of(data={"eval_fraction": 0.1}, adapter={"rank": 32}, training=training)

    def on_cpu(available_bytes: int, **more: Any) -> Plan:
        return make_plan(recipe, Machine("t", "cpu", torch.float32, False, available_bytes, 0), **more)

    roomy, tight = on_cpu(10**10), on_cpu(1)
    assert roomy.holds_weights
    name = "adapted weights kept between steps"
    holding = {moment for moment in roomy.memory.moments if name in {c.name for c in roomy.memory.at(moment)}}
    assert holding == roomy.memory.moments.keys() - {"answers"}  # which let go of them
    assert not tight.holds_weights
    held = 4 * sum(x.n * x.m for x in roomy.adapted if roomy.is_summed(x))
    assert roomy.memory.total_bytes - tight.memory.total_bytes == held > 0
    assert not on_cpu(tight.needed_bytes + held - 1).holds_weights
    assert not on_cpu(10**10, sharing=Sharing(per_node=2)).holds_weights
    assert not make_plan(recipe, gpu(10**10)).holds_weights


def test_changes_make_it_fit(recipe_of: Any) -> None:
    training = {"gradient_checkpointing": False}
    model = {"resident": False}  # auto would fill the room that a change makes
    recipe = recipe_of(data={"max_length": 256}, adapter={"rank": 128}, training=training, model=model)
    needed = make_plan(recipe, gpu(10**9)).memory.total_bytes
    plan = make_plan(recipe, gpu(needed * 2 // 3))
    assert not plan.fits
    assert len(plan.changes) >= 3
    for change in plan.changes:
        other = make_plan(changed(recipe, change.settings), gpu(needed * 2 // 3))
        assert change.fits and other.fits
        assert other.memory.total_bytes == change.total_bytes < needed
    keys = [next(iter(change.settings)) for change in plan.changes]
    assert keys[0] == "training.gradient_checkpointing"
    assert "data.max_length" in keys
    (last,) = make_plan(recipe, gpu(1000)).changes
    assert not last.fits
    assert len(last.settings) > 4


@pytest.mark.parametrize("keys", [
    {"task": "sequence-classification"},
    {"training": {"objective": "dpo"}},
    {"training": {"objective": "kto", "per_device_train_batch_size": 4}},
], ids=["classifier", "dpo", "kto"])  # fmt: skip
def test_changes_are_keys_and_values_that_the_recipe_takes(keys: dict[str, Any], recipe_of: Any) -> None:
    """A classifier has no chunks of logits, and a pass of KTO's has two rows."""
    recipe = recipe_of(**{**keys, "training": {"gradient_checkpointing": False, **keys.get("training", {})}})
    for size in (make_plan(recipe, gpu(10**9)).memory.total_bytes * 2 // 3, 1000):
        changes = make_plan(recipe, gpu(size)).changes
        assert changes
        assert "training.loss_chunk_tokens" not in {key for change in changes for key in change.settings}
        for change in changes:
            changed(recipe, change.settings)


def test_rows_a_pass_are_no_change_where_rows_are_packed(recipe_of: Any) -> None:
    """Packing replaces training.per_device_train_batch_size."""
    for packing in (False, True):
        data = {"max_length": 256, "packing": packing}
        recipe = recipe_of(data=data, model={"resident": False}, training={"gradient_checkpointing": True})
        needed = make_plan(recipe, gpu(10**9)).memory.total_bytes
        for size in (needed - 1, 1000):  # one change each, and all together
            keys = {key for change in make_plan(recipe, gpu(size)).changes for key in change.settings}
            assert "data.max_length" in keys
            assert ("training.per_device_train_batch_size" in keys) is not packing


def test_rows_a_pass_divide_the_answers_of_a_step_of_grpo(recipe_of: Any) -> None:
    training = {"objective": "grpo", "reward": "r.py:f", "global_batch_size": 1, "group_size": 16,
                "per_device_train_batch_size": 16, "gradient_checkpointing": True}  # fmt: skip
    recipe = recipe_of(data={"max_length": 256}, model={"resident": False}, training=training)
    half = make_plan(changed(recipe, {"training.per_device_train_batch_size": 8}), gpu(10**9)).memory.total_bytes
    found = [change.settings for change in make_plan(recipe, gpu(half)).changes]
    assert {"training.per_device_train_batch_size": 8} in found


def test_sizes() -> None:
    for text, size in (("24GB", 24 * 10**9), ("24", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512mb", 512 * 10**6)):
        assert parse_size(text) == size
    for text in ("", "big", "0GB", "24TBs", "-3GB", "4090"):
        with pytest.raises(InputError, match="--gpu: takes the size of its memory such as 24GB"):
            parse_size(text)


@pytest.mark.parametrize(("quantization", "on_gpu"), [("nf4", True), ("nf4", False), ("int8", False), ("none", True)])
def test_a_step_has_seconds_and_random_numbers_go_on_as_before(
    recipe_of: Any, monkeypatch: pytest.MonkeyPatch, quantization: str, on_gpu: bool
) -> None:
    recipe = recipe_of(model={"quantization": quantization}, data={"max_length": 64})
    plan = make_plan(recipe, gpu(10**9) if on_gpu else Machine("a CPU", "cpu", torch.float32, True, 10**10))
    monkeypatch.setattr(planning, "_BUDGET_SECONDS", 1e-3)
    before = torch.random.get_rng_state()
    seconds = planning.time_step(plan, torch.device("cpu"))
    assert all(0 < part < 10 for name, part in seconds.items() if name != "dequantization")
    resident = quantization == "nf4" and on_gpu  # there is room for copies
    assert (seconds["dequantization"] > 0) is (quantization != "none" and not resident)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_command(write_recipe: Any, capsys: Any) -> None:
    recipe = str(write_recipe(training={"max_steps": 7}))
    assert main(["plan", recipe, "--no-timing"]) == 0
    said = capsys.readouterr().out
    assert "Fits" in said
    assert "the longest batch of the data" in " ".join(said.split())
    assert main(["plan", recipe, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    parts = plan["memory"]["moments"][plan["memory"]["peak_moment"]]
    assert sum(part["bytes"] for part in parts) == plan["memory"]["total_bytes"]
    assert 0 < plan["step_seconds"] < 10
    assert plan["planned_steps"] == 7
    assert main(["plan", recipe]) == 0
    assert "7 optimizer steps in all, at most about " in capsys.readouterr().out
    assert main(["plan", recipe, "--gpu", "0.001GB"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Does not fit" in said
    assert """--set 'adapter.targets=["q_proj", "v_proj"]'""" in said
    assert main(["plan", recipe, "--gpu", "24GB", "--set", "data.mixture=[{path: somebody/rows}]"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the longest batch of the data" not in said, "a part of it is on the hub, which a plan does not wait for"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["missing.yaml"], "no such recipe file"),
        (["RECIPE", "--gpu", "huge"], "takes the size of its memory such as 24GB"),
        (["RECIPE", "--set", "adapter.targets=[nothing]"], "no linear of this model's layers is named nothing"),
        (["RECIPE", "--set", "model.path=/nowhere"], "'/nowhere' is not a directory"),
    ],
)
def test_refusals(arguments: list[str], message: str, write_recipe: Any, capsys: Any) -> None:
    recipe = str(write_recipe())
    assert main(["plan", *(recipe if a == "RECIPE" else a for a in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "name", "parts"),
    [
        ("README.md", "plan", [table.markdown, lambda: table.COMMAND]),
        ("docs/memory.md", "context", [table.contexts, table.least]),
    ],
)
def test_the_tables_of_the_pages_and_the_picture_are_current(page: str, name: str, parts: Any) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    inside = text.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0]
    assert all(part() in inside for part in parts)
    measured_by_others = (ROOT / "docs" / "first-machine.md").read_text(encoding="utf-8")
    assert all(f"| {line} |" in measured_by_others for line in table.published().splitlines())
    if page == "README.md":
        assert (ROOT / "docs" / "plan.svg").read_text(encoding="utf-8") == table.picture()


def test_the_table_agrees_with_itself() -> None:
    for name, card in (("Llama-2 7B", 6), ("CodeLlama 34B", 24), ("Llama-2 70B", 48)):
        longest = table.longest_tokens(name, card * 10**9)
        assert 0 < table.total_bytes(name, longest) <= card * 10**9
    assert table.longest_tokens("Llama-2 70B", 24 * 10**9) == 0


def test_a_config_with_an_impossible_size_is_refused(config_only: Path, write_recipe: Any, capsys: Any) -> None:
    config = json.loads((config_only / "config.json").read_text()) | {"num_key_value_heads": -2}
    (config_only / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(write_recipe()), "--set", f"model.path={config_only}", "--gpu", "24GB"]) == 2
    assert "config" in capsys.readouterr().err
