"""Adapters that come and go, trained together on a base that answers requests meanwhile.

Unlike in `many.ManyTrainer`, each adapter has a recipe and rows of its own and may begin, end, be saved or go on at any
time. The loop is the same (`bank_loop.BankLoop`). `run_slice` takes one part of it: a forward and backward pass, an
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
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from qvera.adapters.bank import AdapterBank
from qvera.adapters.files.save_load import new_config, save_adapter, start_from
from qvera.adapters.layer import adapted_layers
from qvera.adapters.methods import check_recipe, method_of
from qvera.adapters.products.slots import PATHS
from qvera.adapters.projection import forget_inputs
from qvera.adapters.shared_model import add_adapter, leave_to_training, training_layout
from qvera.data import AdapterRows, data_sha256, planned_steps
from qvera.models import linear
from qvera.models.attention import implementation_on
from qvera.models.checkpointing import enable_checkpointing
from qvera.training import checkpoint
from qvera.training.bank_loop import BankLoop
from qvera.training.checkpoint import TrainState
from qvera.training.loop import Records
from qvera.training.roster import AdapterRun, Roster
from qvera.training.run_dir import changed_keys
from qvera.utils import accelerator
from qvera.utils.atomic import disk_errors, replacing
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import plain_json
from qvera.utils.safetensors_io import save_tensors

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.data import Datasets
    from qvera.models.loader import Base

_JOB_FORMAT = "1"
ADAPTER = "__training__"  # PEFT's name of the adapter that stands for all that are trained
_HARMLESS = ("training.on_oom", "training.exact_match_rows")  # keys of a recipe that nothing here reads
_SHARED = ("weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "loss_chunk_tokens")
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
        saved_job = None if saved is None else SavedJob.read(saved, run, self._base)
        if not self._attached:
            self._attach(run.datasets.pad_id)
        run.state, run.best, run.after, run.reason = TrainState(), None, None, None
        self._roster.enter(run)
        try:
            self.loop.begin(run)
            if saved_job is not None:
                saved_job.put_into(run, self.loop)
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
                    self._work = self.loop.take_round()
                records = next(self._work, None)
                if records is None:  # the round was at its end; its successor has work
                    self._work = self.loop.take_round()
                    records = next(self._work, [])
                return [record for record in records if record["kind"] != "round"]
        except Exception:
            # whatever it was, what is half done is not gone on with
            self._work = self.loop.step = None
            self.loop.drop_gradients()
            forget_inputs(self.loop.model)
            raise

    def end(self, run: AdapterRun) -> None:
        """Free a job's slot, whether it is done, paused or cancelled. Its part of a round under way is dropped."""
        if run not in self.in_flight:
            return
        loop = self.loop
        loop.drop_run(run)
        if loop.step is not None and not loop.step.shares:
            self._work = loop.step = None
        loop.bank.gradients[run.held_slot].zero_()
        ended: Any = "waiting" if not run.has_ended else "done" if run.reason is None else "not_finite"
        self._roster.leave(run, ended)

    def save(self, run: AdapterRun, file: Path) -> None:
        """Write a job's state to a file (`save_job`). RunFailed if the disk is full; an earlier file stays."""
        save_job(file, run, self.loop, self._base)

    def save_adapter(self, run: AdapterRun, directory: Path) -> None:
        """Write the adapter of a job in flight. RunFailed where the disk is full; an earlier adapter is kept."""
        save_adapter(self.loop.model, directory, vectors=self.loop.bank.take(run.held_slot), adapter=ADAPTER)

    def _attach(self, pad_id: int) -> None:
        """Put the adapter on that stands for all, and make the bank."""
        facts, section, training = self._base.facts, self.recipe.adapter, self.recipe.training
        config = new_config(section, facts.get("path"), facts.get("fingerprint"), None, self.recipe.model)
        adapted = self._base.adapted
        is_on = adapted is not None and ADAPTER in adapted.peft_config  # an attempt before this one failed later
        model: Any = adapted if is_on else add_adapter(self._base, ADAPTER, config)
        leave_to_training(model, ADAPTER)
        if section.init_from is not None:
            start_from(model, config, section.init_from, ADAPTER)
        with training_layout(model, ADAPTER):
            for layer in adapted_layers(model):
                if layer.carries(ADAPTER):
                    layer.set_adapter([ADAPTER])  # what its method trains gets gradients
            bank = AdapterBank(model, self.slots, ADAPTER)
        self.loop = BankLoop(model, bank, self._roster, self.recipe, pad_id, beside_answers=True)
        mode = training.gradient_checkpointing
        enable_checkpointing(model, True if mode == "auto" else mode, by_tiles=False)
        self._attached = True

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """The model as a part needs it; see the module's docstring."""
        model = self._base.model
        answering, was_training = model.config._attn_implementation, model.training
        with accelerator.forked_random_state(), training_layout(self.loop.model, ADAPTER):
            if self._random is None:
                torch.manual_seed(self.recipe.training.seed)
            else:
                checkpoint.set_random_state(self._random)
            try:
                model.set_attn_implementation(_implementation(model))
                self.loop.model.train()
                yield
                accelerator.synchronize()  # a part has ended when its kernels have
            finally:
                self.loop.model.train(was_training)
                model.set_attn_implementation(answering)
                self._random = checkpoint.random_state()


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
    if method_of(recipe.adapter).peft_type not in PATHS:
        raise InputError(
            f"adapter.method: {recipe.adapter.method} with these options can't be trained beside answers. Use vera "
            "without magnitude, or lora."
        )
    if linear.embedding_dtype(base.model.get_input_embeddings()) == torch.float16:
        raise InputError(
            "model.compute_dtype: this base computes in float16, which needs a loss scale that the jobs would share. "
            "Serve it with bfloat16 or float32."
        )
    if base.facts.get("added_tokens"):
        raise InputError("model.added_tokens: this base has tokens of its own, whose rows no job could train.")


