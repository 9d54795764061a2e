"""The pages of `qvera ui`: what they show of runs in every state, and that odd runs do not break them."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvera.evaluation.report.compare import compare_runs
from qvera.evaluation.report.pages import compare_page
from qvera.serve.ui import metrics
from qvera.serve.ui.directories import RunDirectories
from qvera.utils.errors import InputError
from qvera.utils.files import RUN_OWNER, RUN_PROGRESS
from tests.evaluation.report.conftest import adapter_entry, eval_rows, many_info, many_rows, run_info, train_rows
from tests.serve.ui.conftest import Served, append, begin

Build = Callable[..., Path]


@pytest.fixture
def served(serve: Callable[..., Served], tmp_path: Path) -> Served:
    """A server over the runs of the test."""
    return serve(tmp_path)


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def rows_of(served: Served) -> dict[str, list[str]]:
    """Id → cells of each row of the list."""
    rows = re.findall(r'<tr id="run-([^"]*)">(.*?)</tr>', served.get("/").text, re.DOTALL)
    return {
        html.unescape(id): [text_of(c).strip() for c in re.findall(r"<td[^>]*>(.*?)</td>", row)] for id, row in rows
    }


def test_the_list_says_where_every_run_is(build_run: Build, served: Served, tmp_path: Path) -> None:
    build_run(name="done", info={**run_info(), "result": {**run_info()["result"], "planned_steps": 96}})
    begin(build_run(name="going", info=None, evals=None), status="running", planned_steps=200)
    build_run(name="stopped", info={"status": "interrupted"})
    long_ago = [*train_rows(40), *eval_rows({40: 0.173}), *train_rows(400)[40:]]
    begin(build_run(name="long", info=None, train=long_ago, evals=None), status="running", planned_steps=900)
    build_run(name="broken", info={"status": "failed"})
    build_run(name="dead", info={"status": "running"}, train=None, evals=None)
    owner = {"host": os.uname().nodename, "pid": 1, "started": "1999-01-01"}  # another process has the number now
    (tmp_path / "dead" / RUN_OWNER).write_text(json.dumps(owner))
    rows = rows_of(served)
    states = {
        "going": "running",
        "long": "running",
        "stopped": "interrupted",
        "broken": "failed",
        "dead": "interrupted",
        "done": "finished",
    }
    assert {id: cells[0] for id, cells in rows.items()} == states
    assert next(iter(rows)) == "going"
    _, step, loss, held_out, _, left, _ = rows["going"]
    assert (step, held_out) == ("96 of 200", "–")
    minutes, seconds = divmod(round(sum(row["step_seconds"] for row in train_rows()[-50:]) / 50 * 104), 60)
    assert left == f"{minutes} min {seconds:02d} s"
    assert float(loss) == pytest.approx(train_rows()[-1]["loss"], rel=1e-3)
    assert rows["done"][1:4] == ["96 of 96", rows["done"][2], "0.07120"]  # that of run.json, of the best step
    assert rows["long"][1:4] == ["400 of 900", rows["long"][2], "0.1730"]
    assert rows["dead"][1:6] == ["–", "–", "–", "–", ""]  # nothing is made up


def test_a_run_shows_its_report_and_where_it_is(build_run: Build, served: Served) -> None:
    info = {**run_info(), "result": {}, "status": "running", "planned_steps": 100}
    info["samples"] = [{key: sample[key] for key in ("prompt", "reference", "before")} for sample in info["samples"]]
    begin(build_run(name="a", evals=eval_rows({40: 0.173})), **info)
    page = served.get("/run/a")
    assert page.status_code == 200
    for expected in (
        *("running since 24 November", "Step 96 of 100", "Left", "Held-out loss 0.1730 at step 40"),
        *("Gradient norm", "Memory", "learning_rate", "Answered before training.", "qvera preview"),
    ):
        assert expected in text_of(page.text)
    assert 'max="100.0" value="96.0"' in page.text
    assert "killed" not in page.text
    assert page.text.count(" After ") == 0


def test_new_resumed_and_deleted_runs_are_noticed(build_run: Build, served: Served, tmp_path: Path) -> None:
    assert "No run is here yet" in served.get("/").text
    run, deep = build_run(name="late", info={"status": "interrupted"}), tmp_path / "a" / "b" / "copy"
    shutil.copytree(run, deep)
    served.look_again()
    assert rows_of(served).keys() == {"late", "a/b/copy"}
    assert "interrupted" in served.get("/run/a/b/copy").text
    begin(deep)
    assert "Step" in text_of(served.get("/run/a/b/copy").text)
    assert rows_of(served)["a/b/copy"][0] == "running"
    shutil.rmtree(deep)
    assert served.get("/run/a/b/copy").status_code == 404
    served.look_again()
    assert rows_of(served).keys() == {"late"}


def test_every_phase_of_a_run_has_its_name_its_count_and_its_time_left(
    build_run: Build, served: Served, tmp_path: Path
) -> None:
    """Also one that has written nothing yet, and one of many adapters."""
    (tmp_path / "loading").mkdir()
    begin(tmp_path / "loading")
    begin(build_run(name="many", info=None, evals=None, train=many_rows()), **(many_info() | {"status": "running"}))
    phase = {"name": "answering 48 prompts with the base", "done": 5, "total": 48, "left_seconds": 90, "facts": ""}
    (tmp_path / "loading" / RUN_PROGRESS).write_text(json.dumps(phase))
    (tmp_path / "many" / RUN_PROGRESS).write_text(json.dumps({**phase, "name": "training"}))
    rows = rows_of(served)
    assert rows["loading"][:2] == ["running", "answering 48 prompts with the base 5 of 48"]
    assert rows["loading"][5] == rows["many"][5] == "1 min 30 s"
    assert rows["many"][2] == "0.2083"
    page = text_of(served.get("/run/loading").text)
    assert "Now answering 48 prompts with the base 5 of 48 Left 1 min 30 s of this phase" in page
    assert "Left 1 min 30 s" in text_of(served.get("/run/many").text)


FILES = ("run.json", "recipe.yaml", "metrics.jsonl")
ODD: dict[str, Callable[[Path], object]] = {
    "empty": lambda run: [(run / name).write_bytes(b"") for name in FILES],
    "noise": lambda run: [(run / name).write_bytes(os.urandom(5000)) for name in FILES],
    "half": lambda run: [os.truncate(run / name, (run / name).stat().st_size // 2) for name in FILES[::2]],
    "lists": lambda run: [(run / "run.json").write_text("[[[" * 5000), (run / "recipe.yaml").write_text("- " * 3000)],
    "other types": lambda run: [
        (run / "run.json").write_text(json.dumps({key: [1, None, "x"] for key in run_info()})),
        append(run, train | {"loss": "x", "step_seconds": [1]}, {"kind": ["eval"], "step": 3}),
    ],
    "huge numbers": lambda run: append(run, train | {"step": 1e300, "loss": 1e308}, train | {"peak_bytes": 1e99}),
    "not finite": lambda run: append(run, train | {"loss": float("nan"), "step_seconds": 1e98}),
    "text": lambda run: append(run, {"kind": "round", "round": 3, "adapters": "many", "step_seconds": "1"}),
    "a pipe": lambda run: [(run / "metrics.jsonl").unlink(), os.mkfifo(run / "metrics.jsonl")],
    "a device": lambda run: [(run / "run.json").unlink(), (run / "run.json").symlink_to("/dev/zero")],
    "directories": lambda run: [(run / "run.json").unlink(), (run / "run.json").mkdir()],
    "a huge recipe": lambda run: os.truncate(run / "recipe.yaml", 1 << 32),
    "a huge summary": lambda run: os.truncate(run / "run.json", 1 << 33),
    "a round zero": lambda run: [
        begin(run, status="running", planned_steps=9, adapters=[]),
        append(run, {"kind": "round", "round": 0, "adapters": 2, "step_seconds": 1.0}),
    ],
    "an odd owner": lambda run: (run / RUN_OWNER).write_text('{"host": 3, "pid": 1e400, "started": []}'),
}
train: dict[str, Any] = {"kind": "train", "step": 97, "loss": 1e99}


def test_an_odd_run_breaks_no_page(build_run: Build, served: Served) -> None:
    build_run(name="good")
    for kind, spoil in ODD.items():
        spoil(build_run(name=kind))
    rows = rows_of(served)
    assert rows.keys() == {"good", *ODD}
    assert rows["good"][0] == "finished"
    for kind in ODD:
        for path in (f"/run/{kind}", f"/compare?run={kind}&run=good"):
            assert served.get(path).status_code in (200, 400), kind
    assert served.get("/run/good").status_code == 200


def test_many_adapters_are_found_by_name_a_page_at_a_time(build_run: Build, served: Served) -> None:
    entries = [adapter_entry(f"customer {n}", f"customer-{n}", flags=["x"] * (n % 300 == 7)) for n in range(3_000)]
    build_run(name="many", info={**many_info(), "adapters": entries}, train=None, evals=None)

    def names(query: str) -> tuple[list[str], str]:
        page = served.get(f"/run/many{query}").text
        assert len(page) < 300_000
        (shown,) = re.findall(r'<span class="shown soft">(.*?)</span>', page)
        return re.findall(r'name="adapter" value="([^"]*)"', page), shown

    first, said = names("")
    assert (len(first), first[0], said) == (100, "customer 0", "1 to 100 of 3,000")
    last, said = names("?page=29")
    assert (last[-1], said) == ("customer 2999", "2,901 to 3,000 of 3,000")
    assert names("?page=99999999")[1] == names("?page=0")[1]  # a number of eight digits is none
    assert names("?page=5000000")[0] == last
    for query, found in {
        "?q=MER+277": "1 to 11 of 11",
        "?flagged=1": "1 to 10 of 10",
        "?q=nobody": "none found",
    }.items():
        assert names(query)[1] == found
    assert 'href="/run/many?q=&amp;page=1"' in served.get("/run/many").text


def test_one_adapter_and_a_run_of_many_that_goes_on(build_run: Build, served: Served) -> None:
    build_run(name="many", info=many_info(), train=many_rows(), evals=None)
    page = served.get("/adapter/many?name=Anna's Bakery").text
    assert "training loss from 2.50 at step 1" in page
    assert 'href="/run/many"' in page
    assert "did you mean" in served.get("/adapter/many?name=chloee").text
    info = {"status": "running", "planned_steps": 100, "processes": {"count": 1}}
    recipe = {"model": {"path": "x"}, "data": {"path": "x", "adapter_column": "customer"}}
    begin(build_run(name="going", info=info, train=many_rows(), evals=None, recipe=recipe))
    served.look_again()
    page = served.get("/run/going").text
    assert 'max="100.0" value="24.0"' in page  # steps of all adapters
    # 76 steps are left, two in a round of half a second
    for expected in ("Round 12 24 of 100 steps", "2 adapters trained together", "Left 19 s"):
        assert expected in text_of(page)


def test_adapters_of_all_processes_are_listed_while_they_train(
    build_run: Build, served: Served, tmp_path: Path
) -> None:
    """Each process but the first has a file of its own until the run ends."""
    recipe = {"model": {"path": "x"}, "data": {"path": "x", "adapter_column": "customer"}}
    info = {"status": "running", "processes": {"count": 2}}
    begin(build_run(name="many", info=info, train=many_rows(), evals=None, recipe=recipe))

    def names() -> list[str]:
        return re.findall(r'name="adapter" value="([^"]*)"', html.unescape(served.get("/run/many").text))

    assert names() == ["Anna's Bakery", "chloe"]
    for number, name in enumerate(("dora", "emil"), start=1):
        step = {"kind": "train", "adapter": name, "round": number, "step": number, "loss": 0.375}
        with (tmp_path / "many" / "metrics.rank-00001.jsonl").open("a") as file:
            file.write(json.dumps(step) + "\n")
        assert names() == ["Anna's Bakery", "chloe", "dora", "emil"][: 2 + number]
    assert "step 2: training loss 0.375" in text_of(served.get("/adapter/many?name=emil").text)


def test_runs_and_adapters_are_compared_as_qvera_compare_does(build_run: Build, served: Served, tmp_path: Path) -> None:
    runs = [build_run(name="one"), build_run(name="two", train=train_rows(50), info={"status": "interrupted"})]
    texts = (served.get("/compare?run=one&run=two").text, compare_page(compare_runs(runs)))
    inside = [re.findall(r"<main[^>]*>(.*)</main>", text, re.DOTALL) for text in texts]
    assert len(inside[0]) == 1
    assert inside[0] == inside[1]
    build_run(name="many", info=many_info(), train=many_rows(), evals=None)
    served.look_again()
    two = "/compare?run=many&adapter=Anna's Bakery&adapter=ben <b>"
    assert "ben &lt;b&gt;" in served.get(two).text
    (scored := tmp_path / "many" / "adapters" / "Anna=27s=20Bakery").mkdir(parents=True)
    (scored / "eval.json").write_text("{}")
    assert "Anna&#39;s Bakery: eval.json: has no key" in served.get(two).text
    nine = "?" + "&".join(f"run=r{n}" for n in range(9))
    refused = {"": "two runs or more", "?run=one": "got 1", "?run=one&run=one": "got 1", nine: "at most 8"}
    for query, said in refused.items():
        answer = served.get(f"/compare{query}")
        assert (answer.status_code, said in answer.text) == (400, True), query


def test_the_tokens_of_a_thinned_curve_are_those_of_all_steps(
    build_run: Build, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        metrics, "MOST_ROWS", 20
    )  # so every eighth step stays, and most held-out losses are between them
    build_run(name="short", train=train_rows(16), evals=None)
    build_run(name="long")
    page = served.get("/compare?run=short&run=long").text
    costs = text_of(page[page.index("Cost</h2>") :])
    assert "Tokens seen" in costs and "307 k" in costs  # 96 × 3,200
    assert page.count('class="dot held-out c2"') == 2 * 6  # by steps, and by tokens
    monkeypatch.setattr(metrics, "WHOLE_BYTES", 1000)  # of a longer file, samples are read
    build_run(name="sampled")
    served.look_again()
    page = served.get("/compare?run=short&run=sampled").text
    assert re.search("sampled: its files lack: [^<]*tokens seen", page)


def test_directories_are_named_so_that_no_two_runs_share_an_id(build_run: Build, tmp_path: Path) -> None:
    one, two = build_run(name="one"), tmp_path / "elsewhere" / "one"
    shutil.copytree(one, two)
    assert RunDirectories([one]).find() == {"one": one}
    assert RunDirectories([one, two, one]).find() == {"one": one, "one-2": two}
    assert RunDirectories([tmp_path]).find() == {"one": one, "elsewhere/one": two}
    with pytest.raises(InputError, match="no such directory"):
        RunDirectories([tmp_path / "nowhere"])


def test_the_server_loads_no_torch(build_run: Build, tmp_path: Path) -> None:
    build_run(name="one")
    code = """
import sys
from pathlib import Path
from qvera.cli import serve
from qvera.serve.api.server import Server
from qvera.serve.ui.app import create_app
from qvera.serve.ui.pages import Finder
pages = create_app([Path(sys.argv[1])]).state.service.pages
assert "Gradient norm" in pages.run("one", Finder("/", "", False, 0))
heavy = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "fastapi"} & set(sys.modules)
assert not heavy and len(sys.modules) < 1000, heavy
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
