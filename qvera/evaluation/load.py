"""Open what can be evaluated: a run, an adapter, several adapters on one base, or a whole checkpoint."""

import contextlib
import copy
import dataclasses
import logging
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import nn

from qvera.adapters import adapter_file, save_load
from qvera.adapters.shared_model import load_adapters
from qvera.config.schema import Recipe, load_recipe
from qvera.config.sections import ModelSection
from qvera.data import NAMED_TEMPLATES, Datasets, Labels, data_sha256
from qvera.evaluation.named_adapters import (
    adapters_root,
    kind_of,
    name_of,
    named_directories,
    refuse_name,
    require_all_named,
    require_named,
    run_of,
)
from qvera.evaluation.run_info import load_run_recipe, read_certificate
from qvera.models import loader
from qvera.models.hub import base_directory, local_directory
from qvera.models.model_class import CAUSAL_LM, REGRESSION, ModelClass, stored_class
from qvera.models.structure import causal_model
from qvera.models.tokenizer import load_processor
from qvera.utils import accelerator
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CERTIFICATE,
    CHAT_TEMPLATE,
    RECIPE_FILE,
    file_sha256,
    read_json,
    resolve_path,
    try_read_json,
)
from qvera.utils.formatting import first_of
from qvera.utils.progress import warn

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A directory that can be evaluated, before anything big is read."""

    path: Path
    what: str  # for people: a run, an adapter (LORA), a merged export, a checkpoint
    section: ModelSection  # the base model of a run or adapter; a checkpoint itself
    adapter: Path | None = None  # the adapter's directory; None for a checkpoint
    recipe: Recipe | None = None  # says how rows are read; None where it is not known
    run: Path | None = None  # the run directory of the recipe
    name: str | None = None  # of one of several adapters that a run trained
    merged: dict[str, Any] | None = None  # the certificate (qvera_export.json) of a merged export

    @property
    def arguments(self) -> str:
        """The words by which a command finds it."""
        own = ["--adapter", self.name] if self.name is not None and adapters_root(self.path) is not None else []
        return shlex.join([str(self.path), *own])

    @property
    def model_class(self) -> ModelClass:
        """The kind of model. InputError: the adapter does not say it."""
        if self.adapter is not None:
            return adapter_file.model_class_of(self.adapter, _config(self.adapter))
        return stored_class((try_read_json(self.path / "config.json") or {}).get("architectures"))


@dataclasses.dataclass
class OpenRun:
    """A model ready for scores and answers, its base, and what was opened."""

    target: Artifact
    base: loader.Base
    model: Any
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of one of several adapters → its name in the model, which differs because a name may be anything."""

    @property
    def labels(self) -> Labels:
        """The meaning of a classifier's outputs."""
        config = causal_model(self.model).config
        names = tuple(config.id2label[number] for number in range(config.num_labels))
        return Labels(names, config.problem_type == REGRESSION)


def require_answers(target: Artifact, what: str) -> None:
    """Raise InputError for a classifier: ``what`` is for models that write text."""
    if target.model_class.has_own_head:
        raise InputError(
            f"{target.path}: is a classifier, and {what} is for models that write text. `qvera eval {target.arguments} "
            "--data ROWS --predictions FILE` writes its labels."
        )


def require_adapter(target: Artifact) -> Path:
    """Return the directory of the adapter. InputError: ``target`` is a whole checkpoint."""
    if target.adapter is None:
        raise InputError(
            f"{target.path}: is {target.what}, and neither a run (with {RECIPE_FILE}) nor an adapter directory (with "
            f"{ADAPTER_CONFIG})."
        )
    return target.adapter


def open_run(path: str | Path, *, adapter: bool = True, name: str | None = None) -> OpenRun:
    """Load a run, an adapter directory or a merged export (``adapter=False``: the base alone), ready for answers."""
    return open_target(find_target(Path(path), name=name, needs_name=adapter), adapter=adapter)


