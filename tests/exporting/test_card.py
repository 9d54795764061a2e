"""The model card: what the run's files say, as the hub reads it, and nothing else."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from qvera.cli.main import main
from qvera.config.schema import load_recipe
from qvera.evaluation.load import find_target, open_run
from qvera.exporting import card
from qvera.exporting.card import files_of, find_subject, model_card
from qvera.serve.store import AdapterStore
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256
from tests.image_text import IMAGE_FAMILIES, image_rows
from tests.many_adapters import write_run

pytestmark = pytest.mark.process


def written(path: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of the card that `qvera card` writes."""
    out = path.parent / f"{path.name}-card.md"
    assert main(["card", str(path), "--out", str(out), *options]) == 0
    text = out.read_text()
    out.unlink()
    return ModelCard(text).data.to_dict(), text


def section(text: str, name: str) -> dict[str, list[str]]:
    """The rows of a section's table: first cell → the others."""
    lines = text.partition(f"## {name}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "my"))


def test_the_card_has_what_was_measured_and_how_it_was_trained(run: Path, capsys: Any) -> None:
    front, text = written(run, "--repo", "anna/orders")
    result = json.loads((run / "run.json").read_text())["result"]
    assert front["library_name"] == "peft" and front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["qvera", "vera"]
    assert text.partition("\n# ")[2].startswith("orders\n")
    found = [float(value) for value in section(text, "Scores")["loss"]]
    assert found == pytest.approx([result["eval_before"]["loss"], result["eval_after"]["loss"]], rel=1e-3)
    training = section(text, "Training")
    assert training["rank"] == ["8"] and training["steps"] == ["3"] and training["base held in"] == ["nf4"]
    assert training["data"] == ["rows.jsonl"] and training["learning rate"] == ["0.02"]
    assert "PeftModel.from_pretrained(base, 'anna/orders')" in text
    assert "qvera export anna/orders gguf/ --to gguf" in text and "--lora-modules" in text
    # the base is a directory of this computer, and names no license: nothing is made up, and no path is told
    assert not {"base_model", "license", "datasets", "language", "metrics"} & front.keys()
    assert str(run) not in text and "/tmp" not in text

    assert main(["card", str(run)]) == 0
    assert (run / "adapter" / "README.md").is_file()
    assert main(["card", str(run)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["card", str(run), "--repo", "orders", "--out", str(run / "card.md")]) == 2
    assert "orders: is no name of a repository" in capsys.readouterr().err


def test_the_card_names_the_objective_and_what_the_base_computed_in(run: Path) -> None:
    card = written(run)[1]
    assert "objective" not in section(card, "Training") and "compute_dtype='float32'" in card
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["training"]["objective"], recipe["model"]["compute_dtype"] = "orpo", "auto"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = written(run)[1]
    assert section(card, "Training")["objective"] == ["orpo"] and "compute_dtype='bfloat16'" in card


def test_what_the_base_and_the_scores_say_is_taken_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"column": "Adapter", "adapter_sha256": file_sha256(run / "adapter" / "adapter_model.safetensors")}
    about["data"] = "/home/anna/rows.jsonl, 20.0% held out by its seed"
    scores, of_base = {"exact_match": 0.8125, "rows": 4}, {"exact_match": 0.25, "rows": 4}
    (run / "eval.json").write_text(json.dumps({"subject": about, "scores": scores, "base_scores": of_base}))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    copy = Path(shutil.copytree(recipe["model"]["path"], run.parent / "base"))
    (copy / "README.md").write_text("---\nlicense: other\nlicense_name: small\nlicense_link: LICENSE\n---\n# Base\n")
    recipe["model"]["path"] = str(copy)
    recipe["data"]["path"] = "tatsu-lab/alpaca"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    front, text = written(run)
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "small", "LICENSE")
    assert front["datasets"] == ["tatsu-lab/alpaca"] and front["metrics"] == ["exact_match"]
    assert section(text, "Scores")["exact match"] == ["0.2500", "0.8125"]
    assert "On 4 rows of rows.jsonl, 20.0% held out by its seed, by `qvera eval`." in text and "/home" not in text
    assert "That of the base: small." in text
    recipe["model"]["path"] = "meta/base"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(card, "try_to_load_from_cache", lambda *_, **__: str(copy / "README.md"))
    front, text = written(run)
    assert (front["base_model"], front["base_model_relation"]) == ("meta/base", "adapter")
    assert "from_pretrained('meta/base', quantization_config=quantized)" in text and front["license_name"] == "small"


