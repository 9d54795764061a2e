"""Every kernel compiles for the cards people have, keeps its numbers in registers, and leaves room for other warps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.compiled import resources

pytestmark = [pytest.mark.slow, pytest.mark.process]

BLOCKS = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}
SIZES = "out_features:i width:i row_stride:i"
GRADIENTS = f"M:f B:T d:f b:f grad_b:f grad_d_parts:f C:T scale:x c_scale:x {SIZES}"
COLUMNS = "x:T vectors:f base:T out:T index:l scale:x columns:i x_stride:i base_stride:i vector_stride:i"
STRIDES = [f"{name}_{axis}:i" for name in "qk" for axis in ("batch", "head", "token")]
STRIDES += [f"{name}_{axis}:i" for name in "cs" for axis in ("batch", "token")]
ROPE = f"q:T k:T cos:T sin:T q_out:T k_out:T tokens:i q_heads:i k_heads:i half:i {' '.join(STRIDES)}"
KERNELS: list[tuple[str, str, dict[str, Any]]] = [  # kernel, its parameters, its constants
    ("combined", f"B:T d:f b:f C:T scale:x {SIZES}", BLOCKS),
    *(("vector_gradients", GRADIENTS, {"WRITE_C": write, **BLOCKS}) for write in (False, True)),
    *(
        ("scaled_columns", COLUMNS, {"ADD": add, "INDEXED": indexed, "BLOCK_COLUMNS": 1024})
        for add in (False, True)
        for indexed in (False, True)
    ),
    (
        "scaled_columns_backward",
        "g:T x:T vector:f grad_x:T grad_vector_parts:f rows:i columns:i g_stride:i x_stride:i",
        {"ROWS": 64, **BLOCKS},
    ),
    # at the width of a 7B and at that of a 70B
    *(("rms_norm", "x:T weight:T y:T factor:f width:i eps:x", {"BLOCK": width}) for width in (4096, 8192)),
    *(("rms_norm_backward", "g:T x:T factor:f weight:T grad:T width:i", {"BLOCK": width}) for width in (4096, 8192)),
    ("swiglu", "a:T c:T y:T count:i", {"BLOCK": 1024}),
    ("swiglu_backward", "g:T a:T c:T grad_a:T grad_c:T count:i", {"BLOCK": 1024}),
    *(("rope", ROPE, {"BACKWARD": backward, "BLOCK_HEADS": 8, "BLOCK_HALF": 64}) for backward in (False, True)),
    # at vocabularies above a block
    *(
        (
            "logit_sums",
            "x:T most:f sums:f means:f width:i row_stride:i scale:x cap:x",
            {"CAPPED": capped, "MEAN": capped, "BLOCK": 4096},
        )
        for capped in (False, True)
    ),
    *(
        (
            "logit_gradient",
            "x:T most:f sums:f factor:f width:i row_stride:i spread:x scale:x cap:x",
            {"CAPPED": capped, "BLOCK": 4096},
        )
        for capped in (False, True)
    ),
    *(
        (
            "dequantize_4bit",
            f"packed:u absmax:{'u' if nested else 'f'} code:f nested_absmax:f nested_code:f offset:f weight:T "
            "count:i bytes:i blocks:i",
            {"NESTED_BLOCK": nested, "HALF": 32, "BLOCKS": 64},
        )
        for nested in (0, 256)
    ),
]


def described(kernel: str, parameters: str, constants: dict[str, Any], dtype: str) -> dict[str, Any]:
    """As `resources` takes it. T: a pointer to ``dtype``; f, u, l: to fp32, bytes, int64; i and x: numbers."""
    kinds = {"T": f"*{dtype}", "f": "*fp32", "u": "*u8", "l": "*i64", "i": "i32", "x": "fp32"}
    return {
        "name": f"{kernel} {constants} {dtype}",
        "module": "qvera.kernels.triton_kernels",
        "kernel": f"{kernel}_kernel",
        "signature": {name: kinds[kind] for name, kind in (each.split(":") for each in parameters.split())},
        "constexprs": constants,
        "num_warps": constants["BLOCK"] // 512 if kernel.startswith(("rms_norm", "log")) else 4,
    }


def test_registers_and_spills() -> None:
    kernels = [described(*kernel, dtype) for kernel in KERNELS for dtype in ("bf16", "fp16")]
    found = resources(kernels[::2], [80, 89, 90]) | resources(kernels[1::2], [80])
    assert len(found) == 4 * len(KERNELS) == 88
    for name, used in found.items():
        assert used["spilled_bytes"] == 0, (name, used)
        assert 8 <= used["registers"] <= 128, (name, used)  # 128: four programs of 128 threads on a multiprocessor
