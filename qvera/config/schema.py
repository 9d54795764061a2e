"""The recipe: its sections together, the keys beside them, and how it is read from YAML and ``--set``.

YAML is read as by PyYAML's safe loader, with fewer surprises: ``010`` is no number (YAML 1.1 reads 8), and 2026-12-01 a
text. Repeated keys, and aliases that expand to more than a recipe can hold, are errors.
"""

import copy
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from qvera.config.fields import NonEmpty, OnlyWith, Section, key_problems, take_old_keys
from qvera.config.plugins import extensible
from qvera.config.sections import AdapterSection, DataSection, DataSource, ExportSection, ModelSection, TrainingSection
from qvera.utils.errors import InputError, did_you_mean_path
from qvera.utils.files import RECIPE_FILE, not_utf8, other_writer
from qvera.utils.formatting import counted, describe


def _path_alone(value: object) -> object:
    return {"path": str(value)} if isinstance(value, str | Path) else value


_FORMAT_OF = {"sequence-classification": "classification", "image-classification": "image"}
"""Task → the format of its rows, where it has one of its own."""
_FORMAT_OF_OBJECTIVE = {
    "dpo": "preference", "orpo": "preference", "kto": "unpaired-preference", "grpo": "prompt",
}  # fmt: skip
"""``training.objective`` → likewise."""


def _with_format(source: Any, wanted: str) -> Any:
    """The keys of a source with this format, where they leave it open."""
    keys = dict(source) if isinstance(source, DataSource) else source
    return {**keys, "format": wanted} if isinstance(keys, dict) and keys.get("format", "auto") == "auto" else keys


_NO_EFFECT = "has no effect without"
_SHARED_PASS_ROWS = 16
"""The default of ``training.per_device_train_batch_size`` where many adapters share a forward pass."""


