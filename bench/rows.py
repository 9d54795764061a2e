"""Rows by qvera's own readers, processes and cache, and by `datasets`: seconds and memory, cold and warm.

    python bench/rows.py [--short 60000] [--long 2000] [--rounds 2]

The work is the same everywhere: JSON Lines → checked conversations → ChatML → ids, mask and prompt of each row, as the
Arrow columns that training maps. Ways to do it:

- qvera: `build_datasets`, by one process and by two;
- datasets: ``load_dataset("json").map(batched=True, num_proc=…)``, which knows no line numbers;
- datasets, named rows: our reader's rows with file and line by ``Dataset.from_generator``, then the same ``map``.

Each case is a process of its own with an empty cache (cold), then once more with what that left (warm). Seconds are
those of the work, after imports; CPU seconds have those of child processes. Memory is the highest sum of RSS over the
process and its children, sampled every 20 ms, less what the process had after its imports. The best of all rounds is
kept: other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from bench.common import header, write_result

WORDS = (
    "red green blue order three small boxes deliver tomorrow street garden quickly window paper answer number".split()
)
CASES = [(way, processes) for way in ("qvera", "datasets", "datasets, named rows") for processes in (1, 2)]


def write_chats(path: Path, count: int, words: int) -> None:
    """``count`` conversations of one exchange, with some ``words`` words in each of its two turns."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(words // 2, words * 3 // 2))) for _ in range(2)]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
            turns[0]["content"] = f"{number}: {turns[0]['content']}"
            out.write(json.dumps({"messages": turns}) + "\n")


def tokenizer_in(directory: Path) -> Any:
    """A byte-level BPE tokenizer of a few thousand tokens, made once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    file = directory / "tokenizer.json"
    if not file.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet)
        tokenizer.train_from_iterator([" ".join(WORDS), "system user assistant"] * 9, trainer)
        tokenizer.save(str(file))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<s>", eos_token="</s>", pad_token="</s>")


class Highest:
    """The highest RSS of this process and its children since it was made, less what there was then."""

    def __init__(self) -> None:
        self._process, self._stop, self._before = psutil.Process(), threading.Event(), 0
        self._before = self._highest = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _now(self) -> int:
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:  # ended meanwhile
                continue
        return total

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._highest = max(self._highest, self._now())

    def end(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._highest - self._before


def by_qvera(args: argparse.Namespace, tokenizer: Any) -> tuple[int, int]:
    from qvera.config.sections import DataSection
    from qvera.data import build_datasets

    section = DataSection(path=args.file, template="chatml", max_length=100_000, tokenize_processes=args.processes)
    data = build_datasets(section, tokenizer)
    return len(data.train), data.stats.tokens


def by_datasets(args: argparse.Namespace, tokenizer: Any) -> tuple[int, int]:
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    from qvera.config.sections import DataSection
    from qvera.data import Encoder, resolve_template
    from qvera.data.detect import detect_format
    from qvera.data.readers import RawRow, read_rows
    from qvera.data.tokenization import RowTokenizer

    datasets.disable_progress_bars()
    section = DataSection(path=args.file, template="chatml", max_length=100_000)
    if args.way == "datasets":
        rows = datasets.load_dataset("json", data_files=args.file, split="train")
    else:

        def named(file: str) -> Any:
            for row in read_rows(file):
                yield {**row.fields, "source": row.source}

        rows = datasets.Dataset.from_generator(named, gen_kwargs={"file": args.file})
    format = detect_format(RawRow({k: v for k, v in rows[0].items() if k != "source"}, ""))
    work = RowTokenizer(section, Encoder(tokenizer), resolve_template("chatml", tokenizer), format)

    def tokenize(table: pa.Table, numbers: list[int]) -> pa.Table:
        read = table.to_pylist()
        sources = [row.pop("source", f"{args.file} row {number}") for row, number in zip(read, numbers, strict=True)]
        chunk = work.tokenize_chunk([RawRow(*each) for each in zip(read, sources, strict=True)])
        return pa.Table.from_batches([chunk.batch])

    made = rows.with_format("arrow").map(
        tokenize,
        with_indices=True,
        batched=True,
        batch_size=256,
        num_proc=args.processes if args.processes > 1 else None,
        remove_columns=rows.column_names,
    )
    return len(made), int(pc.sum(pc.list_value_length(made.data.column("input_ids"))).as_py())


def case(args: argparse.Namespace) -> None:
    """One measurement, in a process of its own; prints JSON."""
    import qvera.data  # noqa: F401  # imports are not measured

    if args.way != "qvera":
        import datasets  # noqa: F401

    tokenizer = tokenizer_in(Path(args.directory))
    highest, began, used = Highest(), time.perf_counter(), os.times()
    rows, tokens = (by_qvera if args.way == "qvera" else by_datasets)(args, tokenizer)
    seconds, now = time.perf_counter() - began, os.times()
    cpu = sum(now[:4]) - sum(used[:4])
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "bytes": highest.end(), "rows": rows, "tokens": tokens}))


def measure(directory: Path, file: Path, way: str, processes: int) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=directory) as cache:
        command = [sys.executable, __file__, "--case", way, "--processes", str(processes)]
        command += ["--file", str(file), "--directory", str(directory)]
        places = {"QVERA_CACHE": f"{cache}/qvera", "HF_DATASETS_CACHE": f"{cache}/datasets", "HF_HUB_OFFLINE": "1"}
        found = {}
        for state in ("cold", "warm"):
            done = subprocess.run(
                command,
                env={**os.environ, **places},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            )
            found[state] = dict(json.loads(done.stdout.splitlines()[-1]))
        found["kept"] = {"bytes": sum(f.stat().st_size for f in Path(cache).rglob("*") if f.is_file())}
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", type=int, default=60_000)
    parser.add_argument("--long", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=2)
    for name in ("--case", "--file", "--directory"):
        parser.add_argument(name, dest="way" if name == "--case" else None)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    if args.way is not None:
        return case(args)
    import datasets

    document: dict[str, Any] = {**header(), "datasets": datasets.__version__, "sets": {}}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer_in(directory)
        for kind, count, words in (("short", args.short, 20), ("long", args.long, 1000)):
            file = directory / f"{kind}.jsonl"
            write_chats(file, count, words)
            best: dict[str, Any] = {}
            for _ in range(args.rounds):
                for way, processes in CASES:
                    label = f"{way}, {processes} process{'es' if processes > 1 else ''}"
                    for state, figures in measure(directory, file, way, processes).items():
                        kept = best.setdefault(label, {}).setdefault(state, figures)
                        kept.update({key: min(value, kept[key]) for key, value in figures.items()})
                    print(kind, label, best[label], file=sys.stderr, flush=True)
            assert len({(b["cold"]["rows"], b["cold"]["tokens"]) for b in best.values()}) == 1, "not the same work"
            document["sets"][kind] = {"rows": count, "source_bytes": file.stat().st_size, **best}
    print(write_result("rows", document))


if __name__ == "__main__":
    main()
