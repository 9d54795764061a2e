"""`qvera eval` on all that a run can become: the same scores where the numbers are the same, and every answer written down."""

from __future__ import annotations

import json
import math
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qvera.adapters.files.save_load import load_adapter, save_adapter
from qvera.cli.main import main
from qvera.config.load import load_recipe
from qvera.config.schema import ModelSection
from qvera.data import build_datasets, collate
from qvera.evaluation import metrics as textscores
from qvera.evaluation.metrics import NAMES, scores_of, text_metrics
from qvera.models.loader import load_base
from qvera.models.tokenizer import load_tokenizer
from qvera.tasks.causal_lm import CausalLM
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256
from tests.adapters.helpers import perturb

pytestmark = pytest.mark.process


def evaluate(*arguments: Any) -> dict[str, Any]:
    """The document of `qvera eval ARGUMENTS`."""
    out = Path(arguments[0]).parent / f"scores{len(list(Path(arguments[0]).parent.glob('scores*')))}.json"
    assert main(["eval", *map(str, arguments), "--json", str(out)]) == 0
    return dict(json.loads(out.read_text()))


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


def test_a_run_its_adapter_and_what_it_exports_to(run: Path, of_run: dict[str, Any]) -> None:
    before = json.loads((run / "run.json").read_text())["result"]["eval_before"]
    assert of_run["base_scores"]["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert abs(of_run["scores"]["loss"] - before["loss"]) > 0.01
    assert any(row["answer"] != row["base_answer"] for row in of_run["answers"])
    assert evaluate(run / "adapter", "--max-new-tokens", "6")["answers"] == [
        {key: value for key, value in row.items() if not key.startswith("base_")} for row in of_run["answers"]
    ]
    for kind in ("lora", "peft"):
        out = run.parent / kind
        assert main(["export", str(run), str(out), "--to", kind]) == 0
        # in float16 by default, and its base is read as the run's recipe says
        found = evaluate(out, "--recipe", run, "--with-base", "--max-new-tokens", "6")
        assert found["scores"]["loss"] == pytest.approx(of_run["scores"]["loss"], rel=2e-3), kind
        assert found["base_scores"]["loss"] == pytest.approx(of_run["base_scores"]["loss"], rel=1e-6)
        assert found["scores"]["rows"] == of_run["scores"]["rows"] == 8
        assert kind.replace("peft", "vera").upper() in found["subject"]["what"]


@pytest.mark.parametrize("weights", ["original", "dequantized"])
def test_a_merged_export_finds_its_run_and_its_base(
    run: Path, of_run: dict[str, Any], tiny_model_dir: Path, weights: str
) -> None:
    out = run.parent / "merged"
    assert main(["export", str(run), str(out), "--dtype", "float32", "--base", weights, "--no-compare"]) == 0
    (run.parent / "prompts.txt").write_text("say red 1\n")
    asked = [str(out), str(run.parent / "prompts.txt"), "--out", str(run.parent / "answers.jsonl")]
    assert main(["generate", *asked, "--max-new-tokens", "2"]) == 0
    assert json.loads((run.parent / "answers.jsonl").read_text())["prompt"] == "say red 1"
    found = evaluate(out, "--with-base", "--max-new-tokens", "6")
    assert found["scores"]["loss"] == pytest.approx(loss_in_stock_transformers(out, run), rel=1e-5)
    if weights == "original":
        assert found["base_scores"]["loss"] == pytest.approx(loss_in_stock_transformers(tiny_model_dir, run), rel=1e-5)
    else:  # merged into what the run trained on, so it is the run again
        for scores in ("scores", "base_scores"):
            assert found[scores]["loss"] == pytest.approx(of_run[scores]["loss"], rel=1e-4)
        assert [row["answer"] for row in found["answers"]] == [row["answer"] for row in of_run["answers"]]


@pytest.mark.parametrize("kind", ["prompt-completion", "alpaca"])
def test_an_export_is_asked_what_its_run_was_trained_on(make_recipe: Any, tmp_path: Path, kind: str) -> None:
    """The template is `auto`, and what it means depends on the rows where a tokenizer has no template."""
    model = Path(shutil.copytree(make_recipe().model.path, tmp_path / "model"))
    for file in model.glob("*.jinja"):
        file.unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    names = ("prompt", "completion") if kind == "prompt-completion" else ("instruction", "output")
    rows = [{names[0]: f"say {n}", names[1]: f"{n} {n}"} for n in range(20)]
    if kind == "alpaca":
        rows = [{**row, "input": "red"} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = make_recipe(
        model={"path": str(model)},
        data={"path": str(tmp_path / "rows.json"), "max_length": 256},
        training={"max_steps": 1, "sample_count": 0, "output_dir": str(tmp_path / "run")},
    )
    train(recipe, tmp_path / "run")
    out = tmp_path / "merged"
    options = ["--dtype", "float32", "--base", "dequantized", "--no-compare"]
    assert main(["export", str(tmp_path / "run"), str(out), *options]) == 0
    run, merged = (evaluate(place, "--max-new-tokens", "2") for place in (tmp_path / "run", out))
    assert [row["prompt"] for row in merged["answers"]] == [row["prompt"] for row in run["answers"]]
    assert merged["scores"]["loss"] == pytest.approx(run["scores"]["loss"], rel=1e-4)
    said = load_tokenizer(ModelSection(path=str(out))).apply_chat_template(
        [{"role": "user", "content": "say 3"}], tokenize=False, add_generation_prompt=True
    )
    assert ("### Instruction:" in said) == (kind == "alpaca")


def test_a_base_that_has_gone_is_said_before_anything_is_done(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = run.parent / "merged"
    assert main(["export", str(run), str(out), "--no-compare"]) == 0
    file = out / "qvera_export.json"
    certificate = json.loads(file.read_text())
    certificate["base"]["path"] = str(tmp_path / "moved")
    file.write_text(json.dumps(certificate))
    capsys.readouterr()
    assert main(["eval", str(out), "--with-base", "--predictions", str(tmp_path / "answers.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "qvera_export.json" in said
    assert "moved" in said
    assert not (tmp_path / "answers.jsonl").exists()
    # a page alone does without
    assert main(["eval", str(out), "--html", str(tmp_path / "page.html"), "--max-new-tokens", "4"]) == 0
    assert "no base" in capsys.readouterr().err
    assert (tmp_path / "page.html").exists()


def test_a_file_is_not_looked_for_in_the_recipe_s_hub_set(run: Path, tiny_rows: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    recipe = recipe.replace(data=recipe.data.replace(config_name="main", revision="v1"))
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    assert evaluate(run, "--data", tiny_rows, "--no-generation")["scores"]["rows"] == 40


def test_an_export_without_its_run_says_what_it_needs(run: Path, tiny_rows: Path, capsys: Any) -> None:
    out = run.parent / "merged"
    assert main(["export", str(run), str(out), "--no-compare"]) == 0
    moved = run.rename(run.parent / "elsewhere")
    capsys.readouterr()
    assert main(["eval", str(out)]) == 2
    assert "--data FILE" in capsys.readouterr().err
    by_recipe = evaluate(out, "--recipe", moved, "--no-generation")
    by_file = evaluate(out, "--recipe", moved / "recipe.yaml", "--data", tiny_rows, "--no-generation")
    assert (by_recipe["scores"]["rows"], by_file["scores"]["rows"]) == (8, 40)
    assert evaluate(out, "--data", tiny_rows, "--no-generation")["scores"]["loss"] == by_file["scores"]["loss"]
    # the run is there again, but with other vectors: its rows are not taken for the export's
    moved.rename(run)
    weights = run / "adapter" / "adapter_model.safetensors"
    model = load_adapter(load_base(load_recipe(run / "recipe.yaml").model).model, run / "adapter")
    perturb(model, seed=5)
    save_adapter(model, weights.parent)
    assert main(["eval", str(out)]) == 2


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "is for Megatron"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "which changes prompts"),
        ({"peft_type": "LORETTA"}, "not a config that PEFT can read"),
        ({"target_modules": ["no_such_proj"]}, "no module of this model is named no_such_proj"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "12 unknown"),
        ({"r": 3}, "this model needs [3, 64]"),
    ],
)
def test_adapters_that_peft_would_load_with_harm_or_without_effect(
    run: Path, stock_lora: Path, capsys: Any, changes: dict[str, Any], said: str
) -> None:
    out = Path(shutil.copytree(stock_lora, run.parent / "lora"))
    config = out / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert main(["eval", str(out), "--recipe", str(run), "--no-generation"]) == 2
    assert said in capsys.readouterr().err


def test_predictions_and_page_hold_every_answer(run: Path) -> None:
    predictions, page = run.parent / "answers.jsonl", run.parent / "page.html"
    metrics = "exact,bleu,rougeL,chrf"
    found = evaluate(run, "--predictions", predictions, "--html", page, "--metrics", metrics, "--max-new-tokens", "6")
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert rows == found["answers"]
    assert len(rows) == 8
    for row in rows:
        assert row.keys() == {"source", "prompt", "references", "answer", "scores", "base_answer", "base_scores"}
        assert row["scores"].keys() == row["base_scores"].keys() == set(metrics.split(","))
    html = page.read_text()
    shown = unescape(html)
    for row in rows:
        assert row["source"] in shown
        assert row["references"][0] in shown
    assert html.count('<article class="sample">') == 8
    assert html.count("<h3>Base ") == html.count("<h3>Adapter ") == html.count("<h3>Reference</h3>") == 8
    assert "default-src 'none'" in html
    assert "http" not in html.replace("http-equiv", "")
    import sacrebleu

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


def test_a_file_of_its_own_is_not_mixed_or_weighted(make_recipe: Any, tiny_rows: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        data={"weight": 2.0, "mixture": [{"path": str(tiny_rows), "limit": 10}]}, training={"max_steps": 1}
    )
    train(recipe, tmp_path / "run")
    three = tmp_path / "three.jsonl"
    three.write_text("".join(tiny_rows.read_text().splitlines(keepends=True)[:3]))
    assert evaluate(tmp_path / "run", "--data", three, "--no-generation")["scores"]["rows"] == 3


def test_a_checkpoint_without_a_base_has_a_page_without_one(
    tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    model, page = tmp_path / "model", tmp_path / "page.html"
    shutil.copytree(tiny_model_dir, model)
    found = evaluate(model, "--data", tiny_rows, "--rows", "2", "--max-new-tokens", "2", "--html", page)
    assert found["base_scores"] is None
    assert found["subject"]["column"] == "Model"
    html = page.read_text()
    assert html.count("<h3>Model ") == 2
    assert "<h3>Base " not in html


def test_the_base_alone(run: Path, of_run: dict[str, Any]) -> None:
    alone = evaluate(run, "--base", "--max-new-tokens", "6")
    assert alone["base_scores"] is None
    assert alone["scores"]["loss"] == of_run["base_scores"]["loss"]
    assert [row["answer"] for row in alone["answers"]] == [row["base_answer"] for row in of_run["answers"]]
    assert alone["subject"]["column"] == "Base"


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


def test_names_are_checked_and_missing_packages_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [m.name for m in text_metrics(["rougel", "bleu", "rougeL"])] == ["rougeL", "bleu"]
    with pytest.raises(InputError, match="no metric 'meteor'; known: exact, bleu"):
        text_metrics(["exact", "meteor"])
    monkeypatch.setattr(textscores, "find_spec", lambda name: None)
    assert [m.name for m in text_metrics(["exact"])] == ["exact"]
    for name, package in (("bleu", "sacrebleu"), ("rougeL", "rouge-score")):
        with pytest.raises(InputError, match=rf"needs the package {package}.*pip install 'qvera\[metrics\]'"):
            text_metrics([name])


def test_an_adapter_in_a_copied_directory_needs_no_recipe_with_data(run: Path, tiny_rows: Path) -> None:
    """Its config names the base; only the rows have to be said."""
    lone = run.parent / "lone"
    shutil.copytree(run / "adapter", lone)
    found = evaluate(lone, "--data", tiny_rows, "--no-generation")
    assert found["scores"]["rows"] == 40
    assert math.isfinite(found["scores"]["loss"])


def test_compare_shows_what_eval_left_in_the_run(run: Path, capsys: Any) -> None:
    other = Path(shutil.copytree(run, run.parent / "other"))
    for place in (run, other):
        flags = ["--metrics", "exact,bleu", "--max-new-tokens", "6", "--json", str(place / "eval.json")]
        assert main(["eval", str(place), *flags]) == 0
    written = json.loads((run / "eval.json").read_text())
    capsys.readouterr()

    def compare() -> dict[str, Any]:
        assert main(["compare", str(run), str(other), "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    found = compare()
    assert not [gap for gap in found["gaps"] if "eval.json" in gap]
    for each in found["runs"]:
        assert each["evaluation"]["scores"] == {key: written["scores"][key] for key in ("exact_match", "bleu")}
        assert each["evaluation"]["scored_rows"] == 8
    # fewer rows, of an adapter that then changes
    (other / "eval.json").unlink()
    flags = ["--metrics", "exact,bleu", "--max-new-tokens", "6", "--rows", "5", "--json", str(other / "eval.json")]
    assert main(["eval", str(other), *flags]) == 0
    model = load_adapter(load_base(load_recipe(other / "recipe.yaml").model).model, other / "adapter")
    perturb(model, seed=5)
    save_adapter(model, other / "adapter")
    capsys.readouterr()
    said = [gap for gap in compare()["gaps"] if "eval.json" in gap]
    assert len(said) == 2
    assert said[0].startswith("other: eval.json is of another adapter")
    assert "not of the same inputs (run: 8 rows of" in said[1]
    assert "other: 5 rows of" in said[1]


def test_a_loss_that_is_not_finite_is_null_in_the_json(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLM, "held_out_loss", lambda *_, **__: {"loss": math.nan, "rows": 8})
    file = tmp_path / "scores.json"
    assert main(["eval", str(trained_run), "--no-generation", "--json", str(file)]) == 0
    document = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["scores"]["loss"] is None


@pytest.mark.parametrize(
    "option", [("--metrics", "bleu"), ("--max-new-tokens", "4"), ("--predictions", "p.jsonl"), ("--group-prompts",)]
)
def test_options_for_answers_are_refused_where_none_are_asked_for(
    option: tuple[str, ...], trained_run: Path, capsys: Any
) -> None:
    assert main(["eval", str(trained_run), "--no-generation", *option]) == 2
    assert f"{option[0]}: is for answers, and --no-generation asks for none" in capsys.readouterr().err


def test_adapter_hash_is_of_what_was_asked(run: Path) -> None:
    """An export is known by the adapter that it was made with; the base alone by none."""
    out = run.parent / "merged"
    assert main(["export", str(run), str(out), "--no-compare"]) == 0
    hashes = [
        evaluate(place, "--max-new-tokens", "2", "--rows", "1", *flags)["subject"]["adapter_sha256"]
        for place, *flags in ((run,), (run / "adapter",), (out,), (run, "--base"))
    ]
    digest = file_sha256(run / "adapter" / "adapter_model.safetensors")
    assert hashes == [digest, digest, digest, None]
