"""Backward, clip and step with DeepSpeed, in a run with a ``deepspeed`` key.

ZeRO stages 1 and 2 get a module of the vectors alone. DeepSpeed sends every parameter that it is given from rank 0 to
the others, so a mapped base would become private memory on each of them. Stage 3 gets the decoder, whose weights
`BaseSharder` has sharded already.

Checkpoints hold whole vectors and optimizer state, through DeepSpeed's public ``safe_get_*`` and ``safe_set_*``. So a
run can go on under another stage and another number of processes.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from qvera.adapters.save_load import trained_vectors
from qvera.config.sections import TrainingSection
from qvera.distributed.group import Group
from qvera.distributed.zero import Sizes, ZeroConfig, deepspeed_module, gather_at_call, is_sharded, whole_numel
from qvera.models.structure import causal_model, core_of, decoder_layers
from qvera.training.engine import LocalEngine
from qvera.training.optim import current_rate

_STATE = ("exp_avg", "exp_avg_sq")


class _VectorsOnly(nn.Module):
    """The module of stages 1 and 2. By a call with the loss DeepSpeed learns that a backward pass comes."""

    def __init__(self, vectors: list[nn.Parameter]) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(vectors)

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


class ZeroEngine(LocalEngine):
    """Backward, clip and step by DeepSpeed.

    ``model``: base and adapter, its trained vectors whole. ``optimizer``: a torch AdamW over them, whose state is taken
    over. ``scratch``: a directory for what DeepSpeed offloads.
    """

    def __init__(
        self,
        config: ZeroConfig,
        training: TrainingSection,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        group: Group,
        scratch: Path,
        scaler: GradScaler | None = None,
    ) -> None:
        vectors = trained_vectors(model)
        super().__init__(vectors, optimizer, schedule, training.max_grad_norm, group, scaler)
        self.config = config
        # The state of a checkpoint is keyed by whole vectors, and DeepSpeed steps flat partitions of them. So it is
        # taken out now, and put into the partitions at the end (`_take_over`).
        before = {name: dict(optimizer.state[p]) for name, p in vectors.items() if p in optimizer.state}
        optimizer.state.clear()
        decoder = core_of(model)
        module = decoder if config.shards_base else _VectorsOnly(list(vectors.values()))
        sizes = _sizes(decoder, vectors) if config.shards_base else Sizes()
        sizes = dataclasses.replace(sizes, trained=sum(vector.numel() for vector in vectors.values()))
        tree = config.complete(training, group.world_size, sizes, scratch)
        if config.shards_base:
            _show_shared(decoder, vectors)
        with _embedding_hidden(decoder) if config.shards_base else contextlib.nullcontext():
            self.deepspeed: Any = deepspeed_module().initialize(model=module, optimizer=optimizer, config=tree)[0]
        self.core = self.deepspeed if config.shards_base else None
        if config.shards_base:
            self._gather_unsharded()
            # embedding and head are called outside the decoder, where no hook of DeepSpeed's would gather them
            for end in (causal_model(model).get_input_embeddings(), causal_model(model).get_output_embeddings()):
                if end is not None:
                    gather_at_call(end)
        if before:
            self._take_over(before)

    def _gather_unsharded(self) -> None:
        """Gather the parameters that stay whole on every rank: vectors and norms."""
        whole = [p for p in self.deepspeed.module.parameters() if p.ds_persist]
        missing = [p for p in whole if p.ds_status.name != "AVAILABLE"]
        if missing:
            missing[0].all_gather(param_list=missing)

    def loss_gradient(self) -> torch.Tensor:
        """Return the loss scale times the number of ranks, by which `backward` multiplies the loss too."""
        return super().loss_gradient() * self.group.world_size

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        engine = self.deepspeed
        if self.scaler is not None:
            self.loss_scale = self.scaler.get_scale()
            engine.optimizer.override_loss_scale(self.loss_scale)
        engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over ranks, and the loss is divided by the trained tokens of all of them already
        loss = loss * self.group.world_size
        engine.backward(loss if self.config.shards_base else engine(loss), scale_wrt_gas=False)

    def step(self) -> tuple[float, float]:
        rate = current_rate(self.schedule)
        self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm())
        if math.isfinite(norm):
            self.schedule.step()
        elif self.config.shards_base:
            self._gather_unsharded()  # DeepSpeed does so after a step, but not after one that it skips
        if self.scaler is not None:
            # DeepSpeed has divided the gradients by the scale; the scaler looks at their norm in place of them
            # on its own device: a copy of what it found that is still on its way would overwrite the overflow
            device = next(iter(self.vectors.values())).device
            probe = nn.Parameter(torch.zeros((), device=device))
            probe.grad = torch.tensor(norm, device=device)
            self.scaler.unscale_(torch.optim.SGD([probe]))
            self.scaler.update()
        return norm, rate

    @property
    def _flats(self) -> list[torch.Tensor]:
        """This rank's fp32 partitions of the vectors, which are the basic optimizer's parameters."""
        zero = self.deepspeed.optimizer
        return zero.fp32_partitioned_groups_flat if self.config.stage == 3 else zero.single_partition_of_fp32_groups

    def unsharded(self) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        """Return copies of vectors and optimizer, gathered from the partitions of all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        vectors = {name: nn.Parameter(safe_get_full_fp32_param(p).detach().clone()) for name, p in self.vectors.items()}
        optimizer = torch.optim.AdamW(vectors.values())
        # AdamW makes its state in its first step: before that there is none to copy
        steps = [self.optimizer.state[flat]["step"] for flat in self._flats if flat in self.optimizer.state]
        if steps:
            self._link_states()
        for name, parameter in self.vectors.items() if steps else ():
            state: dict[str, Any] = {key: safe_get_full_optimizer_state(parameter, key).clone() for key in _STATE}
            optimizer.state[vectors[name]] = {"step": steps[0].detach().clone(), **state}
        return vectors, optimizer

    def gather_vectors(self) -> None:
        if self.config.shards_base:
            self._gather_unsharded()

    def _link_states(self) -> None:
        """Tell DeepSpeed's ``safe_*`` functions of stages 1 and 2 where the optimizer's state of each vector is.

        DeepSpeed does it once, after the first parameter group's first step, when the other groups have no state yet.
        """
        if self.config.stage < 3:
            from deepspeed.utils import lazy_init_hp_params_optimizer_state

            zero = self.deepspeed.optimizer
            for params, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(params, flat, self.optimizer.state)

    def forget_module_order(self) -> None:
        """Let ZeRO-3 record anew in which order modules need their weights.

        A pass that computed gradients without adding them up may take q, k and v in another order than a step does.
        """
        offload = getattr(self.deepspeed.optimizer, "parameter_offload", None)
        coordinator = None if offload is None else offload.get_param_coordinator()
        if coordinator is not None and not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()  # as DeepSpeed's parameter_offload.py does when its hooks change

    def _take_over(self, before: dict[str, dict[str, Any]]) -> None:
        """Put the optimizer state of whole vectors into the partitions."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        steps = next(iter(before.values()))["step"]
        for flat in self._flats:
            empty = {key: torch.zeros_like(flat) for key in _STATE}
            self.optimizer.state[flat] = {"step": steps.clone(), **empty}
        self._link_states()
        for name, parameter in self.vectors.items():
            for key in _STATE:
                value = before[name][key]
                if self.config.stage < 3:
                    safe_set_full_optimizer_state(parameter, value, key)
                else:
                    # DeepSpeed's function for the whole fails in stage 3 where the ranks do not divide the length
                    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
                    part = value.reshape(-1)[self.group.rank * size : (self.group.rank + 1) * size]
                    share = torch.nn.functional.pad(part, (0, size - part.numel()))
                    safe_set_local_optimizer_state(parameter, share, key)


@contextlib.contextmanager
def _embedding_hidden(decoder: nn.Module) -> Iterator[None]:
    """Hide the embedding while DeepSpeed puts its hooks on the decoder.

    Its hooks would gather the embedding again in backward, for a gradient that nobody reads. With a tied head it was
    left whole and becomes a buffer, since DeepSpeed takes every parameter for its own. The head keeps the parameter.
    """
    embeddings = [(name, m) for name, m in decoder.named_modules() if isinstance(m, nn.Embedding)]
    for name, _ in embeddings:
        decoder.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        for name, module in embeddings:
            decoder.set_submodule(name, module)
            if not is_sharded(module.weight):
                weight = module.weight.detach()
                del module.weight
                module.register_buffer("weight", weight, persistent=False)


def _show_shared(decoder: nn.Module, vectors: dict[str, nn.Parameter]) -> None:
    """Put the vectors that all layers share into the decoder, so that DeepSpeed gathers them after each step."""
    inside = {id(p) for p in decoder.parameters()}
    shared = [vector for vector in vectors.values() if id(vector) not in inside]
    if shared:
        decoder.qvera_shared = nn.ParameterList(shared)


def _sizes(decoder: nn.Module, vectors: dict[str, nn.Parameter]) -> Sizes:
    layers = [list(layer.parameters()) for layer in decoder_layers(decoder)]
    # a table is whole where the head is tied to it
    tables = {id(m.weight) for m in decoder.modules() if isinstance(m, nn.Embedding)}
    small = [p.numel() for p in decoder.parameters() if not is_sharded(p) and id(p) not in tables]
    return Sizes(
        largest_layer=max(sum(map(whole_numel, layer)) for layer in layers),
        unsharded=max([*small, *(p.numel() for p in vectors.values())]),
    )
