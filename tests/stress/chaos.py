"""One training killed by SIGKILL again and again, inside steps and at every boundary of a checkpoint's write, against the same
training never killed: the adapter, the whole loss sequence and the names of all files have to be the same.

A server process imports everything once; each life of the training is a fork of it that calls `qvera train` (with
--resume once there is a recipe.yaml), so a restart costs a second instead of ten. Kills at files: `tracer.py` holds the
process in the kernel at the system call that the plan names, and kills it before or after the call, or with part of a
write's bytes in the file. Kills in
steps: a timer goes off at a random moment of the step that the plan names; a byte in shared memory, set by wrappers
around the step's functions in the fork, says what the process was doing when it died. The training's own code is as it
is.

    python -m tests.stress.chaos                       100 kills, two minutes
    python -m tests.stress.chaos --kills 24 --out FILE
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import RESULTS, header, train_records
from bench.synthesise import tokenizer
from qvera.cli.main import main as qvera
from qvera.models import forward
from qvera.training.engine import LocalEngine
from qvera.training.loop import AloneLoop
from tests.stress import tracer
from tests.stress.tracer import AFTER, GO, KILL, Stop, Traced

OUTSIDE, BETWEEN, FORWARD, BACKWARD, UPDATE = range(5)
PHASES = dict(enumerate(("step: batch or loss", "step: forward", "step: backward", "step: clip, AdamW"), start=BETWEEN))
IN_A_WRITE = ("open", "partial write", "fsync", "manifest", "rename")
ELSEWHERE = (
    "deleting an old checkpoint",
    "line of metrics.jsonl",
    "reading a checkpoint",
    "recipe.yaml",
    "final adapter",
)
SAVE_STEPS, EVAL_STEPS = 2, 8
# no two runs share these
OF_THE_PROCESS = ("step_seconds", "tokens_per_second", "memory_bytes", "peak_bytes", "seconds")


class Marker:
    """What the training is doing, in memory that outlives it: a phase and the step it is in."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def set(self, phase: int, step: int | None = None) -> None:
        self._memory[0] = phase
        if step is not None:
            self._memory[8:16] = struct.pack("Q", step)

    @property
    def phase(self) -> int:
        return self._memory[0]

    @property
    def step(self) -> int:
        return int(struct.unpack("Q", self._memory[8:16])[0])

    def watch(self, tell: int) -> None:
        """Called in the fork: wrap the step's functions, and send SIGUSR1 to ``tell`` when a step begins."""

        def around(owner: Any, name: str, phase: int) -> None:
            kept = getattr(owner, name)

            def wrapped(*args: Any, **more: Any) -> Any:
                before = self.phase
                if before != OUTSIDE:
                    self.set(phase)
                found = kept(*args, **more)
                if before != OUTSIDE:
                    self.set(before)
                return found

            setattr(owner, name, wrapped)

        around(forward, "batch_nll", FORWARD)
        around(LocalEngine, "backward", BACKWARD)
        around(LocalEngine, "step", UPDATE)
        step: Any = AloneLoop.train_step

        def watched(loop: AloneLoop) -> Any:
            self.set(BETWEEN, loop.state.step + 1)
            os.kill(tell, signal.SIGUSR1)
            found = step(loop)
            self.set(OUTSIDE)
            return found

        AloneLoop.train_step = watched  # type: ignore[method-assign, assignment]


