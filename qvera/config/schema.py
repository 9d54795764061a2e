"""The recipe: one YAML file with five sections and one key. Every default is written here and nowhere else.

The text below each field is its description in the JSON schema (`json_schema`) and in docs/recipe.md.
"""

import os
from collections.abc import Iterator
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, Strict, ValidationError, model_validator

from qvera.config.fields import (
    Bool,
    Fraction,
    NonEmpty,
    NonNegative,
    NonNegativeFloat,
    Number,
    Passes,
    Positive,
    PositiveFloat,
    Section,
    Seed,
)
from qvera.config.problems import describe, move_renamed_keys
from qvera.utils.errors import InputError


class ModelSection(Section):
    """The frozen base model. ``model: some/path`` alone is short for ``model: {path: some/path}``."""

    path: NonEmpty
    """A local directory with safetensors files, or a hub id such as ``meta-llama/Llama-2-7b-hf``."""
    revision: str | None = None
    """The branch, tag or commit of a hub id. Default: the main branch."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """The number format of the frozen linear layers. ``nf4`` and ``fp4`` take 4 bits a weight, ``int8`` takes 8 bits,
    and ``none`` keeps the weights in ``compute_dtype``."""
    double_quant: Bool = True
    """Quantize the scales of the 4-bit weights too (QLoRA, section 3). Saves 0.37 bits a weight."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The dtype of matrix products and activations. ``auto``: bfloat16 where the device supports it, else float16 on a
    GPU and float32 on a CPU."""
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype that the packed 4-bit weights are declared as; their bytes are the same. bfloat16 lets ZeRO-3 shard
    them."""
    stream: Literal["auto"] | Bool = "auto"
    """Keep the 4-bit decoder layers in RAM and bring each to the GPU right before it is used, so that only two of them
    take memory there. For a base that is larger than the GPU; the results are the same. Slower where a batch computes
    for less time than its layers travel. ``auto``: where the base does not fit otherwise. Not with ZeRO-3."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention code. ``auto``: what transformers picks, usually ``sdpa``. On an accelerator ``sdpa`` also takes
    torch's variable-length attention where that runs (``docs/memory.md``). ``flash_attention_2`` needs the flash-attn
    package."""
    trust_remote_code: Bool = False
    """Run Python code that comes with the model. Only for a model whose authors you trust."""
    tokenizer: str | None = None
    """The directory or hub id of another tokenizer. Default: the model's own."""
    added_tokens: list[NonEmpty] = []
    """New tokens, such as ``["<|tool|>"]``. The embedding and the head are frozen, so each new token keeps an initial
    row that is drawn from the mean and spread of the other rows, seeded by the token's text. The adapter and a merged
    export carry the rows and ids. Not supported under ZeRO-3."""
    pad_token: str | None = None
    """The token that pads batches: one of the model's or of ``added_tokens``. Default: the tokenizer's own, else its
    eos token. No row looks at padding, so it may be a token that is used elsewhere."""
    eos_token: str | None = None
    """The token that ends an answer, in place of the tokenizer's (ChatML's ``<|im_end|>``, say): one of the model's or
    of ``added_tokens``."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict each other."""
        if self.quantization == "int8" and self.compute_dtype == "float32":
            yield "compute_dtype", "int8 linears compute in 16 bits; use auto, bfloat16 or float16."
        if self.stream is True and self.quantization not in ("nf4", "fp4"):
            yield "stream", f"only 4-bit layers are streamed, and model.quantization is {self.quantization}."


