"""Load a base model's tokenizer or image processor, and add a recipe's tokens to a model whose tables are frozen.

VeRA trains no row of embedding or head, so a new token keeps the row it gets here. Per column, that is the mean of the
existing rows plus their standard deviation times a random number, whose generator is keyed by the token's text. The
mean itself, usual for trained rows, won't do: a head row within the others' convex hull never has the highest logit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.utils.hub import cached_file

from qvera.config.sections import ModelSection
from qvera.data.images import ImageProcessor, ImageTextProcessor, give_images, require_pillow
from qvera.models.hub import base_directory, not_on_hub, require_model_files
from qvera.models.model_class import CAUSAL_LM, ModelClass, load_config
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import read_json, replace_text, resolve_path
from qvera.utils.hub import leave_silent_hub
from qvera.utils.safetensors_io import save_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qvera.data.source import Processor

ADDED_ROWS = "added_tokens.safetensors"
"""The file beside an adapter's vectors with ``embedding`` and, unless tied, ``head`` [added tokens, hidden], by id."""
PLACED = "qvera_added_tokens"
"""The attribute of a model with the tokens that have rows: token → id."""
PROCESSOR_FILE = "preprocessor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_PROCESSOR_FILES = (PROCESSOR_FILE, "processor_config.json", "video_preprocessor_config.json")
IMAGE_TYPES = (
    "gemma3", "gemma4", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "idefics3", "smolvlm",
    "lfm2_vl",
)  # fmt: skip
"""Model types whose rows may hold images among text; each is tested. Others are trained on text."""
_PROCESSORS: Any = PROCESSOR_MAPPING_NAMES
_BLOCK_ROWS = 4096
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")