def test_what_the_card_tells_peft_to_load_is_the_adapter_on_the_base_of_its_training(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = written(run, "--repo", "anna/orders")
    code = text.partition("```python\n")[2].partition("```")[0]
    (run.parent / "tiny-llama").symlink_to(load_recipe(run / "recipe.yaml").model.path)
    shutil.copytree(run / "adapter", run.parent / "anna" / "orders")
    monkeypatch.chdir(run.parent)
    loaded, packed = dict[str, Any](), list[Any]()
    exec(code, loaded)
    for model in (loaded["model"], opened := open_run(run).model):
        weights = [weight for name, weight in model.named_parameters() if "_proj" in name and name.endswith("weight")]
        packed.append([weight.view(torch.uint8).flatten().tolist() for weight in weights])
    assert packed[0] == packed[1] and len(packed[0]) == 14
    assert loaded["model"].peft_config["default"].rank == opened.peft_config["default"].rank


def test_a_base_that_takes_images_is_named_by_its_class_and_its_linears_by_short_names(
    make_recipe: Any, tmp_path: Path
) -> None:
    base, rows = IMAGE_FAMILIES["gemma3"].write(tmp_path / "base"), image_rows(tmp_path, 6)
    recipe = make_recipe(
        model={"path": str(base), "quantization": "none"},
        data={"path": str(rows), "eval_fraction": 0.0, "max_length": 256},
        training={"max_steps": 1, "sample_count": 0},
    )
    train(recipe, tmp_path / "run")
    alone = Path(shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "alone"))
    assert main(["export", str(alone), str(tmp_path / "merged"), "--no-compare"]) == 0
    for path in (tmp_path / "run", alone, tmp_path / "merged"):
        front, text = written(path)
        assert front["pipeline_tag"] == "image-text-to-text" and "AutoModelForImageTextToText.from_pretrained" in text
        assert "AutoModelForCausalLM" not in text and "BitsAndBytesConfig" not in text
    names = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert section(written(tmp_path / "run")[1], "Training")["adapted linears"] == [names]


def test_the_rows_of_exact_match_are_no_score_of_their_own(run: Path) -> None:
    summary = json.loads((run / "run.json").read_text())
    for when, exact in (("eval_before", 0.0), ("eval_after", 0.75)):
        summary["result"][when] |= {"exact_match": exact, "exact_match_rows": 4, "commonest_reference": 0.25}
    (run / "run.json").write_text(json.dumps(summary))
    _, text = written(run)
    assert section(text, "Scores")["exact match, 4 rows"] == ["0", "0.7500"]
    assert "exact match rows" not in text and "commonest" not in text


def test_scores_of_anything_but_this_adapter_are_left_out(run: Path) -> None:
    about = {"column": "Adapter", "adapter_sha256": file_sha256(run / "adapter" / "adapter_model.safetensors")}
    for changes in ({"adapter_sha256": "0" * 64}, {"adapter_sha256": None}, {"column": "Export"}):
        (run / "eval.json").write_text(json.dumps({"subject": about | changes, "scores": {"bleu": 99.5, "rows": 8}}))
        front, text = written(run)
        assert "99.5" not in text and "metrics" not in front


