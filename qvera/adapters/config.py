"""The adapter's config: what `adapter_config.json` holds."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

from peft import PeftConfig

from qvera.adapters.projection import (
    GENERATOR,
    Pair,
    Seeds,
    pair_number,
    projection_sha256,
    require_same_pairs,
    require_sha256,
)
from qvera.config import plugins
from qvera.config.sections import AdapterSection
from qvera.models.model_class import CAUSAL_LM, REGRESSION, ModelClass, classification_class, image_class
from qvera.utils.errors import InputError

PEFT_TYPE = "QVERA"
PREFIX = "base_model.model."
"""PEFT's prefix of module names in an adapter file."""
SHARED_PREFIX = "base_model.shared."
"""The prefix for tensors that all linears share."""

LABELS_VERSION = 4
FORMAT_VERSION = 5
"""The newest format that is read. An adapter names the oldest one that has all it needs."""
# 1: one b and one d for each linear; 2: b_groups, input_scale; 3: method, magnitude; 4: labels; 5: experts

_BIASES = ("none", "all", "qvera_only")
_NAMES_IN_PEFT = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "vera_dropout": "dropout",
    "projection_prng_key": "projection_seed",
}  # fmt: skip
"""Fields of `peft.LoraConfig` and `peft.VeraConfig` → their names here."""
_DEFAULTS = AdapterSection()


