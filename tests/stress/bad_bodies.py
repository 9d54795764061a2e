"""Bodies that a client can get wrong, by accident or on purpose."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/load_adapter", "/v1/unload_adapter", "/v1/load_lora_adapter")
STRANGE: list[Any] = [
    None, True, False, 0, -1, 10**6, 10**30, -(10**30), 1e308, float("nan"), float("inf"), 0.5, "", "x", "\x00", "\ud800",
    "é" * 5000, "../../etc/passwd", "a*0.5+b*0.5", "a*1e999", [], [[]], [None], [10**12], [-1], ["x"] * 100, [[1]] * 100, {}, {"a": {}},
]  # fmt: skip


def bad_call(chooser: random.Random, good: dict[str, Any]) -> tuple[str, dict[str, str], bytes]:
    """Path, headers and body of a call that is wrong in one of many ways; few are right after all.

    Args:
        good: a right body of /v1/completions.
    """
    path = chooser.choices(PATHS, weights=(6, 6, 1, 1, 1))[0]
    good = copy.deepcopy(good)
    if "chat" in path:
        good["messages"] = [{"role": "user", "content": "say"}]
        del good["prompt"]
    kinds: list[Callable[[random.Random, dict[str, Any]], bytes]] = [
        _strange_value, _strange_value, _strange_value, _other_keys, _noise, _cut, _flipped, _not_utf8, _deep, _huge_number,
        _twice, _no_object,
    ]  # fmt: skip
    content = chooser.choice(kinds)(chooser, good)
    headers = {"Content-Type": chooser.choice(["application/json"] * 8 + ["text/plain", "multipart/form-data", ""])}
    return path, headers, content


def _dumped(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _strange_value(chooser: random.Random, good: dict[str, Any]) -> bytes:
    """One value, perhaps deep inside, is another one."""
    holder: Any = good
    key: Any = chooser.choice(list(good))
    while isinstance(holder[key], (dict, list)) and holder[key] and chooser.random() < 0.6:
        holder = holder[key]
        key = chooser.choice(list(holder)) if isinstance(holder, dict) else chooser.randrange(len(holder))
    holder[key] = chooser.choice(STRANGE)
    return _dumped(good)


def _other_keys(chooser: random.Random, good: dict[str, Any]) -> bytes:
    """A key more, or one less."""
    keys = ["n", "best_of", "logprobs", "top_p", "logit_bias", "tools", "stream_options", "echo", "name", "lora_path"]
    keys.append("x" * 300)
    if chooser.random() < 0.7:
        good[chooser.choice(keys)] = chooser.choice(STRANGE)
    else:
        del good[chooser.choice(list(good))]
    return _dumped(good)


def _noise(chooser: random.Random, good: dict[str, Any]) -> bytes:
    return chooser.randbytes(chooser.choice([0, 1, 100, 10_000]))


def _cut(chooser: random.Random, good: dict[str, Any]) -> bytes:
    text = _dumped(good)
    return text[: chooser.randrange(len(text))]


def _flipped(chooser: random.Random, good: dict[str, Any]) -> bytes:
    text = bytearray(_dumped(good))
    for _ in range(chooser.randint(1, 8)):
        text[chooser.randrange(len(text))] = chooser.randrange(256)
    return bytes(text)


def _not_utf8(chooser: random.Random, good: dict[str, Any]) -> bytes:
    return _dumped(good).replace(b'"', b'"' + chooser.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88"]), 3)


def _deep(chooser: random.Random, good: dict[str, Any]) -> bytes:
    depth = chooser.choice([100, 5_000, 400_000])
    return chooser.choice([b"[" * depth, b'{"prompt":' * min(depth, 50_000), b"[" * depth + b"]" * depth])


def _huge_number(chooser: random.Random, good: dict[str, Any]) -> bytes:
    number = chooser.choice([b"9" * 5000, b"1e999", b"-1e999", b"1" + b"0" * 100, b"0." + b"1" * 5000])
    key = chooser.choice(["max_tokens", "temperature", "seed", "n", "top_p", "prompt"])
    return b'{"%s": %s, ' % (key.encode(), number) + _dumped({k: v for k, v in good.items() if k != key})[1:]


def _twice(chooser: random.Random, good: dict[str, Any]) -> bytes:
    """Two documents, or one key twice."""
    text = _dumped(good)
    return text + text if chooser.random() < 0.5 else text[:-1] + b', "model": 3}'


def _no_object(chooser: random.Random, good: dict[str, Any]) -> bytes:
    return _dumped(chooser.choice(STRANGE))
