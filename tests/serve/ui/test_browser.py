"""The pages in a real Chromium (skipped where that or playwright is missing), over a run that trains meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.report.conftest import eval_rows, many_info, many_rows, run_info, train_rows
from tests.helpers import start_process, wait_until
from tests.serve.ui.conftest import Served, append, begin

Build = Callable[..., Path]
Serve = Callable[..., Served]


def train_slowly(recipe: Any, run_dir: Path, step_seconds: float) -> None:
    """A real run whose steps a person could follow."""
    from qvera.training.alone import Trainer
    from qvera.training.trainer import train

    log = Trainer.log

    def slow(self: Any, record: dict[str, Any]) -> None:
        log(self, record)
        time.sleep(step_seconds)

    Trainer.log = slow  # type: ignore[method-assign]  # in a process of its own
    train(recipe, run_dir)


@pytest.fixture
def page_of(browser: Any) -> Iterator[Callable[..., Any]]:
    """New pages, on which no error may be."""
    problems, pages = list[str](), list[Any]()

    def new_page(url: str, **settings: Any) -> Any:
        page = browser.new_page(**settings)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(url)
        pages.append(page)
        return page

    yield new_page
    assert problems == []
    for page in pages:
        page.close()


def points(page: Any) -> int:
    """How many points the first curve has."""
    return len(re.findall("[ML]", page.locator(".axes path").first.get_attribute("d")))


@pytest.mark.process
def test_a_run_that_trains_shows_up_and_its_curve_grows(
    serve: Serve, page_of: Any, make_recipe: Any, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    page = page_of(serve(runs).url)
    assert "No run is here yet" in page.text_content("main")
    training = {"max_steps": 24, "eval_steps": 8, "save_steps": 24, "sample_count": 1}
    process = start_process(train_slowly, make_recipe(training=training), runs / "live", 0.25)
    try:
        page.wait_for_selector("td.running", timeout=60_000)  # without a reload
        page.click("#run-live a")
        page.wait_for_selector(".axes path", timeout=30_000)
        page.evaluate("window.sameDocument = true")
        page.click("summary >> text=The whole effective recipe")
        page.focus(".plot >> nth=0")
        page.keyboard.press("ArrowLeft")
        first, begun = points(page), page.text_content("#now-step")
        wait_until(lambda: points(page) >= first + 6, 60)
        assert int(page.text_content("#now-step")) > int(begun)
        assert page.evaluate("document.activeElement.className") == "plot"  # what a reader does, stays
        assert page.is_visible(".plot .tip >> nth=0")
        assert page.locator("details[open]").count() == 1
        assert "of 24" in page.text_content(".now")
        page.wait_for_selector("text=finished", timeout=60_000)
        page.wait_for_selector(".now", state="detached")
        wait_until(lambda: points(page) == 24, 30)
        assert "Held-out prompts" in page.text_content("main")
        assert page.evaluate("window.sameDocument") is True
    finally:
        process.join(60)
    assert process.exitcode == 0


WIDE = """width => [...document.querySelectorAll("body *")]
    .filter(one => one.getBoundingClientRect().right > width + 1 && !one.closest(".scroll"))
    .map(one => one.outerHTML.slice(0, 80))"""
"""What stands beyond the window's edge, for the message of a test that fails."""


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (768, "dark"), (1280, "light")])
def test_pages_fit_their_widths_and_load_nothing_else(
    build_run: Build, serve: Serve, page_of: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    long = "a-run-with-a-rather-long-name-of-its-own-as-people-give-them"
    build_run(name=long)
    begin(build_run(name="going", evals=eval_rows({40: 0.173})), **{**run_info(), "planned_steps": 200, "result": {}})
    build_run(name="many", info=many_info(), train=many_rows(), evals=None)
    url, asked = serve(tmp_path).url, list[str]()
    page = page_of("about:blank", viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("request", lambda request: asked.append(request.url))
    for path in ("/", "/run/going", "/run/many", "/adapter/many?name=chloe", f"/compare?run=going&run={long}"):
        page.goto(f"{url}{path}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, page.evaluate(WIDE, width))
    assert all(one.startswith((url, "data:")) for one in asked)


def test_runs_are_chosen_and_compared_by_keyboard(build_run: Build, serve: Serve, page_of: Any, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        build_run(name=name)
    page = page_of(serve(tmp_path).url)
    page.focus("[value=one]")
    page.keyboard.press("Space")
    append(tmp_path / "three", {**train_rows(1)[0], "step": 97})  # the list is drawn again, in another order
    page.wait_for_selector("#run-three >> text=97", timeout=20_000)
    page.focus("[value=two]")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare?*")
    assert sorted(re.findall(r"run=(\w+)", page.url)) == ["one", "two"]
    assert page.locator(".axes").count() >= 2


def test_a_server_that_ends_is_said(build_run: Build, serve: Serve, browser: Any, tmp_path: Path) -> None:
    build_run(name="one")
    served, page = serve(tmp_path), browser.new_page()
    page.goto(f"{served.url}/run/one")
    page.wait_for_selector("#link.live")
    served.service.draining = served.server.should_exit = True
    page.wait_for_selector("text=The server does not answer", timeout=20_000)
    page.close()
