"""The chat page: its files, and its behaviour in a real Chromium (skipped where that or playwright is missing)."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from qvera.serve.api.app import PAGE_FILES
from tests.helpers import wait_until
from tests.serve.api.conftest import Start


def test_the_page_needs_no_key_and_asks_no_other_host(start: Start) -> None:
    with start(keys={"all": ("*", "use")}).client() as client:
        for path in PAGE_FILES:
            answer = client.get(path)
            assert answer.status_code == 200, path
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert not re.search(r"https?://", answer.text)
        assert client.get("/v1/models").status_code == 401
        assert client.get("/page/../keys.py").status_code in (401, 404)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (820, "dark"), (390, "dark")])
def test_base_and_adapter_answer_side_by_side(start: Start, browser: Any, width: int, scheme: str) -> None:
    served = start()
    served.said["anna"] = "anna <b>says</b> blue"
    page = browser.new_page(viewport={"width": width, "height": 760}, color_scheme=scheme)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(served.url)
    page.wait_for_selector(".pane >> nth=1")
    assert page.locator(".pane h2").all_text_contents() == ["tiny", "anna"]
    page.fill("#prompt", "hello")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".measured >> nth=1")
    answers = [text.split() for text in page.locator(".said.assistant").all_text_contents()]
    assert answers[0] == served.said["tiny"].split()
    assert "".join(answers[1]) == "".join(served.said["anna"].split())  # as text, not as markup
    assert page.locator(".said b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    sent = [message.prompt for message in served.engine.requests]
    assert len(sent) == 2
    page.close()


def test_the_keyboard_chooses_filters_and_stops(start: Start, browser: Any) -> None:
    served = start()
    page = browser.new_page()
    page.goto(served.url)
    page.wait_for_selector(".pane >> nth=1")
    page.fill("#filter", "be")
    assert page.locator("#list label span").all_text_contents() == ["ben"]
    page.focus("#list input")
    page.keyboard.press("Space")
    assert page.locator(".pane h2").all_text_contents() == ["tiny", "anna", "ben"]
    page.keyboard.press("Space")
    assert page.locator(".pane h2").all_text_contents() == ["tiny", "anna"]
    served.said["tiny"] = "word " * 400
    served.engine.step_seconds = 0.02
    page.fill("#prompt", "hello")
    page.press("#prompt", "Enter")
    wait_until(lambda: len(page.text_content(".said.assistant >> nth=0")) > 20)
    page.keyboard.press("Escape")
    wait_until(lambda: page.text_content("#send") == "Send")
    # the adapter's short answer may have ended by itself
    [base_request] = [request for request in served.engine.requests if request.adapter is None]
    wait_until(lambda: base_request.id in served.engine.cancelled)
    assert len(page.text_content(".said.assistant >> nth=0")) < len(served.said["tiny"])
    page.close()


def test_cleared_chats_are_not_sent_again_also_where_an_answer_was_being_written(start: Start, browser: Any) -> None:
    served = start()
    served.said["tiny"] = "word " * 400
    served.engine.step_seconds = 0.02
    page = browser.new_page()
    page.goto(served.url)
    page.wait_for_selector(".pane >> nth=1")
    page.fill("#prompt", "a secret")
    page.press("#prompt", "Enter")
    wait_until(lambda: len(page.text_content(".said.assistant >> nth=0")) > 20)
    page.evaluate("document.getElementById('clear').click()")
    wait_until(lambda: page.text_content("#send") == "Send")
    assert page.locator(".said").count() == 0
    page.fill("#prompt", "hello")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.press("#prompt", "Enter")
    assert json.loads(asked.value.post_data)["messages"] == [{"role": "user", "content": "hello"}]
    page.close()


def test_a_key_is_asked_for_and_a_wrong_one_is_said_to_be_wrong(start: Start, browser: Any) -> None:
    served = start(keys={"all": ("*", "use")})
    key = served.headers["all"]["Authorization"].removeprefix("Bearer ")
    page = browser.new_page()
    page.goto(served.url)
    for said, refused in (("wrong", False), (key, True)):
        page.wait_for_selector("#login[open]")
        assert page.is_visible("#refused") is refused
        page.fill("#key", said)
        page.press("#key", "Enter")
    page.wait_for_selector(".pane >> nth=1")
    page.close()
