"""Run lm-evaluation-harness (the package lm-eval, extra ``harness``) on a run, an adapter or an export."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from qvera.evaluation import held_out
from qvera.evaluation.generate import end_tokens
from qvera.evaluation.load import OpenRun
from qvera.models.structure import causal_model
from qvera.utils.errors import InputError, first_line, require_packages

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def find_tasks(names: Sequence[str], include: Path | None) -> TaskManager:
    """lm-eval's task manager, after a check that it has these tasks.

    ``names`` are tasks, groups or tags; ``*`` is allowed. Tasks in the directory ``include`` come before lm-eval's.

    InputError: lm-eval is not installed, or the directory or a task does not exist.
    """
    require_packages("harness", "lm_eval")
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise InputError(f"--include {include}: no such directory. Expected one with lm-eval task files (*.yaml).")
    if not names:
        raise InputError("--tasks: names no task.")
    path = None if include is None else str(include)
    # lm-eval's own thousands of tasks are only looked through where a name is not among the given ones
    for defaults in (False, True) if include is not None else (True,):
        manager = TaskManager(include_path=path, include_defaults=defaults)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise InputError(
        f"--tasks: lm-eval has no task {unknown[0]!r}"
        + (f", and none is defined in {include}. " if include is not None else "; --include DIR adds your own. ")
        + "`lm_eval ls tasks` lists them."
    )


def run_harness(
    opened: OpenRun, manager: TaskManager, names: Sequence[str], batch_size: int, **options: object
) -> dict[str, Any]:
    """Evaluate a model, and return lm-eval's results (``results``: task → metrics). InputError: a task can't be set up.

    ``options`` are those of lm-eval's ``simple_evaluate``.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # answers end where ours do, and a checkpoint's own settings, such as a repetition penalty, do not count
    ends = end_tokens(opened.model, opened.base.tokenizer)
    causal_model(opened.model).generation_config = GenerationConfig(eos_token_id=ends)
    with held_out.scoring(opened.model):
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=opened.model, tokenizer=opened.base.tokenizer, batch_size=batch_size),
                tasks=manager.match_tasks(list(names)),
                task_manager=manager,
                **options,
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--tasks {','.join(names)}: lm-eval could not run it: {first_line(error)}") from error
    return dict(found or {})
