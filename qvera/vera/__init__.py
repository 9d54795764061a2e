"""VeRA as a PEFT tuner: config, layer, tuner, and the mathematics they share."""

from .config import QveraConfig
from .layer import QveraLinear
from .lowrank import LowRankPath
from .projection import SharedProjection
from .stock import accelerate_peft, accelerated_peft, restore_peft
from .tuner import QveraModel, register

__all__ = [
    "LowRankPath",
    "QveraConfig",
    "QveraLinear",
    "QveraModel",
    "SharedProjection",
    "accelerate_peft",
    "accelerated_peft",
    "register",
    "restore_peft",
]
