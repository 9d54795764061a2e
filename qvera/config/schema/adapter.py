"""The section ``adapter`` of a recipe."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Strict

from qvera.config.fields import Bool, Fraction, NonEmpty, Number, Positive, PositiveFloat, Section, Seed
from qvera.config.plugins import extensible

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
    """An adapter directory whose tensors to start from. It must have the same base model, method, rank and targets, and
    the same other keys of its method (such as b_groups, magnitude or alpha). Where A and B are drawn from the
    seed, that must be the same too."""

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