def load_processor(section: ModelSection, model_class: ModelClass) -> Processor:
    """The image processor of a model that reads images, else the tokenizer; raises as their loaders."""
    return load_image_processor(section) if model_class.reads_images else load_tokenizer(section)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises InputError if there is none, or if it has a token that the section adds."""
    require_model_files(resolve_path(section.path))
    config = None
    # AutoTokenizer answers impossible sizes in a config with errors of its own kind, so the config is looked at first;
    # what else is wrong with the model is not the tokenizer's to say
    with contextlib.suppress(OSError, ValueError, KeyError, ImportError):
        config = load_config(section)
    name, key = (
        resolve_path(section.tokenizer or section.path),
        "model.tokenizer" if section.tokenizer else "model.path",
    )
    revision = None if section.tokenizer else section.revision
    leave_silent_hub(name)
    try:
        if Path(name).is_dir() and not any(any(Path(name).glob(pattern)) for pattern in _TOKENIZER_FILES):
            raise OSError("it has no tokenizer file")  # transformers 5.0 would make an empty tokenizer
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, HFValidationError, KeyError, ImportError) as error:
        if not Path(name).is_dir():
            raise not_on_hub(key, name, error) from None
        fix = "there" if section.tokenizer else "beside the weights; or name another one with model.tokenizer"
        raise InputError(
            f"{key}: no tokenizer can be loaded from {name!r} ({first_line(error)}). Expected tokenizer.json or "
            f"tokenizer.model {fix}."
        ) from None
    add_tokens(tokenizer, section.added_tokens, section.pad_token, section.eos_token)
    if config is None or not CAUSAL_LM.of_published(config.architectures).takes_images:
        return tokenizer
    if config.model_type in IMAGE_TYPES:
        give_images(tokenizer, ImageTextProcessor(functools.partial(load_image_text_processor, section, tokenizer)))
    if tokenizer.chat_template is None:  # older repositories have it in a file of the processor
        with contextlib.suppress(OSError, ValueError):
            tree, _ = ProcessorMixin.get_processor_dict(name, revision=revision)
            tokenizer.chat_template = tree.get("chat_template")
    return tokenizer


def load_image_text_processor(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """Load the processor by which a published model takes images among text, on Pillow where transformers can.

    Raises InputError: there is none, or a package that it needs is missing.
    """
    require_pillow()
    name = resolve_path(section.path)
    options: dict[str, Any] = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    try:
        tree, _ = ProcessorMixin.get_processor_dict(name, revision=section.revision)
        name_of_class = tree.get("processor_class") or _PROCESSORS[load_config(section).model_type]
        kind: Any = processor_class_from_name(name_of_class)
        # without its parts for videos and sounds, so that it needs no torchvision
        unchecked: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})
        images = AutoImageProcessor.from_pretrained(name, backend="pil", **options)
        parts = {"image_processor": images, "tokenizer": tokenizer}
        processor = unchecked.from_args_and_dict([parts.get(part) for part in kind.get_attributes()], tree)
        processor.__class__ = kind  # unlike the class above, this one can be pickled
        return processor
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, HFValidationError) as error:
        raise InputError(
            f"model.path: the processor of {name!r} can't be loaded, so rows can't hold images ({first_line(error)}). "
            f"Expected {PROCESSOR_FILE} or processor_config.json beside the weights, and the packages it needs "
            "(torchvision for LFM2-VL, num2words for SmolVLM)."
        ) from None


def save_tokenizer(tokenizer: Processor, section: ModelSection, directory: Path) -> None:
    """Save a tokenizer, or a processor of images, for transformers 5 and 4, with the base's own files for other tools.

    transformers 5 names a class and writes a list that 4 can't read, and leaves out keys. llama.cpp's converter reads
    sentencepiece's model, and the tokens that were added to it from tokenizer_config.json.
    """
    tokenizer.save_pretrained(directory)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return  # a processor of images
    name, revision = resolve_path(section.tokenizer or section.path), None if section.tokenizer else section.revision
    before: dict[str, Any] = {}
    for file in (TOKENIZER_CONFIG, "tokenizer.model", "vocab.json", "merges.txt"):
        with contextlib.suppress(OSError):  # the base has none
            found = Path(cached_file(name, file, revision=revision))
            if file == TOKENIZER_CONFIG:
                before = read_json(found, "a tokenizer's config")
            elif not (directory / file).exists():
                shutil.copyfile(found, directory / file)
    config = read_json(directory / TOKENIZER_CONFIG, "a tokenizer's config")
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    kept = ("tokenizer_class", "add_bos_token", "add_eos_token", "legacy")
    config |= {key: before[key] for key in kept if key in before}
    if config.get("tokenizer_class") == "TokenizersBackend":  # of a base that transformers 5 has written
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokens = tokenizer.added_tokens_decoder.items()
    config["added_tokens_decoder"] = {str(number): token.__getstate__() for number, token in tokens}
    replace_text(directory / TOKENIZER_CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def copy_processor(section: ModelSection, directory: Path) -> None:
    """Copy the files of a base's processor of images into a checkpoint that is made from it."""
    base = base_directory(section)
    for name in _PROCESSOR_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], pad: str | None = None, eos: str | None = None
) -> None:
    """Add ``tokens`` to a tokenizer as single tokens with the next free ids; make ``pad`` and ``eos`` its own.

    Only these two become special tokens; answers show the others. Raises InputError if a token is in the vocabulary
    already or twice in the list, or if pad or eos is in neither.
    """
    vocabulary = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if token in vocabulary:
            raise InputError(
                f"model.added_tokens: {token!r} is a token of this model already (id {vocabulary[token]}). Remove it."
            )
        if token in tokens[:number] or not token.strip():
            raise InputError(f"model.added_tokens: {token!r} is blank, or twice in the list. Write each token once.")
    for token in tokens:
        special = token in (pad, eos)
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
    vocabulary = tokenizer.get_vocab() if tokens else vocabulary
    for key, named in (("pad_token", pad), ("eos_token", eos)):
        if named is None:
            continue
        if named not in vocabulary:
            raise InputError(
                f"model.{key}: {named!r} is no token of this model. Name one that it has, write it into "
                "model.added_tokens too, or leave the key out to use the model's own."
            )
        # special, so that decoding an answer leaves it out, which a token that is only named eos or pad would not be
        tokenizer.add_special_tokens({key: AddedToken(named, special=True, normalized=False)})


