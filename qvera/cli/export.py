"""`qvera export`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from qvera.cli.common import AdapterName, GgufDtype, RunPath, console, progress, quiet_libraries
from qvera.utils import formatting
from qvera.utils.atomic import replace_text, require_empty
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256, read_json, try_read_json
from qvera.utils.paths import ADAPTER_WEIGHTS, CERTIFICATE

if TYPE_CHECKING:
    import torch

    from qvera.config.schema import ExportSection, ModelSection, Recipe
    from qvera.evaluation.load import Artifact
    from qvera.exporting.deltas import AdapterDeltas


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty directory, or this export unfinished.")],
    adapter: AdapterName = None,
    to: Annotated[
        Literal["merged", "lora", "peft", "gguf", "gguf-lora"], typer.Option(help="What to write.")
    ] = "merged",
    rank: Annotated[
        int | None, typer.Option(metavar="K", help="With --to lora or gguf-lora: keep the best K directions.")
    ] = None,
    dtype: Annotated[GgufDtype | None, typer.Option(help="Default: the recipe's, float16. q8_0: GGUF only.")] = None,
    quantize: Annotated[
        Literal["nf4", "fp4"] | None, typer.Option(help="With --to merged: write it in 4 bits.")
    ] = None,
    base: Annotated[Literal["original", "dequantized"] | None, typer.Option(help="Default: the recipe's.")] = None,
    no_compare: Annotated[bool, typer.Option("--no-compare", help="Do not measure the difference.")] = False,
    compare_only: Annotated[bool, typer.Option("--compare-only", help="Only measure the export in OUT.")] = False,
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
    _check_options(to, rank, dtype, quantize, base, no_compare, compare_only)
    quiet_libraries()

    import torch

    from qvera.adapters.files.adapter_file import read_config, require_base
    from qvera.config.schema import ExportSection
    from qvera.evaluation.load import find_adapter, require_answers
    from qvera.exporting.compare import difference_text
    from qvera.models.loader import fingerprint_of

    target, adapter_dir = find_adapter(run, adapter)
    recipe, section = target.recipe, target.section
    options = recipe.export if recipe is not None else ExportSection()
    written = dtype or options.dtype
    options = options.replace(dtype="float32" if written == "q8_0" else written, base=base or options.base)
    chat = chat_of(target)
    if to != "merged":
        require_empty(out)  # before factors are cut, or a model is converted
    if to.startswith("gguf"):
        require_answers(target, f"--to {to}")
    if to == "gguf":
        _merge_to_gguf(section, adapter_dir, out, options, written, chat)
        return
    if to != "merged":
        require_base(read_config(adapter_dir), adapter_dir, section.path, fingerprint_of(section))
        if to == "gguf-lora":
            _export_gguf_lora(section, adapter_dir, out, written, rank, chat)
            return
        certificate = _export_adapter(to, section, adapter_dir, out, getattr(torch, options.dtype), rank, chat)
        if rank is not None and recipe is not None and not no_compare and options.certificate_rows:
            certificate["difference"] = _lora_difference(recipe, target, out, options)
        replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
        return
    if compare_only:
        if not options.certificate_rows:
            raise InputError(
                f"{run}: --compare-only compares on as many rows as export.certificate_rows of its recipe says, and "
                "that is 0. Set it to 16 there."
            )
        certificate = read_json(out / CERTIFICATE, "the certificate of a finished merged export", ("adapter", "base"))
        if certificate.get("kind") != "merged":
            raise InputError(f"{out}: --compare-only measures merged exports (--to merged), and this is another one.")
        if recipe is None:
            raise InputError(f"{run}: --compare-only takes a run; an adapter alone has no rows to compare on.")
        if certificate["adapter"].get("sha256") != file_sha256(adapter_dir / ADAPTER_WEIGHTS):
            raise InputError(f"{out / CERTIFICATE}: is of another adapter than that of {run} (adapter.sha256).")
    else:
        certificate = _merge(section, adapter_dir, out, options, chat, quantize)
    certificate["difference"] = None
    if recipe is not None and (compare_only or (not no_compare and options.certificate_rows)):
        certificate["difference"] = _difference(recipe, target, run, adapter, out, options)
    replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
    if certificate["difference"] is not None:
        print(difference_text(certificate["difference"], certificate["base"]["weights"]))


def _check_options(
    to: str, rank: int | None, dtype: str | None, quantize: str | None, base: str | None, no_compare: bool, only: bool
) -> None:
    """Raise InputError for an option that has no effect beside the others."""
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
    given = {"--dtype": dtype, "--quantize": quantize, "--base": base, "--no-compare": no_compare or None}
    if only and (extra := [name for name, value in given.items() if value is not None]):
        raise InputError(f"--compare-only: measures the export as it is; drop {extra[0]}.")


class Chat(NamedTuple):
    """What a run was trained with, for those who will talk to the export.

    Attributes:
        template: the chat template.
        system: the system prompt.
        beside: the template, where it is not the base's own: an adapter needs it beside its files.
    """

    template: str | None
    system: str | None
    beside: str | None


def chat_of(target: Artifact) -> Chat:
    """Of a run, or of an adapter with a template beside it."""
    from qvera.data import resolve_template
    from qvera.evaluation.load import template_beside, template_of
    from qvera.models.tokenizer import load_tokenizer
    from qvera.tasks import task_of

    recipe = target.recipe
    if recipe is None:
        beside = template_beside(target)
        return Chat(beside, None, beside)
    if not task_of(recipe).has_answers:
        return Chat(None, None, None)
    tokenizer = load_tokenizer(target.section)
    template = resolve_template(template_of(recipe, target.run), tokenizer).jinja
    own = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return Chat(template, recipe.data.system, None if template == own else template)


def _merge(
    section: ModelSection, adapter_dir: Path, out: Path, options: ExportSection, chat: Chat, quantize: str | None
) -> dict[str, Any]:
    """Write the merged checkpoint; returns its certificate."""
    from qvera.exporting import export_merged
    from qvera.exporting.quantized import errors_text, export_quantized

    with progress("Merging") as show:
        if quantize is None:
            certificate = export_merged(
                adapter_dir,
                section,
                out,
                options,
                chat_template=chat.template,
                progress=lambda done, total, name: show(f"Merging: {done} of {total} tensors ({name})"),
            )
        else:
            certificate = export_quantized(
                adapter_dir, section, out, options, quantize, chat_template=chat.template, progress=show
            )
    files, changed = certificate["files"], len(certificate["delta"])
    size = sum((out / name).stat().st_size for name in files)
    print(f"{formatting.size(size)} in {len(files)} file(s) in {out}, {changed} weights changed")
    if quantize is not None:
        print(errors_text(certificate["quantized"]))
    if certificate["base"]["stored_in_4_bits"]:
        print(f"merged into the dequantized weights of {section.path}, which is stored in 4 bits")
    return certificate


def _merge_to_gguf(
    section: ModelSection, adapter_dir: Path, out: Path, options: ExportSection, dtype: str, chat: Chat
) -> None:
    """--to gguf."""
    from qvera.exporting.gguf import export_gguf

    with progress("Merging") as show:
        certificate = export_gguf(
            adapter_dir,
            section,
            out,
            options,
            dtype,
            chat_template=chat.template,
            system=chat.system,
            progress=lambda done, total, name: show(f"Merging: {done} of {total} tensors ({name})"),
        )
    (file,) = certificate["files"]
    size = formatting.size((out / file).stat().st_size)
    print(f"{size} in {out / file}, {len(certificate['delta'])} weights changed")
    print(f"Ollama takes it with: ollama create NAME -f {shlex.quote(str(out / 'Modelfile'))}")


def _export_gguf_lora(
    section: ModelSection, adapter_dir: Path, out: Path, dtype: str, rank: int | None, chat: Chat
) -> None:
    """--to gguf-lora."""
    import torch

    from qvera.adapters.files.adapter_file import read_config
    from qvera.exporting import lora
    from qvera.exporting.deltas import read_deltas
    from qvera.exporting.gguf import export_gguf_lora
    from qvera.models.model_config import empty_model

    require_no_added_tokens(read_config(adapter_dir), adapter_dir, "--to gguf-lora")
    adapter = read_deltas(adapter_dir, empty_model(section), section)
    factors = lost = None
    if rank is not None:
        whole = ((name, delta.lora()) for name, delta in adapter.layers.items())
        factors, errors = lora.truncate_all(whole, adapter.rank, rank, torch.float32)
        lost = lora.truncation_text(errors, adapter.rank, rank)
    size = export_gguf_lora(
        adapter, adapter_dir, section, out, dtype, factors, chat_template=chat.template, system=chat.system
    )
    if lost is not None:
        print(lost)
    print(f"{formatting.size(size)} in {out}: LoRA of rank {rank or adapter.rank} on {len(adapter.layers)} linears")
    print(f"Put the path of the base's GGUF file into {out / 'Modelfile'} for Ollama, or name both files to llama.cpp.")


def _export_adapter(
    to: str, section: ModelSection, adapter_dir: Path, out: Path, dtype: torch.dtype, rank: int | None, chat: Chat
) -> dict[str, Any]:
    """--to lora and --to peft; returns the certificate."""
    from qvera.adapters.files.adapter_file import read_config
    from qvera.exporting.deltas import read_deltas
    from qvera.exporting.lora import export_stock_vera, serving_text
    from qvera.models.model_class import CAUSAL_LM
    from qvera.models.model_config import empty_model
    from qvera.utils import memory

    config = read_config(adapter_dir)
    require_no_added_tokens(config, adapter_dir, f"--to {to}")
    model_class = getattr(config, "model_class", CAUSAL_LM)
    adapter = read_deltas(adapter_dir, empty_model(section, None, model_class), section)
    errors = None
    if to == "peft":
        size = export_stock_vera(adapter, out, chat.beside)
        print(f"{formatting.size(size)} in {out}: PEFT's VeRA of rank {adapter.rank}, projections included")
    else:
        errors = write_lora(adapter, out, dtype, adapter.rank, rank, None, chat.beside)
        if not model_class.has_own_head:
            print(serving_text(rank or adapter.rank, adapter.magnitude))
    return {
        "format": 1,
        "kind": to,
        "base": {"path": section.path, "revision": section.revision},
        "adapter": adapter.facts(adapter_dir),
        "rank": rank or adapter.rank,
        "dtype": str(dtype).removeprefix("torch.") if to == "lora" else "float32",
        "files": {ADAPTER_WEIGHTS: file_sha256(out / ADAPTER_WEIGHTS)},
        "relative_errors": errors,
        "difference": None,
        "versions": memory.versions(),
    }


def write_lora(
    adapter: AdapterDeltas,
    out: Path,
    dtype: torch.dtype,
    own_rank: int,
    rank: int | None,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] | None,
    chat_template: str | None,
) -> dict[str, float] | None:
    """Print errors, rank and size, and write a LoRA: of ``own_rank``, where it is exact, or cut to ``rank``.

    ``factors`` are those of ΔW = B A by layer, as `export_lora` takes them; None: those of ``adapter``. Where there is
    a ``chat_template``, it is written beside them. Returns the error of each layer where it is cut.
    """
    from qvera.exporting import lora

    errors = None
    kind = "DoRA" if adapter.magnitude else "LoRA"
    if rank is not None:
        whole = factors.items() if factors else ((name, delta.lora()) for name, delta in adapter.layers.items())
        factors, errors = lora.truncate_all(whole, own_rank, rank, dtype)
        text = lora.truncation_text(errors, own_rank, rank)
    else:
        text = f"{kind} of rank {own_rank}: {lora.rounding_text(dtype)}"
    size = formatting.size(lora.export_lora(adapter, out, dtype, factors, chat_template))
    print(text)
    print(f"{size} in {out}: {kind} of rank {rank or own_rank} on {len(adapter.layers)} linears, for stock PEFT")
    return errors


def require_no_added_tokens(config: object, adapter_dir: Path, what: str) -> None:
    """Refuse an adapter that adds tokens, for formats that hold only factors of ΔW."""
    if tokens := getattr(config, "added_tokens", None):
        raise InputError(
            f"{adapter_dir}: adds the tokens {', '.join(tokens)}, whose rows of embedding and head have no place in "
            f"what {what} writes. Export it with --to merged, whose checkpoint and tokenizer have them."
        )


def _lora_difference(recipe: Recipe, target: Artifact, out: Path, options: ExportSection) -> dict[str, Any]:
    """What the cut costs on held-out rows, printed too."""
    from qvera.exporting.lora_scores import compare_lora, scores_text

    def measure() -> dict[str, Any]:
        with progress(f"Loading {target.path}") as show:
            return compare_lora(recipe, target, out, options.certificate_rows, console, show)

    found = _measured(measure, "Export again to measure it, or use `qvera eval` on either.")
    print(f"not measured: {found['not_measured']}" if "not_measured" in found else scores_text(found))
    return found


def _measured(measure: Callable[[], dict[str, Any]], again: str) -> dict[str, Any]:
    """What ``measure`` gives. If data is gone or memory is short, it says so and the export stands."""
    import torch

    try:
        return measure()
    except (InputError, OSError, ValueError) as error:
        return {"not_measured": f"{error} {again}"}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return {"not_measured": f"the memory gave out. {again}"}


def _difference(
    recipe: Recipe, target: Artifact, run: Path, adapter: str | None, out: Path, options: ExportSection
) -> dict[str, Any]:
    """The measured part of a merged export's certificate; ``run`` and ``adapter`` as they were named."""
    from qvera.data import build_datasets
    from qvera.evaluation.load import open_target
    from qvera.evaluation.named_adapters import rows_to_compare
    from qvera.exporting.compare import measure_difference, too_little_memory
    from qvera.tasks import task_of

    option = "" if adapter is None else f" --adapter {shlex.quote(adapter)}"
    again = f"`qvera export {run} {out}{option} --compare-only` measures it later, or on a larger machine."

    def measure() -> dict[str, Any]:
        summary = None if target.run is None else try_read_json(target.run / "run.json")
        trained = (summary or {}).get("model", {})
        if (reason := too_little_memory(out, trained.get("base_bytes", 0))) is not None:
            return {"not_measured": f"{reason}. {again}"}
        with progress(f"Loading {run}"):
            opened = open_target(target)
        task = task_of(recipe)
        labels = opened.labels if task.exported_class.has_own_head else None
        datasets = build_datasets(recipe.data, opened.base.tokenizer, console, labels=labels)
        rows, split = rows_to_compare(datasets, target.name)
        rows = rows[: options.certificate_rows]
        with progress("Comparing the trained with the exported model"):
            return {"split": split, **measure_difference(opened.model, out, rows, datasets.pad_id, task, labels)}

    return _measured(measure, again)
