"""Files that a stranger may have made: no pickle is opened, no code of a model is run, no name leaves its directory."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qvera.adapters.adapter_file import read_adapter
from qvera.cli.main import main
from qvera.config.sections import ModelSection
from qvera.models.loader import load_base
from qvera.training import checkpoint
from qvera.utils.errors import InputError
from tests.helpers import start_process
from tests.training.runs import stop_after

pytestmark = pytest.mark.process


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = str(sprung)

    def __reduce__(self) -> Any:
        return (open, (self.sprung, "w"))


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    return tmp_path / "sprung"


def lay(directory: Path, sprung: Path, *names: str) -> None:
    """Pickles of a `Trap` under these names, as torch writes them and bare."""
    for number, name in enumerate(names):
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if number % 2:
            file.write_bytes(pickle.dumps(Trap(sprung)))
        else:
            torch.save({"state_dict": Trap(sprung)}, file)


def test_values_of_other_types_are_shown_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"base_model.model.q.lora_A.weight": torch.ones(4, 4)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q", {}], "modules_to_save": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert main(["info", str(tmp_path)]) == 0
    assert "q, {}" in capsys.readouterr().out
    export = tmp_path / "export"
    export.mkdir()
    (export / "qvera_export.json").write_text('{"kind": ["gguf"]}')
    assert main(["eval", str(export)]) == 2
    assert "has kind \"['gguf']\" in format 1, which this qvera does not know." in capsys.readouterr().err


BESIDE_A_BASE = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "adapter_model.bin", "tokenizer.pkl")
BESIDE_AN_ADAPTER = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "optimizer.pt")
IN_A_CHECKPOINT = (
    # transformers' Trainer's, and DeepSpeed's
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.pkl", "pytorch_model.bin", "training_args.bin",
    "global_step3/mp_rank_00_model_states.pt", "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt", "latest.pt",
)  # fmt: skip


def trapped_base(tiny_model_dir: Path, where: Path, sprung: Path) -> Path:
    shutil.copytree(tiny_model_dir, where)
    lay(where, sprung, *BESIDE_A_BASE)
    return where


def test_the_trap_works(tmp_path: Path, sprung: Path) -> None:
    lay(tmp_path, sprung, "by-torch.pt", "bare.pt")
    for name in ("by-torch.pt", "bare.pt"):
        with open(tmp_path / name, "rb") as handle:
            torch.load(tmp_path / name, weights_only=False) if name == "by-torch.pt" else pickle.load(handle)
        assert sprung.exists()
        sprung.unlink()


@pytest.fixture
def interrupted(
    make_recipe: Any, write_recipe: Any, tiny_model_dir: Path, tmp_path: Path, sprung: Path
) -> tuple[Path, Path, list[str]]:
    """A base and an interrupted run full of traps, and the command that goes on."""
    base, run = trapped_base(tiny_model_dir, tmp_path / "base", sprung), tmp_path / "run"
    settings = {"model": {"path": str(base)}, "training": {"max_steps": 2, "save_steps": 1, "output_dir": str(run)}}
    stop_after(make_recipe(**settings), run, step=1)
    lay(run, sprung, *IN_A_CHECKPOINT)
    for place in [run / "checkpoints", *(run / "checkpoints").iterdir()]:
        lay(place, sprung, *IN_A_CHECKPOINT)
        (place / "latest").write_text("global_step3")
        (place / "trainer_state.json").write_text('{"global_step": 3}')
    return base, run, ["train", str(write_recipe(**settings)), "--resume"]


def test_no_pickle_is_opened_from_base_to_export(
    interrupted: tuple[Path, Path, list[str]], tmp_path: Path, sprung: Path
) -> None:
    base, run, resume = interrupted
    assert main(resume) == 0
    lay(run / "adapter", sprung, *BESIDE_AN_ADAPTER)
    for line in (
        f"eval {run} --max-new-tokens 2",
        f"export {run} {tmp_path}/merged --to merged",
        f"export {run} {tmp_path}/lora --to lora",
        f"info {run}",
        f"quantize {base} {tmp_path}/quantized",
        f"plan {resume[1]}",
    ):
        assert main(line.split()) == 0, line
        assert not sprung.exists(), line
    for written in ("merged", "lora", "quantized"):
        assert not [p for p in (tmp_path / written).rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def go_on_under(stage: str, resume: list[str]) -> None:
    sys.exit(main([*resume, "--set", f"deepspeed={stage}"]))


@pytest.mark.parametrize(
    "stage", [pytest.param("zero3", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.matrix)]
)
def test_no_pickle_is_opened_under_deepspeed(
    interrupted: tuple[Path, Path, list[str]], sprung: Path, stage: str
) -> None:
    _, run, resume = interrupted
    before = (run / "metrics.jsonl").read_text()
    process = start_process(go_on_under, stage, resume)
    process.join(120)
    assert process.exitcode == 0
    assert (run / "metrics.jsonl").read_text().startswith(before), "it went on"
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert not sprung.exists()


def test_a_pickle_by_a_safe_name_is_refused(tiny_model_dir: Path, tmp_path: Path, sprung: Path) -> None:
    base, adapter = trapped_base(tiny_model_dir, tmp_path / "base", sprung), tmp_path / "adapter"
    lay(base, sprung, "model.safetensors")
    for section in (ModelSection(path=str(base)), ModelSection(path=str(base), quantization="none")):
        with pytest.raises(InputError, match="safetensors"):
            load_base(section)
    lay(adapter, sprung, "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "QVERA", "r": 8}))
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_adapter(adapter)
    assert not sprung.exists()


CODE = """
open({sprung!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
Quantization = Literal["nf4", "none"]


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_code_that_comes_with_a_model_is_run_only_where_the_recipe_says_so(
    tiny_model_dir: Path, tmp_path: Path, sprung: Path, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds that directory
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "evil"))
    (base / "evil.py").write_text(CODE.format(sprung=str(sprung)))
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    change(base / "config.json", auto_map=classes)
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]})
    section = ModelSection(path=str(base), quantization=quantization)
    load_base(section)  # a Llama by its model_type: transformers' own classes read it
    assert not sprung.exists()
    change(base / "config.json", model_type="evil")
    with pytest.raises(InputError, match="needs Python code of its own. Set model.trust_remote_code: true"):
        load_base(section)
    assert not sprung.exists()
    with contextlib.suppress(InputError):  # that it was there to be run
        load_base(section.replace(trust_remote_code=True))
    assert sprung.exists()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_index_that_names_a_file_elsewhere_is_refused(
    tiny_model_dir: Path, tmp_path: Path, quantization: Quantization
) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    shutil.move(base / "model.safetensors", tmp_path / "secret.safetensors")
    (base / "sub").mkdir()
    with safe_open(tmp_path / "secret.safetensors", framework="pt") as reader:
        names = list(reader.keys())
    elsewhere = ["../secret.safetensors", "/etc/secret.safetensors", "sub/../../secret.safetensors", "evil.bin", 7]
    for name in elsewhere:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="names .* as a shard. Expected names of .* in its own directory"):
            load_base(ModelSection(path=str(base), quantization=quantization))


def test_a_manifest_that_names_files_elsewhere_reads_none_of_them(make_recipe: Any, tmp_path: Path) -> None:
    """Which files a checkpoint has is not up to its manifest."""
    stop_after(make_recipe(training={"max_steps": 4}), tmp_path / "run", step=1)
    path = tmp_path / "run" / "checkpoints" / "step-00000001"
    outside = shutil.move(path / "vectors.safetensors", tmp_path / "vectors.safetensors")
    files = json.loads((path / "manifest.json").read_text())["files"]
    facts = files.pop("vectors.safetensors")
    for name in ("../../../vectors.safetensors", str(outside)):
        change(path / "manifest.json", files={**files, name: facts})
        with pytest.raises(InputError, match="has no complete manifest"):
            checkpoint.load(path)
