"""The GPU bench runs here in its tiny CPU mode, so that it works the first time on a GPU; what benches compare is comparable."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import classification, family, family_picture, gguf_answers, lora_cut
from bench.common import RESULTS, do_missing, read_lines, with_table
from bench.trials import Trial, run
from qvera.adapters.methods import check_recipe
from qvera.training.lr_finder import read_curve
from qvera.training.trainer import train

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent


def gpu_bench(out: Path, *parts: str) -> list[dict[str, Any]]:
    """The rows that the parts of the GPU bench write in CPU mode; no part: all of them."""
    sizes = ["--shape", "tiny", "--tokens", "16", "32", "64", "--steps", "2", "--limit-seconds", "6000"]
    chosen = ["--parts", *parts] if parts else []
    command = [sys.executable, "bench/gpu/run.py", "--device", "cpu", *sizes, *chosen, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    return rows


@pytest.mark.slow
def test_the_gpu_bench_writes_a_header_rows_and_an_end(tmp_path: Path) -> None:
    header, *rows, end = gpu_bench(tmp_path / "gpu.jsonl", "profile_step")
    assert header["part"] == "header" and header["versions"]["torch"]
    assert rows[-1]["launches"] >= sum(row["launches"] for row in rows[:-1])
    assert end["part"] == "profile_step" and end["seconds"] > 0


@pytest.mark.matrix
def test_every_part_of_the_gpu_bench_runs_in_cpu_mode(tmp_path: Path) -> None:
    rows = gpu_bench(tmp_path / "gpu.jsonl")
    by_part = {
        part: [r for r in rows if r["part"] == part and "options" not in r] for part in {r["part"] for r in rows}
    }
    for row in by_part["numerics"]:
        assert max(value for name, value in row.items() if "error" in name) < (
            0.001 if row["dtype"] == "float32" else 0.05
        )
    (training,) = by_part["training"]
    assert training["resumed_adapter_is_bit_equal"]
    speed = by_part["speed"]
    trained = {row["case"]: row["trained_numbers"] for row in speed}
    assert trained["frozen, ours"] == trained["frozen, stock"] == 0
    assert trained["ours r=256"] == trained["PEFT VeRA r=256"] > 0
    assert len(speed) == 3 * len(trained) == 21
    assert all(row["step_seconds"] > 0 and row["peak_allocated_bytes"] > 0 for row in speed)
    losses = {row["mode"]: row["losses"] for row in by_part["modes"]}
    for mode, one in losses.items():
        assert one == pytest.approx(losses["checkpointing"], rel=1e-3), mode
    assert {row["batch"] for row in by_part["decoding"]} == {1, 16}
    assert by_part["profile"][-1]["launches"] >= sum(row["launches"] for row in by_part["profile"][:-1])


def test_trials_differ_in_the_adapter_alone(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(training={"max_steps": 12, "lr_scheduler_type": "cosine"})  # as a trial that names none
    made = [
        Trial(method="lora", rank=4, learning_rate=1e-2, steps=12),
        Trial(method="vera", rank=8, learning_rate=2e-2, steps=12),
        Trial(method="qvera", rank=8, learning_rate=2e-2, steps=12),
    ]
    found = {trial.method: run(trial, recipe)[3] for trial in [Trial(method="frozen"), *made]}
    assert len({found[trial.method]["losses"][0] for trial in made}) == 1, "not the same rows on the same model"
    assert len({found[trial.method]["losses"][-1] for trial in made}) == 3
    for trial in made:
        assert found[trial.method]["held_out_loss"] < found["frozen"]["held_out_loss"] - 0.2
    train(recipe, tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    own = [line["loss"] for line in lines if line["kind"] == "train"]
    assert found["qvera"]["losses"] == pytest.approx(own, rel=1e-5)


@pytest.fixture
def variant(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("variant").Variant


@pytest.mark.parametrize("more", [{}, {"b_groups": 2}, {"b_groups": 4, "input_scale": True}], ids=str)
def test_a_variant_written_as_its_formulas_trains_as_the_layers_do(
    make_recipe: Any, variant: Any, more: dict[str, Any]
) -> None:
    """So that what bench/variants.py measured stands for ``adapter.b_groups`` and ``adapter.input_scale``."""
    groups, scaled = more.get("b_groups", 1), more.get("input_scale", False)
    shared: dict[str, Any] = {"rank": 8, "learning_rate": 2e-2, "steps": 4, "input_scale": scaled}
    trials = Trial(method="qvera", b_groups=groups, **shared), variant(method="variant", groups=groups, **shared)
    losses = [run(trial, make_recipe())[3]["losses"] for trial in trials]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_every_variant_starts_from_the_base_and_trains(make_recipe: Any, variant: Any) -> None:
    def losses(**more: Any) -> list[float]:
        return run(variant(method="variant", rank=8, learning_rate=2e-2, steps=5, **more), make_recipe())[3]["losses"]

    plain = losses()
    for what in (
        {"magnitude": "ia3"}, {"magnitude": "dora"}, {"redraw": 2}, {"per_layer": "weight"}, {"input_norm": 1.0},
        {"input_norm": 0.5, "input_unit": True}, {"by_spectrum": True}, {"scale": 0.5}, {"train_d": False},
    ):  # fmt: skip
        other = losses(**what)
        assert plain[0] == pytest.approx(other[0], rel=1e-4), what  # nothing is changed yet
        assert other[-1] < other[0], what
        assert other[1:] != plain[1:], what


def test_a_kept_trial_is_the_model_that_was_trained(make_recipe: Any, tmp_path: Path) -> None:
    recipe, trial = make_recipe(), Trial(method="qvera", rank=8, learning_rate=2e-2, steps=3)
    trained, _, _, facts = run(trial, recipe, tmp_path)
    again, _, _, read = run(trial, recipe, tmp_path)
    assert read == facts
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(trained(input_ids=ids).logits, again(input_ids=ids).logits)
    run(dataclasses.replace(trial, seed=1), recipe, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_trial_of_the_table_of_methods_that_diverges_is_a_line_and_the_next_one_follows(
    tmp_path: Path, tiny_model_dir: Path, make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_recipe().data.path
    held_out = shutil.copy(rows, tmp_path / "held_out.jsonl")
    data = {"path": rows, "eval_path": str(held_out), "test": str(held_out), "max_length": 64}
    monkeypatch.setattr(family, "smollm2", lambda: str(tiny_model_dir))
    monkeypatch.setattr(family, "prepare", lambda *_: data)
    monkeypatch.setattr(family, "LINES", tmp_path / "family.jsonl")
    trials = [
        family.Trial("lora r=1", "trec", 1e33, 3),
        family.Trial("lora r=1", "trec", 1e33, 3, 0, True),
        family.Trial("lora r=1", "trec", 1e-3, 3, 1, True),
    ]
    do_missing(family.LINES, family.Trial, lambda: trials, lambda trial: family.do(trial, tmp_path))
    swept, bad, good = read_lines(family.LINES)
    assert [line["held_out_loss"] for line in (swept, bad)] == [None, None]
    assert [line["scores"] for line in (swept, bad)] == [None, None]
    assert good["held_out_loss"] > 0
    assert family.final_scores("trec", "accuracy") == {"lora r=1": [good["scores"]["accuracy"]]}
    assert f"{good['scores']['accuracy']:.1f} (1 more diverged)" in family.table()


@pytest.mark.parametrize("task", ["trec", "rte"])
def test_a_classifier_is_trained_and_scored_by_each_method(
    task: str, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_file, test_file, columns, _ = classification.TASKS[task]
    for file in (train_file, test_file):
        rows = [{**dict.fromkeys(columns.values(), f"say {n}"), "label": "ab"[n % 2]} for n in range(40)]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(classification, "LINES", tmp_path / "lines.jsonl")
    bases = {"minilm": str(tiny_model_dir)}
    tries = [
        classification.Trial("minilm", task, method, factor, 1)
        for method in classification.METHODS
        for factor in (1.0, 3.0)
    ]
    for trial in tries:
        trial = dataclasses.replace(trial, final=trial.factor == 3.0)
        line = classification.do(trial, tmp_path, bases)
        assert line["held_out_loss"] > 0
        assert (line["scores"] is None) == (not trial.final)
        assert line["head"] == 64 * 2
        assert (line["trained"] == 0) == (trial.method == "linear probe")


def test_the_rates_of_a_classifier_are_those_with_the_lowest_held_out_loss() -> None:
    trial = classification.Trial("minilm", "trec", "VeRA r=256", 1.0, 100)
    lines = [
        {**dataclasses.asdict(trial), "factor": f, "held_out_loss": x} for f, x in ((1.0, 2.0), (2.0, None), (3.0, 1.0))
    ]
    assert classification.best_factor(trial, lines) == 3.0
    assert classification.best_factor(trial, lines[:2]) is None


@pytest.mark.parametrize("method", family.METHODS)
def test_each_method_of_the_table_is_a_whole_recipe(
    method: str, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "smollm2", lambda: str(tiny_model_dir))
    check_recipe(family.recipe_of(family.Trial(method, "trec", 1e-3, 50), {"path": "rows.jsonl"}, tmp_path))


def test_the_page_of_methods_shows_the_committed_trials() -> None:
    page = ROOT / "docs" / "methods" / "table.md"
    text = page.read_text(encoding="utf-8")
    assert text == with_table(with_table(text, "table", family.table()), "e2e", family.e2e_table())
    assert (page.parent / "table.svg").read_text(encoding="utf-8") == family_picture.picture()


def test_the_page_of_classifiers_shows_the_committed_trials() -> None:
    text = classification.PAGE.read_text(encoding="utf-8")
    assert text == with_table(text, "table", classification.table())


def test_the_page_of_serving_at_scale_shows_the_measured_loss_of_a_cut() -> None:
    page = (ROOT / "docs" / "serving-at-scale.md").read_text(encoding="utf-8")
    cases = json.loads((ROOT / "bench" / "results" / "lora_cut.json").read_text())["cases"]
    assert lora_cut.table(cases) in page


def test_the_page_of_exports_has_the_answers_of_llama_cpp() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert gguf_answers.table(json.loads((ROOT / "bench" / "results" / "gguf_answers.json").read_text())) in page


@pytest.mark.parametrize(
    ("name", "steepest", "suggested"), [("quickstart", 0.0076, 0.046), ("e2e", 0.014, 0.07), ("instruct", 0.014, 0.07)]
)
def test_the_range_tests_of_the_docs_are_those_of_their_points(name: str, steepest: float, suggested: float) -> None:
    points = read_lines(RESULTS / f"lr-range-{name}.jsonl")
    smoothed = [point["smoothed_loss"] for point in points]
    found = read_curve(points)
    assert (float(f"{found.steepest:.2g}"), float(f"{found.suggestion:.2g}")) == (steepest, suggested)
    assert [point["smoothed_loss"] for point in points] == pytest.approx(smoothed)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert re.search(rf"\| {name} \([^|]*\) \| {steepest:g} \| {suggested:g} \|", page, re.IGNORECASE)
