"""The merged checkpoint is W + ΔW, any tool loads it, and nothing half-written passes for a model."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from qvera.adapters.save_load import attach, named_vectors, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.cli.main import main
from qvera.config.sections import AdapterSection, ExportSection, ModelSection
from qvera.exporting.merged import export_merged
from qvera.models import quantization
from qvera.models.loader import load_base
from qvera.models.tokenizer import load_tokenizer
from qvera.utils.errors import RunFailed
from qvera.utils.files import file_sha256
from tests.conftest import small_llama, small_tokenizer
from tests.exporting.helpers import deltas, trained_adapter

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelSection, Path]:
    return trained_adapter(tiny_model_dir, tmp_path_factory.mktemp("merged") / "adapter")


def test_every_weight_is_w_plus_delta_in_fp32_before_the_cast(
    trained: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model, section, adapter = trained
    export_merged(adapter, section, tmp_path / "out32", ExportSection(dtype="float32", base="original"))
    export_merged(adapter, section, tmp_path / "out16", ExportSection(dtype="float16", base="original"))
    source = load_file(tiny_model_dir / "model.safetensors")
    wide, narrow = (load_file(tmp_path / n / "model.safetensors") for n in ("out32", "out16"))
    change = deltas(model)
    assert wide.keys() == narrow.keys() == source.keys()
    assert len(change) == 14
    for name, weight in source.items():
        expected = weight.float() + change[name] if name in change else weight.float()
        torch.testing.assert_close(wide[name], expected, rtol=0, atol=1e-7)
        assert torch.equal(narrow[name], wide[name].half())
        assert (name in change) == (not torch.equal(wide[name], weight.float()))


def test_the_dequantized_base_gives_the_trained_models_logits(tiny_model_dir: Path, tmp_path: Path) -> None:
    """It is quantized where it was even without adapter. test_other_environment.py loads one where qvera is not."""
    model, section, adapter = trained_adapter(tiny_model_dir, tmp_path / "adapter", targets=["q_proj"])
    export_merged(adapter, section, tmp_path / "out", ExportSection(dtype="float32", base="dequantized"))
    ids = torch.arange(3, 43).view(2, 20)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_files_config_and_certificate(trained: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    model, section, adapter = trained
    export_merged(adapter, section, tmp_path / "out", ExportSection())
    assert "<|im_start|>" in (tmp_path / "out" / "chat_template.jinja").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "qvera_export.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("float16", ["LlamaForCausalLM"])
    assert "quantization_config" not in config
    certificate = json.loads((tmp_path / "out" / "qvera_export.json").read_text())
    weights, of_base = (file_sha256(path / "model.safetensors") for path in (tmp_path / "out", tiny_model_dir))
    assert certificate["files"] == {"model.safetensors": weights}
    assert certificate["base"]["sha256"] == {"model.safetensors": of_base}
    assert certificate["adapter"]["sha256"] == file_sha256(adapter / "adapter_model.safetensors")
    for name, change in deltas(model).items():
        assert certificate["delta"][name]["max_abs"] == pytest.approx(change.abs().max().item(), rel=1e-5)
        assert certificate["delta"][name]["mean_abs"] == pytest.approx(change.abs().mean().item(), rel=1e-5)


def as_written_by_4(base: Path) -> dict[str, Any]:
    """Save a Llama with the config and tokenizer_config that a repository of transformers 4 has; returns the first."""
    small_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 12345.0}).save_pretrained(base)
    small_tokenizer().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (base / "config.json").write_text(json.dumps(config))
    of_tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    special = of_tokenizer.pop("extra_special_tokens", [])
    of_tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": special}
    (base / "tokenizer_config.json").write_text(json.dumps(of_tokenizer))
    return config


def test_config_and_tokenizer_have_what_transformers_4_reads(trained: Any, tmp_path: Path) -> None:
    """It takes its own default, without a word, for a key that transformers 5 has renamed."""
    base, out = tmp_path / "base", tmp_path / "out"
    before = as_written_by_4(base)
    (base / "tokenizer.model").write_text("sentencepiece")  # read by llama.cpp's converter alone
    added = {"added_tokens": ["<|new|>"], "quantization": "none"}
    model, section, adapter = trained_adapter(base, tmp_path / "adapter", added)
    export_merged(adapter, section, out, ExportSection(dtype="float32"))
    config, of_tokenizer = (json.loads((out / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert {key: config[key] for key in ("rope_theta", "rope_scaling")} == {
        key: before[key] for key in ("rope_theta", "rope_scaling")
    }
    assert config["torch_dtype"] == "float32"
    assert of_tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in of_tokenizer
    assert "<|new|>" in [token["content"] for token in of_tokenizer["added_tokens_decoder"].values()]
    assert (out / "tokenizer.model").read_text() == "sentencepiece"
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(3, 23).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    # a base that transformers 5 has written has none of these keys
    _, section, adapter = trained
    export_merged(adapter, section, tmp_path / "of_5", ExportSection())
    config, of_tokenizer = (
        json.loads((tmp_path / "of_5" / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    assert (config["rope_theta"], config["rope_scaling"]) == (config["rope_parameters"]["rope_theta"], None)
    assert of_tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.matrix
def test_transformers_4_opens_an_export_with_the_same_logits_and_tokens(tmp_path: Path) -> None:
    """Installs it from the package index into a directory of its own."""
    wanted = ["transformers==4.57.*", "tokenizers<0.23", "huggingface_hub<1"]
    place = ["--quiet", "--no-deps", "--target", str(tmp_path / "four")]
    subprocess.run([sys.executable, "-m", "pip", "install", *place, *wanted], check=True)
    as_written_by_4(tmp_path / "base")
    added = {"added_tokens": ["<|new|>"], "eos_token": "<|new|>", "quantization": "none"}
    model, section, adapter = trained_adapter(tmp_path / "base", tmp_path / "adapter", added)
    export_merged(adapter, section, tmp_path / "out", ExportSection(dtype="float32"))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T, __version__\n"
        "ids = T.from_pretrained(sys.argv[1])('say<|new|> red 12', return_tensors='pt').input_ids\n"
        "logits = M.from_pretrained(sys.argv[1], dtype=torch.float32)(input_ids=ids).logits.detach()\n"
        "torch.save([__version__, ids, logits], sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "four")}
    arguments = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "said.pt")]
    subprocess.run(arguments, env=environment, check=True)
    version, ids, logits = torch.load(tmp_path / "said.pt")
    assert version.startswith("4.57.")
    assert ids[0].tolist() == load_tokenizer(section)("say<|new|> red 12").input_ids
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_other_programs_end_answers_at_the_trained_end_of_turn(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A base model's eos ends a text, and its chat template ends a turn with another token."""
    base, config = tmp_path / "base", tmp_path / "out" / "generation_config.json"
    shutil.copytree(tiny_model_dir, base)
    tokenizer = small_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    # as Llama-2-chat's: transformers reads it, and refuses to save it once it is changed
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id, "top_p": 0.6}))
    _, section, adapter = trained_adapter(base, tmp_path / "adapter")
    export_merged(adapter, section, tmp_path / "out", ExportSection())
    ends = json.loads(config.read_text())["eos_token_id"]
    assert GenerationConfig.from_pretrained(tmp_path / "out").top_p == 0.6
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]


