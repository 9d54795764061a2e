"""An export that is killed, stopped, out of disk or given a damaged base: named, nothing finished is lost, nothing half passes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qvera.adapters.files.save_load import attach, load_adapter
from qvera.cli.main import main
from qvera.config.load import load_recipe
from qvera.config.schema import AdapterSection, ExportSection, ModelSection
from qvera.exporting.merged import export_merged
from qvera.models import safetensors_stream
from qvera.models.loader import load_base
from qvera.utils import memory
from qvera.utils.errors import InputError, Interrupted, RunFailed
from tests.adapters.helpers import edit_config
from tests.conftest import small_llama, small_tokenizer
from tests.disk import fill, small_disk
from tests.exporting.helpers import trained_adapter

pytestmark = pytest.mark.process

OPTIONS = ExportSection(max_shard_size_bytes=60_000)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The tiny Llama in shards."""
    small_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    small_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> tuple[ModelSection, Path]:
    return trained_adapter(base, tmp_path / "adapter", knows_base=True)[1:]


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def times(directory: Path) -> dict[str, int]:
    """When each shard was written."""
    return {p.name: p.stat().st_mtime_ns for p in directory.glob("*.safetensors")}


def exporting(directory: Path, section: ModelSection, out: Path, options: ExportSection) -> None:
    """An export in a process of its own, slow enough to be killed in its middle."""
    export_merged(directory, section, out, options, progress=lambda *_: time.sleep(0.05))


@pytest.mark.parametrize("weights", ["original", pytest.param("dequantized", marks=pytest.mark.matrix)])
def test_killed_again_and_again_it_ends_with_the_same_bytes(adapter: Any, tmp_path: Path, weights: str) -> None:
    section, directory = adapter
    options = OPTIONS.replace(base=weights)
    export_merged(directory, section, tmp_path / "whole", options)
    shards = sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) > 5
    out = tmp_path / "out"
    seen: list[Any] = []
    for kill_at in (shards[0], shards[3]):
        # forked: a fresh process would import torch for longer than it exports
        arguments = directory, section, out, options
        process = multiprocessing.get_context("fork").Process(target=exporting, args=arguments)
        process.start()
        state = out / ".qvera_export_state.json"
        while not (state.is_file() and kill_at in json.loads(state.read_text())["shards"]):
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(0.013 * (len(seen) + 1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (out / "config.json").exists() and not (out / "qvera_export.json").exists()
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)
        for file in out.glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes(), "a shard is whole or not there"
        seen.append(times(out))
    assert seen[0].keys() < seen[1].keys()
    export_merged(directory, section, out, options)
    assert contents(out) == contents(tmp_path / "whole")
    # the shard that was being put in its place at the kill may not have been written down as finished
    for before, after in itertools.pairwise([*seen, times(out)]):
        assert sum(after[name] != written for name, written in before.items()) <= 1


def test_a_stop_is_exit_code_75_and_the_same_command_goes_on(adapter: Any, tmp_path: Path) -> None:
    section, directory = adapter
    whole, out = tmp_path / "whole", tmp_path / "out"
    export_merged(directory, section, whole, OPTIONS)

    def stop(done: int, _total: int, _name: str) -> None:
        if done == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"[1-9]\d* of \d+ shards finished .*The same command goes on") as caught:
        export_merged(directory, section, out, OPTIONS, progress=stop)
    assert caught.value.exit_code == 75
    assert not (out / "config.json").exists() and not list(out.glob("*.partial"))
    with pytest.raises(InputError, match="unfinished export of something else"):
        export_merged(directory, section, out, OPTIONS.replace(dtype="bfloat16"))
    finished = times(out)
    export_merged(directory, section, out, OPTIONS)
    assert finished.items() <= times(out).items()
    assert contents(out) == contents(whole)


def test_a_disk_that_fills_up_and_one_that_is_too_small(adapter: Any, tmp_path: Path) -> None:
    section, directory = adapter
    export_merged(directory, section, tmp_path / "whole", OPTIONS)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        filler = fill(disk, leave_bytes=100_000)
        with pytest.raises(InputError, match=r"the export needs \S+ .B, and .* are free"):
            export_merged(directory, section, disk / "out", OPTIONS)
        filler.unlink()

        def fills_up(done: int, _total: int, _name: str) -> None:
            if done == 9:
                fill(disk)

        kept = r"the disk is full.* [1-9]\d* of \d+ shards are finished and kept\. Make room and run the same command again"
        with pytest.raises(RunFailed, match=kept) as caught:
            export_merged(directory, section, disk / "out", OPTIONS, progress=fills_up)
        assert caught.value.exit_code == 1
        finished = times(disk / "out")
        assert finished and not (disk / "out" / "config.json").exists()
        filler.unlink()
        export_merged(directory, section, disk / "out", OPTIONS)
        assert contents(disk / "out") == contents(tmp_path / "whole")
        assert finished.items() <= times(disk / "out").items()