@extensible("RecipeKeys")
class Recipe(Section):
    """A whole run. The sections say what each key means."""

    model: Annotated[ModelSection, BeforeValidator(_path_alone, json_schema_input_type=str | ModelSection)]
    """The frozen base model: a mapping, or its path alone."""
    data: Annotated[DataSection, BeforeValidator(_path_alone, json_schema_input_type=str | DataSection)]
    """Where rows come from, how they become text, and which tokens are trained: a mapping, or their path alone."""
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    """The VeRA adapter."""
    training: TrainingSection = Field(default_factory=TrainingSection)
    """The training loop."""
    export: ExportSection = Field(default_factory=ExportSection)
    """The defaults of ``qvera export``."""
    task: Literal["causal-lm", "sequence-classification", "image-classification"] = "causal-lm"
    """What is trained: ``causal-lm``, a language model on answers or text; ``sequence-classification``, a model that
    gives each text or pair of texts a class or a number (docs/classification.md); or ``image-classification``, a model
    that gives each image a class (docs/images.md)."""
    deepspeed: Annotated[NonEmpty | None, BeforeValidator(lambda value: None if value == "none" else value)] = None
    """How several processes share the work. Null or ``none``: they sum their gradients and share nothing else; right
    for almost every run. ``zero3``: each process holds only a shard of the frozen 4-bit base, for a base that does not
    fit on one device. ``zero3-offload-cpu`` and ``zero3-offload-nvme``: the shards are kept in RAM or on disk.
    ``zero1`` and ``zero2``: the optimizer's state is sharded, which saves a few MB. Or the path of a DeepSpeed
    configuration file, such as a copy of one in ds_configs/. It must not set what the recipe sets (batch size,
    precision, clipping, schedule)."""

    def _keys_without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield keys that are set while what they are about is switched off (`OnlyWith`)."""
        sections = [(name, section) for name, section in self if isinstance(section, Section)]
        sections += [(f"data.mixture.{number}", part) for number, part in enumerate(self.data.mixture)]
        for name, section in sections:
            for key, field in type(section).model_fields.items():
                changed = getattr(section, key) != field.get_default(call_default_factory=True)
                for mark in field.metadata:
                    if changed and isinstance(mark, OnlyWith) and not mark.is_on(self):
                        *others, last = mark.switches
                        switches = f"{', '.join(others)} or {last}" if others else last
                        yield f"{name}.{key}", f"{_NO_EFFECT} {switches}. Set that, or remove this key."

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, tree: object) -> object:
        """Fill in defaults that depend on other keys: the format of rows, and how many share a forward pass."""
        if isinstance(tree, dict):  # a key with nothing behind it, such as a section of comments alone, is not set
            tree = {key: value for key, value in tree.items() if value is not None or key not in cls.model_fields}
        if not isinstance(tree, dict) or not isinstance(training := tree.get("training", {}), dict | TrainingSection):
            return tree
        data, keys = _path_alone(tree.get("data")), dict(training)
        if isinstance(data, DataSection):
            data = dict(data)
        if not isinstance(data, dict):
            return tree
        wanted = _FORMAT_OF.get(str(tree.get("task"))) or _FORMAT_OF_OBJECTIVE.get(str(keys.get("objective")))
        if wanted is not None:
            mixture = data.get("mixture")
            parts = [_with_format(part, wanted) for part in mixture] if isinstance(mixture, list) else mixture
            data = _with_format(data if parts is None else {**data, "mixture": parts}, wanted)
        if isinstance(training, dict) and (data.get("adapter_column") or data.get("adapter_files")):
            training = {"per_device_train_batch_size": _SHARED_PASS_ROWS, **training}
        return {**tree, "data": data, **({"training": training} if training else {})}

    def _format_contradictions(self) -> Iterator[tuple[str, str]]:
        objective = self.training.objective
        name, wanted = f"task: {self.task}", _FORMAT_OF.get(self.task)
        if wanted is None:
            name, wanted = f"training.objective: {objective}", _FORMAT_OF_OBJECTIVE.get(objective)
        for key, source in self.data.sources("data.format"):
            if wanted is not None and source.format != wanted:
                yield key, f"{name} reads rows of the format {wanted}; set this key to auto."
            elif wanted is None and source.format in _FORMAT_OF.values():
                task = next(task for task, format in _FORMAT_OF.items() if format == source.format)
                yield key, f"{source.format} is for task: {task}. Set that beside the sections."
            elif wanted is None and source.format in _FORMAT_OF_OBJECTIVE.values():
                fitting = " or ".join(one for one, form in _FORMAT_OF_OBJECTIVE.items() if form == source.format)
                yield key, f"{source.format} is for training.objective: {fitting}. Set that."

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys of different sections that contradict each other."""
        data, training, wanted = self.data, self.training, "set data.eval_path, eval_split or eval_fraction."
        yield from self._keys_without_effect()
        yield from self._format_contradictions()
        if training.objective != "sft":
            of = _reward_contradictions if training.objective == "grpo" else _preference_contradictions
            yield from of(self)
        rows, pass_rows = training.step_rows, training.per_device_train_batch_size
        if data.has_adapters:
            key = "adapter_files" if data.adapter_files else "adapter_column"
            yield from self.many_adapters_contradictions(f"data.{key}")
        elif rows % pass_rows:
            size = f"training.per_device_train_batch_size ({pass_rows})"
            answers = " (answers, group_size to each prompt)" if rows > training.global_batch_size else ""
            yield "training.global_batch_size", f"{rows}{answers} is not a multiple of {size}."
        for name in ("eval_steps", "load_best_model_at_end", "early_stopping_patience"):
            if getattr(training, name) and not data.has_held_out_rows:
                yield f"training.{name}", f"needs held-out rows; {wanted}"
            elif getattr(training, name) and not training.eval_steps:
                yield f"training.{name}", "needs training.eval_steps above 0."
        if training.metric_for_best_model != "loss" and (data.has_adapters or not training.eval_steps):
            needs = "many adapters are compared by their loss" if data.has_adapters else "needs training.eval_steps"
            yield "training.metric_for_best_model", f"{training.metric_for_best_model}: {needs}."
        if training.greater_is_better and training.metric_for_best_model in ("loss", "perplexity"):
            yield "training.greater_is_better", f"of the {training.metric_for_best_model} less is better. Remove it."
        # other tasks have no exact match, and say so (`Task.take_own`)
        asks = self.task == "causal-lm" and training.objective != "grpo" and not data.has_adapters
        if asks and training.metric_for_best_model == "exact_match" and not training.exact_match_rows:
            yield "training.metric_for_best_model", "exact_match: needs training.exact_match_rows."
        if self.model.stream is True and training.torch_compile:
            yield "training.torch_compile", "compiled code does not wait for streamed layers; remove one of the two."
        if self.deepspeed is not None and training.optim != "adamw":
            yield (
                "training.optim",
                f"{training.optim} keeps its state in blocks that ZeRO would cut elsewhere with every other number of "
                "processes. With a deepspeed key use adamw; VeRA's whole optimizer state is a few MB.",
            )
        if self.deepspeed is not None and training.on_oom == "halve":
            yield "training.on_oom", "halve: DeepSpeed can't undo a step that its ranks have begun; use save."

    def many_adapters_contradictions(self, names: str) -> Iterator[tuple[str, str]]:
        """Yield keys with which no adapters can be trained together. ``names``: what asks for many of them."""
        adapter, training, name = self.adapter, self.training, f"many adapters ({names})"
        if adapter.dropout:
            yield (
                "adapter.dropout",
                f"each adapter ({names}) equals the same one trained alone, but for random drops; set it to 0.",
            )
        if adapter.magnitude:
            yield "adapter.magnitude", f"its norms are not kept for {name}; remove one of the two."
        if self.model.compute_dtype == "float16":
            yield (
                "model.compute_dtype",
                f"float16 needs a loss scale, which {name} would share; use bfloat16 or float32.",
            )
        if self.deepspeed is not None:
            yield (
                "deepspeed",
                f"processes share out the adapters ({names}), and each trains its own without DeepSpeed; remove it.",
            )
        if training.objective != "sft":
            yield "training.objective", f"{training.objective} is not built for {name}; use sft."
        if training.optim != "adamw":
            yield "training.optim", f"{name} are stepped together by adamw; use that."
        yield from self._not_built(name, "model.added_tokens", "training.torch_compile", "training.exact_match_rows")
        if training.on_oom == "halve":
            yield "training.on_oom", f"halve is not built for {name}; use save."

    def _not_built(self, name: str, *keys: str) -> Iterator[tuple[str, str]]:
        """Yield those of the keys that are set; ``name``: what does not go with them."""
        for key in keys:
            if operator.attrgetter(key)(self):
                yield key, f"is not built for {name}; remove one of the two."

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every key written out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _reward_contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield keys that have no meaning where the model trains on its own answers."""
    data, training, name = recipe.data, recipe.training, "training.objective: grpo"
    if training.reward is None:
        yield "training.reward", f"{name} needs a function that scores answers, such as rewards.py:score."
    if training.clip_low_threshold > 1 or training.clip_high_threshold < 1:
        yield "training.clip_low_threshold", "the bounds of the ratio have to be on both sides of 1."
    if recipe.adapter.dropout:
        yield "adapter.dropout", f"with {name} an answer's probability would change by what is dropped; set it to 0."
    if data.too_long == "split":
        yield "data.too_long", f"split would part a prompt; with {name} use cut-start or drop."
    if data.train_on != "assistant":
        yield "data.train_on", f"{name} trains on the model's own answers; remove the key."
    for key in ("packing", "group_by_length"):
        if getattr(data, key):
            yield f"data.{key}", f"{name} trains on answers that are not known before; remove one of the two."
    keys = "training.label_smoothing", "training.torch_compile", "training.exact_match_rows"
    yield from recipe._not_built(name, *keys)
    if training.on_oom == "halve":
        yield "training.on_oom", f"halve is not built for {name}; use save."


def _preference_contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield keys that have no counterpart in the loss of the recipe's objective, and are not ignored in silence."""
    data, training, adapter = recipe.data, recipe.training, recipe.adapter
    objective = training.objective
    name = f"training.objective: {objective}"
    if data.too_long not in ("cut-end", "drop"):
        yield "data.too_long", f"{data.too_long} would part an answer from its prompt; with {name} use cut-end or drop."
    if data.train_on != "assistant":
        yield "data.train_on", f"{name} compares the last answers of its rows; remove the key."
    for key in ("max_source_length", "max_target_length"):
        if getattr(data, key) is not None:
            yield f"data.{key}", f"is not built for {name}; set data.max_length."
    if data.packing:
        yield "data.packing", f"is not built for {name}, whose rows stand in a padded batch; remove one of the two."
    for key, source in data.sources("data.label_names"):
        if source.label_names:
            yield key, f"has no meaning for {name}; remove it."
    yield from recipe._not_built(name, "training.label_smoothing", "training.torch_compile")
    if training.loss_chunk_tokens != type(training).model_fields["loss_chunk_tokens"].default:
        yield "training.loss_chunk_tokens", f"{name} computes its loss in TRL, which has its own chunks; remove it."
    if training.gradient_checkpointing == "offload":
        yield "training.gradient_checkpointing", f"offload is not built for {name}; use true."
    if objective != "dpo" and training.on_oom == "halve":
        yield "training.on_oom", f"halve changes the loss of {name}, which depends on the rows of a pass; use save."
    if adapter.dropout:
        yield "adapter.dropout", f"TRL's losses are computed without dropout ({name}); set it to 0."
    if adapter.init_from is not None and objective != "orpo":
        yield (
            "adapter.init_from",
            f"the reference of {name} is the base without an adapter. Export that adapter (`qvera export --to merged`) "
            "and set model.path to the result.",
        )
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if objective == "kto" and getattr(training, key) < 2:
            yield f"training.{key}", f"{name} pairs each prompt with another row's answer; set 2 or more."


