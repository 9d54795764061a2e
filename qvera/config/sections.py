"""The sections of a recipe, and the options of a range test. Every default is written here and nowhere else.

The text below each field is its description in the JSON schema (`json_schema`) and in docs/recipe.md.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from qvera.config.fields import (
    Bool,
    Fraction,
    NonEmpty,
    NonNegative,
    NonNegativeFloat,
    Number,
    OnlyWith,
    Passes,
    Positive,
    PositiveFloat,
    Section,
    Seed,
)
from qvera.config.plugins import extensible
from qvera.utils.errors import InputError

MOST_RANK = 65_536


@extensible("AdapterKeys")
class AdapterSection(Section):
    """The adapter: by default VeRA (arXiv 2310.11454), vectors d [rank] and b [out_features] for each linear layer."""

    method: NonEmpty = "vera"
    """The method of adaptation: ``vera``, ``lora``, or one that a package brings (docs/methods/index.md has qvera's
    own). With another one than ``vera`` the rank and the learning rate have no default."""
    rank: Annotated[int, Strict(), Field(ge=1, le=MOST_RANK)] = 256
    """Rows of the projection A. VeRA's vector d has as many elements."""
    b_groups: Positive = 1
    """Split the rank into this many equal groups, each with its own vector b: more trained parameters for the same
    products, as RandLoRA sums several random bases (arXiv 2502.00987). 1 is VeRA. Must divide ``rank``."""
    targets: Literal["all-linear"] | Annotated[list[NonEmpty], Field(min_length=1)] = "all-linear"
    """The layers to adapt: ``all-linear`` (every linear layer but the head), or names such as ``[q_proj, v_proj]``.
    Each name must match a layer."""
    input_scale: Bool = False
    """Train a third vector [in_features] that scales the input of A (RandLoRA's Γ). It starts at 1. Layers that read
    the same input then can't share the product with A."""
    experts: Literal["none", "shared", "each"] = "none"
    """Adapt the experts of a mixture, with ``targets: all-linear`` or a name such as ``gate_up_proj``: ``each`` expert
    with its own d and b (or A and B of ``lora``), or all experts of a layer with one ``shared`` d and b. ``none``
    leaves them frozen. Routers are never adapted."""
    magnitude: Bool = False
    """Train the norm of each row of the weight too, as DoRA does (arXiv 2402.09353, DVoRA there): out_features more
    numbers for each linear, which start at the norms of W. Backward then keeps the output of every adapted linear."""
    d_initial: Annotated[float, Field(ge=-3e38, le=3e38, allow_inf_nan=False), *Number] = 0.1
    """The initial value of every element of d. Scaling it by c acts like using c·lr as the learning rate of b and lr/c
    as that of d (AdamW without weight decay), so there are no separate learning rates."""
    dropout: Fraction = 0.0
    """The probability of dropping an input of the adapter during training."""
    seed: Seed = 0
    """The seed of the shared projections A and B. The same seed gives the same projections on every machine."""
    train_d: Bool = True
    """Train d as well as b. ``false``: adapters of the same seed can be added, averaged and interpolated exactly."""
    alpha: PositiveFloat | None = None
    """α of ΔW = (α / rank) B A, where A and B are trained (LoRA and its like): by default the rank, so that the scale
    is 1."""
    use_rslora: Bool = False
    """Use the rank-stabilised scale α / √rank (arXiv 2312.03732)."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal"] = "default"
    """Where LoRA's A and B start, as PEFT's ``LoraConfig`` has it. ``default``: A uniform in ±1/√in_features, B zero.
    ``gaussian``: A normal with standard deviation 1 / rank, B zero. ``orthogonal``: both random, with B A = 0."""
    loraplus_lr_ratio: PositiveFloat = 1.0
    """LoRA+ (arXiv 2402.12354): the learning rate of B as a multiple of ``training.learning_rate``, which is that of A.
    The paper uses 16."""
    init_from: str | None = None
    """The directory or hub id (``user/name``) of an adapter whose tensors to start from. It must have the same base
    model, method, rank and targets, and the same other keys of its method (such as b_groups, magnitude or alpha). Where
    A and B are drawn from the seed, that must be the same too."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict each other."""
        if self.rank % self.b_groups:
            yield "b_groups", f"{self.b_groups} does not divide adapter.rank ({self.rank})."
        if self.init_lora_weights == "orthogonal" and self.rank % 2:
            yield "init_lora_weights", f"orthogonal takes an even adapter.rank, got {self.rank}."
        if self.magnitude and self.input_scale:
            yield "magnitude", "can't be combined with adapter.input_scale; remove one of the two."
        if self.magnitude and self.experts != "none":
            yield "experts", "can't be adapted with adapter.magnitude; remove one of the two."
        if self.input_scale and not self.train_d:
            yield "input_scale", "is a vector to train, and adapter.train_d is false; remove one of the two."


