"""Loading the frozen base: what was loaded is read back from the live modules; what is wrong is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qvera.adapters.save_load import attach, save_adapter
from qvera.config.sections import AdapterSection, ModelSection
from qvera.models import linear as frozen
from qvera.models import quantization as quantize
from qvera.models.loader import load_base, pick_compute_dtype
from qvera.models.model_class import empty_model, image_class
from qvera.models.tokenizer import load_tokenizer
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.safetensors_io import base_fingerprint
from tests.adapters.helpers import perturb, relative
from tests.conftest import small_llama
from tests.models.helpers import stock_four_bit

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42]])
SHAPES = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192)]
"""Of q, k, v, o, gate, up and down in two layers. Embedding, head and norms are beside them."""
LINEAR_PARAMETERS, DENSE_PARAMETERS = sum(m * n for m, n in SHAPES), 2 * 304 * 64 + 5 * 64


def section(path: Path, **changes: Any) -> ModelSection:
    return ModelSection(path=str(path), **{"compute_dtype": "bfloat16", **changes})


@pytest.mark.parametrize(
    ("quantization", "double_quant", "storage"),
    [("nf4", True, "bfloat16"), ("fp4", False, "uint8"), ("int8", None, None), ("none", None, None)],
)
def test_facts_of_a_base(tiny_model_dir: Path, quantization: str, double_quant: Any, storage: Any) -> None:
    four_bit, changes = storage is not None, {"double_quant": double_quant, "quant_storage": storage}
    wanted = section(tiny_model_dir, quantization=quantization, **(changes if four_bit else {}))
    base = load_base(wanted, CPU)
    blocks, rows = [m * n // 64 for m, n in SHAPES], sum(m for m, _ in SHAPES)
    scales = sum(b + 4 * -(-b // 256) if double_quant else 4 * b for b in blocks)
    packed_bytes = {"int8": LINEAR_PARAMETERS + 4 * rows, "none": 2 * LINEAR_PARAMETERS}
    assert base.facts == {
        "path": str(tiny_model_dir),
        "architecture": "LlamaForCausalLM",
        "parameters": LINEAR_PARAMETERS + DENSE_PARAMETERS,
        "quantization": quantization,
        "double_quant": double_quant,
        "compute_dtype": "bfloat16",
        "quant_storage": storage,
        "four_bit_modules": 14 if four_bit else 0,
        "int8_modules": 14 if quantization == "int8" else 0,
        "expert_bytes": 0,
        "dense_matrices": {},
        "base_bytes": packed_bytes.get(quantization, LINEAR_PARAMETERS // 2 + scales) + 2 * DENSE_PARAMETERS,
        "fingerprint": base_fingerprint(tiny_model_dir),
    }
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    kinds = {type(m) for n, m in base.model.named_modules() if n.endswith("_proj")}
    frozen_class = {"int8": frozen.FrozenLinear8bit, "none": torch.nn.Linear}.get(quantization, frozen.FrozenLinear4bit)
    assert kinds == {frozen_class} and type(base.model.lm_head) is torch.nn.Linear


def test_the_loaded_weights_are_the_stored_ones(tiny_model_dir: Path) -> None:
    exact = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        plain = exact(IDS).logits
        same = load_base(section(tiny_model_dir, quantization="none", compute_dtype="float32"), CPU).model(IDS).logits
        assert torch.equal(same, plain)
        for quantization, error in (("int8", 0.05), ("nf4", 0.35), ("fp4", 0.5)):
            model = load_base(section(tiny_model_dir, quantization=quantization), CPU).model
            assert 1e-3 < relative(model(IDS).logits, plain) < error


def test_layers_stay_transformers_own(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[bool]()
    monkeypatch.setattr(PreTrainedModel, "set_use_kernels", lambda model, use, *others: asked.append(use))
    base = load_base(section(tiny_model_dir, quantization="none"), CPU)
    assert asked == [False] and not base.model.use_kernels  # newer versions take kernels from the hub otherwise


@pytest.fixture(scope="module")
def prequantized_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bitsandbytes' own serialized NF4 format, as stock transformers writes it."""
    return stock_four_bit(tiny_model_dir, tmp_path_factory.mktemp("models") / "nf4", bnb_4bit_quant_storage=torch.uint8)


def test_a_checkpoint_that_is_4_bit_already_is_taken_as_it_is(prequantized_dir: Path, tiny_model_dir: Path) -> None:
    # quant_storage says bfloat16 by default; the bytes in the file are uint8, and the compute dtype is the recipe's
    base = load_base(section(prequantized_dir), CPU)
    assert (base.facts["quant_storage"], base.facts["compute_dtype"]) == ("uint8", "bfloat16")
    assert {m.compute_dtype for m in base.model.modules() if isinstance(m, quantize.Linear4bit)} == {torch.bfloat16}
    fresh = load_base(section(tiny_model_dir), CPU)
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, fresh.model(IDS).logits)
    with pytest.raises(InputError, match="what was loaded from .* is not what the recipe says: .*is nf4.* says int8"):
        load_base(section(prequantized_dir, quantization="int8"), CPU)
    with pytest.raises(InputError, match="double_quant is True, the recipe says False"):
        load_base(section(prequantized_dir, double_quant=False), CPU)


