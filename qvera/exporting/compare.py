"""Measure how far an export is from the trained model, on rows of its own data.

The trained model runs on a quantized base, and the export on 16-bit or dequantized weights: they are two models.
"""

import gc
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from qvera.config.schema import Recipe
from qvera.data import Datasets, Example, Labels, Rows, build_datasets
from qvera.evaluation.held_out import prompts_of, score_model
from qvera.evaluation.load import Artifact, OpenRun, find_target, open_target, warn_of_other_rows
from qvera.evaluation.metrics import text_metrics
from qvera.evaluation.named_adapters import rows_of
from qvera.models.loader import exported_bytes, load_exported
from qvera.tasks import CausalLM, Task, task_of
from qvera.utils import accelerator, formatting, memory
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError, Interrupted, RunFailed
from qvera.utils.files import try_read_json
from qvera.utils.progress import Phase
from qvera.utils.signals import StopRequests

CAUSAL = CausalLM()
BATCH_TOKENS = 2048
"""Tokens of a batch with padding. Each batch dequantizes all weights, so single rows would take longer."""


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        # Every row is padded to the longest one, the next one included.
        longest = max(len(e.input_ids) for e in [*batch, example])
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


@torch.no_grad()
def measure_difference(
    trained: PeftModel,
    exported_dir: Path,
    examples: Sequence[Example],
    pad_id: int,
    task: Task = CAUSAL,
    labels: Labels | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare the trained model with the exported checkpoint on the targets of ``examples``.

    Returns:
        Mean loss of both (nats per target, or squared error), the largest difference of a logit, rows, targets
        (``tokens``), and what a target is (``unit``). For tokens and classes also: mean and largest KL(trained ||
        exported) per target, the largest difference of a log probability, the share of targets with the same most
        likely output, and the number of rows where all targets agree.
    """
    device = next(trained.parameters()).device
    exported = load_exported(exported_dir, device, task.exported_class, trust_remote_code)
    examples = [row for example in examples for _, row in example.shown()]  # both answers of a pair
    largest_logit, measured = 0.0, list[torch.Tensor]()
    for rows in _batches(examples):
        ours, targets = task.logits(trained, rows, pad_id, labels)
        theirs, _ = task.logits(exported, rows, pad_id, labels)
        largest_logit = max(largest_logit, (ours - theirs).abs().max().item())
        if labels is not None and labels.is_regression:
            measured.append(torch.stack([(side.squeeze(1) - targets).square() for side in (ours, theirs)]))
            continue
        same = ours.argmax(dim=1) == theirs.argmax(dim=1)
        ours, theirs = torch.log_softmax(ours, dim=-1), torch.log_softmax(theirs, dim=-1)
        losses = [-side.gather(1, targets.unsqueeze(1)).squeeze(1) for side in (ours, theirs)]
        kl, largest = (ours.exp() * (ours - theirs)).sum(dim=1), (ours - theirs).abs().amax(dim=1)
        measured.append(torch.stack([*losses, kl, largest, same.float()]))
    loss_trained, loss_exported, *more = torch.cat(measured, dim=1).double()  # of each target
    found = {
        "rows": len(examples),
        "tokens": len(loss_trained),
        "unit": task.unit,
        "loss_trained": loss_trained.mean().item(),
        "loss_exported": loss_exported.mean().item(),
        "logit_max_difference": largest_logit,
    }
    if more:
        kl, largest, same = more
        found |= {
            "kl_mean": kl.mean().item(),
            "kl_max": kl.max().item(),
            "log_probability_max_difference": largest.max().item(),
            "top1_agreement": same.mean().item(),
            "answers_agree": sum(bool(row.all()) for row in same.split([e.trained_tokens for e in examples])),
        }
    return found


def rows_name(difference: Mapping[str, Any]) -> str:
    """The words for the compared rows in messages, by ``split``."""
    return "training rows" if difference.get("split") == "training" else "rows"


def difference_text(difference: dict[str, Any], base: str = "") -> str:
    """Describe a certificate's ``difference`` in a sentence or two; ``base`` says which weights a merge is onto."""
    if "not_measured" in difference:
        return f"not measured: {difference['not_measured']}"
    sides = [difference.get(side) or {"loss": difference[f"loss_{side}"]} for side in ("trained", "exported")]
    rows = difference["rows"] if "rows" in difference else sides[0]["rows"]
    name = rows_name(difference)
    text = (
        f"trained vs exported on {rows} {name.removesuffix('s') if rows == 1 else name}: loss {sides[0]['loss']:.4f} "
        f"vs {sides[1]['loss']:.4f}"
    )
    if "trained" in difference:  # a LoRA
        if "exact_match" in sides[0]:
            text += f", right answers {sides[0]['exact_match']:.1%} vs {sides[1]['exact_match']:.1%}"
        return text
    if "kl_mean" not in difference:
        return f"{text}, largest difference of a value {difference['logit_max_difference']:.2e}"
    unit, agree = difference.get("unit", "token"), difference.get("answers_agree", rows)
    text += f", KL {difference['kl_mean']:.2e} per {unit}, same first choice "
    if unit == "row":
        text += f"in {agree} of {rows} rows"
    else:
        text += f"at {difference['top1_agreement']:.1%} of the tokens and throughout {agree} of {rows} answers"
    if base == "original" and agree < rows:
        text += (
            "\nThe adapter was trained on the quantized base and is merged onto the original 16-bit weights here. "
            "--base dequantized merges onto the base it was trained on: its answers are nearest to those of the run."
        )
    return text


def adapter_scores(opened: OpenRun, recipe: Recipe, datasets: Datasets, rows: Rows) -> dict[str, Any]:
    """Score the loss and, where rows have references, ``exact_match`` (`qvera.evaluation.held_out.score_model`)."""
    task = task_of(recipe)
    task.prepare(opened.model, opened.base.tokenizer, datasets)

    def held_out() -> dict[str, Any]:
        return task.held_out_loss(opened.model, rows)

    if not task.has_answers:
        scores = held_out()
    else:
        scores, _ = score_model(
            opened.model,
            opened.base.tokenizer,
            held_out,
            prompts_of(rows),
            text_metrics(["exact"]),
            recipe.training,
            max_new_tokens=recipe.training.sample_max_new_tokens,
        )
    kept = ["loss", "rows", "trained_tokens", "exact_match", "scored_rows", "accuracy", "pearson"]
    kept += ["reward", "rewards/margins"]
    return {key: scores[key] for key in kept if key in scores}


def compare_merged(target: Artifact, recipe: Recipe, merged: Path, limit: int, console: Console) -> dict[str, Any]:
    """Measure a merged export beside its run, on at most ``limit`` rows. Both models are in memory together."""
    command = f"qvera export {target.arguments} {shlex.quote(str(merged))} --compare-only"
    again = f"`{command}` measures it later, or on a larger machine."

    def measure() -> dict[str, Any]:
        summary = None if target.run is None else try_read_json(target.run / "run.json")
        trained_bytes = ((summary or {}).get("model") or {}).get("base_bytes", 0)
        device = accelerator.current_device()
        needed, available = trained_bytes + exported_bytes(merged, device), memory.available_bytes(device)
        if needed > available:
            sizes = f"{formatting.size(needed)}, and {formatting.size(available)} of memory are available"
            return {"not_measured": f"holding the trained and the exported model together takes {sizes}. {again}"}
        opened, datasets, rows, split = _open_with_rows(target, recipe, limit, console)
        labels = opened.labels if task_of(recipe).exported_class.has_own_head else None
        with Phase(console, "comparing the trained with the exported model"):
            about = datasets.pad_id, task_of(recipe), labels, recipe.model.trust_remote_code
            found = measure_difference(opened.model, merged, rows, *about)
        return {"split": split, **found}

    return _measured(measure, merged, again)


def compare_lora(target: Artifact, recipe: Recipe, lora: Path, limit: int, console: Console) -> dict[str, Any]:
    """Score the adapter of ``target`` and the LoRA made of it, on at most ``limit`` rows, one model after the other."""

    def measure() -> dict[str, Any]:
        opened, datasets, rows, split = _open_with_rows(target, recipe, limit, console)
        with Phase(console, "scoring the trained adapter"):
            trained = adapter_scores(opened, recipe, datasets, rows)
        del opened
        gc.collect()  # a quantized weight and its module hold each other
        accelerator.empty_cache()
        with Phase(console, "scoring the LoRA on its base"):
            exported = adapter_scores(open_target(find_target(lora, target.run)), recipe, datasets, rows)
        return {"split": split, "trained": trained, "exported": exported}

    command = shlex.join(["qvera", "eval", str(lora), "--recipe", str(target.run or "RECIPE")])
    return _measured(measure, lora, f"`{command}` scores the LoRA later.")


def _open_with_rows(
    target: Artifact, recipe: Recipe, limit: int, console: Console
) -> tuple[OpenRun, Datasets, Rows, str]:
    with Phase(console, f"loading {target.path}"):
        opened = open_target(target)
    labels = opened.labels if task_of(recipe).exported_class.has_own_head else None
    datasets = build_datasets(recipe.data, opened.base.tokenizer, console, labels=labels)
    warn_of_other_rows(target, datasets, console)
    training, held_out = rows_of(datasets, target.name)
    rows = held_out or training
    if not rows:
        raise _NoRows(f"the data of {target.run} has no rows of adapter {shown_name(str(target.name))} to compare on.")
    return opened, datasets, rows[:limit], "held-out" if held_out else "training"


class _NoRows(Exception):
    """There is nothing to compare on, now or later."""


def _measured(measure: Callable[[], dict[str, Any]], export: Path, again: str) -> dict[str, Any]:
    """Call ``measure``. If data or memory is missing, the result says so, because the ``export`` itself is good.

    Raises Interrupted if the process is asked to stop. The export is whole then too.
    """
    with StopRequests(first=None) as stop:
        try:
            return measure()
        except _NoRows as error:
            return {"not_measured": str(error)}
        except (InputError, RunFailed, OSError, ValueError) as error:
            why: str | None = str(error)
        except (MemoryError, RuntimeError) as error:
            if not stop.asked and not memory.is_out_of_memory(error):
                raise
            why = "the memory gave out."
        except KeyboardInterrupt:
            why = None
        if stop.asked or why is None:  # a library that reads weights may have made another error of Ctrl-C
            raise Interrupted(f"Stopped while it was measured; {export} is whole. {again}")
    return {"not_measured": f"{why} {again}"}
