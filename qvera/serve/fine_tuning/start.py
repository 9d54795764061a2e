"""Fine-tuning on a base that is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.serve.fine_tuning.jobs import Jobs
from qvera.serve.fine_tuning.recipes import Recipes
from qvera.training.online import OnlineTrainer
from qvera.training.run_dir import require_writable
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.serve.engine import Engine
    from qvera.serve.fine_tuning.directory import TrainingDirectory
    from qvera.serve.opening import Served


def open_jobs(directory: TrainingDirectory, served: Served, engine: Engine, at_once: int) -> Jobs:
    """The jobs of a training directory, as the engine's background work; entering them lets them go on.

    Args:
        at_once: how many are trained together.

    Raises:
        InputError: there is no directory for their adapters, or adapters of the served run can't be trained so.
    """
    if served.store.root is None:
        raise InputError(
            "--training-dir: what is trained becomes a model of the directory of adapters, and there is none. Name one "
            "with --adapters DIR; it may be empty."
        )
    require_writable(served.store.root / "adapter", "--adapters")
    recipes = Recipes(served.opened.target)
    trainer = OnlineTrainer(served.opened.base, recipes.server, at_once)
    jobs = Jobs(directory, recipes, trainer, served.store, served.opened.base.tokenizer, engine.wake)
    engine.set_background(jobs.worker)
    return jobs
