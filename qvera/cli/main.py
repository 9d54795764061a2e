"""The command line. Each command is a file in this folder, with its options, help, example and action.

Modules are imported where an action needs them, so `--help` starts in a moment.
"""

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qvera.cli import cache, doctor, eval, export, generate, info, quickstart, recipes, serve, train
from qvera.cli.common import Command, UsageError, command_streams, flag, help_of, report, with_exit_code
from qvera.config import plugins
from qvera.utils.cores import fitting_threads
from qvera.utils.errors import EXIT_DONE
from qvera.utils.post_import import around_import

PANELS: dict[str, tuple[Callable[..., int | None], ...]] = {
    "Train": (quickstart.quickstart, recipes.init, recipes.preview, recipes.plan, train.train, train.launch),
    "Look": (eval.evaluate, info.compare, eval.harness, info.info, serve.ui),
    "Use": (generate.chat, generate.generate, serve.serve),
    "Share": (export.export, export.merge_adapters, export.card, export.push),
    "Setup": (doctor.doctor, recipes.schema),
    "Bases": (cache.quantize,),
}


class CommandsByPanel(TyperGroup):
    """`qvera --help`: all commands in groups, on one screen of 80 columns."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """A line for each command; the first of a group begins with the group's name."""
        lines, last = ["qvera [--traceback] COMMAND [...]. Exit codes: 1 failed, 2 bad input, 75 saved"], ""
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            assert command is not None
            panel = getattr(command, "rich_help_panel", None) or last
            summary = (command.help or "").partition("\n")[0]
            lines.append(f"{panel if panel != last else '':<6} {name:<15} {summary}")
            last = panel
        formatter.write("\n".join(lines))


@functools.cache  # it reads the annotations of every option
def build_app() -> Any:
    """All commands, in the groups of `qvera --help`, as typer's group of them."""
    app = typer.Typer(cls=CommandsByPanel, pretty_exceptions_enable=False)
    tracebacks = [False]

    @app.callback(invoke_without_command=True)
    def qvera(
        ctx: typer.Context,
        version: Annotated[bool, flag("--version", "Print versions.")] = False,
        traceback: Annotated[bool, flag("--traceback", "Show the Python traceback of an error.")] = False,
        local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
    ) -> None:
        """Fine-tune Llama models in 4-bit with VeRA."""
        tracebacks[0] = traceback  # local_rank: DeepSpeed's launcher puts it here; the environment has it too
        if version:
            from qvera.utils.files import versions

            print("\n".join(f"{name} {number}" for name, number in versions().items()))
            raise typer.Exit
        if ctx.invoked_subcommand is None:
            print(ctx.get_help())

    def add(to: typer.Typer, function: Callable[..., int | None], panel: str | None, command: str = "") -> None:
        name = "eval" if function is eval.evaluate else function.__name__.replace("_", "-")
        text, example = help_of(function)
        to.command(
            name,
            help=text,
            epilog=f"Example: {example}",
            rich_help_panel=panel,
            cls=export.Weights if function is export.merge_adapters else Command,
        )(with_exit_code(command or name, function, lambda: tracebacks[0]))

    for panel, functions in PANELS.items():
        for function in (*functions, *(plugins.load_all("qvera.commands") if panel == "Look" else ())):
            add(app, function, panel)
    cached = typer.Typer(help="List, verify and remove what qvera keeps in its cache.")
    for function in (cache.ls, cache.rm, cache.verify):
        add(cached, function, None, "cache")
    app.add_typer(cached, name="cache", rich_help_panel=panel)
    return typer.main.get_command(app)


_INSTEAD = {
    "report": "`qvera train` writes report.html into each run, and `qvera ui` shows runs",
    "ls": "`qvera ui` shows runs, `qvera info` one of them",
    "list": "`qvera ui` shows runs, `qvera info` one of them",
    "pull": "A command that takes a run takes USER/NAME of the hub too, and fetches it",
    "download": "A command that takes a run takes USER/NAME of the hub too, and fetches it",
    "login": "The hub's token is stored by `hf auth login`",
}
"""A command that other tools have → what to do here."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 wrong input, 75 interrupted and saved."""
    # Torch reads this when it is imported: its GPU allocator (Linux only) grows segments, so batches of many lengths do
    # not fragment memory. The user's own setting stays, under torch 2.9's name or an older one.
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if "torch" not in sys.modules:
        around_import("torch", fitting_threads)
    with command_streams():
        return _run(arguments)


def _run(arguments: list[str] | None) -> int:
    try:
        code = build_app().main(args=arguments, prog_name="qvera", standalone_mode=False) or EXIT_DONE
        if code == EXIT_DONE:
            sys.stdout.flush()
    except UsageError as error:
        at = getattr(error, "ctx", None)
        command = at.command_path if at is not None else "qvera"
        text = error.format_message().replace("Value error, ", "")  # pydantic's
        for name, instead in _INSTEAD.items() if command == "qvera" else ():
            if f"No such command {name!r}" in text:
                text = f"No such command {name!r}. {instead}"
        takes_keys = at is not None and any("--set" in param.opts for param in at.command.params)
        if "No such option" in text and takes_keys:
            text += ". A key of the recipe goes to --set, as in --set training.num_train_epochs=3"
        key = re.search(r"unexpected extra argument.*?\((\w+\.\w+=[^\s)]*)", text)
        if "unexpected extra argument" in text and "--set" in (arguments or sys.argv):
            text += ". Each key takes its own --set, and a value with spaces quotes: --set 'a.b={c: d}'"
        elif key is not None and takes_keys:
            text += f". A key of the recipe goes to --set: --set {key[1]}"
        elif "unexpected extra argument" in text and "--metrics" in (arguments or sys.argv):
            text += ". Metrics are one list: --metrics exact,bleu"
        end = "" if text.endswith((".", "?")) else "."
        print(f"{command}: {text}{end} `{command} --help` shows what it takes.", file=sys.stderr)
        code = error.exit_code
    except SystemExit as ended:  # typer's, of --install-completion and of what a shell asks
        if not isinstance(ended.code, int):
            raise
        code = ended.code
    except typer.Abort:  # Ctrl-C at a question
        code = report("", KeyboardInterrupt())
    except (KeyboardInterrupt, OSError) as error:  # before a command, or of a text that none prints: help, versions
        code = report("", error)
    if "RANK" in os.environ:  # one of several processes
        from qvera.distributed.launch import leave_exit_code
        from qvera.distributed.processes import end_if_stuck

        leave_exit_code(code)
        end_if_stuck(code)
    return code
