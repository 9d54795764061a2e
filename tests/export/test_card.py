"""The model card: what the run's files say, as the hub reads it, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from qvera.cli.main import main
from qvera.export import card
from qvera.export.card import find_subject, model_card
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
    before, after = section(text, "Scores")["loss"]
    assert (float(before), float(after)) == pytest.approx(
        (result["eval_before"]["loss"], result["eval_after"]["loss"]), rel=1e-3
    )
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


def test_what_the_base_and_the_scores_say_is_taken_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "eval.json").write_text(json.dumps({"scores": {"loss": 1.0, "exact_match": 0.8125, "rows": 8}}))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    base = Path(recipe["model"]["path"])
    copy = Path(shutil.copytree(base, run.parent / "base"))
    (copy / "README.md").write_text("---\nlicense: other\nlicense_name: small\nlicense_link: LICENSE\n---\n# Base\n")
    recipe["model"]["path"] = str(copy)
    recipe["data"]["path"] = "tatsu-lab/alpaca"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    front, text = written(run)
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "small", "LICENSE")
    assert front["datasets"] == ["tatsu-lab/alpaca"] and front["metrics"] == ["exact_match"]
    assert section(text, "Scores")["exact match"] == ["–", "0.8125"]
    assert "That of the base: small." in text
    recipe["model"]["path"] = "meta/base"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(card, "try_to_load_from_cache", lambda *_, **__: str(copy / "README.md"))
    front, text = written(run)
    assert (front["base_model"], front["base_model_relation"]) == ("meta/base", "adapter")
    assert "from_pretrained('meta/base')" in text and front["license_name"] == "small"


@pytest.mark.parametrize(
    ("to", "library", "relation", "use"),
    [
        ("merged", "transformers", "merged into it.", "AutoModelForCausalLM.from_pretrained('anna/x')"),
        ("gguf", "gguf", "merged into it, as a GGUF file.", "llama-cli -m here/model-f16.gguf"),
        ("gguf-lora", "gguf", "as a LoRA in a GGUF file.", "--lora here/adapter-f16.gguf"),
        ("lora", "peft", "as a LoRA.", "--lora-modules name=anna/x"),
    ],
)
def test_an_export_has_the_card_of_its_run(run: Path, to: str, library: str, relation: str, use: str) -> None:
    out = run.parent / "out"
    assert main(["export", str(run), str(out), "--to", to, "--no-compare"]) == 0
    front, text = written(out, "--repo", "anna/x")
    assert front["library_name"] == library and relation in text and use in text
    assert "steps" in section(text, "Training") and "loss" in section(text, "Scores")
    shutil.rmtree(run)  # the certificate alone says less, and nothing wrong
    _, text = written(out, "--repo", "anna/x")
    assert use in text and "## Scores" not in text and "of rank 8" in text


def test_a_classifier_is_used_as_one(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    rows = run.parent / "rows.csv"
    rows.write_text("text,label\nred,0\nblue,1\n")
    recipe |= {"task": "sequence-classification", "data": {"path": str(rows), "eval_fraction": 0.5}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    front, text = written(run, "--repo", "anna/topics")
    assert front["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained(" in text and "qvera eval anna/topics" in text
    assert "qvera chat" not in text and "vllm" not in text and "ollama" not in text


def test_one_of_many_adapters_has_a_card_of_its_own(make_recipe: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "many", make_recipe())
    entry = json.loads((run / "run.json").read_text())["adapters"][0]
    text = model_card(find_subject(run, entry["name"]))
    assert section(text, "Training")["rows"] == [str(entry["rows"])]
    assert float(section(text, "Scores")["loss"][1]) == pytest.approx(entry["eval_after"]["loss"], rel=1e-3)
