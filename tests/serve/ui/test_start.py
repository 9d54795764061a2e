"""The form of `qvera ui --train`: the command line's own checks, a key, and a run that nothing but Stop ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.cli.main import main
from qvera.serve.ui import start
from qvera.serve.ui.app import create_app
from qvera.serve.ui.directories import RunDirectories
from qvera.utils.files import RUN_OWNER, RUN_PROGRESS
from tests.helpers import wait_until
from tests.serve.command import running
from tests.serve.ui.test_browser import WIDE


class Form:
    """A running `qvera ui --train`."""

    def __init__(self, url: str, starter: start.Starter) -> None:
        self.url, self.starter = url, starter

    def ask(self, path: str, key: str | None = None, origin: str | None = None, **fields: str) -> httpx.Response:
        """GET without fields, else POST; redirects are followed."""
        address = f"{self.url}{path}?key={self.starter.key if key is None else key}"
        headers = {} if origin is None else {"Origin": origin}
        method = "POST" if fields else "GET"
        return httpx.request(method, address, data=fields, headers=headers, follow_redirects=True, timeout=120)


@pytest.fixture
def form(tmp_path: Path) -> Iterator[Form]:
    (tmp_path / "runs").mkdir()
    app = create_app([tmp_path / "runs"], trains=True)
    with running(app) as (_, url, _):
        yield Form(url, app.state.service.pages.starter)
        app.state.service.draining = True
        app.state.service.pages.starter.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """``quick(code)``: this Python code runs in place of qvera, with its arguments in sys.argv."""

    def replace(code: str) -> None:
        file = tmp_path / "python"
        file.write_text(f"#!{sys.executable}\nimport sys; sys.argv[1:4] = []\n{code}\n")
        file.chmod(0o755)
        monkeypatch.setattr(start.sys, "executable", str(file))

    return replace


WRITES = "from pathlib import Path; Path(sys.argv[2]).write_text('a: 1\\n'); print(sys.argv[1:])"


def test_without_the_key_nothing_is_shown_or_started(form: Form, quick: Any, tmp_path: Path) -> None:
    quick(WRITES)
    fields = {"name": "mine", "model": "base", "data": "rows.csv"}
    for path, given in (("/new", {}), ("/new", fields), ("/recipe/mine", {"do": "train", "recipe": "a: 1"})):
        for key in ("", "wrong", form.starter.key[:-1]):
            answer = form.ask(path, key, **given)
            assert (answer.status_code, "address that `qvera ui --train` printed" in answer.text) == (403, True)
            assert form.starter.key not in answer.text
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):  # with the key, from a page of another site
        assert form.ask("/new", origin=origin, **fields).status_code == 403
    assert list((tmp_path / "runs").iterdir()) == []
    assert form.ask("/new", origin=form.url, **fields).status_code == 200
    assert form.starter.key not in form.ask("/", key="").text
    app = create_app([tmp_path / "runs"])
    with running(app) as (_, url, _):
        assert httpx.get(f"{url}/new").status_code == httpx.post(f"{url}/recipe/mine").status_code == 404


def test_fields_are_the_options_of_init_and_names_stay_in_their_directory(
    form: Form, quick: Any, tmp_path: Path
) -> None:
    quick(WRITES)
    fields = {"model": "--help", "data": "my rows.csv", "prompt-column": "q", "task": "", "system": "Be <b>brief</b>."}
    for name in ("../mine", ".hidden", "a/b", "", "x" * 101, "--help", "é"):
        assert form.ask("/new", name=name, **fields).status_code == 400, name
    page = form.ask("/new", name="mine", **fields)
    assert page.url.path == "/recipe/mine"
    assert "<b>brief" not in page.text
    recipe = tmp_path / "runs" / "mine.yaml"
    given = ["--model=--help", "--data=my rows.csv", "--prompt-column=q", "--system=Be <b>brief</b>."]
    assert form.starter.output("mine", "init").splitlines()[1] == str(["init", str(recipe), *given])
    (tmp_path / "runs" / "trained").mkdir()
    assert "is there already. Take another name." in form.ask("/new", name="trained", **fields).text
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    (tmp_path / "runs" / "linked.yaml").symlink_to(secret)
    for fields in ({}, {"do": "plan", "recipe": "a: 1"}):
        answer = form.ask("/recipe/linked", **fields)
        assert (answer.status_code, "hunter2" in answer.text) == (400, False)
    assert secret.read_text() == "hunter2"
    assert form.ask("/recipe/none").status_code == 404


def test_a_run_of_the_first_directory_leads_back_to_its_recipe_also_beside_others(tmp_path: Path) -> None:
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        (place / "mine").mkdir(parents=True)
        (place / "mine" / "run.json").write_text('{"status": "done"}')
        (place / "mine.yaml").write_text("a: 1")
    for count, leads in ((1, {"mine": True}), (2, {"first/mine": True, "second/mine": False})):
        with running(create_app(places[:count], trains=True)) as (_, url, _):
            pages = {id: httpx.get(f"{url}/run/{id}", timeout=120).text for id in leads}
        assert {id: 'href="/recipe/mine"' in page for id, page in pages.items()} == leads


def test_stop_asks_as_ctrl_c_does_and_the_end_of_the_server_stops_no_training(
    form: Form, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(
        "import time\ntry:\n print(sys.argv[1:], 'begun', flush=True)\n time.sleep(600)\nexcept KeyboardInterrupt: print('saved')"
    )
    monkeypatch.setattr(start, "_WAIT_SECONDS", 0.0)
    for command in ("train", "serve"):
        form.ask("/recipe/mine", do=command, recipe="a: 1\r\nb: 2\r\n")
    wait_until(lambda: all("begun" in form.starter.output("mine", command) for command in ("train", "serve")))
    run = form.starter.place / "mine"
    given = ["train", f"{run}.yaml", "--set", f'training.output_dir="{run}"']
    assert str(given) in form.starter.output("mine", "train")
    assert str(["serve", str(run), "--port", "0"]) in form.starter.output("mine", "serve")
    assert form.starter.recipe("mine").read_bytes() == b"a: 1\nb: 2\n"
    again = form.ask("/recipe/mine", do="train", recipe="a: 1")
    assert (again.status_code, "is running" in again.text) == (400, True)
    assert form.starter.recipe("mine").read_bytes() == b"a: 1\nb: 2\n"  # a page that was open before changes nothing
    asked, killpg = list[int](), os.killpg
    monkeypatch.setattr(os, "killpg", lambda *given: (asked.append(given[0]), killpg(*given)))
    form.starter.close()  # as when the server ends
    assert len(asked) == 1, "a second Ctrl-C would cut running answers off"
    wait_until(lambda: not form.starter.is_running("mine", "serve"))
    assert form.starter.is_running("mine", "train")
    form.ask("/recipe/mine", do="stop-train")
    wait_until(lambda: not form.starter.is_running("mine", "train"))
    assert form.starter.output("mine", "train").endswith("saved")
    form.ask("/recipe/mine", do="resume", recipe="a: 1")
    wait_until(lambda: "begun" in form.starter.output("mine", "train"))
    assert str([*given, "--resume"]) in form.starter.output("mine", "train")
    form.ask("/recipe/mine", do="stop-train")
    wait_until(lambda: not form.starter.is_running("mine", "train"))


BEGINS = """
import json, os, shutil, time
from pathlib import Path
run = Path(sys.argv[4].partition("=")[2].strip('"'))
run.mkdir(exist_ok=True)
(run / ".qvera_run.owner").write_text(json.dumps({"pid": os.getpid()}))
if run.name == "killed": time.sleep(1); sys.exit("another recipe")
(run / ".qvera_run.progress").touch()
while not run.with_name("go").exists(): time.sleep(0.05)
shutil.rmtree(run)
sys.exit("row 31 is cut off")
"""
"""A training that fails while it reads its rows, or of a recipe named killed before that."""


def test_what_a_training_printed_that_has_no_run_is_a_link_away(form: Form, quick: Any) -> None:
    place = form.starter.place
    quick(BEGINS)
    assert form.ask("/recipe/mine", do="train", recipe="a: 1").url.path == "/run/mine"
    (place / "go").touch()
    wait_until(lambda: not form.starter.is_running("mine", "train"))
    page = form.ask("/run/mine", key="")
    assert (page.status_code, "row 31" in page.text) == (404, False)  # without the key
    assert 'href="/recipe/mine"' in page.text.partition("<main")[2]
    assert "row 31 is cut off" in form.ask("/recipe/mine").text
    assert "/recipe/" not in form.ask("/run/other").text
    # a run that was killed, and whose recipe has changed since
    (place / "killed").mkdir()
    for left in (RUN_OWNER, RUN_PROGRESS):
        (place / "killed" / left).write_text('{"pid": 1}')
    page = form.ask("/recipe/killed", do="train", recipe="a: 1")
    assert (page.url.path, "another recipe" in page.text) == ("/recipe/killed", True)


def test_what_is_started_can_be_stopped_where_the_server_ignores_ctrl_c(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a script's background
    try:
        start.Starter(tmp_path, RunDirectories([tmp_path]))
        code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_listens_to_this_machine_only_and_makes_its_directory(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvera.serve.api.server.Server.run", lambda self, sockets: self._on_start())
    assert main(["ui", str(tmp_path), "--train", "--host", "0.0.0.0"]) == 2
    assert "--train: starts processes" in capsys.readouterr().err
    assert main(["ui", str(tmp_path / "runs"), "--train", "--port", "0"]) == 0
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/new\?key=[\w-]{43}\n", capsys.readouterr().out)
    (tmp_path / "file").touch()
    assert main(["ui", str(tmp_path / "file"), "--train"]) == 2
    assert "is a file, not a directory" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.process
def test_from_rows_to_a_chat_in_a_browser_at_three_widths(
    form: Form, browser: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"say {n}", "a": "yes"}) + "\n" for n in range(24)))
    page = browser.new_page()
    page.set_default_timeout(180_000)

    def fits() -> None:
        for width in (360, 768, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_timeout(200)  # it is laid out in steps
            assert page.evaluate("document.documentElement.scrollWidth") <= width, page.evaluate(WIDE, width)

    page.goto(f"{form.url}/new?key={form.starter.key}")
    for field, value in {"name": "mine", "model": str(tiny_model_dir), "data": str(rows)}.items():
        page.fill(f"[name={field}]", value)
    page.click("text=Write the recipe")
    assert "Columns found: q, a" in page.text_content("[role=alert]")  # the message of `qvera init`
    fits()
    page.fill("[name=prompt-column]", "q")
    page.fill("[name=answer-column]", "a")
    page.click("text=Write the recipe")
    page.wait_for_url("**/recipe/mine?*")
    text = page.input_value("textarea")
    page.fill("textarea", text.replace("num_train_epochs: 10", "max_steps: 3"))
    page.click("[value=plan]")
    page.wait_for_selector("text=3 optimizer steps in all")
    fits()
    page.click("[value=train]")
    page.wait_for_url("**/run/mine")
    page.click("text=Recipe, stop, chat")  # the link has the key
    page.wait_for_selector("[value=resume]")  # shown once the run has finished, without a reload
    fits()
    page.fill("textarea", page.input_value("textarea").replace("max_steps: 3", "max_steps: 5"))
    page.click("[value=resume]")
    page.wait_for_url("**/run/mine")
    page.click("text=Recipe, stop, chat")
    page.click("[value=serve]")
    page.wait_for_selector(".chat a")
    fits()
    with page.expect_popup() as opened:
        page.click(".chat a")
    opened.value.wait_for_function("document.title == 'qvera serve'")
    page.click("[value=stop-serve]")
    wait_until(lambda: not form.starter.is_running("mine", "serve"))
    run = json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())
    assert (run["status"], run["result"]["steps"]) == ("done", 5)
