"""Damaged checkpoints and bad disks with several ranks: rank 0 sees them, all ranks do the same and go on from the same one. Slow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.disk import fill, read_only, small_disk
from tests.distributed.ranks import run_worker
from tests.distributed.runs import BARE, CUT, TinyRuns, losses, vectors

pytestmark = pytest.mark.slow
STAGES = [None, "zero3"]


def flip(path: Path) -> str:
    content = bytearray((path / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(content)
    return "optimizer.safetensors: is missing or not what the manifest says"


def cut(path: Path) -> str:
    content = (path / "vectors.safetensors").read_bytes()
    (path / "vectors.safetensors").write_bytes(content[: len(content) // 2])
    return "vectors.safetensors: is missing or not what the manifest says"


def foreign(path: Path) -> str:
    shutil.copy(path.with_name("step-00000003") / "manifest.json", path / "manifest.json")
    return "is missing or not what the manifest says"


def older(path: Path) -> str:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    return "has checkpoint format 0; this qvera reads format 1"


DAMAGE = [flip, cut, foreign, older]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_rows: Path) -> TinyRuns:
    place = TinyRuns(tmp_path_factory.mktemp("damage"), tiny_rows)
    root, said = place.root, {}
    tasks: list[dict[str, Any]] = []
    for stage in STAGES:
        recipe = place.recipe(stage, **BARE)
        tasks.append({"name": f"{stage}-whole", "recipe": recipe, "run_dir": str(root / f"{stage}-whole")})
        tasks.append(
            {**tasks[-1], "name": f"{stage}-stopped", "run_dir": str(root / f"{stage}-stopped"), "stop_after": CUT}
        )
    run_worker(tasks, 2, root / "first", limit_seconds=200)
    tasks = []
    for stage in STAGES:
        for damage in DAMAGE:
            name = f"{stage}-{damage.__name__}"
            shutil.copytree(root / f"{stage}-stopped", root / name)
            said[name] = damage(root / name / "checkpoints" / f"step-{CUT:08d}")
            task = {"name": name, "recipe": place.recipe(stage, **BARE), "run_dir": str(root / name), "resume": True}
            tasks.append(task)
    place.found = run_worker(tasks, 2, root / "second", limit_seconds=300)
    place.said = said  # type: ignore[attr-defined]
    return place


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_go_on_from_the_one_before(place: TinyRuns, stage: str | None, damage: Any) -> None:
    name = f"{stage}-{damage.__name__}"
    for rank in place.found:  # from step 3, where the cut had been after 4
        assert len(rank[name]["rows"]) == 3, rank[name]
    assert losses(place.root / name) == losses(place.root / f"{stage}-whole")
    mine, theirs = vectors(place.root / name), vectors(place.root / f"{stage}-whole")
    assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items())
    said = "".join((place.root / "second" / "rank0.log").read_text().split())  # lines are broken anywhere
    assert "".join(place.said[name].split()) in said  # type: ignore[attr-defined]
    assert "Itispassedover." in said


def test_a_full_disk_and_a_read_only_one_end_all_ranks_alike(place: TinyRuns, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        filler = fill(disk, leave_bytes=40_000)  # the run's first files, and no checkpoint

        def attempt(name: str, **more: Any) -> list[dict[str, Any]]:
            recipe = place.recipe(None, save_steps=1, **BARE)
            task = {"name": "run", "recipe": recipe, "run_dir": str(disk / "run"), "fails": True, **more}
            return [rank["run"] for rank in run_worker([task], 2, tmp_path / name, limit_seconds=120)]

        for rank in attempt("full"):
            assert rank["error"] == "RunFailed"
            assert "the disk is full" in rank["text"]
            assert rank["exit_code"] == 1
        filler.unlink()
        with read_only(disk):
            for rank in attempt("read-only", resume=True):
                assert rank["error"] == "InputError"
                assert "nothing can be written in" in rank["text"]
        for rank in attempt("again", resume=True):
            assert rank["error"] is None
        assert len(losses(disk / "run")) == len(losses(place.root / "None-whole"))
        assert losses(disk / "run") == losses(place.root / "None-whole")
