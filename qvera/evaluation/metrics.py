"""Text metrics, by name: scores of answers compared with their references.

``exact`` is qvera's own; the others are those of the libraries that papers use: sacrebleu (arXiv 1804.08771) for BLEU,
chrF and TER, rouge-score for ROUGE (Lin, 2004). Each keeps its library's scale: BLEU, chrF and TER from 0 to 100, the
others from 0 to 1.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from qvera.utils.errors import InputError

References = Sequence[Sequence[str]]
"""For each answer one or more texts, any of which would be right."""


def exact_match(answer: str, reference: str) -> bool:
    """Whether an answer is its reference: equal as JSON values where both are JSON, else equal up to white space."""
    try:
        return json.loads(answer) == json.loads(reference)
    except (ValueError, RecursionError):  # RecursionError: an answer of thousands of brackets
        return " ".join(answer.split()) == " ".join(reference.split())


@dataclass(frozen=True)
class TextMetric:
    """One metric.

    Attributes:
        name: as it is asked for, and the key of its scores.
        label: for people.
        top: the score of a perfect answer: 100, or 1. For TER, where lower is better, 0.
        lower_is_better: for TER only.
        of_all: answers and references to the score of the whole set. For BLEU, chrF and TER that is not the mean of the
        rows'.
        of_one: an answer and its references → that row's score.
        signature: what another person needs to get the same number.
    """

    name: str
    label: str
    top: float
    lower_is_better: bool
    of_all: Callable[[Sequence[str], References], float]
    of_one: Callable[[str, Sequence[str]], float]
    signature: Callable[[], str]


def _mean_of(one: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[str], References], float]:
    def of_all(answers: Sequence[str], references: References) -> float:
        return sum(map(one, answers, references)) / len(answers)

    return of_all


def _exact(name: str) -> TextMetric:
    def one(answer: str, references: Sequence[str]) -> float:
        return float(any(exact_match(answer, reference) for reference in references))

    return TextMetric(
        name, "Exact match", 1.0, False, _mean_of(one), one, lambda: "equal as JSON, else but for white space"
    )


def _rouge(name: str) -> TextMetric:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=False)

    def one(answer: str, references: Sequence[str]) -> float:
        return float(scorer.score_multi(list(references), answer)[name].fmeasure)

    version = importlib.metadata.version("rouge-score")
    label = f"ROUGE-{name.removeprefix('rouge')}"
    return TextMetric(
        name, label, 1.0, False, _mean_of(one), one, lambda: f"rouge-score {version}, F1, best reference, no stemming"
    )


def _sacrebleu(name: str) -> TextMetric:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    makers: dict[str, tuple[str, type, dict[str, Any]]] = {
        "bleu": ("BLEU", BLEU, {}),
        "bleu-lowercase": ("BLEU, lower case", BLEU, {"lowercase": True}),
        "chrf": ("chrF", CHRF, {}),
        "chrf++": ("chrF++", CHRF, {"word_order": 2}),
        "ter": ("TER", TER, {}),
    }
    label, kind, settings = makers[name]
    corpus = kind(**settings)
    # a single row seldom shares four words in a row; BLEU then counts only the orders that it has
    single = kind(**settings, effective_order=True) if kind is BLEU else corpus

    def of_all(answers: Sequence[str], references: References) -> float:
        most = max(map(len, references))
        # sacrebleu wants the first reference of each answer, then the second of each, ...; None where there is none
        columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
        return float(corpus.corpus_score(list(answers), columns).score)

    def of_one(answer: str, references: Sequence[str]) -> float:
        return float(single.sentence_score(answer, list(references)).score)

    lower = kind is TER
    return TextMetric(
        name, label, 0.0 if lower else 100.0, lower, of_all, of_one, lambda: f"sacrebleu {corpus.get_signature()}"
    )


_MAKERS: dict[str, tuple[Callable[[str], TextMetric], str | None]] = {
    "exact": (_exact, None),
    **dict.fromkeys(("bleu", "bleu-lowercase", "chrf", "chrf++", "ter"), (_sacrebleu, "sacrebleu")),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), (_rouge, "rouge_score")),
}
"""Name → what makes the metric, and the module that it needs."""

NAMES = tuple(_MAKERS)


def text_metrics(names: Sequence[str]) -> list[TextMetric]:
    """The metrics of these names, each once, in their order.

    Raises:
        InputError: there is no such metric, or the package that it needs is not installed.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names))
    known = {name.lower(): name for name in NAMES}
    unknown = [name for name in wanted if name.lower() not in known]
    if unknown or not wanted:
        found = f"there is no metric {unknown[0]!r}" if unknown else "names none"
        raise InputError(f"--metrics: {found}; known: {', '.join(NAMES)}.")
    wanted = list(dict.fromkeys(known[name.lower()] for name in wanted))
    for name in wanted:
        package = _MAKERS[name][1]
        if package is not None and find_spec(package) is None:
            raise InputError(
                f"--metrics: {name} needs the package {package.replace('_', '-')}, which is not installed. Install it "
                f"with: "
                "pip install 'qvera[metrics]'."
            )
    return [_MAKERS[name][0](name) for name in wanted]


def scores_of(metrics: Sequence[TextMetric], answers: Sequence[str], references: References) -> dict[str, float]:
    """Metric name → score over all rows.

    Raises:
        ValueError: no rows, not as many references as answers, or a row without one.
    """
    if not answers or len(answers) != len(references) or not all(references):
        raise ValueError(f"{len(answers)} answers and {len(references)} lists of references; need one each, none empty")
    return {metric.name: metric.of_all(answers, references) for metric in metrics}


def row_scores(metrics: Sequence[TextMetric], answer: str, references: Sequence[str]) -> dict[str, float]:
    """Metric name → score of one answer; empty where there is no reference."""
    return {metric.name: metric.of_one(answer, references) for metric in metrics} if references else {}
