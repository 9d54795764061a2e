"""Every kernel compiles for the cards people have, keeps its numbers in registers, and leaves room for other warps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.compiled import resources

pytestmark = [pytest.mark.slow, pytest.mark.process]

_SIZES = {"out_features": "i32", "width": "i32", "row_stride": "i32"}
_BLOCKS = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}


def low_rank(dtype: str) -> list[dict[str, Any]]:
    B, vectors, C = {"B": f"*{dtype}"}, {"d": "*fp32", "b": "*fp32"}, {"C": f"*{dtype}"}
    gradients = {"M": "*fp32", **B, **vectors, "grad_b": "*fp32", "grad_d_parts": "*fp32", **C}
    return [
        {
            "name": f"combined {dtype}",
            "kernel": "combined_kernel",
            "signature": {**B, **vectors, **C, "scale": "fp32", **_SIZES},
            "constexprs": _BLOCKS,
        },
        *(
            {
                "name": f"vector gradients {dtype}, C written: {write}",
                "kernel": "vector_gradients_kernel",
                "signature": {**gradients, "scale": "fp32", "c_scale": "fp32", **_SIZES},
                "constexprs": {"WRITE_C": write, **_BLOCKS},
            }
            for write in (False, True)
        ),
    ]


KERNELS = [{"module": "qvera.kernels.triton_low_rank", **kernel} for d in ("bf16", "fp16") for kernel in low_rank(d)]


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_registers_and_spills(capability: int) -> None:
    found = resources(KERNELS, capability)
    assert len(found) == len(KERNELS)
    for name, used in found.items():
        assert used["spilled_bytes"] == 0, (name, used)
        assert 8 <= used["registers"] <= 128, (name, used)  # 128: four programs of 128 threads on a multiprocessor
