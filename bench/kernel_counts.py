"""Kernels that one layer launches, forward and backward, on a GPU that is not there (tests/gpu/fake_accelerator.py).

Counts, not seconds: qvera with and without its kernels, stock PEFT's VeRA and LoRA, and the frozen base alone, as
transformers and bitsandbytes run it. Writes bench/results/kernel_counts.json and prints the table of docs/benchmarks.md.

python bench/kernel_counts.py
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from bench.common import header, write_result
from qvera.kernels import choice
from tests.gpu.fake_accelerator import FakeAccelerator
from tests.gpu.kernel_counts import ADAPTERS, CASES, layer_costs

SHAPES = {"7b": "7B", "8b": "8B (grouped queries)"}


def measure(fake: FakeAccelerator, name: str, shape: str, kernels: str) -> dict[str, Any]:
    """One row of the table: launches without a checkpoint and with one, both by name, and bytes kept for backward."""
    with mock.patch.object(choice, "switch", kernels):
        found = layer_costs(fake, CASES[name], shape=shape, adapters=ADAPTERS.get(name, 1))
    for key in ("plain", "checkpointed"):
        found[key] = {"launches": found[key].total(), "by_name": dict(found[key].most_common())}
    return {"case": name, "shape": shape, "QVERA_KERNELS": kernels, "tokens": 2048, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, one line a case."""
    lines = [
        "| one layer, 2,048 tokens | "
        + " | ".join(f"{name} | with a checkpoint | kept" for name in SHAPES.values())
        + " |",
        "|---|" + "--:|" * 3 * len(SHAPES),
    ]
    for case, kernels in dict.fromkeys((row["case"], row["QVERA_KERNELS"]) for row in rows):
        cells = [case + (", QVERA_KERNELS=off" if case.startswith("qvera") and kernels == "off" else "")]
        for row in (r for r in rows if (r["case"], r["QVERA_KERNELS"]) == (case, kernels)):
            cells += [str(row[key]["launches"]) for key in ("plain", "checkpointed")]
            cells.append(f"{row['kept_bytes'] / 1e6:.0f} MB")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, write and print."""
    document = header()
    with FakeAccelerator() as fake:
        cases = [
            (name, kernels) for name in CASES for kernels in (("off", "on") if name.startswith("qvera") else ("off",))
        ]
        rows = [measure(fake, name, shape, kernels) for name, kernels in cases for shape in SHAPES]
    write_result("kernel_counts", document | {"device": "fake accelerator: counts only", "rows": rows})
    print(table(rows), end="")


if __name__ == "__main__":
    main()
