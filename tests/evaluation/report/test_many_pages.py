"""The pages of a run that trained many adapters, and comparisons of its adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qvera.evaluation.report.compare import compare_runs
from qvera.evaluation.report.read import AdapterEntry, read_many
from qvera.evaluation.report.run_page import many_page, write_report
from qvera.utils.errors import InputError
from tests.evaluation.report.conftest import RECIPE, adapter_entry, many_info, many_rows
from tests.evaluation.report.test_run_page import Page

Build = Callable[..., Path]
MANY_RECIPE = {**RECIPE, "data": {"path": "data/rows.csv", "adapter_column": "customer", "eval_fraction": 0.2}}


@pytest.fixture
def run(build_run: Build) -> Path:
    return build_run(many_info(), many_rows(), None, MANY_RECIPE)


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_has_every_adapter_and_says_which_to_look_at(run: Path) -> None:
    found = page(write_report(run))
    for fact in (
        "4 adapters trained together, each VeRA of rank 256 on 210 linear layers",
        "Held-out loss, median of the adapters before 2.40 → , after 2.05",
        "Done 1 Stopped early 1 Not finite 1 No rows 1",
        "Got worse : 1 adapter, ben <b> .",
        "Too few rows : 1 adapter, ben <b> .",
        "Anna's Bakery 1,240 3 6 2.400 1.500 2.500 1.250 done",
        "ben <b> 2 3 6 2.400 2.600 2.500 1.250 stopped early; got worse ; too few rows",
        "chloe 7 3 6 2.400 – 2.500 1.250 not finite",
        "dan 0 0 0 – – – – no rows",
        "Time 2 min 00 s 60 adapters an hour",
        "Parameters an adapter 209 k exactly 209,280",
        "data.adapter_column customer",
    ):
        assert fact in found.text, fact
    links = [attributes["href"] for tag, attributes in found.elements if tag == "a"]
    # in the notices, then in the table; dan has no page
    assert links[-3:] == ["report/Anna%3D27s%3D20Bakery.html", "report/ben.html", "report/chloe.html"]
    assert sorted(path.name for path in (run / "report").iterdir()) == [
        "Anna=27s=20Bakery.html",
        "ben.html",
        "chloe.html",
    ]
    assert found.count("tr", class_="flagged") == 3


def test_the_page_of_an_adapter_has_its_curve_and_facts(run: Path) -> None:
    write_report(run)
    anna = page(run / "report" / "Anna=27s=20Bakery.html")
    for fact in (
        "An adapter of quickstart · done",
        "Held-out loss 2.40 1.50",
        "Rows 1,240",
        "Files adapters/Anna=27s=20Bakery",
    ):
        assert fact in anna.text, fact
    assert [one["href"] for tag, one in anna.elements if tag == "a"] == ["../report.html"]
    assert anna.count("svg", class_="axes") == 3
    source = (run / "report" / "Anna=27s=20Bakery.html").read_text(encoding="utf-8")
    assert "held-out loss 1.40" in source
    assert "step 12" in source
    assert "Stopped: step 3: the loss is NaN." in page(run / "report" / "chloe.html").text


def test_a_killed_run_has_its_adapters_from_the_metrics(build_run: Build) -> None:
    run = build_run(None, many_rows(), None, MANY_RECIPE, tail='{"kind": "tra')
    found = page(write_report(run)).text
    assert "2 adapters trained together" in found
    assert "Anna's Bakery – – – – – unfinished" in found
    assert "The last line of metrics.jsonl is cut off" in found
    assert "still going after step 12" in found


def test_rounds_are_those_of_the_first_process_and_steps_are_read_once(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "adapter": "chloe", "step": 12, "loss": 0.5}) + "\n")
    many = read_many(run)
    assert [row["adapters"] for row in many.run.train] == [2] * 12
    train = many.curves["chloe"].rows("train")
    assert [row["step"] for row in train] == list(range(1, 13))
    assert train[-1]["loss"] == 0.5


def test_a_damaged_run_json_is_still_a_page_and_writes_nowhere_else(build_run: Build, tmp_path: Path) -> None:
    info = many_info()
    info["adapters"] = [
        *("text", None, {"name": ""}, {"name": "up", "directory": "../../up", "rows": "many", "flags": "odd"}),
        {"name": "here", "directory": ".", "eval_after": [1], "status": ["done"]},
        adapter_entry("\ud800 </table><script>", "good", flags=[3, None]),
    ]
    run = build_run(info, many_rows(), None, MANY_RECIPE)
    found = page(write_report(run))
    assert "5 adapters trained together" in found.text  # two of them from metrics.jsonl
    assert [path.name for path in (run / "report").iterdir()] == ["good.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart"]
    assert found.count("script") == 1


def test_a_page_of_an_adapter_is_written_again_only_for_new_vectors(run: Path) -> None:
    weights = run / "adapters" / "ben" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"vectors")
    write_report(run)
    pages = {path: path.stat().st_ino for path in (run / "report").iterdir()}
    (run / "report" / "ben.html").write_text("kept")
    write_report(run)
    assert (run / "report" / "ben.html").read_text() == "kept"
    weights.write_bytes(b"others")
    write_report(run)
    assert "kept" not in (run / "report" / "ben.html").read_text()
    assert len(pages) == 3


def test_a_page_of_ten_thousand_stays_small(run: Path) -> None:
    many = read_many(run)
    more = [
        AdapterEntry(f"customer {n}", f"customer=20{n}", "done", 20, 4, 30, 20, 2.5, 0.5, 2.4, 0.6)
        for n in range(9_996)
    ]
    many.entries.extend(more)
    assert len(many_page(many).encode()) < 2_500_000


def test_adapters_are_compared_within_a_run_and_between_runs(run: Path, build_run: Build) -> None:
    within = compare_runs([run], ["Anna's Bakery", "ben <b>"])
    assert list(within.runs) == ["Anna's Bakery", "ben <b>"]
    assert [figures["loss_after"] for figures in within.figures.values()] == [1.5, 2.6]
    assert within.figures["Anna's Bakery"]["loss_lowest"] == 1.4
    other = build_run(many_info(), many_rows(), None, MANY_RECIPE, name="other")
    assert list(compare_runs([run, other], ["chloe"]).runs) == ["quickstart", "other"]
    assert list(compare_runs([run, other], ["chloe", "dan"]).runs)[1] == "quickstart: dan"
    with pytest.raises(InputError, match=r"--adapter chlo: .* has no adapter of this name; did you mean 'chloe'\?"):
        compare_runs([run, other], ["chlo"])
    plain = build_run(name="plain")
    with pytest.raises(InputError, match="did not train many adapters"):
        compare_runs([run, plain], ["chloe"])
