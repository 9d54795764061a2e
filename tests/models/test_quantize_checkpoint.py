"""The quantized copy is what transformers' own quantized load makes; it loads everywhere; a kill or a full disk loses nothing."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qvera.cli.main import main
from qvera.config.sections import ModelSection
from qvera.models import quantization, quantize_checkpoint, safetensors_stream
from qvera.models.quantize_checkpoint import cached_base, find_base
from qvera.models.quantized_record import BASES, problem_of, read_record
from qvera.utils.errors import InputError, RunFailed
from tests.conftest import small_llama, small_tokenizer
from tests.disk import fill, small_disk
from tests.helpers import wait_until
from tests.models.helpers import stock_load

pytestmark = pytest.mark.process

IDS = torch.arange(3, 43).view(2, 20)
FORK: Any = multiprocessing.get_context("fork")  # a process of its own would import torch for longer than it quantizes


def quantized(source: Path, out: Path, shard_bytes: int | None = None, progress: Any = None, **settings: Any) -> Any:
    section = ModelSection(path=str(source), **settings)
    read = quantize_checkpoint.read_source(section, source)
    with mock.patch.object(quantize_checkpoint, "SHARD_BYTES", shard_bytes or quantize_checkpoint.SHARD_BYTES):
        return quantize_checkpoint.quantize_checkpoint(section, read, out, progress=progress)


def save(directory: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "50GB", **changes: Any) -> Path:
    small_llama(**changes).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    small_tokenizer().save_pretrained(directory)
    return directory


def same_model(out: Path, source: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> None:
    """Stock transformers loads from ``out`` the bytes that it would make of ``source``."""
    settings = {"bnb_4bit_quant_storage": torch.bfloat16, **settings}
    loaded, expected = AutoModelForCausalLM.from_pretrained(out, dtype="auto"), stock_load(source, dtype, **settings)
    mine, theirs = loaded.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape, name
        assert torch.equal(mine[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    if loaded.config.hidden_size % 64 == 0:  # bitsandbytes' kernel takes no other
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, expected(IDS).logits)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def inodes(files: list[Path]) -> dict[str, int]:
    """A file that is written again is another one."""
    return {file.name: file.stat().st_ino for file in files}


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard_with(source: Path, name: str) -> Path:
    return next(file for file in shards(source) if name in load_file(file))


def flip_last_bit(file: Path) -> None:
    """In place: the inode stays."""
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


ODD = {"hidden_size": 44, "intermediate_size": 52, "attention_bias": True, "mlp_bias": True, "head_dim": 6}
SOURCES: dict[str, tuple[torch.dtype, bool, dict[str, Any], tuple[str, bool, str]]] = {
    "plain": (torch.bfloat16, False, {}, ("nf4", True, "bfloat16")),
    "tied, in shards": (torch.float16, True, {"tie_word_embeddings": True}, ("fp4", False, "uint8")),
    "from fp32": (torch.float32, True, {}, ("nf4", False, "float32")),
    "biases and odd widths": (torch.bfloat16, False, ODD, ("fp4", True, "bfloat16")),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_stock_transformers_loads_the_bytes_that_it_would_make(kind: str, tmp_path: Path) -> None:
    dtype, sharded, changes, (quant_type, double_quant, storage) = SOURCES[kind]
    source, out = save(tmp_path / "source", dtype, "60KB" if sharded else "50GB", **changes), tmp_path / "out"
    settings = {"quantization": quant_type, "double_quant": double_quant, "quant_storage": storage}
    quantized(source, out, 30_000 if sharded else None, **settings)
    assert (out / "model.safetensors.index.json").exists() == sharded
    same_model(
        out, source, dtype, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=getattr(torch, storage),
    )  # fmt: skip
    kept = {name for file in shards(out) for name in load_file(file)}
    assert ("lm_head.weight" in kept) == ("tie_word_embeddings" not in changes)
    assert not kept & {"lm_head.weight.absmax", "model.embed_tokens.weight.absmax"}


def test_tokenizer_template_and_generation_config_come_along(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_model_dir, tmp_path / "source"))
    (source / "pytorch_model.bin").write_bytes(b"not wanted")
    out = tmp_path / "out"
    record = quantized(source, out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    for facts, file in ((record["source"], source / "model.safetensors"), (record, out / "model.safetensors")):
        assert facts["files"][file.name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not list(out.glob(".*"))
    raw = (out / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    packed = [entry for name, entry in json.loads(raw[8 : 8 + length]).items() if name.endswith("_proj.weight")]
    assert len(packed) == 14  # each starts at a multiple of 64 bytes
    assert all((8 + length + entry["data_offsets"][0]) % 64 == 0 for entry in packed)


def on_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU be taken for a card. Its maxima leave NaN out, as those of a card may."""
    kernel = quantization.bnb_functional.quantize_4bit
    monkeypatch.setattr(
        quantization.bnb_functional, "quantize_4bit", lambda rows, **settings: kernel(rows.nan_to_num(), **settings)
    )
    monkeypatch.setattr(quantize_checkpoint.accelerator, "is_accelerator", lambda device: True)


