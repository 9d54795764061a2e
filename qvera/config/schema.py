"""A recipe: one YAML file, five sections and a key, every default written here and nowhere else.

A recipe is read strictly. An unknown key at any depth, a wrong type and a value out of range are all reported at
once, each with its key, what was found, what is accepted and (for a misspelt key) the nearest name.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import field
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from qvera.config.explain import explain
from qvera.utils.errors import InputError

_STRICT = ConfigDict(extra="forbid")


def _yaml_float(value: Any) -> Any:
    # YAML 1.1 reads `4e-3` (no dot) as a string; people write learning rates that way.
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


# pydantic's lax mode would take True for 1 and "yes" for True.
_Int = Annotated[int, Strict()]
_Bool = Annotated[bool, Strict()]
_Float = Annotated[float, BeforeValidator(_yaml_float), Strict()]
Positive = Annotated[_Int, Field(ge=1)]
NonNegative = Annotated[_Int, Field(ge=0)]
Seed = Annotated[_Int, Field(ge=0, lt=2**64)]  # what torch's and numpy's generators take
Fraction = Annotated[_Float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[_Float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[_Float, Field(ge=0.0, allow_inf_nan=False)]
NonEmpty = Annotated[str, Field(min_length=1)]

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(config=_STRICT, kw_only=True)
class ModelSection:
    """The frozen base model. ``model: some/path`` alone is short for ``model: {path: some/path}``."""

    path: NonEmpty
    """A local directory with safetensors (sharded or not), or a hub id such as ``meta-llama/Llama-2-7b-hf``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen linears are stored. ``none`` keeps them in the compute dtype."""
    double_quant: _Bool = True
    """Quantize the 4-bit scales too (QLoRA, section 3): 0.37 bits a weight less."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The dtype of matrix products and activations. ``auto``: bfloat16 where the device has it, else float16."""
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype in which packed 4-bit weights are held; bytes are the same. bfloat16 lets ZeRO-3 shard them."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: _Bool = False
    """Run Python code that comes with the model. Only for a model whose authors you trust."""
    tokenizer: str | None = None
    """Another directory or hub id for the tokenizer. Default: the model's own."""
    added_tokens: list[NonEmpty] = field(default_factory=list)
    """New tokens, such as ``["<|tool|>"]``. Embedding and head are frozen: each token keeps the row that is drawn for it,
    by its text, from the mean and spread of the others; the adapter's vectors learn what it is for. Rows and ids go with the
    adapter and into a merged export. Not under ZeRO-3."""
    pad_token: str | None = None
    """A token of the model, or an added one, to pad batches with. Default: the tokenizer's, else its eos. Padding is masked, so it
    needs no token of its own."""
    eos_token: str | None = None
    """A token of the model, or an added one, that ends an answer in place of the tokenizer's (ChatML's ``<|im_end|>``, say)."""


@dataclass(config=_STRICT, kw_only=True)
class AdapterSection:
    """The VeRA adapter (arXiv 2310.11454): vectors d [rank] and b [out_features] for each adapted linear."""

    rank: Positive = 256
    b_groups: Positive = 1
    """Cut the rank into so many equal groups, each with a b of its own: more trained numbers for the same products, as RandLoRA
    sums several random bases (arXiv 2502.00987). 1 is VeRA. Must divide ``rank``."""
    targets: Literal["all-linear"] | Annotated[list[NonEmpty], Field(min_length=1)] = "all-linear"
    """``all-linear`` (every linear but the head) or names such as ``[q_proj, v_proj]``; each must match something."""
    input_scale: _Bool = False
    """Train a third vector, [in_features], that scales what A reads (RandLoRA's Γ). It starts at 1. Layers then don't share z."""
    d_initial: _Float = 0.1
    """The start of every element of d. c times it, at ``learning_rate`` r, is what rates of c r for b and r / c for d would be
    (AdamW without weight decay): rates apart need no key of their own."""
    dropout: Fraction = 0.0
    seed: Seed = 0
    """The seed of the shared projections A and B. The same seed gives the same numbers on every machine."""
    train_d: _Bool = True
    """Train d as well as b. Without it adapters of one seed can be added, averaged and interpolated exactly."""
    init_from: str | None = None
    """Start from the vectors of this adapter directory (same rank, b_groups, input_scale, targets and seed)."""


@dataclass(config=_STRICT, kw_only=True)
class Source:
    """Rows of one kind."""

    path: NonEmpty
    """A .jsonl, .json, .csv, .tsv or .parquet file, a directory of them, or a hub dataset id."""
    weight: PositiveFloat = 1.0
    """How often each row is seen in an epoch: 2 is twice, 0.5 every other row (``data.seed`` says which; the same in every epoch).
    For shares of an epoch weigh by rows: 1,000 beside 10,000 are half of it at a weight of 10."""
    split: NonEmpty = "train"
    """The split of a hub dataset."""
    config_name: str | None = None
    """The configuration of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt-completion", "text"] = "auto"
    """``auto`` looks at the column names of the first row and says what it found."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of your columns where they differ: ``{prompt: question, completion: answer}``."""
    template: NonEmpty = "auto"
    """``auto``: the tokenizer's own chat template; without one ``plain`` for prompt-completion and text rows, else ``alpaca``.
    Or a named one: alpaca, chatml, llama-2, llama-3, mistral, zephyr, plain."""
    system: str | None = None
    """A system prompt for rows that bring none."""
    limit: Positive | None = None
    """Use only the first rows of ``path``."""


