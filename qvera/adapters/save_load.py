"""Puts an adapter on a base model, saves it and loads it."""

from __future__ import annotations

import copy
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from qvera.adapters.adapter_file import (
    read_adapter,
    require_base,
    require_places,
    require_tokens,
    write_for_peft,
)
from qvera.adapters.config import LABELS_VERSION, SHARED_KEYS, QveraConfig
from qvera.adapters.layer import QveraLinear, SharedTensors
from qvera.adapters.methods import Source, method_of
from qvera.adapters.peft_compat import accelerated_peft
from qvera.adapters.projection import require_same_pairs
from qvera.config import plugins
from qvera.config.schema import Recipe
from qvera.config.sections import AdapterSection, ModelSection
from qvera.models.hub import fingerprint_of, local_directory
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.tokenizer import ADDED_ROWS, put_token_rows, save_token_rows
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTERS,
    CHAT_TEMPLATE,
    RECIPE_FILE,
    discard,
    disk_errors,
    flush,
    resolve_path,
    take_place,
)
from qvera.utils.formatting import first_of
from qvera.utils.safetensors_io import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qvera.models.loader import Base


def attach(
    model: nn.Module,
    section: AdapterSection,
    base_name: str | None = None,
    base_fingerprint: str | None = None,
    added_tokens: dict[str, int] | None = None,
    base_section: ModelSection | None = None,
    changes: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    model_class: ModelClass = CAUSAL_LM,
) -> PeftModel:
    """Put an adapter on a loaded base model: a fresh one, or with ``section.init_from`` the vectors of an existing one.

    Only its vectors, and a head that the model's class trains whole, are trainable afterwards.

    Args:
        base_name, base_fingerprint: path or hub id of the base, and `qvera.utils.safetensors_io.base_fingerprint`.
        added_tokens: token → id; the model must have their rows.
        base_section: how the base was opened (`OF_BASE`).
        changes: fields of the config that override the section (`plugins.Schedule.config`).
        progress: called with the name of each weight that a method decomposes.

    Raises:
        InputError: a target matches nothing, or ``init_from`` does not fit.
    """
    config = new_config(section, base_name, base_fingerprint, added_tokens, base_section, changes)
    if model_class.has_own_head:
        config.labels, config.problem_type = list(model_class.labels), model_class.problem_type
        config.modules_to_save = list(model_class.head_modules(model))  # type: ignore[arg-type]
        config.task_type = None if model_class.reads_images else "SEQ_CLS"  # type: ignore[assignment]
        config.format_version = max(config.format_version, LABELS_VERSION)
    start = read_start(config, section.init_from)
    config.progress = progress
    try:
        peft_model = put_on(model, config)
    finally:
        config.progress = None  # it may hold a terminal's progress bar, which can't be copied or pickled
    if start is not None:
        start_from(peft_model, config, start)
    return peft_model


OF_BASE = ("revision", "quantization", "double_quant", "pad_token", "eos_token")
"""Keys of the recipe's ``model`` that an adapter keeps: by these its base is opened where there is no recipe."""


def new_config(
    section: AdapterSection,
    base_name: str | None = None,
    base_fingerprint: str | None = None,
    added_tokens: dict[str, int] | None = None,
    base_section: ModelSection | None = None,
    changes: Mapping[str, Any] | None = None,
) -> QveraConfig:
    """The config of a fresh adapter; see `attach`."""
    fields = {
        **{name: getattr(section, name) for name in SHARED_KEYS},
        "target_modules": section.targets if isinstance(section.targets, str) else list(section.targets),
        "projection_seed": section.seed,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base_name is None else portable_name(base_name),
        "base_fingerprint": base_fingerprint,
        "added_tokens": dict(added_tokens) if added_tokens else None,
        **({} if base_section is None else {key: getattr(base_section, key) for key in OF_BASE}),
    }
    return QveraConfig(**fields | dict(changes or {}))


_PROJECTIONS = {
    "projection_shapes": "projections (by its targets and base) of shapes",
    "projection_sha256": "projections' SHA-256",
}


def check_start(section: AdapterSection, base: ModelSection) -> None:
    """Check ``section.init_from`` as far as possible without a model; InputError if it does not fit."""
    start = read_start(new_config(section), section.init_from)
    if start is not None:
        require_base(start.config, start.name, base.path, fingerprint_of(base))


