"""Products with few columns, as a LoRA of a small rank has them, beside the same taken as the transpose of a transpose.

    python -m bench.narrow_products        # a minute; results/narrow_products.json

For T tokens, an upstream gradient g [T, m], z [T, r], B [m, r] and x [T, n]: ``gT z``, ``g B`` and ``x AT`` in microseconds of
one thread (the fastest of five rounds), as they stand and the other way round. `qvera.kernels.low_rank.narrow_product` takes
the second form up to the rank where it no longer pays.
"""

from __future__ import annotations

import time

import torch

from bench.common import header, write_result

TOKENS, SIDE, RANKS = (96, 768), 1536, (1, 2, 4, 8, 12, 16, 24, 32, 64)


def microseconds(left: torch.Tensor, right: torch.Tensor, turned: bool, times: int) -> float:
    """Of left @ right, or of it turned."""
    rounds = []
    for _ in range(6):  # the first one warms up
        began = time.process_time()
        for _ in range(times):
            _ = (right.t() @ left.t()).t() if turned else left @ right
        rounds.append((time.process_time() - began) / times)
    return round(min(rounds[1:]) * 1e6, 1)


def main() -> None:
    torch.set_num_threads(1)
    lines = []
    for tokens in TOKENS:
        g, x = torch.randn(tokens, SIDE), torch.randn(tokens, SIDE)
        for rank in RANKS:
            z, B, A = torch.randn(tokens, rank), torch.randn(SIDE, rank), torch.randn(rank, SIDE)
            pairs = {"gT z": (g.t(), z), "g B": (g, B), "x AT": (x, A.t())}
            line: dict[str, float] = {"tokens": tokens, "rank": rank}
            for name, (left, right) in pairs.items():
                line[name] = microseconds(left, right, False, 3840 // tokens)
                line[f"{name}, turned"] = microseconds(left, right, True, 3840 // tokens)
            lines.append(line)
    print("\n".join(map(str, lines)))
    print(write_result("narrow_products", {**header(), "side": SIDE, "microseconds": lines}))


if __name__ == "__main__":
    main()
