"""Adapters that come and go, trained together on a base that answers requests meanwhile.

`trainer.ManyTrainer` trains the adapters of one file until all are done, on a model of its own. Here each adapter has
a recipe and rows of its own and may begin, end, be saved or go on at any time. The work is cut into parts: one forward
and backward pass, one optimizer step of all, or one pass over held-out rows. Between two parts the model belongs to
whoever answers. Rounds, optimizer and evaluations are those of `rounds`, so an adapter becomes what it becomes there.

**The model in a part.** It is left in the layout of answers (`qvera.evaluation.generate.generating`), whose copies of
weights a part neither reads nor drops (`qvera.adapters.shared_model.training_layout`). Making the layout anew would
dequantize or pack every weight, for each request that comes between two parts. For the time of a part the attention is
one that joins whole rows, the mode is training's, and torch's generators are the trainer's own. Everything is put back,
so an answer is to the bit what it is without training. That holds for layers that only the trained adapter has, too:
they compute as the bare base does (`leave_to_training`).

**Memory.** ``gradient_checkpointing: auto`` is true here. Where memory runs out, the round begins again with half as
many rows in a pass, from then on. A job one row of which does not fit ends, with the reason, and the others go on with
as many rows as at first.

An adapter in flight takes a step in every round, as in `trainer`. One that begins joins in the next round, and one that
ends in the middle of a round leaves no gradient behind.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qvera.adapters.bank import AdapterBank
from qvera.adapters.files.save_load import new_config, save_adapter, start_from
from qvera.adapters.layer import adapted_layers
from qvera.adapters.projection import forget_inputs
from qvera.adapters.shared_model import add_adapter, leave_to_training, training_layout
from qvera.models import linear
from qvera.models.attention import implementation_on
from qvera.models.checkpointing import enable_checkpointing
from qvera.training import checkpoint
from qvera.training.checkpoint import TrainState
from qvera.training.many.online_job import OnlineJob, Purpose, prepared_run, require_trainable
from qvera.training.many.optimizer import BankAdamW
from qvera.training.many.roster import AdapterRun
from qvera.training.many.rounds import HeldOutRows, HeldOutScores, Round, bank_nll
from qvera.training.many.saved_run import SavedRun, save_run
from qvera.training.optim import lr_lambda
from qvera.utils import accelerator
from qvera.utils.errors import InputError, OutOfMemory, RunFailed

if TYPE_CHECKING:
    from peft import PeftModel

    from qvera.config.schema import Recipe
    from qvera.data import Datasets, Example
    from qvera.models.loader import Base

_logger = logging.getLogger(__name__)
ADAPTER = "__training__"
"""PEFT's name of the adapter that stands for all that are trained."""


