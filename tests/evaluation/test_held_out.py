"""`qvera eval` on all that a run can become: the same scores where the numbers are the same, and every answer written down."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from qvera.adapters.save_load import load_adapter, save_adapter
from qvera.cli.main import main
from qvera.config.schema import load_recipe
from qvera.config.sections import ModelSection
from qvera.data import build_datasets, collate
from qvera.evaluation.load import find_target, open_target, require_comparable
from qvera.evaluation.metrics import NAMES, scores_of, text_metrics
from qvera.models.loader import load_base
from qvera.models.tokenizer import load_tokenizer
from qvera.tasks.causal_lm import CausalLM
from qvera.training.trainer import train
from qvera.utils.files import file_sha256
from tests.adapters.helpers import perturb
from tests.many_adapters import write_run

pytestmark = pytest.mark.process


def evaluate(*arguments: Any) -> dict[str, Any]:
    """The document of `qvera eval ARGUMENTS`."""
    out = Path(arguments[0]).parent / f"scores{len(list(Path(arguments[0]).parent.glob('scores*')))}.json"
    assert main(["eval", *map(str, arguments), "--json", str(out)]) == 0
    return dict(json.loads(out.read_text()))


def export(run: Path, name: str, *options: str) -> Path:
    """What `qvera export RUN NAME OPTIONS` writes, beside the run."""
    out = run.parent / name
    assert main(["export", str(run), str(out), *options]) == 0
    return out


def loss_in_stock_transformers(directory: Path, run: Path) -> float:
    """Held-out loss of a checkpoint by transformers alone, row by row."""
    recipe = load_recipe(run / "recipe.yaml")
    rows = build_datasets(recipe.data, load_tokenizer(recipe.model)).eval
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total = tokens = 0.0
    for row in rows:
        with torch.no_grad():
            loss = model(**collate([row], 0)).loss
        total, tokens = total + float(loss) * row.trained_tokens, tokens + row.trained_tokens
    return total / tokens


@pytest.fixture(scope="module")
def of_run(moved_run: Path) -> dict[str, Any]:
    """The run itself, with its base."""
    return evaluate(moved_run, "--with-base", "--max-new-tokens", "6")


def test_a_run_its_base_its_adapter_and_what_it_exports_to(run: Path, of_run: dict[str, Any]) -> None:
    before = json.loads((run / "run.json").read_text())["result"]["eval_before"]
    assert of_run["base_scores"]["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert abs(of_run["scores"]["loss"] - before["loss"]) > 0.01
    assert any(row["answer"] != row["base_answer"] for row in of_run["answers"])
    adapter = evaluate(run / "adapter", "--max-new-tokens", "6")
    assert adapter["answers"] == [
        {key: value for key, value in row.items() if not key.startswith("base_")} for row in of_run["answers"]
    ]
    base = evaluate(run, "--base", "--max-new-tokens", "6")
    assert base["base_scores"] is None
    assert base["scores"]["loss"] == of_run["base_scores"]["loss"]
    assert [row["answer"] for row in base["answers"]] == [row["base_answer"] for row in of_run["answers"]]
    assert base["subject"]["column"] == "Base"
    digest = file_sha256(run / "adapter" / "adapter_model.safetensors")
    hashes = [document["subject"]["adapter_sha256"] for document in (of_run, adapter, base)]
    assert hashes == [digest, digest, None]
    for kind in ("lora", "peft"):
        # in float16 by default, and its base is read as the run's recipe says
        found = evaluate(export(run, kind, "--to", kind), "--recipe", run, "--with-base", "--no-generation")
        assert found["scores"]["loss"] == pytest.approx(of_run["scores"]["loss"], rel=2e-3), kind
        assert found["base_scores"]["loss"] == pytest.approx(of_run["base_scores"]["loss"], rel=1e-6)
        assert found["scores"]["rows"] == of_run["scores"]["rows"] == 8
        assert kind.replace("peft", "vera").upper() in found["subject"]["what"]


def test_rows_that_changed_since_the_training_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = f"{run}: its rows (data.path or data.eval_path) are others now than in training"
    evaluate(run, "--no-generation")
    assert told not in capsys.readouterr().err
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    rows = Path(recipe["data"]["path"]).read_text().splitlines(keepends=True)
    recipe["data"]["path"] = str(tmp_path / "rows.jsonl")
    Path(recipe["data"]["path"]).write_text("".join(reversed(rows)))
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    evaluate(run, "--no-generation")
    assert told in capsys.readouterr().err
    export(run, "merged")
    assert told in capsys.readouterr().err


def test_rows_of_a_file_may_have_another_format_than_those_that_trained(run: Path, tmp_path: Path) -> None:
    recipe, rows = yaml.safe_load((run / "recipe.yaml").read_text()), tmp_path / "chats.jsonl"
    recipe["data"]["format"] = "prompt-completion"  # as `qvera init` writes it
    recipe["data"] |= {"path": "somebody/rows", "split": "train_sft"}  # a hub dataset's split, which no file has
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    turns = [{"role": "user", "content": "say red 1"}, {"role": "assistant", "content": "red red"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    line = (run / "adapter", "--recipe", tmp_path / "recipe.yaml", "--data", rows, "--no-generation")
    assert evaluate(*line)["scores"]["rows"] == 1


def test_rows_of_a_file_that_the_run_was_trained_on_are_told(
    run: Path, tiny_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 32, and two of the held-out rows repeat one of these
    told = f"{tiny_rows}: the run was trained on 34 of these 40 rows. Scores will flatter."
    evaluate(run, "--no-generation", "--data", tiny_rows)
    assert told in capsys.readouterr().err
    evaluate(run, "--no-generation", "--data", tiny_rows, "--base")  # which has learnt from none of them
    (tmp_path / "new.jsonl").write_text('{"prompt": "say nothing", "completion": "nothing"}\n')
    evaluate(run, "--no-generation", "--data", tmp_path / "new.jsonl")
    assert "the run was trained on" not in capsys.readouterr().err


def test_references_that_no_answer_is_long_enough_for_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "8 of 8 references are longer than the 1 tokens of an answer, so they can't match. Raise --max-new-tokens to"
    evaluate(run, "--max-new-tokens", "1")
    said = capsys.readouterr().err
    assert told in said
    enough = re.search(r"Raise --max-new-tokens to (\d+)", said)
    assert enough is not None
    evaluate(run, "--max-new-tokens", enough[1])
    assert "can't match" not in capsys.readouterr().err
    recipe = load_recipe(run / "recipe.yaml").replace(training={"sample_max_new_tokens": 1, "exact_match_rows": 2})
    console = Console(record=True, width=1000)
    train(recipe, tmp_path / "short", console=console)
    assert "2 of 2 references are longer" in console.export_text()


@pytest.mark.parametrize("weights", ["original", "dequantized"])
def test_a_merged_export_finds_its_run_and_its_base(
    run: Path, of_run: dict[str, Any], tiny_model_dir: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(run, "merged", "--dtype", "float32", "--base", weights, "--no-compare")
    answers = run.parent / "answers.jsonl"
    assert main(f"generate {out} --prompt x --max-new-tokens 2 --out {answers}".split()) == 0
    assert json.loads(answers.read_text())["prompt"] == "x"
    found = evaluate(out, "--with-base", "--max-new-tokens", "6")
    assert found["scores"]["loss"] == pytest.approx(loss_in_stock_transformers(out, run), rel=1e-5)
    assert found["subject"]["adapter_sha256"] == of_run["subject"]["adapter_sha256"]  # of the one it was made with
    if weights == "original":
        assert found["base_scores"]["loss"] == pytest.approx(loss_in_stock_transformers(tiny_model_dir, run), rel=1e-5)
    else:  # merged into what the run trained on, so it is the run again
        for scores in ("scores", "base_scores"):
            assert found[scores]["loss"] == pytest.approx(of_run[scores]["loss"], rel=1e-4)
        assert [row["answer"] for row in found["answers"]] == [row["answer"] for row in of_run["answers"]]
    written = out / "qvera_export.json"
    written.write_text(written.read_text().replace(of_run["subject"]["adapter_sha256"], "0" * 64))
    capsys.readouterr()
    assert main(["eval", str(out)]) == 2
    assert f"no longer that of a run at {run / 'adapter'}: moved, or trained further" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["prompt-completion", "alpaca"])
def test_an_export_is_asked_what_its_run_was_trained_on(make_recipe: Any, tmp_path: Path, kind: str) -> None:
    """The template is `auto`, and what it means depends on the rows where a tokenizer has no template."""
    model = Path(shutil.copytree(make_recipe().model.path, tmp_path / "model"))
    for file in model.glob("*.jinja"):
        file.unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    row = {"prompt": "say 3", "completion": "3 3"}
    if kind == "alpaca":
        row = {"instruction": "say 3", "output": "3 3", "input": "red"}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 12))
    run = tmp_path / "run"
    data = {"path": str(tmp_path / "rows.json"), "max_length": 256}
    training = {"max_steps": 1, "sample_count": 0, "output_dir": str(run)}
    train(make_recipe(model={"path": str(model)}, data=data, training=training), run)
    out = export(run, "merged", "--dtype", "float32", "--base", "dequantized", "--no-compare")
    of_run, merged = (evaluate(place, "--max-new-tokens", "2") for place in (run, out))
    assert [row["prompt"] for row in merged["answers"]] == [row["prompt"] for row in of_run["answers"]]
    assert merged["scores"]["loss"] == pytest.approx(of_run["scores"]["loss"], rel=1e-4)
    said = load_tokenizer(ModelSection(path=str(out))).apply_chat_template(
        [{"role": "user", "content": "say 3"}], tokenize=False, add_generation_prompt=True
    )
    assert ("### Instruction:" in said) == (kind == "alpaca")


def test_an_export_whose_base_or_run_has_gone_says_what_it_needs(run: Path, tiny_rows: Path, capsys: Any) -> None:
    out = export(run, "merged", "--no-compare")
    kept = (out / "qvera_export.json").read_text()
    certificate = json.loads(kept)
    certificate["base"]["path"] = str(run.parent / "moved")
    (out / "qvera_export.json").write_text(json.dumps(certificate))
    page, predictions = run.parent / "page.html", run.parent / "answers.jsonl"
    capsys.readouterr()
    assert main(["eval", str(out), "--with-base", "--predictions", str(predictions)]) == 2
    said = capsys.readouterr().err
    assert "qvera_export.json" in said and "moved" in said
    assert not predictions.exists()
    assert main(["eval", str(out), "--html", str(page), "--max-new-tokens", "2"]) == 0  # a page alone does without
    assert "no base" in capsys.readouterr().err
    assert page.exists()

    (out / "qvera_export.json").write_text(kept)
    moved = run.rename(run.parent / "elsewhere")
    assert main(["eval", str(out)]) == 2
    assert "--data FILE" in capsys.readouterr().err
    by_recipe = evaluate(out, "--recipe", moved, "--no-generation")
    by_file = evaluate(out, "--recipe", moved / "recipe.yaml", "--data", tiny_rows, "--no-generation")
    assert (by_recipe["scores"]["rows"], by_file["scores"]["rows"]) == (8, 40)
    assert evaluate(out, "--data", tiny_rows, "--no-generation")["scores"]["loss"] == by_file["scores"]["loss"]
    # the run is there again, but its recipe can't be read; or with other vectors: its rows are not the export's
    moved.rename(run)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(f"{recipe}later_key: 1\n")
    assert evaluate(out, "--data", tiny_rows, "--no-generation")["scores"]["rows"] == 40
    (run / "recipe.yaml").write_text(recipe)
    model = load_adapter(load_base(load_recipe(run / "recipe.yaml").model).model, run / "adapter")
    perturb(model, seed=5)
    save_adapter(model, run / "adapter")
    assert main(["eval", str(out)]) == 2


def test_an_export_by_relative_paths_finds_its_run_and_its_base_from_elsewhere(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (run / "recipe.yaml").read_text()
    base = Path(load_recipe(run / "recipe.yaml").model.path)
    os.symlink(base, run.parent / "base")
    (run / "recipe.yaml").write_text(text.replace(str(base), "base"))
    monkeypatch.chdir(run.parent)
    assert main(["export", run.name, "merged", "--base", "original", "--no-compare"]) == 0
    (run.parent / "elsewhere").mkdir()
    monkeypatch.chdir(run.parent / "elsewhere")
    target = find_target(run.parent / "merged")
    assert target.run is not None and target.run.samefile(run)
    require_comparable(target)


def test_a_run_whose_base_or_rows_have_moved_names_the_key_and_the_file_to_mend(run: Path, capsys: Any) -> None:
    recipe, config = run / "recipe.yaml", run / "adapter" / "adapter_config.json"
    base, rows = load_recipe(recipe).model.path, str(load_recipe(recipe).data.path)
    for files, place, said in (
        ((recipe, config), base, f"{recipe}: model.path: the base {base}.gone is not there. If it has moved"),
        ((recipe,), rows, f"data of {recipe}: {rows}.gone: no such file or directory"),
    ):
        texts = [file.read_text() for file in files]
        for file, text in zip(files, texts, strict=True):
            assert place in text
            file.write_text(text.replace(place, f"{place}.gone"))
        capsys.readouterr()
        assert main(["eval", str(run)]) == 2
        assert said in capsys.readouterr().err
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)


def test_rows_with_other_columns_are_scored_by_a_recipe_that_names_them(run: Path, tmp_path: Path, capsys: Any) -> None:
    rows, recipe = tmp_path / "rows.csv", tmp_path / "columns.yaml"
    rows.write_text("ask,reply\n1+1,2\n")
    command = ["eval", str(run), "--data", str(rows), "--no-generation"]
    assert main(command) == 2
    assert "or name them in a copy of the recipe: --recipe FILE." in capsys.readouterr().err
    of_run = load_recipe(run / "recipe.yaml")
    columns = {"prompt": "ask", "completion": "reply"}
    recipe.write_text(of_run.replace(data=of_run.data.replace(columns=columns)).to_yaml())
    assert main([*command, "--recipe", str(recipe)]) == 0
    rows.write_text("prompt,completion\n1+1,2\n")  # called as qvera calls them
    assert main([*command, "--recipe", str(recipe)]) == 0


def test_the_relative_base_of_a_run_of_many_is_found_from_elsewhere(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    os.symlink(recipe.model.path, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "many", recipe.replace(model=recipe.model.replace(path="base")), ["anna"])
    shutil.copytree(run / "adapters" / "anna", tmp_path / "copy")
    shutil.copytree(run / "adapters" / "anna", tmp_path / "several" / "anna")
    (tmp_path / "several" / "a log").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_target(tmp_path / "several", needs_name=False).section.path == str(tmp_path / "base")
    for path, of_run in ((run / "adapters" / "anna", None), (tmp_path / "copy", run)):
        assert open_target(find_target(path, of_run)).target.section.path == str(tmp_path / "base")


@pytest.fixture(scope="module")
def stock_lora(moved_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that PEFT wrote."""
    base = load_base(load_recipe(moved_run / "recipe.yaml").model).model
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    out = tmp_path_factory.mktemp("stock") / "lora"
    model.save_pretrained(out, save_embedding_layers=False)
    return out


