"""Preference tuning (``training.objective``: dpo, orpo, kto) of a causal language model, by TRL's losses.

A target is a pair of answers, or for KTO one judged answer. The reference of DPO and KTO is the base with the adapter
switched off. ORPO has none.

TRL's trainer gets our model and our tokens, but its loop is not used. This module relies on how a trainer is made, its
collator's keys, ``compute_loss`` and the metrics that ``log`` adds. `tests/tasks/test_preference.py` compares each loss
with its paper's formula, to notice a TRL that computes something else.
"""

import contextlib
import copy
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qvera.adapters.save_load import named_vectors
from qvera.config.schema import Recipe
from qvera.config.sections import TrainingSection
from qvera.data import Datasets, Example
from qvera.distributed.group import ALONE, Group
from qvera.evaluation.held_out import over_held_out
from qvera.models.checkpointing import draws_random_numbers
from qvera.models.structure import causal_model
from qvera.tasks.base import Core, Progress
from qvera.tasks.causal_lm import CausalLM
from qvera.utils import accelerator
from qvera.utils.errors import InputError

OLDEST_TRL = "1.16.0"
_MEASURED = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
_MEASURED_BY = {"orpo": ("nll_loss", "log_odds_ratio"), "kto": ("kl",)}


def require_trl() -> None:
    """Raise InputError if TRL is missing or too old."""
    if find_spec("trl") is None:
        found = "TRL is not installed"
    elif tuple(map(int, version("trl").split(".")[:2])) < tuple(map(int, OLDEST_TRL.split(".")[:2])):
        found = f"TRL {version('trl')} is installed"
    else:
        return
    raise InputError(
        f"training.objective: the losses on preferences are those of TRL {OLDEST_TRL} or later, and {found}: pip "
        "install 'qvera[trl]'"
    )


class Preferences(CausalLM):
    """The task to learn from compared answers. Each run has its own instance, with TRL's trainer for its model.

    ORPO's likelihood term is a mean over the tokens of a pass, and KTO estimates the divergence over its rows. So these
    two depend on how rows are divided into passes.
    """

    joins_rows = False
    loss_is_trl = True
    takes_loss = False
    scores = ("loss", "rewards/margins", "rewards/accuracies", "exact_match")
    _trainer: Any

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.objective = objective = recipe.training.objective
        self.has_reference = objective != "orpo"
        self.makes_all_logits = objective == "orpo"
        # one is the reference's; KTO takes two more, over prompts with other rows' answers
        self.passes_without_gradient = {"orpo": 0, "dpo": 1, "kto": 3}[objective]
        self._keys = (*_MEASURED, *_MEASURED_BY.get(objective, ()))
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # metric → weighted sum, weight
        self._pass: dict[str, tuple[float, int]] = {}  # metric → mean over the latest pass, weight

    def check(self) -> None:
        require_trl()

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: Datasets) -> None:
        """Make TRL's trainer. InputError if TRL is missing or too old, or can't take the model apart."""
        super().prepare(model, tokenizer, datasets)
        require_trl()
        inner = causal_model(model)
        if self.objective != "orpo" and inner.base_model is inner:  # Llama 4 with images
            raise InputError(
                f"training.objective {self.objective}: TRL can't tell the decoder of {type(inner).__name__} from its "
                "head. Take orpo or sft."
            )
        self._sums.clear()
        own_tokenizer = copy.deepcopy(tokenizer)  # TRL gives it a pad token
        own_tokenizer.pad_token_id = datasets.pad_id
        with _quiet(), _as_it_was(model):
            self._trainer = _make_trainer(model, own_tokenizer, self.training)
            # TRL adds a copy of the fresh adapter as the reference. It gives what the base gives, and without it TRL
            # switches the adapter off instead.
            if "ref" in getattr(model, "peft_config", {}):
                model.delete_adapter("ref")  # type: ignore[operator]

    def targets(self, rows: Sequence[Example]) -> int:
        return len(rows)

    def loss(
        self, model: nn.Module, rows: Sequence[Example], core: Core = None, expected_grad: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        """Return TRL's loss, summed over pairs or judged answers."""
        batch = self._trainer.data_collator(_features(self.objective, rows))
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}

        def fp32_logits(*args: Any, **inputs: Any) -> Any:
            output = model(*args, **inputs)
            output.logits = output.logits.float()
            return output

        # ORPO takes the model's logits, and sums of log probabilities in 16 bits would tell few answers apart
        loss = self._trainer.compute_loss(fp32_logits if self.objective == "orpo" else model, batch)
        self._pass = self._measured(rows)
        return loss * len(rows), len(rows)  # TRL's is a mean

    def _measured(self, examples: Sequence[Example]) -> dict[str, tuple[float, int]]:
        """Return metric → TRL's mean over the latest pass, and the number of rows behind it."""
        logged: dict[str, Any] = {"loss": 0.0}
        self._trainer.log(logged)  # adds the metrics
        self._trainer.state.log_history.clear()  # it would grow with each pass
        good = sum(example.desirable is not False for example in examples)
        bad = sum(example.desirable is not True for example in examples)
        found = {}
        for key in self._keys:
            value = logged.get(key, logged.get(f"eval_{key}"))  # TRL's name where the model is in evaluation mode
            weight = good if key.endswith("chosen") else bad if key.endswith("rejected") else len(examples)
            if value is not None and weight:
                found[key] = float(value), weight
        return found

    def count_pass(self) -> None:
        for key, (value, weight) in self._pass.items():
            self._sums[key][0] += value * weight
            self._sums[key][1] += weight
        self._pass = {}

    def forget_metrics(self) -> None:
        self._sums.clear()

    def take_metrics(self, group: Group = ALONE) -> dict[str, float]:
        """Return means over all counted passes, without metrics that no row has.

        They are rewards and log probabilities of chosen and rejected answers, ``rewards/margins`` between them,
        ``rewards/accuracies`` (the share of pairs with a higher reward for the chosen answer), and the objective's own.
        """
        sums = group.sum([number for key in self._keys for number in self._sums[key]])
        self._sums.clear()
        pairs = zip(self._keys, sums[::2], sums[1::2], strict=True)
        found = {key: total / weight for key, total, weight in pairs if weight}
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def held_out_loss(
        self, model: nn.Module, rows: Sequence[Example], group: Group = ALONE, progress: Progress = None
    ) -> dict[str, Any]:
        """Score the rows by their mean loss and the metrics of `take_metrics`."""
        started = time.perf_counter()
        self.forget_metrics()

        def compute(numbers: list[int]) -> torch.Tensor:
            total, _ = self.loss(model, [rows[i] for i in numbers])
            self.count_pass()
            return total

        size = self.training.per_device_eval_batch_size
        found = over_held_out(model, rows, compute, size, "Lower data.max_length.", progress, group)
        (total,) = group.sum([sum(loss.item() for _, loss in found)])
        return {
            "loss": total / len(rows),
            "rows": len(rows),
            "trained_tokens": sum(row.trained_tokens for row in rows),
            **self.take_metrics(group),
            "seconds": time.perf_counter() - started,
        }

    def line(self, scores: dict[str, Any]) -> str:
        text = f"held-out loss {scores['loss']:.4f}"
        if "rewards/margins" in scores:
            text += f", reward margin {scores['rewards/margins']:.4f}"
        if "rewards/accuracies" in scores:
            text += f", reward accuracy {scores['rewards/accuracies']:.1%}"
        if "exact_match" in scores:
            text += f", exact match {scores['exact_match']:.1%} of {scores['exact_match_rows']} rows"
        return text


