"""Export a run or an adapter: as a merged checkpoint, a LoRA, PEFT's VeRA, or a GGUF file."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console

from qvera.adapters.files.adapter_file import read_config, require_base
from qvera.config.schema import ExportSection, Recipe
from qvera.data import build_datasets, resolve_template
from qvera.evaluation.load import (
    Artifact,
    open_target,
    require_adapter,
    require_answers,
    template_beside,
    template_of,
)
from qvera.evaluation.named_adapters import adapters_root, rows_to_compare
from qvera.exporting import lora
from qvera.exporting.compare import compare_lora, difference_text, measure_difference, scores_text, too_little_memory
from qvera.exporting.deltas import AdapterDeltas, read_deltas
from qvera.exporting.gguf.files import export_gguf, export_gguf_lora
from qvera.exporting.merged import export_merged
from qvera.exporting.quantized import errors_text, export_quantized
from qvera.models.loader import fingerprint_of
from qvera.models.model_class import CAUSAL_LM, empty_model
from qvera.models.tokenizer import load_tokenizer
from qvera.tasks import task_of
from qvera.utils import formatting, memory
from qvera.utils.atomic import replace_text, require_empty
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256, read_json, try_read_json
from qvera.utils.paths import ADAPTER_WEIGHTS, CERTIFICATE
from qvera.utils.status_line import status_line

To = Literal["merged", "lora", "peft", "gguf", "gguf-lora"]


def export(
    target: Artifact,
    out: Path,
    *,
    to: To = "merged",
    rank: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    base: Literal["original", "dequantized"] | None = None,
    compare: bool = True,
    compare_only: bool = False,
    console: Console | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any] | None:
    """Export an adapter; the arguments are the options of ``qvera export``.

    Args:
        out: a new or empty directory, or this export unfinished.
        compare: measure the difference between the trained and the exported model, for the certificate.
        compare_only: only measure the finished export in ``out``.
        say: takes each line of the result.

    Returns:
        The certificate; None for ``gguf-lora``.

    Raises:
        InputError: the arguments contradict each other, or ``target`` can't be written so.
        RunFailed: a weight is out of the dtype's range, or the disk is full.
        Interrupted: a signal came; the same call continues.
    """
    _require_fitting(to, rank, dtype, quantize, base, compare, compare_only)
    options = target.recipe.export if target.recipe is not None else ExportSection()
    written = dtype or options.dtype
    options = options.replace(dtype="float32" if written == "q8_0" else written, base=base or options.base)
    one = _Export(target, require_adapter(target), out, options, chat_of(target), console or Console(stderr=True), say)
    if to == "merged":
        return one.measured(one.checked() if compare_only else one.merged(quantize), compare, compare_only)
    require_empty(out)  # before factors are cut, or a model is converted
    if to.startswith("gguf"):
        require_answers(target, f"--to {to}")
    if to == "gguf":
        return one.gguf(written)
    require_base(read_config(one.adapter), one.adapter, target.section.path, fingerprint_of(target.section))
    if to == "gguf-lora":
        one.gguf_lora(written, rank)
        return None
    certificate = one.factors(to, rank)
    if rank is not None and compare:
        certificate["difference"] = one.cost_of_cut()
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
    """Chat template and system prompt of a run; ``beside`` is the template where it is not the base's own."""

    template: str | None
    system: str | None
    beside: str | None


def chat_of(target: Artifact) -> Chat:
    """From the run, or from a template beside the adapter."""
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


