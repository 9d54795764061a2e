"""A trained run in llama.cpp: its exported GGUF files answer held-out rows, beside the run itself.

    qvera quickstart                                    # first: leaves runs/quickstart
    pip install xllamacpp                               # llama.cpp
    python -m bench.gguf_answers [--run runs/quickstart] [--types float16 bfloat16 q8_0] [--rows 48]

Greedy answers of the run (4-bit base and adapter, as `qvera eval` gives them) and of each `qvera export --to gguf` of it
in llama.cpp, from the same prompt tokens: exact answers, answers that equal the run's, and the size of the file.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.common import header, markdown, write_result
from qvera.cli.main import main as qvera
from qvera.data import build_datasets
from qvera.evaluation import held_out
from qvera.evaluation.load import open_run
from qvera.evaluation.metrics import exact_match
from qvera.utils import formatting


def llama_cpp_answers(file: Path, prompts: Sequence[list[int]], new_tokens: int) -> Iterator[str]:
    """Greedy answers of a GGUF file to prompts of token ids."""
    xllamacpp = importlib.import_module("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 1024, 1, 1
    server = xllamacpp.Server(settings)
    for prompt in prompts:
        found = server.handle_completions({"prompt": prompt, "max_tokens": new_tokens, "temperature": 0})
        yield found["choices"][0]["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--types", nargs="*", default=["float32", "float16", "bfloat16", "q8_0"])
    parser.add_argument("--rows", type=int, default=48)
    args = parser.parse_args()
    opened = open_run(args.run)
    recipe = opened.target.recipe
    assert recipe is not None
    new_tokens = recipe.training.sample_max_new_tokens
    datasets = build_datasets(recipe.data.replace(eval_limit=args.rows), opened.base.tokenizer)
    rows = [row for row in datasets.eval if len(row.prompt_ids)]
    references = [str(row.reference) for row in rows]
    answered = held_out.answer_rows(opened.model, opened.base.tokenizer, rows, max_new_tokens=new_tokens)
    expected = [row["answer"] for row in answered]
    document: dict[str, Any] = {**header(), "rows": len(rows), "cases": {}}

    def record(name: str, answers: Sequence[str], file_bytes: int | None) -> None:
        document["cases"][name] = {
            "exact": sum(map(exact_match, answers, references)),
            "same_as_run": sum(one.strip() == other.strip() for one, other in zip(answers, expected, strict=True)),
            "file_bytes": file_bytes,
        }
        write_result("gguf_answers", document)
        print(name, document["cases"][name], flush=True)

    record("the run", expected, None)
    for dtype in args.types:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "gguf"
            if status := qvera(["export", str(args.run), str(out), "--to", "gguf", "--dtype", dtype]):
                raise SystemExit(status)
            (file,) = out.glob("*.gguf")
            answers = list(llama_cpp_answers(file, [row.prompt_ids.tolist() for row in rows], new_tokens))
            record(f"llama.cpp, {dtype}", answers, file.stat().st_size)
    print(table(document))


def table(document: dict[str, Any]) -> str:
    """As docs/export.md has it."""

    def row(name: str, case: dict[str, Any]) -> list[str]:
        size = case["file_bytes"]
        counts = [f"{case[key]} of {document['rows']}" for key in ("exact", "same_as_run")]
        return [name, *counts, "–" if size is None else formatting.size(size)]

    titles = ["", "exact answers", "answers equal to the run's", "file"]
    return markdown(titles, (row(name, case) for name, case in document["cases"].items()))


if __name__ == "__main__":
    main()
