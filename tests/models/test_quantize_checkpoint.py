"""The quantized copy is what transformers' own quantized load makes; it loads everywhere; a kill or a full disk loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from qvera.cli.main import main
from qvera.config.schema import ModelSection
from qvera.models import quantize_checkpoint, safetensors_stream
from qvera.models.quantize_checkpoint import NotPlain, cached_base, find_base
from qvera.models.quantized_record import BASES, problem_of, read_record
from qvera.utils.errors import InputError, RunFailed
from tests.conftest import small_llama, small_tokenizer
from tests.disk import fill, small_disk
from tests.helpers import sampled, start_process, wait_until

pytestmark = pytest.mark.process

IDS = torch.arange(3, 43).view(2, 20)


def quantized(source: Path, out: Path, shard_bytes: int | None = None, **settings: Any) -> dict[str, Any]:
    section = ModelSection(path=str(source), **settings)
    return quantize_checkpoint.quantize_checkpoint(
        section, quantize_checkpoint.read_source(section, source), out, shard_bytes=shard_bytes
    )


def stock_load(source: Path, dtype: torch.dtype, **settings: Any) -> Any:
    section = ModelSection(path=str(source), **settings)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quantization,
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_quant_storage=getattr(torch, section.quant_storage),
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)


def same_bytes(a: Any, b: Any) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape, name
        assert torch.equal(mine[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def save(directory: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    shard = changes.pop("max_shard_size", "50GB")
    small_llama(**changes).to(dtype).save_pretrained(directory, max_shard_size=shard)
    small_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("quantization", "double_quant", "storage"),
    sampled(["nf4", "fp4"], [True, False], ["bfloat16", "uint8", "float32"]),
)
def test_stock_transformers_loads_the_same_bytes_as_it_would_make(
    tiny_model_dir: Path, tmp_path: Path, quantization: str, double_quant: bool, storage: str
) -> None:
    settings = {"quantization": quantization, "double_quant": double_quant, "quant_storage": storage}
    quantized(tiny_model_dir, tmp_path / "out", **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = stock_load(tiny_model_dir, torch.bfloat16, **settings)
    same_bytes(loaded, expected)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize(
    ("dtype", "tied", "sharded"), sampled([torch.float16, torch.float32], [True, False], [True, False])
)
def test_other_dtypes_tied_heads_and_shards(tmp_path: Path, dtype: torch.dtype, tied: bool, sharded: bool) -> None:
    shard = "60KB" if sharded else "50GB"
    source = save(tmp_path / "source", dtype, tie_word_embeddings=tied, max_shard_size=shard)
    quantized(source, tmp_path / "out", shard_bytes=30_000 if sharded else None)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == sharded
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    same_bytes(loaded, stock_load(source, dtype))
    kept = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert ("lm_head.weight" in kept) == (not tied)
    assert "lm_head.weight.absmax" not in kept
    assert "model.embed_tokens.weight.absmax" not in kept
    assert "model.layers.0.self_attn.q_proj.weight.absmax" in kept


def test_biases_and_odd_widths_go_along(tmp_path: Path) -> None:
    source = save(
        tmp_path / "source", hidden_size=44, intermediate_size=52, attention_bias=True, mlp_bias=True, head_dim=6
    )
    quantized(source, tmp_path / "out")
    same_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), stock_load(source, torch.bfloat16))


def test_tokenizer_template_and_generation_config_come_along(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source)
    (source / "pytorch_model.bin").write_bytes(b"not wanted")
    record = quantized(source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    sha = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert record["source"]["files"]["model.safetensors"]["sha256"] == sha
    sha = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert record["files"]["model.safetensors"]["sha256"] == sha
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_packed_weights_start_at_a_multiple_of_64_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantized(tiny_model_dir, tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
        if name.endswith("_proj.weight"):
            assert (8 + length + entry["data_offsets"][0]) % 64 == 0, name


def test_threads_and_chunk_sizes_change_no_byte(tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    quantized(tiny_model_dir, tmp_path / "one")
    monkeypatch.setattr(safetensors_stream, "BLOCK_ELEMENTS", 64 * 3)
    torch.set_num_threads(2)
    try:
        quantized(tiny_model_dir, tmp_path / "two")
    finally:
        torch.set_num_threads(1)
    one, two = (p / "model.safetensors" for p in (tmp_path / "one", tmp_path / "two"))
    assert one.read_bytes() == two.read_bytes()


def test_whole_weights_quantized_on_a_device_give_the_same_file(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a GPU, with the CPU as the device that gets whole weights."""
    quantized(tiny_model_dir, tmp_path / "one")
    monkeypatch.setattr(safetensors_stream, "BLOCK_ELEMENTS", 64 * 3)
    monkeypatch.setattr(
        quantize_checkpoint, "_pack", lambda _section, _source, _device, block: (block, block.rows, None)
    )
    quantized(tiny_model_dir, tmp_path / "two")
    one, two = (p / "model.safetensors" for p in (tmp_path / "one", tmp_path / "two"))
    assert one.read_bytes() == two.read_bytes()


