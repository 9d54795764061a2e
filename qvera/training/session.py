"""One loaded training: its rows, model, optimizer and engine, the optimizer step that it takes, and its scores.

`trainer.Trainer` makes a run of it, `lr_finder.find_lr` a learning-rate range test.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from rich.console import Console
from rich.text import Text

from qvera.adapters.save_load import attach
from qvera.config.schema import Recipe
from qvera.data import Datasets, batches_of, build_datasets, data_warnings, print_preflight
from qvera.distributed.group import Group, for_all
from qvera.distributed.zero_config import load_zero_config
from qvera.distributed.zero_params import BaseSharder, any_sharded
from qvera.evaluation import evaluate
from qvera.models.loader import Base, enable_checkpointing, load_base, pick_device, require_packing
from qvera.models.tokenizer import load_tokenizer
from qvera.training import memory_check
from qvera.training.checkpoint import TrainState
from qvera.training.engine import LocalEngine, trained_vectors
from qvera.training.logging import status_line
from qvera.training.optim import build_optimizer
from qvera.training.plan import Plan, Sharing, make_plan, this_machine
from qvera.training.plan.shapes import NotPlannable
from qvera.training.plan.sharding import spread_of
from qvera.training.plan.show import run_lines
from qvera.training.rank_checks import (
    check_disk_space,
    check_memory,
    check_same_data,
    check_same_setup,
    count_nodes,
)  # fmt: skip
from qvera.training.run_dir import plain_json
from qvera.utils import memory
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.formatting import size

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
        check_same_setup(recipe, group, self.console)
        self.device = pick_device()
        torch.manual_seed((recipe.training.seed + group.rank) % 2**64)  # ranks drop out different elements
        if recipe.training.full_determinism:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.resources.close()

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
        self.watch = self.resources.enter_context(memory.PeakWatch(self.device))
        self.sharder: BaseSharder | None = None
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

    def make_engine(self) -> LocalEngine:
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

    def held_out_loss(self) -> dict[str, Any]:
        """Loss and perplexity of all held-out rows, the very same values on all ranks."""
        training, datasets = self.recipe.training, self.datasets
        result = evaluate.held_out_loss(
            self.model,
            datasets.eval,
            pad_id=datasets.pad_id,
            batch_size=training.per_device_eval_batch_size,
            chunk_tokens=training.loss_chunk_tokens,
            group=self.group,
        )
        return self.group.broadcast(result)

    def score(self, label: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Held-out loss and, where the recipe asks for it, exact match of greedy answers.

        The ranks share the held-out rows. Rank 0 alone answers prompts, unless ZeRO-3 has sharded the weights: then all
        ranks walk through the layers together and rank 0's answers count.

        Returns:
            The scores, and the answers to show as samples.
        """
        training, rows = self.recipe.training, self.datasets.eval
        answers: list[dict[str, Any]] = []
        with status_line(self.console, f"{label}: held-out loss") as update, evaluate.scoring(self.model):
            result = self.held_out_loss()
            asked = (i for i, row in enumerate(rows) if len(row.prompt_ids))
            with_reference = (i for i, row in enumerate(rows) if len(row.prompt_ids) and row.reference is not None)
            sample_rows = list(itertools.islice(asked, training.sample_count))
            match_rows = list(itertools.islice(with_reference, training.exact_match_rows))
            indices = list(dict.fromkeys(match_rows + sample_rows))  # each is answered once
            if self.group.first or any_sharded(self.model):
                answers = evaluate.answer_rows(
                    self.model,
                    self.base.tokenizer,
                    [rows[i] for i in indices],
                    max_new_tokens=training.sample_max_new_tokens,
                    batch_size=training.answer_batch_size,
                    progress=lambda done: update(f"{label}: {done} of {len(indices)} answers"),
                )
            answers = self.group.broadcast(answers)
        by_row = dict(zip(indices, answers, strict=True))
        text = f"{label}: held-out loss {result['loss']:.4f}"
        if match_rows:
            result["exact_match"] = sum(bool(by_row[i]["exact"]) for i in match_rows) / len(match_rows)
            result["exact_match_rows"] = len(match_rows)
            text += f", exact match {result['exact_match']:.1%} of {len(match_rows)} rows"
        self.console.print(text)
        return result, [by_row[i] for i in sample_rows]

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
            console.print(Text(line, style="yellow"), soft_wrap=True)
        return datasets

    def _load_base(self) -> Base:
        section = self.recipe.model
        with status_line(self.console, f"Loading {section.path}") as update:

            def progress(stage: str, done: int, total: int, _: str) -> None:
                update(f"{stage.capitalize()} {section.path}: {done / max(total, 1):.0%} of {size(total)}")

            def read() -> Base:
                return load_base(section, self.device, progress, self.sharder)

            return self.group.agree(read) if self.sharder is None else read()  # ranks meet while they shard it

    def _plan_memory(self) -> Plan | None:
        """The memory plan of one rank, printed in a few lines, and refused where a GPU or a disk lacks the room.

        On a CPU a plan that does not fit is a warning: swap, or other processes that end, may make room.
        """
        recipe, group, console = self.recipe, self.group, self.console
        sharing = Sharing.of(self.zero, *count_nodes(group), group.world_size)
        machine = this_machine(recipe.model, self.device)
        try:
            plan = make_plan(recipe, machine, self.datasets.train, sharing)
        except NotPlannable as error:
            console.print(f"[yellow]No plan: {error}", highlight=False)
            return None
        if not plan.fits and machine.on_gpu and group.world_size == 1:
            raise InputError("\n".join(run_lines(plan)))
        for line in run_lines(plan):
            console.print(line if plan.fits else f"[yellow]{line}", highlight=False, soft_wrap=True)
        check_memory(plan, group, console)
        if self.sharder is not None and self.sharder.folder is not None:
            check_disk_space(self.sharder.folder, -(-spread_of(plan.shape).packed // group.world_size), group)
        return plan

    def _try_longest_batch(self) -> None:
        if self.state.step == 0 and self.steps and self.recipe.training.try_longest_batch:
            with status_line(self.console, "Trying the longest batch"):
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
                f"{norm}); rows: {where}. No step was taken and earlier checkpoints are kept. Lower "
                "training.learning_rate, or look at these rows."
            )
        )
