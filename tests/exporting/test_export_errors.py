"""An export that is killed, stopped, out of disk or given a damaged base: named, nothing finished is lost, nothing half passes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qvera.adapters.save_load import attach, check_start, load_adapter
from qvera.cli.main import main
from qvera.config.schema import load_recipe
from qvera.config.sections import AdapterSection, ExportSection, ModelSection
from qvera.exporting.merged import export_merged
from qvera.models import safetensors_stream
from qvera.models.loader import load_base
from qvera.utils import memory
from qvera.utils.errors import InputError, Interrupted, OutOfMemory, RunFailed
from tests.adapters.helpers import edit_config
from tests.conftest import small_llama, small_tokenizer
from tests.disk import fill, small_disk
from tests.exporting.helpers import trained_adapter

pytestmark = pytest.mark.process

OPTIONS = ExportSection(max_shard_size_bytes=60_000)


class Case(NamedTuple):
    """An adapter that knows its base, and the whole export of the two."""

    section: ModelSection
    adapter: Path
    whole: Path

    @property
    def base(self) -> Path:
        return Path(self.section.path)

    def export(self, out: Path, options: ExportSection = OPTIONS, progress: Any = None) -> dict[str, Any]:
        return export_merged(self.adapter, self.section, out, options, progress=progress)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Of the tiny Llama in shards."""
    root = tmp_path_factory.mktemp("case")
    small_llama().to(torch.bfloat16).save_pretrained(root / "base", max_shard_size="60KB")
    small_tokenizer().save_pretrained(root / "base")
    _, section, adapter = trained_adapter(root / "base", root / "adapter", knows_base=True)
    made = Case(section, adapter, root / "whole")
    made.export(made.whole)
    return made


@pytest.fixture
def own(case: Case, tmp_path: Path) -> Case:
    """Copies of base and adapter that a test may damage."""
    for path in (case.base, case.adapter):
        shutil.copytree(path, tmp_path / path.name)
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    return case._replace(section=case.section.replace(path=str(tmp_path / "base")), adapter=tmp_path / "adapter")


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def times(directory: Path) -> dict[str, int]:
    """When each shard was written."""
    return {p.name: p.stat().st_mtime_ns for p in directory.glob("*.safetensors")}


def at_the_ninth_tensor(act: Callable[[], object]) -> Callable[[int, int, str], None]:
    def progress(done: int, _total: int, _name: str) -> None:
        if done == 9:
            act()

    return progress


def test_killed_again_and_again_it_ends_with_the_same_bytes(case: Case, tmp_path: Path) -> None:
    whole, out, seen = contents(case.whole), tmp_path / "out", list[dict[str, int]]()
    shards = sorted(times(case.whole))
    assert len(shards) > 5
    for kill_at in (shards[0], shards[3]):
        # forked: a fresh process would import torch for longer than it exports; slow enough to be killed in its middle
        arguments = out, OPTIONS, lambda *_: time.sleep(0.05)
        process = multiprocessing.get_context("fork").Process(target=case.export, args=arguments)
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
        seen.append(times(out))
        assert all((out / name).read_bytes() == whole[name] for name in seen[-1]), "a shard is whole or not there"
    assert seen[0].keys() < seen[1].keys()
    case.export(out)
    assert contents(out) == whole
    # the shard that was being put in its place at the kill may not have been written down as finished
    for before, after in itertools.pairwise([*seen, times(out)]):
        assert sum(after[name] != written for name, written in before.items()) <= 1


def test_a_stop_is_exit_code_75_and_the_same_command_goes_on(case: Case, tmp_path: Path) -> None:
    out, stop = tmp_path / "out", at_the_ninth_tensor(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"[1-9]\d* of \d+ shards finished .*The same command goes on") as caught:
        case.export(out, progress=stop)
    assert caught.value.exit_code == 75
    assert not (out / "config.json").exists() and not list(out.glob("*.partial"))
    with pytest.raises(InputError, match="unfinished export of something else"):
        case.export(out, OPTIONS.replace(dtype="bfloat16"))
    finished = times(out)
    case.export(out, OPTIONS.replace(certificate_rows=3))  # the merge is the same
    assert finished.items() <= times(out).items()
    assert contents(out) == contents(case.whole)