def json_schema() -> dict[str, object]:
    """Return the JSON schema of a recipe, with titles, descriptions and defaults, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def parse_recipe(
    tree: object, source: str, lines: dict[tuple[str, ...], int] | None = None, drop_idle_keys: bool = False
) -> Recipe:
    """Turn a parsed YAML tree into a `Recipe`.

    Args:
        tree: what a YAML reader returned.
        source: the file's name, for messages.
        lines: the line of each key by its path, such as ``("adapter", "rank")``, for messages.
        drop_idle_keys: ignore keys that have no effect without another one, and removed keys of any value, which
            otherwise are errors.

    Raises:
        InputError: with every problem of the recipe, one a line.
    """
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else describe(tree)
        raise InputError(f"{source}: a recipe is a mapping with at least `model` and `data`, got {got}.")
    tree = take_old_keys(tree, source, of_a_run=drop_idle_keys)
    while True:
        try:
            return Recipe.model_validate(tree)
        except ValidationError as error:
            found = key_problems(error, Recipe)
        idle = [key for key, sentence in found if sentence.startswith(_NO_EFFECT)] if drop_idle_keys else []
        tree = copy.deepcopy(tree)
        removed = [_remove(tree, key) for key in idle]
        if not any(removed):  # else again: a key that is gone may have been another's switch
            break
    listed = ""
    for key, sentence in found:
        line = (lines or {}).get(tuple(key.split(".")))
        listed += "\n  " + ("" if line is None else f"line {line}, ") + f"{key}: {sentence}"
    count = len(found)
    raise InputError(f"{source}: {count} problem{'s' if count > 1 else ''} in the recipe:{listed}")


def _remove(tree: Any, key: str) -> bool:
    """Remove a key by its path; returns whether it was there."""
    *way, last = key.split(".")
    for part in way:
        tree = tree[int(part)] if isinstance(tree, list) else tree.get(part, {})
    return tree.pop(last, None) is not None


_MOST_NODES = 100_000
"""Values in a recipe after its aliases are expanded; a usual recipe has a hundred."""

_REPLACED = {
    "data.eval_path": ("data.eval_fraction",),
    "data.eval_split": ("data.eval_fraction",),
    "data.eval_fraction": ("data.eval_path", "data.eval_split"),
    "training.num_train_epochs": ("training.max_steps",),
}
"""Override → keys of the recipe that it replaces: other ways to say the same."""


class _Loader(yaml.SafeLoader):
    """Dates are texts, and so are octal and base-60 numbers, which no key that takes a number accepts."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        tag = super().resolve(kind, value, implicit)
        number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        is_odd = number and re.fullmatch(r"[-+]?(0[0-9_]+|0[bx]_+|[0-9_]+:.*)", value)
        return "tag:yaml.org,2002:str" if is_odd or tag == "tag:yaml.org,2002:timestamp" else tag


