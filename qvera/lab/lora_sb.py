"""LoRA-SB (arXiv 2411.19557): ΔW = B R A, R [rank, rank] trained, A and B from the first sign step of full training.

With G the gradient of the frozen weight over the first rows, and η the first learning rate, −η sign(G) ≈ U S Vᵀ. The
start is B = U, R = S and A = Vᵀ: the best rank-r approximation of that step. A and B depend on the rows, so the
adapter's file holds them, in bfloat16 as in the authors' code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qvera.adapters.factors import Factors
from qvera.adapters.hooks import TrainingHook
from qvera.adapters.layer import QveraLinear
from qvera.adapters.methods.base import LinearBytes, LinearSpec, Method, Shapes, Source, Tensors, Traits
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair, forget_inputs
from qvera.config.plugins import Schedule
from qvera.distributed.zero import zero_config_of
from qvera.lab.keys import Settings
from qvera.lab.lora_xs import require_rank
from qvera.lab.svd import rows_of, rows_of_tensor, truncated_svd
from qvera.models.structure import causal_model
from qvera.training.optim import current_rate
from qvera.utils import memory
from qvera.utils.errors import InputError, RunFailed

if TYPE_CHECKING:
    from qvera.data import Batches
    from qvera.training.loop import AloneLoop


class LoraSb(Method):
    """R [rank, rank] is trained, A and B are not. All are 0 until `StartFromGradient` sets them."""

    name = "lora-sb"
    title = "LoRA-SB"
    keys = {"gradient_rows": False}
    usual = {"adapter.rank": 96, "training.learning_rate": 1e-4}
    source = Source.STORED

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        require_rank(adapter.rank, spec)
        r = adapter.rank
        return {"qvera_frozen_A": (r, spec.in_features), "qvera_frozen_B": (spec.out_features, r), "qvera_R": (r, r)}

    def traits(self, name: str, adapter: Settings) -> Traits:
        return Traits() if name == "qvera_R" else Traits(torch.bfloat16, is_trained=False)

    def memory(
        self, adapter: Settings, spec: LinearSpec, tokens: int, dtype: torch.dtype, on_accelerator: bool
    ) -> LinearBytes:
        cast = adapter.rank * (spec.in_features + spec.out_features) * dtype.itemsize if dtype != torch.bfloat16 else 0
        return super().memory(adapter, spec, tokens, dtype, on_accelerator)._replace(cast=cast)

    def factors(self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        return Factors(tensors["qvera_frozen_A"], tensors["qvera_frozen_B"], R=at_least_fp32(tensors["qvera_R"]))


class FirstGradient(Schedule):
    """Gives LoRA-SB its start, by `StartFromGradient`."""

    name = "first_gradient"
    keys = (f"adapter.method={LoraSb.name}",)
    plans_steps = False

    def check(self, recipe: Any, method: Method) -> None:
        zero = zero_config_of(recipe)
        if zero is not None and zero.shards_base:
            raise InputError(
                f"deepspeed: {recipe.deepspeed} shards the base (ZeRO-3), and adapter.method {method.name} starts from "
                "gradients of whole weights. Use zero1, zero2 or none."
            )
        if recipe.training.objective == "grpo" and recipe.adapter.init_from is None:
            raise InputError(
                f"training.objective: grpo has no gradient before there are answers, and adapter.method {method.name} "
                "starts from one. Choose another method, or give adapter.init_from."
            )

    def hook(self, training: Any) -> StartFromGradient | None:
        return StartFromGradient() if training.recipe.adapter.init_from is None else None


_SHARE_OF_FREE_MEMORY = 4


class StartFromGradient(TrainingHook):
    """Gives the adapter its start. Each rank takes its share of the first ``adapter.gradient_rows`` rows.

    Gradients are collected for as many linears at a time as a quarter of the free memory holds.
    """

    def start(self, training: AloneLoop) -> None:
        section: Any = training.recipe.adapter
        layers = {name: m for name, m in training.model.named_modules() if isinstance(m, QveraLinear)}
        steps = max(training.steps, training.batches.per_epoch)
        rows, rate = _first_rows(training.batches, steps, section.gradient_rows), current_rate(training.schedule)
        # Linears in parts, whose gradients fit into the memory together. Each part takes a pass over the rows.
        parts: list[dict[str, QveraLinear]] = []
        # They are the same on all ranks, which meet in each of them.
        free = min(training.group.gather(memory.available_bytes(training.device)))
        most, room = free // _SHARE_OF_FREE_MEMORY, 0
        for name, layer in layers.items():
            size = 4 * layer.in_features * layer.out_features
            if not parts or size > room:
                parts.append({})
                room = most
            parts[-1][name] = layer
            room -= size
        name = f"gradient of the first {len(rows)} rows"
        with training.session.phase(name, 100) as percent, _base_alone(training.model, layers):
            for number, part in enumerate(parts):

                def show(share: float, number: int = number) -> None:
                    percent(int(100 * (number + share) / len(parts)))

                gradients = _gradients(training, {name: each.base_layer for name, each in part.items()}, rows, show)
                for name, layer in part.items():
                    gradient = gradients.pop(name)
                    training.group.all_reduce([gradient])
                    if not torch.isfinite(gradient).all():
                        raise RunFailed(f"{name}: its gradient over the first {len(rows)} rows has NaN or Inf.")
                    svd = truncated_svd(rows_of_tensor(sign_step(gradient, rate)), section.rank)
                    made = {"qvera_frozen_A": svd.V.t(), "qvera_frozen_B": svd.U, "qvera_R": torch.diag(svd.S)}
                    # Ranks may round the decomposition differently, and all must train over the same A and B.
                    made = training.group.broadcast_tensors({kind: tensor.cpu() for kind, tensor in made.items()})
                    with torch.no_grad():
                        for kind, vector in layer.vectors("default").items():
                            vector.copy_(made[kind])
        # a head is trained too, and has got the gradients of these passes
        training.optimizer.zero_grad(set_to_none=True)


def _first_rows(batches: Batches, steps: int, most: int) -> list[int]:
    """List the first ``most`` different rows that training will see, in order."""
    found: dict[int, None] = {}
    for step in range(steps):
        if len(found) >= most:
            break
        found |= dict.fromkeys(batches.rows(step))
    return list(found)[:most]


def _gradients(
    training: AloneLoop, linears: dict[str, nn.Module], rows: list[int], show: Callable[[float], None]
) -> dict[str, Tensor]:
    def in_passes(passes: list[list[int]]) -> dict[str, Tensor]:
        with collected(causal_model(training.model), linears) as gradients:
            for done, micro in enumerate(passes):
                show(done / len(passes))
                if micro:
                    training.nll([training.datasets.train[i] for i in micro])[0].backward()
        return gradients

    return training.over_passes(rows, in_passes, "The gradient of the first rows")


@contextlib.contextmanager
def _base_alone(model: nn.Module, layers: dict[str, QveraLinear]) -> Iterator[None]:
    """Switch the adapter off inside the block, in training mode, so that layers are recomputed."""
    was_training = model.training
    # PEFT, asked for the base within a pass (a loss with a reference), freezes vectors of layers that are off already
    vectors = [vector for layer in layers.values() for vector in layer.tensors("default").values()]
    trained = [vector.requires_grad for vector in vectors]
    try:
        for layer in layers.values():
            layer._disable_adapters = True
        model.train()
        yield
    finally:
        for layer in layers.values():
            layer._disable_adapters = False
        for vector, requires_grad in zip(vectors, trained, strict=True):
            vector.requires_grad_(requires_grad)
        model.train(was_training)
        forget_inputs(model)


class _AddUp(torch.autograd.Function):
    """Returns y. Backward adds gᵀ x to ``total``. x is saved through autograd, so checkpoints drop it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.total = total
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,), total = ctx.saved_tensors, ctx.total
        total.addmm_(g.reshape(-1, g.shape[-1]).t().to(total.dtype), x.reshape(-1, x.shape[-1]).to(total.dtype))
        return g, None, None


@contextlib.contextmanager
def collected(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect gradients [out_features, in_features] of linears, fp32 or wider, from backward passes in the block."""
    gradients: dict[str, Tensor] = {}

    def leaf(_module: nn.Module, _inputs: object, y: Tensor) -> Tensor:
        return y if y.requires_grad or not torch.is_grad_enabled() else y.detach().requires_grad_()

    with contextlib.ExitStack() as stack:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if isinstance(embedding, nn.Module):  # nothing before the linears needs a gradient by itself
            stack.callback(embedding.register_forward_hook(leaf).remove)
        for name, linear in linears.items():
            weight = linear.weight
            assert isinstance(weight, Tensor)
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            total = gradients[name] = torch.zeros(rows_of(linear).shape, dtype=wide, device=weight.device)

            def add(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor, total: Tensor = total) -> Tensor | None:
                return _AddUp.apply(y, inputs[0].detach(), total) if y.requires_grad else None

            stack.callback(linear.register_forward_hook(add).remove)
        yield gradients


def sign_step(gradient: Tensor, size: float) -> Tensor:
    """Return −size · sign(gradient), the first step of a sign-based optimizer, as Adam's is."""
    return gradient.sign().mul_(-size)