class Kill:
    """One kill of the plan. ``wait``: how many steps, or checkpoint writes, of its life go by before it is due."""

    def __init__(self, place: str, wait: int, chooser: random.Random) -> None:
        self.place, self.wait = place, wait
        self.moment = chooser.random()  # in [0, 1): of a step's time, or of a write's bytes
        self.file = chooser.randrange(4)  # the how many-th file of a checkpoint
        self.answer = chooser.choice((KILL, AFTER))
        self.part = chooser.choice(("open", "partial write", "fsync"))  # of the manifest
        self.at = ""  # filled in where it happened
        self._writes = self._files = 0

    def decide(self, stop: Stop) -> Any:
        """For a kill at a file: whether this is the call, and what is to be done with it."""
        path = Path(stop.path)
        in_write = path.parent.name.startswith(".partial-step-")
        if stop.call == "mkdir" and path.name.startswith(".partial-step-"):
            self._writes, self._files = self._writes + 1, 0
        if self.place in IN_A_WRITE:
            if self._writes <= self.wait:
                return GO
            if self.place == "rename":
                return self._rename(stop, path)
            if not in_write or (path.name == "manifest.json") != (self.place == "manifest"):
                return GO
            wanted = self.part if self.place == "manifest" else self.place
            return self._file(stop, path, wanted, skip=0 if self.place == "manifest" else self.file)
        if self.place == "deleting an old checkpoint" and stop.call in ("unlink", "rmdir"):
            return self._nth("/step-" in stop.path, stop, self.answer, skip=self.file)
        if self.place == "line of metrics.jsonl" and stop.call == "write" and path.name == "metrics.jsonl":
            return self._nth(True, stop, int(self.moment * stop.size_bytes), skip=self.wait)
        if self.place == "reading a checkpoint" and stop.call == "open" and not stop.creates:
            return self._nth("/step-" in stop.path, stop, self.answer, skip=self.file)
        if self.place == "recipe.yaml" and "recipe.yaml" in path.name and stop.call == "write":
            return self._nth(True, stop, int(self.moment * stop.size_bytes))
        if self.place == "final adapter":
            if self.answer == KILL and stop.call == "write":
                return self._nth(
                    ".adapter.partial" in stop.path, stop, int(self.moment * stop.size_bytes), skip=self.file % 2
                )
            return self._nth(stop.call == "rename" and Path(stop.target).name == "adapter", stop, self.answer)
        return GO

    def _file(self, stop: Stop, path: Path, wanted: str, skip: int) -> Any:
        if wanted == "partial write":
            return self._nth(stop.call == "write", stop, int(self.moment * stop.size_bytes), skip)
        if wanted == "fsync":
            return self._nth(stop.call == "fsync", stop, self.answer, skip)
        return self._nth(stop.call == "open" and stop.creates, stop, self.answer, skip)

    def _rename(self, stop: Stop, path: Path) -> Any:
        if self.file == 0:  # between the rename and the flush of the directory that holds the name
            return self._nth(stop.call == "fsync" and path.name == "checkpoints", stop, self.answer)
        return self._nth(stop.call == "rename" and path.name.startswith(".partial-step-"), stop, self.answer)

    def _nth(self, here: bool, stop: Stop, answer: Any, skip: int = 0) -> Any:
        if not here:
            return GO
        self._files += 1
        if self._files <= skip:
            return GO
        how = {KILL: "before", AFTER: "after"}.get(answer, f"after {answer} of {stop.size_bytes} bytes of")
        self.at = f"{how} {stop.call} {Path(stop.path).name}"
        return answer