@dataclasses.dataclass
class _Export:
    """Each method writes one kind of export, says what it wrote, and returns the certificate."""

    target: Artifact
    adapter: Path
    out: Path
    options: ExportSection
    chat: Chat
    console: Console
    say: Callable[[str], None]

    def merged(self, quantize: str | None) -> dict[str, Any]:
        section, out, template = self.target.section, self.out, self.chat.template
        with status_line(self.console, "Merging") as show:
            if quantize is None:
                certificate = export_merged(
                    self.adapter,
                    section,
                    out,
                    self.options,
                    chat_template=template,
                    progress=lambda done, total, name: show(f"Merging: {done} of {total} tensors ({name})"),
                )
            else:
                certificate = export_quantized(
                    self.adapter, section, out, self.options, quantize, chat_template=template, progress=show
                )
        files, changed = certificate["files"], len(certificate["delta"])
        size = sum((out / name).stat().st_size for name in files)
        self.say(f"{formatting.size(size)} in {len(files)} file(s) in {out}, {changed} weights changed")
        if quantize is not None:
            self.say(errors_text(certificate["quantized"]))
        if certificate["base"]["stored_in_4_bits"]:
            self.say(f"merged into the dequantized weights of {section.path}, which is stored in 4 bits")
        return certificate

    def checked(self) -> dict[str, Any]:
        """The certificate of the finished merge in ``out``. InputError: it can't be compared."""
        path, file = self.target.path, self.out / CERTIFICATE
        if not self.options.certificate_rows:
            raise InputError(
                f"{path}: --compare-only compares on as many rows as export.certificate_rows of its recipe says, and "
                "that is 0. Set it to 16 there."
            )
        certificate = read_json(file, "the certificate of a finished merged export", ("adapter", "base"))
        if certificate.get("kind") != "merged":
            raise InputError(
                f"{self.out}: --compare-only measures merged exports (--to merged), and this is another one."
            )
        if self.target.recipe is None:
            raise InputError(f"{path}: --compare-only takes a run; an adapter alone has no rows to compare on.")
        if certificate["adapter"].get("sha256") != file_sha256(self.adapter / ADAPTER_WEIGHTS):
            raise InputError(f"{file}: is of another adapter than that of {path} (adapter.sha256).")
        return certificate

    def measured(self, certificate: dict[str, Any], compare: bool, compare_only: bool) -> dict[str, Any]:
        """Write the certificate again, with the difference between the trained and the exported model."""
        certificate["difference"] = None
        if self.target.recipe is not None and (compare_only or (compare and self.options.certificate_rows)):
            certificate["difference"] = self._difference(self.target.recipe)
        replace_text(self.out / CERTIFICATE, json.dumps(certificate, indent=1))
        if certificate["difference"] is not None:
            self.say(difference_text(certificate["difference"], certificate["base"]["weights"]))
        return certificate

    def gguf(self, dtype: str) -> dict[str, Any]:
        with status_line(self.console, "Merging") as show:
            certificate = export_gguf(
                self.adapter,
                self.target.section,
                self.out,
                self.options,
                dtype,
                chat_template=self.chat.template,
                system=self.chat.system,
                progress=lambda done, total, name: show(f"Merging: {done} of {total} tensors ({name})"),
            )
        (file,) = certificate["files"]
        size = formatting.size((self.out / file).stat().st_size)
        self.say(f"{size} in {self.out / file}, {len(certificate['delta'])} weights changed")
        self.say(f"Ollama takes it with: ollama create NAME -f {shlex.quote(str(self.out / 'Modelfile'))}")
        return certificate

    def gguf_lora(self, dtype: str, rank: int | None) -> None:
        section, out, chat = self.target.section, self.out, self.chat
        require_no_added_tokens(read_config(self.adapter), self.adapter, "--to gguf-lora")
        adapter = read_deltas(self.adapter, empty_model(section), section)
        factors = lost = None
        if rank is not None:
            whole = ((name, delta.lora()) for name, delta in adapter.layers.items())
            factors, errors = lora.truncate_all(whole, adapter.rank, rank, torch.float32)
            lost = lora.truncation_text(errors, adapter.rank, rank)
        size = export_gguf_lora(
            adapter, self.adapter, section, out, dtype, factors, chat_template=chat.template, system=chat.system
        )
        if lost is not None:
            self.say(lost)
        linears = f"LoRA of rank {rank or adapter.rank} on {len(adapter.layers)} linears"
        self.say(f"{formatting.size(size)} in {out}: {linears}")
        where = f"Put the path of the base's GGUF file into {out / 'Modelfile'} for Ollama"
        self.say(f"{where}, or name both files to llama.cpp.")

    def factors(self, to: str, rank: int | None) -> dict[str, Any]:
        """For --to lora and --to peft."""
        section, out, dtype = self.target.section, self.out, self.options.dtype
        config = read_config(self.adapter)
        require_no_added_tokens(config, self.adapter, f"--to {to}")
        model_class = getattr(config, "model_class", CAUSAL_LM)
        adapter = read_deltas(self.adapter, empty_model(section, None, model_class), section)
        errors = None
        if to == "peft":
            size = lora.export_stock_vera(adapter, out, self.chat.beside)
            self.say(f"{formatting.size(size)} in {out}: PEFT's VeRA of rank {adapter.rank}, projections included")
        else:
            tensors = getattr(torch, dtype)
            errors = write_lora(adapter, out, tensors, adapter.rank, rank, None, self.chat.beside, self.say)
            if not model_class.has_own_head:
                self.say(lora.serving_text(rank or adapter.rank, adapter.magnitude))
        return {
            "format": 1,
            "kind": to,
            "base": {"path": section.path, "revision": section.revision},
            "adapter": adapter.facts(self.adapter),
            "rank": rank or adapter.rank,
            "dtype": dtype if to == "lora" else "float32",
            "files": {ADAPTER_WEIGHTS: file_sha256(out / ADAPTER_WEIGHTS)},
            "relative_errors": errors,
            "difference": None,
            "versions": memory.versions(),
        }

    def cost_of_cut(self) -> dict[str, Any] | None:
        """What a smaller rank costs on held-out rows; None where there are none."""
        recipe, limit = self.target.recipe, self.options.certificate_rows
        if recipe is None or not limit:
            return None

        def measure() -> dict[str, Any]:
            with status_line(self.console, f"Loading {self.target.path}") as show:
                return compare_lora(recipe, self.target, self.out, limit, self.console, show)

        found = _measured(measure, "Export again to measure it, or use `qvera eval` on either.")
        self.say(f"not measured: {found['not_measured']}" if "not_measured" in found else scores_text(found))
        return found

    def _difference(self, recipe: Recipe) -> dict[str, Any]:
        target, out, console = self.target, self.out, self.console
        option = f" --adapter {shlex.quote(target.name)}" if target.name and adapters_root(target.path) else ""
        again = f"`qvera export {target.path} {out}{option} --compare-only` measures it later, or on a larger machine."

        def measure() -> dict[str, Any]:
            summary = None if target.run is None else try_read_json(target.run / "run.json")
            trained = (summary or {}).get("model", {})
            if (reason := too_little_memory(out, trained.get("base_bytes", 0))) is not None:
                return {"not_measured": f"{reason}. {again}"}
            with status_line(console, f"Loading {target.path}"):
                opened = open_target(target)
            task = task_of(recipe)
            labels = opened.labels if task.exported_class.has_own_head else None
            datasets = build_datasets(recipe.data, opened.base.tokenizer, console, labels=labels)
            rows, split = rows_to_compare(datasets, target.name)
            rows = rows[: self.options.certificate_rows]
            with status_line(console, "Comparing the trained with the exported model"):
                return {"split": split, **measure_difference(opened.model, out, rows, datasets.pad_id, task, labels)}

        return _measured(measure, again)


