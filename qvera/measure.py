"""What is measured on the machine: memory, device name, versions."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch


def memory_bytes(device: torch.device) -> int:
    """Memory held now: tensors on the CUDA device, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: on the CUDA device, or as resident set since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken: on the CUDA device, or in this machine within the limit of this process's cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_cgroup_available()])


def _cgroup_available() -> Iterator[int]:
    """What the memory cgroups above this process (v1 or v2) leave it; dropped file pages count as free."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, limit, usage, cache = (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_cache",
            )
        elif controllers == "":
            root, limit, usage, cache = "/sys/fs/cgroup", "memory.max", "memory.current", "file"
        else:
            continue
        group = Path(root) / path.lstrip("/")
        for directory in (group, *group.parents):
            try:
                most, held = int((directory / limit).read_text()), int((directory / usage).read_text())
                stat = dict(row.split() for row in (directory / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max": no limit here
                continue
            yield most - held + int(stat.get(cache, 0))


def device_name(device: torch.device) -> str:
    """The device in words, with what a timing depends on."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            name = next(line.split(":", 1)[1].strip() for line in handle if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"cpu: {name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of everything that a result can depend on."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "qvera")
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
