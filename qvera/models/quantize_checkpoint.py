"""Quantize a 16-bit checkpoint to bitsandbytes' serialized 4-bit format, once: into $QVERA_CACHE/bases, or elsewhere.

Stock transformers loads the copy, and qvera maps it. Each source file is read once: one thread reads and hashes, one a
core quantizes, the calling one writes. Finished shards survive a kill. ``config.json`` is written last: without it
nothing takes a directory for a model. A copy in the cache is found again by content (`qvera.models.quantized_record`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from qvera.config.sections import ModelSection
from qvera.models import quantization
from qvera.models.conversion import (
    FusedTensor,
    Mxfp4Stack,
    as_named,
    as_stacks,
    fp8_factors,
    from_fp8,
    fused_tensors,
    is_decoded,
    mxfp4_stacks,
)
from qvera.models.experts import expert_specs
from qvera.models.hub import base_directory
from qvera.models.model_class import CAUSAL_LM, ModelClass, empty_model, require_own_weights
from qvera.models.quantized_record import BASES, RECORD, content_identity, problem_of, read_record, settings_of
from qvera.models.safetensors_stream import (
    Block,
    CheckpointReader,
    in_order,
    read_tensor,
    rows_per_block,
    write_index,
    write_shard,
)
from qvera.utils import accelerator
from qvera.utils.cache_dir import UNFINISHED, StageProgress, discard, size_bytes
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import (
    CERTIFICATE,
    OutputDirectory,
    disk_errors,
    file_sha256,
    flush,
    read_json,
    replace_text,
    require_space,
    resolve_path,
    try_read_json,
    versions,
)
from qvera.utils.safetensors_io import (
    TensorEntry,
    TensorSpec,
    base_fingerprint,
    checkpoint_tensors,
    file_stamps,
    grouped_by_bytes,
    shard_files,
    write_source_fingerprint,
)

SHARD_BYTES = 1_000_000_000
"""A kill costs at most the work of one shard."""
_NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pkl", ".pickle", ".pth",
    ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json",
)  # fmt: skip
_NOT_AHEAD = "Such a checkpoint can't be quantized ahead; it is quantized each time it is loaded."

Shards = list[tuple[str, list[TensorSpec]]]
"""File name and tensors of each shard."""


class NotPlain(InputError):
    """transformers renames or fuses this checkpoint while loading, so its file can't be quantized by itself."""


