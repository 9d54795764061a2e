"""README's example of many adapters: its rows are those of the script, its commands run."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.customer_rows import STYLES, row, write_rows
from qvera.adapters.bank import MixedForward, User
from qvera.cli.main import main
from qvera.evaluation.named_adapters import require_named
from tests.helpers import ROOT, commands

pytestmark = pytest.mark.process

ROWS = ROOT / "recipes" / "customers" / "rows.csv"


def test_the_shipped_rows_are_those_of_the_script(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv")
    assert ROWS.read_bytes() == (tmp_path / "rows.csv").read_bytes()
    found = list(csv.DictReader(ROWS.open(encoding="utf-8")))
    assert len({one["customer"] for one in found}) == len(STYLES) == 20
    assert len({(one["customer"], one["prompt"]) for one in found}) == len(found)
    answers = {row(name, style, 3, "red", "mug", "Friday")["completion"] for name, style in STYLES.items()}
    assert len(answers) == 20, "one order is written in twenty ways"


def test_the_commands_train_twenty_adapters_and_three_answer_in_one_batch(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train, answer, _serve = (shlex.split(line)[1:] for line in commands("README.md") if "customers" in line)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    smaller = {"model.path": tiny_model_dir, "model.compute_dtype": "float32", "adapter.rank": 8}
    smaller |= {"data.max_length": 256, "training.max_steps": 2}
    assert main([*train, *(part for key, value in smaller.items() for part in ("--set", f"{key}={value}"))]) == 0
    run = Path("runs/customers")
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    entries = facts["adapters"]
    shipped = Counter(one["customer"] for one in csv.DictReader(ROWS.open(encoding="utf-8")))
    assert {one["name"]: one["rows"] + one["eval_rows"] for one in entries} == shipped
    assert {(one["status"], one["steps"]) for one in entries} == {("done", 2)}
    assert len(list((run / "report").iterdir())) == 20
    assert "20 adapters trained together" in (run / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()

    batches: list[set[User]] = []
    use = MixedForward.use
    monkeypatch.setattr(MixedForward, "use", lambda self, users: (batches.append(set(users)), use(self, users))[1])
    short = ["--max-new-tokens", "8"]
    assert main([*answer, *short]) == 0
    assert {len(users) for users in batches} == {3}
    together, alone = capsys.readouterr().out, ""
    for name in [word for option, word in zip(answer, answer[1:], strict=False) if option == "--adapter"]:
        assert main(["generate", str(require_named(run, name)), *answer[answer.index("--prompt") :], *short]) == 0
        alone += f"{name}: {capsys.readouterr().out}"
    assert together == alone