def find_target(
    path: Path, recipe: Path | None = None, *, name: str | None = None, needs_name: bool = True
) -> Artifact:
    """Find out what a directory is, or a hub id (``user/name`` or ``user/name@revision``).

    Args:
        recipe: a recipe file or a run directory that says how rows are read; its ``model`` section is then an adapter's
            base. Default: the recipe of the run that it is, that it lies in, or that a merged export names.
        name: picks one of several adapters.
        needs_name: False where only the base matters, because any of several adapters tells it.

    InputError: it is none of these, it has no adapter of this name, or the recipe can't be read.
    """
    path = local_directory(path)
    kind = kind_of(path)
    given, run = None, None
    if recipe is not None:
        run = recipe if recipe.is_dir() else None
        file = recipe if run is None else run / RECIPE_FILE
        if not file.is_file():
            raise InputError(f"--recipe {recipe}: expected a recipe file, or a run directory with {RECIPE_FILE} in it.")
        given = load_recipe(file, of_a_run=run is not None)
        given = given if run is None else with_base_found(given, run / "adapter")
    if kind == "many":
        directories = named_directories(adapters_root(path) or path)
        if name is None and not needs_name and (found := next(iter(directories.values()), None)):
            return dataclasses.replace(_adapter_target(found, given, run), path=path, name=None)
        return dataclasses.replace(_adapter_target(require_named(path, name), given, run, name), path=path)
    refuse_name(path, name)
    if kind == "run":
        own = with_base_found(load_run_recipe(path), path / "adapter")
        return Artifact(path, "a run", own.model, path / "adapter", given or own, run if given else path)
    if kind in ("adapter", "lora"):
        return _adapter_target(path, given, run)
    section = ModelSection(path=str(path), quantization="none")
    if kind == "checkpoint":
        return Artifact(path, "a checkpoint", section, None, given, run)
    certificate = read_certificate(path)
    if kind != "merged":
        raise InputError(
            f"{path}: is an export to {kind}, which llama.cpp and Ollama open. For qvera name what "
            f"it was exported from, {certificate['adapter']['path']}."
        )
    exported, name = Path(certificate["adapter"]["path"]), None
    if given is None and (beside := run_of(exported)) is not None:  # it is still there, with the same adapter
        weights = exported / ADAPTER_WEIGHTS
        if weights.is_file() and file_sha256(weights) == certificate["adapter"]["sha256"]:
            try:
                given = load_recipe(beside / RECIPE_FILE, of_a_run=True)
                run, name = beside, name_of(exported)
            except InputError as error:
                _logger.warning("%s\nThe export is read without that recipe.", error)
    return Artifact(path, "a merged export", section, None, given, run, name, certificate)


def _adapter_target(adapter: Path, given: Recipe | None, run: Path | None, name: str | None = None) -> Artifact:
    tree, beside, name = _config(adapter), run_of(adapter), name or name_of(adapter)
    what = f"an adapter ({tree['peft_type']})" if name is None else f"adapter {name!r}"
    if given is None and beside is not None:
        given, run = load_recipe(beside / RECIPE_FILE, of_a_run=True), beside
    if given is not None:
        given = with_base_found(given, adapter)
        return Artifact(adapter, what, given.model, adapter, given, run, name)
    if adapter_file.runs_on_our_layers(tree):
        tree = dict(vars(adapter_file.read_config(adapter)))
    base = tree.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{adapter / ADAPTER_CONFIG}: names no base model. Write its directory or hub id there, as "
            "base_model_name_or_path."
        )
    kept = {
        key: value for key in save_load.OF_BASE if (value := tree.get(key)) is not None
    }  # older adapters keep fewer
    section = ModelSection(path=base, added_tokens=list(tree.get("added_tokens") or ()), **kept)
    return Artifact(adapter, what, section, adapter, None, run, name)


def _config(adapter: Path) -> dict[str, Any]:
    return read_json(adapter / ADAPTER_CONFIG, "a PEFT adapter config", keys=("peft_type",))


def adapter_sha256(target: Artifact) -> str | None:
    """SHA-256 of the adapter's file, or of the adapter in a merged export; None where there is neither."""
    if target.adapter is None:
        return None if target.merged is None else str(target.merged["adapter"]["sha256"])
    weights = target.adapter / ADAPTER_WEIGHTS
    return file_sha256(weights) if weights.is_file() else None


def template_name(recipe: Recipe, run: Path | None) -> str:
    """Name the template that a run trained with; run.json resolves ``auto``. A mixture has its first source's."""
    name, used = recipe.data.template, None
    if name == "auto" and run is not None:
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            data = (try_read_json(run / "run.json") or {})["data"]
            first = data["sources"][0] if data.get("sources") else {}
            used = first.get("template", data["template"])  # an older run.json has the first source's there
    return used if isinstance(used, str) and used in NAMED_TEMPLATES else name


def template_beside(target: Artifact) -> str | None:
    """The chat template of an adapter whose recipe is not known, beside it or else in its config; None: it has none."""
    if target.adapter is None or target.recipe is not None:
        return None
    file = target.adapter / CHAT_TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if not adapter_file.runs_on_our_layers(_config(target.adapter)):
        return None
    return getattr(adapter_file.read_config(target.adapter), "chat_template", None)