@dataclasses.dataclass
class SourceCheckpoint:
    """A 16-bit checkpoint, checked against its config.

    Attributes:
        entries: all tensors, in the order they lie on disk.
        stamps: file name → bytes, mtime_ns, inode, by which hashed content is known again.
        tensors: those that the model has, each stack of experts as one, in the order in which they are written.
        quantized: names of the weights that become 4-bit.
        fused: the stacks of experts that lie in the files as several tensors.
        factors: a tensor in FP8 → the tensor of its factors.
        kept_dense: patterns of the linears that are never quantized (`quantization.kept_dense`).
        settings: what the copy depends on besides the source (`settings_of`).
    """

    directory: Path
    config: dict[str, Any]
    config_sha256: str
    entries: list[TensorEntry]
    stamps: dict[str, list[int]]
    tensors: list[TensorEntry]
    quantized: set[str]
    fused: dict[str, FusedTensor | Mxfp4Stack]
    factors: dict[str, TensorEntry]
    kept_dense: list[str]
    settings: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """The shards, in the order of ``entries``."""
        return [self.directory / name for name in self.stamps]

    def decoded(self, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Rows of a tensor, from ``first`` on, in 16 bits or more."""
        if (entry := self.factors.get(name)) is None:
            return rows
        if name not in self._read_factors:
            self._read_factors[name] = read_tensor(entry, self.stamps)
        return from_fp8(rows, self._read_factors[name], first, self._sizes[name])

    def __post_init__(self) -> None:
        self._read_factors: dict[str, torch.Tensor] = {}
        self._sizes = {entry.name: entry.shape[-2] for entry in self.entries if entry.name in self.factors}

    def identity(self, hashes: Mapping[Path, str]) -> str:
        """The copy's name by content, from the SHA-256 of each shard."""
        return content_identity(self.config_sha256, hashes, self.settings)


def read_source(section: ModelSection, directory: Path, model_class: ModelClass = CAUSAL_LM) -> SourceCheckpoint:
    """Check config and headers of a checkpoint in 16 bits, or of one that is decoded to them; no weights are read.

    Raises:
        InputError: a shard is missing or damaged, a shape is not the config's, or the checkpoint is quantized already.
        NotPlain: the tensors are not the model's parameters by name.
    """
    config = read_json(directory / "config.json", "the config of a model")
    if (stored_as := config.pop("quantization_config", None)) is not None and not is_decoded(stored_as):
        raise InputError(
            f"{directory}: is already quantized (config.json has a quantization_config). Use it as model.path as it "
            "is, or name the 16-bit checkpoint that it was made from."
        )
    model_class = model_class.copied_as(config.get("architectures"))
    model = empty_model(section, directory, model_class)
    entries = as_named(checkpoint_tensors(directory), model)
    stored = {entry.name for entry in entries}
    heads = list(model_class.head_modules(model))
    names = {name for name in model.state_dict() if name in stored or name.partition(".")[0] not in heads}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    require_own_weights(directory, entries, model, model_class)
    entries = as_stacks(entries, model)
    specs = {name: spec for name, spec in expert_specs(model).items() if spec.is_quantizable}
    fused: dict[str, FusedTensor | Mxfp4Stack] = {
        name: tensor for name, tensor in fused_tensors(entries, model).items() if name in specs or not tensor.is_merged
    }
    fused |= mxfp4_stacks(entries, {name: spec.shape for name, spec in specs.items()})
    factors, stored = fp8_factors(entries), stored | fused.keys()
    # of tensors that are tied, one has to be there
    absent = [n for n in names if n not in stored and tied.get(n) not in stored and n not in tied.values()]
    if absent:
        raise NotPlain(
            f"{directory}: has no tensor {min(absent)}, which the model of its config.json has: transformers renames "
            f"or fuses tensors while loading. {_NOT_AHEAD}"
        )
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    dense = quantization.kept_dense(model, heads)
    linears = quantization.four_bit_linears(model, section, dense)
    if transposed & linears:
        raise NotPlain(
            f"{directory}: stores {min(transposed & linears)} transposed (a Conv1D), and transformers turns it while "
            f"loading. {_NOT_AHEAD}"
        )
    quantized = ({f"{name}.weight" for name in linears} | specs.keys()) & stored
    tensors = _as_written(entries, fused, names)
    decoded = factors.keys() | {
        name for name, t in fused.items() if all(e.name in factors for each in t.sources.values() for e in each)
    }
    tensors = [dataclasses.replace(e, dtype=torch.bfloat16) if e.name in decoded else e for e in tensors]
    for entry in (entry for entry in tensors if entry.name in quantized):
        if entry.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise InputError(
                f"{entry.file}: {entry.name} is {entry.dtype}, expected a bfloat16, float16 or float32 weight."
            )
        if entry.numel % (2 * getattr(torch, section.quant_storage).itemsize):
            raise NotPlain(
                f"{entry.file}: {entry.name} has {entry.numel} weights, which do not fill whole elements of "
                f"{section.quant_storage}. Train with model.quant_storage: uint8, which makes a copy in the cache."
            )
    digest = file_sha256(directory / "config.json")
    stamps, settings = file_stamps(entries), settings_of(section, model_class.settings)
    return SourceCheckpoint(
        directory, config, digest, entries, stamps, tensors, quantized, fused, factors, dense, settings
    )


def _as_written(
    entries: list[TensorEntry], fused: Mapping[str, FusedTensor | Mxfp4Stack], names: set[str]
) -> list[TensorEntry]:
    """The model's tensors in the order of the files; a fused one stands in the place of its first source."""
    target_of = {entry.name: t for t in fused.values() for sources in t.sources.values() for entry in sources}
    written: dict[str, TensorEntry] = {}
    for entry in entries:
        if (tensor := target_of.get(entry.name)) is not None:
            spec = tensor.spec
            written.setdefault(spec.name, TensorEntry(spec.name, spec.dtype, spec.shape, entry.file, 0, 0))
        elif entry.name in names:
            written[entry.name] = entry
    return list(written.values())


def quantize_checkpoint(
    section: ModelSection,
    source: SourceCheckpoint,
    out: Path,
    known: Mapping[Path, str] | None = None,
    device: torch.device | None = None,
    progress: StageProgress | None = None,
) -> dict[str, Any]:
    """Write the 4-bit checkpoint to ``out``, or go on with it; returns its record (also written there).

    ``out`` is new, empty, or was left by the same call when it was killed. ``known`` has SHA-256 of source files that
    need no hashing. A CUDA ``device`` uses bitsandbytes' own kernels. ``progress`` may raise, to stop.

    Raises:
        InputError: ``out`` holds something else, or its disk has no room.
        RunFailed: a weight has NaN or Inf, the source changed meanwhile, or the disk is full; finished shards stay.
    """
    began = time.perf_counter()
    device = device or torch.device("cpu")
    # all that the output's bytes depend on; the device too, whose kernels of bitsandbytes may round otherwise
    place = str(source.directory.resolve())
    identity = {
        "source": place,
        "files": source.stamps,
        "config": source.config_sha256,
        "settings": source.settings,
        "device": device.type,
        "shard_bytes": SHARD_BYTES,
    }
    shards = _shards(source, section)
    with (
        OutputDirectory.open(out, identity, "quantize") as work,
        disk_errors(f"{out}", "Finished shards are kept: run again."),
    ):
        missing = [(name, specs) for name, specs in shards if not work.has(name)]
        require_space(out, sum(s.size_bytes for _, specs in missing for s in specs), "the quantized copy")
        hashes = work.facts.get("source", {}) | {f.name: h for f, h in (known or {}).items() if f in source.files}
        # stored stacks are read as [E m, n], so that a block is less than an expert
        flat = [
            dataclasses.replace(e, shape=(math.prod(e.shape[:-1]), e.shape[-1])) if e.name in source.quantized else e
            for e in source.entries
        ]
        reader = CheckpointReader(flat, source.stamps, hashes)
        planned = {spec.name for _, specs in missing for spec in specs}
        blocks = _blocks(source, reader, planned)
        workers, pack = torch.get_num_threads(), functools.partial(_pack, section, source, device)
        # progress counts the weights in 16 bits, of which the files may have fewer (FP8, MXFP4)
        total = sum(entry.size_bytes for entry in source.tensors)
        done = total - sum(entry.size_bytes for entry in source.tensors if entry.name in planned)

        def report(block: Block) -> None:
            nonlocal done
            if progress is not None:
                progress("quantizing", done, total, block.entry.name)
            weights = block.rows.numel() * (1 if block.absmax is None else 2)  # two packed ones in a byte
            done += weights * block.entry.dtype.itemsize

        with contextlib.closing(in_order(blocks, pack, workers, 2 * workers + 2)) as packed:
            tensors = _tensors(section, packed, report)
            for name, specs in missing:
                digest = write_shard(out / name, specs, tensors)
                work.facts["source"] = dict(reader.sha256)
                work.finished(name, digest)
            for _ in tensors:  # the rest of the source is hashed
                raise RuntimeError("more tensors were made than planned")
        if progress is not None:
            progress("quantizing", total, total, "")
        record = {
            "format": 1,
            "source": {
                "path": section.path,
                "revision": section.revision,
                "directory": place,
                "config_sha256": source.config_sha256,
                "files": {
                    name: {"sha256": reader.sha256[name], "bytes": stamp[0]} for name, stamp in source.stamps.items()
                },
            },
            "settings": source.settings,
            "identity": source.identity({Path(name): digest for name, digest in reader.sha256.items()}),
            "files": {name: {"sha256": work.shards[name], "bytes": (out / name).stat().st_size} for name, _ in shards},
            "seconds": time.perf_counter() - began,
            "versions": versions(),
        }
        _write_small_files(source, section, out, shards, record)
        work.complete()
    return record


def _shards(source: SourceCheckpoint, section: ModelSection) -> Shards:
    """A weight and its statistics stay together. The order is that of the source."""
    units: Iterator[list[TensorSpec]] = (
        quantization.serialized_layout(entry, section) if entry.name in source.quantized else list[TensorSpec]([entry])
        for entry in source.tensors
    )
    return grouped_by_bytes(units, lambda spec: spec.size_bytes, SHARD_BYTES)


def _blocks(source: SourceCheckpoint, reader: CheckpointReader, planned: set[str]) -> Iterator[Block]:
    """The planned tensors in blocks of rows, in the order of ``source.tensors``; a stack of experts as [E m, n]."""
    order = (entry for entry in source.tensors if entry.name in planned and entry.numel)
    for block in reader.blocks({entry.name for entry in source.entries} - planned):
        if block.first == 0:
            while (entry := next(order)).name != block.entry.name:
                yield from _expert_blocks(source, entry)
        yield block._replace(entry=entry)
    for entry in order:
        yield from _expert_blocks(source, entry)


def _expert_blocks(source: SourceCheckpoint, entry: TensorEntry) -> Iterator[Block]:
    """A stack whose experts are read from where they lie, one expert in 16 bits at a time; a convolution, at once."""
    tensor, (experts, rows, columns) = source.fused[entry.name], entry.shape  # or of a convolution
    step = rows_per_block(columns)

    def read(stored: TensorEntry, number: int | None) -> torch.Tensor:
        first = 0 if number is None else number * stored.shape[1]
        return source.decoded(stored.name, read_tensor(stored, source.stamps, number), first)

    if isinstance(tensor, FusedTensor) and entry.name not in source.quantized:
        yield Block(entry, 0, tensor.whole(read), True)
        return
    for expert in range(experts):
        matrix = tensor.part(expert, read)
        for first in range(0, rows, step):
            part = matrix[first : first + step]
            is_last = expert == experts - 1 and first + len(part) == rows
            yield Block(entry, expert * rows + first, part, is_last)


def _pack(section: ModelSection, source: SourceCheckpoint, device: torch.device, block: Block) -> Block:
    """Return a block with the bytes of its weights in 4 bits as rows, and their absmax; others keep their rows."""
    entry = block.entry
    rows = source.decoded(entry.name, block.rows, block.first)
    if entry.name not in source.quantized:
        return block._replace(rows=rows)
    if not accelerator.is_accelerator(device):
        packed, absmax = quantization.pack_four_bit(rows, section.quantization)
        is_finite = torch.isfinite(absmax).all()
    else:
        rows = rows.to(device)
        packed, state = quantization.bnb_functional.quantize_4bit(
            rows, blocksize=64, compress_statistics=False, quant_type=section.quantization
        )
        packed, absmax = packed.cpu(), state.absmax.cpu()
        is_finite = torch.isfinite(rows).all()  # a maximum on a card may leave a NaN out
    if not is_finite:
        raise RunFailed(
            f"{entry.file}: {entry.name} has NaN or Inf in it, so it can't be quantized. The checkpoint is damaged, or "
            "was saved in a dtype too narrow for it."
        )
    return block._replace(rows=packed, absmax=absmax)


def _tensors(
    section: ModelSection, blocks: Iterator[Block], progress: Callable[[Block], None]
) -> Iterator[torch.Tensor]:
    """The output's tensors in its order; a packed weight comes in parts, and then its statistics."""
    scales: list[torch.Tensor] = []
    storage = getattr(torch, section.quant_storage)
    for block in blocks:
        progress(block)
        if block.absmax is None:
            yield block.rows
            continue
        yield block.rows.view(-1).view(storage).view(-1, 1)
        scales.append(block.absmax)
        if block.last:
            statistics = quantization.serialized_statistics(block.entry, torch.cat(scales), section)
            scales.clear()
            for spec in quantization.serialized_layout(block.entry, section)[1:]:
                yield statistics[spec.name]


def _write_small_files(
    source: SourceCheckpoint, section: ModelSection, out: Path, shards: Shards, record: dict[str, Any]
) -> None:
    # config.json comes last: without it nothing takes the directory for a model
    write_index(out, shards)
    for file in sorted(source.directory.iterdir()):
        # the certificate of an export is of the 16-bit files
        if file.name in ("config.json", RECORD, CERTIFICATE) or file.name.startswith(".") or not file.is_file():
            continue
        if not file.name.lower().endswith(_NOT_COPIED):
            shutil.copyfile(file, out / file.name)
            flush(out / file.name)
    replace_text(out / RECORD, json.dumps(record, indent=1))
    write_source_fingerprint(out, base_fingerprint(source.directory))
    dtypes = [entry.dtype for entry in source.tensors if entry.name in source.quantized]
    dtype = max(set(dtypes), key=dtypes.count) if dtypes else torch.bfloat16
    wanted = quantization.quantization_config(section, dtype, source.kept_dense)
    assert wanted is not None  # read_source was asked for 4 bits
    config = dict(source.config)
    config["quantization_config"] = json.loads(wanted.to_json_string(use_diff=False))
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = str(dtype).removeprefix("torch.")
    replace_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def cached_base(
    section: ModelSection,
    *,
    device: torch.device | None = None,
    verify: bool = False,
    progress: StageProgress | None = None,
    model_class: ModelClass = CAUSAL_LM,
) -> Path:
    """The directory of the quantized copy of ``section.path``, made on first use.

    If several processes want the same copy, one makes it and the others wait. A damaged copy is made again. ``device``
    is where to quantize (default CPU). With ``verify``, source and copy are hashed again.

    Raises:
        NotPlain: transformers renames or fuses this checkpoint's tensors while loading.
        InputError: no such model, a shard is missing or damaged, or the cache can't be written.
        RunFailed: a weight has NaN or Inf, or the disk is full; finished shards stay.
    """
    directory = base_directory(section)
    if not verify and (found := find_base(section, directory, model_class)) is not None:
        return found  # without a look at the model
    source = read_source(section, directory, model_class)
    root, hashes = BASES.root, BASES.hashes
    where = [device.type if device is not None else "cpu", SHARD_BYTES]
    parts = [str(source.directory.resolve()), source.stamps, source.config_sha256, *where]
    key = hashlib.sha256(json.dumps([parts, source.settings], sort_keys=True).encode()).hexdigest()[:16]
    unfinished = root / f"{UNFINISHED}{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{root}: the cache can't be written ({error.strerror}). Set QVERA_CACHE to a directory that can."
        ) from None

    def waiting() -> None:
        assert progress is not None
        total = sum(spec.size_bytes for _, specs in _shards(source, section) for spec in specs)
        progress("waiting", min(size_bytes(unfinished), total), total, "another process quantizes this model")

    # one process makes a copy; the others find it finished when they get the lock
    with BASES.locked(key, None if progress is None else waiting):
        known = {} if verify else hashes.known(source.files)
        if verify or (len(known) < len(source.files) and _similar(source)):
            known = hashes.hashed(source.files, known, progress)
        if len(known) == len(source.files):
            target = _place(section, source.identity(known))
            if target.exists() and problem_of(target, verify=verify) is None:
                return target
        BASES.clear_removed()
        record = None
        if not any(unfinished.glob(".qvera_*.json")) and problem_of(unfinished, verify=True) is None:
            record = read_record(unfinished)  # killed between its last byte and its name
        if record is None and unfinished.is_dir() and not any(unfinished.glob(".qvera_*")):
            discard(unfinished)  # it was complete once, and was damaged since: nothing to go on from
        if record is None:
            record = quantize_checkpoint(section, source, unfinished, known, device, progress)
        _remember(source, record)
        return _publish(unfinished, _place(section, record["identity"]))