def test_fp16_overflow_is_refused_by_tensor_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, section, adapter = trained_adapter(tiny_model_dir, tmp_path / "adapter")
    named_vectors(model)["base_model.model.model.layers.1.mlp.up_proj.qvera_b"].data.mul_(1e8)
    save_adapter(model, adapter)
    said = r"model\.layers\.1\.mlp\.up_proj\.weight: has values up to .* beyond torch.float16.* Take --dtype bfloat16"
    with pytest.raises(RunFailed, match=said):
        export_merged(adapter, section, tmp_path / "out", ExportSection())
    assert not (tmp_path / "out" / "config.json").exists()
    export_merged(adapter, section, tmp_path / "wide", ExportSection(dtype="bfloat16"))
    assert (tmp_path / "wide" / "config.json").exists()
    named_vectors(model)["base_model.model.model.layers.1.mlp.up_proj.qvera_b"].data.fill_(3e38)
    named_vectors(model)["base_model.model.model.layers.1.mlp.up_proj.qvera_d"].data.fill_(1e9)
    save_adapter(model, adapter)
    with pytest.raises(RunFailed, match="up_proj.weight: has NaN or Inf after merging. Look at this adapter;"):
        export_merged(adapter, section, tmp_path / "inf", ExportSection(dtype="bfloat16"))


