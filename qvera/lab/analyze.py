"""`qvera analyze`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from qvera.cli.common import (
    AdapterName,
    Json,
    RunPath,
    console,
    print_table,
    progress,
    require_new_file,
    say,
)
from qvera.utils import formatting
from qvera.utils.errors import InputError
from qvera.utils.files import plain_json, versions

if TYPE_CHECKING:
    from qvera.data.rows import Rows
    from qvera.evaluation.load import Artifact


def analyze(
    run: RunPath,
    adapter: AdapterName = None,
    top_k: Annotated[int, typer.Option(min=1, metavar="K", help="Singular vectors of each W + dW to look at.")] = 10,
    epsilon: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="E", help="Cosine below which one is an intruder.")
    ] = 0.5,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Other text (rows, or .txt): loss with and without the adapter.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use only the first N rows of each text.")
    ] = None,
    reduce: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, metavar="L", help="Keep this share of each intruder; needs --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="With --reduce: where the LoRA is written.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the picture there.")] = None,
    as_json: Json = False,
) -> None:
    """Show what training changed: intruder dimensions, norms.

    An intruder dimension is a left singular vector of W + dW, among the first K, whose cosine with every one of W is
    below E (arXiv 2410.21228). W is the base as it was trained on, read one linear at a time. The effective rank of dW
    is exp of the entropy of its singular values.

    --text FILE measures forgetting: the loss on rows of other text, in any format that data.path takes, or on the
    paragraphs of a .txt file. The held-out rows of the run, if it has any, are measured beside it.

    --reduce 0.75 --out DIR writes the adapter as a LoRA for PEFT in which each intruder dimension is at three quarters
    of its size. It is exact: its rank is that of the adapter and the most intruders of a linear.

    Example:
        qvera analyze runs/quickstart --html page.html
    """
    if reduce is not None and out is None:
        raise InputError("--reduce: needs --out DIR, where the LoRA is written.")
    if out is not None and reduce is None:
        raise InputError("--out: goes with --reduce only.")
    if rows is not None and text is None:
        raise InputError("--rows: goes with --text only.")
    require_new_file(html, ".html")
    if text is not None and not text.is_file():
        raise InputError(f"--text: {text}: no such file. Expected rows (.jsonl, .json, .csv, .tsv, .parquet) or .txt.")

    import torch

    from qvera.adapters.adapter_file import read_config
    from qvera.evaluation.load import adapter_sha256, find_target, require_adapter, require_answers
    from qvera.exporting.export import chat_of, require_no_added_tokens
    from qvera.exporting.lora import export_lora
    from qvera.lab.analysis import analysis_page, analyze_adapter
    from qvera.utils.files import replace_text, require_empty

    target = find_target(run, name=adapter)
    adapter_dir = require_adapter(target)
    texts: list[ScoredText] = []
    if text is not None:  # a file that can't be read is said before minutes of work
        require_answers(target, "--text")
        texts = _texts(target, text, rows)
    sha256 = adapter_sha256(target)  # now: the run may go on meanwhile
    template = None
    if out is not None:
        require_empty(out)
        template = chat_of(target).beside
        require_no_added_tokens(read_config(adapter_dir), adapter_dir, "--reduce")
    with progress("analyzing linears") as show:
        analysis = analyze_adapter(
            adapter_dir,
            target.section,
            top_k=top_k,
            epsilon=epsilon,
            keep=reduce,
            progress=lambda done, total, name: show(done, total, facts=name),
        )
    if left := sum(delta.experts > 0 for delta in analysis.adapter.layers.values()):
        say(f"Left out: {left} projections of experts (adapter.experts); only linears are analyzed.")
    document: dict[str, Any] = {
        "subject": {
            "path": str(run),
            "method": analysis.adapter.method,
            "rank": max(linear.rank for linear in analysis.linears),
            "adapter_sha256": sha256,
            "base": target.section.path,
            "quantization": target.section.quantization,
        },
        "top_k": top_k,
        "epsilon": epsilon,
        "linears": [dataclasses.asdict(linear) for linear in analysis.linears],
        "reduced": None,
        "losses": [],
        "versions": versions(),
    }
    if out is not None:
        size = export_lora(analysis.adapter, out, torch.float32, analysis.reduced(), template)
        document["reduced"] = {"keep": reduce, "path": str(out), "rank": analysis.reduced_rank, "bytes": size}
    if text is not None:
        document["losses"] = _losses(target, texts, out)
    if html is not None:
        replace_text(html, analysis_page(document))
    if as_json:
        print(json.dumps(plain_json(document), indent=1, ensure_ascii=False))
        return
    _print_analysis(document)
    if text is None and not target.model_class.has_own_head:
        print("Forgetting: not measured; --text FILE compares the loss on other text with that of the base.")
    if html is not None:
        print(f"{html}: the same, layer by layer")


ScoredText: TypeAlias = "tuple[str, Rows, int]"
"""A label, rows to measure a loss on, and the padding token."""


def _texts(target: Artifact, text: Path, limit: int | None) -> list[ScoredText]:
    from qvera.config.sections import DataSection
    from qvera.data import build_datasets
    from qvera.data.source import has_columns
    from qvera.evaluation.load import template_beside, template_name, warn_of_other_rows
    from qvera.evaluation.named_adapters import rows_of
    from qvera.models.tokenizer import load_tokenizer

    recipe, tokenizer = target.recipe, load_tokenizer(target.section)
    if (template := template_beside(target)) is not None:
        tokenizer.chat_template = template
    about: dict[str, Any] = {"limit": limit}
    if recipe is not None:
        about |= {"template": template_name(recipe, target.run), "max_length": recipe.data.max_length}
    with _rows_file(text) as path:
        if recipe is not None and recipe.data.columns and has_columns(path, recipe.data.columns.values()):
            about["columns"] = recipe.data.columns
        datasets = build_datasets(DataSection(path=str(path), **about), tokenizer, console)
    found = [(str(text), datasets.train[:limit], datasets.pad_id)]
    if recipe is not None and recipe.data.has_held_out_rows:
        datasets = build_datasets(recipe.data.replace(template=about["template"]), tokenizer, console)
        warn_of_other_rows(target, datasets, console)
        if held_out := rows_of(datasets, target.name)[1]:  # one of many adapters may have none
            found.append(("held-out rows of the run", held_out[:limit], datasets.pad_id))
    return found


def _losses(target: Artifact, texts: list[ScoredText], reduced: Path | None) -> list[dict[str, Any]]:
    from qvera.config.sections import TrainingSection
    from qvera.evaluation.held_out import held_out_loss, scoring
    from qvera.evaluation.load import base_of, open_target

    settings = target.recipe.training if target.recipe is not None else TrainingSection()
    size, chunk = settings.per_device_eval_batch_size, settings.loss_chunk_tokens
    with progress("loading the model"):
        opened = open_target(target)
    tables: list[dict[str, Any]] = [
        {"text": label, "rows": len(some), "base": None, "adapter": None, "reduced": None} for label, some, _ in texts
    ]

    def measure(model: Any, column: str) -> None:
        with progress(f"loss of the {column}") as show, scoring(model):
            for table, (label, some, pad_id) in zip(tables, texts, strict=True):
                show(0, table["rows"], f"loss of the {column} on {label}")
                found = held_out_loss(model, some, pad_id=pad_id, batch_size=size, chunk_tokens=chunk, progress=show)
                table[column] = found["loss"]

    measure(opened.model, "adapter")
    with base_of(opened) as base:
        measure(base, "base")
    if reduced is not None:
        opened.model = opened.base.model = None  # both need not be held
        del base
        measure(open_target(dataclasses.replace(target, path=reduced, adapter=reduced)).model, "reduced")
    return tables


@contextlib.contextmanager
def _rows_file(text: Path) -> Iterator[Path]:
    """Plain text becomes a file with a row for each paragraph (between empty lines)."""
    if text.suffix.lower() != ".txt":
        yield text
        return
    try:
        parts = map(str.strip, text.read_text(encoding="utf-8").split("\n\n"))
    except UnicodeDecodeError:
        raise InputError(f"--text: {text}: is not UTF-8. Convert the file.") from None
    if not (paragraphs := list(filter(None, parts))):
        raise InputError(f"--text: {text}: holds no text. Is it the right file?")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "text.jsonl"
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs), encoding="utf-8")
        yield path


def _print_analysis(document: dict[str, Any]) -> None:
    from qvera.lab.analysis import ROLE_TITLES, loss_rows, loss_titles, role_rows, summary

    print_table(["", *ROLE_TITLES], role_rows(document))
    print(f"\n{summary(document)}")
    if losses := loss_rows(document):
        print()
        print_table(["loss", *(title.lower() for title in loss_titles(document))], losses)
    if reduced := document["reduced"]:
        size = formatting.size(reduced["bytes"])
        print(f"{size} in {reduced['path']}: LoRA of rank {reduced['rank']}, exact, intruders at {reduced['keep']:g}")
