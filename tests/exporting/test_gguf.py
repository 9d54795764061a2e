"""GGUF files: llama.cpp loads them and answers as transformers does on the merged model, token by token."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bench.common import smollm2
from qvera.adapters.factors import Factors
from qvera.adapters.save_load import attach, save_adapter
from qvera.cli.main import main
from qvera.config.sections import AdapterSection, ExportSection, ModelSection
from qvera.data.chat_template import NAMED_TEMPLATES
from qvera.evaluation.run_info import directory_facts
from qvera.exporting import gguf as gguf_file
from qvera.exporting.deltas import read_deltas
from qvera.exporting.gguf import export_gguf, export_gguf_lora, known_template, modelfile
from qvera.exporting.gguf_metadata import GgufArchitecture, model_name
from qvera.exporting.merged import export_merged
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import file_sha256
from tests.adapters.helpers import perturb
from tests.conftest import small_tokenizer
from tests.exporting.go_template import render
from tests.exporting.llama_cpp import half_characters, llama_cpp, transformers_answer

pytestmark = pytest.mark.process

PROMPTS = [
    "say the word",
    "assistant, say 12345 words twice!",
    "Zoë\n\n  pays £12.50 🙂",
    "  we'll SAY'S\t\tit\r\n 我想",
]
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256, "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [2.0, 3.0, 5.0, 8.0],
}  # fmt: skip
GEMMA_3: dict[str, Any] = {
    "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 6,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
    },
}  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256, "eos_token_id": 2,
    "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip
_SLOW = (
    "llama-tied",
    "llama-linear",
    "llama-yarn",
    "mistral",
    "phi3",
    "gemma",
    "gemma3",
)  # like another one but for a setting
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA_3, "head_dim": 32}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "phi3-long": ("Phi3", {"rope_parameters": LONG, "max_position_embeddings": 512}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 3}),
    "gemma3": ("Gemma3Text", GEMMA_3),
    "gemma3-images": ("Gemma3Text", GEMMA_3),
}


def byte_level(kind: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE that splits texts as the tokenizers of GPT-2, SmolLM, Qwen 2 or Llama 3 do."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    before: list[Any] = []
    if kind == "smollm":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    elif kind != "gpt-2":
        numbers = r"\p{N}{1,3}" if kind in ("llama-bpe", "dbrx") else r"\p{N}"
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )  # fmt: skip
        before = [pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)]
    backend = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, words])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["say the word 12345 twice\n\n  we'll  £££ 12.50 assistant"] * 4, trainer)
    bos = "<|endoftext|>" if kind == "llama-bpe" else None
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token=bos)


def sentence_pieces(kind: str = "llama") -> PreTrainedTokenizerFast:
    """A BPE as SentencePiece makes it, with scores and byte fallback, in the form of Llama 2's or Gemma's tokenizer.json."""
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # SentencePiece orders pieces by score; every two pieces whose sum is a piece are merged
    pieces = [
        "th", "he", "the", "▁th", "▁the", "ay", "say", "▁s", "▁say", "▁▁", "or", "wor", "word", "▁w", "▁word", "wo",
    ]  # fmt: skip
    letters = sorted({letter for piece in pieces for letter in piece} | set("12345, !i"))
    vocabulary = {piece: number for number, piece in enumerate([*base, *pieces, *letters])}
    halves = [(piece[:place], piece[place:]) for piece in pieces for place in range(1, len(piece))]
    merges = [pair for pair in halves if all(half in vocabulary for half in pair)]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "▁▁")])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def small_config(name: str) -> Any:
    kind, changes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    if name != "gemma3-images":
        return config
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    return transformers.Gemma3Config(text_config=config, vision_config=vision, mm_tokens_per_image=4, eos_token_id=2)


class Made:
    """A small model, an adapter on it, and what is made of the two."""

    def __init__(self, name: str, root: Path, tokenizer: Any = None, **adapter: Any) -> None:
        self.root, self.name, self.adapter = root, name, root / "adapter"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(name))
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that are told apart
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(root / "base")
        (tokenizer or byte_level("gpt-2")).save_pretrained(root / "base")
        self.section = ModelSection(path=str(root / "base"), compute_dtype="float32", quantization="none")
        self.adapt(self.adapter, **adapter)

    def adapt(self, directory: Path, size: float = 0.3, **settings: Any) -> Path:
        model = attach(load_base(self.section).model, AdapterSection(**{"rank": 8, **settings}), self.section.path)
        save_adapter(perturb(model, size=size), directory)
        return directory

    @functools.cached_property
    def merged(self) -> tuple[Any, Any]:
        """Model and tokenizer in transformers."""
        return merged_model(self.adapter, self.section, self.root / "merged")

    @functools.cached_property
    def base_file(self) -> Path:
        """The GGUF file of the base alone: an adapter that changes nothing, merged."""
        return self.written(self.root / "bare", self.adapt(self.root / "nothing", size=0.0))

    def written(self, out: Path, adapter: Path | None = None) -> Path:
        """The GGUF file of the merge in float32."""
        export_gguf(adapter or self.adapter, self.section, out, ExportSection(), "float32")
        return out / "model-f32.gguf"


def merged_model(adapter: Path, section: ModelSection, directory: Path) -> tuple[Any, Any]:
    export_merged(adapter, section, directory, ExportSection(dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Each kind of model is made once."""
    return functools.cache(lambda name: Made(name, tmp_path_factory.mktemp("made")))


