"""Which class of transformers a base model is made as, and the head that is trained whole on it.

A causal language model keeps its head, frozen. A classification model gets a head that is fp32 and trained whole: all
that it has beside its base model (``score``, ``classifier``, ``pooler``). Where the checkpoint has none, it is drawn
from a seed as torch draws layers, the same on every rank and machine.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
"""Ends of the class names of causal language models."""
_BUFFERS = r"(?:^|\.)(?:position_ids|inv_freq)$"
"""Old checkpoints carry these; the model makes them."""
_OF_TEXTS, _OF_IMAGES = "AutoModelForSequenceClassification", "AutoModelForImageClassification"
REGRESSION, CLASSES = "regression", "single_label_classification"
"""transformers' ``problem_type``."""


@dataclasses.dataclass(frozen=True)
class ModelClass:
    """What a task asks of the loader.

    Attributes:
        auto: the auto class of transformers.
        what: the kind of model, for messages.
        labels: the names of the head's outputs, in order; empty: those of the checkpoint's config.
        problem_type: `CLASSES` or `REGRESSION`; None: the checkpoint's.
        seed: for a head that the checkpoint does not have.
    """

    auto: str = "AutoModelForCausalLM"
    what: str = "a causal language model"
    has_own_head: bool = False
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    seed: int = 0

    @property
    def reads_images(self) -> bool:
        """Whether an image processor makes its input, and no tokenizer."""
        return self.auto == _OF_IMAGES

    def from_config(self, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """The model of a config, as transformers initializes it."""
        return getattr(transformers, self.auto).from_config(self.configured(config), **options)

    def from_pretrained(self, name: str, config: PretrainedConfig, **options: Any) -> Any:
        """The model of a checkpoint, as transformers loads it. A head of other labels is left out."""
        if self.has_own_head:
            options |= {"config": self.configured(config), "ignore_mismatched_sizes": True}
        return getattr(transformers, self.auto).from_pretrained(name, **options)

    def configured(self, config: PretrainedConfig) -> PretrainedConfig:
        """Put this head's labels into the config, and return it."""
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: number for number, name in config.id2label.items()}
            config.problem_type = self.problem_type
        return config

    def finds_head(self, config: PretrainedConfig) -> bool:
        """Whether a checkpoint of this config has a head of the same labels (ask before `configured`)."""
        stored = getattr(config, "id2label", None) or {}
        names = tuple(stored[number] for number in sorted(stored))
        is_headed = any("Classification" in name for name in config.architectures or ())
        return self.has_own_head and is_headed and self.labels in ((), names)

    def head_modules(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The modules that are trained whole, by name: all with parameters beside the model's base model."""
        if not self.has_own_head:
            return {}
        return {
            name: module
            for name, module in model.named_children()
            if name != model.base_model_prefix and next(module.parameters(), None) is not None
        }

    def belongs_to_head(self, name: str, model: PreTrainedModel) -> bool:
        """Whether a parameter of the model is one of its head's."""
        return name.partition(".")[0] in self.head_modules(model)

    def stored_names(self, names: Iterable[str], model: PreTrainedModel) -> set[str]:
        """The checkpoint's tensors of this model: without another head, such as a language model's."""
        if not self.has_own_head:
            return set(names)
        known, inside = model.state_dict().keys(), f"{model.base_model_prefix}."
        ignored = [_BUFFERS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        within = (name for name in names if name in known or name.startswith(inside))
        return {name for name in within if name in known or not any(re.search(one, name) for one in ignored)}

    def copied_as(self, architectures: Iterable[str] | None) -> ModelClass:
        """The class of a checkpoint's quantized copy: all tasks share that of a language model."""
        is_language_model = any(name.endswith(_LANGUAGE_MODELS) for name in architectures or ())
        if not self.has_own_head or is_language_model:
            return CAUSAL_LM
        return dataclasses.replace(self, labels=(), problem_type=None)

    @property
    def settings(self) -> Mapping[str, str]:
        """What a quantized copy depends on; empty for a causal language model."""
        return {} if self == CAUSAL_LM else {"auto": self.auto}

    def start_head(self, model: PreTrainedModel, is_stored: bool, device: torch.device) -> None:
        """Make the head fp32 on its device, drawn anew unless ``is_stored``. It takes its input in any dtype."""
        for module in self.head_modules(model).values():
            if not is_stored:
                module.to_empty(device="cpu")
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.seed)
                    for part in module.modules():
                        if callable(reset := getattr(part, "reset_parameters", None)):
                            reset()
            module.to(device=device, dtype=torch.float32)
            module.register_forward_pre_hook(_in_own_dtype)


def _in_own_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


CAUSAL_LM = ModelClass()


def classification_class(labels: Iterable[str] = (), is_regression: bool = False, seed: int = 0) -> ModelClass:
    """A model for classes of texts, or (with one label) for a number. Without labels those of its checkpoint."""
    labels = tuple(labels)
    problem = (REGRESSION if is_regression else CLASSES) if labels else None
    what = "a sequence classification model"
    return ModelClass(_OF_TEXTS, what, True, labels, problem, seed)


def image_class(labels: Iterable[str] = (), seed: int = 0) -> ModelClass:
    """A model for classes of images. Without labels those of its checkpoint."""
    labels = tuple(labels)
    return ModelClass(_OF_IMAGES, "an image classification model", True, labels, CLASSES if labels else None, seed)


def stored_class(architectures: Iterable[str] | None) -> ModelClass:
    """The class of a finished checkpoint, by the ``architectures`` of its config."""
    for name in architectures or ():
        if "SequenceClassification" in name:
            return classification_class()
        if "ImageClassification" in name:
            return image_class()
    return CAUSAL_LM
