"""The chat templates that a recipe can name, for models whose tokenizer brings none (or the wrong one)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """One format.

    Attributes:
        jinja: the template, as transformers' ``apply_chat_template`` takes it.
        needs: markers that the tokenizer must have as single tokens; without them the model could not learn to stop.
        reads_context: it has its own place for Alpaca's ``input``.
    """

    jinja: str
    needs: tuple[str, ...] = ()
    reads_context: bool = False


# Stanford Alpaca's two prompts, word for word (tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT); later turns repeat
# the headings. A system turn takes the place of the introduction.
_ALPACA = """\
{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] + '\\n\\n' }}\
{%- elif messages[0]['context'] is defined -%}\
{{ 'Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.\\n\\n' }}\
{%- else -%}\
{{ 'Below is an instruction that describes a task. \
Write a response that appropriately completes the request.\\n\\n' }}\
{%- endif -%}\
{%- for message in messages -%}\
{%- if message['role'] == 'user' -%}\
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}\
{%- if message['context'] is defined -%}{{ '### Input:\\n' + message['context'] + '\\n\\n' }}{%- endif -%}\
{%- elif message['role'] == 'assistant' -%}\
{{ '### Response:\\n' + message['content'] + eos_token }}\
{%- if not loop.last -%}{{ '\\n\\n' }}{%- endif -%}\
{%- elif message['role'] != 'system' or not loop.first -%}\
{{ raise_exception('the alpaca template has no place for a ' + message['role'] + ' turn') }}\
{%- endif -%}\
{%- endfor -%}\
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"""

_CHATML = """\
{%- for message in messages -%}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{%- endfor -%}\
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# Meta's reference (llama/generation.py, chat_completion): each exchange is its own <s> ... </s>.
_LLAMA_2 = """\
{%- if messages[0]['role'] == 'system' -%}\
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}{%- set turns = messages[1:] -%}\
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}\
{%- for message in turns -%}\
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] -%}\
{{ raise_exception('the llama-2 template needs user and assistant turns that alternate, the user first') }}\
{%- elif message['role'] == 'user' -%}\
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}\
{%- else -%}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{%- endif -%}\
{%- endfor -%}"""

_LLAMA_3 = """\
{{- bos_token -}}\
{%- for message in messages -%}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' }}\
{%- endfor -%}\
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""

# Mistral-7B-Instruct v0.1 to v0.3; the system prompt goes in front of the first user turn, as Mistral's guide has it.
_MISTRAL = """\
{%- if messages[0]['role'] == 'system' -%}\
{%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set turns = messages[1:] -%}\
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}\
{{- bos_token -}}\
{%- for message in turns -%}\
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] -%}\
{{ raise_exception('the mistral template needs user and assistant turns that alternate, the user first') }}\
{%- elif message['role'] == 'user' -%}\
{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}\
{%- else -%}{{ ' ' + message['content'] + eos_token }}{%- endif -%}\
{%- endfor -%}"""

# Zephyr, TinyLlama: headings in plain text, so a Llama-2 tokenizer needs no new tokens.
_ZEPHYR = """\
{%- for message in messages -%}\
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}\
{%- endfor -%}\
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

# Nothing between the turns: prompt, completion, end.
_PLAIN = """\
{%- for message in messages -%}\
{{ message['content'] }}{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}\
{%- endfor -%}"""

NAMED_TEMPLATES: dict[str, NamedTemplate] = {
    "alpaca": NamedTemplate(_ALPACA, reads_context=True),
    "chatml": NamedTemplate(_CHATML, needs=("<|im_start|>", "<|im_end|>")),
    "llama-2": NamedTemplate(_LLAMA_2),
    "llama-3": NamedTemplate(_LLAMA_3, needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": NamedTemplate(_MISTRAL),
    "zephyr": NamedTemplate(_ZEPHYR),
    "plain": NamedTemplate(_PLAIN),
}
