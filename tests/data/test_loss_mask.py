"""Which tokens are trained: for every template, exactly what the model has to write, end of turn included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qvera.config.schema import DataSection
from qvera.data import NAMED_TEMPLATES, Datasets, Encoder, Example, Turn, build_datasets, resolve_template
from qvera.utils.errors import InputError
from tests.data.conftest import SMOLLM2_TEMPLATE, MakeTokenizer

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
# Line breaks and markers in answers are what a careless mask trips over.
PIECES = [
    "yes",
    " ",
    "\n",
    "\n\n",
    "a b",
    "é日",
    "🙂",
    "<|im_end|>",
    "### Response:\n",
    "[/INST]",
    "</s>",
    "\t-",
    "assistant",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=8), max_size=6).map("".join)
ANSWERS = TEXTS.filter(lambda text: text.strip() != "")


def build(tmp_path: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast, **section: Any) -> Datasets:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return build_datasets(DataSection(path=str(path), **section), tokenizer)


def one(tmp_path: Path, turns: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, **section: Any) -> Example:
    messages = [{"role": role, "content": content} for role, content in turns]
    return build(tmp_path, [{"messages": messages}], tokenizer, **section).train[0]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained_text(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    return decoded(tokenizer, example.input_ids[example.trained])


def tokenizer_for(template: str, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue("smollm2_tokenizer" if template == "smollm2" else "base_tokenizer")


@pytest.mark.parametrize("template", list(WRITTEN))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exchanges=st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3), system=st.none() | ANSWERS)
def test_trained_tokens_are_the_answers_and_their_ends(
    template: str,
    exchanges: list[tuple[str, str]],
    system: str | None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
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
    jinja = SMOLLM2_TEMPLATE if template == "smollm2" else NAMED_TEMPLATES[template]
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


def test_tool_turns_are_read_and_never_trained(smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "call f"), ("tool", "42"), ("assistant", "It is 42.")]
    example = one(tmp_path, turns, smollm2_tokenizer)
    assert trained_text(smollm2_tokenizer, example) == "call f<|im_end|>It is 42.<|im_end|>"
    assert "<|im_start|>tool\n42<|im_end|>" in decoded(smollm2_tokenizer, example.input_ids)


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


@pytest.mark.parametrize("template", ["llama-2", "mistral", "alpaca", "zephyr", "plain"])
def test_sentencepiece(template: str, llama2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    turns = [("user", "Name a colour."), ("assistant", "Blue é.\n日"), ("user", "Another"), ("assistant", "Be brief.")]
    example = one(tmp_path, turns, llama2_tokenizer, template=template)
    runs: list[list[int]] = []
    previous = False
    for token, is_trained in zip(example.input_ids.tolist(), example.trained.tolist(), strict=True):
        if is_trained and not previous:
            runs.append([])
        if is_trained:
            runs[-1].append(token)
        previous = is_trained
    eos = llama2_tokenizer.eos_token_id
    assert [run[-1] for run in runs] == [eos, eos]
    assert [decoded(llama2_tokenizer, run[:-1]).strip() for run in runs] == ["Blue é.\n日", "Be brief."]
    # In one piece: a space would be put in front of every further one.
    messages = [{"role": role, "content": content} for role, content in turns]
    text = llama2_tokenizer.apply_chat_template(messages, chat_template=NAMED_TEMPLATES[template], tokenize=False)
    ids = llama2_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist()[-len(ids) :] == ids
    bos = llama2_tokenizer.bos_token_id
    # Meta's format opens every exchange with BOS; the others have one in front.
    assert example.input_ids.tolist().count(bos) == (2 if template == "llama-2" else 1)
    assert example.input_ids[0] == bos
    assert example.input_ids[1] != bos


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


def test_generation_blocks_are_followed(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ eos_token + '\n' }}{% else %}{{ 'Q: ' + m.content + '\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    assert trained_text(tokenizer, one(tmp_path, TWO, tokenizer)) == "first</s>second</s>"


def test_a_template_without_end_of_turn_gets_eos_at_the_end(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    example = one(tmp_path, TWO[:4], tokenizer)
    assert trained_text(tokenizer, example) == "first\nsecond\n</s>"
    assert decoded(tokenizer, example.input_ids).count("</s>") == 1


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


@pytest.mark.parametrize(
    "block",
    [
        "{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
        "{% generation %}{{ c }}{% endgeneration %}{{ '<|im_end|>\n' }}",
    ],
    ids=["end of turn inside", "end of turn outside"],
)
def test_generation_blocks_place_answers_that_the_template_rewrites(
    block: str, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    written = "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}"
    marked = "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}" + block + "{% else %}"
    marked += "{{ c + '<|im_end|>\n' }}{% endif %}"
    tokenizer = make_tokenizer(chat_template=REWRITES.replace(written, marked))
    turns = [("user", "q"), ("assistant", "<think>a</think>\nb"), ("user", "r"), ("assistant", "<think>c</think>\nd")]
    assert trained_text(tokenizer, one(tmp_path, turns, tokenizer)) == "b<|im_end|><think>c</think>\nd<|im_end|>"


def test_a_template_that_strips_line_breaks(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    stripping = REWRITES.replace("{% set c = m.content %}", "{% set c = m.content.strip('\n') %}")
    tokenizer = make_tokenizer(chat_template=stripping)
    turns = [("user", "q"), ("assistant", "\n\nyes\n"), ("user", "r"), ("assistant", "no\n")]
    assert trained_text(tokenizer, one(tmp_path, turns, tokenizer)) == "yes<|im_end|>no<|im_end|>"


# In the manner of Qwen3: the last answer opens with a think block that is empty, earlier ones are written without.
THINKS_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_writes_more_before_the_last_answer(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=THINKS_LAST)
    example = one(tmp_path, TWO[:4], tokenizer)
    assert trained_text(tokenizer, example) == "first<|im_end|><think>\n\n</think>\n\nsecond<|im_end|>"
    assert example.prompt_text.endswith("two<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_refuses_the_row(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*llama-2.* refuses the row: .*alternate.*user, user"):
        one(tmp_path, [("user", "a"), ("user", "b"), ("assistant", "c")], make_tokenizer(), template="llama-2")


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


NO_PROMPT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def test_a_template_without_generation_prompt(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=NO_PROMPT)
    example = one(tmp_path, TWO[:4], tokenizer)
    assert trained_text(tokenizer, example) == "first\nsecond\n</s>"
    assert example.prompt_text.endswith("user: two\nassistant: ")


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
