"""Runs that trained many adapters, and directories of adapters: opened by name, several in one batch."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from qvera import load
from qvera.adapters.adapter_file import read_adapter
from qvera.cli.main import main
from qvera.evaluation.load import find_target, open_run
from qvera.evaluation.named_adapters import require_named
from qvera.utils import memory
from qvera.utils.adapter_names import escape_name
from qvera.utils.errors import InputError
from tests.many_adapters import NAMES, write_customers, write_run

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def run(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    rows = write_customers(root / "rows.csv")
    recipe = make_recipe(data={"path": str(rows), "adapter_column": "customer", "eval_fraction": 0.3})
    return write_run(root / "run", recipe)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("say 3 red\nsay 14 blue\n", encoding="utf-8")
    return path


def answers(directory: Path, place: Path, *options: str) -> list[dict[str, str]]:
    """What `qvera generate PLACE OPTIONS` writes."""
    out = directory / f"answers-{time.monotonic_ns()}.jsonl"
    assert main(["generate", str(place), *options, "--out", str(out), "--max-new-tokens", "8"]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_several_answer_in_one_batch_as_each_does_alone(run: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    options = [part for name in NAMES[:3] for part in ("--adapter", name)]
    lines = answers(tmp_path, run, str(prompts), *options)
    assert [line["adapter"] for line in lines] == [*NAMES[:3], *NAMES[:3]]
    assert [line["prompt"] for line in lines] == ["say 3 red"] * 3 + ["say 14 blue"] * 3
    for name in NAMES[:3]:
        alone = answers(tmp_path, require_named(run, name), str(prompts))
        assert [line["answer"] for line in lines if line["adapter"] == name] == [line["answer"] for line in alone]
    assert len({line["answer"] for line in lines[:3]}) == 3, "the adapters differ"
    # a directory of adapters needs no run
    shelf = shutil.copytree(run / "adapters", tmp_path / "shelf")
    found = answers(tmp_path, shelf, str(prompts), "--adapter", "dan", "--adapter", "anna")
    alone = answers(tmp_path, require_named(run, "dan"), str(prompts))
    assert [line["answer"] for line in found][::2] == [line["answer"] for line in alone]
    capsys.readouterr()
    assert main(["info", str(shelf), "--json"]) == 0
    assert {one["name"] for one in json.loads(capsys.readouterr().out)["adapters"]} == set(NAMES)


def test_rows_name_their_adapters(run: Path, tmp_path: Path) -> None:
    names = ["dan", "anna", "dan", "../chloe"]
    for column in ("customer", "adapter"):
        rows = tmp_path / f"{column}.jsonl"
        rows.write_text("".join(json.dumps({column: name, "prompt": "say 3 red"}) + "\n" for name in names))
        lines = answers(tmp_path, run, str(rows))
        assert [line["adapter"] for line in lines] == names
        assert lines[0]["answer"] == lines[2]["answer"] != lines[1]["answer"]


def test_eval_scores_only_rows_of_the_adapter_where_the_file_names_them(run: Path, tmp_path: Path, capsys: Any) -> None:
    both, own, unnamed = (tmp_path / f"{name}.csv" for name in ("both", "own", "unnamed"))
    write_customers(both, ["anna", "dan"], each=6)
    header, *lines = both.read_text().splitlines(keepends=True)
    own.write_text(header + "".join(line for line in lines if line.startswith("dan,")))
    unnamed.write_text("".join(line.partition(",")[2] for line in (header, *lines)))

    def scores(data: Path, code: int = 0) -> dict[str, float]:
        out = tmp_path / f"{data.stem}.json"
        line = f"eval {run} --adapter dan --no-generation --data {data} --json {out}"
        assert main(line.split()) == code
        return json.loads(out.read_text())["scores"] if code == 0 else {}

    found, expected = scores(both), scores(own)
    assert found["rows"] == expected["rows"] == 6 and found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert f"{both}: 6 of its 12 rows are of adapter dan." in capsys.readouterr().err
    assert scores(unnamed)["rows"] == 12
    other = tmp_path / "other.csv"
    other.write_text(own.read_text().replace("dan,", "anna,"))
    scores(other, code=2)
    assert f"{other}: none of its rows names adapter dan." in capsys.readouterr().err


def test_answers_are_printed_after_their_names(run: Path, capsys: Any) -> None:
    line = ["generate", str(run), "--prompt", "say 3 red", "--adapter", "dan", "--adapter", "Ben & Söhne"]
    assert main([*line, "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("dan: ") and "\nBen & Söhne: " in said
    assert ">" not in said.partition(":")[0]
    assert main(["generate", str(run), "--base", "--prompt", "one", "--prompt", "two", "--max-new-tokens", "3"]) == 0
    assert [part.partition("\n")[0] for part in capsys.readouterr().out.split("> ")[1:]] == ["one", "two"]


def test_a_name_opens_its_own_adapter_and_reads_no_other(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    for name in NAMES:
        if name != "Anna":
            (require_named(copy, name) / "adapter_model.safetensors").write_bytes(b"broken")
    opened = open_run(copy, name="Anna")
    expected = read_adapter(require_named(run, "Anna"))[1]
    found = {key: value for key, value in opened.model.named_parameters() if "qvera_d" in key}
    assert len(found) == 14
    for key, value in found.items():
        assert value.equal(expected[key.replace(".default", "")]), key


def test_one_of_five_thousand_is_found_at_once(run: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    for number in range(5_000):
        config = tmp_path / "adapters" / f"customer{number}" / "adapter_config.json"
        config.parent.mkdir()
        config.touch()
    shutil.copy(run / "recipe.yaml", tmp_path)
    shutil.copytree(require_named(run, "dan"), tmp_path / "adapters" / "dan")
    seconds = []
    for _ in range(3):  # a collection of what other tests left may fall into one of them
        began = time.thread_time()
        target = find_target(tmp_path, name="dan")
        seconds.append(time.thread_time() - began)
        assert target.adapter == tmp_path / "adapters" / "dan"
    assert min(seconds) < 1.0
    with pytest.raises(InputError, match=r"did you mean 'customer4711'\?.*and 4,993 more"):
        find_target(tmp_path, name="custommer4711")


WRONG_LINES = [
    ("chat RUN --adapter ana", "--adapter ana: RUN has no adapter of this name; did you mean 'anna'?"),
    ("chat RUN", "RUN: has 5 adapters; name one with --adapter NAME. There are: "),
    ("chat RUN --adapter nan", "held-out loss was not finite, so its vectors were not saved."),
    ("eval RUN", "has 5 adapters"),
    ("export RUN OUT", "has 5 adapters"),
    ("info RUN --adapter Dan", "did you mean 'dan'?"),
    ("generate RUN PROMPTS", "has 5 adapters"),
    ("generate RUN PROMPTS --adapter dan --adapter bem", "--adapter bem: RUN has no adapter of this name"),
    ("generate RUN", "or --prompt TEXT; give one of them."),
    ("generate RUN PROMPTS --prompt x", "or --prompt TEXT; give one of them."),
    ("generate RUN ROWS", "rows.jsonl:2: names no adapter. Expected one in its column 'customer' or 'adapter'"),
    ("generate RUN STRANGER", "rows.csv:3: RUN has no adapter bem. There are: "),
    ("merge-adapters RUN RUN OUT --adapter dan", "--adapter: takes the adapters of one run"),
    ("compare RUN RUN2", "RUN: trained many adapters; name those to compare with --adapter NAME."),
    (
        "compare RUN --adapter dan",
        "compare takes two runs or more, got 1. Of adapters of one run, name each with --adapter NAME.",
    ),
    ("compare RUN --adapter dan --adapter bem", "--adapter bem: RUN has no adapter of this name"),
    ("compare RUN --adapter dan --adapter dan", "dan: is named twice"),
    ("info RUN/adapters/dan --adapter dan", "is for a run that trained many adapters"),
]


def test_wrong_lines_are_answered_before_anything_is_loaded(
    run: Path, prompts: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"customer": "dan", "prompt": "x"}\n{"prompt": "x"}\n')
    (tmp_path / "rows.csv").write_text("customer,prompt\ndan,x\nbem,x\nbem,y\n")
    places = {"RUN2": shutil.copytree(run, tmp_path / "two"), "RUN": run, "PROMPTS": prompts}
    places |= {"OUT": tmp_path / "out", "ROWS": tmp_path / "rows.jsonl", "STRANGER": tmp_path / "rows.csv"}
    monkeypatch.setattr("qvera.models.loader.load_base", lambda *_: pytest.fail("a model was loaded"))
    for line, said in WRONG_LINES:
        for word, path in places.items():
            line, said = line.replace(word, str(path)), said.replace(word, str(path))
        assert main(line.split()) == 2, line
        assert said in capsys.readouterr().err


def test_eval_scores_the_rows_of_one_adapter(run: Path, tmp_path: Path, capsys: Any) -> None:
    places = (f"{run} --adapter dan", str(require_named(run, "dan")))  # its own directory says the same
    documents: list[dict[str, Any]] = []
    for place in places:
        assert main(f"eval {place} --no-generation --json {tmp_path}/{len(documents)}.json".split()) == 0
        documents.append(json.loads((tmp_path / f"{len(documents)}.json").read_text()))
    assert documents[0]["scores"]["rows"] == 3
    assert documents[0]["subject"]["what"] == "Adapter 'dan'"
    assert documents[1]["scores"]["loss"] == documents[0]["scores"]["loss"]
    # the base alone has all rows, and no adapter has to be named
    assert main(["eval", str(run), "--base", "--no-generation"]) == 0
    assert "15" in capsys.readouterr().out


def test_an_adapter_without_held_out_rows(make_recipe: Any, tmp_path: Path, capsys: Any) -> None:
    """It is compared on its own training rows, and scored on a file only."""
    rows = write_customers(tmp_path / "rows.csv", ["anna"])
    with open(rows, "a", encoding="utf-8") as file:
        file.write("solo,say 1 green,green green\n")
    recipe = make_recipe(data={"path": str(rows), "adapter_column": "customer", "eval_fraction": 0.3})
    run = write_run(tmp_path / "run", recipe, ["anna", "solo"])
    for name, options in (("merged", "--dtype float32"), ("lora", "--to lora --rank 2")):
        assert main(f"export {run} --adapter solo {tmp_path / name} {options}".split()) == 0
        assert "trained vs exported on 1 training row: loss" in capsys.readouterr().out
        found = json.loads((tmp_path / name / "qvera_export.json").read_text())["difference"]
        assert (found["split"], found["trained"]["rows"] if name == "lora" else found["rows"]) == ("training", 1)
    shutil.copytree(run / "adapters" / "solo", run / "adapters" / "job")  # as a server's job leaves one there
    assert main(f"export {run} --adapter job {tmp_path / 'of_job'}".split()) == 0
    assert capsys.readouterr().out.endswith(
        f"not measured: the data of {run} has no rows of adapter job to compare on.\n"
    )
    assert main(f"eval {run} --adapter job --no-generation".split()) == 2
    assert "adapter job has no held-out rows" in capsys.readouterr().err
    assert main(f"eval {run} --adapter solo --no-generation".split()) == 2
    said = "adapter solo has no held-out rows, so there is nothing to score it on. Name a file with --data."
    assert said in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("the sea is grey\n")
    assert main(f"analyze {run} --adapter solo --top-k 2 --text {tmp_path}/text.txt --json".split()) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert [one["text"] for one in losses] == [str(tmp_path / "text.txt")]


def test_what_is_advised_for_one_of_many_names_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    mine = shutil.copytree(run, tmp_path / "mine")
    summary = json.loads((mine / "run.json").read_text())
    summary["data"]["sha256"] = "0" * 64  # of other rows
    (mine / "run.json").write_text(json.dumps(summary))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda _: 1000)
        assert main(["export", str(mine), str(tmp_path / "out"), "--adapter", "Ben & Söhne"]) == 0
    (advised,) = re.findall("`qvera (export .*--compare-only)`", capsys.readouterr().out)
    assert main(shlex.split(advised)) == 0
    (advised,) = re.findall("never seen: qvera (eval .*) --data FILE", capsys.readouterr().err)
    assert shlex.split(advised) == ["eval", str(mine), "--adapter", "Ben & Söhne"]


def test_export_merge_and_chat_take_one_by_name(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    merged = tmp_path / "merged"
    assert main(["export", str(run), str(merged), "--adapter", "../chloe", "--dtype", "float32"]) == 0
    difference = json.loads((merged / "qvera_export.json").read_text())["difference"]
    assert (difference["rows"], difference["split"]) == (3, "held-out")
    target = find_target(merged)
    assert (target.name, target.run) == ("../chloe", run)
    line = ["merge-adapters", str(run), str(tmp_path / "sum"), "--weights", "1", "-0.5", "--to", "lora"]
    assert main([*line, "--adapter", "dan", "--adapter", "anna"]) == 0
    assert main([*line[:2], str(run / "adapters" / "dan"), str(tmp_path / "two"), "--to", "lora"]) == 2
    assert f"Name their directories, such as {run}/adapters/NAME; or {run} alone" in capsys.readouterr().err
    assert (tmp_path / "sum" / "adapter_config.json").is_file()
    shelf = shutil.copytree(run / "adapters", tmp_path / "shelf")
    for name in ("dan", "anna"):  # each was trained elsewhere
        (shelf / name / "chat_template.jinja").write_text(name)
    line = ["merge-adapters", str(shelf), str(tmp_path / "sum of two"), "--to", "lora"]
    assert main([*line, "--adapter", "dan", "--adapter", "anna"]) == 0
    assert "different chat templates, so none is written" in capsys.readouterr().out
    assert not (tmp_path / "sum of two" / "chat_template.jinja").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO("say 3 red\n/quit\n"))
    assert main(["chat", str(run), "--adapter", "dan", "--max-new-tokens", "3"]) == 0


def test_info_shows_a_table_and_one_of_them(run: Path, capsys: Any) -> None:
    other = run / "adapters" / "notes"  # which is no adapter
    other.mkdir()
    assert main(["info", str(run)]) == 0
    assert len(load(run).names) == 5
    other.rmdir()
    said = capsys.readouterr().out
    assert "saved_adapters        5" in said
    (row,) = (line for line in said.splitlines() if line.startswith("Ben & Söhne"))
    assert row.split()[3:] == ["7", "3", "6", "2.4000", "1.5000", "2.5000", "1.2500", "done"]
    (row,) = (line for line in said.splitlines() if line.startswith("nan"))
    assert row.split()[-2:] == ["not", "finite"]
    assert main(["info", str(run), "--adapter", "Anna", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["rank"], facts["steps"]) == ("Anna", 8, 6)
    assert facts["path"].endswith(f"adapters/{require_named(run, 'Anna').name}")
    assert main(["info", str(run / "adapters" / escape_name("dan"))]) == 0
