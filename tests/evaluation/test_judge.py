"""`qvera eval --judge`: pairs of answers, each read in both orders, scored by a server's model."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvera.cli.main import main
from qvera.data import Example
from qvera.evaluation.judge import Pair, filled, judge_pairs, other_answers, read_prompt, read_verdict, summary_of
from qvera.tasks import evaluate
from qvera.utils.errors import InputError, RunFailed
from tests.evaluation.judges import serving

PROMPT = "Q {question} R {reference} A <a>{answer_a}</a> B <b>{answer_b}</b>"


def longest_wins(prompt: str) -> str:
    found = re.search(r"<a>(.*)</a> B <b>(.*)</b>", prompt, re.DOTALL)
    assert found is not None
    return f"[[A]] would be too quick. [[{len(found[1])}, {len(found[2])}]]"


def first_wins(_: str) -> str:
    return "The first one. [[A]]"


def judged_by(replies: list[str], pairs: int = 1) -> list[dict[str, Any]]:
    """Pairs judged by a judge that gives these replies."""
    left = iter(replies)
    return judge_pairs([Pair("q", "one", "two")] * pairs, PROMPT, lambda _: next(left), at_once=1)


@pytest.mark.parametrize(
    ("reply", "preference", "scores"),
    [
        ("Both are fine.\n[[7, 4]]", 1, (7.0, 4.0)),
        ("[[9, 1]] at first sight, but: [[ 3.5,6 ]]", -1, (3.5, 6.0)),
        ("Even. [[5, 5]]", 0, (5.0, 5.0)),
        ("[[A]]", 1, None),
        ("[[B]]", -1, None),
        ("[[C]]", 0, None),
    ],
)
def test_the_last_verdict_of_a_reply_counts(reply: str, preference: int, scores: tuple[float, float] | None) -> None:
    verdict = read_verdict(reply)
    assert verdict is not None
    assert (verdict.preference, verdict.scores) == (preference, scores)


def test_a_reply_without_a_verdict_is_none_and_its_pair_has_no_part_in_the_mean_scores() -> None:
    for reply in ("", "A is better", "[7, 4]", "[[7]]", "[[D]]", "[[-1, 4]]"):
        assert read_verdict(reply) is None
    judged = judged_by(["[[9, 1]]", "who knows", "[[3, 4]]", "[[4, 3]]"], pairs=2)
    assert judged[0]["outcome"] == "unreadable"
    found = summary_of(judged)
    assert (found["unreadable"], found["score"], found["other_score"]) == (1, 3.0, 4.0)


def test_an_answer_wins_where_it_is_preferred_in_both_orders() -> None:
    pairs = [Pair("q", "long answer", "short"), Pair("q", "no", "longer"), Pair("q", "same", "also")]
    judged = judge_pairs(pairs, PROMPT, longest_wins)
    assert [row["outcome"] for row in judged] == ["win", "loss", "tie"]
    assert judged[0]["scores"] == [[11.0, 5.0], [11.0, 5.0]]
    found = summary_of(judged)
    assert (found["win_rate"], found["consistent"], found["first_preferred"]) == (0.5, 1.0, 0.5)
    assert (found["score"], found["other_score"]) == pytest.approx(((11 + 2 + 4) / 3, (5 + 6 + 4) / 3))
    # a judge that always prefers the first answer makes ties and is found out
    found = summary_of(judge_pairs(pairs, PROMPT, first_wins))
    assert (found["ties"], found["win_rate"], found["consistent"], found["first_preferred"]) == (3, 0.5, 0.0, 1.0)
    assert found["score"] is None


def test_nobody_is_asked_about_equal_answers() -> None:
    judged = judge_pairs([Pair("q", "same ", " same")], PROMPT, lambda _: pytest.fail("was asked"))
    assert judged[0]["outcome"] == "tie"
    assert summary_of(judged)["consistent"] is None


def test_an_error_ends_the_judging() -> None:
    asked = []

    def fails(prompt: str) -> str:
        asked.append(prompt)
        time.sleep(0.05 if len(asked) > 1 else 0)  # as a server would: the other requests are cancelled meanwhile
        raise RunFailed("gone")

    with pytest.raises(RunFailed, match="gone"):
        judge_pairs([Pair("q", str(n), "x") for n in range(100)], PROMPT, fails, at_once=1)
    assert len(asked) < 200


def test_a_prompt_has_its_places_and_none_in_what_an_answer_contains(tmp_path: Path) -> None:
    pair = Pair("{answer_b}", "{question}", "{x} {reference}", ["right", "also"])
    text = filled(PROMPT, pair, swapped=True)
    assert text == "Q {answer_b} R right\n\nalso A <a>{x} {reference}</a> B <b>{question}</b>"
    (tmp_path / "p.txt").write_text("{question} {answer_a}")
    with pytest.raises(InputError, match=r"has no place for \{answer_b\}"):
        read_prompt(tmp_path / "p.txt")
    places = set(re.findall(r"\{\w+\}", read_prompt()))
    assert {"{question}", "{answer_a}", "{answer_b}", "{reference}"} <= places


@pytest.mark.process
def test_eval_has_a_server_judge_the_answers(
    trained_run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_file = tmp_path / "judge.txt"
    prompt_file.write_text(PROMPT)
    files = [tmp_path / name for name in ("scores.json", "page.html", "answers.jsonl")]
    with serving(longest_wins) as server:
        ask = ["eval", str(trained_run), "--max-new-tokens", "4", "--judge", server.url]
        written = ["--json", str(files[0]), "--html", str(files[1]), "--predictions", str(files[2])]
        assert main([*ask, "--judge-against", "reference", "--judge-prompt", str(prompt_file), *written]) == 0
        bodies = list(server.bodies)
        assert main([*ask, "--judge-against", str(files[2]), "--json", str(tmp_path / "again.json")]) == 0
        assert main([*ask, "--json", str(tmp_path / "base.json")]) == 0
        short = tmp_path / "short.jsonl"
        short.write_text(files[2].read_text().partition("\n")[0] + "\n")
        monkeypatch.setattr(evaluate, "score_model", lambda *_, **__: pytest.fail("nothing is answered in vain"))
        assert main([*ask, "--judge-against", str(short)]) == 2
    document, again, base = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("scores", "again", "base"))
    rows, summary = document["answers"], document["judge"]
    points = {1: "win", 0: "tie", -1: "loss"}
    for row in rows:
        mine, other = len(row["answer"].strip()), len(row["references"][0].strip())
        assert row["judge"]["outcome"] == points[(mine > other) - (mine < other)]
    assert len(bodies) == 2 * len(rows)
    assert summary["pairs"] == len(rows) == summary["wins"] + summary["ties"] + summary["losses"]
    assert {(body["model"], body["temperature"]) for body in bodies} == {("judge", 0.0)}
    question = bodies[0]["messages"][0]["content"]
    assert "<|im_start|>" in rows[0]["prompt"]
    assert "<|im_start|>" not in question
    assert "R (none) " in question, "the judge must not be told which answer is the reference"
    assert "win rate" in capsys.readouterr().out
    assert "Wins, ties, losses" in files[1].read_text()
    assert again["judge"]["ties"] == len(rows), "against its own answers"
    assert base["judge"]["against"] == "base"
    assert "base_answer" in base["answers"][0]


@pytest.mark.process
def test_a_judge_that_fails_or_is_stopped_costs_no_answers(
    trained_run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: str) -> str:
        raise RunFailed("out of credit")

    with serving(fails) as server:
        line = ["eval", str(trained_run), "--judge", server.url, "--judge-against", "reference"]
        assert main([*line, "--max-new-tokens", "2", "--json", str(tmp_path / "scores.json")]) == 1
    assert "out of credit" in capsys.readouterr().err
    document = json.loads((tmp_path / "scores.json").read_text())
    assert document["answers"]
    assert document["judge"] is None

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qvera.evaluation.judge.judge_pairs", stops)
    with serving(longest_wins) as server:
        line[3] = server.url
        assert main([*line, "--max-new-tokens", "2", "--json", str(tmp_path / "stopped.json")]) == 75
    assert json.loads((tmp_path / "stopped.json").read_text())["answers"] == document["answers"]


def test_wrong_options_are_said_before_anything_is_loaded(tmp_path: Path, capsys: Any) -> None:
    with serving(first_wins, "one", "two") as server:
        for options, said in (
            (["--judge-model", "x"], "--judge-model: goes with --judge URL only"),
            (["--judge", "runs/judge"], "takes the address of a server"),
            (["--judge", server.url], "has 2 models. Name one with --judge-model: one, two"),
            (
                ["--judge", server.url, "--judge-model", "onr"],
                "has no model onr; did you mean 'one'? There are",
            ),
            (["--judge", server.url, "--no-generation"], "--judge: compares answers"),
            (["--judge", server.url, "--judge-against", str(tmp_path / "no.jsonl")], "there is no such file"),
            (["--judge", server.url, "--judge-prompt", str(tmp_path / "no.txt")], "can't be read as UTF-8 text"),
            (["--judge", server.url, "--judge-model", "one", "--base"], "--base asks for it; add --judge-against"),
        ):
            assert main(["eval", str(tmp_path), *options]) == 2, options
            assert said in " ".join(capsys.readouterr().err.split()), options


def test_answers_of_another_run_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    nothing = np.zeros(0, np.int32)
    rows = [Example(nothing, nothing.astype(bool), "rows.jsonl:1", nothing, "a\u2028b", None)]
    file = tmp_path / "answers.jsonl"
    row = {"prompt": "a\u2028b", "answer": "x\x85y"}  # with line separators in them
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert other_answers(file, rows) == ["x\x85y"]
    for content, said in (
        (b'{"prompt": "b", "answer": "y"}\n', "line 1 answers another prompt than rows.jsonl:1"),
        (b"[]\n", "line 1 is none of"),
        (b"", "has 0 answers, and there are 1 here"),
        (b"\xff\n", "can't be read as UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=said):
            other_answers(file, rows)