class Start(NamedTuple):
    """An adapter that a fresh one starts from, as `read_start` read it.

    Attributes:
        name: what the recipe's ``adapter.init_from`` says, a directory or hub id.
        vectors: by their keys in its file.
        directory: its files, which may be a snapshot of the hub.
    """

    name: str
    config: QveraConfig
    vectors: dict[str, Tensor]
    directory: Path


def start_from(peft_model: PeftModel, config: QveraConfig, start: Start, adapter: str = "default") -> None:
    """Copy the vectors of another adapter into a fresh one of that config.

    InputError: projections, tokens, labels or the base differ.
    """
    init_from, theirs, vectors, directory = start
    seeded = method_of(config).source in (Source.SEEDED, Source.OWN)
    of_model = {"labels": "labels", "problem_type": "problem_type"}
    _require_equal(theirs, config, init_from, of_model | (_PROJECTIONS if seeded else {}))
    require_base(theirs, init_from, str(config.base_model_name_or_path), config.base_fingerprint)
    try:
        require_same_pairs(config.pair_numbers or {}, theirs.pair_numbers or {})
    except InputError as error:
        raise InputError(f"adapter.init_from: {init_from}: {error}") from None
    require_tokens(theirs, init_from, config.added_tokens)
    if config.added_tokens:
        put_token_rows(peft_model.get_base_model(), config.added_tokens, directory)
    load_vectors(peft_model, vectors, init_from, adapter)


def read_start(config: QveraConfig, init_from: str | None) -> Start | None:
    """Read the adapter that one of ``config`` starts from, and compare them as far as the recipe alone decides.

    The config takes over its patterns of ranks and alphas. InputError: there is none that can be read, its settings
    differ, or it is an adapter of PEFT's own VeRA.
    """
    if init_from is None:
        return None
    directory = Path(resolve_path(init_from))
    try:
        snapshot = local_directory(directory)
        theirs, vectors = read_adapter(snapshot)
    except InputError as error:
        moved = " A run that goes on needs it too: where it has moved, write that into the run's recipe.yaml."
        recipe = directory.parent / RECIPE_FILE
        if recipe.is_file() and not recipe.with_name(ADAPTERS).is_dir():
            moved = f" The run has not ended: `qvera train {recipe} --resume` finishes it."
        raise InputError(f"adapter.init_from: {error}{'' if directory.is_dir() else moved}") from None
    if not isinstance(theirs, QveraConfig):
        raise InputError(
            f"adapter.init_from: {init_from} is an adapter of PEFT's own VeRA, whose projections are not drawn from a "
            "seed as ours are. Train it further with PEFT after qvera.adapters.accelerate_peft(), or start anew."
        )
    method = method_of(config)
    seeds = {"seeds": "seed"} if method.source in (Source.SEEDED, Source.OWN) else {}
    own = {"seeds" if key == "seed" else key: key for key, is_fixed in method.keys.items() if is_fixed}
    _require_equal(theirs, config, init_from, {"method": "method", "rank": "rank"} | seeds | own)
    # tensor shapes and scales depend on these, a recipe has no key for them, and PEFT's LoRAs may have them
    config.rank_pattern, config.alpha_pattern = theirs.rank_pattern, theirs.alpha_pattern
    return Start(init_from, theirs, vectors, snapshot)


def _require_equal(theirs: QveraConfig, config: QveraConfig, init_from: str, fields: dict[str, str]) -> None:
    """Raise InputError unless two configs agree in ``fields``: field → its name in the message."""

    # no alpha means that of the rank, so the two are equal when one of them is written out
    def value(of: QveraConfig, field: str) -> object:
        return of.rank if field == "alpha" and of.alpha is None else getattr(of, field)

    for field, name in fields.items():
        given, wanted = value(theirs, field), value(config, field)
        if given != wanted:
            raise InputError(f"adapter.init_from: {init_from} has {name} {given}, the recipe {wanted}.")


def portable_name(name: str) -> str:
    """A name that other tools can open: the absolute path of a local directory, or a hub id unchanged."""
    path = Path(resolve_path(name))
    return str(path.absolute()) if path.is_dir() else name


