"""What leaves a run for other tools: export and merge-adapters."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from qvera.adapters.save_load import ADAPTER_WEIGHTS, read_config, require_base
from qvera.cli.commands.common import console, quiet_libraries
from qvera.config.schema import ExportSection, ModelSection, Recipe
from qvera.data import build_datasets, resolve_template
from qvera.evaluation.load import find_adapter, open_run, template_of
from qvera.export import export_merged
from qvera.export.compare import measure_difference, too_little_memory
from qvera.export.deltas import AdapterDeltas, read_deltas
from qvera.export.lora import Truncation, export_lora, export_stock_vera, lora_bytes, lora_factors, truncate_all
from qvera.export.merge_adapters import stacked_factors, union, weighted_sum, write_vectors
from qvera.models.loader import fingerprint_of
from qvera.models.model_config import empty_model
from qvera.models.tokenizer import load_tokenizer
from qvera.utils import formatting
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256
from qvera.utils.paths import CERTIFICATE
from qvera.utils.safetensors_io import same_base


def export(args: argparse.Namespace) -> None:
    """Qvera export"""
    quiet_libraries()
    recipe, section, adapter_dir = find_adapter(args.run)
    options = recipe.export if recipe is not None else ExportSection()
    changes = {"dtype": args.dtype, "base": args.weights}
    options = options.replace(**{k: v for k, v in changes.items() if v is not None})
    if args.rank is not None and args.to != "lora":
        raise InputError("--rank: goes with --to lora only.")
    if args.to != "merged":
        if args.compare_only:
            raise InputError("--compare-only: goes with --to merged only.")
        require_base(read_config(adapter_dir), adapter_dir, section.path, fingerprint_of(section))
        _export_adapter(args, section, adapter_dir, getattr(torch, options.dtype))
        return
    if args.compare_only:
        _compare_only(args, recipe, section, adapter_dir, options)
        return
    template = None
    if recipe is not None:
        template = resolve_template(template_of(recipe, args.run), load_tokenizer(section)).jinja
    with console.status("Merging") as status:
        certificate = export_merged(
            adapter_dir,
            section,
            args.out,
            options,
            chat_template=template,
            progress=lambda done, total, name: status.update(f"Merging: {done} of {total} tensors ({name})"),
        )
    size = sum((args.out / name).stat().st_size for name in certificate["files"])
    print(
        f"{formatting.size(size)} in {len(certificate['files'])} file(s) in {args.out}, {len(certificate['delta'])} weights changed"
    )
    if recipe is None or args.no_compare or not options.certificate_rows:
        certificate["difference"] = None
    else:
        certificate["difference"] = _difference(recipe, args.run, args.out, options)
    replace_text(args.out / CERTIFICATE, json.dumps(certificate, indent=1))
    _say_difference(certificate["difference"])


def _say_difference(difference: dict[str, Any] | None) -> None:
    if difference and "kl_mean" in difference:
        print(
            f"trained vs exported on {difference['rows']} rows: loss {difference['loss_trained']:.4f} vs "
            f"{difference['loss_exported']:.4f}, KL {difference['kl_mean']:.2e} a token, same first choice "
            f"{difference['top1_agreement']:.1%}"
        )
    elif difference:
        print(f"not measured: {difference['not_measured']}")


def _compare_only(
    args: argparse.Namespace, recipe: Recipe | None, section: ModelSection, adapter_dir: Path, options: ExportSection
) -> None:
    """--compare-only: measure the difference of an export that is there, and put it into its certificate."""
    try:
        certificate = json.loads((args.out / CERTIFICATE).read_text(encoding="utf-8"))
        merged = certificate["adapter"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{args.out}: --compare-only takes a finished merged export, with its {CERTIFICATE} ({type(error).__name__}: {error})."
        ) from None
    if recipe is None:
        raise InputError(f"{args.run}: --compare-only takes a run; an adapter alone has no rows to compare on.")
    if merged != file_sha256(adapter_dir / ADAPTER_WEIGHTS):
        raise InputError(
            f"{args.out}: is the export of another adapter than that of {args.run} ({CERTIFICATE}, adapter.sha256)."
        )
    certificate["difference"] = _difference(recipe, args.run, args.out, options)
    replace_text(args.out / CERTIFICATE, json.dumps(certificate, indent=1))
    _say_difference(certificate["difference"])


def _export_adapter(args: argparse.Namespace, section: ModelSection, adapter_dir: Path, dtype: torch.dtype) -> None:
    """--to lora and --to peft"""
    _require_no_tokens(read_config(adapter_dir), adapter_dir, f"--to {args.to}")
    adapter = read_deltas(adapter_dir, empty_model(section))
    if args.to == "peft":
        size = export_stock_vera(adapter, args.out)
        print(f"{formatting.size(size)} in {args.out}: PEFT's VeRA of rank {adapter.A.shape[0]}, projections included")
        return
    _write_lora(adapter, args.out, dtype, adapter.A.shape[0], args.rank, None)


def _write_lora(
    adapter: AdapterDeltas,
    out: Path,
    dtype: torch.dtype,
    own: int,
    cut: int | None,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] | None,
) -> None:
    """Say errors, rank and size, then write."""
    if cut is not None:
        print(f"{'layer':<44}{'Frobenius':>11}{'spectral':>11}   relative error of rank {cut}")

        def say(_: int, name: str, error: Truncation) -> None:
            print(f"{name:<44}{error.frobenius:11.2e}{error.spectral:11.2e}")

        factors = truncate_all(factors.items() if factors else lora_factors(adapter), own, cut, dtype, say)
    rank = cut or own
    expected = lora_bytes(adapter, rank, dtype)
    print(f"LoRA of rank {rank} on {len(adapter.layers)} linears: {formatting.size(expected)} in {out}")
    size = export_lora(adapter, out, dtype, factors)
    print(f"written: {size:,} bytes; stock PEFT loads it")


def merge_adapters(args: argparse.Namespace) -> None:
    """Qvera merge-adapters"""
    quiet_libraries()
    found = [find_adapter(path) for path in args.adapters]
    _require_one_base(found)
    for _, _, directory in found:
        _require_no_tokens(read_config(directory), directory, "merge-adapters")
    model = empty_model(found[0][1])
    adapters = [read_deltas(directory, model) for _, _, directory in found]
    weights = args.weights or [1.0 / len(adapters)] * len(adapters)
    if args.to == "qvera":
        write_vectors(found[0][2], weighted_sum(adapters, weights), args.out)
        print(f"{len(adapters)} adapters, weights {', '.join(f'{w:g}' for w in weights)}: exact, in {args.out}")
        return
    factors = stacked_factors(adapters, weights)
    own = sum(adapter.A.shape[0] for adapter in adapters)
    _write_lora(union(adapters), args.out, getattr(torch, args.dtype), own, args.rank, factors)


def _require_no_tokens(config: Any, adapter_dir: Path, what: str) -> None:
    """Refuse an adapter that brings rows of embedding and head where only factors of ΔW are written."""
    tokens = getattr(config, "added_tokens", None)
    if tokens:
        raise InputError(
            f"{adapter_dir}: adds the tokens {', '.join(tokens)}, whose rows of embedding and head have no place in what {what} "
            "writes. Export it with --to merged, whose checkpoint and tokenizer have them."
        )


def _require_one_base(found: list[tuple[Recipe | None, ModelSection, Path]]) -> None:
    """All adapters of one base: by content where they all say it, else by name."""
    prints = {path: getattr(read_config(path), "base_fingerprint", None) for _, _, path in found}
    names = {path: section.path for _, section, path in found}
    known = [p for p in prints.values() if p is not None]
    if len(known) == len(prints):
        different = any(not same_base(known[0], other) for other in known)
    else:
        different = len(set(names.values())) > 1
    if different:
        bases = ", ".join(f"{names[p]} (fingerprint {(prints[p] or 'unknown')[:16]})" for p in names)
        raise InputError(f"these adapters were trained on different base models: {bases}.")


def _difference(recipe: Recipe, run: Path, out: Path, options: ExportSection) -> dict[str, Any]:
    """The certificate's measured part; data that has gone since, or too little memory, is said and costs the export nothing."""
    again = f"`qvera export {run} {out} --compare-only` measures it later, or on a larger machine."
    try:
        reason = too_little_memory(out, _trained_bytes(run))
        if reason is not None:
            return {"not_measured": f"{reason}. {again}"}
        with console.status(f"Loading {run}"):
            opened = open_run(run)
        datasets = build_datasets(recipe.data, opened.base.tokenizer, console)
        rows = (datasets.eval or datasets.train)[: options.certificate_rows]
        with console.status("Comparing the trained with the exported model"):
            return measure_difference(opened.model, out, rows, datasets.pad_id)
    except (InputError, OSError, ValueError) as error:
        return {"not_measured": f"{error} {again}"}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return {"not_measured": f"the memory gave out. {again}"}


def _trained_bytes(run: Path) -> int:
    """What the base took when it was trained on, as the run measured it; 0 where it does not say."""
    try:
        return int(json.loads((run / "run.json").read_text(encoding="utf-8"))["model"]["base_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