def test_threads_chunk_sizes_and_the_kernels_of_a_device_change_no_byte(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a GPU, with the CPU as the device and bitsandbytes' kernels for it."""
    quantized(tiny_model_dir, tmp_path / "one")
    monkeypatch.setattr(safetensors_stream, "FILE_BLOCK_ELEMENTS", 64 * 3)
    torch.set_num_threads(2)
    try:
        quantized(tiny_model_dir, tmp_path / "two")
    finally:
        torch.set_num_threads(1)
    on_card(monkeypatch)
    quantized(tiny_model_dir, tmp_path / "three")
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two == three


def quantize_and_die(source: Path, out: Path, count: int) -> None:
    def progress(*_: Any) -> None:
        if len(shards(out)) >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    quantized(source, out, 30_000, progress)


def test_killed_at_any_shard_it_goes_on_to_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    record = quantized(tiny_model_dir, tmp_path / "whole", 30_000)
    assert len(record["files"]) > 4
    out = tmp_path / "out"
    for count in (1, 3):
        process = FORK.Process(target=quantize_and_die, args=(tiny_model_dir, out, count))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(shards(out)) == count
        assert not (out / "config.json").exists()
        assert read_record(out) is None
    with pytest.raises(InputError, match="unfinished quantize of something else"):
        quantized(tiny_model_dir, out, 30_000, quantization="fp4")
    damaged, *kept = shards(out)
    before = inodes(kept)
    flip_last_bit(damaged)
    again = quantized(tiny_model_dir, out, 30_000)
    assert (again["files"], again["source"]["files"]) == (record["files"], record["source"]["files"])
    for name in record["files"]:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert inodes(kept) == before  # not written again


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source", max_shard_size="60KB")


def renamed(source: Path) -> str:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    name = index["weight_map"]["model.final.weight"] = index["weight_map"].pop("model.norm.weight")
    change_tensors(
        source / name, lambda tensors: tensors.update({"model.final.weight": tensors.pop("model.norm.weight")})
    )
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return "has no tensor model.norm.weight"


def quantized_already(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(config))
    return "is already quantized"


@pytest.mark.parametrize("spoil", [renamed, quantized_already], ids=lambda f: f.__name__)
def test_a_bad_source_is_named_and_nothing_is_written(
    source: Path, tmp_path: Path, capsys: Any, spoil: Callable[[Path], str]
) -> None:
    said = spoil(source)
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert said in message and str(source) in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_what_the_model_does_not_have_is_left_out(source: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_tensors(shards(source)[0], lambda tensors: tensors.update(extra))
    (source / "model.safetensors.index.json").rename(tmp_path / "index")  # shards without an index are read too
    quantized(source, tmp_path / "out")
    (tmp_path / "index").rename(source / "model.safetensors.index.json")
    same_model(tmp_path / "out", source)


@pytest.mark.parametrize("device", ["cpu", "card"])
def test_nan_is_refused_by_tensor_name(device: str, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    if device == "card":
        on_card(monkeypatch)
    name = "model.layers.1.self_attn.k_proj.weight"
    file = shard_with(source, name)
    change_tensors(file, lambda tensors: tensors[name][3].fill_(float("nan")))
    with pytest.raises(RunFailed, match=rf"{file.name}: {name} has NaN or Inf"):
        quantized(source, tmp_path / "out", 20_000)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_a_source_that_changes_meanwhile_is_noticed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="changed while it was read"):
        quantized(source, tmp_path / "out", progress=lambda *_: os.utime(shards(source)[-1]))
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_disk_that_is_too_small_and_one_that_fills_up(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = quantized(tiny_model_dir, tmp_path / "whole", 20_000)
    with small_disk(tmp_path / "disk", 600 * 1024) as disk:
        filler, out = fill(disk, leave_bytes=50_000), disk / "out"
        with pytest.raises(InputError, match=r"needs 1\d\d kB, and .* kB are free"):
            quantized(tiny_model_dir, disk / "too small")
        filler.unlink()

        def fill_up(*_: Any) -> None:
            if len(shards(out)) == 2 and not filler.exists():
                fill(disk, leave_bytes=8192)

        with pytest.raises(RunFailed, match="the disk is full.*Finished shards are kept"):
            quantized(tiny_model_dir, out, 20_000, fill_up)
        assert not (out / "config.json").exists() and not list(out.glob(".model*.partial"))
        kept = shards(out)
        before = inodes(kept)
        assert len(kept) >= 2
        filler.unlink()
        assert quantized(tiny_model_dir, out, 20_000)["files"] == whole["files"]
        assert inodes(kept) == before


# The cache: one copy for each content, made once.


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def section(tiny_model_dir: Path, tmp_path: Path, root: Path) -> ModelSection:
    return ModelSection(path=str(shutil.copytree(tiny_model_dir, tmp_path / "model")))


def weights(section: ModelSection) -> Path:
    return Path(section.path) / "model.safetensors"


class Stages(list[str]):
    """A progress callback that remembers."""

    def __call__(self, stage: str, done: int, total: int, what: str) -> None:
        assert 0 <= done <= total
        if self[-1:] != [stage]:
            self.append(stage)


def test_made_on_first_use_and_found_afterwards(section: ModelSection, root: Path) -> None:
    stages = Stages()
    assert find_base(section) is None
    first = cached_base(section, progress=stages)
    assert stages == ["quantizing"]  # hashed on the way, not before
    assert first.parent == root
    assert problem_of(first, verify=True) is None
    assert cached_base(section, progress=lambda *_: pytest.fail("made again")) == find_base(section) == first


def test_settings_and_content_make_the_identity_and_the_path_does_not(section: ModelSection, tmp_path: Path) -> None:
    first = cached_base(section)
    settings: list[dict[str, Any]] = [{"quantization": "fp4"}, {"double_quant": False}, {"quant_storage": "uint8"}]
    others = [cached_base(section.replace(**changes)) for changes in settings]
    assert len({first, *others}) == 4
    shutil.copytree(section.path, tmp_path / "elsewhere")
    stages = Stages()
    assert cached_base(section.replace(path=str(tmp_path / "elsewhere")), progress=stages) == first
    assert stages == ["hashing"]  # not quantized again
    change_tensors(weights(section), lambda tensors: tensors["model.norm.weight"].add_(1))
    assert cached_base(section) not in (first, *others)


def test_what_was_hashed_is_trusted_by_size_time_and_inode_and_verify_is_not_fooled(section: ModelSection) -> None:
    first, file = cached_base(section), weights(section)
    before = file.stat()
    flip_last_bit(file)
    assert find_base(section) is None  # another mtime
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cached_base(section) == first  # believed
    second = cached_base(section, verify=True)
    assert second != first
    assert cached_base(section) == second  # and remembered


def test_a_damaged_copy_is_made_again(section: ModelSection) -> None:
    copy = cached_base(section)
    shard = copy / "model.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1])
    assert cached_base(section) == copy
    assert shard.read_bytes() == good
    flip_last_bit(shard)
    assert cached_base(section) == copy
    assert shard.read_bytes() != good
    assert cached_base(section, verify=True) == copy
    assert shard.read_bytes() == good


def make(section: ModelSection, directory: Path, name: str) -> None:
    """Quantize, waiting after three shards for the file ``go``; stages go to the file ``name``, the result to ``name``.path."""
    quantize_checkpoint.SHARD_BYTES = 30_000

    def progress(stage: str, done: int, total: int, what: str) -> None:
        with open(directory / name, "a") as handle:
            handle.write(stage + "\n")
        while stage == "quantizing" and len(unfinished_shards(BASES.root)) >= 3 and not (directory / "go").exists():
            time.sleep(0.02)

    (directory / f"{name}.path").write_text(str(cached_base(section, progress=progress)))


def stages_of(file: Path) -> set[str]:
    return set(file.read_text().split()) if file.exists() else set()


def unfinished_shards(root: Path) -> list[Path]:
    return sorted(root.glob(".unfinished-*/*.safetensors"))


@pytest.mark.parametrize("killed", [False, True])
def test_of_two_processes_one_makes_it_and_the_other_waits(
    killed: bool, section: ModelSection, root: Path, tmp_path: Path
) -> None:
    """If the first is killed, the other goes on from its shards."""
    one, two = (FORK.Process(target=make, args=(section, tmp_path, name)) for name in ("one", "two"))
    one.start()
    wait_until(lambda: len(unfinished_shards(root)) >= 3)
    two.start()
    wait_until(lambda: "waiting" in stages_of(tmp_path / "two"))
    kept = inodes(unfinished_shards(root))
    assert one.is_alive() and two.is_alive()
    assert "is being made" in str(pytest.raises(InputError, BASES.remove, unfinished_shards(root)[0].parent.name).value)
    if killed:
        one.kill()
        one.join()
    (tmp_path / "go").touch()
    for process in (two,) if killed else (one, two):
        process.join(60)
        assert process.exitcode == 0
    made = Path((tmp_path / "two.path").read_text())
    assert killed or Path((tmp_path / "one.path").read_text()) == made
    assert problem_of(made, verify=True) is None
    assert stages_of(tmp_path / "two") == ({"waiting", "quantizing"} if killed else {"waiting"})
    assert inodes([made / name for name in kept]) == kept
    assert [p for p in root.iterdir() if p.is_dir()] == [made]


def test_killed_between_the_last_byte_and_the_name(section: ModelSection, monkeypatch: Any) -> None:
    def dying(made: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_checkpoint, "_publish", dying)
        cached_base(section)
    stages = Stages()
    copy = cached_base(section, progress=stages)
    assert problem_of(copy, verify=True) is None and "quantizing" not in stages
    assert [entry.directory for entry in BASES.listed()] == [copy]


def test_the_commands(section: ModelSection, root: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["quantize", section.path]) == 0
    (copy,) = [p for p in root.iterdir() if p.is_dir()]
    assert str(copy) in capsys.readouterr().out
    for _ in range(2):
        assert main(["quantize", section.path, str(tmp_path / "out"), "--quantization", "fp4"]) == 0
    assert read_record(tmp_path / "out")["settings"]["quantization"] == "fp4"  # type: ignore[index]
    assert main(["quantize", section.path, str(tmp_path / "out")]) == 2  # nf4 is another thing
    assert main(["cache", "ls"]) == 0
    said = capsys.readouterr().out
    assert copy.name in said and section.path in said
    assert main(["cache", "ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["finished"] and row["size_bytes"] == sum(f.stat().st_size for f in copy.iterdir())
    assert main(["cache", "verify"]) == 0
    flip_last_bit(copy / "model.safetensors")
    assert main(["cache", "verify"]) == 1
    assert "another SHA-256" in capsys.readouterr().err
    assert main(["cache", "rm", "nothing"]) == main(["cache", "rm", "../.."]) == main(["cache", "rm"]) == 2
    assert copy.is_dir()
    assert main(["cache", "rm", copy.name[:8]]) == 0
    assert not copy.exists()
    assert BASES.listed() == []


def test_ctrl_c_keeps_finished_shards_and_says_so(section: ModelSection, root: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(quantize_checkpoint, "SHARD_BYTES", 30_000)
    finished = quantize_checkpoint.OutputDirectory.finished

    def interrupting(self: Any, name: str, sha256: str) -> None:
        finished(self, name, sha256)
        if len(self.shards) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_checkpoint.OutputDirectory, "finished", interrupting)
        assert main(["quantize", section.path]) == 75
    kept = inodes(unfinished_shards(root))
    (entry,) = BASES.listed()
    assert len(kept) == 2 and not entry.finished
    assert main(["quantize", section.path]) == 0
    (entry,) = BASES.listed()
    assert inodes([entry.directory / name for name in kept]) == kept
    assert main(["cache", "rm", "--all"]) == 0
    assert BASES.listed() == []


def test_a_cache_that_cannot_be_written_is_said(section: ModelSection, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="QVERA_CACHE"):
        cached_base(section)