def tolerance_of(name: str) -> float:
    """Of log probabilities: llama.cpp looks Gemma's GELU up in a table of 16-bit numbers."""
    return 3e-3 if name.startswith("gemma") else 2e-4


def assert_answers(
    files: list[Path], merged: tuple[Any, Any], prompts: list[Any], tolerance: float, count: int = 8
) -> None:
    """llama.cpp, with a model's file and a LoRA's or not, answers texts and ids as transformers does."""
    model, tokenizer = merged
    banned = half_characters(tokenizer, model.config.get_text_config().vocab_size)
    with llama_cpp(*files) as loaded:
        for prompt in prompts:
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            found, expected = loaded.answer(prompt, banned, count), transformers_answer(model, ids, banned, count)
            assert (found.tokens, found.prompt_tokens) == (expected.tokens, expected.prompt_tokens)
            assert found.log_probabilities == pytest.approx(expected.log_probabilities, abs=tolerance)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ()) for name in MODELS]
)
def test_llama_cpp_answers_as_transformers_does_on_the_merged_model(
    name: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    one, prompts = made(name), list[Any](PROMPTS[2:])
    if name == "phi3-long":  # longer texts have other factors
        prompts.append(one.merged[1](" ".join(PROMPTS * 8))["input_ids"])
        assert 256 < len(prompts[-1]) < 500
    assert_answers([one.written(tmp_path / "gguf")], one.merged, prompts, tolerance_of(name))


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "llama", "gemma"])
def test_llama_cpp_reads_the_same_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = sentence_pieces(kind) if kind in ("llama", "gemma") else byte_level(kind)
    # one that looks special, and one that does not
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<|call|>", "[WORD]")])
    file = Made("llama", tmp_path, tokenizer).written(tmp_path / "gguf")
    texts = [*PROMPTS, "the words say the   word", "say the<|call|>word [WORD] the", "1234567 say 12.5", "\n\n\n   the"]
    if kind not in ("llama", "gemma"):
        texts += ["<|im_start|>user\nthe word<|im_end|>\n", "I'll say'd X'LL"]
    with llama_cpp(file) as loaded:
        banned = half_characters(tokenizer, 320)
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            read = loaded.answer(text, banned, 1)
            assert read == loaded.answer(ids, banned, 1), (text, tokenizer.convert_ids_to_tokens(ids))
            assert read.prompt_tokens == len(ids)


def test_spaces_after_special_tokens_are_read_as_phi_3_reads_them(tmp_path: Path) -> None:
    tokenizer = sentence_pieces()
    stripping = [AddedToken(text, normalized=False, rstrip=True) for text in ("</s>", "<|user|>", "<|end|>")]
    tokenizer.add_tokens([*stripping, AddedToken("<|endoftext|>", normalized=False)])
    with llama_cpp(Made("phi3", tmp_path, tokenizer).written(tmp_path / "gguf")) as loaded:
        for text in ("<|user|>\n  say the word<|end|>\nthe", "<s> the</s> word"):
            ids = tokenizer(text)["input_ids"]
            assert loaded.answer(text, (), 1) == loaded.answer(ids, (), 1), tokenizer.convert_ids_to_tokens(ids)


