"""qvera: fine-tune a Llama in 4-bit with VeRA. Importing it teaches PEFT the adapter type ``QVERA``."""

from . import _bitsandbytes as _bitsandbytes  # first, because PEFT imports bitsandbytes too
from .vera import QveraConfig, QveraModel, accelerate_peft, register, restore_peft

__version__ = "0.1.0"
__all__ = ["QveraConfig", "QveraModel", "__version__", "accelerate_peft", "restore_peft"]

register()
