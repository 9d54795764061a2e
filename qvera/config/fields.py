"""The types of a recipe's fields, the base class of its sections, and what is wrong with them in plain sentences."""

import difflib
import functools
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from qvera.config.plugins import load_all
from qvera.utils.errors import InputError


def _number(value: object) -> object:
    # YAML 1.1 reads `4e-3` (no dot) as a string; people write learning rates that way.
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


# Strict, because pydantic would otherwise take True for 1, 1 for True, and "yes" for True. Bounds come first: pydantic
# leaves those that follow a function out of the JSON schema. Counts are 32-bit integers, and fp32 ends at 3.4e38.
Number = (Strict(), BeforeValidator(_number))
Bool = Annotated[bool, Strict()]
Positive = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
NonNegative = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**64)]  # what torch's and numpy's generators take
Fraction = Annotated[float, Field(ge=0.0, lt=1.0), *Number]
PositiveFloat = Annotated[float, Field(gt=0.0, le=3e38, allow_inf_nan=False), *Number]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=3e38, allow_inf_nan=False), *Number]
Passes = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False), *Number]
NonEmpty = Annotated[str, Field(min_length=1)]


class OnlyWith:
    """Marks a key that means something only where one of ``switches`` is on.

    ``section.key`` is on for any value but false, zero or an empty one; ``section.key: value`` is on for that value;
    ``key: value`` is for a key beside the sections.
    """

    def __init__(self, *switches: str) -> None:
        self.switches = switches

    def is_on(self, recipe: BaseModel) -> bool:
        """Whether a recipe has one of the switches on."""
        for switch in self.switches:
            path, _, value = switch.partition(": ")
            there: object = functools.reduce(getattr, path.split("."), recipe)
            if there == value if value else there:
                return True
        return False


class Section(BaseModel):
    """A mapping that is read strictly: unknown keys, wrong types and contradicting keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def __init__(self, *mappings: object, **keys: object) -> None:
        if mappings:
            name = type(self).__name__
            raise InputError(f"{name}: takes keys by name; for a mapping, write {name}(**mapping).")
        try:
            super().__init__(**keys)
        except ValidationError as error:
            raise InputError("\n".join(f"{key}: {text}" for key, text in key_problems(error, type(self)))) from None

    # pydantic calls an `__init__` without this mark for every section of a recipe; then the first bad section would
    # hide the problems of the others
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> None:
        raise InputError(f"{name}: a recipe does not change; its `replace` makes a copy with other values.")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for keys that are valid alone but not together."""
        return iter(())

    @model_validator(mode="before")
    @classmethod
    def _write_paths(cls, tree: object) -> object:
        """Take a path of pathlib's as its text."""
        if not isinstance(tree, dict):
            return tree
        return {key: str(value) if isinstance(value, PurePath) else value for key, value in tree.items()}

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        if found := list(self.contradictions()):
            raise PydanticCustomError("contradiction", "keys contradict each other", {"problems": found})
        return self

    def replace(self, **changes: object) -> Self:
        """A copy with some keys changed; raises InputError like a recipe from a file.

        A mapping for a section changes those of its keys, and leaves the others. Keys that were never set keep their
        defaults, which may depend on the changed ones.
        """
        for name, value in changes.items():
            if isinstance(value, Mapping) and isinstance(section := getattr(self, name, None), Section):
                changes[name] = section.replace(**value)
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def to_dict(self) -> dict[str, object]:
        """Every key with its value, defaults included."""
        return self.model_dump()


_logger = logging.getLogger(__name__)

RENAMED: dict[str, str] = {"training.rehearse_longest_batch": "training.try_longest_batch"}
"""Old key → new key, as ``section.key``. Old ones are accepted with a warning."""
REMOVED: dict[str, object] = {"training.loss_scale_window": 2000}
"""A key that is gone → its default. A recipe that has it, as those of old runs do, still loads."""