def test_a_model_is_not_called_phi_3_where_it_keeps_spaces() -> None:
    assert model_name("my-Phi3-run", sentence_pieces()) == "my-phi_3-run"
    for options in ({"rstrip": True}, {"lstrip": True}, {"single_word": True}):
        changed = sentence_pieces()
        changed.add_tokens([AddedToken("<|user|>", normalized=False, **options)])
        with pytest.raises(InputError, match=re.escape("its added token '<|user|>'")):
            model_name("any", changed)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float16", 2e-2), pytest.param("bfloat16", 0.1, marks=pytest.mark.slow), ("q8_0", 0.1)],
)
def test_smaller_types_are_as_near_as_they_can_be(
    dtype: str, tolerance: float, made: Callable[[str], Made], tmp_path: Path
) -> None:
    section, adapter = made("llama").section.replace(quantization="nf4"), made("llama").adapter
    certificate = export_gguf(adapter, section, tmp_path / "gguf", ExportSection(), dtype)
    assert certificate["dtype"] == dtype and len(certificate["delta"]) == 14
    assert certificate == json.loads((tmp_path / "gguf" / "qvera_export.json").read_text())
    (name,) = certificate["files"]
    merged = merged_model(adapter, section, tmp_path / "merged")
    assert_answers([tmp_path / "gguf" / name], merged, PROMPTS[1:2], tolerance, count=4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("qwen2", {"b_groups": 2, "input_scale": True}),
        pytest.param("llama", {"method": "lora", "alpha": 4}, marks=pytest.mark.slow),
        ("phi3-long", {}),
    ],
)
def test_a_lora_file_on_the_bases_file_answers_as_the_merged_model(
    name: str, settings: dict[str, Any], made: Callable[[str], Made], tmp_path: Path
) -> None:
    one = Made(name, tmp_path, **settings) if settings else made(name)
    deltas = read_deltas(one.adapter, empty_model(one.section), one.section)
    certificate = export_gguf_lora(deltas, one.adapter, one.section, tmp_path / "lora", "float32")
    file = tmp_path / "lora" / "adapter-f32.gguf"
    assert certificate["files"] == {file.name: file_sha256(file)}
    assert_answers([one.base_file, file], one.merged, PROMPTS[2:], tolerance_of(name))
    with pytest.raises(AssertionError):  # without it it answers otherwise
        assert_answers([one.base_file], one.merged, PROMPTS[2:], tolerance_of(name))


def test_layers_of_other_ranks_are_scaled_to_one_alpha(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("llama")
    deltas = read_deltas(one.adapter, empty_model(one.section), one.section)
    for number, (layer, delta) in enumerate(deltas.layers.items()):
        A, B = delta.lora()
        more = number % 3  # zeros that change the rank and nothing else
        padded = torch.cat([A, A.new_zeros(more, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), more)], 1)
        deltas.layers[layer] = dataclasses.replace(delta, factors=Factors(*padded))
    export_gguf_lora(deltas, one.adapter, one.section, tmp_path / "lora", "float32")
    file = tmp_path / "lora" / "adapter-f32.gguf"
    assert_answers([one.base_file, file], one.merged, PROMPTS[1:2], 2e-4)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64 (not 32)"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "layer_types ['full_attention'"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_act gelu"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers [1, 1, 1, 1]"),
        ("granite", {"rope_parameters": {**LONG}}, "rope_type longrope"),
    ],
)
def test_what_llama_cpp_decides_in_its_own_way_is_refused(name: str, changes: dict[str, Any], words: str) -> None:
    config = small_config(name)
    config.architectures = [f"{MODELS[name][0].removesuffix('Text')}ForCausalLM"]
    GgufArchitecture(config)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(InputError, match=re.escape(words)):
        GgufArchitecture(config)


