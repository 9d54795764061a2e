"""The keys of a recipe that this package's methods and schedules read, and what the recipe alone can say against them.

Each class extends a section (`qvera.config.plugins.extensible`). This module is imported with the recipe's schema, so
it imports nothing heavy.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from qvera.config.fields import (
    Bool,
    Fraction,
    NonEmpty,
    NonNegative,
    NonNegativeFloat,
    Number,
    OnlyWith,
    Positive,
    PositiveFloat,
    Section,
)
from qvera.utils.errors import InputError

_BY_TASK = OnlyWith("data.sampling: task")
_EVALUATED = OnlyWith("data.eval_path", "data.eval_split", "data.eval_fraction", "data.held_out_tasks")
_BILEVEL = OnlyWith("training.bilevel")
_SCHEDULES = ("bilevel", "resample_every", "sample_tokens")
Problems = Iterator[tuple[str, str]]
Settings: TypeAlias = Any
"""A `QveraConfig` or the adapter section of a recipe, both with the keys of this module."""


class AdapterKeys(Section):
    """Of the section ``adapter``."""

    growth: Literal["accumulated-gradient", "momentum"] = "accumulated-gradient"
    """With spiel, which places of a weight get a value: those with the largest gradient over ``accumulate_steps``
    steps, with AdamW, or with the largest product of SM3's row and column accumulators, with SM3, whose momentum is
    ``training.adam_beta1``: 4 bytes a value, where AdamW and the candidates take 28."""
    reselect_every: Positive = 20
    """With spiel, the steps from one change of places to the next. The first one comes after ``accumulate_steps``."""
    accumulate_steps: Positive = 5
    """With spiel, the optimizer steps over which the gradient at new places is summed before each change."""
    drop_share: Fraction = 0.2
    """With spiel, the share of the values that get a new place each time: those of smallest size. It falls to zero
    along a line until the last step. The first change moves all values, whose places were random."""
    orthogonal_penalty: NonNegativeFloat = 0.1
    """Read by ``bilora``: γ of γ (‖PᵀP - I‖² + ‖QQᵀ - I‖²), which is added to the loss for every linear. 0: none."""
    singular_share: Annotated[float, Field(gt=0, le=1), *Number] = 0.1
    """Read by ``sara``: a layer's rank is the number of its weight's leading singular values whose sum is this share of
    the sum of all, and at most ``rank``."""
    frozen_pair: Literal["seeded", "svd"] = "seeded"
    """Read by ``sara``: A and B are VeRA's shared random pair, or each layer's own from the SVD of its weight."""
    mixed_vectors: Positive = 1
    """Read by ``sara``: vectors d that a trained router mixes for each token (Mo-SARA). Above 1 the adapter can't be
    merged or exported as a LoRA."""
    lorta_convention: Literal["input-first", "output-first"] = "input-first"
    """Read by ``lorta``: the side of each weight that the shared A is on; the other side is cut into heads. The
    authors' language-model code is input-first, their fork of PEFT output-first."""
    theta_length: Positive | None = None
    """Read by ``uni-lora``: how many numbers are trained in all. Each number of each A and B is one of them."""
    gradient_rows: Positive = 50
    """Read by ``lora-sb``: the first rows of the training, from whose gradient A, B and R are made."""

    def contradictions(self) -> Problems:
        """Yield keys that contradict each other."""
        yield from super().contradictions()
        if self.accumulate_steps > self.reselect_every:
            yield "accumulate_steps", f"{self.accumulate_steps} is more than adapter.reselect_every."


