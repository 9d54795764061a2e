"""`qvera train --find-lr`: the training loop's own steps at growing rates, a curve, a suggestion, and no run left behind."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvera.cli.main import main
from qvera.cli.train import _print_curve
from qvera.config.schema import parse_recipe
from qvera.config.sections import LrRange
from qvera.training.loop import AloneLoop
from qvera.training.lr_finder import PAGE, POINTS, RULE, RangeTestResult, has_diverged, range_page, read_curve
from qvera.training.trainer import find_lr, train
from qvera.utils import progress
from qvera.utils.errors import NotFinite
from tests.training.runs import on_two_ranks, records, run_json

pytestmark = pytest.mark.process


def points_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / POINTS).read_text().splitlines()]


def test_its_suggestion_is_of_use(
    write_recipe: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    out = tmp_path / "out"
    recipe = write_recipe(training={"output_dir": str(out)})
    ramp = ["--lr-from", "1e-4", "--lr-to", "1", "--lr-steps", "41"]
    assert main(["train", str(recipe), "--find-lr", *ramp]) == 0
    said, on_the_way = capsys.readouterr()
    assert "testing 41 learning rates, a step each" in on_the_way
    assert "diverged          not up to 1;" in said
    assert RULE in said
    assert "known before      0.03, of other rows" in said
    points = points_of(out)
    assert [point["step"] for point in points] == list(range(1, 42))
    for number, point in enumerate(points):
        assert point["learning_rate"] == pytest.approx(1e-4 * 10 ** (number / 10), rel=1e-9)
    suggested = float(re.findall(r"training.learning_rate=(\S+)", said)[0])
    at_lowest = min(points, key=lambda point: point["smoothed_loss"])["learning_rate"]
    assert suggested == pytest.approx(at_lowest, rel=0.05)
    assert suggested > 0.01
    assert float(re.findall(r"steepest fall +at (\S+)", said)[0]) < suggested
    page = (out / PAGE).read_text()
    assert f"Suggested: {RULE}" in unescape(page)
    assert page.count('class="plot"') == 2
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    gained = []
    for rate in (suggested / 100, suggested):
        run = tmp_path / f"run-{rate}"
        settings = [f"training.learning_rate={rate}", f"training.output_dir={run}"]
        assert main(["train", str(recipe), "--set", settings[0], "--set", settings[1]]) == 0
        result = run_json(run)["result"]
        gained.append(result["eval_before"]["loss"] - result["eval_after"]["loss"])
    assert gained[1] > 0.3 > 5 * gained[0]
    capsys.readouterr()
    _print_curve(RangeTestResult(points, 0.02, 0.01, None), run, LrRange())
    assert "learning_rate=0.02, with another training.output_dir: a run is in this one" in capsys.readouterr().out


def test_it_stops_where_the_loss_diverges(make_recipe: Any, tmp_path: Path) -> None:
    """From an adapter that has learnt its rows: a random model has little to lose."""
    train(make_recipe(training={"max_steps": 15, "learning_rate": 0.1, "save_steps": 30}), tmp_path / "learnt")
    recipe = make_recipe(adapter={"init_from": str(tmp_path / "learnt" / "adapter")})
    found = find_lr(recipe, tmp_path / "out", LrRange(start=1e-2, end=1e3, steps=20))
    assert found is not None
    assert found.diverged is not None
    assert found.diverged == found.points[-1]["learning_rate"] < 1e3
    assert len(found.points) < 20
    losses = [point["loss"] for point in found.points]
    assert losses[-1] > losses[0]
    assert losses[-1] > 2 * min(losses)


def test_nothing_looks_like_a_run_and_a_run_beside_it_stays(make_recipe: Any, tmp_path: Path, capsys: Any) -> None:
    out, recipe = tmp_path / "out", make_recipe(training={"max_steps": 2})
    ramp = LrRange(start=1e-4, end=1e-2, steps=10)
    found = find_lr(recipe, out, ramp)
    assert "--lr-steps: 10 steps draw a curve; to suggest a rate takes 20 or more" in capsys.readouterr().err
    assert found is not None
    assert found.suggestion is None
    assert found.reason == "10 losses before the test ended, and 20 are needed. Raise --lr-steps"
    assert sorted(path.name for path in out.iterdir()) == [PAGE, POINTS]
    assert main(["info", str(out)]) == 2
    assert main(["eval", str(out)]) == 2
    first = (out / POINTS).read_bytes()
    train(recipe, out)  # the directory is free for a run
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    find_lr(recipe, out, ramp)
    again = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert again.keys() == files.keys()
    assert {path.name for path in files if again[path] != files[path]} <= {PAGE, POINTS}
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in (first, again[out / POINTS])]
    assert losses[0] == losses[1]


def test_its_steps_are_those_of_a_run(make_recipe: Any, tmp_path: Path) -> None:
    """A ramp that does not rise is a run at a constant rate: same rows, same losses, same gradients, to the bit."""
    steady = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 10, "learning_rate": 0.02}
    recipe = make_recipe(training=steady, data={"group_by_length": True}, adapter={"dropout": 0.1})
    found = find_lr(recipe, tmp_path / "ramp", LrRange(start=0.02, end=math.nextafter(0.02, 1), steps=10))
    train(recipe, tmp_path / "run")
    assert found is not None
    assert len(found.points) == 10
    for point, record in zip(found.points, records(tmp_path / "run"), strict=True):
        for key in ("step", "loss", "grad_norm", "trained_tokens", "input_tokens"):
            assert point[key] == record[key]


def test_a_loss_that_is_not_a_number_ends_it_but_not_before_the_first_step(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_lr(make_recipe(), tmp_path / "out", LrRange(start=1e-3, end=1e36, steps=14))
    assert found is not None
    assert found.diverged == found.points[-1]["learning_rate"]
    assert len(points_of(tmp_path / "out")) == len(found.points) < 14

    real, ramp = AloneLoop.train_step, LrRange(start=1e-4, end=1e-2, steps=10)

    def failing(loop: AloneLoop) -> Any:
        if loop.state.step == after:
            raise NotFinite("not finite")
        return real(loop)

    monkeypatch.setattr(AloneLoop, "train_step", failing)
    after = 3
    found = find_lr(make_recipe(), tmp_path / "cut", ramp)
    assert found is not None
    assert [p["loss"] is None for p in found.points] == [False] * 3 + [True]
    assert found.diverged == pytest.approx(1e-4 * 100 ** (3 / 9))
    assert points_of(tmp_path / "cut")[-1]["loss"] is None
    assert "NaN" not in (tmp_path / "cut" / POINTS).read_text()
    after = 0
    with pytest.raises(NotFinite):
        find_lr(make_recipe(), tmp_path / "none", ramp)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "stage", [None, pytest.param("zero3", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.matrix)]
)
def test_two_processes_find_what_one_finds(write_recipe: Any, tmp_path: Path, stage: str | None) -> None:
    ramp = ["--find-lr", "--lr-from", "1e-4", "--lr-to", "1e-1", "--lr-steps", "10"]
    recipe = write_recipe(training={"output_dir": str(tmp_path / "one")})
    assert main(["train", str(recipe), *ramp]) == 0
    tree = yaml.safe_load(recipe.read_text()) | {"deepspeed": stage}
    tree["training"]["output_dir"] = str(tmp_path / "two")
    recipe.write_text(yaml.safe_dump(tree))
    said = on_two_ranks(["train", str(recipe), *ramp], tmp_path / "logs")
    assert said.count("suggestion") == 1
    for alone, shared in zip(points_of(tmp_path / "one"), points_of(tmp_path / "two"), strict=True):
        assert shared["learning_rate"] == pytest.approx(alone["learning_rate"], rel=1e-9)
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {PAGE, POINTS}


def curve(steps: int, fall_at: float, rise_at: float, noise: float = 0.0) -> list[dict[str, Any]]:
    """A loss that falls by 2 around one rate and rises by 6 around another, over rates from 1e-5 to 1."""
    points = []
    for number in range(steps):
        rate = 10 ** (-5 + 5 * number / (steps - 1))
        fall = 1 / (1 + (fall_at / rate) ** 3)
        rise = 1 / (1 + (rise_at / rate) ** 4)
        loss = 3 - 2 * fall + 6 * rise + noise * math.sin(1e4 * number)
        points.append({"step": number + 1, "learning_rate": rate, "loss": loss})
    return points


@pytest.mark.parametrize(("fall_at", "noise"), [(3e-4, 0.0), (8e-3, 0.15)])
def test_the_suggestion_is_at_the_lowest_loss_and_the_steepest_fall_before_it(fall_at: float, noise: float) -> None:
    points = curve(100, fall_at, 0.2, noise)
    found = read_curve(points)
    suggestion, steepest = found.suggestion, found.steepest
    assert all("smoothed_loss" in point for point in points)
    assert suggestion is not None
    assert steepest is not None
    assert found.reason is None
    assert abs(math.log10(steepest / fall_at)) < (0.35 if noise else 0.1)
    clean = curve(100, fall_at, 0.2)
    best = min(clean, key=lambda point: point["loss"])["loss"]
    (at,) = (p["loss"] for p, q in zip(clean, points, strict=True) if math.isclose(q["learning_rate"], suggestion))
    assert at < best + 0.1
    assert steepest < suggestion < 0.2


@pytest.mark.parametrize(("steps", "left"), [(24, 1), (24, 2), (40, 2), (40, 3)])
def test_the_suggestion_does_not_lag_behind_a_loss_that_rises_at_the_end(steps: int, left: int) -> None:
    """The loss falls slowly, and rises steeply over the last ``left`` points."""
    points = curve(steps, 1e-2, 1e9)
    for number, point in enumerate(points[-left:], start=1):
        point["loss"] = points[-left - 1]["loss"] + 0.4 * number
    suggestion = read_curve(points).suggestion
    assert suggestion is not None
    assert suggestion <= points[-left - 1]["learning_rate"] * 1.0001


def test_there_is_no_suggestion_where_nothing_falls() -> None:
    rising = [{"learning_rate": 10.0**n, "loss": 1.0 + n} for n in range(20)]
    found = read_curve(rising)
    assert found.suggestion is None
    assert found.steepest is None
    assert "the loss never fell" in str(found.reason)
    assert "3 losses before the test ended, and 20 are needed" in str(read_curve(rising[:3]).reason)
    ended = [*curve(40, 1e-3, 0.2)[:30], {"learning_rate": 1.0, "loss": None}]
    assert read_curve(ended).suggestion is not None
    assert sum("smoothed_loss" in point for point in ended) == 30


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        ([2.0] * 20 + [8.0] * 20, 23),  # a running mean of about five steps: neither at once nor late
        ([2.0] * 20 + [8.0] + [2.0] * 20, None),  # one bad batch
        ([3.0 * 0.8**n for n in range(20)] + [0.5] * 20, None),  # four times its lowest, but far below its start
        ([2.0, 2.1, 1.9] * 20, None),
        ([2.0] * 5 + [math.nan], 5),
    ],
)
def test_when_a_loss_has_diverged(losses: list[float], at: int | None) -> None:
    said = [has_diverged(losses[: step + 1], steps=100) for step in range(len(losses))]
    first = said.index(True) if True in said else None
    assert first == at or (at is not None and at > 5 and first is not None and 20 < first <= at)


def test_a_page_without_a_suggestion() -> None:
    found = RangeTestResult([{"step": 1, "learning_rate": 1e-5, "loss": None}], None, None, 1e-5, "the loss never fell")
    tree = {"model": "<model>", "data": {"path": "rows.jsonl"}, "training": {"learning_rate": 4e-3}}
    page = range_page("out", parse_recipe(tree, "a test"), LrRange(), found)
    for part in ("the loss never fell", "&lt;model&gt;", "0.004"):
        assert part in page
    assert 'class="plot"' not in page
