"""The Python API: what ``import qvera`` gives. Each function does the work of a command, without what that prints.

A path is a run, an adapter, an exported checkpoint, or an id on the hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from rich.console import Console

from qvera.config.fields import Positive, Seed, value_problem
from qvera.config.schema import Recipe, load_recipe, parse_recipe
from qvera.config.sections import ExportDtype, ExportKind, LrRange
from qvera.data import Turn
from qvera.data.conversations import Conversation, read_messages
from qvera.evaluation import generate as answering
from qvera.evaluation.generate import PromptWriter
from qvera.evaluation.load import Artifact, OpenRun, find_target, open_adapters, open_target, require_answers
from qvera.evaluation.named_adapters import adapters_root, named_directories, require_all_named, require_named
from qvera.exporting import export as exports
from qvera.tasks import evaluate as evaluations
from qvera.utils.errors import InputError, QveraError, did_you_mean, first_line
from qvera.utils.files import refuse_file_name, resolve_path
from qvera.utils.progress import Phase

if TYPE_CHECKING:
    from qvera.evaluation.metrics import Metric
    from qvera.tasks.base import OwnLoss
    from qvera.training.lr_finder import RangeTestResult
    from qvera.training.run import RunResult

Prompt = str | Sequence[Mapping[str, Any]] | Conversation
"""A user's text; messages with ``role`` and ``content``, as in OpenAI's API; or a row as qvera reads it."""

Temperature = Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _checked(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Check the arguments that are texts, paths, numbers or choices by their annotations; InputError names a wrong one.

    What else the function takes, such as rows or callbacks, is left to itself.
    """
    names = list(inspect.signature(function).parameters)
    unseen = dict.fromkeys(("Metric", "OwnLoss", "RangeTestResult", "RunResult", "Model"), Any)
    hints = get_type_hints(function, localns=unseen, include_extras=True)
    config = ConfigDict(strict=True)
    checks = {
        name: TypeAdapter(hints[name], config=config) for name in names if name in hints and _is_plain(hints[name])
    }

    @functools.wraps(function)
    def call(*given: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        for name, value in (*zip(names, given, strict=False), *named.items()):
            if name not in names and "settings" not in names:
                of_recipe = " A key of the recipe stands in the recipe." if "recipe" in names else ""
                listed = ", ".join(known for known in names if known != "self")
                taken = f"{did_you_mean(name, names)}{of_recipe} Its arguments: {listed}."
                raise TypeError(f"{function.__name__}() takes no {name!r}{taken}")
            if name in checks:
                try:
                    checks[name].validate_python(value)
                except ValidationError as error:
                    problems = dict.fromkeys(map(value_problem, error.errors()))
                    raise InputError(f"{name}: {' Or: '.join(problems)}") from None
        try:
            return function(*given, **named)
        except QveraError as error:
            error.args = (_OPTION.sub(_as_argument, str(error)).replace("same command", "same call"),)
            raise

    return call


_ARGUMENTS = {"data": "rows", "lr-from": "start", "lr-steps": "steps", "resume": "resume=True"}
"""An option of a command that messages name → the argument here, where it is called otherwise."""
_OPTIONS = "adapter|base|data|dtype|find-lr|lr-from|lr-steps|max-new-tokens|quantize|rank|recipe|resume|to|with-base"
_VALUES = "NAME|FILE|merged|lora|peft|gguf-lora|gguf|q8_0|b?float[0-9]+|original|dequantized"
_OPTION = re.compile(rf"`[^`]*`|--({_OPTIONS})\b(?: ({_VALUES})\b)?")


def _as_argument(found: re.Match[str]) -> str:
    """Turn an option of a message into an argument; a command in backticks stays as it is."""
    option, value = found.groups()
    if option is None:
        return found[0]
    return _ARGUMENTS.get(option, option.replace("-", "_")) + (f"={value}" if value else "")


def _is_plain(hint: Any) -> bool:
    """Whether an annotation takes only texts, paths, numbers and choices, or sequences of these."""
    if get_origin(hint) is Annotated:
        return _is_plain(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return True
    return all(map(_is_plain, get_args(hint))) if get_args(hint) else hint in (bool, int, float, str, Path, type(None))


@_checked
def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[Any] = (),
    metrics: Mapping[str, Metric] | None = None,
    loss: OwnLoss | None = None,
    console: Console | None = None,
) -> RunResult | None:
    """Train an adapter, or many, and write a run directory, as ``qvera train`` does.

    Args:
        recipe: a recipe, its tree, or the path of its file.
        run_dir: default: as in ``qvera train``. It must not hold a run yet, unless ``resume``, or it was interrupted.
        resume: go on from the newest checkpoint there that verifies. A run that was interrupted, or that torchrun
            restarts, does so by itself.
        dry_run: check all that needs no weights of the base, show rows and the plan, and stop; nothing is written.
        callbacks: transformers' ``TrainerCallback`` objects, and functions that are called with each record of
            metrics.jsonl right after it is written, in the process that writes it. A function that returns False, or a
            callback that raises StopIteration, makes the run save a checkpoint and raise Interrupted. Any other
            exception stops the run too, and is raised once the checkpoint is saved.
        metrics: name → function of predictions, references and rows of the held-out data that returns a number. It is
            computed before and after training, and in each evaluation (docs/api.md).
        loss: in place of the cross entropy, a function of the targets' log-probabilities [n], or a classifier's logits
            [n, outputs], and a `qvera.tasks.base.LossBatch`. It returns the loss of each target [n], or their mean.
        console: for progress; default: standard error.

    Returns:
        ``run_dir``, and ``run``: the content of its run.json. None after a dry run, and in all but the first of several
        processes.

    Raises:
        InputError: recipe, data, model, run directory or a callback are wrong; nothing was written.
        Interrupted: a signal (SIGINT, SIGTERM, SIGHUP) or a callback stopped the run: during its steps after one,
            which was saved; in any other phase at once, and the same call goes on or begins again.
        RunFailed: a loss is not finite, a function of the caller's fails, or the disk is full; a checkpoint is kept.
    """
    from qvera.training import trainer  # here, so that to answer imports no training

    read, where = _recipe_and_directory(recipe, run_dir, resume)
    return trainer.train(
        read, where, resume=resume, dry_run=dry_run, callbacks=callbacks, metrics=metrics, loss=loss, console=console
    )


@_checked
def find_lr(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    start: float = LrRange.start,
    end: float = LrRange.end,
    steps: int = LrRange.steps,
    console: Console | None = None,
) -> RangeTestResult | None:
    """Test a range of learning rates, as ``qvera train --find-lr`` does, and write the curve into ``out``.

    Returns:
        ``suggestion`` (None where there is none, with a ``reason``), ``steepest``, ``diverged`` and ``points``. None in
        all but the first of several processes.

    Raises:
        InputError: as `train`, or the rates do not rise.
    """
    from qvera.training import trainer

    ramp = LrRange(start=start, end=end, steps=steps)
    read, where = _recipe_and_directory(recipe, out)
    return trainer.find_lr(read, where, ramp, console=console)


def _recipe_and_directory(
    recipe: Recipe | Mapping[str, Any] | str | Path, directory: str | Path | None, of_a_run: bool = False
) -> tuple[Recipe, Path]:
    from qvera.training.trainer import run_directory

    file = None
    if isinstance(recipe, str | Path):
        file = Path(resolve_path(recipe))
        recipe = load_recipe(file, of_a_run=of_a_run)
    elif not isinstance(recipe, Recipe):
        tree = dict(recipe) if isinstance(recipe, Mapping) else recipe
        recipe = parse_recipe(tree, "the recipe", drop_idle_keys=of_a_run)
    return recipe, run_directory(recipe, file) if directory is None else Path(resolve_path(directory))


@_checked
def load(
    path: str | Path,
    adapter: str | Sequence[str] | None = None,
    *,
    recipe: str | Path | None = None,
    base: bool = False,
    console: Console | None = None,
) -> Model:
    """Find a run, an adapter or an export. Its weights are read when they are first needed.

    Args:
        path: its directory, or its id on the hub.
        adapter: which adapter or adapters, of a run that trained many or a directory of adapters; default: all.
        recipe: a recipe or a run, whose rows and settings replace those of the run itself.
        base: the base model without the adapter.
        console: for progress; default: standard error.

    Raises:
        InputError: there is no such directory or adapter, or the path is something else.
    """
    path, given = Path(resolve_path(path)), None if recipe is None else Path(resolve_path(recipe))
    path = path.absolute() if path.exists() else path  # a program may change its directory; else an id on the hub
    if isinstance(adapter, str) or base or (root := adapters_root(path)) is None:
        name = adapter if isinstance(adapter, str) or adapter is None else next(iter(adapter), None)
        return Model(find_target(path, given, name=name, needs_name=not base), base=base, console=console)
    names = list(dict.fromkeys(named_directories(root) if adapter is None else adapter))
    require_all_named(path, names)
    target = find_target(path, given, needs_name=False)
    return Model(target, names=names, base=not names, console=console)


class Model:
    """A run, an adapter, an export or a base, as `load` found it. The first call that needs its weights reads them.

    Attributes:
        target: the directory, the base, the recipe.
        names: the names of adapters that are loaded together; empty for a single one or none.
    """

    def __init__(
        self, target: Artifact, *, names: Sequence[str] = (), base: bool = False, console: Console | None = None
    ) -> None:
        self.target, self.names, self.base_alone = target, tuple(names), base
        self.console = console or Console(stderr=True)
        self._opened: OpenRun | None = None
        self._lock = threading.RLock()  # a call sets its layers for its own passes, so others wait for its end

    @property
    def opened(self) -> OpenRun:
        """The base, its tokenizer and the adapter, in memory."""
        path = self.target.path
        with self._lock:
            if self._opened is None:
                with Phase(self.console, f"loading {path}", len(self.names) or None) as show:
                    if self.names:
                        self._opened = open_adapters(path, self.names, show)
                    else:
                        self._opened = open_target(self.target, adapter=not self.base_alone)
            return self._opened

    @_checked
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        adapter: str | Sequence[str | None] | None = None,
        max_new_tokens: Positive = 256,
        temperature: Temperature = 0.0,
        top_p: Share = 1.0,
        seed: Seed = 0,
        batch_size: Positive = 16,
        on_answer: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Answer each prompt, as ``qvera generate`` does.

        Args:
            prompts: one or many. A text gets the recipe's system prompt; messages are taken as they are.
            adapter: where several are loaded: the one for all prompts, or one for each (None: the base alone).
            max_new_tokens: the longest answer. It ends too where the model's context does.
            temperature: 0 is greedy; else answers are sampled with ``top_p`` and ``seed``.
            on_answer: called with the number of a prompt, from 0, and its answer, as soon as that is there.

        Raises:
            InputError: it is a classifier, an adapter is not loaded, or a prompt is too long.
            RunFailed: memory does not suffice for a single prompt.
        """
        require_answers(self.target, "qvera generate")
        if isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable):
            raise InputError(f"prompts: expected a text, or a list of texts or of lists of messages, got {prompts!r}.")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        names = [adapter] * len(listed) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(listed):
            raise InputError(f"adapter: names {len(names)} adapters for {len(listed)} prompts; name one for each.")
        if self.names:
            if adapter is None:
                # It raises, and its message lists the adapters: one of them must be named.
                require_named(self.target.path, None)
            for name in names:
                if name is not None and name not in self.names:
                    raise InputError(f"adapter: {name!r} is not loaded{did_you_mean(name, self.names)}")
        elif adapter is not None and None in names and not self.base_alone:
            load = f"qvera.load({str(self.target.path)!r}, base=True)"
            raise InputError(f"adapter: None asks for the base alone. Load that: {load}.")
        elif adapter is not None and (wrong := [name for name in names if name != self.target.name]):
            is_alone = self.target.name is None and not self.base_alone
            advice = f"{self.target.path} has one adapter" if is_alone else "name it in `load`"
            raise InputError(f"adapter: {wrong[0]!r} is not loaded; {advice}.")
        rows = [_conversation(prompt, number) for number, prompt in enumerate(listed, start=1)]
        opened = self.opened
        writer = PromptWriter.of(opened)
        if writer.system:
            asked = Turn("system", writer.system)
            rows = [
                dataclasses.replace(row, turns=[asked, *row.turns]) if isinstance(prompt, str) else row
                for prompt, row in zip(listed, rows, strict=True)
            ]
        encoded = [writer.ids(row.turns, row.tools) for row in rows]
        answering.require_context(opened.model, [(row.source, ids) for row, ids in zip(rows, encoded, strict=True)])
        tokenizer = opened.base.tokenizer

        def told(number: int, tokens: list[int]) -> None:
            if on_answer is not None:
                on_answer(number, tokenizer.decode(tokens, skip_special_tokens=True))

        with self._lock, Phase(self.console, "answering", len(encoded)) as show:
            return answering.generate(
                opened.model,
                tokenizer,
                encoded,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                adapters=["__base__" if n is None else opened.keys[n] for n in names] if self.names else None,
                progress=show,
                on_answer=told,
                images=[writer.images(row.turns) for row in rows],
            )

    def _require_one(self) -> None:
        if self.names:
            raise InputError(
                f"{self.target.path}: {len(self.names)} adapters are loaded, and this takes one. Load it alone: "
                f"qvera.load({str(self.target.path)!r}, {self.names[0]!r})."
            )

    @_checked
    def evaluate(
        self,
        rows: str | Path | Sequence[Mapping[str, Any]] | None = None,
        *,
        limit: Positive | None = None,
        metrics: Sequence[str] = ("exact",),
        group_prompts: bool = False,
        answers: bool = True,
        max_new_tokens: Positive | None = None,
        with_base: bool = False,
    ) -> dict[str, Any]:
        """Measure the held-out loss, answer, and score the answers, as ``qvera eval`` does.

        Args:
            rows: a file, or the rows themselves, in a format of ``data.format``; default: the recipe's held-out rows.
                Images in rows themselves are named by absolute paths.
            limit: use only the first rows.
            metrics: how answers are compared with references: ``exact``, ``bleu``, ``rougeL`` and others.
            group_prompts: rows with the same prompt are one, with all their references.
            answers: False: loss only.
            max_new_tokens: of an answer; default: the recipe's.
            with_base: evaluate the base model too.

        Returns:
            What ``qvera eval --json`` writes: ``scores``, ``base_scores``, ``answers``, and what was evaluated.

        Raises:
            InputError: there are no rows, several adapters are loaded, or a package for a metric is missing.
        """
        self._require_one()
        with self._lock, contextlib.ExitStack() as until_scored:
            called = None
            if rows is not None and not isinstance(rows, str | Path):
                rows, called = until_scored.enter_context(_file_of(rows)), "the given rows"
            if with_base and self.target.adapter is None:  # an export's weights make room for those of its base
                until_scored.callback(setattr, self, "_opened", None)
            document = evaluations.evaluate(
                self.target,
                None if rows is None else str(rows),
                called=called,
                limit=limit,
                base_alone=self.base_alone,
                with_base=with_base,
                metrics=metrics,
                group_prompts=group_prompts,
                answers=answers,
                max_new_tokens=max_new_tokens,
                opened=lambda: self.opened,
                console=self.console,
            )
            for row in document["answers"] if called else ():
                row["source"] = row["source"].replace(str(rows), "rows")
            return document

    @_checked
    def export(
        self,
        out: str | Path,
        *,
        to: ExportKind = "merged",
        rank: Positive | None = None,
        dtype: ExportDtype | None = None,
        quantize: Literal["nf4", "fp4"] | None = None,
        base: Literal["original", "dequantized"] | None = None,
        compare: bool = True,
    ) -> dict[str, Any]:
        """Write a checkpoint or an adapter that other tools load, as ``qvera export`` does.

        Args:
            out: a new or empty directory.
            to: ``merged``, ``lora``, ``peft``, ``gguf`` or ``gguf-lora``.
            rank: of a LoRA, to keep only the best directions.
            dtype: default: the recipe's, float16.
            quantize: a merge to ``nf4`` or ``fp4``.
            base: merge into the ``original`` weights or the ``dequantized`` ones; default: the recipe's.
            compare: measure the difference between the trained and the exported model.

        Returns:
            The certificate: what was written from what.

        Raises:
            InputError: the arguments contradict each other, or there is no adapter.
            RunFailed: a weight is out of the dtype's range, or the disk is full.
        """
        self._require_one()
        return exports.export(
            self.target,
            Path(resolve_path(out)),
            to=to,
            rank=rank,
            dtype=dtype,
            quantize=quantize,
            base=base,
            compare=compare,
            console=self.console,
        )


@contextlib.contextmanager
def _file_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[Path]:
    """A temporary file of rows. An InputError about it calls it ``rows``."""
    with tempfile.TemporaryDirectory(prefix="qvera-rows-") as folder:
        file = Path(folder) / "rows.jsonl"
        listed = list(rows) if isinstance(rows, Iterable) else [rows]
        if wrong := [row for row in listed if not isinstance(row, Mapping)]:
            raise InputError(
                f"rows: expected a file, or a list of mappings such as {{'prompt': ..., 'completion': ...}}; got "
                f"{wrong[0]!r}. Of a DataFrame, df.to_dict('records') is such a list."
            )
        try:
            lines = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in listed)
            file.write_text(lines, encoding="utf-8")
        except (TypeError, ValueError) as error:
            raise InputError(
                f"rows: can't be written as lines of JSON ({first_line(error)}) Values are those that JSON has."
            ) from None
        try:
            yield file
        except InputError as error:
            # The caller gave no file, so its name would tell nothing.
            raise InputError(str(error).replace(str(file), "rows")) from None


def _conversation(prompt: Prompt, number: int) -> Conversation:
    if isinstance(prompt, Conversation):
        return prompt
    if isinstance(prompt, str):
        refuse_file_name(prompt, f"prompt {number}")
        return Conversation([Turn("user", prompt)], f"prompt {number}")
    if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Sequence):
        hint = " Give the text itself." if isinstance(prompt, Mapping) else ""
        if hint and "role" in map(str, prompt):
            hint = " Put the messages of a conversation into a list: [[...]]."
        raise InputError(f"prompt {number}: expected a text or a list of messages, got {prompt!r}.{hint}")
    return Conversation(read_messages(prompt, f"prompt {number}"), f"prompt {number}")


@_checked
def generate(
    path: str | Path,
    prompts: str | Sequence[Prompt],
    *,
    adapter: str | Sequence[str | None] | None = None,
    console: Console | None = None,
    **settings: Any,
) -> list[str]:
    """`load` a model and answer prompts. ``settings`` are those of `Model.generate`."""
    names = adapter if adapter is None or isinstance(adapter, str) else [name for name in adapter if name is not None]
    return load(path, names, console=console).generate(prompts, adapter=adapter, **settings)


@_checked
def evaluate(
    path: str | Path,
    rows: str | Path | Sequence[Mapping[str, Any]] | None = None,
    *,
    adapter: str | None = None,
    console: Console | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`load` a model and score it on rows. ``settings`` are those of `Model.evaluate`."""
    return load(path, adapter, console=console).evaluate(rows, **settings)


@_checked
def export(
    path: str | Path,
    out: str | Path,
    *,
    adapter: str | None = None,
    console: Console | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`load` a model and export its adapter. ``settings`` are those of `Model.export`."""
    return load(path, adapter, console=console).export(out, **settings)