class DataKeys(Section):
    """Of the section ``data``."""

    sampling: Literal["rows", "task"] = "rows"
    """How a step's rows are drawn. ``rows``: each row once an epoch. ``task``: a step has rows of one task, and all
    tasks have equally many steps, however many rows they have (multitask fine-tuning, arXiv 2203.04904). A task is a
    source (``path``, or a part of ``mixture``), or a value of ``task_column``."""
    task_column: Annotated[NonEmpty | None, _BY_TASK] = None
    """The column whose values are the tasks, in every source. Default: each source is a task."""
    task_labels: Annotated[Positive | None, _BY_TASK] = None
    """With ``task_column``: a task is this many of its values, drawn at random (the paper: 5). The same value may be in
    several tasks. Default: each value is a task."""
    task_count: Annotated[Positive | None, _BY_TASK] = None
    """With ``task_labels``: how many tasks are drawn."""
    task_steps: Annotated[Positive, _BY_TASK] = 1
    """Optimizer steps on a task before the next one has its turn. The paper trains one task after the other, which is a
    large number here."""
    held_out_tasks: Annotated[NonNegative | list[NonEmpty], _BY_TASK] = 0
    """Tasks that are not trained: their names (paths, or values of ``task_column``), or how many are chosen by
    ``seed``. ``training.adapt_steps`` adapts to each of them after training."""
    eval_limit: Annotated[Positive | None, _EVALUATED] = None
    """Use only the first held-out rows of each source; of many adapters, of each. Default: all."""

    if TYPE_CHECKING:
        mixture: list[Any]
        group_by_length: bool
        adapter_files: bool
        adapter_column: str | None
        sources: Any

    @property
    def owner_column(self) -> tuple[str, str] | None:
        """See `DataSection.owner_column`."""
        return (self.task_column, "task") if self.task_column is not None else super().owner_column  # type: ignore[misc]

    def contradictions(self) -> Problems:
        """Yield keys that contradict each other."""
        yield from super().contradictions()
        if self.sampling == "rows":
            return
        if self.task_column is None and not self.mixture:
            yield "sampling", "task needs several tasks; set data.task_column, or add sources to data.mixture."
        for key, source in self.sources("weight"):
            if source.weight != 1:
                yield key, "data.sampling: task gives every task equally many steps; remove the weights."
        if self.group_by_length:
            yield "group_by_length", "a step's rows are those of its task (data.sampling); remove one of the two."
        if (self.task_labels is None) != (self.task_count is None):
            yield "task_labels", "and data.task_count go together; set both."
        elif self.task_labels is not None:
            if self.task_column is None:
                yield "task_labels", "counts values of data.task_column, which is not set."
            if self.held_out_tasks:
                yield "held_out_tasks", "a value may be in many tasks of data.task_labels; remove one of the two."
        if self.adapter_files or self.adapter_column is not None:
            key = "adapter_files" if self.adapter_files else "adapter_column"
            yield (
                "sampling",
                f"task draws steps over tasks, and each adapter (data.{key}) has steps of its own; remove one of the "
                "two.",
            )


class TrainingKeys(Section):
    """Of the section ``training``."""

    adam_beta2: Annotated[Fraction, OnlyWith("adapter.growth: accumulated-gradient")] = 0.999
    """AdamW's β2. SM3 (``adapter.growth: momentum``) adds squares up and has none."""
    bilevel: Bool = False
    """Train two groups of parameters on two disjoint parts of the rows in turn, so that neither fits both (BiLoRA,
    arXiv 2403.13037, first order). VeRA: b on the lower level's rows, d on the upper level's; ``bilora``: P and Q, and
    Λ. For small data sets."""
    bilevel_share: Annotated[Fraction, _BILEVEL] = 0.2
    """With ``bilevel``: the share of the rows that the upper level trains on, chosen by ``data.seed``."""
    bilevel_lower_steps: Annotated[Positive, _BILEVEL] = 4
    """With ``bilevel``: optimizer steps of the lower level before the upper one has its turn. The defaults give every
    row one pass an epoch."""
    bilevel_upper_steps: Annotated[Positive, _BILEVEL] = 1
    """With ``bilevel``: optimizer steps of the upper level before the lower one has its turn again."""
    bilevel_retrain: Annotated[Fraction, _BILEVEL] = 0.0
    """With ``bilevel``: the last share of the steps, in which the lower level trains on all rows and the upper level is
    frozen, as BiDoRA does at the end."""
    resample_every: NonNegative = 0
    """Freeze the trained vectors every this many optimizer steps, and go on with a new pair of projections of the next
    seed and fresh vectors, as ReLoRA and Flora do. The adapter is the sum of all phases, of ``adapter.rank`` each. For
    VeRA, on long runs. 0: never."""
    resample_momentum: Annotated[Literal["clear", "move"], OnlyWith("training.resample_every")] = "clear"
    """With ``resample_every``: whether a new phase begins without optimizer state, or with the old momentum of b as far
    as the new subspace has it (Flora; about 1/√in_features of it) and the old second moments. ``move`` is for
    ``optim: adamw``."""
    sample_tokens: Fraction = 0.0
    """For methods that train A (``lora``, input-first ``lorta``): the share of each input's tokens that backward keeps
    for the gradient of A, drawn so that it is right in expectation (WTA-CRS, arXiv 2305.15265). Less memory, noisier
    steps. 0: all."""
    adapt_steps: Annotated[NonNegative, OnlyWith("data.held_out_tasks")] = 0
    """After training, optimizer steps on each of ``data.held_out_tasks``, from the trained vectors, with a constant
    rate. The report has the loss of the task's other rows before and after. The saved adapter is not changed. 0:
    none."""
    adapt_rows: Annotated[Positive, OnlyWith("training.adapt_steps")] = 16
    """Rows of a held-out task that ``adapt_steps`` trains on, at most half of them; the others are scored."""
    adapt_learning_rate: Annotated[PositiveFloat | None, OnlyWith("training.adapt_steps")] = None
    """The rate of ``adapt_steps``. Default: ``learning_rate``."""


