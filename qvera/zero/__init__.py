"""DeepSpeed ZeRO under a run. DeepSpeed itself is imported only where a recipe asks for it."""

from .config import STAGES, ZeroConfig, check_optimizer, read_config

__all__ = ["STAGES", "ZeroConfig", "check_optimizer", "read_config"]