# What to write instead of a TrainingArguments field that has another name or place here.
_INSTEAD = {
    "gradient_accumulation_steps": "set training.global_batch_size, the rows of one optimizer step",
    "deepspeed": "write `deepspeed:` beside the sections, not in one",
    "bf16": "set model.compute_dtype: bfloat16",
    "fp16": "set model.compute_dtype: float16",
    "logging_dir": "TensorBoard files go into the run directory; set training.output_dir",
    "eval_strategy": "set training.eval_steps (0: only at the end)",
    "save_strategy": "set training.save_steps",
    "logging_steps": "remove it; every step is logged",
    "do_train": "use the command `qvera train`",
    "do_eval": "use the command `qvera eval`, or set training.eval_steps",
    "do_predict": "use the command `qvera generate`",
    "resume_from_checkpoint": "use `qvera train RECIPE --resume`",
    "data_seed": "set data.seed",
    "group_by_length": "set data.group_by_length",
    "packing": "set data.packing",
    "overwrite_output_dir": "remove it; a finished run is never overwritten, choose another training.output_dir",
    "max_seq_length": "set data.max_length",
    "max_length": "set data.max_length",
    "loss_scale_window": "remove it; a float16 run doubles its loss scale after 2,000 steps without an overflow",
    "use_cpu": "remove it; CUDA is used when there is one (hide it with CUDA_VISIBLE_DEVICES=)",
}

_SHORT_NAMES = {
    "lr": "learning_rate", "r": "rank", "lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "target_modules": "targets", "epochs": "num_train_epochs", "batch_size": "global_batch_size",
    "optimizer": "optim", "scheduler": "lr_scheduler_type", "bs": "global_batch_size",
    "per_device_batch_size": "per_device_train_batch_size", "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size", "random_state": "seed", "projection_prng_key": "seed",
    "max_seq_length": "max_length", "cutoff_len": "max_length", "val_size": "eval_fraction", "max_samples": "limit",
    "completion_only_loss": "train_on", "assistant_only_loss": "train_on", "num_generations": "group_size",
    "lora_rank": "rank", "lora_target": "targets", "finetuning_type": "method", "peft_type": "method",
    "model_name_or_path": "model", "torch_dtype": "compute_dtype", "load_in_4bit": "quantization",
    "dataset_num_proc": "tokenize_processes", "preprocessing_num_workers": "tokenize_processes",
    "gradient_accumulation": "gradient_accumulation_steps", "evaluation_strategy": "eval_strategy",
}  # fmt: skip
"""Other tools' names that no key here resembles."""

# pydantic's words → those of YAML.
_WORDS = {
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid dictionary": "a mapping",
    "'str' instances are not allowed as a Sequence value": "should be a list",
}


def take_old_keys(tree: dict[Any, Any], source: str, of_a_run: bool) -> dict[Any, Any]:
    """Replace old names of keys, and drop removed keys that have their default.

    A user's recipe gets a warning for an old name. That of a run (``of_a_run``) gets none; its removed keys are dropped
    whatever their value, and the plug-ins' ``take_old_keys`` change it too. If an old and a new name are both there,
    both stay: the old one is then an unknown key.
    """
    moved = {name: dict(keys) if isinstance(keys, dict) else keys for name, keys in tree.items()}
    for module in load_all("qvera.recipe") if of_a_run else ():
        if (take := getattr(module, "take_old_keys", None)) is not None:
            take(moved)
    for old, new in RENAMED.items():
        (old_section, old_key), (section, key) = old.split("."), new.split(".")
        keys, target = moved.get(old_section), moved.setdefault(section, {})
        if isinstance(keys, dict) and old_key in keys and isinstance(target, dict) and key not in target:
            target[key] = keys.pop(old_key)
            if not of_a_run:
                text = "%s: %s is now called %s. The old name still works; please rename it."
                _logger.warning(text, source, old, new)
    for old, default in REMOVED.items():
        section, key = old.split(".")
        keys = moved.get(section)
        if isinstance(keys, dict) and key in keys and (of_a_run or keys[key] == default):
            del keys[key]
    return moved


def key_problems(error: ValidationError, root: type[BaseModel]) -> list[tuple[str, str]]:
    """(key, sentence) for each problem that pydantic found in a ``root``, in the order of the schema."""
    found: dict[str, list[str]] = {}
    for one in error.errors():
        for key, sentence in _problems(one, root):
            sentences = found.setdefault(key, [])
            if sentence not in sentences:
                sentences.append(sentence)
    return [(key, " Or: ".join(sentences)) for key, sentences in found.items()]