def require_embedded(tokenizer: object, model: PreTrainedModel, rows: Iterable[Any]) -> None:
    """Raise InputError where a row has a token that the model has no embedding for. Most tokenizers have none such."""
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    if known is None or not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) <= known:
        return
    for row in rows:
        if (beyond := row.input_ids[row.input_ids >= known]).size:
            raise InputError(
                f"{row.source}: holds {tokenizer.decode(beyond[:1])!r}, token {beyond[0]} of the tokenizer, and the "
                f"model has {known:,} tokens, numbered from 0. Name the model's own tokenizer (model.tokenizer)."
            )


def ids_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[str, int]:
    """Token → id, in the order of the ids."""
    vocabulary = tokenizer.get_vocab() if tokens else {}
    return dict(sorted(((token, vocabulary[token]) for token in tokens), key=lambda pair: pair[1]))


def place_token_rows(model: PreTrainedModel, ids: dict[str, int]) -> None:
    """Give every added token its row in embedding and head. Raises InputError if they can't be given rows.

    Rows that the checkpoint has beyond its tokens (Qwen pads its vocabulary) are taken first, in place. If they are too
    few, embedding and head become private copies with more rows.
    """
    tables = _tables(model)
    first, known = min(ids.values()), tables[0].weight.shape[0]
    if not 2 <= first <= known:
        raise InputError(
            f"model.added_tokens: the tokenizer would give {next(iter(ids))!r} the id {first}, but the model has rows "
            f"for {known} tokens: the two do not belong together. Name the model's own tokenizer."
        )
    _put(model, ids, [_drawn(module.weight, ids, first) for module in tables])


def put_token_rows(model: PreTrainedModel, ids: dict[str, int], directory: Path) -> None:
    """Put an adapter's rows in the places of `place_token_rows`. InputError: as `read_token_rows`, or another width."""
    rows, tables = read_token_rows(directory), _tables(model)
    names = ["embedding", "head"][: len(tables)]
    expected = (len(ids), tables[0].weight.shape[1])
    for name in names:
        if name not in rows or tuple(rows[name].shape) != expected:
            found = list(rows[name].shape) if name in rows else "nothing"
            raise InputError(
                f"{directory / ADDED_ROWS}: holds {found} as {name}, expected rows of shape {list(expected)} for this "
                "model."
            )
    _put(model, ids, [rows[name] for name in names])


def save_token_rows(model: PreTrainedModel, ids: dict[str, int], directory: Path) -> None:
    """Write the added tokens' rows, as they are in the model, beside an adapter."""
    tables, places = zip(("embedding", "head"), _tables(model), strict=False), list(ids.values())
    tensors = {name: module.weight.detach()[places].cpu().contiguous() for name, module in tables}
    save_tensors(tensors, directory / ADDED_ROWS)


def read_token_rows(directory: Path) -> dict[str, torch.Tensor]:
    """Read the rows of `save_token_rows`. Raises InputError if the file is missing or damaged, or has NaN or Inf."""
    file = directory / ADDED_ROWS
    try:
        rows = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file}: can't be read ({first_line(error)}). The adapter's config says that it adds tokens, whose rows "
            "are in this file: copy the whole adapter directory again."
        ) from None
    if any(not torch.isfinite(tensor).all() for tensor in rows.values()):
        raise InputError(f"{file}: has NaN or Inf in it. Copy the adapter directory again.")
    return rows


def _tables(model: PreTrainedModel) -> list[nn.Embedding | nn.Linear]:
    """Embedding and head, or one of them where they are one table."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    dense = isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear) and head.weight.is_floating_point()
    if not dense or embedding.weight.shape != head.weight.shape or getattr(head, "bias", None) is not None:
        raise InputError(
            f"model.added_tokens: the embedding ({type(embedding).__name__}) or the head ({type(head).__name__}) of "
            "this model can't be given more rows: both have to be dense, of one shape, and without a bias. Use tokens "
            "that the model has."
        )
    return [embedding] if head.weight.data_ptr() == embedding.weight.data_ptr() else [embedding, head]


def _drawn(weight: torch.Tensor, ids: dict[str, int], known: int) -> torch.Tensor:
    """A row for each token: mean + std · ε over the first ``known`` rows, ε uniform with variance 1, in float64."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, known, _BLOCK_ROWS):  # a table of a large vocabulary is never whole in float64
        block = weight[start : min(start + _BLOCK_ROWS, known)].detach().to("cpu", torch.float64)
        total += block.sum(0)
        squares += (block * block).sum(0)
    mean = total / known
    deviation = (squares / known - mean * mean).clamp_min(0).sqrt()
    rows = []
    for token in ids:
        key = np.frombuffer(hashlib.sha256(token.encode()).digest()[:16], dtype="<u8").astype(np.uint64)
        words = np.random.Philox(key=key).random_raw(len(mean))  # raw words: the stream that numpy promises to keep
        uniform = torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0)
        rows.append(mean + deviation * (3.0**0.5) * uniform)
    return torch.stack(rows).to(weight.dtype)


