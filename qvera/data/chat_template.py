"""Conversations → the text a model reads, and which characters of it are answers."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qvera.data.conversations import REASONING, Conversation, Turn
from qvera.data.loss_mask import AnswerSpan, Layouts, Message, TemplateError, Tools, answer_spans
from qvera.data.row_format import UNRENDERED
from qvera.utils.errors import InputError, did_you_mean, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer"
"""The name of "the chat template that came with the tokenizer"."""
NAMED_TEMPLATES = {
    file.stem: file.read_text(encoding="utf-8")
    for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
"""The chat templates that a recipe can name, for models whose tokenizer brings none (or the wrong one)."""
_MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""What the tokenizer must have as single tokens; without them the model could not learn to stop."""
_DAY = {
    "%d": "26", "%e": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday",
    "%a": "Fri", "%H": "00", "%M": "00", "%S": "00",
}  # fmt: skip
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DAY.items())
    + " }}{%- endmacro %}"
)
"""Gives a template that asks for today's date the day that Llama 3's own has where there is no clock, 26 Jul 2024.

Rows are then the same tokens on every day, on every rank, and when a run goes on. transformers hands no function of
ours to a template.
"""


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase, format: str = "messages") -> ChatTemplate:
    """The template that ``data.template`` means for this tokenizer.

    Args:
        name: ``auto``, ``tokenizer`` (the tokenizer's own, or fail) or one of `NAMED_TEMPLATES`. ``auto`` is the
            tokenizer's own where it has one; else ``plain`` for prompt-completion rows and texts, which say everything
            themselves, and ``alpaca`` for the others.
        format: of the rows.

    Raises:
        InputError: an unknown name, or a template whose markers the tokenizer does not have.
    """
    own = _own_template(tokenizer)
    if name == "auto":
        name = OWN if own else "plain" if format in ("prompt-completion", *UNRENDERED) else "alpaca"
    if name == OWN:
        if not own:
            raise InputError(
                f"data.template: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template. "
                f"Name one: {', '.join(NAMED_TEMPLATES)}."
            )
        return ChatTemplate(OWN, own, tokenizer)
    if name not in NAMED_TEMPLATES:
        known = ["auto", OWN, *NAMED_TEMPLATES]
        hint = did_you_mean(name, known)
        raise InputError(f"data.template: no template is called {name!r}{hint} Known: {', '.join(known)}.")
    vocabulary = tokenizer.get_vocab()
    absent = {each: [m for m in _MARKERS.get(each, ()) if m not in vocabulary] for each in NAMED_TEMPLATES}
    if absent[name]:
        usable = [each for each in NAMED_TEMPLATES if not absent[each]]
        raise InputError(
            f"data.template: {name} needs {', '.join(absent[name])}, which the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} does not have as single tokens. Templates that work with "
            f"it: {', '.join(usable)}. Or add them with model.added_tokens (and set model.eos_token to the one that "
            f"ends a turn)."
        )
    return ChatTemplate(name, NAMED_TEMPLATES[name], tokenizer)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several named templates and none called "default"
        raise InputError(f"data.template: the tokenizer's chat template can't be chosen: {error} Name one.") from None


