"""What fits on which card: prints the tables of the README and of docs/memory.md, and draws the picture.

tests/gpu/test_plan.py compares the plan behind them with the real code on a fake accelerator.

python bench/plan_table.py docs/plan.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from qvera.config.schema import Recipe, parse_recipe
from qvera.training.plan.activations import offloaded_bytes
from qvera.training.plan.memory import Kind, layer_bytes, plan_memory
from qvera.training.plan.run import Batch, Machine, PlannedRun, Shape, gpu_machine, shape_of
from qvera.utils.formatting import count, size

CARDS_GB = (6, 8, 12, 16, 24, 48, 80)
COMMAND = "python bench/plan_table.py docs/plan.svg"
PICTURE_TOKENS = 2048
CONTEXT_MODEL = "Llama-3 8B"
UNSLOTH_8B_TOKENS = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475}
"""Card in GB → the longest context that unsloth publishes for an 8B at batch 1."""
UNSLOTH_LEAST_GB = {"Llama-2 7B": 5, "Llama-3 8B": 6, "Qwen2.5 14B": 8.5, "Qwen2.5 32B": 26, "Llama-2 70B": 41}
"""Model → the least memory that unsloth publishes for QLoRA of that size."""
LEAST_TOKENS = 512
_SHORTEST_TOKENS = 64

# hidden, ff, layers, heads, kv heads, vocabulary, longest: the config.json of Llama-2, Llama-3 and CodeLlama
_MODELS = {
    "Llama-2 7B": (4096, 11008, 32, 32, 32, 32000, 4096),
    "Llama-3 8B": (4096, 14336, 32, 32, 8, 128256, 8192),
    "Llama-2 13B": (5120, 13824, 40, 40, 40, 32000, 4096),
    "CodeLlama 34B": (8192, 22016, 48, 64, 8, 32000, 16384),
    "Llama-2 70B": (8192, 28672, 80, 64, 8, 32000, 4096),
}
# only in the table of the least memory, for the sizes that others publish
_MORE_MODELS = {
    "Qwen2.5 14B": (5120, 13824, 48, 40, 8, 152064, 32768),
    "Qwen2.5 32B": (5120, 27648, 64, 40, 8, 152064, 32768),
}

# type and config.json of gpt-oss-20b, Qwen3-30B-A3B and Mixtral 8x7B; their experts are frozen here
_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss-20b": ("gpt_oss", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "max_position_embeddings": 131072,
        "num_local_experts": 32, "num_experts_per_tok": 4,
    }),
    "Qwen3-30B-A3B": ("qwen3_moe", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "num_experts": 128, "num_experts_per_tok": 8,
    }),
    "Mixtral 8x7B": ("mixtral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }),
}  # fmt: skip

_COLOURS: dict[Kind, tuple[str, str, str]] = {
    "base": ("4-bit base", "#8a949b", "#6a737b"),
    "vectors": ("projections, vectors, optimizer", "#00696f", "#5cc7c0"),
    "checkpoints": ("layer inputs", "#d08a2e", "#e0a458"),
    "transient": ("one layer, recomputed", "#a34b6b", "#d07a98"),
    "loss": ("loss", "#4c63b6", "#8fa3e8"),
    "runtime": ("CUDA context", "#c9cfd2", "#3c444a"),
}  # fmt: skip


@cache
def shapes() -> dict[str, Shape]:
    """The shapes of the models of the table, by name."""
    return {name: _shape(name) for name in (*_MODELS, *_MIXTURES)}


@cache
def _shape(name: str) -> Shape:
    if name in _MIXTURES:
        model_type, tree = _MIXTURES[name]
        config = AutoConfig.for_model(model_type, **tree, tie_word_embeddings=False)
    else:
        hidden, ff, layers, heads, kv, vocabulary, longest = {**_MODELS, **_MORE_MODELS}[name]
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=ff, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, vocab_size=vocabulary, max_position_embeddings=longest, tie_word_embeddings=False,
        )  # fmt: skip
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config))


def recipe_of(rank: int, checkpointing: bool | str = True, stream: bool = False, **training: Any) -> Recipe:
    """A recipe with every default but the rank, where base and activations are kept, and keys of ``training``."""
    tree: dict[str, Any] = {
        "model": {"path": "-", "stream": stream}, "data": {"path": "-"}, "adapter": {"rank": rank},
        "training": {"gradient_checkpointing": checkpointing, **training},
    }  # fmt: skip
    return parse_recipe(tree, "the table")


def _gpu(card_bytes: int) -> Machine:
    return gpu_machine(recipe_of(256).model, card_bytes)


def _run(name: str, tokens: int, checkpointing: bool | str = True, stream: bool = False, **training: Any) -> PlannedRun:
    batch = Batch(1, tokens, tokens, False, False, "", tokens)
    return PlannedRun(_shape(name), recipe_of(256, checkpointing, stream, **training), batch, _gpu(0))


@cache
def total_bytes(name: str, tokens: int, stream: bool = False, **training: Any) -> int:
    """Device memory of training that model at r=256 on one row of so many tokens."""
    return plan_memory(_run(name, tokens, stream=stream, **training)).total_bytes


def longest_tokens(name: str, card_bytes: int, stream: bool = False) -> int:
    """The longest single row, in powers of two up to what the model was made for, that fits; 0: none of 64 tokens."""
    tokens, found = _SHORTEST_TOKENS, 0
    while tokens <= _shape(name).longest_tokens and total_bytes(name, tokens, stream) <= card_bytes:
        found, tokens = tokens, tokens * 2
    return found


def _cell(name: str, card_bytes: int) -> str:
    """The longest row on a card; with an asterisk where it takes a streamed base."""
    resident, streamed = longest_tokens(name, card_bytes), longest_tokens(name, card_bytes, stream=True)
    if streamed > resident:
        return f"{streamed:,}*"
    return f"{resident:,}" if resident else "–"


def longest_context(name: str, card_bytes: int, checkpointing: bool | str) -> int:
    """The longest single row, in steps of 64 tokens, whatever length the model was made for; 0: none."""
    low, high = 0, 2**14  # in 64 tokens
    while low < high:
        middle = (low + high + 1) // 2
        fits = plan_memory(_run(name, 64 * middle, checkpointing)).total_bytes <= card_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return 64 * low


def contexts() -> str:
    """The table of docs/memory.md: how long a row of Llama-3 8B may be, beside what unsloth publishes."""
    lines = [
        f"Made by `{COMMAND}`: the longest row of Llama-3 8B at batch 1, VeRA r=256 on all linears, in the recipe's two modes.",
        "unsloth's figures are its own, for LoRA r=32 on cards of that name (unsloth.ai/docs/basics/unsloth-benchmarks). Ours are",
        "**computed, not measured**, for decimal GB with 0.5 GB for the CUDA context.",
        "",
        "| card | layer inputs on the card | `gradient_checkpointing: offload` | pinned RAM for that | unsloth |",
        "|---|---|---|---|---|",
    ]
    for gb, published in UNSLOTH_8B_TOKENS.items():
        there, offloaded = (longest_context(CONTEXT_MODEL, gb * 10**9, mode) for mode in (True, "offload"))
        pinned = offloaded_bytes(_run(CONTEXT_MODEL, offloaded, "offload")) if offloaded else 0
        lines.append(f"| {gb} GB | {there:,} | {offloaded:,} | {size(pinned)} | {published:,} |")
    return "\n".join(lines) + "\n"


def least() -> str:
    """The table of docs/memory.md: the least memory for each size of model, beside what unsloth publishes."""
    lines = [
        f"The least memory for one row of {LEAST_TOKENS} tokens (the same command and settings, `training.loss_chunk_tokens: 128`),",
        "**computed, not measured**:",
        "",
        "| | base on the card | `model.stream: true` | RAM for that | unsloth QLoRA |",
        "|---|---|---|---|---|",
    ]
    for name, published in UNSLOTH_LEAST_GB.items():
        resident, streamed = (
            total_bytes(name, LEAST_TOKENS, stream, loss_chunk_tokens=128) for stream in (False, True)
        )
        layers = sum(layer_bytes(_run(name, LEAST_TOKENS, stream=True)))
        lines.append(f"| {name} | {size(resident)} | {size(streamed)} | {size(layers)} | {published} GB |")
    return "\n".join(lines) + "\n"


def published() -> str:
    """The plan's column of docs/first-machine.md: torchtune's case in GiB, and LLaMA-Factory's in GB."""
    both = Batch(2, 2048, 2 * 2048, False, False, "", 2048)
    parts = plan_memory(PlannedRun(_shape("Llama-3 8B"), recipe_of(256), both, _gpu(0))).peak
    without = sum(part.bytes for part in parts if part.kind != "runtime")
    sevens = (f"{total_bytes('Llama-2 7B', 1000 * k) / 1e9:.1f}" for k in (1, 2, 4, 8, 16, 32, 64, 100))
    return f"{without / 2**30:.1f} GiB without the CUDA context\n{' '.join(sevens)} GB\n"


