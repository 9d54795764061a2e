"""Memory of mapped rows: what is held a row does not depend on the row, and an epoch over all of them adds nothing to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

# In a process of its own, whose private memory (RssAnon) is this and nothing else. The rows are written without a
# tokenizer: 200
# tokens each, some of them trained, a prompt, a source.
SCRIPT = """
import json, re, sys
from pathlib import Path
import numpy as np, pyarrow as pa, torch
from qvera.data import Batches, Rows, collate
from qvera.data.rows import SCHEMA, write_table

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

file, count, epochs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tokens, made = 200, 2048

def batches():
    for first in range(0, count, made):
        n = min(made, count - first)
        ids = (np.arange(n * tokens, dtype=np.int32).reshape(n, tokens) + first) % 50_000
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * tokens)
        lists = lambda values: pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))
        numbers = np.arange(first, first + n)
        ids[:, 0] = numbers % 50_000
        ids[:, 1] = numbers // 50_000
        text = pa.array([f"rows.jsonl:{i}" for i in numbers])
        columns = [lists(ids), lists((ids % 2).astype(np.uint8)), lists(ids), text, text, text,
                   pa.array((ids % 2).sum(1).astype(np.int32)), *[pa.array(numbers.astype(np.uint64))] * 2]
        columns += [pa.nulls(n, field.type) for field in list(SCHEMA)[len(columns):]]
        yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)

write_table(batches(), file)
before = anonymous()
rows = Rows.open(file)
opened = anonymous() - before
batches = Batches(rows.lengths, 64, 8, seed=1)
seen = np.zeros(count, dtype=np.uint8)
highest = 0
for step in range(epochs * batches.per_epoch):
    if step % batches.per_epoch == 0:
        seen[:] = 0
    for part in batches.passes(batches.rows(step)):
        batch = collate([rows[i] for i in part], 0)
        found = (batch["input_ids"][:, 0] + 50_000 * batch["input_ids"][:, 1]).tolist()
        assert found == part  # each row is the one that was asked for
        seen[part] += 1
    if step % 256 == 0:
        highest = max(highest, anonymous() - before)
    if (step + 1) % batches.per_epoch == 0:
        assert (seen == 1).all()
del batch, found
before = anonymous()
some = min(count, 100_000)
copies = [(r.input_ids.copy(), r.trained.copy(), r.prompt_ids.copy()) for r in rows[:some]]
objects = anonymous() - before
print(json.dumps({"opened": opened, "highest": highest, "objects": objects, "file": file.stat().st_size}))
"""


def check(tmp_path: Path, count: int, epochs: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "rows.arrow"), str(count), str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = dict(json.loads(done.stdout.splitlines()[-1]))
    assert sizes["file"] > 1_500 * count
    # 24 bytes a row of lengths, counts and hashes; two epochs' order, 8 bytes a row each while it is drawn; and the
    # interpreter's own few MB, whatever the rows
    assert sizes["opened"] < 40 * count + 10_000_000
    assert sizes["highest"] < 100 * count + 40_000_000
    # the same rows as arrays of their own would be too much for that: the measure can fail
    assert sizes["objects"] > 1_500 * min(count, 100_000)
    print(f"{count:,} rows, {sizes}")


def test_an_epoch_takes_the_memory_of_its_order(tmp_path: Path) -> None:
    check(tmp_path, 50_000, 1)


@pytest.mark.slow
def test_a_million_rows(tmp_path: Path) -> None:
    check(tmp_path, 1_000_000, 1)
