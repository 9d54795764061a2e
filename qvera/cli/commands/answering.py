"""What a run answers: chat, generate."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import transformers

from qvera.cli.commands.common import console, quiet_libraries, require_new_file
from qvera.config.schema import DataSection
from qvera.data import ChatTemplate, Encoder, Turn, read_prompts, resolve_template
from qvera.evaluation.generate import generate as generate_texts
from qvera.evaluation.generate import generating
from qvera.evaluation.load import OpenRun, find_adapter, open_run, template_of


def chat(args: argparse.Namespace) -> None:
    """Qvera chat"""
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
    name = template_of(opened.recipe, opened.path) if opened.recipe is not None else "auto"
    return resolve_template(name, opened.base.tokenizer), Encoder(opened.base.tokenizer)


def _prompt_ids(template: ChatTemplate, encoder: Encoder, turns: list[Turn], tools: Any = None) -> list[int]:
    text, starts = template.prompt(turns, tools)
    return encoder.encode_prompt(text, starts)


def generate(args: argparse.Namespace) -> None:
    """Qvera generate"""
    quiet_libraries()
    require_new_file(args.out)
    recipe, _, _ = find_adapter(args.run)
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
