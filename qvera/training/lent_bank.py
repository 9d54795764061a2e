"""Banks that are trained on a base which answers requests meanwhile: they are lent the model for slices of the work.

**The model in a slice.** It stays in the layout of answers (`qvera.evaluation.generate.generating`), whose copies of
weights a slice neither reads nor drops (`qvera.adapters.shared_model.training_layout`). To make them anew would
dequantize or pack every weight for each request. A slice has attention that joins whole rows, and its own random
generators. All of it is put back, and layers that only trained adapters have compute as the bare base does
(`leave_to_training`). So an answer is to the bit what it is without training.

A base may have several such banks, each with an adapter of PEFT's that stands for all of its slots.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch

from qvera.adapters.bank import AdapterBank
from qvera.adapters.layer import adapted_layers
from qvera.adapters.save_load import new_config, read_start, start_from
from qvera.adapters.shared_model import add_adapter, leave_to_training, training_layout
from qvera.config.sections import AdapterSection, ModelSection
from qvera.models import linear
from qvera.models.attention import implementation_on, joining_of
from qvera.models.checkpointing import Mode, enable_checkpointing
from qvera.models.loader import Base
from qvera.models.structure import causal_model
from qvera.training import checkpoint
from qvera.utils import accelerator
from qvera.utils.errors import InputError


class LentBank:
    """A served base as a trained bank borrows it. Methods are called in the thread that runs the model.

    Attributes:
        model: the base with its adapters.
        adapter: PEFT's name of the adapter that stands for all those of the bank.
    """

    def __init__(
        self,
        base: Base,
        adapter: str,
        section: AdapterSection,
        seed: int = 0,
        base_section: ModelSection | None = None,
        checkpointing: Mode | Literal["auto"] = "auto",
    ) -> None:
        """Put the adapter on, unless it is on already; this takes as long as the first request for an adapter.

        ``seed`` is that of dropout. ``base_section``: how the base was opened. ``checkpointing``
        is `Mode`, or ``auto``: on where this base can recompute its layers. InputError: a target matches nothing.
        """
        self.adapter, self._base, self._seed = adapter, base, seed
        config = new_config(section, base.facts.get("path"), base.facts.get("fingerprint"), None, base_section)
        start = read_start(config, section.init_from)
        model = base.adapted
        if model is None or adapter not in model.peft_config:  # else an attempt before this one failed later
            model = add_adapter(base, adapter, config)
        self.model = model
        leave_to_training(self.model, adapter)
        if start is not None:
            start_from(self.model, config, start, adapter)
        can_recompute = bool(causal_model(base.model).supports_gradient_checkpointing)
        mode = can_recompute if checkpointing == "auto" else checkpointing
        enable_checkpointing(self.model, mode, by_tiles=False)
        self._random: dict[str, torch.Tensor] | None = None

    def make_bank(self, slots: int) -> AdapterBank:
        """Make a bank of the adapter's shape, in place of an earlier one."""
        with training_layout(self.model, self.adapter):
            for layer in adapted_layers(self.model):
                if layer.carries(self.adapter):
                    layer.set_adapter([self.adapter])  # what its method trains gets gradients
            return AdapterBank(self.model, slots, self.adapter)

    @functools.cached_property
    def joins_rows(self) -> bool:
        """Whether the rows of a slice stand in one sequence, without padding."""
        model = self._base.model
        return joining_of(model.config, _implementation(model), False, False, whole_rows=True) is not None

    @contextlib.contextmanager
    def training(self, mode: bool = True) -> Iterator[None]:
        """Lend the model for a slice of the work, inside the block. ``mode`` False: without dropout and checkpoints."""
        model = self._base.model
        answering, was_training = model.config._attn_implementation, model.training
        with accelerator.forked_random_state(), training_layout(self.model, self.adapter):
            # generators of its own, which go on where the last slice ended: answers in between draw from others
            if self._random is None:
                torch.manual_seed(self._seed)
            else:
                checkpoint.set_generator_states(self._random)
            try:
                model.set_attn_implementation(_implementation(model))
                self.model.train(mode)
                yield
                accelerator.synchronize()  # a slice has ended when its kernels have
            finally:
                self.model.train(was_training)
                model.set_attn_implementation(answering)
                self._random = checkpoint.generator_states()


def _implementation(model: Any) -> str:
    """Return the attention of a slice: one that joins whole rows where the model can, whatever answers take."""
    name = (model.config._attn_implementation or "").removeprefix("paged|")
    if name != "sdpa":
        return name
    device, dtype = next(model.parameters()).device, linear.embedding_dtype(model.get_input_embeddings())
    return implementation_on(device, model.config, dtype)


def require_trainable_base(base: Base) -> None:
    """Raise InputError for a base that can't be trained on while it answers."""
    if linear.embedding_dtype(base.model.get_input_embeddings()) == torch.float16:
        raise InputError(
            "model.compute_dtype: this base computes in float16, which needs a loss scale that the jobs would share. "
            "Serve a run whose recipe has float32, or bfloat16."
        )
    if base.facts.get("added_tokens"):
        raise InputError("model.added_tokens: this base has tokens of its own, whose rows no job could train.")
