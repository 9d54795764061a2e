"""Which tokens are trained: for every template, exactly what the model has to write, end of turn included.

Random conversations go through our templates and those of real models. For the latter the expected mask comes from
`real_templates` and the tokenizer's own offsets, never from qvera.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qvera.data import NAMED_TEMPLATES, Encoder, Example, Turn, resolve_template
from qvera.utils.errors import InputError
from tests.data.conftest import MARKERS, MakeTokenizer
from tests.data.real_templates import LLAMA_3, QWEN_25, REAL, SMOLLM2, Messages, Pieces
from tests.data.rows import build, decoded, one, trained_text

pytestmark = pytest.mark.process

# What the model writes for an answer: (before the answer, what becomes of the answer, after it), per template.
WRITTEN: dict[str, Any] = {
    "alpaca": lambda answer, eos: answer + eos,
    "plain": lambda answer, eos: answer + eos,
    "zephyr": lambda answer, eos: answer + eos,
    "chatml": lambda answer, eos: answer + "<|im_end|>",
    "llama-2": lambda answer, eos: f" {answer.strip()} {eos}",
    "llama-3": lambda answer, eos: answer.strip() + "<|eot_id|>",
    "mistral": lambda answer, eos: f" {answer}{eos}",
    "smollm2": lambda answer, eos: answer + "<|im_end|>",
}
# What a careless mask trips over: the templates' own markers and headings, white space, letters of several bytes.
PIECES = [
    "yes",
    " ",
    "\n",
    "\n\n",
    "\t",
    "  x  ",
    "a b",
    "é日",
    "🙂",
    "e\u0301",
    "\u2028",
    "assistant",
    "{{ x }}",
    "[/INST]",
]
PIECES += [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "</s>",
    "<s>",
    "[INST] ",
    "### Response:\n",
    "<</SYS>>\n\n",
]
PIECES += ["<|start_header_id|>assistant<|end_header_id|>\n\n", "<|assistant|>\n", "</tool_call>", "QveraSlot0001Zq7"]
PIECES += ["{% generation %}"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=8), max_size=6).map("".join)
ANSWERS = TEXTS.filter(lambda text: text.strip() != "")


def tokenizer_for(template: str, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue("smollm2_tokenizer" if template == "smollm2" else "base_tokenizer")


@pytest.mark.parametrize("template", list(WRITTEN))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exchanges=st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3), system=st.none() | ANSWERS)
def test_trained_tokens_are_the_answers_and_their_ends(
    template: str, exchanges: list[tuple[str, str]], system: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = tokenizer_for(template, request)
    # some characters (a byte order mark, say) leave no token; such an answer is refused (hypothesis 6.100 gives blank
    # ones too)
    assume(all(answer.strip() and tokenizer.encode(answer, add_special_tokens=False) for _, answer in exchanges))
    turns = [("system", system)] if system else []
    for question, answer in exchanges:
        turns += [("user", question), ("assistant", answer)]
    name = "auto" if template == "smollm2" else template
    example = one(tmp_path, turns, tokenizer, template=name, max_length=100_000)
    expected = "".join(WRITTEN[template](answer, tokenizer.eos_token) for _, answer in exchanges)
    assert trained_text(tokenizer, example) == expected
    # The whole row is what transformers itself makes of the conversation, BOS apart.
    jinja = SMOLLM2 if template == "smollm2" else NAMED_TEMPLATES[template]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False)
    whole = decoded(tokenizer, example.input_ids)
    assert whole in (text, f"<s>{text}")
    # What is generated from is everything before the last answer, and ends on a token boundary.
    last = WRITTEN[template](exchanges[-1][1], tokenizer.eos_token)
    assert decoded(tokenizer, example.prompt_ids) == whole[: whole.rindex(last)]
    assert example.input_ids[: len(example.prompt_ids)].tolist() == example.prompt_ids.tolist()
    assert example.reference == exchanges[-1][1]


@pytest.mark.parametrize("template", list(NAMED_TEMPLATES))
@pytest.mark.parametrize("adds_bos", [True, False])
def test_one_bos_where_the_model_wants_one(
    template: str, adds_bos: bool, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    example = one(tmp_path, [("user", "hi"), ("assistant", "yes")], tokenizer, template=template)
    writes_bos = "bos_token" in NAMED_TEMPLATES[template]
    bos = (example.input_ids == tokenizer.bos_token_id).nonzero()[0].tolist()
    assert bos == ([0] if adds_bos or writes_bos else [])
    prompt_bos = (example.prompt_ids == tokenizer.bos_token_id).nonzero()[0].tolist()
    assert prompt_bos == bos


def test_bos_that_opens_every_turn_is_not_added_to(smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "yes")]
    example = one(tmp_path, turns, smollm2_tokenizer)
    messages = [{"role": role, "content": content} for role, content in turns]
    own = smollm2_tokenizer.apply_chat_template(messages, return_dict=False)
    assert example.input_ids.tolist() == own
    assert "named SmolLM" in example.prompt_text
    assert example.prompt_text.endswith("<|im_start|>assistant\n")


def test_text_rows_train_everything_and_end(base_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    example = build(tmp_path, [{"text": "Blue. "}], base_tokenizer).train[0]
    assert decoded(base_tokenizer, example.input_ids) == "<s>Blue. </s>"
    assert example.trained.tolist() == [False] + [True] * (len(example.input_ids) - 1)
    assert len(example.prompt_ids) == 0
    assert example.reference is None


def test_text_without_bos_does_not_count_the_first_token(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(adds_bos=False)
    example = build(tmp_path, [{"text": "Blue"}], tokenizer).train[0]
    assert not example.trained[0]
    assert example.trained[1:].all()
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_auto_without_a_chat_template(base_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    plain = build(tmp_path, [{"prompt": "name: x ->", "completion": " y"}], base_tokenizer)
    assert plain.stats.template == "plain"
    assert decoded(base_tokenizer, plain.train[0].input_ids) == "<s>name: x -> y</s>"
    assert trained_text(base_tokenizer, plain.train[0]) == " y</s>"
    alpaca = build(tmp_path, [{"instruction": "Add.", "input": "1, 2", "output": "3"}], base_tokenizer)
    assert alpaca.stats.template == "alpaca"
    assert decoded(base_tokenizer, alpaca.train[0].input_ids) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:\n3</s>"
    )
    no_input = build(tmp_path, [{"instruction": "Add.", "input": "", "output": "3"}], base_tokenizer).train[0]
    assert no_input.prompt_text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )


def test_alpaca_input_follows_the_instruction_elsewhere(
    smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    example = build(tmp_path, [{"instruction": "Add.", "input": "1, 2", "output": "3"}], smollm2_tokenizer).train[0]
    assert "<|im_start|>user\nAdd.\n\n1, 2<|im_end|>" in example.prompt_text


TWO = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second"), ("user", "three")]


def test_train_on(smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer = smollm2_tokenizer
    assert trained_text(tokenizer, one(tmp_path, TWO, tokenizer)) == "first<|im_end|>second<|im_end|>"
    assert trained_text(tokenizer, one(tmp_path, TWO, tokenizer, train_on="last")) == "second<|im_end|>"
    everything = one(tmp_path, TWO, tokenizer, train_on="all")
    assert everything.trained.tolist() == [False] + [True] * (len(everything.input_ids) - 1)
    assert one(tmp_path, TWO, tokenizer).reference is None  # a user turn ends it: there is no answer to compare with


def test_the_rows_own_word_on_turns(smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    messages = [{"role": role, "content": content} for role, content in TWO[:4]]
    messages[1]["weight"] = 0  # type: ignore[assignment]
    example = build(tmp_path, [{"messages": messages}], smollm2_tokenizer).train[0]
    assert trained_text(smollm2_tokenizer, example) == "second<|im_end|>"


def test_tool_calls_are_trained(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% if m.tool_calls %}"
        "{{ '<|eot_id|>' + m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    example = build(tmp_path, [{"messages": messages}], tokenizer).train[0]
    assert trained_text(tokenizer, example) == '<|eot_id|>[{"name": "f"}]<|im_end|>It is 42.<|im_end|>'


def test_a_prompt_and_an_answer_never_share_a_token(smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer = smollm2_tokenizer
    merged = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert len(merged) == 1, "the tokenizer has to merge two line breaks for this test to mean something"
    example = one(tmp_path, [("user", "q"), ("assistant", "\n\nyes")], tokenizer)
    assert trained_text(tokenizer, example) == "\n\nyes<|im_end|>"
    prompt = tokenizer(example.prompt_text, add_special_tokens=False)["input_ids"]
    assert example.prompt_ids.tolist() == prompt


@pytest.mark.parametrize("answer", ["yes", " yes", "\n\nyes\n\n", "  a\n\n  b "])
def test_trimmed_offsets(answer: str, make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(trim_offsets=True)
    example = one(tmp_path, [("user", "say "), ("assistant", answer)], tokenizer, template="plain")
    assert trained_text(tokenizer, example) == answer + "</s>"


def test_a_tokenizer_without_offsets_gives_the_same(
    smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = one(tmp_path, TWO, smollm2_tokenizer)
    call = PreTrainedTokenizerFast.__call__

    def without_offsets(self: Any, text: Any, **kwargs: Any) -> Any:
        return dict(call(self, text, **kwargs))  # what a tokenizer written in Python returns holds no encodings

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", without_offsets)
    slow = one(tmp_path, TWO, smollm2_tokenizer)
    assert slow.input_ids.tolist() == fast.input_ids.tolist()
    assert slow.trained.tolist() == fast.trained.tolist()


# In the manner of Qwen3: reasoning is kept in the last answer and taken out of earlier ones.
REWRITES = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_answers(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=REWRITES)
    turns = [("user", "q"), ("assistant", "<think>a</think>\nb"), ("user", "r"), ("assistant", "<think>c</think>\nd")]
    with pytest.raises(InputError, match=r"rows\.jsonl:1: the chat template .* rewrites turn 2"):
        one(tmp_path, turns, tokenizer)
    last = one(tmp_path, turns, tokenizer, train_on="last")
    assert trained_text(tokenizer, last) == "<think>c</think>\nd<|im_end|>"
    assert trained_text(tokenizer, one(tmp_path, TWO, tokenizer)) == "first<|im_end|>second<|im_end|>"


# In the manner of Qwen3: the last answer opens with a think block that is empty, earlier ones are written without.
THINKS_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m.content }}"
    "{% endgeneration %}{{ eos_token + '\n' }}{% else %}{{ 'Q: ' + m.content + '\n' }}{% endif %}{% endfor %}"
)


def rewrites_in_blocks(block: str) -> str:
    marked = "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}" + block + "{% else %}"
    marked += "{{ c + '<|im_end|>\n' }}{% endif %}"
    return REWRITES.replace("{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}", marked)


THOUGHTS = [("user", "q"), ("assistant", "<think>a</think>\nb"), ("user", "r"), ("assistant", "<think>c</think>\nd")]
BREAKS = [("user", "q"), ("assistant", "\n\nyes\n"), ("user", "r"), ("assistant", "no\n")]
# template, turns, what is trained, how the prompt of the last answer ends
PLACED: dict[str, tuple[str, list[tuple[str, str]], str, str]] = {
    "generation blocks": (BLOCKS, TWO, "first</s>second</s>", ""),
    "blocks with the end of turn, around answers that are rewritten": (
        rewrites_in_blocks("{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"),
        THOUGHTS,
        "b<|im_end|><think>c</think>\nd<|im_end|>",
        "",
    ),
    "blocks without the end of turn, around answers that are rewritten": (
        rewrites_in_blocks("{% generation %}{{ c }}{% endgeneration %}{{ '<|im_end|>\n' }}"),
        THOUGHTS,
        "b<|im_end|><think>c</think>\nd<|im_end|>",
        "",
    ),
    "line breaks are stripped": (
        REWRITES.replace("{% set c = m.content %}", "{% set c = m.content.strip('\n') %}"),
        BREAKS,
        "yes<|im_end|>no<|im_end|>",
        "",
    ),
    "more is written before the last answer": (
        THINKS_LAST,
        TWO[:4],
        "first<|im_end|><think>\n\n</think>\n\nsecond<|im_end|>",
        "two<|im_end|>\n<|im_start|>assistant\n",
    ),
    "no generation prompt": (NO_PROMPT, TWO[:4], "first\nsecond\n</s>", "user: two\nassistant: "),
    "no end of turn": (
        NO_PROMPT + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        TWO[:4],
        "first\nsecond\n</s>",
        "user: two\nassistant: ",
    ),
}


@pytest.mark.parametrize(("jinja", "turns", "trained", "prompt"), PLACED.values(), ids=list(PLACED))
def test_answers_are_placed_whatever_the_template_does(
    jinja: str, turns: Any, trained: str, prompt: str, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(chat_template=jinja)
    example = one(tmp_path, turns, tokenizer)
    assert trained_text(tokenizer, example) == trained
    assert example.prompt_text.endswith(prompt)
    if trained.endswith("</s>") and jinja is not BLOCKS:
        assert decoded(tokenizer, example.input_ids).count("</s>") == 1


def test_names_and_needs(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    row = [("user", "a"), ("assistant", "b")]
    with pytest.raises(InputError, match="no template is called 'lama-2'; did you mean 'llama-2'"):
        one(tmp_path, row, make_tokenizer(), template="lama-2")
    with pytest.raises(InputError, match="has no chat template. Name one: alpaca"):
        one(tmp_path, row, make_tokenizer(), template="tokenizer")
    bare = make_tokenizer(markers=[])
    with pytest.raises(InputError, match=r"chatml needs <\|im_start\|>, <\|im_end\|>.*work with it: alpaca, llama-2"):
        one(tmp_path, row, bare, template="chatml")
    assert trained_text(bare, one(tmp_path, row, bare, template="zephyr")) == "b</s>"


@pytest.mark.parametrize("template", ["plain", "zephyr", "llama-2"])
def test_a_tokenizer_written_in_python(template: str, tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    example = one(tmp_path, TWO[:4], tokenizer, template=template)
    answers = [WRITTEN[template](answer, "</s>") for answer in ("first", "second")]
    # Such tokenizers drop white space beside special tokens, in any text; everything else is exact.
    assert trained_text(tokenizer, example).replace(" ", "") == "".join(answers).replace(" ", "")
    assert "".join(decoded(tokenizer, example.prompt_ids).split()) == "".join(example.prompt_text.split())


def test_no_eos_is_added_behind_an_answer_that_is_not_trained(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=NO_PROMPT)
    messages: list[Any] = [{"role": role, "content": content} for role, content in TWO[:4]]
    messages[3]["weight"] = 0
    example = build(tmp_path, [{"messages": messages}], tokenizer).train[0]
    assert trained_text(tokenizer, example) == "first\n"
    assert tokenizer.eos_token_id not in example.input_ids.tolist()


@pytest.mark.parametrize("template", [*NAMED_TEMPLATES, "tokenizer"])
def test_chat_prompts_are_those_of_training(template: str, make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=NO_PROMPT)
    for turns in (TWO[:2], TWO[:4]):
        example = one(tmp_path, turns, tokenizer, template=template)
        text, starts = resolve_template(template, tokenizer).prompt([Turn(*turn) for turn in turns[:-1]])
        assert text == example.prompt_text
        assert Encoder(tokenizer).encode_prompt(text, starts) == example.prompt_ids.tolist()


def test_a_token_across_the_end_of_an_answer_belongs_to_it(base_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(base_tokenizer)
    whole = base_tokenizer("yes\n\n", add_special_tokens=False)["input_ids"]
    assert base_tokenizer.decode(whole[-1:]) == "\n\n"
    assert encoder.encode(["yes\n\n"], [[(0, 0, len("yes\n"))]]) == [(whole, [(0, 0, len(whole))])]


def test_a_turn_of_weight_0_is_not_trained_where_all_text_is(
    smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "right"},
    ]
    found = build(tmp_path, [{"messages": messages}], smollm2_tokenizer, train_on="all").train[0]
    text = trained_text(smollm2_tokenizer, found)
    assert "wrong" not in text and "one" in text and "right" in text


def test_the_prompt_of_a_row_is_not_trained_though_an_assistant_speaks_in_it(
    smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As in TRL, whose conversational rows have examples in their prompts; a CSV has the lists as JSON."""
    asked = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "shown"},
        {"role": "user", "content": "3 + 3?"},
    ]
    answer = [{"role": "assistant", "content": "six"}]
    plain = build(tmp_path, [{"prompt": asked, "completion": answer}], smollm2_tokenizer).train[0]
    assert trained_text(smollm2_tokenizer, plain) == "six<|im_end|>"
    texts = {"prompt": json.dumps(asked), "completion": json.dumps(answer)}
    as_text = build(tmp_path, [texts], smollm2_tokenizer).train[0]
    assert as_text.input_ids.tolist() == plain.input_ids.tolist()
    data = [{"prompt": '[{"a": 1}]', "completion": "a\n1"}]  # JSON that is no messages is the text that it is
    assert '[{"a": 1}]' in decoded(smollm2_tokenizer, build(tmp_path, data, smollm2_tokenizer).train[0].input_ids)