@dataclass(config=_STRICT, kw_only=True)
class DataSection(Source):
    """Where rows come from, how they become text, and which tokens are trained."""

    mixture: list[Source] = field(default_factory=list)
    """More sources, mixed with ``path``: each a mapping of the keys above, with a format, a template and a weight of its own."""
    eval_path: str | None = None
    """Held-out rows from another file. Without it ``eval_fraction`` of each source is held out, chosen by ``seed``."""
    eval_fraction: Fraction = 0.0
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Train every assistant turn, only the last one, or all tokens."""
    max_length: Annotated[_Int, Field(ge=8)] = 1024
    """Tokens of a row. What becomes of longer ones says ``too_long``; it is counted and reported."""
    too_long: Literal["cut-end", "cut-start", "split", "drop"] = "cut-end"
    """Longer rows lose tokens at the end or (after a BOS) at the start, or become several rows, or are left out."""
    max_source_length: Positive | None = None
    """Tokens kept of what comes before the first trained token (VeRA's instruction runs: 768)."""
    max_target_length: Positive | None = None
    """Tokens kept from the first trained token on (VeRA's instruction runs: 256)."""
    prefix_once: _Bool = True
    """Compute what the rows of a batch begin with (a system prompt, an instruction) once for all of them, where that pays. The
    numbers are the same; only Llama-like models with sdpa or eager attention can."""
    packing: _Bool = False
    """Put as many rows as fit into ``max_length`` tokens into one sequence, each seeing itself only: no padding. Losses and
    gradients are those of the padded rows (tested with sdpa and eager; flash attention has not run yet). Takes the place of
    ``training.per_device_train_batch_size``."""
    group_by_length: _Bool = False
    """Put rows of like length into one optimizer step, so that less is padded. Costs some of the order's randomness."""
    tokenize_processes: Positive | None = None
    """Processes that tokenize. Default: one, and as many as there are cores once it shows that the rest would take one alone
    another minute. The rows are the same. What was tokenized before is found in the cache (``qvera cache ls``)."""
    eval_limit: Positive | None = None
    """Use only the first held-out rows of each source."""
    shuffle: _Bool = True
    seed: Seed = 0


@dataclass(config=_STRICT, kw_only=True)
class TrainingSection:
    """The loop. Names are those of transformers' TrainingArguments where the meaning is the same."""

    output_dir: str | None = None
    """Where the run is written. Default: ``runs/`` and the recipe's file name."""
    num_train_epochs: PositiveFloat = 1.0
    max_steps: Annotated[_Int, Field(ge=-1)] = -1
    """Optimizer steps; -1: what ``num_train_epochs`` comes to."""
    global_batch_size: Positive = 16
    """Rows per optimizer step, whatever the number of processes."""
    per_device_train_batch_size: Positive = 4
    """Rows per forward pass on one device; accumulation follows from ``global_batch_size``."""
    per_device_eval_batch_size: Positive = 4
    learning_rate: PositiveFloat = 4e-3
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "linear"
    """What follows the warmup. A linear decay to zero did better than the cosine wherever both were tried (docs/evaluation.md)."""
    warmup_ratio: Fraction = 0.1
    warmup_steps: NonNegative = 0
    """Overrides ``warmup_ratio`` when above 0."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient of all vectors together to this norm; 0: do not clip."""
    gradient_checkpointing: _Bool = True
    rehearse_longest_batch: _Bool = True
    """Run the longest batch once before the first step, so that a run that will not fit says so at once."""
    loss_chunk_tokens: Positive = 512
    """Tokens whose logits exist at one time in the loss."""
    seed: Seed = 0
    full_determinism: _Bool = False
    """Deterministic CUDA kernels (slower): a resumed run then equals an uninterrupted one to the bit there too."""
    eval_steps: NonNegative = 0
    """Evaluate every so many steps; 0: only at the end, where there are held-out rows."""
    save_steps: Positive = 100
    save_total_limit: Positive = 2
    """Checkpoints kept (the best one is kept besides)."""
    load_best_model_at_end: _Bool = False
    """Leave the vectors with the lowest held-out loss in ``adapter/`` instead of the last ones."""
    early_stopping_patience: NonNegative = 0
    """Stop after so many evaluations without a lower held-out loss; 0: never."""
    report_to: list[NonEmpty] = field(default_factory=lambda: ["auto"])
    """``tensorboard``, ``wandb``, ... by their usual names; ``auto``: TensorBoard where it is installed. metrics.jsonl and
    report.html are always written."""
    sample_count: NonNegative = 3
    """Held-out prompts answered before and after training, for the report."""
    answer_batch_size: Positive = 16
    """Prompts answered at a time, for the samples and the exact match."""
    sample_max_new_tokens: Positive = 160
    exact_match_rows: NonNegative = 0
    """Held-out rows answered greedily before and after training and compared with their reference."""


@dataclass(config=_STRICT, kw_only=True)
class ExportSection:
    """What ``qvera export`` does unless its flags say otherwise."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    base: Literal["original", "dequantized"] = "original"
    """Merge into the 16-bit weights, or into the dequantized ones that the vectors were trained against."""
    max_shard_size_bytes: Positive = 5_000_000_000
    certificate_rows: NonNegative = 16
    """Held-out rows on which the trained and the exported model are compared."""


@dataclass(config=_STRICT, kw_only=True)
class Recipe:
    """A whole run. See the sections for what each key means."""

    model: ModelSection
    data: DataSection
    adapter: AdapterSection = field(default_factory=AdapterSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    export: ExportSection = field(default_factory=ExportSection)
    deepspeed: NonEmpty | None = None
    """How several processes share the work. Null: they only add up their gradients. ``zero1`` or ``zero2``: they share the
    optimizer's state too (a few MB). ``zero3``: each also holds only its share of the frozen 4-bit base;
    ``zero3-offload-cpu`` and ``zero3-offload-nvme`` keep that share off the device. Or a DeepSpeed configuration file, such as a
    copy of one in ds_configs/; what a recipe says too (batch size, precision, clipping, schedule) may not be in it."""

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, defaults filled in."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeTest:
    """The ramp of a learning-rate range test (Smith, arXiv 1506.01186, section 3.3): ``--find-lr``. No part of a recipe."""

    start: float = 1e-5
    """``--lr-from``: the first step's rate, too small to do anything."""
    end: float = 1.0
    """``--lr-to``: the last step's, which should be too much."""
    steps: int = 100
    """``--lr-steps``: optimizer steps, each with a rate larger by the same factor."""

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end < float("inf"):
            raise InputError(
                f"--lr-from {self.start:g}, --lr-to {self.end:g}: expected two rates, 0 < from < to, such as 1e-5 and 1."
            )
        if self.steps < 10:
            raise InputError(f"--lr-steps: takes a whole number >= 10 (a curve needs points), got {self.steps}.")


_RECIPE_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def parse_recipe(tree: Any, source: str) -> Recipe:
    """Turn a parsed YAML tree into a `Recipe`.

    Args:
        tree: what ``yaml.safe_load`` gave.
        source: the file's name, for messages.

    Raises:
        InputError: with every problem of the recipe, one a line.
    """
    if not isinstance(tree, dict):
        got = "an empty file" if tree is None else type(tree).__name__
        raise InputError(f"{source}: a recipe is a mapping with at least `model` and `data`, got {got}.")
    tree = dict(tree)
    if isinstance(tree.get("model"), str):
        tree["model"] = {"path": tree["model"]}
    try:
        recipe = _RECIPE_ADAPTER.validate_python(tree)
    except ValidationError as failure:
        problems: dict[str, str] = {}
        for error in failure.errors():
            key, sentence = explain(error, Recipe)
            problems.setdefault(key, sentence)
        lines = "\n".join(f"  {key}: {sentence}" for key, sentence in problems.items())
        count = len(problems)
        raise InputError(f"{source}: {count} problem{'s' if count > 1 else ''} in the recipe:\n{lines}") from None
    problems_across = _check_across(recipe)
    if problems_across:
        lines = "\n".join(f"  {line}" for line in problems_across)
        raise InputError(f"{source}: the recipe's keys contradict each other:\n{lines}")
    return recipe


def _check_across(recipe: Recipe) -> list[str]:
    """Problems that no single key shows."""
    problems = []
    training, data, model = recipe.training, recipe.data, recipe.model
    if training.global_batch_size % training.per_device_train_batch_size:
        problems.append(
            f"training.global_batch_size: {training.global_batch_size} is not a multiple of "
            f"training.per_device_train_batch_size ({training.per_device_train_batch_size})."
        )
    if recipe.adapter.rank % recipe.adapter.b_groups:
        problems.append(
            f"adapter.b_groups: {recipe.adapter.b_groups} does not divide adapter.rank ({recipe.adapter.rank})."
        )
    if recipe.adapter.input_scale and not recipe.adapter.train_d:
        problems.append(
            "adapter.input_scale: is a vector to train, and adapter.train_d is false; remove one of the two."
        )
    held_out = data.eval_path is not None or data.eval_fraction > 0
    if not held_out:
        for name in ("eval_steps", "load_best_model_at_end", "early_stopping_patience"):
            if getattr(training, name):
                problems.append(f"training.{name}: needs held-out rows; set data.eval_path or data.eval_fraction.")
    elif not training.eval_steps:
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(training, name):
                problems.append(f"training.{name}: needs training.eval_steps above 0.")
    if data.eval_path is not None and data.eval_fraction > 0:
        problems.append("data.eval_fraction: held-out rows already come from data.eval_path; remove one of the two.")
    if model.quantization == "int8" and model.compute_dtype == "float32":
        problems.append("model.compute_dtype: int8 linears compute in 16 bits; use auto, bfloat16 or float16.")
    return problems