def find_base(section: ModelSection, directory: Path | None = None, model_class: ModelClass = CAUSAL_LM) -> Path | None:
    """The finished copy for this section, if the source's hashes are known. Nothing is hashed; None: not found."""
    directory = directory or base_directory(section)
    files = shard_files(directory)
    known = BASES.hashes.known(files)
    if not files or len(known) < len(files) or not (directory / "config.json").is_file():
        return None
    config = try_read_json(directory / "config.json") or {}
    settings = settings_of(section, model_class.copied_as(config.get("architectures")).settings)
    target = _place(section, content_identity(file_sha256(directory / "config.json"), known, settings))
    return target if problem_of(target) is None else None


def how_stored(section: ModelSection) -> tuple[bool, int]:
    """Return whether a 4-bit base is mapped, and the bytes of a number in its dense tensors; (True, 2): not here."""
    directory = Path(resolve_path(section.path))
    try:
        if not directory.is_dir():
            return True, 2
        sizes = Counter[int]()
        for entry in checkpoint_tensors(directory):
            if entry.dtype.is_floating_point and len(entry.shape) > 1:
                sizes[entry.dtype.itemsize] += entry.size_bytes
        itemsize = max(sizes, key=sizes.__getitem__, default=2)
        stored = (try_read_json(directory / "config.json") or {}).get("quantization_config")
        if (stored is None or is_decoded(stored)) and find_base(section, directory) is None:
            read_source(section, directory)
    except NotPlain:
        return False, itemsize
    except InputError:  # loading it tells
        return True, 2
    return True, itemsize


