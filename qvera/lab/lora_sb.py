"""LoRA-SB (arXiv 2411.19557): ΔW = B R A with R [rank, rank] trained between the truncated SVD of a first sign step.

With G the gradient of the frozen weight over the first rows and η the first learning rate, −η sign(G) ≈ U S Vᵀ; then
B = U, R = S and A = Vᵀ. So the run starts from the best rank-r approximation of that step, and not from the base. A and
B depend on the rows, so the adapter's file has them, in bfloat16 as the authors' code has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import LinearSpec, Method, Source
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.products.weight_gradients import sign_step
from qvera.adapters.projection import Pair
from qvera.distributed.zero_config import zero_config_of
from qvera.lab.keys import Settings
from qvera.lab.lora_xs import require_rank
from qvera.lab.svd import rows_of_tensor, truncated_svd
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.config.schema import Recipe


class LoraSb(Method):
    """R [rank, rank] is trained, A [rank, in_features] and B [out_features, rank] are not.

    All are 0 until `from_gradient`.
    """

    name = "lora-sb"
    title = "LoRA-SB"
    keys = frozenset({"gradient_rows"})
    usual = {"adapter.rank": 96, "training.learning_rate": 1e-4}
    source = Source.TRAINED
    starts_at_base = False
    starts_from_gradient = True

    def tensors(self, adapter: Settings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        require_rank(adapter.rank, spec)
        r = adapter.rank
        return {"qvera_frozen_A": (r, spec.in_features), "qvera_frozen_B": (spec.out_features, r), "qvera_R": (r, r)}

    def start(self, name: str, shape: tuple[int, ...], adapter: Settings, spec: LinearSpec) -> torch.Tensor:
        if getattr(adapter, "init_weights", True):
            return torch.zeros(shape, dtype=self.dtype(name))
        return torch.randn(shape).to(self.dtype(name))

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name == "qvera_R" else torch.bfloat16

    def is_trained(self, name: str, adapter: Settings) -> bool:
        return name == "qvera_R"

    def cast_bytes(self, adapter: Settings, spec: LinearSpec, dtype: torch.dtype) -> int:
        numbers = adapter.rank * (spec.in_features + spec.out_features)
        return numbers * dtype.itemsize if dtype != self.dtype("qvera_frozen_A") else 0

    def check(self, recipe: Recipe) -> None:
        zero = zero_config_of(recipe)
        if zero is not None and zero.shards_base:
            raise InputError(
                f"deepspeed: {recipe.deepspeed} shards the base (ZeRO-3), and adapter.method {self.name} starts from "
                "gradients of whole weights. Use zero1, zero2 or none."
            )

    def from_gradient(
        self, adapter: Settings, spec: LinearSpec, gradient: torch.Tensor, rate: float
    ) -> dict[str, torch.Tensor]:
        found = truncated_svd(rows_of_tensor(sign_step(gradient, rate)), adapter.rank)
        return {"qvera_frozen_A": found.V.t(), "qvera_frozen_B": found.U, "qvera_R": torch.diag(found.S)}

    def factors(
        self, adapter: Settings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        return Factors(tensors["qvera_frozen_A"], tensors["qvera_frozen_B"], R=at_least_fp32(tensors["qvera_R"]))
