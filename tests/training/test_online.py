"""Adapters that begin, end and go on at any time beside others become what they become alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qvera.config.schema import Recipe
from qvera.data import Example
from qvera.models.loader import load_base
from qvera.training import checkpoint
from qvera.training.bank_loop import BankLoop
from qvera.training.online import OnlineTrainer
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_WEIGHTS
from tests.training.online_jobs import Jobs, datasets_of, difference, job_recipe, server_recipe, write_job_rows
from tests.training.runs import records, run_json

pytestmark = pytest.mark.process

OTHER_PASSES = 5e-5  # what rows that go into passes of another size may be rounded to


def test_jobs_with_recipes_of_their_own_become_what_they_are_alone(make_recipe: Any, tmp_path: Path) -> None:
    """One stops early, one keeps its best vectors, one has no held-out rows; rates, sizes and orders differ."""
    held = {"eval_fraction": 0.3}
    recipes: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
        "stops": (11, held, {"max_steps": 20, "learning_rate": 0.05, "eval_steps": 2, "early_stopping_patience": 1}),
        "best": (30, {**held, "seed": 7}, {"max_steps": 8, "eval_steps": 3, "load_best_model_at_end": True}),
        "plain": (9, {"shuffle": False}, {"max_steps": -1, "num_train_epochs": 3.0, "learning_rate": 0.01}),
        "large": (20, held, {"global_batch_size": 12, "max_steps": 3, "lr_scheduler_type": "cosine"}),
    }
    own = {}
    for name, (count, data, training) in recipes.items():
        rows = write_job_rows(tmp_path / f"{name}.jsonl", count, len(name), noise=name == "stops")
        own[name] = job_recipe(make_recipe, rows, data, **training)
        train(own[name], tmp_path / name)
    jobs = Jobs(server_recipe(make_recipe))
    runs = [jobs.begin(name, own[name]) for name in ("stops", "best")]
    jobs.do_parts(lambda: runs[0].state.step == 1)  # the others come later
    runs += [jobs.begin(name, own[name]) for name in ("plain", "large")]
    jobs.do_parts(lambda: False)
    assert runs[0].state.stopped_early
    for run in runs:
        assert run.has_ended
        assert run.reason is None
        expected = run_json(tmp_path / run.name)["result"]
        for kind in ("train", "eval"):
            ours = [record for record in jobs.of(run.name, kind) if record["step"]]
            theirs = records(tmp_path / run.name, kind)
            for one, other in zip(ours, theirs, strict=kind == "train"):
                for key in other.keys() & {"step", "epoch", "learning_rate", "trained_tokens", "input_tokens", "rows"}:
                    assert one[key] == other[key]
                assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert run.state.best_step == expected["best_step"]
        assert run.kept_step == (run.state.best_step if run.name == "best" else run.state.step)
        for scores, when in ((run.state.before, "eval_before"), (run.after, "eval_after")):
            assert (scores is None) == (expected[when] is None)
            if scores is not None:
                assert scores["loss"] == pytest.approx(expected[when]["loss"], rel=1e-5)
        jobs.trainer.save_adapter(run, tmp_path / "out" / run.name)
        directories = tmp_path / "out" / run.name, tmp_path / run.name / "adapter"
        trained, alone = (load_file(directory / "adapter_model.safetensors") for directory in directories)
        assert trained.keys() == alone.keys()
        flat = [torch.cat([tensors[key].flatten() for key in sorted(alone)]) for tensors in (trained, alone)]
        assert difference(*flat) <= 1e-5


@pytest.mark.parametrize("start", [None, "of PEFT"])
def test_jobs_train_loras_where_the_served_recipe_does(make_recipe: Any, tmp_path: Path, start: str | None) -> None:
    adapter: dict[str, Any] = {"method": "lora", "rank": 3, "alpha": 6.0}
    if start is not None:  # its ranks and alphas differ by linear, which a recipe can't say
        base: Any = AutoModelForCausalLM.from_pretrained(make_recipe().model.path)
        config = LoraConfig(
            r=3, lora_alpha=6, target_modules="all-linear", rank_pattern={"k_proj": 5}, alpha_pattern={"down_proj": 2}
        )
        stock = get_peft_model(base, config)
        for name, parameter in stock.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        stock.save_pretrained(tmp_path / start)
        adapter |= {"init_from": str(tmp_path / start)}
    jobs, runs = Jobs(server_recipe(make_recipe, adapter=adapter, training={"learning_rate": 1e-3})), []
    for seed, name in enumerate(("anna", "ben")):
        rows = write_job_rows(tmp_path / f"{name}.jsonl", 10, seed)
        data = {"system": "Say it twice."}  # a chat template of its own stands beside the adapter
        recipe = job_recipe(make_recipe, rows, data, learning_rate=2e-3 + seed * 1e-3, max_steps=6)
        recipe = recipe.replace(adapter=jobs.trainer.recipe.adapter)
        train(recipe, tmp_path / name)
        runs.append(jobs.begin(name, recipe))
    jobs.do_parts(lambda: False)
    for run in runs:
        jobs.trainer.save_adapter(run, tmp_path / "out")
        templates = [
            (place / "chat_template.jinja").read_text() for place in (tmp_path / "out", tmp_path / run.name / "adapter")
        ]
        assert templates[0] == templates[1]
        found, alone = (
            load_file(path / ADAPTER_WEIGHTS) for path in (tmp_path / "out", tmp_path / run.name / "adapter")
        )
        assert any("lora_B" in key for key in found) and found.keys() == alone.keys()
        assert all(difference(found[key], alone[key]) <= 1e-4 for key in alone)


@pytest.fixture(scope="module")
def own(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """Three jobs of ten rows, with rows held out."""
    directory = tmp_path_factory.mktemp("jobs")
    training = {"max_steps": 4, "eval_steps": 2, "load_best_model_at_end": True}
    return {
        name: job_recipe(
            make_recipe, write_job_rows(directory / f"{name}.jsonl", 14, seed), {"eval_fraction": 0.3}, **training
        )
        for seed, name in enumerate(("anna", "ben", "cleo"))
    }


@pytest.fixture(scope="module")
def narrow(make_recipe: Any) -> Recipe:
    """A server whose rounds take several passes, of two rows."""
    return server_recipe(make_recipe, training={"per_device_train_batch_size": 2})


@pytest.fixture(scope="module")
def alone(narrow: Recipe, own: dict[str, Recipe]) -> Callable[[str], torch.Tensor]:
    """A job's vectors where it is the only one."""
    found: dict[str, torch.Tensor] = {}

    def vectors(name: str) -> torch.Tensor:
        if name not in found:
            jobs = Jobs(narrow)
            found[name] = jobs.finish([jobs.begin(name, own[name])])[name]
        return found[name]

    return vectors


