"""tests/lowest.py, which `make test-lowest` depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lowest import lowest_constraints

PROJECT = '[project]\nname = "x"\ndependencies = {}\n'


def test_lower_bounds_become_pins_and_markers_stay() -> None:
    lines = lowest_constraints(PROJECT.format('["b>=2.0.1", "c==3.1", "a[extra]>=1.5,<3; sys_platform == \'linux\'"]'))
    assert lines == ["a==1.5; sys_platform == 'linux'", "b==2.0.1", "c==3.1"]


def test_a_dependency_without_a_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="no lower bound"):
        lowest_constraints(PROJECT.format('["a"]'))


def test_the_project_has_a_bound_for_everything_it_runs_with() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    names = {line.partition("==")[0] for line in lowest_constraints(text)}
    assert {"torch", "transformers", "peft", "bitsandbytes", "deepspeed", "gguf", "pytest"} <= names
