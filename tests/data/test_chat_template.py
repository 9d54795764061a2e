"""Which tokens are trained: for every template, exactly what the model has to write, end of turn included.

Random conversations go through our templates and those of real models. For the latter the expected mask comes from
`real_templates` and the tokenizer's own offsets, never from qvera.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qvera.config.sections import DataSection
from qvera.data import NAMED_TEMPLATES, Encoder, Turn, build_datasets, data_warnings, resolve_template
from qvera.utils.errors import InputError
from tests.data.conftest import MARKERS, MakeTokenizer
from tests.data.real_templates import QWEN_3, QWEN_25, REAL, SMOLLM2, Messages, Pieces
from tests.data.rows import build, decoded, messages_of, one, trained_text

pytestmark = pytest.mark.process

# What the model writes for an answer, per template.
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
    "yes", " ", "\n", "\n\n", "\t", "  x  ", "a b", "é日", "🙂", "e\u0301", "\u2028", "assistant", "{{ x }}", "[/INST]",
    "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "</s>", "<s>", "[INST] ", "### Response:\n", "<</SYS>>\n\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|assistant|>\n", "</tool_call>", "QveraSlot0001Zq7",
    "{% generation %}",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=8), max_size=6).map("".join)
ANSWERS = TEXTS.filter(lambda text: text.strip() != "")


@pytest.mark.parametrize("template", list(WRITTEN))
@settings(max_examples=8, deadline=None)
@given(exchanges=st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3), system=st.none() | ANSWERS)
def test_trained_tokens_are_the_answers_and_their_ends(
    template: str, exchanges: list[tuple[str, str]], system: str | None, base_tokenizer: Any, smollm2_tokenizer: Any
) -> None:
    named = template != "smollm2"
    tokenizer = base_tokenizer if named else smollm2_tokenizer
    # some characters (a byte order mark, say) leave no token; such an answer is refused (hypothesis 6.100 gives blank
    # ones too)
    assume(all(answer.strip() and tokenizer.encode(answer, add_special_tokens=False) for _, answer in exchanges))
    messages = [{"role": "system", "content": system}] if system else []
    messages += messages_of(*(text for exchange in exchanges for text in exchange))
    example = one(messages, tokenizer, template=template if named else "auto", max_length=100_000)
    expected = "".join(WRITTEN[template](answer, tokenizer.eos_token) for _, answer in exchanges)
    assert trained_text(tokenizer, example) == expected
    # The whole row is what transformers itself makes of the conversation, BOS apart.
    jinja = NAMED_TEMPLATES[template] if named else SMOLLM2
    text = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False)
    whole = decoded(tokenizer, example.input_ids)
    assert whole in (text, f"<s>{text}")
    # What is generated from is everything before the last answer, and ends on a token boundary.
    last = WRITTEN[template](exchanges[-1][1], tokenizer.eos_token)
    assert decoded(tokenizer, example.prompt_ids) == whole[: whole.rindex(last)]
    assert example.input_ids[: len(example.prompt_ids)].tolist() == example.prompt_ids.tolist()
    assert example.reference == exchanges[-1][1]


ASKED = messages_of("hi", "yes")


@pytest.mark.parametrize("template", list(NAMED_TEMPLATES))
def test_one_bos_where_the_model_wants_one(template: str, make_tokenizer: MakeTokenizer) -> None:
    for adds_bos in (True, False):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        example = one(ASKED, tokenizer, template=template)
        expected = [0] if adds_bos or "bos_token" in NAMED_TEMPLATES[template] else []
        for ids in (example.input_ids, example.prompt_ids):
            assert np.flatnonzero(ids == tokenizer.bos_token_id).tolist() == expected


def test_text_rows_train_everything_and_end(make_tokenizer: MakeTokenizer) -> None:
    for bos in ("<s>", ""):
        tokenizer = make_tokenizer(adds_bos=bool(bos))
        example = build([{"text": "Blue. "}], tokenizer).train[0]
        assert decoded(tokenizer, example.input_ids) == f"{bos}Blue. </s>"
        assert example.trained.tolist() == [False] + [True] * (len(example.input_ids) - 1)
        assert (len(example.prompt_ids), example.reference) == (0, None)


def test_auto_without_a_chat_template_and_where_an_input_goes(base_tokenizer: Any, smollm2_tokenizer: Any) -> None:
    plain = build([{"prompt": "name: x ->", "completion": " y"}], base_tokenizer)
    assert plain.stats.template == "plain"
    assert decoded(base_tokenizer, plain.train[0].input_ids) == "<s>name: x -> y</s>"
    assert trained_text(base_tokenizer, plain.train[0]) == " y</s>"
    rows = [{"instruction": "Add.", "input": text, "output": "3"} for text in ("1, 2", "")]
    alpaca = build(rows, base_tokenizer)
    assert alpaca.stats.template == "alpaca"
    assert [decoded(base_tokenizer, row.input_ids) for row in alpaca.train] == [
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:\n3</s>",
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n3</s>",
    ]
    elsewhere = build(rows, smollm2_tokenizer).train[0]
    assert "<|im_start|>user\nAdd.\n\n1, 2<|im_end|>" in elsewhere.prompt_text


TWO = messages_of("one", "first", "two", "second")
OPEN = messages_of("one", "first", "two", "second", "three")


def weighed(messages: Messages, number: int) -> Messages:
    """The same with a turn whose weight is 0."""
    return [{**message, "weight": 0} if i == number else message for i, message in enumerate(messages)]


def test_train_on_and_the_rows_own_word_on_turns(smollm2_tokenizer: Any) -> None:
    tokenizer = smollm2_tokenizer
    both = one(OPEN, tokenizer)
    assert trained_text(tokenizer, both) == "first<|im_end|>second<|im_end|>"
    assert both.reference is None  # a user turn ends it: there is no answer to compare with
    assert trained_text(tokenizer, one(OPEN, tokenizer, train_on="last")) == "second<|im_end|>"
    everything = one(OPEN, tokenizer, train_on="all")
    assert everything.trained.tolist() == [False] + [True] * (len(everything.input_ids) - 1)
    assert trained_text(tokenizer, one(weighed(TWO, 1), tokenizer)) == "second<|im_end|>"
    text = trained_text(tokenizer, one(weighed(TWO, 1), tokenizer, train_on="all"))
    assert "first" not in text and "one" in text and "second" in text


def test_tokenizers_with_other_offsets_give_the_same(
    make_tokenizer: MakeTokenizer, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed = make_tokenizer(trim_offsets=True)
    for answer in ("yes", " yes", "\n\nyes\n\n", "  a\n\n  b "):
        assert trained_text(trimmed, one(messages_of("say ", answer), trimmed, template="plain")) == answer + "</s>"
    fast = one(OPEN, smollm2_tokenizer)
    call = PreTrainedTokenizerFast.__call__
    # what a tokenizer written in Python returns holds no encodings
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *args, **keys: dict(call(*args, **keys)))
    slow = one(OPEN, smollm2_tokenizer)
    assert slow.input_ids.tolist() == fast.input_ids.tolist()
    assert slow.trained.tolist() == fast.trained.tolist()


_TURN = "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}"
_PROMPTS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# In the manner of Qwen3: reasoning is kept in the last answer and taken out of earlier ones.
REWRITES = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}" + _TURN + "{% endfor %}" + _PROMPTS
)
# In the manner of Qwen3: the last answer opens with a think block that is empty, earlier ones are written without.
THINKS_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}" + _PROMPTS
)
NO_PROMPT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m.content }}"
    "{% endgeneration %}{{ eos_token + '\n' }}{% else %}{{ 'Q: ' + m.content + '\n' }}{% endif %}{% endfor %}"
)
THOUGHTS = messages_of("q", "<think>a</think>\nb", "r", "<think>c</think>\nd")


def test_a_template_that_rewrites_answers(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=REWRITES)
    with pytest.raises(InputError, match=r"rows\.jsonl:1: the chat template .* rewrites turn 2"):
        one(THOUGHTS, tokenizer)
    last = one(THOUGHTS, tokenizer, train_on="last")
    assert trained_text(tokenizer, last) == "<think>c</think>\nd<|im_end|>"
    assert trained_text(tokenizer, one(OPEN, tokenizer)) == "first<|im_end|>second<|im_end|>"


def rewrites_in_blocks(block: str) -> str:
    marked = "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}" + block + "{% else %}"
    return REWRITES.replace(_TURN, marked + "{{ c + '<|im_end|>\n' }}{% endif %}")


# template, turns, what is trained, how the prompt of the last answer ends
PLACED: dict[str, tuple[str, Messages, str, str]] = {
    "generation blocks": (BLOCKS, OPEN, "first</s>second</s>", ""),
    "blocks with the end of turn, around answers that are rewritten": (
        rewrites_in_blocks("{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"),
        THOUGHTS, "b<|im_end|><think>c</think>\nd<|im_end|>", "",
    ),
    "blocks without the end of turn, around answers that are rewritten": (
        rewrites_in_blocks("{% generation %}{{ c }}{% endgeneration %}{{ '<|im_end|>\n' }}"),
        THOUGHTS, "b<|im_end|><think>c</think>\nd<|im_end|>", "",
    ),
    "line breaks are stripped": (
        REWRITES.replace("{% set c = m.content %}", "{% set c = m.content.strip('\n') %}"),
        messages_of("q", "\n\nyes\n", "r", "no\n"), "yes<|im_end|>no<|im_end|>", "",
    ),
    "more is written before the last answer": (
        THINKS_LAST, TWO, "first<|im_end|><think>\n\n</think>\n\nsecond<|im_end|>", "two<|im_end|>\n<|im_start|>assistant\n",
    ),
    "no generation prompt": (NO_PROMPT, TWO, "first\nsecond\n</s>", "user: two\nassistant: "),
    "no end of turn": (
        NO_PROMPT + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        TWO, "first\nsecond\n</s>", "user: two\nassistant: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jinja", "messages", "trained", "prompt"), PLACED.values(), ids=list(PLACED))
def test_answers_are_placed_whatever_the_template_does(
    jinja: str, messages: Messages, trained: str, prompt: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(chat_template=jinja)
    example = one(messages, tokenizer)
    assert trained_text(tokenizer, example) == trained
    assert example.prompt_text.endswith(prompt)
    if jinja.startswith(NO_PROMPT):
        assert decoded(tokenizer, example.input_ids).count("</s>") == 1
        untrained = one(weighed(messages, 3), tokenizer)
        assert trained_text(tokenizer, untrained) == "first\n"
        assert tokenizer.eos_token_id not in untrained.input_ids.tolist()


def test_names_and_needs(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(InputError, match="no template is called 'lama-2'; did you mean 'llama-2'"):
        one(ASKED, make_tokenizer(), template="lama-2")
    with pytest.raises(InputError, match="has no chat template. Name one: alpaca"):
        one(ASKED, make_tokenizer(), template="tokenizer")
    bare = make_tokenizer(markers=[])
    with pytest.raises(InputError, match=r"chatml needs <\|im_start\|>, <\|im_end\|>.*work with it: alpaca, llama-2"):
        one(ASKED, bare, template="chatml")
    assert trained_text(bare, one(ASKED, bare, template="zephyr")) == "yes</s>"


@pytest.mark.parametrize("template", ["plain", "zephyr", "llama-2"])
def test_a_tokenizer_written_in_python(template: str) -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    example = one(TWO, tokenizer, template=template)
    answers = [WRITTEN[template](answer, "</s>") for answer in ("first", "second")]
    # Such tokenizers drop white space beside special tokens, in any text; everything else is exact.
    assert trained_text(tokenizer, example).replace(" ", "") == "".join(answers).replace(" ", "")
    assert "".join(decoded(tokenizer, example.prompt_ids).split()) == "".join(example.prompt_text.split())


@pytest.mark.parametrize("template", [*NAMED_TEMPLATES, "tokenizer"])
def test_chat_prompts_are_those_of_training(template: str, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=NO_PROMPT)
    for messages in (TWO[:2], TWO):
        example = one(messages, tokenizer, template=template)
        turns = [Turn(message["role"], message["content"]) for message in messages[:-1]]
        text, starts = resolve_template(template, tokenizer).prompt(turns)
        assert text == example.prompt_text
        assert Encoder(tokenizer).encode_prompt(text, starts) == example.prompt_ids.tolist()


def test_a_token_across_the_end_of_an_answer_belongs_to_it(base_tokenizer: Any) -> None:
    whole = base_tokenizer("yes\n\n", add_special_tokens=False)["input_ids"]
    assert base_tokenizer.decode(whole[-1:]) == "\n\n"
    found = Encoder(base_tokenizer).encode(["yes\n\n"], [[(0, 0, len("yes\n"))]])
    assert found == [(whole, [(0, 0, len(whole))])]


def test_the_prompt_of_a_row_is_not_trained_though_an_assistant_speaks_in_it(smollm2_tokenizer: Any) -> None:
    """As in TRL, whose conversational rows have examples in their prompts; a CSV has the lists as JSON."""
    *asked, answer = messages_of("2 + 2?", "shown", "3 + 3?", "six")
    plain = build([{"prompt": asked, "completion": [answer]}], smollm2_tokenizer).train[0]
    assert trained_text(smollm2_tokenizer, plain) == "six<|im_end|>"
    texts = {"prompt": json.dumps(asked), "completion": json.dumps([answer])}
    as_text = build([texts], smollm2_tokenizer).train[0]
    assert as_text.input_ids.tolist() == plain.input_ids.tolist()
    data = [{"prompt": '[{"a": 1}]', "completion": "a\n1"}]  # JSON that is no messages is the text that it is
    assert '[{"a": 1}]' in decoded(smollm2_tokenizer, build(data, smollm2_tokenizer).train[0].input_ids)


def test_a_short_target_leaves_the_prompt_of_the_last_turn_whole(smollm2_tokenizer: Any) -> None:
    messages = messages_of("one", "first answer", "two", "final")
    whole = one(messages, smollm2_tokenizer)
    cut = one(messages, smollm2_tokenizer, max_target_length=3)
    assert len(cut.input_ids) < len(whole.input_ids)
    assert cut.prompt_ids.tolist() == whole.prompt_ids.tolist()
    lead = cut.trained.tolist().index(True)  # the row is cut at its start too, so the prompt loses its beginning
    short = one(messages, smollm2_tokenizer, max_target_length=3, max_length=lead + 2, too_long="cut-start")
    assert short.prompt_ids[-8:].tolist() == whole.prompt_ids[-8:].tolist()


_PLAIN = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), min_size=1, max_size=8)
_ARGUMENTS = st.dictionaries(st.sampled_from(["city", "größe", "n"]), _PLAIN | st.integers(), max_size=2)


def tokenizer_of(name: str, make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(
        eos=REAL[name].eos,
        pad=None if name == "llama-2" else "<pad>",
        adds_bos=name not in ("chatml", "qwen-2.5"),
        chat_template=REAL[name].jinja,
        markers=[*MARKERS, "<|eom_id|>", "<|python_tag|>"],
    )


def call_of(name: str, arguments: Any) -> dict[str, Any]:
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
        for _ in range(draw(st.integers(0, 2)) if real.tools else 0):
            answer: dict[str, Any] = {"role": "assistant", "content": draw(TEXTS)}
            if real.calls:
                count = 1 if real.single else draw(st.integers(1, 2))
                answer["tool_calls"] = [call_of("look_up", draw(_ARGUMENTS)) for _ in range(count)]
            messages.append(answer)
            messages += [{"role": "tool", "content": draw(TEXTS)} for _ in range(draw(st.integers(1, 2)))]
        messages.append({"role": "assistant", "content": draw(TEXTS)})
    if not real.alternates and draw(st.booleans()):
        messages.append({"role": "user", "content": draw(TEXTS)})
    return messages


def answerable(tokenizer: Any, messages: Messages) -> bool:
    """Not a row that is refused: some answer has a token (some characters leave none, a byte order mark for one)."""
    answers = [message for message in messages if message["role"] == "assistant"]
    texts = [message["content"].strip() for message in answers]
    return any(message.get("tool_calls") for message in answers) or any(
        text and tokenizer.encode(text, add_special_tokens=False) for text in texts
    )


def expected(tokenizer: Any, pieces: Pieces, whole: bool) -> tuple[list[int], list[bool]]:
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


@pytest.mark.parametrize(
    ("name", "sentencepiece"),
    [*((name, False) for name in REAL), *((name, True) for name in ("llama-2", "mistral", "alpaca", "zephyr"))],
)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_trained_is_what_the_assistant_says_and_its_end(
    name: str, sentencepiece: bool, data: st.DataObject, make_tokenizer: MakeTokenizer, llama2_tokenizer: Any
) -> None:
    tokenizer = llama2_tokenizer if sentencepiece else tokenizer_of(name, make_tokenizer)
    tokenizer.chat_template = REAL[name].jinja
    messages = data.draw(conversations(name))
    assume(answerable(tokenizer, messages))
    is_blank = messages[0]["role"] == "system" and not messages[0]["content"].strip()
    written = messages[is_blank:]  # an empty system turn is none
    pieces = REAL[name].pieces(written)
    jinja = REAL[name].jinja or NAMED_TEMPLATES["alpaca"]
    text = tokenizer.apply_chat_template(written, chat_template=jinja, tokenize=False)
    assert text == "".join(piece for piece, _ in pieces), "the oracle has to know this template"
    assert all(piece.endswith(REAL[name].eos) for piece, trained in pieces if trained)
    example = one(messages, tokenizer, max_length=100_000, template="auto" if REAL[name].jinja else name)
    # SentencePiece would put a space in front of every further piece, so it takes the text in one
    ids, mask = expected(tokenizer, pieces, whole=sentencepiece)
    got = example.input_ids.tolist()
    shift = len(got) - len(ids)  # one BOS where the model wants one and the text has none
    assert shift <= 1 and got == [tokenizer.bos_token_id] * shift + ids
    assert example.trained.tolist() == [False] * shift + mask
    if sentencepiece:
        assert got[0] == tokenizer.bos_token_id != got[1]
    else:
        assert trained_text(tokenizer, example) == "".join(piece for piece, trained in pieces if trained)


@pytest.mark.parametrize("name", ["llama-2", "mistral", "alpaca"])
def test_a_template_that_refuses_a_row_is_named_with_the_roles(name: str, make_tokenizer: MakeTokenizer) -> None:
    tokenizer, template = tokenizer_of(name, make_tokenizer), "auto" if REAL[name].jinja else name
    for roles in [("user", "assistant", "tool", "assistant"), *[("user", "user", "assistant")] * (name == "llama-2")]:
        messages = [{"role": role, "content": "x"} for role in roles]
        words = rf"rows\.jsonl:1: the chat template .* refuses the row: .*roles are {', '.join(roles)}"
        with pytest.raises(InputError, match=words):
            one(messages, tokenizer, template=template)


_HEAD, _CONTENT = "{{ '<|im_start|>assistant\n' }}", "{{ message['content'] }}"
_PLAIN_TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
# Where authors put their blocks: around the content; with the token that ends it; with the line break behind that, too;
# and, as SmolLM3 does, around the whole turn, its heading included.
MARKED = {
    "content": _HEAD + "{%- generation %}" + _CONTENT + "{% endgeneration %}{{ '<|im_end|>\n' }}",
    "content and end": _HEAD + "{% generation %}" + _CONTENT + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "content, end and line break": _HEAD + "{%+ generation %}" + _CONTENT + "{{ '<|im_end|>\n' }}{%- endgeneration %}",
    "the whole turn": "{% generation %}" + _PLAIN_TURN + "{% endgeneration %}",
}


def marked(style: str) -> str:
    """SmolLM2's template with a generation block."""
    assert SMOLLM2.count(_PLAIN_TURN) == 1
    block = "{% if message['role'] == 'assistant' %}" + MARKED[style] + "{% else %}" + _PLAIN_TURN + "{% endif %}"
    return SMOLLM2.replace(_PLAIN_TURN, block)


