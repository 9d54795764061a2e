"""What a model is asked: conversations as its chat template writes them, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvera.data import ChatTemplate, Encoder, Turn, resolve_template
from qvera.evaluation.load import template_of

if TYPE_CHECKING:
    from qvera.evaluation.load import OpenRun


@dataclass(frozen=True)
class PromptWriter:
    """A chat template with the encoder of its tokenizer.

    Attributes:
        system: the system prompt of the recipe; None where it has none.
    """

    template: ChatTemplate
    encoder: Encoder
    system: str | None = None

    @classmethod
    def of(cls, opened: OpenRun) -> PromptWriter:
        """With the chat template that a run was trained with; run.json resolves ``auto``.

        Raises:
            InputError: the template does not go with the tokenizer.
        """
        recipe = opened.target.recipe
        name = template_of(recipe, opened.target.run) if recipe is not None else "auto"
        template = resolve_template(name, opened.base.tokenizer)
        return cls(template, Encoder(opened.base.tokenizer), recipe.data.system if recipe is not None else None)

    def ids(self, turns: list[Turn], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        Raises:
            InputError: the template refuses the turns.
        """
        text, starts = self.template.prompt(turns, tools)
        return self.encoder.encode_prompt(text, starts)
