"""VeRA as a PEFT tuner: config, layer, tuner, and the mathematics they share."""

from .config import QveraConfig
from .layer import QveraLinear
from .projection import SharedProjection
from .tuner import QveraModel, register

__all__ = ["QveraConfig", "QveraLinear", "QveraModel", "SharedProjection", "register"]