def read_yaml(text: str, source: str) -> tuple[object, dict[tuple[str, ...], int]]:
    """The values, and the line of each key by its path; InputError if the text is not valid YAML or too large."""
    lines: dict[tuple[str, ...], int] = {}
    try:
        loader = _Loader(text)
        loader.name = source
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _note_lines(node, (), {}, as_written=True)
        tree = loader.construct_document(node)
        _note_lines(node, (), lines)  # again: merge keys have been replaced by what they stand for
        return tree, lines
    except yaml.reader.ReaderError as error:
        line, name = text.count("\n", 0, error.position) + 1, f"U+{ord(text[error.position]):04X}"
        raise InputError(
            f"{source}: line {line} holds the character {name}, which YAML does not take. Remove it."
        ) from None
    except yaml.YAMLError as error:
        hint, indentation = "", _without_colon(error, text) or _indentation(error, text)
        if "character '\\t'" in str(error):
            hint = " Indent with spaces, not with tabs."
        if "mapping values are not" in str(error) and indentation is None:
            hint = " A text with a colon and a space in it has to be in quotes."
        if "unknown escape" in str(error) or "expected escape" in str(error):
            hint = " In double quotes a backslash begins an escape: use single quotes."
        raise InputError(f"{source}: not valid YAML: {indentation or error}{hint}") from None
    except RecursionError:
        raise InputError(
            f"{source}: not a recipe: its values are nested too deeply, or one contains itself by an alias."
        ) from None


