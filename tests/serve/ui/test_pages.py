"""The pages of `qvera ui`: what they show of runs in every state, and that odd runs do not break them."""

from __future__ import annotations

import builtins
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qvera.serve.ui.directories import RunDirectories
from qvera.serve.ui.views import Summaries
from qvera.utils.errors import InputError
from qvera.utils.paths import RUN_OWNER
from tests.evaluation.report.conftest import adapter_entry, eval_rows, many_info, many_rows, run_info, train_rows
from tests.serve.ui.conftest import Served, append, begin

Build = Callable[..., Path]
Serve = Callable[..., Served]


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def rows_of(page: str) -> dict[str, list[str]]:
    """Id → cells of each row of the list."""
    rows = re.findall(r'<tr id="run-([^"]*)">(.*?)</tr>', page, re.DOTALL)
    return {
        html.unescape(id): [text_of(c).strip() for c in re.findall(r"<td[^>]*>(.*?)</td>", row)] for id, row in rows
    }


def test_the_list_says_where_every_run_is(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    build_run(name="done", info={**run_info(), "result": {**run_info()["result"], "planned_steps": 96}})
    begin(build_run(name="going", info=None, evals=None), status="running", planned_steps=200)
    build_run(name="stopped", info={"status": "interrupted"})
    build_run(name="broken", info={"status": "failed"})
    build_run(name="dead", info={"status": "running"}, train=None, evals=None)
    owner = {"host": os.uname().nodename, "pid": 1, "started": "1999-01-01"}  # another process has the number now
    (tmp_path / "dead" / RUN_OWNER).write_text(json.dumps(owner))
    page = serve(tmp_path).get("/")
    assert page.status_code == 200
    rows = rows_of(page.text)
    assert {id: cells[0] for id, cells in rows.items()} == {
        "going": "running",
        "stopped": "interrupted",
        "broken": "failed",
        "dead": "killed",
        "done": "finished",
    }
    assert next(iter(rows)) == "going"
    state, step, loss, held_out, _, left, _ = rows["going"]
    assert (step, held_out) == ("96 of 200", "–")
    seconds = [row["step_seconds"] for row in train_rows()[-50:]]
    assert left == f"{round(sum(seconds) / 50 * 104) // 60} min {round(sum(seconds) / 50 * 104) % 60:02d} s"
    assert float(loss) == pytest.approx(train_rows()[-1]["loss"], rel=1e-3)
    assert rows["done"][1:4] == ["96 of 96", rows["done"][2], "0.07350"]
    assert rows["dead"][1:6] == ["–", "–", "–", "–", ""]  # nothing is made up


def test_a_run_shows_its_report_and_where_it_is(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    run = begin(build_run(name="a", evals=eval_rows({40: 0.173})), **{**run_info(), "result": {}})
    info = json.loads((run / "run.json").read_text())
    info["samples"] = [{key: sample[key] for key in ("prompt", "reference", "before")} for sample in info["samples"]]
    (run / "run.json").write_text(json.dumps({**info, "status": "running", "planned_steps": 100}))
    page = serve(tmp_path).get("/run/a")
    text = text_of(page.text)
    assert page.status_code == 200
    for expected in ("running since 24 November", "Step 96 of 100", "Left", "Held-out loss 0.1730 at step 40"):
        assert expected in text
    for expected in ("Gradient norm", "Memory", "learning_rate", "Answered before training.", "qvera preview"):
        assert expected in text  # curves, recipe, samples
    assert 'max="100.0" value="96.0"' in page.text
    assert "killed" not in text
    assert page.text.count(" After ") == 0


def test_new_resumed_and_deleted_runs_are_noticed(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    served = serve(tmp_path)
    assert "No run is here yet" in served.get("/").text
    run = build_run(name="late", info={"status": "interrupted"})
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    shutil.copytree(run, deep / "copy")
    served.service.directories._scanned_at = None
    assert rows_of(served.get("/").text).keys() == {"late", "a/b/copy"}
    assert "interrupted" in served.get("/run/a/b/copy").text
    begin(deep / "copy")
    assert "Step" in text_of(served.get("/run/a/b/copy").text)
    assert rows_of(served.get("/").text)["a/b/copy"][0] == "running"
    shutil.rmtree(deep)
    assert served.get("/run/a/b/copy").status_code == 404
    served.service.directories._scanned_at = None
    assert rows_of(served.get("/").text).keys() == {"late"}


ODD: dict[str, Callable[[Path], object]] = {
    "empty": lambda run: [(run / name).write_bytes(b"") for name in ("run.json", "recipe.yaml", "metrics.jsonl")],
    "noise": lambda run: [
        (run / name).write_bytes(os.urandom(5000)) for name in ("run.json", "recipe.yaml", "metrics.jsonl")
    ],
    "half": lambda run: [
        os.truncate(run / name, (run / name).stat().st_size // 2) for name in ("run.json", "metrics.jsonl")
    ],
    "lists": lambda run: [(run / "run.json").write_text("[[[" * 5000), (run / "recipe.yaml").write_text("- " * 3000)],
    "other types": lambda run: [
        (run / "run.json").write_text(json.dumps({key: [1, None, "x"] for key in run_info()})),
        append(run, {"kind": "train", "step": 97, "loss": "x", "step_seconds": [1]}, {"kind": ["eval"], "step": 3}),
    ],
    "huge numbers": lambda run: append(
        run,
        {"kind": "train", "step": 1e300, "loss": 1e308},
        {"kind": "train", "step": 98, "loss": 1e99, "peak_bytes": 1e99},
    ),
    "not finite": lambda run: append(run, {"kind": "train", "step": 97, "loss": float("nan"), "step_seconds": 1e98}),
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


def test_an_odd_run_breaks_no_page(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    build_run(name="good")
    for kind, spoil in ODD.items():
        spoil(build_run(name=kind))
    served = serve(tmp_path)
    rows = rows_of(served.get("/").text)
    assert rows.keys() == {"good", *ODD}
    assert rows["good"][0] == "finished"
    for kind in ODD:
        assert served.get(f"/run/{kind}").status_code in (200, 400), kind
        assert served.get(f"/compare?run={kind}&run=good").status_code in (200, 400), kind
    assert served.get("/run/good").status_code == 200


def test_many_adapters_are_found_by_name_a_page_at_a_time(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    entries = [
        adapter_entry(f"customer {n}", f"customer-{n}", flags=["got worse"] if n % 1000 == 7 else [])
        for n in range(10_000)
    ]
    build_run(name="many", info={**many_info(), "adapters": entries}, train=None, evals=None)
    served = serve(tmp_path)

    def names(query: str) -> tuple[list[str], str]:
        page = served.get(f"/run/many{query}")
        assert page.status_code == 200
        shown = re.search(r'<span class="shown soft">(.*?)</span>', page.text)
        assert shown is not None
        return re.findall(r'name="adapter" value="([^"]*)"', page.text), shown[1]

    first, said = names("")
    assert (len(first), first[0], said) == (100, "customer 0", "1 to 100 of 10,000")
    last, said = names("?page=99")
    assert (last[-1], said) == ("customer 9999", "9,901 to 10,000 of 10,000")
    assert names("?page=99999999")[1] == names("?page=0")[1]  # a number of eight digits is none
    assert names("?page=5000000")[0] == last
    assert names("?q=MER+777")[1] == "1 to 11 of 11"
    assert names("?flagged=1")[1] == "1 to 10 of 10"
    assert names("?q=nobody")[1] == "none found"
    page = served.get("/run/many").text
    assert len(page) < 300_000
    assert 'href="/run/many?q=&amp;page=1"' in page


def test_one_adapter_and_a_comparison_of_adapters(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    build_run(name="many", info=many_info(), train=many_rows(), evals=None)
    served = serve(tmp_path)
    page = served.get("/adapter/many?name=Anna's Bakery")
    assert page.status_code == 200
    assert "training loss from 2.50 at step 1" in page.text
    assert 'href="/run/many"' in page.text
    assert "did you mean" in served.get("/adapter/many?name=chloee").text
    both = served.get("/compare?run=many&adapter=Anna's Bakery&adapter=ben <b>")
    assert both.status_code == 200
    assert "ben &lt;b&gt;" in both.text
    assert served.get("/compare?run=many&run=many").status_code == 400  # one run, named twice


def test_a_run_of_many_that_goes_on_shows_those_that_have_begun(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    info = {"status": "running", "planned_steps": 100, "processes": {"count": 1}}
    recipe = {"model": {"path": "x"}, "data": {"path": "x", "adapter_column": "customer"}}
    run = begin(build_run(name="many", info=info, train=many_rows(), evals=None, recipe=recipe))
    assert (run / "metrics.jsonl").is_file()
    page = serve(tmp_path).get("/run/many")
    text = text_of(page.text)
    assert "Round 12 24 of 100 steps" in text
    assert 'max="100.0" value="24.0"' in page.text  # steps of all adapters
    assert "2 adapters trained together" in text
    # 76 steps are left, two in a round of half a second
    assert "Left 19 s" in text


def test_runs_are_compared_as_qvera_compare_does(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    from qvera.evaluation.report.compare import compare_runs
    from qvera.evaluation.report.pages import compare_page

    runs = [build_run(name="one"), build_run(name="two", train=train_rows(50), info={"status": "interrupted"})]
    page = serve(tmp_path).get("/compare?run=one&run=two")
    assert page.status_code == 200
    inside = [
        re.search(r"<main[^>]*>(.*)</main>", text, re.DOTALL) for text in (page.text, compare_page(compare_runs(runs)))
    ]
    assert inside[0] is not None and inside[1] is not None
    assert inside[0][1] == inside[1][1]


def test_a_comparison_of_too_few_or_too_many_is_refused(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    build_run(name="one")
    served, nine = serve(tmp_path), "?" + "&".join(f"run=r{n}" for n in range(9))
    for query, said in (("", "two runs or more"), ("?run=one", "got 1"), (nine, "at most 8")):
        answer = served.get(f"/compare{query}")
        assert (answer.status_code, said in answer.text) == (400, True)


def test_a_hundred_runs_are_listed_from_two_reads_each_and_then_from_none(
    build_run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_run(name="run-0")
    for number in range(1, 100):
        shutil.copytree(first, tmp_path / f"run-{number}")
    opened: list[object] = []
    plain, low = builtins.open, os.open
    monkeypatch.setattr(builtins, "open", lambda *a, **k: opened.append(a[0]) or plain(*a, **k))
    monkeypatch.setattr("io.open", builtins.open)
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a[0]) or low(*a, **k))
    summaries = Summaries(RunDirectories([tmp_path]))

    def reads() -> list[str]:
        opened.clear()
        assert len(summaries.list()) == 100
        return [str(path) for path in opened if str(path).endswith(("run.json", "metrics.jsonl"))]

    assert len(reads()) <= 3 * 100  # run.json is opened once to see that it is a file
    assert reads() == []
    append(tmp_path / "run-7", {"kind": "train", "step": 97, "loss": 1.0})
    assert {Path(path).parent.name for path in reads()} == {"run-7"}


def test_directories_are_named_so_that_no_two_runs_share_an_id(build_run: Build, tmp_path: Path) -> None:
    one, two = build_run(name="one"), tmp_path / "elsewhere" / "one"
    two.parent.mkdir()
    shutil.copytree(one, two)
    assert RunDirectories([one]).find() == {"one": one}
    assert RunDirectories([one, two, one]).find() == {"one": one, "one-2": two}
    assert RunDirectories([tmp_path]).find() == {"one": one, "elsewhere/one": two}
    with pytest.raises(InputError, match="no such directory"):
        RunDirectories([tmp_path / "nowhere"])


def test_the_server_loads_no_torch(build_run: Build, tmp_path: Path) -> None:
    build_run(name="one")
    code = f"""
import sys
from pathlib import Path
from qvera.cli import serve
from qvera.serve.api.server import Server
from qvera.serve.ui.app import create_app
service = create_app([Path({str(tmp_path)!r})]).state.service
from qvera.serve.ui.pages import Finder
assert "one" in service.pages.runs(Finder("/", "", False, 0))
assert "Gradient norm" in service.pages.run("one", Finder("/", "", False, 0))
heavy = {{"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "fastapi"}} & set(sys.modules)
assert not heavy, heavy
print(len(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000