@pytest.mark.parametrize("style", list(MARKED))
@settings(max_examples=8, deadline=None)
@given(messages=conversations("chatml"))
def test_generation_blocks_agree_with_the_template_without_them(
    style: str, messages: Messages, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = tokenizer_of("chatml", make_tokenizer)
    assume(answerable(tokenizer, messages))
    without = one(messages, tokenizer, max_length=100_000)
    tokenizer.chat_template = marked(style)
    within = one(messages, tokenizer, max_length=100_000)
    assert within.input_ids.tolist() == without.input_ids.tolist()
    assert within.trained.tolist() == without.trained.tolist()
    assert within.prompt_ids.tolist() == without.prompt_ids.tolist()


def test_generation_blocks_are_what_transformers_makes_of_them(make_tokenizer: MakeTokenizer) -> None:
    """With the end of turn inside of the block there is nothing to add: the mask is transformers' own."""
    tokenizer = tokenizer_of("chatml", make_tokenizer)
    tokenizer.chat_template = marked("content and end")
    messages = messages_of("one", " first\n", "assistant", "<|im_end|> 🙂")
    messages[2]["role"] = "tool"
    own = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    trained = np.asarray(own["input_ids"])[np.asarray(own["assistant_masks"], bool)]
    example = one(messages, tokenizer)
    # by text: qvera starts an answer on a token of its own, so that a generation prompt has the ids it had in training
    assert decoded(tokenizer, example.input_ids) == decoded(tokenizer, own["input_ids"])
    assert trained_text(tokenizer, example) == decoded(tokenizer, trained)


_TOOL: dict[str, Any] = call_of("look_up", None)
_TOOL["function"] = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}
_CALLED: Messages = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [call_of("look_up", {})]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "Sun."},
]
_ANSWERED = [_CALLED[0], _CALLED[3]]
_BRIEF = {"role": "system", "content": "Be brief."}