@dataclass
@plugins.extensible("ConfigFields")
@dataclass
class QveraConfig(PeftConfig):
    """An adapter over a (quantized) base model, VeRA by default.

    Fields that a recipe's adapter section has too (`AdapterSection`) have its meaning and its defaults.

    Args:
        target_modules: ``"all-linear"`` (every linear but the head), a regular expression, or names, which must match.
        layers_pattern: the name of the list of layers that ``layers_to_transform`` counts, if it is not the first one.
        modules_to_save: modules that are trained and saved whole. PEFT adds a classification head by itself.
        bias: which biases are trained and saved too: ``none``, ``all``, or ``qvera_only`` (those of adapted linears).
        init_weights: False starts b and d at random, so that a fresh adapter changes the model (for tests).
        rank_pattern, alpha_pattern: name or regular expression of linears → rank or α, as in PEFT's LoRA.
        projection_seed: the section's ``seed``.
        projection_generator: the rule that draws A and B from the seed.
        projection_shapes, projection_sha256: of A and B. Set when the adapter is put on a model and checked at loading.
        pair_numbers: linear → `qvera.adapters.projection.pair_number`, if each linear has its own A and B.
        shared_by: how many linears share the adapter's tensors; None: each has its own.
        added_tokens: token → id. Their rows lie beside the vectors.
        chat_template: the Jinja template of the adapter's prompts; None: that of the base.
        labels: names of a classification head's outputs, in order; None: the model is a language model.

    Raises:
        InputError: a value is out of range, or a newer format or another generator wrote the config.
    """

    method: str = _DEFAULTS.method
    rank: int = _DEFAULTS.rank
    target_modules: str | list[str] | set[str] | None = "all-linear"
    exclude_modules: str | list[str] | set[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_weights: bool = True
    b_groups: int = _DEFAULTS.b_groups
    input_scale: bool = _DEFAULTS.input_scale
    experts: str = _DEFAULTS.experts
    magnitude: bool | None = _DEFAULTS.magnitude
    d_initial: float = _DEFAULTS.d_initial
    train_d: bool = _DEFAULTS.train_d
    alpha: float | None = _DEFAULTS.alpha
    use_rslora: bool = _DEFAULTS.use_rslora
    init_lora_weights: str = _DEFAULTS.init_lora_weights
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout: float = _DEFAULTS.dropout
    projection_seed: int = _DEFAULTS.seed
    projection_generator: str = GENERATOR
    projection_shapes: dict[str, list[int]] | None = None
    projection_sha256: str | None = None
    pair_numbers: dict[str, float] | None = None
    shared_by: int | None = None
    format_version: int = 1
    base_fingerprint: str | None = None
    quantization: str | None = None
    double_quant: bool | None = None
    added_tokens: dict[str, int] | None = None
    pad_token: str | None = None
    eos_token: str | None = None
    chat_template: str | None = None
    labels: list[str] | None = None
    problem_type: str | None = None

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """InputError: a keyword of PEFT's own configs that has another name here."""
        for name in _NAMES_IN_PEFT.keys() & named:
            here = _NAMES_IN_PEFT[name]
            raise InputError(f"QveraConfig: PEFT's {name} is called {here} here. Write {here}={named[name]!r}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PEFT_TYPE  # a string: PEFT's enum stays as it is
        self.progress: Callable[[str], None] | None = None
        """A callback that gets the name of each weight of the base while a method decomposes it; not saved."""
        if self.format_version > FORMAT_VERSION:
            raise InputError(
                f"this QVERA adapter has format version {self.format_version} and optional parts this qvera does not "
                f"know (it reads version {FORMAT_VERSION}): update qvera."
            )
        if self.projection_generator != GENERATOR:
            raise InputError(
                f"this QVERA adapter's projections come from the generator {self.projection_generator!r}; this qvera "
                f"has {GENERATOR!r} only: update qvera."
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))
        if self.magnitude is None:  # older files have null: the key was reserved
            self.magnitude = False
        self._check_values()
        # the oldest format that has all this adapter needs, so that an older qvera can still read it
        needed = 2 if self.b_groups > 1 or self.input_scale else 1
        needed = 3 if self.method != _DEFAULTS.method or self.magnitude else needed
        needed = LABELS_VERSION if self.labels else needed
        self.format_version = max(self.format_version, FORMAT_VERSION if self.experts != "none" else needed)
        if self.added_tokens:  # PEFT writes its JSON with sorted keys; ids say in which order tokens were added
            self.added_tokens = dict(sorted(self.added_tokens.items(), key=lambda pair: pair[1]))

    @property
    def seeds(self) -> Seeds:
        """The seed of A and B, or several seeds whose pairs stand side by side."""
        return self.projection_seed

    def check_projection(self, largest_in: int, largest_out: int) -> None:
        """Record the seed's projections in a fresh config; InputError if an existing one has others."""
        shapes = {"A": [self.rank, largest_in], "B": [largest_out, self.rank]}
        if self.projection_shapes is not None and self.projection_shapes != shapes:
            raise InputError(
                f"this adapter was trained with projections of shapes {self.projection_shapes}, but this model and its "
                f"targets need {shapes}: it belongs to another base model."
            )
        digest = projection_sha256(self.rank, largest_in, largest_out, self.seeds)
        require_sha256(self.projection_sha256, digest, self.seeds)
        self.projection_shapes, self.projection_sha256 = shapes, digest

    def check_pair(self, name: str, pair: Pair) -> None:
        """Record a linear's own pair in a fresh config; InputError if an existing one has another."""
        # a model on the meta device has no weight that a pair could be made from
        if not pair[1].is_meta:
            found, self.pair_numbers = pair_number(pair[1]), self.pair_numbers or {}
            require_same_pairs({name: found}, {name: self.pair_numbers.setdefault(name, found)})

    def _check_values(self) -> None:
        # a recipe's section checks the keys that both have, and its messages name them as the recipe does
        _DEFAULTS.replace(**{name: getattr(self, name) for name in SHARED_KEYS})
        try:
            _DEFAULTS.replace(seed=self.projection_seed)
        except InputError as error:
            raise InputError(f"projection_{error}") from None
        if self.bias not in _BIASES:
            raise InputError(f"bias: takes one of {', '.join(_BIASES)}, got {self.bias!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError(
                f"layers_pattern: takes effect only with layers_to_transform, got {self.layers_pattern!r}."
            )
        names = self.labels or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"labels: takes the names of the head's outputs, got {names!r}.")
        tokens = self.added_tokens or {}
        if not isinstance(tokens, dict) or not all(type(i) is int and i >= 0 for i in tokens.values()):
            raise InputError(f"added_tokens: takes token → id (whole numbers >= 0), got {tokens!r}.")

    @property
    def model_class(self) -> ModelClass:
        """The model class that the adapter needs."""
        if not self.labels:
            return CAUSAL_LM
        if self.task_type is None:  # PEFT has no name for images
            return image_class(self.labels)
        return classification_class(self.labels, self.problem_type == REGRESSION)


SHARED_KEYS = sorted({each.name for each in fields(QveraConfig)} & set(AdapterSection.model_fields))
"""The keys that a recipe's adapter section and an adapter's config have under the same name."""
