"""`qvera export`, `qvera merge-adapters`, `qvera card` and `qvera push`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qvera.cli.common import (
    AdapterName,
    AdapterNames,
    Command,
    RunPath,
    argument,
    check_target,
    console,
    flag,
    option,
    progress,
    require_new_file,
    say,
)
from qvera.config.sections import Dtype, ExportDtype, ExportKind
from qvera.utils import formatting
from qvera.utils.errors import InputError
from qvera.utils.files import replace_text, require_empty
from qvera.utils.formatting import counted
from qvera.utils.safetensors_io import same_base

if TYPE_CHECKING:
    from qvera.evaluation.load import Artifact


def export(
    run: RunPath,
    out: Annotated[Path, argument("OUT", "A new or empty directory, or this export unfinished.")],
    adapter: AdapterName = None,
    to: Annotated[ExportKind, typer.Option(help="What to write.")] = "merged",
    rank: Annotated[int | None, option("K", "With --to lora or gguf-lora: keep the best K directions.")] = None,
    dtype: Annotated[ExportDtype | None, typer.Option(help="Default: the recipe's, float16. q8_0: GGUF only.")] = None,
    quantize: Annotated[Literal["nf4", "fp4"] | None, typer.Option(help="With --to merged: write in 4 bits.")] = None,
    base: Annotated[
        Literal["original", "dequantized"] | None,
        typer.Option(help="Default: the recipe's; with --quantize: original."),
    ] = None,
    no_compare: Annotated[bool, flag("--no-compare", "Do not measure the difference.")] = False,
    compare_only: Annotated[bool, flag("--compare-only", "Only measure the export in OUT.")] = False,
) -> None:
    """Write a checkpoint that other tools load.

    --to merged: W + dW in 16 bits; transformers loads it. --base dequantized merges into the weights that training
    used, so that the export answers as the run does; --base original into the original 16-bit ones. The difference
    between the trained and the exported model is measured and written to OUT/qvera_export.json. --quantize nf4 writes
    the merge in 4 bits. If it is stopped, the same command continues from the finished shards.

    --to lora: the same change as a LoRA for PEFT, exact with --dtype float32, or cut to the best --rank K, with its
    error and what it costs on held-out rows. --to peft: an adapter of PEFT's own VeRA, projections in the file.

    --to gguf: the merged model as a GGUF file for llama.cpp and Ollama, with a Modelfile; --dtype q8_0: 8 bits.
    --to gguf-lora: the adapter alone as such a file, for a GGUF of its base.

    Example:
        qvera export runs/quickstart out/ --to merged
    """
    check_target(run, adapter)

    from qvera.evaluation.load import find_target
    from qvera.exporting.export import export as export_adapter

    export_adapter(
        find_target(run, name=adapter),
        out,
        to=to,
        rank=rank,
        dtype=dtype,
        quantize=quantize,
        base=base,
        compare=not no_compare,
        compare_only=compare_only,
        console=console,
        say=print,
    )


class Weights(Command):
    """Lets ``--weights`` take several numbers: ``--weights 1 -1``, or ``--weights 0.5,0.5``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each number."""
        found: list[str] = []
        for arg in args:
            if "--weights" in found[-2:] and re.fullmatch(r"([-+]?[\d.]+([eE][-+]?\d+)?,?)+", arg):
                found = found[: -1 if found[-1] == "--weights" else None]
                found += [part for weight in arg.split(",") for part in ("--weights", weight)]
            else:
                found.append(arg)
        return super().parse_args(ctx, found)


def merge_adapters(
    adapters: Annotated[list[Path], argument("ADAPTER", "Runs, adapter directories, or hub ids.")],
    out: Annotated[Path, argument("OUT", "A new or empty directory.")],
    names: AdapterNames,
    weights: Annotated[list[float] | None, option("W...", "One each (default: average).")] = None,
    to: Annotated[Literal["qvera", "lora"] | None, typer.Option(help="Default: qvera if exact, else lora.")] = None,
    rank: Annotated[int | None, option("K", "With --to lora: keep the best K directions.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of a LoRA. Default: float32.")] = None,
) -> None:
    """Scale, add or interpolate adapters of one base.

    The default is their average; --weights 1 -1 subtracts, --weights 0.3 0.7 interpolates, one adapter with --weights
    0.5 is scaled. If seed, rank, b_groups, targets, d and a agree (adapter.train_d: false), the result is again a QVERA
    adapter, exactly. Any others add up exactly to a LoRA of their ranks' sum, which --rank K cuts. Without --to, the
    first is written if it is possible.

    --adapter NAME, once for each, takes the adapters of one run that trained many.

    Example:
        qvera merge-adapters runs/one runs/two out/ --to lora --weights 0.3 0.7
    """
    if names and len(adapters) != 1:
        raise InputError("--adapter: takes the adapters of one run; name one directory and OUT.")
    from qvera.evaluation.named_adapters import adapters_root

    for path in adapters:
        check_target(path)
        if not names and (root := adapters_root(path)) is not None:
            raise InputError(
                f"{path}: has several adapters. Name their directories, such as {root}/NAME; or {path} alone, and "
                "--adapter NAME for each that is added."
            )
    if len(names or adapters) == 1 and not any((weights, to, rank, dtype)):
        last = f" {out} is taken for OUT, the directory to write." if out.exists() else ""
        raise InputError(
            f"{adapters[0]}: is one adapter, and this would copy it.{last} Name others too, or scale it with "
            "--weights W. `qvera export` merges an adapter into its base."
        )

    import torch

    from qvera.adapters.adapter_file import read_config
    from qvera.evaluation.load import find_target, require_adapter
    from qvera.exporting.deltas import read_deltas
    from qvera.exporting.export import require_no_added_tokens
    from qvera.exporting.lora import in_every_place, write_lora
    from qvera.exporting.sums import same_directions, stacked_factors, union, weighted_sum, write_vectors
    from qvera.models.model_class import CAUSAL_LM, empty_model

    found = [find_target(adapters[0], name=name) for name in names] or [find_target(path) for path in adapters]
    directories = [require_adapter(target) for target in found]
    configs = [read_config(directory) for directory in directories]
    require_empty(out)
    _require_one_base(found, [getattr(config, "base_fingerprint", None) for config in configs])
    for directory, config in zip(directories, configs, strict=True):
        require_no_added_tokens(config, directory, "merge-adapters")
        if getattr(config, "model_class", CAUSAL_LM).has_own_head:
            raise InputError(f"{directory}: has a classification head, and heads can't be added. Export it alone.")
    model = empty_model(found[0].section)
    deltas = [read_deltas(require_adapter(target), model, target.section) for target in found]
    factors = weights or [1.0 / len(deltas)] * len(deltas)
    if wrong := [weight for weight in factors if not math.isfinite(weight)]:
        raise InputError(f"--weights: expected numbers, got {wrong[0]:g}.")
    template = _template(found)
    own_rank = sum(adapter.rank for adapter in deltas)
    why = same_directions(deltas) if to is None else None
    if to is None:
        to = "qvera" if why is None and rank is None else "lora"
    if to == "qvera":
        if rank is not None:
            raise InputError("--rank: goes with --to lora only.")
        if dtype is not None:
            raise InputError("--dtype: a QVERA adapter is written in float32. Leave it out, or add --to lora.")
        write_vectors(directories[0], weighted_sum(deltas, factors), out, template)
        print(f"{counted(len(deltas), 'adapter')}, weights {', '.join(f'{w:g}' for w in factors)}: exact, in {out}")
        return
    deltas = [in_every_place(adapter, model) for adapter in deltas]
    stacked = stacked_factors(deltas, factors)
    if why is not None:
        lora = f"a LoRA of rank {rank or own_rank}"
        print(f"No QVERA adapter is the exact sum of these: {why}. So this writes {lora}.")
    write_lora(union(deltas), out, getattr(torch, dtype or "float32"), rank, stacked, template, print)


def _template(found: list[Artifact]) -> str | None:
    """The chat template for a sum: that of all its adapters, unless it is the base's own."""
    from qvera.exporting.export import chat_of

    of_runs = {target.run or target.adapter: target for target in found}  # a run's adapters share one
    templates = {chat_of(target).beside for target in of_runs.values()}
    if len(templates) > 1:
        print("The adapters were trained with different chat templates, so none is written beside their sum.")
        return None
    return templates.pop()