def writes(part: str = "", of: str = "messages") -> str:
    """A template that writes these messages, each after ``part``."""
    return "{% for m in " + of + " %}" + part + "{{ m['role'] + m['content'] + eos_token }}{% endfor %}"


NOT_WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({"messages": _ANSWERED, "tools": [_TOOL]}, SMOLLM2),
    "tool_calls": ({"messages": _CALLED}, SMOLLM2),
    "turns of the role tool": (
        {"messages": _CALLED[:1] + _CALLED[2:]},
        writes(of="messages if m['role'] != 'tool'"),
    ),
}


@pytest.mark.parametrize("part", list(NOT_WRITTEN))
def test_a_template_that_passes_over_a_part_is_refused(part: str, make_tokenizer: MakeTokenizer) -> None:
    row, jinja = NOT_WRITTEN[part]
    tokenizer = make_tokenizer(chat_template=jinja)
    with pytest.raises(InputError, match=rf"rows.jsonl:2.*does not write {part}, so the model would not see them"):
        build([{"messages": _ANSWERED}, row], tokenizer)
    asked = [Turn(m["role"], m["content"], extra={k: m[k] for k in m if k == "tool_calls"}) for m in row["messages"]]
    with pytest.raises(InputError, match=f"does not write {part}"):
        resolve_template("auto", tokenizer).prompt(asked[:-1], row.get("tools"))


