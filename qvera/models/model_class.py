"""A base model's class of transformers, its config, the model without weights, and checks that its weights fit.

A causal language model keeps its head, frozen. A classification model gets a head that is fp32 and trained whole: all
that it has beside its base model (``score``, ``classifier``, ``pooler``). Layers that the checkpoint lacks, and outputs
of other labels, are drawn from a seed as torch draws layers, the same on every rank and machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from qvera.config.sections import ModelSection
from qvera.models.conversion import DECODED, is_decoded, made_of
from qvera.models.hub import not_on_hub, require_model_files
from qvera.models.structure import share_tied_modules
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import resolve_path
from qvera.utils.formatting import first_of
from qvera.utils.hub import leave_silent_hub
from qvera.utils.safetensors_io import TensorEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TAKES_IMAGES = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
_BUFFERS = r"(?:^|\.)(?:position_ids|inv_freq)$"
"""Old checkpoints carry these; the model makes them."""
_OF_TOKENS, _OF_TEXTS = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
_OF_IMAGES, _OF_IMAGES_AND_TEXT = "AutoModelForImageClassification", "AutoModelForImageTextToText"
_KINDS = {
    _OF_TOKENS: "a causal language model",
    _OF_IMAGES_AND_TEXT: "a language model that takes images",
    _OF_TEXTS: "a sequence classification model",
    _OF_IMAGES: "an image classification model",
}
REGRESSION, CLASSES = "regression", "single_label_classification"
"""transformers' ``problem_type``."""
_LARGEST = {
    "num_hidden_layers": 10_000, "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16,
    "hidden_size": 2**20, "intermediate_size": 2**24, "vocab_size": 2**24,
}  # fmt: skip
"""Far above any model there is, and far below what would end in a traceback or fill the memory."""
_KIND_OF: dict[str, tuple[type[Collection[Any]], str]] = {
    "architectures": (list, "a list of names"), "id2label": (dict, "a name for each number"),
    "quantization_config": (dict, "settings by their names"),
}  # fmt: skip
_REFUSED = {
    "cpmant": "takes token 0 for padding, on the left",
    "rwkv": "changes its weights between training and evaluation",
}
_COMPARED_BYTES = 2**24
_LAYER = re.compile(r"(.*?\b(?:layers|h|blocks)\.)(\d+)\.")