class RecipeKeys(Section):
    """What sections say against each other."""

    if TYPE_CHECKING:
        adapter: Any
        data: Any
        training: Any
        task: str
        deepspeed: str | None

    def contradictions(self) -> Problems:
        """Yield keys of different sections that contradict each other."""
        yield from super().contradictions()
        data, training, adapter, method = self.data, self.training, self.adapter, self.adapter.method
        if training.objective != "sft":
            name = f"training.objective: {training.objective}"
            if data.sampling == "task":
                yield "data.sampling", f"task is not built for {name}; use rows."
            for key in _SCHEDULES:
                if getattr(training, key):
                    yield f"training.{key}", f"is not built for {name}; remove one of the two."
        if method == "bilora" and adapter.orthogonal_penalty and self.deepspeed is not None:
            yield (
                "adapter.orthogonal_penalty",
                "is added to gradients of which DeepSpeed has its own copies. Set it to 0, or remove the deepspeed "
                "key.",
            )
        own = {"lorta": "other factors", "sara": "other ranks", "uni-lora": "other places of its numbers"}
        if training.torch_compile and method in own:
            yield (
                "training.torch_compile",
                f"adapter.method {method} has {own[method]} in each layer, and torch would compile 8 layers and run "
                "the rest as they are. Remove it, or choose another method.",
            )
        given = {
            "training.optim": (training.optim, "adamw"),
            "deepspeed": (self.deepspeed, None),
            "training.torch_compile": (training.torch_compile, False),
            "task": (self.task, "causal-lm"),
        }
        for key, (value, taken) in given.items() if method == "spiel" else ():
            if value != taken:
                yield (
                    key,
                    f"is {value}, and adapter.method spiel, whose values change their places between steps, has "
                    f"optimizers of its own, over these values alone, that run in plain torch. Remove {key}, or choose "
                    "another method.",
                )
        if training.adapt_steps and self.deepspeed is not None:
            yield "training.adapt_steps", "steps with another optimizer than DeepSpeed's; remove one of the two."
        if training.sample_tokens and training.torch_compile:
            problem = "draws by the data's own sizes, which is not compiled; remove one of the two."
            yield "training.sample_tokens", problem
        for key, problems in (("bilevel", self._bilevel_problems()), ("resample_every", self._resample_problems())):
            if getattr(training, key):
                yield from ((f"training.{key}", problem) for problem in problems)

    def _bilevel_problems(self) -> Iterator[str]:
        if self.deepspeed is not None:
            yield "DeepSpeed expects a gradient of every vector in every step; remove one of the two."
        if self.data.sampling == "task":
            yield "cuts the rows into two parts, not into tasks (data.sampling); remove one of the two."
        if self.data.group_by_length:
            yield "has an order of rows of its own; remove data.group_by_length."

    def _resample_problems(self) -> Iterator[str]:
        adapter, training = self.adapter, self.training
        if self.deepspeed is not None:
            yield "clears optimizer state, of which DeepSpeed has its own copies; remove one of the two."
        if training.weight_decay:
            yield "weight decay would go on to pull at the frozen phases; set training.weight_decay: 0."
        if adapter.b_groups > 1 or adapter.input_scale:
            yield "each phase has one b and one d; remove adapter.b_groups and adapter.input_scale."
        if adapter.experts == "each":
            yield "phases are not built for vectors of each expert; set adapter.experts: shared."
        if adapter.init_from is not None:
            yield "begins with fresh vectors; remove adapter.init_from."
        if training.resample_momentum == "move" and training.optim != "adamw":
            yield f"{training.optim} holds its state in blocks; set training.resample_momentum: clear."
        if training.bilevel:
            yield "and training.bilevel are two schedules for the same vectors; remove one of the two."

    def many_adapters_contradictions(self, names: str) -> Problems:
        """Yield keys with which no adapters can be trained together."""
        yield from super().many_adapters_contradictions(names)  # type: ignore[misc]
        for key in _SCHEDULES:
            if getattr(self.training, key):
                yield f"training.{key}", f"is not built for many adapters ({names}); remove one of the two."