def test_what_llama_cpp_might_read_otherwise_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Made("llama", tmp_path)

    def refusal() -> str:
        with pytest.raises(InputError) as caught:
            one.written(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    config = tmp_path / "base" / "config.json"
    tree, tokenizer_file = json.loads(config.read_text()), tmp_path / "base" / "tokenizer.json"
    for changes, words in (
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
        ({"architectures": ["ArceeForCausalLM"]}, "What is written: LlamaForCausalLM,"),
    ):
        config.write_text(json.dumps({**tree, **changes}))
        message = refusal()
        assert words in message and "convert_hf_to_gguf.py" in message
    config.write_text(json.dumps(tree))

    def edited(tokenizer: PreTrainedTokenizerFast) -> Any:
        return json.loads(tokenizer.backend_tokenizer.to_str())

    tokens, pieces, digits = edited(byte_level("gpt-2")), edited(sentence_pieces()), edited(sentence_pieces())
    pieces["model"]["merges"].remove(["▁", "the"])
    digits["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}
    word = sentence_pieces()
    word.add_tokens(["[WORD]"])
    for changed, words in (
        ({**tokens, "pre_tokenizer": {"type": "Whitespace"}}, "splits texts into words by ['Whitespace']"),
        ({**tokens, "model": {**tokens["model"], "ignore_merges": True}}, "has ignore_merges True"),
        (digits, "splits texts into words by ['Digits']"),
        (edited(word), "looks for its added token '[WORD]' as '▁[WORD]'"),
        (pieces, "does not merge '▁' and 'the' to its token '▁the'"),
    ):
        tokenizer_file.write_text(json.dumps(changed))
        assert words in refusal()
    tokenizer_file.write_text(json.dumps(tokens))

    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    assert "pip install 'qvera[gguf]'" in refusal()


def test_a_context_is_no_longer_than_the_attention_window(tmp_path: Path) -> None:
    one, config = Made("mistral", tmp_path), tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sliding_window": 100}))
    export_gguf(one.adapter, one.section, tmp_path / "out", ExportSection(), "q8_0")
    settings = gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf").fields
    assert settings["llama.context_length"].contents() == 100
    assert settings["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


def test_a_weight_beyond_float16_leaves_nothing_behind(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("llama")
    adapter = one.adapt(tmp_path / "adapter", size=1e6)
    with pytest.raises(RunFailed, match="--dtype bfloat16"):
        export_gguf(adapter, one.section, tmp_path / "out", ExportSection(), "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    export_gguf(adapter, one.section, tmp_path / "out", ExportSection(), "bfloat16")
    deltas = read_deltas(adapter, empty_model(one.section), one.section)
    for dtype in ("float16", "q8_0"):  # a tensor whose rows are not made of whole blocks is float16 in q8_0
        with pytest.raises(RunFailed, match=r"lora_.: has values beyond float16\. Export with --dtype bfloat16"):
            export_gguf_lora(deltas, adapter, one.section, tmp_path / "lora", dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}


def test_the_command_writes_the_model_and_the_adapter(
    trained_run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(trained_run), str(tmp_path / "model"), "--to", "gguf", "--dtype", "q8_0"]) == 0
    said = capsys.readouterr().out
    assert "model-q8_0.gguf, 14 weights changed" in said and f"ollama create NAME -f {tmp_path / 'model'}" in said
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert files == ["Modelfile", "model-q8_0.gguf", "qvera_export.json"]
    assert main(["export", str(trained_run), str(tmp_path / "lora"), "--to", "gguf-lora", "--rank", "2"]) == 0
    assert "rank 2 of 8: relative error" in capsys.readouterr().out
    text = (tmp_path / "lora" / "Modelfile").read_text()
    assert "FROM ./base.gguf\nADAPTER ./adapter-f16.gguf\nTEMPLATE" in text
    assert main(["export", str(trained_run), str(tmp_path / "x"), "--dtype", "q8_0"]) == 2
    assert "--dtype q8_0: goes with --to gguf" in capsys.readouterr().err
    for name, kind in (("model", "merged export (GGUF)"), ("lora", "LoRA (GGUF)")):
        assert directory_facts(tmp_path / name)["kind"] == kind
    assert len(json.loads((tmp_path / "lora" / "qvera_export.json").read_text())["relative_errors"]) == 14
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    monkeypatch.setattr(gguf_file, "truncate_all", lambda *_: pytest.fail("factors were cut"))  # which may take minutes
    assert main(["export", str(trained_run), str(tmp_path / "y"), "--to", "gguf-lora", "--rank", "2"]) == 2


@pytest.mark.slow
def test_smollm2_answers_prompts_in_llama_cpp_as_in_transformers(tmp_path: Path) -> None:
    """Its first four layers; docs/export.md has the numbers of all of it, of 20 prompts and of every type."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    AutoModelForCausalLM.from_pretrained(smollm2(), num_hidden_layers=4).save_pretrained(base)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(base)
    section = ModelSection(path=str(base), compute_dtype="float32")
    save_adapter(perturb(attach(load_base(section).model, AdapterSection(rank=64), section.path), size=0.01), adapter)
    model, tokenizer = merged_model(adapter, section, tmp_path / "merged")
    rows = (Path(__file__).parents[2] / "recipes" / "quickstart" / "heldout.jsonl").read_text().splitlines()[:4]
    turns = [[{"role": "user", "content": json.loads(row)["prompt"]}] for row in rows]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    export_gguf(adapter, section, tmp_path / "gguf", ExportSection(), "float32")
    assert_answers([tmp_path / "gguf" / "model-f32.gguf"], (model, tokenizer), texts, 1e-3)


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
