"""What a recipe alone shows to be wrong, looked at before torch is imported: a failing start takes a second or two."""

from __future__ import annotations

import logging
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from qvera.config.schema import Recipe
from qvera.data.source import local_files, source_files, source_paths
from qvera.training.run_dir import check_run_dir
from qvera.utils.errors import InputError
from qvera.utils.files import resolve_path

_logger = logging.getLogger(__name__)
_HUB_SECONDS = 6


def check_early(recipe: Recipe, run_dir: Path | None = None, resume: bool = False) -> None:
    """Look at the run directory (if given), packages, the base's directory and the files of rows.

    Where the hub is asked for something and does not answer, its client goes offline: it would try again for a minute.
    Raises InputError as what reads them later does.
    """
    if run_dir is not None:
        check_run_dir(run_dir, recipe, resume)
    # transformers takes kernels of the hub where the package `kernels` is there
    if recipe.model.attn_implementation == "flash_attention_2" and not any(map(find_spec, ("flash_attn", "kernels"))):
        raise InputError(
            "model.attn_implementation: flash_attention_2 needs the package flash-attn, which is not installed here. "
            "Install it, or remove the key: auto takes the fastest attention that is there."
        )
    for path, _ in source_paths(recipe.data):
        source_files(recipe.data, path)
    for part in recipe.data.mixture:
        local_files(part.path)
    leave_silent_hub(recipe.model.path, *(path for path, _ in source_paths(recipe.data)))

    from qvera.models.hub import require_model_files  # by now its client may have been told to be offline

    require_model_files(resolve_path(recipe.model.path))


def leave_silent_hub(*names: str) -> None:
    """Set HF_HUB_OFFLINE where one of ``names`` is an id and the hub gives no answer within `_HUB_SECONDS`."""
    is_asked = not all(os.path.exists(name) or name.startswith(("/", ".", "~")) for name in names)
    if not is_asked or "huggingface_hub" in sys.modules or "HF_HUB_OFFLINE" in os.environ:
        return
    address, answered = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_HUB_SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except OSError as error:
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # the client may know that certificate
                return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a name may take longer to look up than any timeout
    asking.start()
    asking.join(_HUB_SECONDS)
    if not answered.is_set():
        _logger.warning("%s does not answer, so only what was fetched before is used.", address)
        os.environ["HF_HUB_OFFLINE"] = "1"
