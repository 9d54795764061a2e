"""Merge W + ΔW some rows at a time, and write the checkpoint in 16 bits, or from that in 4 bits.

Each file of the base is read once, from start to end. ``config.json`` is written last, because without it no tool takes
a directory for a model. An interrupted export continues from whole shards.

`export_quantized` measures the error of each weight: ΔW lies partly between two values of a 4-bit type, and rounding
loses that part.
"""

import contextlib
import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from qvera.adapters.adapter_file import read_config, require_tokens
from qvera.adapters.save_load import portable_name
from qvera.config.sections import ExportSection, ModelSection
from qvera.data.tokenization import own_turn_end, pad_id_of
from qvera.exporting.base import (
    PackedBaseReader,
    TrainedBaseReader,
    one_thread_each,
    open_adapter_on_base,
    read_trained_weight,
)
from qvera.exporting.deltas import TokenTable, token_tables
from qvera.models import quantization
from qvera.models.conversion import as_stacks, fused_tensors
from qvera.models.experts import expert_specs
from qvera.models.hub import base_directory
from qvera.models.model_class import CAUSAL_LM, ModelClass, empty_model
from qvera.models.quantize_checkpoint import quantize_checkpoint, read_source
from qvera.models.quantized_record import problem_of, read_record
from qvera.models.safetensors_stream import (
    Block,
    CheckpointReader,
    in_order,
    read_tensor,
    write_index,
    write_shard,
)
from qvera.models.stored_weights import packed_weights, without_statistics
from qvera.models.tokenizer import ADDED_ROWS, copy_processor, ids_of, load_processor, save_tokenizer
from qvera.utils import accelerator, memory
from qvera.utils.cache_dir import StageProgress
from qvera.utils.errors import InputError, Interrupted, RunFailed
from qvera.utils.files import (
    ADAPTER_WEIGHTS,
    CERTIFICATE,
    OutputDirectory,
    disk_errors,
    file_sha256,
    place_files,
    read_json,
    replace_text,
    require_new_or_unfinished,
    require_space,
    try_read_json,
)
from qvera.utils.safetensors_io import TensorSpec, base_fingerprint, checkpoint_tensors, file_stamps, grouped_by_bytes
from qvera.utils.signals import StopRequests

_MERGING_BYTES = 2 * 10**9
"""Free memory needed on an accelerator: the pair of a 70B at rank 1024 in fp32 is 230 MB, and blocks add to it."""
Merged = tuple[Block, torch.Tensor, tuple[float, float] | None]
"""A block, its rows in the output's dtype, and max and sum of |ΔW| in them where the weight is adapted."""
Progress = Callable[[int, int, str], None]  # called with (finished tensors, all tensors, tensor name)