def warn_of_other_rows(target: Artifact, datasets: Datasets, console: Console) -> None:
    """Say so where a run's rows have changed since its training: those held out now may be among the trained ones."""
    data = None if target.run is None else (try_read_json(target.run / "run.json") or {}).get("data")
    trained = data.get("sha256") if isinstance(data, dict) else None
    if target.recipe is not None and target.recipe.training.objective == "grpo":
        # in training the prompts were counted with room for their answers
        datasets = dataclasses.replace(datasets, train=copy.copy(datasets.train), eval=copy.copy(datasets.eval))
        for rows in filter(len, (datasets.train, datasets.eval)):
            rows.ask(target.recipe.training.sample_max_new_tokens)
    if trained is not None and trained != data_sha256(datasets):
        warn(
            console,
            f"{target.run}: its rows (data.path or data.eval_path) are others now than in training, so rows that are "
            "held out now may have been trained on, and score too well. Put the file back, or score rows that the run "
            f"has never seen: qvera eval {target.arguments} --data FILE",
        )


def open_target(target: Artifact, *, adapter: bool = True) -> OpenRun:
    """Load a target, ready for scores and answers. ``adapter=False`` loads the base alone.

    The base of a run or adapter is loaded as its recipe says, else with the defaults of ``model``. A checkpoint is
    loaded as it is stored, and computes in fp32 on a CPU. The base of a merged export has the export's precision.

    InputError: the files do not fit together, or a checkpoint names no base.
    """
    if target.adapter is None:
        base = _load_stored(target.path, target.model_class) if adapter else _load_merged_base(target)
        return OpenRun(target, base, base.model)
    ours = adapter_file.runs_on_our_layers(_config(target.adapter))
    if adapter and ours:
        adapter_file.read_adapter(target.adapter)  # a broken adapter is found before a big model is loaded
    elif adapter:
        _require_loadable(target.adapter)
    path, trained_on = Path(resolve_path(target.section.path)), _config(target.adapter).get("base_model_name_or_path")
    # a base that was a directory is not looked for on the hub
    if not path.is_dir() and isinstance(trained_on, str) and os.path.isabs(trained_on) and _ends_as(trained_on, path):
        file, key = target.adapter / ADAPTER_CONFIG, "base_model_name_or_path"
        if target.recipe is not None:
            file, key = (target.run or target.path) / RECIPE_FILE, "model.path"
        raise InputError(
            f"{file}: {key}: the base {trained_on} is not there. If it has moved, write its new place there, as {key}."
        )
    base = loader.load_base(target.section, model_class=target.model_class)
    if (template := template_beside(target)) is not None:
        base.tokenizer.chat_template = template
    if not adapter:
        return OpenRun(target, base, base.model)
    if ours:
        return OpenRun(target, base, save_load.load_adapter(base.model, target.adapter, base))
    return OpenRun(target, base, _load_other_adapter(base.model, target.adapter))


def open_adapters(path: Path, names: Sequence[str], progress: Callable[[int], None] | None = None) -> OpenRun:
    """Load a base and these of its adapters; ``progress`` takes the number of adapters read.

    InputError: an adapter is missing or damaged, or has another base.
    """
    directories = require_all_named(path, dict.fromkeys(names))
    configs = {name: adapter_file.read_config(directory) for name, directory in directories.items()}
    opened = open_target(find_target(path, needs_name=False), adapter=False)
    facts = opened.base.facts
    for name, config in configs.items():
        adapter_file.require_base(config, directories[name], facts["path"], facts.get("fingerprint"))
    opened.keys = {name: str(number) for number, name in enumerate(directories)}
    by_key = {opened.keys[name]: directory for name, directory in directories.items()}
    opened.model = load_adapters(opened.base.model, by_key, progress)
    return opened


def _require_loadable(directory: Path) -> None:
    """Refuse, before a big model is loaded, adapters that PEFT would load with harm or without effect.

    Our losses and answers ignore prompt learning. A Megatron config makes PEFT import a module that the file names.
    """
    adapter_file.require_files(directory)
    file, tree = directory / ADAPTER_CONFIG, _config(directory)
    if tree.get("megatron_config"):
        raise InputError(f"{file}: is for Megatron (megatron_config), whose modules are not imported here.")
    try:
        prompts = PeftConfig.from_pretrained(str(directory)).is_prompt_learning
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: not a config that PEFT can read ({first_line(error)})") from None
    if prompts or tree["peft_type"] == "ADAPTION_PROMPT":
        raise InputError(
            f"{file}: peft_type is {tree['peft_type']}, which changes prompts; expected one that changes layers."
        )