def _problems(error: ErrorDetails, root: type[BaseModel]) -> Iterator[tuple[str, str]]:
    kind, got = error["type"], error["input"]
    unknown = kind in ("extra_forbidden", "invalid_key")
    keys, holder = _path(error["loc"][:-1] if unknown else error["loc"], root)
    key = ".".join(keys)
    if kind == "contradiction":
        for name, problem in error["ctx"]["problems"]:
            yield ".".join([*keys, name]), problem
    elif unknown:
        yield ".".join([*keys, str(error["loc"][-1])]), _unknown_key(keys, str(error["loc"][-1]), holder, root)
    elif kind == "missing":
        yield key, "is missing and has no default."
    elif kind == "model_type":
        are_rows = key == "data" and hasattr(got, "__iter__")
        hint = " Write rows in memory into a .jsonl file, and name that." if are_rows else ""
        if keys[:2] == ["data", "mixture"] and isinstance(got, str):
            hint = f" Write {{path: {got}}}."
        yield key, f"should be a mapping of keys, got {_short(got)}.{hint}"
    else:
        hint = ""
        field = holder.model_fields.get(keys[-1]) if keys else None
        if kind == "string_type" and isinstance(got, (int, float, dict)):
            hint = " Write it in quotes."
        elif keys == ["data", "path"] and isinstance(got, list):
            hint = " For several files name their directory, or each in data.mixture."
        elif got is None and ":" in str(error["loc"][-1]):
            hint = " Put a space after each colon."
        elif got is None and field is not None and not field.is_required():
            hint = " Leave the key out for its default."
        elif kind == "list_type" and isinstance(got, str) and "=" not in got:
            words = [word for one in get_args(field.annotation) for word in get_args(one)] if field else []
            if not any(str(word).startswith(got) for word in words):  # that word is meant
                hint = f" Write [{got}]."
        elif kind != "literal_error" and isinstance(got, str) and "=" in got:
            hint = " Each key takes its own --set."
        yield key, value_problem(error) + hint


def value_problem(error: ErrorDetails) -> str:
    """Say in a sentence what pydantic takes in place of a value."""
    sentence = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        sentence = sentence.replace(theirs, ours)
    return f"{sentence[0].lower()}{sentence[1:]}, got {_short(error['input'])}."


def _path(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The keys of one of pydantic's locations, without branches of unions (``"literal['x']"``), and the model there."""
    keys: list[str] = []
    model: type[BaseModel] | None = root
    holder = root
    for part in location:
        if isinstance(part, int):
            keys.append(str(part))
        elif model is not None and part in model.model_fields:
            keys.append(part)
            model = _model_of(model.model_fields[part].annotation)
            holder = model or holder
        else:
            break
    return keys, holder


def _model_of(annotation: object) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((one for one in candidates if hasattr(one, "model_fields")), None)  # type: ignore[misc]


def _unknown_key(parents: list[str], name: str, holder: type[BaseModel], root: type[BaseModel]) -> str:
    known = list(holder.model_fields)
    if parents in ([], ["training"]):
        advice, package = _INSTEAD.get(_SHORT_NAMES.get(name, name)), importlib.util.find_spec("transformers")
        if parents and advice is None and package is not None and package.origin is not None:
            # TrainingArguments as text: importing it would take seconds
            text = (Path(package.origin).parent / "training_args.py").read_text(encoding="utf-8")
            if re.search(rf"^    {re.escape(name)}: ", text, re.MULTILINE):
                advice = "it is a TrainingArguments field that this loop does not have; remove it"
        if advice is not None:
            return f"is not a key here: {advice}."
    if ":" in name:
        return "unknown key. Put a space after the colon."
    section, _, key = name.partition(".")
    if key and section in known:
        return f"unknown key. Write `{key}` under `{section}`."
    name = _SHORT_NAMES.get(name, name)
    elsewhere: dict[str, list[str]] = {}  # key → where other sections have it
    for section, field in root.model_fields.items():
        if (model := _model_of(field.annotation)) is not None and parents != [section]:
            for key in model.model_fields:
                elsewhere.setdefault(key, []).append(f"`{section}.{key}`")
    if name in elsewhere and name not in known:
        return f"unknown key. There is {' or '.join(elsewhere[name])}: move it there."
    if near := difflib.get_close_matches(name, known, n=1):
        return f"unknown key. Did you mean `{near[0]}`?"
    if near := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.76):
        return f"unknown key. There is {' or '.join(elsewhere[near[0]])}."
    return f"unknown key. Known here: {', '.join(known)}."


def _short(value: object) -> str:
    text = " ".join(repr(value).split())  # that of a table has lines
    if len(text) > 200 and not isinstance(value, (str, list, tuple, Mapping)):
        return f"an object of the type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