_CAUSAL = OnlyWith("task: causal-lm")
_OF_TEXTS = OnlyWith("task: causal-lm", "task: sequence-classification")
_OF_IMAGES = OnlyWith("task: image-classification")
_LABELLED = OnlyWith("task: sequence-classification", "task: image-classification")
_EVALUATED = OnlyWith("data.eval_path", "data.eval_split", "data.eval_fraction")
_FOUR_BIT = OnlyWith("model.quantization: nf4", "model.quantization: fp4")


MOST_ROW_CHARACTERS = 4 * 2**20


class DataSource(Section):
    """Rows of one kind, and how they become text."""

    path: NonEmpty
    """A .jsonl, .json, .csv, .tsv or .parquet file, a directory of such files, or a hub dataset id. Images may also be
    in a directory with a folder for each class."""
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
    format: Literal[
        "auto",
        "alpaca",
        "messages",
        "sharegpt",
        "prompt-completion",
        "text",
        "classification",
        "image",
        "preference",
        "unpaired-preference",
        "prompt",
    ] = "auto"
    """The layout of a row. ``auto`` looks at the column names of the first row and reports what it found.
    ``classification`` (a text, maybe a ``text_pair``, and a ``label``) is that of ``task: sequence-classification``,
    ``image`` (an ``image`` and a ``label``) that of ``task: image-classification``, ``preference`` that of
    ``training.objective: dpo`` and ``orpo``, ``unpaired-preference`` that of ``kto``, and ``prompt`` (a ``prompt`` or
    ``messages``; the other columns are for the reward) that of ``grpo``."""
    columns: dict[str, str] = {}
    """The names of your columns where they differ from the format's: ``{prompt: question, completion: answer}``."""
    template: Annotated[NonEmpty, _CAUSAL] = "auto"
    """The chat template. ``auto``: the tokenizer's own; if it has none, ``plain`` for prompt-completion and text rows,
    else ``alpaca``. Or a named one: alpaca, chatml, llama-2, llama-3, mistral, zephyr, plain."""
    label_names: list[NonEmpty] = []
    """The names of integer labels, from 0, where the answers are such labels: ``[negative, positive]``. Without it a
    number is trained as text. Of the classification tasks the classes, in order; without it they are those
    of a hub dataset's own label names, or the labels of the training rows, sorted."""
    system: Annotated[str | None, _CAUSAL] = None
    """The system prompt of rows that have none of their own. ``qvera generate`` and ``qvera chat`` use it too."""
    limit: Positive | None = None
    """Use only the first rows of ``path``; of many adapters, of each. Default: all."""


