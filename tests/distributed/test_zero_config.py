"""The ``deepspeed`` key and what it needs of a machine, without a second process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qvera.cli.main import main
from qvera.data import Batches
from qvera.distributed import zero
from qvera.distributed.group import Group
from qvera.distributed.zero import STAGES, ZeroConfig, abandoned_build, load_zero_config, zero_config_of
from qvera.training import session
from qvera.training.plan import Machine, Sharing, make_plan
from qvera.training.plan.activations import goes_by_tiles
from qvera.training.plan.decisions import can_stream
from qvera.training.session import TrainingSession
from qvera.utils.errors import InputError
from tests.helpers import ROOT, start_process


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "size"), [(8, 4), (7, 7), (1, 1), (5, 2)])
def test_passes_share_a_batch_whatever_the_number_of_ranks(count: int, size: int, world_size: int) -> None:
    rows = [3 * i + 1 for i in range(count)]
    batches = Batches([5] * (3 * count + 1), count, size)
    shares = [batches.passes(rows, rank, world_size) for rank in range(world_size)]
    assert [row for share in shares for one in share for row in one] == rows
    assert len({len(share) for share in shares}) == 1, "all ranks walk through the layers equally often"
    assert max(len(one) for share in shares for one in share) <= size
    taken = [sum(map(len, share)) for share in shares]
    assert max(taken) - min(taken) <= 1


def test_the_shipped_configs_say_zero_and_nothing_else() -> None:
    paths = {path.stem: path for path in (ROOT / "ds_configs").iterdir()}
    assert sorted(paths) == sorted(STAGES)
    for word, path in paths.items():
        tree = json.loads(path.read_text())
        assert list(tree) == ["zero_optimization"]
        assert tree["zero_optimization"]["stage"] == int(word[4])
        try:
            config = load_zero_config(word)
        except InputError as error:
            assert word == "zero3-offload-nvme"
            assert "libaio" in str(error) and "or use zero3" in str(error)
        else:
            assert config is not None and config.model_dump(exclude_unset=True) == tree
            assert config.shards_base == word.startswith("zero3")


def test_a_build_that_was_killed_is_named_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert abandoned_build("async_io") is None  # begun a moment ago: somebody is building
    os.utime(lock, (0, 0))
    assert abandoned_build("async_io") == lock
    assert abandoned_build("another") is None


def train_with(modules: Path, said: Path, *recipes: Path) -> None:
    """In a process of its own: train the first, and end with what the second ends with."""
    sys.path.insert(0, str(modules))
    with open(said, "w") as handle, contextlib.redirect_stderr(handle):
        codes = [main(["train", str(recipe)]) for recipe in recipes]
    assert codes[0] == 0
    sys.exit(codes[1])


@pytest.mark.process
def test_a_deepspeed_that_fails_to_import_stops_only_the_runs_that_need_it(tmp_path: Path, write_recipe: Any) -> None:
    broken, said = tmp_path / "broken" / "deepspeed" / "__init__.py", tmp_path / "said"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise RuntimeError('CUDA_HOME does not exist')")
    short = {"max_steps": 1, "sample_count": 0}
    plain, zero1 = (
        write_recipe(f"{word}.yaml", training={**short, "output_dir": str(tmp_path / word)})
        for word in ("plain", "zero1")
    )
    zero1.write_text(zero1.read_text().replace("deepspeed: null", "deepspeed: zero1"))
    process = start_process(train_with, broken.parent.parent, said, plain, zero1)
    process.join(300)
    assert process.exitcode == 2, said.read_text()
    message = " ".join(said.read_text().split())
    assert "deepspeed: zero1 needs DeepSpeed, which can't be imported: CUDA_HOME does not exist. DeepSpeed" in message
    assert "or leave the key out" in message


def test_a_disk_without_room_for_the_base_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Four(Group):
        def gather(self, one: Any) -> list[Any]:
            return [["left", 250], ["right", 200], ["right", 199], ["left", 250]]

    asked = []
    monkeypatch.setattr(
        session.shutil, "disk_usage", lambda place: asked.append(place) or shutil._ntuple_diskusage(0, 0, 0)
    )
    session.check_disk_space(tmp_path / "run" / "offload", 99, Four())
    assert asked == [tmp_path]  # what is there of the path
    with pytest.raises(InputError, match="200 B of the base go to .*run/offload on right, where 199 B are free"):
        session.check_disk_space(tmp_path / "run" / "offload", 100, Four())


@pytest.mark.parametrize("named", [False, True], ids=["of the run", "named by the user"])
def test_what_a_killed_run_left_on_nvme_is_cleared_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_recipe: Any, named: bool
) -> None:
    monkeypatch.setattr(zero, "return_buffers_at_once", lambda: None)  # of this process, for good
    scratch, folder = tmp_path / "run" / "offload", tmp_path / "disk" if named else tmp_path / "run" / "offload"
    device = {"device": "nvme", **({"nvme_path": str(folder)} if named else {})}
    config = ZeroConfig.model_validate({"zero_optimization": {"stage": 3, "offload_param": device}})
    left = [folder / "zero_stage_3" / "bfloat16params" / f"rank{rank}" / "7_param.tensor.swp" for rank in (0, 1)]
    for file in left:
        file.parent.mkdir(parents=True)
        file.touch()
    first = zero.BaseSharder(config, make_recipe(), 0, 2, scratch)
    assert first.folder == folder
    assert not left[0].exists()
    assert left[1].exists()
    zero.BaseSharder(config, make_recipe(), 1, 2, scratch)
    assert folder.exists() == named
    assert not (folder / "zero_stage_3").exists()
    assert not (tmp_path / "run").exists()


def of_zero3(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **keys}}


NVME = {"offload_param": {"device": "nvme"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_batch_size": 8}, "train_batch_size: belongs to the recipe: .* set training.global_batch_size"),
        ({"train_micro_batch_size_per_gpu": 1}, "set training.per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: belongs"),
        ({"gradient_clipping": 1.0}, "set training.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "bf16: belongs to the recipe: .* set model.compute_dtype: bfloat16"),
        ({"fp16": {"enabled": True}}, "set model.compute_dtype: float16"),
        ({"scheduler": {"type": "WarmupLR"}}, "set training.lr_scheduler_type"),
        ({"optimizer": {"type": "Adam"}}, "set training.optim"),
        ({"pipeline": {}}, "pipeline: is not supported by this training loop"),
        ({"zero_optimization": {"stage": 0}}, "stage: should be greater than or equal to 1, got 0. Without ZeRO leave"),
        ({"zero_optimization": {"stage": True}}, "stage: should be a whole number, got True"),
        ({"zero_optimization": None}, "zero_optimization: should be a mapping of keys, got None"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offloads parameters in stage 2"),
        (of_zero3(offload_optimizer={"device": "cpu"}), "offload_optimizer"),
        (of_zero3(stage3_param_persistence_threshold="auto"), "_persistence_threshold: is 'auto', .* Remove it"),
        (of_zero3(offload_param={"device": "disk"}), "offload_param.device: should be 'cpu', 'nvme' or 'none', got"),
        (of_zero3(**NVME, stage3_prefetch_bucket_size=9), "bucket_size: is not possible for weights on NVMe"),
        (of_zero3(**NVME, stage3_max_reuse_distance=9), "distance: is not possible for weights on NVMe"),
    ],
)
def test_a_config_that_says_what_the_recipe_says_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **change}))
    with pytest.raises(InputError, match=words) as caught:
        load_zero_config(str(path))
    assert "mine.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_said(tmp_path: Path, make_recipe: Any) -> None:
    with pytest.raises(InputError, match=r"'zero33' is neither; did you mean 'zero3'\?"):
        load_zero_config("zero33")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match="holds a list"):
        load_zero_config(str(tmp_path / "list.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad.json: line 1, column 2 is not JSON .*the recipe's deepspeed key"):
        load_zero_config(str(tmp_path / "bad.json"))
    with pytest.raises(InputError, match="training.optim: adamw_8bit"):
        make_recipe(training={"optim": "adamw_8bit"}).replace(deepspeed="zero1")
    assert make_recipe().replace(deepspeed="none").deepspeed is None  # as other messages advise
    recipe = make_recipe().replace(deepspeed="zero1")
    assert yaml.safe_load(recipe.to_yaml())["deepspeed"] == "zero1"


@pytest.fixture(params=["zero3", "a file of its own"])
def stage_three(request: Any, tmp_path: Path) -> str:
    """Two values of the recipe's key that both shard the base."""
    if request.param == "zero3":
        return request.param
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 3}}')
    return str(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("section", "keys", "words"),
    [
        ("model", {"stream": True}, "model.stream: ZeRO-3 brings the layers"),
        ("model", {"added_tokens": ["<|tool|>"]}, "model.added_tokens: ZeRO-3 divides the embedding"),
        ("training", {"torch_compile": True}, "training.torch_compile: ZeRO-3 gathers"),
        ("training", {"objective": "dpo"}, "which is not built for training.objective: dpo"),
    ],
)
def test_what_does_not_go_with_a_sharded_base_is_refused_by_run_and_plan(
    stage_three: str, section: str, keys: dict[str, Any], words: str, make_recipe: Any, tmp_path: Path, capsys: Any
) -> None:
    recipe = make_recipe(**{section: keys})
    assert zero_config_of(recipe) is None
    assert zero_config_of(recipe.replace(deepspeed="zero2")) is not None
    recipe = recipe.replace(deepspeed=stage_three)
    with pytest.raises(InputError, match=words):
        TrainingSession(recipe, tmp_path, Group())
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--no-timing"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_plan_neither_streams_nor_tiles_a_sharded_base(stage_three: str, make_recipe: Any) -> None:
    recipe = make_recipe(training={"gradient_checkpointing": True, "loss_chunk_tokens": 8}, data={"max_length": 4096})
    recipe = recipe.replace(deepspeed=stage_three)
    sharing, card = Sharing.of(zero_config_of(recipe)), Machine("a GPU", "cuda", torch.bfloat16, False, 1000)
    sharded, alone = make_plan(recipe, card, sharing=sharing), make_plan(recipe.replace(deepspeed=None), card)
    assert alone.batch.all_tokens > 4096 and goes_by_tiles(alone)
    assert can_stream(alone) and any("model.stream" in change.settings for change in alone.changes)
    assert sharing.stage == 3
    assert not goes_by_tiles(sharded) and not can_stream(sharded)
    assert not any("model.stream" in change.settings for change in sharded.changes)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_zero3_gathers_one_layer_ahead_on_a_gpu_and_none_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, make_recipe: Any, tmp_path: Path, gpu: bool
) -> None:
    monkeypatch.setattr(zero.accelerator, "is_available", lambda: gpu)
    config = load_zero_config("zero3")
    assert config is not None
    tree = config.complete(make_recipe().training, 2, zero.Sizes(largest_layer=1000), tmp_path)["zero_optimization"]
    assert tree["stage3_prefetch_bucket_size"] == (1000 if gpu else 0)
    assert tree["stage3_max_live_parameters"] == (3000 if gpu else 2000)
