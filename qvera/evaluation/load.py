"""Open what can be evaluated: a run, an adapter on its base model, or a whole checkpoint such as a merged export."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from qvera.adapters import save_load
from qvera.config.load import load_recipe
from qvera.config.schema import ModelSection, Recipe
from qvera.data import NAMED_TEMPLATES
from qvera.models import loader
from qvera.models.hub import base_directory
from qvera.models.loader import load_exported
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import file_sha256, read_json
from qvera.utils.formatting import first_of
from qvera.utils.paths import CERTIFICATE, RECIPE_FILE

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

OUR_ADAPTERS = ("QVERA", "VERA")
"""Adapter types that run on qvera's layers. PEFT loads every other type."""


@dataclasses.dataclass
class OpenRun:
    """A run ready to use. ``recipe`` is None for an adapter directory that stands alone."""

    path: Path
    recipe: Recipe | None
    base: loader.Base
    model: Any


def find_adapter(path: Path) -> tuple[Recipe | None, ModelSection, Path]:
    """Recipe, model section and adapter directory of a run or adapter directory, without loading anything big.

    Raises:
        InputError: it is neither, or the run has no adapter yet.
    """
    if not path.is_dir():
        raise InputError(
            f"{path}: no such directory. Expected a run (with {RECIPE_FILE} and adapter/) or an adapter directory."
        )
    if (path / RECIPE_FILE).is_file():
        recipe = load_recipe(path / RECIPE_FILE)
        adapter = path / "adapter"
        if not adapter.is_dir():
            raise InputError(f"{path}: this run has no adapter/ yet; finish it with `qvera train ... --resume`.")
        return recipe, recipe.model, adapter
    if (path / save_load.ADAPTER_CONFIG).is_file():
        config, _ = save_load.read_adapter(path)
        if config.base_model_name_or_path is None:
            raise InputError(f"{path / save_load.ADAPTER_CONFIG}: names no base model (base_model_name_or_path).")
        section = ModelSection(
            path=config.base_model_name_or_path,
            revision=config.revision,
            added_tokens=list(getattr(config, "added_tokens", None) or ()),
            pad_token=getattr(config, "pad_token", None),
            eos_token=getattr(config, "eos_token", None),
        )
        return None, section, path
    raise InputError(
        f"{path}: is neither a run (it has no {RECIPE_FILE}) nor an adapter directory (it has no "
        f"{save_load.ADAPTER_CONFIG})."
    )


def open_run(path: str | Path, *, adapter: bool = True) -> OpenRun:
    """Load base and adapter of a run or adapter directory, ready for answers.

    Args:
        adapter: False: the base model alone (for a comparison).
    """
    path = Path(path)
    recipe, section, directory = find_adapter(path)
    if adapter:
        save_load.read_adapter(directory)  # a broken adapter is found before a big model is loaded
    base = loader.load_base(section)
    return OpenRun(path, recipe, base, save_load.load_adapter(base.model, directory, base) if adapter else base.model)


@dataclasses.dataclass(frozen=True)
class EvalTarget:
    """A directory that can be evaluated, before anything big is read.

    Attributes:
        kind: ``run``, ``adapter`` (of any kind that PEFT knows) or ``checkpoint``.
        section: the base model of a run or adapter; a checkpoint itself.
        adapter: the adapter's directory; None for a checkpoint.
        recipe: the recipe that says how rows are read; None where none is known.
        run: the run directory that the recipe is from; None where there is none.
        merged: certificate of a merged export (qvera_export.json); None for other checkpoints.
    """

    path: Path
    kind: Literal["run", "adapter", "checkpoint"]
    section: ModelSection
    adapter: Path | None = None
    recipe: Recipe | None = None
    run: Path | None = None
    merged: dict[str, Any] | None = None

    @property
    def what(self) -> str:
        """For people: a run, a LORA adapter, a merged export, a checkpoint."""
        if self.kind == "adapter" and self.adapter is not None:
            return f"an adapter ({_config(self.adapter)['peft_type']})"
        return {"run": "a run", "checkpoint": "a merged export" if self.merged else "a checkpoint"}.get(self.kind, "")


