"""Nothing outside of the runs is served, whatever is asked for and whatever lies in them; and no other site may ask."""

from __future__ import annotations

import json
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qvera.serve.api import access
from qvera.serve.api.access import is_own_name
from qvera.serve.ui import app
from tests.evaluation.report.conftest import evaluation, many_info
from tests.serve.ui.conftest import Served

Build = Callable[..., Path]
Serve = Callable[..., Served]
SECRET = "hunter2-secret"


@pytest.fixture
def outside(build_run: Build, tmp_path: Path) -> Path:
    """A run beside the served directory, all of whose files hold a secret."""
    run, scores = build_run(name="outside"), evaluation()
    scores["metrics"][0]["label"] = SECRET
    info = {**json.loads((run / "run.json").read_text()), "device": SECRET}
    recipe = f"# {SECRET}\n{(run / 'recipe.yaml').read_text()}"
    texts = {"recipe.yaml": recipe, "run.json": json.dumps(info), "eval.json": json.dumps(scores), "secret.txt": SECRET}
    for name, text in texts.items():
        (run / name).write_text(text)
    (tmp_path / "runs").mkdir()
    return run


def put(build_run: Build, tmp_path: Path, name: str, **parts: object) -> Path:
    return Path(shutil.move(build_run(name=name, **parts), tmp_path / "runs" / name))


def test_links_are_not_followed(build_run: Build, serve: Serve, outside: Path, tmp_path: Path) -> None:
    put(build_run, tmp_path, "good")
    (tmp_path / "runs" / "linked").symlink_to(outside)
    (tmp_path / "runs" / "up").symlink_to("..")
    names = ("recipe.yaml", "run.json", "eval.json", "metrics.jsonl")
    for name in names:
        run = put(build_run, tmp_path, f"with-{name}")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / name)
    served = serve(tmp_path / "runs")
    listed = served.get("/").text
    assert SECRET not in listed
    assert "linked" not in listed
    for id in ("linked", "up/outside", *(f"with-{name}" for name in names)):
        for path in (f"/run/{id}", f"/compare?run={id}&run=good", f"/adapter/{id}?name=x"):
            assert SECRET not in served.get(path).text, path
    assert "recipe.yaml is a link" in served.get("/run/with-recipe.yaml").text
    assert served.get("/run/good").status_code == 200


def test_a_summary_leads_nowhere_else(build_run: Build, serve: Serve, outside: Path, tmp_path: Path) -> None:
    """run.json names the directory of each adapter, and may come from anywhere."""
    places = ["../../../outside", "/etc", "..", ".", "a/../../../../outside", "linked"]
    for number, directory in enumerate(places):
        info = many_info()
        for entry in info["adapters"][:2]:
            entry["directory"] = directory
        run = put(build_run, tmp_path, f"many-{number}", info=info)
        (run / "adapters").mkdir()
        (run / "adapters" / "linked").symlink_to(outside)
    served = serve(tmp_path / "runs")
    one, other = (entry["name"].replace(" ", "+").replace("<", "%3C") for entry in many_info()["adapters"][:2])
    for id in (f"many-{number}" for number in range(len(places))):
        for path in (f"/run/{id}", f"/compare?run={id}&adapter={one}&adapter={other}", f"/adapter/{id}?name={other}"):
            answer = served.get(path)
            assert answer.status_code in (200, 400), path
            assert SECRET not in answer.text, path


UPS = (b"..", b"%2e%2e", b"%252e%252e", b"..%00", b"..;", b"%c0%ae%c0%ae", b"..%5c", b"..\\", b".%2e", b"%uff0e%uff0e")
SLASHES = (b"/", b"%2f", b"%5c", b"//", b"%252f")
ENDS = (b"outside", b"outside/secret.txt", b"etc/passwd", b"outside/run.json")
FRONTS = (b"/run/", b"/look/", b"/adapter/", b"/events/run/", b"/", b"/run/good/", b"//", b"file:///")
OTHERS = (b"run", b"good", b"?", b"&", b"=", b"%", b"%0a", b"%ff", b"~", b"*", b"name=", b"from=1-2")


