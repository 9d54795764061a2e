"""Answers that are the same to the bit whoever shares the batch (`EngineSettings.batch_invariant`).

Kernels are chosen by shapes, so a row of a product has other last bits beside 3 rows than beside 40. Here all shapes
are fixed, or depend on the request alone:

- a pass computes a fixed number of tokens, filled up, and its head all of their logits (`PagedBatches.passes`);
- each token attends by itself, to as many keys as its place says, so it makes no difference which pieces a prompt came
  in, and what was in the cache (`PagedBatches.run`);
- a LoRA is multiplied with all tokens of a pass, and kept where it is asked for (`TokenSlots.fixed`);
- linears have one layout, whichever adapters come and go (`qvera.evaluation.generate.generating`);
- each answer's token is drawn by itself, and so is each place of a prompt scored.

What is left is a row's place in the pass. It makes no difference either, which is tried when the engine is made.
The idea of fixed shapes is that of "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab, 2025).
"""

from collections.abc import Iterable

import torch

from qvera.models.structure import expert_weights

PASS_TOKENS_ON_CPU, PASS_TOKENS_ON_CARD = (16, 32, 64), (64, 128)
"""Tokens of a pass: the first number that works. On a card 64 should take about as long as one, as both read all
weights."""


def why_refused(model: torch.nn.Module) -> str | None:
    """Say why a token's numbers depend on other requests in this model, whatever the shapes are; None: they don't."""
    if expert_weights(model) or any("experts" in name.split(".") for name, _ in model.named_modules()):
        return "how many tokens share an expert's products depends on all requests of a pass"
    return None


def computes_rows_alike(rows: int, widths: Iterable[int], dtype: torch.dtype) -> bool:
    """Whether a CPU's elementwise kernels compute all rows of [rows, width] alike, for each width.

    Threads share out the numbers, and each computes what is left behind its last whole vector one by one. Some
    functions round otherwise there, such as the sigmoid in fp32.
    """
    drawn = torch.linspace(0.1, 4, 992).to(dtype)
    for function in (torch.sigmoid, torch.rsqrt):
        differs = function(drawn) != torch.cat([function(one) for one in drawn.split(1)])
        for width in widths if differs.any() else ():
            found = function(drawn[differs][0].expand(rows, width).contiguous())
            if not bool((found == found[0, 0]).all()):
                return False
    return True
