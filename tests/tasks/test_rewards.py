"""Reinforcement learning with a reward (``training.objective: grpo``)."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import qvera
from qvera.adapters.save_load import attach, named_vectors
from qvera.config.schema import Recipe, load_recipe
from qvera.data import Datasets, build_datasets
from qvera.evaluation.report.compare import run_figures
from qvera.evaluation.report.read import read_run
from qvera.models.loader import load_base
from qvera.tasks import task_of
from qvera.tasks.rewards import Answer, Rewards, load_rewards
from qvera.training.trainer import train
from qvera.utils.errors import InputError, OwnCodeFailed
from tests.adapters.helpers import perturb, relative
from tests.conftest import small_llama, small_tokenizer
from tests.helpers import ROOT
from tests.training.runs import assert_same_run, cut_off, records, run_json, same, vectors

REWARDS = '''
import os

calls = []

def letters(prompt, answer, row):
    """The share of the answer that is letters."""
    assert prompt.startswith("say") and row["prompt"] == prompt and row["wanted"] == "letters"
    return sum(one.isascii() and one.isalpha() for one in answer) / max(1, len(answer))

def short(prompt, answer, row):
    return -len(answer) / 100

def some(prompt, answer, row):
    return letters(prompt, answer, row) if int(prompt.split()[1]) % 3 == 0 else 0.1

def same(prompt, answer, row):
    return 0.1

def broken(prompt, answer, row):
    return {"raises": 1 / 0 if row["wanted"] else 0, "nan": float("nan")}[row["kind"]]

def nan(prompt, answer, row):
    return float("nan")

def nothing(prompt, answer, row):
    pass

def late(prompt, answer, row):
    calls.append(answer)
    if len(calls) > 60 and "MENDED" not in os.environ:
        raise ValueError("the judge is away")
    return letters(prompt, answer, row)
'''


@pytest.fixture(scope="module")
def make_rewarded(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe whose prompts are answered with letters, with a file of rewards."""
    directory = tmp_path_factory.mktemp("rewards")
    (directory / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"say {number} red", "wanted": "letters"} for number in range(12)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(reward: Any = "letters", **training: Any) -> Recipe:
        named = {reward: 1.0} if isinstance(reward, str) else reward or {}
        keys = {
            "objective": "grpo", "reward": {f"{directory}/rewards.py:{name}": weight for name, weight in named.items()} or None,
            "group_size": 6, "global_batch_size": 4, "per_device_train_batch_size": 8, "learning_rate": 0.2,
            "sample_max_new_tokens": 8, "seed": 3, **training,
        }  # fmt: skip
        data = {"path": str(directory / "rows.jsonl")}
        return make_recipe(data=data, training=keys, adapter={"rank": 32})

    return make


def _alone() -> Any:
    from qvera.distributed.group import ALONE

    return ALONE


def _as_it_is() -> Any:
    import contextlib

    return contextlib.nullcontext()


def _asked(recipe: Recipe) -> tuple[Any, Any, Datasets]:
    """The task with a model whose vectors are not zero, and its rows."""
    base, task = load_base(recipe.model), task_of(recipe)
    datasets = build_datasets(recipe.data, base.tokenizer)
    task.prepare_rows(datasets)
    model = attach(base.model, recipe.adapter)
    perturb(model)
    task.prepare(model, base.tokenizer, datasets)
    return task, model, datasets


def test_seeds_of_64_bits_draw_answers_of_their_own(make_rewarded: Any) -> None:
    def texts(seed: int) -> list[str]:
        task, model, _ = _asked(make_rewarded(seed=seed))
        return [answer.reference for answer in task.step_rows(model, [0], 1, _alone())]

    assert len({tuple(texts(seed)) for seed in (0, 2**63, 2**64 - 1)}) == 3


