"""Adapted experts: VeRA on the projections of a mixture's experts, over the pair A, B that all layers share.

    y_s = W_e x_s + b_e ⊙ B (s d_e ⊙ A x_s)        for a row s that was routed to expert e

or LoRA, whose A_e and B_e each expert has itself.

A x is computed once for each token, whatever number of experts it goes to. With ``adapter.experts: each`` every expert
has its own d_e and b_e, which is the product of a batch whose tokens use different adapters (`products.slots`). With
``shared`` the experts of a layer have one d and one b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvera.adapters.layer import QveraLinear
from qvera.adapters.products.slots import PATHS, TokenSlots
from qvera.models.experts import Routing


class QveraExperts(QveraLinear):
    """The experts of a layer over an `ExpertStack`. It is called with the rows' experts."""

    def forward(self, x: Tensor, routing: Routing, of_tokens: bool = False) -> Tensor:  # type: ignore[override]
        """See `qvera.models.experts.ExpertStack.forward`: rows [S, in_features] give [S, out_features]."""
        if self.mixed is not None:
            return self.mixed.forward_experts(self, x, routing, of_tokens)
        y = self.base_layer(x, routing, of_tokens)
        for adapter in () if self.disable_adapters else self.active_names():
            y = self.add_routed(adapter, x, y, routing, of_tokens)
        return y

    def add_routed(self, adapter: str, x: Tensor, y: Tensor, routing: Routing, of_tokens: bool) -> Tensor:
        """y + ΔW_e x for the rows of each expert e."""
        method, config = self.qvera_settings[adapter]
        if config.experts == "each":
            experts = TokenSlots(routing.experts, self.spec.experts, tuple(routing.ends))
            gather = routing.tokens if of_tokens else None
            return PATHS[method.peft_type](self, adapter, x, y, self.vectors(adapter), experts, gather)
        factors = self.parts(adapter)
        z = self.project(x, adapter, factors.A, factors.a)
        return factors.expand(y, z[routing.tokens] if of_tokens else z)

    def cache_merged_weight(self, hold: bool, base_only: bool = False) -> None:
        """Nothing is held: only some of the experts are read for a batch."""

    def delta_weight_fp32(self, adapter: str) -> Tensor:
        """ΔW of each expert in fp32: [E, m, n] as the file has the weights."""
        factors, experts = self.parts(adapter), range(self.spec.experts)
        each = [factors.expert(number).delta() for number in experts]
        return torch.stack([delta.t() if self.base_layer.spec.is_transposed else delta for delta in each])

    get_delta_weight = delta_weight_fp32  # PEFT's name for it

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """ValueError: quantized experts would be quantized again. `qvera export --to merged` writes exact weights."""
        raise ValueError("adapted experts can't be merged in place; export a merged checkpoint (qvera export).")
