"""Conversations → the text a model reads, and which characters of it are answers."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvera.data.formats import Conversation, Turn
from qvera.data.loss_mask import answer_spans
from qvera.data.named_templates import NAMED_TEMPLATES
from qvera.data.rendering import Renderer, TemplateError
from qvera.data.template_parts import Skeletons
from qvera.data.text_spans import Rendered
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer"
"""The name of "the chat template that came with the tokenizer"."""


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase, format: str = "messages") -> ChatTemplate:
    """The template that ``data.template`` means for this tokenizer.

    Args:
        name: ``auto``, ``tokenizer`` (the tokenizer's own, or fail) or one of `NAMED_TEMPLATES`. ``auto`` is the
            tokenizer's own where it has one; else ``plain`` for prompt-completion and text rows, which say everything
            themselves, and ``alpaca`` for the others.
        tokenizer: a transformers tokenizer.
        format: the format of the rows.

    Raises:
        InputError: an unknown name, or a template whose markers the tokenizer does not have.
    """
    own = _own_template(tokenizer)
    if name == "auto":
        name = OWN if own else "plain" if format in ("prompt-completion", "text") else "alpaca"
    if name == OWN:
        if not own:
            raise InputError(
                f"data.template: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template. "
                f"Name one: {', '.join(NAMED_TEMPLATES)}."
            )
        return ChatTemplate(OWN, own, tokenizer)
    named = NAMED_TEMPLATES.get(name)
    if named is None:
        near = difflib.get_close_matches(name, [*NAMED_TEMPLATES, "auto", OWN], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"data.template: no template is called {name!r}; {hint}Known: auto, {OWN}, {', '.join(NAMED_TEMPLATES)}."
        )
    vocabulary = tokenizer.get_vocab()
    absent = [marker for marker in named.needs if marker not in vocabulary]
    if absent:
        usable = [other for other, entry in NAMED_TEMPLATES.items() if all(m in vocabulary for m in entry.needs)]
        raise InputError(
            f"data.template: {name} needs {', '.join(absent)}, which the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} does not have as single tokens. Templates that work with "
            f"it: {', '.join(usable)}. Or add them with model.added_tokens (and set model.eos_token to the one that ends a turn)."
        )
    return ChatTemplate(name, named.jinja, tokenizer, reads_context=named.reads_context)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several named templates and none called "default"
        raise InputError(f"data.template: the tokenizer's chat template can't be chosen: {error} Name one.") from None


@dataclass(slots=True)
class ChatTemplate(Renderer):
    """A chat template bound to a tokenizer, which can tell where the answers of a row are.

    Its attributes are `Renderer`'s.
    """

    _skeletons: Skeletons = field(default_factory=dict)

    def prompt(self, turns: list[Turn], tools: list[dict[str, Any]] | None = None) -> tuple[str, list[int]]:
        """The text that an answer to ``turns`` is generated from: exactly what came before answers in training.

        It differs from `render` with ``prompt=True`` for templates that ignore ``add_generation_prompt``.

        Returns:
            The text, and the characters at which its earlier answers start (for `Encoder.encode_prompt`).

        Raises:
            InputError: the template refuses the turns.
        """
        conversation = Conversation([*turns, Turn("assistant", "x")], "The conversation", tools)
        try:
            rendered = self.lay_out(conversation, [len(turns)])
        except InputError:  # a template may take the question and refuse or rewrite such an answer
            return self.render(self.messages(turns), tools, prompt=True), []
        *earlier, last = rendered.answers
        return rendered.text[: last.start], [answer.start for answer in earlier]

    def lay_out(self, conversation: Conversation, needed: list[int]) -> Rendered:
        """Render a row and say where its answers are.

        Args:
            conversation: the row.
            needed: the turns that are going to be trained; other answers may stay without a place.

        Raises:
            InputError: names the row; the template refuses it, or rewrites it so that answers can't be located.
        """
        turns = conversation.turns
        messages = self.messages(turns)
        try:
            text = self.attempt(messages, conversation.tools)
            answers = answer_spans(self, self._skeletons, text, messages, conversation)
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
        append_eos = bool(answers) and answers[-1].turn == len(turns) - 1 and not answers[-1].marked
        return Rendered(text, answers, append_eos)
