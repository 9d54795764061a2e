"""Grammars that an answer must follow, compiled by llguidance. Imports no torch.

A grammar says at each step which tokens may come next. It works on the bytes of a vocabulary's tokens, so any tokenizer
will do. Nothing is kept outside of the objects here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qvera.utils.errors import InputError, first_line, require_packages

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from qvera.serve.text import TokenTexts

_WHITE_SPACE = r"[ \n\r\t]{1,16}"
"""Between the parts of JSON. Without an end, a small model may write nothing else until its tokens are used up."""
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keys of a JSON schema whose values hold a schema for each name."""
_VALUES = ("enum", "const", "default", "examples")
"""Keys whose values are no schemas."""
_IDLE: dict[str, tuple[object, ...]] = {"uniqueItems": (False,), "propertyNames": ({}, True, {"type": "string"})}
"""Keys that llguidance refuses whatever they say → values by which they say nothing."""
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Those that llguidance keeps to. It refuses others, which in JSON Schema are annotations."""
_MOST_PARTS = 200  # of a schema that are tried to find the one at fault


class Grammar:
    """A grammar, and the place in it that an answer has come to. For one thread."""

    def __init__(self, matcher: Any, tokens: int, text: str) -> None:
        """``matcher``: an ``LLMatcher`` over so many ``tokens``. ``text``: what it was compiled from."""
        self._matcher, self._tokens, self.text = matcher, tokens, text

    def copy(self) -> Grammar:
        """Return the grammar at the same place, from which another answer may go on."""
        return Grammar(self._matcher.deep_copy(), self._tokens, self.text)

    def allowed(self, width: int) -> np.ndarray:
        """Return a mask of the tokens that may come next, bool [width]. Where none may, `error` may say why."""
        found = np.zeros(width, dtype=bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if not self._matcher.is_error():  # else an end would be allowed
            known = np.unpackbits(bits, bitorder="little")[: min(self._tokens, width)]
            found[: len(known)] = known
        return found

    def take(self, token: int) -> None:
        """Go on by a token that may come next."""
        self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether the answer has come to an end that nothing can follow."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def error(self) -> str:
        """Why the grammar can't be compiled or followed; empty if it can."""
        return first_line(self._matcher.get_error()) if self._matcher.is_error() else ""


class Grammars:
    """Compiles grammars for one vocabulary. For any thread."""

    def __init__(self, texts: TokenTexts, stop_tokens: frozenset[int]) -> None:
        self._texts, self._stop_tokens = texts, stop_tokens

    def of_schema(self, schema: dict[str, Any], name: str) -> Grammar:
        """Return the grammar of JSON that follows a schema.

        Raises InputError that names the part of ``name`` at fault, or says that llguidance is missing.
        """
        grammar = self._of_schema(schema)
        if not (error := grammar.error):
            return grammar
        # go down to the smallest part that fails with the same error by itself; parts may refer to the definitions
        shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        place, children, tried = name, _parts(schema), 0
        while (child := next(children, None)) is not None and tried < _MOST_PARTS:
            tried += 1
            if self._of_schema({**shared, **child[1]}).error == error:
                place, children = f"{place}.{child[0]}", _parts(child[1])
        why = error.rpartition("failed to compile JSON schema: ")[2].rstrip(".:")
        raise InputError(f"{place}: this JSON schema can't be kept to: {why}.")

    def of_calls(
        self,
        parameters: dict[str, dict[str, Any]],
        literals: tuple[str, str, str],
        single: bool,
        answer: Grammar | None = None,
    ) -> Grammar:
        """Return the grammar of calls of tools, or of an ``answer`` instead, if that is given.

        Raises InputError as `of_schema`.

        Args:
            parameters: a JSON schema for each tool.
            literals: the texts before a name, between it and the arguments, and behind them.
            single: one call is allowed; else there may be several, one to a line.
        """
        (before, between, behind), lines = literals, list[str]()
        for number, (name, schema) in enumerate(parameters.items()):
            self.of_schema(schema, f"the parameters of the tool {name}")  # for its error, which names the tool
            opening, closing = (json.dumps(text, ensure_ascii=False) for text in (before + name + between, behind))
            lines += [f"c{number}: {opening} a{number} {closing}", f"a{number}: {_json(schema)}"]
        lines.append(f"call: {' | '.join(f'c{number}' for number in range(len(parameters)))}")
        calls = "call" if single else r'call ("\n" call)*'
        if answer is not None:
            lines, calls = [*lines, f"answer: {answer.text}"], f"{calls} | answer"
        grammar = self._compiled("\n".join([f"start: {calls}", *lines]))
        if not grammar.error:
            return grammar
        raise InputError(f"tools: a grammar of all of them can't be made: {grammar.error}")

    def _of_schema(self, schema: dict[str, Any]) -> Grammar:
        return self._compiled(_json(schema), "start: ")

    def _compiled(self, text: str, prefix: str = "") -> Grammar:
        tokenizer, count = self._vocabulary
        compiled = Grammar(self._llguidance.LLMatcher(tokenizer, prefix + text, log_level=0), count, text)
        compiled.allowed(count)  # the first time takes longest, and copies know the result
        return compiled

    @functools.cached_property
    def _llguidance(self) -> Any:
        require_packages("serve", "llguidance", what="a JSON schema, or a call of a tool that must be made, ")
        import llguidance

        return llguidance

    @functools.cached_property
    def _vocabulary(self) -> tuple[LLTokenizer, int]:
        """The vocabulary as llguidance knows it, and its size. A second of work for 150,000 tokens."""
        wrapped = self._llguidance.TokenizerWrapper(_Vocabulary(self._texts))
        count = self._texts.size
        ends = sorted(self._stop_tokens) or [count]
        return self._llguidance.LLTokenizer(wrapped, n_vocab=count + 1, eos_token=ends), count


def _json(schema: dict[str, Any]) -> str:
    """Return a schema in llguidance's grammar, without keys that it refuses and that forbid no answer."""
    copied = json.loads(json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITE_SPACE}}))
    parts = [copied]
    while parts:  # no recursion: a schema may be nested as deeply as Python's stack
        part = parts.pop()
        parts += [child for _, child in _parts(part)]
        idle = [key for key, values in _IDLE.items() if part.get(key) in values]
        for key in idle + ["format"] * (part.get("format", _FORMATS[0]) not in _FORMATS):
            del part[key]
    return f"%json {json.dumps(copied)}"


class _Vocabulary:
    """A vocabulary as `llguidance.TokenizerWrapper` asks for it.

    Its last token is none of the model's. It stands for the end where the model has no stop tokens.
    """

    bos_token_id = None

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, count = texts, texts.size
        self.tokens = [*map(texts.bytes_of, range(count)), b"<end>"]
        self.special_token_ids = [*sorted(texts.special), count]
        self.eos_token_id = count

    def __call__(self, text: str) -> list[int]:
        return self._texts.encode(text)


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas directly within a schema, each with its keys there, joined by dots."""
    for key, value in schema.items():
        if key in _VALUES:
            continue
        named = value.items() if key in _OF_NAMES and isinstance(value, dict) else ()
        listed = enumerate(value) if isinstance(value, list) else ()
        for name, part in [*named, *listed] or [("", value)]:
            if isinstance(part, dict):
                yield f"{key}.{name}".rstrip("."), part
