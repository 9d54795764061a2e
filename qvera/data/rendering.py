"""Messages → the text that a chat template makes of them for one tokenizer, and that tokenizer's markers in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvera.data.formats import Turn
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TemplateError(Exception):
    """The template itself refused the conversation."""


@dataclass(slots=True)
class Renderer:
    """A Jinja template bound to a tokenizer.

    Attributes:
        name: ``tokenizer`` or a named template; `resolve_template` takes it back.
        jinja: its source, for ``tokenizer.chat_template`` beside an adapter.
        tokenizer: the tokenizer that it is for.
        reads_context: it has a place of its own for Alpaca's ``input``.
        special: finds the tokenizer's special tokens in a text.
    """

    name: str
    jinja: str
    tokenizer: PreTrainedTokenizerBase
    reads_context: bool = False
    special: re.Pattern[str] = field(init=False, repr=False)
    _added: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        added = list(self.tokenizer.added_tokens_decoder.values())
        named = list(self.tokenizer.all_special_tokens)
        self.special = _any_of([token.content for token in added if token.special] + named)
        self._added = _any_of([token.content for token in added] + named)

    def messages(self, turns: list[Turn]) -> list[dict[str, Any]]:
        """Turns as ``apply_chat_template`` takes them."""
        out = []
        for turn in turns:
            message = {"role": turn.role, "content": turn.content, **turn.extra}
            if turn.context is not None:
                if self.reads_context:
                    message["context"] = turn.context
                else:
                    message["content"] = f"{turn.content}\n\n{turn.context}"
            out.append(message)
        return out

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, prompt: bool = False
    ) -> str:
        """The text of ``messages``.

        Args:
            messages: role and content.
            tools: JSON schemas that the model may call.
            prompt: end with what opens an assistant turn.

        Raises:
            InputError: the template refuses these messages (a role that it does not know, an order it does not take).
        """
        try:
            return self.attempt(messages, tools, prompt)
        except TemplateError as error:
            raise InputError(f"The chat template ({self.name}) refuses the messages: {error}.") from None

    def attempt(self, messages: list[dict[str, Any]], tools: Any = None, prompt: bool = False) -> str:
        """`render`, for those who know what to do where the template refuses.

        Raises:
            TemplateError: the template refuses these messages; it says why, and nothing else.
        """
        import jinja2

        # Named templates are given eos and bos as text even where a tokenizer has none, so that they render at all.
        blanks = {k: "" for k in ("bos_token", "eos_token") if getattr(self.tokenizer, k, None) is None}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.jinja, tokenize=False, add_generation_prompt=prompt, **blanks
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateError(" ".join(str(error).split()).rstrip(".") or type(error).__name__) from None

    def has_special_token(self, text: str) -> bool:
        """Whether a row's text contains a special token's spelling, which the tokenizer will read as that token."""
        return self.special.search(text) is not None

    def marker_end(self, text: str, start: int, stop: int, last: bool = False) -> int | None:
        """Where the end-of-turn marker ends that template text [start, stop) holds: its first special token."""
        # Fine-tuned models exist whose <|im_end|> was added as an ordinary token, hence the second pattern. It only
        # comes second, since <tool_call> and <think> are ordinary added tokens that end nothing.
        for pattern in (self.special, self._added):
            found = list(pattern.finditer(text, start, stop))
            if found:
                return found[-1 if last else 0].end()
        return None


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    longest_first = sorted({token for token in tokens if token.strip()}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
