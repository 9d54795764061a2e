"""The commands as a user meets them: outputs, exit codes, signals."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from rich.console import Console

from qvera.cli import common
from qvera.cli.main import PANELS, main
from qvera.config import plugins
from qvera.config.load import load_recipe
from qvera.data import build_datasets, decode
from qvera.models.tokenizer import load_tokenizer
from tests.cli.helpers import parse

pytestmark = pytest.mark.process


def test_train_says_what_came_of_it(write_recipe: Any, tmp_path: Path, capsys: Any) -> None:
    recipe = write_recipe(training={"output_dir": str(tmp_path / "run"), "max_steps": 3, "exact_match_rows": 2})
    assert main(["train", str(recipe), "--set", "adapter.rank=4"]) == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"{summary['adapter']['trainable_parameters']:,}" in said
    assert summary["adapter"]["rank"] == 4
    for word in ("held-out loss", "exact match", "peak memory", "tokens/s", "report.html"):
        assert word in said


@pytest.mark.parametrize("terminal", [True, False])
def test_quantize_into_the_cache_says_how_small_the_model_became(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, terminal: bool
) -> None:
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path))
    progress = io.StringIO()
    monkeypatch.setattr("qvera.cli.cache.console", Console(file=progress, force_terminal=terminal, width=100))
    assert main(["quantize", str(tiny_model_dir)]) == 0
    assert re.search(r"kB → [\d.]+ kB in .*/bases/nf4-\w+, \d+ s", capsys.readouterr().out)
    assert ("Quantizing" in progress.getvalue()) == terminal  # a bar


def test_preview_shows_what_would_be_trained(write_recipe: Any, tmp_path: Path, capsys: Any) -> None:
    recipe, page = write_recipe(), tmp_path / "page.html"
    assert main(["preview", str(recipe), "--rows", "3", "--html", str(page)]) == 0
    said, html = capsys.readouterr().out, page.read_text()
    loaded = load_recipe(recipe)
    tokenizer = load_tokenizer(loaded.model)
    datasets = build_datasets(loaded.data, tokenizer)
    marked = re.findall("<mark>(.*?)</mark>", html, flags=re.DOTALL)[1:]  # the first is the legend's
    trained = [decode(tokenizer, row.input_ids[row.trained].tolist()) for row in datasets.train[:3]]
    assert [unescape(text) for text in marked] == trained
    for row, text in zip(datasets.train[:3], trained, strict=True):
        assert row.source in said
        assert row.source in html
        assert f"⟦{text}⟧" in said
    assert datasets.train[3].source not in html
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert main(["preview", str(recipe), "--html", str(page)]) == 2
    assert "page.html: exists" in capsys.readouterr().err
    assert list(tmp_path.glob("run*")) == []


@pytest.fixture
def mixture_recipe(write_recipe: Any, tmp_path: Path) -> Path:
    """The tiny rows with the tokenizer's own template, and Alpaca rows with theirs."""
    more = tmp_path / "more.json"
    more.write_text(json.dumps([{"instruction": f"do {i}", "output": f"done {i}"} for i in range(5)]))
    mixture = [{"path": str(more), "template": "alpaca"}]
    return write_recipe(
        data={"mixture": mixture, "max_length": 256}, training={"output_dir": str(tmp_path / "run"), "max_steps": 1}
    )