def attempts(count: int) -> list[bytes]:
    """Ways to ask for a file beside the runs."""
    fronts = (*FRONTS, b"/compare?run=good&run=")
    made = [
        front + (up + slash) * deep + end
        for front in fronts for deep in (1, 8) for up in UPS for slash in SLASHES for end in ENDS
    ]  # fmt: skip
    chooser, alphabet = random.Random(0), [*UPS, *SLASHES, *ENDS, *OTHERS]
    made += [b"/" + b"".join(chooser.choices(alphabet, k=chooser.randint(1, 12))) for _ in range(200)]
    return chooser.sample(made, count)


def test_no_address_leads_out_of_the_runs(
    build_run: Build,
    serve: Serve,
    outside: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(build_run, tmp_path, "good")
    monkeypatch.setattr(app, "LOOK_SECONDS", 0.0)  # a stream of news of a run that is not there ends at its second look
    served = serve(tmp_path / "runs")
    for target in attempts(90):
        if target.startswith((b"/events/run/good", b"/events/runs")):
            continue  # streams do not end
        answer = served.raw(target)
        assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4", b"HTTP/1.1 3")) or b"event: gone" in answer, target
        assert SECRET.encode() not in answer, target
        assert b"root:" not in answer, target
    assert "Traceback" not in caplog.text


def test_names_of_other_alphabets_and_of_markup_are_texts(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    names = ["Ünï 漢字", "a<script>alert(1)<", "q\"uo'te", "50% ? & #1 +", "a..b", "%2e%2e"]
    for name in names:
        build_run(name=name)
    served = serve(tmp_path)
    page = served.get("/").text
    assert "<script>alert" not in page
    hrefs = [part.split('"')[0].replace("&amp;", "&") for part in page.split('<a href="/run')[1:]]
    assert [served.get(f"/run{href}").status_code for href in hrefs] == [200] * len(names)


def test_other_sites_are_refused(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    build_run(name="one")
    served = serve(tmp_path)
    good = [("localhost", ""), ("127.0.0.1:8001", ""), ("[::1]:8001", ""), ("localhost:1", "http://localhost:1")]
    bad = [(host, "") for host in ("evil.example", "localhost.evil.example", "10.0.0.1", "")]
    bad += [("localhost", origin) for origin in ("https://evil.example", "null")]
    for host, origin in good + bad:
        answer = served.get("/run/one", Host=host, **({"Origin": origin} if origin else {}))
        is_own = (host, origin) in good
        assert (answer.status_code, "SmolLM2" in answer.text) == (200 if is_own else 403, is_own), host
        assert "access-control-allow-origin" not in answer.headers
    # one that others reach takes addresses and its own names
    assert all(is_own_name(host, "0.0.0.0") for host in ("192.168.0.7:8001", "[fe80::1]:80", socket.gethostname()))
    assert not any(is_own_name(host, "0.0.0.0") for host in ("evil.example", "192.168.0.7.evil.example", "", "a:b:c"))
    assert is_own_name("box.lan:8001", "box.lan")


def test_strangers_names_do_not_ask_dns_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(socket, "getfqdn", lambda: asked.append("") or "box.lan")
    access._names_of_this_machine.cache_clear()
    found = [is_own_name(name, "0.0.0.0") for name in ("evil.example", "box.lan", "evil.example")]
    access._names_of_this_machine.cache_clear()
    assert (found, len(asked)) == ([False, True, False], 1)


def test_every_answer_forbids_scripts_and_loads_of_others(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    build_run(name="one")
    served = serve(tmp_path)
    for path in ("/", "/run/one", "/compare", "/nowhere", "/look/live.js", "/look/style.css", "/health"):
        answer = served.get(path)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'"), path
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in answer.text.replace("http://www.w3.org", "")
        for inline in ("<script>", "<style>", " style=", " onclick", "javascript:"):
            assert inline not in answer.text or path.startswith("/look"), (path, inline)


def test_only_reading_is_allowed_and_no_query_without_end(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    build_run(name="one")
    served = serve(tmp_path)
    for method in (b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"):
        assert served.raw(b"/run/one", method=method).startswith(b"HTTP/1.1 405")
    assert served.get("/?q=" + "x" * 20_000).status_code == 414
