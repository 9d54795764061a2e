"""Random conversations through real chat templates: trained is what the assistant says and the token that ends it, no more.

The expected mask comes from `real_templates` and the tokenizer's own offsets, never from qvera.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qvera.data import NAMED_TEMPLATES, Example
from qvera.data.chat_template import resolve_template
from qvera.data.conversations import Turn
from qvera.utils.errors import InputError
from tests.data.conftest import MARKERS, MakeTokenizer
from tests.data.real_templates import LLAMA_3, QWEN_25, REAL, SMOLLM2, Messages, Pieces
from tests.data.test_loss_mask import build, decoded

pytestmark = pytest.mark.process

# The templates' own markers and headings, white space at the edges, letters of several bytes.
_SPELLED = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "</s>",
    "<s>",
    "[/INST]",
    "[INST] ",
    "### Response:\n",
]
_SPELLED += [
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|assistant|>\n",
    "<</SYS>>\n\n",
    "</tool_call>",
    "\n\n",
]
_WORDS = [
    "yes",
    "a b",
    " ",
    "\n",
    "\t",
    "  x  ",
    "é日",
    "🙂",
    "e\u0301",
    "\u2028",
    "QveraSlot0001Zq7",
    "{{ x }}",
    "{% generation %}",
]
TEXTS = st.lists(
    st.sampled_from(_SPELLED + _WORDS) | st.text(st.characters(codec="utf-8"), max_size=6), max_size=5
).map("".join)
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


def check_mask(name: str, data: st.DataObject, tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
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


def with_examples(count: int) -> Any:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", list(REAL))
@with_examples(40)
@given(data=st.data())
def test_trained_is_what_the_assistant_says_and_its_end(
    name: str, data: st.DataObject, tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    check_mask(name, data, tmp_path, make_tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REAL))
@with_examples(400)
@given(data=st.data())
def test_trained_is_what_the_assistant_says_and_its_end_in_many_conversations(
    name: str, data: st.DataObject, tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    check_mask(name, data, tmp_path, make_tokenizer)


@pytest.mark.parametrize("name", ["llama-2", "mistral", "alpaca", "zephyr"])
@with_examples(20)
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
    got = example.input_ids.tolist()
    shift = len(got) - len(ids)
    assert got[shift:] == ids
    assert shift <= 1
    assert example.trained.tolist() == [False] * shift + mask


@pytest.mark.parametrize("name", ["llama-2", "mistral", "alpaca"])
def test_a_template_without_a_place_for_tools_refuses_them(
    name: str, tmp_path: Path, make_tokenizer: MakeTokenizer
) -> None:
    turns = [("user", "q"), ("assistant", "f()"), ("tool", "42"), ("assistant", "It is 42.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(
        InputError, match=r"rows\.jsonl:1: the chat template .* refuses the row: .*roles are user, assistant, tool"
    ):
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
    "Llama-2's": (
        "llama-2",
        _marked(
            REAL["llama-2"].jinja or "",
            "{{ ' '  + content.strip() + ' ' + eos_token }}",
            "{% generation %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endgeneration %}",
        ),
    ),
}


@pytest.mark.parametrize("style", list(MARKED))
@with_examples(20)
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
