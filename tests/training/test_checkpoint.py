"""Checkpoints: what is saved comes back to the bit; what was damaged, cut short or left half-written is never taken."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvera.training import checkpoint
from qvera.utils import files
from qvera.utils.errors import InputError, RunFailed
from tests.disk import fill, small_disk
from tests.training.runs import vouch_for

STATE: dict[str, Any] = {"schedule": {"last_epoch": 7}, "progressed": {"best_loss": 1.25, "note": "Grüße"}}
FILES = ["manifest.json", "optimizer.safetensors", "random.safetensors", "state.json", "vectors.safetensors"]
Vectors = dict[str, nn.Parameter]


def run(seed: int = 0, steps: int = 3) -> tuple[Vectors, torch.optim.Optimizer]:
    """Vectors and an AdamW that has taken a few steps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"layers.0.q.qvera_b": 5, "layers.0.q.qvera_d": 3, "layers.1.q.qvera_b": 4}
    vectors = {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in sizes.items()}
    optimizer = torch.optim.AdamW(vectors.values(), lr=0.1)
    take_steps(vectors, optimizer, steps)
    return vectors, optimizer


def take_steps(vectors: Vectors, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    """Steps that draw random numbers, as dropout does."""
    for _ in range(steps):
        optimizer.zero_grad()
        sum((v * torch.rand(v.shape)).square().sum() for v in vectors.values()).backward()  # type: ignore[union-attr]
        optimizer.step()


def save_steps(directory: Path, *steps: int) -> None:
    vectors, optimizer = run()
    for number in steps:
        checkpoint.save(directory, number, vectors, optimizer, STATE)


def newest(directory: Path, warned: list[str] | None = None) -> int | None:
    """The step of the newest checkpoint that can be used."""
    found = checkpoint.newest(directory, (lambda _: None) if warned is None else warned.append)
    return None if found is None else found.number


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    vectors, optimizer = run()
    return checkpoint.save(tmp_path, 7, vectors, optimizer, STATE)


def test_going_on_from_what_was_saved_is_going_on(tmp_path: Path) -> None:
    torch.manual_seed(5)
    vectors, optimizer = run()
    before = {name: vector.detach().clone() for name, vector in vectors.items()}
    path = checkpoint.save(tmp_path, 7, vectors, optimizer, STATE)
    assert (path, names(tmp_path), names(path)) == (tmp_path / "step-00000007", ["step-00000007"], FILES)
    loaded = checkpoint.load(path)
    assert (loaded.number, loaded.path) == (7, path)
    assert {key: loaded.state[key] for key in STATE} == STATE
    assert loaded.files["vectors"].keys() == before.keys()
    assert all(torch.equal(loaded.files["vectors"][name], vector) for name, vector in before.items())
    take_steps(vectors, optimizer, 4)

    torch.manual_seed(999)
    others, fresh = run(seed=8, steps=0)
    checkpoint.restore(checkpoint.load(path), others, fresh)
    take_steps(others, fresh, 4)
    for name, vector in vectors.items():
        assert torch.equal(others[name], vector)
        mine, theirs = optimizer.state[vector], fresh.state[others[name]]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_scalars_and_bytes_in_the_optimizers_state_survive(tmp_path: Path) -> None:
    vectors, optimizer = run(steps=0)
    kept = {"step": 12, "flag": True, "absmax1": torch.tensor([0.5]), "state1": torch.arange(5, dtype=torch.uint8)}
    optimizer.state[vectors["layers.0.q.qvera_b"]] = kept
    path = checkpoint.save(tmp_path, 1, vectors, optimizer, {})
    others, fresh = run(seed=3, steps=0)
    checkpoint.restore(checkpoint.load(path), others, fresh)
    state = fresh.state[others["layers.0.q.qvera_b"]]
    assert (state["step"], state["flag"], state["absmax1"]) == (12, True, 0.5)
    assert torch.equal(state["state1"], torch.arange(5, dtype=torch.uint8)) and state["state1"].dtype == torch.uint8
    assert others["layers.0.q.qvera_d"] not in fresh.state  # what had no state yet has none now


def test_paged_state_is_paged_again(tmp_path: Path) -> None:
    vectors = {"layers.0.q.qvera_b": nn.Parameter(torch.randn(6))}
    optimizer: Any = torch.optim.AdamW(vectors.values(), lr=0.1)
    take_steps(vectors, optimizer)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, vectors, optimizer, STATE))
    paged: list[torch.Tensor] = []
    optimizer.is_paged = True
    optimizer.get_state_buffer = lambda p, dtype: (paged.append(torch.zeros_like(p, dtype=dtype)), paged[-1])[1]
    checkpoint.restore(loaded, vectors, optimizer)
    state = optimizer.state[vectors["layers.0.q.qvera_b"]]
    assert {id(tensor) for tensor in paged} == {id(state["exp_avg"]), id(state["exp_avg_sq"])}
    assert torch.equal(state["exp_avg"], loaded.files["optimizer"]["layers.0.q.qvera_b/exp_avg"])