@extensible("DataKeys")
class DataSection(DataSource):
    """Where rows come from, how they become text, and which tokens are trained."""

    mixture: list[DataSource] = []
    """More sources, mixed with ``path``. Each is a mapping of the keys above, with its own format, template and
    weight."""
    eval_path: str | None = None
    """A file of held-out rows; with ``adapter_files`` a directory of files with the same names. Default:
    ``eval_fraction`` of each source is held out, chosen by ``seed``."""
    eval_split: NonEmpty | None = None
    """The split of a hub dataset whose rows are held out, such as ``validation``: of ``eval_path`` where that is a hub
    dataset id, else of ``path``."""
    eval_fraction: Fraction = 0.0
    """The share of each source that is held out for evaluation; of many adapters, of each. 0: none."""
    train_on: Annotated[Literal["assistant", "last", "all"], _CAUSAL] = "assistant"
    """Which tokens the loss covers: every assistant turn, only the last one, or all tokens."""
    max_length: Annotated[int, Strict(), Field(ge=8, lt=2**31), _OF_TEXTS] = 1024
    """The most tokens of a row. ``too_long`` sets what happens to longer rows; they are counted and reported."""
    too_long: Annotated[Literal["cut-end", "cut-start", "split", "drop"], _OF_TEXTS] = "cut-end"
    """What happens to a longer row: cut at the end, cut at the start (after the BOS token), split into several rows, or
    dropped."""
    max_source_length: Annotated[Positive | None, _CAUSAL] = None
    """The most tokens before the first trained token (VeRA's instruction runs: 768). Default: no limit."""
    max_target_length: Annotated[Positive | None, _CAUSAL] = None
    """The most tokens from the first trained token on (VeRA's instruction runs: 256). Default: no limit."""
    prefix_once: Annotated[Bool, _CAUSAL] = True
    """Compute the common beginning of a batch's rows (a system prompt, an instruction) once for all of them, where that
    is faster. The results are the same. Only for Llama-like models with sdpa or eager attention. Attention then tells
    rows apart by their offsets, or by a mask on a GPU that does not run torch's variable-length attention."""
    packing: Annotated[Bool, _CAUSAL] = False
    """Put as many rows as fit into one sequence of ``max_length`` tokens, without padding. Each row attends only to
    itself, and losses and gradients are those of padded rows (tested with sdpa and eager attention and with offsets,
    not on a GPU and not with flash-attn). Replaces ``training.per_device_train_batch_size``."""
    group_by_length: Annotated[Bool, _OF_TEXTS] = False
    """Put rows of similar length into one optimizer step. Less padding, but the order is less random."""
    tokenize_processes: Positive | None = None
    """Processes that tokenize texts or check images. Default: one, and one per core when the rest would take one
    process another minute. The rows are the same. Tokenized rows are kept in a cache (``qvera cache ls``)."""
    eval_limit: Annotated[Positive | None, _EVALUATED] = None
    """Use only the first held-out rows of each source; of many adapters, of each. Default: all."""
    adapter_column: Annotated[NonEmpty | None, _CAUSAL] = None
    """The column that names the adapter each row trains: many adapters (VeRA or LoRA) in one run, each with rows,
    order, steps, schedule and held-out rows of its own. A name is a text or a whole number; 1 and "1" are the same."""
    adapter_files: Annotated[Bool, _CAUSAL] = False
    """As ``adapter_column``, where ``path`` is a directory: each of its files has the rows of one adapter, which is
    called as the file is without its suffix."""
    augment: Annotated[Literal["none", "crop-flip"], _OF_IMAGES] = "none"
    """What is done to training images. ``crop-flip``: a random part of the image, of 8 to 100 % of its area, at the
    model's size, flipped left to right every other time. It is drawn anew in each step, from ``seed``, the step and the
    row alone."""
    regression: Annotated[Bool | Literal["auto"], OnlyWith("task: sequence-classification")] = "auto"
    """Whether labels are numbers to come near to, and not classes. ``auto``: where a label of the training rows has a
    fraction."""
    rows_per_label: Annotated[Positive | None, _LABELLED] = None
    """Train on only so many rows of each label, chosen by ``seed``. Default: all."""
    max_row_characters: Positive = MOST_ROW_CHARACTERS
    """The most characters of a row of JSONL or CSV. A longer one is an error, and is never read as a whole. All tokens
    of a row are in memory at once, at a hundred bytes each."""
    shuffle: Bool = True
    """Shuffle the rows anew in each epoch. ``false``: the order of the file."""
    seed: Seed = 0
    """The seed of the order of rows, and of the choice of held-out rows."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict each other."""
        if self.held_out_path is not None and self.eval_fraction > 0:
            key = "eval_split" if self.eval_path is None else "eval_path"
            yield "eval_fraction", f"held-out rows already come from data.{key}; remove one of the two."
        if self.held_out_path == self.path and self.eval_split == self.split:
            yield "eval_split", f"is data.split too ({self.split}), so nothing would be held out. Name another split."
        if self.has_adapters:
            yield from self._adapter_contradictions()
        if self.regression is True and self.rows_per_label is not None:
            yield "rows_per_label", "counts the rows of classes, and data.regression has none; remove one of the two."
        for key, source in self.sources("label_names"):
            if len(set(source.label_names)) < len(source.label_names):
                yield key, "names a label twice; each class has a name of its own."
        for key, source in self.sources("columns"):
            named = list(source.columns.values())
            if twice := next((column for column in named if named.count(column) > 1), None):
                fields = " and ".join(field for field, column in source.columns.items() if column == twice)
                yield key, f"{fields} are one column, {twice!r}. Name a column of its own for each."
        if self.regression is True and self.label_names:
            yield "label_names", "are names of classes, and data.regression has none; remove one of the two."
        if self.format == "classification" and self.too_long == "split":
            yield "too_long", "split: a text has one label, which its parts have not; use cut-end, cut-start or drop."

    def _adapter_contradictions(self) -> Iterator[tuple[str, str]]:
        key = "adapter_files" if self.adapter_files else "adapter_column"
        if self.adapter_column is not None and self.adapter_files:
            yield "adapter_files", "and data.adapter_column both name the rows' adapters; remove one of the two."
        if self.packing:
            yield (
                "packing",
                f"would put rows of several adapters (data.{key}) into one sequence, where one that diverges spoils "
                "the others; remove it.",
            )
        if self.mixture:
            yield "mixture", f"data.{key} takes all rows from data.path; put them into one file or directory."
        if self.weight != 1:
            yield "weight", f"each adapter (data.{key}) has rows of its own; set training.num_train_epochs instead."

    def sources(self, key: str) -> Iterator[tuple[str, DataSource]]:
        """This section and each part of ``mixture``, with the name that ``key`` (of this section) has there."""
        yield key, self
        section, dot, name = key.rpartition(".")
        for number, part in enumerate(self.mixture):
            yield f"{section}{dot}mixture.{number}.{name}", part

    @property
    def has_adapters(self) -> bool:
        """Whether each row names the adapter that it trains, so that the run trains many."""
        return self.adapter_column is not None or self.adapter_files

    @property
    def owner_column(self) -> tuple[str, str] | None:
        """The column that says what each row belongs to, and to what kind of thing: ``data.KIND_column`` names it."""
        return None if self.adapter_column is None else (self.adapter_column, "adapter")

    @property
    def has_held_out_rows(self) -> bool:
        """Whether the recipe names rows to evaluate on."""
        return self.held_out_path is not None or self.eval_fraction > 0

    @property
    def held_out_path(self) -> str | None:
        """Where held-out rows come from that are not drawn from the training rows; None: there are none such."""
        return self.path if self.eval_path is None and self.eval_split is not None else self.eval_path


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
    quant_storage: Annotated[Literal["uint8", "bfloat16", "float16", "float32"], _FOUR_BIT] = "bfloat16"
    """The dtype that the packed 4-bit weights are declared as; their bytes are the same. bfloat16 lets ZeRO-3 shard
    them."""
    stream: Literal["auto"] | Bool = "auto"
    """Keep the 4-bit decoder layers in RAM and bring each to the GPU right before it is used, so that only two of them
    take memory there. For a base that is larger than the GPU; the results are the same. Slower where a batch computes
    for less time than its layers travel. ``auto``: where the base does not fit otherwise. Not with ZeRO-3."""
    resident: Annotated[Literal["auto"] | Bool, _FOUR_BIT] = "auto"
    """Keep a copy of each 4-bit linear in the 16-bit compute dtype while training, 2 bytes a weight, so that products
    need not dequantize it; the results are the same. ``auto``: on a GPU where the plan has room for it."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention code. ``auto``: what transformers picks, usually ``sdpa``. On an accelerator ``sdpa`` also takes
    torch's variable-length attention where that runs (``docs/memory.md``). ``flash_attention_2`` needs the flash-attn
    package."""
    trust_remote_code: Bool = False
    """Run Python code that comes with the model. Only for a model whose authors you trust."""
    tokenizer: Annotated[str | None, _OF_TEXTS] = None
    """The directory or hub id of another tokenizer. Default: the model's own."""
    added_tokens: Annotated[list[NonEmpty], _CAUSAL] = []
    """New tokens, such as ``["<|tool|>"]``. The embedding and the head are frozen, so each new token keeps an initial
    row that is drawn from the mean and spread of the other rows, seeded by the token's text. The adapter and a merged
    export carry the rows and ids. Not supported under ZeRO-3."""
    pad_token: Annotated[str | None, _OF_TEXTS] = None
    """The token that pads batches: one of the model's or of ``added_tokens``. Default: the tokenizer's own, else its
    eos token. No row looks at padding, so it may be a token that is used elsewhere."""
    eos_token: Annotated[str | None, _OF_TEXTS] = None
    """The token that ends an answer, in place of the tokenizer's (ChatML's ``<|im_end|>``, say): one of the model's or
    of ``added_tokens``."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict each other."""
        if self.quantization == "int8" and self.compute_dtype == "float32":
            yield "compute_dtype", "int8 linears compute in 16 bits; use auto, bfloat16 or float16."
        if self.stream is True and self.quantization not in ("nf4", "fp4"):
            yield "stream", f"only 4-bit layers are streamed, and model.quantization is {self.quantization}."
        if self.resident is True and self.stream is True:
            yield "resident", "streamed layers are not kept on the device; remove model.stream or model.resident."
        if self.resident is True and self.compute_dtype == "float32":
            yield "resident", "the copies are in 16 bits, and model.compute_dtype is float32."