_MISTRAL_SYSTEM = """{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and messages[0]['role'] ==
'system' %}{{ messages[0]['content'] }} {% endif %}{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %}{{ m['content']
+ eos_token }}{% endif %}{% endfor %}"""  # the system turn is written where the last turn is a user's, as Mistral 0.3 has it


def test_a_system_turn_that_is_not_written_is_refused(make_tokenizer: MakeTokenizer) -> None:
    """In prompts alone, in rows alone, behind the first turn; one that says nothing is not missed."""
    tokenizer = make_tokenizer(chat_template=_MISTRAL_SYSTEM)
    text, _ = resolve_template("auto", tokenizer).prompt([Turn("system", "Be brief."), Turn("user", "hi")])
    assert text == "[INST] Be brief. hi[/INST]"
    with pytest.raises(InputError, match=r"role system.*Name another data.template \(.*mistral"):
        one([_BRIEF, *_ANSWERED], tokenizer)
    silent = make_tokenizer(chat_template=writes(of="messages if m['role'] != 'system'"))
    # Arrow gives every turn the keys of all turns
    assert one([{"role": "system", "content": ""}, _ANSWERED[0], {**_ANSWERED[1], "tool_calls": []}], silent)
    first_only = writes("{% if m['role'] == 'system' and not loop.first %}{% continue %}{% endif %}")
    rows = [[_BRIEF, *_ANSWERED], [_BRIEF, *_ANSWERED, {"role": "system", "content": "At length."}, *_ANSWERED]]
    with pytest.raises(InputError, match=r"rows.jsonl:2.*does not write system turns behind the first turn"):
        build([{"messages": row} for row in rows], make_tokenizer(chat_template=first_only))


