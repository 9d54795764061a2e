"""A loss and metrics of one's own: gradients as in fp64, scores everywhere, and faults that are named and cost nothing."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file

from qvera.adapters import QveraLinear
from qvera.adapters.save_load import named_vectors
from qvera.cli.train import print_result
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.model_class import CAUSAL_LM
from qvera.tasks.base import LossBatch
from qvera.training.trainer import train
from qvera.utils import progress
from qvera.utils.errors import InputError, RunFailed
from tests.distributed.ranks import Ranks
from tests.tasks.own_code import AskOfTheSecondRank, by_row, first_letters, focal, mean_focal
from tests.tasks.sessions import loop_of
from tests.tasks.test_encoders import DenseVera, dense_reference
from tests.training.runs import assert_close_run, assert_same_run, losses

pytestmark = pytest.mark.process
Loss = Callable[[torch.Tensor, LossBatch], torch.Tensor]
QUIET = {"sample_count": 0, "save_total_limit": 9}


@pytest.mark.parametrize(
    ("loss", "passes", "checkpointing", "data"),
    [
        (focal, 1, False, {"prefix_once": False}), (focal, 3, True, {"prefix_once": True}), (by_row, 2, False, {"packing": True}),
        (mean_focal, 7, False, {}), (by_row, 1, True, {"prefix_once": False}),
    ],
)  # fmt: skip
def test_gradients_of_a_loss_of_log_probabilities_are_those_of_dense_weights_in_fp64(
    make_recipe: Any, tmp_path: Path, loss: Loss, passes: int, checkpointing: bool, data: dict[str, Any]
) -> None:
    """NF4, padded rows or joined ones, a chunk that does not divide the tokens, any number of passes."""
    recipe = make_recipe(data={"eval_fraction": 0.0, **data}, training={"loss_chunk_tokens": 7, **QUIET})
    loop = loop_of(recipe, tmp_path)
    enable_checkpointing(loop.model, checkpointing)
    loop.task.own_loss = loss
    examples = [loop.datasets.train[i] for i in range(7)]
    targets = loop.task.targets(examples)
    for part in torch.arange(7).chunk(passes):
        (loop.nll([examples[i] for i in part.tolist()])[0] / targets).backward()
    reference = dense_reference(loop.model.base_model.model, CAUSAL_LM)
    lps, labels = [], []
    for example in examples:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        places = torch.from_numpy(np.flatnonzero(example.trained))
        every = reference(input_ids=ids[None]).logits[0].log_softmax(-1)
        lps.append(every[places - 1].gather(1, ids[places, None]).squeeze(1))
        labels.append(ids[places])
    row = torch.repeat_interleave(torch.arange(7), torch.tensor([len(each) for each in labels]))
    expected = loss(torch.cat(lps), LossBatch(torch.cat(labels), row, [{}] * 7))
    (expected.mean() if expected.dim() else expected).backward()
    dense = {name: module for name, module in reference.named_modules() if isinstance(module, DenseVera)}
    adapted = {n: m for n, m in loop.model.base_model.model.named_modules() if isinstance(m, QveraLinear)}
    assert dense.keys() == adapted.keys() and len(dense) == 14
    for name, module in adapted.items():
        for kind in "db":
            found = module.vectors("default")[f"qvera_{kind}"].grad
            wanted = getattr(dense[name], kind).grad
            torch.testing.assert_close(found.double(), wanted, rtol=5e-4, atol=2e-6, msg=f"{name} {kind}")


def test_gradients_of_a_loss_of_a_classifiers_logits_are_those_in_fp64(classify: Any, tmp_path: Path) -> None:
    def hinge(logits: torch.Tensor, batch: LossBatch) -> torch.Tensor:
        return F.multi_margin_loss(logits, batch.labels, reduction="none")

    loop = loop_of(classify(model={"quantization": "none"}), tmp_path)
    loop.task.own_loss = hinge
    examples = [loop.datasets.train[i] for i in range(7)]
    for part in (examples[:3], examples[3:]):
        (loop.nll(part)[0] / 7).backward()
    found = {name: vector.grad.clone() for name, vector in named_vectors(loop.model).items()}
    loop.model.zero_grad()
    reference = loop.model.double()
    logits = [reference(input_ids=torch.tensor(e.input_ids[None], dtype=torch.int64)).logits for e in examples]
    F.multi_margin_loss(torch.cat(logits), torch.from_numpy(loop.datasets.labels.targets(examples))).backward()
    for name, vector in named_vectors(reference).items():
        torch.testing.assert_close(found[name].double(), vector.grad.double(), rtol=5e-4, atol=2e-6, msg=name)


def test_cross_entropy_as_a_loss_of_ones_own_is_the_run_without_it(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(training={"max_steps": 3, **QUIET})
    train(recipe, tmp_path / "stock")
    result = train(recipe, tmp_path / "own", loss=lambda logprobs, _: -logprobs)
    assert result is not None and "lambda" in result.run["own"]["loss"]
    assert_close_run(tmp_path / "own", tmp_path / "stock")


def test_a_loss_that_fails_is_named_with_its_rows_and_costs_no_step(make_recipe: Any, tmp_path: Path) -> None:
    calls = 0

    def make(limit: int) -> Loss:
        def own(logprobs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return focal(logprobs, batch) if calls <= limit else torch.full((3, 3), 1 / 0)

        return own

    recipe = make_recipe(training={"max_steps": 3, **QUIET}, adapter={"dropout": 0.1})
    with pytest.raises(RunFailed, match=r"own raised ZeroDivisionError .* on .*rows\.jsonl:\d+.*\n.*Step 1 is saved"):
        train(recipe, tmp_path / "run", loss=make(4))  # the longest batch, two passes of step 1, one of step 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    with pytest.raises(InputError, match="was saved with another loss than"):
        train(recipe, tmp_path / "run", resume=True)
    calls = 0
    train(recipe, tmp_path / "run", resume=True, loss=make(99))
    calls = 0
    train(recipe, tmp_path / "whole", loss=make(99))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda lp, _: lp.detach(), "without a gradient"),
        (lambda lp, _: lp[:2], r"returned \(2,\)"),
        (lambda lp, _: 3.0, "returned float"),
        (lambda lp, _: lp * float("nan"), "not finite"),
    ],
)
def test_what_is_no_loss_is_said_before_the_first_step(make_recipe: Any, tmp_path: Path, loss: Loss, said: str) -> None:
    with pytest.raises(RunFailed, match=said):
        train(make_recipe(training={"max_steps": 1, **QUIET}), tmp_path, loss=loss)


def scripted(*values: float) -> Callable[..., float]:
    """A metric that gives these values, one after the other."""
    left = list(values)
    return lambda *_: left.pop(0)


def test_a_run_that_stops_early_says_of_which_step_its_adapter_is(
    make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"metric_for_best_model": "mine", "early_stopping_patience": 1, "max_steps": 4, "eval_steps": 1, **QUIET}
    train(make_recipe(training=training), tmp_path, metrics={"mine": scripted(0.5, 0.75, 0.625, 0.5)})
    said = " ".join(capsys.readouterr().err.split())
    assert "(best: step 1). The adapter is the last step's" in said


@pytest.mark.parametrize(("greater", "best", "steps"), [(None, 2, 4), (False, 1, 3)])
def test_a_metric_chooses_the_best_step_and_stops_early(
    make_recipe: Any,
    tmp_path: Path,
    greater: bool | None,
    best: int,
    steps: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = {"metric_for_best_model": "mine", "greater_is_better": greater, "early_stopping_patience": 2}
    training |= {"load_best_model_at_end": True, "max_steps": 6, "eval_steps": 1, "save_steps": 1, **QUIET}
    values = scripted(0.125, 0.5, 0.75, 0.625, 0.5625, 0.25)
    result = train(make_recipe(training=training), tmp_path, metrics={"mine": values, "letters": first_letters})
    assert result is not None
    found = result.run["result"]
    assert (found["best_step"], found["steps"], found["stopped_early"]) == (best, steps, True)
    assert found["eval_before"]["mine"] == 0.125 and found["eval_before"]["letters"] >= 0
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert [line["mine"] for line in lines if line["kind"] == "eval"] == [0.5, 0.75, 0.625, 0.5625][:steps]
    kept = load_file(tmp_path / "checkpoints" / f"step-{best:08d}" / "vectors.safetensors")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in saved.items())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "letters" in page and f"Best mine at step {best}" in page
    said = capsys.readouterr().err
    assert "mine 0.1250" in said and "without a better held-out mine" in said
    print_result(tmp_path, result.run)
    assert "mine              0.1250 → " in capsys.readouterr().out


def test_the_recipes_own_scores_choose_the_best_step_too(
    classify: Any, make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"metric_for_best_model": "accuracy", "eval_steps": 1, "max_steps": 2}
    majority = {"first": lambda predictions, labels, rows: float(np.mean([p == "fruit" for p in predictions]))}
    result = train(classify(training=training), tmp_path / "labels", metrics=majority)
    assert result is not None and 0 <= result.run["result"]["eval_after"]["first"] <= 1
    training = {"metric_for_best_model": "exact_match", "eval_steps": 1, "max_steps": 2, "exact_match_rows": 2}
    shown: list[tuple[int, str]] = []
    show = progress.Phase.__call__

    def watched(phase: progress.Phase, done: int, *more: Any, **facts: Any) -> None:
        show(phase, done, *more, **facts)
        shown.append((done, phase._line()))

    monkeypatch.setattr(progress.Phase, "__call__", watched)
    result = train(make_recipe(training={**training, **QUIET}), tmp_path / "answers")
    assert result is not None and result.run["result"]["best_step"] == 1
    answering = [line for done, line in shown if "answering 2 prompts with the adapter" in line and done == 2]
    assert len(answering) == 3 and all("2/2" in line for line in answering)  # of two evaluations and the last score
    with pytest.raises(InputError, match=r"metric_for_best_model: there is no score 'acuracy' here; did you mean 'acc"):
        train(classify(training={"metric_for_best_model": "acuracy", "eval_steps": 1}), tmp_path / "wrong")
    with pytest.raises(InputError, match="there is no score 'exact_match' here. There are loss, accuracy"):
        train(classify(training={"metric_for_best_model": "exact_match", "eval_steps": 1}), tmp_path / "wrong")


def _of_rows(*_: Any) -> float:
    return float("nan")


def _on_one(predictions: Any, references: Any, rows: list[dict[str, Any]]) -> float:
    return 1.0 / min(float(not row["source"].endswith(":7")) for row in rows)


def _from_the_second_call(metric: Any) -> Any:
    metrics = itertools.chain([lambda *_: 0.0], itertools.repeat(metric))
    return lambda *columns: next(metrics)(*columns)


def test_a_metric_that_fails_is_named_with_its_row_and_costs_no_step(make_recipe: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"{n}"}) + "\n" for n in range(20)))
    held_out = tmp_path / "held" / "rows.jsonl"
    held_out.parent.mkdir()
    held_out.write_text("".join(json.dumps({"prompt": f"tell {n}", "completion": f"{n}"}) + "\n" for n in range(5, 15)))
    recipe = make_recipe(
        data={"path": str(rows), "eval_path": str(held_out), "eval_fraction": 0.0},
        training={"max_steps": 3, "eval_steps": 2, "save_steps": 9, "exact_match_rows": 10, **QUIET},
    )
    for name, metric, said in (
        ("first", _of_rows, "mine gave nan for 10 held-out rows; alone, the first"),
        ("run", _on_one, r"ZeroDivisionError .*rows\.jsonl:7\."),
    ):
        with pytest.raises(RunFailed, match=said) as failed:
            train(recipe, tmp_path / name, metrics={"mine": _from_the_second_call(metric)})
        assert "Step 2 is saved" in str(failed.value)
    printed = io.StringIO()
    train(recipe, tmp_path / "run", resume=True, dry_run=True, console=Console(file=printed, width=300))
    assert "the run goes on without mine, which it was begun with" in printed.getvalue()
    train(recipe, tmp_path / "run", resume=True, metrics={"mine": lambda *_: 0.0})
    train(recipe, tmp_path / "whole", metrics={"mine": lambda *_: 0.0})
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert losses(tmp_path / "run", "eval") == losses(tmp_path / "whole", "eval")


@pytest.mark.parametrize(
    ("sections", "given", "said"),
    [
        (
            {"training": {"objective": "grpo", "reward": "r.py:f"}},
            {"loss": focal},
            "the cross entropy, and training.objective: grpo asks for another one",
        ),
        ({"training": {"label_smoothing": 0.1}}, {"loss": focal}, "training.label_smoothing asks for another one"),
        ({}, {"loss": "focal"}, "'focal' is no function"),
        ({}, {"metrics": [first_letters]}, "metrics: expected names with functions"),
        ({}, {"callbacks": print}, "callbacks: expected a list of callbacks"),
        ({}, {"metrics": {"loss": first_letters}}, "'loss' is the name of another score here"),
        ({}, {"metrics": {"mine": len}}, "metrics: mine: is called with 3 arguments, which it does not take"),
        ({}, {"loss": lambda logits: logits}, "loss: is called with 2 arguments"),
        ({}, {"callbacks": [lambda step, loss: None]}, "callbacks: <lambda>: is called with 1 argument"),
        ({"data": {"eval_fraction": 0.0}}, {"metrics": {"mine": first_letters}}, "no rows are held out"),
        ({"data": {"adapter_column": "who"}}, {"loss": focal}, "are for a run of one adapter"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_read(
    make_recipe: Any, tmp_path: Path, sections: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    if "objective" in sections.get("training", {}):
        (tmp_path / "r.py").write_text("def f(prompt, answer, row):\n    return 0.0\n")
        sections = {"training": {"objective": "grpo", "reward": f"{tmp_path}/r.py:f"}}
    with pytest.raises(InputError, match=said):
        train(make_recipe(**sections), tmp_path / "run", **given)


@pytest.mark.slow
def test_two_processes_with_code_of_ones_own_give_the_numbers_of_one(make_recipe: Any, tmp_path: Path) -> None:
    """What the second rank's callback asks for is done by both."""
    recipe = make_recipe(training={"max_steps": 5, "eval_steps": 5, "save_steps": 5, **QUIET})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    ranks = Ranks(["-m", "tests.tasks.own_code", str(tmp_path)], 2, tmp_path / "logs")
    assert ranks.wait(200) == [0, 0], ranks.text()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["status"], run["result"]["steps"]) == ("done", 3)
    assert run["own"] == {"loss": "focal", "metrics": ["first_letters"], "callbacks": ["AskOfTheSecondRank"]}
    lines = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [1]

    class Ask(AskOfTheSecondRank):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            state.max_steps = 99
            super().on_step_end(args, state, control, **more)

    result = train(recipe, tmp_path / "alone", callbacks=[Ask], loss=focal, metrics={"first_letters": first_letters})
    assert_close_run(tmp_path / "run", tmp_path / "alone")
    assert result is not None
    assert result.run["result"]["eval_after"]["first_letters"] == run["result"]["eval_after"]["first_letters"]
