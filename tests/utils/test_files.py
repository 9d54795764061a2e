"""JSON files that people or other programs wrote: read, or refused with the file, the place and what was expected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qvera
from qvera.utils.errors import InputError
from qvera.utils.files import read_json, try_read_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n  "b" 2}', "line 2, column 7 is not JSON"),
        (b"\xff\xfe", "can't be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "can't be read as JSON"),
        (b"[" * 200_000, "can't be read as JSON"),
        (b"[1]", "holds a list; expected the run's record as a JSON object"),
        (b'{"b": 1}', "has no key 'a'"),
        (None, "is missing; expected the run's record"),
    ],
)
def test_bad_json_is_refused_with_its_place(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_json(file, "the run's record", keys=("a",), fix="Run again.")
    assert str(caught.value).startswith(str(file))
    assert str(caught.value).endswith("Run again.")


def test_a_record_that_can_be_made_again_is_read_or_none(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    assert try_read_json(file) is None
    file.write_text('{"a": 1')
    assert try_read_json(file) is None
    file.write_text('{"a": 1}')
    assert try_read_json(file) == {"a": 1}


def test_the_utilities_and_the_cache_of_bases_import_no_torch() -> None:
    code = f"""
import importlib, pkgutil, sys, types
package = sys.modules["qvera"] = types.ModuleType("qvera")  # its packages alone, whatever the package itself imports
package.__path__ = [{str(Path(qvera.__file__).parent)!r}]
for module in pkgutil.iter_modules(importlib.import_module("qvera.utils").__path__):
    importlib.import_module("qvera.utils." + module.name)
import qvera.models.quantized_record  # what `qvera cache ls` reads
print(len(sys.modules), sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["[]"]