@dataclasses.dataclass(frozen=True)
class ModelClass:
    """The kind of model that a task asks the loader for.

    Attributes:
        auto: the auto class of transformers.
        labels: the names of the head's outputs, in order; empty: those of the checkpoint's config.
        problem_type: `CLASSES` or `REGRESSION`; None: the checkpoint's.
        seed: for a head that the checkpoint does not have.
    """

    auto: str = _OF_TOKENS
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    seed: int = 0

    @property
    def what(self) -> str:
        """The kind of model, for messages."""
        return _KINDS[self.auto]

    @property
    def has_own_head(self) -> bool:
        """Whether the head is trained whole."""
        return self.auto in (_OF_TEXTS, _OF_IMAGES)

    @property
    def reads_images(self) -> bool:
        """Whether an image processor makes its input, and no tokenizer."""
        return self.auto == _OF_IMAGES

    @property
    def takes_images(self) -> bool:
        """Whether it is a language model that takes images beside text."""
        return self.auto == _OF_IMAGES_AND_TEXT

    def of_published(self, architectures: Iterable[str] | None) -> ModelClass:
        """Return the class whose names the tensors of a checkpoint with these ``architectures`` have.

        A model that takes images too holds its text model as a part, which transformers can also open alone.
        """
        takes_images = not _TAKES_IMAGES.isdisjoint(architectures or ())
        return ModelClass(_OF_IMAGES_AND_TEXT) if self.auto == _OF_TOKENS and takes_images else self

    def from_config(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """The model of a config, as transformers initializes it."""
        auto = self.of_published(config.architectures).auto
        model = getattr(transformers, auto).from_config(self.configured(config), **options)
        _complete_outputs(model)
        _plain_linears(model)
        share_tied_modules(model)
        return model

    def from_pretrained(self, name: str, config: PretrainedConfig, **options: Any) -> Any:
        """The model of a checkpoint, as transformers loads it. A head of other labels is left out."""
        options["use_kernels"] = False  # else newer versions put kernels from the hub in place of layers, on a GPU
        if self.has_own_head:
            options |= {"config": self.configured(config), "ignore_mismatched_sizes": True}
        auto = self.of_published(config.architectures).auto
        found = getattr(transformers, auto).from_pretrained(name, **options)
        _complete_outputs(found[0] if isinstance(found, tuple) else found)
        return found

    def configured(self, config: PretrainedConfig) -> PretrainedConfig:
        """Put this head's labels into the config, and return it."""
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: number for number, name in config.id2label.items()}
            config.problem_type = self.problem_type
        return config

    def finds_head(self, config: PretrainedConfig) -> bool:
        """Whether a checkpoint of this config has a head of the same labels (ask before `configured`)."""
        stored = stored_labels(config)
        return self.has_own_head and stored is not None and self.labels in ((), stored)

    def head_modules(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The modules that are trained whole, by name: all with parameters beside the model's base model."""
        if not self.has_own_head:
            return {}
        base = model.base_model_prefix
        return {n: m for n, m in model.named_children() if n != base and next(m.parameters(), None) is not None}

    def outputs(self, model: PreTrainedModel) -> tuple[str, ...]:
        """The parameters of the head that have a row for each label, by name."""
        heads = tuple(f"{name}." for name in self.head_modules(model))
        named, labels = model.named_parameters(), model.config.num_labels
        return tuple(name for name, p in named if name.startswith(heads) and p.shape[:1] == (labels,))

    def stored_names(self, names: Iterable[str], model: PreTrainedModel) -> set[str]:
        """The checkpoint's tensors of this model: without another head, such as a language model's."""
        if not self.has_own_head:
            return set(names)
        known, inside = model.state_dict().keys(), f"{model.base_model_prefix}."
        ignored = [_BUFFERS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        # the statistics of a packed weight go with it
        weights = {name: f"{name.partition('.weight.')[0]}.weight" for name in names}
        within = (name for name, own in weights.items() if name in known or own in known or name.startswith(inside))
        return {name for name in within if name in known or not any(re.search(one, name) for one in ignored)}

    def copied_as(self, architectures: Iterable[str] | None) -> ModelClass:
        """The class of a checkpoint's quantized copy: all tasks share that of a language model."""
        is_language_model = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures or ())
        return CAUSAL_LM if is_language_model else ModelClass(self.of_published(architectures).auto, seed=self.seed)

    @property
    def settings(self) -> Mapping[str, str]:
        """The settings of the class that a quantized copy depends on; empty for a causal language model."""
        return {"auto": self.auto} if self.auto != _OF_TOKENS else {}

    def start_head(self, model: PreTrainedModel, drawn: Collection[str], device: torch.device) -> None:
        """Make the head fp32 on its device, layers with ``drawn`` parameters anew. It takes its input in any dtype."""

        def in_own_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            dtype = next(module.parameters()).dtype
            return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

        for name, module in self.head_modules(model).items():
            # drawn on the CPU, by a generator of its own, so that it is the same on every device and rank
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                for place, part in module.named_modules(prefix=name):
                    if any(f"{place}.{key}" in drawn for key, _ in part.named_parameters(recurse=False)):
                        part.to_empty(device="cpu", recurse=False)
                        if callable(reset := getattr(part, "reset_parameters", None)):
                            reset()
            module.to(device=device, dtype=torch.float32)
            module.register_forward_pre_hook(in_own_dtype)


CAUSAL_LM = ModelClass()


def _plain_linears(model: PreTrainedModel) -> None:
    """Make Falcon's linears, of a class of their own that computes the same, linears that can be in 4 bits."""
    for module in model.modules():
        if type(module).__name__ == "FalconLinear":
            module.__class__ = nn.Linear


def _complete_outputs(model: PreTrainedModel) -> None:
    """Give Llama 4 with images an output that it reads from its text model, and that transformers 5.24 leaves out."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        text: Any = model.get_submodule("language_model")
        text.register_forward_hook(lambda module, inputs, output: setattr(output, "image_outputs", None))


def classification_class(labels: Iterable[str] = (), is_regression: bool = False, seed: int = 0) -> ModelClass:
    """A model for classes of texts, or (with one label) for a number. Without labels those of its checkpoint."""
    labels = tuple(labels)
    return ModelClass(_OF_TEXTS, labels, (REGRESSION if is_regression else CLASSES) if labels else None, seed)


def image_class(labels: Iterable[str] = (), seed: int = 0) -> ModelClass:
    """A model for classes of images. Without labels those of its checkpoint."""
    labels = tuple(labels)
    return ModelClass(_OF_IMAGES, labels, CLASSES if labels else None, seed)


def stored_class(architectures: Iterable[str] | None) -> ModelClass:
    """The class of a finished checkpoint, by the ``architectures`` of its config."""
    for name in architectures or ():
        if "SequenceClassification" in name:
            return classification_class()
        if "ImageClassification" in name:
            return image_class()
    return CAUSAL_LM


def stored_labels(config: PretrainedConfig) -> tuple[str, ...] | None:
    """The labels of a checkpoint's own classification head, in their order; None: it has none."""
    if not any("Classification" in name for name in config.architectures or ()):
        return None
    names = getattr(config, "id2label", None) or {}
    return tuple(names[number] for number in sorted(names))


def load_config(section: ModelSection, source: Path | str | None = None) -> PretrainedConfig:
    """The transformers config of the base, or of a directory or hub id ``source``.

    Raises:
        OSError: there is none, or it is not JSON; the message is transformers'.
        InputError: it describes no possible model.
    """
    name = str(source or resolve_path(section.path))
    revision = None if source else section.revision
    leave_silent_hub(name)
    # impossible sizes are found before transformers' classes see them, which answer with tracebacks
    raw, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    for part in (raw, raw.get("text_config")):
        if isinstance(part, Mapping):
            _require_possible(part, f"{name}: config.json")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=section.trust_remote_code)
    except StrictDataclassError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{name}: config.json describes no model that can be built: {reason}") from None
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        advice = "Set model.trust_remote_code: true (`qvera quantize`: --trust-remote-code), if you trust its authors."
        raise InputError(f"model.path: {name!r} needs Python code of its own. {advice}") from None
    stored = getattr(config, "quantization_config", None)
    if section.quantization in ("nf4", "fp4") and is_decoded(stored):
        del config.quantization_config  # the quantized copy is made from it as from a checkpoint in 16 bits
    method = stored.get("quant_method", "bitsandbytes") if isinstance(stored, Mapping) else "bitsandbytes"
    if section.quantization in ("nf4", "fp4") and method not in ("bitsandbytes", *DECODED):
        raise InputError(
            f"model.path: {name!r} is stored in the format of {method}, which is not trained on. Name the 16-bit model "
            "that it was made from."
        )
    return config


