"""Compile the decoder layers of a model with torch.compile.

Each layer is compiled for itself: a model's layers are alike, so the first one's code serves all of them, and gradient
checkpointing stays around a layer. Lengths are symbolic, so a batch of another length needs no new code. Measured on
CPUs only.
"""

from torch import nn

from qvera.distributed.zero_params import decoder_layers
from qvera.models import stream
from qvera.models.loader import causal_model
from qvera.utils.errors import InputError


def compile_layers(model: nn.Module, backend: str = "inductor") -> int:
    """Let the decoder layers of this model run compiled from their next call on. Returns how many there are.

    Raises:
        InputError: the layers are streamed, and compiled code would read weights that are not there yet.
    """
    inner = causal_model(model)
    if stream.facts_of(inner) is not None:
        raise InputError(
            "training.torch_compile: the layers of this base are streamed to the device, which compiled code does not "
            "wait for. Leave torch_compile out, or set model.stream: false."
        )
    layers = decoder_layers(inner.get_decoder())
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    return len(layers)