class AdapterSection(Section):
    """The VeRA adapter (arXiv 2310.11454): vectors d [rank] and b [out_features] for each adapted linear layer."""

    rank: Annotated[int, Strict(), Field(ge=1, le=65_536)] = 256
    """Rows of the shared projection A, and elements of each vector d."""
    b_groups: Positive = 1
    """Split the rank into this many equal groups, each with its own vector b: more trained parameters for the same
    products, as RandLoRA sums several random bases (arXiv 2502.00987). 1 is VeRA. Must divide ``rank``."""
    targets: Literal["all-linear"] | Annotated[list[NonEmpty], Field(min_length=1)] = "all-linear"
    """The layers to adapt: ``all-linear`` (every linear layer but the head), or names such as ``[q_proj, v_proj]``.
    Each name must match a layer."""
    input_scale: Bool = False
    """Train a third vector [in_features] that scales the input of A (RandLoRA's Γ). It starts at 1. Layers that read
    the same input then can't share the product with A."""
    d_initial: Annotated[float, Field(ge=-3e38, le=3e38, allow_inf_nan=False), *Number] = 0.1
    """The initial value of every element of d. Scaling it by c acts like using c·lr as the learning rate of b and lr/c
    as that of d (AdamW without weight decay), so there are no separate learning rates."""
    dropout: Fraction = 0.0
    """The probability of dropping an input of the adapter during training."""
    seed: Seed = 0
    """The seed of the shared projections A and B. The same seed gives the same projections on every machine."""
    train_d: Bool = True
    """Train d as well as b. ``false``: adapters of the same seed can be added, averaged and interpolated exactly."""
    init_from: str | None = None
    """An adapter directory whose vectors to start from. It must have the same rank, b_groups, input_scale, targets and
    seed."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict each other."""
        if self.rank % self.b_groups:
            yield "b_groups", f"{self.b_groups} does not divide adapter.rank ({self.rank})."
        if self.input_scale and not self.train_d:
            yield "input_scale", "is a vector to train, and adapter.train_d is false; remove one of the two."


class DataSource(Section):
    """Rows of one kind, and how they become text."""

    path: NonEmpty
    """A .jsonl, .json, .csv, .tsv or .parquet file, a directory of such files, or a hub dataset id."""
    weight: Passes = 1.0
    """How often each row is seen in an epoch: 2 is twice, 0.5 is every other row (chosen by ``data.seed``, the same
    rows in every epoch). To give a small source half of an epoch, weigh it by rows: 1,000 rows beside 10,000 need a
    weight of 10."""
    split: NonEmpty = "train"
    """The split of a hub dataset."""
    config_name: str | None = None
    """The configuration of a hub dataset."""
    revision: str | None = None
    """The branch, tag or commit of a hub dataset."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt-completion", "text"] = "auto"
    """The layout of a row. ``auto`` looks at the column names of the first row and reports what it found."""
    columns: dict[str, str] = {}
    """The names of your columns where they differ from the format's: ``{prompt: question, completion: answer}``."""
    template: NonEmpty = "auto"
    """The chat template. ``auto``: the tokenizer's own; if it has none, ``plain`` for prompt-completion and text rows,
    else ``alpaca``. Or a named one: alpaca, chatml, llama-2, llama-3, mistral, zephyr, plain."""
    label_names: list[NonEmpty] = []
    """The names of integer labels, from 0, where the answers are such labels: ``[negative, positive]``. Without it a
    number is trained as text."""
    system: str | None = None
    """The system prompt of rows that have none of their own. ``qvera generate`` and ``qvera chat`` use it too."""
    limit: Positive | None = None
    """Use only the first rows of ``path``. Default: all."""