def _without_colon(error: yaml.YAMLError, text: str) -> str | None:
    """Name a line at an error of PyYAML's, or the one before, that lacks the colon or the space of ``key: value``."""
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None))
    if mark is None or problem.startswith("expected ',' or"):  # a list that is not closed may go on here
        return None

    def indent(line: str) -> int:
        return len(line) - len(line.lstrip())

    lines = enumerate(text.splitlines()[: mark.line + 1], start=1)
    written = [(number, line.rstrip()) for number, line in lines if line.strip() and line.strip()[0] != "#"]
    for place in reversed(range(len(written))[-2:]):
        number, line = written[place]
        section = next((above for _, above in reversed(written[:place]) if indent(above) < indent(line)), ":")
        is_in_text = not section.partition(" #")[0].rstrip().endswith(":")  # that began behind its key, and goes on
        found = re.fullmatch(r"\s*(\w+)(?::|\s+|$)(.*)", line)
        if found and not is_in_text and not re.search(r":(\s|$)", line):
            return f"line {number} is no key with its value. Write `{found[1]}: {found[2] or 'VALUE'}`."
    return None


def _indentation(error: yaml.YAMLError, text: str) -> str | None:
    """What is wrong with the indentation at an error of PyYAML's, which speaks of blocks and tokens; None: nothing."""
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None))
    lines = text.splitlines()
    written = [n for n, line in enumerate(lines, start=1) if line.strip() and not line.lstrip().startswith("#")]
    if mark is None or mark.line + 1 not in written:
        return None
    # A line that is too deep is read on as the value above it, so its first colon comes as a surprise.
    is_too_deep = problem.startswith("mapping values") and ":" not in lines[mark.line][: mark.column]
    if not is_too_deep and not problem.startswith(("expected <block end>", "expected '<document start>'")):
        return None
    indent = {number: len(lines[number - 1]) - len(lines[number - 1].lstrip(" ")) for number in written}
    here, place = mark.line + 1, written.index(mark.line + 1)
    beside = written[max(place - 1, 0) : place] + written[place + 1 : place + 2]
    if all(indent[number] == indent[here] for number in beside):
        return None
    others = " and ".join(f"line {number} by {indent[number]}" for number in beside)
    return (
        f"line {here} is indented by {counted(indent[here], 'space')}, {others}. Keys of one section begin in the "
        "same column: indent them alike."
    )


def yaml_text(value: object) -> str:
    """A value on one line of YAML, with texts in quotes."""
    return yaml.safe_dump(value, default_flow_style=True, default_style='"', allow_unicode=True, width=2**31).strip()


