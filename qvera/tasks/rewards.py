"""Reinforcement learning with a reward of one's own (``training.objective: grpo``), on the base that is trained.

In a step the model answers prompts, `group_size` times each. An answer's advantage is its reward less its group's mean,
divided by the group's deviation (GRPO, arXiv 2402.03300, section 4.1). The loss of its tokens is a policy loss
(`qvera.models.token_losses`), and is divided by the number of tokens of all answers of the step (DAPO, arXiv
2503.14476, equation 12). With ``kl_coefficient`` β there is, for each token, β (u - log u - 1) with u = base's
probability / model's (GRPO, equation 4).

Answers are drawn by `qvera.evaluation.generate` from the weights that the step begins with. With
``updates_per_answers`` above 1, later steps train on the same answers again, against the probabilities at the time they
were given.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from statistics import fmean, pstdev
from statistics import mean as exact_mean
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qvera.adapters.hooks import TrainingHook
from qvera.config.schema import Recipe
from qvera.data import Datasets, Example, microbatches
from qvera.data.sampler import share_of
from qvera.distributed.group import ALONE, Group
from qvera.evaluation.generate import end_tokens, generate_tokens
from qvera.evaluation.metrics import Metric
from qvera.models import forward
from qvera.models.loss import Head, Weigh
from qvera.models.structure import causal_model
from qvera.models.token_losses import TOKEN_LOSSES, Inputs, Weighed, sequence_ratios
from qvera.tasks.base import Core, OwnLoss, Progress
from qvera.tasks.causal_lm import CausalLM
from qvera.utils.errors import InputError, OwnCodeFailed, call_problem, first_line, one_line
from qvera.utils.files import resolve_path
from qvera.utils.formatting import shortened
from qvera.utils.memory import each_in_halves

_SMALLEST_DEVIATION = 1e-4
"""Added to a group's deviation, as in TRL."""
_ADVICE = "Lower training.sample_max_new_tokens, or shorten the prompt."


class Reward(NamedTuple):
    """A reward function, of a prompt, an answer and a row, and the weight of the number that it returns."""

    name: str
    score: Callable[[str, str, dict[str, Any]], float]
    weight: float


def load_rewards(given: str | Mapping[str, float]) -> list[Reward]:
    """Load the functions of ``training.reward``. InputError: a file is missing or fails, or lacks the function."""
    weights = {given: 1.0} if isinstance(given, str) else given
    found, modules = [], dict[Path, ModuleType]()
    for text, weight in weights.items():
        file, _, name = text.rpartition(":")
        path = Path(resolve_path(file))
        if not file or not path.is_file():
            lacks = "function" if Path(resolve_path(text)).is_file() else "file here"
            raise InputError(
                f"training.reward: {text!r} names no {lacks}; expected a file and a function in it, such as "
                "rewards.py:score."
            )
        if path not in modules:
            loader = SourceFileLoader(str(path), str(path))
            modules[path] = module_from_spec(ModuleSpec(str(path), loader, origin=str(path)))
            modules[path].__file__ = str(path)
            sys.modules[str(path)] = modules[path]  # where dataclasses look for the names in their annotations
            if (directory := str(path.absolute().parent)) not in sys.path:
                sys.path.append(directory)  # it may import files beside it, also when it is called
            try:
                loader.exec_module(modules[path])
            except (Exception, SystemExit) as error:
                raise InputError(
                    f"training.reward: {path} can't be imported: {type(error).__name__}: {first_line(error)}"
                ) from error
        score = getattr(modules[path], name, None)
        if not callable(score):
            raise InputError(f"training.reward: {path} has no function {name!r}.")
        if (problem := call_problem(score, 3)) is not None:
            raise InputError(
                f"training.reward: {name} in {path} is called with the prompt, the answer and the row: {problem}."
            )
        names = [other.rpartition(":")[2] for other in weights]
        found.append(Reward(name if names.count(name) == 1 else text, score, weight))
    return found


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Answer(Example):
    """A prompt with an answer that the model has given. Only the answer's tokens are trained."""

    reward: float = 0.0
    rewards: Sequence[float] = ()  # the number that each function gave
    advantage: float = 0.0
    is_ended: bool = False  # whether the model has ended it, and not its length
    logprobs: np.ndarray | None = None  # fp32 [answer tokens], from the time it was given; None: take those of now
    base_logprobs: np.ndarray | None = None  # fp32 [answer tokens], of the model without its adapter