class DataSection(DataSource):
    """Where rows come from, how they become text, and which tokens are trained."""

    mixture: list[DataSource] = []
    """More sources, mixed with ``path``. Each is a mapping of the keys above, with its own format, template and
    weight."""
    eval_path: str | None = None
    """A file of held-out rows. Default: ``eval_fraction`` of each source is held out, chosen by ``seed``."""
    eval_fraction: Fraction = 0.0
    """The share of each source that is held out for evaluation. 0: none."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens the loss covers: every assistant turn, only the last one, or all tokens."""
    max_length: Annotated[int, Strict(), Field(ge=8, lt=2**31)] = 1024
    """The most tokens of a row. ``too_long`` sets what happens to longer rows; they are counted and reported."""
    too_long: Literal["cut-end", "cut-start", "split", "drop"] = "cut-end"
    """What happens to a longer row: cut at the end, cut at the start (after the BOS token), split into several rows, or
    dropped."""
    max_source_length: Positive | None = None
    """The most tokens before the first trained token (VeRA's instruction runs: 768). Default: no limit."""
    max_target_length: Positive | None = None
    """The most tokens from the first trained token on (VeRA's instruction runs: 256). Default: no limit."""
    prefix_once: Bool = True
    """Compute the common beginning of a batch's rows (a system prompt, an instruction) once for all of them, where that
    is faster. The results are the same. Only for Llama-like models with sdpa or eager attention. Attention then tells
    rows apart by a mask, or by their offsets on a GPU that runs torch's variable-length attention."""
    packing: Bool = False
    """Put as many rows as fit into one sequence of ``max_length`` tokens, without padding. Each row attends only to
    itself, and losses and gradients are those of padded rows (tested with sdpa and eager attention and with offsets,
    not on a GPU and not with flash-attn). Replaces ``training.per_device_train_batch_size``."""
    group_by_length: Bool = False
    """Put rows of similar length into one optimizer step. Less padding, but the order is less random."""
    tokenize_processes: Positive | None = None
    """Processes that tokenize. Default: one, and one per core when the rest would take one process another minute. The
    rows are the same. Tokenized rows are kept in a cache (``qvera cache ls``)."""
    eval_limit: Positive | None = None
    """Use only the first held-out rows of each source. Default: all."""
    shuffle: Bool = True
    """Shuffle the rows anew in each epoch. ``false``: the order of the file."""
    seed: Seed = 0
    """The seed of the order of rows, and of the choice of held-out rows."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict each other."""
        if self.eval_path is not None and self.eval_fraction > 0:
            yield "eval_fraction", "held-out rows already come from data.eval_path; remove one of the two."

    @property
    def has_held_out_rows(self) -> bool:
        """Whether the recipe names rows to evaluate on."""
        return self.eval_path is not None or self.eval_fraction > 0