def test_a_lora_that_peft_trained(run: Path, stock_lora: Path, capsys: Any) -> None:
    out = Path(shutil.copytree(stock_lora, run.parent / "lora"))
    found = evaluate(out, "--recipe", run, "--with-base", "--no-generation")
    assert abs(found["scores"]["loss"] - found["base_scores"]["loss"]) > 1e-3
    (out / "adapter_model.safetensors").rename(out / "adapter_model.bin")
    assert main(["eval", str(out), "--recipe", str(run)]) == 2
    assert "pickled adapters are not read" in capsys.readouterr().err
    (out / "adapter_model.bin").unlink()
    assert main(["eval", str(out), "--recipe", str(run)]) == 2
    assert "has no adapter_model.safetensors, so it is not an adapter directory" in capsys.readouterr().err


HARMFUL: dict[str, dict[str, Any]] = {
    "is for Megatron": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    "which changes prompts": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "not a config that PEFT can read": {"peft_type": "LORETTA"},
    "no module of this model is named no_such_proj": {"target_modules": ["no_such_proj"]},
    "(names are written in a list: ['q_proj'])": {"target_modules": "q_proj"},
    "12 unknown": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "this model needs [3, 64]": {"r": 3},
}


@pytest.mark.parametrize("said", HARMFUL)
def test_adapters_that_peft_would_load_with_harm_or_without_effect(
    run: Path, stock_lora: Path, capsys: Any, said: str
) -> None:
    out = Path(shutil.copytree(stock_lora, run.parent / "lora"))
    config = out / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | HARMFUL[said]))
    assert main(["eval", str(out), "--recipe", str(run), "--no-generation"]) == 2
    assert said in capsys.readouterr().err


