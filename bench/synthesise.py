"""Write a checkpoint of a real shape with random weights: what 7B to 70B are measured on where no hub is reachable.

16-bit: normal weights of deviation 0.02, seeded by tensor, written shard by shard. `--nf4` writes bitsandbytes'
serialized 4-bit form directly, layer by layer (random nibbles, statistics as of such weights): 37 GB for 70B. `--fp8` writes
linears in FP8 with a factor for each block of 128 x 128, as Qwen publishes them. With a byte-level tokenizer.

    python bench/synthesise.py 7b /tmp/7b            13.5 GB
    python bench/synthesise.py 70b /tmp/70b --nf4    37 GB
    python bench/synthesise.py qwen3-30b /tmp/moe    61 GB, with single experts as the hub has them (--fp8: 31 GB; --nf4: 17 GB,
                                                     stacked)
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

_LLAMA = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _shape(hidden: int, ff: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    return {
        **_LLAMA, "hidden_size": hidden, "intermediate_size": ff, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, **others,
    }  # fmt: skip


SHAPES = {
    "host": _shape(64, 128, 6, 2, 1),  # for time of the host: products that take next to nothing
    "tiny": _shape(256, 704, 3, 4, 2),
    "1b": _shape(2048, 5632, 22, 32, 4),
    "7b": _shape(4096, 11008, 32, 32, 32),
    "8b": _shape(4096, 14336, 32, 32, 8, vocab_size=128256),
    "13b": _shape(5120, 13824, 40, 40, 40),
    "70b": _shape(8192, 28672, 80, 64, 8),
    "qwen3-30b": _shape(
        2048, 6144, 48, 32, 4, model_type="qwen3_moe", vocab_size=151936, head_dim=128, moe_intermediate_size=768,
        num_experts=128, num_experts_per_tok=8, max_position_embeddings=40960,
    ),
}  # fmt: skip
DEVIATION = 0.02
SHARD_BYTES = 5_000_000_000
BLOCK, NESTED_BLOCK = 64, 256
FP8_BLOCK = 128
_ST_NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
Spec = tuple[str, torch.dtype, tuple[int, ...]]


def config_of(shape: str) -> Any:
    """The config of one of `SHAPES`: Llama's, or that of its model type."""
    tree = dict(SHAPES[shape])
    kind = tree.pop("model_type", "llama")
    name = {"llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[kind]
    return AutoConfig.for_model(kind, dtype="bfloat16", architectures=[name], **tree)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three markers; ids below 260, so it fits every shape."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def weights(config: Any, stacked: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint in the order of its layers; ``stacked``: a layer's experts are one tensor."""
    h, ff, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    q, experts = config.num_attention_heads * config.head_dim, getattr(config, "num_experts", 0)
    yield "model.embed_tokens.weight", (config.vocab_size, h)
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}"
        yield f"{p}.input_layernorm.weight", (h,)
        for name, shape in (("q", (q, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, q))):
            yield f"{p}.self_attn.{name}_proj.weight", shape
        yield f"{p}.post_attention_layernorm.weight", (h,)
        mlp = (("gate", (ff, h)), ("up", (ff, h)), ("down", (h, ff)))
        if not experts:
            yield from ((f"{p}.mlp.{name}_proj.weight", shape) for name, shape in mlp)
            continue
        yield from ((f"{p}.self_attn.{name}_norm.weight", (config.head_dim,)) for name in "qk")
        yield f"{p}.mlp.gate.weight", (experts, h)
        ff = config.moe_intermediate_size
        if stacked:
            yield f"{p}.mlp.experts.gate_up_proj", (experts, 2 * ff, h)
            yield f"{p}.mlp.experts.down_proj", (experts, h, ff)
            continue
        for e in range(experts):
            for name, shape in (("gate", (ff, h)), ("up", (ff, h)), ("down", (h, ff))):
                yield f"{p}.mlp.experts.{e}.{name}_proj.weight", shape
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (config.vocab_size, h)


def is_quantized(name: str) -> bool:
    return "_proj" in name


def specs_16bit(config: Any, dtype: torch.dtype) -> list[Spec]:
    return [(name, dtype, shape) for name, shape in weights(config)]


def specs_fp8(config: Any) -> list[Spec]:
    """Linears in FP8, each with its factors behind it; the others in bf16."""
    found: list[Spec] = []
    for name, shape in weights(config):
        if is_quantized(name):
            found.append((name, torch.float8_e4m3fn, shape))
            blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
            found.append((f"{name}_scale_inv", torch.bfloat16, blocks))
        else:
            found.append((name, torch.bfloat16, shape))
    return found


