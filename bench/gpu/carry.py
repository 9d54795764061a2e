"""Wheels that a GPU machine without a network may lack, in a folder below 30 MB; it has torch, triton and numpy of its own.

    python bench/gpu/carry.py wheels [--python 3.12] [--cuda 130]       # here; then first_machine.py A --wheels wheels, there

bitsandbytes is repacked with the libraries of those versions of CUDA alone (130: 4 MB; 126 and 128: over 20 MB each).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGES = (
    "accelerate", "bitsandbytes", "datasets", "dill", "filelock", "jinja2", "multiprocess", "peft", "psutil",
    "safetensors", "tokenizers", "transformers", "xxhash", "typer", "rich", "pyyaml", "fsspec",
    "pytest", "pluggy", "iniconfig",
)  # fmt: skip
WITH_THEIR_OWN = ("pydantic",)  # it wants one very version of pydantic-core
LIMIT_BYTES = 30_000_000


def slim(wheel: Path, cuda: list[str]) -> None:
    """Drop bitsandbytes' libraries for other devices from its wheel."""
    kept = {"libbitsandbytes_cpu.so", *(f"libbitsandbytes_cuda{version}.so" for version in cuda)}

    def stays(name: str) -> bool:
        return "libbitsandbytes_" not in name or name.rpartition("/")[2] in kept

    whole = wheel.rename(wheel.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                text = data.decode().splitlines(keepends=True)
                data = "".join(line for line in text if stays(line.partition(",")[0])).encode()
            if stays(entry.filename):
                out.writestr(entry.filename, data)
    whole.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--cuda", nargs="+", default=["130"])
    args = parser.parse_args()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--implementation", "cp"]
    pip += ["--python-version", args.python, "--dest", str(args.folder)]
    for platform in (
        "manylinux_2_28_x86_64",
        "manylinux_2_24_x86_64",
        "manylinux_2_17_x86_64",
        "manylinux2014_x86_64",
        "any",
    ):
        pip += ["--platform", platform]
    subprocess.run([*pip, "--no-deps", *PACKAGES], check=True)
    subprocess.run([*pip, *WITH_THEIR_OWN], check=True)
    for wheel in args.folder.glob("bitsandbytes-*.whl"):
        slim(wheel, args.cuda)
    size = sum(wheel.stat().st_size for wheel in args.folder.glob("*.whl"))
    print(f"{args.folder}: {size / 1e6:.1f} MB")
    if size > LIMIT_BYTES:
        raise SystemExit(f"{args.folder}: above {LIMIT_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
