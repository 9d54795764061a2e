"""One loaded training: its rows, model, optimizer and engine, and the optimizer step that it takes.

`trainer.Trainer` makes a run of it, `lr_finder.find_lr` a learning-rate range test.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from rich.console import Console

from qvera.adapters.save_load import attach
from qvera.config.schema import Recipe
from qvera.data import batches_of
from qvera.distributed.group import Group
from qvera.evaluation import evaluate
from qvera.models.loader import Base, enable_checkpointing, require_packing
from qvera.training import memory_check
from qvera.training.checkpoint import TrainState
from qvera.training.engine import Engine, LocalEngine, trained_vectors
from qvera.training.logging import StatusLine
from qvera.training.optim import build_optimizer
from qvera.training.plan import Plan, Sharing
from qvera.training.plan.sharding import spread_of
from qvera.training.rank_checks import check_disk_space, check_memory, check_same_setup, count_nodes, for_all
from qvera.training.run_dir import plain_json
from qvera.training.setup import base_sharder, load_base_everywhere, load_datasets, read_zero_config, select_device
from qvera.utils import memory
from qvera.utils.errors import RunFailed

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler


class TrainingSession:
    """What a training has loaded, as attributes. All ranks call each method together, in the order they stand here."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, group: Group, console: Console | None = None, base: Base | None = None
    ) -> None:
        """Compare the ranks and seed them; nothing is loaded yet. See `trainer.train` for the parameters."""
        self.recipe, self.run_dir, self.group = recipe, run_dir, group
        self.console = (console or Console(stderr=True)) if group.first else Console(quiet=True)
        self.given_base = base
        self.resources = contextlib.ExitStack()
        self.state = TrainState()
        self.zero = read_zero_config(recipe, base, group)
        check_same_setup(recipe, group, self.console)
        self.device = select_device(recipe, group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.resources.close()

    def load_data(self, preview: bool = False) -> None:
        """Read and tokenize the rows; ``preview``: print some of them."""
        self.datasets = load_datasets(self.recipe, self.given_base, self.console, self.group, preview)

    def load_model(self) -> None:
        """Plan the memory, load the base, put a fresh adapter on it and build its optimizer.

        Raises:
            InputError: it does not fit, or the base or the adapter are wrong.
        """
        recipe = self.recipe
        self.watch = self.resources.enter_context(memory.PeakWatch(self.device))
        self.sharder = self.resources.enter_context(
            base_sharder(self.zero, recipe, self.run_dir / "offload", self.group)
        )
        self.plan = self._plan_memory()
        self.base = self.given_base or load_base_everywhere(recipe, self.device, self.sharder, self.group, self.console)
        facts = self.base.facts
        identity = facts.get("fingerprint"), facts.get("added_tokens")
        self.model = attach(self.base.model, recipe.adapter, recipe.model.path, *identity, recipe.model)
        if recipe.data.packing:
            require_packing(self.model)
        if recipe.training.gradient_checkpointing:
            enable_checkpointing(self.model)
        self.batches = batches_of(recipe, self.datasets.train)
        self.optimizer = build_optimizer(recipe.training, trained_vectors(self.model))

    def build_engine(self, schedule: LRScheduler, steps: int) -> None:
        """Build what steps the vectors, and try the longest batch of ``steps`` steps once, before the first of them.

        Raises:
            InputError: the longest batch does not fit into memory.
        """
        self.schedule, self.steps = schedule, steps
        if self.sharder is None:
            self.group.agree(self._try_longest_batch)
        self.engine = self.make_engine()
        if self.sharder is not None:  # the engine's hooks gather the weights; a rank that fails in one tells the others
            self._try_longest_batch()

    def make_engine(self) -> Engine:
        """Plain torch, or DeepSpeed where the recipe asks for it."""
        if self.zero is None:
            limit = self.recipe.training.max_grad_norm
            return LocalEngine(trained_vectors(self.model), self.optimizer, self.schedule, limit, self.group)
        from qvera.training.zero_engine import ZeroEngine

        parts = self.model, self.optimizer, self.schedule, self.group
        return ZeroEngine(self.zero, self.recipe, *parts, self.run_dir / "offload")

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on the mean loss over the global batch's trained tokens: accumulate gradients, clip, step.

        Returns:
            The record for metrics.jsonl. ``learning_rate`` is the one the step was taken with.

        Raises:
            RunFailed: the loss or the gradient is not finite; no step was taken.
        """
        training, data, datasets, group = self.recipe.training, self.recipe.data, self.datasets, self.group
        began = time.perf_counter()
        rows = self.batches.rows(self.state.step)
        trained_tokens = sum(datasets.train[i].trained_tokens for i in rows)
        passes = self.batches.passes(rows, group.rank, group.world_size)
        losses, input_tokens = [], 0
        for number, micro in enumerate(passes, start=1):
            # a rank without rows runs a dummy pass so that collectives stay in sync
            examples = [datasets.train[i] for i in micro or rows[:1]]
            batch = evaluate.make_batch(self.model, examples, datasets.pad_id, data.prefix_once, data.packing)
            nll, _ = evaluate.batch_nll(self.model, batch, training.loss_chunk_tokens, self.engine.decoder)
            # divided by the tokens of the whole global batch, so that neither accumulation nor ranks change the mean
            self.engine.backward(nll / trained_tokens if micro else nll * 0.0, last=number == len(passes))
            if micro:
                losses.append(nll.detach())
                input_tokens += sum(len(example.input_ids) for example in examples)
        sums = torch.stack(losses).tolist() if losses else []
        total, inputs = group.sum([sum(sums), input_tokens])
        norm, rate = self.engine.step() if math.isfinite(total) else (math.nan, 0.0)
        if not math.isfinite(norm):
            raise self._not_finite(sums, norm, rows, [micro for micro in passes if micro])
        seconds, loss = time.perf_counter() - began, total / trained_tokens
        self.state.add_step(loss, seconds, int(inputs))
        return {
            "kind": "train",
            "step": self.state.step,
            "epoch": round(self.state.step / self.batches.per_epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "trained_tokens": trained_tokens,
            "input_tokens": int(inputs),
            "step_seconds": seconds,
            "tokens_per_second": inputs / seconds,
            "memory_bytes": memory.memory_bytes(self.device),
            "peak_bytes": self.watch.peak_bytes,
        }

    def _plan_memory(self) -> Plan | None:
        """The memory plan of one rank, refused where a node lacks the room."""
        group = self.group
        nodes, per_node = count_nodes(group)
        sharing = Sharing.of(self.zero, nodes, per_node, group.world_size)
        plan = memory_check.plan_run(self.recipe, self.datasets, self.device, self.given_base, self.console, sharing)
        check_memory(plan, group, self.console)
        if self.sharder is not None and self.sharder.folder is not None and plan is not None:
            check_disk_space(self.sharder.folder, -(-spread_of(plan.shape).packed // group.world_size), group)
        return plan

    def _try_longest_batch(self) -> None:
        if self.state.step == 0 and self.steps and self.recipe.training.try_longest_batch:
            with StatusLine(self.console, "Trying the longest batch"):
                memory_check.run_longest_batch(self.model, self.recipe, self.datasets, self.plan, self.steps)

    def _not_finite(self, losses: list[float], norm: float, rows: list[int], passes: list[list[int]]) -> RunFailed:
        """The error of a loss or gradient that is not finite, with the rows that it came from on all ranks."""
        train = self.datasets.train
        bad = [micro for micro, loss in zip(passes, losses, strict=True) if not math.isfinite(loss)]
        found = self.group.gather(
            {"losses": plain_json(losses), "rows": [train[i].source for micro in bad for i in micro]}
        )
        where = ", ".join(source for one in found for source in one["rows"])
        where = where or "the gradient only; rows " + ", ".join(train[i].source for i in rows)
        shown = ", ".join("not finite" if loss is None else f"{loss:g}" for one in found for loss in one["losses"])
        return for_all(
            RunFailed(
                f"Step {self.state.step + 1}: the loss or its gradient is not finite (losses {shown}; gradient norm "
                f"{norm}); rows: "
                f"{where}. No step was taken and earlier checkpoints are kept. Lower training.learning_rate, or look "
                f"at these rows."
            )
        )