def test_a_disk_that_fills_up_and_one_that_is_too_small(case: Case, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        filler, out = fill(disk, leave_bytes=100_000), disk / "out"
        with pytest.raises(InputError, match=r"the export needs \S+ .B, and .* are free"):
            case.export(out)
        filler.unlink()
        kept = r"the disk is full.* [1-9]\d* of \d+ shards are finished and kept\. Make room and run the same command again"
        with pytest.raises(RunFailed, match=kept) as caught:
            case.export(out, progress=at_the_ninth_tensor(lambda: fill(disk)))
        assert caught.value.exit_code == 1
        finished = times(out)
        assert finished and not (out / "config.json").exists()
        filler.unlink()
        case.export(out)
        assert contents(out) == contents(case.whole)
        assert finished.items() <= times(out).items()


def _missing(base: Path) -> None:
    sorted(base.glob("*.safetensors"))[1].unlink()


def _missing_without_index(base: Path) -> None:
    (base / "model.safetensors.index.json").unlink()
    sorted(base.glob("*.safetensors"))[-1].unlink()


def _in_one_file(base: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> None:
    tensors = {k: v for f in base.glob("*.safetensors") for k, v in load_file(f).items()}
    for file in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        file.unlink()
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


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
        (_missing, r"model-00002-of-.*: this shard is named in .* but is missing"),
        (_missing_without_index, r"model-000\d\d-of-.*: this shard of \d+ is missing"),
        (_wrong_shape, r"model\.norm\.weight has shape \[63\], the model of config\.json needs \[64\]"),
        (_whole_numbers, r"model\.safetensors: model\.steps is torch\.int64, expected a floating-point weight"),
        (
            _other_content,
            r"another base model than .* with fingerprint [0-9a-f]{16};.* The files there are others by now",
        ),
    ],
)
def test_a_damaged_or_other_base_is_refused_by_name(
    own: Case, tmp_path: Path, damage: Any, message: str, capsys: Any
) -> None:
    damage(own.base)
    if damage in (_wrong_shape, _whole_numbers):  # told from the trained one already by content
        edit_config(own.adapter, base_fingerprint=None)
    assert main(["export", str(own.adapter), str(tmp_path / "out")]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_while_it_is_read_is_noticed(own: Case, tmp_path: Path) -> None:
    _in_one_file(own.base)
    file = own.base / "model.safetensors"
    with pytest.raises(RunFailed, match="while it was read"):
        own.export(tmp_path / "out", progress=lambda *_: os.truncate(file, file.stat().st_size - 1_000))
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_fingerprint_guards_load_merge_and_start_and_old_adapters_pass(
    own: Case, trained_run: Path, tmp_path: Path, capsys: Any
) -> None:
    section, adapter = own.section.replace(path=str(tmp_path / "other")), str(own.adapter)
    shutil.copytree(own.base, tmp_path / "other")
    _other_content(tmp_path / "other")
    other = load_base(section)
    with pytest.raises(InputError, match="trained on another base model"):
        load_adapter(other.model, own.adapter, other)
    with pytest.raises(InputError, match=r"adapter\.init_from: .*not an adapter directory\. Did you mean .*/adapter\?"):
        check_start(AdapterSection(rank=8, init_from=str(trained_run)), section)
    start = AdapterSection(rank=8, init_from=adapter)
    with pytest.raises(InputError, match="trained on another base model"):
        check_start(start, section)  # before anything is loaded
    recipe = {
        "model": {"path": section.path},
        "data": {"path": "rows.jsonl"},
        "adapter": {"rank": 8, "init_from": adapter},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--no-timing"]) == 2
    assert "trained on another base model" in capsys.readouterr().err
    with pytest.raises(InputError, match="trained on another base model"):
        attach(load_base(section).model, start, section.path, other.facts["fingerprint"])
    # the same content under another name is the same base: these two can be merged, and exported from there
    shutil.copytree(own.base, tmp_path / "moved")
    second = Path(shutil.copytree(own.adapter, tmp_path / "second"))
    edit_config(second, base_model_name_or_path=str(tmp_path / "moved"))
    assert main(["merge-adapters", adapter, str(second), str(tmp_path / "average")]) == 0
    assert main(["export", str(second), str(tmp_path / "out"), "--to", "lora"]) == 0
    edit_config(second, base_fingerprint="0" * 64)
    for line, said in (
        (["merge-adapters", adapter, str(second), str(tmp_path / "no")], "different base models"),
        (["export", str(second), str(tmp_path / "no"), "--to", "lora"], "trained on another base model"),
    ):
        assert main(line) == 2
        assert said in capsys.readouterr().err
    config = json.loads((own.adapter / "adapter_config.json").read_text())
    config.pop("base_fingerprint")
    (own.adapter / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(other.model, own.adapter, other)


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


@pytest.mark.parametrize("weights", ["original", "dequantized"])
def test_a_base_without_index_and_small_blocks_give_the_same_weights(
    weights: Any, own: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS.replace(base=weights, dtype="float32")
    whole = own.export(tmp_path / "whole", options)
    monkeypatch.setattr(safetensors_stream, "FILE_BLOCK_ELEMENTS", 700)
    (own.base / "model.safetensors.index.json").unlink()
    pieces = own.export(tmp_path / "pieces", options)
    assert pieces["base"] == whole["base"]
    for name in whole["files"]:
        one, other = (load_file(tmp_path / directory / name) for directory in ("whole", "pieces"))
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    for name, found in whole["delta"].items():
        assert pieces["delta"][name] == pytest.approx(found, rel=1e-5)


def test_too_little_memory_to_compare_is_said_and_can_be_made_up_for(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run, out = str(trained_run), tmp_path / "my out"
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda _: 1000)
        assert main(["export", run, str(out)]) == 0
    said = json.loads((out / "qvera_export.json").read_text())["difference"]["not_measured"]
    assert "B of memory are available" in said and said in capsys.readouterr().out
    before = contents(out)
    (advised,) = re.findall("`qvera (export .*--compare-only)`", said)
    assert main(shlex.split(advised)) == 0
    difference = json.loads((out / "qvera_export.json").read_text())["difference"]
    assert difference["rows"] == 8 and difference["logit_max_difference"] > 0
    after = contents(out)
    assert before.pop("qvera_export.json") != after.pop("qvera_export.json") and before == after
    assert main(["export", run, str(tmp_path / "nothing"), "--compare-only"]) == 2
    for number, (error, said) in enumerate(
        {
            MemoryError(): "the memory gave out. `qvera eval",
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"): "memory gave out. ",
            OutOfMemory("Memory ran out with one of the prompts at a time."): "one of the prompts at a time. `qvera",
        }.items()
    ):
        cut = tmp_path / f"cut{number}"

        def fail(*_: object, cut: Path = cut, error: Exception = error) -> None:
            assert (cut / "qvera_export.json").is_file()  # whatever ends the scoring, the LoRA has its certificate
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("qvera.exporting.compare.adapter_scores", fail)
            assert main(["export", run, str(cut), "--to", "lora", "--rank", "4"]) == 0
        assert said in json.loads((cut / "qvera_export.json").read_text())["difference"]["not_measured"]
    (advised,) = re.findall(f"`qvera (eval .*{cut.name}.*)`", capsys.readouterr().out)
    assert main(shlex.split(advised)) == 0
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
    monkeypatch.setattr("qvera.adapters.adapter_file.load_file", lambda _: pytest.fail("vectors were read"))
    (tmp_path / "here").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    monkeypatch.chdir(tmp_path / "here")
    for out, said in ((".", ".: is the directory that this command runs in"), ("../full", "is not an empty directory")):
        assert main([{"RUN": str(trained_run), "OUT": out}.get(part, part) for part in line]) == 2
        assert said in capsys.readouterr().err


def test_a_merge_into_a_full_directory_is_refused_before_the_base_is_hashed(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("qvera.exporting.merged.Merging", lambda *_: pytest.fail("the base was read"))
    (tmp_path / "mine").touch()
    assert main(["export", str(trained_run), str(tmp_path)]) == 2
    assert "is not empty. Nothing is overwritten" in capsys.readouterr().err


def test_a_recipe_without_rows_to_compare_on_is_named(trained_run: Path, tmp_path: Path, capsys: Any) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    recipe = load_recipe(run / "recipe.yaml", of_a_run=True)
    (run / "recipe.yaml").write_text(recipe.replace(export=recipe.export.replace(certificate_rows=0)).to_yaml())
    assert main(["export", str(run), str(tmp_path / "out"), "--compare-only"]) == 2
    assert "export.certificate_rows of its recipe says, and that is 0. Set it to 16" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_stopped_while_it_is_measured_is_whole_and_measured_later(
    number: int, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stopped(*_: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:  # as a library may do while it reads weights
            raise ValueError("could not determine the shape of object type 'UntypedStorage'") from None

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("qvera.exporting.compare.measure_difference", stopped)
        assert main(["export", str(trained_run), str(out)]) == 75
    said = capsys.readouterr().err
    assert f"Stopped while it was measured; {out} is whole." in said
    (advised,) = re.findall("`qvera (export .*--compare-only)`", said)
    assert main(shlex.split(advised)) == 0
    assert json.loads((out / "qvera_export.json").read_text())["difference"]["rows"] == 8
