"""Import bitsandbytes without the advice on an optional package that it logs on some CPUs."""

import logging

_logger = logging.getLogger("bitsandbytes")
_level = _logger.level
_logger.setLevel(logging.ERROR)
import bitsandbytes  # noqa: E402  # below the log level on purpose

_logger.setLevel(_level)
__all__ = ["bitsandbytes"]