def quantize_and_die(source: Path, out: Path, shards: int) -> None:
    section = ModelSection(path=str(source))

    def progress(stage: str, done: int, total: int, name: str) -> None:
        if len(list(out.glob("*.safetensors"))) >= shards:
            os.kill(os.getpid(), signal.SIGKILL)

    read = quantize_checkpoint.read_source(section, source)
    quantize_checkpoint.quantize_checkpoint(section, read, out, progress=progress, shard_bytes=30_000)


def test_killed_at_any_shard_it_goes_on_to_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    record = quantized(tiny_model_dir, tmp_path / "whole", shard_bytes=30_000)
    assert len(record["files"]) > 4
    out = tmp_path / "out"
    for shards in (1, 3):
        process = start_process(quantize_and_die, tiny_model_dir, out, shards)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(out.glob("*.safetensors"))) == shards
        assert not (out / "config.json").exists()
        assert read_record(out) is None
    kept = {p.name: p.stat().st_ino for p in out.glob("*.safetensors")}
    damaged = sorted(kept)[0]
    flipped = bytearray((out / damaged).read_bytes())
    flipped[-1] ^= 1
    (out / damaged).write_bytes(flipped)
    again = quantized(tiny_model_dir, out, shard_bytes=30_000)
    assert again["files"] == record["files"]
    assert again["source"]["files"] == record["source"]["files"]
    for name in record["files"]:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {name: (out / name).stat().st_ino for name in kept if name != damaged} == {
        name: inode for name, inode in kept.items() if name != damaged
    }  # not written again


def test_another_source_or_other_settings_do_not_go_on_with_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    start_process(quantize_and_die, tiny_model_dir, tmp_path / "out", 1).join()
    with pytest.raises(InputError, match="unfinished quantize of something else"):
        quantized(tiny_model_dir, tmp_path / "out", shard_bytes=30_000, quantization="fp4")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source", max_shard_size="60KB")


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def missing(source: Path) -> str:
    file = shards(source)[1]
    file.unlink()
    return file.name


def renamed(source: Path) -> str:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    file = source / index["weight_map"]["model.norm.weight"]
    tensors = load_file(file)
    tensors["model.final.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    index["weight_map"]["model.final.weight"] = index["weight_map"].pop("model.norm.weight")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return "has no tensor model.norm.weight"


def quantized_already(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(config))
    return "is already quantized"


def integers(source: Path) -> str:
    file = next(f for f in shards(source) if any("q_proj" in k for k in load_file(f)))
    save_file(
        {k: v.to(torch.int32) if "q_proj" in k else v for k, v in load_file(file).items()}, file, {"format": "pt"}
    )
    return "q_proj.weight is torch.int32"


@pytest.mark.parametrize(
    "spoil",
    [missing, renamed, quantized_already, integers],
    ids=lambda f: f.__name__,
)
def test_a_bad_source_is_named_and_nothing_is_written(
    source: Path, tmp_path: Path, capsys: Any, spoil: Callable[[Path], str]
) -> None:
    said = spoil(source)
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert str(source) in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_transposed_linears_are_left_to_transformers(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(NotPlain, match="transposed"):
        quantized(tmp_path / "gpt2", tmp_path / "out")


def test_what_the_model_does_not_have_is_left_out(source: Path, tmp_path: Path) -> None:
    file = shards(source)[0]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    expected = stock_load(source, torch.bfloat16)
    (source / "model.safetensors.index.json").unlink()  # shards without an index are read too
    quantized(source, tmp_path / "out")
    same_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected)


def test_nan_is_refused_by_tensor_name_and_finished_shards_stay(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    file = next(f for f in shards(source) if name in load_file(f))
    tensors = load_file(file)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunFailed, match=rf"{file.name}: {name} has NaN or Inf"):
        quantized(source, tmp_path / "out", shard_bytes=20_000)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_a_source_that_changes_meanwhile_is_noticed(source: Path, tmp_path: Path) -> None:
    section = ModelSection(path=str(source))

    def touch(stage: str, done: int, total: int, name: str) -> None:
        os.utime(shards(source)[-1])

    with pytest.raises(RunFailed, match="changed while it was read"):
        quantize_checkpoint.quantize_checkpoint(
            section, quantize_checkpoint.read_source(section, source), tmp_path / "out", progress=touch
        )
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 600 * 1024) as place:
        yield place


