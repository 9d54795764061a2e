"""The client of `qvera chat` and `qvera generate` for servers of OpenAI's API. Standard library only."""

import dataclasses
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Self

from qvera.serve.api.access import is_loopback
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError, RunFailed, did_you_mean
from qvera.utils.formatting import first_of

KEY_VARIABLE = "QVERA_API_KEY"
"""The environment variable with the server's key. Other users of the machine could read it on a command line."""
_BUSY = (429, 503)
_TRIES = 20
_SECONDS = 600


class _BeyondContext(InputError):
    """The prompt and the tokens asked for are more than the model's context."""


def server_url(path: Path) -> str | None:
    """The URL in an argument that may be a run instead (None). `Path` makes one slash of a URL's two."""
    found = re.fullmatch(r"(https?):/+(?!huggingface\.co/)(.+?)(/v1(/chat/completions)?)?", str(path))
    return None if found is None else f"{found[1]}://{found[2]}"


@dataclasses.dataclass(frozen=True)
class ServerClient:
    """A server, and the key to it."""

    url: str
    key: str | None

    @classmethod
    def at(cls, url: str) -> Self:
        """A client with the key of `KEY_VARIABLE`."""
        return cls(url, os.environ.get(KEY_VARIABLE))

    def pick_models(self, names: Mapping[str | None, str], base: bool) -> dict[str | None, str]:
        """Name → the server's model: the same, the base, or for None the server's only adapter.

        ``names``: each with where it stands. Raises InputError, which says where, if the server has no such model, or
        has several and none is named.
        """
        models = self._models()
        adapters = [model for model, parent in models.items() if parent is not None]
        bases = [model for model, parent in models.items() if parent is None]
        if base:
            if not bases:
                raise InputError(f"--base: this key may not use the base of {self.url}.")
            return dict.fromkeys(names, bases[0])
        for name, place in names.items():
            if name is None and len(adapters) > 1:
                some = _some_of(adapters)
                raise InputError(
                    f"{place}: names no adapter, and {self.url} has several. Name one with --adapter NAME: {some}. The "
                    "rows of a file may name theirs in a column called adapter."
                )
            if name is not None and name not in models and "*" not in name:  # a blend is not listed
                raise self._unknown(place, name, models)
        return {name: (adapters or bases)[0] if name is None else name for name in names}

    def pick_judge(self, name: str | None) -> str:
        """The model that judges: this one, or the server's only one. Raises InputError as `pick_models`."""
        models = self._models()
        if name is not None and name not in models:
            raise self._unknown("--judge-model", name, models)
        if name is None and len(models) != 1:
            raise InputError(
                f"{self.url}: has {len(models):,} models. Name one with --judge-model: {_some_of(models)}."
            )
        return name or next(iter(models))

    def _unknown(self, place: str, name: str, models: Collection[str]) -> InputError:
        hint = f"{did_you_mean(name, models)} There are {_some_of(models)}."
        return InputError(f"{place}: {self.url} has no model {shown_name(name)}{hint}")

    def _models(self) -> dict[str, str | None]:
        """Return each model with its base, or with None where it is a base itself. InputError: there is none."""
        try:
            with self._call("/v1/models") as answer:
                if not (found := {model["id"]: model.get("parent") for model in json.load(answer)["data"]}):
                    raise InputError(f"{self.url}: has no model that this key may use.")
                return found
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunFailed(f"{self.url}: /v1/models is no list of models. Is this a server of OpenAI's API?") from None
        except (OSError, HTTPException) as error:
            raise self._cut_off(error) from None

    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        on_text: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> str:
        """The answer to a conversation; ``on_text`` gets each piece as it comes.

        Where ``max_tokens`` is more than the model's context has room for, the context ends the answer.

        Raises:
            InputError: the server refuses the request or the key.
            RunFailed: it can't be reached, stays busy, or fails.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **settings}
        text, path = "", "/v1/chat/completions"
        try:
            called = self._call(path, body)
        except _BeyondContext:
            called = self._call(path, {key: value for key, value in body.items() if key != "max_tokens"})
        with called as answer:
            for event in self._events(answer):
                if "error" in event:
                    raise RunFailed(f"{self.url}: {event['error']['message']}")
                for choice in event.get("choices", []):
                    if piece := choice.get("delta", {}).get("content"):
                        text += piece
                        if on_text is not None:
                            on_text(piece)
        return text

    def _events(self, answer: HTTPResponse) -> Iterator[dict[str, Any]]:
        try:
            for line in answer:
                data = line.decode("utf-8").removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if line.startswith(b"data:"):
                    yield json.loads(data)
        except (OSError, HTTPException, ValueError) as error:
            raise self._cut_off(error) from None
        raise RunFailed(f"{self.url}: the connection ended in the middle of an answer.")

    def _cut_off(self, error: Exception) -> RunFailed:
        return RunFailed(f"{self.url}: the connection broke in the middle of an answer: {error}")

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> HTTPResponse:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        # the environment's proxy is not used for this machine's own addresses
        is_own = is_loopback(urllib.parse.urlsplit(self.url).hostname or "")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if is_own else None))
        tries_left = _TRIES
        while True:
            request = urllib.request.Request(self.url + path, data, headers)
            try:
                return opener.open(request, timeout=_SECONDS)  # type: ignore[no-any-return]
            except urllib.error.HTTPError as error:
                tries_left -= 1
                if error.code not in _BUSY or not tries_left:
                    raise self._problem(error) from None
                time.sleep(_wait_seconds(error))
            except (OSError, HTTPException, ValueError) as error:
                reason = getattr(error, "reason", error)
                is_tls = isinstance(reason, ssl.SSLError)
                question = "Is it a server of http://?" if is_tls else "Is `qvera serve` running there?"
                raise RunFailed(f"{self.url}: can't be reached: {reason}. {question}") from None

    def _problem(self, error: urllib.error.HTTPError) -> InputError | RunFailed:
        code = None
        try:
            said = json.load(error)["error"]
            message, code = said["message"], said.get("code")
        except (ValueError, KeyError, TypeError, OSError, HTTPException):
            message = f"answered {error.code} {error.reason}"
        if error.code in (401, 403) and self.key is None:
            message += f" Set {KEY_VARIABLE} to a key of this server."
        kind = RunFailed if error.code >= 500 or error.code in _BUSY else InputError
        kind = _BeyondContext if code == "context_length_exceeded" else kind
        return kind(f"{self.url}: {message}")


def _some_of(names: Collection[str]) -> str:
    return first_of([*map(shown_name, names)], 8)


def _wait_seconds(error: urllib.error.HTTPError) -> float:
    try:
        return min(max(float(error.headers.get("Retry-After", 1)), 0.1), 30)
    except ValueError:
        return 1