@dataclasses.dataclass
class ConfigFields:
    """Of adapter_config.json.

    Args:
        singular_share: SARA's share of the sum of a weight's singular values, by which its rank is chosen.
        frozen_pair: where SARA's A and B come from.
        mixed_vectors: SARA's sets of values that a router mixes.
        ranks: linear → the rank that SARA's rule gave.
        lorta_convention: on which side of a weight LoRTA's A is.
        theta_length: how many numbers Uni-LoRA trains.
        seed_chain: the seeds of the phases of a run that resampled its projections, ``projection_seed`` first. The rank
            is that of all phases together, and each has one of ``b_groups`` vectors b (`qvera.lab.resample`).
    """

    singular_share: float = 0.1
    frozen_pair: str = "seeded"
    mixed_vectors: int = 1
    ranks: dict[str, int] | None = None
    lorta_convention: str = "input-first"
    theta_length: int | None = None
    seed_chain: list[int] | None = None

    def __post_init__(self) -> None:
        config: Any = self
        if isinstance(config.experts, int):  # the name that adapters had for it before the core read it
            self.mixed_vectors, config.experts = config.experts, "none"
        super().__post_init__()  # type: ignore[misc]
        self.current_phase: int | None = None
        """The phase of ``seed_chain`` that is trained now; None outside of training. Not part of the file."""
        if not (chain := self.seed_chain):
            return
        config.format_version = max(config.format_version, 3)
        whole = isinstance(chain, list) and all(type(seed) is int and 0 <= seed < 2**64 for seed in chain)
        if not whole or chain[0] != config.projection_seed or len(chain) != config.b_groups:
            raise InputError(
                f"seed_chain: takes the seeds of {config.b_groups} phases (b_groups), the first of them "
                f"{config.projection_seed} (projection_seed), got {chain!r}."
            )

    @property
    def seeds(self) -> int | tuple[int, ...]:
        """The seed of A and B, or those of its phases."""
        config: Any = super()
        return tuple(self.seed_chain) if self.seed_chain else config.seeds


def take_old_keys(recipe: dict[str, Any]) -> None:
    """Change the recipe of a run from the time when ``adapter.experts`` was the name of ``mixed_vectors``."""
    adapter = recipe.get("adapter")
    if isinstance(adapter, dict) and type(adapter.get("experts")) is int:
        adapter["mixed_vectors"] = adapter.pop("experts")


FACTS = {"mixed_vectors": 1, "seed_chain": None}
"""Fields of `ConfigFields` that `qvera info` and the report show → their defaults."""
