"""lm-evaluation-harness on a run and on its export, with a task of our own and no network; and what is said where it can't be."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from qvera.adapters.save_load import load_adapter
from qvera.cli.main import main
from qvera.evaluation import generate, lm_eval
from qvera.evaluation.load import find_target, open_target
from qvera.models.loader import load_base

pytestmark = pytest.mark.process

installed = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'qvera[harness]')"
)

COLOURS = ["red", "blue", "green"]
DOCUMENTS = [{"question": f"say {COLOURS[n % 3]} {n}", "answer": n % 3} for n in range(12)]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A multiple-choice task and a generating one over a local file."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    common |= {"doc_to_text": "{{question}}\nAnswer:"}
    choice: dict[str, Any] = {"task": "qvera_colours", "output_type": "multiple_choice", "doc_to_choice": COLOURS}
    choice |= {"doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    answer: dict[str, Any] = {
        "task": "qvera_answers",
        "output_type": "generate_until",
        "metric_list": [{"metric": "exact_match"}],
    }
    answer |= {"doc_to_target": "{{['red', 'blue', 'green'][answer]}}"}
    answer |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    directory = tmp_path / "tasks"
    directory.mkdir()
    for task in (choice, answer):
        (directory / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return directory


def ask(*arguments: Any) -> dict[str, Any]:
    """lm-eval's results by `qvera harness ARGUMENTS`."""
    out = Path(arguments[0]).parent / f"results{len(list(Path(arguments[0]).parent.glob('results*')))}.json"
    assert main(["harness", *map(str, arguments), "--json", str(out)]) == 0
    return dict(json.loads(out.read_text()))


def choice_of(samples: list[dict[str, Any]]) -> torch.Tensor:
    """The log likelihood of each choice of each document, in the documents' order."""
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return torch.tensor([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in ordered])


def by_hand(model: Any, tokenizer: Any) -> torch.Tensor:
    """The same from the model's logits."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    found = []
    for document in DOCUMENTS:
        context = encode(f"{document['question']}\nAnswer:")
        scores = []
        for colour in COLOURS:
            ids = encode(f"{document['question']}\nAnswer: {colour}")
            with torch.no_grad():
                logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
            scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        found.append(scores)
    return torch.tensor(found)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


@installed
def test_a_run_is_asked_as_it_was_trained(run: Path, tasks: Path, make_recipe: Any, capsys: Any) -> None:
    base = load_base(make_recipe().model)
    plain = by_hand(base.model, base.tokenizer)
    adapted = by_hand(load_adapter(base.model, run / "adapter"), base.tokenizer)
    assert not torch.allclose(plain, adapted, atol=0.05)
    for arguments, wanted in (([], adapted), (["--base"], plain)):
        found = ask(run, "--tasks", "qvera_colours", "--include", tasks, *arguments)
        assert close(choice_of(found["samples"]["qvera_colours"]), wanted)
        share = float((wanted.argmax(1) == torch.tensor([document["answer"] for document in DOCUMENTS])).float().mean())
        assert found["results"]["qvera_colours"]["acc,none"] == pytest.approx(share)
        said = capsys.readouterr().out
        for text in ("qvera_colours", f"{share:.4f}", "acc"):
            assert text in said
    few = ask(run / "adapter", "--tasks", "qvera_*", "--include", tasks, "--limit", "5")
    assert few["results"].keys() == {"qvera_colours", "qvera_answers"}
    assert len(few["samples"]["qvera_answers"]) == 5
    assert close(choice_of(few["samples"]["qvera_colours"]), adapted[:5])


@installed
def test_an_export_gives_the_same_by_us_and_by_lm_eval_alone(run: Path, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert main(["export", str(run), str(out), "--dtype", "float32", "--no-compare"]) == 0
    ours = ask(out, "--tasks", "qvera_colours,qvera_answers", "--include", tasks)
    command = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={out},dtype=float32", "--device", "cpu"]
    command += ["--tasks", "qvera_colours,qvera_answers", "--include_path", str(tasks), "--batch_size", "8"]
    command += ["--log_samples", "--output_path", str(tmp_path / "theirs")]
    program = [sys.executable, "-m", *command]
    done = subprocess.run(program, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for path in (tmp_path / "theirs").rglob("samples_*.jsonl"):
        name = next(name for name in ours["results"] if name in path.name)
        samples[name] = [json.loads(line) for line in path.read_text().splitlines()]
    assert close(choice_of(samples["qvera_colours"]), choice_of(ours["samples"]["qvera_colours"]))
    texts = [
        {sample["doc_id"]: sample["filtered_resps"] for sample in each}
        for each in (samples["qvera_answers"], ours["samples"]["qvera_answers"])
    ]
    assert texts[0] == texts[1]
    assert any(answer[0] for answer in texts[0].values())


def test_answers_end_at_the_end_of_a_turn_as_ours_do(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []

    def answer(model: Any, **_: object) -> None:
        ids = torch.tensor([[5, 6, 7]])
        answers.append(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, 3:].tolist())

    opened = open_target(find_target(run))
    answer(opened.model)
    opened.model.generation_config.repetition_penalty = 9.0  # not ours
    monkeypatch.setattr(generate, "turn_ends", lambda tokenizer: {answers[0][2]})
    harness: dict[str, Any] = {"simple_evaluate": answer, "HFLM": lambda pretrained, **_: pretrained}
    for module in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**harness))
    lm_eval.run_harness(opened, Mock(), ["a task"], batch_size=1)
    assert answers[1] == answers[0][:3]


@installed
def test_tasks_that_are_not_there(run: Path, tasks: Path, capsys: Any) -> None:
    for line, expected in (
        (f"--tasks qvera_colours,qvera_colors --include {tasks}", "no task 'qvera_colors', and none is defined in"),
        (f"--tasks qvera_colours --include {tasks / 'none'}", "no such directory"),
        ("--tasks ,", "names no task"),
        ("--tasks qvera_colours --limit 0", "Invalid value for '--limit'"),
    ):
        assert main(["harness", str(run), *line.split()]) == 2
        assert expected in capsys.readouterr().err
    broken = yaml.safe_load((tasks / "qvera_colours.yaml").read_text())
    broken["dataset_kwargs"]["data_files"]["test"] = str(tasks / "gone.jsonl")
    (tasks / "qvera_colours.yaml").write_text(yaml.safe_dump(broken))
    assert main(["harness", str(run), "--tasks", "qvera_colours", "--include", str(tasks)]) == 2
    assert "lm-eval could not run it" in capsys.readouterr().err


def test_without_lm_eval_it_says_what_to_install(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find_spec(name, *a)
    )
    assert main(["harness", str(trained_run), "--tasks", "arc_easy"]) == 2
    assert "pip install 'qvera[harness]'" in capsys.readouterr().err
    assert main(["harness", str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert "is neither a run" in capsys.readouterr().err  # which is said first: to install it takes long
