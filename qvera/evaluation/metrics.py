"""Scores of answers, classes and numbers.

``exact`` is our own. The other text metrics come from the libraries that papers use: sacrebleu (arXiv 1804.08771) for
BLEU, chrF and TER (0 to 100), and rouge-score for ROUGE (Lin, 2004; 0 to 1).
"""

import importlib.metadata
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from qvera.utils.errors import InputError, OwnCodeFailed, one_line, require_packages

TOP5_CLASSES = 10  # from as many on, ``top5`` is a score
References = Sequence[Sequence[str]]  # for each answer, one or more right texts


def exact_match(answer: str, reference: str) -> bool:
    """Whether two texts are equal as JSON where both are JSON, else up to white space."""
    if answer == reference:  # NaN is JSON for Python, and not equal to itself
        return True
    try:
        return _same_json(json.loads(answer), json.loads(reference))
    except (ValueError, RecursionError):  # RecursionError: an answer of thousands of brackets
        return " ".join(answer.split()) == " ".join(reference.split())


def _same_json(one: Any, other: Any) -> bool:
    """Compare two JSON values. Unlike with Python's ``==``, true is not 1 and false is not 0."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_json, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same_json(value, other[key]) for key, value in one.items())
    return bool(one == other)


@dataclass(frozen=True)
class TextMetric:
    """A metric of answers."""

    name: str
    label: str
    signature: Callable[[], str]  # what another person needs to get the same number
    of_one: Callable[[str, Sequence[str]], float]  # the score of a row
    of_all: Callable[[Sequence[str], References], float] | None = None  # None: the mean of the rows' scores
    lower_is_better: bool = False  # for TER only


def _any_exact(answer: str, references: Sequence[str]) -> float:
    return float(any(exact_match(answer, reference) for reference in references))


def _rouge(name: str) -> TextMetric:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=False)

    def one(answer: str, references: Sequence[str]) -> float:
        return float(scorer.score_multi(list(references), answer)[name].fmeasure)

    signature = f"rouge-score {importlib.metadata.version('rouge-score')}, F1, best reference, no stemming"
    return TextMetric(name, f"ROUGE-{name.removeprefix('rouge')}", lambda: signature, one)


def _sacrebleu(name: str) -> TextMetric:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    kinds: dict[str, tuple[str, type, dict[str, Any]]] = {
        "bleu": ("BLEU", BLEU, {}),
        "bleu-lowercase": ("BLEU, lower case", BLEU, {"lowercase": True}),
        "chrf": ("chrF", CHRF, {}),
        "chrf++": ("chrF++", CHRF, {"word_order": 2}),
        "ter": ("TER", TER, {}),
    }
    label, kind, settings = kinds[name]
    corpus = kind(**settings)
    # a single row seldom shares four words in a row; BLEU then counts only the orders that it has
    single = kind(**settings, effective_order=True) if kind is BLEU else corpus

    def of_all(answers: Sequence[str], references: References) -> float:
        # sacrebleu wants the first reference of each answer, then the second of each, ...; None where there is none
        return float(corpus.corpus_score(list(answers), list(zip_longest(*references))).score)

    def of_one(answer: str, references: Sequence[str]) -> float:
        return float(single.sentence_score(answer, list(references)).score)

    return TextMetric(name, label, lambda: f"sacrebleu {corpus.get_signature()}", of_one, of_all, kind is TER)


_MAKERS: dict[str, tuple[Callable[[str], TextMetric], str | None]] = {
    "exact": (
        lambda name: TextMetric(name, "Exact match", lambda: "equal as JSON, else but for white space", _any_exact),
        None,
    ),
    **dict.fromkeys(("bleu", "bleu-lowercase", "chrf", "chrf++", "ter"), (_sacrebleu, "sacrebleu")),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), (_rouge, "rouge_score")),
}
"""Name → function that makes the metric, and the module that it needs."""

NAMES = tuple(_MAKERS)


def text_metrics(names: Sequence[str]) -> list[TextMetric]:
    """The metrics of these names, each once, in this order.

    InputError: a metric is unknown, or its package is not installed.
    """
    known = {name.lower(): name for name in NAMES}
    unknown = [name for name in names if name.strip().lower() not in known]
    if unknown:
        raise InputError(f"metrics: there is no metric {unknown[0].strip()!r}; known: {', '.join(NAMES)}.")
    wanted = list(dict.fromkeys(known[name.strip().lower()] for name in names))
    for name in wanted:
        require_packages("metrics", *filter(None, _MAKERS[name][1:]), what=f"metrics: {name} ")
    return [_MAKERS[name][0](name) for name in wanted]


def scores_of(metrics: Sequence[TextMetric], answers: Sequence[str], references: References) -> dict[str, float]:
    """Map each metric's name to its score over all rows. There must be a row, and each needs a reference."""
    found = {}
    for metric in metrics:
        if metric.of_all is not None:
            found[metric.name] = metric.of_all(answers, references)
        else:
            found[metric.name] = sum(map(metric.of_one, answers, references)) / len(answers)
    return found


