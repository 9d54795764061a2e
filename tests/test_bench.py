"""The GPU bench runs here in its tiny CPU mode, so that it works the first time on a GPU; what benches compare is comparable."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from bench import (
    alpaca,
    candidates,
    classification,
    family,
    first_rows,
    gguf_answers,
    host_time,
    lora_cut,
    quality,
    quality_picture,
    rewards,
)
from bench.common import RESULTS, do_missing, header, perturb, read_lines, with_table, write_rows
from bench.gpu import common, fast, right
from bench.gpu.common import Lines
from bench.gpu.first_machine import PART_SECONDS, PARTS, environment_of, has_ended
from bench.gpu.first_machine import run as run_piece
from bench.trials import Trial, run
from qvera.adapters.methods import check_recipe
from qvera.cli.main import main
from qvera.data.rows import Example
from qvera.training.lr_finder import read_curve
from qvera.training.trainer import train
from tests.helpers import wait_until
from tests.training.runs import losses

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.matrix
def test_every_piece_that_a_first_machine_is_asked_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, to save importing torch once for each; the next test has the processes."""
    # but for a command with an environment of its own
    monkeypatch.setattr(right, "qvera", lambda *line, **own: common.qvera(*line, **own) if own else main([*line]))
    args = argparse.Namespace(scratch=tmp_path, shape="tiny", device="cpu", tokens=[16], steps=2)
    path, asked = tmp_path / "lines.jsonl", [piece for part in PARTS.values() for piece in part]
    for module, piece, _ in asked:
        if not piece.endswith("round 2"):  # the same once more
            pieces = importlib.import_module(f"bench.gpu.{module}").PIECES
            pieces[piece](args, Lines(path, piece, torch.device("cpu"), "tiny"))
            torch.use_deterministic_algorithms(False)  # which `resumed` leaves on
    rows = read_lines(path)
    assert {row["piece"] for row in rows} == {piece for _, piece, _ in asked if not piece.endswith("round 2")}
    assert [row["piece"] for row in rows if "left_out" in row] == ["sanitizer"]
    assert "needs CUDA" in next(row["left_out"] for row in rows if "left_out" in row)
    assert all(row["same_bits"] for row in rows if row["piece"] == "resumed")
    assert all(row["gradient_error_worst"] < 0.03 for row in rows if row["piece"] == "layer")
    host = {row["case"]: row["checkpointed_microseconds_a_layer"] for row in rows if row["piece"] == "host"}
    assert host.keys() == host_time.CASES.keys() and all(microseconds > 0 for microseconds in host.values())
    timed = [row for row in rows if "case" in row and row["piece"] != "host"]
    assert all(row["step_seconds"] > 0 and row["kernel_seconds"] > 0 for row in timed) and len(timed) == 7
    assert all(row["tokens_per_second"] > 0 for row in rows if "tokens_per_second" in row)


@pytest.mark.matrix
def test_a_command_goes_on_where_it_was_killed_and_past_a_piece_that_fails(tmp_path: Path) -> None:
    asked = ["--pieces", "ceilings", "frozen, round 1", "frozen, round 2", "--shape", "tiny", "--device", "cpu"]
    command = [sys.executable, "bench/gpu/first_machine.py", "A", "B", *asked, "--tokens", "16"]
    path = tmp_path / "lines.jsonl"
    command += ["--part-seconds", "9000", "--scratch", str(tmp_path / "scratch"), "--lines", str(path)]
    killed = subprocess.Popen(command, cwd=ROOT)
    wait_until(lambda: has_ended(path, {"piece": "ceilings"}), 300)  # then it is in the second piece
    killed.kill()
    killed.wait()
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 1
    ended = [row for row in read_lines(path) if "ended" in row]
    assert [row["piece"] for row in ended] == ["ceilings", "frozen, round 1", "frozen, round 2"]
    assert all("the piece `qvera train` has to run first" in row["said"] for row in ended[1:])
    assert not has_ended(path, {"piece": "frozen, round 1"}), "what has failed is done again"


def test_a_copy_without_its_history_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.common.ROOT", tmp_path)
    assert header()["commit"] is None


def test_a_piece_that_hangs_or_fails_is_named_dies_with_all_that_it_started_and_the_next_goes_on(
    tmp_path: Path,
) -> None:
    mark = tmp_path / "mark"
    hangs = f"import subprocess, time; subprocess.Popen(['sh', '-c', 'sleep 3; touch {mark}']); time.sleep(60)"
    found = [
        run_piece([sys.executable, "-c", code], dict(os.environ), 1.0)
        for code in (hangs, "raise SystemExit('no card')", "pass")
    ]
    assert found[0]["error"] == "stopped after 1 s" and "no card" in found[1]["said"] and "error" not in found[2]
    time.sleep(3)
    assert not mark.exists()
    assert all(sum(seconds for _, _, seconds in part) <= PART_SECONDS < 540 for part in PARTS.values())


