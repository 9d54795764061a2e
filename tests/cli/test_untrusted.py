"""Files that a stranger may have made: no pickle is opened, no code of a model is run, no name leaves its directory."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qvera.adapters.files.adapter_file import read_adapter
from qvera.adapters.files.save_load import load_adapter
from qvera.cli.main import main
from qvera.config.schema import ModelSection
from qvera.models.loader import load_base
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.training.runs import stop_after

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent.parent


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


def trap_a_run(run: Path, sprung: Path) -> None:
    lay(run, sprung, *IN_A_CHECKPOINT)
    for checkpoint in [run / "checkpoints", *(run / "checkpoints").iterdir()]:
        lay(checkpoint, sprung, *IN_A_CHECKPOINT)
        (checkpoint / "latest").write_text("global_step3")
        (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')


def test_the_trap_works(tmp_path: Path, sprung: Path) -> None:
    lay(tmp_path, sprung, "by-torch.pt", "bare.pt")
    for name in ("by-torch.pt", "bare.pt"):
        with open(tmp_path / name, "rb") as handle:
            torch.load(tmp_path / name, weights_only=False) if name == "by-torch.pt" else pickle.load(handle)
        assert sprung.exists()
        sprung.unlink()


def test_no_pickle_is_opened_from_base_to_export(
    make_recipe: Any, write_recipe: Any, tiny_model_dir: Path, tmp_path: Path, sprung: Path
) -> None:
    base, run = trapped_base(tiny_model_dir, tmp_path / "base", sprung), tmp_path / "run"
    settings = {"model": {"path": str(base)}, "training": {"max_steps": 4, "save_steps": 2, "output_dir": str(run)}}
    stop_after(make_recipe(**settings), run, step=3)
    trap_a_run(run, sprung)
    assert main(["train", str(write_recipe(**settings)), "--resume"]) == 0
    lay(run / "adapter", sprung, *BESIDE_AN_ADAPTER)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("say red 1\n")
    for command in (
        ["eval", str(run), "--max-new-tokens", "2"],
        ["generate", str(run), str(prompts), "--out", str(tmp_path / "answers.jsonl"), "--max-new-tokens", "2"],
        ["export", str(run), str(tmp_path / "merged"), "--to", "merged"],
        ["export", str(run), str(tmp_path / "lora"), "--to", "lora"],
        ["info", str(run)],
        ["quantize", str(base), str(tmp_path / "quantized")],
        ["plan", str(tmp_path / "recipe.yaml")],
    ):
        assert main(command) == 0, command
        assert not sprung.exists(), command
    for written in ("merged", "lora", "quantized"):
        assert not [p for p in (tmp_path / written).rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_no_pickle_is_opened_under_deepspeed(
    make_recipe: Any, write_recipe: Any, tiny_model_dir: Path, tmp_path: Path, sprung: Path, stage: str
) -> None:
    base, run = trapped_base(tiny_model_dir, tmp_path / "base", sprung), tmp_path / "run"
    settings = {"model": {"path": str(base)}, "training": {"max_steps": 4, "save_steps": 2, "output_dir": str(run)}}
    stop_after(make_recipe(**settings), run, step=3)
    trap_a_run(run, sprung)
    command = ["train", str(write_recipe(**settings)), "--resume", "--set", f"deepspeed={stage}"]
    done = subprocess.run(
        [sys.executable, "-m", "qvera", *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "Going on from step 3" in " ".join(done.stderr.split()), done.stderr[-3000:]
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_pickle_by_a_safe_name_is_refused(tiny_model_dir: Path, tmp_path: Path, sprung: Path, name: str) -> None:
    base = trapped_base(tiny_model_dir, tmp_path / "base", sprung)
    if name == "model.safetensors":
        lay(base, sprung, name)
        with pytest.raises(InputError, match="safetensors"):
            load_base(ModelSection(path=str(base)))
        with pytest.raises(InputError, match="safetensors"):
            load_base(ModelSection(path=str(base), quantization="none"))
    else:
        adapter = tmp_path / "adapter"
        lay(adapter, sprung, name)
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "QVERA", "r": 8}))
        with pytest.raises(InputError, match="not a readable safetensors file"):
            read_adapter(adapter)
    assert not sprung.exists()


def test_stock_peft_adapters_are_read_without_their_pickles(tiny_model_dir: Path, tmp_path: Path, sprung: Path) -> None:
    from peft import VeraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), VeraConfig(r=4, target_modules=["down_proj"])
    )
    stock.save_pretrained(tmp_path / "adapter")
    lay(tmp_path / "adapter", sprung, *BESIDE_AN_ADAPTER)
    base = load_base(ModelSection(path=str(tiny_model_dir)))
    load_adapter(base.model, tmp_path / "adapter", base)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()  # PEFT alone would take adapter_model.bin now
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        load_adapter(base.model, tmp_path / "adapter", base)
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


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_code_that_comes_with_a_model_is_run_only_where_the_recipe_says_so(
    tiny_model_dir: Path,
    tmp_path: Path,
    sprung: Path,
    quantization: str,
    make_recipe: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds that directory
    base = tmp_path / "evil"
    shutil.copytree(tiny_model_dir, base)
    (base / "evil.py").write_text(CODE.format(sprung=str(sprung)))
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    section = ModelSection(path=str(base), quantization=quantization)
    load_base(section)  # a Llama by its model_type: transformers' own classes read it
    assert not sprung.exists()
    config["model_type"] = "evil"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="can't be loaded as a causal language model"):
        load_base(section)
    recipe = make_recipe(model={"path": str(base), "quantization": quantization})
    with pytest.raises(InputError):
        train(recipe, tmp_path / "run")
    assert not sprung.exists()
    assert not (tmp_path / "run").exists()
    with contextlib.suppress(InputError):  # that it was there to be run
        load_base(section.replace(trust_remote_code=True))
    assert sprung.exists()


# Names that would lead elsewhere.


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_index_that_names_a_file_elsewhere_is_refused(
    tiny_model_dir: Path, tmp_path: Path, quantization: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
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
    from qvera.training import checkpoint

    run = tmp_path / "run"
    stop_after(make_recipe(training={"max_steps": 4}), run, step=1)
    path = run / "checkpoints" / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    outside = tmp_path / "vectors.safetensors"
    shutil.move(path / "vectors.safetensors", outside)
    facts = manifest["files"].pop("vectors.safetensors")
    for name in ("../../../vectors.safetensors", str(outside)):
        files = {**manifest["files"], name: facts}
        (path / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(InputError, match="has no complete manifest"):
            checkpoint.load(path)