def find_target(path: Path, recipe: Path | None = None) -> EvalTarget:
    """Find out what a directory is.

    Args:
        recipe: a recipe file, or a run's directory, whose rows, lengths and template are used. Without it they are
            those of the run itself, of the run that an ``adapter/`` lies in, or of the run that a merged export names,
            where it is still there. An adapter's base is then read as that recipe's ``model`` section says.

    Raises:
        InputError: it is none of the three, or the recipe can't be read.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such directory. Expected a run, an adapter directory or an exported checkpoint.")
    given = None if recipe is None else _recipe_of(recipe)
    given_run = recipe if recipe is not None and recipe.is_dir() else None
    if (path / RECIPE_FILE).is_file():
        own, section, adapter = find_adapter(path)
        return EvalTarget(path, "run", section, adapter, given or own, given_run if given else path)
    if (path / save_load.ADAPTER_CONFIG).is_file():
        return _adapter(path, given, given_run)
    if (path / "config.json").is_file():
        return _checkpoint(path, given, given_run)
    raise InputError(
        f"{path}: is neither a run (it has no {RECIPE_FILE}) nor an adapter directory (no {save_load.ADAPTER_CONFIG}) "
        f"nor an "
        "exported checkpoint (no config.json)."
    )


def _recipe_of(path: Path) -> Recipe:
    file = path / RECIPE_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"--recipe {path}: expected a recipe file, or a run directory with {RECIPE_FILE} in it.")
    return load_recipe(file)


def _adapter(path: Path, recipe: Recipe | None, run: Path | None) -> EvalTarget:
    beside = path.resolve().parent
    if recipe is None and path.resolve().name == "adapter" and (beside / RECIPE_FILE).is_file():
        recipe, run = load_recipe(beside / RECIPE_FILE), beside
    if recipe is not None:
        return EvalTarget(path, "adapter", recipe.model, path, recipe, run)
    tree = _config(path)
    if tree["peft_type"] in OUR_ADAPTERS:
        return EvalTarget(path, "adapter", find_adapter(path)[1], path)
    name = tree.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{path / save_load.ADAPTER_CONFIG}: names no base model (base_model_name_or_path). Name a recipe or run "
            f"that does "
            "with --recipe."
        )
    return EvalTarget(path, "adapter", ModelSection(path=name, revision=tree.get("revision")), path)


def _config(adapter: Path) -> dict[str, Any]:
    return read_json(adapter / save_load.ADAPTER_CONFIG, "a PEFT adapter config", ("peft_type",))


def _checkpoint(path: Path, recipe: Recipe | None, run: Path | None) -> EvalTarget:
    """A checkpoint, with the run that it was exported from where that is still there and still has the same adapter."""
    section = ModelSection(path=str(path), quantization="none")
    file = path / CERTIFICATE
    if not file.is_file():
        return EvalTarget(path, "checkpoint", section, None, recipe, run)
    fix = "Export again, or remove it to have the directory taken for a plain checkpoint."
    certificate = read_json(file, "the certificate of a merged export", fix=fix)
    try:
        adapter, digest = Path(certificate["adapter"]["path"]), certificate["adapter"]["sha256"]
        certificate["base"]["path"], certificate["base"]["weights"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: is not the certificate of a merged export (it has no {error}). {fix}") from None
    weights = adapter / save_load.ADAPTER_WEIGHTS
    if (
        recipe is None
        and (adapter.parent / RECIPE_FILE).is_file()
        and weights.is_file()
        and file_sha256(weights) == digest
    ):
        recipe, run = load_recipe(adapter.parent / RECIPE_FILE), adapter.parent
    return EvalTarget(path, "checkpoint", section, None, recipe, run, certificate)


def adapter_sha256(target: EvalTarget) -> str | None:
    """Of the adapter's file, or of the one that a merged export was made with; None where there is neither."""
    if target.adapter is None:
        return None if target.merged is None else str(target.merged["adapter"]["sha256"])
    weights = target.adapter / save_load.ADAPTER_WEIGHTS
    return file_sha256(weights) if weights.is_file() else None


def template_of(recipe: Recipe, run: Path | None) -> str:
    """The name of the template that a run trained with: ``auto`` as run.json says which one it was.

    Of a mixture the first source's, as ``recipe.data.template`` is.
    """
    name = recipe.data.template
    if name == "auto" and run is not None and (run / "run.json").is_file():
        try:
            data = json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]
            first = data["sources"][0] if data.get("sources") else {}
            used = first.get("template", data["template"])  # an older run.json has the first source's there
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return name
        return used if isinstance(used, str) and used in NAMED_TEMPLATES else name
    return name


def open_target(target: EvalTarget, *, adapter: bool = True) -> OpenRun:
    """Load it, ready for scores and answers.

    A run's or an adapter's base is loaded as its recipe says, or, without one, as the defaults of ``model`` do. A
    checkpoint is loaded as it is stored, and computes in fp32 on a CPU.

    Args:
        adapter: False: the base model alone. Of a merged export that is the base it was merged into, in the same
            precision.

    Raises:
        InputError: what is there does not fit together, or a checkpoint names no base.
    """
    if target.adapter is None:
        return _open_checkpoint(target) if adapter else _open_merged_base(target)
    directory = target.adapter
    ours = _config(directory)["peft_type"] in OUR_ADAPTERS
    if adapter and ours:
        save_load.read_adapter(directory)  # a broken adapter is found before a big model is loaded
    elif adapter:
        _require_loadable(directory)
    base = loader.load_base(target.section)
    if not adapter:
        return OpenRun(target.path, target.recipe, base, base.model)
    load = save_load.load_adapter if ours else _load_other_adapter
    return OpenRun(target.path, target.recipe, base, load(base.model, directory, base))


