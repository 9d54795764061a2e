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


def elementwise(dtype: str) -> list[dict[str, Any]]:
    """At the width of a 7B and at that of a 70B."""
    kind, factor = f"*{dtype}", {"factor": "*fp32"}
    norms = [
        {
            "name": f"{kernel} of {width}, {dtype}",
            "kernel": f"{kernel}_kernel",
            "signature": signature | {"width": "i32"} | more,
            "constexprs": {"BLOCK": width},
            "num_warps": width // 512,
        }
        for width in (4096, 8192)
        for kernel, signature, more in (
            ("rms_norm", {"x": kind, "weight": kind, "y": kind, **factor}, {"eps": "fp32"}),
            ("rms_norm_backward", {"g": kind, "x": kind, **factor, "weight": kind, "grad": kind}, {}),
        )
    ]
    swiglus = [
        {
            "name": f"{kernel}, {dtype}",
            "kernel": f"{kernel}_kernel",
            "signature": dict.fromkeys(tensors, kind) | {"count": "i32"},
            "constexprs": {"BLOCK": 1024},
        }
        for kernel, tensors in (("swiglu", "acy"), ("swiglu_backward", ("g", "a", "c", "grad_a", "grad_c")))
    ]
    tensors = ("q", "k", "cos", "sin", "q_out", "k_out")
    strides = [f"{name}_{axis}" for name in "qk" for axis in ("batch", "head", "token")]
    strides += [f"{name}_{axis}" for name in "cs" for axis in ("batch", "token")]
    sizes = ("tokens", "q_heads", "k_heads", "half", *strides)
    ropes = [
        {
            "name": f"rope, {dtype}, backward: {backward}",
            "kernel": "rope_kernel",
            "signature": dict.fromkeys(tensors, kind) | dict.fromkeys(sizes, "i32"),
            "constexprs": {"BACKWARD": backward, "BLOCK_HEADS": 8, "BLOCK_HALF": 64},
        }
        for backward in (False, True)
    ]
    return norms + swiglus + ropes


def dequantize(dtype: str) -> list[dict[str, Any]]:
    return [
        {
            "name": f"dequantize, {dtype}, double: {nested > 0}",
            "kernel": "dequantize_4bit_kernel",
            "signature": {
                "packed": "*u8", "absmax": "*u8" if nested else "*fp32", "code": "*fp32", "nested_absmax": "*fp32",
                "nested_code": "*fp32", "offset": "*fp32", "weight": f"*{dtype}",
                "count": "i32", "bytes": "i32", "blocks": "i32",
            },
            "constexprs": {"NESTED_BLOCK": nested, "HALF": 32, "BLOCKS": 64},
        }
        for nested in (0, 256)
    ]  # fmt: skip


def columns(dtype: str) -> list[dict[str, Any]]:
    strides = ("columns", "x_stride", "base_stride", "vector_stride", "rows_a_vector")
    tensors = {"x": f"*{dtype}", "vectors": "*fp32", "base": f"*{dtype}", "out": f"*{dtype}", "index": "*i64"}
    return [
        {
            "name": f"scaled columns {dtype}, added: {add}, indexed: {indexed}",
            "kernel": "scaled_columns_kernel",
            "signature": {**tensors, "scale": "fp32", **dict.fromkeys(strides, "i32")},
            "constexprs": {"ADD": add, "INDEXED": indexed, "BLOCK_COLUMNS": 1024},
        }
        for add in (False, True)
        for indexed in (False, True)
    ] + [
        {
            "name": f"scaled columns backward {dtype}",
            "kernel": "scaled_columns_backward_kernel",
            "signature": {
                "g": f"*{dtype}",
                "x": f"*{dtype}",
                "vector": "*fp32",
                "grad_x": f"*{dtype}",
                "grad_vector_parts": "*fp32",
                **dict.fromkeys(("rows", "columns", "g_stride", "x_stride"), "i32"),
            },
            "constexprs": {"ROWS": 64, "BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128},
        }
    ]


KERNELS = [
    {"module": "qvera.kernels.triton_kernels", **kernel}
    for kernels in (low_rank, columns, elementwise, dequantize)
    for dtype in ("bf16", "fp16")
    for kernel in kernels(dtype)
]


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_registers_and_spills(capability: int) -> None:
    found = resources(KERNELS, capability)
    assert len(found) == len(KERNELS)
    for name, used in found.items():
        assert used["spilled_bytes"] == 0, (name, used)
        assert 8 <= used["registers"] <= 128, (name, used)  # 128: four programs of 128 threads on a multiprocessor
