"""Scores of classes and of numbers by scikit-learn and scipy (the extra ``classification``)."""

from __future__ import annotations

import importlib.util
import math
import warnings

import numpy as np

from qvera.utils.errors import InputError


def require_packages(task: str) -> None:
    """Raises InputError, which names the task, where scikit-learn or scipy is missing."""
    for module, package in (("sklearn", "scikit-learn"), ("scipy", "scipy")):
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"task: {task} is scored by {package}, which is not installed. Run pip install 'qvera[classification]'."
            )


def class_scores(targets: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """``accuracy``; ``f1``, of two classes that of the second, else the mean over the classes; ``matthews``; ``top5``.

    The last is the share of rows whose class is among the five with the highest logits, where there are ten or more.
    Empty where there are no rows, or a logit is not finite: scikit-learn refuses these.

    Args:
        targets: the number of each row's class, int [n].
        logits: fp [n, classes].
    """
    if not len(targets) or not np.isfinite(logits).all():
        return {}
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, top_k_accuracy_score

    found, classes = logits.argmax(1), list(range(logits.shape[1]))
    average = {"average": "binary", "pos_label": 1} if len(classes) == 2 else {"average": "macro", "labels": classes}
    scores = {
        "accuracy": float(accuracy_score(targets, found)),
        "f1": float(f1_score(targets, found, zero_division=0, **average)),
        "matthews": float(matthews_corrcoef(targets, found)),
    }
    if len(classes) >= 10:
        scores["top5"] = float(top_k_accuracy_score(targets, logits, k=5, labels=classes))
    return scores


def value_scores(targets: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """``pearson`` and ``spearman`` of values fp [n]; neither where a side is constant or not finite, or of one row."""
    from scipy.stats import pearsonr, spearmanr

    if len(targets) < 2 or not np.isfinite(found).all():
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant side has no correlation
        scores = {"pearson": float(pearsonr(targets, found)[0]), "spearman": float(spearmanr(targets, found)[0])}
    return {name: score for name, score in scores.items() if math.isfinite(score)}
