"""What the hub's client is told before it is imported, and what to say of it in an error. Imports no client."""

import logging
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request

from qvera.utils.errors import InputError

_logger = logging.getLogger(__name__)
_ANSWER_SECONDS = 6


def leave_silent_hub(*names: str) -> None:
    """Set HF_HUB_OFFLINE where one of ``names`` is an id and the hub gives no answer within `_ANSWER_SECONDS`."""

    def is_path(name: str) -> bool:
        return name.startswith(("/", ".", "~")) or os.path.exists(name) or os.path.exists(os.path.dirname(name))

    if all(map(is_path, names)) or "huggingface_hub" in sys.modules or "HF_HUB_OFFLINE" in os.environ:
        return
    address, answered = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), threading.Event()
    if not address.startswith(("http://", "https://")):
        raise InputError(f"HF_ENDPOINT: {address!r} is no address of a hub; expected one that begins with https://.")

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_ANSWER_SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except OSError as error:
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # the client may know that certificate
                return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a name may take longer to look up than any timeout
    asking.start()
    asking.join(_ANSWER_SECONDS)
    if not answered.is_set():
        _logger.warning("%s does not answer, so only what was fetched before is used.", address)
        os.environ["HF_HUB_OFFLINE"] = "1"


def hub_hint() -> str:
    """Return the last sentence for an error about something that the hub should have given."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set, or the hub did not answer at the start: look at the network and HF_ENDPOINT."
    return "Look at the network, HF_ENDPOINT and HF_HUB_OFFLINE."
