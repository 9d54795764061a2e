"""Export a run or an adapter: as a merged checkpoint, a LoRA, PEFT's VeRA, or a GGUF file."""

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console

from qvera.adapters.adapter_file import read_config, require_base
from qvera.config.sections import ExportDtype, ExportKind, ExportSection
from qvera.data import resolve_template
from qvera.evaluation.load import Artifact, require_adapter, require_answers, template_beside, template_name
from qvera.exporting import lora
from qvera.exporting.compare import compare_lora, compare_merged, difference_text
from qvera.exporting.deltas import read_deltas
from qvera.exporting.gguf import export_gguf, export_gguf_lora
from qvera.exporting.merged import export_merged, export_quantized
from qvera.models.hub import fingerprint_of
from qvera.models.loader import rounds_away
from qvera.models.model_class import CAUSAL_LM, empty_model, load_config
from qvera.models.tokenizer import load_tokenizer
from qvera.tasks import task_of
from qvera.utils import formatting
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_WEIGHTS, CERTIFICATE, file_sha256, read_json, replace_text, require_empty
from qvera.utils.progress import Phase


def export(
    target: Artifact,
    out: Path,
    *,
    to: ExportKind = "merged",
    rank: int | None = None,
    dtype: ExportDtype | None = None,
    quantize: str | None = None,
    base: Literal["original", "dequantized"] | None = None,
    compare: bool = True,
    compare_only: bool = False,
    console: Console | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Export an adapter and return the certificate; the arguments are the options of ``qvera export``.

    Args:
        out: a new or empty directory, or this export unfinished.
        compare: measure the difference between the trained and the exported model, for the certificate.
        compare_only: only measure the finished export in ``out``.
        say: takes each line of the result.

    InputError: the arguments contradict each other, or ``target`` can't be written so.
    RunFailed: a weight is out of the dtype's range, or the disk is full.
    Interrupted: a signal came; the same call continues.
    """
    _require_fitting(to, rank, dtype, quantize, base, compare, compare_only)
    section, adapter_dir, chat = target.section, require_adapter(target), chat_of(target)
    options = target.recipe.export if target.recipe is not None else ExportSection()
    written = dtype or options.dtype
    if quantize is not None and base is None and not hasattr(load_config(section), "quantization_config"):
        base = "original"  # rounding dequantized weights to 4 bits again gives the base's, without what was trained
    options = options.replace(dtype="float32" if written == "q8_0" else written, base=base or options.base)
    console = console or Console(stderr=True)
    recipe, limit = target.recipe, options.certificate_rows
    is_known = recipe is not None or "quantization" in section.model_fields_set
    if not is_known and base is None and to in ("merged", "gguf") and not compare_only:
        say(
            f"Nothing says which weights {adapter_dir} was trained on. So it is merged into the base in NF4, "
            "like a QLoRA; for one that was trained on 16-bit weights add --base original."
        )
    # A merge has its own way: it can be continued, quantized and compared later. It returns here.
    if to == "merged":
        if compare_only:
            certificate = _merge_to_compare(target, adapter_dir, out, limit)
        else:
            certificate = _merge(target, adapter_dir, out, options, quantize, chat, console, say)
        if recipe is not None and limit and (compare or compare_only):
            certificate["difference"] = compare_merged(target, recipe, out, limit, console)
            say(difference_text(certificate["difference"], certificate["base"]["weights"]))
        else:
            certificate["difference"] = None
        replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
        return certificate
    require_empty(out)  # before factors are cut, or a model is converted
    if to.startswith("gguf"):
        require_answers(target, f"--to {to}")
    if to == "gguf":
        with Phase(console, "merging tensors") as show:
            certificate = export_gguf(
                adapter_dir,
                section,
                out,
                options,
                written,
                chat_template=chat.template,
                system=chat.system,
                progress=lambda done, total, name: show(done, total, facts=name),
            )
        (file,) = certificate["files"]
        size = formatting.size((out / file).stat().st_size)
        say(f"{size} in {out / file}, {len(certificate['delta'])} weights changed")
        say(f"Ollama takes it with: ollama create NAME -f {shlex.quote(str(out / 'Modelfile'))}")
        return certificate
    # What remains writes factors of ΔW only, for which a model without weights is enough.
    config = read_config(adapter_dir)
    require_base(config, adapter_dir, section.path, fingerprint_of(section))
    require_no_added_tokens(config, adapter_dir, f"--to {to}")
    model_class = getattr(config, "model_class", CAUSAL_LM)
    empty = empty_model(section, None, model_class)
    adapter = read_deltas(adapter_dir, empty, section)
    if to == "gguf-lora":
        certificate = export_gguf_lora(
            adapter, adapter_dir, section, out, written, rank, chat_template=chat.template, system=chat.system
        )
        if rank is not None:
            say(lora.truncation_text(certificate["relative_errors"], adapter.rank, rank))
        (file,) = certificate["files"]
        size = formatting.size((out / file).stat().st_size)
        say(f"{size} in {out}: LoRA of rank {rank or adapter.rank} on {len(adapter.layers)} linears")
        where = f"Put the path of the base's GGUF file into {out / 'Modelfile'} for Ollama"
        say(f"{where}, or name both files to llama.cpp.")
        return certificate
    errors = None
    adapter = lora.in_every_place(adapter, empty)
    places = lora.require_kept_by_peft(adapter, empty) if to == "lora" else {}
    if to == "peft":
        size = formatting.size(lora.export_stock_vera(adapter, out, chat.beside))
        say(f"{size} in {out}: PEFT's VeRA of rank {adapter.rank}, projections included")
    else:
        errors = lora.write_lora(adapter, out, getattr(torch, options.dtype), rank, None, chat.beside, say, places)
        if places:
            say("PEFT opens it (target_parameters); few other tools read a LoRA of experts.")
        elif not model_class.has_own_head:
            say(lora.serving_text(rank or adapter.rank, adapter.magnitude))
    certificate = adapter.certificate(
        to,
        section,
        adapter_dir,
        rank=rank or adapter.rank,
        dtype=options.dtype if to == "lora" else "float32",
        files={ADAPTER_WEIGHTS: file_sha256(out / ADAPTER_WEIGHTS)},
        relative_errors=errors,
        difference=None,
    )
    replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))  # now: scoring takes long, and may be stopped
    # A whole LoRA equals the adapter but for rounding, so only one that is cut is measured.
    if rank is not None and compare and recipe is not None and limit:
        certificate["difference"] = compare_lora(target, recipe, out, limit, console)
        say(difference_text(certificate["difference"]))
        replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
    return certificate


def _require_fitting(
    to: str, rank: int | None, dtype: str | None, quantize: str | None, base: str | None, compare: bool, only: bool
) -> None:
    """Refuse options that have no effect beside the others."""
    if rank is not None and to not in ("lora", "gguf-lora"):
        raise InputError("--rank: goes with --to lora and --to gguf-lora only.")
    if dtype == "q8_0" and not to.startswith("gguf"):
        raise InputError("--dtype q8_0: goes with --to gguf and --to gguf-lora only. Take float16 or bfloat16.")
    if dtype is not None and to == "peft":
        raise InputError("--dtype: --to peft writes float32, as training does. Leave it out.")
    if quantize is not None and to != "merged":
        raise InputError("--quantize: goes with --to merged only. With --to gguf, --dtype q8_0 is the smallest type.")
    if base is not None and to not in ("merged", "gguf"):
        raise InputError(f"--base: goes with --to merged and --to gguf only; --to {to} writes no weights of the base.")
    if only and to != "merged":
        raise InputError("--compare-only: goes with --to merged only.")
    given = {"--dtype": dtype, "--quantize": quantize, "--base": base, "--no-compare": None if compare else True}
    if only and (extra := [name for name, value in given.items() if value is not None]):
        raise InputError(f"--compare-only: measures the export as it is; drop {extra[0]}.")


class Chat(NamedTuple):
    """The chat template of a run, which begins with its system prompt; ``beside``: if it is not the base's own."""

    template: str | None
    system: str | None
    beside: str | None


def chat_of(target: Artifact) -> Chat:
    """Find the chat template and system prompt, in the run or beside the adapter."""
    recipe = target.recipe
    if recipe is None:
        beside = template_beside(target)
        return Chat(beside, None, beside)
    if not task_of(recipe).has_answers:
        return Chat(None, None, None)
    tokenizer = load_tokenizer(target.section)
    template, system = resolve_template(template_name(recipe, target.run), tokenizer), recipe.data.system
    return Chat(template.with_system(system), system, template.beside(system))


def _merge(
    target: Artifact,
    adapter_dir: Path,
    out: Path,
    options: ExportSection,
    quantize: str | None,
    chat: Chat,
    console: Console,
    say: Callable[[str], None],
) -> dict[str, Any]:
    what = adapter_dir, target.section, out, options
    with Phase(console, "merging tensors") as show:

        def progress(stage: str | None, done: int, total: int, name: str) -> None:
            show(done, total, stage, name)

        if quantize is not None:
            certificate = export_quantized(*what, quantize, chat_template=chat.template, progress=progress)
        else:
            whole = functools.partial(progress, None)
            certificate = export_merged(*what, chat_template=chat.template, progress=whole)
    files, changed = certificate["files"], len(certificate["delta"])
    size = formatting.size(sum((out / name).stat().st_size for name in files))
    say(f"{size} in {len(files)} file(s) in {out}, {changed} weights changed")
    if quantize is not None:
        errors: dict[str, float] = certificate["quantized"]["relative_errors"]
        ordered = sorted(errors, key=errors.__getitem__)
        middle, largest = ordered[len(ordered) // 2], ordered[-1]
        say(
            f"{quantize}: relative error of W + ΔW (Frobenius) {errors[middle]:.2g} in the median weight, at most "
            f"{errors[largest]:.2g} ({largest})"
        )
    if certificate["base"]["stored_in_4_bits"]:
        say(f"merged into the dequantized weights of {target.section.path}, which is stored in 4 bits")
    if quantize is not None and rounds_away(certificate, quantize):
        say(f"These were rounded to {quantize} before. Rounded again, they lose nearly all of what was trained.")
    return certificate


def _merge_to_compare(target: Artifact, adapter_dir: Path, out: Path, limit: int) -> dict[str, Any]:
    """The certificate of the finished merge in ``out``. InputError: it can't be compared."""
    path, file = target.path, out / CERTIFICATE
    if not limit:
        raise InputError(
            f"{path}: --compare-only compares on as many rows as export.certificate_rows of its recipe says, and "
            "that is 0. Set it to 16 there."
        )
    certificate = read_json(file, "the certificate of a finished merged export", ("adapter", "base"))
    if certificate.get("kind") != "merged":
        raise InputError(f"{out}: --compare-only measures merged exports (--to merged), and this is another one.")
    if target.recipe is None:
        raise InputError(f"{path}: --compare-only takes a run; an adapter alone has no rows to compare on.")
    if certificate["adapter"].get("sha256") != file_sha256(adapter_dir / ADAPTER_WEIGHTS):
        raise InputError(f"{file}: is of another adapter than that of {path} (adapter.sha256).")
    return certificate


def require_no_added_tokens(config: object, adapter_dir: Path, what: str) -> None:
    """Refuse added tokens, for formats that hold only factors of ΔW."""
    if tokens := getattr(config, "added_tokens", None):
        raise InputError(
            f"{adapter_dir}: adds the tokens {', '.join(tokens)}, whose rows of embedding and head have no place in "
            f"what {what} writes. Export it with --to merged, whose checkpoint and tokenizer have them."
        )