class TrainingSection(Section):
    """The training loop. Keys are named as in transformers' TrainingArguments where the meaning is the same."""

    output_dir: Annotated[NonEmpty, AfterValidator(os.path.normpath)] | None = None
    """The directory of the run. Default: ``runs/`` and the recipe's file name. A ``..`` in it is resolved:
    ``runs/../x`` is ``x``."""
    num_train_epochs: Passes = 1.0
    """Passes over the training rows. A part of an epoch, such as 0.5, is allowed."""
    max_steps: Annotated[int, Strict(), Field(ge=-1, lt=2**31)] = -1
    """Optimizer steps. -1: what ``num_train_epochs`` amounts to."""
    global_batch_size: Positive = 16
    """Rows per optimizer step, over all processes."""
    per_device_train_batch_size: Positive = 4
    """Rows per forward pass on one device. Must divide ``global_batch_size``; gradients are accumulated over
    global_batch_size / (per_device_train_batch_size x processes) passes. Default: 4, or the largest number below it
    that divides ``global_batch_size``."""
    per_device_eval_batch_size: Positive = 4
    """Rows per forward pass of an evaluation."""
    learning_rate: PositiveFloat = 4e-3
    """The highest learning rate, after the warmup. The default is the paper's for 7B models. Small models need more:
    3e-2 for 135M parameters. ``qvera train RECIPE --find-lr`` suggests one."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "linear"
    """The learning rate after the warmup: a decay to zero along a cosine or a line, or constant. The line did better
    than the cosine wherever both were tried (docs/evaluation.md)."""
    warmup_ratio: Fraction = 0.1
    """The share of all steps in which the learning rate rises to its highest."""
    warmup_steps: NonNegative = 0
    """The number of warmup steps. Above 0 it overrides ``warmup_ratio``."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """The optimizer. The 8-bit and paged ones come from bitsandbytes. Under ZeRO only ``adamw``."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    adam_beta1: Fraction = 0.9
    """AdamW's β1."""
    adam_beta2: Fraction = 0.999
    """AdamW's β2."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's ε."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient of all vectors together to this norm. 0: no clipping."""
    initial_scale_power: Annotated[int, Strict(), Field(ge=0, le=24)] = 16
    """The first loss scale of a run that computes in float16: 2 to this power. A step whose gradient overflows is taken
    again with half the scale. 0: begin without scaling."""
    loss_scale_window: Positive = 2000
    """Steps in a row without an overflow after which the loss scale of a float16 run is doubled."""
    gradient_checkpointing: Bool | Literal["auto", "offload"] = "auto"
    """Recompute the activations of a layer in the backward pass, and keep only its input: much less memory, about a
    third more time. ``offload`` keeps these inputs in pinned RAM instead of on the accelerator (on a CPU it is the same
    as ``true``). ``auto``: ``false`` where the plan says that the run fits so with a good margin, else ``true``, else
    ``offload``. `qvera plan` shows what it comes to, and a resumed run keeps it."""
    torch_compile: Bool = False
    """Compile the decoder layers with torch.compile. The first step then takes minutes, and later ones may be faster;
    tested on CPUs only. Not with ZeRO-3 or a streamed base."""
    try_longest_batch: Bool = True
    """Run the longest batch once before the first step, so that a run that does not fit into memory fails at once."""
    on_oom: Literal["save", "halve"] = "save"
    """What to do when memory runs out in a step. The step is undone; then ``save`` saves a checkpoint and ends the run,
    and ``halve`` goes on with half as many rows in a pass and the same global batch. Without dropout the numbers are
    the same up to rounding. Not with a ``deepspeed`` key."""
    loss_chunk_tokens: Positive = 512
    """Tokens whose logits are in memory at the same time in the loss."""
    seed: Seed = 0
    """The seed of everything random in the loop, such as dropout."""
    full_determinism: Bool = False
    """Use deterministic CUDA kernels. Slower, but a resumed run then equals an uninterrupted one to the bit on a GPU
    too."""
    eval_steps: NonNegative = 0
    """Evaluate every this many steps. 0: only at the end, if there are held-out rows."""
    save_steps: Positive = 100
    """Save a checkpoint every this many steps."""
    save_total_limit: Positive = 2
    """How many of the latest checkpoints to keep. The best one is kept besides."""
    load_best_model_at_end: Bool = False
    """Write the vectors with the lowest held-out loss into ``adapter/`` instead of the last ones."""
    early_stopping_patience: NonNegative = 0
    """Stop after this many evaluations without a lower held-out loss. 0: never."""
    report_to: list[NonEmpty] = ["auto"]
    """``tensorboard``, ``wandb`` and others by their usual names. ``auto``: TensorBoard where it is installed.
    metrics.jsonl and report.html are always written."""
    sample_count: NonNegative = 3
    """Held-out prompts that are answered before and after training, for the report."""
    answer_batch_size: Positive = 16
    """Prompts that are answered at the same time, for the samples and the exact match."""
    sample_max_new_tokens: Positive = 160
    """The most tokens of an answer."""
    exact_match_rows: NonNegative = 0
    """Held-out rows that are answered greedily before and after training and compared with their reference. 0: none."""

    @model_validator(mode="before")
    @classmethod
    def _fit_batch_size(cls, keys: object) -> object:
        name = "per_device_train_batch_size"
        if isinstance(keys, dict) and name not in keys and isinstance(rows := keys.get("global_batch_size"), int):
            return {**keys, name: max(size for size in (1, 2, 3, 4) if rows % size == 0)}
        return keys

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict each other."""
        if self.global_batch_size % self.per_device_train_batch_size:
            size = f"training.per_device_train_batch_size ({self.per_device_train_batch_size})"
            yield "global_batch_size", f"{self.global_batch_size} is not a multiple of {size}."


class ExportSection(Section):
    """The defaults of ``qvera export``; its flags override them."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The dtype of the exported weights."""
    base: Literal["original", "dequantized"] = "dequantized"
    """Merge into the dequantized weights that the vectors were trained with, so that the export answers as the run
    does, or into the original 16-bit ones."""
    max_shard_size_bytes: Annotated[int, Strict(), Field(ge=1, le=2**50)] = 5_000_000_000
    """The largest safetensors file, in bytes."""
    certificate_rows: NonNegative = 16
    """Held-out rows on which the trained and the exported model are compared."""


