"""A tokenizer in a GGUF file, so that llama.cpp splits a text into the same tokens.

For byte-level BPE, llama.cpp knows by name how a text is split into words. For BPE with byte fallback (SentencePiece),
it finds merges by the scores of the pieces.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITTERS = {
    (_WORDS % r"\p{N}{1,3}",): "llama-bpe",
    (_WORDS % r"\p{N}",): "qwen2",
    ("digits", "words"): "smollm",
    ("words",): "gpt-2",
}
"""How a text becomes words → llama.cpp's name of it (``tokenizer.ggml.pre`` in llama-vocab.cpp)."""
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
        raise _refused(f"takes its added token {other[0]!r} only between spaces, or with those before it")
    if not strips:
        return _PHI_3.sub("phi_3", name)
    contents = {token.content for token in added}
    if strips != contents - _NOT_STRIPPED or not contents.issuperset(_NOT_STRIPPED | {"</s>"}):
        raise _refused(f"takes its added token {min(strips)!r} with the spaces after it")
    return name if _PHI_3.search(name) else f"Phi-3 {name}"


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Write the tokenizer. InputError: llama.cpp has none that splits texts as this one does."""
    import gguf

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        config.save_pretrained(scratch)  # gguf looks there for special tokens that the tokenizer does not name
        file = Path(scratch) / "tokenizer.json"
        if not file.is_file():
            raise _refused("has no tokenizer.json")
        tree = json.loads(file.read_text(encoding="utf-8"))
        model = tree["model"]
        if model["type"] != "BPE":
            raise _refused(f"is of type {model['type']}, not BPE")
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
    """Text and kind of each id, as llama.cpp's converter has them."""
    from gguf import TokenType

    vocabulary, added = {number: text for text, number in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    if max(vocabulary) >= count:
        raise _refused(f"has an id {max(vocabulary)}, and the model has {count} rows for tokens")
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
                    raise _refused(f"looks for its added token {text!r} as {changed!r} (add it with normalized=False)")
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
        raise _refused(f"splits texts into words by {found}, for which no name of llama.cpp's is known here")
    ignores_merges = bool(tree["model"].get("ignore_merges"))
    if name == "llama-bpe" and not ignores_merges:
        return "dbrx"  # the same words
    if name != "llama-bpe" and ignores_merges:
        raise _refused(f"has ignore_merges True, which llama.cpp's {name} has not")
    return name


def _steps(tree: dict[str, Any], stage: str, members: str) -> list[dict[str, Any]]:
    """A stage of tokenizer.json has a sequence of steps, a single step, or none."""
    whole = tree.get(stage) or {}
    return list(whole.get(members, [whole] if whole else []))


def _piece_scores(tree: dict[str, Any]) -> dict[str, float]:
    """Minus the place among the merges: SentencePiece's scores of a BPE have the same order.

    SentencePiece and llama.cpp split only at spaces before merging, and merge any two pieces whose sum is a piece.
    """
    for part in _steps(tree, "pre_tokenizer", "pretokenizers"):
        of_spaces = part["type"] == "Split" and part["pattern"] == {"String": " "}
        if part["type"] != "Metaspace" and not of_spaces:
            raise _refused(f"splits texts into words by {[part['type']]}")
    vocabulary = tree["model"]["vocab"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in tree["model"]["merges"]]
    known, scores = {(left, right) for left, right in merges}, dict[str, float]()
    for place, (left, right) in enumerate(merges):
        piece = left + right
        scores.setdefault(piece, -float(place))
        for cut in range(1, len(piece)):
            if (pair := (piece[:cut], piece[cut:])) not in known and all(part in vocabulary for part in pair):
                raise _refused(f"does not merge {pair[0]!r} and {pair[1]!r} to its token {piece!r}")
    return scores


def _refused(why: str) -> InputError:
    return InputError(
        f"--to gguf: the tokenizer {why}, so llama.cpp might read other tokens. Convert the merged export (--to "
        "merged) with llama.cpp's convert_hf_to_gguf.py."
    )
