"""Whether the hub answers, and what to say of it in an error."""

import logging
import math
import os
import ssl
import threading
import time
import urllib.error
import urllib.request

from qvera.utils.errors import InputError

_logger = logging.getLogger(__name__)
_ANSWER_SECONDS = 6
_AGAIN_SECONDS = 60
_asked_at: dict[str, float] = {}
"""Hub → when it was last asked."""
_silent: set[str] = set()
"""Hubs that gave no answer, for which the client was told to be offline."""


def leave_silent_hub(name: str) -> None:
    """Tell the hub's client to be offline where ``name`` is an id and the hub gives no answer within `_ANSWER_SECONDS`.

    The client itself tries six times, over half a minute, for each file. It may go online again once the hub answers:
    a process asks no more than once a minute.
    """
    from huggingface_hub import constants  # its functions look there at each call

    address, now = constants.ENDPOINT, time.monotonic()
    if name.startswith(("/", ".", "~")) or os.path.exists(name) or os.path.exists(os.path.dirname(name)):
        return
    if (constants.HF_HUB_OFFLINE and not _silent) or now - _asked_at.get(address, -math.inf) < _AGAIN_SECONDS:
        return
    if not address.startswith(("http://", "https://")):
        raise InputError(f"HF_ENDPOINT: {address!r} is no address of a hub; expected one that begins with https://.")
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_ANSWER_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code in (502, 503, 504):  # of what stands before the hub
                return
        except OSError as error:
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # the client may know that certificate
                return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a name may take longer to look up than any timeout
    asking.start()
    asking.join(_ANSWER_SECONDS)
    _asked_at[address] = now
    if not answered.is_set():
        if address not in _silent:
            _logger.warning("%s does not answer, so only what was fetched before is used.", address)
        _silent.add(address)
        constants.HF_HUB_OFFLINE = True
    elif _silent:
        _silent.clear()
        constants.HF_HUB_OFFLINE = False


def hub_hint() -> str:
    """Return the last sentence for an error about something that the hub should have given."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, or the hub did not answer: look at the network and HF_ENDPOINT."
    return "Look at the network, HF_ENDPOINT and HF_HUB_OFFLINE."