def quantized_copy(
    section: ModelSection,
    out: Path,
    *,
    device: torch.device | None = None,
    verify: bool = False,
    progress: StageProgress | None = None,
) -> dict[str, Any]:
    """Write the quantized copy to ``out``, or go on with it; returns its record. Raises as `cached_base`."""
    source = read_source(section, base_directory(section))
    hashes = BASES.hashes
    known = {} if verify else hashes.known(source.files)
    if (record := read_record(out)) is not None:
        if record["settings"] != source.settings:
            raise InputError(f"{out}: is quantized with other settings ({record['settings']}). Name another directory.")
        known = hashes.hashed(source.files, known, progress)
        if record["identity"] != source.identity(known):
            raise InputError(f"{out}: is the quantized copy of another checkpoint. Name another directory.")
        if (problem := problem_of(out, verify=verify)) is not None:
            raise InputError(f"{problem}. Delete {out} and run again.")
        return record
    record = quantize_checkpoint(section, source, out, known, device, progress)
    _remember(source, record)
    return record


def _remember(source: SourceCheckpoint, record: dict[str, Any]) -> None:
    recorded = record["source"]["files"]
    BASES.hashes.add({file: (source.stamps[file.name], recorded[file.name]["sha256"]) for file in source.files})


def _place(section: ModelSection, identity: str) -> Path:
    return BASES.root / f"{section.quantization}-{identity[:24]}"


def _similar(source: SourceCheckpoint) -> bool:
    """Whether a finished copy has sources of these names and sizes: then it pays to hash before quantizing."""
    wanted = source.settings, {name: stamp[0] for name, stamp in source.stamps.items()}
    records = (entry.record for entry in BASES.listed() if entry.record is not None)
    return any(
        (record["settings"], {name: file["bytes"] for name, file in record["source"]["files"].items()}) == wanted
        for record in records
    )


def _publish(made: Path, target: Path) -> Path:
    """Give a finished copy its name. If another process was quicker, take its copy."""
    if target.exists():
        if problem_of(target, verify=True) is None:
            shutil.rmtree(made)
            return target
        discard(target)
    try:
        made.rename(target)
    except OSError:
        if problem_of(target) is not None:
            raise
        shutil.rmtree(made)
    flush(target.parent)
    return target
