"""The research methods are a plug-in: the core names none of them, and finds them as it finds a stranger's."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

from qvera.adapters import methods
from qvera.adapters.methods import Method
from qvera.config import plugins
from qvera.config.sections import AdapterSection, DataSection, TrainingSection
from tests.adapters.methods.cases import CASES

ROOT = Path(__file__).parents[2]
WORDS = re.compile(
    r"qvera\.lab|lora[-_ ]?xs|lora[-_ ]?sb|shared[-_]core|lorta|uni[-_ ]?lora|theta_length|\bsara\b|mo-sara|spiel|bilora|bilevel|resample_|resampling"
    r"|sample_tokens|token_sampl|adapt_(steps|rows|learning)|held_out_tasks|task_(column|labels|count|steps)|reselect"
    r"|gradient_rows|seed_chain|singular_share|frozen_pair|orthogonal_penalty|factor_record|intruder|current_phase"
    r"|accumulate_steps|drop_share|analyze",
    re.IGNORECASE,
)
OF_OLD_RUNS = {("run.html", "adapt_steps")}
"""The report of a run shows what its run.json has, with or without the plug-in that wrote it."""


def test_the_core_has_no_word_of_the_lab() -> None:
    files = [f for kind in ("py", "html", "js", "css") for f in (ROOT / "qvera").rglob(f"*.{kind}")]
    core = [file for file in files if "lab" not in file.relative_to(ROOT / "qvera").parts[:1]]
    assert len(core) > 150
    lines = [(file.name, line) for file in core for line in file.read_text(encoding="utf-8").splitlines()]
    found = {(name, match[0].lower()) for name, line in lines for match in WORDS.finditer(line)}
    assert found == OF_OLD_RUNS
    of_lab = [file.read_text(encoding="utf-8") for file in (ROOT / "qvera" / "lab").glob("*.py")]
    assert sum(bool(WORDS.search(text)) for text in of_lab) > 12


def test_a_method_has_at_most_20_members() -> None:
    members = {name for name in {**vars(Method), **inspect.get_annotations(Method)} if not name.startswith("_")}
    assert len(members) <= 20


def test_every_method_has_a_case_and_every_schedule_a_name_of_its_own() -> None:
    assert {case.adapter.get("method", "vera") for case in CASES.values()} == set(methods.names())
    names = [schedule.name for schedule in plugins.load_all("qvera.schedules")]
    assert len(set(names)) == len(names) > 4


def test_what_is_installed_is_what_pyproject_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for group, entries in project["entry-points"].items():
        assert set(entries) <= set(plugins.names(group)), f"install again: {group} is not what pyproject.toml says"


def test_sections_know_which_keys_plug_ins_add() -> None:
    assert plugins.added_keys(AdapterSection())["growth"] == "accumulated-gradient"
    assert plugins.added_keys(DataSection(path="x"))["sampling"] == "rows"
    added = plugins.added_keys(TrainingSection())
    assert added["bilevel"] is False
    assert "adam_beta2" not in added, "which a plug-in's field replaces"
