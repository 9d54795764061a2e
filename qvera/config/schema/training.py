"""The section ``training`` of a recipe."""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict, model_validator

from qvera.config.fields import (
    Bool,
    Fraction,
    NonEmpty,
    NonNegative,
    NonNegativeFloat,
    OnlyWith,
    Passes,
    Positive,
    PositiveFloat,
    Section,
    Seed,
)
from qvera.config.plugins import extensible

_CAUSAL = OnlyWith("task: causal-lm")
_HEADED = OnlyWith("task: sequence-classification", "task: image-classification")
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
    answer has at most ``sample_max_new_tokens`` tokens, and ``answer_batch_size`` prompts are answered at a time."""
    num_train_epochs: Passes = 1.0
    """Passes over the training rows. A part of an epoch, such as 0.5, is allowed."""
    max_steps: Annotated[int, Strict(), Field(ge=-1, lt=2**31)] = -1
    """Optimizer steps. -1: what ``num_train_epochs`` amounts to."""
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
    head_learning_rate: Annotated[PositiveFloat | None, _HEADED] = None
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
    again with half the scale. 0: begin without scaling."""
    loss_scale_window: Annotated[Positive, _SCALED] = 2000
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
    metrics.jsonl and report.html are always written."""
    sample_count: Annotated[NonNegative, _CAUSAL] = 3
    """Held-out prompts that are answered before and after training, for the report."""
    answer_batch_size: Annotated[Positive, _CAUSAL] = 16
    """Prompts that are answered at the same time, for the samples and the exact match."""
    sample_max_new_tokens: Annotated[Positive, _CAUSAL] = 160
    """The most tokens of an answer."""
    exact_match_rows: Annotated[
        NonNegative, OnlyWith("data.eval_path", "data.eval_split", "data.eval_fraction"), _CAUSAL
    ] = 0
    """Held-out rows that are answered greedily before and after training and compared with their reference. 0: none."""

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step, over all processes: with ``objective: grpo`` the answers to its prompts."""
        return self.global_batch_size * (self.group_size if self.objective == "grpo" else 1)

    @property
    def takes_greater(self) -> bool:
        """Whether a greater score of ``metric_for_best_model`` is better."""
        by_name = self.metric_for_best_model not in ("loss", "perplexity")
        return by_name if self.greater_is_better is None else self.greater_is_better

    @model_validator(mode="before")
    @classmethod
    def _fit_batch_size(cls, keys: object) -> object:
        name = "per_device_train_batch_size"
        if isinstance(keys, dict) and name not in keys and isinstance(rows := keys.get("global_batch_size"), int):
            return {**keys, name: max(size for size in (1, 2, 3, 4) if rows % size == 0)}
        return keys
