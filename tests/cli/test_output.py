"""What the commands print, and where: terminals without UTF-8, full disks, logs; and what they report at once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import typer

from qvera.cli.common import LossyStream, print_json
from qvera.cli.eval import _print_scores
from qvera.cli.main import main
from qvera.cli.train import loss_line, print_result
from tests.disk import fill, small_disk

pytestmark = pytest.mark.process

Capture = pytest.CaptureFixture[str]


def test_a_terminal_without_utf8_gets_question_marks(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["info", str(trained_run)]) == 0
    assert b"base_revision         ?" in written.getvalue()


def test_a_full_disk_behind_stdout_is_an_error(
    trained_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115  # closing it fails too
    try:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info", str(trained_run)]) == 1
    finally:
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert capsys.readouterr().err == "qvera info: No space left on device\n"


def test_a_reader_that_left_is_no_error_message(
    trained_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qvera info RUN | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info", str(trained_run)]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_a_log_survives_a_slow_reader_and_a_handler_that_outlives_its_command() -> None:
    """absl's handler closes every stream that is not sys.stderr by then."""
    written: list[str] = []

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            if text == "lost":
                raise BlockingIOError
            written.append(text)
            return len(text)

    inner = Slow()
    stream = LossyStream(inner)
    for text in ("one", "lost", "two"):
        stream.write(text)
    stream.close()
    assert written == ["one", "two"]
    assert not inner.closed