def _load_other_adapter(base_model: nn.Module, directory: Path) -> PeftModel:
    """Load a LoRA, or any other adapter of PEFT's, and check that all of its tensors found a place."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            peft_model = PeftModel.from_pretrained(base_model, str(directory))
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"{directory}: PEFT can't put this adapter on its base: {first_line(error)}") from None
    # PEFT only warns of a tensor that the file lacks, and says nothing of one that it does not use.
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing:
        raise InputError(f"{directory}: does not fit its base: {missing[0][:300]}")
    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as stored:
        unused = sorted(set(stored.keys()) - set(get_peft_model_state_dict(peft_model, save_embedding_layers=False)))
    unused = [name for name in unused if peft_model.base_model.prefix in name]  # PEFT passes over them in silence
    if unused:
        raise InputError(
            f"{directory}: does not fit its base and its target_modules: {first_of(unused)} of its file belong nowhere."
        )
    peft_model.requires_grad_(False)
    return peft_model.eval()


def _load_merged_base(target: Artifact) -> loader.Base:
    """Load the base of a merged export. InputError: it is not known, or not there."""
    section = _base_of_export(target)
    assert target.merged is not None
    if target.merged["base"]["weights"] == "original":
        return _load_stored(base_directory(section))
    trained = target.merged.get("trained_on") or {}
    changes = {key: trained[key] for key in ("quantization", "double_quant") if key in trained}
    if not accelerator.is_available():
        # as load_exported computes there, so that the change of the weights is all that differs
        changes["compute_dtype"] = "float32"
    return loader.load_base(section.replace(**changes))


def require_comparable(target: Artifact) -> None:
    """Raise InputError where there is no base to compare with, as far as files say it."""
    if target.adapter is None:
        _base_of_export(target)


def _base_of_export(target: Artifact) -> ModelSection:
    if target.merged is None:
        raise InputError(
            f"{target.path}: is a checkpoint that says nothing of a base ({CERTIFICATE} is missing), so there is none "
            "to compare with. Evaluate that base's directory by itself."
        )
    if tokens := target.merged.get("added_tokens"):
        raise InputError(
            f"{target.path}: has rows for {', '.join(tokens)}, which the base it was merged into has not, so it can't "
            "be asked the same. Evaluate the run itself, whose base is given them."
        )
    base = target.merged["base"]
    section = ModelSection(path=base["path"], revision=base.get("revision"), quantization="none")
    try:
        base_directory(section)
    except InputError as error:
        file = target.path / CERTIFICATE
        raise InputError(f"{file}: names a base (base.path) that is not there any more. {error}") from None
    return section


def _load_stored(directory: Path, model_class: ModelClass = CAUSAL_LM) -> loader.Base:
    """Load a checkpoint as it is stored, in 16 bits or in bitsandbytes' 4 bits."""
    tokenizer = load_processor(ModelSection(path=str(directory)), model_class)
    try:
        loaded = loader.load_exported(directory, accelerator.current_device(), model_class)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"{directory}: can't be loaded as {model_class.what}: {first_line(error)} Expected a finished export."
        ) from None
    loaded.requires_grad_(False)
    stored = "stored" if hasattr(loaded.config, "quantization_config") else "none"
    facts = {"path": str(directory), "architecture": type(loaded).__name__, "quantization": stored}
    return loader.Base(loaded, tokenizer, facts)


@contextlib.contextmanager
def base_of(opened: OpenRun) -> Iterator[nn.Module]:
    """Yield the model before training: with the adapter off, or the base of an export, loaded for the block."""
    if opened.target.adapter is None:
        yield _load_merged_base(opened.target).model
        return
    with opened.model.disable_adapter():
        yield opened.model


def with_base_found(recipe: Recipe, adapter: Path) -> Recipe:
    """Return the recipe of a run, with a ``model.path`` that leads to its base.

    Its path may be relative to where the run started; the config of ``adapter`` has the whole path.
    """
    path = Path(resolve_path(recipe.model.path))
    known = (try_read_json(adapter / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
    if path.is_dir() or not isinstance(known, str) or not os.path.isabs(known) or not Path(known).is_dir():
        return recipe
    if not _ends_as(known, path):
        return recipe
    return recipe.replace(model=recipe.model.replace(path=known))


def _ends_as(trained_on: str, path: Path) -> bool:
    """Whether a recipe's ``path`` can be the directory it was trained on; an id of the hub is none."""
    return Path(trained_on).parts[-len(path.parts) :] == path.parts