def _second(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[1]


def _shorter(base: Path) -> None:
    os.truncate(_second(base), os.path.getsize(_second(base)) - 100)


def _bad_header(base: Path) -> None:
    raw = _second(base).read_bytes()
    _second(base).write_bytes(raw[:8] + b"\x00" * 40 + raw[48:])


def _missing(base: Path) -> None:
    _second(base).unlink()


def _missing_without_index(base: Path) -> None:
    (base / "model.safetensors.index.json").unlink()
    sorted(base.glob("*.safetensors"))[-1].unlink()


def _in_one_file(base: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> None:
    tensors = {k: v for f in base.glob("*.safetensors") for k, v in load_file(f).items()}
    for file in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        file.unlink()
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def _missing_by_the_config(base: Path) -> None:
    _in_one_file(base, lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))


def _wrong_shape(base: Path) -> None:
    _in_one_file(base, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))


def _whole_numbers(base: Path) -> None:
    """A tensor that the model does not know, which a merged checkpoint would have rounded to bfloat16."""
    _in_one_file(base, lambda tensors: tensors.update({"model.steps": torch.tensor([1_000_003])}))


def _other_content(base: Path) -> None:
    """The same name, shapes and config, other weights."""
    small_llama(seed=5).to(torch.bfloat16).save_pretrained(base, max_shard_size="60KB")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_shorter, r"model-00002-of-.*, or cut short"),
        (_bad_header, r"model-00002-of-.*: not a readable safetensors file"),
        (_missing, r"model-00002-of-.*: this shard is named in .* but is missing"),
        (_missing_without_index, r"model-000\d\d-of-.*: this shard of \d+ is missing"),
        (_missing_by_the_config, r"hold no model\.layers\.1\.input_layernorm\.weight.*which config\.json asks for"),
        (_wrong_shape, r"model\.norm\.weight has shape \[63\], the model of config\.json needs \[64\]"),
        (_whole_numbers, r"model\.safetensors: model\.steps is torch\.int64, expected a floating-point weight"),
        (_other_content, r"trained on another base model than .*Expected the base .* with fingerprint [0-9a-f]{16}"),
    ],
)
def test_a_damaged_or_other_base_is_refused_by_name(
    adapter: Any, base: Path, tmp_path: Path, damage: Any, message: str, capsys: Any
) -> None:
    directory = adapter[1]
    damage(base)
    if damage in (_missing_by_the_config, _wrong_shape, _whole_numbers):  # told from the trained one already by content
        edit_config(directory, base_fingerprint=None)
    assert main(["export", str(directory), str(tmp_path / "out")]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_while_it_is_read_is_noticed(adapter: Any, base: Path, tmp_path: Path) -> None:
    section, directory = adapter
    _in_one_file(base)

    def cut(done: int, _total: int, _name: str) -> None:
        if done == 1:
            os.truncate(base / "model.safetensors", os.path.getsize(base / "model.safetensors") - 5_000)

    with pytest.raises(RunFailed, match="while it was read"):
        export_merged(directory, section, tmp_path / "out", OPTIONS, progress=cut)
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_fingerprint_guards_load_merge_and_start_and_old_adapters_pass(
    adapter: Any, tmp_path: Path, capsys: Any
) -> None:
    section, directory = adapter
    small_llama(seed=5).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    small_tokenizer().save_pretrained(tmp_path / "other")
    moved = section.replace(path=str(tmp_path / "other"))
    other = load_base(moved)
    with pytest.raises(InputError, match="trained on another base model"):
        load_adapter(other.model, directory, other)
    start = AdapterSection(rank=8, init_from=str(directory))
    with pytest.raises(InputError, match="trained on another base model"):
        attach(load_base(moved).model, start, moved.path, other.facts["fingerprint"])
    # the same content under another name is the same base: these two can be merged, and exported from there
    shutil.copytree(section.path, tmp_path / "moved")
    second = Path(shutil.copytree(directory, tmp_path / "second"))
    edit_config(second, base_model_name_or_path=str(tmp_path / "moved"))
    assert main(["merge-adapters", str(directory), str(second), str(tmp_path / "average")]) == 0
    export_merged(directory, section.replace(path=str(tmp_path / "moved")), tmp_path / "out", OPTIONS)
    edit_config(second, base_fingerprint="0" * 64)
    for line, said in (
        (["merge-adapters", str(directory), str(second), str(tmp_path / "no")], "different base models"),
        (["export", str(second), str(tmp_path / "no"), "--to", "lora"], "trained on another base model"),
    ):
        assert main(line) == 2
        assert said in capsys.readouterr().err
    config = json.loads((directory / "adapter_config.json").read_text())
    config.pop("base_fingerprint")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(other.model, directory, other)


def test_a_run_records_its_base_and_answers_only_on_it(trained_run: Path, tmp_path: Path, capsys: Any) -> None:
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    stored = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_fingerprint"]
    assert stored == json.loads((run / "run.json").read_text())["model"]["fingerprint"]
    recipe = load_recipe(run / "recipe.yaml", of_a_run=True)
    shutil.copytree(recipe.model.path, tmp_path / "model")
    small_llama(seed=5).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    moved = recipe.replace(model=recipe.model.replace(path=str(tmp_path / "model")))
    (run / "recipe.yaml").write_text(moved.to_yaml())
    assert main(["eval", str(run), "--no-generation"]) == 2
    assert "trained on another base model" in capsys.readouterr().err


def test_a_base_without_index_and_small_blocks_give_the_same_weights(
    adapter: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, directory = adapter
    for weights in ("original", "dequantized"):
        options = OPTIONS.replace(base=weights, dtype="float32")
        whole = export_merged(directory, section, tmp_path / weights, options)
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_stream, "BLOCK_ELEMENTS", 700)
            index = (base / "model.safetensors.index.json").read_text()
            (base / "model.safetensors.index.json").unlink()
            pieces = export_merged(directory, section, tmp_path / f"{weights}-pieces", options)
            (base / "model.safetensors.index.json").write_text(index)
        assert pieces["base"] == whole["base"]
        for name in whole["files"]:
            one, other = (load_file(tmp_path / d / name) for d in (weights, f"{weights}-pieces"))
            for key, tensor in one.items():
                torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6)
        for name, found in whole["delta"].items():
            assert pieces["delta"][name] == pytest.approx(found, rel=1e-5)


