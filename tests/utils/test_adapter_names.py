"""Directories for adapters' names: they give the name back, and are good and distinct on every file system."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvera.utils.adapter_names import MOST_BYTES, directory_names, escape_name, similar_names, unescape_name
from qvera.utils.errors import InputError

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
TRICKY = st.text("aAeÉé\u0301ßſ./\\=%\u212b가\u1100\u1161 \U0001f600\0", min_size=1, max_size=6).filter(str.strip)
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def test_a_name_has_this_directory_and_the_directory_gives_the_name_back() -> None:
    directories = {
        "anna": "anna", "Anna_B-2.example.com": "Anna_B-2.example.com", "1": "1", "anna smith": "anna=20smith",
        "a/b\\c": "a=2Fb=5Cc", ".": "=2E", "..": "=2E=2E", "...": "=2E.=2E", ".hidden": "=2Ehidden", "-rf": "=2Drf",
        "trailing.": "trailing=2E", "a=b": "a=3Db", "50%": "50=25", "CON": "=43ON", "nul.txt": "=6Eul.txt",
        "com1": "=63om1", "conrad": "conrad", "Zoë": "Zoë", "Zoe\u0308": "Zoe=CC=88", "顧客": "顧客",
        "😀": "=F0=9F=98=80", "line\nbreak": "line=0Abreak", "nothing\0": "nothing=00",
    }  # fmt: skip
    assert {name: escape_name(name) for name in directories} == directories
    assert [unescape_name(directory) for directory in directories.values()] == list(directories)
    by_hand = ["my adapter", "a=b", "x=FF", "50%", "rank=64", "=20"]  # is its own name
    assert [unescape_name(name) for name in by_hand] == by_hand


@settings(deadline=None, max_examples=100)
@given(st.lists(NAMES | TRICKY, min_size=1, max_size=6, unique=True))
def test_directories_are_good_names_distinct_everywhere_and_give_the_names_back(names: list[str]) -> None:
    directories = directory_names(names)
    assert list(directories) == names
    for name, directory in directories.items():
        assert unescape_name(directory) == name
        assert unescape_name(unicodedata.normalize("NFD", directory)) == name  # as an older macOS lists it
        assert not set(directory) & set('<>:"/\\|?* \0') and directory.isprintable()
        assert directory.strip(".") == directory.lstrip("-") == directory
        assert not WINDOWS_DEVICE.match(directory)
    seen = {unicodedata.normalize("NFD", directory).casefold() for directory in directories.values()}
    assert len({unicodedata.normalize("NFD", each) for each in seen}) == len(names)


def test_names_that_differ_by_case_get_directories_that_differ_by_more() -> None:
    directories = {
        "Anna": "=41nna", "anna": "anna", "ANNA": "=41=4E=4E=41", "ben": "ben", "Zoë": "=5Ao=C3=AB",
        "Zoe\u0308": "=5Aoe=CC=88", "straße": "stra=C3=9Fe", "STRASSE": "=53=54=52=41=53=53=45", "anna ": "anna=20",
    }  # fmt: skip
    assert directory_names(directories) == directories
    groups = [["Anna", "anna", "ANNA", "anna "], ["Zoë", "Zoe\u0308"], ["straße", "STRASSE"]]
    assert similar_names(directories) == groups


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "name is empty"),
        (" \t", "name is blank"),
        ("\ud83d", "holds half a character"),
        ("x" * (MOST_BYTES + 1), f"has {MOST_BYTES + 1} bytes, and {MOST_BYTES} are allowed"),
        ("客" * 67, "has 201 bytes"),
    ],
)
def test_a_name_that_can_not_be_a_directory_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        escape_name(name)
