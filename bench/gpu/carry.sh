#!/usr/bin/env bash
# Wheels that a GPU machine without a network lacks (it has torch, transformers, accelerate, triton, rich, typer on Python 3.12):
#   bench/gpu/carry.sh wheels && du -sh wheels          # here; must stay under 64 MiB
#   python -m pip install --no-index --no-deps wheels/*.whl && python bench/gpu/run.py --out $OUT/gpu.jsonl      # there
set -euo pipefail
out=${1:?usage: carry.sh DIRECTORY}
fetch() {
    python3 -m pip download --quiet --only-binary=:all: --python-version 3.12 --implementation cp --dest "$out" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform any "$@"
}
fetch --no-deps bitsandbytes peft datasets dill multiprocess
fetch pydantic # with what it needs: it wants one very version of pydantic-core
du -sh "$out"
