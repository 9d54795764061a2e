"""Adapters with a pair of their own (LoRA) in one batch: each slot's tokens one by one, beside one batched product.

    python -m bench.slot_products        # two minutes; results/slot_products.json

The seven linears of a layer of SmolLM2-135M, 16 slots with so many tokens each, ranks 1, 8 and 32, fp32: milliseconds of one
thread for all seven, the fastest of five rounds. ``answers``: forward alone. ``training``: forward and backward. ``copies``:
copying out the 16 slots' matrices of a bank, where those of neighbours are a view.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.common import header, write_result
from qvera.adapters.products.slots import TokenSlots, pair_slots

LINEARS = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))
SLOTS, TOKENS, RANKS = 16, (1, 4, 16, 64), (1, 8, 32)


def milliseconds(work: Callable[[], object]) -> float:
    rounds = []
    for _ in range(6):  # the first one warms up
        began = time.process_time()
        work()
        rounds.append(time.process_time() - began)
    return round(min(rounds[1:]) * 1e3, 2)


def main() -> None:
    torch.set_num_threads(1)
    lines = []
    for rank in RANKS:
        banks = [(torch.randn(2 * SLOTS, rank, n), torch.randn(2 * SLOTS, m, rank)) for n, m in LINEARS]
        every_second = torch.arange(0, 2 * SLOTS, 2)

        def copy(banks: list[tuple[torch.Tensor, torch.Tensor]] = banks, slots: torch.Tensor = every_second) -> None:
            for A, B in banks:
                _ = A[slots], B[slots]

        copies = milliseconds(copy)
        for tokens in TOKENS:
            line: dict[str, float] = {"rank": rank, "tokens": tokens, "copies": copies}
            for is_batched in (False, True):
                total = SLOTS * tokens
                ends = tuple(range(0, total + 1, tokens))
                slots = TokenSlots(torch.arange(SLOTS).repeat_interleave(tokens), SLOTS, ends)
                if not is_batched:
                    slots.__dict__["width"] = None
                inputs = [
                    [t.requires_grad_() for t in (torch.randn(total, m), torch.randn(total, n), A[:SLOTS], B[:SLOTS])]
                    for (n, m), (A, B) in zip(LINEARS, banks, strict=True)
                ]

                def answers(inputs: list[list[torch.Tensor]] = inputs, slots: TokenSlots = slots) -> None:
                    with torch.no_grad():
                        for base, x, A, B in inputs:
                            pair_slots(base, x, A, B, 2.0, slots)

                def training(inputs: list[list[torch.Tensor]] = inputs, slots: TokenSlots = slots) -> None:
                    for base, x, A, B in inputs:
                        y = pair_slots(base, x, A, B, 2.0, slots)
                        torch.autograd.grad(y, (x, A, B), y.detach())

                how = "batched" if is_batched else "one by one"
                line[f"answers, {how}"] = milliseconds(answers)
                line[f"training, {how}"] = milliseconds(training)
            lines.append(line)
    print("\n".join(map(str, lines)))
    print(write_result("slot_products", {**header(), "slots": SLOTS, "milliseconds": lines}))


if __name__ == "__main__":
    main()