def _require_one_base(found: list[Artifact], prints: list[str | None]) -> None:
    """Compares bases by content (``prints``, their fingerprints) if all adapters know it, else by name."""
    from qvera.adapters.save_load import portable_name

    names = [portable_name(target.section.path) for target in found]
    if all(prints):
        different = any(not same_base(prints[0], other) for other in prints)
    else:
        different = len(set(names)) > 1
    if different:
        bases = [f"{name} (fingerprint {(known or 'unknown')[:16]})" for name, known in zip(names, prints, strict=True)]
        raise InputError(f"these adapters were trained on different base models: {', '.join(bases)}.")


def card(
    path: Annotated[Path, argument("RUN", "A run, an adapter, an export, or a hub id.")],
    adapter: AdapterName = None,
    out: Annotated[Path | None, option("FILE", "Default: README.md beside the weights.")] = None,
    repo: Annotated[str | None, option("USER/NAME", "Where it will be, for its commands.")] = None,
) -> None:
    """Write a model card from a run.

    A README.md as the Hugging Face hub reads it: base and its license, data, method, scores before and after, and how
    to use the adapter in PEFT, transformers, vLLM, Ollama and qvera. What the run's files do not say is left out.

    Example:
        qvera card runs/quickstart
    """
    from qvera.exporting.card import find_subject, model_card
    from qvera.models.hub import require_repository_name

    if repo is not None:
        require_repository_name(repo)
    subject = find_subject(path, adapter)
    file = out or subject.directory / "README.md"
    require_new_file(file, ".md")
    replace_text(file, model_card(subject, repo))
    print(f"{file}: the card of {path}")


