"""Chat templates that write tools, as short as they can be: in the forms of Hermes and Qwen, of Llama 3.1, and others."""

_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)
_TURNS = (
    "{%% for message in messages %%}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%% for call in message.tool_calls or [] %%}%s{%% endfor %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
_JSON = '{"name": "{{ call.function.name }}", "%s": {{ call.function.arguments | tojson }}}'
HERMES = _TOOLS + _TURNS % f"{{{{ '\\n' }}}}<tool_call>\n{_JSON % 'arguments'}\n</tool_call>"
LLAMA = _TOOLS + _TURNS % (_JSON % "parameters")
CODER = _TOOLS + _TURNS % (
    "<tool_call>\n<function={{ call.function.name }}>\n{% for name, value in call.function.arguments | items %}"
    "<parameter={{ name }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
STRANGE = _TOOLS + _TURNS % "[CALL] {{ call.function.name }}({{ call.function.arguments }})"
