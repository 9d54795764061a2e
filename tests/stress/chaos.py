"""One training killed by SIGKILL again and again, in its steps and at every boundary of a checkpoint's write, against the
same training never killed: the adapter, the whole loss sequence and the names of all files have to be the same.

This process imports everything once; each life of the training is a fork of it that calls `qvera train` (with --resume
once there is a recipe.yaml), so a restart costs a second instead of ten. In the fork, Python's own audit hook tells of
each file that is about to be opened, made, renamed or removed, and the plan says before which one the process dies.
Where a file was being written just then, the kill may leave half of it. In steps, a timer goes off at a random moment.

    python -m tests.stress.chaos                       100 kills, two minutes
    python -m tests.stress.chaos --kills 24 --out FILE
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.common import RESULTS, header, train_records, write_rows
from qvera.cli.main import main as qvera
from tests.conftest import small_llama, small_tokenizer

CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
WRITE = ("os.mkdir", r"/\.partial-step-\d+$", 28)
PLACES: dict[str, tuple[str, str, int]] = {
    # the call and the path with which it begins, and among how many calls from there the last one is chosen
    "step": ("open", r"/metrics\.jsonl$", 3),
    "checkpoint": WRITE,
    "half a file of a checkpoint": WRITE,
    "half a line of metrics.jsonl": (*WRITE[:2], 1),
    "deleting an old checkpoint": ("shutil.rmtree", r"/step-\d+$", 5),
    "reading a checkpoint": ("open", r"/step-\d+/manifest\.json$", 6),
    "recipe.yaml": ("open", r"/\.recipe\.yaml\.partial$", 4),
    "final adapter": ("open", r"/\.adapter\.partial-\d+/", 8),
}
IN_WRITES, ELSEWHERE = tuple(PLACES)[1:3], tuple(PLACES)[3:]
# no two runs share these
OF_THE_PROCESS = ("step_seconds", "tokens_per_second", "memory_bytes", "peak_bytes", "seconds")


class Kill:
    """One kill of the plan: at the ``wait``-th call from where its place begins for the ``start``-th time."""

    def __init__(self, place: str, chooser: random.Random) -> None:
        self.place = place
        self.call, self.path, count = PLACES[place]
        self.start, self.wait = chooser.randrange(2 if place in IN_WRITES else 1), chooser.randrange(count)
        self.moment = chooser.random()  # in [0, 1): of a step's time, or of a file's bytes

    def arm(self, run_dir: Path, step_seconds: float) -> None:
        """Called in the fork. (An audit hook can't be taken out again.)"""
        calls, done = -1 - self.start, False  # calls: since it began

        def look(call: str, arguments: tuple[Any, ...]) -> None:
            nonlocal calls, done
            if done or call not in CALLS:
                return
            path = str(arguments[0])
            if path.startswith("/") and not path.startswith(str(run_dir)):  # in a deletion, names alone are told
                return
            begins = call == self.call and re.search(self.path, path) is not None
            # a step begins with the line of the one before, and each line is one of these calls
            calls += begins if calls < 0 or self.place == "step" else 1
            if calls < self.wait:
                return
            done = True
            if self.place == "step":
                threading.Timer(self.moment * step_seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            elif self.halve(run_dir):
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                done = False

        sys.addaudithook(look)

    def halve(self, run_dir: Path) -> bool:
        """Cut the file that was written last, as a kill in the middle of that leaves it; False where it was whole by now."""
        if not self.place.startswith("half"):
            return True
        file = max((path for path in run_dir.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
        content = file.read_bytes()
        begun = content[:-1].rfind(b"\n") + 1 if file.name == "metrics.jsonl" else 0
        if not begun if "line" in self.place else "/.partial-" not in str(file):
            return False
        os.truncate(file, begun + int(self.moment * (len(content) - begun)))
        return True


def plan(kills: int, seed: int) -> list[Kill]:
    """In a hundred: 62 in steps, 28 in checkpoint writes, 10 elsewhere; those of the final adapter last: then it is over."""
    chooser = random.Random(seed)
    elsewhere, writes = max(len(ELSEWHERE), kills // 10), max(4, round(kills * 0.28))
    places = ["step"] * (kills - writes - elsewhere)
    places += [IN_WRITES[i % 2] for i in range(writes)] + [ELSEWHERE[i % len(ELSEWHERE)] for i in range(elsewhere)]
    chooser.shuffle(places)
    places.sort(key=lambda place: (place == "final adapter", place != "recipe.yaml"))
    return [Kill(place, chooser) for place in places]


def newest_verified(checkpoints: Path) -> int:
    """Step of the newest checkpoint whose files are those that the manifest names, or 0; without qvera's help."""
    found = [0]
    for path in checkpoints.glob("step-*"):
        with contextlib.suppress(OSError, ValueError):
            files = json.loads((path / "manifest.json").read_text())["files"]
            if all(hashlib.sha256((path / f).read_bytes()).hexdigest() == files[f]["sha256"] for f in files):
                found.append(int(path.name[-8:]))
    return max(found)


class Training:
    """The recipe, and the lives of its run."""

    def __init__(self, scratch: Path, steps: int) -> None:
        self.scratch, self.step_seconds = scratch, 0.0
        small_llama().to(torch.bfloat16).save_pretrained(scratch / "model")
        small_tokenizer().save_pretrained(scratch / "model")
        words = ["red", "blue", "green", "grey", "gold"] * 12
        rows = [{"prompt": f"say {n} {word}", "completion": f"{word} {word}"} for n, word in enumerate(words)]
        self.tree: dict[str, Any] = {
            "model": {"path": str(scratch / "model"), "compute_dtype": "float32"},
            "adapter": {"rank": 8, "dropout": 0.1},  # so that the random state counts too
            "data": {"path": write_rows(scratch / "rows.jsonl", rows), "eval_fraction": 0.2, "max_length": 64},
            "training": {
                "max_steps": steps, "global_batch_size": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
                "save_steps": 2, "eval_steps": 8, "save_total_limit": 2, "sample_count": 1,
                "sample_max_new_tokens": 2, "exact_match_rows": 0, "report_to": [],
            },
        }  # fmt: skip

    def life(self, name: str, kill: Kill | None = None) -> str:
        """One start of the training until it ends or is killed, as it should; what it printed."""
        out, log, recipe = self.scratch / name, self.scratch / f"{name}.log", self.scratch / f"{name}.yaml"
        self.tree["training"]["output_dir"] = str(out)
        recipe.write_text(yaml.safe_dump(self.tree))
        more = ["--resume"] if (out / "recipe.yaml").exists() else []
        pid = os.fork()
        if pid == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            for number in (1, 2):
                os.dup2(output, number)
            if kill is not None:
                kill.arm(out, self.step_seconds)
            os._exit(qvera(["train", str(recipe), *more]))
        code, text = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text(errors="replace")
        if code != (0 if kill is None else -signal.SIGKILL):
            raise SystemExit(f"{name}, {kill and kill.place}: exit code {code}. More --steps?\n{text[-3000:]}")
        return text

    def killed(self, kill: Kill) -> dict[str, Any]:
        """One life with its kill; what happened, and where the life had begun."""
        checkpoints = self.scratch / "killed" / "checkpoints"
        before = newest_verified(checkpoints)
        text = self.life("killed", kill)
        said = re.search(r"Going on from step (\d+) of|starting from step (0)", " ".join(text.split()))
        fresh = 0 if "parameters in" in text else None  # a first life says what it trains
        return {
            "place": kill.place,
            "newest_verified_before": before,
            "went_on_from": int(said[1] or 0) if said else fresh,
            "newest_verified_after": newest_verified(checkpoints),
        }


def outcome(out: Path) -> dict[str, Any]:
    """What two runs are compared by: the adapter's bytes, all that metrics.jsonl says of the model, the files' names."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "adapter_sha256": hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "records": [{k: v for k, v in line.items() if k not in OF_THE_PROCESS} for line in lines],
        "files": sorted(str(p.relative_to(out)) for p in out.rglob("*")),
    }


def chaos(kills: int, steps: int, seed: int, scratch: Path) -> dict[str, Any]:
    """The whole experiment."""
    training = Training(scratch, steps)
    training.life("whole")
    training.step_seconds = statistics.median(r["step_seconds"] for r in train_records(scratch / "whole"))
    lives = [training.killed(kill) for kill in plan(kills, seed)]
    training.life("killed")
    whole, killed = outcome(scratch / "whole"), outcome(scratch / "killed")
    count = collections.Counter(life["place"] for life in lives)
    return {
        "steps": steps,
        "seed": seed,
        "sigkills": len(lives),
        "histogram": {name: count[name] for name in PLACES},
        "train_losses_compared": sum(r["kind"] == "train" for r in whole["records"]),
        "evaluations_compared": sum(r["kind"] == "eval" for r in whole["records"]),
        "records_equal_to_the_bit": killed["records"] == whole["records"],
        "adapter_equal_to_the_bit": killed["adapter_sha256"] == whole["adapter_sha256"],
        "files_left_over": sorted(set(killed["files"]) ^ set(whole["files"])),
        "adapter_sha256": whole["adapter_sha256"],
        "step_seconds_median": training.step_seconds,
        "lives": lives,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least 10")
    parser.add_argument("--steps", type=int, help="of the training, which must outlast the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "chaos.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork of a process with threads would hang
    document = header()
    with tempfile.TemporaryDirectory(prefix="qvera-chaos-") as scratch:
        os.environ |= {"QVERA_CACHE": f"{scratch}/cache", "TOKENIZERS_PARALLELISM": "false"}
        document |= chaos(args.kills, args.steps or 2 * args.kills + 10, args.seed, Path(scratch))
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: document[key] for key in document if key != "lives"}, indent=1), args.out, sep="\n")


if __name__ == "__main__":
    main()