def test_too_little_memory_to_compare_is_said_and_can_be_made_up_for(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run, out = str(trained_run), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda _: 1000)
        assert main(["export", run, str(out)]) == 0
    said = json.loads((out / "qvera_export.json").read_text())["difference"]["not_measured"]
    assert "B of memory are available" in said and f"qvera export {run} {out} --compare-only" in said
    assert said in capsys.readouterr().out
    before = contents(out)
    assert main(["export", run, str(out), "--compare-only"]) == 0
    difference = json.loads((out / "qvera_export.json").read_text())["difference"]
    assert difference["rows"] == 8 and difference["logit_max_difference"] > 0
    after = contents(out)
    assert before.pop("qvera_export.json") != after.pop("qvera_export.json") and before == after
    assert main(["export", run, str(tmp_path / "nothing"), "--compare-only"]) == 2
    assert main(["export", run, str(tmp_path / "lora"), "--to", "lora"]) == 0
    certificate = (tmp_path / "lora" / "qvera_export.json").read_bytes()
    assert main(["export", run, str(tmp_path / "lora"), "--compare-only"]) == 2
    assert "--compare-only measures merged exports" in capsys.readouterr().err
    assert (tmp_path / "lora" / "qvera_export.json").read_bytes() == certificate


@pytest.mark.parametrize(
    "line",
    [
        ("export", "RUN", "OUT", "--to", "lora", "--rank", "1"),
        ("export", "RUN", "OUT", "--to", "gguf-lora"),
        ("merge-adapters", "RUN", "OUT", "--weights", "2"),
        ("analyze", "RUN", "--reduce", "1", "--out", "OUT"),
    ],
)
def test_an_output_that_is_not_free_is_refused_before_any_work(
    line: tuple[str, ...], trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("qvera.adapters.files.adapter_file.load_file", lambda _: pytest.fail("vectors were read"))
    (tmp_path / "here").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    monkeypatch.chdir(tmp_path / "here")
    for out, said in ((".", ".: is the directory that this command runs in"), ("../full", "is not an empty directory")):
        assert main([{"RUN": str(trained_run), "OUT": out}.get(part, part) for part in line]) == 2
        assert said in capsys.readouterr().err


def test_a_recipe_without_rows_to_compare_on_is_named(trained_run: Path, tmp_path: Path, capsys: Any) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    recipe = load_recipe(run / "recipe.yaml", of_a_run=True)
    (run / "recipe.yaml").write_text(recipe.replace(export=recipe.export.replace(certificate_rows=0)).to_yaml())
    assert main(["export", str(run), str(tmp_path / "out"), "--compare-only"]) == 2
    assert "export.certificate_rows of its recipe says, and that is 0. Set it to 16" in capsys.readouterr().err
