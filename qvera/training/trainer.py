"""The beginning of a training: the processes, the run directory, mistakes that the recipe alone shows, then torch.

A process on its own imports torch last, so a failing start takes a second or two.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.config.schema import Recipe, load_recipe
from qvera.config.sections import LrRange
from qvera.data.source import hub_datasets
from qvera.distributed.group import for_all, in_group
from qvera.training.run_dir import check_run_dir, mark_ended, require_writable, run_lock
from qvera.utils.errors import InputError
from qvera.utils.files import RECIPE_FILE, cache_root, is_recipe_of_run, resolve_path

if TYPE_CHECKING:
    from rich.console import Console

    from qvera.evaluation.metrics import Metric
    from qvera.tasks.base import OwnLoss
    from qvera.training.lr_finder import RangeTestResult
    from qvera.training.run import Run, RunResult
    from qvera.training.session import TrainingSession

_logger = logging.getLogger(__name__)
_RESTART_WAIT_SECONDS = 60.0  # for the lock of the process whose place a restarted run takes


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[Any] = (),
    metrics: Mapping[str, Metric] | None = None,
    loss: OwnLoss | None = None,
    console: Console | None = None,
) -> RunResult | None:
    """Train an adapter, or many, and write a run directory. Arguments, result and errors: see `qvera.api.train`."""
    with _session(recipe, run_dir, console, resume, is_run=not dry_run) as (session, goes_on):
        from transformers import EarlyStoppingCallback

        from qvera.training.alone import Trainer
        from qvera.training.callbacks import Callbacks
        from qvera.training.checkpoint import directories, of_rank
        from qvera.training.many import ManyTrainer

        own = session.group.agree(lambda: Callbacks(callbacks))
        if recipe.data.has_adapters and own.callbacks:
            raise for_all(
                InputError(
                    f"callbacks: {type(own.callbacks[0]).__name__} follows the steps of one adapter, and with "
                    "data.adapter_column or adapter_files there are many. A function gets the records of all."
                )
            )
        if not recipe.training.eval_steps and any(isinstance(one, EarlyStoppingCallback) for one in own.callbacks):
            raise for_all(
                InputError("callbacks: EarlyStoppingCallback needs evaluations on the way; set training.eval_steps.")
            )
        trainer: Run = (ManyTrainer if recipe.data.has_adapters else Trainer)(session, own, goes_on)
        session.group.agree(lambda: session.task.take_own(metrics or {}, loss))
        if loss is not None and session.zero is not None and session.zero.shards_base:
            raise for_all(InputError("loss: is not computed by a head that ZeRO-3 shards. Use zero1, zero2 or none."))
        if dry_run:
            trainer.load_data(preview=True)
            session.check_model()
            return None
        if goes_on and not resume:
            saved = directories(of_rank(run_dir, session.group.rank))
            how = "it goes on" if saved else "no step of it was saved, so it begins again"
            session.say(f"{run_dir} holds this run, which was interrupted: {how}.")
        status = "failed"
        try:
            trainer.load_data()
            session.load_model()
            trainer.setup()
            return trainer.train()
        except KeyboardInterrupt as signal:
            status = "interrupted"
            raise trainer.interrupted(signal) from None
        finally:
            mark_ended(run_dir, status)
            if own.error is not None:  # raised in place of Interrupted, or after the last step
                raise own.error


def find_lr(
    recipe: Recipe, out: Path, ramp: LrRange | None = None, *, console: Console | None = None
) -> RangeTestResult | None:
    """Test learning rates and write ``lr-range.jsonl`` and ``lr-range.html`` into ``out``; a run there stays as it is.

    Returns None in a process that is not the first of several. InputError as `train`; NotFinite where the very first
    loss was not finite.
    """
    if recipe.training.objective == "grpo":
        raise InputError(
            "--find-lr: goes by the loss, which with training.objective: grpo is near 0 at any rate. Compare the "
            "rewards of short runs."
        )
    with _session(recipe, out, console) as (session, _):
        from qvera.training.lr_finder import take_range_test

        return take_range_test(session, ramp or LrRange())


def run_directory(recipe: Recipe, file: Path | None) -> Path:
    """Return the directory of a recipe's run: ``training.output_dir``, or ``runs/`` and the name of its file.

    The recipe.yaml that a run has written into its directory is a recipe of that directory, also after it was moved or
    copied; another ``output_dir`` than is written there begins a run elsewhere.
    """
    asked = recipe.training.output_dir
    if file is not None and is_recipe_of_run(file):
        written = load_recipe(file, of_a_run=True).training.output_dir
        if asked in (None, written):
            return file.parent
    if asked is not None:
        return Path(resolve_path(asked))
    return Path("runs") / (file.stem if file is not None else "run")


@contextlib.contextmanager
def _session(
    recipe: Recipe, run_dir: Path, console: Console | None, resume: bool | None = None, is_run: bool = False
) -> Iterator[tuple[TrainingSession, bool]]:
    """Yield a session, and whether it goes on with the run in the directory. A run holds that directory until the end.

    ``resume``: None leaves a run that is there as it is.
    """
    with in_group() as group, contextlib.ExitStack() as held:
        # Whether any node counts a restart: the node that takes the place of a lost one does not know that it is one.
        again = bool(group.sum([float(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))])[0])

        def open_run_dir() -> bool:
            if is_run:
                held.enter_context(run_lock(run_dir, _RESTART_WAIT_SECONDS if again else 0.0))
            else:
                require_writable(run_dir)
            # a restart goes on only with a run that its own launch has begun
            begun = again and group.has_flag(f"begun {run_dir}") and (run_dir / RECIPE_FILE).exists()
            return resume is not None and check_run_dir(run_dir, recipe, begun or resume)

        goes_on = group.on_first(open_run_dir)
        group.agree(lambda: check_early(recipe))

        from qvera.training.session import TrainingSession

        session = TrainingSession(recipe, run_dir, group, console)
        with session.signals, session.resources:
            yield session, goes_on


def check_early(recipe: Recipe) -> None:
    """Check the base's directory before torch is imported. InputError as their readers would raise it.

    Where the hub is asked for something and does not answer, its client goes offline: it would try again for a minute.
    """
    if (root := cache_root()).exists() and not root.is_dir():
        raise InputError(
            f"{root}: is a file, and the cache needs a directory; see the environment variable QVERA_CACHE."
        )
    if recipe.data.system is not None and os.path.isfile(recipe.data.system):  # not Path's: a text may be long
        raise InputError(f"data.system: {recipe.data.system!r} is a file here. Write its text into the recipe.")
    hub_datasets(recipe.data)  # raises where rows are in no file here, and not on the hub by their name

    from qvera.models.hub import require_model_files

    require_model_files(resolve_path(recipe.model.path))