def _require_possible(part: Mapping[str, Any], where: str) -> None:
    for key, largest in _LARGEST.items():
        value = part.get(key)
        if value is None or isinstance(value, list):  # some models have a list, a value a layer
            continue
        # beside qk_nope_head_dim, head_dim is the part with positions, which GLM 5.3 has not
        least = 0 if key == "head_dim" and "qk_nope_head_dim" in part else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
            raise InputError(f"{where} has {key} {value!r}, expected a whole number from {least} to {largest:,}.")
    for key, (kind, what) in _KIND_OF.items():
        value = part.get(key)
        if value is not None and not (isinstance(value, kind) and all(isinstance(name, str) for name in value)):
            raise InputError(f"{where} has {key} {value!r}, expected {what}.")
    pairs = [("num_attention_heads", "num_key_value_heads")]
    if not any("head_dim" in key for key in part):  # a head is hidden_size / num_attention_heads wide
        pairs.append(("hidden_size", "num_attention_heads"))
    for key, unit in pairs:
        number, divisor = part.get(key), part.get(unit)
        if isinstance(number, int) and isinstance(divisor, int) and number % divisor:
            raise InputError(f"{where} has {key} {number}, not a multiple of {unit} {divisor}.")


def empty_model(
    section: ModelSection, source: Path | str | None = None, model_class: ModelClass = CAUSAL_LM
) -> PreTrainedModel:
    """The base without weights, on the meta device. Raises InputError if no model of this class can be made."""
    try:
        config = load_config(section, source)
        if reason := _REFUSED.get(config.model_type):
            raise InputError(
                f"model.path: {config.model_type} {reason}, which qvera is not made for. Take another model."
            )
        with torch.device("meta"):
            model = model_class.from_config(config, trust_remote_code=section.trust_remote_code)
        if model_class.has_own_head:
            _require_base_model(model)
        return model
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        name = str(source or resolve_path(section.path))
        if not (Path(name) / "config.json").is_file():
            require_model_files(name)  # it says what the directory is instead
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise not_on_hub("model.path", name, error) from None
        fix = " Take another model, or a transformers that knows this one." if isinstance(error, ValueError) else ""
        reason = first_line(error)
        if reason.startswith("Unrecognized configuration class"):
            reason = f"transformers has none of the type {config.model_type}."
        raise InputError(
            f"model.path: no model can be made from the config of {name!r}; it can't be loaded as {model_class.what}: "
            f"{reason}{fix}"
        ) from None


