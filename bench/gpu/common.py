"""What the pieces of the first machine share: their lines, a random 4-bit base, `qvera` as a command, and memory."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.common import header, plain_json, read_lines
from bench.gpu.first_machine import add_line
from bench.synthesise import SHAPES, synthesise
from qvera.utils import accelerator, memory

ROOT = Path(__file__).resolve().parents[2]
BASE_LAYERS = 4  # of pieces that need a real width and not a real depth


class Lines:
    """Rows of JSON, one a line, each on disk before the next is measured."""

    def __init__(self, path: Path, piece: str, device: torch.device, shape: str) -> None:
        now = header()
        self.path, versions = path, {name: now["versions"].get(name) for name in ("torch", "transformers", "triton")}
        self.about = {"piece": piece, "shape": shape, "card": memory.device_name(device), "commit": now["commit"],
                      "date": now["date"], "versions": versions}  # fmt: skip

    def add(self, **row: Any) -> None:
        """Write one row and show it."""
        add_line(self.path, plain_json({**self.about, **row}))

    def read(self, piece: str) -> list[dict[str, Any]]:
        """What an earlier piece wrote at this commit, on this card and shape."""
        wanted = {**self.about, "piece": piece}
        keys = ("piece", "shape", "card", "commit")
        return [row for row in read_lines(self.path) if all(row.get(key) == wanted[key] for key in keys)]


Piece = Callable[[argparse.Namespace, Lines], None]


def do_piece(description: str | None, pieces: Mapping[str, Piece]) -> None:
    """The command line of a part: does the piece that it names. A name's part behind a comma or number is its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="7b", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    device = accelerator.current_device()
    if device.type != args.device:
        raise SystemExit(f"--device {args.device}: torch finds {device.type}. {accelerator.unusable_card() or ''}")
    torch.manual_seed(0)
    pieces[args.piece](args, Lines(args.lines, args.piece, device, args.shape))


def start_peak(device: torch.device) -> None:
    """Free what is left of an earlier run, cycles too, and count peaks anew."""
    gc.collect()
    accelerator.empty_cache()
    accelerator.reset_peak(device)


def peak_bytes(device: torch.device) -> dict[str, int | None]:
    """The most that tensors took, and what the allocator took from the device for them. On a CPU: memory held now."""
    if device.type == "cpu":
        return {"peak_allocated_bytes": memory.private_bytes()}
    kinds: Any = ("allocated", "reserved")
    return {f"peak_{kind}_bytes": accelerator.counted_bytes(device, kind, peak=True) for kind in kinds}


def made_once(out: Path, make: Callable[[Path], object]) -> Path:
    """A directory that ``make`` has made whole, now or before; one that was cut off is made anew."""
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(out)
    return out


def base_on_disk(args: argparse.Namespace, layers: int | None = None, nf4: bool = True, shape: str = "") -> str:
    """A random checkpoint, its linears but the head in NF4 or all in bf16, with a byte-level tokenizer; made once."""
    shape = shape or args.shape
    layers = None if shape == "tiny" else layers

    def make(out: Path) -> None:
        synthesise(shape, out, nf4=nf4, layers=layers)
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131_072}))

    return str(made_once(args.scratch / f"{shape}-{layers or 'all'}-layers-{'nf4' if nf4 else 'bf16'}", make))


def write_rows(path: Path, count: int, characters: int, even: bool = False) -> Path:
    """A JSONL file of prompts and completions; every byte is a token. Lengths differ by up to a half unless ``even``."""
    with open(path, "w", encoding="utf-8") as handle:
        for i in range(count):
            length = characters if even else characters - (i * 37) % (characters // 2)
            row = {"prompt": f"{i} " + "ab c" * (length // 8), "completion": "de f" * (length // 8 - even)}
            handle.write(json.dumps(row) + "\n")
    return path


def recipe(args: argparse.Namespace, name: str, base: str, rows: Path, **sections: dict[str, Any]) -> tuple[Path, Path]:
    """A recipe file and its run directory; keys of ``sections`` replace the defaults here."""
    run, tree = args.scratch / name.replace(" ", "-"), dict[str, dict[str, Any]]()
    tree["model"] = {"path": base}
    tree["data"] = {"path": str(rows), "template": "plain", "eval_fraction": 0.0}
    tree["adapter"] = {"rank": 256}
    tree["training"] = {"output_dir": str(run), "max_steps": args.steps, "sample_count": 0, "report_to": []}
    for section, keys in sections.items():
        tree[section] |= keys
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    shutil.rmtree(run, ignore_errors=True)
    return file, run


def qvera(*arguments: str, **environment: str) -> None:
    """Run a command of qvera from this checkout.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    line = [sys.executable, "-m", "qvera", *arguments]
    done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"qvera {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-3000:]}")
