"""The ways to be wrong: each gives one clear message and exit code 2, and nothing on disk changes.

What one room alone refuses (a recipe, a model, an export) is tested there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from qvera.cli.main import main

pytestmark = pytest.mark.process

Edit = Callable[[], object]
"""Spoils one thing of a good scratch directory, which is the working directory: model/, rows.jsonl, recipe.yaml, run/."""
GOOD_ROW = '{"prompt": "say red 1", "completion": "red red"}'
TRAIN, ANSWER = "train recipe.yaml", "generate run rows.jsonl --out answers.jsonl"
HOST = socket.gethostname()
ADAPTER = "run/adapter/adapter_config.json"


def write(file: str, content: str | bytes = "precious") -> Edit:
    data = content.encode() if isinstance(content, str) else content

    def edit() -> None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(data)

    return edit


def rows(*lines: str) -> Edit:
    return write("rows.jsonl", "".join(f"{line}\n" for line in lines))


def change(file: str, **values: Any) -> Edit:
    """Set keys of a JSON file."""
    return lambda: Path(file).write_text(json.dumps({**json.loads(Path(file).read_text()), **values}))


def recipe(section: str, file: str = "recipe.yaml", **values: Any) -> Edit:
    def edit() -> None:
        tree = yaml.safe_load(Path(file).read_text())
        tree.setdefault(section, {}).update(values)
        Path(file).write_text(yaml.safe_dump(tree))

    return edit


def drop(*files: str) -> Edit:
    return lambda: [shutil.rmtree(file) if Path(file).is_dir() else Path(file).unlink() for file in files]


def cut(file: str, count: int) -> Edit:
    return lambda: Path(file).write_bytes(Path(file).read_bytes()[:-count])


def lora_without_base() -> None:
    write("lora/adapter_config.json", '{"peft_type": "LORA"}')()
    save_file({"nothing": torch.zeros(1)}, "lora/adapter_model.safetensors")


def holds_a_run() -> None:
    shutil.copytree("run", "out")


INDEX = '{"metadata": {}, "weight_map": {"model.norm.weight": "no-2.safetensors"}}'
SHARDS = write("model/model.safetensors.index.json", INDEX)
MOVED = (recipe("model", "run/recipe.yaml", path="models/base"), change(ADAPTER, base_model_name_or_path="/no/base"))
BATCH = {"global_batch_size": 6, "per_device_train_batch_size": 4}
CALL = (
    r'{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ude42"}}}]}'
)
IN_A_CALL = f'{{"messages": [{{"role": "user", "content": "x"}}, {CALL}]}}'
OWN_BASE = recipe("model", "run/recipe.yaml", path="model")
BROKEN = write("model/qvera_export.json", '{"adapter": {}}')
OTHER_HASH = {"projection_sha256": "0" * 64}
GGUF = (
    '{"kind": "gguf", "base": {"path": "b", "weights": "original"}, "adapter": {"path": "runs/my", "sha256": "0"}, '
    '"files": {}, "delta": {}}'
)

# name: (the command, what the message must say, how it is spoilt)
TABLE: dict[str, tuple[Any, ...]] = {
    "unknown key": (TRAIN, "Did you mean `learning_rate`?", recipe("training", learning_rte=1.0)),
    "batch does not divide": (TRAIN, "not a multiple", recipe("training", **BATCH)),
    "unknown reporter": (TRAIN, "no reporter 'wandbb'", recipe("training", report_to=["wandbb"])),
    "paged optimizer on a CPU": (TRAIN, "no GPU here", recipe("training", optim="paged_adamw")),
    "model without config": (TRAIN, "config.json", drop("model/config.json")),
    "model of no known kind": (TRAIN, "lama", change("model/config.json", model_type="lama")),
    "tokenizer missing": (TRAIN, "tokenizer", drop("model/tokenizer.json", "model/tokenizer_config.json")),
    "known added token": (TRAIN, "is a token of this model already", recipe("model", added_tokens=["<|im_end|>"])),
    "pad token that is not there": (TRAIN, "'<pad>' is no token of this model", recipe("model", pad_token="<pad>")),
    "a plan of no adapter": ("plan recipe.yaml --set adapter.init_from=./nowhere", "no such directory"),
    "base of a name near a directory": (TRAIN, "here; did you mean 'model'? Nor can", recipe("model", path="modell")),
    "the beginning of a base's name": (
        TRAIN,
        "not a directory; did you mean 'model'? Expected",
        recipe("model", path="./mo"),
    ),
    "two keys of one --set": (f"{TRAIN} --set adapter.rank=4 adapter.dropout=0", "Each key takes its own --set"),
    "rows for a recipe": ("train rows.jsonl", "is a file of rows, not a recipe. `qvera init"),
    "no such data file": (TRAIN, "rowz.jsonl", recipe("data", path="./rowz.jsonl")),
    "malformed line": (TRAIN, "rows.jsonl:2", rows(GOOD_ROW, '{"prompt": "x", ')),
    "half a character in a call": (TRAIN, "rows.jsonl:1: messages[1] holds half a character", rows(IN_A_CALL)),
    # /proc takes no directories, not even root's
    "output not writable": (TRAIN, "/proc", recipe("training", output_dir="/proc/qvera-run")),
    "output in the base's directory": (f"{TRAIN} --set training.output_dir=model", "holds config.json and no recipe.y"),
    "output among runs": (
        f"{TRAIN} --set training.output_dir=all",
        "all: holds the runs a, and this run's files would lie among them. Choose one of its own, such as all/NAME.",
        lambda: shutil.copytree("run", "all/a"),
    ),
    "a run that has just begun": (
        "eval out",
        "out: a training has just begun here",
        write("out/.qvera_run.owner", "{}"),
    ),
    "a base for a recipe": ("plan model", "expected a file of YAML. `qvera init my.yaml --model model` writes one."),
    "an adapter of one": ("generate run --prompt x --adapter run/adapter", "and run is neither. Leave it out."),
    "a system prompt's file": (f"{TRAIN} --set data.system=rows.jsonl", "data.system: 'rows.jsonl' is a file here."),
    "a variable": (
        f"{TRAIN} --set model.path=$BASE/model",
        "variables such as $HOME are not filled in; write ~ for it",
    ),
    "an address of a base": (
        f"{TRAIN} --set model.path=https://hf.co/a/b",
        "of a model on the hub write owner/name a",
    ),
    "output holds files of a run": (TRAIN, " more) and no recipe.yaml", holds_a_run, drop("out/recipe.yaml")),
    "a recipe that the run would write over": (f"{TRAIN} --set training.output_dir=.", "recipe.yaml: is no run's"),
    "the same with --resume": (f"{TRAIN} --resume --set training.output_dir=.", "recipe.yaml: is no run's"),
    "output through a link to nothing": (
        TRAIN,
        "out: is a link to nowhere, which is",
        lambda: os.symlink("nowhere", "out"),
    ),
    "several files of rows": (
        f"{TRAIN} --set data.path=[a.csv,b.csv]",
        "name their directory, or each in data.mixture",
    ),
    "a greater loss": (f"{TRAIN} --set training.greater_is_better=true", "of the loss less is better. Remove it."),
    "metrics as words": ("eval run --metrics exact bleu", "Metrics are one list: --metrics exact,bleu"),
    "a dash for a file": ("generate run --prompt x --out -", "-: is the name of no file here"),
    "a recipe without its ending": ("train recipe", "recipe: no such recipe file; did you mean 'recipe.yaml'?"),
    "resume without a run": (f"{TRAIN} --resume", "Leave --resume out to begin it."),
    "resume of a run of another name": (
        f"{TRAIN} --set training.output_dir=runs/new --resume",
        "Leave --resume out to begin it, or go on with a run that is there: runs/old.",
        write("runs/old/recipe.yaml"),
    ),
    "no such run": ("info nothing", "no such directory"),
    "the name of a run with a slip": ("chat runn", "runn: no such directory; did you mean 'run'? Expected a run"),
    "a run with a slip, beside others": (
        "info runs/tickest",
        "runs/tickest: no such directory; did you mean 'runs/tickets'?",
        write("runs/tickets/run.json"),
    ),
    "a run without its directory": (
        "generate tickets --prompt x",
        "tickets: no such directory; did you mean 'runs/tickets'?",
        write("runs/tickets/recipe.yaml"),
    ),
    "a served run without its directory": (
        "serve tickets",
        "tickets: no such directory; did you mean 'runs/tickets'?",
        write("runs/tickets/recipe.yaml"),
    ),
    "a key without its option": (
        "train recipe.yaml training.max_steps=5",
        "A key of the recipe goes to --set: --set training.max_steps=5.",
    ),
    "a served run with a slip": (
        "serve runs/tickest",
        "runs/tickest: no such directory; did you mean 'runs/tickets'?",
        write("runs/tickets/recipe.yaml"),
    ),
    "rows in place of a recipe's name": ("init rows.jsonl", "in .yaml. Rows go to --data rows.jsonl."),
    "a run for a base": (
        "init new.yaml --model run --data rows.jsonl",
        "name its base, /bases/llama. To go on from its adapter: adapter.init_from: run/adapter.",
        change(ADAPTER, base_model_name_or_path="/bases/llama"),
    ),
    "an image on the web": (
        "generate run --prompt x --image http://pictures.org/a.png",
        "http://pictures.org/a.png is an address, from which no image is fetched. Expected the path of a file here.",
    ),
    "an image as an address": ("generate run --prompt x --image file:///a.png", "file:///a.png is an address"),
    "a prompt for a file": ('generate run "A shawl in DK yarn"', "A prompt itself goes to --prompt."),
    "unknown kind of model": (TRAIN, "a transformers that knows this", change("model/config.json", model_type="new")),
    "file for a run": ("info rows.jsonl", "rows.jsonl: is a file, not a directory"),
    "a base for a run": ("info model", "model: is a checkpoint that no adapter was merged into. Expected a run,"),
    "a GGUF to generate with": (
        "generate out --prompt x",
        "is an export to gguf, which llama.cpp and Ollama open. For qvera name what it was exported from, runs/my",
        write("out/qvera_export.json", GGUF),
    ),
    "a merged export without its config": (
        "generate out --prompt x",
        "nor an exported checkpoint (no config.json)",
        write("out/qvera_export.json", GGUF.replace('"gguf"', '"merged"')),
    ),
    "a run that still trains": (
        "eval run",
        "Process 7 on box trains it: wait for it. If that is gone, finish it with",
        drop("run/adapter"),
        write("run/.qvera_run.owner", '{"pid": 7, "host": "box"}'),
        write("run/run.json", '{"status": "running", "processes": {"pid": 7, "host": "box"}}'),
    ),
    "a run that was killed": (
        "eval run",
        "this run has no adapter/ yet. Finish it with `qvera train run/recipe.yaml --resume`",
        drop("run/adapter"),
        write("run/.qvera_run.owner", '{"pid": 7, "host": "box"}'),
        write("run/run.json", json.dumps({"status": "running", "processes": {"pid": 2**30, "host": HOST}})),
    ),
    "run without adapter": ("chat run", "has no adapter/ yet", drop("run/adapter")),
    "base is not there": (ANSWER, "model.path: 'models/base' is no directory here. Nor", *MOVED),
    "a run without its vectors": (
        "eval run",
        "`qvera train run/recipe.yaml --resume` writes it again from the run's last checkpoint.",
        drop("run/adapter/adapter_model.safetensors"),
    ),
    "adapter cut short": ("eval run", "cut short", cut("run/adapter/adapter_model.safetensors", 9)),
    "another kind": ("chat run", "PEFT can't put this adapter on its base", change(ADAPTER, peft_type="LORA")),
    "adapter of a newer format": ("chat run", "format version 99", change(ADAPTER, format_version=99)),
    "adapter of other projections": ("eval run", "SHA-256", change(ADAPTER, **OTHER_HASH)),
    "export of other projections": ("export run x", "SHA-256", change(ADAPTER, projection_seed=5)),
    "serve of other projections": ("serve run --port 0", "made by another generator", change(ADAPTER, **OTHER_HASH)),
    "export over something": ("export run merged", "not empty", write("merged/thesis.tex")),
    "export with a missing shard": ("export run merged", "missing", SHARDS, OWN_BASE),
    "base of a LoRA": ("export run x --to lora --base original", "--base: goes with --to merged and --to gguf only"),
    "dtype of PEFT's VeRA": ("export run x --to peft --dtype float16", "--dtype: --to peft writes float32"),
    "changing comparison": ("export run x --compare-only --base original", "measures the export as it is; drop --base"),
    "card of a base": ("card model", "a checkpoint that no adapter was merged into"),
    "answers file exists": (ANSWER, "exists; nothing is overwritten", write("answers.jsonl")),
    "quantize a missing shard": ("quantize model q", "missing", SHARDS),
    "no such quantized base": ("cache rm nf4-none", "nothing of that name is in the cache"),
    "unknown metric": ("eval run --metrics exact,bleurt", "no metric 'bleurt'; known: exact, bleu"),
    "eval of no run": ("eval empty", "nor an exported checkpoint (no config.json)", write("empty/notes.txt")),
    "eval of a directory of runs": (
        "eval .",
        "is a directory of runs. Name one of them: run",
        drop("recipe.yaml"),
    ),
    "a checkpoint in place of its run": (
        "generate run/checkpoints/step-00000002 --prompt hello",
        "is a checkpoint from which `qvera train --resume` goes on. Name the run run.",
        write("run/checkpoints/step-00000002/manifest.json"),
    ),
    "a checkpoint of a run that has not ended": (
        "generate run/checkpoints/step-00000002 --prompt hello",
        "The run has no adapter yet: `qvera train run/recipe.yaml --resume` finishes it.",
        write("run/checkpoints/step-00000002/manifest.json"),
        drop("run/adapter"),
    ),
    "a start from a run that has not ended": (
        f"{TRAIN} --set adapter.init_from=run/adapter",
        "The run has not ended: `qvera train run/recipe.yaml --resume` finishes it.",
        drop("run/adapter"),
    ),
    "a run that is misspelt": ("generate ren/adapter --prompt hello", "did you mean 'run/adapter'? Nor has the hub"),
    "a directory of runs for adapters": (
        "serve model --adapters .",
        "Copy them there, `mkdir adapters; cp -r run/adapter adapters/run`, and",
        drop("recipe.yaml"),
    ),
    "a recipe in place of its run": ("serve recipe.yaml", "recipe.yaml: is a recipe. Name the directory of"),
    "eval of a model without rows": ("eval model", "Name a file with --data FILE"),
    "eval beside an unknown base": ("eval model --data rows.jsonl --with-base", "there is none to compare with"),
    "eval by no recipe": ("eval model --recipe model", "expected a recipe file, or a run directory"),
    "a recipe of another task": (
        "eval run --recipe labels.yaml",
        "run: is a model that writes text, and the recipe's task is sequence-classification",
        write("labels.yaml", "{task: sequence-classification, model: model, data: rows.jsonl}"),
    ),
    "base beside itself": ("eval run --base --with-base", "drop one of them"),
    "one file for two things": ("eval run --json x --html x", "need a file each"),
    "eval of no rows": ("eval run --rows 0", "Invalid value for '--rows'"),
    "certificate is broken": ("eval model --data rows.jsonl", "expected the certificate of a merged export", BROKEN),
    "adapter without a base": (
        "eval lora --data rows.jsonl",
        "names no base model. Write its directory or",
        lora_without_base,
    ),
    "adapter whose base has moved": (
        "chat lone",
        "lone/adapter_config.json: base_model_name_or_path: the base /no/base is not there. If it has moved, write",
        lambda: shutil.copytree("run/adapter", "lone"),
        change("lone/adapter_config.json", base_model_name_or_path="/no/base"),
    ),
    "compare a run with a model": ("compare run model", "not a run directory"),
    "compare a directory of runs": (
        "compare runs run",
        "runs: is a directory of runs. Name those that are meant: runs/tickets.",
        write("runs/tickets/recipe.yaml"),
    ),
    "adapters without a place for their sum": (
        "merge-adapters run run",
        "run is taken for OUT, the directory to write",
    ),
    "a ramp that falls": (f"{TRAIN} --find-lr --lr-from 0.1 --lr-to 0.01", "expected two rates, 0 < from < to"),
    "a ramp of few steps": (f"{TRAIN} --find-lr --lr-steps 3", "takes a whole number >= 10"),
    "a range test by rewards": (
        f"{TRAIN} --find-lr --set training.objective=grpo --set training.reward=a.py:f",
        "--find-lr: goes by the loss, which with training.objective: grpo is near 0",
    ),
    "a range test into a file": (f"{TRAIN} --find-lr", "is a file", write("out")),
    "a base that offline can't be fetched": (f"{TRAIN} --set model.path=anna/base", "HF_HUB_OFFLINE is set"),
    "rows that offline can't be fetched": (f"{TRAIN} --set data.path=anna/rows", "HF_HUB_OFFLINE is set"),
    "an adapter that offline can't be fetched": ("generate anna/adapter hello", "HF_HUB_OFFLINE is set"),
    "a base that is no directory here": (f"{TRAIN} --set model.path=run/none", "'run/none' is not a directory"),
    "a served base that is no directory here": ("serve ./run/none --port 0", "is not a directory"),
    "a run in place of its recipe": (
        "train run",
        "whose recipe is run/recipe.yaml. `qvera train run/recipe.yaml --res",
    ),
    "a base without its owner": (
        "plan recipe.yaml --set model.path=smollm --no-timing",
        "An id on the hub is OWNER/NAME. HF_HUB_OFFLINE is set",
    ),
    "rows of another directory": (  # in which a run is called like them
        f"{TRAIN} --set data.path=run.csv",
        "A relative path begins where the command runs, here /",
    ),
    "a text of prompts in another directory": (
        "generate run asked.txt",
        "Expected a .txt (one prompt a line), .jsonl, .json, .csv, .tsv or .parquet file",
    ),
    "an option without its value": (f"{TRAIN} --set", "requires an argument. `qvera train --help`"),
    "a key as an option of plan": ("plan recipe.yaml --adapter.rank=64", "A key of the recipe goes to --set"),
    "an adapter as a base": (
        "plan recipe.yaml --set model.path=run/adapter --no-timing",
        "It is an adapter: name its base, /",
    ),
    "a run as a base": ("plan recipe.yaml --set model.path=run --no-timing", "It is a run: name its base, /"),
    "a run without its recipe": ("eval run", "it has no recipe.yaml", lambda: Path("run/recipe.yaml").unlink()),
    "an empty prompt": ("generate run --prompt=", "--prompt: is empty, so there is nothing to answer"),
    "a file's name for a prompt": (
        "generate run --prompt rows.jsonl",
        "'rows.jsonl' names a file here. `qvera generate",
    ),
    "a file's name as curl has it": ("generate run --prompt=@rows.jsonl", "`qvera generate RUN rows.jsonl` answers"),
    "lines of JSON in a table": ("generate run rows.jsonl --out answers.csv", "expected a name that ends in .jsonl"),
    "a page in a PDF": ("eval run --html page.pdf", "page.pdf: HTML is written into it"),
    "an option twice": ("eval run --metrics exact --metrics bleu", "'--metrics': is given twice, and takes one value"),
    "a server without http": ("generate localhost:8000 --prompt x", "a server, for chat and generate, as http://HOST"),
    "a server to export": ("export http://127.0.0.1:8000 out", "is no directory here. A run is named by"),
    "an address of the hub": ("generate https://huggingface.co/anna/x --prompt x", "as USER/NAME on the hub"),
    "facts of a directory of runs": ("info .", "a directory of runs. Name one of them", drop("recipe.yaml")),
    "a card of a directory of runs": ("card .", "a directory of runs. Name one of them", drop("recipe.yaml")),
    "one adapter for many": ("serve model --adapters run --port 0", "--adapters run: has a single adapter"),
    "room for too many adapters": ("serve run --port 0 --slots 1000000000000", "do not fit into memory. Lower --slots"),
    "no prompts": ("generate run prompts.txt --out answers.jsonl", "holds no rows", write("prompts.txt", "\n \n")),
}


@pytest.fixture(scope="module")
def scratch(tiny_model_dir: Path, tiny_rows: Path, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model, good rows, a good recipe and a finished run."""
    root = tmp_path_factory.mktemp("scratch")
    shutil.copytree(tiny_model_dir, root / "model")
    shutil.copytree(trained_run, root / "run")
    shutil.copy(tiny_rows, root / "rows.jsonl")
    training = {"max_steps": 1, "output_dir": "out", "report_to": [], "sample_count": 0}
    tree = {"model": {"path": "model"}, "data": {"path": "rows.jsonl", "max_length": 64}, "training": training}
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return root


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, scratch: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(scratch, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what was read at the import
    line, expected, *edits = TABLE[name]
    for edit in edits:
        edit()
    before = snapshot(tmp_path)
    code = main(shlex.split(line))
    message = capsys.readouterr().err
    said = message[message.rindex(f"qvera {line.split()[0]}: ") :]
    assert expected in said
    assert code == 2, said
    assert "Traceback" not in said
    assert "\n\n" not in said.strip(), "one paragraph"
    assert snapshot(tmp_path) == before
