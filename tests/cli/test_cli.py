"""The commands as a user meets them: outputs, exit codes, signals."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from rich.console import Console

from qvera.cli.generate import _as_row
from qvera.cli.main import PANELS, main
from qvera.config import plugins
from qvera.config.schema import load_recipe
from qvera.data import build_datasets, decode
from qvera.data.conversations import Conversation, parse_row, read_messages
from qvera.data.detect import detect_format
from qvera.data.readers import RawRow
from qvera.evaluation import generate as generation
from qvera.models.tokenizer import load_tokenizer
from tests.cli.helpers import stopped_after
from tests.disk import fill, small_disk
from tests.helpers import Terminal, wait_until

pytestmark = pytest.mark.process

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def mixture_recipe(write_recipe: Any, tmp_path: Path) -> Path:
    """The tiny rows with the tokenizer's own template, and Alpaca rows with theirs."""
    more = tmp_path / "more.json"
    more.write_text(json.dumps([{"instruction": f"do {i}", "output": f"done {i}"} for i in range(5)]))
    data = {"mixture": [{"path": str(more), "template": "alpaca"}], "max_length": 256}
    training = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "exact_match_rows": 2}
    return Path(write_recipe(data=data, training=training))


def test_train_says_what_came_of_it(mixture_recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", str(mixture_recipe), "--set", "adapter.rank=4"]) == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"{summary['adapter']['trainable_parameters']:,}" in said
    assert summary["adapter"]["rank"] == 4
    for word in ("held-out loss", "exact match", "peak memory", "tokens/s", "report.html"):
        assert word in said
    data = summary["data"]
    layouts = [(source["format"], source["template"]) for source in data["sources"]]
    assert layouts == [("prompt-completion", "tokenizer"), ("alpaca", "alpaca")]
    assert (data["format"], data["template"]) == ("prompt-completion, alpaca", "tokenizer, alpaca")


def test_quantize_into_the_cache_says_how_small_the_model_became(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path))
    progress = io.StringIO()
    monkeypatch.setattr("qvera.cli.common.console", Console(file=progress, force_terminal=True, width=400))
    assert main(["quantize", str(tiny_model_dir)]) == 0
    assert re.search(r"kB → [\d.]+ kB in .*/bases/nf4-\w+, \d+ s", capsys.readouterr().out)
    assert f"quantizing {tiny_model_dir}" in progress.getvalue()  # a bar