def markdown() -> str:
    """The table of the README."""
    head = [f"{gb} GB" for gb in CARDS_GB]
    lines = [
        f"Made by `{COMMAND}`. The longest row, in tokens, at batch 1: NF4, VeRA r=256 on all linears, bf16,",
        "gradient checkpointing, at most the model's own context. Decimal GB, 0.5 of them for the CUDA context. \\*: with the base",
        "streamed from RAM (`model.stream`, slower). The last three have experts, in 4 bits too. **Computed, not measured.**",
        "",
        "| | memory at 512 tokens | " + " | ".join(head) + " |",
        "|---|---|" + "---|" * len(head),
    ]
    for name in shapes():
        shown = [_cell(name, gb * 10**9) for gb in CARDS_GB]
        lines.append(f"| {name} | {size(total_bytes(name, 512))} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _stacks() -> Iterator[tuple[str, list[tuple[Kind, int]]]]:
    batch = Batch(1, PICTURE_TOKENS, PICTURE_TOKENS, False, False, "", PICTURE_TOKENS)
    merged: dict[str, Kind] = {"projections": "vectors"}
    for name, shape in shapes().items():
        parts = dict.fromkeys(_COLOURS, 0)
        for part in plan_memory(PlannedRun(shape, recipe_of(256), batch, _gpu(0))).peak:
            parts[merged.get(part.kind, part.kind)] += part.bytes
        yield name, [(kind, held) for kind, held in parts.items() if held]


def picture() -> str:
    """Where the memory goes for each model, against the cards, as a standalone SVG for light and dark pages."""
    width, left, top, row = 860, 118, 58, 42
    right = width - 24
    stacks = list(_stacks())
    scale = (right - left) / 52e9
    height = top + row * len(stacks) + 34
    dark = "".join(f".k-{kind}{{fill:{colour}}}" for kind, (_, _, colour) in _COLOURS.items())
    light = "".join(f".k-{kind}{{fill:{colour}}}" for kind, (_, colour, _) in _COLOURS.items())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Memory of training on one row of {PICTURE_TOKENS:,} tokens, by model, against cards of 6 to 48 '
        f'GB">',
        "<style>text{font:13px system-ui,sans-serif;fill:#1a1d20}.soft{fill:#555d66;font-size:12px}"
        f".card{{stroke:#a3abb0;stroke-dasharray:3 3}}{light}"
        f"@media(prefers-color-scheme:dark){{text{{fill:#e7e9ea}}.soft{{fill:#a1a9b1}}.card{{stroke:#6a737b}}{dark}}}</style>",
    ]
    x = 12
    for kind, (label, _, _) in _COLOURS.items():
        parts.append(f'<rect class="k-{kind}" x="{x}" y="8" width="11" height="11"/>')
        parts.append(f'<text class="soft" x="{x + 16}" y="18">{escape(label)}</text>')
        x += 30 + round(6.6 * len(label))
    for gb in CARDS_GB[:-1]:
        place = round(left + gb * 1e9 * scale, 1)
        parts.append(f'<line class="card" x1="{place}" x2="{place}" y1="{top - 8}" y2="{height - 26}"/>')
        parts.append(f'<text class="soft" x="{place}" y="{top - 14}" text-anchor="middle">{gb} GB</text>')
    for index, (name, stack) in enumerate(stacks):
        y, x_at = top + row * index + 6, float(left)
        parts.append(f'<text x="{left - 10}" y="{y + 18}" text-anchor="end">{escape(name)}</text>')
        for kind, held in stack:
            said = f"{name}: {_COLOURS[kind][0]} {size(held)}"
            parts.append(
                f'<rect class="k-{kind}" x="{x_at:.1f}" y="{y}" width="{held * scale:.1f}" height="26">'
                f"<title>{escape(said)}</title></rect>"
            )
            x_at += held * scale
        total = sum(held for _, held in stack)
        parts.append(f'<text x="{x_at + 6:.1f}" y="{y + 18}">{size(total)}</text>')
    parts.append(
        f'<text class="soft" x="{left}" y="{height - 8}">One row of {count(PICTURE_TOKENS)} tokens, r=256, all '
        f"linears, bf16, "
        "gradient checkpointing. Computed, not measured.</text></svg>"
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Print the table, and write the picture where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("svg", nargs="?", type=Path, help="write the picture there")
    args = parser.parse_args()
    print(markdown())
    print(contexts())
    print(least())
    print(published(), end="")
    if args.svg is not None:
        args.svg.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
