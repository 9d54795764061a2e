"""Llama 4's mixture of experts over `ExpertStack`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from qvera.models.experts import route, sum_of_tokens


class RoutedLlama4(Llama4TextMoe):
    """transformers gives every expert all tokens, and has no interface for functions of others.

    Here an expert gets the tokens that it was chosen for. Their inputs are weighted, not their outputs.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        hidden = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)
        chosen = logits.topk(self.top_k, dim=1).indices
        routing, order = route(chosen, self.num_experts)
        shares = scores.gather(1, chosen).reshape(-1)[order].unsqueeze(-1)
        experts: Any = self.experts
        gate, up = experts.gate_up_proj(hidden[routing.tokens] * shares, routing).chunk(2, dim=-1)
        outer = experts.down_proj(up * experts.act_fn(gate), routing)
        return self.shared_expert(hidden) + sum_of_tokens(outer, order, chosen), logits