def test_calls_are_objects_without_keys_that_only_other_rows_have(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    """OpenAI's API has arguments as JSON texts, and Parquet gives every object the keys of all objects."""
    tokenizer = tokenizer_of("qwen-2.5", make_tokenizer)

    def row(arguments: Any, **function: Any) -> dict[str, Any]:
        called = [_CALLED[0], {**_CALLED[1], "tool_calls": [call_of("look_up", arguments)]}, *_CALLED[2:]]
        tool = {"name": "look_up", "parameters": {"type": "object"}, **function}
        return {"messages": called, "tools": [{"type": "function", "function": tool}]}

    rows = [row({"city": "Rome"}), row('{"city": "Rome"}')]
    examples = [build([each], tokenizer).train[0] for each in rows]
    pq.write_table(pa.Table.from_pylist([rows[0], row({"x": 1}, strict=True)]), tmp_path / "rows.parquet")
    examples.append(build_datasets(DataSection(path=str(tmp_path / "rows.parquet")), tokenizer).train[0])
    texts = [decoded(tokenizer, example.input_ids) for example in examples]
    assert texts[0] == texts[1] == texts[2]
    assert '"arguments": {"city": "Rome"}}' in texts[0] and "null" not in texts[0]


def test_reasoning_is_trained_where_the_template_writes_it(make_tokenizer: MakeTokenizer) -> None:
    writes = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}</s>"
    jinja = "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}<|assistant|>"
    ends = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = make_tokenizer(chat_template=f"{jinja}{writes}{ends}")
    messages = [_ANSWERED[0], {**_ANSWERED[1], "reasoning_content": "June."}]
    assert trained_text(tokenizer, one(messages, tokenizer)) == "<think>June.</think>Sun.</s>"
    with pytest.raises(InputError, match=r"does not write reasoning_content.*or train a base whose own") as refused:
        one(messages, make_tokenizer(chat_template=SMOLLM2))
    assert "Name another data.template" not in str(refused.value)  # none of them writes it