def _require_loadable(directory: Path) -> None:
    """Refuse, before a big model is loaded, what PEFT would load with harm or without effect.

    Raises:
        InputError: no safetensors; a kind that PEFT does not know; one that changes the prompt instead of layers, which
            our losses and answers would pass by; or a config that names a Python module for PEFT to import.
    """
    if not (directory / save_load.ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{directory}: has no {save_load.ADAPTER_WEIGHTS}; pickled adapters are not read.")
    file, tree = directory / save_load.ADAPTER_CONFIG, _config(directory)
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


def _load_other_adapter(base_model: nn.Module, directory: Path, _: loader.Base) -> PeftModel:
    """A LoRA, or whatever else PEFT itself can load, on our frozen base."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            peft_model = PeftModel.from_pretrained(base_model, str(directory))
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"{directory}: PEFT can't put this adapter on its base: {first_line(error)}") from None
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing:
        raise InputError(f"{directory}: does not fit its base: {missing[0][:300]}")
    with safe_open(directory / save_load.ADAPTER_WEIGHTS, framework="pt") as stored:
        unused = sorted(set(stored.keys()) - set(get_peft_model_state_dict(peft_model, save_embedding_layers=False)))
    unused = [name for name in unused if peft_model.base_model.prefix in name]  # PEFT passes over them in silence
    if unused:
        raise InputError(
            f"{directory}: does not fit its base and its target_modules: {first_of(unused)} of its file belong nowhere."
        )
    peft_model.requires_grad_(False)
    return peft_model.eval()


def _open_checkpoint(target: EvalTarget) -> OpenRun:
    return OpenRun(target.path, target.recipe, *_stored_model(target.path))


def _open_merged_base(target: EvalTarget) -> OpenRun:
    require_base(target)
    assert target.merged is not None
    told, trained = target.merged["base"], target.merged.get("trained_on") or {}
    section = ModelSection(path=told["path"], revision=told.get("revision"), quantization="none")
    if told["weights"] == "original":
        loaded, own = _stored_model(base_directory(section))
        return OpenRun(target.path, target.recipe, loaded, own)
    kept = {key: trained[key] for key in ("quantization", "double_quant") if key in trained}
    if loader.pick_device().type == "cpu":
        kept["compute_dtype"] = (
            "float32"  # as load_exported computes there, so that the change of the weights is all that differs
        )
    base = loader.load_base(section.replace(**kept))
    return OpenRun(target.path, target.recipe, base, base.model)


def base_problem(target: EvalTarget) -> str | None:
    """Why there is no base to compare with; None where there is one, as far as can be said before it is loaded."""
    if target.kind != "checkpoint":
        return None
    if target.merged is None:
        return (
            f"{target.path}: is a checkpoint that says nothing of a base ({CERTIFICATE} is missing), so there is none "
            f"to compare "
            "with. Evaluate that base's directory by itself."
        )
    tokens = target.merged.get("added_tokens")
    if tokens:
        return (
            f"{target.path}: has rows for {', '.join(tokens)}, which the base it was merged into has not, so it can't "
            f"be asked "
            "the same. Evaluate the run itself, whose base is given them."
        )
    told = target.merged["base"]
    try:
        base_directory(ModelSection(path=told["path"], revision=told.get("revision")))
    except InputError as error:
        return f"{target.path / CERTIFICATE}: names a base that is not there any more. {error}"
    return None


def require_base(target: EvalTarget) -> None:
    """Raises InputError where there is no base to compare with."""
    problem = base_problem(target)
    if problem is not None:
        raise InputError(problem)


def _stored_model(directory: Path) -> tuple[loader.Base, PreTrainedModel]:
    tokenizer = loader.load_tokenizer(ModelSection(path=str(directory)))
    if read_json(directory / "config.json", "a model's config").get("quantization_config"):
        raise InputError(
            f"{directory}: is stored quantized; expected a 16-bit checkpoint, such as `qvera export --to merged` "
            "writes. A run or an adapter on this base can be evaluated."
        )
    try:
        loaded = load_exported(directory, loader.pick_device())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"{directory}: can't be loaded as a causal language model: {first_line(error)} Expected a finished export."
        ) from None
    loaded.requires_grad_(False)
    facts = {"path": str(directory), "architecture": type(loaded).__name__, "quantization": "none"}
    return loader.Base(loaded, tokenizer, facts), loaded


@contextlib.contextmanager
def base_of(target: EvalTarget, opened: OpenRun) -> Iterator[nn.Module]:
    """A context with the model before training: the adapter switched off, or an export's base model loaded."""
    if target.adapter is None:
        yield _open_merged_base(target).model
        return
    with opened.model.disable_adapter():
        yield opened.model