def test_sharded_base_and_tied_head(tmp_path: Path) -> None:
    small_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    small_tokenizer().save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    model, section, adapter = trained_adapter(tmp_path / "base", tmp_path / "adapter", {"quantization": "none"})
    export_merged(adapter, section, tmp_path / "out", ExportSection(dtype="float32"))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 23).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_base_with_nan_is_named(trained: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    _, section, adapter = trained
    broken = Path(shutil.copytree(tiny_model_dir, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailed, match=r"model\.norm\.weight: the base weight itself has NaN"):
        export_merged(adapter, section.replace(path=str(broken)), tmp_path / "out", ExportSection())


def test_the_command_measures_the_difference(trained_run: Path, tmp_path: Path, capsys: Any) -> None:
    for name, flags in (("original", ["--base", "original"]), ("dequantized", [])):  # the latter is the default
        assert main(["export", str(trained_run), str(tmp_path / name), "--dtype", "float32", *flags]) == 0
    original, dequantized = (
        json.loads((tmp_path / name / "qvera_export.json").read_text())["difference"]
        for name in ("original", "dequantized")
    )
    assert dequantized["kl_max"] < 1e-6 and dequantized["top1_agreement"] == 1.0
    assert dequantized["answers_agree"] == dequantized["rows"] == original["rows"] == 8
    assert original["kl_mean"] > 1e-4, "the two bases are different models, and the certificate must show it"
    run = json.loads((trained_run / "run.json").read_text())
    assert dequantized["loss_trained"] == pytest.approx(run["result"]["eval_after"]["loss"], rel=1e-5)
    assert "throughout 8 of 8 answers" in capsys.readouterr().out


def test_the_adapter_in_a_run_is_exported_as_the_run_is(alpaca_run: Path, tmp_path: Path) -> None:
    files, differences = [], []
    for number, named in enumerate((alpaca_run, alpaca_run / "adapter")):
        out = tmp_path / str(number)
        assert main(["export", str(named), str(out), "--dtype", "float32"]) == 0
        certificate = json.loads((out / "qvera_export.json").read_text())
        assert certificate["trained_on"]["quantization"] == "none"
        differences.append(certificate["difference"])
        files.append({path.name: path.read_bytes() for path in out.iterdir() if path.name != "qvera_export.json"})
    assert files[0] == files[1] and "Alpaca" in files[0]["chat_template.jinja"].decode()
    assert differences[0] == differences[1] and differences[0]["kl_max"] < 1e-6


def test_peft_warns_of_an_adapter_that_is_not_put_on_its_base(tiny_model_dir: Path, tmp_path: Path) -> None:
    """An export that it was merged into, and other weights of the same shapes."""
    _, section, adapter = trained_adapter(tiny_model_dir, tmp_path / "adapter", knows_base=True)
    export_merged(adapter, section, tmp_path / "out", ExportSection())
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    expected = {tmp_path / "out": "would act twice", tmp_path / "other": "trained on other weights than those of"}
    for directory, is_alone in itertools.product((*expected, tiny_model_dir), (True, False)):
        base = AutoModelForCausalLM.from_pretrained(directory)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if is_alone:
                PeftModel.from_pretrained(base, adapter)
            else:
                load_adapters(base, {"it": adapter})
        said = [str(one.message) for one in seen if "adapter" in str(one.message) or "trained" in str(one.message)]
        assert len(said) == (directory in expected) and expected.get(directory, "") in "".join(said)


def test_the_dequantized_base_is_the_one_trained_on_where_the_stored_dtype_is_wider(tmp_path: Path) -> None:
    """A quantized copy is made from the stored numbers; rounding them to the compute dtype first gives other nibbles."""
    source = tmp_path / "base"
    small_llama().to(torch.float32).save_pretrained(source)
    small_tokenizer().save_pretrained(source)
    section = ModelSection(path=str(source), compute_dtype="bfloat16")
    base = load_base(section, torch.device("cpu"))
    trained_on = {
        f"{name}.weight": quantization.dequantized_weight(module, torch.float32)
        for name, module in base.model.named_modules()
        if isinstance(module, quantization.Linear4bit)
    }
    save_adapter(attach(base.model, AdapterSection(rank=8), str(source)), tmp_path / "adapter")  # b = 0: W alone
    export_merged(tmp_path / "adapter", section, tmp_path / "out", ExportSection(dtype="float32", base="dequantized"))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert len(trained_on) == 14
    for name, weight in trained_on.items():
        assert torch.equal(exported[name], weight), name
