"""Adapters that come and go, trained together on a base that answers requests meanwhile.

Unlike in `many.ManyTrainer`, each adapter has a recipe and rows of its own, and may begin, end, be saved or go on at
any time. The loop is the same (`bank_loop.BankLoop`). `run_slice` does one slice of it: a forward and backward pass, an
optimizer step, or a pass over held-out rows, for which the model is lent (`lent_bank.LentBank`). Between two slices it
belongs to whoever answers.

**Memory.** ``gradient_checkpointing: auto`` is true here, on a base that can recompute its layers. Where memory runs
out, the round begins again with half as many rows in a pass. If a single row does not fit, its job ends with the
reason, and the others go on with as many rows as at first.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qvera.adapters.methods import check_recipe, method_of
from qvera.adapters.products.slots import PATHS
from qvera.adapters.projection import forget_inputs
from qvera.adapters.save_load import save_adapter
from qvera.config.schema import Recipe
from qvera.data import AdapterRows, Datasets, data_sha256, planned_steps
from qvera.models.loader import Base
from qvera.training.bank_loop import BankLoop
from qvera.training.checkpoint import TrainState, read_state, write_state
from qvera.training.lent_bank import LentBank, require_trainable_base
from qvera.training.loop import Records
from qvera.training.roster import AdapterRun, Roster
from qvera.training.run_dir import changed_keys
from qvera.utils.errors import InputError

ADAPTER = "__training__"  # PEFT's name of the adapter that stands for all that are trained
_HARMLESS = ("training.on_oom", "training.exact_match_rows")  # keys of a recipe that nothing here reads
_SHARED = (
    *("weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "loss_chunk_tokens"),
    "label_smoothing",
)
"""Keys of ``training`` that all jobs share, besides ``adapter``."""


class OnlineTrainer:
    """Trains adapters on a base that answers requests meanwhile.

    Methods are called in the thread that runs the model, unless they say otherwise. ``recipe`` says the adapter's
    shape, the optimizer and the rows of a pass, for all. Epochs, rows of a step, learning rate, order and evaluations
    are those of each job's own recipe.
    """

    loop: BankLoop  # from the first `begin` on

    def __init__(self, base: Base, recipe: Recipe, slots: int) -> None:
        """Check that it can be done (else InputError); nothing is changed yet. May be called from any thread."""
        if slots < 1:
            raise InputError(f"adapters trained at once: expected at least 1, got {slots}.")
        require_trainable(base, recipe)
        self.recipe, self.slots, self._base = recipe, slots, base
        self._roster = Roster((), slots, None)
        self._numbers = itertools.count()
        self._lent: LentBank | None = None
        self._work: Iterator[Records] | None = None

    @property
    def in_flight(self) -> list[AdapterRun]:
        """The jobs that have a slot, in the order in which they began. One that has ended stays until `end`."""
        return self._roster.in_flight

    @property
    def free_slots(self) -> int:
        """The number of adapters that may begin."""
        return self._roster.free_slots

    @property
    def has_work(self) -> bool:
        """Whether `run_slice` has anything to do. May be called from any thread."""
        return any(not run.has_ended for run in list(self.in_flight))

    def prepare(self, id: str, recipe: Recipe, datasets: Datasets) -> AdapterRun:
        """Make a job for `begin`; ``id`` is for records. May be called from any thread.

        InputError where there are no rows, or the recipe differs from the server's in what all jobs share.
        """
        shared = {f"training.{key}" for key in _SHARED}
        changed = changed_keys(self.recipe.to_dict(), recipe)
        if other := [key for key in changed if key.startswith("adapter.") or key in shared]:
            raise InputError(f"{id}: {', '.join(other)} differ from the server's recipe, which all jobs share.")
        if datasets.adapters or datasets.train.part_of is not None:
            raise InputError(f"{id}: its rows are of several adapters or tasks; a job trains one adapter on all rows.")
        rows, held_out = len(datasets.train), len(datasets.eval)
        if not rows:
            raise InputError(f"{id}: no row is left to train on. Raise data.max_length, or give other rows.")
        numbers = AdapterRows(id, np.arange(rows), np.arange(held_out), datasets.stats.repeated_rows)
        step_rows = min(recipe.training.global_batch_size, rows)
        return AdapterRun(next(self._numbers), numbers, id, planned_steps(recipe, rows), step_rows, recipe, datasets)

    def begin(self, run: AdapterRun, saved: Path | None = None) -> None:
        """Give a job a slot; it takes its first step in the next round.

        The first call puts the trained adapter on the model, which takes as long as the first request for an adapter.
        ``saved``: a file of `save` to go on from; InputError where it is damaged or of another job.
        """
        if run.slot is not None or not self.free_slots:
            raise ValueError(f"{run.name}: " + ("is in flight" if run.slot is not None else "there is no free slot"))
        # all that may fail comes before the job takes a slot
        kept = None if saved is None else _read_job(saved, run, self._base)
        if self._lent is None:
            self._attach(run.datasets.pad_id)
        run.state, run.best, run.after, run.reason = TrainState(), None, None, None
        self._roster.enter(run)
        try:
            self.loop.begin(run)
            if kept is not None:
                self._put_back(run, *kept)
        except BaseException:
            self._roster.leave(run, "waiting")
            raise

    def run_slice(self) -> list[dict[str, Any]]:
        """Do the next slice of the work: one pass, or the step of a round.

        Returns records (mostly none) of kind ``train`` and ``eval``, with ``adapter`` (the job's id), ``step``,
        ``loss`` and more. The evaluation before training has step 0.
        """
        if not self.has_work:
            return []
        assert self._lent is not None
        try:
            with self._lent.training():
                if self._work is None:
                    self._work = self.loop.take_round()
                records = next(self._work, None)
                if records is None:  # the round was at its end, and the next one has work
                    self._work = self.loop.take_round()
                    records = next(self._work, [])
                return [record for record in records if record["kind"] != "round"]
        except Exception:
            # whatever it was, a round that is half done is not gone on with
            self._work = self.loop.step = None
            self.loop.drop_gradients()
            forget_inputs(self.loop.model)
            raise

    def end(self, run: AdapterRun) -> None:
        """Free the slot of a job that is done, paused or cancelled. Its part of a round under way is dropped."""
        if run not in self.in_flight:
            return
        loop = self.loop
        loop.drop_run(run)
        if loop.step is not None and not loop.step.shares:  # nobody is left in the round
            self._work = loop.step = None
        loop.bank.gradients[run.held_slot].zero_()
        ended: Any = "waiting" if not run.has_ended else "done" if run.reason is None else "not_finite"
        self._roster.leave(run, ended)

    def save(self, run: AdapterRun, file: Path) -> None:
        """Write a job's state to a safetensors file. RunFailed if the disk is full; an earlier file stays.

        Tensors, fp32: ``vectors`` [numbers], the moments ``first`` and ``second`` [trained numbers], and ``best``
        [numbers] where the recipe keeps the vectors of the best step.
        """
        slot, bank, adamw = run.held_slot, self.loop.bank, self.loop.adamw
        tensors = {"vectors": bank.vectors[slot], "first": adamw.first[slot], "second": adamw.second[slot]}
        if run.best is not None:
            tensors["best"] = run.best
        state = {
            "job": run.name,
            **_inputs_of(run, self._base),
            "recipe": run.recipe.to_dict(),
            "optimizer_steps": adamw.steps[slot],
            "state": dataclasses.asdict(run.state),
            "after": run.after,
            "reason": run.reason,
        }
        write_state(file, tensors, state)

    def _put_back(self, run: AdapterRun, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Put a saved state into a job in flight, which goes on from it."""
        slot, bank, adamw = run.held_slot, self.loop.bank, self.loop.adamw
        bank.vectors[slot].copy_(tensors["vectors"])
        adamw.first[slot].copy_(tensors["first"])
        adamw.second[slot].copy_(tensors["second"])
        adamw.steps[slot] = state["optimizer_steps"]
        run.best, run.state = tensors.get("best"), TrainState(**state["state"])
        run.after, run.reason = state["after"], state["reason"]

    def save_adapter(self, run: AdapterRun, directory: Path) -> None:
        """Write the adapter of a job in flight. RunFailed where the disk is full; an earlier adapter is kept."""
        template, vectors = run.datasets.template_beside(run.recipe.data.system), self.loop.bank.take(run.held_slot)
        save_adapter(self.loop.model, directory, vectors=vectors, adapter=ADAPTER, chat_template=template)

    def _attach(self, pad_id: int) -> None:
        """Put on the adapter that stands for all jobs, and make the bank and the loop."""
        recipe, training = self.recipe, self.recipe.training
        mode = training.gradient_checkpointing
        lent = LentBank(self._base, ADAPTER, recipe.adapter, training.seed, recipe.model, mode)
        bank = lent.make_bank(self.slots)
        self.loop = BankLoop(lent.model, bank, self._roster, recipe, pad_id, beside_answers=True)
        self._lent = lent


def require_trainable(base: Base, recipe: Recipe) -> None:
    """Raise InputError for a recipe whose adapters can't share passes, and a base that can't be trained on."""
    problems = [p for p in recipe.many_adapters_contradictions("training beside answers") if p[0] not in _HARMLESS]
    if problems:
        raise InputError("\n".join(f"{key}: {text}" for key, text in problems))
    check_recipe(recipe)
    if method_of(recipe.adapter).peft_type not in PATHS:
        raise InputError(
            f"adapter.method: {recipe.adapter.method} with these options can't be trained beside answers. Use vera "
            "without magnitude, or lora."
        )
    require_trainable_base(base)


def _read_job(file: Path, run: AdapterRun, base: Base) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read and verify a file of `save`. InputError where it is damaged, or of another job, rows, recipe or base."""
    tensors, state = read_state(file, "Begin the job anew.")
    inputs = _inputs_of(run, base)
    # the base may have moved: its fingerprint is compared below
    may_change = () if inputs["base"] is None else ("model.path",)
    try:
        TrainState(**state["state"])
        changed = changed_keys(state["recipe"], run.recipe, may_change)
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: was written by another version of qvera ({error}). Begin the job anew.") from None
    if changed:
        raise InputError(f"{file}: is of another job; {', '.join(changed)} differ from the recipe of {run.name}.")
    for key, value in {"job": run.name, **inputs}.items():
        if state.get(key) != value:
            raise InputError(f"{file}: has another {key} than {run.name}. Give the file of this job, or begin anew.")
    return tensors, state


def _inputs_of(run: AdapterRun, base: Base) -> dict[str, Any]:
    return {"rows": data_sha256(run.datasets), "base": base.facts.get("fingerprint")}
