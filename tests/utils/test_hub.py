"""A hub that does not answer is left, and is asked again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from qvera.config.sections import ModelSection
from qvera.models.hub import local_directory, require_model_files
from qvera.models.loader import load_base
from qvera.utils import hub
from qvera.utils.errors import InputError


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub has been asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_asked_at", {})
    monkeypatch.setattr(hub, "_silent", set())


class _Answers(BaseHTTPRequestHandler):
    code = 503
    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Answers]]:
    """A hub; its class says how it answers, and counts how often it was asked."""
    answers = type("Answers", (_Answers,), {})
    with HTTPServer(("127.0.0.1", 0), answers) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{found.server_port}")
        yield answers
        found.shutdown()


def test_a_hub_that_is_down_is_left_until_it_answers(
    fresh: None, server: type[_Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("/no/where", "./none", "~/none", "tests/none"):
        hub.leave_silent_hub(name)
    assert server.asked == 0, "these are paths"
    for _ in range(2):
        hub.leave_silent_hub("nobody/nothing")
        assert constants.HF_HUB_OFFLINE and server.asked == 1, "once a minute"
    with pytest.raises(
        InputError, match=r"'nothing' is no directory here. Nor .* before\). An id on the hub is OWNER/NAME"
    ):
        require_model_files("nothing")
    assert hub.hub_hint().startswith("HF_HUB_OFFLINE is set, or the hub did not answer")
    monkeypatch.setattr(hub, "_AGAIN_SECONDS", 0)
    server.code = 404
    hub.leave_silent_hub("nobody/nothing")
    assert not constants.HF_HUB_OFFLINE and server.asked == 2


def test_who_is_offline_by_choice_asks_nobody(
    fresh: None, server: type[_Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.code = 404
    hub.leave_silent_hub("nobody/nothing")
    assert constants.HF_HUB_OFFLINE and server.asked == 0


def test_python_programs_get_no_retries_of_a_hub_that_does_not_answer(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, or the hub did not answer"):
        load_base(ModelSection(path="nobody/nothing"))
    constants.HF_HUB_OFFLINE = False
    hub._asked_at.clear()
    with pytest.raises(InputError, match="Nor has the hub given it: .* HF_HUB_OFFLINE is set"):
        local_directory(Path("nobody/nothing"))
    assert "Retrying" not in caplog.text and "127.0.0.1:9 does not answer" in caplog.text


def test_an_address_that_is_none_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "127.0.0.1:9")
    with pytest.raises(InputError, match="HF_ENDPOINT: '127.0.0.1:9' is no address of a hub"):
        hub.leave_silent_hub("nobody/nothing")
