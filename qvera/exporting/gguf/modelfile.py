"""Ollama's Modelfile: GGUF files, the chat template, and where an answer ends.

Format: github.com/ollama/ollama, docs/modelfile.md. Its templates are Go's text/template; ``.Messages`` has all turns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qvera.data.chat_template import NAMED_TEMPLATES, OWN, ChatTemplate, Message, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOP = "{{- range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
"""Every turn. An answer that is the last turn is left open, because Ollama lets the model continue it."""
_OPEN = '{{ if not (and $last (eq $m.Role "assistant")) }}'
_PROMPT = '{{ if and $last (ne $m.Role "assistant") }}'
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_BRACKETS = (
    '{{- $system := "" }}'
    + _LOOP
    + '{{ if eq $m.Role "system" }}{{ $system = $m.Content }}{{ else if eq $m.Role "user" }}'
    + "{{ if $started }}BOS{{ end }}{{ $started = true }}[INST] "
    + '{{ if $system }}BEFORE{{ $system }}AFTER{{ $system = "" }}{{ end }}'
    + "{{ $m.Content }} [/INST]{{ else }} {{ $m.Content }}"
    + _OPEN
    + "TAIL{{ end }}{{ end }}{{ end }}"
)


class GoTemplate(NamedTuple):
    """A named template in Ollama's language, with EOS and BOS for tokens, and the texts that end an answer."""

    text: str
    stop: tuple[str, ...]


def _brackets(bos: str, before: str, after: str, tail: str) -> str:
    text = "{{- $started := false }}" + _BRACKETS.replace("BOS", bos)
    return text.replace("BEFORE", before).replace("AFTER", after).replace("TAIL", tail)


GO_TEMPLATES = {
    "chatml": GoTemplate(
        _LOOP
        + "<|im_start|>{{ $m.Role }}\n{{ $m.Content }}" + _OPEN + "<|im_end|>\n{{ end }}"
        + _PROMPT + "<|im_start|>assistant\n{{ end }}{{ end }}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama-3": GoTemplate(
        _LOOP
        + "<|start_header_id|>{{ $m.Role }}<|end_header_id|>\n\n{{ $m.Content }}" + _OPEN + "<|eot_id|>{{ end }}"
        + _PROMPT + "<|start_header_id|>assistant<|end_header_id|>\n\n{{ end }}{{ end }}",
        ("<|start_header_id|>", "<|eot_id|>"),
    ),
    "zephyr": GoTemplate(
        _LOOP
        + "<|{{ $m.Role }}|>\n{{ $m.Content }}" + _OPEN + "EOS\n{{ end }}"
        + _PROMPT + "<|assistant|>\n{{ end }}{{ end }}",
        ("EOS",),
    ),
    "llama-2": GoTemplate(_brackets("BOS", "<<SYS>>\n", "\n<</SYS>>\n\n", " EOS"), ("EOS",)),
    "mistral": GoTemplate(_brackets("", "", "\n\n", "EOS"), ("EOS",)),
    "alpaca": GoTemplate(
        _LOOP
        + '{{ if eq $i 0 }}{{ if eq $m.Role "system" }}{{ $m.Content }}\n\n{{ else }}' + _ALPACA + "{{ end }}{{ end }}"
        + '{{ if eq $m.Role "user" }}### Instruction:\n{{ $m.Content }}\n\n{{ else if eq $m.Role "assistant" }}'
        + "### Response:\n{{ $m.Content }}{{ if not $last }}EOS\n\n{{ end }}{{ end }}"
        + _PROMPT + "### Response:\n{{ end }}{{ end }}",
        ("EOS", "### Instruction:"),
    ),
    "plain": GoTemplate(
        _LOOP + '{{ $m.Content }}{{ if and (eq $m.Role "assistant") (not $last) }}EOS{{ end }}{{ end }}', ("EOS",)
    ),
}  # fmt: skip
"""For each of `NAMED_TEMPLATES`, without the first BOS token, which llama.cpp adds."""


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
        go = GO_TEMPLATES[name]
        texts = {"EOS": tokenizer.eos_token or "", "BOS": tokenizer.bos_token or ""}
        text = go.text
        for marker, value in texts.items():
            text = text.replace(marker, value)
        lines.append(f'TEMPLATE """{text}"""')
        stop = [text for marker in go.stop if (text := texts.get(marker, marker))]
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