def _note_lines(
    node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int], as_written: bool = False
) -> None:
    """Add the line of each key below ``node``. ``as_written``, before merge keys are replaced: refuse repeated keys."""
    pairs: list[tuple[str, yaml.Node, yaml.Mark]] = []
    if isinstance(node, yaml.MappingNode):
        pairs = [(key.value, value, key.start_mark) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(number), value, value.start_mark) for number, value in enumerate(node.value)]
    for key, value, mark in pairs:
        place = (*path, key)
        if as_written and place in lines:
            problem = f"the key '{key}' is written twice, first in line {lines[place]}"
            raise yaml.constructor.ConstructorError(None, None, problem, mark)
        lines[place] = mark.line + 1
        if len(lines) > _MOST_NODES:
            raise InputError(
                f"{mark.name}: its aliases expand to more than {_MOST_NODES:,} values; a recipe has a hundred."
            )
        _note_lines(value, place, lines, as_written)


def load_recipe(path: str | Path, overrides: list[str] | None = None, of_a_run: bool = False) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` overrides, whose values are YAML.

    An override that holds out rows, or says how long to train, replaces the recipe's own way to do so. One that changes
    the method takes away the rank and the learning rate, which suit the recipe's own method: `methods.check_recipe`
    then asks for others.
    With ``of_a_run`` the run has begun, maybe with an older qvera that accepted keys without effect. These are ignored.
    Raises InputError: the file can't be read, is not YAML, or is not a valid recipe.
    """
    path = Path(path)
    if path.suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        raise InputError(
            f"{path}: is a file of rows, not a recipe. `qvera init my.yaml --model MODEL --data {path}` writes one."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        whole = path.with_name(f"{path.name}.yaml")
        hint = did_you_mean_path(path, [whole] if whole.is_file() else path.parent.glob("*.yaml"))
        if hint == "." and not path.is_absolute():
            hint = f". A relative path begins where the command runs, here {Path.cwd()}."
        raise InputError(f"{path}: no such recipe file{hint}") from None
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except OSError as error:
        if (own := path / RECIPE_FILE).is_file():
            raise InputError(
                f"{path}: can't be read as a recipe: it is the directory of a run, whose recipe is {own}. "
                f"`qvera train {own} --resume` goes on with the run."
            ) from None
        reason = error.strerror or error
        hint = f" `qvera init my.yaml --model {path}` writes one." if (path / "config.json").is_file() else ""
        raise InputError(f"{path}: can't be read as a recipe ({reason}); expected a file of YAML.{hint}") from None
    tree, lines = read_yaml(text, str(path))
    method = _method_in(tree)
    given = {override.partition("=")[0] for override in overrides or []}
    for override in overrides or []:
        tree = _override(tree, override)
        lines.pop(tuple(override.partition("=")[0].split(".")), None)
    replaced = [key for name in given for key in _REPLACED.get(name, ())]
    if _method_in(tree) != method:
        replaced += ["adapter.rank", "training.learning_rate"]
    for part, _, key in (name.partition(".") for name in replaced if name not in given):
        if isinstance(tree, dict) and isinstance(section := tree.get(part), dict):
            section.pop(key, None)
    try:
        return parse_recipe(tree, str(path), lines, drop_idle_keys=of_a_run)
    except InputError as error:
        raise InputError(f"{error}{other_writer(path.parent) if of_a_run else ''}") from None


def _method_in(tree: object) -> object:
    section = tree.get("adapter") if isinstance(tree, dict) else None
    return (section if isinstance(section, dict) else {}).get("method", AdapterSection().method)


def _override(tree: object, override: str) -> dict[object, object]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise InputError(f"--set {override}: expected section.key=value, for example --set training.max_steps=100.")
    value, _ = read_yaml(text, f"--set {override}")
    is_plain = text.lstrip()[:1] not in tuple("'\"|>&*!")
    if is_plain and (isinstance(value, str) or (value is None and "#" in text)):
        value = text.strip()  # of "Team #1 only", YAML takes the end for a comment
    whole = dict(tree) if isinstance(tree, dict) else {}
    node = whole
    for part in parts[:-1]:
        child = node.get(part)
        if part in ("model", "data") and node is whole and isinstance(child, str):
            child = {"path": child}
        node[part] = dict(child) if isinstance(child, dict) else {}
        node = node[part]
    node[parts[-1]] = value
    return whole