class Rewards(CausalLM, TrainingHook):
    """The task to make answers likelier that got a higher reward than others to the same prompt.

    It is a hook too, so that checkpoints keep the answers that later steps train on.
    """

    takes_loss = False
    scores = ("loss", "reward")
    _tokenizer: PreTrainedTokenizerBase

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        training = recipe.training
        self.passes_without_gradient = int(training.updates_per_answers > 1) + int(training.kl_coefficient > 0)
        self.rewards: list[Reward] = []
        self._kept: list[dict[str, Any]] = []  # the answers of all ranks, as JSON
        self._of_step: dict[str, float] = {}  # metrics of the rewards
        self._step_tokens = 1  # of all answers of all ranks
        self._sums: dict[str, float] = defaultdict(float)  # metrics, summed over the tokens of a step
        self._pass: dict[str, torch.Tensor] = {}  # those of the latest pass, until it counts

    def take_own(self, metrics: Mapping[str, Metric], loss: OwnLoss | None) -> None:
        if metrics:
            raise InputError(
                "metrics: compare answers with references, and rows of grpo have none. Use training.reward."
            )
        super().take_own(metrics, loss)

    def check(self) -> None:
        assert self.training.reward is not None
        self.rewards = load_rewards(self.training.reward)

    def prepare_rows(self, datasets: Datasets) -> None:
        for rows in (datasets.train, datasets.eval):
            if len(rows):
                rows.ask(self.training.sample_max_new_tokens)

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: Datasets) -> None:
        """Take the tokenizer. InputError: the model caps its logits, and the temperature is not 1."""
        super().prepare(model, tokenizer, datasets)
        self._tokenizer = tokenizer
        if not self.rewards:  # of a run that is evaluated
            self.check()
        if self.training.answer_temperature != 1 and Head.of(causal_model(model)).softcap is not None:
            raise InputError(
                "training.answer_temperature: this model caps its logits, and the loss then knows probabilities at the "
                "temperature 1 only. Remove the key."
            )

    def step_rows(self, model: nn.Module, rows: Sequence[int], step: int, group: Group) -> Sequence[Example]:
        """Return the answers that this step trains on. Their rewards become its metrics."""
        training, datasets = self.training, self.datasets
        if (step - 1) % training.updates_per_answers == 0 or not self._kept:
            # each prompt is answered `group_size` times
            own = share_of(rows, group.rank, group.world_size)
            numbers = [row for row in own for _ in range(training.group_size)]
            prompts = [datasets.train[row] for row in numbers]
            # by step and rank, so that a resumed run draws the same answers
            key = np.array([training.seed, step * 2**20 + group.rank], np.uint64)
            seed = int(np.random.Philox(key=key).random_raw() >> 1)
            found = self._answers(model, prompts, training.answer_temperature, seed)
            for part in microbatches(found, training.group_size):
                mean, deviation = exact_mean(one["reward"] for one in part), 1.0  # equal rewards: advantages of 0
                if training.scale_rewards:
                    deviation = pstdev(one["reward"] for one in part) + _SMALLEST_DEVIATION
                for one in part:
                    one["advantage"] = (one["reward"] - mean) / deviation
            answers = [_answer(prompt, one) for prompt, one in zip(prompts, found, strict=True)]
            if training.updates_per_answers > 1:  # a later step compares with the model of now
                self._add_logprobs("logprobs", found, model, answers)
            if training.kl_coefficient:
                with model.disable_adapter():  # type: ignore[operator]  # PEFT's
                    self._add_logprobs("base_logprobs", found, model, answers)
            # all ranks keep all answers, as the passes of the step are cut over the answers of all
            kept = [{"row": number, **one} for number, one in zip(numbers, found, strict=True)]
            self._kept = list(itertools.chain(*group.gather(kept)))
        answers = [_answer(datasets.train[one["row"]], one) for one in self._kept]
        self._of_step, self._step_tokens = self._measured(answers), max(1, self.targets(answers))
        return answers

    def has_gradient(self, row: Example) -> bool:
        return bool(getattr(row, "advantage", 0.0)) or self.training.kl_coefficient > 0

    def step_hook(self) -> TrainingHook:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"answers": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = state["answers"]

    def _answers(
        self,
        model: nn.Module,
        prompts: Sequence[Example],
        temperature: float,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer each prompt; return the answers with rewards as JSON. OwnCodeFailed where a reward is no number."""
        training, tokenizer = self.training, self._tokenizer
        ends = set(end_tokens(model, tokenizer))
        found = generate_tokens(
            model,  # type: ignore[arg-type]
            tokenizer,
            [prompt.prompt_ids.tolist() for prompt in prompts],
            max_new_tokens=training.sample_max_new_tokens,
            batch_size=training.answer_batch_size,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )
        answers, texts = [], tokenizer.batch_decode(found, skip_special_tokens=True)
        for prompt, tokens, text in zip(prompts, found, texts, strict=True):
            scores = [_scored(reward, prompt, text) for reward in self.rewards]
            total = sum(score * reward.weight for score, reward in zip(scores, self.rewards, strict=True))
            is_ended = bool(tokens and tokens[-1] in ends)
            answers.append({"tokens": tokens, "text": text, "reward": total, "rewards": scores, "is_ended": is_ended})
        return answers

    @torch.no_grad()
    def _add_logprobs(
        self, name: str, found: Sequence[dict[str, Any]], model: nn.Module, answers: Sequence[Answer]
    ) -> None:
        """Note the log-probabilities of each answer's tokens under a name."""

        def compute(rows: list[Answer]) -> list[np.ndarray]:
            batch = forward.make_batch(model, rows, self.datasets.pad_id, self.recipe.data.prefix_once)
            _, logprobs = self._weighed(model, batch, lambda lp, _: (lp, lp))
            return np.split(logprobs.squeeze(1).float().cpu().numpy(), np.cumsum([r.trained_tokens for r in rows])[:-1])

        batches = microbatches(answers, self.training.per_device_train_batch_size)
        each = each_in_halves(batches, compute, next(model.parameters()).device, "answers", _ADVICE)
        for one, logprobs in zip(found, itertools.chain.from_iterable(lps for _, lps in each), strict=True):
            one[name] = logprobs.tolist()

    def _weighed(
        self, model: nn.Module, batch: dict[str, Any], weigh: Weigh, core: Any = None, grad: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `forward.weighed_loss` at the temperature that answers are drawn at."""
        chunk, temperature = self.training.loss_chunk_tokens, self.training.answer_temperature
        return forward.weighed_loss(model, batch, chunk, weigh, core, grad, temperature)

    def loss(
        self, model: nn.Module, rows: Sequence[Example], core: Core = None, expected_grad: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        """Return the policy loss. Rows that are no answers, as in the trial of the longest batch, weigh nothing."""
        batch = forward.make_batch(model, rows, self.datasets.pad_id, self.recipe.data.prefix_once)
        counts = [row.trained_tokens for row in rows]
        device = batch["trained"].device

        def column(values: Sequence[Any]) -> torch.Tensor:
            """Return a column [n, 1] over all tokens, in fp32, from a number, or one for each token, of each row."""
            each = [np.broadcast_to(np.asarray(v, np.float32), n) for v, n in zip(values, counts, strict=True)]
            return torch.from_numpy(np.concatenate(each)).to(device).unsqueeze(1)

        inputs = {"advantages": column([getattr(row, "advantage", 0.0) for row in rows])}
        for name in ("logprobs", "base_logprobs"):
            known = [getattr(row, name, None) for row in rows]
            if all(each is not None for each in known):
                inputs[name] = column(known)
        settings = self.training
        loss = TOKEN_LOSSES[settings.policy_loss]
        if loss.by_row:  # a token's weight depends on all tokens of its row: they are computed first, without gradient
            row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)).to(device)
            inputs["sequence_ratio_mask"] = torch.ones_like(inputs["advantages"])
            with torch.no_grad():
                _, now = self._weighed(model, batch, lambda lp, _: (lp, lp), core)
            inputs["sequence_ratio"] = sequence_ratios(now, {"logprobs": now, **inputs}, row, len(rows))
        chosen = {key: float(getattr(settings, key)) for key in loss.settings}
        self._pass = defaultdict(lambda: torch.zeros((), device=device))

        # called for one chunk of tokens at a time; returns each token's loss and its derivative
        def weigh(logprobs: torch.Tensor, part: slice) -> Weighed:
            here: Inputs = {"logprobs": logprobs, **{name: each[part] for name, each in inputs.items()}}
            losses, weights = loss.compute(logprobs, here, chosen)
            self._pass["clipped"] += ((weights == 0) & (here["advantages"] != 0)).sum()
            if "base_logprobs" in here:
                apart = here["base_logprobs"] - logprobs
                divergence, beta = apart.exp() - apart - 1, settings.kl_coefficient
                self._pass["kl"] += divergence.sum()
                losses, weights = losses + beta * divergence, weights + beta * (apart.exp() - 1)
            return losses, weights

        total, _ = self._weighed(model, batch, weigh, core, expected_grad)
        return total, sum(counts)

    def count_pass(self) -> None:
        for key, value in self._pass.items():
            self._sums[key] += float(value)

    def forget_metrics(self) -> None:
        self._sums.clear()

    def take_metrics(self, group: Group = ALONE) -> dict[str, float]:
        """Return the step's rewards, the share of tokens that clipping held back, and the divergence from the base."""
        names = ["clipped", *(["kl"] if self.training.kl_coefficient else [])]
        sums = group.sum([self._sums[name] for name in names])
        self._sums.clear()
        return self._of_step | {name: each / self._step_tokens for name, each in zip(names, sums, strict=True)}

    def _measured(self, answers: Sequence[Answer]) -> dict[str, float]:
        groups = [[a.reward for a in part] for part in microbatches(answers, self.training.group_size)]
        found = {
            "reward": fmean(answer.reward for answer in answers),
            "reward_deviation": fmean(map(pstdev, groups)),
            "equal_groups": fmean(float(min(group) == max(group)) for group in groups),
            "answer_tokens": fmean(answer.trained_tokens for answer in answers),
            "ended_answers": fmean(float(answer.is_ended) for answer in answers),
        }
        if len(self.rewards) > 1:
            means = map(fmean, zip(*(answer.rewards for answer in answers), strict=True))
            found |= {f"reward/{reward.name}": mean for reward, mean in zip(self.rewards, means, strict=True)}
        return found

    def held_out_loss(
        self, model: nn.Module, rows: Sequence[Example], group: Group = ALONE, progress: Progress = None
    ) -> dict[str, Any]:
        """Score greedy answers: ``reward`` is their mean reward, ``loss`` is -reward. The ranks share the prompts."""
        started = time.perf_counter()
        own = [rows[i] for i in range(group.rank, len(rows), group.world_size)]
        answers = self._answers(model, own, 0.0, 0, progress) if own else []
        total, tokens = group.sum([sum(a["reward"] for a in answers), sum(len(a["tokens"]) for a in answers)])
        reward = total / len(rows)
        about = {"rows": len(rows), "trained_tokens": int(tokens), "seconds": time.perf_counter() - started}
        return {"loss": 0.0 - reward, "reward": reward, **about}  # not -0.0

    def line(self, scores: dict[str, Any]) -> str:
        return f"held-out reward {scores['reward']:.4f}"


def _answer(prompt: Example, kept: Mapping[str, Any]) -> Answer:
    """Make an answer of its JSON in checkpoints: tokens, text, rewards, advantage and log-probabilities."""
    ids = np.append(prompt.prompt_ids, np.asarray(kept["tokens"], np.int32))
    of_row = {field.name: getattr(prompt, field.name) for field in dataclasses.fields(Example)}
    of_row |= {"input_ids": ids, "trained": np.arange(len(ids)) >= len(prompt.prompt_ids), "reference": kept["text"]}
    values: dict[str, Any] = {name: kept.get(name) for name in ("reward", "rewards", "advantage", "is_ended")}
    for name in ("logprobs", "base_logprobs"):
        values[name] = None if kept.get(name) is None else np.asarray(kept[name], np.float32)
    return Answer(**of_row, **values)


def _scored(reward: Reward, prompt: Example, answer: str) -> float:
    """Return a reward. OwnCodeFailed, which names the row: the function raises, or gives no finite number."""
    asked, row = json.loads(prompt.about or '["", {}]')
    try:
        given: Any = reward.score(asked, answer, row)
        problem = f"gave {shortened(repr(given))} for"
    except Exception as error:
        given, problem = None, f"raised {type(error).__name__} ({one_line(error)}) on"
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(number := float(given)):
            return number
    raise OwnCodeFailed(
        f"training.reward: {reward.name} {problem} an answer to {prompt.source}; expected a finite number. The answer "
        f"was {answer[:200]!r}. Mend the function."
    )
