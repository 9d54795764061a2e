"""Ollama's Modelfile: GGUF files, the chat template, and where an answer ends.

Format: github.com/ollama/ollama, docs/modelfile.md. Its templates are Go's text/template; ``.Messages`` has all turns.
Those in templates/ have EOS and BOS for tokens, and no first BOS, which llama.cpp adds. An answer that is the last turn
is left open, because Ollama lets the model continue it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qvera.data.chat_template import NAMED_TEMPLATES, OWN, ChatTemplate, Message, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOP_TEXTS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|eot_id|>"),
    "zephyr": ("EOS",),
    "llama-2": ("EOS",),
    "mistral": ("EOS",),
    "alpaca": ("EOS", "### Instruction:"),
    "plain": ("EOS",),
}
"""For each of `NAMED_TEMPLATES`, the texts that end an answer."""


def modelfile(
    model: str | None,
    adapter: str | None,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
    *,
    base: str | None = None,
) -> str:
    """The text of a Modelfile. ``model`` and ``adapter`` are GGUF files.

    Without ``model`` the file has a placeholder, and a comment asks for the GGUF file of ``base``.
    """
    lines = []
    if model is None:
        lines += [f"# The GGUF file of the base, {base}: put its path here.", "FROM ./base.gguf"]
    else:
        lines.append(f"FROM ./{model}")
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    name, default = known_template(tokenizer)
    if name is None:
        lines += [
            "# TEMPLATE: none is known here for this model's chat template. Ollama compares the one in the GGUF file",
            "# with those that it knows; `ollama show --modelfile NAME` shows what it took.",
        ]
        stop = [tokenizer.eos_token] if tokenizer.eos_token else []
    else:
        texts = {"EOS": tokenizer.eos_token or "", "BOS": tokenizer.bos_token or ""}
        file = Path(__file__).parent / "templates" / f"{name}.gotmpl"
        text = file.read_text(encoding="utf-8").removesuffix("\n")
        for marker, value in texts.items():
            text = text.replace(marker, value)
        lines.append(f'TEMPLATE """{text}"""')
        stop = [text for marker in STOP_TEXTS[name] if (text := texts.get(marker, marker))]
        stop += [texts["EOS"]] if texts["EOS"] and texts["EOS"] not in stop else []
    lines += [f'PARAMETER stop "{text}"' for text in stop]
    system = system or default
    if system is not None and '"""' in system:
        lines.append('# SYSTEM: left out, because the system prompt has """ in it, which a Modelfile can\'t hold.')
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def known_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str | None]:
    """Which of `NAMED_TEMPLATES` equals the tokenizer's own, and the default system prompt of the latter."""
    if not tokenizer.chat_template:
        return "plain", None
    user, answer = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
    turns: list[Message] = [user, answer, {"role": "user", "content": "three"}]
    system: Message = {"role": "system", "content": "SYSTEM-PROMPT"}
    own = ChatTemplate(OWN, tokenizer.get_chat_template(), tokenizer)
    for name, source in NAMED_TEMPLATES.items():
        named = ChatTemplate(name, source, tokenizer)
        try:
            if own.render([system, *turns], prompt=True) != named.render([system, *turns], prompt=True):
                continue
            bare = own.render(turns, prompt=True)
            if bare == named.render(turns, prompt=True):
                return name, None
            before, _, after = named.render([system, *turns], prompt=True).partition("SYSTEM-PROMPT")
            if bare.startswith(before) and bare.endswith(after) and len(bare) > len(before) + len(after):
                return name, bare[len(before) : len(bare) - len(after)]
        except TemplateError:
            continue
    return None, None
