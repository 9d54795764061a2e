"""What is wrong with a key of a recipe, in words: what was found, what is accepted, and the nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

# What to write instead of a TrainingArguments field that has another name or place here.
_INSTEAD = {
    "gradient_accumulation_steps": "set training.global_batch_size; accumulation is global_batch_size / "
    "(per_device_train_batch_size x processes)",
    "deepspeed": "write `deepspeed:` beside the sections, not in one",
    "bf16": "set model.compute_dtype: bfloat16",
    "fp16": "set model.compute_dtype: float16",
    "tf32": "set it with torch.set_float32_matmul_precision in your own script; the low-rank path does not use it",
    "logging_dir": "TensorBoard files go into the run directory; set training.output_dir",
    "eval_strategy": "set training.eval_steps (0: only at the end)",
    "evaluation_strategy": "set training.eval_steps (0: only at the end)",
    "save_strategy": "set training.save_steps",
    "logging_strategy": "remove it; every step is logged",
    "logging_steps": "remove it; every step is logged",
    "logging_first_step": "remove it; every step is logged",
    "do_train": "use the command `qvera train`",
    "do_eval": "use the command `qvera eval`, or set training.eval_steps",
    "do_predict": "use the command `qvera generate`",
    "resume_from_checkpoint": "use `qvera train RECIPE --resume`",
    "data_seed": "set data.seed",
    "group_by_length": "set data.group_by_length",
    "packing": "set data.packing",
    "overwrite_output_dir": "remove it; a finished run is never overwritten, choose another training.output_dir",
    "metric_for_best_model": "remove it; the best checkpoint is the one with the lowest held-out loss",
    "greater_is_better": "remove it; the best checkpoint is the one with the lowest held-out loss",
    "max_seq_length": "set data.max_length",
    "max_length": "set data.max_length",
    "per_gpu_train_batch_size": "set training.per_device_train_batch_size",
    "gradient_checkpointing_kwargs": "remove it; checkpointing is non-reentrant here",
    "use_cpu": "remove it; CUDA is used when there is one (hide it with CUDA_VISIBLE_DEVICES=)",
    "no_cuda": "remove it; CUDA is used when there is one (hide it with CUDA_VISIBLE_DEVICES=)",
}


def _inside(hint: Any) -> Any:
    """The dataclass that a list of them holds, or the type itself; a number in a path says which one of the list."""
    items = get_args(hint) if get_origin(hint) is list else ()
    return items[0] if items and dataclasses.is_dataclass(items[0]) else hint


def _section_fields(root: type, path: tuple[str, ...]) -> list[str]:
    """The valid key names of the section at ``path``."""
    cls: Any = root
    for part in path:
        if not part.isdigit():
            cls = _inside(get_type_hints(cls).get(part))
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _accepts(hint: Any) -> str:
    """What a field takes, in words, read from its type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, bounds = _accepts(args[0]), []
        for meta in args[1:]:
            for constraint in getattr(meta, "metadata", [meta]):
                for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
                    if getattr(constraint, name, None) is not None:
                        bound = getattr(constraint, name)
                        bounds.append(f"{sign} {'2**64' if bound == 2**64 else format(bound, 'g')}")
                if getattr(constraint, "min_length", None):
                    base = f"a non-empty {base.removeprefix('a ')}"
        return f"{base} {' and '.join(bounds)}".strip()
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(a) for a in args)
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return " or ".join("nothing (null)" if a is type(None) else _accepts(a) for a in args)
    if origin is list:
        if dataclasses.is_dataclass(args[0]):
            return "a list of mappings of keys"
        return f"a list of {_accepts(args[0]).removeprefix('a ')}s"  # all others of ours are lists of names
    if origin is dict:
        return "a mapping of names to names"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def explain(error: Any, root: type) -> tuple[str, str]:
    """One of pydantic's errors about a ``root`` (the recipe's dataclass) as (key, sentence)."""
    path = tuple(str(part) for part in error["loc"])
    kind, got = error["type"], error.get("input")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        *parents, name = path
        known = _section_fields(root, tuple(parents))
        if tuple(parents) == ("training",):
            advice = _INSTEAD.get(name) or _training_argument_advice(name)
            if advice:
                return ".".join(path), f"is not a key of this section: {advice}."
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        elsewhere = [s for s in _section_fields(root, ()) if parents != [s] and name in _section_fields(root, (s,))]
        if near:
            hint = f"Did you mean `{near[0]}`?"
        elif elsewhere:
            hint = f"There is `{elsewhere[0]}.{name}`: move it there."
        else:
            hint = f"Known here: {', '.join(known)}."
        return ".".join(path), f"unknown key. {hint}"
    # pydantic adds the branch of a union to the path ("targets", "literal['all-linear']"): keep the keys only
    keys: list[str] = []
    taken: Any = root
    for part in path:
        hints: dict[str, Any] = get_type_hints(taken, include_extras=True) if dataclasses.is_dataclass(taken) else {}
        if dataclasses.is_dataclass(_inside(taken)) and get_origin(taken) is list and part.isdigit():
            keys.append(part)
            taken = _inside(taken)
            continue
        if part not in hints:
            break
        keys.append(part)
        taken = hints[part]
    key = ".".join(keys) or "the recipe"
    if kind in ("missing", "missing_argument"):
        return key, "is missing and has no default." if keys else f"is missing: {path}"
    if dataclasses.is_dataclass(taken):
        return key, f"takes a mapping of keys, got {got!r}."
    return key, f"takes {_accepts(taken)}, got {got!r}."


def _training_argument_advice(name: str) -> str | None:
    from transformers import TrainingArguments

    if name in {f.name for f in dataclasses.fields(TrainingArguments)}:
        return "it is a TrainingArguments field that this loop does not have; remove it"
    return None