def test_a_short_target_leaves_the_prompt_of_the_last_turn_whole(
    smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    turns = [("user", "one"), ("assistant", "first answer"), ("user", "two"), ("assistant", "final")]
    whole = one(tmp_path, turns, smollm2_tokenizer)
    cut = one(tmp_path, turns, smollm2_tokenizer, max_target_length=3)
    assert len(cut.input_ids) < len(whole.input_ids)
    assert cut.prompt_ids.tolist() == whole.prompt_ids.tolist()
    lead = cut.trained.tolist().index(True)  # the row is cut at its start too, so the prompt loses its beginning
    short = one(tmp_path, turns, smollm2_tokenizer, max_target_length=3, max_length=lead + 2, too_long="cut-start")
    assert short.prompt_ids[-8:].tolist() == whole.prompt_ids[-8:].tolist()


_PLAIN = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), min_size=1, max_size=8)
_ARGUMENTS = st.dictionaries(st.sampled_from(["city", "größe", "n"]), _PLAIN | st.integers(), max_size=2)


def tokenizer_of(name: str, make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    real = REAL[name]
    return make_tokenizer(
        eos=real.eos,
        pad=None if name == "llama-2" else "<pad>",
        adds_bos=name not in ("chatml", "qwen-2.5"),
        chat_template=real.jinja,
        markers=[*MARKERS, "<|eom_id|>", "<|python_tag|>"],
    )


def call_of(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@st.composite
def conversations(draw: Any, name: str) -> Messages:
    """Turns that the model's template takes, the last one an assistant's or not."""
    real = REAL[name]
    messages: Messages = []
    if real.system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        if real.tools:
            for _ in range(draw(st.integers(0, 2))):
                answer: dict[str, Any] = {"role": "assistant", "content": draw(TEXTS)}
                if real.calls:
                    count = 1 if real.single else draw(st.integers(1, 2))
                    answer["tool_calls"] = [call_of("look_up", draw(_ARGUMENTS)) for _ in range(count)]
                messages.append(answer)
                for _ in range(draw(st.integers(1, 2))):
                    messages.append({"role": "tool", "content": draw(TEXTS)})
        messages.append({"role": "assistant", "content": draw(TEXTS)})
    if not real.alternates and draw(st.booleans()):
        messages.append({"role": "user", "content": draw(TEXTS)})
    return messages


def answerable(tokenizer: PreTrainedTokenizerFast, messages: Messages) -> bool:
    """Not a row that is refused: some answer has a token (some characters leave none, a byte order mark for one)."""
    return any(
        m.get("tool_calls")
        or (m["content"].strip() and tokenizer.encode(m["content"].strip(), add_special_tokens=False))
        for m in messages
        if m["role"] == "assistant"
    )


def expected(tokenizer: PreTrainedTokenizerFast, pieces: Pieces, whole: bool = False) -> tuple[list[int], list[bool]]:
    """Ids and mask of the pieces' text, cut where answers begin (or in one piece), by the tokenizer's offsets."""
    cuts: list[Pieces] = [[]]
    for piece in pieces:
        if piece[1] and cuts[-1] and not whole:
            cuts.append([])
        cuts[-1].append(piece)
    ids: list[int] = []
    mask: list[bool] = []
    for part in cuts:
        text = "".join(piece for piece, _ in part)
        wanted = np.concatenate([np.full(len(piece), trained) for piece, trained in part]).astype(bool)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids += encoding["input_ids"]
        mask += [bool(wanted[low:high].any()) for low, high in encoding["offset_mapping"]]
    return ids, mask


def row(tmp_path: Path, messages: Messages, tokenizer: PreTrainedTokenizerFast, **section: Any) -> Example:
    return build(tmp_path, [{"messages": messages}], tokenizer, max_length=100_000, **section).train[0]


def with_examples(count: int) -> Any:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", list(REAL))
@with_examples(15)
@given(data=st.data())
def test_trained_is_what_the_assistant_says_and_its_end(
    name: str, data: st.DataObject, tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = tokenizer_of(name, make_tokenizer)
    messages = data.draw(conversations(name))
    assume(answerable(tokenizer, messages))
    pieces = REAL[name].pieces(messages)
    jinja = REAL[name].jinja or NAMED_TEMPLATES["alpaca"]
    text = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False)
    assert text == "".join(piece for piece, _ in pieces), "the oracle has to know this template"
    example = row(tmp_path, messages, tokenizer, template="auto" if REAL[name].jinja else name)
    ids, mask = expected(tokenizer, pieces)
    got = example.input_ids.tolist()
    shift = len(got) - len(ids)  # one BOS where the model wants one and the text has none
    assert got[shift:] == ids
    assert got[:shift] == [tokenizer.bos_token_id] * shift
    assert shift <= 1
    assert example.trained.tolist() == [False] * shift + mask
    assert decoded(tokenizer, example.input_ids[example.trained]) == "".join(piece for piece, on in pieces if on)
    ends = REAL[name].eos
    for piece in (piece for piece, on in pieces if on):
        assert piece.endswith(ends)


@pytest.mark.parametrize("name", ["llama-2", "mistral", "alpaca", "zephyr"])
@with_examples(8)
@given(data=st.data())
def test_the_same_with_a_sentencepiece_tokenizer(
    name: str, data: st.DataObject, tmp_path: Path, llama2_tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = data.draw(conversations(name))
    assume(answerable(llama2_tokenizer, messages))
    jinja = REAL[name].jinja or NAMED_TEMPLATES["alpaca"]
    llama2_tokenizer.chat_template = REAL[name].jinja
    try:
        example = row(tmp_path, messages, llama2_tokenizer, template="auto" if REAL[name].jinja else name)
    finally:
        llama2_tokenizer.chat_template = None
    pieces = REAL[name].pieces(messages)
    assert llama2_tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False) == "".join(
        piece for piece, _ in pieces
    )
    ids, mask = expected(llama2_tokenizer, pieces, whole=True)
    got, bos = example.input_ids.tolist(), llama2_tokenizer.bos_token_id
    shift = len(got) - len(ids)
    assert got[shift:] == ids  # in one piece: a space would be put in front of every further one
    assert shift <= 1 and got[0] == bos != got[1]
    assert example.trained.tolist() == [False] * shift + mask


_TOOL_TURN = ("user", "assistant", "tool", "assistant")
_TWO_QUESTIONS = ("user", "user", "assistant")


@pytest.mark.parametrize(
    ("name", "roles"), [*((name, _TOOL_TURN) for name in ("llama-2", "mistral", "alpaca")), ("llama-2", _TWO_QUESTIONS)]
)
def test_a_template_that_refuses_a_row_is_named_with_the_roles(
    name: str, roles: tuple[str, ...], tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    messages = [{"role": role, "content": "x"} for role in roles]
    words = rf"rows\.jsonl:1: the chat template .* refuses the row: .*roles are {', '.join(roles)}"
    with pytest.raises(InputError, match=words):
        row(tmp_path, messages, tokenizer_of(name, make_tokenizer), template="auto" if REAL[name].jinja else name)


def _marked(jinja: str, plain: str, marked: str) -> str:
    assert jinja.count(plain) == 1
    return jinja.replace(plain, marked)


_QWEN_PLAIN = "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
_LLAMA_3_PLAIN = (
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
)
_SMOL_PLAIN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
# Where authors put their blocks: around the content; with the token that ends it; with the line break behind that, too; and, as
# SmolLM3 does, around the whole turn, its heading included.
MARKED = {
    "content": (
        "chatml",
        _marked(
            SMOLLM2,
            _SMOL_PLAIN,
            "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
            "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{'<|im_end|>' + '\n'}}",
        ),
    ),
    "content and end": (
        "llama-3",
        _marked(
            LLAMA_3,
            _LLAMA_3_PLAIN,
            "{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n"
            "\n' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}"
            "{% endgeneration %}"
            "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}",
        ),
    ),
    "content, end and line break": (
        "qwen-2.5",
        _marked(
            _marked(
                QWEN_25,
                _QWEN_PLAIN,
                "        {{- '<|im_start|>' + message.role + '\\n' }}\n        {%- if message.role == 'assistant' %}"
                "{%+ generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}\n        {%- else %}"
                "{{- message.content + '<|im_end|>\\n' }}{%- endif %}",
            ),
            "        {%- if message.content %}\n            {{- '\\n' + message.content }}\n        {%- endif %}\n",
            "        {%- generation %}\n        {%- if message.content %}\n            {{- '\\n' + message.content }}\n"
            "        {%- endif %}\n",
        ).replace(
            "        {%- endfor %}\n        {{- '<|im_end|>\\n' }}",
            "        {%- endfor %}\n        {{- '<|im_end|>\\n' }}{%- endgeneration %}",
        ),
    ),
    "the whole turn": (
        "chatml",
        _marked(
            SMOLLM2,
            _SMOL_PLAIN,
            "{% if message['role'] == 'assistant' %}{% generation %}"
            + _SMOL_PLAIN
            + "{% endgeneration %}{% else %}"
            + _SMOL_PLAIN
            + "{% endif %}",
        ),
    ),
}


@pytest.mark.parametrize("style", list(MARKED))
@with_examples(8)
@given(data=st.data())
def test_generation_blocks_agree_with_the_template_without_them(
    style: str, data: st.DataObject, tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    name, jinja = MARKED[style]
    messages = data.draw(conversations(name))
    tokenizer = tokenizer_of(name, make_tokenizer)
    assume(answerable(tokenizer, messages))
    plain = row(tmp_path, messages, tokenizer)
    tokenizer.chat_template = jinja
    assert re.search(r"\{%[-+]? *generation", jinja)
    marked = row(tmp_path, messages, tokenizer)
    assert marked.input_ids.tolist() == plain.input_ids.tolist()
    assert marked.trained.tolist() == plain.trained.tolist()
    assert marked.prompt_ids.tolist() == plain.prompt_ids.tolist()


def test_generation_blocks_are_what_transformers_makes_of_them(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    """With the end of turn inside of the block there is nothing to add: the mask is transformers' own."""
    name, jinja = MARKED["content and end"]
    tokenizer = tokenizer_of(name, make_tokenizer)
    tokenizer.chat_template = jinja
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " first\n"},
        {"role": "tool", "content": "assistant"},
        {"role": "assistant", "content": "<|eot_id|> 🙂"},
    ]
    own = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    trained = np.asarray(own["input_ids"])[np.asarray(own["assistant_masks"], bool)]
    example = row(tmp_path, messages, tokenizer)
    # by text: qvera starts an answer on a token of its own, so that a generation prompt has the ids it had in training
    assert decoded(tokenizer, example.input_ids) == decoded(tokenizer, own["input_ids"])
    assert decoded(tokenizer, example.input_ids[example.trained]) == decoded(tokenizer, trained)


_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}
_CALLED: Messages = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [call_of("look_up", {})]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "Sun."},
]
_NO_TOOL_TURNS = "{% for m in messages if m['role'] != 'tool' %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("row", "jinja", "part"),
    [
        ({"messages": _CALLED[:1] + _CALLED[3:], "tools": [_TOOL]}, SMOLLM2, "tools"),
        ({"messages": _CALLED}, SMOLLM2, "tool_calls"),
        ({"messages": _CALLED[:1] + _CALLED[2:]}, _NO_TOOL_TURNS, "turns of the role tool"),
    ],
    ids=["tools", "calls", "answers of tools"],
)
def test_a_template_that_passes_over_a_part_is_refused(
    row: dict[str, Any], jinja: str, part: str, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(chat_template=jinja)
    with pytest.raises(InputError, match=rf"rows.jsonl:2.*does not write {part}, so the model would not see them"):
        build(tmp_path, [{"messages": _CALLED[:1] + _CALLED[3:]}, row], tokenizer)
    with pytest.raises(InputError, match=f"does not write {part}"):
        asked = row["messages"][:-1]
        turns = [Turn(m["role"], m["content"], extra={k: m[k] for k in m if k == "tool_calls"}) for m in asked]
        resolve_template("auto", tokenizer).prompt(turns, row.get("tools"))


_MISTRAL_SYSTEM = """{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and messages[0]['role'] ==
'system' %}{{ messages[0]['content'] }} {% endif %}{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %}{{ m['content']
+ eos_token }}{% endif %}{% endfor %}"""  # the system turn is written where the last turn is a user's, as Mistral 0.3 has it


def test_a_template_that_writes_a_part_in_prompts_alone_is_refused_in_rows_alone(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(chat_template=_MISTRAL_SYSTEM)
    turns = [{"role": "system", "content": "Be brief."}, *_CALLED[:1], *_CALLED[3:]]
    text, _ = resolve_template("auto", tokenizer).prompt([Turn("system", "Be brief."), Turn("user", "hi")])
    assert text == "[INST] Be brief. hi[/INST]"
    with pytest.raises(InputError, match=r"role system.*Name another data.template \(.*mistral"):
        build(tmp_path, [{"messages": turns}], tokenizer)


def test_parts_that_say_nothing_are_not_missed(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    """Arrow gives every turn the keys of all turns."""
    silent = "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    turns = [{"role": "system", "content": ""}, *_CALLED[:1], {**_CALLED[3], "tool_calls": []}]
    found = build(tmp_path, [{"messages": turns}], make_tokenizer(chat_template=silent))
    assert len(found.train) == 1


def test_calls_are_objects_without_keys_that_only_other_rows_have(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    """OpenAI's API has arguments as JSON texts, and Parquet gives every object the keys of all objects."""
    tokenizer = tokenizer_of("qwen-2.5", make_tokenizer)
    texts = []
    for arguments in ({"city": "Rome"}, '{"city": "Rome"}', {"city": "Rome", "x": None}):
        called = [_CALLED[0], {**_CALLED[1], "tool_calls": [call_of("look_up", arguments)]}, *_CALLED[2:]]
        tool = {**_TOOL, "function": {**_TOOL["function"], "strict": None}}
        texts.append(build(tmp_path, [{"messages": called, "tools": [tool]}], tokenizer).train[0].input_ids.tolist())
    assert texts[0] == texts[1] == texts[2]
    assert '"arguments": {"city": "Rome"}}' in decoded(tokenizer, texts[0])
    assert "null" not in decoded(tokenizer, texts[0])


def test_reasoning_is_trained_where_the_template_writes_it(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    writes = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}</s>"
    jinja = "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}<|assistant|>"
    ends = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = make_tokenizer(chat_template=f"{jinja}{writes}{ends}")
    row = {"messages": [*_CALLED[:1], {**_CALLED[3], "reasoning_content": "June."}]}
    found = build(tmp_path, [row], tokenizer).train[0]
    assert decoded(tokenizer, found.input_ids[found.trained]) == "<think>June.</think>Sun.</s>"
    with pytest.raises(InputError, match="does not write reasoning_content"):
        build(tmp_path, [row], make_tokenizer(chat_template=SMOLLM2))


def test_a_later_system_turn_is_looked_at_by_itself(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    written = "{% if m['role'] != 'system' or loop.first %}{{ m['content'] + eos_token }}{% endif %}"
    first_only = f"{{% for m in messages %}}{written}{{% endfor %}}"
    ordinary = [{"role": "system", "content": "Be brief."}, *_CALLED[:1], *_CALLED[3:]]
    later = [*ordinary, {"role": "system", "content": "Now at length."}, *_CALLED[:1], *_CALLED[3:]]
    with pytest.raises(InputError, match=r"rows.jsonl:2.*does not write system turns behind the first turn"):
        build(tmp_path, [{"messages": ordinary}, {"messages": later}], make_tokenizer(chat_template=first_only))


def test_a_tokenizer_with_a_template_for_tools_is_told_of_it(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template={"default": SMOLLM2, "tool_use": QWEN_25})
    row = {"messages": _CALLED[:1] + _CALLED[3:], "tools": [_TOOL]}
    with pytest.raises(InputError, match="Make the tokenizer's template tool_use its only one"):
        build(tmp_path, [row], tokenizer)


def test_a_row_that_the_template_refuses_hides_no_later_one(make_tokenizer: MakeTokenizer) -> None:
    refuses = "{% if not m['content'] %}{{ raise_exception('empty') }}{% endif %}"
    jinja = "{% for m in messages %}" + refuses + "{{ m['content'] }}{% endfor %}"
    template = resolve_template("auto", make_tokenizer(chat_template=jinja))
    with pytest.raises(InputError, match="refuses the messages: empty"):
        template.prompt([Turn("user", "")], [_TOOL])
    with pytest.raises(InputError, match="does not write tools"):
        template.prompt([Turn("user", "Weather?")], [_TOOL])
