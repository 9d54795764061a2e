"""What stock PEFT makes of a LoRA when it opens its file: which layers it adapts, and which tensors it drops."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers import PreTrainedModel

from qvera.adapters.config import PREFIX
from qvera.models.structure import share_tied_modules
from qvera.utils.errors import InputError, first_line
from qvera.utils.formatting import first_of


class PeftPlace(NamedTuple):
    """Where PEFT has the LoRA of a layer's experts."""

    module: str
    """Each of a module's parameters has its LoRA in a wrapper around the wrapper of the one before."""
    turned: bool
    """Whether PEFT takes their matrices [in, out] for [out, in], so that A and B change places."""


Places = Mapping[str, PeftPlace]


def other_places(names: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Further places of linears in a module that stands in several (`share_tied_modules`) → their names."""
    shared = share_tied_modules(model).items()
    return {
        place + name.removeprefix(source): name
        for name in names
        for place, source in shared
        if name.startswith(f"{source}.")
    }


def require_kept(config: LoraConfig, layers: Mapping[str, bool | None], model: PreTrainedModel) -> Places:
    """Put a LoRA on a model like a base, as PEFT does when it opens a file. Returns where PEFT has that of experts.

    In models with experts PEFT takes names such as ``down_proj`` for those of experts, and drops the tensors of dense
    MLPs with these names, or of shared experts (Laguna).

    Args:
        layers: what is adapted: the names of linears → None, of experts → whether their matrices are [in, out].
        model: needs no weights.

    InputError: it refuses the targets, or would adapt other layers.
    """
    weights, kept, places = dict(model.named_parameters()), set(), {}
    if flat := sorted(name for name, turned in layers.items() if turned is not None and weights[name].dim() == 2):
        raise InputError(
            f"PEFT takes {first_of(flat)} for one matrix, where the adapter changes each expert. Export with --to "
            "merged."
        )
    try:
        with torch.device("meta"):  # not the base itself, where modules stand in several places
            adapted = get_peft_model(type(model)(model.config), config)
    except ValueError as error:
        raise InputError(
            f"PEFT refuses a LoRA of this adapter's targets: {first_line(error)} Export with --to merged, or train "
            "with adapter.targets that leave these out."
        ) from None
    own = get_peft_model_state_dict(adapted)
    missing = set_peft_model_state_dict(adapted, own).missing_keys  # PEFT renames tensors when it reads them
    lost = {name.partition(".lora_")[0].removeprefix(PREFIX) for name in missing if ".lora_" in name}
    for path, module in adapted.get_base_model().named_modules():
        name = path
        if isinstance(module, ParamWrapper):
            name = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
            takes_turned, turned = getattr(module.get_base_layer(), "is_transposed", False), layers.get(name)
            places[name] = PeftPlace(path, turned is not None and turned != takes_turned)
        if isinstance(module, LoraLayer) and path not in lost:
            kept.add(name)
    if other := sorted(layers.keys() - kept) or sorted(kept - layers.keys()):
        raise InputError(
            f"PEFT would not adapt {first_of(other)} of this model as the adapter does: it takes the name for that of "
            "experts, and the export would lose it. Export with --to merged, or train with adapter.targets that name "
            "attention only."
        )
    return places
