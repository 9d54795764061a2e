"""Where tensors lie in a file, and a fingerprint that tells one base from another by content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvera.config.sections import ModelSection
from qvera.models.hub import fingerprint_of
from qvera.utils.errors import InputError
from qvera.utils.safetensors_io import (
    SOURCE_FILE,
    base_fingerprint,
    read_header,
    same_base,
    save_tensors,
    write_source_fingerprint,
)
from tests.conftest import small_llama


def test_positions_are_the_tensors_bytes(tiny_model_dir: Path) -> None:
    file = tiny_model_dir / "model.safetensors"
    found = {entry.name: entry for entry in read_header(file)}
    data, values = file.read_bytes(), load_file(file)
    assert found.keys() == values.keys()
    for name, entry in found.items():
        assert entry.dtype == values[name].dtype
        assert entry.shape == tuple(values[name].shape)
        assert data[entry.start : entry.stop] == values[name].view(torch.uint8).numpy().tobytes()


def test_a_damaged_file_is_refused_by_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = (tiny_model_dir / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    bad_header, bad_length = data[:8] + b"\xff" + data[9:], b"\xff" * 8 + data[8:]
    for damaged in (data[:-7], data + b"7", bad_header, bad_length, b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.safetensors: .*(?:again)"):
            read_header(file)


def test_the_fingerprint_knows_content_and_nothing_else(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = base_fingerprint(tiny_model_dir)
    small_llama().to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert base_fingerprint(tmp_path / "sharded") == one, "the same tensors in more files, without a tokenizer"
    small_llama(seed=1).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    small_llama().save_pretrained(tmp_path / "wide")
    assert len({one, base_fingerprint(tmp_path / "other"), base_fingerprint(tmp_path / "wide")}) == 3


def test_one_number_at_either_end_of_a_big_tensor_changes_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    for at in (0, -1):
        tensors = load_file(tiny_model_dir / "model.safetensors")
        assert tensors["lm_head.weight"].nbytes > 3 * 4096
        tensors["lm_head.weight"].view(-1)[at] += 1
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert base_fingerprint(tmp_path) != base_fingerprint(tiny_model_dir)


def test_a_quantized_copy_says_what_it_was_made_from(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["x.quant_state.bitsandbytes__nf4"] = torch.zeros(4, dtype=torch.uint8)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    unknown = base_fingerprint(copy)
    assert unknown.startswith("quantized:")
    write_source_fingerprint(copy, base_fingerprint(tiny_model_dir))
    assert base_fingerprint(copy) == base_fingerprint(tiny_model_dir)
    (copy / SOURCE_FILE).write_text(json.dumps([]))
    with pytest.raises(InputError, match=SOURCE_FILE):
        base_fingerprint(copy)


def test_what_can_be_compared() -> None:
    for one, other in (("a", "a"), (None, "a"), ("a", None), ("quantized:a", "b")):
        assert same_base(one, other)
    assert not same_base("a", "b") and not same_base("quantized:a", "quantized:b")


def test_a_base_in_the_hubs_cache_has_the_fingerprint_of_its_snapshot(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--some--llama"
    shutil.copytree(tiny_model_dir, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint_of(ModelSection(path="some/llama")) == base_fingerprint(tiny_model_dir)
    assert fingerprint_of(ModelSection(path="some/other")) is None


def test_saved_tensors_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """So that a run of one user can be served by another, such as the user of a container."""
    before = os.umask(0)
    try:
        for umask, permissions in ((0o022, 0o644), (0o007, 0o660), (0o077, 0o600)):
            os.umask(umask)
            file = tmp_path / f"{umask}.safetensors"
            save_tensors({"x": torch.ones(3)}, file, {"format": "pt"})
            assert file.stat().st_mode & 0o777 == permissions
    finally:
        os.umask(before)
    assert load_file(file)["x"].tolist() == [1, 1, 1]


def test_a_file_of_another_user_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"short")
    with pytest.raises(InputError, match="cut short"):
        read_header(file)
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests may run as root, who may read everything
    with pytest.raises(InputError, match="this user may not read it"):
        read_header(file)
