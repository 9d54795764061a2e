"""Uniform random numbers from a seed, the same on every machine.

They come from numpy's Philox 4x64-10, a counter-based generator whose integer stream numpy promises to keep. Element
(i, j) of a matrix (key ``[seed, stream]``) is word ``j mod 4`` of the block with counter ``[j // 4 + 1, i, 0, 0]``,
mapped to [-1, 1) by ``u = (w >> 40) * 2**-23 - 1``, which is exact in fp32.
"""

import numpy as np


def uniform_matrix(rows: int, columns: int, seed: int, stream: int) -> np.ndarray:
    """The [rows, columns] fp32 matrix of a seed, uniform on [-1, 1).

    Args:
        stream: which of the seed's matrices: 0 and 1 are a pair's A and B, plug-ins have 2 and 3, and
            `qvera.adapters.projection` has 4.
    """
    out = np.empty((rows, columns), dtype=np.float32)
    # as uint64, since numpy would make float64 of a list in which one number needs the 64th bit, and round the seed
    key = np.array([seed, stream], dtype=np.uint64)
    for i in range(rows):
        words = np.random.Philox(counter=np.array([0, i, 0, 0], dtype=np.uint64), key=key).random_raw(columns)
        # 24 bits times 2**-23 minus 1 is exact in fp32, so no rounding mode can change a value
        out[i] = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return out
