"""`qvera eval --judge`: answers compared by another language model, which a server has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.cli.common import progress
from qvera.evaluation.judge import JudgePrompt, Pair, judge_pairs, summary_of
from qvera.serve.client import ServerClient, server_url
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvera.data import Example
    from qvera.evaluation.held_out import EvalPrompt

_MOST_TOKENS = 2048
"""Of a judge's reply; models that think first need more than a few sentences."""


@dataclass(frozen=True)
class Judge:
    """A model of a server that compares answers, and what they are compared with."""

    client: ServerClient
    model: str
    against: str
    """``base``, ``reference``, or a file that ``qvera eval --predictions`` wrote."""
    prompt: JudgePrompt

    @classmethod
    def of_options(
        cls, url: str | None, model: str | None, against: str | None, prompt: Path | None, no_generation: bool
    ) -> Judge | None:
        """From the options of the command line; None: nobody judges. The server is asked which models it has.

        Raises:
            InputError: options contradict each other, a file is missing, or the server has no such model.
            RunFailed: it can't be reached.
        """
        if url is None:
            given = {"--judge-model": model, "--judge-against": against, "--judge-prompt": prompt}
            if names := [name for name, value in given.items() if value is not None]:
                raise InputError(f"{names[0]}: goes with --judge URL only.")
            return None
        if no_generation:
            raise InputError("--judge: compares answers, and --no-generation asks for none; drop one of them.")
        if (address := server_url(Path(url))) is None:
            raise InputError(f"--judge {url}: takes the address of a server, such as http://127.0.0.1:8000.")
        against = against or "base"
        if against not in ("base", "reference") and not Path(against).is_file():
            raise InputError(
                f"--judge-against {against}: takes `base`, `reference`, or a file that `qvera eval --predictions` "
                "wrote, and there is no such file."
            )
        text = JudgePrompt.read(prompt)
        client = ServerClient.at(address)
        return cls(client, client.pick_judge(model), against, text)

    def others(self, prompts: Sequence[EvalPrompt]) -> list[str] | None:
        """What the answer to each prompt is compared with; None: the base's answers, which are not there yet.

        Raises:
            InputError: a prompt has nothing to compare with, or the file's answers are to other prompts.
        """
        if self.against == "base":
            return None
        if self.against == "reference":
            without = [prompt.example.source for prompt in prompts if not prompt.references]
            if without:
                raise InputError(f"--judge-against reference: {without[0]} has no reference to compare with.")
            return [prompt.references[0] for prompt in prompts]
        return _other_answers(Path(self.against), [prompt.example for prompt in prompts])

    def judge(
        self, answers: list[dict[str, Any]], questions: Sequence[str], others: Sequence[str] | None
    ) -> dict[str, Any]:
        """Ask about each answer, and write ``judge`` into its row.

        Args:
            answers: the rows of `qvera.evaluation.held_out.score_model`, with ``base_answer`` where they are compared
                with the base.
            questions: what each of them answers, as a person reads it.
            others: of `others`.

        Returns:
            `summary_of` the rows, and who judged against what.

        Raises:
            InputError: the server refuses.
            RunFailed: the server can't be reached, or fails.
        """
        others = [row["base_answer"] for row in answers] if others is None else others
        pairs = [
            Pair(question, row["answer"], other, row["references"])
            for question, row, other in zip(questions, answers, others, strict=True)
        ]
        if self.against == "reference":  # the judge must not be told which of the two it is
            pairs = [Pair(pair.question, pair.answer, pair.other) for pair in pairs]
        with progress("Judging") as show:
            judged = judge_pairs(
                pairs,
                self.prompt,
                self._ask,
                progress=lambda done: show(f"Judging: {done} of {2 * len(pairs)} replies"),
            )
        for row, found in zip(answers, judged, strict=True):
            row["judge"] = found
        about = {"server": self.client.url, "model": self.model, "against": self.against}
        return {**about, "prompt_sha256": self.prompt.sha256, **summary_of(judged)}

    def _ask(self, text: str) -> str:
        message = {"role": "user", "content": text}
        return self.client.chat(self.model, [message], temperature=0.0, max_tokens=_MOST_TOKENS)


def _other_answers(path: Path, examples: Sequence[Example]) -> list[str]:
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
    """The result in a few lines. ``name``: who is compared."""
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
