"""Bodies that a client can get wrong, by accident or on purpose."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/load_adapter", "/v1/unload_adapter", "/v1/load_lora_adapter")
STRANGE: list[Any] = [
    None, True, False, 0, -1, 10**6, 10**30, -(10**30), 1e308, float("nan"), float("inf"), 0.5, "", "x", "\x00", "\ud800",
    "é" * 5000, "../../etc/passwd", "a*0.5+b*0.5", "a*1e999", [], [[]], [None], [10**12], [-1], ["x"] * 100, [[1]] * 100, {}, {"a": {}},
]  # fmt: skip
OTHER_KEYS = ("n", "best_of", "logprobs", "top_p", "logit_bias", "tools", "stream_options", "echo", "name", "lora_path")
KINDS = ("strange value",) * 3 + (
    "other keys", "noise", "cut", "flipped", "not utf-8", "deep", "huge number", "twice", "no object",
)  # fmt: skip


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
    content = _body(chooser.choice(KINDS), chooser, good)
    return (
        path,
        {"Content-Type": chooser.choice(["application/json"] * 8 + ["text/plain", "multipart/form-data", ""])},
        content,
    )


def _dumped(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _body(kind: str, chooser: random.Random, good: dict[str, Any]) -> bytes:
    text, choose = bytearray(_dumped(good)), chooser.choice
    if kind == "strange value":
        _put_strange(chooser, good)
    elif kind == "other keys" and chooser.random() < 0.7:
        good[choose([*OTHER_KEYS, "x" * 300])] = choose(STRANGE)
    elif kind == "other keys":
        del good[choose(list(good))]
    elif kind == "no object":
        return _dumped(choose(STRANGE))
    elif kind == "noise":
        return chooser.randbytes(choose([0, 1, 100, 10_000]))
    elif kind == "cut":
        return bytes(text[: chooser.randrange(len(text))])
    elif kind == "flipped":
        for _ in range(chooser.randint(1, 8)):
            text[chooser.randrange(len(text))] = chooser.randrange(256)
        return bytes(text)
    elif kind == "not utf-8":
        return bytes(text).replace(b'"', b'"' + choose([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88"]), 3)
    elif kind == "deep":
        depth = choose([100, 5_000, 400_000])
        return choose([b"[" * depth, b'{"prompt":' * min(depth, 50_000), b"[" * depth + b"]" * depth])
    elif kind == "huge number":
        number = choose([b"9" * 5000, b"1e999", b"-1e999", b"1" + b"0" * 100, b"0." + b"1" * 5000])
        key = choose(["max_tokens", "temperature", "seed", "n", "top_p", "prompt"])
        return b'{"%s": %s, ' % (key.encode(), number) + _dumped({k: v for k, v in good.items() if k != key})[1:]
    else:  # two documents, or one key twice
        return bytes(text + text if chooser.random() < 0.5 else text[:-1] + b', "model": 3}')
    return _dumped(good)


def _put_strange(chooser: random.Random, good: dict[str, Any]) -> None:
    """One value, perhaps deep inside, is another one."""
    holder: Any = good
    key: Any = chooser.choice(list(good))
    while isinstance(holder[key], (dict, list)) and holder[key] and chooser.random() < 0.6:
        holder = holder[key]
        key = chooser.choice(list(holder)) if isinstance(holder, dict) else chooser.randrange(len(holder))
    holder[key] = chooser.choice(STRANGE)