def named_vectors(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The tensors of an adapter (shared ones and a trained head too), by their keys in its file: ``layer.qvera_b``."""
    vectors: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, (QveraLinear, SharedTensors)):
            vectors |= {f"{name}.{kind}": vector for kind, vector in module.vectors(adapter).items()}
    return vectors | head_tensors(model, adapter)


def trained_vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's vectors that need a gradient, by their keys in its file."""
    return {name: vector for name, vector in named_vectors(model).items() if vector.requires_grad}


def head_tensors(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The tensors of modules that are trained whole (PEFT's ``modules_to_save``), by their keys in the file."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter].named_parameters()
    }


def rate_factors(model: PeftModel, recipe: Recipe, adapter: str = "default") -> dict[str, float]:
    """Map each key of `named_vectors` to its learning rate, as a multiple of ``training.learning_rate``."""
    section, training, head = recipe.adapter, recipe.training, head_tensors(model, adapter)
    method, head_factor = method_of(section), (training.head_learning_rate or training.learning_rate)
    return {
        name: head_factor / training.learning_rate
        if name in head
        else method.traits(name.rpartition(".")[2], section).rate
        for name in named_vectors(model, adapter)
    }


def adapter_facts(model: PeftModel) -> dict[str, Any]:
    """Counts from the live adapter: the ``adapter`` object of run.json, without the file size."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QveraLinear) and m.carries("default")}
    config = model.peft_config["default"]
    head = sum(p.numel() for p in head_tensors(model).values() if p.requires_grad)
    return {
        "method": config.method,
        "title": method_of(config).title or config.method,
        "rank": config.rank,
        "b_groups": config.b_groups,
        "input_scale": config.input_scale,
        "experts": config.experts,
        "magnitude": config.magnitude,
        "targets": sorted({name.rpartition(".")[2] for name in layers}),
        "adapted_modules": len(layers),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad) - head,
        **({"head_parameters": head} if head else {}),
        "seed": config.projection_seed,
        **{key: value for key, default in plugins.facts().items() if (value := getattr(config, key)) != default},
        "lora_r64_parameters": sum(
            64 * (m.in_features + m.out_features) * max(m.spec.experts, 1) for m in layers.values()
        ),
    }


def save_adapter(
    model: PeftModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vectors: dict[str, Tensor] | None = None,
    adapter: str = "default",
    chat_template: str | None = None,
    kept: str = "What was there before is kept; make room, and save it again.",
) -> int:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (fp32 vectors, no projections).

    Added tokens' rows (`ADDED_ROWS`) and the base's ``tokenizer`` go beside them, and the ``chat_template`` (Jinja) of
    its prompts if it is not the base's own. Other tools read it in its file; the config has it too, since an adapter is
    often handed on as its two files alone. ``vectors`` are written in place of
    the model's own, by the same keys; any ``adapter`` but the default one needs them. Files get a temporary name first,
    so that no half-written adapter is ever found. Markdown files of an adapter that was there before stay. ``kept``
    ends the message about a full disk. Returns the size in bytes, without the tokenizer's files.

    RunFailed: the disk is full. An adapter that was there before is kept.
    """
    with disk_errors(str(directory), kept):
        partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
        discard(partial)
        if isinstance(config := model.peft_config[adapter], QveraConfig):
            config.chat_template = chat_template
        try:
            _write_files(model, partial, tokenizer, vectors, adapter)
            if chat_template is not None:
                (partial / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
            for note in directory.glob("*.md"):  # a card that was edited, or what else its owner wrote
                shutil.copy2(note, partial)
            for file in partial.iterdir():
                flush(file)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        take_place(partial, directory)  # so that a server finds an adapter at any moment
        for leftover in directory.parent.iterdir():  # temporary directories of processes that were killed in here
            found = re.fullmatch(rf"\.{re.escape(directory.name)}\.(?:partial|old)-(\d+)", leftover.name)
            if found and not psutil.pid_exists(int(found[1])):
                discard(leftover)
    ours = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADDED_ROWS)
    return sum(f.stat().st_size for f in directory.iterdir() if f.name in ours)


def _write_files(
    model: PeftModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    vectors: dict[str, Tensor] | None,
    adapter: str,
) -> None:
    config = model.peft_config[adapter]
    # save_embedding_layers=False: PEFT would otherwise look the base up on the hub
    if isinstance(config, QveraConfig) and method_of(config).peft_type == "LORA":
        directory.mkdir(parents=True)
        ours = vectors or get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        write_for_peft(directory, config, ours)
    elif vectors is not None:
        directory.mkdir(parents=True)
        tensors = {name: vector.detach().cpu().contiguous() for name, vector in vectors.items()}
        save_tensors(tensors, directory / ADAPTER_WEIGHTS, {"format": "pt"})
        written = copy.copy(config)  # PEFT too saves an adapter as one for answers, and leaves the live config alone
        written.inference_mode = True
        written.save_pretrained(str(directory))
    else:
        model.save_pretrained(str(directory), save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    ids = getattr(config, "added_tokens", None)
    if ids:
        save_token_rows(model.get_base_model(), ids, directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)


def load_vectors(model: nn.Module, vectors: dict[str, Tensor], source: str, adapter: str = "default") -> None:
    """Copy an adapter file's tensors into a model.

    InputError: one is missing, unknown, of another shape, or no index of the weight; nothing was copied.
    """
    # everything is checked before the first copy, so that an error leaves the model as it was
    config = getattr(model, "peft_config", {}).get(adapter)
    ours: dict[str, Tensor] = {**named_vectors(model, adapter)}
    if config is not None and config.bias != "none":
        ours = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    missing, unknown = sorted(ours.keys() - vectors.keys()), sorted(vectors.keys() - ours.keys())
    for keys, what in ((missing, "missing"), (unknown, "unknown")):
        if keys:
            found = f"{len(keys)} {what} (first: {keys[0]})"
            raise InputError(f"{source}: its vectors do not fit this model and these targets: {found}.")
    for name, tensor in ours.items():
        if tensor.shape != vectors[name].shape:
            raise InputError(
                f"{source}: {name} has shape {list(vectors[name].shape)}, this model needs {list(tensor.shape)}."
            )
    for name, module in model.named_modules():
        if isinstance(module, QveraLinear) and module.carries(adapter):
            try:
                require_places(module.spec, {kind: vectors[f"{name}.{kind}"] for kind in module.vectors(adapter)})
            except InputError as error:
                raise InputError(f"{source}: {error}") from None
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(vectors[name])


def put_on(model: nn.Module, config: QveraConfig, adapter: str = "default") -> PeftModel:
    """Call `get_peft_model`. The config keeps its own name of the base, which PEFT would replace."""
    name, config.base_model_name_or_path = config.base_model_name_or_path, None
    saved = None if config.modules_to_save is None else list(config.modules_to_save)
    with warnings.catch_warnings():  # PEFT asks for it by the name that transformers has given up
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        peft_model = get_peft_model(model, config, adapter_name=adapter)  # type: ignore[arg-type]
    if saved is not None:
        config.modules_to_save = saved  # PEFT adds every name that a classification head may have
    if name is not None:
        config.base_model_name_or_path = name
    return peft_model


def load_adapter(model: nn.Module, directory: Path, base: Base | None = None) -> PeftModel:
    """Put the adapter in ``directory`` on a loaded base model: one of ours, or of PEFT's own VeRA.

    Projections, names, shapes and values are checked. With ``base``, what `load_base` gave for ``model``, the base is
    compared by content too. InputError: it is no adapter, or not one for this model.
    """
    config, vectors = read_adapter(directory)
    facts = {} if base is None else base.facts  # a model as it comes from the hub has no added tokens
    if base is not None:
        require_base(config, directory, facts["path"], facts.get("fingerprint"))
    require_tokens(config, directory, facts.get("added_tokens"))
    if ids := getattr(config, "added_tokens", None):
        put_token_rows(model, ids, directory)
    if isinstance(config, QveraConfig):
        try:
            peft_model = put_on(model, config)
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None
        load_vectors(peft_model, vectors, str(directory / ADAPTER_WEIGHTS))
    else:  # PEFT reads the file and the projections of its own VeRA, our layers compute
        try:
            with warnings.catch_warnings(), accelerated_peft():
                warnings.simplefilter("ignore", UserWarning)
                peft_model = PeftModel.from_pretrained(model, str(directory))  # type: ignore[arg-type]
        except (ValueError, RuntimeError, KeyError) as error:
            raise InputError(f"{directory}: does not fit this base model: {first_line(error)}") from None
        missing = [name for name, p in peft_model.named_parameters() if "vera_lambda" in name and p.is_meta]
        if missing:
            raise InputError(f"{directory}: has no values for {first_of(missing)}.")
    peft_model.requires_grad_(False)
    return peft_model.eval()
