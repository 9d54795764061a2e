"""Decomposed weights on disk: found again, told apart, made anew where they are damaged, and shown by `qvera cache`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.adapters.projection import pair_number
from qvera.cli.main import main
from qvera.lab.factor_record import FACTORS
from qvera.lab.lora_xs import FactorCache
from tests.adapters.helpers import base_layer


@pytest.fixture
def computed() -> list[str]:
    """The names of what was decomposed."""
    return []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[str]) -> FactorCache:
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "cache"))
    return FactorCache("abc", "some/model", computed.append)


def files() -> list[Path]:
    return sorted(FACTORS.root.glob("*/*.safetensors"))


def test_what_was_computed_once_is_read_again(cache: FactorCache, computed: list[str]) -> None:
    layer = base_layer("nf4+dq-bfloat16")
    made, again = (cache.pair("q", layer, 6) for _ in range(2))
    assert computed == ["q"]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(made, again, strict=True))
    values, once_more = (cache.singular_values("q", layer) for _ in range(2))
    assert torch.equal(values, once_more)
    torch.testing.assert_close(values[:6].float(), made[0].norm(dim=1))
    assert len(computed) == 2


def test_what_differs_is_told_apart_and_found_by_its_number(cache: FactorCache, computed: list[str]) -> None:
    layer = base_layer("linear")
    cache.pair("q", layer, 6)
    for name, other, rank, fingerprint in (
        ("k", layer, 6, "abc"),  # another linear
        ("q", layer, 7, "abc"),
        ("q", layer, 6, "def"),  # another base
        *(
            ("q", base_layer(kind), 6, "abc") for kind in ("nf4-uint8", "nf4+dq-uint8", "fp4-uint8", "int8")
        ),  # stored so
    ):
        before, one = len(files()), FactorCache(fingerprint, None, computed.append)
        A, B = one.pair(name, other, rank)
        assert len(files()) == before + 1
        found = one.find(name, rank, pair_number(B))
        assert found is not None
        assert torch.equal(found[0], A) and torch.equal(found[1], B)
    assert computed == ["q", "k", *["q"] * 6]
    assert cache.find("q", 6, 99.0) is None


def test_a_model_that_was_changed_in_memory_gets_its_own(cache: FactorCache) -> None:
    layer = base_layer("linear")
    A, _ = cache.pair("q", layer, 6)
    layer.weight.data.mul_(2)
    changed, _ = cache.pair("q", layer, 6)
    torch.testing.assert_close(changed, 2 * A)
    layer.weight.data.div_(2)
    assert torch.equal(cache.pair("q", layer, 6)[0], A)  # the file is the fingerprint's


def test_without_a_fingerprint_or_a_writable_cache_it_is_computed(
    cache: FactorCache, computed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = base_layer("linear")
    for _ in range(2):
        FactorCache(None, None, computed.append).pair("q", layer, 6)
    assert len(computed) == 2
    assert not files()
    (tmp_path / "file").touch()
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "file"))
    assert cache.pair("q", layer, 6)[0].shape == (6, layer.in_features)


@pytest.mark.parametrize("damage", ["a bit", "the end", "all"])
def test_a_damaged_file_is_made_again(cache: FactorCache, computed: list[str], damage: str, capsys: Any) -> None:
    layer = base_layer("linear")
    A, _ = cache.pair("q", layer, 6)
    (file,) = files()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes({"a bit": bytes(content), "the end": bytes(content[:-9]), "all": b""}[damage])
    assert main(["cache", "verify"]) == 1
    assert file.name in capsys.readouterr().err
    assert torch.equal(cache.pair("q", layer, 6)[0], A)
    assert len(computed) == 2
    assert main(["cache", "verify"]) == 0


def test_the_commands_show_and_remove_it_unless_it_is_in_use(cache: FactorCache, capsys: Any) -> None:
    cache.pair("q", base_layer("linear"), 6)
    assert main(["cache", "ls", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["source"] == "some/model"
    assert entry["finished"]
    assert entry["size_bytes"] > 4 * 6 * (64 + 96)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FACTORS.locked(entry["name"].removeprefix("factors-")))
        assert main(["cache", "rm", entry["name"]]) == 2
    assert files()
    assert main(["cache", "rm", entry["name"]]) == 0
    assert not files()