@pytest.mark.parametrize("change", ["another name", "one fewer", "another length"])
def test_vectors_of_another_recipe_are_refused(saved: Path, change: str) -> None:
    vectors, _ = run(seed=3)
    first = vectors.pop("layers.0.q.qvera_b")
    if change != "one fewer":
        vectors["layers.9.q.qvera_b" if "name" in change else "layers.0.q.qvera_b"] = first
    if change == "another length":
        vectors["layers.0.q.qvera_d"] = nn.Parameter(torch.zeros(2))
    before = [vector.detach().clone() for vector in vectors.values()]
    with pytest.raises(InputError, match=r"its vectors are not those of this recipe.*other rank, targets or model"):
        checkpoint.restore(checkpoint.load(saved), vectors, torch.optim.AdamW(vectors.values()))
    assert all(torch.equal(vector, old) for vector, old in zip(vectors.values(), before, strict=True))


# Damage.


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_missing_or_cut_anywhere_or_has_a_flipped_bit_is_passed_over(saved: Path, file: str) -> None:
    content = (saved / file).read_bytes()
    damaged: list[bytes | None] = [None, content[:-1], *(content[:length] for length in range(0, len(content), 17))]
    if file != "manifest.json":
        for place in range(0, len(content), max(1, len(content) // 40)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 8)
            damaged.append(bytes(flipped))
    for left in damaged:
        (saved / file).unlink(missing_ok=True)
        if left is not None:
            (saved / file).write_bytes(left)
        warned: list[str] = []
        assert newest(saved.parent, warned) is None
        assert len(warned) == 1
        assert file in warned[0] and warned[0].endswith("It is passed over.")
    (saved / file).write_bytes(content)
    assert newest(saved.parent) == 7


def test_no_flipped_bit_in_the_manifest_gets_through_or_crashes(saved: Path) -> None:
    """Either it is refused with a message, or (white space) it means the same as before."""
    manifest = saved / "manifest.json"
    content, wanted = manifest.read_bytes(), checkpoint.load(saved)
    refused = 0
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        manifest.write_bytes(flipped)
        try:
            loaded = checkpoint.load(saved)
        except InputError as error:
            refused += 1
            assert str(saved) in str(error)
            assert "\n" not in str(error)
        else:
            assert (loaded.number, loaded.state) == (wanted.number, wanted.state)
            assert all(torch.equal(loaded.files["vectors"][n], v) for n, v in wanted.files["vectors"].items())
    assert refused > 0.7 * len(content)


OTHER_FORMAT = "has checkpoint format {}; this qvera reads format 1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(files={}), ""),
        (lambda m: m["files"].pop("vectors.safetensors"), ""),
        (lambda m: m.update(files=[]), ""),
        (lambda m: m["files"].update({"state.json": "abc"}), ""),
        (lambda m: m["files"]["state.json"].pop("sha256"), ""),
        (lambda m: m.pop("files"), ""),
        (lambda m: m.pop("format"), ""),
        (lambda m: m.update(format=0), OTHER_FORMAT.format(0)),
        (lambda m: m.update(format="1"), OTHER_FORMAT.format(1)),
    ],
)
def test_a_manifest_of_another_format_or_that_does_not_vouch_for_every_file_is_passed_over(
    saved: Path, change: Callable[[Any], Any], said: str
) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    change(manifest)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    warned: list[str] = []
    assert newest(saved.parent, warned) is None
    (line,) = warned
    assert "step-00000007" in line and f"{said}. It is passed over." in line


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vectors.safetensors", b"not safetensors"),
        ("optimizer.safetensors", b""),
        ("random.safetensors", b"\xff" * 64),
        *(("state.json", content) for content in (b"[]", b"{", b"\xff", b'{"step": 8}', b'{"step": "7"}')),
    ],
)
def test_a_manifest_that_fits_does_not_make_it_a_checkpoint(saved: Path, file: str, content: bytes) -> None:
    (saved / file).write_bytes(content)
    vouch_for(saved)
    with pytest.raises(InputError, match="step-00000007: is no checkpoint of qvera's"):
        checkpoint.load(saved)


def test_the_manifest_of_another_run_or_step_is_refused_and_the_one_before_taken(tmp_path: Path) -> None:
    for run_name, seed in (("mine", 1), ("other", 2)):
        vectors, optimizer = run(seed=seed)
        for number in (2, 4):
            checkpoint.save(tmp_path / run_name, number, vectors, optimizer, STATE)
            take_steps(vectors, optimizer)
    manifest = tmp_path / "mine" / "step-00000004" / "manifest.json"
    for source in (tmp_path / "other" / "step-00000004", tmp_path / "mine" / "step-00000002"):
        shutil.copy(source / "manifest.json", manifest)
        warned: list[str] = []
        assert newest(tmp_path / "mine", warned) == 2
        assert len(warned) == 1
        assert "step-00000004" in warned[0] and "not what the manifest says" in warned[0]


