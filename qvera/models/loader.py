"""Load the frozen base model, read back what was loaded, and say what the model can be given."""

import copy
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from safetensors import SafetensorError
from torch.nn.modules.conv import _ConvNd
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from qvera.config.sections import ModelSection
from qvera.data.tokenization import pad_id_of, require_eos
from qvera.distributed.zero import BaseSharder, whole_numel
from qvera.models import attention, linear, quantization, quantize_checkpoint, stream
from qvera.models.conversion import as_named, is_decoded
from qvera.models.experts import stacks
from qvera.models.hub import base_directory, fingerprint_of
from qvera.models.loss import require_own_logits
from qvera.models.model_class import CAUSAL_LM, ModelClass, empty_model, load_config, require_own_weights, stored_labels
from qvera.models.safetensors_stream import read_tensor
from qvera.models.stored_weights import NotMappable, load_mapped
from qvera.models.structure import beside_the_layers, routers
from qvera.models.tokenizer import ids_of, load_processor, place_token_rows
from qvera.utils import accelerator
from qvera.utils.cache_dir import StageProgress
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import CERTIFICATE, read_json, resolve_path, try_read_json
from qvera.utils.formatting import first_of, size
from qvera.utils.safetensors_io import checkpoint_tensors, file_stamps

_NOTED_SHARE = 0.01
"""Dense matrices that are less than this share of the base are named in run.json only, and not on the console."""


@dataclasses.dataclass
class Base:
    """A loaded base model with its tokenizer, or (as ``tokenizer``) its image processor."""

    model: PreTrainedModel
    tokenizer: Any
    facts: dict[str, Any]
    """Read back from the loaded modules (`_read_back`)."""
    adapted: PeftModel | None = None
    """The model with the adapters of `qvera.adapters.shared_model.add_adapter`."""


def pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a recipe's ``compute_dtype``; ``auto`` asks the device what it multiplies fast."""
    if name != "auto":
        return getattr(torch, name)
    if accelerator.is_accelerator(device):
        return torch.bfloat16 if accelerator.multiplies_bfloat16(device) else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        # without its instructions bfloat16 products run at 2 to 20 GFLOP/s, fp32 ones at 150 (bench/log.md)
        fast = any(capabilities.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    else:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def load_base(
    section: ModelSection,
    device: torch.device | None = None,
    progress: StageProgress | None = None,
    sharder: BaseSharder | None = None,
    model_class: ModelClass = CAUSAL_LM,
) -> Base:
    """Load the base model of a recipe, quantized and frozen, in evaluation mode.

    A 16-bit base for 4 bits is quantized once, into the cache (`qvera.models.quantize_checkpoint`). 4-bit files are
    mapped (`qvera.models.stored_weights`). transformers loads int8, dense and unusual checkpoints.
    `qvera.models.linear` runs every quantized linear. ``progress`` is called during the first quantization.

    Raises:
        InputError: there is no such model, its weights are not those of its config, or it is not as the recipe says.
    """
    device = device or accelerator.current_device()
    dtype = pick_compute_dtype(section.compute_dtype, device)
    name = resolve_path(section.path)
    tokenizer = load_processor(section, model_class)
    if not model_class.has_own_head:
        require_eos(tokenizer)
    try:
        config = load_config(section)
        own_labels = stored_labels(config)
        prequantized = getattr(config, "quantization_config", None) is not None
        # config and headers are compared before weights are loaded
        directory, empty = base_directory(section, progress), empty_model(section, None, model_class)
        require_own_weights(directory, as_named(checkpoint_tensors(directory), empty), empty, model_class)
        model = _load_mapped(section, config, directory, dtype, device, progress, sharder, model_class)
        if model is None and sharder is not None:
            four_bit = "" if section.quantization in ("nf4", "fp4") else "model.quantization: nf4, or "
            raise InputError(
                f"deepspeed: ZeRO-3 spreads a 4-bit base over the ranks while it reads it, and {name!r} with "
                f"model.quantization {section.quantization} can't be read so. Use {four_bit}zero1 or zero2."
            )
        if model is None and section.stream is True:
            raise InputError(
                f"model.stream: only a base whose layers are 4-bit tensors of a file can be streamed, and {name!r} "
                f"with model.quantization {section.quantization} can't be read so. Leave model.stream out."
            )
        if model is None:
            model = _load_by_transformers(section, config, directory, empty, dtype, device, model_class)
    except (OSError, ValueError, KeyError, HFValidationError, SafetensorError, ImportError) as error:
        raise InputError(
            f"model.path: {name!r} can't be loaded as {model_class.what}: {first_line(error)} Expected a hub id, or a "
            "directory with config.json and safetensors weights."
        ) from None
    model.name_or_path = model.config._name_or_path = name  # not the cached copy's: PEFT writes it into adapters
    model.config._commit_hash = section.revision or "main"  # by which an adapter's base is compared with this one
    model.requires_grad_(False).eval()
    if model_class.has_own_head and not model_class.reads_images:
        # a decoder's head reads the last token that is no padding
        model.config.get_text_config().pad_token_id = pad_id_of(tokenizer)
        model.config.use_cache = False
    if ids := ids_of(tokenizer, section.added_tokens):
        place_token_rows(model, ids)
    linear.freeze_linears(model)
    attention.choose_implementation(model, device, dtype)
    # a type that is not among the tested ones has to show that the loss knows how it makes logits
    if not model_class.has_own_head and sharder is None and attention.needs_padding_mask(model):
        require_own_logits(model)
    facts = _read_back(model, section, dtype, prequantized)
    if ids:
        facts["added_tokens"] = ids
    if (streamed := stream.facts_of(model)) is not None:
        facts["streamed"] = streamed
    if own_labels is not None and own_labels != model_class.labels and sorted(own_labels) == sorted(model_class.labels):
        facts["head_not_kept"] = list(own_labels)
    if (note := rounded_note(directory, section.quantization)) is not None:
        facts["rounded_again"] = note
    facts["fingerprint"] = fingerprint_of(section)
    return Base(model, tokenizer, facts)


def _load_mapped(
    section: ModelSection,
    config: PretrainedConfig,
    base: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: StageProgress | None,
    sharder: BaseSharder | None,
    model_class: ModelClass,
) -> PreTrainedModel | None:
    """The model, mapped from the 4-bit file in ``base`` or its copy in the cache. None: transformers has to load it."""
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None:
        if not (stored if isinstance(stored, dict) else stored.to_dict()).get("load_in_4bit"):
            return None
    elif section.quantization not in ("nf4", "fp4"):
        return None
    try:
        directory = base
        if stored is None:
            directory = quantize_checkpoint.cached_base(
                section, device=device, progress=progress, model_class=model_class
            )
            # the copy is known by config and shards: code and generation config are the base's, which may have changed
            config = copy.deepcopy(config)
            config.quantization_config = read_json(directory / "config.json", "a config")["quantization_config"]
        streamed = section.stream is True
        if section.stream == "auto" and sharder is None:
            stored_bytes = sum(entry.size_bytes for entry in checkpoint_tensors(directory))
            streamed = stream.streams_by_itself(stored_bytes, device)
        attn = None if section.attn_implementation == "auto" else section.attn_implementation
        trusted = section.trust_remote_code
        model = load_mapped(directory, config, dtype, device, attn, trusted, sharder, streamed, model_class, base)
        if streamed:
            stream.stream_layers(model, device)
        return model
    except (quantize_checkpoint.NotPlain, NotMappable):
        return None


def _load_by_transformers(
    section: ModelSection,
    config: PretrainedConfig,
    directory: Path,
    empty: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    model_class: ModelClass,
) -> PreTrainedModel:
    """Raises InputError if the checkpoint lacks weights, which transformers would draw at random."""
    heads = list(model_class.head_modules(empty))
    stored_as: Any = getattr(config, "quantization_config", None)
    wanted: Any = None
    if stored_as is None:
        wanted = quantization.quantization_config(section, dtype, quantization.kept_dense(empty, heads))
    elif is_decoded(stored_as):  # transformers would compute in the stored format where it has kernels for that
        wanted = AutoQuantizationConfig.from_dict({**stored_as, "dequantize": True})
    name, keeps_head = resolve_path(section.path), model_class.finds_head(config)
    model, loading = model_class.from_pretrained(
        name,
        config,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        output_loading_info=True,
        attn_implementation=None if section.attn_implementation == "auto" else section.attn_implementation,
        **({} if wanted is None else {"quantization_config": wanted}),
    )
    drawn = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    missing = sorted(key for key in drawn if keeps_head or key.partition(".")[0] not in heads)
    if missing and stored_as is None:
        raise InputError(
            f"model.path: the weights of {name!r} hold no {first_of(missing)} of the shape that config.json asks for, "
            "which transformers would draw at random. Copy config.json and all weight files of one checkpoint again."
        )
    drawn.update(() if keeps_head else model_class.outputs(model))
    model_class.start_head(model, drawn, device)
    if stored_as is None:  # transformers has rounded it to the compute dtype
        entries = as_named(checkpoint_tensors(directory), empty)
        stored = [e for e in entries if e.name.partition(".")[0] in heads and e.name not in drawn]
        stamps = file_stamps(stored)
        model.load_state_dict({entry.name: read_tensor(entry, stamps) for entry in stored}, strict=False)
    return model


def _read_back(model: PreTrainedModel, section: ModelSection, dtype: torch.dtype, prequantized: bool) -> dict[str, Any]:
    """Quantization, dtypes, counts and bytes of the live modules. Raises InputError if they are not the recipe's."""
    four_bit = [m for m in model.modules() if isinstance(m, quantization.Linear4bit)]
    eight_bit = [m for m in model.modules() if isinstance(m, quantization.Linear8bit)]
    if not four_bit and section.quantization in ("nf4", "fp4"):
        head = model.get_output_embeddings()
        linears = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        kinds = sorted({type(m).__name__ for m in linears})
        raise InputError(
            f"model.quantization: no linear of {section.path!r} is in 4 bits. bitsandbytes takes modules of the class "
            f"Linear, and {type(model).__name__} has {', '.join(kinds) or 'none'}. Set model.quantization: none, or "
            "point model.path at a checkpoint in 16 bits if this one is stored in another format."
        )
    if prequantized:
        # the checkpoint's config names a compute dtype too; the recipe's counts
        for module in four_bit:
            module.compute_dtype = dtype
    found: dict[str, object] = {"quantization": "int8" if eight_bit else "none"}
    compute, storage, problems = str(dtype).removeprefix("torch."), None, []
    if four_bit:
        fact, *others = {quantization.four_bit_facts(m) for m in four_bit}
        if others:
            problems.append(f"its 4-bit layers differ among themselves: {sorted(map(str, [fact, *others]))}")
        storage = str(fact.storage_dtype).removeprefix("torch.")
        found = {"quantization": fact.quant_type, "double_quant": fact.double_quant}
        if not prequantized:
            found |= {"quant_storage": storage, "compute_dtype": str(fact.compute_dtype).removeprefix("torch.")}
    wanted = section.to_dict() | {"compute_dtype": compute}
    problems += [
        f"{key} is {value}, the recipe says {wanted[key]}" for key, value in found.items() if value != wanted[key]
    ]
    if problems:
        raise InputError(
            f"model: what was loaded from {section.path!r} is not what the recipe says: {'; '.join(problems)}."
        )
    quantized, held = [*four_bit, *eight_bit], stacks(model)
    packed = {id(m.weight) for m in (*quantized, *held)}
    sizes = [(whole_numel(p), p.element_size()) for p in model.parameters() if id(p) not in packed]
    return {
        "path": section.path,
        "architecture": type(model).__name__,
        "parameters": sum(n for n, _ in sizes)
        + sum(m.in_features * m.out_features for m in quantized)
        + sum(math.prod(m.spec.shape) for m in held),
        "quantization": found["quantization"],
        "double_quant": section.double_quant if four_bit else None,
        "compute_dtype": compute,
        "quant_storage": storage,
        "four_bit_modules": len(four_bit),
        "int8_modules": len(eight_bit),
        "expert_bytes": sum(map(quantization.storage_bytes, held)),
        "dense_matrices": _dense_matrices(model, packed) if quantized else {},
        "base_bytes": sum(n * width for n, width in sizes) + sum(map(quantization.storage_bytes, (*quantized, *held))),
    }


def _dense_matrices(model: PreTrainedModel, packed: Collection[int]) -> dict[str, int]:
    """Bytes of the matrices that are not quantized, by their names without numbers, the largest first.

    Embeddings, convolutions, heads and routers are not counted. ``packed``: ids of the quantized weights.
    """
    head = model.get_output_embeddings()
    # a language model's tower for images counts too
    found, skipped = Counter[str](), beside_the_layers(model) if head is None else routers(model)
    for name, module in model.named_modules():
        is_table = module is head or "embed" in name or isinstance(module, (torch.nn.Embedding, _ConvNd))
        if name in skipped or is_table:
            continue
        for key, weight in module.named_parameters(recurse=False):
            is_matrix = weight.dim() > 1 and weight.is_floating_point() and not key.endswith("bias")
            if is_matrix and id(weight) not in packed:
                kind = ".".join(part for part in f"{name}.{key}".split(".")[2:] if not part.isdigit())
                found[kind.removesuffix(".weight")] += whole_numel(weight) * weight.element_size()
    return dict(found.most_common())


def notes(facts: dict[str, Any]) -> Iterator[str]:
    """A sentence each on what a user may not expect of a base: matrices that are not quantized, a head not taken."""
    kinds, dense_bytes = facts["dense_matrices"], sum(facts["dense_matrices"].values())
    if kinds and dense_bytes >= _NOTED_SHARE * facts["base_bytes"]:
        share = dense_bytes / facts["base_bytes"]
        yield f"Not quantized: {first_of(list(kinds))} ({size(dense_bytes)}, {share:.0%} of the base)."
    if labels := facts.get("head_not_kept"):
        yield (
            "The base has a trained head of these labels in another order, which is drawn anew. To keep it, set "
            f"data.label_names: {json.dumps(labels, ensure_ascii=False)}."
        )
    if note := facts.get("rounded_again"):
        yield note


def rounds_away(certificate: dict[str, Any], quantization: str) -> bool:
    """Whether weights of a merged export become the base's again, without what was trained, if they are quantized so.

    They do where they lie on the grid of the same 4 bits: of an exact match of 42 %, 0 % was left.
    """
    merged_into, trained_on = certificate.get("base", {}).get("weights"), certificate.get("trained_on", {})
    return merged_into == "dequantized" and trained_on.get("quantization") == quantization


def rounded_note(directory: Path, quantization: str) -> str | None:
    """A sentence where a base is a merge into weights of 4 bits, and is rounded to the same 4 bits again."""
    certificate = try_read_json(directory / CERTIFICATE) or {}
    if "quantized" in certificate or not rounds_away(certificate, quantization):
        return None
    return (
        f"{directory} holds what was trained, merged into weights dequantized from {quantization}. Rounded to "
        f"{quantization} again, they are nearly the base's own, without what was trained. Export the run with --base "
        "original, or set model.quantization: none."
    )


def load_exported(
    directory: Path, device: torch.device, model_class: ModelClass = CAUSAL_LM, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The checkpoint in evaluation mode: on a CPU mapped, in fp32; on an accelerator as transformers loads it."""
    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(directory, **trusted)
    if (stored := getattr(config, "quantization_config", None)) is not None:
        section = ModelSection(
            path=str(directory),
            quantization=stored.get("bnb_4bit_quant_type", "nf4"),
            double_quant=bool(stored.get("bnb_4bit_use_double_quant")),
            **trusted,
        )
        if not accelerator.is_accelerator(device):
            section = section.replace(compute_dtype="float32")
        return load_base(section, device, model_class=model_class).model
    if accelerator.is_accelerator(device):
        placed = {"dtype": "auto", "device_map": {"": device}}
        return model_class.from_pretrained(str(directory), config, **placed, **trusted).eval()
    try:  # fp16 products are slow or missing on CPUs, and fp32 holds every value of the file
        return load_mapped(directory, config, torch.float32, device, model_class=model_class, **trusted)
    except NotMappable:
        return model_class.from_pretrained(str(directory), config, dtype=torch.float32, **trusted).eval()


def exported_bytes(directory: Path, device: torch.device) -> int:
    """Memory that `load_exported` takes on ``device``, from the headers; mapped, one cast weight at a time."""
    entries = checkpoint_tensors(directory)
    if accelerator.is_accelerator(device):
        return sum(file.stat().st_size for file in {e.file for e in entries})
    return 4 * max(math.prod(e.shape) for e in entries)
