"""Compile kernels for cards that are not here, and print what they take: `python -m tests.kernels.compiled 90 < kernels.json`.

A process of its own: kernels that Triton's interpreter runs can't be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest


def resources(kernels: list[dict[str, Any]], capabilities: list[int]) -> dict[str, dict[str, int]]:
    """Kernel and capability → registers of a thread, and bytes of local memory (spills), as the cubin says.

    Args:
        kernels: each with ``module``, ``kernel``, ``signature`` (parameter → Triton's type, such as ``*bf16`` or
            ``i32``) and ``constexprs``. Pointers and i32 are taken for multiples of 16, as a model's shapes are.
        capabilities: 80, 89, 90.
    """
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", *map(str, capabilities)],
        input=json.dumps(kernels), capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _compile(kernel: dict[str, Any], capability: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel["module"]), kernel["kernel"])
    signature = kernel["signature"] | dict.fromkeys(kernel["constexprs"], "constexpr")
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=kernel["constexprs"], attrs=attributes)
    options = {"num_warps": kernel.get("num_warps", 4)}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spilled_bytes": usage["STACK"] + usage["LOCAL"]}


if __name__ == "__main__":
    given, on = json.load(sys.stdin), map(int, sys.argv[1:])
    print(json.dumps({f"{k['name']} sm_{card}": _compile(k, card) for card in on for k in given}))
