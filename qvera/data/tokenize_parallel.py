"""Tokenizing by several processes: each reads the source itself and takes every n-th chunk of rows, so that no row crosses a pipe.

    python -m qvera.data.tokenize_parallel < job.json > events.jsonl

The processes are programs of their own, not forks: the trainer has threads (of torch, of the heartbeat) that a fork would not copy,
and the code of whoever called `build_datasets` is not run again. Jobs and answers are JSON; rows come back as an Arrow file each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from qvera.config.schema import DataSection
from qvera.data.chat_template import resolve_template
from qvera.data.encoding import Encoder
from qvera.data.formats import RowFormat
from qvera.data.row_selection import chosen_rows, chunks_of
from qvera.data.row_tables import SCHEMA, RowWriter, record_batch
from qvera.data.tokenization import Counts, RowTokenizer
from qvera.utils.errors import InputError


def tokenizer_state(tokenizer: Any) -> dict[str, Any] | None:
    """All that tokenizing depends on in a tokenizer, as JSON; None for one written in Python, whose code can't be told apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        return None
    model = json.loads(backend.to_str())
    model["truncation"] = model["padding"] = None  # of the last call, not of the tokenizer
    return {
        "model": json.dumps(model, ensure_ascii=False),
        "special": tokenizer.special_tokens_map,  # by name: what templates can write, a model's own names included
        "all_special": sorted(tokenizer.all_special_tokens),
        "add_bos_token": getattr(tokenizer, "add_bos_token", None),
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", None),
        "chat_template": tokenizer.chat_template,
        "probe": tokenizer("a")["input_ids"],
    }