def _features(objective: str, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return rows for the collator of TRL's trainer: pairs (dpo, orpo), or judged answers (kto)."""
    rows: list[dict[str, Any]] = []
    answers = [example.input_ids[example.answer_start :].tolist() for example in examples]
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        prompt = example.input_ids[: example.answer_start].tolist()
        if objective == "kto":
            # as in TRL, the divergence is estimated with the answer of the row before; a single row has its own
            about = {"KL_completion_ids": answers[number - 1], "label": bool(example.desirable)}
            rows.append({"prompt_ids": prompt, "completion_ids": answer, **about})
            continue
        if example.rejected_ids is None:
            raise ValueError(f"{example.source}: is no preference pair")
        pair = {"chosen": answer, "rejected": example.rejected_ids.tolist()}
        if objective == "dpo":
            rows.append({"prompt_ids": prompt, **{f"{name}_ids": ids for name, ids in pair.items()}})
            continue
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name, ids in pair.items():
            row[f"{name}_input_ids"] = prompt + ids
            row[f"{name}_attention_mask"] = [1] * len(prompt + ids)
            row[f"{name}_labels"] = [-100] * len(prompt) + ids
        rows.append(row)
    return rows


def _make_trainer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, training: TrainingSection) -> Any:
    """Make TRL's trainer for the objective. It asks for rows, so it gets some that are never used."""
    from datasets import Dataset
    from transformers import PrinterCallback

    rows: dict[str, list[Any]] = {"prompt": ["a", "a"], "chosen": ["b", "b"], "rejected": ["c", "c"]}
    settings: dict[str, Any] = {"beta": training.beta, "max_length": None}
    if training.objective == "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer

        settings["loss_type"] = training.loss_type
    elif training.objective == "kto":
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer

        settings |= {"desirable_weight": training.desirable_weight, "undesirable_weight": training.undesirable_weight}
        rows = {"prompt": ["a", "a"], "completion": ["b", "c"], "label": [True, False]}
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

        settings["max_length"] = 1024  # of the rows that are never used: None is a warning
    with tempfile.TemporaryDirectory() as unused:
        arguments = Config(
            output_dir=unused,
            max_steps=1,
            use_cpu=not accelerator.is_accelerator(next(model.parameters()).device),
            bf16=False,  # the model computes in its own dtype
            gradient_checkpointing=False,  # a run enables it; TRL disables it for the reference, then enables it so
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": draws_random_numbers(model)},
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        # A process uses one GPU. TRL refuses to see several, since transformers would put a model on all of them.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = Trainer(model, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.accelerator = _OneProcess(trainer.accelerator)
    return trainer


class _OneProcess:
    """An accelerator that gathers nothing: ranks may differ in their number of rows, and `Group` sums the results."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    gather_for_metrics = gather


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore random state, mode and vectors: TRL seeds generators, and rounds vectors to 16 bits."""
    was_training = model.training
    vectors = {name: (vector, vector.data, vector.requires_grad) for name, vector in named_vectors(model).items()}
    with accelerator.forked_random_state():
        yield
    for vector, data, requires_grad in vectors.values():
        vector.data = data
        vector.requires_grad_(requires_grad)
    model.train(was_training)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide TRL's own messages, and the progress bars of rows that are never used."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if not hidden:
            datasets.enable_progress_bars()