def test_a_job_that_ends_within_a_round_leaves_no_trace_on_others_or_on_the_next_in_its_slot(
    narrow: Recipe, own: dict[str, Recipe], alone: Any
) -> None:
    jobs = Jobs(narrow, slots=2)
    anna, ben = (jobs.begin(name, own[name]) for name in ("anna", "ben"))
    jobs.do_parts(lambda: ben.state.step == 1)
    gradient = jobs.trainer.loop.bank.gradients[ben.held_slot]
    jobs.do_parts(lambda: gradient.any())  # in the middle of the second round
    assert anna.state.step == 1
    slot = ben.held_slot
    jobs.trainer.end(ben)
    assert not gradient.any()
    cleo = jobs.begin("cleo", own["cleo"])
    assert (cleo.slot, jobs.trainer.free_slots) == (slot, 0)
    found = jobs.finish([anna, cleo])
    assert not jobs.of("ben", "train")[1:]
    for name in ("anna", "cleo"):
        assert difference(found[name], alone(name)) <= 1e-5


def test_a_saved_job_goes_on_to_the_bit_from_any_part_and_beside_others(
    narrow: Recipe, own: dict[str, Recipe], tmp_path: Path
) -> None:
    """From before its first step, the middle of a round, an evaluation that is due, and after its end."""
    whole = Jobs(narrow)
    run = whole.begin("anna", own["anna"])
    files: list[Path] = []
    while whole.trainer.has_work:
        whole.records += whole.trainer.run_slice()
        files.append(tmp_path / f"{len(files)}.safetensors")
        whole.trainer.save(run, files[-1])
    steps = [json.dumps(one["loss"]) for one in whole.of("anna", "train")]
    for file in [files[0], *files[3::11], files[-1]]:
        again = Jobs(narrow)
        found = again.begin("anna", own["anna"], file)
        begun_at, owes = found.state.step, found.owes_score
        again.do_parts(lambda: False)
        assert torch.equal(again.vectors(found), whole.vectors(run))
        assert [json.dumps(one["loss"]) for one in again.of("anna", "train")] == steps[begun_at:]
        scored = [[one["step"] for one in jobs.of("anna", "eval")] for jobs in (whole, again)]
        assert scored[1] == [step for step in scored[0] if step > begun_at - owes]
        assert (found.state.best_step, found.state.best_loss) == (run.state.best_step, run.state.best_loss)
        assert found.after is not None and run.after is not None
        assert found.after["loss"] == run.after["loss"]
    others = Jobs(narrow)
    others.begin("cleo", own["cleo"])
    model = own["anna"].model
    moved = own["anna"].replace(model=model.replace(path=f"{model.path}/"))  # another path to the same base
    again_beside = others.begin("anna", moved, files[len(files) // 2])
    assert difference(others.finish([again_beside])["anna"], whole.vectors(run)) <= 1e-5


def test_a_damaged_file_or_that_of_another_job_is_refused_and_takes_no_slot(
    make_recipe: Any, own: dict[str, Recipe], tmp_path: Path
) -> None:
    jobs = Jobs(server_recipe(make_recipe), slots=2)
    run = jobs.begin("anna", own["anna"])
    jobs.trainer.save(run, tmp_path / "anna")
    whole = (tmp_path / "anna").read_bytes()
    (tmp_path / "flipped").write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    (tmp_path / "short").write_bytes(whole[:1000])
    with safe_open(tmp_path / "anna", "pt") as stored:
        metadata, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    state = json.loads(metadata["state"])
    text = json.dumps({**state, "state": {**state["state"], "mood": "good"}})
    written = {**metadata, "state": text, "sha256": checkpoint._sha256(text, tensors)}
    save_file(tensors, tmp_path / "newer", written)
    other_rate = own["anna"].replace(training=own["anna"].training.replace(learning_rate=0.5))
    for name, recipe, file, message in (
        ("ben", own["ben"], "anna", r"data\.path"),
        ("another", own["anna"], "anna", "has another job than another"),
        ("anna", other_rate, "anna", r"training\.learning_rate differ"),
        ("anna", own["anna"], "flipped", "SHA-256"),
        ("anna", own["anna"], "short", "damaged"),
        ("anna", own["anna"], "missing", "damaged"),
        ("anna", own["anna"], "newer", "another version of qvera"),
    ):
        with pytest.raises(InputError, match=message):
            jobs.begin(name, recipe, tmp_path / file)
    assert jobs.trainer.free_slots == 1


def short_of_memory(monkeypatch: pytest.MonkeyPatch, fits: Any) -> list[int]:
    """Let passes fail after their backward for which ``fits(rows)`` is false; the rows of those that did not fail."""
    real, sizes = BankLoop.pass_nll, list[int]()

    def pass_nll(self: BankLoop, slots: Any, examples: Sequence[Example], weights: Any = None) -> torch.Tensor:
        found = real(self, slots, examples, weights)
        if not fits(examples):
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        if weights is not None:
            sizes.append(len(examples))
        return found

    monkeypatch.setattr(BankLoop, "pass_nll", pass_nll)
    return sizes


@pytest.mark.filterwarnings("ignore:Memory ran out:UserWarning")
def test_where_memory_runs_out_passes_have_half_the_rows_and_adapters_are_the_same(
    make_recipe: Any, own: dict[str, Recipe], alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: alone(name) for name in ("anna", "ben")}
    sizes = short_of_memory(monkeypatch, lambda rows: len(rows) <= 3)
    jobs = Jobs(server_recipe(make_recipe))
    found = jobs.finish([jobs.begin(name, own[name]) for name in expected])
    assert max(sizes) == jobs.trainer.loop.pass_rows == 2
    for name, vectors in expected.items():
        assert difference(found[name], vectors) <= OTHER_PASSES
        assert len(jobs.of(name, "train")) == 4


@pytest.mark.filterwarnings("ignore:Memory ran out:UserWarning")
@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_job_with_a_row_that_does_not_fit_ends_and_says_so(
    where: str, make_recipe: Any, own: dict[str, Recipe], alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone("anna")
    datasets = datasets_of(own["ben"])
    rows = datasets.train if where == "train" else datasets.eval
    bad = rows[int(rows.lengths.argmax())].input_ids.tobytes()
    short_of_memory(monkeypatch, lambda rows: all(row.input_ids.tobytes() != bad for row in rows))
    jobs = Jobs(server_recipe(make_recipe))
    anna, ben = (jobs.begin(name, own[name]) for name in ("anna", "ben"))
    jobs.do_parts(lambda: False)
    assert anna.reason is None
    assert difference(jobs.vectors(anna), expected) <= OTHER_PASSES
    assert ben.has_ended
    assert ben.reason is not None
    assert "2.15 GB were asked for" in ben.reason
    assert ("ben.jsonl" in ben.reason) == (where == "train")


def test_a_job_whose_loss_is_not_finite_ends_and_the_others_are_as_without_it(
    make_recipe: Any, own: dict[str, Recipe], alone: Any
) -> None:
    sizes = {"per_device_train_batch_size": 16, "global_batch_size": 16}
    jobs = Jobs(server_recipe(make_recipe, training=sizes))
    anna, ben, cleo = (jobs.begin(name, own[name]) for name in own)
    jobs.do_parts(lambda: ben.state.step == 2)
    jobs.trainer.loop.bank.vectors[ben.held_slot, 0] = float("nan")
    found = jobs.finish([anna, cleo])
    assert ben.reason is not None
    assert ben.reason.startswith("step 3: the loss or its gradient is not finite")
    assert "ben.jsonl" in ben.reason
    for name, vectors in found.items():
        assert difference(vectors, alone(name)) <= OTHER_PASSES


def test_an_error_in_a_part_spoils_nothing(
    narrow: Recipe, own: dict[str, Recipe], alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(narrow)
    run = jobs.begin("anna", own["anna"])
    jobs.do_parts(lambda: run.state.step == 1)
    jobs.do_parts(lambda: jobs.trainer.loop.bank.gradients.any())
    with monkeypatch.context() as patch:
        patch.setattr(BankLoop, "pass_nll", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            jobs.trainer.run_slice()
    assert torch.equal(jobs.finish([run])["anna"], alone("anna"))


def test_what_can_not_be_trained_beside_answers_is_refused_by_its_key(make_recipe: Any, own: dict[str, Recipe]) -> None:
    base = load_base(make_recipe().model)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"adapter": {"method": "lora-xs", "rank": 4}}, "adapter.method: lora-xs with these options can't be trained"),
        ({"adapter": {"magnitude": True}}, "adapter.magnitude"),
        ({"training": {"optim": "adamw_8bit"}}, "training.optim"),
    ]
    for sections, message in refused:
        with pytest.raises(InputError, match=message):
            OnlineTrainer(base, server_recipe(make_recipe, **sections), 2)
    half = load_base(make_recipe(model={"compute_dtype": "float16"}).model)
    with pytest.raises(InputError, match="float16, which needs a loss scale"):
        OnlineTrainer(half, server_recipe(make_recipe), 2)
    trainer = OnlineTrainer(base, server_recipe(make_recipe), 2)
    for section, key, value in (("adapter", "rank", 4), ("training", "label_smoothing", 0.1)):
        other = own["anna"].replace(**{section: getattr(own["anna"], section).replace(**{key: value})})
        with pytest.raises(InputError, match=rf"anna: {section}\.{key} differ from the server's recipe"):
            trainer.prepare("anna", other, datasets_of(own["anna"]))


@pytest.mark.parametrize("model", [{"quantization": "none"}, {"quantization": "int8", "compute_dtype": "auto"}])
def test_jobs_learn_on_other_bases(model: dict[str, Any], make_recipe: Any, own: dict[str, Recipe]) -> None:
    jobs = Jobs(server_recipe(make_recipe, model=model))
    run = jobs.begin("anna", own["anna"].replace(model=own["anna"].model.replace(**model)))
    jobs.do_parts(lambda: False)
    assert run.reason is None
    assert run.after is not None and run.state.before is not None
    assert run.after["loss"] < run.state.before["loss"]