def _put(model: PreTrainedModel, ids: dict[str, int], rows: list[torch.Tensor]) -> None:
    tables = _tables(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    places, needed = list(ids.values()), max(ids.values()) + 1
    grown = max(0, needed - embedding.weight.shape[0])
    for module, new in zip(tables, rows, strict=True):
        weight = module.weight.detach()
        if grown:
            # rows between the old ones and the new belong to no token, and are zeros
            weight = torch.cat([weight, weight.new_zeros(grown, weight.shape[1])])
            module.weight = nn.Parameter(weight, requires_grad=False)
        weight[places] = new.to(weight)  # a mapping is private: the file is not written to
    if grown:
        # modules and configs have to agree with the new size
        if len(tables) == 1:
            head.weight = embedding.weight
        embedding.num_embeddings = head.out_features = needed
        for owner in (model.config, model.config.get_text_config(), model):
            if hasattr(owner, "vocab_size"):
                owner.vocab_size = needed
    setattr(model, PLACED, dict(ids))


def load_image_processor(section: ModelSection) -> ImageProcessor:
    """The image processor of a model, on Pillow: a run gives the same bits with and without torchvision."""
    require_pillow()
    name = resolve_path(section.path)
    require_model_files(name)
    try:
        config = load_config(section)
        if Path(name).is_dir() and not (Path(name) / PROCESSOR_FILE).is_file():
            raise OSError(f"it has no {PROCESSOR_FILE}")
        processor = AutoImageProcessor.from_pretrained(
            name, revision=section.revision, trust_remote_code=section.trust_remote_code, backend="pil"
        )
    except (OSError, ValueError, KeyError, ImportError, HFValidationError) as error:
        raise InputError(
            f"model.path: no image processor can be loaded from {name!r} ({first_line(error)}). Expected "
            f"{PROCESSOR_FILE} beside the weights: copy it from the model that the weights are of."
        ) from None
    if (channels := getattr(config, "num_channels", 3)) != 3:
        raise InputError(f"model.path: {name!r} takes images of {channels} channels, and rows are read as RGB, of 3.")
    height, width = _input_size(config, processor, name)
    return ImageProcessor(processor, (height, width), image_tokens(config, height, width))


def _input_size(config: PretrainedConfig, processor: Any, name: str) -> tuple[int, int]:
    """Height and width of a model's images: by its config, else as the processor makes them."""
    if (sides := image_sides(config)) is not None:
        return sides
    made: Any = getattr(processor, "crop_size" if getattr(processor, "do_center_crop", False) else "size", None) or {}
    height, width = (dict(made).get(side) for side in ("height", "width"))
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    raise InputError(
        f"model.path: neither the config of {name!r} (image_size) nor its {PROCESSOR_FILE} (size or crop_size, with "
        "height and width) says how large its images are, and a batch needs images of one size. Add it there."
    )


def image_sides(config: PretrainedConfig) -> tuple[int, int] | None:
    """Height and width of the images that a model takes, where its config says so."""
    size = getattr(config, "image_size", None)
    pair = (size, size) if isinstance(size, int) else tuple(size or ())
    return pair if len(pair) == 2 and all(isinstance(side, int) for side in pair) else None


def image_tokens(config: PretrainedConfig, height: int, width: int) -> int:
    """Return how many tokens a vision transformer makes of an image, the class's included; 1 for any other model."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return 1
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return (height // rows) * (width // columns) + 1