def plan(kills: int, seed: int) -> list[Kill]:
    """In a hundred: 62 in steps, 28 in checkpoint writes, 10 elsewhere; those of the final adapter last, since then it is over."""
    chooser = random.Random(seed)
    elsewhere = max(len(ELSEWHERE), kills // 10)
    writes = max(len(IN_A_WRITE), round(kills * 0.28))
    places = ["step"] * (kills - writes - elsewhere)
    places += [IN_A_WRITE[i % len(IN_A_WRITE)] for i in range(writes)]
    places += [ELSEWHERE[i % len(ELSEWHERE)] for i in range(elsewhere)]
    chooser.shuffle(places)
    places.sort(key=lambda place: place == "final adapter")
    return [Kill(place, chooser.randrange(3 if place == "step" else 2), chooser) for place in places]


def verified(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints whose files are those that the manifest names; looked at without qvera's help."""
    found = []
    for path in checkpoints.glob("step-*") if checkpoints.is_dir() else ():
        with contextlib.suppress(OSError, ValueError):
            files = json.loads((path / "manifest.json").read_text())["files"]
            if all(hashlib.sha256((path / f).read_bytes()).hexdigest() == files[f]["sha256"] for f in files):
                found.append(int(path.name[-8:]))
    return sorted(found)


class Training:
    """The recipe, and the lives of its run."""

    def __init__(self, scratch: Path, steps: int) -> None:
        self.scratch, self.steps = scratch, steps
        self.marker = Marker()
        model, rows = scratch / "model", scratch / "rows.jsonl"
        shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=2, tie_word_embeddings=False, **shape)).to(
            torch.bfloat16
        ).save_pretrained(model)
        tokenizer().save_pretrained(model)
        chooser = random.Random(0)
        words = ["red", "blue", "green", "grey", "gold"]
        with open(rows, "w", encoding="utf-8") as handle:
            for _ in range(60):
                word = chooser.choice(words)
                row = {"prompt": f"say {word} {chooser.randint(0, 99)}", "completion": f"{word} {word}"}
                handle.write(json.dumps(row) + "\n")
        self.tree: dict[str, Any] = {
            "model": {"path": str(model), "compute_dtype": "float32"},
            "adapter": {"rank": 8, "dropout": 0.1},  # so that the random state counts too
            "data": {"path": str(rows), "eval_fraction": 0.2, "max_length": 64},
            "training": {
                "max_steps": steps, "global_batch_size": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
                "save_steps": SAVE_STEPS, "eval_steps": EVAL_STEPS, "save_total_limit": 2, "sample_count": 1,
                "sample_max_new_tokens": 2, "exact_match_rows": 0, "report_to": [],
            },
        }  # fmt: skip

    def life(
        self, name: str, decide: Callable[[Stop], Any], begun: Callable[[Traced], Any] = lambda _: None
    ) -> tuple[int, str]:
        """One start of the training until it ends or is killed: exit code (or minus the signal) and what it printed."""
        out, log, recipe = self.scratch / name, self.scratch / f"{name}.log", self.scratch / f"{name}.yaml"
        self.tree["training"]["output_dir"] = str(out)
        recipe.write_text(yaml.safe_dump(self.tree))
        more = ["--resume"] if (out / "recipe.yaml").exists() else []
        server = os.getpid()

        def body() -> int:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            for number in (1, 2):
                os.dup2(output, number)
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            self.marker.watch(server)
            return qvera(["train", str(recipe), *more])

        self.marker.set(OUTSIDE, 0)
        child = Traced(body)
        begun(child)
        return child.follow(decide), log.read_text(errors="replace")

    def killed(self, name: str, kill: Kill, step_seconds: float) -> dict[str, Any]:
        """One life with its kill; what happened, and where the life had begun."""
        out = self.scratch / name
        before = verified(out / "checkpoints")
        start = before[-1] if before else 0
        child: list[Traced] = []

        def look(*_: Any) -> None:
            """The timer went off: kill where a step is running, else come back in half a millisecond."""
            if self.marker.phase != OUTSIDE:
                child[0].kill()
            else:
                signal.setitimer(signal.ITIMER_REAL, 0.0005)

        def step_begins(*_: Any) -> None:
            if kill.place == "step" and self.marker.step == start + 1 + kill.wait:
                signal.setitimer(signal.ITIMER_REAL, max(kill.moment * step_seconds, 1e-6))

        signal.signal(signal.SIGALRM, look)
        signal.signal(signal.SIGUSR1, step_begins)
        decide = kill.decide if kill.place != "step" else lambda _: GO
        began = time.perf_counter()
        try:
            code, text = self.life(name, decide, child.append)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if code != -signal.SIGKILL:
            raise SystemExit(f"kill at {kill.place} never came, exit code {code}: more --steps?\n{text[-3000:]}")
        said = re.search(r"Going on from step (\d+) of|starting from step (0)", " ".join(text.split()))
        fresh = 0 if "parameters in" in text else None  # a first life says what it trains
        place = kill.place if kill.place != "step" else PHASES[self.marker.phase]
        after = verified(out / "checkpoints")
        return {
            "place": place,
            "at": kill.at or f"step {self.marker.step}",
            "newest_verified_before": start,
            "went_on_from": int(said[1] or 0) if said else fresh,
            "newest_verified_after": after[-1] if after else 0,
            "seconds": time.perf_counter() - began,
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
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    code, text = training.life("whole", lambda _: GO)
    if code:
        raise SystemExit(f"the run that is never killed failed with {code}:\n{text[-3000:]}")
    step_seconds = statistics.median(r["step_seconds"] for r in train_records(scratch / "whole"))
    lives = []
    for number, kill in enumerate(plan(kills, seed), start=1):
        lives.append(training.killed("killed", kill, step_seconds))
        last = lives[-1]
        print(f"{number:3d}  {last['seconds']:.1f} s  {last['place']}: {last['at']}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    code, text = training.life("killed", lambda _: GO)
    if code:
        raise SystemExit(f"the last life, which nobody killed, failed with {code}:\n{text[-3000:]}")
    whole, killed = outcome(scratch / "whole"), outcome(scratch / "killed")
    count = collections.Counter(life["place"] for life in lives)
    in_steps = sum(count[name] for name in PHASES.values())
    in_writes = sum(count[name] for name in IN_A_WRITE)
    return {
        "steps": steps,
        "seed": seed,
        "sigkills": len(lives),
        "inside_steps": in_steps,
        "inside_checkpoint_writes": in_writes,
        "histogram": {name: count[name] for name in (*PHASES.values(), *IN_A_WRITE, *ELSEWHERE)},
        "train_losses_compared": sum(r["kind"] == "train" for r in whole["records"]),
        "evaluations_compared": sum(r["kind"] == "eval" for r in whole["records"]),
        "records_equal_to_the_bit": killed["records"] == whole["records"],
        "adapter_equal_to_the_bit": killed["adapter_sha256"] == whole["adapter_sha256"],
        "files_left_over": sorted(set(killed["files"]) ^ set(whole["files"])),
        "adapter_sha256": whole["adapter_sha256"],
        "step_seconds_median": step_seconds,
        "lives": lives,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least 12")
    parser.add_argument("--steps", type=int, help="of the training, which must outlast the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=RESULTS / "chaos.json")
    args = parser.parse_args()
    problem = tracer.possible()
    if problem is not None:
        raise SystemExit(f"nothing was killed: {problem}")
    torch.set_num_threads(1)  # a fork of a process with threads would hang
    document = header()
    scratch = Path(tempfile.mkdtemp(prefix="qvera-chaos-", dir=args.scratch))
    os.environ["QVERA_CACHE"] = str(scratch / "cache")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began = time.perf_counter()
    try:
        document |= chaos(args.kills, args.steps or 2 * args.kills + 10, args.seed, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    document["seconds"] = time.perf_counter() - began
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: document[key] for key in document if key != "lives"}, indent=1), args.out, sep="\n")


if __name__ == "__main__":
    main()