def test_predictions_and_page_hold_every_answer(run: Path) -> None:
    import sacrebleu

    predictions, page = run.parent / "answers.jsonl", run.parent / "page.html"
    metrics = "exact,bleu,rougeL,chrf"
    found = evaluate(run, "--predictions", predictions, "--html", page, "--metrics", metrics, "--max-new-tokens", "6")
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert rows == found["answers"] and len(rows) == 8
    html = page.read_text()
    shown = unescape(html)
    for row in rows:
        assert row.keys() == {"source", "prompt", "references", "answer", "scores", "base_answer", "base_scores"}
        assert row["scores"].keys() == row["base_scores"].keys() == set(metrics.split(","))
        assert row["source"] in shown and row["references"][0] in shown
    assert html.count('<article class="sample">') == 8
    assert html.count("<h3>Base ") == html.count("<h3>Adapter ") == html.count("<h3>Reference</h3>") == 8
    answers, references = [row["answer"] for row in rows], [[row["references"][0] for row in rows]]
    assert found["scores"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, references).score)
    assert found["scores"]["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, references).score)
    for name in ("exact", "rougeL"):
        mean = sum(row["scores"][name] for row in rows) / 8
        assert found["scores"]["exact_match" if name == "exact" else name] == pytest.approx(mean)
    assert "sacrebleu" in {m["name"]: m["signature"] for m in found["metrics"]}["bleu"]


def test_prompts_that_repeat_are_one_input_with_all_their_references(run: Path) -> None:
    data = run.parent / "repeated.jsonl"
    lines = [("say red 1", "red red"), ("say blue 2", "blue"), ("say red 1", "red, red"), ("say red 1", "red red")]
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in lines))
    apart = evaluate(run, "--data", data, "--max-new-tokens", "4")
    grouped = evaluate(run, "--data", data, "--max-new-tokens", "4", "--group-prompts")
    assert [row["references"] for row in apart["answers"]] == [["red red"], ["blue"], ["red, red"], ["red red"]]
    assert [row["references"] for row in grouped["answers"]] == [["red red", "red, red"], ["blue"]]
    assert (grouped["scores"]["scored_rows"], grouped["scores"]["references"]) == (2, 3)
    assert grouped["scores"]["loss"] == apart["scores"]["loss"]  # the loss is over all rows either way