def test_an_adapter_in_the_place_of_the_runs_own_gets_none_of_its_scores(
    run: Path, make_recipe: Any, tmp_path: Path, capsys: Any
) -> None:
    many = write_run(tmp_path / "many", make_recipe(), ["anna", "ben"])
    summary = json.loads((many / "run.json").read_text())
    for entry in summary["adapters"][:2]:
        weights = many / "adapters" / entry["directory"] / "adapter_model.safetensors"
        entry["sha256"] = file_sha256(weights)
    (many / "run.json").write_text(json.dumps(summary))
    shutil.rmtree(many / "adapters" / "anna")
    for place in (run / "adapter", many / "adapters" / "anna"):  # one that was trained elsewhere
        shutil.copytree(many / "adapters" / "ben", place, dirs_exist_ok=True)
    for path, options in ((run, ()), (many, ("--adapter", "anna"))):
        _, text = written(path, *options)
        assert "## Scores" not in text and "## Training" not in text
        assert main(["info", str(path), *options]) == 0
        assert "another adapter is there now than this run wrote" in capsys.readouterr().out
    store = AdapterStore(many)
    store.add("mine", run / "adapter")
    for name, is_own in (("mine", False), ("anna", False), ("ben", True)):
        facts = store.facts(name)
        assert (facts["loss"] is not None, facts["rows"] is not None) == (is_own, is_own)
    assert main(["compare", str(many), "--adapter", "anna", "--adapter", "ben"]) == 0
    said = capsys.readouterr().out
    assert "anna: another adapter is there now" in said and "ben: another" not in said
    there = file_sha256(run / "adapter" / "adapter_model.safetensors")
    assert main(["train", str(run / "recipe.yaml"), "--resume"]) == 2  # which would write the run's own over it
    assert "Move it elsewhere. To train on from it, start a new run with" in capsys.readouterr().err
    assert file_sha256(run / "adapter" / "adapter_model.safetensors") == there
    (run / "adapter").rename(run / "theirs")
    assert main(["train", str(run / "recipe.yaml"), "--resume"]) == 0
    assert file_sha256(run / "adapter" / "adapter_model.safetensors") != there


@pytest.mark.parametrize(
    ("kind", "rank", "expected"),
    [
        ("VERA", 1024, "lora/ --to lora --rank 512\nvllm serve B --enable-lora --max-lora-rank 512"),
        ("LORA", 12, "vllm serve B --enable-lora --max-lora-rank 16 --lora-modules name=anna/x"),
        ("LORA", 1024, None),
    ],
)
def test_the_card_gives_vllm_a_rank_that_it_takes(run: Path, kind: str, rank: int, expected: str | None) -> None:
    subject = find_subject(run)
    facts = {**subject.adapter, "peft_type": kind, "method": kind.lower(), "rank": rank}
    text = model_card(subject._replace(adapter=facts), "anna/x").replace("serve tiny-llama ", "serve B ")
    assert expected in text if expected is not None else "vllm" not in text
    assert "import qvera" not in text  # PEFT has both types
    assert "import qvera" in model_card(find_subject(run), "anna/x")


def test_the_card_of_an_adapter_whose_change_differs_by_token_names_no_export(run: Path) -> None:
    subject = find_subject(run)
    text = model_card(subject._replace(adapter={**subject.adapter, "method": "sara", "mixed_vectors": 3}), "anna/x")
    assert "qvera generate anna/x" in text
    assert not any(word in text for word in ("qvera export", "vllm", "ollama"))


def test_the_card_of_adapted_experts_says_how_transformers_holds_them_and_leaves_vllm_out(run: Path) -> None:
    for file, change in (("adapter/adapter_config.json", {"experts": "each"}), ("run.json", {"expert_bytes": 4096})):
        known = json.loads((run / file).read_text())
        (known["model"] if file == "run.json" else known).update(change)
        (run / file).write_text(json.dumps(known))
    text = written(run)[1]
    assert "BitsAndBytesConfig(  # as in training, but for experts, which transformers leaves as they are\n" in text
    assert "vllm" not in text


