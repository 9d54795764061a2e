"""The chat templates of real models, as their tokenizer_config.json has them, and what each writes, said again in Python.

The second half is the tests' oracle: a conversation as (text, trained) pieces, written from the models' documented formats
and not from qvera. `test_chat_template` holds it against what transformers renders before anything else is compared with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]
Pieces = list[tuple[str, bool]]

_TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("templates/*.jinja")}
SMOLLM2, QWEN_25, QWEN_3 = (_TEMPLATES[name] for name in ("smollm2", "qwen-2.5", "qwen3"))
_QWEN_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_SMOL_DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def _llama_2(messages: Messages) -> Pieces:
    system = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n" if messages[0]["role"] == "system" else ""
    out: Pieces = []
    for number, message in enumerate(messages[1:] if system else messages):
        if message["role"] == "user":
            content = ((system if number == 0 else "") + message["content"]).strip()
            out.append((f"<s>[INST] {content} [/INST]", False))
        else:
            out.append((f" {message['content'].strip()} </s>", True))
    return out


def _llama_31(messages: Messages) -> Pieces:
    system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
    head = "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    out: Pieces = [(f"{head}{system}<|eot_id|>", False)]
    for message in messages[1:] if messages[0]["role"] == "system" else messages:
        role = "ipython" if message["role"] == "tool" else message["role"]
        out.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
        if role == "ipython":  # transformers' tojson leaves Unicode as it is
            out.append((json.dumps(message["content"], ensure_ascii=False) + "<|eot_id|>", False))
        elif "tool_calls" in message:
            call = message["tool_calls"][0]["function"]
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            out.append((f'{{"name": "{call["name"]}", "parameters": {arguments}}}<|eot_id|>', True))
        else:
            out.append((message["content"].strip() + "<|eot_id|>", role == "assistant"))
    return out


def _headed(messages: Messages, heading: str, end: str) -> Pieces:
    out: Pieces = []
    for message in messages:
        role = message["role"]
        out += [(heading.format(role), False), (message["content"] + end, role == "assistant"), ("\n", False)]
    return out


def _zephyr(messages: Messages) -> Pieces:
    return _headed(messages, "<|{}|>\n", "</s>")


def _smollm2(messages: Messages) -> Pieces:
    own = messages[0]["role"] == "system"
    system = f"<|im_start|>system\n{_SMOL_DEFAULT}<|im_end|>\n"
    return [*([] if own else [(system, False)]), *_headed(messages, "<|im_start|>{}\n", "<|im_end|>")]


def _qwen_25(messages: Messages) -> Pieces:
    own = messages[0]["role"] == "system"
    system, rest = messages[0]["content"] if own else _QWEN_DEFAULT, messages[own:]
    out: Pieces = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    for number, message in enumerate(rest):
        if message["role"] == "tool":
            opens = number == 0 or rest[number - 1]["role"] != "tool"
            closes = number + 1 == len(rest) or rest[number + 1]["role"] != "tool"
            text = f"\n<tool_response>\n{message['content']}\n</tool_response>"
            out.append((("<|im_start|>user" if opens else "") + text + ("<|im_end|>\n" if closes else ""), False))
            continue
        written = message["content"]
        if message.get("tool_calls"):
            written = f"\n{written}" if written else ""
            for call in (call["function"] for call in message["tool_calls"]):
                arguments = json.dumps(call["arguments"], ensure_ascii=False)
                written += f'\n<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>'
            written = written[1:]  # the line break behind the role is the generation prompt's
        out.append((f"<|im_start|>{message['role']}\n", False))
        out += [(written + "<|im_end|>", message["role"] == "assistant"), ("\n", False)]
    return out


def _mistral(messages: Messages) -> Pieces:
    out: Pieces = [("<s>", False)]
    for message in messages:
        if message["role"] == "user":
            out.append((f"[INST] {message['content']} [/INST]", False))
        else:
            out += [(message["content"] + "</s>", True), (" ", False)]
    return out


def _alpaca(messages: Messages) -> Pieces:
    """Stanford's PROMPT_DICT; later turns repeat the headings."""
    intro = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    own = messages[0]["role"] == "system"
    out: Pieces = [((messages[0]["content"] if own else intro) + "\n\n", False)]
    rest = messages[1:] if own else messages
    for number, message in enumerate(rest):
        if message["role"] == "user":
            out.append((f"### Instruction:\n{message['content']}\n\n", False))
        else:
            out += [("### Response:\n", False), (message["content"] + "</s>", True)]
            out.append(("\n\n" if number + 1 < len(rest) else "", False))
    return out


@dataclass(frozen=True)
class Real:
    """A model's template, what it writes, and which turns it takes.

    Attributes:
        jinja: None: one of qvera's named templates of the same name (Alpaca has no official Jinja text).
        eos: the tokenizer's.
        alternates: only user, assistant, user, ...; no tools.
        calls: it has a place for ``tool_calls``; ``single``: one at a time, and then no content.
    """

    jinja: str | None
    pieces: Callable[[Messages], Pieces]
    eos: str = "</s>"
    alternates: bool = False
    system: bool = True
    tools: bool = False
    calls: bool = False
    single: bool = False


# The models: meta-llama/Llama-2-7b-chat-hf, meta-llama/Llama-3.1-8B-Instruct, HuggingFaceTB/SmolLM2-135M-Instruct (ChatML, with
# a system prompt of its own where the conversation brings none), Qwen/Qwen2.5-7B-Instruct (ChatML with tools),
# mistralai/Mistral-7B-Instruct-v0.1, and HuggingFaceH4/zephyr-7b-beta, as TinyLlama/TinyLlama-1.1B-Chat-v1.0 has it.
REAL = {
    "llama-2": Real(_TEMPLATES["llama-2"], _llama_2, alternates=True),
    "llama-3.1": Real(_TEMPLATES["llama-3.1"], _llama_31, "<|eot_id|>", tools=True, calls=True, single=True),
    "chatml": Real(SMOLLM2, _smollm2, "<|im_end|>", tools=True),
    "qwen-2.5": Real(QWEN_25, _qwen_25, "<|im_end|>", tools=True, calls=True),
    "mistral": Real(_TEMPLATES["mistral"], _mistral, alternates=True, system=False),
    "zephyr": Real(_TEMPLATES["zephyr"], _zephyr),
    "alpaca": Real(None, _alpaca),
}
