"""`qvera generate` and `qvera chat`: answers of a run, or of a server."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from filelock import FileLock, Timeout

from qvera.cli.common import (
    AdapterName,
    AdapterNames,
    RunOrServer,
    Seed,
    Temperature,
    TopP,
    argument,
    check_target,
    console,
    flag,
    number,
    option,
    progress,
    require_new_file,
    say,
)
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError, Interrupted, QveraError
from qvera.utils.files import disk_errors, file_stamp, refuse_file_name, replace_text
from qvera.utils.formatting import shortened
from qvera.utils.signals import in_threads

if TYPE_CHECKING:
    from qvera.data import Turn
    from qvera.data.conversations import Conversation
    from qvera.evaluation.load import Artifact
    from qvera.serve.client import ServerClient

    Answer: TypeAlias = Callable[[list[Turn], int], str]


def generate(
    run: RunOrServer,
    adapters: AdapterNames,
    prompts: Annotated[Path | None, argument("PROMPTS", "A file of rows, or .txt: one prompt a line.")] = None,
    prompt: Annotated[list[str] | None, option("TEXT", "A prompt, in place of a file (repeatable).")] = None,
    out: Annotated[Path | None, option("FILE", "JSONL file to write; must not exist. Default: print.")] = None,
    base: Annotated[bool, flag("--base", "Answer with the base model, without the adapter.")] = False,
    batch_size: Annotated[int, number("Prompts at a time.")] = 16,
    max_new_tokens: Annotated[int, number("Longest answer, in tokens; the model's context ends it too.")] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    image: Annotated[list[str] | None, option("FILE", "An image in front of each --prompt (repeatable).")] = None,
    system: Annotated[str | None, option("TEXT", "For prompts without a system turn (default: the recipe's).")] = None,
) -> None:
    """Answer the prompts of a file in batches.

    PROMPTS: .jsonl, .json, .csv or .parquet rows as for training (a last assistant turn is ignored), or .txt. Each
    output line has source, prompt, answer, and can be a row of a training: a prompt of several turns, such as one with
    a system prompt, is a list of messages.

    A run that trained many adapters answers with several in one batch. Each row names its adapter in the column that
    trained them (data.adapter_column), or in a column called adapter. Or --adapter, once for each, answers every prompt
    with each of them. The output lines then have adapter too.

    With --out, answers are kept in .FILE.unfinished beside it as they come. After Ctrl-C, a kill or a full disk, the
    same command goes on from them; what it still samples is drawn anew.

    With the http:// address of a server in place of a run, the server answers, --batch-size prompts at a time. Its key
    is taken from QVERA_API_KEY.

    Example:
        qvera generate runs/quickstart prompts.txt --out answers.jsonl
    """
    require_new_file(out, ".jsonl")
    if (prompts is None) == (not prompt):
        raise InputError("takes a file PROMPTS, or --prompt TEXT; give one of them.")
    if prompts is not None and len(str(prompts).split()) > 1 and not os.path.exists(prompts):  # which takes any length
        raise InputError(
            f"{shortened(str(prompts))!r}: no such file. Expected one of rows, or .txt with one prompt a line. "
            "A prompt itself goes to --prompt."
        )
    if not image and not all(text.strip() for text in prompt or ()):
        raise InputError("--prompt: is empty, so there is nothing to answer.")
    if image and prompts is not None:
        raise InputError("--image: goes with --prompt; a file of prompts has images in its rows.")
    for text in prompt or ():
        refuse_file_name(text, "--prompt")

    from qvera.data.conversations import read_messages
    from qvera.serve.client import ServerClient, server_url

    asked: list[Turn] = []
    images = [{"type": "image", "image": file} for file in image or ()]
    for text in prompt or ():
        asked += read_messages([{"role": "user", "content": [*images, {"type": "text", "text": text}]}], "--prompt")

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    weights: list[list[int]] = []
    if (url := server_url(run)) is not None:
        questions = _questions(None, prompts, asked, adapters, system, many=not base)
        client = ServerClient.at(url)
        named: dict[str | None, str] = {}
        for row, name in questions:
            named.setdefault(name, "--adapter" if adapters else row.source)
        models = client.pick_models(named, base)
        asked_of = [(row, models[name]) for row, name in questions]
        questions = [(row, None if base else model) for row, model in asked_of]
    else:
        check_target(run, *adapters)

        from qvera.api import load
        from qvera.evaluation.load import find_target, require_answers
        from qvera.evaluation.named_adapters import adapters_root, named_directories, require_all_named

        root = None if base else adapters_root(run)
        target = find_target(run, name=adapters[0] if adapters else None, needs_name=False)
        require_answers(target, "qvera generate")
        questions = _questions(target, prompts, asked, adapters, system, many=root is not None)
        names = list(dict.fromkeys(name for _, name in questions if name is not None))
        places = [target.adapter or target.path]
        if root is not None:
            in_rows = {name: row.source for row, name in reversed(questions) if name is not None and not adapters}
            require_all_named(run, names, in_rows)  # before a big model is loaded
            directories = named_directories(root)
            places = [directories[name] for name in names]
        weights = [file_stamp(file.stat()) for place in places for file in sorted(place.glob("*.safetensors"))]
        model = load(run, names[0] if len(names) == 1 else names or None, base=base, console=console)

    depends_on = [str(run), weights, base, max_new_tokens, sampling, seed, questions]
    with _alone(out):
        answers = KeptAnswers(out, depends_on, len(questions))
        left = answers.left()
        if answers.found:
            say(f"{answers.said()}: going on.")

        def keep(place: int, answer: str) -> None:
            answers.add(left[place], answer)

        try:
            if url is not None:
                settings = {**sampling, "max_tokens": max_new_tokens, "seed": seed}
                _ask_server(client, [asked_of[number] for number in left], batch_size, settings, keep)
            elif left:
                model.generate(
                    [questions[number][0] for number in left],
                    adapter=None if root is None else [questions[number][1] for number in left],
                    max_new_tokens=max_new_tokens,
                    seed=(seed + len(answers.found)) % 2**64,  # what was drawn for others is not drawn again
                    batch_size=batch_size,
                    on_answer=keep,
                    **sampling,
                )
        except KeyboardInterrupt:
            raise answers.interrupted() from None
        if out is not None:
            lines = [
                {
                    "source": row.source,
                    **({"adapter": name} if name else {}),
                    **_as_row(row),
                    "answer": answers.found[number],
                }
                for number, (row, name) in enumerate(questions)
            ]
            answers.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            print(f"{len(lines)} answers in {out}")
            return
        several, last = len({row.source for row, _ in questions}) > 1, None
        for place, (row, name) in enumerate(questions):
            # each after its adapter's name, if it has one; prompts too where there are several
            if several and row.source != last:
                last = row.source
                print(f"> {row.turns[-1].text}")
            print(f"{shown_name(name)}: {answers.found[place]}" if name else answers.found[place])


def _as_row(row: Conversation) -> dict[str, Any]:
    """A prompt as a row's ``prompt``: its text, or a list of messages where there are turns before it or images."""
    first, *more = row.turns
    messages = [{"role": turn.role, "content": _content(turn, _in_row), **turn.extra} for turn in row.turns]
    prompt = messages if more or first.images else first.text
    return {"prompt": prompt, "tools": row.tools} if row.tools else {"prompt": prompt}


