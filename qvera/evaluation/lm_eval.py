"""Run lm-evaluation-harness on a run, an adapter or an export.

The harness (the package lm-eval, extra ``harness``) makes prompts and scores; the model it asks is what
`qvera.evaluation.load` opens, so a run is measured on the quantized base it was trained on, without an export. For a
merged export ``lm_eval --model hf`` does the same by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.evaluation import evaluate
from qvera.evaluation.load import OpenRun
from qvera.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def find_tasks(names: Sequence[str], include: Path | None) -> TaskManager:
    """lm-eval's task manager, once it is known to have these tasks.

    Args:
        names: of tasks, groups or tags, with ``*`` allowed.
        include: a directory with tasks of one's own (YAML files); they come before lm-eval's of the same name.

    Raises:
        InputError: lm-eval is not installed, no such directory, or no task of one of the names.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "qvera harness needs the package lm-eval, which is not installed. Install it with: pip install "
            "'qvera[harness]'."
        )
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
    opened: OpenRun,
    manager: TaskManager,
    names: Sequence[str],
    *,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Evaluate an opened model on tasks of lm-eval.

    Args:
        manager: from `find_tasks`.
        limit: documents of each task; None: all.
        few_shot: examples before each question, where the task leaves it open.
        chat: prompts go through the tokenizer's chat template.
        log_samples: keep every document with the model's answers.

    Returns:
        lm-eval's results: ``results`` has a mapping of metrics for each task.

    Raises:
        InputError: a task can't be set up, as for data that is not there.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = manager.match_tasks(list(names))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with evaluate.scoring(opened.model):
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=opened.model, tokenizer=opened.base.tokenizer, batch_size=batch_size),
                tasks=tasks,
                task_manager=manager,
                num_fewshot=few_shot,
                limit=limit,
                apply_chat_template=chat,
                log_samples=log_samples,
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--tasks {','.join(names)}: lm-eval could not run it: {first_line(error)}") from error
    return dict(found or {})