# Which one is taken, and which are kept.


def test_the_newest_that_is_whole_is_taken_and_the_others_are_told_of(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") is None
    assert newest(tmp_path) is None
    save_steps(tmp_path, 2, 10, 9)
    for half_written_or_foreign in (".partial-step-00000099", "step-00000099-old"):
        shutil.copytree(tmp_path / "step-00000010", tmp_path / half_written_or_foreign)
    assert [path.name for path in checkpoint.directories(tmp_path)] == [f"step-{n:08d}" for n in (2, 9, 10)]
    warned: list[str] = []
    assert newest(tmp_path, warned) == 10
    assert not warned
    (tmp_path / "step-00000010" / "manifest.json").unlink()
    (tmp_path / "step-00000009" / "vectors.safetensors").write_bytes(b"")
    assert newest(tmp_path, warned) == 2
    assert [("step-00000010" in warned[0]), ("step-00000009" in warned[1]), len(warned)] == [True, True, 2]


def test_the_manifest_is_written_last_and_everything_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    for module in (checkpoint, files):
        monkeypatch.setattr(module, "flush", lambda path: flushed.append(path.name))
    save_steps(tmp_path, 4)
    assert sorted(flushed[:-2]) == FILES[1:]
    assert flushed[-2:] == ["manifest.json", tmp_path.name]


def test_the_same_step_again_replaces_it_and_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, optimizer = run()
    saved = checkpoint.save(tmp_path, 4, vectors, optimizer, {"a": 1})
    with torch.no_grad():
        vectors["layers.0.q.qvera_d"].fill_(9)
    remove = shutil.rmtree

    def removed(path: Path, **options: Any) -> None:
        assert path != saved, "a kill now would lose the only checkpoint"
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", removed)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 4, vectors, optimizer, {"a": 2}))
    assert loaded.state["a"] == 2
    assert torch.equal(loaded.files["vectors"]["layers.0.q.qvera_d"], torch.full((3,), 9.0))
    assert names(tmp_path) == ["step-00000004"]


@pytest.mark.parametrize(
    ("newest_step", "keep", "also", "left"),
    [
        (40, 2, {10}, [10, 30, 40]),
        (40, 1, {40}, [40]),
        (40, 1, {99}, [40]),
        (40, 9, set(), [10, 20, 30, 40]),
        (30, 1, {10}, [10, 30]),  # 40 was damaged, and the run went on from an earlier one
    ],
)
def test_prune_keeps_the_newest_and_the_best(
    tmp_path: Path, newest_step: int, keep: int, also: set[int], left: list[int]
) -> None:
    save_steps(tmp_path, 40, 10, 20, 30)
    (tmp_path / ".partial-step-00000050").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.prune(tmp_path, newest_step, keep, also)
    assert names(tmp_path) == ["notes.txt", *(f"step-{n:08d}" for n in left)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_run_that_goes_on_does_not_keep_the_file_open_and_a_file_in_use_stops_no_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a file that is deleted while it is mapped stays in its directory, under another name."""
    save_steps(tmp_path, 10, 20)
    vectors, optimizer = run()
    checkpoint.restore(checkpoint.load(tmp_path / "step-00000010"), vectors, optimizer)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    unlink = os.unlink

    def silly_rename(path: Any, *more: Any, **options: Any) -> None:
        if Path(path).name != "optimizer.safetensors":
            unlink(path, *more, **options)

    monkeypatch.setattr("os.unlink", silly_rename)
    checkpoint.prune(tmp_path, 20, 1, set())
    monkeypatch.undo()
    checkpoint.prune(tmp_path, 20, 1, set())
    assert names(tmp_path) == ["step-00000020"]


def test_a_full_disk_is_said_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400_000) as disk:
        vectors = {"layers.0.q.qvera_b": nn.Parameter(torch.randn(5_000))}
        optimizer = torch.optim.AdamW(vectors.values(), lr=0.1)
        take_steps(vectors, optimizer)
        checkpoint.save(disk / "c", 1, vectors, optimizer, STATE)
        filler = fill(disk, leave_bytes=30_000)  # room for the vectors, not for the optimizer's state
        message = "the checkpoint of step 2 .*the disk is full.*Earlier checkpoints are kept"
        with pytest.raises(RunFailed, match=message):
            checkpoint.save(disk / "c", 2, vectors, optimizer, STATE)
        assert names(disk / "c") == ["step-00000001"]
        assert newest(disk / "c") == 1
        filler.unlink()
        checkpoint.save(disk / "c", 2, vectors, optimizer, STATE)
        assert names(disk / "c") == ["step-00000001", "step-00000002"]