def test_a_run_that_is_done_is_done_whoever_reads_its_result(
    write_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qvera train RECIPE 2>&1 | true`."""
    recipe = write_recipe(training={"max_steps": 1, "output_dir": str(tmp_path / "run")})
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, open(os.dup(writer), "w") as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        assert main(["train", str(recipe)]) == 0
        print("what Python flushes when it ends", flush=True)
        monkeypatch.undo()
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_loss_that_is_not_known_is_a_dash_at_the_end_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    """One that was not finite is null in a checkpoint, and so in a resumed run."""
    result = {"eval_before": {"loss": None}, "eval_after": {"loss": 1.25}, "tokens_per_second": None}
    result |= {"peak_bytes": 10**6, "mapped_bytes": 0}
    adapter = {"trainable_parameters": 8, "lora_r64_parameters": 64, "file_bytes": 100}
    print_result(tmp_path, {"result": result, "adapter": adapter})
    assert "held-out loss     – → 1.2500" in capsys.readouterr().out


def test_the_end_of_a_run_says_what_the_loss_did_and_what_to_do_next() -> None:
    def line(
        before: float,
        after: float,
        steps: int = 100,
        exact: float = 0.5,
        last: float = 1.0,
        commonest: float = 0.4,
        norm: float = 1.0,
        epochs: float = 3.0,
    ) -> str:
        scores = {"exact_match": exact, "exact_match_rows": 30, "commonest_reference": commonest}
        result: dict[str, Any] = {"steps": steps, "train_loss_first": 4.0, "train_loss_last": last}
        result |= {"grad_norm_last": norm, "epochs": epochs}
        result |= {"eval_before": {"loss": before}, "eval_after": {"loss": after, **scores}}
        return loss_line({"result": result}, "qvera train my.yaml")

    assert line(1.65, 0.03) == "the held-out loss fell by 98.2 %."
    find = "Look for a better rate: qvera train my.yaml --find-lr   Or add rows or steps."
    assert line(5.53, 5.5) == f"the held-out loss fell by 0.5 %, which is little. {find}"
    assert line(5.53, 4.48, exact=0) == f"the held-out loss fell by 19 %, and no held-out answer is right. {find}"
    blind = "no more held-out answers are right than if all were the commonest one"
    assert line(13.0, 0.9, exact=0.4) == f"the held-out loss fell by 93.1 %, and {blind}. {find}"
    assert line(13.0, 0.9, exact=1.0, commonest=1.0) == "the held-out loss fell by 93.1 %."
    assert line(2.0, 2.5, last=4.2) == f"the held-out loss rose by 25 %. {find}"
    assert "the rows are learnt by heart. Add rows, or take fewer steps" in line(2.0, 2.5)
    assert line(2.0, 2.5, epochs=0.5) == f"the held-out loss rose by 25 %. {find}"  # no row was seen twice
    assert line(2.0, 1.9, steps=0).startswith("no step was taken: the adapter is what it was at the start")
    dead = line(2.0, 1.8, steps=20, norm=0.0)
    assert "had no gradient: nothing is learnt any more. Try a lower rate: qvera train my.yaml --find-lr" in dead
    assert line(2.0, 2.0, steps=1) == f"the held-out loss stayed the same. {find}"
    once = {"steps": 1, "train_loss_first": 2.0, "train_loss_last": 2.0}
    assert loss_line({"result": once}, "") == "not known"
    assert "a step's loss tells nothing of rewards" in loss_line({"result": once}, "", has_rewards=True)
    assert "had no gradient" in loss_line({"result": {**once, "grad_norm_last": 0.0}}, "")
    few = line(5.53, 4.48, steps=17, exact=0)
    assert "in 17 steps, which are few. Go on: qvera train my.yaml --resume --set training.max_steps=34 " in few
    result = {"steps": 9, "train_loss_first": 2.0, "train_loss_last": 1.95, "grad_norm_last": 0.0}
    rewarded = loss_line({"result": result}, "", has_rewards=True)
    assert "a step's loss tells nothing of rewards" in rewarded and "all answers to a prompt had equal" in rewarded
    scores = {"eval_before": {"loss": -0.2}, "eval_after": {"loss": -0.9}}
    rewarded = loss_line({"result": {**result, **scores, "grad_norm_last": 1.0}}, "", has_rewards=True)
    assert rewarded == "the held-out reward went from 0.2 to 0.9."
    longer = loss_line({"result": result | {"grad_norm_last": 1.0}}, "qvera train my.yaml --set training.max_steps=9")
    assert "qvera train my.yaml --resume --set training.max_steps=18 " in longer
    result["grad_norm_last"] = 1.0
    ended = loss_line({"result": {**result, "stopped_early": True}}, "")
    for text in (ended, loss_line({"result": result}, "", fixed_length=True)):  # neither can be made longer
        assert "Go on" not in text and "Look for a better rate" in text
    entry: dict[str, Any] = {
        "eval_before": {"loss": 2.0},
        "eval_after": {"loss": 1.0},
        "train_loss_first": 2.0,
        "train_loss_last": 1.0,
    }
    assert loss_line({"result": {"steps": 60}, "adapters": [entry] * 3}, "") == "the held-out loss fell by 50 %."


def test_a_process_ends_with_the_commands_code_after_what_libraries_do_at_the_end_and_takes_no_module_apart() -> None:
    lines = [
        "import atexit, sys",
        "from qvera.__main__ import run",
        "class Late:",
        "    def __del__(self): print('apart')",
    ]
    lines += ["late, sys.argv = Late(), ['qvera', 'info', 'nowhere']", "import qvera.cli.main"]
    lines += [
        "before = qvera.cli.main.main",
        "def main():",
        "    atexit.register(print, 'done')",
        "    return before()",
    ]
    program = "\n".join([*lines, "qvera.cli.main.main = main", "sys.exit(run())"])
    ended = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "done\n")
    assert "nowhere: no such directory" in ended.stderr


def test_what_no_command_prints_ends_at_a_full_disk_too() -> None:
    command = f"{sys.executable} -m qvera --version > /dev/full"
    ended = subprocess.run(["bash", "-c", command], timeout=120, stderr=subprocess.PIPE, text=True)
    assert ended.stderr == "qvera: No space left on device\n"
    assert ended.returncode == 1


def test_ctrl_c_before_a_command_and_at_a_question_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for kind in (KeyboardInterrupt, typer.Abort):
        monkeypatch.setattr("qvera.cli.main.build_app", Mock(side_effect=kind))
        assert main(["train", "x.yaml"]) == 75
        assert capsys.readouterr().err == "qvera: interrupted. The same command begins again.\n"


def test_what_a_shell_asks_to_complete_a_line_ends_well(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"_QVERA_COMPLETE": "complete_bash", "COMP_WORDS": "qvera expo", "COMP_CWORD": "1"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert main([]) == 0
    assert capsys.readouterr().out == "export\n"


def test_a_command_whose_streams_are_closed_ends_as_any_other(trained_run: Path) -> None:
    command = f"{sys.executable} -m qvera info {shlex.quote(str(trained_run))} >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", command], timeout=120).returncode == 0


def test_json_for_other_programs_has_null_for_nan(capsys: Capture) -> None:
    print_json({"loss": [float("nan"), 1.5]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"loss": [None, 1.5]}


def test_bytes_that_are_no_utf8_are_told_in_arguments_and_read_as_a_mark_in_a_chat(
    trained_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = os.fsdecode(b"\xe9")  # as Python reads an argument
    for line in (f"preview {trained_run / 'recipe.yaml'} --set data.system={wrong}", f"init x.yaml --system {wrong}"):
        assert main(line.split()) == 2
        assert "is not UTF-8 text" in capsys.readouterr().err
    for errors in ("strict", "surrogateescape"):  # as Python reads standard input in most locales, and in C
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
        assert main(["chat", str(trained_run), "--max-new-tokens", "1"]) == 0


def test_a_bleu_of_0_says_what_compares_short_answers(capsys: Capture) -> None:
    scores: dict[str, Any] = {"base_scores": None, "subject": {"column": "Adapter"}, "metrics": []}
    for bleu, is_told in ((0.0, True), (1.5, False)):
        _print_scores({**scores, "scores": {"loss": 1.0, "bleu": bleu}})
        assert ("BLEU is 0 where no answer has four words" in capsys.readouterr().err) == is_told


def test_a_full_disk_under_a_file_is_told_with_its_name(trained_run: Path, tmp_path: Path, capsys: Capture) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        fill(disk)
        page = disk / "page.html"
        assert main(["preview", str(trained_run / "recipe.yaml"), "--html", str(page)]) == 1
        scores = disk / "scores.json"
        said = capsys.readouterr().err
        assert main(["eval", str(trained_run), "--rows", "1", "--max-new-tokens", "1", "--json", str(scores)]) == 1
        assert "perplexity" in capsys.readouterr().out, "the scores are shown, though their file can't be written"
    told = f"qvera preview: {page}: No space left on device. Make room there, and run the same command again.\n"
    assert said.endswith(told)
