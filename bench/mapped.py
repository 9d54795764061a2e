"""How long a mapped base takes to be ready, what memory it takes, and whether a second process shares its pages.

python bench/mapped.py /path/to/an/nf4/checkpoint
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.common import header, write_result
from bench.limits import measured

_READY = """
import sys
from qvera.models.loader import load_base
from qvera.config.sections import ModelSection
base = load_base(ModelSection(path=sys.argv[1]))
"""
_READ_ALL = (
    _READY
    + """
for parameter in base.model.parameters():
    parameter.data.view(-1).view(__import__("torch").uint8)[::4096].sum()
print("read", flush=True)
sys.stdin.readline()
for line in open("/proc/self/smaps_rollup"):
    if line.startswith(("Pss_File", "Shared_Clean", "Private_Clean", "Rss")):
        print(line.strip(), flush=True)
print("end", flush=True)
sys.stdin.readline()
"""
)


def two_processes(model: Path) -> list[dict[str, int]]:
    """Both have read every page of the base; bytes of each, as the kernel counts them (`/proc/PID/smaps_rollup`)."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _READ_ALL, str(model)]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline().strip() == "read"
    found: list[dict[str, int]] = []
    for process in processes:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        facts: dict[str, int] = {}
        for line in iter(process.stdout.readline, "end\n"):
            key, value, _ = line.split()
            facts[key.rstrip(":").lower() + "_bytes"] = int(value) * 1024
        found.append(facts)
    for process in processes:
        process.communicate("\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an NF4 checkpoint; its pages are read once first (warm page cache)")
    args = parser.parse_args()
    files = list(args.model.glob("*.safetensors"))
    for file in files:
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    document: dict[str, Any] = {**header(), "base_bytes": sum(f.stat().st_size for f in files)}
    ready = [measured([sys.executable, "-c", _READY, str(args.model)]).to_dict() for _ in range(3)]
    document["process_start_to_ready"] = [{k: r[k] for k in ("seconds", "peak_bytes", "returncode")} for r in ready]
    document["two_processes"] = two_processes(args.model)
    print(json.dumps(document, indent=1))
    print(write_result("mapped", document))


if __name__ == "__main__":
    main()
