"""Mixtures that run their experts by code of their own, over `ExpertStack`: Llama 4, DBRX, JetMoE, LongCat-Flash.

transformers has no interface for functions of others there. Each function here is the ``forward`` of a class of its,
whose name it is given for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qvera.models.experts import Routing, route, sum_of_tokens


def _llama4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """An expert gets the tokens that it was chosen for, not all; their inputs are weighted, not their outputs."""
    hidden = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden)
    chosen = logits.topk(self.top_k, dim=1).indices
    routing, order = route(chosen, self.num_experts)
    shares, experts = scores.gather(1, chosen).reshape(-1)[order].unsqueeze(-1), self.experts
    gate, up = experts.gate_up_proj(hidden[routing.tokens] * shares, routing).chunk(2, dim=-1)
    outer = experts.down_proj(up * experts.act_fn(gate), routing)
    return self.shared_expert(hidden) + sum_of_tokens(outer, order, chosen), logits


def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Gate and up are two projections."""
    hidden, own = hidden_states.reshape(-1, self.hidden_size), self.mlp
    routing, order = route(top_k_index, self.num_experts)
    gate, up = (stack(hidden, routing, of_tokens=True) for stack in (own.w1, own.v1))
    outer = own.w2(own.activation_fn(gate) * up, routing)
    outer = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return sum_of_tokens(outer, order, top_k_index).view(hidden_states.shape)


def _longcat(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts behind the routed ones give their input. They have rows in the first projection that nothing reads."""
    routing, order = route(top_k_index, self.num_routed_experts)
    end = routing.ends[-1]  # of the rows of routed experts, which come first
    same = hidden_states[routing.tokens[end:]]
    routing = routing._replace(experts=routing.experts[:end], tokens=routing.tokens[:end])
    wide = routing._replace(ends=routing.ends + [end] * self.zero_expert_num)
    gate, up = self.gate_up_proj(hidden_states, wide, of_tokens=True).chunk(2, dim=-1)
    outer = torch.cat([self.down_proj(self.act_fn(gate) * up, routing), same])
    outer = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return sum_of_tokens(outer, order, top_k_index).to(hidden_states.dtype)


def _jetmoe_router(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Routing, Tensor]:
    """The `Routing` stands where the sizes of the experts' groups do."""
    logits = self.layer(hidden_states).float()
    shares, chosen = logits.topk(self.top_k, dim=1)
    shares = torch.softmax(shares, dim=1).type_as(hidden_states)
    routing, order = route(chosen, self.num_experts)
    return order, routing.tokens, shares.reshape(-1)[order], routing, logits


def _jetmoe(self: Any, inputs: Tensor, expert_size: Routing) -> Tensor:
    return self.weight(inputs, expert_size)


_FORWARD = {
    "Llama4TextMoe": _llama4,
    "DbrxExperts": _dbrx,
    "LongcatFlashExperts": _longcat,
    "JetMoeTopKGating": _jetmoe_router,
    "JetMoeParallelExperts": _jetmoe,
}


def run_here(model: nn.Module, path: str) -> None:
    """Let the module of that name, the one around it, and the router there be run from here, where they are known."""
    around = model.get_submodule(path.rpartition(".")[0])
    for module in (around, *around.children()):
        kind: Any = type(module)
        forward = _FORWARD.get(kind.__name__)
        if forward is not None and kind.forward is not forward:
            module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