def save_job(file: Path, run: AdapterRun, loop: BankLoop, base: Base) -> None:
    """Write the state of an adapter in flight to a safetensors file. After a kill it is whole: the new or the old one.

    Tensors, fp32: ``vectors`` [numbers], the moments ``first`` and ``second`` [trained numbers], and ``best`` [numbers]
    where the recipe keeps the vectors of the best step. Metadata: ``format``, ``state`` (a JSON object) and ``sha256``
    over the state and all tensors.
    """
    slot, bank, adamw = run.held_slot, loop.bank, loop.adamw
    tensors = {"vectors": bank.vectors[slot], "first": adamw.first[slot], "second": adamw.second[slot]}
    if run.best is not None:
        tensors["best"] = run.best
    state = {
        "job": run.name,
        **_inputs_of(run, base),
        "recipe": run.recipe.to_dict(),
        "optimizer_steps": adamw.steps[slot],
        "state": dataclasses.asdict(run.state),
        "after": run.after,
        "reason": run.reason,
    }
    text = json.dumps(plain_json(state))
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _JOB_FORMAT, "state": text, "sha256": _sha256(text, held)}
    with disk_errors(str(file), "What was saved before is kept."), replacing(file) as partial:
        save_tensors(held, partial, metadata)


@dataclasses.dataclass
class SavedJob:
    """What `save_job` wrote."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]

    @classmethod
    def read(cls, file: Path, run: AdapterRun, base: Base) -> Self:
        """Read and verify a job's file. InputError where it is damaged, or of another job, rows, recipe or base."""
        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no dict
            if metadata["format"] != _JOB_FORMAT:
                raise InputError(f"{file}: has the format {metadata['format']}; this qvera reads format {_JOB_FORMAT}.")
            if metadata["sha256"] != _sha256(metadata["state"], tensors):
                raise ValueError("its SHA-256 is another one")
            saved = cls(tensors, json.loads(metadata["state"]))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(
                f"{file}: is no saved state of a job, or is damaged ({first_line(error)}) Begin the job anew."
            ) from None
        try:
            TrainState(**saved.state["state"])
        except TypeError as error:
            raise InputError(
                f"{file}: was written by another version of qvera ({error}). Begin the job anew."
            ) from None
        if changed := changed_keys(saved.state["recipe"], run.recipe):
            raise InputError(f"{file}: is of another job; {', '.join(changed)} differ from the recipe of {run.name}.")
        for key, value in {"job": run.name, **_inputs_of(run, base)}.items():
            if saved.state.get(key) != value:
                raise InputError(
                    f"{file}: has another {key} than {run.name}. Give the file of this job, or begin anew."
                )
        return saved

    def put_into(self, run: AdapterRun, loop: BankLoop) -> None:
        """Let a job in flight go on from here."""
        slot, bank, adamw = run.held_slot, loop.bank, loop.adamw
        bank.vectors[slot].copy_(self.tensors["vectors"])
        adamw.first[slot].copy_(self.tensors["first"])
        adamw.second[slot].copy_(self.tensors["second"])
        adamw.steps[slot] = self.state["optimizer_steps"]
        run.best, run.state = self.tensors.get("best"), TrainState(**self.state["state"])
        run.after, run.reason = self.state["after"], self.state["reason"]


def _inputs_of(run: AdapterRun, base: Base) -> dict[str, Any]:
    return {"rows": data_sha256(run.datasets), "base": base.facts.get("fingerprint")}


def _sha256(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name].numpy().tobytes())
    return digest.hexdigest()
