"""The folder of wheels for a machine without a network, without one here: repacking, and what a machine is found to lack."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from bench.gpu import first_machine
from bench.gpu.carry import slim


def test_bitsandbytes_keeps_the_libraries_of_the_cpu_and_of_one_cuda(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda130", "cuda128", "rocm64")]
    names = [*libraries, "bitsandbytes/nn.py", "bitsandbytes-1.0.dist-info/RECORD"]
    with zipfile.ZipFile(wheel, "w") as out:
        for name in names:
            out.writestr(name, "".join(f"{each},,\n" for each in names) if "RECORD" in name else name)
    slim(wheel, ["130"])
    kept = [*libraries[:2], *names[4:]]
    with zipfile.ZipFile(wheel) as found:
        assert found.namelist() == kept
        assert found.read(names[-1]).decode().splitlines() == [f"{name},," for name in kept]
    assert list(tmp_path.iterdir()) == [wheel]


def test_what_a_machine_lacks_or_has_too_old_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("missing_here-1.0", "torch-1.0", "transformers-999.0"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda line, check: asked.append(line))
    first_machine.install(tmp_path, tmp_path / "site")
    assert [Path(wheel).name.partition("-")[0] for wheel in asked[0][-2:]] == ["missing_here", "transformers"]
