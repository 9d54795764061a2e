"""Tokenize with several processes. Each reads the source itself and takes every n-th chunk of its rows.

    python -m qvera.data.tokenize_parallel JOB.pickle NUMBER

The processes are programs of their own, not forks or spawns: a fork would not copy the trainer's threads, and a spawn
would run the caller's ``__main__`` again. Each writes one Arrow file a chunk; the counts of a chunk are in the file's
metadata.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from qvera.data.chat_template import resolve_template
from qvera.data.encoding import Encoder, tokenizer_sha256
from qvera.data.rows import SCHEMA
from qvera.data.sources import CHUNK_ROWS
from qvera.data.tokenization import RowCounts, TokenizedChunk
from qvera.data.tokenize_source import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "USE_TORCH": "0"}
"""A worker's: one core each, and transformers without torch, whose import takes ten times as long as all the rest."""
_POLL_SECONDS = 0.05


class WorkerFailed(Exception):
    """A process could not be started, or ended before its work was done: one process can do the rest all the same."""


def chunks(
    part: Part, tokenizer: PreTrainedTokenizerBase, first: int, processes: int, scratch: Path
) -> Iterator[TokenizedChunk]:
    """Yield all chunks of a part from number ``first`` on, in order.

    Args:
        scratch: an empty directory for the processes' files.

    Raises:
        WorkerFailed: after the chunks that were yielded, none can be had in this way.
    """
    job = scratch / "job.pickle"
    workers: list[subprocess.Popen[bytes]] = []
    try:
        job.write_bytes(pickle.dumps((part, tokenizer, tokenizer_sha256(tokenizer), first, processes)))
        for number in range(processes):
            command = [sys.executable, "-m", "qvera.data.tokenize_parallel", str(job), str(number)]
            nowhere = subprocess.DEVNULL
            workers.append(
                subprocess.Popen(
                    command, stdin=nowhere, stdout=nowhere, stderr=nowhere, env={**os.environ, **_ENVIRONMENT}
                )
            )
        for number in range(first, -(-part.rows // CHUNK_ROWS)):
            yield _wait_for(scratch / f"{number}.arrow", workers[(number - first) % processes])
    except (OSError, pickle.PicklingError, TypeError, AttributeError) as error:
        raise WorkerFailed(str(error)) from error
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _wait_for(file: Path, worker: subprocess.Popen[bytes]) -> TokenizedChunk:
    """Read and remove a chunk's file as soon as its worker has written it."""
    while not file.exists():
        if worker.poll() is not None and not file.exists():
            raise WorkerFailed(f"the process that writes {file.name} ended with {worker.returncode}")
        time.sleep(_POLL_SECONDS)
    with pa.OSFile(str(file), "rb") as source, pa.ipc.open_file(source) as reader:
        facts = json.loads(reader.schema.metadata[b"facts"])
        batch = pa.RecordBatch.from_arrays(reader.get_batch(0).columns, schema=SCHEMA)
    file.unlink()
    return TokenizedChunk(batch=batch, counts=RowCounts(**facts.pop("counts")), **facts)


def _write(file: Path, chunk: TokenizedChunk) -> None:
    facts = {name: getattr(chunk, name) for name in ("rows", "empty_rows", "error", "malformed")}
    facts["counts"] = dataclasses.asdict(chunk.counts)
    partial = file.with_suffix(".partial")
    schema = SCHEMA.with_metadata({"facts": json.dumps(facts)})
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(chunk.batch.columns, schema=schema))
    partial.rename(file)


def _work(job: Path, number: int) -> None:
    """One process's chunks: ``first + number``, ``first + number + processes``, ..."""
    part, tokenizer, sha256, first, processes = pickle.loads(job.read_bytes())
    if tokenizer_sha256(tokenizer) != sha256:
        raise SystemExit("the tokenizer is another one here")
    template = resolve_template(part.section.template, tokenizer)
    row_tokenizer = part.tokenizer(Encoder(tokenizer), template)
    for place, chunk in enumerate(part.tokenize(row_tokenizer, first + number, processes)):
        _write(job.with_name(f"{first + number + place * processes}.arrow"), chunk)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