def _content(turn: Turn, part_of: Callable[[str | bytes], dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content of a turn for messages; ``part_of`` makes the part of an image."""
    images = iter(turn.images)
    return [each if each["type"] == "text" else part_of(next(images)) for each in turn.parts] or turn.text


def _in_row(image: str | bytes) -> dict[str, Any]:
    return {"type": "image", "image": image} if isinstance(image, str) else _as_url(image)


def _as_url(image: str | bytes) -> dict[str, Any]:
    content = Path(image).read_bytes() if isinstance(image, str) else image
    return {"type": "image_url", "image_url": {"url": f"data:image;base64,{base64.b64encode(content).decode()}"}}


def _ask_server(
    client: ServerClient,
    asked: Sequence[tuple[Conversation, str]],
    at_a_time: int,
    settings: dict[str, Any],
    on_answer: Callable[[int, str], None],
) -> None:
    """Ask each model its question; ``on_answer`` gets the question's place and the answer. A failure ends all."""

    def answer(question: tuple[Conversation, str]) -> str:
        row, model = question
        if row.tools or any("tool_calls" in turn.extra or turn.role == "tool" for turn in row.turns):
            raise InputError(f"{row.source}: has tools or calls of tools, which a server does not take.")
        messages = [{"role": turn.role, "content": _content(turn, _as_url)} for turn in row.turns]
        return client.chat(model, messages, **settings)

    with progress("answering", len(asked)) as show:
        for done, (place, text) in enumerate(in_threads(answer, asked, at_a_time), start=1):
            on_answer(place, text)
            show(done)


def _questions(
    target: Artifact | None,
    file: Path | None,
    asked: Sequence[Turn],
    names: Sequence[str],
    system: str | None,
    *,
    many: bool,
) -> list[tuple[Conversation, str | None]]:
    """The prompts, each with the adapter that answers it; None where there is only one.

    ``target`` is None for a server. Each of ``names`` (--adapter) answers every prompt; else the rows name their
    adapters. ``system`` (--system) is for prompts that have none, in place of the recipe's.
    """
    from qvera.config.sections import DataSection
    from qvera.data import Turn, read_prompts
    from qvera.data.conversations import Conversation
    from qvera.evaluation.named_adapters import require_named

    if target is not None and many and not names and (file is None or file.suffix.lower() == ".txt"):
        require_named(target.path, None)  # raises: nothing there names an adapter
    recipe = None if target is None else target.recipe
    section = DataSection(path=str(file)) if recipe is None else recipe.data
    section = section if system is None else section.replace(system=system)
    columns = [name for name in (section.adapter_column, "adapter") if name is not None]
    if file is not None:
        rows = read_prompts(file, section, columns if many and not names else ())
    else:
        before = [Turn("system", section.system)] if section.system else []
        rows = [Conversation([*before, turn], f"--prompt {number}") for number, turn in enumerate(asked, start=1)]
    if not many:
        return [(row, None) for row in rows]
    if names:
        return [(row, name) for row in rows for name in dict.fromkeys(names)]
    for row in rows:
        if row.owner is None and target is not None:
            raise InputError(
                f"{row.source}: names no adapter. Expected one in its column {' or '.join(map(repr, columns))}, or "
                "--adapter NAME for all rows."
            )
    return [(row, row.owner) for row in rows]


@contextlib.contextmanager
def _alone(out: Path | None) -> Iterator[None]:
    """Hold a file that answers go into. InputError where another process does, or has just written it."""
    if out is None:
        yield
        return
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{out}: another process answers into it. Wait for it, or name another file.") from None
    try:
        require_new_file(out)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


class KeptAnswers:
    """Answers by the number of their question, from 0, kept beside the file they are for until all are there.

    The first line of the hidden file is a hash of all that the answers depend on; each further one has a number and
    an answer, in the order in which they were finished. A kill may cut the last line off, which is then left out.

    Attributes:
        found: the answers so far.

    Args:
        out: the file that gets all answers; None: nothing is kept.
        asked: questions and settings, as something whose repr tells them.
        total: how many questions there are.

    Raises:
        InputError: what is kept was asked otherwise.
    """

    def __init__(self, out: Path | None, asked: object, total: int) -> None:
        self.found: dict[int, str] = {}
        self._out, self._total = out, total
        if out is None:
            return
        self._file = out.with_name(f".{out.name}.unfinished")
        self._first = json.dumps(hashlib.sha256(repr(asked).encode("utf-8", "surrogatepass")).hexdigest()) + "\n"
        if not self._file.exists():
            return
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.decode("ascii", "replace").splitlines(keepends=True) or [self._first]
        if first != self._first:
            raise InputError(
                f"{self._file}: holds answers to other prompts, or by another model or other settings, that were not "
                "finished. Delete it, or name another --out."
            )
        self.found = dict(map(json.loads, lines))
        os.truncate(self._file, len(whole))

    def left(self) -> list[int]:
        """The numbers of the questions without an answer."""
        return [number for number in range(self._total) if number not in self.found]

    def said(self) -> str:
        """How many answers are kept, and where."""
        return f"{len(self.found)} of {self._total} answers are in {self._file}"

    def add(self, number: int, answer: str) -> None:
        """Keep an answer. RunFailed: the disk is full; the others are kept."""
        if self._out is not None:
            line = json.dumps([number, answer]) + "\n"
            kept = f"{self.said()}: make room, and the same command goes on."
            with (
                disk_errors(str(self._out), kept),
                self._file.open("a" if self.found else "w", encoding="utf-8") as stream,
            ):
                stream.write(line if self.found else self._first + line)
        self.found[number] = answer

    def interrupted(self) -> Interrupted | KeyboardInterrupt:
        """What Ctrl-C raises."""
        if self._out is None or not self.found:
            return KeyboardInterrupt()
        return Interrupted(f"interrupted. {self.said()}: the same command goes on.")

    def write(self, text: str) -> None:
        """Write the file that all this is for, and remove what was kept. RunFailed: the disk is full."""
        assert self._out is not None
        with disk_errors(str(self._out), f"{self.said()}: make room, and the same command goes on."):
            replace_text(self._out, text)
        self._file.unlink(missing_ok=True)


def chat(
    run: RunOrServer,
    adapter: AdapterName = None,
    system: Annotated[str | None, option("TEXT", "A system prompt (default: the recipe's).")] = None,
    base: Annotated[bool, flag("--base", "Talk to the base model without the adapter.")] = False,
    max_new_tokens: Annotated[int, number("Longest answer, in tokens.")] = 512,
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
    from qvera.serve.client import ServerClient, server_url

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    if (url := server_url(run)) is not None:
        client = ServerClient.at(url)
        model = client.pick_models({adapter: "--adapter"}, base)[adapter]

        def answer_there(turns: list[Turn], seed: int) -> str:
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
            settings = {**sampling, "max_tokens": max_new_tokens, "seed": seed}
            text = client.chat(model, messages, lambda piece: print(piece, end="", flush=True), **settings)
            print()
            return text

        _talk([Turn("system", system)] if system else [], seed, answer_there)
        return
    check_target(run, adapter)

    import transformers

    from qvera.evaluation.generate import PromptWriter, generate, generating, require_context
    from qvera.evaluation.load import find_target, open_target, require_answers

    with progress(f"loading {run}"):
        target = find_target(run, name=adapter, needs_name=not base)
        require_answers(target, "qvera chat")
        opened = open_target(target, adapter=not base)
    prompts, tokenizer = PromptWriter.of(opened), opened.base.tokenizer

    def answer_here(turns: list[Turn], seed: int) -> str:
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings: dict[str, Any] = {**sampling, "max_new_tokens": max_new_tokens, "seed": seed, "streamer": streamer}
        ids = prompts.ids(turns)
        require_context(opened.model, [("the conversation", ids)])
        (text,) = generate(opened.model, tokenizer, [ids], **settings)
        return text

    system = prompts.system if system is None else system
    with generating(opened.model):  # once for all messages
        _talk([Turn("system", system)] if system else [], seed, answer_here)


def _talk(first: list[Turn], seed: int, answer: Answer) -> None:
    """Read messages until the end. ``answer`` takes the turns and a seed, and prints the answer that it returns."""
    from qvera.data import Turn

    turns: list[Turn] = []
    console.print("Type a message; /reset forgets the conversation, /quit ends it.")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        word = text.strip()
        if word in ("/quit", "/exit"):
            return
        if word == "/reset":
            turns = []
        elif word.startswith("/"):
            say(f"{word.split()[0]}: unknown command; expected /reset or /quit.")
        elif word:
            turns.append(Turn("user", text))
            try:
                turns.append(Turn("assistant", answer(first + turns, (seed + len(turns)) % 2**64)))
            except (QveraError, KeyboardInterrupt) as error:
                if not sys.stdin.isatty():
                    raise
                turns.pop()  # the conversation before it is kept
                stopped = "\nStopped: this message and its answer are forgotten. /quit ends the conversation."
                say(stopped if isinstance(error, KeyboardInterrupt) else str(error))
