"""qvera: fine-tune a Llama in 4-bit with VeRA. Importing it teaches PEFT the adapter type ``QVERA``."""

# isort: off
from qvera.models import bitsandbytes_import as _bitsandbytes  # noqa: F401  # first, because PEFT imports bitsandbytes too
from qvera.adapters import QveraConfig, QveraModel, accelerate_peft, register, restore_peft
# isort: on

__version__ = "0.1.0"
__all__ = ["QveraConfig", "QveraModel", "__version__", "accelerate_peft", "restore_peft"]

register()
