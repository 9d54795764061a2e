"""The ways to be wrong: each gives one clear message and exit code 2, and nothing on disk changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qvera.cli.main import main
from qvera.training.trainer import train

pytestmark = pytest.mark.process


class Scratch:
    """A scratch directory with a good model, good rows and a good recipe in it, to be spoilt one thing at a time."""

    def __init__(self, root: Path, model: Path, rows: Path, run: Path) -> None:
        self.root, self.run = root, run
        shutil.copytree(model, root / "model")
        shutil.copy(rows, root / "rows.jsonl")
        self.recipe: dict[str, Any] = {
            "model": {"path": str(root / "model"), "compute_dtype": "float32"},
            "adapter": {"rank": 4},
            "data": {"path": str(root / "rows.jsonl"), "max_length": 64},
            "training": {"max_steps": 1, "output_dir": str(root / "out"), "report_to": []},
        }

    def train(self, *more: str) -> list[str]:
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return ["train", str(path), *more]

    def with_recipe(self, text: str) -> list[str]:
        (self.root / "recipe.yaml").write_text(text)
        return ["train", str(self.root / "recipe.yaml")]

    def with_rows(self, *lines: str, name: str = "rows.jsonl") -> list[str]:
        (self.root / name).write_text("".join(f"{line}\n" for line in lines))
        self.recipe["data"]["path"] = str(self.root / name)
        return self.train()

    def copied_run(self) -> Path:
        shutil.copytree(self.run, self.root / "run")
        return self.root / "run"


GOOD_ROW = '{"prompt": "say red 1", "completion": "red red"}'


def set_key(section: str, **values: Any) -> Callable[[Scratch], list[str]]:
    def spoil(place: Scratch) -> list[str]:
        place.recipe.setdefault(section, {}).update(values)
        return place.train()

    return spoil


def edit_json(file: str, **values: Any) -> Callable[[Scratch], list[str]]:
    def spoil(place: Scratch) -> list[str]:
        path = place.root / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return place.train()

    return spoil


def drop(*files: str) -> Callable[[Scratch], list[str]]:
    def spoil(place: Scratch) -> list[str]:
        for file in files:
            (place.root / file).unlink()
        return place.train()

    return spoil


def only_pickles(place: Scratch) -> list[str]:
    (place.root / "model" / "model.safetensors").rename(place.root / "model" / "pytorch_model.bin")
    return place.train()


def cut_weights(place: Scratch) -> list[str]:
    file = place.root / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return place.train()


def no_eos(place: Scratch) -> list[str]:
    file = place.root / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))
    return place.train()


def latin1_rows(place: Scratch) -> list[str]:
    (place.root / "rows.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "x"}\n')
    return place.train()


def out_is_a_file(place: Scratch) -> list[str]:
    (place.root / "out").write_text("precious")
    return place.train()


def out_not_writable(place: Scratch) -> list[str]:
    # /proc takes no directories, not even root's
    place.recipe["training"]["output_dir"] = "/proc/qvera-run"
    return place.train()


def out_holds_a_run(place: Scratch) -> list[str]:
    shutil.copytree(place.run, place.root / "out")
    return place.train()


def out_holds_files_of_a_run(place: Scratch) -> list[str]:
    shutil.copytree(place.run, place.root / "out")
    (place.root / "out" / "recipe.yaml").unlink()
    return place.train()


def base_moved(place: Scratch) -> list[str]:
    run = place.copied_run()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["path"] = "models/base"  # as it stood in the recipe; it is no id of the hub
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    adapter_edited("base_model_name_or_path", str(place.root / "models" / "base"))(place)
    return ["generate", str(run), str(place.root / "rows.jsonl"), "--out", str(place.root / "answers.jsonl")]


def resume_nothing(place: Scratch) -> list[str]:
    return place.train("--resume")


def resume_another_recipe(place: Scratch) -> list[str]:
    shutil.copytree(place.run, place.root / "out")
    place.recipe["training"]["learning_rate"] = 1e-5
    return place.train("--resume")


def adapter_cut_short(place: Scratch) -> list[str]:
    file = place.copied_run() / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    return ["eval", str(place.root / "run")]


def adapter_edited(key: str, value: Any, command: str = "info") -> Callable[[Scratch], list[str]]:
    def spoil(place: Scratch) -> list[str]:
        run = place.root / "run"
        file = (run if run.exists() else place.copied_run()) / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
        return [command, str(place.root / "run")]

    return spoil


def adapter_for_another_model(place: Scratch) -> list[str]:
    config = json.loads((place.root / "model" / "config.json").read_text())
    config["intermediate_size"] = 128
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(place.root / "model")
    run = place.copied_run()
    text = (run / "recipe.yaml").read_text()
    recipe = yaml.safe_load(text)
    recipe["model"]["path"] = str(place.root / "model")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["generate", str(run), str(place.root / "rows.jsonl"), "--out", str(place.root / "answers.jsonl")]


def run_without_adapter(place: Scratch) -> list[str]:
    shutil.rmtree(place.copied_run() / "adapter")
    return ["chat", str(place.root / "run")]


def export_over_something(place: Scratch) -> list[str]:
    (place.root / "merged").mkdir()
    (place.root / "merged" / "thesis.tex").write_text("precious")
    return ["export", str(place.copied_run()), str(place.root / "merged")]


def quantize_missing_shard(place: Scratch) -> list[str]:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (place.root / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["quantize", str(place.root / "model"), str(place.root / "q")]


def export_missing_shard(place: Scratch) -> list[str]:
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    run = place.copied_run()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["path"] = str(place.root / "model")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (place.root / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["export", str(run), str(place.root / "merged")]


def answers_exist(place: Scratch) -> list[str]:
    (place.root / "answers.jsonl").write_text("precious")
    return ["generate", str(place.run), str(place.root / "rows.jsonl"), "--out", str(place.root / "answers.jsonl")]


def empty_prompts(place: Scratch) -> list[str]:
    (place.root / "prompts.txt").write_text("\n \n")
    return ["generate", str(place.run), str(place.root / "prompts.txt"), "--out", str(place.root / "answers.jsonl")]


def find_lr_into_a_file(place: Scratch) -> list[str]:
    return [*out_is_a_file(place), "--find-lr"]


def broken_certificate(place: Scratch) -> list[str]:
    (place.root / "model" / "qvera_export.json").write_text('{"adapter": {}}')
    return ["eval", str(place.root / "model"), "--data", str(place.root / "rows.jsonl")]


def adapter_without_base(place: Scratch) -> list[str]:
    (place.root / "lora").mkdir()
    (place.root / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"nothing": torch.zeros(1)}, place.root / "lora" / "adapter_model.safetensors")
    return ["eval", str(place.root / "lora"), "--data", str(place.root / "rows.jsonl")]


# name: (how it is spoilt, what the message must say)
TABLE: dict[str, tuple[Callable[[Scratch], list[str]], str]] = {
    "no such recipe": (lambda p: ["train", str(p.root / "recipee.yaml")], "no such recipe file"),
    "recipe is empty": (lambda p: p.with_recipe(""), "got an empty file"),
    "recipe is no YAML": (lambda p: p.with_recipe("model: [unclosed"), "not valid YAML"),
    "recipe has a key twice": (lambda p: p.with_recipe("model: a\nmodel: b\n"), "written twice"),
    "unknown key": (set_key("training", learning_rte=1.0), "Did you mean `learning_rate`?"),
    "unknown section": (set_key("trainng", a=1), "Did you mean `training`?"),
    "another tool's key": (set_key("training", gradient_accumulation_steps=4), "set training.global_batch_size"),
    "wrong type": (set_key("adapter", rank="big"), "adapter.rank: should be a whole number, got 'big'"),
    "out of range": (set_key("adapter", dropout=1.5), "adapter.dropout: should be less than 1, got 1.5"),
    "batch does not divide": (
        set_key("training", global_batch_size=6, per_device_train_batch_size=4),
        "not a multiple",
    ),
    "early stopping without held-out rows": (set_key("training", early_stopping_patience=2), "needs held-out rows"),
    "bad override": (lambda p: p.train("--set", "rank"), "expected section.key=value"),
    "unknown reporter": (set_key("training", report_to=["wandbb"]), "no reporter 'wandbb'"),
    "paged optimizer on a CPU": (set_key("training", optim="paged_adamw"), "no GPU here"),
    "model path does not exist": (set_key("model", path="./no-such-model"), "is not a directory"),
    "model without config": (drop("model/config.json"), "config.json"),
    "model without weights": (drop("model/model.safetensors"), "no *.safetensors"),
    "model with pickles only": (only_pickles, "which are pickles and are not read"),
    "weights cut short": (cut_weights, "cut short"),
    "model of no known kind": (edit_json("model/config.json", model_type="lama"), "lama"),
    "tokenizer missing": (drop("model/tokenizer.json", "model/tokenizer_config.json"), "tokenizer"),
    "tokenizer without eos": (no_eos, "no end-of-sequence token"),
    "added token that is there": (set_key("model", added_tokens=["<|im_end|>"]), "is a token of this model already"),
    "pad token that is not there": (set_key("model", pad_token="<pad>"), "'<pad>' is no token of this model"),
    "unknown target": (
        set_key("adapter", targets=["q_proj", "query"]),
        "no linear of this model's layers is named query",
    ),
    "init_from is no adapter": (set_key("adapter", init_from="./nowhere"), "no such adapter directory"),
    "a plan of an init_from that is no adapter": (
        lambda place: ["plan", *place.train()[1:], "--set", "adapter.init_from=./nowhere"],
        "no such adapter directory",
    ),
    "a rank above a linear's singular values": (
        lambda place: [
            "plan",
            *place.train()[1:],
            "--set",
            "adapter.method=lora-xs",
            "--set",
            "adapter.rank=512",
            "--set",
            "training.learning_rate=4e-3",
        ],
        "singular values, and the rank is 512",
    ),
    "no such data file": (set_key("data", path="./rowz.jsonl"), "rowz.jsonl"),
    "unknown data extension": (lambda p: p.with_rows(GOOD_ROW, name="rows.xlsx"), ".xlsx"),
    "data file is empty": (lambda p: p.with_rows(), "rows.jsonl"),
    "malformed line": (lambda p: p.with_rows(GOOD_ROW, '{"prompt": "x", '), "rows.jsonl:2"),
    "line is no object": (lambda p: p.with_rows(GOOD_ROW, "[1, 2]"), "rows.jsonl:2"),
    "column missing in a row": (lambda p: p.with_rows(GOOD_ROW, '{"prompt": "x"}'), "rows.jsonl:2"),
    "unknown columns": (lambda p: p.with_rows('{"frage": "x", "antwort": "y"}'), "frage"),
    "half a character": (
        lambda p: p.with_rows(GOOD_ROW, '{"prompt": "x \\ud83d y", "completion": "z"}'),
        r"rows.jsonl:2: prompt holds half a character, '\ud83d', behind 'x '",
    ),
    "half a character in a tool call": (
        lambda p: p.with_rows(
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "",'
            ' "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\\ude42"}}}]}]}'
        ),
        "rows.jsonl:1: messages[1] holds half a character",
    ),
    "empty answer": (lambda p: p.with_rows(GOOD_ROW, '{"prompt": "x", "completion": ""}'), "rows.jsonl:2"),
    "unknown role": (
        lambda p: p.with_rows(
            '{"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}'
        ),
        "wizard",
    ),
    "not UTF-8": (latin1_rows, "UTF-8"),
    "unknown template": (set_key("data", template="chatmll"), "chatml"),
    "every row too long": (set_key("data", max_length=8), "max_length"),
    "every row dropped": (set_key("data", max_length=8, too_long="drop"), "data.too_long is drop"),
    "output is a file": (out_is_a_file, "is a file"),
    "output not writable": (out_not_writable, "/proc"),
    "output holds a run": (out_holds_a_run, "already holds a run"),
    "resume without a run": (resume_nothing, "holds no run to resume"),
    "resume with another recipe": (resume_another_recipe, "started with another recipe"),
    "no such run": (lambda p: ["info", str(p.root / "nothing")], "no such directory"),
    "neither run nor adapter": (lambda p: ["info", str(p.root / "model")], "is neither a run"),
    "run without adapter": (run_without_adapter, "has no adapter/ yet"),
    "adapter cut short": (adapter_cut_short, "cut short"),
    "adapter of another kind": (adapter_edited("peft_type", "LORA", "chat"), "PEFT can't put this adapter on its base"),
    "adapter of a newer format": (adapter_edited("format_version", 99, "chat"), "format version 99"),
    "adapter with other projections": (adapter_edited("projection_sha256", "0" * 64, "eval"), "SHA-256"),
    "export of other projections": (
        lambda p: [*adapter_edited("projection_seed", 5, "export")(p), str(p.root / "x")],
        "SHA-256",
    ),
    "adapter for another model": (adapter_for_another_model, "another base model"),
    "export over something": (export_over_something, "not empty"),
    "export with a missing shard": (export_missing_shard, "missing"),
    "8 bits without GGUF": (
        lambda p: ["export", str(p.run), str(p.root / "x"), "--dtype", "q8_0"],
        "--dtype q8_0: goes with --to gguf",
    ),
    "4 bits of a LoRA": (
        lambda p: ["export", str(p.run), str(p.root / "x"), "--to", "lora", "--quantize", "nf4"],
        "--quantize: goes with --to merged only",
    ),
    "base of a LoRA": (
        lambda p: ["export", str(p.run), str(p.root / "x"), "--to", "lora", "--base", "original"],
        "--base: goes with --to merged and --to gguf only",
    ),
    "dtype of PEFT's VeRA": (
        lambda p: ["export", str(p.run), str(p.root / "x"), "--to", "peft", "--dtype", "float16"],
        "--dtype: --to peft writes float32",
    ),
    "comparison that changes the export": (
        lambda p: ["export", str(p.run), str(p.root / "x"), "--compare-only", "--base", "original"],
        "--compare-only: measures the export as it is; drop --base",
    ),
    "card of a base": (lambda p: ["card", str(p.root / "model")], "a checkpoint that no adapter was merged into"),
    "push without an owner": (lambda p: ["push", str(p.run), "orders"], "Expected USER/NAME"),
    "answers file exists": (answers_exist, "exists; nothing is overwritten"),
    "quantize what is not there": (lambda p: ["quantize", "./nowhere", str(p.root / "q")], "is not a directory"),
    "quantize over something": (lambda p: ["quantize", str(p.root / "model"), str(p.root / "model")], "not empty"),
    "quantize with a missing shard": (quantize_missing_shard, "missing"),
    "no such quantized base": (lambda p: ["cache", "rm", "nf4-none"], "no quantized base of that name"),
    "unknown metric": (
        lambda p: ["eval", str(p.run), "--metrics", "exact,bleurt"],
        "no metric 'bleurt'; known: exact, bleu",
    ),
    "output directory with files of a run": (out_holds_files_of_a_run, "and 4 more) and no recipe.yaml"),
    "base of a run is not there": (base_moved, "from 'models/base', which is no directory here ("),
    "serve of an adapter of other projections": (
        adapter_edited("projection_sha256", "0" * 64, "serve"),
        "made by another generator",
    ),
    "eval of no run": (lambda p: ["eval", str(p.root)], "nor an exported checkpoint (no config.json)"),
    "eval of a model without rows": (lambda p: ["eval", str(p.root / "model")], "Name a file with --data FILE"),
    "eval beside a base that is not known": (
        lambda p: ["eval", str(p.root / "model"), "--data", str(p.root / "rows.jsonl"), "--with-base"],
        "there is none to compare with",
    ),
    "eval by a recipe that is not there": (
        lambda p: ["eval", str(p.root / "model"), "--recipe", str(p.root)],
        "expected a recipe file, or a run directory",
    ),
    "base beside itself": (lambda p: ["eval", str(p.run), "--base", "--with-base"], "drop one of them"),
    "predictions without answers": (
        lambda p: ["eval", str(p.run), "--no-generation", "--predictions", str(p.root / "x")],
        "--no-generation asks for none",
    ),
    "one file for two things": (
        lambda p: ["eval", str(p.run), "--json", str(p.root / "x"), "--html", str(p.root / "x")],
        "need a file each",
    ),
    "eval of no rows": (lambda p: ["eval", str(p.run), "--rows", "0"], "Invalid value for '--rows'"),
    "certificate is broken": (broken_certificate, "expected the certificate of a merged export"),
    "adapter without a base": (adapter_without_base, "names no base model"),
    "compare one run": (lambda p: ["compare", str(p.run)], "takes two runs or more, got 1"),
    "compare a run with a model": (lambda p: ["compare", str(p.run), str(p.root / "model")], "not a run directory"),
    "compare over a page": (
        lambda p: ["compare", str(p.run), str(p.run), "--html", str(p.root / "rows.jsonl")],
        "exists; nothing is overwritten",
    ),
    "a ramp that falls": (
        lambda p: p.train("--find-lr", "--lr-from", "0.1", "--lr-to", "0.01"),
        "expected two rates, 0 < from < to",
    ),
    "a ramp of few steps": (lambda p: p.train("--find-lr", "--lr-steps", "3"), "takes a whole number >= 10"),
    "a ramp for a run": (lambda p: p.train("--lr-steps", "30"), "go with --find-lr only"),
    "a range test resumed": (lambda p: p.train("--find-lr", "--resume"), "--resume: goes with a run"),
    "a range test into a file": (find_lr_into_a_file, "is a file"),
    "no prompts": (empty_prompts, "holds no rows"),
}


@pytest.fixture(scope="module")
def finished_run(tiny_model_dir: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qvera.config.schema import parse_recipe

    run = tmp_path_factory.mktemp("runs") / "run"
    recipe = {
        "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
        "adapter": {"rank": 4},
        "data": {"path": str(tiny_rows), "max_length": 64, "eval_fraction": 0.2},
        "training": {"max_steps": 1, "output_dir": str(run), "report_to": [], "sample_count": 0},
    }
    train(parse_recipe(recipe, "recipe"), run)
    return run


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(
    name: str,
    tiny_model_dir: Path,
    tiny_rows: Path,
    finished_run: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    spoil, expected = TABLE[name]
    arguments = spoil(Scratch(tmp_path, tiny_model_dir, tiny_rows, finished_run))
    before, run_before = snapshot(tmp_path), snapshot(finished_run)
    code = main(arguments)
    message = capsys.readouterr().err
    said = message[message.rindex(f"qvera {arguments[0]}: ") :]
    assert expected in said
    assert code == 2, said
    assert "Traceback" not in said
    assert "\n\n" not in said.strip(), "one paragraph"
    assert snapshot(tmp_path) == before
    assert snapshot(finished_run) == run_before


def test_all_problems_of_a_recipe_are_named_at_once(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {path: x, quantisation: nf4}\ndata: {path: y, max_length: 2}\nadapter: {rank: 0}\n"
    )
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    said = capsys.readouterr().err
    assert "3 problems" in said
    for part in ("model.quantisation", "data.max_length", "adapter.rank"):
        assert part in said
