"""What YAML can do in a recipe, and what it can't."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qvera.config.schema import Recipe, load_recipe
from qvera.utils.errors import InputError

BODY = "model: some/model\ndata:\n  path: rows.jsonl\n"


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, list(overrides))


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    for content in (b"\xef\xbb\xbf" + BODY.encode(), BODY.replace("\n", "\r\n").encode()):
        assert load(tmp_path, content) == load(tmp_path, BODY)


ALIASES = """\
model: some/model
data: &first
  path: a.jsonl
  template: alpaca
  mixture:
    - &second {path: b.jsonl, weight: 2, system: &prompt Be brief.}
    - {<<: *second, path: c.jsonl}
    - {<<: [*second, {limit: 3}], weight: 4}
  system: *prompt
"""


def test_anchors_aliases_and_merge_keys_work(tmp_path: Path) -> None:
    recipe = load(tmp_path, ALIASES)
    sources = [(one.path, one.weight, one.limit) for one in recipe.data.mixture]
    assert sources == [("b.jsonl", 2, None), ("c.jsonl", 2, None), ("b.jsonl", 4, 3)]
    assert recipe.data.system == "Be brief."


def test_a_merged_key_that_is_wrong_gets_the_line_where_it_is_written(tmp_path: Path) -> None:
    text = "model: m\ndata:\n  path: a\n  mixture:\n    - &b\n      path: b\n      weight: 0\n    - <<: *b\n      limit: 0\n"
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    places = [line.strip().split(":")[0] for line in str(caught.value).splitlines()[1:]]
    expected = (7, "0.weight"), (7, "1.weight"), (9, "1.limit")
    assert places == [f"line {line}, data.mixture.{key}" for line, key in expected]


def test_an_alias_bomb_is_refused_at_once_and_shortly(tmp_path: Path) -> None:
    levels = "".join(f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 12))
    began = time.monotonic()
    with pytest.raises(InputError, match="aliases expand to more than 100,000 values") as caught:
        load(tmp_path, f"{BODY}training:\n  l0: &l0 lol\n{levels}")
    assert time.monotonic() - began < 5
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("export: &a\n  dtype: *a\n", "nested too deeply, or one contains itself"),
        ("export: " + "[" * 800 + "]" * 800 + "\n", "nested too deeply"),
        ("export: *nowhere\n", "undefined alias 'nowhere'"),
        ("---\nmodel: b\n", "expected a single document"),
        ("export: !!python/name:os.system x\n", "could not determine a constructor"),
    ],
)
def test_other_bad_yaml_gets_a_short_message(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load(tmp_path, BODY + text)
    assert str(tmp_path / "recipe.yaml") in str(caught.value)
    assert len(str(caught.value)) < 600


def test_octal_and_base_60_numbers_are_refused(tmp_path: Path) -> None:
    for written in ("010", "-017", "0_10", "1:30", "1:30.5"):
        for text, overrides in ((f"  limit: {written}\n", []), ("", [f"data.limit={written}"])):
            with pytest.raises(InputError, match=f"data.limit: should be a whole number, got '{written}'"):
                load(tmp_path, BODY + text, *overrides)
        assert load(tmp_path, f"{BODY}  system: {written}\n").data.system == written


def test_other_numbers_are_read_as_written_and_are_no_keys(tmp_path: Path) -> None:
    data = load(tmp_path, f"{BODY}  limit: 1_000\n  max_source_length: 0x10\n  seed: 0\n  system: '010'\n").data
    assert (data.limit, data.max_source_length, data.seed, data.system) == (1000, 16, 0, "010")
    with pytest.raises(InputError, match="line 4, 7: unknown key"):
        load(tmp_path, f"{BODY}7: 8\n")


def test_dates_are_texts_and_what_only_looks_like_one_is_no_error(tmp_path: Path) -> None:
    for written in ("2026-12-01", "2026-13-45", "2026-12-01 10:00:00", "0b_"):
        data = load(tmp_path, f"{BODY}  system: {written}\n", f"data.adapter_column={written}").data
        assert (data.system, data.adapter_column) == (written, written)