class Merging:
    """A base and its adapter, opened and compared before anything is written. Yields merged rows (`merged`)."""

    reader: CheckpointReader

    def __init__(
        self, adapter_dir: Path, section: ModelSection, options: ExportSection, chat_template: str | None = None
    ) -> None:
        self.adapter_dir, self.section, self.options = adapter_dir, section, options
        self.base = base = open_adapter_on_base(adapter_dir, section)
        self.adapter, self.dtype = base.adapter, getattr(torch, options.dtype)
        if getattr(base.config, "quantization_config", None) is not None:
            if options.base == "original":
                raise InputError(
                    f"--base original: {base.directory} is stored in 4 bits, so the original weights are not there. "
                    "Use --base dequantized, or point model.path at the 16-bit checkpoint it was made from."
                )
            del base.config.quantization_config
        self.tokenizer = cast(Any, load_processor(section, base.model_class))
        if chat_template is not None:  # models of images have none
            own = self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None
            if chat_template != own:
                self.tokenizer.chat_template = chat_template
        self.added_tokens = ids_of(self.tokenizer, section.added_tokens)
        require_tokens(self.adapter.config, adapter_dir, self.added_tokens)
        # Shapes of the output: those of the files, but for experts and added tokens.
        shapes = {entry.name: entry.shape for entry in base.entries}
        own = {file: base.model.get_parameter(n) for n in expert_specs(base.model) if (file := base.names.get(n))}
        self.flat = {name: tuple(weight.shape) for name, weight in own.items() if weight.dim() == 2}
        """Experts that the file has one below the other."""
        shapes |= self.flat
        self.tables: dict[str, TokenTable] = {}
        if self.added_tokens:
            self.tables = token_tables(base.model, self.added_tokens, adapter_dir, shapes, base.names)
            shapes |= {name: table.shape for name, table in self.tables.items()}
        self.device = accelerator.current_device()
        if memory.available_bytes(self.device) < _MERGING_BYTES:  # something else has filled it
            self.device = torch.device("cpu")
        self.deltas = {
            base.names.get(own := name if delta.experts else f"{name}.weight", own): delta
            for name, delta in self.adapter.on(self.device).layers.items()
        }
        # Experts that are single in the files. A dequantized base changes all of them, else a ΔW changes some.
        changed = base.fused.keys() if options.base == "dequantized" else base.fused.keys() & self.deltas.keys()
        self.expert_sources = {
            source: (base.fused[name], *place)
            for name in changed
            for source, place in base.fused[name].expert_of().items()
        }
        """Maps a tensor of one expert in the files to its stack, the expert's number, and its place in the expert."""
        self.merged_expert = functools.lru_cache(maxsize=4)(self._merged_expert)  # its tensors come one after the other
        self.head = dict(sorted(self.adapter.head.items()))  # tensors of a classification head, fp32
        # in the order of the base's files; then those of the head
        whole = {entry.name: entry.dtype for entry in base.entries if not entry.dtype.is_floating_point}
        self.parts: dict[str, list[str]] = {}
        """Maps a tensor of the files to those that have its rows (`conversion.in_parts`), in most cases itself."""
        for entry in base.entries:
            self.parts.setdefault(entry.rows_of or entry.name, []).append(entry.name)
        self.specs = []
        for name, parts in self.parts.items():
            # Parts of one tensor of the files lie one below the other.
            first, *others = (shapes[part] for part in parts)
            shape = (first[0] + sum(other[0] for other in others), *first[1:]) if others else first
            self.specs.append(TensorSpec(name, whole.get(name, self.dtype), shape))
        self.specs += [TensorSpec(name, torch.float32, tuple(tensor.shape)) for name, tensor in self.head.items()]
        self.layers: dict[str, dict[str, float]] = {}  # adapted weight → max and mean |ΔW|, of the merged ones

    def identity(self) -> dict[str, Any]:
        """Return all that must be equal for an interrupted export to continue.

        The base's files are compared by size, time and inode, because their SHA-256 is only known after merging.
        """
        section, token_rows = self.section, self.adapter_dir / ADDED_ROWS
        return {
            "adapter": self.adapter.sha256,
            "tokens": file_sha256(token_rows) if token_rows.is_file() else None,
            "base": [str(self.base.directory.resolve()), self.base.stamps],
            "options": self.options.model_dump(exclude={"certificate_rows"}),  # they are compared afterwards
            "device": self.device.type,  # another one may round otherwise
            "quantization": [section.quantization, section.double_quant, str(self.base.compute)],
        }

    @contextlib.contextmanager
    def merged(
        self, skip: Collection[str], known: dict[str, str], check: Callable[[], None], progress: Progress | None
    ) -> Iterator[Iterator[tuple[Block, torch.Tensor]]]:
        """Yield merged rows except those of ``skip``, in order. As they are read, `layers` fills up.

        ``known``: SHA-256 of files already hashed. ``check`` is called at each block, and raises to stop.
        """
        base = self.base
        if base.packed or self.options.base == "dequantized":
            self.reader = base.reader(self.section, known)
        else:
            self.reader = CheckpointReader(base.stored, base.stamps, known)
        # Tensors that are not merged are still read, because the certificate has the hash of each file.
        skip = {entry.name for entry in base.stored} - {entry.name for entry in base.entries} | set(skip)

        def counted(results: Iterator[Merged]) -> Iterator[tuple[Block, torch.Tensor]]:
            largest = total = 0.0
            done = sum(entry.name in skip for entry in base.entries)
            for block, rows, found in results:
                check()
                if found is not None:
                    largest, total = max(largest, found[0]), total + found[1]
                    if block.last:
                        self.layers[block.entry.name] = {"max_abs": largest, "mean_abs": total / block.entry.numel}
                        largest = total = 0.0
                if block.last:
                    done += 1
                    if progress is not None:
                        progress(done, len(base.entries), block.entry.name)
                yield block, rows

        with (
            one_thread_each() as workers,
            contextlib.closing(in_order(self.reader.blocks(skip), self._merge, workers, 3 * workers + 2)) as results,
        ):
            yield counted(results)

    def _merge(self, block: Block) -> Merged:
        """Add ΔW to a block of W in fp32, and round the sum once to the output's dtype.

        The host waits for an accelerator twice a block: for the numbers and for the rows. RunFailed: NaN or Inf.
        """
        if block.entry.name in self.expert_sources:
            return self._merge_expert(block)
        name, weight, found = block.entry.name, block.rows, None
        if not weight.is_floating_point() and name not in self.base.packed:
            return block, weight, None
        numbers: list[torch.Tensor] = []
        delta = self.deltas.get(name)
        if name in self.tables:
            weight = self.tables[name].put(weight, block.first, block.last)
        if isinstance(self.reader, (TrainedBaseReader, PackedBaseReader)):
            weight = self.reader.as_trained(block, weight)
        if delta is None:
            exact = weight if self.dtype == weight.dtype else weight.to(torch.float32)
        else:
            exact = delta.rows(block.first, len(weight), weight)
            numbers += [*torch.aminmax(exact), exact.abs().sum()]
            exact.add_(weight.to(exact.device))  # in fp32, like weight.float() + ΔW
        result = exact.to(self.dtype).contiguous()
        result = result.flatten(0, 1) if name in self.flat else result
        numbers += torch.aminmax(result)  # both are NaN where one element is
        *of_delta, low, high = torch.stack([number.float() for number in numbers]).tolist()
        if of_delta:
            found = (max(-of_delta[0], of_delta[1]), of_delta[2])
        if not (math.isfinite(low) and math.isfinite(high)):
            raise self._not_finite(block, exact)
        return block, result.cpu(), found

    def _not_finite(self, block: Block, exact: torch.Tensor) -> RunFailed:
        """Find out what is wrong: the base itself, the sum (``exact``), or only its rounding to the output's dtype."""
        what = "has NaN or Inf after merging. Look at this adapter"
        if not torch.isfinite(block.rows.float()).all():
            what = f"the base weight itself has NaN or Inf ({block.entry.file}). Mend or replace it"
        elif torch.isfinite(exact.float()).all():
            largest, most = exact.abs().max().item(), torch.finfo(self.dtype).max
            what = f"has values up to {largest:.6g}, beyond {self.dtype} (largest {most:g}). Take --dtype bfloat16"
        return RunFailed(f"{block.entry.name}: {what}; this shard was not finished.")

    def _merged_expert(self, target: str, number: int) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Return W + ΔW and ΔW of one expert in fp32, each cut into the tensors that the base's files have of it."""
        fused, section = self.base.fused[target], self.section
        weight = fused.part(number, lambda entry, _: read_tensor(entry, self.base.stamps))
        is_quantized = section.quantization in ("nf4", "fp4") and weight.numel() % 64 == 0
        if self.options.base == "dequantized":
            compute = self.base.compute
            weight = quantization.quantized_reader(weight, section, compute)() if is_quantized else weight.to(compute)
        if (delta := self.deltas.get(target)) is None:
            return fused.split(weight), None
        change = delta.rows(number, 1)[0].cpu()
        return fused.split(change + weight), fused.split(change)

    def _merge_expert(self, block: Block) -> Merged:
        """Do what `_merge` does, for rows of a tensor of one expert."""
        name, rows = block.entry.name, slice(block.first, block.first + len(block.rows))
        fused, number, place = self.expert_sources[name]
        merged, changes = self.merged_expert(fused.spec.name, number)
        exact = merged[place][rows]
        result, found = exact.to(self.dtype), None
        if not torch.isfinite(result).all():
            raise self._not_finite(block, exact)
        if changes is not None:
            change = changes[place][rows].abs()
            found = change.max().item(), change.sum().item()
        return block, result.contiguous(), found

    def config(self) -> PretrainedConfig:
        """Make the config of the merged model: its dtype, its tokens, no quantization."""
        config, section = self.base.config, self.section
        config.dtype = self.dtype
        for table in self.tables.values():
            config.get_text_config().vocab_size = table.shape[0]
        if section.eos_token is not None:
            config.eos_token_id = self.tokenizer.eos_token_id
        if section.pad_token is not None:
            config.pad_token_id = self.tokenizer.pad_token_id
        own = [type(self.base.model).__name__]
        if self.head and not self.base.model_class.reads_images:
            config.get_text_config().pad_token_id = pad_id_of(self.tokenizer)
        config.architectures = own if self.head else config.architectures or own
        return config

    def save_config(self, directory: Path) -> None:
        """Write config.json for transformers 5 and 4, which takes a default for each key that it does not find."""
        config = self.config()
        config.save_pretrained(directory)
        written, base = (read_json(place / "config.json", "a config") for place in (directory, self.base.directory))
        _add_keys_of_4(written, config.to_dict(), base)
        replace_text(directory / "config.json", json.dumps(written, indent=2, sort_keys=True) + "\n")

    def certificate(self, kind: str, files: dict[str, str]) -> dict[str, Any]:
        """Say what was merged into what, once all of the base is read; ``files`` maps names to SHA-256."""
        section, base = self.section, self.base
        trained_on: dict[str, Any] = {"quantization": section.quantization, "double_quant": section.double_quant}
        for weight in base.packed.values():  # what is in the file, whatever the recipe says
            trained_on = {"quantization": weight.quant_type, "double_quant": weight.double_quant}
        certificate = self.adapter.certificate(
            kind,
            section,
            self.adapter_dir,
            trained_on=trained_on,
            added_tokens=self.added_tokens,
            head=list(self.head),
            dtype=self.options.dtype,
            files=files,
            delta={e.name: self.layers[e.name] for e in base.entries if e.name in self.layers},  # in files' order
        )
        certificate["base"] |= {
            "weights": self.options.base,
            "stored_in_4_bits": bool(base.packed),
            "fingerprint": base.fingerprint,
            "sha256": {name: self.reader.sha256[name] for name in base.stamps},
        }
        return certificate


