"""A language model compares pairs of answers in both orders (MT-Bench's pairwise comparison, arXiv 2306.05685).

Judges prefer the answer that they read first, so a judge reads each pair twice. An answer wins if it is preferred both
times, as in the paper. If the two verdicts differ, the pair is a tie.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qvera.utils.errors import InputError
from qvera.utils.signals import in_threads

if TYPE_CHECKING:
    from qvera.data import Example
    from qvera.evaluation.held_out import EvalPrompt

_PLACES = re.compile(r"\{(question|reference|answer_a|answer_b)\}")
_NEEDED = ("question", "answer_a", "answer_b")
_NUMBER = r"\d+(?:\.\d+)?"
_VERDICT = re.compile(rf"\[\[\s*(?:([ABC])|({_NUMBER})\s*,\s*({_NUMBER}))\s*\]\]")


@dataclass(frozen=True)
class Pair:
    """Two answers to one request."""

    question: str
    answer: str
    other: str
    references: Sequence[str] = ()


class Verdict(NamedTuple):
    """A judge's verdict on answers A and B; ``preference`` is 1 for A, -1 for B, 0 for neither."""

    preference: int
    scores: tuple[float, float] | None = None


def read_prompt(path: Path | None = None) -> str:
    """Read what a judge is asked from a file, or our own. InputError: the file can't be read, or lacks a place."""
    try:
        text = (path or Path(__file__).with_name("judge_prompt.txt")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--judge-prompt {path}: can't be read as UTF-8 text: {error}.") from None
    found = {match[1] for match in _PLACES.finditer(text)}
    if missing := [f"{{{name}}}" for name in _NEEDED if name not in found]:
        raise InputError(
            f"--judge-prompt {path}: has no place for {', '.join(missing)}. A judge's prompt has {{question}}, "
            "{answer_a}, {answer_b} and, if you like, {reference}, and asks for a last line such as [[7, 4]] (the "
            "scores of A and B) or [[A]], [[B]] or [[C]] (a tie)."
        )
    return text


def filled(prompt: str, pair: Pair, swapped: bool) -> str:
    """Fill a pair into the places of a prompt. ``swapped``: its answer is B, and the other one is A."""
    first, second = (pair.other, pair.answer) if swapped else (pair.answer, pair.other)
    values = {"question": pair.question, "answer_a": first, "answer_b": second}
    values["reference"] = "\n\n".join(pair.references) or "(none)"
    # in one pass, so that a {place} inside an answer stays as it is
    return _PLACES.sub(lambda place: values[place[1]].strip(), prompt)


def read_verdict(reply: str) -> Verdict | None:
    """Read the last ``[[7, 4]]``, ``[[A]]``, ``[[B]]`` or ``[[C]]`` (a tie) in a reply; None without one."""
    found = list(_VERDICT.finditer(reply))
    if not found:
        return None
    letter, first, second = found[-1].groups()
    if letter:
        return Verdict({"A": 1, "B": -1, "C": 0}[letter])
    a, b = float(first), float(second)
    return Verdict((a > b) - (a < b), (a, b))


def judge_pairs(
    pairs: Sequence[Pair],
    prompt: str,
    ask: Callable[[str], str],
    at_once: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Ask a judge about each pair, in both orders. Equal answers are a tie without asking.

    Several threads call ``ask``, and an error in it ends the judging. ``progress`` takes the number of replies.

    Returns:
        One dict a pair: ``outcome``, and three lists with an entry for each order, empty for equal answers: ``scores``
        of the answer and of the other one (None: no scores), ``preferences`` (1: the answer, -1: the other one, 0:
        neither, None: no verdict), and ``replies``.
    """
    asked = [number for number, pair in enumerate(pairs) if pair.answer.strip() != pair.other.strip()]
    prompts = [filled(prompt, pairs[number], swapped) for number in asked for swapped in (False, True)]
    replies = [""] * len(prompts)
    for done, (number, reply) in enumerate(in_threads(ask, prompts, at_once), start=1):
        replies[number] = reply
        if progress is not None:
            progress(done)
    judged: list[dict[str, Any]] = [{"outcome": "tie", "scores": [], "preferences": [], "replies": []} for _ in pairs]
    # Replies alternate: as they are, swapped.
    for number, texts in zip(asked, zip(replies[::2], replies[1::2], strict=True), strict=True):
        first, second = map(read_verdict, texts)
        if second is not None:  # there the answer is B
            second = Verdict(-second.preference, None if second.scores is None else second.scores[::-1])
        preferences = [None if verdict is None else verdict.preference for verdict in (first, second)]
        known = [preference for preference in preferences if preference is not None]
        judged[number] = {
            # preferred both times, or neither time; else a tie
            "outcome": {2: "win", -2: "loss"}.get(sum(known), "tie") if len(known) == 2 else "unreadable",
            "scores": [list(verdict.scores) if verdict and verdict.scores else None for verdict in (first, second)],
            "preferences": preferences,
            "replies": list(texts),
        }
    return judged


def summary_of(judged: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count outcomes and take means over the pairs; a mean of nothing is None.

    Returns:
        ``pairs``, ``wins``, ``ties``, ``losses``, ``unreadable``; ``win_rate`` (a tie counts ½) and its standard error
        ``win_rate_error``; ``score`` and ``other_score``, the mean scores; ``consistent``, the share of asked pairs
        with the same verdict in both orders; ``first_preferred``, the share of preferences for the answer read first
        (½: no bias).
    """
    outcomes = [row["outcome"] for row in judged]
    points = [{"win": 1.0, "tie": 0.5, "loss": 0.0}[outcome] for outcome in outcomes if outcome != "unreadable"]
    readable = [row for row in judged if row["replies"] and row["outcome"] != "unreadable"]
    both = [row["preferences"] for row in readable]
    # Preferences are about the answer, which the second order has as B: there -1 is for the answer read first.
    first = [place * sign > 0 for pair in both for place, sign in zip(pair, (1, -1), strict=True) if place]
    scores = [pair for pair in chain.from_iterable(row["scores"] for row in readable) if pair is not None]

    def mean(values: Sequence[float]) -> float | None:
        return statistics.fmean(values) if values else None

    return {
        "pairs": len(judged),
        "wins": outcomes.count("win"),
        "ties": outcomes.count("tie"),
        "losses": outcomes.count("loss"),
        "unreadable": outcomes.count("unreadable"),
        "win_rate": mean(points),
        "win_rate_error": statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else None,
        "score": mean([answer for answer, _ in scores]),
        "other_score": mean([other for _, other in scores]),
        "consistent": mean([pair[0] == pair[1] for pair in both]),
        "first_preferred": mean(first),
    }


@dataclass(frozen=True)
class Judge:
    """A model on a server that compares answers, and what it compares them with."""

    ask: Callable[[str], str]  # sends a text and returns the reply
    server: str
    model: str
    against: str  # ``base``, ``reference``, or a file that ``qvera eval --predictions`` wrote
    prompt: str

    def others(self, prompts: Sequence[EvalPrompt]) -> list[str] | None:
        """Return the answers to compare with; None for the base's, which come later. InputError: one does not fit."""
        if self.against == "base":
            return None
        if self.against == "reference":
            without = [prompt.example.source for prompt in prompts if not prompt.references]
            if without:
                raise InputError(f"--judge-against reference: {without[0]} has no reference to compare with.")
            return [prompt.references[0] for prompt in prompts]
        return other_answers(Path(self.against), [prompt.example for prompt in prompts])

    def judge(
        self,
        answers: list[dict[str, Any]],
        questions: Sequence[str],
        others: Sequence[str] | None,
        show: Callable[[int, int], None],
    ) -> dict[str, Any]:
        """Ask about each answer, write ``judge`` into its row, and return who judged and the summary (`summary_of`).

        ``answers`` are rows of `qvera.evaluation.held_out.score_model`, with ``base_answer`` to compare with the base.
        ``others`` are from `others`. ``show`` takes how many replies there are, and will be.

        InputError: the server refuses.
        RunFailed: the server can't be reached, or fails.
        """
        others = [row["base_answer"] for row in answers] if others is None else others
        hides = self.against == "reference"  # the judge must not be told which of the two it is
        pairs = [
            Pair(question, row["answer"], other, () if hides else row["references"])
            for question, row, other in zip(questions, answers, others, strict=True)
        ]
        judged = judge_pairs(pairs, self.prompt, self.ask, progress=lambda done: show(done, 2 * len(pairs)))
        for row, found in zip(answers, judged, strict=True):
            row["judge"] = found
        about = {"server": self.server, "model": self.model, "against": self.against}
        return {**about, "prompt_sha256": hashlib.sha256(self.prompt.encode()).hexdigest(), **summary_of(judged)}


def other_answers(path: Path, examples: Sequence[Example]) -> list[str]:
    """Read the answers from a file of ``qvera eval --predictions``. InputError: they are to other examples."""
    where = f"--judge-against {path}"
    try:  # str.splitlines would split an answer at other characters too
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: can't be read as UTF-8 text: {error}.") from None
    if len(lines) != len(examples):
        raise InputError(
            f"{where}: has {len(lines)} answers, and there are {len(examples)} here. Evaluate both on the same rows."
        )
    found = []
    for number, (line, example) in enumerate(zip(lines, examples, strict=True), start=1):
        try:
            prompt, answer = (json.loads(line)[key] for key in ("prompt", "answer"))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{where}: line {number} is none of `qvera eval --predictions`.") from None
        if not isinstance(answer, str) or prompt != example.prompt_text:
            raise InputError(
                f"{where}: line {number} answers another prompt than {example.source}. Evaluate both on the same rows, "
                "with the same template."
            )
        found.append(answer)
    return found


def summary_text(summary: dict[str, Any], name: str) -> list[str]:
    """Describe the result in a few lines; ``name`` says who is compared."""
    sides = f"{name} against {summary['against']}"
    lines = [
        f"judge             {summary['model']}: {sides}, {summary['pairs']:,} pairs, each in both orders",
        f"wins/ties/losses  {summary['wins']:,} / {summary['ties']:,} / {summary['losses']:,}",
    ]
    if summary["win_rate"] is not None:
        error = "" if summary["win_rate_error"] is None else f" ± {summary['win_rate_error']:.3f} (standard error)"
        lines.append(f"win rate          {summary['win_rate']:.3f}{error}; a tie counts half")
    if summary["score"] is not None:
        lines.append(f"mean scores       {summary['score']:.2f} against {summary['other_score']:.2f}")
    if summary["consistent"] is not None:
        text = f"same verdict      in both orders for {summary['consistent']:.0%} of the pairs"
        if summary["first_preferred"] is not None:
            text += f"; the first answer was preferred in {summary['first_preferred']:.0%} of the verdicts"
        lines.append(text)
    if summary["unreadable"]:
        lines.append(
            f"without verdict   {summary['unreadable']:,} pairs: a reply had no [[7, 4]] or [[A]], [[B]], [[C]]"
        )
    return lines
