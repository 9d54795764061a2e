"""What run.json says of the adapters of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvera.training.failures import has_finite_loss
from qvera.training.run_json import measurements

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.training.many.roster import AdapterRun
    from qvera.training.many.trainer import ManyTrainer

GOT_WORSE = "got worse"
"""The held-out loss is higher after training than before."""
TOO_FEW_ROWS = "too few rows"
"""Fewer rows than one optimizer step takes."""
REPEATED = "held-out rows repeat training rows"
"""Some held-out rows are, token for token, also training rows of the same adapter."""


def adapter_result(run: AdapterRun, recipe: Recipe) -> dict[str, Any]:
    """An adapter's entry in run.json. ``unfinished`` is the status of one that is still to be trained."""
    state = run.state
    flags = []
    if _got_worse(state.before, run.after):
        flags.append(GOT_WORSE)
    if len(run.rows.train) < recipe.training.global_batch_size:
        flags.append(TOO_FEW_ROWS)
    if run.rows.repeated_rows:
        flags.append(REPEATED)
    return {
        "name": run.name,
        "directory": run.directory,
        "status": run.status if run.has_left else "unfinished",
        "rows": len(run.rows.train),
        "eval_rows": len(run.rows.eval),
        "steps": state.step,
        "planned_steps": run.steps,
        "best_step": state.best_step,
        "train_loss_first": state.train_loss_first,
        "train_loss_last": state.train_loss_last,
        "eval_before": state.before,
        "eval_after": run.after,
        "flags": flags,
        **({} if run.reason is None else {"reason": run.reason}),
    }


def _got_worse(before: dict[str, Any] | None, after: dict[str, Any] | None) -> bool:
    return before is not None and after is not None and has_finite_loss(before) and after["loss"] > before["loss"]


def without_rows(name: str) -> dict[str, Any]:
    """The entry of an adapter all of whose rows were dropped or cut away."""
    empty = ("best_step", "train_loss_first", "train_loss_last", "eval_before", "eval_after")
    counts = ("rows", "eval_rows", "steps", "planned_steps")
    entry = {"name": name, "directory": None, "status": "no_rows"}
    return {**entry, **dict.fromkeys(counts, 0), **dict.fromkeys(empty), "flags": []}


def add_results(run: dict[str, Any], trainer: ManyTrainer, status: str, entries: Sequence[dict[str, Any]]) -> None:
    """Add what came out of a run to its run.json. All ranks call this together.

    Args:
        run: what `run_json.begun_run` returned.
        status: ``done``, ``interrupted`` or ``failed``.
        entries: of all adapters, in the order of the data.
    """
    rounds, seconds, tokens = zip(
        *trainer.group.gather([trainer.round, trainer.totals.seconds, trainer.totals.input_tokens]), strict=True
    )
    longest = max(seconds)
    run["status"] = status
    run["adapters"] = list(entries)
    run["result"] = {
        "rounds": max(rounds),
        "steps": sum(entry["steps"] for entry in entries),
        "planned_steps": sum(entry["planned_steps"] for entry in entries),
        "seconds": longest,
        "tokens_per_second": sum(tokens) / longest if longest else None,
        **measurements(run, trainer),
    }
    run["samples"] = []