class OnlineTrainer:
    """Trains adapters on a base that answers requests meanwhile.

    All methods but `prepare` are called in the thread that runs the model.

    Attributes:
        recipe: says the adapter's shape, the optimizer and the rows of a pass, for all. Epochs, rows of a step,
            learning rate, order and evaluations are those of each job's own recipe.
        in_flight: those that have a slot, in the order in which they began. One that has ended stays until `end`.
        pass_rows: rows of a pass at most, now.
    """

    model: PeftModel
    bank: AdapterBank
    adamw: BankAdamW

    def __init__(self, base: Base, recipe: Recipe, slots: int) -> None:
        """Check that it can be done; nothing is changed yet. May be called from any thread.

        Args:
            base: as it is served.
            recipe: of the server.
            slots: how many adapters are trained at a time.

        Raises:
            InputError: the recipe's adapter can't be one of many, or the base can't be trained on.
        """
        if slots < 1:
            raise InputError(f"adapters trained at once: expected at least 1, got {slots}.")
        require_trainable(base, recipe)
        self.recipe, self.slots, self._base = recipe, slots, base
        self.device = next(base.model.parameters()).device
        self.pass_rows = recipe.training.per_device_train_batch_size
        self.in_flight: list[OnlineJob] = []
        self._free = list(range(slots))
        self._numbers = itertools.count()
        self._attached = False
        self._random: dict[str, torch.Tensor] | None = None
        self._rounds = 0
        self._round: Round | None = None
        self._scores: HeldOutScores | None = None
        self._scored: list[tuple[OnlineJob, Purpose] | None] = []  # by their places in `_scores`; None: it has ended

    @property
    def free_slots(self) -> int:
        """How many adapters may begin."""
        return len(self._free)

    @property
    def has_work(self) -> bool:
        """Whether `run_slice` has anything to do. May be called from any thread."""
        return any(not run.has_ended for run in list(self.in_flight))

    def prepare(self, id: str, recipe: Recipe, datasets: Datasets) -> OnlineJob:
        """A job that `begin` takes. May be called from any thread.

        Args:
            id: of the job, for records.
            recipe: its own.
            datasets: its rows.

        Raises:
            InputError: there are no rows, or the recipe differs from the server's in what all jobs share.
        """
        return prepared_run(next(self._numbers), id, recipe, datasets, self.recipe)

    def begin(self, run: OnlineJob, saved: Path | None = None) -> None:
        """Give a job a slot; it takes its first step in the next round.

        The first call puts the trained adapter on the model, which takes as long as the first request for an adapter.

        Args:
            run: not in flight.
            saved: a file that `save` wrote; it goes on from there, else from the beginning.

        Raises:
            InputError: the file is damaged, or is of another job.
        """
        if run.slot is not None or not self._free:
            raise ValueError(f"{run.id}: " + ("is in flight" if run.slot is not None else "there is no free slot"))
        found = None if saved is None else SavedRun.read(saved, run, self._base)
        if not self._attached:
            self._attach()
        slot = heapq.heappop(self._free)
        try:
            self.bank.start(slot)
            self.adamw.reset(slot)
            run.state, run.best, run.after, run.reason = TrainState(), None, None, None
            run.slot, run.status = slot, "in_flight"
            if found is not None:
                found.put_into(run, self.bank, self.adamw)
            run.begin(lr_lambda(run.recipe.training, run.steps))
        except BaseException:
            run.slot, run.status = None, "waiting"
            heapq.heappush(self._free, slot)
            raise
        self.in_flight.append(run)

    def run_slice(self) -> list[dict[str, Any]]:
        """Do the next part of the work: one pass, or the step of a round.

        Returns:
            Records of kind ``train`` and ``eval``, with ``adapter`` (the job's id), ``step``, ``loss`` and more; mostly
            none. The evaluation before training has step 0.
        """
        if not self.has_work:
            return []
        try:
            with self._training():
                return self._next_part()
        except Exception:
            # whatever it was, what is half done is not gone on with
            self._round, self._scores = None, None
            self.bank.gradients.zero_()
            forget_inputs(self.model)
            raise

    def end(self, run: OnlineJob) -> None:
        """Free a job's slot: it is saved, paused or cancelled. Its part of a round under way is dropped."""
        if run not in self.in_flight:
            return
        self.in_flight.remove(run)
        if self._round is not None:
            self._leave_round(run)
        for place, scored in enumerate(self._scored):
            if self._scores is not None and scored is not None and scored[0] is run:
                self._scores.drop(place)
                self._scored[place] = None
        if not any(self._scored):
            self._scores = None
        self.bank.gradients[run.held_slot].zero_()
        heapq.heappush(self._free, run.held_slot)
        run.slot, run.batches, run.shares = None, None, None
        run.status = "waiting" if not run.has_ended else "done" if run.reason is None else "not_finite"

    def save(self, run: OnlineJob, file: Path) -> None:
        """Write what a job in flight goes on from, as of its last step, to one file (`saved_run`).

        Raises:
            RunFailed: the disk is full or read-only; an earlier file is kept.
        """
        save_run(file, run, self.bank, self.adamw, self._base)

    def save_adapter(self, run: OnlineJob, directory: Path) -> None:
        """Write the adapter of a job in flight, as other adapters are saved.

        Raises:
            RunFailed: the disk is full; an adapter that was there before is still there.
        """
        save_adapter(self.model, directory, vectors=self.bank.take(run.held_slot), adapter=ADAPTER)

    def pass_nll(
        self, slots: Sequence[int], examples: Sequence[Example], weights: Sequence[float] | None = None
    ) -> torch.Tensor:
        """See `bank_nll`."""
        pad_id = self.in_flight[0].datasets.pad_id  # of the tokenizer, which all share
        return bank_nll(self, self.recipe.training, pad_id, slots, examples, weights)

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
        """The model as a part needs it; see the module's text."""
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

    def _next_part(self) -> list[dict[str, Any]]:
        if self._round is None and self._scores is None:
            self._choose()
        if self._scores is not None:
            return self._score()
        assert self._round is not None
        if self._round.is_accumulated:
            return self._step(self._round)
        if (shortage := self._round.do_pass()) is not None:
            self._make_smaller(self._round, str(shortage))
        return []

    def _choose(self) -> None:
        """Begin the evaluations that are wanted, else a round."""
        self._scored = [(run, wanted) for run in self.in_flight if (wanted := run.next_evaluation) is not None]
        if not self._scored:
            stepping = [run for run in self.in_flight if not run.has_ended]
            self._round = Round(self, stepping, self._rounds + 1, self.pass_rows)
            return
        rows = []
        for run, wanted in filter(None, self._scored):
            if wanted == "after":
                run.put_best_back(self.bank.vectors[run.held_slot])
            rows.append(HeldOutRows(run.held_slot, run.datasets.eval, run.rows.eval.tolist()))
        self._scores = HeldOutScores(self, rows, self.recipe.training.per_device_eval_batch_size)

    def _step(self, taken: Round) -> list[dict[str, Any]]:
        self._round, self._rounds = None, self._rounds + 1
        try:
            records = taken.step()
        except RunFailed as error:  # in the optimizer, in which some vectors have been stepped and some have not
            for run in taken.runs:
                run.reason = str(error)
            return []
        for run in taken.runs:
            run.state.evaluation_due = run.reason is None and run.evaluation_is_due
        return records

    def _make_smaller(self, taken: Round, shortage: str) -> None:
        """Begin a round again that memory did not suffice for."""
        runs = taken.current_runs
        if len(runs) > 1:
            self.pass_rows = len(runs) // 2
            _logger.warning(
                "Memory ran out with %d rows a pass (%s); going on with %d.", len(runs), shortage, self.pass_rows
            )
        else:
            [run] = runs
            tokens = len(taken.examples[0].input_ids)
            run.reason = (
                f"step {run.state.step + 1}: memory ran out with a single row of {tokens:,} tokens "
                f"({taken.examples[0].source}): {shortage}. Shorten it, or lower data.max_length."
            )
            self._leave_round(run)
            self.pass_rows = self.recipe.training.per_device_train_batch_size  # it was this row that took the memory
        if self._round is not None:
            taken.restart(self.pass_rows)

    def _leave_round(self, run: AdapterRun) -> None:
        assert self._round is not None
        self._round.drop(run)
        if not self._round.runs:
            self._round = None

    def _score(self) -> list[dict[str, Any]]:
        """One pass over held-out rows, or what came out of all of them."""
        assert self._scores is not None
        try:
            if self._scores.do_pass():
                return []
        except OutOfMemory as error:
            forget_inputs(self.model)
            for place in self._scores.current:
                if (scored := self._scored[place]) is not None:
                    scored[0].reason = str(error)
            self._scores = None
            return []
        results, self._scores = self._scores.results(), None
        records = []
        for scored, result in zip(self._scored, results, strict=True):
            if scored is not None and result is not None:
                run, wanted = scored
                if self._take_score(run, wanted, result):
                    records.append({"kind": "eval", "adapter": run.id, "step": run.state.step, **result})
        self._scored = []
        return records

    def _take_score(self, run: OnlineJob, wanted: Purpose, result: dict[str, Any]) -> bool:
        """Note a held-out loss; False: it is that of an earlier step once more."""
        vectors, is_new = self.bank.vectors[run.held_slot], True
        if wanted == "before":
            run.state.before = result
        elif wanted == "due":
            run.state.evaluation_due = False
            run.add_evaluation(result["loss"], vectors)
            if run.takes_no_step and not run.put_best_back(vectors):
                run.after = result  # of the very vectors that are saved
        else:
            run.after, is_new = result, run.best is None
        run.refuse_bad_score()
        return is_new


def _implementation(model: Any) -> str:
    """The attention of a part: joins whole rows where the model's can, whatever answers take."""
    name = (model.config._attn_implementation or "").removeprefix("paged|")
    if name != "sdpa":
        return name
    device, dtype = next(model.parameters()).device, linear.embedding_dtype(model.get_input_embeddings())
    return implementation_on(device, model.config, dtype, whole_rows=True)
