"""`qvera chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qvera.cli.common import AdapterName, EvalPath, Seed, Temperature, TopP, console, progress, quiet_libraries


def chat(
    run: EvalPath,
    adapter: AdapterName = None,
    system: Annotated[str | None, typer.Option(help="A system prompt (default: the recipe's).")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to a trained run.

    /reset forgets the conversation, /quit or Ctrl-D ends it.

    Example:
        qvera chat runs/quickstart --temperature 0.7
    """
    quiet_libraries()

    import transformers

    from qvera.data import Turn
    from qvera.evaluation.generate import generate, generating
    from qvera.evaluation.load import open_run
    from qvera.evaluation.prompts import PromptWriter

    with progress(f"Loading {run}"):
        opened = open_run(run, adapter=not base, name=adapter)
    prompts = PromptWriter.of(opened)
    if system is None:
        system = prompts.system
    first = [Turn("system", system)] if system else []
    turns: list[Turn] = []
    console.print("Type a message; /reset forgets the conversation, /quit ends it.")
    with generating(opened.model):  # once for all messages
        while (text := _read_message()) is not None:
            if text.startswith("/"):
                if text != "/reset":
                    console.print(f"{text.split()[0]}: unknown command; expected /reset or /quit.", markup=False)
                turns = turns if text != "/reset" else []
                continue
            turns.append(Turn("user", text))
            streamer = transformers.TextStreamer(opened.base.tokenizer, skip_prompt=True, skip_special_tokens=True)
            (answer,) = generate(
                opened.model,
                opened.base.tokenizer,
                [prompts.ids(first + turns)],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed + len(turns),
                streamer=streamer,
            )
            turns.append(Turn("assistant", answer))


def _read_message() -> str | None:
    """The next line that is not empty; None: the conversation is over."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        if text.strip() in ("/quit", "/exit"):
            return None
        if text.strip():
            return text.strip() if text.strip().startswith("/") else text