def _add_keys_of_4(written: dict[str, Any], known: dict[str, Any], base: dict[str, Any]) -> None:
    """Add the base's keys that transformers 5 has renamed or left out. ``known``: all that the config has now."""
    for key, value in base.items():
        if key.endswith("_config") and isinstance(value, dict) and isinstance(written.get(key), dict):
            _add_keys_of_4(written[key], known[key], value)
        elif key not in written and key != "quantization_config":
            written[key] = known.get("dtype" if key == "torch_dtype" else key, value)
    rope = written.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # of all layers; 4 has no form for several
        written.setdefault("rope_theta", rope["rope_theta"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        written.setdefault("rope_scaling", scaling if rope.get("rope_type", "default") != "default" else None)


_KEPT = "{done} of {total} shards are finished and kept. Make room and run the same command again; it resumes there."
_INTERRUPTED = "Stopped by {why} with {done} of {total} shards finished in {out}. The same command goes on from there."


def export_merged(
    adapter_dir: Path,
    section: ModelSection,
    out: Path,
    options: ExportSection,
    *,
    chat_template: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the merged checkpoint to ``out`` and return its certificate (also written as qvera_export.json).

    Args:
        section: the base that the adapter was trained on.
        options: dtype, base (original or dequantized), shard size.
        chat_template: the template of the training, for the tokenizer.

    Raises:
        InputError: adapter and base do not fit, or ``out`` holds something else.
        RunFailed: a merged weight is NaN, Inf, or too large for the dtype, or the disk is full. The same call
            continues.
        Interrupted: SIGINT or SIGTERM came. The same call continues.
    """
    require_new_or_unfinished(out, "export")  # before files are hashed
    merging = Merging(adapter_dir, section, options, chat_template)
    limit = options.max_shard_size_bytes
    shards = grouped_by_bytes(([s] for s in merging.specs), lambda spec: spec.size_bytes, limit)
    with StopRequests() as stop, OutputDirectory.open(out, merging.identity(), "export") as work:

        def told(text: str, **more: object) -> str:
            return text.format(done=len(work.shards), total=len(shards), out=out, **more)

        def check() -> None:
            if stop.asked:
                raise Interrupted(told(_INTERRUPTED, why=stop.asked))

        try:
            _write_shards(merging, shards, work, check, lambda: told(_KEPT), progress)
            certificate = merging.certificate("merged", work.shards)
            with disk_errors(f"{out}", told(_KEPT)):
                write_index(out, shards)
                place_files(out, functools.partial(save_tokenizer, merging.tokenizer, section))
                if merging.base.model_class.of_published(merging.base.config.architectures).takes_images:
                    place_files(out, functools.partial(copy_processor, section))
                if (published := merging.base.directory / "generation_config.json").is_file():
                    # as it is: transformers saves no changed one that samples without do_sample, as old ones do
                    generation = read_json(published, "a generation config")
                    if section.eos_token is not None:
                        generation["eos_token_id"] = merging.tokenizer.eos_token_id
                    own = generation.get("eos_token_id")  # which in a base model may end a text, and no turn
                    ends = own if isinstance(own, list) else [own] if own is not None else []
                    if more := own_turn_end(merging.tokenizer) - set(ends):
                        generation["eos_token_id"] = [*ends, *more]
                    replace_text(out / "generation_config.json", json.dumps(generation, indent=2) + "\n")
                if section.trust_remote_code:  # a config that is saved brings its own code alone
                    code = list(merging.base.directory.glob("*.py"))
                    place_files(out, lambda scratch: [shutil.copy2(file, scratch) for file in code])
                # The config comes last: from then on the directory is a model.
                replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
                place_files(out, merging.save_config)
        except KeyboardInterrupt:
            raise Interrupted(told(_INTERRUPTED, why="Ctrl-C")) from None
        work.complete()
    return certificate


def _write_shards(
    merging: Merging,
    shards: list[tuple[str, list[TensorSpec]]],
    work: OutputDirectory,
    check: Callable[[], None],
    kept: Callable[[], str],
    progress: Progress | None,
) -> None:
    """Write the shards that are not finished. ``check`` raises to stop; ``kept`` says what an error leaves."""
    left = [(name, group) for name, group in shards if not work.has(name)]
    # Tensors of finished shards are skipped; what is known of their ΔW comes from the state file.
    done = {spec.name for spec in merging.specs} - {spec.name for _, group in left for spec in group}
    skip = {part for name in done for part in merging.parts.get(name, [name])}
    merging.layers = {name: facts for name, facts in work.facts.get("layers", {}).items() if name in skip}
    needed = sum(entry.numel for entry in merging.base.entries if entry.name not in skip) * merging.dtype.itemsize
    require_space(work.out, needed, "the rest of the export" if skip else "the export")
    header = merging.adapter.header(merging.section.path) | {"base_fingerprint": merging.base.fingerprint}

    with merging.merged(skip, work.facts.get("base", {}), check, progress) as results:
        head = (tensor for name, tensor in merging.head.items() if name not in skip)
        rows = itertools.chain((rows for _, rows in results), head)
        for name, group in left:
            with disk_errors(str(work.out / name), kept()):
                sha256 = write_shard(work.out / name, group, rows, header)
                work.facts.update(base=dict(merging.reader.sha256), layers=dict(merging.layers))
                work.finished(name, sha256)
        for _ in results:  # the rest of the files is only read for its hash
            raise RuntimeError("the shards were planned without some of the tensors")


def export_quantized(
    adapter_dir: Path,
    section: ModelSection,
    out: Path,
    options: ExportSection,
    quantization: str,
    *,
    chat_template: str | None = None,
    progress: StageProgress = lambda *_: None,
) -> dict[str, Any]:
    """Write the merged model to ``out`` in bitsandbytes' 4-bit format, and return its certificate (also written there).

    The merge is in .OUT.merged until the errors are measured. The same call continues an interrupted one.

    Args:
        section: the base; its double_quant and quant_storage also hold for the output.
        options: dtype of the merge and of what is not quantized, base, shard size.
        quantization: nf4 or fp4.

    InputError, RunFailed, Interrupted: as `export_merged` and `quantize_checkpoint`.
    """
    model_class = getattr(read_config(adapter_dir), "model_class", CAUSAL_LM)
    base, place = base_directory(section), out.absolute()
    is_dense = read_json(base / "config.json", "the config of a model").get("quantization_config") is None
    # Refused before the merge, which may take long.
    if is_dense and not read_source(section.replace(quantization=quantization), base, model_class).quantized:
        raise InputError(f"--quantize: {base} has no linear of a class that bitsandbytes quantizes. Leave it out.")
    merged = place.with_name(f".{place.name}.merged")
    target = ModelSection(
        path=str(merged),
        quantization=quantization,  # type: ignore[arg-type]
        double_quant=section.double_quant,
        quant_storage=section.quant_storage,
        trust_remote_code=section.trust_remote_code,
    )
    certificate, record = _merge_to_quantize(merged, adapter_dir, section, options), None
    if certificate is not None:  # a quantized copy that is whole, but was not measured
        record = read_record(out)
        if record is not None and not (out / CERTIFICATE).exists() and not any(out.glob(".qvera_quantize*")):
            source = read_source(target, merged, model_class)
            identity = source.identity({Path(name): digest for name, digest in certificate["files"].items()})
            record = record if record["identity"] == identity and problem_of(out) is None else None
        else:
            record = None
    if record is None:
        require_new_or_unfinished(out, "quantize")  # before anything is merged
    if certificate is None:
        certificate = export_merged(
            adapter_dir,
            section,
            merged,
            options,
            chat_template=chat_template,
            progress=functools.partial(progress, "merging"),
        )
    with StopRequests() as stop:

        def report(stage: str, done: int, total: int, what: str) -> None:
            progress(stage, done, total, what)
            if stop.asked:
                raise Interrupted(f"{stop.asked}: stopped. The same command goes on from there.")

        if record is None:
            source = read_source(target, merged, model_class)
            record = quantize_checkpoint(target, source, out, device=accelerator.current_device(), progress=report)
        errors = _weight_errors(merged, out, target, model_class, report)
    certificate |= {
        "files": {name: file["sha256"] for name, file in record["files"].items()},
        "quantized": {
            "quantization": quantization,
            "double_quant": section.double_quant,
            "relative_errors": errors,
        },
    }
    replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
    shutil.rmtree(merged)
    return certificate


def _merge_to_quantize(
    merged: Path, adapter_dir: Path, section: ModelSection, options: ExportSection
) -> dict[str, Any] | None:
    """Return the certificate of a merge that an interrupted call finished; None if there is none."""
    found = try_read_json(merged / CERTIFICATE) if (merged / "config.json").is_file() else None
    if found is None or any(merged.glob(".qvera_export*")):
        return None
    same = (
        found["adapter"]["sha256"] == file_sha256(adapter_dir / ADAPTER_WEIGHTS)
        and found["base"]["path"] == portable_name(section.path)
        and found["base"]["fingerprint"] == base_fingerprint(base_directory(section))
        and (found["base"]["weights"], found["dtype"]) == (options.base, options.dtype)
    )
    if not same:
        raise InputError(f"{merged}: holds the merge of another export that was interrupted. Delete it and try again.")
    return found


@torch.no_grad()
def _weight_errors(
    dense: Path, quantized: Path, section: ModelSection, model_class: ModelClass, progress: StageProgress
) -> dict[str, float]:
    """Map the name of each 4-bit weight to ‖Q(W) - W‖ / ‖W‖ (Frobenius), with W from ``dense``.

    One weight of ``dense`` is in memory at a time. ``progress`` may raise, to stop.
    """
    model = empty_model(section, base_directory(section.replace(path=str(quantized))), model_class)
    stored, originals = checkpoint_tensors(quantized), as_stacks(checkpoint_tensors(dense), model)
    packed = packed_weights(stored, model)
    reader = PackedBaseReader(stored, file_stamps(stored), {}, packed, torch.float32)
    source = PackedBaseReader(originals, file_stamps(originals), {}, {}, torch.float32)
    entries, fused = {entry.name: entry for entry in originals}, fused_tensors(originals, model)
    errors: dict[str, float] = {}
    for entry in without_statistics(stored, packed):
        if entry.name not in packed:
            continue
        progress("measuring", len(errors), len(packed), entry.name)
        if entry.name in entries:
            weight = read_trained_weight(source, entries[entry.name])
        else:  # experts that are single in the files
            tensor = fused[entry.name]
            parts = [tensor.part(i, lambda e, at: read_tensor(e, source.stamps, at)) for i in range(entry.shape[0])]
            weight = torch.stack(parts).float()
        # Sums in fp64 over blocks of rows, so no second copy of the weight is made.
        wrong = size = 0.0
        with open(entry.file, "rb", buffering=0) as handle:
            for block in reader.blocks_of(handle.fileno(), entry):
                rows = reader.as_trained(block, block.rows)
                exact = weight[block.first : block.first + len(rows)]
                wrong += (rows - exact).double().square().sum().item()
                size += exact.double().square().sum().item()
        errors[entry.name] = float((wrong / size) ** 0.5) if size else 0.0
    return errors