def test_a_file_of_its_own_is_read_as_it_is(run: Path, tiny_rows: Path) -> None:
    """Not mixed, not weighted, and not looked for in the recipe's hub set. An adapter alone needs no more than a file."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= {"config_name": "main", "revision": "v1", "weight": 2.0, "mixture": [{"path": str(tiny_rows)}]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lone = shutil.copytree(run / "adapter", run.parent / "lone")
    for place in (run, lone):
        scores = evaluate(place, "--data", tiny_rows, "--no-generation")["scores"]
        assert scores["rows"] == 40 and math.isfinite(scores["loss"])


def test_a_checkpoint_without_a_base_has_a_page_without_one(
    tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    page = tmp_path / "page.html"
    found = evaluate(model, "--data", tiny_rows, "--rows", "2", "--max-new-tokens", "2", "--html", page)
    assert found["base_scores"] is None
    assert found["subject"]["column"] == "Model"
    html = page.read_text()
    assert html.count("<h3>Model ") == 2
    assert "<h3>Base " not in html


TEXT = "the red door is open today"


@pytest.mark.parametrize("name", NAMES)
def test_each_metric_is_at_its_best_for_equal_texts_and_falls_with_other_words(name: str) -> None:
    (metric,) = text_metrics([name])
    top = 0 if name == "ter" else 100 if name.startswith(("bleu", "chrf")) else 1
    worse = "a green window stays shut now"
    assert metric.of_one(TEXT, [TEXT]) == pytest.approx(top)
    assert scores_of([metric], [TEXT, TEXT], [[TEXT], [worse, TEXT]]) == {name: pytest.approx(top)}
    partly = metric.of_one("the red door is shut", [TEXT])
    ends = [metric.of_one(worse, [TEXT]), partly, top]
    assert ends == sorted(ends, reverse=metric.lower_is_better)
    assert name == "exact" or len(set(ends)) == 3
    assert math.isfinite(metric.of_one("", [TEXT]))
    assert metric.signature()


def test_known_values() -> None:
    """ROUGE-L by hand: 4 of 5 words in order, of 6: P 4/5, R 4/6."""
    (rouge,) = text_metrics(["rougeL"])
    assert rouge.of_one("the red door is shut", [TEXT]) == pytest.approx(2 * 0.8 * (4 / 6) / (0.8 + 4 / 6))
    upper, lower = text_metrics(["bleu", "bleu-lowercase"])
    assert lower.of_one(TEXT.upper(), [TEXT]) == pytest.approx(100)
    assert upper.of_one(TEXT.upper(), [TEXT]) < 1


def test_metrics_are_named_once_and_missing_packages_before_a_run_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert [m.name for m in text_metrics(["rougel", "bleu", "rougeL"])] == ["rougeL", "bleu"]
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "rouge" in name or "bleu" in name else real(name, *a)
    )
    assert [m.name for m in text_metrics(["exact"])] == ["exact"]
    for name, package in (("bleu", "sacrebleu"), ("rougeL", "rouge-score")):
        assert main(["eval", "no-such-run", "--metrics", name]) == 2
        said = capsys.readouterr().err
        assert f"needs the package {package}" in said and "pip install 'qvera[metrics]'" in said


def test_compare_shows_what_eval_left_in_the_run(run: Path, capsys: Any) -> None:
    flags = ["--metrics", "exact,bleu", "--max-new-tokens", "4", "--json", str(run / "eval.json")]
    assert main(["eval", str(run), *flags]) == 0
    written = json.loads((run / "eval.json").read_text())["scores"]
    other = shutil.copytree(run, run.parent / "other")
    capsys.readouterr()
    assert main(["compare", str(run), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not [gap for gap in found["gaps"] if "eval.json" in gap]
    for each in found["runs"]:
        assert each["evaluation"]["scores"] == {key: written[key] for key in ("exact_match", "bleu")}
        assert each["evaluation"]["scored_rows"] == 8


def test_a_loss_that_is_not_finite_is_null_in_the_json(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLM, "held_out_loss", lambda *_, **__: {"loss": math.nan, "rows": 8})
    file = tmp_path / "scores.json"
    assert main(["eval", str(trained_run), "--no-generation", "--json", str(file)]) == 0
    document = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["scores"]["loss"] is None


def test_options_for_answers_are_refused_where_none_are_asked_for(trained_run: Path, capsys: Any) -> None:
    for option in ("--metrics bleu", "--max-new-tokens 4", "--predictions p.jsonl", "--group-prompts"):
        assert main(["eval", str(trained_run), "--no-generation", *option.split()]) == 2
        name = option.partition(" ")[0]
        assert f"{name}: is for answers, and --no-generation asks for none" in capsys.readouterr().err


def test_wrong_columns_are_an_error_before_weights_are_loaded(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("qvera.tasks.evaluate.open_target", lambda *_, **__: pytest.fail("weights were loaded"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "2 + 2", "reply": "4"}\n')
    assert main(["eval", str(trained_run), "--data", str(rows)]) == 2
    assert "rows.jsonl:1: the columns match" in capsys.readouterr().err