@pytest.mark.parametrize(
    "settings",
    [{}, {"updates_per_answers": 2, "answer_temperature": 0.7, "kl_coefficient": 0.3},
     {"policy_loss": "gspo", "updates_per_answers": 2}, {"policy_loss": "cispo", "kl_coefficient": 0.3}],
    ids=str,
)  # fmt: skip
def test_the_loss_and_its_gradient_are_those_of_the_formula(make_rewarded: Any, settings: dict[str, Any]) -> None:
    recipe = make_rewarded(**settings)
    task, model, datasets = _asked(recipe)
    answers = task.step_rows(model, [0, 3], 1, _alone())
    assert len(answers) == 12 and all(isinstance(answer, Answer) for answer in answers)
    moved = [
        answer
        if answer.logprobs is None
        else dataclasses.replace(answer, logprobs=answer.logprobs + 0.3 * (-1) ** place)
        for place, answer in enumerate(answers)
    ]
    found, count = task.loss(model, moved)
    vectors = named_vectors(model)
    gradients = torch.autograd.grad(found, list(vectors.values()))
    training, total = recipe.training, torch.zeros(())
    for answer in moved:
        start = len(answer.prompt_ids)
        ids = torch.from_numpy(answer.input_ids).long()
        lps = []
        for context in (_as_it_is(), model.disable_adapter()):
            with context:
                logits = model(input_ids=ids.unsqueeze(0)).logits[0, start - 1 : -1] / training.answer_temperature
            lps.append(logits.log_softmax(-1).gather(1, ids[start:].unsqueeze(1)).squeeze(1))
        lp, base = lps[0], lps[1].detach()
        old = lp.detach() if answer.logprobs is None else torch.from_numpy(answer.logprobs)
        ratio = (lp - old).exp()
        if training.policy_loss == "gspo":
            ratio = (lp.detach() - old).mean().exp() * (lp - lp.detach()).exp()
        clipped = ratio.clamp(training.clip_low_threshold, training.clip_high_threshold)
        if training.policy_loss == "cispo":
            total = total - (clipped.detach() * lp * answer.advantage).sum()
        else:
            total = total - torch.minimum(ratio * answer.advantage, clipped * answer.advantage).sum()
        total = total + training.kl_coefficient * ((base - lp).exp() - (base - lp) - 1).sum()
    assert count == sum(answer.trained_tokens for answer in answers)
    assert found.item() == pytest.approx(total.item(), rel=1e-4, abs=1e-4)
    for one, other in zip(gradients, torch.autograd.grad(total, list(vectors.values())), strict=True):
        assert relative(one, other) < 2e-4


def test_advantages_are_of_each_group_and_rewards_add_up(make_rewarded: Any) -> None:
    recipe = make_rewarded({"letters": 2.0, "short": 0.5})
    task, model, datasets = _asked(recipe)
    answers = task.step_rows(model, [1, 2, 5], 1, _alone())
    for group in (answers[:6], answers[6:12], answers[12:]):
        assert len({answer.source for answer in group}) == 1
        rewards = np.array([answer.reward for answer in group])
        assert rewards == pytest.approx([2 * a.rewards[0] + 0.5 * a.rewards[1] for a in group])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert [answer.advantage for answer in group] == pytest.approx(expected)
    found = task.take_metrics()
    assert found["reward"] == pytest.approx(np.mean([answer.reward for answer in answers]))
    assert found["reward/short"] == pytest.approx(np.mean([answer.rewards[1] for answer in answers]))


@pytest.mark.process
def test_the_reward_rises_and_a_run_that_was_cut_off_goes_on_to_the_bit(make_rewarded: Any, tmp_path: Path) -> None:
    recipe = make_rewarded(max_steps=20, updates_per_answers=2, save_steps=5, save_total_limit=5, eval_steps=10)
    train(recipe, tmp_path / "whole")
    rewards = [record["reward"] for record in records(tmp_path / "whole", "train")]
    assert sum(rewards[-4:]) > 1.2 * sum(rewards[:4])
    assert rewards[0] == rewards[1] != rewards[2]  # two steps over the same answers
    result = run_json(tmp_path / "whole")["result"]
    assert result["eval_after"]["reward"] > result["eval_before"]["reward"]
    assert run_figures(read_run(tmp_path / "whole"))["reward"] == result["eval_after"]["reward"]  # `qvera compare`
    told = io.StringIO()
    scored = qvera.load(tmp_path / "whole", console=Console(file=told, width=1000)).evaluate()
    assert scored["scores"]["reward"] == pytest.approx(result["eval_after"]["reward"])
    assert "others now" not in told.getvalue()
    # after step 15 the answers of step 15 are still to be trained on once
    train(recipe, cut_off(tmp_path / "whole", tmp_path / "cut", after=15), resume=True)
    assert same(vectors(tmp_path / "cut"), vectors(tmp_path / "whole"))