def test_pieces_of_the_first_machine_find_what_is_installed_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, scratch = tmp_path / "beside", tmp_path / "scratch"
    for directory in (beside, scratch / "site"):
        directory.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(beside))
    arguments = argparse.Namespace(scratch=scratch, wheels=None, device="cpu")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # which it sets, for this process too
    paths = environment_of(arguments)[0]["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(ROOT), str(scratch / "site"), str(beside)]


def test_a_case_with_other_settings_than_qvera_train_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(
        scratch=tmp_path, shape="tiny", tokens=[16], steps=2, device="cpu", lines=tmp_path / "lines.jsonl"
    )
    for piece in ("qvera train", "ours r=256, round 1"):
        lines = Lines(args.lines, piece, torch.device("cpu"), "tiny")
        if piece == "qvera train":
            fast.PIECES[piece](args, lines)
        else:
            monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:other")
            with pytest.raises(RuntimeError, match="settings are not those of qvera train.*backend:other"):
                fast.PIECES[piece](args, lines)
            monkeypatch.undo()
            settings, session = read_lines(args.lines)[0]["settings"], fast.session_of(args, "ours r=256", 16)
            monkeypatch.setattr(fast, "session_of", mock.Mock(return_value=session))
            for key in settings:  # each alone
                monkeypatch.setattr(fast, "expected_settings", mock.Mock(return_value={**settings, key: "another"}))
                with pytest.raises(RuntimeError, match=f"not those of qvera train: {{'{key}'"):
                    fast.PIECES[piece](args, lines)
    assert len(settings) >= 9
    assert [row["piece"] for row in read_lines(args.lines)] == ["qvera train"]


def test_trials_differ_in_the_adapter_alone(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(training={"max_steps": 4, "lr_scheduler_type": "cosine"})  # as a trial that names none
    made = [Trial(method="lora", rank=4, learning_rate=1e-2, steps=4)]
    made += [Trial(method=method, rank=8, learning_rate=2e-2, steps=4) for method in ("vera", "qvera")]
    found = {trial.method: run(trial, recipe)[3] for trial in [Trial(method="frozen"), *made]}
    assert len({found[trial.method]["losses"][0] for trial in made}) == 1, "not the same rows on the same model"
    assert len({found[trial.method]["losses"][-1] for trial in made}) == 3
    for trial in made:
        assert found[trial.method]["held_out_loss"] < found["frozen"]["held_out_loss"]
    train(recipe, tmp_path / "run")
    assert found["qvera"]["losses"] == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


def test_a_variant_written_as_its_formulas_trains_as_the_layers_do(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what bench/variants.py measured stands for ``adapter.b_groups`` and ``adapter.input_scale``."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    variant = importlib.import_module("variant").Variant
    shared: dict[str, Any] = {"rank": 8, "learning_rate": 2e-2, "steps": 4, "input_scale": True}
    trials = Trial(method="qvera", b_groups=4, **shared), variant(method="variant", groups=4, **shared)
    found = [run(trial, make_recipe())[3]["losses"] for trial in trials]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_trial_of_the_table_of_methods_that_diverges_is_a_line_and_the_next_one_follows(
    tmp_path: Path, tiny_model_dir: Path, make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_recipe().data.path
    held_out = shutil.copy(rows, tmp_path / "held_out.jsonl")
    data = {"path": rows, "eval_path": str(held_out), "test": str(held_out), "max_length": 64}
    monkeypatch.setattr(family, "smollm2", lambda: str(tiny_model_dir))
    monkeypatch.setattr(family, "prepare", lambda *_: data)
    monkeypatch.setattr(family, "LINES", tmp_path / "family.jsonl")
    trials = [family.Trial("lora r=1", "trec", rate, 1, seed, True) for seed, rate in enumerate((1e33, 1e-3))]
    do_missing(family.LINES, family.Trial, lambda: trials, lambda trial: family.do(trial, tmp_path))
    bad, good = read_lines(family.LINES)
    assert (bad["held_out_loss"], bad["scores"]) == (None, None) and good["held_out_loss"] > 0
    assert family.final_scores("trec", "accuracy") == {"lora r=1": [good["scores"]["accuracy"]]}
    assert f"{good['scores']['accuracy']:.1f} (1 more diverged)" in family.table()


def test_a_classifier_is_trained_and_scored_by_each_method(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *files, columns, _ = classification.TASKS["rte"]
    for file in files:
        rows = [{**dict.fromkeys(columns.values(), f"say {n}"), "label": "ab"[n % 2]} for n in range(40)]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(classification, "LINES", tmp_path / "lines.jsonl")
    for number, method in enumerate(classification.METHODS):
        trial = classification.Trial("minilm", "rte", method, 1.0, 1, final=number == 0)
        line = classification.do(trial, tmp_path, {"minilm": str(tiny_model_dir)})
        assert line["held_out_loss"] > 0 and line["head"] == 64 * 2
        assert (line["scores"] is None) == (not trial.final)
        assert (line["trained"] == 0) == (method == "linear probe")
    tried = [{**vars(trial), "factor": f, "held_out_loss": x} for f, x in ((1.0, 2.0), (2.0, None), (3.0, 1.0))]
    assert classification.best_factor(trial, tried) == 3.0
    assert classification.best_factor(trial, tried[:2]) is None


def test_a_search_ends_where_both_neighbours_are_worse_and_goes_on_in_any_session(tmp_path: Path) -> None:
    def do(trial: quality.Trial) -> dict[str, Any]:
        loss = (trial.rate - 5) ** 2 + (trial.head - 3) ** 2 + (trial.ratio - 1) ** 2 + 0.1 * trial.seed
        return {"held_out_loss": loss, "scores": None}

    path = tmp_path / "quality.jsonl"
    first = quality.Trial("smollm2", "sst2", 150, "VeRA r=256", 7, 2)
    for _ in range(40):  # a session of one trial each
        do_missing(
            path, quality.Trial, lambda: quality.search(first, ("rate", "head", "ratio"), read_lines(path)), do, 1
        )
    tried = [first.from_line(line) for line in read_lines(path)]
    best = quality.Trial("smollm2", "sst2", 150, "VeRA r=256", 5, 3, 1)
    assert {*best.next_to("rate"), *best.next_to("head"), *best.next_to("ratio")} < set(tried)
    assert [trial.seed for trial in tried if trial.rate == 5 and trial.head == 3 and trial.ratio == 1] == [0, 1, 2]
    assert len(set(tried)) == len(tried) < 20
    rates = quality.taken_as(best)
    assert rates.b_rate == pytest.approx(3 * rates.rate("qvera_d"), rel=0.01) and rates.rate("score") == 0.0052


def test_a_paired_difference_has_the_mean_over_targets_and_an_interval_that_grows_with_rows_that_differ() -> None:
    random = np.random.default_rng(1)
    targets = random.integers(1, 50, 300).astype(float)
    theirs = {seed: {"loss": random.normal(2, 1, 300), "targets": targets} for seed in (0, 1, 2)}
    even = {seed: {**found, "loss": found["loss"] + 0.1} for seed, found in theirs.items()}
    assert quality.paired_difference(even, theirs, "loss") == pytest.approx((0.1, 0.1, 0.1))
    noisy = {seed: {**found, "loss": found["loss"] + random.normal(0, 1, 300)} for seed, found in theirs.items()}
    mean, low, high = quality.paired_difference(noisy, theirs, "loss")
    # one standard error of a seed's mean is 0.07, of the mean of three 0.04
    assert low < mean < high and low < 0 < high and 0.1 < high - low < 0.4


def test_trials_of_quality_see_the_same_rows_and_are_the_same_when_repeated(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alpaca, "smollm2", lambda: str(tiny_model_dir))
    asked = [{"instruction": f"say {n}", "input": "", "output": f"the number is {n * n}"} for n in range(320)]
    (tmp_path / "alpaca_en_demo.json").write_text(json.dumps(asked))
    (tmp_path / "text_classification").mkdir()
    for file in quality.HEADS["rte"][:2]:
        rows = [{"premise": f"say {n}", "hypothesis": f"{n}", "label": "ab"[n % 2]} for n in range(450)]
        write_rows(tmp_path / "text_classification" / file, rows)
    lines = []
    for task in ("alpaca", "rte"):
        for method in ("VeRA r=256", quality.REFERENCE, *([quality.REFERENCE] if task == "rte" else [])):
            trial = quality.Trial("smollm2", task, 2, method, 5, 2)
            found = quality.do(trial, tmp_path, {"smollm2": str(tiny_model_dir)})
            lines.append({**vars(trial), **json.loads(json.dumps(found))})
            unpacked = quality.unpacked(lines[-1])
            assert quality.mean_loss(unpacked) == pytest.approx(found["scores"]["loss"], rel=1e-3)
        ours, theirs = [line for line in lines if line["task"] == task][:2]
        assert ours["first_loss"] == theirs["first_loss"] and ours["scores"]["loss"] != theirs["scores"]["loss"]
    assert {**lines[-2], "cpu_seconds": 0} == {**lines[-1], "cpu_seconds": 0}
    assert quality.table(quality.results(lines)).count("smollm2 rte, 2") == 2


def test_each_method_of_the_table_is_a_whole_recipe(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "smollm2", lambda: str(tiny_model_dir))
    for method in family.METHODS:
        check_recipe(family.recipe_of(family.Trial(method, "trec", 1e-3, 50), {"path": "rows.jsonl"}, tmp_path))


def test_the_pages_show_the_committed_results() -> None:
    docs = ROOT / "docs"
    pages = {
        page.name: page.read_text(encoding="utf-8") for page in [*docs.glob("*.md"), docs / "methods" / "table.md"]
    }
    text = pages["table.md"]
    results = quality.searched(read_lines(RESULTS / "quality.jsonl"))
    tables = {"table": family.table(), "quality": quality.table(results)}
    assert all(text == with_table(text, name, table) for name, table in tables.items())
    assert (docs / "methods" / "quality.svg").read_text(encoding="utf-8") == quality_picture.picture(results)
    on_alpaca = {each.method: each.mean("loss") for each in results if each.group == ("smollm2", "alpaca", 50)}
    columns = [on_alpaca[name] for name in (quality.REFERENCE, "VeRA r=256", "two b and an a")]
    row = "| Alpaca, 50 steps, test loss, rates searched (lower is better) | **{:.3f}** | {:.3f} | {:.3f} |"
    assert row.format(*columns) in (ROOT / "README.md").read_text(encoding="utf-8")
    text = pages["benchmarks.md"]
    assert text == with_table(text, "first_rows", first_rows.table(read_lines(first_rows.LINES)))
    text = pages["rewards.md"]
    found = {task: read_lines(file) for task, name in rewards.TASKS.items() if (file := RESULTS / name).exists()}
    assert all(text == with_table(text, task, rewards.table(lines)) for task, lines in found.items())
    assert (docs / "rewards.svg").read_text(encoding="utf-8") == rewards.picture(found)
    text = pages[classification.PAGE.name]
    assert text == with_table(text, "table", classification.table())
    cases = json.loads((RESULTS / "lora_cut.json").read_text())["cases"]
    assert lora_cut.table(cases) in pages["serving-at-scale.md"]
    assert gguf_answers.table(json.loads((RESULTS / "gguf_answers.json").read_text())) in pages["export.md"]


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


@pytest.mark.parametrize(
    ("method", "groups"),
    [*((method, 1) for method in candidates.OF_OURS if method != "gradient-bases"), ("both-bases", 2)],
)
def test_candidates_begin_as_the_base_and_have_the_equations_that_are_said(method: str, groups: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).eval()
    tokens, before = torch.randint(0, 64, (2, 7)), {}
    for name, linear in candidates.adapted_linears(model):
        before[name] = linear.weight.clone()
    expected = model(tokens).logits
    rows = [SimpleNamespace(input_ids=row.tolist()) for row in torch.randint(0, 64, (6, 9))]
    model = candidates.adapt(model, method, 4, 0, True, lambda: rows, groups)
    torch.testing.assert_close(model(tokens).logits, expected)
    perturb(model)
    for name, weight in before.items():
        adapted = model.get_submodule(name)
        if method == "two-sided":
            wanted = (1 + adapted.qvera_b)[:, None] * weight * (1 + adapted.qvera_v)
        else:
            delta = sum(
                b[:, None] * (adapted.B[:, g::groups] @ (adapted.qvera_d[g::groups, None] * adapted.A[g::groups]))
                for g, b in enumerate(adapted.qvera_b)
            )
            wanted = weight + (delta if adapted.qvera_a is None else delta * adapted.qvera_a)
            assert (adapted.qvera_a is None) == (groups == 1)
        x = torch.randn(3, weight.shape[1])
        torch.testing.assert_close(adapted(x), torch.nn.functional.linear(x, wanted, adapted.linear.bias))
    shared = {id(module.A) for module in model.modules() if isinstance(module, candidates.Between)}
    assert len(shared) == {"two-sided": 0, "tied": 3}.get(
        method, 12
    )  # a basis for each linear, a tied pair for each shape


def test_bases_of_gradients_span_what_the_rows_would_change_first() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    tokens, trained = torch.randint(1, 64, (3, 9)), np.arange(9) > 3
    rows = [Example(row.int().numpy(), trained, "", np.zeros(0, np.int32), "", None) for row in tokens]
    weight = dict(candidates.adapted_linears(model))["model.layers.0.mlp.up_proj"].weight
    labels = tokens.where(torch.from_numpy(trained), -100)
    (gradient,) = torch.autograd.grad(model(tokens, labels=labels).loss, weight)
    adapted = candidates.adapt(model, "gradient-bases", 32, 0, False, lambda: rows, 1)
    found = adapted.get_submodule("model.layers.0.mlp.up_proj")
    A, B = (torch.nn.functional.normalize(each, dim=dim) for each, dim in ((found.A, 1), (found.B, 0)))
    expected = torch.diag(torch.linalg.svdvals(gradient))
    torch.testing.assert_close(B.T @ gradient @ A.T, expected, atol=1e-6, rtol=1e-4)