def push(
    path: Annotated[Path, argument("RUN", "A run, an adapter directory, or an export.")],
    repo: Annotated[str, argument("USER/NAME", "The repository on the hub.")],
    adapter: AdapterName = None,
    private: Annotated[bool, flag("--private", "A new repository is private; a public one is refused.")] = False,
) -> None:
    """Send an adapter or an export to the hub.

    A run's adapter, or the files of what `qvera export` wrote, and README.md: the one beside them, else the card that
    `qvera card` writes. Recipes, data and certificates stay here. Weights, settings and tokenizer of an earlier push
    are replaced, unless GGUF is sent. The token is that of `hf auth login` or HF_TOKEN.

    Example:
        qvera push runs/quickstart anna/orders --private
    """
    from qvera.exporting.card import REPLACED, contents_of, files_of, find_subject, local_base
    from qvera.models.hub import send_files

    subject = find_subject(path, adapter)
    files = files_of(subject)
    if (base := local_base(subject)) is not None:
        say(
            f"The adapter names a directory of this computer as its base, {base}. Others need that model under the "
            "same name. Train with a hub id in model.path to name it for them.",
            style="yellow",
        )
    size = sum(file.stat().st_size for file in files)
    with progress(f"sending {formatting.size(size)}"):
        contents, message = contents_of(subject, repo), f"{subject.kind} by qvera"
        replaced = () if "gguf" in subject.kind else REPLACED  # llama.cpp reads nothing but the GGUF file
        address, deleted = send_files(contents, repo, private=private, message=message, replaced=replaced)
    print(f"{address}: {formatting.size(size)} in {len(contents) - 1} files, and README.md")
    if deleted:
        print(f"Deleted there, from an earlier push: {', '.join(deleted)}")
