"""What a directory is: every command says the same of it. The directories are made up, and hold no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qvera.cli.common import check_target
from qvera.evaluation.load import find_target
from qvera.evaluation.named_adapters import kind_of
from qvera.evaluation.run_info import directory_facts
from qvera.exporting.card import find_subject
from qvera.utils.errors import InputError

_NEITHER = "is neither a run (it has no recipe.yaml) nor an adapter directory (no adapter_config.json) nor an exported"
_BASE = "is a checkpoint that no adapter was merged into. Expected a run, an adapter directory or an export."
_GGUF = ", which llama.cpp and Ollama open. For qvera name what it was exported from,"

_KINDS: dict[str, tuple[str, ...]] = {
    # what it is; what find_target calls it; its kind in `qvera info`; its kind for the card
    "run": ("run", "a run", "run", "adapter"),
    "run/adapter": ("adapter", "an adapter (QVERA)", "adapter", "adapter"),
    "many": ("many", "has 1 adapters; name one with --adapter NAME.", "run of many adapters", "has 1 adapters"),
    "many/adapters": ("many", "has 1 adapters; name one with", "directory of adapters", "has 1 adapters"),
    "many/adapters/anna": ("adapter", "adapter 'anna'", "adapter", "adapter"),
    "adapter": ("adapter", "an adapter (QVERA)", "adapter", "adapter"),
    "classifier": ("adapter", "an adapter (QVERA)", "adapter", "adapter"),
    "lora": ("lora", "an adapter (LORA)", "adapter", "lora"),
    "peft": ("adapter", "an adapter (VERA)", "adapter", "adapter"),
    "merged": ("merged", "a merged export", "merged export", "merged"),
    "quantized": ("merged", "a merged export", "merged export", "merged"),
    "of an older qvera": ("merged", "a merged export", "merged export", "merged"),
    "gguf": ("gguf", f"is an export to gguf{_GGUF}", "merged export (GGUF)", "gguf"),
    "gguf-lora": ("gguf-lora", f"is an export to gguf-lora{_GGUF}", "LoRA (GGUF)", "gguf-lora"),
    "base": ("checkpoint", "a checkpoint", _BASE, _BASE),
    "unfinished": ("run", *["this run has no adapter/ yet. Finish it with `qvera train"] * 3),
}
_REFUSED = {
    "begun": "a training has just begun here, and has written no file yet.",
    "run/checkpoints/step-3": "is a checkpoint from which `qvera train --resume` goes on. Name the run run.",
    "run/checkpoints": _NEITHER,
    "runs": "is a directory of runs. Name one of them: runs/one.",
    "merged without its config": _NEITHER,
    "lora without its config": _NEITHER,
    "empty": _NEITHER,
    "rows.jsonl": "is a file, not a directory. Expected a run, an adapter directory or an exported checkpoint.",
    "my.yaml": "is a recipe. Name the directory of its run (runs/my, or its training.output_dir). Expected a run,",
    "run/recipe.yaml": "is a recipe. Name the directory of its run (run). Expected a run,",
    "nowhere": "no such directory. Expected a run, an adapter directory or an exported checkpoint.",
    "a later export": "qvera_export.json: has kind 'onnx' in format 1, which this qvera does not know. A newer one may",
    "a later format": "qvera_export.json: has kind 'merged' in format 2, which this qvera does not know. A newer one may",
}


@pytest.fixture
def place(make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one of each kind."""
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe().to_yaml()

    def write(name: str, content: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    def adapter(name: str, **changes: Any) -> None:
        config = {"peft_type": "QVERA", "base_model_name_or_path": str(tmp_path / "base"), "rank": 4, **changes}
        write(f"{name}/adapter_config.json", json.dumps(config))
        save_file({"base_model.model.l.qvera_b": torch.zeros(4)}, tmp_path / name / "adapter_model.safetensors")

    def exported(name: str, **changes: Any) -> None:
        base, of = {"path": str(tmp_path / "base"), "weights": "original"}, {"path": "run/adapter", "sha256": "0"}
        certificate = {"format": 1, "base": base, "adapter": of, "files": {}, "delta": {}, "rank": 4, **changes}
        write(f"{name}/qvera_export.json", json.dumps(certificate))

    for run in ("run", "many", "unfinished", "runs/one"):
        write(f"{run}/recipe.yaml", recipe)
    for name in ("run/adapter", "many/adapters/anna", "adapter", "runs/one/adapter"):
        adapter(name)
    adapter("classifier", labels=["good", "bad"], task_type="SEQ_CLS", problem_type="single_label_classification")
    adapter("lora", peft_type="LORA", r=4, target_modules=["l"])
    adapter("peft", peft_type="VERA", r=4, target_modules=["l"])
    for name, kind in (("lora", "lora"), ("peft", "peft"), ("gguf", "gguf"), ("gguf-lora", "gguf-lora")):
        exported(name, kind=kind)
    for name in ("base", "merged", "quantized", "of an older qvera", "a later export", "a later format"):
        write(f"{name}/config.json", '{"architectures": ["LlamaForCausalLM"]}')
    exported("of an older qvera")
    for name in ("merged", "quantized", "merged without its config"):
        exported(name, kind="merged")
    exported("lora without its config", kind="lora")
    exported("a later export", kind="onnx")
    exported("a later format", kind="merged", format=2)
    write("begun/.qvera_run.owner", "{}")
    for name in ("run/checkpoints/step-3", "empty"):
        (tmp_path / name).mkdir(parents=True)
    write("rows.jsonl", "")
    write("my.yaml", recipe)
    write("run/run.json", "{}")
    return tmp_path


def test_each_command_takes_a_directory_for_the_same(place: Path) -> None:
    for name, (kind, *answers) in _KINDS.items():
        path = Path(name)
        assert kind_of(path) == kind, name
        check_target(path)
        asked: tuple[Callable[[Path], str], ...] = (
            lambda path: find_target(path).what,
            lambda path: str(directory_facts(path)["kind"]),
            lambda path: find_subject(path).kind,
        )
        for ask, expected in zip(asked, answers, strict=True):
            try:
                assert ask(path) == expected, name
            except InputError as error:
                assert str(error).startswith(f"{name}: {expected}"), name


def test_what_is_no_run_and_no_adapter_is_refused_by_each_command_in_the_same_words(place: Path) -> None:
    for name, expected in _REFUSED.items():
        for ask in (kind_of, check_target, find_target, directory_facts, find_subject):
            with pytest.raises(InputError) as caught:
                ask(Path(name))
            assert f"{name}{'/' if expected.startswith('qvera_') else ': '}{expected}" in str(caught.value), ask


def test_the_adapter_of_a_run_that_was_made_longer_and_killed_is_told_as_that(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for status, said in (("done", ""), ("running", "run: this run has not ended (interrupted), so its adapter may be")):
        (place / "run" / "run.json").write_text(json.dumps({"status": status}))
        check_target("run")
        assert capsys.readouterr().err[: len(said) or None] == said


def test_what_a_killed_run_came_to_is_told_from_its_metrics(place: Path) -> None:
    summary = {"status": "running", "planned_steps": 9, "result": {"eval_before": {"loss": 2.0}}}
    (place / "run" / "run.json").write_text(json.dumps(summary))
    rows = [{"kind": "train", "step": step, "step_seconds": 0.5, "input_tokens": 10} for step in (1, 2)]
    (place / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    came_to = {"planned_steps": 9, "steps": 2, "seconds": 1.0, "tokens_per_second": 20.0, "peak_bytes": None}
    assert directory_facts(place / "run")["result"] == came_to


def test_names_with_spaces_at_their_ends_are_in_quotes_where_adapters_are_listed(place: Path) -> None:
    adapters = place / "many" / "adapters"
    shutil.copytree(adapters / "anna", adapters / "my=20own")
    (adapters / "anna").rename(adapters / "=20anna")
    with pytest.raises(InputError, match=r"There are: ' anna', my own\."):
        directory_facts(place / "many", "anna")


def test_the_recipe_of_a_newer_qvera_is_told_as_that(place: Path) -> None:
    with (place / "run" / "recipe.yaml").open("a") as file:
        file.write("later: 1\n")
    (place / "run" / "run.json").write_text('{"versions": {"qvera": "9.0.0"}}')
    for ask in (find_target, directory_facts):
        with pytest.raises(InputError, match=r"later: unknown key(.|\n)*qvera 9.0.0 wrote this run, .* update qvera"):
            ask(place / "run")