Metric = Callable[[Sequence[Any], Sequence[Any], Sequence[dict[str, Any]]], float]
"""A function of the caller's that makes a score of predictions, references and rows."""


def own_scores(
    metrics: Mapping[str, Metric], predictions: Sequence[Any], references: Sequence[Any], rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Score all rows by functions of the caller's; rows name their ``source``.

    OwnCodeFailed: one raises, or gives no finite number.
    """

    def attempt(function: Metric, *columns: Any) -> tuple[float, str | None]:
        try:
            value = float(function(*columns))
            return value, None if math.isfinite(value) else f"gave {value}"
        except Exception as error:
            return math.nan, f"raised {type(error).__name__} ({one_line(error)})"

    found: dict[str, float] = {}
    for name, function in metrics.items():
        found[name], problem = attempt(function, predictions, references, rows)
        if problem is not None:
            # Each row alone, to name the first one that the function can't take.
            each = zip(predictions, references, rows, strict=True)
            bad = (row["source"] for p, r, row in each if attempt(function, [p], [r], [row])[1] is not None)
            alone = f"; alone, the first that it fails on is {source}" if (source := next(bad, None)) else ""
            text = f"metrics: {name} {problem} for {len(rows)} held-out rows{alone}. Expected a finite number."
            raise OwnCodeFailed(text)
    return found


def require_scorers(task: str) -> None:
    """Raise InputError where scikit-learn or scipy is missing."""
    require_packages("classification", "sklearn", "scipy", what=f"task: {task} ")


def class_scores(targets: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Score logits [n, classes] by class numbers [n]: ``accuracy``, ``f1``, ``matthews`` and ``top5``.

    ``top5`` is there from ten classes on. ``f1`` of two classes is that of the second, else the mean. Without rows, or
    with a logit that is not finite, there are no scores, because scikit-learn refuses these.
    """
    if not len(targets) or not np.isfinite(logits).all():
        return {}
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, top_k_accuracy_score

    found, classes = logits.argmax(1), list(range(logits.shape[1]))
    average = {"average": "binary", "pos_label": 1} if len(classes) == 2 else {"average": "macro", "labels": classes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows of one label alone
        scores = {
            "accuracy": float(accuracy_score(targets, found)),
            "f1": float(f1_score(targets, found, zero_division=0, **average)),
            "matthews": float(matthews_corrcoef(targets, found)),
        }
    if len(classes) >= TOP5_CLASSES:
        scores["top5"] = float(top_k_accuracy_score(targets, logits, k=5, labels=classes))
    return scores


def value_scores(targets: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Score values, fp [n]: ``pearson`` and ``spearman``, left out where undefined (a constant side, NaN, one row)."""
    from scipy.stats import pearsonr, spearmanr

    if len(targets) < 2 or not np.isfinite(found).all():
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant side has no correlation
        scores = {"pearson": float(pearsonr(targets, found)[0]), "spearman": float(spearmanr(targets, found)[0])}
    return {name: score for name, score in scores.items() if math.isfinite(score)}
