"""The settings of a GGUF file: llama.cpp's names for them and for tensors, its order of q and k, the tokenizer.

The result equals that of llama.cpp's ``convert_hf_to_gguf.py``. Settings that llama.cpp would ignore are refused.

For byte-level BPE, llama.cpp knows by name how a text is split into words. For BPE with byte fallback (SentencePiece),
it finds merges by the scores of the pieces.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Family:
    """The form in which llama.cpp holds the models of one transformers class."""

    name: str
    paired: bool = False  # the rows of a head of q and k are in pairs (Llama's first release)
    adds_one: bool = False  # transformers multiplies norms by 1 + weight, and llama.cpp by the weight
    activation: str = "silu"  # of the MLP; llama.cpp has no other for it
    rope_types: tuple[str, ...] = ("default", "linear", "yarn", "llama3")  # those that were compared
    slides: bool = False  # llama.cpp has its sliding attention. Otherwise the context is limited to the window


def query_head_size(config: PretrainedConfig) -> int:
    """The number of elements of a head of queries."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


_GEMMA: dict[str, Any] = {"adds_one": True, "activation": "gelu_pytorch_tanh"}
FAMILIES = {
    "LlamaForCausalLM": Family("llama", paired=True),
    "MistralForCausalLM": Family("llama", paired=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "GraniteForCausalLM": Family("granite", paired=True),
    "SmolLM3ForCausalLM": Family("smollm3", paired=True),
    "Olmo2ForCausalLM": Family("olmo2"),
    "Phi3ForCausalLM": Family("phi3", rope_types=("default", "longrope")),
    "GemmaForCausalLM": Family("gemma", rope_types=("default",), **_GEMMA),
    "Gemma2ForCausalLM": Family("gemma2", rope_types=("default",), slides=True, **_GEMMA),
    "Gemma3ForCausalLM": Family("gemma3", rope_types=("default", "linear"), slides=True, **_GEMMA),
}
"""A test has loaded files of each in llama.cpp and compared it with transformers."""
FAMILIES["Gemma3ForConditionalGeneration"] = FAMILIES["Gemma3ForCausalLM"]  # its text model alone


def _difference(name: str, config: PretrainedConfig) -> str | None:
    """Name a setting that llama.cpp would have otherwise, since it derives it from family and layers; or None."""
    numbers = range(1, config.num_hidden_layers + 1)
    if name == "smollm3":
        if config.use_sliding_window:
            return "use_sliding_window"
        same = list(config.no_rope_layers) == [int(number % 4 != 0) for number in numbers]
        return None if same else f"no_rope_layers {config.no_rope_layers}"
    if name == "gemma3":
        sliding = config.rope_parameters["sliding_attention"]
        if sliding.get("rope_type", "default") != "default":
            return f"rope_type {sliding['rope_type']} of sliding layers"
        if config.attn_logit_softcapping is not None:
            return f"attn_logit_softcapping {config.attn_logit_softcapping}"
        if config.use_bidirectional_attention:
            return "use_bidirectional_attention"
    if name in ("gemma2", "gemma3"):
        every, largest = {"gemma2": (2, 46), "gemma3": (6, 62)}[name]
        layers = [("sliding" if number % every else "full") + "_attention" for number in numbers]
        if list(config.layer_types) != layers:
            return f"layer_types {config.layer_types}"
        is_largest = config.num_hidden_layers == largest
        scaled_by = config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
        scalar = config.query_pre_attn_scalar
        return None if scalar == scaled_by else f"query_pre_attn_scalar {scalar} (not {scaled_by})"
    return None


_NOT_WRITTEN = re.compile(r"\.rotary_emb\.inv_freq$|(^|\.)(vision_tower|multi_modal_projector)\.")
_TEXT_MODEL = re.compile(r"(^|\.)language_model\.")  # only this part of a model of images and text is written
_PAIRED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


class GgufArchitecture:
    """The layout of one model. InputError: the architecture or a setting was never compared with llama.cpp."""

    def __init__(self, config: PretrainedConfig) -> None:
        written = (config.architectures or ["?"])[0]
        self.config = config = config.get_text_config()
        if written not in FAMILIES:
            raise _refused(written, f" What is written: {', '.join(FAMILIES)}.")
        self.family = FAMILIES[written]
        self.name = self.family.name
        rope = config.rope_parameters or {}
        self.rope: dict[str, Any] = dict(rope.get("full_attention", rope))
        if self.rope.get("rope_type", "default") not in self.family.rope_types:
            raise _refused(f"{written} with rope_type {self.rope['rope_type']}")
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
        if activation != self.family.activation:
            raise _refused(f"{written} with hidden_act {activation}")
        if (difference := _difference(self.name, config)) is not None:
            raise _refused(f"{written} with {difference}")
        import gguf

        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        self._names = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def tensor_name(self, name: str) -> str | None:
        """llama.cpp's name of a tensor; None for one that it computes itself. InputError: it has none."""
        if _NOT_WRITTEN.search(name):
            return None
        text_name = _TEXT_MODEL.sub(r"\1", name)
        found: str | None = self._names.get_name(text_name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _refused(f"a tensor {name}")
        return found

    def is_paired(self, name: str) -> bool:
        """Whether the rows of a tensor change places (`paired_rows`)."""
        return self.family.paired and _PAIRED.search(name) is not None

    def paired_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Reorder all rows of q or k as llama.cpp has them: element i of a head beside element i + half."""
        found = _PAIRED.search(name)
        assert found is not None
        heads = self.config.num_attention_heads if found[1] == "q" else self.config.num_key_value_heads
        halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Compute the factors by which Llama 3.1 and Phi-3 divide rotary frequencies; checkpoints do not have them."""
        if self.rope.get("rope_type") == "longrope":
            return {
                f"rope_factors_{kind}.weight": torch.tensor(self.rope[f"{kind}_factor"]) for kind in ("long", "short")
            }
        if self.rope.get("rope_type") != "llama3":
            return {}
        size = query_head_size(self.config)
        frequencies = 1.0 / (self.rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size))
        factor, low, high = (self.rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = self.rope["original_max_position_embeddings"]
        factors = []
        for frequency in frequencies.tolist():
            length = 2 * math.pi / frequency
            # As transformers' rope_type llama3: long waves are divided by the factor, short ones stay, others are
            # between.
            smooth = min(max((context / length - low) / (high - low), 0.0), 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
        return {"rope_freqs.weight": torch.tensor(factors)}

    def add_settings(self, writer: GGUFWriter) -> None:
        """Write the model's sizes and settings."""
        import gguf

        config, rope = self.config, self.rope
        window = None if self.family.slides else getattr(config, "sliding_window", None)
        # where llama.cpp's attention does not slide, the answers are the same within one window
        context = min(config.max_position_embeddings, window or math.inf)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(int(context))
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
        if rope.get("rope_type") in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope.get("rope_type") == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            for key, add in (
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if rope.get(key) is not None:
                    add(rope[key])
        if getattr(config, "head_dim", None):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        if self.name in ("llama", "granite", "smollm3"):
            writer.add_vocab_size(config.vocab_size)
            writer.add_rope_dimension_count(query_head_size(config))
        if self.name == "granite":
            writer.add_attention_scale(config.attention_multiplier)
            writer.add_embedding_scale(config.embedding_multiplier)
            writer.add_residual_scale(config.residual_multiplier)
            writer.add_logit_scale(config.logits_scaling)
        if self.name in ("gemma2", "gemma3"):
            writer.add_sliding_window(config.sliding_window)
            if config.attn_logit_softcapping is not None:
                writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            if config.final_logit_softcapping is not None:
                writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if self.name == "gemma3":
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        if self.name == "phi3":
            rope = config.rope_parameters
            writer.add_rope_dimension_count(int(query_head_size(config) * rope.get("partial_rotary_factor", 1.0)))
            writer.add_sliding_window(0)  # its attention does not slide in llama.cpp
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(original)
            if rope.get("rope_type") == "longrope":
                scale, factor = config.max_position_embeddings / original, rope.get("attention_factor")
                if factor is None:
                    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
                writer.add_rope_scaling_attn_factors(factor)


def _refused(what: str, known: str = "") -> InputError:
    return InputError(
        f"--to gguf: {what} has not been compared with llama.cpp, so it is not written. Convert the merged export "
        f"(--to merged) with llama.cpp's convert_hf_to_gguf.py.{known}"
    )


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITTERS = {
    (_WORDS % r"\p{N}{1,3}",): "llama-bpe",
    (_WORDS % r"\p{N}",): "qwen2",
    ("digits", "words"): "smollm",
    ("words",): "gpt-2",
}
"""Maps the way a text is split into words to llama.cpp's name of it (``tokenizer.ggml.pre`` in llama-vocab.cpp)."""
_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
_NOT_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}
_SPACE = "▁"
_PIECE_OF_NO_MERGE = -1e6
_NOT_A_TOKEN = "[PAD{}]"


def model_name(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of a model in its GGUF file, changed so that llama.cpp handles spaces as this tokenizer does.

    A file does not say which added tokens take the spaces after them. With phi-3 in the name, llama.cpp lets all but
    `_NOT_STRIPPED` do so, else none (``impl::load`` of llama-vocab.cpp). InputError: the tokenizer does neither.
    """
    added = tokenizer.added_tokens_decoder.values()
    strips = {token.content for token in added if token.rstrip}
    if other := [token.content for token in added if token.lstrip or token.single_word]:
        raise _refused_tokenizer(f"takes its added token {other[0]!r} only between spaces, or with those before it")
    if not strips:
        return _PHI_3.sub("phi_3", name)
    contents = {token.content for token in added}
    if strips != contents - _NOT_STRIPPED or not contents.issuperset(_NOT_STRIPPED | {"</s>"}):
        raise _refused_tokenizer(f"takes its added token {min(strips)!r} with the spaces after it")
    return name if _PHI_3.search(name) else f"Phi-3 {name}"


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Write the tokenizer. InputError: llama.cpp has none that splits texts as this one does."""
    import gguf

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        config.save_pretrained(scratch)  # gguf looks there for special tokens that the tokenizer does not name
        file = Path(scratch) / "tokenizer.json"
        if not file.is_file():
            raise _refused_tokenizer("has no tokenizer.json")
        tree = json.loads(file.read_text(encoding="utf-8"))
        model = tree["model"]
        if model["type"] != "BPE":
            raise _refused_tokenizer(f"is of type {model['type']}, not BPE")
        tokens, types = _tokens(tokenizer, config.vocab_size)
        byte_level = not model.get("byte_fallback")
        writer.add_tokenizer_model("gpt2" if byte_level else "llama")
        writer.add_tokenizer_pre(_splitter(tree) if byte_level else "default")
        if not byte_level:
            scores = _piece_scores(tree)
            writer.add_token_scores([scores.get(token, _PIECE_OF_NO_MERGE) for token in tokens])
            steps = _steps(tree, "normalizer", "normalizers") + _steps(tree, "pre_tokenizer", "pretokenizers")
            # whether a text is read as if a space stood before it
            writer.add_add_space_prefix(
                any(
                    step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
                    for step in steps
                )
            )
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        special = gguf.SpecialVocab(scratch, load_merges=byte_level, n_vocab=len(tokens))
        read = tokenizer("a")["input_ids"]
        special.add_special_token = {
            "bos": read[0] == tokenizer.bos_token_id,
            "eos": read[-1] == tokenizer.eos_token_id,
        }
        special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[list[str], list[int]]:
    """List the text and the kind of each id, as llama.cpp's converter has them."""
    from gguf import TokenType

    vocabulary, added = {number: text for text, number in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    if max(vocabulary) >= count:
        raise _refused_tokenizer(f"has an id {max(vocabulary)}, and the model has {count} rows for tokens")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    is_fallback = set(fallback) if all(text in tokenizer.get_vocab() for text in fallback) else set()
    unknown = tokenizer.unk_token_id
    texts, types = [], []
    for number in range(count):
        text, kind = vocabulary.get(number, _NOT_A_TOKEN.format(number)), TokenType.NORMAL
        if number not in vocabulary:
            kind = TokenType.UNUSED
        elif text in is_fallback:
            kind = TokenType.BYTE
        elif number in added:
            if added[number].normalized:
                # it is searched in normalized text, so the normalizer must leave it as it is
                normalizer = tokenizer.backend_tokenizer.normalizer
                if normalizer is not None and (changed := normalizer.normalize_str(text)) != text:
                    raise _refused_tokenizer(
                        f"looks for its added token {text!r} as {changed!r} (add it with normalized=False)"
                    )
            else:
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) or text
            marker = text.startswith("<|") and text.endswith("|>")
            kind = TokenType.CONTROL if added[number].special or marker else TokenType.USER_DEFINED
            if number == unknown and is_fallback:
                kind = TokenType.UNKNOWN
            if kind == TokenType.USER_DEFINED:
                text = text.replace(_SPACE, " ")
        texts.append(text)
        types.append(int(kind))
    return texts, types


def _splitter(tree: dict[str, Any]) -> str:
    found = []
    for part in _steps(tree, "pre_tokenizer", "pretokenizers"):
        kind = part["type"]
        if kind == "Digits" and part["individual_digits"]:
            found.append("digits")
        elif kind == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
            found.append(part["pattern"]["Regex"])
        elif kind == "ByteLevel" and not part["add_prefix_space"]:
            found += ["words"] if part["use_regex"] else []
        else:
            found.append(str(kind))
    name = _SPLITTERS.get(tuple(found))
    if name is None:
        raise _refused_tokenizer(f"splits texts into words by {found}, for which no name of llama.cpp's is known here")
    ignores_merges = bool(tree["model"].get("ignore_merges"))
    if name == "llama-bpe" and not ignores_merges:
        return "dbrx"  # the same words
    if name != "llama-bpe" and ignores_merges:
        raise _refused_tokenizer(f"has ignore_merges True, which llama.cpp's {name} has not")
    return name


def _steps(tree: dict[str, Any], stage: str, members: str) -> list[dict[str, Any]]:
    """List the steps of a stage of tokenizer.json, which has a sequence of them, a single one, or none."""
    whole = tree.get(stage) or {}
    return list(whole.get(members, [whole] if whole else []))


def _piece_scores(tree: dict[str, Any]) -> dict[str, float]:
    """Score each piece by minus its place among the merges; SentencePiece's scores of a BPE have the same order.

    SentencePiece and llama.cpp split only at spaces before merging, and merge any two pieces whose sum is a piece.
    """
    for part in _steps(tree, "pre_tokenizer", "pretokenizers"):
        of_spaces = part["type"] == "Split" and part["pattern"] == {"String": " "}
        if part["type"] != "Metaspace" and not of_spaces:
            raise _refused_tokenizer(f"splits texts into words by {[part['type']]}")
    vocabulary = tree["model"]["vocab"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in tree["model"]["merges"]]
    known, scores = {(left, right) for left, right in merges}, dict[str, float]()
    for place, (left, right) in enumerate(merges):
        piece = left + right
        scores.setdefault(piece, -float(place))
        for cut in range(1, len(piece)):
            if (pair := (piece[:cut], piece[cut:])) not in known and all(part in vocabulary for part in pair):
                raise _refused_tokenizer(f"does not merge {pair[0]!r} and {pair[1]!r} to its token {piece!r}")
    return scores


def _refused_tokenizer(why: str) -> InputError:
    return InputError(
        f"--to gguf: the tokenizer {why}, so llama.cpp might read other tokens. Convert the merged export (--to "
        "merged) with llama.cpp's convert_hf_to_gguf.py."
    )
