"""VeRA as a PEFT tuner. Importing it registers ``QVERA`` with PEFT."""

from qvera.adapters.config import QveraConfig
from qvera.adapters.layer import AdaptedForward, QveraLinear, hold_training_weights
from qvera.adapters.peft_compat import accelerate_peft, accelerated_peft, restore_peft
from qvera.adapters.projection import SharedProjection
from qvera.adapters.tuner import QveraModel, register

__all__ = [
    "AdaptedForward",
    "QveraConfig",
    "QveraLinear",
    "QveraModel",
    "SharedProjection",
    "accelerate_peft",
    "accelerated_peft",
    "hold_training_weights",
    "register",
    "restore_peft",
]

register()