def specs_nf4(config: Any) -> list[Spec]:
    """bitsandbytes' serialized tensors for each weight (double quantization, bf16 quant storage)."""
    found: list[Spec] = []
    for name, shape in weights(config, stacked=True):
        if not is_quantized(name):
            found.append((name, torch.bfloat16, shape))
            continue
        n, experts = math.prod(shape), shape[0] if len(shape) == 3 else 1
        found += [
            (name, torch.bfloat16, (n // 4, 1)),
            (f"{name}.absmax", torch.uint8, (n // BLOCK,)),
            (f"{name}.nested_absmax", torch.float32, (experts * -(-n // experts // BLOCK // NESTED_BLOCK),)),
            (f"{name}.nested_quant_map", torch.float32, (256,)),
            (f"{name}.quant_map", torch.float32, (16,)),
            (f"{name}.quant_state.bitsandbytes__nf4", torch.uint8, (len(_state_json(shape)),)),
        ]
    return found


def _state_json(shape: tuple[int, ...]) -> bytes:
    offset = 2.4 * DEVIATION
    state = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
        "nested_offset": [offset] * shape[0] if len(shape) == 3 else offset,
    }  # fmt: skip
    return json.dumps(state).encode()


@functools.cache
def _normal_fp8() -> np.ndarray:
    """256 values of a normal distribution that fills FP8's range, uint8: random bytes choose among them."""
    values = torch.special.ndtri((torch.arange(256) + 0.5) / 256)
    return (values * (448 / values.max())).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _random_bytes(number: int, count: int) -> np.ndarray:
    drawn = np.random.Generator(np.random.SFC64([7, number])).integers(0, 2**64, size=-(-count // 8), dtype=np.uint64)
    return drawn.view(np.uint8)[:count]


def _values(spec: Spec, number: int, shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
    name, dtype, shape = spec
    if dtype is torch.float8_e4m3fn:
        drawn = _normal_fp8()[_random_bytes(number, int(np.prod(shape)))]
        return torch.from_numpy(drawn).view(dtype).view(shape)
    if name.endswith("_scale_inv"):
        return torch.full(shape, DEVIATION * 2.89 / 448, dtype=dtype)
    if "norm." in name:
        return torch.ones(shape, dtype=dtype)
    if name.endswith((".nested_quant_map", ".quant_map")):
        from bitsandbytes import functional as bnb

        return bnb.create_dynamic_map().float() if "nested" in name else bnb.get_4bit_type("nf4", device="cpu")
    if ".quant_state." in name:
        return torch.frombuffer(bytearray(_state_json(shapes[name.split(".quant_state")[0]])), dtype=torch.uint8)
    if name.endswith(".nested_absmax"):
        return torch.full(shape, 0.5 * DEVIATION)
    if name.endswith(".absmax") or (
        dtype is torch.bfloat16 and len(shape) == 2 and shape[1] == 1 and is_quantized(name)
    ):
        drawn = _random_bytes(number, int(np.prod(shape)) * dtype.itemsize)
        return torch.from_numpy(drawn).view(dtype).view(shape)
    generator = torch.Generator().manual_seed(number)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, DEVIATION, generator=generator).to(dtype)


def write(out: Path, specs: list[Spec], shapes: dict[str, tuple[int, ...]]) -> None:
    """Shards and index, one tensor in memory at a time."""
    groups: list[list[tuple[int, Spec]]] = [[]]
    filled = 0
    for number, spec in enumerate(specs):
        size = int(np.prod(spec[2])) * spec[1].itemsize
        if groups[-1] and filled + size > SHARD_BYTES and not spec[0].count(".weight."):
            groups.append([])
            filled = 0
        groups[-1].append((number, spec))
        filled += size
    where: dict[str, str] = {}
    for index, group in enumerate(groups, start=1):
        file = out / f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for _, (name, dtype, shape) in group:
            size = int(np.prod(shape)) * dtype.itemsize
            header[name] = {"dtype": _ST_NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            at, where[name] = at + size, file.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(file, "wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            for number, spec in group:
                handle.write(_values(spec, number, shapes).contiguous().view(-1).view(torch.uint8).numpy().data)
        print(f"{file.name}: {at / 1e9:.1f} GB", file=sys.stderr)
    index_file = {
        "metadata": {"total_size": sum(int(np.prod(s)) * d.itemsize for _, d, s in specs)},
        "weight_map": where,
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index_file))


def synthesise(
    shape: str,
    out: Path,
    *,
    nf4: bool = False,
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
) -> Path:
    """Write the checkpoint into ``out``, which must not exist; refuses where the disk has no room.

    ``layers``: decoder layers, where not those of the shape.

    Raises:
        SystemExit: not enough free disk.
    """
    config = config_of(shape)
    config.num_hidden_layers = layers or config.num_hidden_layers
    specs = specs_nf4(config) if nf4 else specs_fp8(config) if fp8 else specs_16bit(config, dtype)
    size = sum(int(np.prod(s)) * d.itemsize for _, d, s in specs)
    free = shutil.disk_usage(out.parent).free
    if free < size + 2_000_000_000:
        raise SystemExit(f"{out}: needs {size / 1e9:.1f} GB and 2 GB to spare; {free / 1e9:.1f} GB are free")
    out.mkdir(parents=True)
    if nf4:
        config.quantization_config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "bfloat16",
        }  # fmt: skip
    if fp8:
        config.quantization_config = {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }  # fmt: skip
    write(out, specs, dict(weights(config, stacked=nf4)))
    tokenizer().save_pretrained(out)
    config.save_pretrained(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    synthesise(args.shape, args.out, nf4=args.nf4, fp8=args.fp8)
    print(f"{args.out}: written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