_HMM = {"role": "assistant", "content": "Sun.", "reasoning_content": "June."}
_TAGGED = {"role": "assistant", "content": "<think>\nJune.\n</think>\n\nSun."}
_WRITTEN_TAGGED = "<think>\nJune.\n</think>\n\nSun.<|im_end|>"
_WRITTEN_CALL = '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call><|im_end|>'
_EMPTY = "<think>\n\n</think>\n\n"
_TAGGED_CALL = {**_CALLED[1], "content": "<think>\nJune.\n</think>\n\n"}
# rows, what Qwen3 writes of them: an empty think block before the last answer, no reasoning once a question follows
QWEN_3_ROWS: dict[str, tuple[Messages, str]] = {
    "reasoning within the answer": ([_CALLED[0], _TAGGED], _WRITTEN_TAGGED),
    "reasoning within the last answer": ([*_ANSWERED, _CALLED[0], _TAGGED], f"Sun.<|im_end|>{_WRITTEN_TAGGED}"),
    "reasoning beside the last answer": ([*_ANSWERED, _CALLED[0], _HMM], f"Sun.<|im_end|>{_WRITTEN_TAGGED}"),
    "a call": (_CALLED, f"I look.\n{_WRITTEN_CALL}{_EMPTY}Sun.<|im_end|>"),
    "a call without words": (
        [_CALLED[0], {**_CALLED[1], "content": ""}, *_CALLED[2:]], f"{_WRITTEN_CALL}{_EMPTY}Sun.<|im_end|>",
    ),
    "a call behind reasoning": (
        [_CALLED[0], _TAGGED_CALL, _CALLED[2], _TAGGED],
        f"<think>\nJune.\n</think>\n\n{_WRITTEN_CALL}{_WRITTEN_TAGGED}",
    ),
    "a call before another question": (
        [*_CALLED, *_ANSWERED], f"I look.\n{_WRITTEN_CALL}Sun.<|im_end|>{_EMPTY}Sun.<|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "trained"), QWEN_3_ROWS.values(), ids=list(QWEN_3_ROWS))
def test_answers_around_which_qwen3_writes_more_where_they_are_last(
    messages: Messages, trained: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(chat_template=QWEN_3, eos="<|im_end|>")
    example = one(messages, tokenizer, max_length=100_000)
    assert trained_text(tokenizer, example) == trained
    assert example.prompt_text.endswith("<|im_start|>assistant\n")


def test_an_answer_whose_end_of_turn_is_another_one_where_it_is_last(make_tokenizer: MakeTokenizer) -> None:
    """As gpt-oss has it."""
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.thinking %}{{ '<think>' + m.thinking }}{% endif %}"
        "{{ '|' + m.content + ('</s>' if m.role == 'assistant' and loop.last else '<|im_end|>') }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    messages = [*_ANSWERED, _CALLED[0], {**_ANSWERED[1], "thinking": "June."}]
    tokenizer = make_tokenizer(chat_template=jinja)
    assert trained_text(tokenizer, one(messages, tokenizer)) == "|Sun.<|im_end|><think>June.|Sun.</s>"


def test_reasoning_that_a_later_question_removes_is_not_trained_without_a_word(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template=QWEN_3, eos="<|im_end|>")
    for answer in (_TAGGED, _HMM):
        messages = [_CALLED[0], answer, _CALLED[0], answer]
        with pytest.raises(InputError, match=r"rewrites turn 2.*Set data\.train_on: last"):
            one(messages, tokenizer)
        assert trained_text(tokenizer, one(messages, tokenizer, train_on="last")) == _WRITTEN_TAGGED


def test_trained_reasoning_within_an_answer_that_the_template_drops_is_refused(make_tokenizer: MakeTokenizer) -> None:
    """As DeepSeek-R1's distilled models do. That of earlier answers, which are not trained, may go."""
    jinja = SMOLLM2.replace("message['content']", "message['content'].split('</think>')[-1]")
    tokenizer = make_tokenizer(chat_template=jinja)
    for part in ({}, {"train_on": "last"}):
        with pytest.raises(InputError, match=r"does not write the words before </think>.*another data.template"):
            one([_CALLED[0], _TAGGED], tokenizer, **part)
    earlier = [_CALLED[0], _TAGGED, *_ANSWERED]
    assert trained_text(tokenizer, one(earlier, tokenizer, train_on="last")) == "Sun.<|im_end|>"
    assert resolve_template("auto", tokenizer).prompt([Turn(m["role"], m["content"]) for m in earlier[:-1]])


def test_reasoning_that_the_template_leaves_out_is_told_where_all_text_is_trained(
    make_tokenizer: MakeTokenizer,
) -> None:
    r1 = SMOLLM2.replace("message['content']", "message['content'].split('</think>')[-1]")
    for jinja, messages, is_told in (
        (r1, [_CALLED[0], _TAGGED], True),
        (r1, _ANSWERED, False),
        (QWEN_3, [_CALLED[0], _HMM, _CALLED[0], {**_HMM, "reasoning_content": "July."}], True),
        (QWEN_3, [_CALLED[0], _HMM], False),
        (QWEN_3, [_CALLED[0], _TAGGED], False),
    ):
        tokenizer = make_tokenizer(chat_template=jinja)
        read = build([{"messages": messages}], tokenizer, train_on="all", max_length=9999)
        assert (
            "with reasoning that the chat template leaves out: 1." in " ".join(data_warnings(read.stats))
        ) == is_told


def test_reasoning_is_trained_where_the_prompt_closes_its_block(make_tokenizer: MakeTokenizer) -> None:
    """As Qwen3.5's does without thinking."""
    jinja = QWEN_3.replace("if enable_thinking is defined and enable_thinking is false", "if true")
    assert jinja != QWEN_3
    tokenizer = make_tokenizer(chat_template=jinja, eos="<|im_end|>")
    opening = "<|im_start|>assistant\n<think>\n"
    for messages, trained, prompt in (
        ([_CALLED[0], _HMM], "June.\n</think>\n\nSun.<|im_end|>", opening),
        (_ANSWERED, "Sun.<|im_end|>", f"{opening}\n</think>\n\n"),
    ):
        example = one(messages, tokenizer)
        assert trained_text(tokenizer, example) == trained
        assert example.prompt_text.endswith(prompt)


def test_a_tokenizer_with_a_template_for_tools_is_told_of_it(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat_template={"default": SMOLLM2, "tool_use": QWEN_25})
    with pytest.raises(InputError, match="Make the tokenizer's template tool_use its only one"):
        build([{"messages": _ANSWERED, "tools": [_TOOL]}], tokenizer)


def test_a_row_that_the_template_refuses_hides_no_later_one(make_tokenizer: MakeTokenizer) -> None:
    refuses = writes("{% if not m['content'] %}{{ raise_exception('empty') }}{% endif %}")
    template = resolve_template("auto", make_tokenizer(chat_template=refuses))
    with pytest.raises(InputError, match="refuses the messages: empty"):
        template.prompt([Turn("user", "")], [_TOOL])
    with pytest.raises(InputError, match="does not write tools"):
        template.prompt([Turn("user", "Weather?")], [_TOOL])
