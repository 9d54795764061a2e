"""What a run answers: chat, generate, eval."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import transformers

from .. import evaluate
from ..data import NAMED_TEMPLATES, ChatTemplate, Encoder, Turn, build_datasets, read_prompts, resolve_template
from ..errors import InputError
from ..generate import generate as generate_texts
from ..generate import generating
from ..recipe import DataSection
from ..run import OpenRun, locate, open_run
from .common import console, quiet_libraries, require_new_file


def chat(args: argparse.Namespace) -> None:
    """qvera chat"""
    quiet_libraries()
    with console.status(f"Loading {args.run}"):
        opened = open_run(args.run, adapter=not args.base)
    template, encoder = _template(opened)
    system = args.system if args.system is not None else (opened.recipe.data.system if opened.recipe else None)
    console.print("Type a message; /reset forgets the conversation, /quit ends it.")
    with generating(opened.model):  # once for all messages
        _converse(args, opened, template, encoder, system)


def _converse(
    args: argparse.Namespace, opened: OpenRun, template: ChatTemplate, encoder: Encoder, system: str | None
) -> None:
    turns: list[Turn] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.strip() in ("/quit", "/exit"):
            return
        if text.strip() == "/reset":
            turns.clear()
            continue
        if not text.strip():
            continue
        turns.append(Turn("user", text))
        ids = _prompt_ids(template, encoder, _with_system(turns, system))
        streamer = transformers.TextStreamer(opened.base.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (answer,) = generate_texts(
            opened.model,
            opened.base.tokenizer,
            [ids],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed + len(turns),
            streamer=streamer,
        )
        turns.append(Turn("assistant", answer))


def _with_system(turns: list[Turn], system: str | None) -> list[Turn]:
    return [Turn("system", system), *turns] if system else turns


def _template(opened: OpenRun) -> tuple[ChatTemplate, Encoder]:
    """The template that the run was trained with (run.json says which one ``auto`` was), and the tokenizer's encoder."""
    name = opened.recipe.data.template if opened.recipe is not None else "auto"
    summary = opened.path / "run.json"
    if name == "auto" and summary.is_file():
        used = json.loads(summary.read_text(encoding="utf-8")).get("data", {}).get("template")
        name = used if used in NAMED_TEMPLATES else name
    return resolve_template(name, opened.base.tokenizer), Encoder(opened.base.tokenizer)


def _prompt_ids(template: ChatTemplate, encoder: Encoder, turns: list[Turn], tools: Any = None) -> list[int]:
    text, starts = template.prompt(turns, tools)
    return encoder.encode_prompt(text, starts)


def generate(args: argparse.Namespace) -> None:
    """qvera generate"""
    quiet_libraries()
    require_new_file(args.out)
    recipe, _, _ = locate(args.run)
    data = recipe.data if recipe is not None else DataSection(path=str(args.prompts))
    rows = read_prompts(args.prompts, data)
    with console.status(f"Loading {args.run}"):
        opened = open_run(args.run, adapter=not args.base)
    template, encoder = _template(opened)
    prompts = [_prompt_ids(template, encoder, row.turns, row.tools) for row in rows]
    with console.status("Answering") as status:
        answers = generate_texts(
            opened.model,
            opened.base.tokenizer,
            prompts,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            progress=lambda done: status.update(f"Answering: {done} of {len(prompts)}"),
        )
    unfinished = args.out.with_name(f".{args.out.name}.partial")
    with open(unfinished, "w", encoding="utf-8") as handle:
        for row, answer in zip(rows, answers, strict=True):
            line = {"source": row.source, "prompt": row.turns[-1].content, "answer": answer}
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished.replace(args.out)
    print(f"{len(answers)} answers in {args.out}")


def eval(args: argparse.Namespace) -> None:  # noqa: A001  # the command's name
    """qvera eval"""
    quiet_libraries()
    recipe, _, _ = locate(args.run)
    if recipe is None:
        raise InputError(f"{args.run}: is an adapter directory; `qvera eval` needs a run, whose recipe names the data.")
    if args.json is not None:
        require_new_file(args.json)
    section = recipe.data
    if args.data is not None:
        section = dataclasses.replace(section, path=args.data, eval_path=None, eval_fraction=0.0, limit=args.rows)
    elif not (section.eval_path or section.eval_fraction):
        raise InputError(f"{args.run}: its recipe holds out no rows; name a file with --data.")
    with console.status(f"Loading {args.run}"):
        opened = open_run(args.run, adapter=not args.base)
    datasets = build_datasets(section, opened.base.tokenizer, console)
    rows = (datasets.train if args.data is not None else datasets.eval)[: args.rows]
    with console.status("Held-out loss") as status:
        scores = evaluate.held_out_loss(
            opened.model,
            rows,
            pad_id=datasets.pad_id,
            batch_size=recipe.training.per_device_eval_batch_size,
            chunk_tokens=recipe.training.loss_chunk_tokens,
            progress=lambda done: status.update(f"Held-out loss: {done} of {len(rows)} rows"),
        )
    answers: list[dict[str, Any]] = []
    if not args.no_generation:
        with console.status("Answering") as status:
            answers = evaluate.answer_rows(
                opened.model,
                opened.base.tokenizer,
                rows,
                max_new_tokens=args.max_new_tokens or recipe.training.sample_max_new_tokens,
                progress=lambda done: status.update(f"Answering: {done} of {len(rows)} rows"),
            )
        judged = [a for a in answers if a["exact"] is not None]
        if judged:
            scores["exact_match"] = sum(a["exact"] for a in judged) / len(judged)
            scores["exact_match_rows"] = len(judged)
    if args.json is not None:
        args.json.write_text(
            json.dumps({"scores": scores, "answers": answers}, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    for name, value in scores.items():
        print(f"{name:<17}{value:.4f}" if isinstance(value, float) else f"{name:<17}{value:,}")
