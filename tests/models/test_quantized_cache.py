"""One copy for each content, made once: found again, waited for, recovered from a killed maker, listed and removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvera.cli.main import main
from qvera.config.schema import ModelSection
from qvera.models import quantize_checkpoint
from qvera.models.quantize_checkpoint import NotPlain, cached_base, find_base
from qvera.models.quantized_record import BASES, problem_of, read_record
from qvera.utils.errors import InputError
from tests.helpers import start_process, wait_until

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def section(tiny_model_dir: Path, tmp_path: Path) -> ModelSection:
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


def test_a_model_that_is_renamed_on_loading_says_so(section: ModelSection) -> None:
    tensors = load_file(weights(section))
    tensors["model.final.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, weights(section), metadata={"format": "pt"})
    with pytest.raises(NotPlain, match="model.norm.weight"):
        cached_base(section)


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