def test_preview_shows_every_source_of_a_mixture(
    mixture_recipe: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    page = tmp_path / "page.html"
    assert main(["preview", str(mixture_recipe), "--rows", "2", "--html", str(page)]) == 0
    said, html = capsys.readouterr().out, unescape(page.read_text())
    for text in (said, html):
        assert "prompt-completion, template: the tokenizer's own" in text
        assert "alpaca, template: alpaca" in text
        assert "<|im_start|>user\nsay " in text
        assert "### Instruction:\ndo " in text
    assert re.search(r"⟦done \d", said)
    assert re.search(r"<mark>done \d", html)


def test_run_json_names_the_layout_of_every_source(mixture_recipe: Path, tmp_path: Path) -> None:
    assert main(["train", str(mixture_recipe)]) == 0
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    layouts = [(source["format"], source["template"]) for source in data["sources"]]
    assert layouts == [("prompt-completion", "tokenizer"), ("alpaca", "alpaca")]
    assert (data["format"], data["template"]) == ("prompt-completion, alpaca", "tokenizer, alpaca")


def test_info(trained_run: Path, capsys: Any) -> None:
    capsys.readouterr()
    for directory in (trained_run, trained_run / "adapter"):
        assert main(["info", str(directory), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["rank"] == 8
        assert facts["adapted_modules"] == 14
        # 2 layers x (out_features of the seven linears + 7 ranks)
        assert facts["trained_parameters"] == 2 * (64 + 32 + 32 + 64 + 192 + 192 + 64 + 7 * 8)
        assert re.fullmatch("[0-9a-f]{64}", facts["adapter_sha256"])
    assert main(["info", str(trained_run)]) == 0
    said = capsys.readouterr().out
    assert ", halvings none," in said
    assert re.search(r"^adapter_file_bytes +[\d.]+ kB$", said, re.MULTILINE)
    assert re.search(r"seconds [\d.]+ (s|min), .*peak_bytes [\d.]+ [MG]B", said)
    assert re.search(r"^projection_seed +0$", said, re.MULTILINE)


def test_info_takes_what_export_wrote(trained_run: Path, tmp_path: Path, capsys: Any) -> None:
    lora, merged = tmp_path / "lora", tmp_path / "merged"
    assert main(["export", str(trained_run), str(lora), "--to", "lora"]) == 0
    assert main(["export", str(trained_run), str(merged), "--no-compare"]) == 0
    capsys.readouterr()
    assert main(["info", str(lora), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["peft_type"], facts["rank"], facts["adapted_modules"]) == ("adapter", "LORA", 8, 14)
    assert main(["info", str(merged), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["base_weights"], facts["changed_weights"]) == ("merged export", "dequantized", 14)
    assert facts["weights_bytes"] == (merged / "model.safetensors").stat().st_size


def test_eval_agrees_with_the_run(trained_run: Path, tmp_path: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert main(["eval", str(trained_run), "--json", str(tmp_path / "scores.json")]) == 0
    document = json.loads((tmp_path / "scores.json").read_text())
    after = json.loads((trained_run / "run.json").read_text())["result"]["eval_after"]
    assert document["scores"]["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert len(document["answers"]) == document["scores"]["scored_rows"] == 8
    assert main(["eval", str(trained_run), "--base", "--no-generation"]) == 0
    before = json.loads((trained_run / "run.json").read_text())["result"]["eval_before"]
    assert f"{before['loss']:.4f}" in capsys.readouterr().out


def test_a_run_is_read_although_its_recipe_has_keys_without_effect(
    trained_run: Path, tmp_path: Path, capsys: Any
) -> None:
    """Earlier versions accepted them. Every command that reads a run goes on doing so; a new run is refused."""
    old = Path(shutil.copytree(trained_run, tmp_path / "old"))
    recipe = old / "recipe.yaml"
    keys = yaml.safe_load(recipe.read_text())
    keys["training"] |= {"bilevel_share": 0.4, "loss_scale_window": 9, "output_dir": str(old)}
    recipe.write_text(yaml.safe_dump(keys))
    assert main(["train", str(recipe), "--set", f"training.output_dir={tmp_path / 'new'}"]) == 2
    assert "training.bilevel_share: has no effect without training.bilevel" in capsys.readouterr().err
    lines = (
        ["info", str(old)],
        ["eval", str(old), "--no-generation"],
        ["eval", str(old / "adapter"), "--recipe", str(old), "--no-generation"],
        ["export", str(old), str(tmp_path / "lora"), "--to", "lora"],
        ["train", str(recipe), "--resume"],
    )
    for line in lines:
        assert main(line) == 0, (line, capsys.readouterr().err)


def test_generate_from_rows_and_lines(trained_run: Path, tiny_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("say red 1\n\nsay blue 22\n")
    assert main(["generate", str(trained_run), str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "a.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["prompts.txt:1", "prompts.txt:3"]
    sampled = ["--temperature", "1.0", "--seed", "7", "--max-new-tokens", "6"]
    for name in ("b", "c"):
        assert (
            main(["generate", str(trained_run), str(tiny_rows), "--out", str(tmp_path / f"{name}.jsonl"), *sampled])
            == 0
        )
    assert (tmp_path / "b.jsonl").read_text() == (tmp_path / "c.jsonl").read_text()
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 40


def test_chat_reads_messages_until_the_end(trained_run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("say red 1\n/reset\n/foo bar\nsay blue 2\n/quit\nnever read\n"))
    assert main(["chat", str(trained_run), "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr()
    assert len(said.out.strip().splitlines()) >= 1
    assert "/foo: unknown command; expected /reset or /quit." in said.err
    assert sys.stdin.read() == "never read\n"


def test_help_fits_one_screen_and_names_every_command(capsys: Any) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == said
    assert "Exit codes" in said
    assert len(said.splitlines()) <= 24
    assert max(map(len, said.splitlines())) <= 80
    commands = re.findall(r"^.{6} ([a-z-]+)  ", said, flags=re.MULTILINE)
    named = sum(map(len, PANELS.values())) + len(plugins.names("qvera.commands"))
    assert len(commands) == len(set(commands)) == 1 + named  # cache has commands of its own
    for command in commands:
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"Usage: qvera {command} " in shown
        assert f"Example: qvera {command} " in shown or command == "cache"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("trian r.yaml", "'train'"),
        ("train r.yaml --resum", "--resume"),
        ("cache list", "No such command 'list'"),
        ("train", "Missing argument 'RECIPE'"),
        ("export run out --to mergd", "merged"),
        ("chat run --top-p 0", "--top-p"),
        ("chat run --temperature -1", "--temperature"),
        ("generate run p.txt --out a --batch-size 0", "--batch-size"),
        ("generate run p.txt --out a --max-new-tokens 0", "--max-new-tokens"),
    ],
)
def test_a_mistyped_line_is_wrong_input_and_answered_in_one_paragraph(line: str, answer: str, capsys: Any) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("qvera")
    assert answer in said
    assert len(said.splitlines()) == 1


def test_weights_take_several_numbers_after_one_option() -> None:
    name, options = parse(["merge-adapters", "a", "b", "out", "--weights", "1", "-0.5", "--to", "lora"])
    assert name == "merge-adapters"
    assert (list(options["weights"]), list(map(str, options["adapters"])), str(options["out"])) == (
        [1, -0.5],
        ["a", "b"],
        "out",
    )


def test_the_help_of_the_range_test_names_its_defaults() -> None:
    from qvera.config.lr_range import LrRange

    helps = [get_args(option)[1].help for option in (common.LrFrom, common.LrTo, common.LrSteps)]
    ramp = LrRange()
    for text, value in zip(helps, (ramp.start, ramp.end, ramp.steps), strict=True):
        assert f"(default: {value:g})" in text


@pytest.mark.parametrize("is_read", [True, False], ids=["", "the reader of its log is gone"])
def test_ctrl_c_saves_and_exits_75(is_read: bool, write_recipe: Any, tmp_path: Path) -> None:
    """SIGTERM and equality to the bit after it: tests/training/test_trainer.py.

    Ctrl-C under ``2>&1 | tee LOG`` ends the tee too, and what is printed then has nowhere to go.
    """
    run = tmp_path / "run"
    settings = {"max_steps": 40, "save_steps": 50, "per_device_train_batch_size": 1, "output_dir": str(run)}
    recipe = str(write_recipe(training=settings))
    process = subprocess.Popen([sys.executable, "-m", "qvera", "train", recipe], stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    said = ""
    if not is_read:
        assert process.stderr is not None
        process.stderr.close()
        seen = len(metrics.read_text().splitlines())
        while len(metrics.read_text().splitlines()) < seen + 4:  # with a line of progress every three steps
            assert process.poll() is None
            time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    if is_read:
        _, said = process.communicate(timeout=60)
        assert "--resume goes on" in said
        assert "Traceback" not in said
    assert process.wait(timeout=60) == 75, said
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert 3 < len(metrics.read_text().splitlines()) < 40
    assert main(["train", recipe, "--resume"]) == 0
    assert len(metrics.read_text().splitlines()) == 40


def test_an_unexpected_error_is_exit_1(trained_run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvera.evaluation import run_info

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/data/out")

    monkeypatch.setattr(run_info, "directory_facts", full)
    assert main(["info", str(trained_run)]) == 1
    assert "/data/out: No space left on device" in capsys.readouterr().err


def test_a_run_with_a_relative_base_is_used_from_any_directory(
    write_recipe: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(tiny_model_dir)
    run = tmp_path / "run"
    path = write_recipe(model={"path": "models/base"}, training={"max_steps": 1, "output_dir": str(run)})
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path)]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["export", str(run), "merged"]) == 0
    assert main(["export", str(run), "lora", "--to", "lora"]) == 0
    assert main(["merge-adapters", str(run), "lora", "sum", "--to", "lora"]) == 0, capsys.readouterr().err
