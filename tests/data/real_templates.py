"""The chat templates of real models, as their tokenizer_config.json has them, and what each writes, said again in Python.

The second half is the tests' oracle: a conversation as (text, trained) pieces, written from the models' documented formats
and not from qvera. `test_real_templates` holds it against what transformers renders before anything else is compared with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Pieces = list[tuple[str, bool]]

# meta-llama/Llama-2-7b-chat-hf
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and "
    "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)

# meta-llama/Meta-Llama-3-8B-Instruct
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# meta-llama/Llama-3.1-8B-Instruct
LLAMA_31 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message + builtin tools #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\\n\\n"}}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "You have access to the following functions. To call a function, please respond with JSON for a function call." }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{#- Custom tools are passed in a user message with some extra guidance #}
{%- if tools_in_user_message and not tools is none %}
    {#- Extract the first user message so we can plug it in here #}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- "Given the following functions, please respond with a JSON for a function call " }}
    {{- "with its proper arguments that best answers the given prompt.\\n\\n" }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
            {{- "<|python_tag|>" + tool_call.name + ".call(" }}
            {%- for arg_name, arg_val in tool_call.arguments | items %}
                {{- arg_name + '="' + arg_val + '"' }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- endif %}
                {%- endfor %}
            {{- ")" }}
        {%- else  %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}" }}
        {%- endif %}
        {%- if builtin_tools is defined %}
            {#- This means we're in ipython mode #}
            {{- "<|eom_id|>" }}
        {%- else %}
            {{- "<|eot_id|>" }}
        {%- endif %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# HuggingFaceTB/SmolLM2-135M-Instruct: ChatML, with a system prompt of its own where the conversation brings none
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Qwen/Qwen2.5-7B-Instruct: ChatML with tools
QWEN_25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function \
signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n\
</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not \
message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# mistralai/Mistral-7B-Instruct-v0.1
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

# HuggingFaceH4/zephyr-7b-beta, TinyLlama/TinyLlama-1.1B-Chat-v1.0
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)

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


def _llama_3(messages: Messages) -> Pieces:
    out: Pieces = [("<s>", False)]
    for message in messages:
        answer = message["role"] == "assistant"
        out.append((f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False))
        out.append((message["content"].strip() + "<|eot_id|>", answer))
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


def _smollm2(messages: Messages) -> Pieces:
    out: Pieces = []
    if messages[0]["role"] != "system":
        out.append((f"<|im_start|>system\n{_SMOL_DEFAULT}<|im_end|>\n", False))
    for message in messages:
        out.append((f"<|im_start|>{message['role']}\n", False))
        out.append((message["content"] + "<|im_end|>", message["role"] == "assistant"))
        out.append(("\n", False))
    return out


def _qwen_25(messages: Messages) -> Pieces:
    system = messages[0]["content"] if messages[0]["role"] == "system" else _QWEN_DEFAULT
    out: Pieces = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(rest):
        if message["role"] == "tool":
            opens = number == 0 or rest[number - 1]["role"] != "tool"
            closes = number + 1 == len(rest) or rest[number + 1]["role"] != "tool"
            text = f"\n<tool_response>\n{message['content']}\n</tool_response>"
            out.append((("<|im_start|>user" if opens else "") + text + ("<|im_end|>\n" if closes else ""), False))
            continue
        written = message["content"]
        if message.get("tool_calls"):
            calls = [
                f'\n<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
                f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}}}\n</tool_call>"
                for call in message["tool_calls"]
            ]
            # the line break behind the role is the generation prompt's
            written = "".join([f"\n{written}" if written else "", *calls])[1:]
        out.append((f"<|im_start|>{message['role']}\n", False))
        out.append((written + "<|im_end|>", message["role"] == "assistant"))
        out.append(("\n", False))
    return out


def _mistral(messages: Messages) -> Pieces:
    out: Pieces = [("<s>", False)]
    for message in messages:
        if message["role"] == "user":
            out.append((f"[INST] {message['content']} [/INST]", False))
        else:
            out += [(message["content"] + "</s>", True), (" ", False)]
    return out


def _zephyr(messages: Messages) -> Pieces:
    out: Pieces = []
    for message in messages:
        out.append((f"<|{message['role']}|>\n", False))
        out += [(message["content"] + "</s>", message["role"] == "assistant"), ("\n", False)]
    return out


def _alpaca(messages: Messages) -> Pieces:
    """Stanford's PROMPT_DICT; later turns repeat the headings."""
    intro = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    own = messages[0]["role"] == "system"
    out: Pieces = [(messages[0]["content"] + "\n\n" if own else intro, False)]
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


REAL = {
    "llama-2": Real(LLAMA_2, _llama_2, alternates=True),
    "llama-3": Real(LLAMA_3, _llama_3, "<|eot_id|>", tools=True),
    "llama-3.1": Real(LLAMA_31, _llama_31, "<|eot_id|>", tools=True, calls=True, single=True),
    "chatml": Real(SMOLLM2, _smollm2, "<|im_end|>", tools=True),
    "qwen-2.5": Real(QWEN_25, _qwen_25, "<|im_end|>", tools=True, calls=True),
    "mistral": Real(MISTRAL, _mistral, alternates=True, system=False),
    "zephyr": Real(ZEPHYR, _zephyr),
    "alpaca": Real(None, _alpaca),
}