def test_a_disk_that_fills_up_is_named_and_finished_shards_are_used(
    tiny_model_dir: Path, disk: Path, tmp_path: Path
) -> None:
    whole = quantized(tiny_model_dir, tmp_path / "whole", shard_bytes=20_000)
    section, filler = ModelSection(path=str(tiny_model_dir)), disk / "filler"
    out = disk / "out"

    def fill_up(stage: str, done: int, total: int, name: str) -> None:
        if len(list(out.glob("*.safetensors"))) == 2 and not filler.exists():
            fill(disk, leave_bytes=8192)

    source = quantize_checkpoint.read_source(section, tiny_model_dir)
    with pytest.raises(RunFailed, match="the disk is full.*Finished shards are kept"):
        quantize_checkpoint.quantize_checkpoint(section, source, out, progress=fill_up, shard_bytes=20_000)
    assert not (out / "config.json").exists()
    assert not list(out.glob(".model*.partial"))
    assert len(list(out.glob("*.safetensors"))) >= 2
    filler.unlink()
    inode = sorted(out.glob("*.safetensors"))[0].stat().st_ino
    record = quantize_checkpoint.quantize_checkpoint(section, source, out, shard_bytes=20_000)
    assert record["files"] == whole["files"]
    assert sorted(out.glob("*.safetensors"))[0].stat().st_ino == inode


def test_too_small_a_disk_is_refused_before_anything_is_done(tiny_model_dir: Path, disk: Path) -> None:
    fill(disk, leave_bytes=50_000)
    with pytest.raises(InputError, match=r"needs 1\d\d kB, and .* kB are free"):
        quantized(tiny_model_dir, disk / "out")


# The cache: one copy for each content, made once.


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def section(tiny_model_dir: Path, tmp_path: Path, root: Path) -> ModelSection:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    return ModelSection(path=str(tmp_path / "model"))


def weights(section: ModelSection) -> Path:
    return Path(section.path) / "model.safetensors"


class Stages:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, stage: str, done: int, total: int, what: str) -> None:
        assert 0 <= done <= total
        if not self.seen or self.seen[-1] != stage:
            self.seen.append(stage)


def test_made_on_first_use_and_found_afterwards(section: ModelSection, root: Path) -> None:
    stages = Stages()
    assert find_base(section) is None
    first = cached_base(section, progress=stages)
    assert stages.seen == ["quantizing"]  # hashed on the way, not before
    assert first.parent == root
    assert problem_of(first, verify=True) is None
    stages = Stages()
    assert cached_base(section, progress=stages) == find_base(section) == first
    assert stages.seen == []


def test_settings_and_content_make_the_identity_and_the_path_does_not(section: ModelSection, tmp_path: Path) -> None:
    first = cached_base(section)
    others = [
        cached_base(ModelSection(path=section.path, **changes))
        for changes in ({"quantization": "fp4"}, {"double_quant": False}, {"quant_storage": "uint8"})
    ]
    assert len({first, *others}) == 4
    shutil.copytree(section.path, tmp_path / "elsewhere")
    stages = Stages()
    assert cached_base(ModelSection(path=str(tmp_path / "elsewhere")), progress=stages) == first
    assert stages.seen == ["hashing"]  # not quantized again
    tensors = load_file(weights(section))
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights(section), metadata={"format": "pt"})
    assert cached_base(section) not in (first, *others)


def test_what_was_hashed_is_trusted_by_size_time_and_inode_and_verify_is_not_fooled(section: ModelSection) -> None:
    first, file = cached_base(section), weights(section)
    before = file.stat()
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    with open(file, "r+b") as handle:  # in place: same inode
        handle.write(raw)
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
    flipped = bytearray(good)
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    assert cached_base(section) == copy
    assert shard.read_bytes() == flipped
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


def test_of_two_processes_one_makes_it_and_the_other_waits(section: ModelSection, root: Path, tmp_path: Path) -> None:
    one = start_process(make, section, tmp_path, "one")
    wait_until(lambda: len(unfinished_shards(root)) >= 3)
    two = start_process(make, section, tmp_path, "two")
    wait_until(lambda: "waiting" in stages_of(tmp_path / "two"))
    assert one.is_alive()
    assert two.is_alive()
    (tmp_path / "go").touch()
    for process in (one, two):
        process.join(60)
        assert process.exitcode == 0
    found, other = (Path((tmp_path / f"{name}.path").read_text()) for name in ("one", "two"))
    assert found == other
    assert problem_of(found, verify=True) is None
    assert stages_of(tmp_path / "two") == {"waiting"}
    assert [p for p in root.iterdir() if p.is_dir()] == [found]