def test_code_and_generation_config_are_the_bases_though_a_copy_was_made_before(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The copy is known by its shards and its config, which stay."""
    directory = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}
    (directory / "config.json").write_text(json.dumps(config))
    for ends in ([2], [2, 7]):
        own = f"class OwnForCausalLM(LlamaForCausalLM):\n    ends = {ends}\n"
        (directory / "own.py").write_text(f"from transformers import LlamaForCausalLM\n\n\n{own}")
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        model = load_base(section(directory, trust_remote_code=True), CPU).model
        assert (type(model).ends, model.generation_config.eos_token_id) == (ends, ends)
        assert sum(isinstance(m, quantize.Linear4bit) for m in model.modules()) == len(SHAPES)


# What is wrong with a model directory.


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_base(section(path), CPU)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_no_such_directory(tmp_path: Path) -> None:
    assert "`qvera quickstart --fetch-only` fetches it" in refused(tmp_path / "quickstart" / "smollm2")
    (tmp_path / "file").write_text("x")
    assert "is not a directory" in refused(tmp_path / "file")


def _pickles_only(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, directory / "pytorch_model.bin")


def _cut_short(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pointer_only(directory: Path) -> None:
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _link_only(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("gone")


def _in_a_cache(directory: Path) -> None:
    files, snapshot = list(directory.iterdir()), directory / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in files:
        file.rename(snapshot / file.name)


OWN_CODE = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}


def _without(*names: str) -> Any:
    return lambda directory: [(directory / name).unlink() for name in names]


def _edited(file: str, **changes: Any) -> Any:
    def change(directory: Path) -> None:
        (directory / file).write_text(json.dumps({**json.loads((directory / file).read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without("config.json"), "has no config.json, so it is not a model directory. It holds chat_template.jinja, "),
        (_without("model.safetensors"), "has no *.safetensors weights. Convert the weights to safetensors."),
        (_pickles_only, "it has pytorch_model.bin, which are pickles and are not read"),
        (_cut_short, "model.safetensors: not a readable safetensors file, or cut short"),
        (_pointer_only, "model.safetensors: not a readable safetensors file, or cut short"),
        (_pointer_only, "It is a pointer of Git LFS: git lfs pull."),
        (_link_only, "model.safetensors: is a link to gone, and no file can be reached by it. Fetch it again."),
        (_in_a_cache, "has no config.json, so it is not a model directory. Name the directory in it: "),
        (_edited("config.json", quantization_config={"quant_method": "gptq"}), "is stored in the format of gptq"),
        (
            _edited("config.json", model_type="own", auto_map=OWN_CODE),
            "needs Python code of its own. Set model.trust_remote_code",
        ),
        (
            _edited("tokenizer_config.json", eos_token=None, mask_token="<mask>"),
            "is an encoder, as its mask token shows",
        ),
        (lambda directory: (directory / "config.json").write_text('{"model_type": '), ""),
        (_edited("config.json", model_type="nothing-known"), "can't be loaded as a causal language model"),
        (_edited("config.json", model_type="vit"), ""),
        (_without("tokenizer.json", "tokenizer_config.json"), "no tokenizer can be loaded"),
        (_edited("tokenizer_config.json", eos_token=None), "has no end-of-sequence token"),
    ],
)
def test_a_bad_directory_is_refused_with_what_is_wrong(
    tiny_model_dir: Path, tmp_path: Path, spoil: Any, words: str
) -> None:
    directory = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    spoil(directory)
    assert words in refused(directory)


def test_another_tokenizer_can_be_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    _without("tokenizer.json", "tokenizer_config.json")(directory)
    assert load_tokenizer(section(directory, tokenizer=str(tiny_model_dir))).eos_token == "<|im_end|>"
    with pytest.raises(InputError, match=r"model\.tokenizer: no tokenizer can be loaded .* tokenizer\.model there\."):
        load_tokenizer(section(tiny_model_dir, tokenizer=str(directory)))


def test_a_package_that_a_tokenizer_needs_is_named(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **options: Any) -> None:
        raise ImportError("LlamaTokenizer requires the sentencepiece library")

    monkeypatch.setattr("qvera.models.tokenizer.AutoTokenizer.from_pretrained", missing)
    with pytest.raises(InputError, match=r"model\.path: no tokenizer .* requires the sentencepiece library"):
        load_tokenizer(section(tiny_model_dir))


# Device and dtype.


def test_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_compute_dtype("float16", CPU) == torch.float16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert pick_compute_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True}, raising=False)
    assert pick_compute_dtype("auto", CPU) == torch.float32
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, s=supported: s)
        assert pick_compute_dtype("auto", torch.device("cuda")) == dtype


# An adapter to begin from.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(perturb(attach(small_llama(), AdapterSection(rank=8, seed=4))), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 9}, "has rank 8, the recipe 9"),
        ({"targets": ["gate_proj", "down_proj"]}, "20 unknown"),
        ({"targets": ["q_proj"]}, "of shapes {'A': [8, 192], 'B': [192, 8]}, the recipe {'A': [8, 64], 'B': [64, 8]}"),
        ({"init_from": "nothing"}, "no such directory"),
        ({"init_from": __file__}, "is a file, not a directory"),
    ],
)
def test_init_from_that_does_not_fit_is_refused(saved: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        attach(small_llama(), AdapterSection(**{"rank": 8, "seed": 4, "init_from": str(saved), **changes}))
    assert words in str(caught.value) and changes.get("init_from", str(saved)) in str(caught.value)


def test_a_failed_save_leaves_the_old_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f.name: f.read_bytes() for f in saved.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qvera.adapters.save_load.flush", full)
    with pytest.raises(RunFailed, match="adapter: the disk is full"):
        save_adapter(attach(small_llama(), AdapterSection(rank=8, seed=4)), saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_a_model_of_another_kind_and_one_that_is_nowhere_are_told_from_a_broken_config(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it is asked again for half a minute
    with pytest.raises(InputError, match="transformers has none of the type llama. Take another model"):
        empty_model(ModelSection(path=str(tiny_model_dir)), model_class=image_class())
    with pytest.raises(InputError, match="'nowhere/nothing' is no directory here. Nor can it be read from the hub"):
        empty_model(ModelSection(path="nowhere/nothing"))