@dataclass(slots=True)
class ChatTemplate:
    """A chat template bound to a tokenizer.

    Attributes:
        name: ``tokenizer`` or a named template; `resolve_template` takes it back.
        jinja: its source, for ``tokenizer.chat_template`` beside an adapter.
        special: finds the tokenizer's special tokens in a text.
        source: what is rendered: the template with a clock that stands still.
    """

    name: str
    jinja: str
    tokenizer: PreTrainedTokenizerBase
    special: re.Pattern[str] = field(init=False, repr=False)
    source: str = field(init=False, repr=False)
    _added: re.Pattern[str] = field(init=False, repr=False)
    _layouts: Layouts = field(default_factory=dict, repr=False)
    _written: set[tuple[str, bool]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        added = list(self.tokenizer.added_tokens_decoder.values())
        named = list(self.tokenizer.all_special_tokens)
        self.special = _any_of([token.content for token in added if token.special] + named)
        self.source = _CLOCK + self.jinja if "strftime_now" in self.jinja else self.jinja
        self._added = _any_of([token.content for token in added] + named)

    def messages(self, turns: list[Turn]) -> list[Message]:
        """Turns as ``apply_chat_template`` takes them."""
        out = []
        for turn in turns:
            message = {"role": turn.role, "content": turn.content, **turn.extra}
            if turn.context is not None and self.name == "alpaca":
                message["context"] = turn.context
            elif turn.context is not None:
                message["content"] = f"{turn.content}\n\n{turn.context}"
            out.append(message)
        return out

    def render(self, messages: list[Message], tools: Tools = None, prompt: bool = False) -> str:
        """The text of ``messages``; ``prompt``: it ends with what opens an assistant turn.

        Raises:
            TemplateError: the template refuses these messages; it says why, and nothing else.
        """
        import jinja2

        # Named templates are given eos and bos as text even where a tokenizer has none, so that they render at all.
        blanks = {k: "" for k in ("bos_token", "eos_token") if getattr(self.tokenizer, k, None) is None}
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
                **blanks,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateError(one_line(error)) from None

    def marker_end(self, text: str, start: int, stop: int, last: bool = False) -> int | None:
        """Where the end-of-turn marker ends that template text [start, stop) holds: its first special token."""
        # Fine-tuned models exist whose <|im_end|> was added as an ordinary token, hence the second pattern. It only
        # comes second, since <tool_call> and <think> are ordinary added tokens that end nothing.
        for pattern in (self.special, self._added):
            found = list(pattern.finditer(text, start, stop))
            if found:
                return found[-1 if last else 0].end()
        return None

    def prompt(self, turns: list[Turn], tools: Tools = None) -> tuple[str, list[int]]:
        """The text that an answer to ``turns`` is generated from: exactly what came before answers in training.

        It differs from `render` with ``prompt=True`` for templates that ignore ``add_generation_prompt``.

        Returns:
            The text, and the characters at which its earlier answers start (for `Encoder.encode_prompt`).

        Raises:
            InputError: the template refuses the turns, or leaves a part of them out.
        """
        conversation = Conversation([*turns, Turn("assistant", "x")], "The conversation", tools)
        try:
            text, (*earlier, last) = self.lay_out(conversation, [len(turns)])
        except InputError:  # a template may take the question and refuse or rewrite such an answer
            messages = self.messages(turns)
            self._require_written(conversation.source, messages, tools, prompt=True)
            try:
                return self.render(messages, tools, prompt=True), []
            except TemplateError as error:
                raise InputError(f"The chat template ({self.name}) refuses the messages: {error}.") from None
        return text[: last.start], [answer.start for answer in earlier]

    def lay_out(self, conversation: Conversation, needed: list[int]) -> tuple[str, list[AnswerSpan]]:
        """Render a row: its text, and the places of its answers in order.

        Args:
            needed: the turns that are going to be trained; other answers may stay without a place.

        Raises:
            InputError: names the row; the template refuses it, leaves a part of it out, or rewrites it so that answers
                can't be placed.
        """
        turns = conversation.turns
        messages = self.messages(turns)
        self._require_written(conversation.source, messages, conversation.tools)
        try:
            text = self.render(messages, conversation.tools)
            answers = answer_spans(self, self._layouts, text, messages, conversation)
        except TemplateError as error:
            raise InputError(
                f"{conversation.source}: the chat template ({self.name}) refuses the row: {error}. Its roles are "
                f"{', '.join(turn.role for turn in turns)}. Change the row, or name another data.template."
            ) from None
        lost = set(needed) - {answer.turn for answer in answers}
        if lost:
            raise InputError(
                f"{conversation.source}: the chat template ({self.name}) rewrites turn {min(lost) + 1}, so it can't be "
                "told which tokens are the answer. Set data.train_on: last, keep only the final answer in the row, or "
                f"name another data.template ({', '.join(NAMED_TEMPLATES)})."
            )
        return text, answers

    def _require_written(self, source: str, messages: list[Message], tools: Tools, prompt: bool = False) -> None:
        """Refuse (InputError) a row with a part that this template passes over, as many do with tools.

        Such a row would be trained as if that part were not in it. Each kind of part is looked at until a row has
        shown that the template writes it; a template may write it in a prompt alone.
        """
        without: dict[str, list[tuple[list[Message], Tools]]] = {}
        if tools:
            without["tools"] = [(messages, None)]
        if any("tool_calls" in message for message in messages):
            without["tool_calls"] = [([{k: m[k] for k in m if k != "tool_calls"} for m in messages], tools)]
        for key in REASONING:
            if any(key in message for message in messages):
                without[key] = [([{k: m[k] for k in m if k != key} for m in messages], tools)]
        spoken = [(i, m["role"]) for i, m in enumerate(messages) if m["content"].strip()]
        places = {
            "turns of the role tool": [i for i, role in spoken if role == "tool"],
            "turns of the role system": [i for i, role in spoken if role == "system" and i == 0],
            "system turns behind the first turn": [i for i, role in spoken if role == "system" and i > 0],
        }
        for part, found in places.items():
            without[part] = [
                ([{**m, "content": m["content"] + "x"} if i == at else m for i, m in enumerate(messages)], tools)
                for at in found
            ]
        unseen = {part: changes for part, changes in without.items() if changes and (part, prompt) not in self._written}
        if not unseen:
            return
        try:
            whole = self.render(messages, tools, prompt)
        except TemplateError:  # the caller, who renders it too, says so
            return
        for part, changes in unseen.items():
            for changed in changes:
                with contextlib.suppress(TemplateError):  # what it refuses it has read
                    if self.render(*changed, prompt) == whole:
                        raise InputError(f"{source}: {self._unwritten_text(part)}")
            self._written.add((part, prompt))

    def _unwritten_text(self, part: str) -> str:
        text = f"the chat template ({self.name}) does not write {part}, so the model would not see them. "
        others = ", ".join(name for name in NAMED_TEMPLATES if name != self.name)
        if not part.startswith("tool"):  # all named templates write every role
            return f"{text}Name another data.template ({others}), or leave them out of the rows and of data.system."
        own = self.tokenizer.chat_template
        if self.name == OWN and isinstance(own, dict) and "tool_use" in own:
            return f"{text}Make the tokenizer's template tool_use its only one, or take them out of the rows."
        way = "a base whose own chat template writes them"
        way = way if self.name == OWN else f"{way}, with data.template: {OWN}"
        return f"{text}Take them out of the rows, or train {way}."


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    longest_first = sorted({token for token in tokens if token.strip()}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
