"""The names of a checkpoint's tensors as the model has them: transformers renames some while it loads."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvera.utils.safetensors_io import TensorEntry

_STATE = ".quant_state.bitsandbytes__"


def as_named(entries: list[TensorEntry], model: PreTrainedModel) -> list[TensorEntry]:
    """The tensors of a checkpoint under the names that the model has for them, in the same order.

    Three things make them differ: transformers renames parts of old models (GPT-NeoX's head, ViT's attention), an old
    checkpoint calls the vectors of its norms gamma and beta, and one of the base model alone lacks a prefix such as
    ``bert.``. A tensor that transformers fuses with others, splits or turns keeps its name, and so do all of a
    checkpoint that is stored in 4 bits.

    Args:
        entries: all tensors of the checkpoint.
        model: the model without weights.
    """
    known = model.state_dict().keys()
    unknown = [entry for entry in entries if entry.name not in known]
    if not unknown or any(_STATE in entry.name for entry in entries):
        return entries
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    others = [one for one in transforms if not isinstance(one, WeightRenaming)]
    prefix, names = f"{model.base_model_prefix}.", {}
    for entry in unknown:
        name = entry.name
        for one in renamings:
            name, _ = one.rename_source_key(name)
        if any(one.rename_source_key(name)[1] is not None for one in others):
            continue
        for own in (name, prefix + name):
            if own in known:
                names[entry.name] = own
    found = [dataclasses.replace(entry, name=names.get(entry.name, entry.name)) for entry in entries]
    return found if len({entry.name for entry in found}) == len(found) else entries
