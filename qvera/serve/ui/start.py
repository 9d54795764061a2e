"""What the form of `qvera ui --train` starts: qvera's own commands, as processes. So checks and messages are theirs."""

import contextlib
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from qvera.config.schema import yaml_text
from qvera.serve.ui.directories import RunDirectories, unreadable
from qvera.utils.errors import InputError
from qvera.utils.files import RUN_OWNER, RUN_PROGRESS, replace_text, try_read_json

_WAIT_SECONDS = 600.0  # a call waits at most this long for what it has started
FIELDS = (
    ("name", "Name", "of the run, and of its recipe", ()),
    ("model", "Base model", "a directory on this machine, or a hub id", ()),
    ("data", "Rows", "a file or directory on this machine, or a hub id", ()),
    ("task", "Task", "of a classifier", ("", "sequence-classification", "image-classification")),
    ("objective", "Objective", "for preferences", ("", "dpo", "orpo", "kto")),
    ("prompt-column", "Prompt column", "where its name is unusual; of a classifier the text or image", ()),
    ("answer-column", "Answer column", "the same; of a classifier the label", ()),
    ("system", "System prompt", "for all rows; may be empty", ()),
    ("eval-data", "Held-out rows", "empty: some of the rows", ()),
)
"""Name of the run, then options of `qvera init`, each with title, hint and choices. The first three are required."""


class Starter:
    """Writes the recipe PLACE/NAME.yaml of a run PLACE/NAME, and starts and stops what is done with it."""

    def __init__(self, place: Path, directories: RunDirectories) -> None:
        self.place, self.key = place, secrets.token_urlsafe(32)
        self._directories, self._logs = directories, tempfile.TemporaryDirectory()
        self._processes: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
            # processes inherit that it is ignored, and could not be stopped; a handler they do not inherit
            signal.signal(signal.SIGINT, lambda *_: None)

    def recipe(self, name: str) -> Path:
        """Return the path of a run's recipe.

        Raises InputError if the name can't be that of a run here, or the file is a link.
        """
        if not re.fullmatch(r"\w[\w-]{0,99}", name, re.ASCII):
            raise InputError("Name: expected letters, digits, `_` and `-`, at most 100 of them.")
        if odd := unreadable(self.place, f"{name}.yaml"):
            raise InputError(" ".join(odd))
        return self.place / f"{name}.yaml"

    def id_of(self, name: str) -> str | None:
        """Return the id of a run; None: it is not listed."""
        run_dir = (self.place / name).resolve()
        return next((id for id, directory in self._directories.find().items() if directory == run_dir), None)

    def init(self, name: str, values: Mapping[str, str]) -> bool:
        """Run `qvera init`. Returns whether it has written the recipe."""
        if (self.place / name).exists():
            raise InputError(f"Name: {self.place / name} is there already. Take another name.")
        given = [f"--{option}={value}" for option, *_ in FIELDS[1:] if (value := values.get(option, "").strip())]
        self._start(name, "init", str(self.recipe(name)), *given)
        return self._processes[name, "init"].poll() == 0

    def act(self, name: str, do: str, text: str) -> None:
        """Do what a button of a recipe's page is for. ``text`` is the recipe as edited there."""
        recipe, run_dir, command = self.recipe(name), self.place / name, do.removeprefix("stop-")
        if do in ("plan", "train", "resume"):
            self._require_idle(name, "plan" if do == "plan" else "train")  # before the recipe is replaced
            replace_text(recipe, text.replace("\r\n", "\n"))  # as forms send them
        if do == "plan":
            self._start(name, do, str(recipe))
        elif do in ("train", "resume"):
            given = ["--set", f"training.output_dir={yaml_text(str(run_dir))}", *["--resume"] * (do == "resume")]
            self._start(name, "train", str(recipe), *given, until=lambda: self._reads_rows(name))
        elif do == "serve":
            self._start(name, do, str(run_dir), "--port", "0", until=lambda: self.chat_url(name))
        elif self.is_running(name, command):  # as Ctrl-C does in a terminal
            os.killpg(self._processes[name, command].pid, signal.SIGINT)

    def chat_url(self, name: str) -> str:
        """Return the address of the page that a run's server has; empty without a server."""
        found = re.search(r"at (http://127\.0\.0\.1:\d+)/v1\b", self.output(name, "serve"))
        return found[1] if found and self.is_running(name, "serve") else ""

    def has_trained(self, name: str) -> bool:
        """Whether a training of this name was started here."""
        return (name, "train") in self._processes

    def is_running(self, name: str, command: str) -> bool:
        """Whether a process that was started here has not ended."""
        process = self._processes.get((name, command))
        return process is not None and process.poll() is None

    def await_end(self, name: str) -> None:
        """Wait for the last words of a training whose run has ended."""
        with contextlib.suppress(KeyError, subprocess.TimeoutExpired):
            self._processes[name, "train"].wait(10.0)

    def output(self, name: str, command: str) -> str:
        """The command line that was started last, and the end of what it has printed; empty without one."""
        log = Path(self._logs.name, f"{name}.{command}")
        line, _, said = log.read_text("utf-8", "replace").partition("\n") if log.exists() else ("", "", "")
        return f"{line}\n{said[-8192:]}".strip()

    def close(self) -> None:
        """End the servers. Trainings go on."""
        for name in [name for name, command in self._processes if command == "serve"]:
            self.act(name, "stop-serve", "")

    def _reads_rows(self, name: str) -> bool:
        """Whether the training that was started last has passed the checks of its recipe and directory."""
        owner, progress = self.place / name / RUN_OWNER, self.place / name / RUN_PROGRESS
        with contextlib.suppress(OSError):
            # a killed run has left both; the owner is written before the checks
            is_own = (try_read_json(owner) or {}).get("pid") == self._processes[name, "train"].pid
            is_new = progress.stat().st_mtime_ns >= owner.stat().st_mtime_ns
            return is_own and is_new and self.id_of(name) is not None
        return False

    def _require_idle(self, name: str, command: str) -> None:
        if self.is_running(name, command):
            raise InputError(f"`qvera {command}` of {name} is running.")

    def _start(self, name: str, *arguments: str, until: Callable[[], object] = lambda: False) -> None:
        """Start a command of qvera. Returns when it has ended, or ``until`` is true."""
        self._require_idle(name, arguments[0])
        with open(Path(self._logs.name, f"{name}.{arguments[0]}"), "wb") as log:
            log.write(f"$ {shlex.join(['qvera', *arguments])}\n".encode())
            log.flush()
            # -P: a file in the working directory must not stand in for a module
            process = self._processes[name, arguments[0]] = subprocess.Popen(
                [sys.executable, "-P", "-m", "qvera", *arguments],
                env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the server's Ctrl-C ends no training
            )
        end = time.monotonic() + _WAIT_SECONDS
        while process.poll() is None and not until() and time.monotonic() < end:
            time.sleep(0.1)
