"""Checkpoints: what is saved comes back to the bit; what was damaged, cut short or left half-written is never taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvera.training import checkpoint
from qvera.utils.errors import InputError, RunFailed
from tests.disk import fill, read_only, small_disk
from tests.training.runs import vouch_for

STATE: dict[str, Any] = {"schedule": {"last_epoch": 7}, "progressed": {"best_loss": 1.25, "note": "Grüße"}}
FILES = ["manifest.json", "optimizer.safetensors", "random.safetensors", "state.json", "vectors.safetensors"]


def run(seed: int = 0, steps: int = 3) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Vectors and an AdamW that has taken a few steps."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {
        name: nn.Parameter(torch.randn(size, generator=generator))
        for name, size in (("layers.0.q.qvera_b", 5), ("layers.0.q.qvera_d", 3), ("layers.1.q.qvera_b", 4))
    }
    optimizer = torch.optim.AdamW(vectors.values(), lr=0.1)
    for _ in range(steps):
        step(vectors, optimizer)
    return vectors, optimizer


def step(vectors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum((v * torch.rand(v.shape)).square().sum() for v in vectors.values()).backward()  # type: ignore[union-attr]
    optimizer.step()


def newest(directory: Path, warned: list[str] | None = None) -> int | None:
    """The step of the newest checkpoint that can be used."""
    found = checkpoint.newest(directory, (lambda _: None) if warned is None else warned.append)
    return None if found is None else found.number


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    vectors, optimizer = run()
    return checkpoint.save(tmp_path, 7, vectors, optimizer, STATE)


def test_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(5)
    vectors, optimizer = run()
    path = checkpoint.save(tmp_path, 7, vectors, optimizer, STATE)
    assert path == tmp_path / "step-00000007"
    assert sorted(p.name for p in path.iterdir()) == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]
    loaded = checkpoint.load(path)
    assert loaded.number == 7
    assert loaded.path == path
    assert {k: loaded.state[k] for k in STATE} == STATE
    assert loaded.files["vectors"].keys() == vectors.keys()
    assert all(torch.equal(loaded.files["vectors"][n], v) for n, v in vectors.items())


def test_going_on_from_it_is_going_on(tmp_path: Path) -> None:
    torch.manual_seed(5)
    vectors, optimizer = run()
    path = checkpoint.save(tmp_path, 3, vectors, optimizer, STATE)
    for _ in range(4):
        step(vectors, optimizer)

    torch.manual_seed(999)
    others, fresh = run(seed=8, steps=0)
    checkpoint.restore(checkpoint.load(path), others, fresh)
    for _ in range(4):
        step(others, fresh)  # draws random numbers, as dropout does
    assert all(torch.equal(others[n], v) for n, v in vectors.items())
    for name, vector in vectors.items():
        mine, theirs = optimizer.state[vector], fresh.state[others[name]]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_scalars_and_half_precision_in_the_optimizers_state_survive(tmp_path: Path) -> None:
    vectors, optimizer = run(steps=0)
    first = vectors["layers.0.q.qvera_b"]
    moment = torch.arange(5, dtype=torch.uint8)
    optimizer.state[first] = {"step": 12, "state1": moment, "absmax1": torch.tensor([0.5]), "flag": True}
    path = checkpoint.save(tmp_path, 1, vectors, optimizer, {})
    others, fresh = run(seed=3, steps=0)
    checkpoint.restore(checkpoint.load(path), others, fresh)
    state = fresh.state[others["layers.0.q.qvera_b"]]
    assert state["step"] == 12
    assert state["flag"] is True
    assert torch.equal(state["absmax1"], torch.tensor([0.5]))
    assert torch.equal(state["state1"], moment)
    assert state["state1"].dtype == torch.uint8
    assert others["layers.0.q.qvera_d"] not in fresh.state  # what had no state yet has none now


def test_saving_does_not_touch_what_it_saves(tmp_path: Path) -> None:
    vectors, optimizer = run()
    before = {n: v.detach().clone() for n, v in vectors.items()}
    state = torch.get_rng_state()
    checkpoint.save(tmp_path, 1, vectors, optimizer, STATE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in vectors.items())


@pytest.mark.parametrize(
    "rename_first", [{"layers.0.q.qvera_b": "layers.9.q.qvera_b"}, {"layers.0.q.qvera_b": None}], ids=["other", "fewer"]
)
def test_vectors_of_another_recipe_are_refused(saved: Path, rename_first: dict[str, str | None]) -> None:
    vectors, _ = run(seed=3)
    others = {rename_first.get(n, n): v for n, v in vectors.items() if rename_first.get(n, n)}
    before = [v.detach().clone() for v in others.values()]
    with pytest.raises(InputError, match="its vectors are not those of this recipe"):
        checkpoint.restore(checkpoint.load(saved), others, torch.optim.AdamW(others.values()))  # type: ignore[arg-type]
    assert all(torch.equal(v, b) for v, b in zip(others.values(), before, strict=True))
    vectors, optimizer = run()
    vectors["layers.0.q.qvera_d"] = nn.Parameter(torch.zeros(2))  # another length
    with pytest.raises(InputError, match="other rank, targets or model"):
        checkpoint.restore(checkpoint.load(saved), vectors, optimizer)


# Damage.


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_noticed(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(InputError, match=file.replace(".", r"\.")):
        checkpoint.load(saved)


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)], ids=["some bytes", "all bytes"])
def test_cut_at_any_byte_it_is_passed_over(saved: Path, every: int) -> None:
    """Whichever file was cut short; the manifest too."""
    for file in FILES:
        content = (saved / file).read_bytes()
        for length in [*range(0, len(content), every), len(content) - 1]:
            (saved / file).write_bytes(content[:length])
            warned: list[str] = []
            assert newest(saved.parent, warned) is None, (file, length)
            assert len(warned) == 1
            assert file in warned[0]
            assert warned[0].endswith("It is passed over.")
        (saved / file).write_bytes(content)
    assert checkpoint.load(saved).number == 7


@pytest.mark.parametrize("file", [f for f in FILES if f != "manifest.json"])
def test_every_flipped_bit_in_a_file_is_noticed(saved: Path, file: str) -> None:
    content = bytearray((saved / file).read_bytes())
    places = range(0, len(content), max(1, len(content) // 40))
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        (saved / file).write_bytes(flipped)
        with pytest.raises(InputError, match="damaged"):
            checkpoint.load(saved)
    (saved / file).write_bytes(content)
    assert checkpoint.load(saved).number == 7


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
            assert loaded.number == wanted.number
            assert loaded.state == wanted.state
            assert all(torch.equal(loaded.files["vectors"][n], v) for n, v in wanted.files["vectors"].items())
    assert refused > 0.7 * len(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(files={}),
        lambda m: m["files"].pop("vectors.safetensors"),
        lambda m: m.update(files=[]),
        lambda m: m["files"].update({"state.json": "abc"}),
        lambda m: m["files"]["state.json"].pop("sha256"),
        lambda m: m.pop("format"),
        lambda m: m.pop("files"),
    ],
    ids=["no files", "one fewer", "a list", "no facts", "no hash", "no format", "files missing"],
)
def test_a_manifest_that_does_not_vouch_for_every_file_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    change(manifest)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"step-00000007"):
        checkpoint.load(saved)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_format_is_refused(saved: Path, version: Any) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format": version}))
    with pytest.raises(InputError, match=f"has checkpoint format {version}; this qvera reads format 1"):
        checkpoint.load(saved)
    warned: list[str] = []
    assert newest(saved.parent, warned) is None
    assert f"step-00000007: has checkpoint format {version}; this qvera reads format 1. It is passed over." in warned[0]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vectors.safetensors", b"not safetensors"),
        ("optimizer.safetensors", b""),
        ("random.safetensors", b"\xff" * 64),
        ("state.json", b"[]"),
        ("state.json", b"{"),
        ("state.json", b"\xff"),
        ("state.json", b'{"step": 8}'),
        ("state.json", b'{"step": "7"}'),
    ],
)
def test_a_manifest_that_fits_does_not_make_it_a_checkpoint(saved: Path, file: str, content: bytes) -> None:
    (saved / file).write_bytes(content)
    vouch_for(saved)
    with pytest.raises(InputError, match="step-00000007: is no checkpoint of qvera's"):
        checkpoint.load(saved)


def test_the_manifest_of_another_run_or_step_is_refused_and_the_one_before_taken(tmp_path: Path) -> None:
    for run_name, seed in (("mine", 1), ("other", 2)):
        torch.manual_seed(seed)
        vectors, optimizer = run(seed=seed)
        for number in (2, 4):
            checkpoint.save(tmp_path / run_name, number, vectors, optimizer, STATE)
            step(vectors, optimizer)
    manifest = tmp_path / "mine" / "step-00000004" / "manifest.json"
    for source in (tmp_path / "other" / "step-00000004", tmp_path / "mine" / "step-00000002"):
        shutil.copy(source / "manifest.json", manifest)
        warned: list[str] = []
        assert newest(tmp_path / "mine", warned) == 2
        assert len(warned) == 1
        assert "step-00000004" in warned[0]
        assert "not what the manifest says" in warned[0]


# Which one is taken, and which are kept.


def save_steps(directory: Path, *steps: int) -> None:
    vectors, optimizer = run()
    for number in steps:
        checkpoint.save(directory, number, vectors, optimizer, STATE)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_the_newest_that_verifies_is_taken_and_the_others_are_told_of(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") is None
    assert newest(tmp_path) is None
    save_steps(tmp_path, 2, 10, 9)
    warned: list[str] = []
    assert newest(tmp_path, warned) == 10
    assert not warned
    (tmp_path / "step-00000010" / "manifest.json").unlink()
    (tmp_path / "step-00000009" / "vectors.safetensors").write_bytes(b"")
    assert newest(tmp_path, warned) == 2
    assert len(warned) == 2
    assert "step-00000010" in warned[0]
    assert "step-00000009" in warned[1]
    assert all(w.endswith("It is passed over.") for w in warned)
    shutil.rmtree(tmp_path / "step-00000002")
    assert newest(tmp_path) is None


def test_half_written_and_foreign_directories_are_passed_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 4)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / ".partial-step-00000009")
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000099-old")
    assert newest(tmp_path) == 4
    assert [path.name for path in checkpoint.directories(tmp_path)] == ["step-00000004"]


def test_a_write_that_fails_leaves_no_checkpoint_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 4)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(RunFailed, match="the checkpoint of step 8 .*: the disk is full"):
        save_steps(tmp_path, 8)
    assert "step-00000008" not in names(tmp_path)
    assert newest(tmp_path) == 4
    monkeypatch.undo()
    save_steps(tmp_path, 8)  # over the leftovers
    assert names(tmp_path) == ["step-00000004", "step-00000008"]


def test_the_manifest_is_written_last_and_everything_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(checkpoint, "flush", lambda path: flushed.append(path.name))
    save_steps(tmp_path, 4)
    assert sorted(flushed[:-2]) == [f for f in FILES if f != "manifest.json"]
    assert flushed[-2:] == ["manifest.json", tmp_path.name]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    vectors, optimizer = run()
    checkpoint.save(tmp_path, 4, vectors, optimizer, {"a": 1})
    with torch.no_grad():
        vectors["layers.0.q.qvera_d"].fill_(9)
    path = checkpoint.save(tmp_path, 4, vectors, optimizer, {"a": 2})
    loaded = checkpoint.load(path)
    assert loaded.state["a"] == 2
    assert torch.equal(loaded.files["vectors"]["layers.0.q.qvera_d"], torch.full((3,), 9.0))
    assert names(tmp_path) == ["step-00000004"]


def test_paged_state_is_paged_again(tmp_path: Path) -> None:
    vectors = {"layers.0.q.qvera_b": nn.Parameter(torch.randn(6))}
    optimizer: Any = torch.optim.AdamW(vectors.values(), lr=0.1)
    step(vectors, optimizer)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, vectors, optimizer, STATE))
    paged: list[torch.Tensor] = []
    optimizer.is_paged = True
    optimizer.get_state_buffer = lambda p, dtype: (paged.append(torch.zeros_like(p, dtype=dtype)), paged[-1])[1]
    checkpoint.restore(loaded, vectors, optimizer)
    state = optimizer.state[vectors["layers.0.q.qvera_b"]]
    assert {id(tensor) for tensor in paged} == {id(state["exp_avg"]), id(state["exp_avg_sq"])}
    assert torch.equal(state["exp_avg"], loaded.files["optimizer"]["layers.0.q.qvera_b/exp_avg"])


@pytest.mark.parametrize(
    ("saved", "keep", "also", "left"),
    [
        (40, 2, set(), [30, 40]),
        (40, 2, {10}, [10, 30, 40]),
        (40, 1, {40}, [40]),
        (40, 1, {99}, [40]),
        (40, 9, set(), [10, 20, 30, 40]),
        (30, 1, {10}, [10, 30]),  # 40 was damaged, and the run went on from an earlier one
    ],
)
def test_prune_keeps_the_newest_and_the_best(
    tmp_path: Path, saved: int, keep: int, also: set[int], left: list[int]
) -> None:
    save_steps(tmp_path, 40, 10, 20, 30)
    (tmp_path / ".partial-step-00000050").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.prune(tmp_path, saved, keep, also)
    assert names(tmp_path) == ["notes.txt", *(f"step-{n:08d}" for n in left)]


def test_a_full_disk_is_said_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400_000) as disk:
        vectors = {"layers.0.q.qvera_b": nn.Parameter(torch.randn(5_000))}
        optimizer = torch.optim.AdamW(vectors.values(), lr=0.1)
        step(vectors, optimizer)
        checkpoint.save(disk / "c", 1, vectors, optimizer, STATE)
        filler = fill(disk, leave_bytes=30_000)  # room for the vectors, not for the optimizer's state
        with pytest.raises(
            RunFailed, match="the checkpoint of step 2 .*the disk is full.*Earlier checkpoints are kept"
        ):
            checkpoint.save(disk / "c", 2, vectors, optimizer, STATE)
        assert names(disk / "c") == ["step-00000001"]
        assert newest(disk / "c") == 1
        filler.unlink()
        checkpoint.save(disk / "c", 2, vectors, optimizer, STATE)
        assert names(disk / "c") == ["step-00000001", "step-00000002"]


def test_a_disk_that_became_read_only_is_said_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400_000) as disk:
        save_steps(disk / "c", 1)
        with read_only(disk), pytest.raises(RunFailed, match="step 2 .*can't be written .Read-only file system"):
            save_steps(disk / "c", 2)
        assert newest(disk / "c") == 1
        assert names(disk / "c") == ["step-00000001"]
        save_steps(disk / "c", 2)