def write_lora(
    adapter: AdapterDeltas,
    out: Path,
    dtype: torch.dtype,
    own_rank: int,
    rank: int | None,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] | None,
    chat_template: str | None,
    say: Callable[[str], None],
) -> dict[str, float] | None:
    """Write a LoRA, exact with ``own_rank`` or cut to ``rank``, and say its errors, rank and size.

    ``factors`` as for `export_lora`. Returns the error of each layer where it is cut.
    """
    errors = None
    kind = "DoRA" if adapter.magnitude else "LoRA"
    if rank is not None:
        whole = factors.items() if factors else ((name, delta.lora()) for name, delta in adapter.layers.items())
        factors, errors = lora.truncate_all(whole, own_rank, rank, dtype)
        text = lora.truncation_text(errors, own_rank, rank)
    else:
        text = f"{kind} of rank {own_rank}: {lora.rounding_text(dtype)}"
    size = formatting.size(lora.export_lora(adapter, out, dtype, factors, chat_template))
    say(text)
    say(f"{size} in {out}: {kind} of rank {rank or own_rank} on {len(adapter.layers)} linears, for stock PEFT")
    return errors


def require_no_added_tokens(config: object, adapter_dir: Path, what: str) -> None:
    """Refuse added tokens, for formats that hold only factors of ΔW."""
    if tokens := getattr(config, "added_tokens", None):
        raise InputError(
            f"{adapter_dir}: adds the tokens {', '.join(tokens)}, whose rows of embedding and head have no place in "
            f"what {what} writes. Export it with --to merged, whose checkpoint and tokenizer have them."
        )


def _measured(measure: Callable[[], dict[str, Any]], again: str) -> dict[str, Any]:
    """If data or memory is missing, the result says so, and the export stands."""
    try:
        return measure()
    except (InputError, OSError, ValueError) as error:
        return {"not_measured": f"{error} {again}"}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return {"not_measured": f"the memory gave out. {again}"}
