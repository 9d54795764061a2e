"""Conversations → the text a model reads, and which characters of it are answers.

Where an answer lies is never searched for: a row's text could contain anything, the template's own markers included.
The template is rendered once per shape (roles in order) with slots in place of the contents; that gives the literal
pieces between the slots. A row's text is then known piece by piece, and is compared with what the template really
renders for it. Templates that rewrite contents fail that comparison and are measured by rendering prefixes instead.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .formats import Conversation, Turn
from .named_templates import NAMED_TEMPLATES
from .spans import AnswerSpan, Rendered, Skeleton, Slot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer"
"""The name of "the chat template that came with the tokenizer"."""


class TemplateError(Exception):
    """The template itself refused the conversation."""


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
class ChatTemplate:
    """A chat template bound to a tokenizer.

    Attributes:
        name: ``tokenizer`` or a named template; `resolve_template` takes it back.
        jinja: its source, for ``tokenizer.chat_template`` beside an adapter.
        tokenizer: the tokenizer that it is for.
        reads_context: it has a place of its own for Alpaca's ``input``.
    """

    name: str
    jinja: str
    tokenizer: PreTrainedTokenizerBase
    reads_context: bool = False
    _skeletons: dict[Any, Skeleton | None] = field(default_factory=dict)
    _special: re.Pattern[str] = field(init=False, repr=False)
    _added: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        added = list(self.tokenizer.added_tokens_decoder.values())
        named = list(self.tokenizer.all_special_tokens)
        self._special = _any_of([token.content for token in added if token.special] + named)
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
            return self._render(messages, tools, prompt)
        except TemplateError as error:
            raise InputError(f"The chat template ({self.name}) refuses the messages: {error}.") from None

    def _render(self, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
        import jinja2

        # Named templates are given eos and bos as text even where a tokenizer has none, so that they render at all.
        blanks = {k: "" for k in ("bos_token", "eos_token") if getattr(self.tokenizer, k, None) is None}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.jinja, tokenize=False, add_generation_prompt=prompt, **blanks
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateError(" ".join(str(error).split()).rstrip(".") or type(error).__name__) from None

    def spells_marker(self, text: str) -> bool:
        """Whether a row's text contains a special token's spelling, which the tokenizer will read as that token."""
        return self._special.search(text) is not None

    def _marker_end(self, text: str, start: int, stop: int, last: bool = False) -> int | None:
        """Where the end-of-turn marker ends that template text [start, stop) holds: its first special token."""
        # Fine-tuned models exist whose <|im_end|> was added as an ordinary token, hence the second pattern. It only
        # comes second, since <tool_call> and <think> are ordinary added tokens that end nothing.
        for pattern in (self._special, self._added):
            found = list(pattern.finditer(text, start, stop))
            if found:
                return found[-1 if last else 0].end()
        return None

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
            text = self._render(messages, conversation.tools, False)
            answers = self._generation_spans(text, messages, conversation)
            if answers is None:
                answers = self._measured_spans(text, messages, conversation)
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

    # --- three ways to know where the answers are, the surest first -------------------------------------------------

    def _generation_spans(self, text: str, messages: Any, conversation: Conversation) -> list[AnswerSpan] | None:
        """The author's own ``{% generation %}`` blocks, where there is one for each assistant turn.

        Blocks say what an author wants trained, but differ in what they take along: some leave the end of turn outside, some
        hold the turn's heading or the line break behind its end. What is measured without them settles that.
        """
        if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.jinja):
            return None
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, blocks = render_jinja_template(
                [messages],
                tools=conversation.tools,
                chat_template=self.jinja,
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **{"bos_token": "", "eos_token": "", **self.tokenizer.special_tokens_map},
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            return None
        assistants = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        if rendered[0] != text or len(blocks[0]) != len(assistants):
            return None
        measured = {span.turn: span for span in self._measured_spans(text, messages, conversation)}
        answers: list[AnswerSpan] = []
        for turn, (start, end) in zip(assistants, blocks[0], strict=True):
            answers.append(self._within_block(text, turn, start, end, measured.get(turn)))
        return answers

    def _within_block(self, text: str, turn: int, start: int, end: int, measured: AnswerSpan | None) -> AnswerSpan:
        """The answer of a block [start, end): without the turn's heading, and with its end of turn but nothing behind that."""
        header = start
        if measured is not None:
            header = min(measured.header, start)
            start = max(start, measured.start)
            # the end of turn stands right behind a block that leaves it outside; one that stops earlier means to
            closes = measured.marked and self._special.fullmatch(text, end, measured.end)
            if end >= measured.end or closes:
                return AnswerSpan(turn, header, start, measured.end, measured.marked)
        ends = [found.end() for found in self._special.finditer(text, start, end)]
        if ends and not text[ends[-1] : end].strip():
            return AnswerSpan(turn, header, start, ends[-1], True)
        following = self._special.match(text, end)
        if following is not None and not text[start:end].endswith("\n"):
            return AnswerSpan(turn, header, start, following.end(), True)
        return AnswerSpan(turn, header, start, end, False)

    def _measured_spans(self, text: str, messages: Any, conversation: Conversation) -> list[AnswerSpan]:
        spans = self._skeleton_spans(text, messages, conversation)
        return self._prefix_spans(text, messages, conversation) if spans is None else spans

    def _skeleton_spans(self, text: str, messages: Any, conversation: Conversation) -> list[AnswerSpan] | None:
        """Piece the text together from the shape's literals and the row's contents; None where that is not the text."""
        if any(turn.extra or (turn.role == "assistant" and not turn.content) for turn in conversation.turns):
            return None
        shape = tuple((m["role"], "context" in m, not m["content"]) for m in messages)
        key = (shape, repr(conversation.tools) if conversation.tools else None)
        if key not in self._skeletons:
            self._skeletons[key] = self._build_skeleton(messages, conversation.tools)
        skeleton = self._skeletons[key]
        if skeleton is None:
            return None
        parts = [skeleton.literals[0]]
        length = len(parts[0])
        previous_end = 0
        answers = []
        for slot, literal in zip(skeleton.slots, skeleton.literals[1:], strict=True):
            content = messages[slot.turn]["context" if slot.is_context else "content"]
            if slot.strip_left:
                content = content.lstrip()
            if slot.strip_right:
                content = content.rstrip()
            end = length + len(content)
            if slot.turn in skeleton.before and not slot.is_context:
                start = length - skeleton.before[slot.turn]
                close = end + skeleton.after[slot.turn]
                answers.append(AnswerSpan(slot.turn, previous_end, start, close, skeleton.marked[slot.turn]))
            parts += (content, literal)
            previous_end = end
            length = end + len(literal)
        return answers if "".join(parts) == text else None

    def _build_skeleton(self, messages: list[dict[str, Any]], tools: Any) -> Skeleton | None:
        marks: dict[str, tuple[int, bool]] = {}
        slotted = []
        for index, message in enumerate(messages):
            copy = dict(message)
            for name in ("content", "context"):
                if name in copy and (copy[name] or name == "context"):
                    mark = f"QveraSlot{len(marks):04d}Zq7"
                    marks[mark] = (index, name == "context")
                    copy[name] = f"\t{mark}\t"  # a tab that is gone afterwards: the template strips
            slotted.append(copy)
        try:
            text = self._render(slotted, tools, False)
        except TemplateError:
            return None
        pieces = re.split(r"(\t?)(QveraSlot\d{4}Zq7)(\t?)", text)
        if [pieces[i] for i in range(2, len(pieces), 4)] != list(marks):
            return None  # a content is left out, written twice or moved
        slots, literals, contents = [], [pieces[0]], []
        length = len(pieces[0])
        for i in range(1, len(pieces), 4):
            left, mark, right, literal = pieces[i : i + 4]
            turn, is_context = marks[mark]
            slots.append(Slot(turn, is_context, not left, not right))
            contents.append((length, length + len(left + mark + right)))
            literals.append(literal)
            length = contents[-1][1] + len(literal)
        skeleton = Skeleton(literals, slots, {}, {}, {})
        for number, slot in enumerate(slots):
            if messages[slot.turn]["role"] != "assistant" or slot.is_context:
                continue
            start, end = contents[number]
            skeleton.before[slot.turn] = start - self._generation_start(
                slotted[: slot.turn], tools, text, start - len(literals[number]), start
            )
            close, marked = self._end_of_turn(
                slotted[: slot.turn + 1], tools, text, end, end + len(literals[number + 1]), len(slotted)
            )
            skeleton.after[slot.turn] = close - end
            skeleton.marked[slot.turn] = marked
        return skeleton

    def _generation_start(self, slotted: Any, tools: Any, text: str, earliest: int, content: int) -> int:
        """Where in ``text`` the prompt ends that an answer's content (at ``content``) is generated from.

        Llama-2's answers start with a space after ``[/INST]``, and Qwen3's with an empty think block: both are the
        model's to write, since a generation prompt stops before them.
        """
        try:
            prompt = self._render(slotted, tools, True) if slotted else ""
            bare = self._render(slotted, tools, False) if slotted else ""
        except TemplateError:
            return content
        if not prompt or not text.startswith(prompt) or not earliest <= len(prompt) <= content:
            return content
        if prompt == bare and text[len(prompt) : content].strip():
            return content  # the template knows no generation prompt; its heading is still not the model's to write
        return len(prompt)

    def _end_of_turn(self, slotted: Any, tools: Any, text: str, end: int, latest: int, turns: int) -> tuple[int, bool]:
        """Where in ``text`` the answer's turn ends whose content ends at ``end``, and whether by a marker."""
        close: int | None = latest
        if len(slotted) < turns:  # what follows up to the next content holds the next turn's heading too
            try:
                alone = self._render(slotted, tools, False)
            except TemplateError:
                alone = ""
            close = len(alone) if text.startswith(alone) and end <= len(alone) <= latest else None
        marker_end = self._marker_end(text, end, latest if close is None else close)
        if marker_end is not None:
            return marker_end, True
        # No marker: what the template itself puts behind an answer (a line break, say) is all there is to learn from.
        return (end if close is None else close), False

    def _prefix_spans(self, text: str, messages: Any, conversation: Conversation) -> list[AnswerSpan]:
        """Render the conversation through and without each answer; left out where that is not how the text begins."""
        answers = []
        for turn, item in enumerate(conversation.turns):
            if item.role != "assistant":
                continue
            bare = self._render(messages[:turn], conversation.tools, False) if turn else ""
            prompt = self._render(messages[:turn], conversation.tools, True) if turn else ""
            through = self._render(messages[: turn + 1], conversation.tools, False)
            if not text.startswith(through):
                continue
            found = self._content_place(messages[: turn + 1], conversation.tools, through)
            if found is None:
                continue  # rewritten beyond recognition: a marker inside of it could be mistaken for its end
            content, behind = found
            # as `_generation_start` has it; an answer may leave out the end of the generation prompt
            start = len(prompt) if through.startswith(prompt) and len(prompt) <= content else content
            if prompt == bare and text[start:content].strip():
                start = content
            header = len(bare) if prompt.startswith(bare) and len(bare) <= start else start
            # A tool call is written behind the content, and may open with a special token of its own.
            marker_end = self._marker_end(through, behind, len(through), last="tool_calls" in item.extra)
            answers.append(AnswerSpan(turn, header, start, marker_end or len(through), marker_end is not None))
        return answers

    def _content_place(self, messages: list[dict[str, Any]], tools: Any, through: str) -> tuple[int, int] | None:
        """Where in ``through`` the last message's content starts and ends.

        A slot is put in its place: what the template writes before and behind the slot stands around the content too. A template
        that leaves the content of such a message out (as some do with tool calls) has it nowhere: both ends are where the turn
        starts to differ from its prompt.

        Returns:
            None where the template does something else with this content.
        """
        last = messages[-1]
        mark = "QveraSlot"
        spelled = repr(messages) + repr(tools)
        while mark in spelled:
            mark += "Z"
        try:
            slotted = self._render([*messages[:-1], {**last, "content": f"\t{mark}\t"}], tools, False)
            empty = self._render([*messages[:-1], {**last, "content": ""}], tools, False)
        except TemplateError:
            return None
        pieces = re.split(rf"(\t?){mark}(\t?)", slotted)
        if len(pieces) != 4:
            if len(pieces) == 1 and slotted == through:
                bare = self._render(messages[:-1], tools, True) if messages[:-1] else ""
                return (len(bare), len(bare)) if through.startswith(bare) else None
            return None
        before, left, right, behind = pieces
        content = last["content"]
        content = content if left else content.lstrip()
        content = content if right else content.rstrip()
        if through == before + content + behind:
            return len(before), len(before) + len(content)
        if not content and through == empty:
            # The template writes less around nothing at all: what it shares with the other text at its end is behind it.
            return _around_nothing(through, before, behind)
        if through.startswith(before) and through.endswith(behind) and len(through) >= len(before) + len(behind):
            return len(before), len(through) - len(
                behind
            )  # it rewrites the content in its place (line breaks stripped, say)
        return None


def _around_nothing(text: str, before: str, behind: str) -> tuple[int, int]:
    """Where ``text`` stops being like ``before``, and from where on it is like ``behind``; not before that."""
    shared = 0
    while shared < min(len(text), len(behind)) and text[-1 - shared] == behind[-1 - shared]:
        shared += 1
    opening = 0
    while opening < min(len(text), len(before)) and text[opening] == before[opening]:
        opening += 1
    return opening, max(opening, len(text) - shared)


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    longest_first = sorted({token for token in tokens if token.strip()}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
