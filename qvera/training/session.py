"""One loaded training: its rows, model, optimizer and engine, and the optimizer step that it takes.

`trainer.Trainer` makes a run of it, `lr_finder.find_lr` a learning-rate range test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from rich.console import Console

from qvera.adapters import hold_training_weights
from qvera.adapters.projection import forget_inputs
from qvera.adapters.save_load import attach
from qvera.config.schema import Recipe
from qvera.data import Datasets, Example, batches_of, build_datasets, data_warnings, print_preflight
from qvera.distributed.deepspeed_import import require_deepspeed, require_overflow_check
from qvera.distributed.group import Group
from qvera.distributed.zero_config import load_zero_config
from qvera.distributed.zero_params import BaseSharder
from qvera.evaluation import evaluate
from qvera.models.checkpointing import Mode, enable_checkpointing
from qvera.models.compile import compile_layers
from qvera.models.loader import Base, load_base, pick_compute_dtype, require_packing, rows_joined
from qvera.models.tokenizer import load_tokenizer
from qvera.training.checkpoint import TrainState, random_state, set_random_state
from qvera.training.engine import LocalEngine, ZeroEngine, trained_vectors
from qvera.training.failures import lone_error, longest_batch_error, not_finite_error, step_error, worst
from qvera.training.logging import status_line
from qvera.training.optim import build_optimizer, build_scaler
from qvera.training.plan import Plan, Sharing, longest_rows, make_plan
from qvera.training.plan.checkpointing import mode_word, with_mode
from qvera.training.plan.run import NotPlannable
from qvera.training.plan.sharding import spread_of
from qvera.training.plan.show import run_lines
from qvera.training.rank_checks import (
    check_disk_space,
    check_memory,
    check_same_data,
    check_same_setup,
    count_nodes,
)
from qvera.utils import accelerator, memory
from qvera.utils.errors import InputError, RunFailed, first_line
from qvera.utils.formatting import size
from qvera.utils.out_of_memory import Shortage, is_out_of_memory, or_shortage

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler


class TrainingSession:
    """What a training has loaded, as attributes. All ranks call each method together, in the order they stand here."""

    def __init__(self, recipe: Recipe, run_dir: Path, group: Group, console: Console | None = None) -> None:
        """Compare the ranks and seed them; nothing is loaded yet. See `trainer.train` for the parameters."""
        self.recipe, self.run_dir, self.group = recipe, run_dir, group
        self.console = (console or Console(stderr=True)) if group.first else Console(quiet=True)
        self.resources = contextlib.ExitStack()
        self.state = TrainState()
        self.zero = group.agree(lambda: load_zero_config(recipe.deepspeed))
        if recipe.training.torch_compile and self.zero is not None and self.zero.shards_base:  # by a file of its own
            raise InputError(
                "training.torch_compile: ZeRO-3 gathers weights between a layer's parts; remove one of the two."
            )
        if (word := recipe.deepspeed) is not None:
            group.agree(lambda: require_deepspeed(word))
        check_same_setup(recipe, group, self.console)
        self.device = accelerator.current_device()
        torch.manual_seed((recipe.training.seed + group.rank) % 2**64)  # ranks drop out different elements
        if recipe.training.full_determinism:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            # no kernel of ours reads memory that it has not written, and filling every new tensor takes time
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.resources.close()

    def warn(self, text: str) -> None:
        """Print a sentence in yellow."""
        self.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def load_data(self, preview: bool = False) -> None:
        """Read and tokenize the rows, before the model: a wrong row is found before minutes go into loading one.

        Args:
            preview: print rows too, as `qvera preview` does.

        Raises:
            InputError: anything wrong with the data, no row left to train on, or ranks with different rows.
        """
        self.datasets = self.group.agree(lambda: self._read_rows(preview))
        check_same_data(self.datasets, self.recipe, self.group)

    def load_model(self) -> None:
        """Plan the memory, load the base, put a fresh adapter on it and build its optimizer.

        Raises:
            InputError: it does not fit, or the base or the adapter are wrong.
        """
        recipe, group = self.recipe, self.group
        dtype = pick_compute_dtype(recipe.model.compute_dtype, self.device)
        self.scaler = build_scaler(recipe.training, dtype, self.device)
        if self.scaler is not None and self.zero is not None:
            group.agree(require_overflow_check)
        self.watch = self.resources.enter_context(memory.PeakWatch(self.device))
        self.sharder: BaseSharder | None = None
        asked = recipe.training.gradient_checkpointing
        self.checkpointing: Mode = True if asked == "auto" else asked  # where no plan can be made
        if self.zero is not None and self.zero.shards_base:
            self.sharder = BaseSharder(self.zero, recipe, group.rank, group.world_size, self.run_dir / "offload")
            self.resources.callback(self.sharder.discard)
        self.plan = self._plan_memory()
        self.base = self._load_base()
        facts = self.base.facts
        identity = facts.get("fingerprint"), facts.get("added_tokens")
        self.model = attach(self.base.model, recipe.adapter, recipe.model.path, *identity, recipe.model)
        if recipe.data.packing:
            require_packing(self.model)
        self.batches = batches_of(recipe, self.datasets.train)
        self.optimizer = build_optimizer(recipe.training, trained_vectors(self.model))

    def build_engine(self, schedule: LRScheduler, steps: int) -> None:
        """Build what steps the vectors, and try the longest batch of ``steps`` steps once, before the first of them.

        Raises:
            InputError: the longest batch does not fit into memory.
        """
        self.schedule, self.steps = schedule, steps
        enable_checkpointing(self.model, self.checkpointing)
        if self.recipe.training.torch_compile:
            compile_layers(self.model)
        if self.plan is not None and self.plan.holds_weights:
            hold_training_weights(self.model)
        if self.sharder is None:
            self.group.agree(self._try_longest_batch)
        self.engine = self.make_engine()
        if self.sharder is not None:  # the engine's hooks gather the weights; a rank that fails in one tells the others
            self._try_longest_batch()

    def make_engine(self) -> LocalEngine:
        """Plain torch, or DeepSpeed where the recipe asks for it."""
        if self.zero is None:
            limit = self.recipe.training.max_grad_norm
            return LocalEngine(
                trained_vectors(self.model), self.optimizer, self.schedule, limit, self.group, self.scaler
            )
        parts = self.model, self.optimizer, self.schedule, self.group
        return ZeroEngine(self.zero, self.recipe, *parts, self.run_dir / "offload", self.scaler)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on the mean loss over the global batch's trained tokens: accumulate gradients, clip, step.

        With loss scaling, a gradient that overflows takes no step, and neither does one that memory does not suffice
        for: the next call takes the same step again, with a lower scale or with fewer rows a pass.

        Returns:
            The record for metrics.jsonl: of kind ``train``, or ``skipped`` or ``out_of_memory`` where no step was
            taken. ``learning_rate`` and ``loss_scale`` are those the step was taken with.

        Raises:
            RunFailed: the loss or the gradient is not finite; no step was taken.
            OutOfMemory: memory ran out, and ``training.on_oom`` is ``save``, or a pass has a single row. The step was
            undone; on all ranks, unless the error is not `shared`.
        """
        train, group = self.datasets.train, self.group
        began, random = time.perf_counter(), random_state(self.group.rank)
        rows = self.batches.rows(self.state.step)
        trained_tokens = sum(train[i].trained_tokens for i in rows)
        passes = self.batches.passes(rows, group.rank, group.world_size)
        begun: list[list[Example]] = []
        sums = or_shortage(lambda: self._accumulate(passes, rows[:1], trained_tokens, begun), self.device)
        if isinstance(sums, Shortage):
            return self._undo_step(sums, begun[-1], random, time.perf_counter() - began)
        input_tokens = sum(len(train[i].input_ids) for micro in passes for i in micro)
        total, inputs, failed = group.sum([sum(sums), input_tokens, 0.0])
        if failed:
            return self._undo_step(None, [], random, time.perf_counter() - began)
        taken = or_shortage(self.engine.step, self.device) if math.isfinite(total) else (math.nan, 0.0)
        if isinstance(taken, Shortage):
            raise RunFailed(f"Memory ran out in the optimizer's step: {taken}. Earlier checkpoints are kept.")
        norm, rate = taken
        seconds, loss = time.perf_counter() - began, total / trained_tokens
        scaling = {} if self.scaler is None else {"loss_scale": self.engine.loss_scale}
        if not math.isfinite(norm):
            if math.isfinite(total) and self.engine.can_step_again():
                self.state.add_skipped_step(seconds)
                step = self.state.step + 1
                return {"kind": "skipped", "step": step, "loss": loss, "step_seconds": seconds, **scaling}
            sources = [[train[i].source for i in micro] for micro in passes if micro]
            step_rows = [train[i].source for i in rows]
            raise not_finite_error(self.state.step + 1, sums, norm, sources, step_rows, group)
        self.state.add_step(loss, seconds, int(inputs))
        return {
            "kind": "train",
            "step": self.state.step,
            "epoch": round(self.state.step / self.batches.per_epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            **scaling,
            "trained_tokens": trained_tokens,
            "input_tokens": int(inputs),
            "step_seconds": seconds,
            "tokens_per_second": inputs / seconds,
            "memory_bytes": memory.memory_bytes(self.device),
            "peak_bytes": self.watch.peak_bytes,
        }

    def _accumulate(
        self, passes: list[list[int]], dummy: list[int], trained_tokens: int, begun: list[list[Example]]
    ) -> list[float]:
        """Forward and backward of each pass; the summed loss of each. ``begun`` gets the rows of each as it begins."""
        losses = []
        expected_grad = None if self.scaler is None else self.engine.loss_gradient() / trained_tokens
        for number, micro in enumerate(passes, start=1):
            # a rank without rows runs a dummy pass so that collectives stay in sync
            begun.append([self.datasets.train[i] for i in micro or dummy])
            nll, _ = self._nll(begun[-1], self.engine.decoder, expected_grad)
            # divided by the tokens of the whole global batch, so that neither accumulation nor ranks change the mean
            self.engine.backward(nll / trained_tokens if micro else nll * 0.0, last=number == len(passes))
            if micro:
                losses.append(nll.detach())
        return torch.stack(losses).tolist() if losses else []

    def _undo_step(
        self, shortage: Shortage | None, examples: list[Example], random: dict[str, torch.Tensor], seconds: float
    ) -> dict[str, Any]:
        """Undo a step that memory did not suffice for, on every rank, and halve the passes where the recipe says so.

        Args:
            shortage: that of this rank; None: only others ran out of memory.
            examples: the rows of the pass that failed on this rank.
            random: the random state of before the step.

        Returns:
            The record, where the step can be taken again.

        Raises:
            OutOfMemory: it can't.
        """
        group, train, step = self.group, self.datasets.train, self.state.step + 1
        self.engine.undo()
        forget_inputs(self.model)
        set_random_state(random, group.rank)
        if shortage is not None:
            if self.zero is not None and group.world_size > 1:
                raise lone_error(step, shortage, examples, self.plan, train, group)
            group.sum([0.0, 0.0, 1.0])  # the others meet this rank where they add up their losses
        packed = self.recipe.data.packing
        half = sum(len(example.input_ids) for example in examples) if packed else len(examples)
        half = half // 2 if len(examples) > 1 else 0
        found = group.gather(None if shortage is None else [shortage.asked_bytes, shortage.free_bytes, half])
        failed = [one for one in found if one is not None]
        shortage = worst([Shortage(*one[:2]) for one in failed])
        most = min(one[2] for one in failed)
        if self.recipe.training.on_oom == "save" or most == 0:
            raise step_error(step, shortage, examples, self.plan, train, group)
        self.batches.limit(most)
        limit = {"pass_tokens" if packed else "pass_rows": most}
        self.state.add_halving(step, limit, seconds)
        return {
            "kind": "out_of_memory",
            "step": step,
            **dataclasses.asdict(shortage),
            **limit,
            "step_seconds": seconds,
        }

    def _read_rows(self, preview: bool) -> Datasets:
        recipe, console = self.recipe, self.console
        tokenizer = load_tokenizer(recipe.model)
        datasets = build_datasets(recipe.data, tokenizer, console)
        if not datasets.train:
            raise InputError(f"{recipe.data.path}: no row is left to train on. Raise data.max_length.")
        if preview:
            print_preflight(datasets, tokenizer, console)
            return datasets
        stats = datasets.stats
        console.print(
            f"Data: {stats.train_rows:,} rows to train on, {stats.eval_rows:,} held out; the loss covers "
            f"{stats.trained_tokens:,} of {stats.tokens:,} tokens. `qvera preview` shows the rows.",
            highlight=False,
            soft_wrap=True,
        )
        for line in data_warnings(stats):
            self.warn(line)
        return datasets

    def _load_base(self) -> Base:
        section = self.recipe.model
        if self.plan is not None:
            section = section.replace(stream=self.plan.streaming.streams)
        with status_line(self.console, f"Loading {section.path}") as update:

            def progress(stage: str, done: int, total: int, _: str) -> None:
                update(f"{stage.capitalize()} {section.path}: {done / max(total, 1):.0%} of {size(total)}")

            read = functools.partial(load_base, section, self.device, progress, self.sharder)
            return self.group.agree(read) if self.sharder is None else read()  # ranks meet while they shard it

    def _plan_memory(self) -> Plan | None:
        """The memory plan of one rank, printed in a few lines, and refused where a GPU or a disk lacks the room.

        A plan that does not fit is a warning on a CPU, where swap may make room, and where it is near what a GPU has
        (`Plan.is_refused`).
        """
        recipe, group, console = self.recipe, self.group, self.console
        sharing = Sharing.of(self.zero, *count_nodes(group), group.world_size)
        try:
            plan = make_plan(recipe, self.device, self.datasets.train, sharing)
        except NotPlannable as error:
            self.warn(f"No plan: {error}")
            return None
        # ranks with less memory decide for all
        self.checkpointing = max(group.gather(plan.checkpointing), key=[False, True, "offload"].index)
        if self.checkpointing != plan.checkpointing:
            plan = make_plan(with_mode(recipe, self.checkpointing), self.device, self.datasets.train, sharing)
        if plan.is_refused and group.world_size == 1:
            raise InputError("\n".join(run_lines(plan)))
        style = None if plan.fits and not plan.is_tight else "yellow"
        for line in run_lines(plan):
            console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
        check_memory(plan, group, console)
        if self.sharder is not None and self.sharder.folder is not None:
            check_disk_space(self.sharder.folder, -(-spread_of(plan.shape).packed // group.world_size), group)
        return plan

    def keep_checkpointing(self, recorded: Mode) -> None:
        """Take over what `gradient_checkpointing: auto` came to in the run that goes on, where that still fits.

        The MLPs of recomputed layers go by tiles where there are many tokens, so another choice may give other bits.
        """
        if self.recipe.training.gradient_checkpointing != "auto" or recorded == self.checkpointing:
            return
        if all(self.group.gather(self.plan is None or self.plan.decided.fits(recorded))):
            self.checkpointing = recorded
            self.console.print(f"Gradient checkpointing stays {mode_word(recorded)}, as the run began.")
        else:
            self.warn(
                f"Gradient checkpointing was {mode_word(recorded)} when the run began, which does not fit into memory "
                f"now; it goes on with {mode_word(self.checkpointing)}, and its numbers may differ in the last bits."
            )

    def _try_longest_batch(self) -> None:
        if self.state.step == 0 and self.steps and self.recipe.training.try_longest_batch:
            with status_line(self.console, "Trying the longest batch"):
                self.run_longest_batch()

    def run_longest_batch(self) -> None:
        """Forward and backward over the longest batch of the run, without a trace.

        The gradients are computed and dropped, so that neither the vectors nor DeepSpeed's buckets hold them, and
        random state and mode are restored: a run gives the same bits without it. Under ZeRO-3 all ranks call this
        together, once the engine's hooks gather the weights; each of them takes the same batch.

        Raises:
            InputError: memory ran out; names the rows and what would make them fit. With ``training.on_oom: halve`` and
                several rows it is a warning.
        """
        recipe, model = self.recipe, self.model
        joined = rows_joined(model, recipe.data.prefix_once, recipe.data.packing)
        examples = [self.datasets.train[i] for i in longest_rows(recipe, self.datasets.train, joined, self.steps)]
        was_training = model.training
        try:
            with accelerator.forked_random_state():
                model.train()
                nll, trained = self._nll(examples)
                vectors = list(trained_vectors(model).values())
                torch.autograd.grad(nll / trained, vectors, allow_unused=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if recipe.training.on_oom == "save" or len(examples) == 1:
                raise longest_batch_error(recipe, self.plan, bool(self.checkpointing), examples) from None
            self.warn(f"The longest batch does not fit into memory ({first_line(error)}). A step with it is halved.")
        finally:
            model.train(was_training)
            forget_inputs(model)

    def _nll(
        self,
        rows: list[Example],
        decoder: Callable[..., torch.Tensor] | None = None,
        expected_grad: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Summed negative log likelihood of the rows' trained tokens, and how many there are."""
        data, chunk = self.recipe.data, self.recipe.training.loss_chunk_tokens
        batch = evaluate.make_batch(self.model, rows, self.datasets.pad_id, data.prefix_once, data.packing)
        return evaluate.batch_nll(self.model, batch, chunk, decoder, expected_grad)