ExportKind = Literal["merged", "lora", "peft", "gguf", "gguf-lora"]
"""``qvera export --to``."""
Dtype = Literal["float16", "bfloat16", "float32"]
ExportDtype = Literal[Dtype, "q8_0"]
"""``qvera export --dtype``."""


class ExportSection(Section):
    """The defaults of ``qvera export``; its flags override them."""

    dtype: Dtype = "float16"
    """The dtype of the exported weights."""
    base: Literal["original", "dequantized"] = "dequantized"
    """Merge into the dequantized weights that the vectors were trained with, so that the export answers as the run
    does, or into the original 16-bit ones."""
    max_shard_size_bytes: Annotated[int, Strict(), Field(ge=1, le=2**50)] = 5_000_000_000
    """The largest safetensors file, in bytes."""
    certificate_rows: NonNegative = 16
    """Held-out rows on which the trained and the exported model are compared; training rows where none are held out."""


_PREFERENCES = OnlyWith("training.objective: dpo", "training.objective: orpo", "training.objective: kto")
_REWARDED = OnlyWith("training.objective: grpo")
_SCALED = OnlyWith("model.compute_dtype: float16", "model.compute_dtype: auto")


@extensible("TrainingKeys")
class TrainingSection(Section):
    """The training loop. Keys are named as in transformers' TrainingArguments where the meaning is the same."""

    output_dir: Annotated[NonEmpty, AfterValidator(os.path.normpath)] | None = None
    """The directory of the run. Default: ``runs/`` and the recipe's file name. A ``..`` in it is resolved:
    ``runs/../x`` is ``x``."""
    objective: Annotated[Literal["sft", "dpo", "orpo", "kto", "grpo"], _CAUSAL] = "sft"
    """What is minimised. ``sft``: the negative log likelihood of the answers. ``dpo`` (arXiv 2305.18290) and ``orpo``
    (arXiv 2403.07691): losses on pairs of a chosen and a rejected answer. ``kto`` (arXiv 2402.01306): a loss on single
    answers that were judged good or bad. These three are computed by TRL (``pip install 'qvera[trl]'``). ``grpo``
    (arXiv 2402.03300): the model answers prompts, and answers of a higher reward than others to the same prompt become
    likelier (docs/rewards.md)."""
    beta: Annotated[PositiveFloat, _PREFERENCES] = 0.1
    """β of ``dpo`` and ``kto``: how strongly the answers are held to those of the base. λ of ``orpo``: the weight of
    the odds ratio beside the likelihood."""
    loss_type: Annotated[
        Literal["sigmoid", "hinge", "ipo", "apo_zero", "apo_down"], OnlyWith("training.objective: dpo")
    ] = "sigmoid"
    """With ``objective: dpo``, its loss by TRL's name: ``sigmoid`` is DPO's own; ``hinge`` (SLiC, arXiv 2305.10425),
    ``ipo`` (arXiv 2310.12036), ``apo_zero`` and ``apo_down`` (arXiv 2408.06266)."""
    desirable_weight: Annotated[PositiveFloat, OnlyWith("training.objective: kto")] = 1.0
    """With ``objective: kto``, the weight of good answers. Its paper has desirable_weight x good answers between 1 and
    4/3 times undesirable_weight x bad answers."""
    undesirable_weight: Annotated[PositiveFloat, OnlyWith("training.objective: kto")] = 1.0
    """With ``objective: kto``, the weight of bad answers."""
    reward: Annotated[NonEmpty | dict[NonEmpty, float] | None, _REWARDED] = None
    """With ``objective: grpo``, the function that scores an answer: ``rewards.py:score``, a file and a name in it. It
    takes the prompt and the answer (texts) and the row (a mapping of its columns), and returns a number. Or several,
    each with its weight: ``{rewards.py:right: 1, rewards.py:short: 0.2}``."""
    group_size: Annotated[int, Strict(), Field(ge=2), _REWARDED] = 8
    """With ``objective: grpo``, the answers to each prompt, which are compared with each other. ``global_batch_size``
    counts prompts, ``per_device_train_batch_size`` answers."""
    scale_rewards: Annotated[Bool, _REWARDED] = True
    """With ``objective: grpo``: divide an answer's advantage, its reward less its group's mean, by the deviation of the
    group's rewards."""
    policy_loss: Annotated[Literal["ppo", "importance_sampling", "cispo", "gspo"], _REWARDED] = "ppo"
    """With ``objective: grpo``, the loss of a token: ``ppo`` (arXiv 1707.06347), ``importance_sampling`` (without
    clipping), ``cispo`` (arXiv 2506.13585) or ``gspo`` (arXiv 2507.18071)."""
    clip_low_threshold: Annotated[NonNegativeFloat, _REWARDED] = 0.8
    """With ``objective: grpo``, the lower bound of the ratio between an answer's probability now and when it was given.
    It matters with ``updates_per_answers`` above 1."""
    clip_high_threshold: Annotated[PositiveFloat, _REWARDED] = 1.2
    """The upper bound of that ratio."""
    kl_coefficient: Annotated[NonNegativeFloat, _REWARDED] = 0.0
    """With ``objective: grpo``, how strongly answers are held to those of the base: the weight of the divergence from
    the model without its adapter. 0: not at all, which saves a forward pass."""
    updates_per_answers: Annotated[Positive, _REWARDED] = 1
    """With ``objective: grpo``, the optimizer steps that are taken over the same answers."""
    answer_temperature: Annotated[PositiveFloat, _REWARDED] = 1.0
    """With ``objective: grpo``, the temperature at which answers are drawn; the loss is of the same probabilities. An
    answer has at most ``sample_max_new_tokens`` tokens, and ``answer_batch_size`` answers are made at a time."""
    num_train_epochs: Passes = 1.0
    """Passes over the training rows. A part of an epoch, such as 0.5, is allowed."""
    max_steps: Annotated[int, Strict(), Field(ge=-1, lt=2**31)] = -1
    """Optimizer steps. -1: what ``num_train_epochs`` amounts to. 0: none; the held-out rows are scored, and the adapter
    is saved as it begins."""
    global_batch_size: Positive = 16
    """Rows per optimizer step, over all processes. With ``data.adapter_column`` or ``data.adapter_files``: of one
    adapter's step."""
    per_device_train_batch_size: Positive = 4
    """Rows per forward pass on one device. Must divide ``global_batch_size``; gradients are accumulated over
    global_batch_size / (per_device_train_batch_size x processes) passes. Default: 4, or the largest number below it
    that divides ``global_batch_size``. With ``data.adapter_column`` or ``data.adapter_files`` a pass has rows of many
    adapters, whatever ``global_batch_size`` is, and the default is 16."""
    adapters_at_once: Annotated[Literal["auto"] | Positive, OnlyWith("data.adapter_column", "data.adapter_files")] = (
        "auto"
    )
    """With ``data.adapter_column`` or ``data.adapter_files``: how many adapters are trained at the same time. ``auto``:
    as many as it takes to fill a forward pass, as far as memory allows."""
    per_device_eval_batch_size: Positive = 4
    """Rows per forward pass of an evaluation."""
    learning_rate: PositiveFloat = 4e-3
    """The highest learning rate, after the warmup. The default is the paper's for 7B models. Small models need a
    higher one: see docs/evaluation.md, or let ``qvera train RECIPE --find-lr`` suggest one."""
    head_learning_rate: Annotated[PositiveFloat | None, _LABELLED] = None
    """The highest learning rate of the head, which is trained whole; warmup and schedule are those of the vectors.
    Default: ``learning_rate``."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "linear"
    """The learning rate after the warmup: a decay to zero along a cosine or a line, or constant. The line did better
    than the cosine wherever both were tried (docs/benchmarks.md)."""
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
    initial_scale_power: Annotated[int, Strict(), Field(ge=0, le=24), _SCALED] = 16
    """The first loss scale of a run that computes in float16: 2 to this power. A step whose gradient overflows is taken
    again with half the scale; 2,000 steps in a row without an overflow double it. 0: begin without scaling."""
    gradient_checkpointing: Bool | Literal["auto", "offload"] = "auto"
    """Recompute the activations of a layer in the backward pass, and keep only its input: much less memory, about a
    third more time. ``offload`` keeps these inputs in pinned RAM instead of on the accelerator (on a CPU it is the same
    as ``true``). ``auto``: ``false`` where the plan says that the run fits so with a good margin, else ``true``, else
    ``offload``. `qvera plan` shows what it comes to, and a resumed run keeps it."""
    torch_compile: Bool = False
    """Compile the decoder layers with torch.compile. The first step then takes minutes, and later ones may be faster.
    Not with ZeRO-3 or a streamed base."""
    try_longest_batch: Bool = True
    """Run the longest batch once before the first step, so that a run that does not fit into memory fails at once."""
    on_oom: Literal["save", "halve"] = "save"
    """What to do when memory runs out in a step. The step is undone; then ``save`` saves a checkpoint and ends the run,
    and ``halve`` goes on with half as many rows in a pass and the same global batch. Without dropout the numbers are
    the same up to rounding. Not with a ``deepspeed`` key."""
    label_smoothing: Fraction = 0.0
    """The share of each target's probability that is spread evenly over all tokens, or classes, in the training
    loss. Held-out losses are without it. VeRA's paper trains E2E with 0.1. Not for a regression."""
    loss_chunk_tokens: Annotated[Positive, _CAUSAL] = 512
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
    """Write the vectors with the best ``metric_for_best_model`` into ``adapter/`` instead of the last ones."""
    early_stopping_patience: NonNegative = 0
    """Stop after this many evaluations without a better ``metric_for_best_model``. 0: never."""
    metric_for_best_model: NonEmpty = "loss"
    """The held-out score that says which step is best: ``loss``, another score of the task such as ``accuracy``,
    ``reward`` or ``exact_match`` (of ``exact_match_rows``), or a metric of one's own (docs/api.md)."""
    greater_is_better: Bool | None = None
    """Whether a greater score is better. Default: not for ``loss`` and ``perplexity``, else yes."""
    report_to: list[NonEmpty] = ["auto"]
    """``tensorboard``, ``wandb`` and others by their usual names. ``auto``: TensorBoard where it is installed.
    ``none``: none of them. metrics.jsonl and report.html are always written."""
    sample_count: Annotated[NonNegative, _CAUSAL] = 3
    """Held-out prompts that are answered before and after training, for the report."""
    answer_batch_size: Annotated[Positive, _CAUSAL] = 16
    """Prompts that are answered at the same time, for the samples and the exact match."""
    sample_max_new_tokens: Annotated[Positive, _CAUSAL] = 160
    """The most tokens of an answer."""
    exact_match_rows: Annotated[NonNegative, _EVALUATED, _CAUSAL] = 0
    """Held-out rows that are answered greedily before and after training and compared with their reference. 0: none."""

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step, over all processes: with ``objective: grpo`` the answers to its prompts."""
        return self.global_batch_size * (self.group_size if self.objective == "grpo" else 1)

    @property
    def answer_tokens(self) -> int:
        """The most tokens that training adds to a row: with ``objective: grpo`` those of an answer."""
        return self.sample_max_new_tokens if self.objective == "grpo" else 0

    @property
    def takes_greater(self) -> bool:
        """Whether a greater score of ``metric_for_best_model`` is better."""
        by_name = self.metric_for_best_model not in ("loss", "perplexity")
        return by_name if self.greater_is_better is None else self.greater_is_better

    @model_validator(mode="after")
    def _fit_batch_size(self) -> Self:
        name = "per_device_train_batch_size"
        if name not in self.model_fields_set:  # and it stays out of them, so that a replaced recipe derives it anew
            self.__dict__[name] = max(size for size in (1, 2, 3, 4) if self.global_batch_size % size == 0)
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class LrRange:
    """The options of a range test (Smith, arXiv 1506.01186, section 3.3); InputError if they make no sense."""

    start: float = 1e-5
    """``--lr-from``: the first learning rate, too low to change anything."""
    end: float = 1.0
    """``--lr-to``: the last learning rate, which should be too high."""
    steps: int = 100
    """``--lr-steps``: the rate grows by the same factor in each."""

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end < float("inf"):
            rates = f"learning rates from {self.start:g} to {self.end:g}"
            raise InputError(f"{rates}: expected two rates, 0 < from < to, such as 1e-5 and 1.")
        if self.steps < 10:
            raise InputError(
                f"steps of a range test: takes a whole number >= 10 (a curve needs points), got {self.steps}."
            )