def state_sha256(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _tokenizer_of(state: dict[str, Any], name: str) -> Any:
    """The tokenizer again, for a process of its own.

    Raises:
        ValueError: it would not be the same one.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast as Fast

    usual = {key: token for key, token in state["special"].items() if key in Fast.SPECIAL_TOKENS_ATTRIBUTES}
    tokenizer = Fast(
        tokenizer_object=Tokenizer.from_str(state["model"]),
        name_or_path=name,
        extra_special_tokens=[token for token in state["all_special"] if token not in state["special"].values()],
        model_specific_special_tokens={key: token for key, token in state["special"].items() if key not in usual},
        **usual,
    )
    tokenizer.chat_template = state["chat_template"]
    if state["add_bos_token"] is not None:
        tokenizer.add_bos_token = state["add_bos_token"]
    if state["split_special_tokens"] is not None:
        tokenizer.split_special_tokens = state["split_special_tokens"]
    again = tokenizer_state(tokenizer)
    if again != state:
        differ = [key for key in state if again is None or again[key] != state[key]]
        raise ValueError(f"the tokenizer can't be given to another process whole ({', '.join(differ)} differ)")
    return tokenizer


@dataclasses.dataclass
class Spread:
    """What the processes have left: an event for each chunk, and each one's Arrow file, a record batch a chunk."""

    events: dict[int, dict[str, Any]]
    files: list[Path]
    first: int

    def take_into(self, writer: RowWriter, counts: Counts, hollow: list[str]) -> list[str]:
        """Append the chunks in order, and return the sources of hollow rows; ``hollow``: those found before.

        Raises:
            InputError: the first that one process would have met.
        """
        found: list[str] = []
        for chunk in sorted(self.events):
            event = self.events[chunk]
            if event.get("stage") == "parse" or (event.get("stage") == "encode" and not (hollow or found)):
                raise InputError(event["error"])
            found += event.get("hollow", [])
        if not (hollow or found):
            readers = [pa.ipc.open_file(pa.memory_map(str(file))) for file in self.files]
            for chunk in sorted(self.events):
                writer.add(readers[(chunk - self.first) % len(readers)].get_batch((chunk - self.first) // len(readers)))
                counts.add(Counts(**self.events[chunk]["counts"]))
        return found


def tokenize(
    section: DataSection,
    part: str,
    count: int,
    row_format: RowFormat,
    tokenizer: Any,
    first: int,
    processes: int,
    scratch: Path,
    advance: Callable[[int], None],
) -> Spread | None:
    """Tokenize all chunks from ``first`` on; None where that is not possible here, and one process has to.

    Args:
        section: the source; its template is named, not ``auto``, which the rows of this part alone could not settle.
        part, count: see `making.chosen_rows`.
        scratch: an empty directory for the processes' files.
        advance: called with the rows of each chunk that is done.
    """
    state = tokenizer_state(tokenizer)
    if state is None:
        return None
    files = [scratch / f"part-{number}.arrow" for number in range(processes)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    events: dict[int, dict[str, Any]] = {}
    arrived: queue.Queue[dict[str, Any] | None] = queue.Queue()
    workers: list[subprocess.Popen[str]] = []

    def listen(worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            arrived.put(json.loads(line))
        arrived.put(None)

    try:
        for number, file in enumerate(files):
            job = {
                "section": section.to_dict(), "part": part, "count": count, "format": dataclasses.asdict(row_format),
                "tokenizer": state, "name": tokenizer.name_or_path, "out": str(file), "first": first + number, "step": processes,
            }  # fmt: skip
            told = scratch / f"job-{number}.json"
            told.write_text(json.dumps(job), encoding="utf-8")
            # from a file: a pipe holds 64 kB, and the next process would wait until this one has imported all and reads
            with open(told, encoding="utf-8") as asked, open(scratch / f"said-{number}.txt", "w") as said:
                worker = subprocess.Popen(
                    [sys.executable, "-m", "qvera.data.tokenize_parallel"], stdin=asked, stdout=subprocess.PIPE, stderr=said,
                    text=True, encoding="utf-8", env=environment,
                )  # fmt: skip
            workers.append(worker)
            threading.Thread(target=listen, args=(worker,), daemon=True).start()
        open_pipes = len(workers)
        while open_pipes:
            event = arrived.get()
            if event is None:
                open_pipes -= 1
                continue
            events[event["chunk"]] = event
            advance(event["rows"])
        if any(worker.wait() for worker in workers):
            return None
    except OSError:  # no such interpreter, no memory for it, a pipe that broke: one process can do it all the same
        return None
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    return Spread(events, files, first)


def _work(job: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """One process's chunks: ``first``, ``first + step``, ..."""
    section, row_format = DataSection(**job["section"]), RowFormat(**job["format"])
    encoder = Encoder(_tokenizer_of(job["tokenizer"], job["name"]))
    template = resolve_template(section.template, encoder.tokenizer)
    tokenizer = RowTokenizer(section, encoder, template, row_format)
    nothing = record_batch([])
    only_parse = False
    with pa.OSFile(job["out"], "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as out:
        for number, chunk in enumerate(chunks_of(chosen_rows(section, job["part"], job["count"]))):
            if number < job["first"] or (number - job["first"]) % job["step"]:
                continue
            event: dict[str, Any] = {"chunk": number, "rows": len(chunk), "counts": dataclasses.asdict(Counts())}
            batch = nothing
            try:
                event["stage"] = "parse"
                full, event["hollow"] = tokenizer.parse(chunk)
                only_parse = only_parse or bool(event["hollow"])
                if not only_parse:
                    event["stage"] = "encode"
                    examples, lost = tokenizer.encode(full)
                    batch, event["counts"] = record_batch(examples), dataclasses.asdict(lost)
                del event["stage"]
            except InputError as error:
                event["error"] = str(error)
                only_parse = True
            out.write_batch(batch)
            say(event)
            if event.get("stage") == "parse":
                return  # nothing behind it matters


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(event: dict[str, Any]) -> None:
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    _work(json.loads(sys.stdin.read()), say)


if __name__ == "__main__":
    _main()
