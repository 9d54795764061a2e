"""Adapters that come and go, trained together on a base that answers requests meanwhile.

Unlike in `many.ManyTrainer`, each adapter has a recipe and rows of its own and may begin, end, be saved or go on at any
time. The loop is the same (`loop.BankLoop`). `run_slice` takes one part of it: a forward and backward pass, an
optimizer step, or a pass over held-out rows. Between two parts the model belongs to whoever answers.

**The model in a part.** It stays in the layout of answers (`qvera.evaluation.generate.generating`), whose copies of
weights a part neither reads nor drops (`qvera.adapters.shared_model.training_layout`). To make them anew would
dequantize or pack every weight for each request. A part has training mode, attention that joins whole rows, and its own
random generators. All of it is put back, and layers that only the trained adapter has compute as the bare base does
(`leave_to_training`). So an answer is to the bit what it is without training.

**Memory.** ``gradient_checkpointing: auto`` is true here. Where memory runs out, the round begins again with half as
many rows in a pass. A job one row of which does not fit ends with the reason, and the others go on with as many rows as
at first.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qvera.adapters.bank import AdapterBank
from qvera.adapters.files.save_load import new_config, save_adapter, start_from
from qvera.adapters.layer import adapted_layers
from qvera.adapters.methods import check_recipe, method_of
from qvera.adapters.projection import forget_inputs
from qvera.adapters.shared_model import add_adapter, leave_to_training, training_layout
from qvera.data import AdapterRows, planned_steps
from qvera.models import linear
from qvera.models.attention import implementation_on
from qvera.models.checkpointing import enable_checkpointing
from qvera.training import checkpoint
from qvera.training.bank_checkpoint import SavedRun, save_run
from qvera.training.checkpoint import TrainState
from qvera.training.loop import BankLoop, Records, Step
from qvera.training.optim import BankAdamW
from qvera.training.roster import AdapterRun, Roster
from qvera.training.run_dir import changed_keys
from qvera.utils import accelerator
from qvera.utils.errors import InputError, OutOfMemory, RunFailed
from qvera.utils.out_of_memory import Shortage

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.data import Datasets
    from qvera.models.loader import Base

_logger = logging.getLogger(__name__)
ADAPTER = "__training__"  # PEFT's name of the adapter that stands for all that are trained
_HARMLESS = ("training.on_oom", "training.exact_match_rows")  # keys of a recipe that nothing here reads
_SHARED = ("weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "loss_chunk_tokens")
"""Keys of ``training`` that all jobs share, besides ``adapter``."""


class OnlineTrainer(BankLoop):
    """Trains adapters on a base that answers requests meanwhile.

    Methods are called in the thread that runs the model, unless they say otherwise. ``recipe`` says the adapter's
    shape, the optimizer and the rows of a pass, for all. Epochs, rows of a step, learning rate, order and evaluations
    are those of each job's own recipe. ``pass_rows``: the most rows of a pass, now.
    """

    logs_all_scores = True

    def __init__(self, base: Base, recipe: Recipe, slots: int) -> None:
        """Check that it can be done (else InputError); nothing is changed yet. May be called from any thread."""
        if slots < 1:
            raise InputError(f"adapters trained at once: expected at least 1, got {slots}.")
        require_trainable(base, recipe)
        self.recipe, self.slots, self._base = recipe, slots, base
        self.device = next(base.model.parameters()).device
        self.pass_rows = recipe.training.per_device_train_batch_size
        self._roster = Roster((), slots, None)
        self._numbers = itertools.count()
        self._attached = False
        self._random: dict[str, torch.Tensor] | None = None
        self._work: Iterator[Records] | None = None

    @property
    def in_flight(self) -> list[AdapterRun]:
        """Those that have a slot, in the order in which they began. One that has ended stays until `end`."""
        return self._roster.in_flight

    @property
    def free_slots(self) -> int:
        """How many adapters may begin."""
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
        saved_run = None if saved is None else SavedRun.read(saved, run, self._base)
        if not self._attached:
            self._attach()
        run.state, run.best, run.after, run.reason = TrainState(), None, None, None
        slot = self._roster.enter(run)
        try:
            self.bank.start(slot)
            self.adamw.reset(slot)
            if saved_run is not None:
                saved_run.put_into(run, self.bank, self.adamw)
            run.begin()
        except BaseException:
            self._roster.leave(run, "waiting")
            raise

    def run_slice(self) -> list[dict[str, Any]]:
        """Do the next part of the work: one pass, or the step of a round.

        Returns records (mostly none) of kind ``train`` and ``eval``, with ``adapter`` (the job's id), ``step``,
        ``loss`` and more. The evaluation before training has step 0.
        """
        if not self.has_work:
            return []
        try:
            with self._training():
                if self._work is None:
                    self._work = self.take_round()
                records = next(self._work, None)
                if records is None:  # the round was at its end; its successor has work
                    self._work = self.take_round()
                    records = next(self._work, [])
                return records
        except Exception:
            # whatever it was, what is half done is not gone on with
            self._work = self.step = None
            self.bank.gradients.zero_()
            forget_inputs(self.model)
            raise

    def end(self, run: AdapterRun) -> None:
        """Free a job's slot, whether it is done, paused or cancelled. Its part of a round under way is dropped."""
        if run not in self.in_flight:
            return
        self.drop_run(run)
        if self.step is not None and not self.step.targets:
            self._work = self.step = None
        self.bank.gradients[run.held_slot].zero_()
        ended: Any = "waiting" if not run.has_ended else "done" if run.reason is None else "not_finite"
        self._roster.leave(run, ended)

    def save(self, run: AdapterRun, file: Path) -> None:
        """Write a job's state to a file (`bank_checkpoint`). RunFailed if the disk is full; an earlier file stays."""
        save_run(file, run, self.bank, self.adamw, self._base)

    def save_adapter(self, run: AdapterRun, directory: Path) -> None:
        """Write the adapter of a job in flight. RunFailed where the disk is full; an earlier adapter is kept."""
        save_adapter(self.model, directory, vectors=self.bank.take(run.held_slot), adapter=ADAPTER)

    def _attach(self) -> None:
        """Put the adapter on that stands for all, and make the bank."""
        facts, section = self._base.facts, self.recipe.adapter
        config = new_config(section, facts.get("path"), facts.get("fingerprint"), None, self.recipe.model)
        adapted = self._base.adapted
        is_on = adapted is not None and ADAPTER in adapted.peft_config  # an attempt before this one failed later
        self.model = adapted if is_on else add_adapter(self._base, ADAPTER, config)
        leave_to_training(self.model, ADAPTER)
        if section.init_from is not None:
            start_from(self.model, config, section.init_from, ADAPTER)
        with training_layout(self.model, ADAPTER):
            for layer in adapted_layers(self.model):
                if layer.carries(ADAPTER):
                    layer.set_adapter([ADAPTER])  # what its method trains gets gradients
            self.bank = AdapterBank(self.model, self.slots, ADAPTER)
        self.adamw = BankAdamW(self.bank, self.recipe.training)
        mode = self.recipe.training.gradient_checkpointing
        enable_checkpointing(self.model, True if mode == "auto" else mode, by_tiles=False)
        self._attached = True

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """The model as a part needs it; see the module's docstring."""
        model = self._base.model
        answering, was_training = model.config._attn_implementation, model.training
        with accelerator.forked_random_state(), training_layout(self.model, ADAPTER):
            if self._random is None:
                torch.manual_seed(self.recipe.training.seed)
            else:
                checkpoint.set_random_state(self._random)
            try:
                model.set_attn_implementation(_implementation(model))
                self.model.train()
                yield
                accelerator.synchronize()  # a part has ended when its kernels have
            finally:
                self.model.train(was_training)
                model.set_attn_implementation(answering)
                self._random = checkpoint.random_state()

    def take_step(self) -> Iterator[Records]:
        """See `Loop.take_step`. Memory that runs out in the optimizer ends the jobs whose vectors it stepped."""
        try:
            yield from super().take_step()
        except RunFailed as error:  # some vectors have been stepped and some have not
            for run in self.step.targets if self.step is not None else ():
                run.reason = str(error)
            self.step = None
            self.bank.gradients.zero_()

    def make_smaller(self, step: Step, shortage: Shortage | None) -> Records:
        """See `Loop.make_smaller`."""
        runs = [run for run, _ in step.passes[0]]
        if len(runs) > 1:
            self.pass_rows = len(runs) // 2
            _logger.warning(
                "Memory ran out with %d rows a pass (%s); going on with %d.", len(runs), shortage, self.pass_rows
            )
        else:
            tokens = len(step.examples[0].input_ids)
            runs[0].reason = (
                f"step {runs[0].state.step + 1}: memory ran out with a single row of {tokens:,} tokens "
                f"({step.examples[0].source}): {shortage}. Shorten it, or lower data.max_length."
            )
            self.pass_rows = self.recipe.training.per_device_train_batch_size  # it was this row that took the memory
        return []

    def scores_failed(self, error: OutOfMemory, runs: Sequence[AdapterRun]) -> None:
        """See `BankLoop.scores_failed`: the jobs whose rows were in the pass end."""
        forget_inputs(self.model)
        for run in runs:
            run.reason = str(error)


def _implementation(model: Any) -> str:
    """The attention of a part: it joins whole rows where the model's can, whatever answers take."""
    name = (model.config._attn_implementation or "").removeprefix("paged|")
    if name != "sdpa":
        return name
    device, dtype = next(model.parameters()).device, linear.embedding_dtype(model.get_input_embeddings())
    return implementation_on(device, model.config, dtype, whole_rows=True)


def require_trainable(base: Base, recipe: Recipe) -> None:
    """Raise InputError for a recipe whose adapters can't share passes, and a base that can't be trained on."""
    problems = [p for p in recipe.many_adapters_contradictions("training beside answers") if p[0] not in _HARMLESS]
    if problems:
        raise InputError("\n".join(f"{key}: {text}" for key, text in problems))
    check_recipe(recipe)
    if method_of(recipe.adapter).peft_type != "VERA":
        raise InputError(
            f"adapter.method: {recipe.adapter.method} with these options can't be trained beside answers. Use vera "
            "without magnitude."
        )
    if linear.embedding_dtype(base.model.get_input_embeddings()) == torch.float16:
        raise InputError(
            "model.compute_dtype: this base computes in float16, which needs a loss scale that the jobs would share. "
            "Serve it with bfloat16 or float32."
        )
    if base.facts.get("added_tokens"):
        raise InputError("model.added_tokens: this base has tokens of its own, whose rows no job could train.")