def test_a_killed_makers_lock_is_recovered_and_its_shards_are_used(
    section: ModelSection, root: Path, tmp_path: Path
) -> None:
    one = start_process(make, section, tmp_path, "one")
    wait_until(lambda: len(unfinished_shards(root)) >= 3)
    two = start_process(make, section, tmp_path, "two")
    wait_until(lambda: "waiting" in stages_of(tmp_path / "two"))
    kept = {p.name: p.stat().st_ino for p in unfinished_shards(root)}
    assert "is being made" in str(pytest.raises(InputError, BASES.remove, unfinished_shards(root)[0].parent.name).value)
    one.kill()
    one.join()
    (tmp_path / "go").touch()
    two.join(60)
    assert two.exitcode == 0
    made = Path((tmp_path / "two.path").read_text())
    assert problem_of(made, verify=True) is None
    assert stages_of(tmp_path / "two") == {"waiting", "quantizing"}
    assert {name: (made / name).stat().st_ino for name in kept} == kept


def test_killed_between_the_last_byte_and_the_name(section: ModelSection, monkeypatch: Any) -> None:
    def dying(made: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_checkpoint, "_publish", dying)
        cached_base(section)
    stages = Stages()
    copy = cached_base(section, progress=stages)
    assert problem_of(copy, verify=True) is None
    assert "quantizing" not in stages.seen
    assert [entry.directory for entry in BASES.listed()] == [copy]


def test_the_commands(section: ModelSection, root: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["quantize", section.path]) == 0
    (copy,) = [p for p in root.iterdir() if p.is_dir()]
    assert str(copy) in capsys.readouterr().out
    assert main(["quantize", section.path, str(tmp_path / "out"), "--quantization", "fp4", "--no-double-quant"]) == 0
    assert main(["quantize", section.path, str(tmp_path / "out"), "--quantization", "fp4", "--no-double-quant"]) == 0
    assert read_record(tmp_path / "out")["settings"]["quantization"] == "fp4"  # type: ignore[index]
    assert main(["quantize", section.path, str(tmp_path / "out")]) == 2  # nf4 is another thing
    assert main(["cache", "ls"]) == 0
    said = capsys.readouterr().out
    assert copy.name in said
    assert section.path in said
    assert main(["cache", "ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["size_bytes"] == sum(f.stat().st_size for f in copy.iterdir())
    assert row["finished"]
    assert main(["cache", "verify"]) == 0
    flipped = bytearray((copy / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (copy / "model.safetensors").write_bytes(flipped)
    assert main(["cache", "verify"]) == 1
    assert "another SHA-256" in capsys.readouterr().err
    assert main(["cache", "rm", "nothing"]) == main(["cache", "rm", "../.."]) == main(["cache", "rm"]) == 2
    assert copy.is_dir()
    assert main(["cache", "rm", copy.name[:8]]) == 0
    assert not copy.exists()
    assert BASES.listed() == []


def test_ctrl_c_keeps_finished_shards_and_says_so(
    section: ModelSection, root: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(quantize_checkpoint, "SHARD_BYTES", 30_000)
    finished = quantize_checkpoint.OutputDirectory.finished

    def interrupting(self: Any, name: str, sha256: str) -> None:
        finished(self, name, sha256)
        if len(self.shards) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(quantize_checkpoint.OutputDirectory, "finished", interrupting)
    assert main(["quantize", section.path]) == 75
    assert len(unfinished_shards(root)) == 2
    (entry,) = BASES.listed()
    assert not entry.finished
    monkeypatch.setattr(quantize_checkpoint.OutputDirectory, "finished", finished)
    kept = {p.name: p.stat().st_ino for p in unfinished_shards(root)}
    assert main(["quantize", section.path]) == 0
    (entry,) = BASES.listed()
    assert {n: (entry.directory / n).stat().st_ino for n in kept} == kept
    assert main(["cache", "rm", "--all"]) == 0
    assert BASES.listed() == []


def test_a_cache_that_cannot_be_written_is_said(section: ModelSection, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="QVERA_CACHE"):
        cached_base(section)


def test_fp32_sources_quantize_from_fp32(section: ModelSection) -> None:
    tensors = {k: v.float() * 1.0001 for k, v in load_file(weights(section)).items()}
    save_file(tensors, weights(section), metadata={"format": "pt"})
    kept = load_file(cached_base(section) / "model.safetensors")
    assert kept["model.embed_tokens.weight"].dtype is torch.float32
    assert (
        json.loads(bytes(kept["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"].tolist()))["dtype"]
        == "float32"
    )
