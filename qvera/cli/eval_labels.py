"""`qvera eval` of a classifier: the scores of its labels, and what it says of each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qvera.cli.common import console, progress
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.config.schema import DataSection
    from qvera.evaluation.load import Artifact

TITLES = {
    "accuracy": "Accuracy",
    "top5": "Top 5",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}


def refuse_options(target: Artifact, **given: bool) -> None:
    """Refuse options (by name, and whether it was given) that a classifier has no answer to.

    Raises:
        InputError: the base alone is asked for, or what is for text.
    """
    for name in ("base", "with_base"):
        if given.pop(name):
            raise InputError(
                f"--{name.replace('_', '-')}: {target.path} is a classifier, and its base has no head that was trained "
                "for these labels. Leave it out; run.json has the scores from before training."
            )
    if asked := [f"--{name.replace('_', '-')}" for name, is_given in given.items() if is_given]:
        raise InputError(f"{asked[0]}: is for models that write text, and {target.path} is a classifier. Leave it out.")


def evaluate_labels(target: Artifact, section: DataSection, all_rows: bool, limit: int | None) -> dict[str, Any]:
    """Score a classifier.

    Args:
        target: what is evaluated.
        section: where its rows come from.
        all_rows: score all rows of ``section``, not only those that are held out.
        limit: only so many of them.

    Returns:
        ``scores``; ``metrics``, how they were computed; ``answers``, a prediction for each row; ``inputs_sha256``.
    """
    from importlib import metadata

    from qvera.data import build_datasets, lengths_of
    from qvera.evaluation.class_metrics import require_packages
    from qvera.evaluation.held_out import scoring
    from qvera.evaluation.load import open_target
    from qvera.evaluation.named_adapters import require_held_out_rows
    from qvera.evaluation.report.read import inputs_sha256
    from qvera.models.positions import require_positions
    from qvera.tasks import classification_of
    from qvera.tasks.classification import label_scores, predictions

    task = classification_of(target.model_class)
    require_packages(task.name)
    section = section.replace(format=task.row_format)  # an adapter alone has no recipe that says it
    with progress(f"Loading {target.path}"):
        opened = open_target(target)
    labels = opened.labels
    datasets = build_datasets(section, opened.base.tokenizer, console, labels=labels)
    rows = (datasets.train if all_rows else require_held_out_rows(datasets, target.name))[:limit]
    require_positions(opened.model, lengths_of(rows))
    batch_size = target.recipe.training.per_device_eval_batch_size if target.recipe else 4
    with progress("Scoring") as show, scoring(opened.model):
        logits = task.held_out_logits(
            opened.model,
            rows,
            datasets.pad_id,
            batch_size,
            progress=lambda done: show(f"Scoring, {done} of {len(rows)} rows"),
        )
    scores = label_scores(logits, rows, labels)
    del scores["trained_tokens"]
    package = "scipy" if labels.is_regression else "scikit-learn"
    signature = f"{package} {metadata.version(package)}"
    return {
        "scores": {**scores, "scored_rows": len(rows)},
        "metrics": [
            {"name": name, "label": title, "signature": signature, "lower_is_better": False}
            for name, title in TITLES.items()
            if name in scores
        ],
        "answers": predictions(logits, rows, labels),
        "inputs_sha256": inputs_sha256([{"prompt": row.prompt_text, "references": [row.reference]} for row in rows]),
    }
