"""The Modelfile: Ollama gives the model the text that it was trained with."""

from __future__ import annotations

from typing import Any

import pytest

from qvera.data.chat_template import NAMED_TEMPLATES
from qvera.exporting.gguf.modelfile import known_template, modelfile
from tests.conftest import small_tokenizer
from tests.exporting.go_template import render

USER, OTHER = {"role": "user", "content": "3 red mugs"}, {"role": "user", "content": 'and {{ "two" }} more'}
ANSWER, SYSTEM = {"role": "assistant", "content": "Yes."}, {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one": [USER],
    "one, with a system prompt": [SYSTEM, USER],
    "several": [USER, ANSWER, OTHER],
    "several, with a system prompt": [SYSTEM, USER, ANSWER, OTHER, ANSWER, USER],
}


def tokenizer(template: str | None) -> Any:
    made = small_tokenizer()
    made.bos_token = "<|endoftext|>"
    made.chat_template = template
    return made


def template_in(text: str) -> str:
    return text.partition('TEMPLATE """')[2].partition('"""')[0]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_ollama_gives_the_same_text(name: str, conversation: str) -> None:
    own, messages = tokenizer(NAMED_TEMPLATES[name]), CONVERSATIONS[conversation]
    expected = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    template = template_in(modelfile("model.gguf", None, own, None))
    found = render(template, messages)
    assert found == expected.removeprefix(own.bos_token)  # llama.cpp puts that one there
    begun = {"role": "assistant", "content": "Ye"}  # an answer that is begun is gone on with
    space = " " if name in ("llama-2", "mistral") else ""
    assert render(template, [*messages, begun]) == found + space + "Ye"


def test_stop_texts_and_the_system_prompt_are_written() -> None:
    text = modelfile("model-f16.gguf", "lora.gguf", tokenizer(NAMED_TEMPLATES["chatml"]), 'Say "yes".')
    assert text.startswith('FROM ./model-f16.gguf\nADAPTER ./lora.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"\n' in text and text.endswith('SYSTEM """Say "yes"."""\n')
    text = modelfile("m.gguf", None, tokenizer(NAMED_TEMPLATES["alpaca"]), 'three """ quotes')
    assert 'PARAMETER stop "### Instruction:"' in text and "SYSTEM: left out" in text and '\nSYSTEM """' not in text


def test_a_template_is_known_by_what_it_writes() -> None:
    # Qwen 2.5's way: ChatML that adds a system prompt of its own where there is none
    own = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Q.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert known_template(tokenizer(own)) == ("chatml", "You are Q.")
    assert modelfile("m.gguf", None, tokenizer(own), None).endswith('SYSTEM """You are Q."""\n')
    assert modelfile("m.gguf", None, tokenizer(own), "Mine.").endswith('SYSTEM """Mine."""\n')
    assert known_template(tokenizer(None)) == ("plain", None)
    other = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    text = modelfile("m.gguf", None, tokenizer(other), None)
    assert "# TEMPLATE: none is known" in text and 'TEMPLATE """' not in text
    assert 'PARAMETER stop "<|im_end|>"' in text