def _require_base_model(model: PreTrainedModel) -> None:
    """Refuse a class that does not hold its base model as a part (CLIP), or whose base has no embedding (ConvNeXt)."""
    with contextlib.suppress(NotImplementedError):  # which transformers raises where it knows of no embedding
        if hasattr(model, model.base_model_prefix) and model.get_input_embeddings() is not None:
            return
    raise InputError(
        f"model.path: {type(model).__name__} has no base model with an input embedding as a part of its own, which "
        "qvera adapts beside the head. Take another model."
    )


def require_own_weights(
    directory: Path, entries: list[TensorEntry], model: PreTrainedModel, model_class: ModelClass = CAUSAL_LM
) -> None:
    """Compare the tensors of a checkpoint with the model that its config.json describes (`empty_model`).

    Other names than the model's are not compared: transformers may rename them. A head of the class itself may be
    missing. Raises InputError for other layers, heads, shapes or dtypes, or a missing weight.
    """
    stored, weights = {entry.name: entry for entry in entries}, model.state_dict()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = _layers(name for name in stored if not any(re.search(pattern, name) for pattern in ignored))
    for prefix, expected in _layers(weights).items():
        if found.get(prefix, expected) != expected:
            raise InputError(
                f"{directory}: config.json describes a model of {len(expected)} layers (num_hidden_layers), and the "
                f"weights hold {len(found[prefix])} ({prefix}*). Copy config.json and all weight files of one "
                "checkpoint again."
            )
    _require_head(directory, stored, model)
    if getattr(model.config, "quantization_config", None) is not None:
        return  # packed weights have other shapes and dtypes
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    heads = tuple(f"{name}." for name in model_class.head_modules(model))
    wanted = [n for n, _ in model.named_parameters() if not n.startswith(heads)]
    missing = [n for n in wanted if n not in stored and n not in tied.values()]
    # names that the model does not know may be the missing ones, before transformers renames them
    if missing and model_class.stored_names(stored, model) <= weights.keys():
        raise InputError(
            f"{directory}: the weights hold no {first_of(missing)}, which config.json asks for. Copy config.json and "
            "all weight files of one checkpoint again."
        )
    for name, tensor in weights.items():
        if (entry := stored.get(name)) is None or name.startswith(heads):
            continue
        if entry.shape != tuple(tensor.shape):
            raise InputError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, the model of config.json needs "
                f"{list(tensor.shape)}. Weights and config.json are not of one model."
            )
        if tensor.is_floating_point() and not entry.dtype.is_floating_point:
            raise InputError(
                f"{entry.file}: {name} is {entry.dtype}, expected a floating-point weight. Save the checkpoint again."
            )


def _layers(names: Iterable[str]) -> dict[str, set[int]]:
    """Prefix of the layers' names → their numbers."""
    found: dict[str, set[int]] = {}
    for match in filter(None, map(_LAYER.match, names)):
        found.setdefault(match[1], set()).add(int(match[2]))
    return found


def _require_head(directory: Path, stored: Mapping[str, TensorEntry], model: PreTrainedModel) -> None:
    names: dict[nn.Module, str] = {module: f"{name}.weight" for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if names.get(embedding) not in stored or head not in names:
        return
    table, output = stored[names[embedding]], stored.get(names[head])
    tied = head.weight is embedding.weight
    if output is None and not tied:
        if (source := made_of(names[head], stored, model)) is not None:  # Inkling 2 cuts rows off
            raise InputError(
                f"{directory}: transformers changes {source} of the files into {names[head]} while it loads them, in a "
                f"way that qvera does not know ({type(model).__name__}). Take another model."
            )
        raise InputError(
            f"{directory}: the weights hold no {names[head]}, and config.json does not tie it to the embedding, so "
            "the model would get a random output head. Copy all weight files again; or, if the model has none of its "
            "own, set tie_word_embeddings: true in config.json."
        )
    if output is not None and tied and not _same_tensor(table, output):
        raise InputError(
            f"{directory}: config.json ties the output head to the embedding, but {names[head]} differs from "
            f"{table.name}. Set tie_word_embeddings: false in config.json, or take the head out of the weights."
        )


def _same_tensor(one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    size = one.size_bytes
    first, second = (np.memmap(e.file, mode="r", offset=e.start, shape=(size,)) for e in (one, other))
    parts = (slice(start, start + _COMPARED_BYTES) for start in range(0, size, _COMPARED_BYTES))
    return all(np.array_equal(first[part], second[part]) for part in parts)
