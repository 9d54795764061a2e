"""`qvera chat`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from qvera.cli.common import AdapterName, RunOrServer, Seed, Temperature, TopP, console, progress, quiet_libraries

if TYPE_CHECKING:
    from qvera.data import Turn

    Answer: TypeAlias = Callable[[list[Turn], int], str]


def chat(
    run: RunOrServer,
    adapter: AdapterName = None,
    system: Annotated[str | None, typer.Option(help="A system prompt (default: the recipe's).")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model without the adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to a trained run, or to a server.

    /reset forgets the conversation, /quit or Ctrl-D ends it. With the http:// address of a server its key is taken from
    QVERA_API_KEY.

    Example:
        qvera chat runs/quickstart --temperature 0.7
    """
    from qvera.data import Turn
    from qvera.serve.client import server_url

    sampling = {"temperature": temperature, "top_p": top_p}
    url = server_url(run)
    if url is not None:
        first = [Turn("system", system)] if system else []
        _talk(first, seed, _server_answers(url, adapter, base, {**sampling, "max_tokens": max_new_tokens}))
        return
    with _local_answers(run, adapter, base, system, {**sampling, "max_new_tokens": max_new_tokens}) as (first, answer):
        _talk(first, seed, answer)


@contextlib.contextmanager
def _local_answers(
    run: Path, adapter: str | None, base: bool, system: str | None, settings: dict[str, Any]
) -> Iterator[tuple[list[Turn], Answer]]:
    """The turns that stand before a conversation, and a function that answers one and prints the answer as it comes."""
    quiet_libraries()

    import transformers

    from qvera.data import Turn
    from qvera.evaluation.generate import PromptWriter, generate, generating
    from qvera.evaluation.load import find_target, open_target, require_answers

    with progress(f"Loading {run}"):
        target = find_target(run, name=adapter, needs_name=not base)
        require_answers(target, "qvera chat")
        opened = open_target(target, adapter=not base)
    prompts, tokenizer = PromptWriter.of(opened), opened.base.tokenizer

    def answer(turns: list[Turn], seed: int) -> str:
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = prompts.ids(turns)
        (text,) = generate(opened.model, tokenizer, [ids], seed=seed, streamer=streamer, **settings)
        return text

    system = prompts.system if system is None else system
    with generating(opened.model):  # once for all messages
        yield [Turn("system", system)] if system else [], answer


def _server_answers(url: str, adapter: str | None, base: bool, settings: dict[str, Any]) -> Answer:
    """A function that has a server answer a conversation and prints the answer as it comes."""
    from qvera.serve.client import ServerClient

    client = ServerClient.at(url)
    model = client.pick_models([adapter], base)[adapter]

    def answer(turns: list[Turn], seed: int) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text = client.chat(model, messages, lambda piece: print(piece, end="", flush=True), seed=seed, **settings)
        print()
        return text

    return answer


def _talk(first: list[Turn], seed: int, answer: Answer) -> None:
    from qvera.data import Turn

    turns: list[Turn] = []
    console.print("Type a message; /reset forgets the conversation, /quit ends it.")
    while (text := _read_message()) is not None:
        if text.startswith("/"):
            if text != "/reset":
                console.print(f"{text.split()[0]}: unknown command; expected /reset or /quit.", markup=False)
            turns = turns if text != "/reset" else []
            continue
        turns.append(Turn("user", text))
        turns.append(Turn("assistant", answer(first + turns, seed + len(turns))))


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