def _path_alone(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class Recipe(Section):
    """A whole run. The sections say what each key means."""

    model: Annotated[ModelSection, BeforeValidator(_path_alone, json_schema_input_type=str | ModelSection)]
    """The frozen base model: a mapping, or its path alone."""
    data: DataSection
    """Where rows come from, how they become text, and which tokens are trained."""
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    """The VeRA adapter."""
    training: TrainingSection = Field(default_factory=TrainingSection)
    """The training loop."""
    export: ExportSection = Field(default_factory=ExportSection)
    """The defaults of ``qvera export``."""
    deepspeed: NonEmpty | None = None
    """How several processes share the work. Null: they sum their gradients and share nothing else; right for almost
    every run. ``zero3``: each process holds only a shard of the frozen 4-bit base, for a base that does not fit on one
    device. ``zero3-offload-cpu`` and ``zero3-offload-nvme``: the shards are kept in RAM or on disk. ``zero1`` and
    ``zero2``: the optimizer's state is sharded, which saves a few MB. Or the path of a DeepSpeed configuration file,
    such as a copy of one in ds_configs/. It must not set what the recipe sets (batch size, precision, clipping,
    schedule)."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys of different sections that contradict each other."""
        names = ("eval_steps", "load_best_model_at_end", "early_stopping_patience")
        used = [name for name in names if getattr(self.training, name)]
        if not self.data.has_held_out_rows:
            for name in used:
                yield f"training.{name}", "needs held-out rows; set data.eval_path or data.eval_fraction."
        elif not self.training.eval_steps:
            for name in used:
                yield f"training.{name}", "needs training.eval_steps above 0."
        if self.model.stream is True and self.deepspeed is not None and self.deepspeed.startswith("zero3"):
            yield "model.stream", "ZeRO-3 brings the layers to the GPU itself; remove one of the two."
        if self.model.stream is True and self.training.torch_compile:
            yield "training.torch_compile", "compiled code does not wait for streamed layers; remove one of the two."
        if self.training.torch_compile and self.deepspeed is not None and self.deepspeed.startswith("zero3"):
            yield "training.torch_compile", "ZeRO-3 gathers weights between a layer's parts; remove one of the two."
        if self.deepspeed is not None and (optim := self.training.optim) != "adamw":
            yield (
                "training.optim",
                (
                    f"{optim} keeps its state in blocks that ZeRO would cut elsewhere with every other number of "
                    "processes. With a deepspeed key use adamw; VeRA's whole optimizer state is a few MB."
                ),
            )

        if self.deepspeed is not None and self.training.on_oom == "halve":
            yield "training.on_oom", "halve: DeepSpeed can't undo a step that its ranks have begun; use save."

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every key written out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, object]:
    """Return the JSON schema of a recipe, with titles, descriptions and defaults, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def parse_recipe(tree: object, source: str, lines: dict[tuple[str, ...], int] | None = None) -> Recipe:
    """Turn a parsed YAML tree into a `Recipe`.

    Args:
        tree: what a YAML reader returned.
        source: the file's name, for messages.
        lines: the line of each key by its path, such as ``("adapter", "rank")``, for messages.

    Raises:
        InputError: with every problem of the recipe, one a line.
    """
    if not isinstance(tree, dict):
        got = "an empty file" if tree is None else type(tree).__name__
        raise InputError(f"{source}: a recipe is a mapping with at least `model` and `data`, got {got}.")
    try:
        return Recipe.model_validate(move_renamed_keys(tree, source))
    except ValidationError as error:
        found = describe(error, Recipe)
    count = len(found)
    listed = ""
    for key, sentence in found:
        line = (lines or {}).get(tuple(key.split(".")))
        listed += "\n  " + ("" if line is None else f"line {line}, ") + f"{key}: {sentence}"
    raise InputError(f"{source}: {count} problem{'s' if count > 1 else ''} in the recipe:{listed}")