@pytest.mark.process
def test_answers_that_teach_nothing_get_no_pass_and_the_steps_are_the_same(
    make_rewarded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_rewarded("some", max_steps=4)
    train(recipe, tmp_path / "run")
    train(make_rewarded("same", max_steps=2), tmp_path / "nothing")
    monkeypatch.setattr(Rewards, "has_gradient", lambda *_: True)
    train(recipe, tmp_path / "all")
    for few, every in zip(records(tmp_path / "run", "train"), records(tmp_path / "all", "train"), strict=True):
        assert few["equal_groups"] > 0
        assert few["input_tokens"] < every["input_tokens"]
        for name in ("trained_tokens", "reward", "clipped"):
            assert few[name] == every[name]
        assert few["grad_norm"] == pytest.approx(every["grad_norm"], rel=1e-4)
    for name, vector in vectors(tmp_path / "all").items():
        torch.testing.assert_close(vectors(tmp_path / "run")[name], vector, rtol=1e-4, atol=1e-5)
    for record in records(tmp_path / "nothing", "train"):
        assert (record["loss"], record["grad_norm"], record["input_tokens"]) == (0, 0, 0)


@pytest.mark.process
def test_a_reward_that_fails_on_the_way_costs_no_step(
    make_rewarded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has 24 answers."""
    recipe = make_rewarded("late", max_steps=4, save_steps=100)
    with pytest.raises(OwnCodeFailed, match=r"late raised ValueError \(the judge is away\) .*\nStep 2 is saved"):
        train(recipe, tmp_path / "run")
    monkeypatch.setenv("MENDED", "yes")
    train(recipe, tmp_path / "run", resume=True)
    train(recipe, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_goes_on_where_its_reward_file_has_moved_and_not_with_another_weight(
    make_rewarded: Any, tmp_path: Path
) -> None:
    old, new, own = tmp_path / "old.py", tmp_path / "new.py", tmp_path / "run" / "recipe.yaml"
    old.write_text("def score(prompt, answer, row):\n    return len(answer)\n")
    train(make_rewarded(max_steps=1).replace(training={"reward": f"{old}:score"}), tmp_path / "run")
    old.rename(new)
    text = own.read_text()
    own.write_text(text.replace(f"{old}:score", f"{{{new}:score: 2}}"))
    console, other = Console(record=True, width=1000), load_recipe(own, of_a_run=True)
    with pytest.raises(InputError, match="holds no checkpoint that can be used"):
        train(other, tmp_path / "run", resume=True, console=console)
    assert "is of another run; training.reward differ from this recipe" in console.export_text()
    own.write_text(text.replace(str(old), str(new)))
    train(load_recipe(own, ["training.max_steps=2"], of_a_run=True), tmp_path / "run", resume=True)
    assert run_json(tmp_path / "run")["result"]["steps"] == 2


@pytest.mark.process
def test_the_recipe_of_orders_trains_by_exact_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    base = tmp_path / "base"
    small_llama(max_position_embeddings=1024).save_pretrained(base)
    small_tokenizer().save_pretrained(base)
    recipe = load_recipe(ROOT / "recipes" / "rewards" / "orders.yaml")
    recipe = recipe.replace(
        model=recipe.model.replace(path=str(base)),
        data=recipe.data.replace(max_length=1024, eval_limit=2),
        training=recipe.training.replace(
            max_steps=1, group_size=2, global_batch_size=2, per_device_train_batch_size=4, sample_max_new_tokens=4
        ),
    )
    train(recipe, tmp_path / "run")
    assert records(tmp_path / "run", "train")[0]["reward"] == 0  # what a random model writes is no order
    (reward,) = load_rewards(str(recipe.training.reward))
    row = {"completion": '{"count":3,"to":{"city":"Leeds","floor":null}}'}
    answers = ['{"to": {"floor": null, "city": "Leeds"}, "count": 3}', row["completion"] + "}", '{"count":3}']
    assert [reward.score("", answer, row) for answer in answers] == [1, 0, 0]


def test_a_reward_that_can_not_be_had_is_named_before_anything_is_loaded_or_with_its_row(
    make_rewarded: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"has no function 'letter'"):
        train(make_rewarded("letter"), tmp_path / "a")
    (tmp_path / "two.py").write_text("def score(prompt, answer):\n    return 1.0\n")
    with pytest.raises(InputError, match="score in .* is called with the prompt, the answer and the row: too many"):
        load_rewards(f"{tmp_path}/two.py:score")
    lines = "from __future__ import annotations", "import dataclasses as d", "@d.dataclass", "class A: x: int = 1"
    (tmp_path / "own.py").write_text("\n".join([*lines, "def score(prompt, answer, row): return A().x"]))
    assert load_rewards(f"{tmp_path}/own.py:score")[0].score("", "", {}) == 1
    (tmp_path / "beside_it.py").write_text("def one(): return 1")
    called = "def score(prompt, answer, row):\n    from beside_it import one\n    return one() * len(__file__)"
    (tmp_path / "other.py").write_text(f"import beside_it\n{called}")
    both = load_rewards({f"{tmp_path}/own.py:score": 1.0, f"{tmp_path}/other.py:score": 2.0})
    assert both[1].score("", "", {}) == len(f"{tmp_path}/other.py")
    assert len({reward.name for reward in both}) == 2  # each has a metric
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    for reward, message in (
        (f"{tmp_path}/bad.py:x", "can't be imported: ModuleNotFoundError"),
        (f"{tmp_path}/ends.py:x", "can't be imported: SystemExit: 3"),
        (f"{tmp_path}/two.py", "names no function; expected a file and a function in it"),
        ("y", "names no file here"),
    ):
        keys = {**make_rewarded().training.to_dict(), "reward": reward}
        recipe = make_rewarded().replace(training=type(make_rewarded().training).model_validate(keys))
        with pytest.raises(InputError, match=message):
            train(recipe, tmp_path / "a")
    for reward, message in (
        ("broken", r"raised ZeroDivisionError .*rows.jsonl:\d+"),
        ("nan", r"gave nan .*rows.jsonl"),
        ("nothing", r"gave None for an answer to .*rows.jsonl:\d+; expected a finite number"),
    ):
        with pytest.raises(OwnCodeFailed, match=message):
            train(make_rewarded(reward), tmp_path / reward)
    with pytest.raises(InputError, match="metrics: compare answers with references, and rows of grpo have none"):
        qvera.train(make_rewarded(), tmp_path / "a", metrics={"length": lambda answers, references, rows: 0.0})
    for keys, message in (({"reward": None}, r"training.reward: .*needs a function"), ({"on_oom": "halve"}, "on_oom")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            make_rewarded(**keys)
    for key, value in ("too_long", "split"), ("train_on", "all"):  # parts of a prompt, or all of one that is too long
        with pytest.raises(InputError, match=f"data.{key}: "):
            make_rewarded().replace(data={key: value})
    (tmp_path / "empty.jsonl").write_text('{"prompt": "say"}\n{"prompt": ""}\n')
    recipe = make_rewarded().replace(data={"path": f"{tmp_path}/empty.jsonl", "template": "plain"})
    with pytest.raises(InputError, match=r"empty.jsonl:2: the prompt is empty"):
        task_of(recipe).prepare_rows(build_datasets(recipe.data, small_tokenizer()))