def test_preview_shows_what_would_be_trained_of_every_source(
    mixture_recipe: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    page = tmp_path / "page.html"
    assert main(["preview", str(mixture_recipe), "--rows", "2", "--html", str(page)]) == 0
    said, html = capsys.readouterr().out, page.read_text()
    for text in (said, unescape(html)):
        assert "prompt-completion, template: the tokenizer's own" in text
        assert "alpaca, template: alpaca" in text
        assert "<|im_start|>user\nsay " in text
        assert "### Instruction:\ndo " in text
    recipe = load_recipe(mixture_recipe)
    tokenizer = load_tokenizer(recipe.model)
    rows = list(build_datasets(recipe.data, tokenizer).train)
    shown = [next(row for row in rows if file in row.source) for file in ("rows.jsonl", "more.json")]
    trained = [decode(tokenizer, row.input_ids[row.trained].tolist()) for row in shown]
    marked = re.findall("<mark>(.*?)</mark>", html, flags=re.DOTALL)[1:]  # the first is the legend's
    assert [unescape(text) for text in marked] == trained
    for row, text in zip(shown, trained, strict=True):
        assert row.source in said and row.source in html
        assert f"⟦{text}⟧" in said
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert main(["preview", str(mixture_recipe), "--html", str(page)]) == 2
    assert "page.html: exists" in capsys.readouterr().err
    assert list(tmp_path.glob("run*")) == []


def test_info_of_runs_adapters_and_exports(trained_run: Path, tmp_path: Path, capsys: Capture) -> None:
    def facts_of(directory: Path) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["info", str(directory), "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    for directory in (trained_run, trained_run / "adapter"):
        facts = facts_of(directory)
        assert (facts["rank"], facts["adapted_modules"]) == (8, 14)
        # 2 layers x (out_features of the seven linears + 7 ranks)
        assert facts["trained_parameters"] == 2 * (64 + 32 + 32 + 64 + 192 + 192 + 64 + 7 * 8)
        assert re.fullmatch("[0-9a-f]{64}", facts["adapter_sha256"])
    assert main(["info", str(trained_run)]) == 0
    said = capsys.readouterr().out
    assert ", halvings none," in said
    assert re.search(r"^adapter_file_bytes +[\d.]+ kB$", said, re.MULTILINE)
    assert re.search(r"seconds [\d.]+ (s|min), .*peak_bytes [\d.]+ [MG]B", said)
    assert re.search(r"^projection_seed +0$", said, re.MULTILINE)

    lora, merged = tmp_path / "lora", tmp_path / "merged"
    assert main(["export", str(trained_run), str(lora), "--to", "lora"]) == 0
    facts = facts_of(lora)
    assert (facts["kind"], facts["peft_type"], facts["rank"], facts["adapted_modules"]) == ("adapter", "LORA", 8, 14)
    assert main(["export", str(trained_run), str(merged), "--no-compare"]) == 0
    facts = facts_of(merged)
    assert (facts["kind"], facts["base_weights"], facts["changed_weights"]) == ("merged export", "dequantized", 14)
    assert facts["weights_bytes"] == (merged / "model.safetensors").stat().st_size


def test_a_run_is_read_although_its_recipe_has_keys_without_effect_or_a_removed_one(
    trained_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Earlier versions accepted them. Every command that reads a run goes on doing so; a new run is refused."""
    old = Path(shutil.copytree(trained_run, tmp_path / "old"))
    recipe = old / "recipe.yaml"
    keys = yaml.safe_load(recipe.read_text())
    keys["training"]["output_dir"] = str(old)
    for key, value, problem in (
        ("bilevel_share", 0.4, "has no effect without training.bilevel"),
        ("loss_scale_window", 9, "is not a key here: remove it"),
    ):
        keys["training"][key] = value
        recipe.write_text(yaml.safe_dump(keys))
        assert main(["train", str(recipe), "--set", f"training.output_dir={tmp_path / 'new'}"]) == 2
        assert f"training.{key}: {problem}" in capsys.readouterr().err
    by_recipe = f"eval {old / 'adapter'} --recipe {old} --no-generation"
    for line in (f"info {old}", by_recipe, f"export {old} {tmp_path / 'lora'} --to lora", f"train {recipe} --resume"):
        assert main(line.split()) == 0, (line, capsys.readouterr().err)


def test_generate_from_rows_and_lines(trained_run: Path, tiny_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("say red 1\n\nsay blue 22\n")
    (tmp_path / "rows.jsonl").write_text("".join(tiny_rows.read_text().splitlines(keepends=True)[:9]))

    def written(prompts: str, *options: str) -> list[dict[str, Any]]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        line = ["generate", str(trained_run), str(tmp_path / prompts), "--out", str(out), "--max-new-tokens", "6"]
        assert main([*line, *options]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    assert [line["source"] for line in written("prompts.txt")] == ["prompts.txt:1", "prompts.txt:3"]
    first, again = (written("rows.jsonl", "--temperature", "1.0", "--seed", "7") for _ in range(2))
    assert first == again and len(first) == 9
    # a conversation keeps the turns before the last one, and the line is a row to train on
    asked = [{"role": "system", "content": "Say it twice."}, {"role": "user", "content": "say red 1"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": asked}) + "\n")
    (line,) = written("chat.jsonl", "--system", "Say it once.")  # which is for prompts without one
    assert line["prompt"] == asked
    assert written("prompts.txt", "--system", "Say it twice.")[0]["prompt"] == asked
    expected = [*(tuple(turn.values()) for turn in asked), ("assistant", line["answer"])]
    assert [(turn.role, turn.content) for turn in _trained(line).turns] == expected


def _trained(line: dict[str, Any]) -> Conversation:
    """An output line as a row to train on."""
    row = RawRow(line, "next.jsonl:1")
    parsed = parse_row(row, detect_format(row, columns={"completion": "answer"}))
    assert isinstance(parsed, Conversation)
    return parsed


def test_an_answered_prompt_keeps_its_images_and_tools(tmp_path: Path) -> None:
    """As a row to train on, else it would be learnt without what it is about."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": str(tmp_path / "a.png")}]
    parts += [{"type": "text", "text": "which, "}, {"type": "image", "bytes": b"not read before it is trained"}]
    turns = read_messages([{"role": "user", "content": parts}], "a test")
    tools = [{"type": "function", "function": {"name": "look"}}]
    line = json.loads(json.dumps(_as_row(Conversation(turns, "a test", tools)) | {"answer": "a"}))
    found = _trained(line)
    assert found.tools == tools
    assert (found.turns[0].images, found.turns[0].parts) == (turns[0].images, turns[0].parts)


def test_answers_are_kept_and_the_same_command_goes_on_from_them(
    trained_run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out, kept = tmp_path / "p.txt", tmp_path / "a.jsonl", tmp_path / ".a.jsonl.unfinished"
    prompts.write_text("".join(f"say red {n}\n" for n in range(6)))
    line = ["generate", str(trained_run), str(prompts), "--max-new-tokens", "4", "--batch-size", "2", "--out"]
    assert main([*line, str(tmp_path / "whole.jsonl")]) == 0
    with monkeypatch.context() as patch:
        stopped_after(0, KeyboardInterrupt(), patch)
        assert main([*line, str(out)]) == 75
        assert "qvera generate: interrupted. The same command begins again." in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stopped_after(3, KeyboardInterrupt(), patch)
        assert main([*line, str(out)]) == 75
    assert f"3 of 6 answers are in {kept}: the same command goes on." in capsys.readouterr().err
    lock = FileLock(tmp_path / ".a.jsonl.lock", thread_local=False)
    other = threading.Thread(target=lock.acquire)  # as another process: filelock refuses to wait for its own thread
    other.start()
    other.join()
    assert main([*line, str(out)]) == 2
    lock.release()
    assert "a.jsonl: another process answers into it. Wait for it" in capsys.readouterr().err
    kept.write_bytes(kept.read_bytes() + b'[5, "cut of')  # as a kill in the middle of a write leaves it
    assert main([*line, str(out), "--seed", "1"]) == 2
    assert "holds answers to other prompts, or by another model or other settings" in capsys.readouterr().err
    asked: list[str] = []
    write = generation.PromptWriter.ids
    monkeypatch.setattr(
        generation.PromptWriter, "ids", lambda self, turns, *more: asked.append("") or write(self, turns, *more)
    )
    assert main([*line, str(out)]) == 0
    assert len(asked) == 3
    assert "3 of 6 answers are in" in capsys.readouterr().err
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not list(tmp_path.glob(".a.jsonl.*")), "nothing is left of what was kept, nor of the lock"


def test_answers_on_a_full_disk_are_kept_and_the_message_says_where(
    trained_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    prompts, long = tmp_path / "p.txt", "red " * 40
    prompts.write_text("".join(f"say {long}{n}\n" for n in range(24)))
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        out, kept = disk / "a.jsonl", disk / ".a.jsonl.unfinished"
        line = ["generate", str(trained_run), str(prompts), "--max-new-tokens", "2", "--out", str(out)]
        filler = fill(disk, leave_bytes=4096)
        assert main(line) == 1
        said = capsys.readouterr().err
        assert f"qvera generate: {out}: the disk is full. 24 of 24 answers are in {kept}: make room, and" in said
        assert kept.exists() and not out.exists()
        filler.unlink()
        assert main(line) == 0
        assert len(out.read_text().splitlines()) == 24 and not kept.exists()


def test_chat_reads_messages_until_the_end(trained_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("say red 1\n/reset\n/foo bar\nsay blue 2\n/quit\nnever read\n"))
    assert main(["chat", str(trained_run), "--max-new-tokens", "4", "--seed", str(2**64 - 1)]) == 0
    said = capsys.readouterr()
    assert said.out.strip()
    assert "/foo: unknown command; expected /reset or /quit." in said.err
    assert sys.stdin.read() == "never read\n"


def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_conversation(
    trained_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = generation.generate, []

    def stopped_once(*args: Any, **settings: Any) -> list[str]:
        seen.append(len(args[2][0]))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(generation, "generate", stopped_once)
    monkeypatch.setattr(sys, "stdin", Terminal("say red 1\nsay red 2\nsay red 3\n/quit\n"))
    assert main(["chat", str(trained_run), "--max-new-tokens", "4"]) == 0
    assert "Stopped: this message and its answer are forgotten." in capsys.readouterr().err
    assert seen[0] < seen[1] == seen[2]  # the first message and its answer are kept


def test_help_fits_one_screen_and_names_every_command(capsys: Capture) -> None:
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


MISTYPED = {
    "trian r.yaml": "'train'",
    "train r.yaml --resum": "--resume",
    "train r.yaml --epochs 3": "A key of the recipe goes to --set, as in --set training.num_train_epochs=3.",
    "report run": "`qvera train` writes report.html into each run, and `qvera ui` shows runs.",
    "ls runs": "No such command 'ls'. `qvera ui` shows runs, `qvera info` one of them.",
    "cache list": "No such command 'list'",
    "train": "Missing argument 'RECIPE'",
    "export run out --to mergd": "merged",
    "chat run --top-p 0": "--top-p",
    "chat run --temperature -1": "--temperature",
    "generate run p.txt --temperature 70": "less than or equal to 2",
    "generate run p.txt --out a --batch-size 0": "--batch-size",
    "generate run p.txt --out a --max-new-tokens 0": "--max-new-tokens",
}


@pytest.mark.parametrize("line", MISTYPED)
def test_a_mistyped_line_is_wrong_input_and_answered_in_one_paragraph(line: str, capsys: Capture) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("qvera") and MISTYPED[line] in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("is_read", [True, False], ids=["", "the reader of its log is gone"])
def test_ctrl_c_saves_and_exits_75(
    is_read: bool, write_recipe: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM and equality to the bit after it: tests/training/test_trainer.py.

    Ctrl-C under ``2>&1 | tee LOG`` ends the tee too, and what is printed then has nowhere to go.
    """
    run = tmp_path / "run"
    training = {"max_steps": 16, "save_steps": 50, "per_device_train_batch_size": 1, "global_batch_size": 4}
    recipe = str(write_recipe(training={**training, "output_dir": str(run)}))
    metrics = run / "metrics.jsonl"

    def steps() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def press() -> None:
        wait_until(lambda: steps() > 3)  # there is a line of progress every two steps
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press, daemon=True)
    pressing.start()
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody, monkeypatch.context() as patch:
        if not is_read:
            patch.setattr(sys, "stderr", nobody)
        assert main(["train", recipe]) == 75
    pressing.join()
    assert not is_read or "The same command goes on" in capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert 3 < steps() < 16
    assert main(["train", recipe, "--resume"]) == 0
    assert steps() == 16


def test_an_unexpected_error_is_exit_1(trained_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvera.evaluation import run_info

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/data/out")

    monkeypatch.setattr(run_info, "directory_facts", full)
    assert main(["info", str(trained_run)]) == 1
    assert "/data/out: No space left on device" in capsys.readouterr().err


def test_a_run_with_a_relative_base_is_used_from_any_directory(
    write_recipe: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(tiny_model_dir)
    run = tmp_path / "run"
    path = write_recipe(model={"path": "models/base"}, training={"max_steps": 1, "output_dir": str(run)})
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path)]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for line in (f"export {run} merged", f"export {run} lora --to lora", f"merge-adapters {run} lora sum --to lora"):
        assert main(line.split()) == 0, (line, capsys.readouterr().err)
