"""Quantized bases in $QVERA_CACHE/bases: made once, and found again by content (`qvera.models.quantized_record`)."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from qvera.config.schema import ModelSection
from qvera.models import quantize_checkpoint
from qvera.models.hub import base_directory
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.quantize_checkpoint import NotPlain, SourceCheckpoint, read_source
from qvera.models.quantized_record import BASES, content_identity, problem_of, read_record, settings_of
from qvera.utils.atomic import flush
from qvera.utils.cache_dir import UNFINISHED, HashIndex, StageProgress, discard, size_bytes
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256, try_read_json
from qvera.utils.paths import resolve_path
from qvera.utils.safetensors_io import checkpoint_tensors, shard_files


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
    settings = settings_of(section, source.model_class.settings)
    root, hashes = BASES.root, BASES.hashes
    key = _key(source, settings, device)
    unfinished = root / f"{UNFINISHED}{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{root}: the cache can't be written ({error.strerror}). Set QVERA_CACHE to a directory that can."
        ) from None

    def waiting() -> None:
        assert progress is not None
        total = quantize_checkpoint.output_bytes(source, section)
        progress("waiting", min(size_bytes(unfinished), total), total, "another process quantizes this model")

    with BASES.locked(key, None if progress is None else waiting):
        known = {} if verify else hashes.known(source.files)
        if verify or (len(known) < len(source.files) and _similar(source, settings)):
            known = hashes.hashed(source.files, known, progress)
        if len(known) == len(source.files):
            target = root / _name(section, _identity(source.config_sha256, settings, known))
            if target.exists() and problem_of(target, verify=verify) is None:
                return target
        BASES.clear_removed()
        record = None
        if not any(unfinished.glob(".qvera_*.json")) and problem_of(unfinished, verify=True) is None:
            record = read_record(unfinished)  # killed between its last byte and its name
        if record is None and unfinished.is_dir() and not any(unfinished.glob(".qvera_*")):
            discard(unfinished)  # it was complete once, and was damaged since: nothing to go on from
        if record is None:
            record = quantize_checkpoint.quantize_checkpoint(section, source, unfinished, known, device, progress)
        _remember(hashes, source, record)
        return _publish(unfinished, root / _name(section, record["identity"]))


def find_base(section: ModelSection, directory: Path | None = None, model_class: ModelClass = CAUSAL_LM) -> Path | None:
    """The finished copy for this section, if the source's hashes are known. Nothing is hashed; None: not found."""
    directory = directory or base_directory(section)
    files = shard_files(directory)
    known = BASES.hashes.known(files)
    if not files or len(known) < len(files) or not (directory / "config.json").is_file():
        return None
    architectures = (try_read_json(directory / "config.json") or {}).get("architectures")
    settings = settings_of(section, model_class.copied_as(architectures).settings)
    config = file_sha256(directory / "config.json")
    target = BASES.root / _name(section, _identity(config, settings, known))
    return target if problem_of(target) is None else None


def how_stored(section: ModelSection) -> tuple[bool, int]:
    """Whether a 4-bit base is mapped, and the bytes of a dense number in it; (True, 2) for one that is not here."""
    directory = Path(resolve_path(section.path))
    try:
        if not directory.is_dir():
            return True, 2
        sizes = Counter[int]()
        for entry in checkpoint_tensors(directory):
            if entry.dtype.is_floating_point and len(entry.shape) > 1:
                sizes[entry.dtype.itemsize] += entry.size_bytes
        itemsize = max(sizes, key=sizes.__getitem__, default=2)
        is_quantized = (try_read_json(directory / "config.json") or {}).get("quantization_config")
        if not is_quantized and find_base(section, directory) is None:
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
    record, settings = read_record(out), settings_of(section)
    if record is not None:
        if record["settings"] != settings:
            raise InputError(f"{out}: is quantized with other settings ({record['settings']}). Name another directory.")
        known = hashes.hashed(source.files, known, progress)
        if record["identity"] != _identity(source.config_sha256, settings, known):
            raise InputError(f"{out}: is the quantized copy of another checkpoint. Name another directory.")
        if (problem := problem_of(out, verify=verify)) is not None:
            raise InputError(f"{problem}. Delete {out} and run again.")
        return record
    record = quantize_checkpoint.quantize_checkpoint(section, source, out, known, device, progress)
    _remember(hashes, source, record)
    return record


def _remember(hashes: HashIndex, source: SourceCheckpoint, record: dict[str, Any]) -> None:
    recorded = record["source"]["files"]
    hashes.add({file: (source.stamps[file.name], recorded[file.name]["sha256"]) for file in source.files})


def _identity(config_sha256: str, settings: dict[str, Any], known: dict[Path, str]) -> str:
    names = {file.name: digest for file, digest in known.items()}
    return content_identity(config_sha256, names, settings)


def _name(section: ModelSection, identity: str) -> str:
    return f"{section.quantization}-{identity[:24]}"


def _key(source: SourceCheckpoint, settings: dict[str, Any], device: torch.device | None) -> str:
    where = [device.type if device is not None else "cpu", quantize_checkpoint.SHARD_BYTES]
    parts = [str(source.directory.resolve()), source.stamps, source.config_sha256, *where]
    text = json.dumps([parts, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _similar(source: SourceCheckpoint, settings: dict[str, Any]) -> bool:
    """Whether a finished copy has sources of these names and sizes: then it pays to hash before quantizing."""
    sizes = {name: stamp[0] for name, stamp in source.stamps.items()}
    for record in (entry.record for entry in BASES.listed() if entry.record is not None):
        recorded = {name: value["bytes"] for name, value in record["source"]["files"].items()}
        if record["settings"] == settings and recorded == sizes:
            return True
    return False


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