def test_names_with_signs_of_a_shell_or_a_table_stay_whole(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    base = shutil.copytree(recipe["model"]["path"], run.parent / "my base; it's")
    recipe["model"]["path"], recipe["data"]["path"] = str(base), "in|out.jsonl"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = written(run)[1]
    command = next(line for line in text.splitlines() if line.startswith("vllm serve"))
    assert shlex.split(command)[2:4] == ["my base; it's", "--enable-lora"]
    assert "| data | in\\|out.jsonl |\n" in text


def test_only_weights_settings_and_tokenizer_are_shared(run: Path) -> None:
    adapter = run / "adapter"
    for name in ("eval.json", "answers.txt", "rows.json", "adapter_config.json.bak"):
        (adapter / name).write_text('{"prompt": "secret"}')
    shared = ["adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "processor_config.json"]
    for name in (*shared[2:], "video_preprocessor_config.json"):  # of a merged model that reads images
        (adapter / name).write_text("{}")
    assert [file.name for file in files_of(find_subject(run))] == [*shared, "video_preprocessor_config.json"]


@pytest.mark.parametrize(
    ("to", "library", "relation", "use"),
    [
        ("merged", "transformers", "merged into it.", "AutoModelForCausalLM.from_pretrained('anna/x')"),
        ("gguf", "gguf", "merged into it, as a GGUF file.", "llama-cli -m here/model-f16.gguf"),
        ("gguf-lora", "gguf", "in a GGUF file as a LoRA of rank 8.", "--lora here/adapter-f16.gguf"),
        ("lora", "peft", "as a LoRA of rank 8.", "--lora-modules name=anna/x"),
    ],
)
def test_an_export_has_the_card_of_its_run(run: Path, to: str, library: str, relation: str, use: str) -> None:
    out = run.parent / "out"
    assert main(["export", str(run), str(out), "--to", to, "--no-compare"]) == 0
    front, text = written(out, "--repo", "anna/x")
    assert front["library_name"] == library and relation in text and use in text and "import qvera" not in text
    assert "steps" in section(text, "Training") and "loss" in section(text, "Scores")
    assert "They are those of the adapter before it was exported." in text
    assert to != "lora" or "compute_dtype='float32'" in text
    shutil.rmtree(run)  # the certificate alone says less, and nothing wrong
    _, text = written(out, "--repo", "anna/x")
    assert use in text and "## Scores" not in text and "of rank 8" in text
    if to == "lora":  # a cut one has a rank and scores of its own
        certificate = json.loads((out / "qvera_export.json").read_text()) | {"rank": 4}
        certificate["difference"] = {"trained": {"loss": 1.25}, "exported": {"loss": 1.5}}
        (out / "qvera_export.json").write_text(json.dumps(certificate))
        _, text = written(out)
        assert section(text, "Scores")["loss"] == ["1.250", "1.500"]
        assert "adapter of rank 8, for tiny-llama, as a LoRA of rank 4." in text and "--max-lora-rank 8 " in text


def test_one_of_many_adapters_has_a_card_of_its_own(make_recipe: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "many", make_recipe())
    entry = json.loads((run / "run.json").read_text())["adapters"][0]
    text = model_card(find_subject(run, entry["name"]))
    assert section(text, "Training")["rows"] == [str(entry["rows"])]
    assert float(section(text, "Scores")["loss"][1]) == pytest.approx(entry["eval_after"]["loss"], rel=1e-3)
    (run / "adapters" / entry["directory"]).rename(run / "adapters" / "job")
    text = model_card(find_subject(run, "job"))  # as a server's job leaves one there, trained on other rows
    assert "rows.csv" not in text and "## Scores" not in text and "## Training" not in text
    with pytest.raises(InputError, match="it was trained, and its directory is no longer there"):
        find_subject(run, entry["name"])


def test_how_the_base_was_opened_goes_with_the_adapter_its_exports_and_its_card(run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    recipe = recipe.replace(
        model=recipe.model.replace(revision="v2", quantization="none"),
        training=recipe.training.replace(max_steps=1, sample_count=0),
    )
    train(recipe, tmp_path / "of_v2")
    alone = Path(shutil.copytree(tmp_path / "of_v2" / "adapter", tmp_path / "alone"))
    for kind in ("lora", "peft"):
        assert main(["export", str(alone), str(tmp_path / kind), "--to", kind]) == 0
    sections = [find_target(tmp_path / kind).section for kind in ("alone", "lora", "peft")]
    assert [section.revision for section in sections] == ["v2"] * 3
    assert [section.quantization for section in sections] == ["none", "none", "nf4"]  # PEFT's VeRA has no place for it
    assert find_target(Path(shutil.copytree(run / "adapter", tmp_path / "nf4"))).section.quantization == "nf4"
    assert "AutoModelForCausalLM.from_pretrained('tiny-llama', revision='v2')" in written(tmp_path / "of_v2")[1]
