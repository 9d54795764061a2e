"""The page in a real browser. Skipped, with the reason, where there is no Chromium."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qvera.evaluation.report.compare import compare_runs
from qvera.evaluation.report.pages import compare_page
from qvera.evaluation.report.run_page import write_report
from qvera.lab.analysis import analysis_page
from tests.evaluation.report.conftest import adapter_entry, analysis, many_info, many_rows, plan, run_info, train_rows
from tests.evaluation.report.pages import Build, answers, many, ramp, runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH"), pytest.mark.process]

QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
QUIET += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000"


def dump_dom(path: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what it wrote to the console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET.split(), *flags, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def with_script(report: Path, name: str) -> Path:
    """A copy of the page whose policy is taken out and that runs ``probes/NAME.js`` at its end."""
    script = (Path(__file__).parent / "probes" / f"{name}.js").read_text(encoding="utf-8")
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    copy = report.with_name("probed.html")
    copy.write_text(source.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy


def test_charts_are_drawn_and_the_script_runs_under_the_policy(build_run: Build, tmp_path: Path) -> None:
    dom, console = dump_dom(write_report(build_run()), tmp_path / "profile")
    assert console == []
    assert '<html lang="en" class="js">' in dom
    assert len(re.findall(r'<svg class="axes"', dom)) == 6
    # 1 + 2 curves of loss, 1 each of rate, norm and speed, 2 of memory
    assert len(re.findall(r'<path class="[^"]+" d="M[\d. L]+', dom)) == 8
    assert "87.5 %" in dom


def test_hostile_text_does_nothing(build_run: Build, tmp_path: Path) -> None:
    attack = "</pre></script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    info = run_info()
    for sample in info["samples"]:
        sample.update(prompt=attack, reference=attack, before=attack, after=attack + " more")
    info["model"]["path"] = info["device"] = info["versions"]["torch"] = attack
    dom, console = dump_dom(write_report(build_run(info=info)), tmp_path / "profile")
    assert console == []
    assert "<title>taken" not in dom
    assert "<img" not in dom
    assert html.escape(attack, quote=False) in dom


def test_runs_are_pointed_at_together_by_steps_and_by_tokens(build_run: Build, tmp_path: Path) -> None:
    places = [build_run(name="one"), build_run(name="two", train=train_rows(96))]
    (tmp_path / "runs.html").write_text(compare_page(compare_runs(places)))
    dom, console = dump_dom(with_script(tmp_path / "runs.html", "pointed_together"), tmp_path / "profile")
    assert console == []
    number, by_step, by_token, colours = re.findall(r"<title>(.*?)</title>", dom)[0].split(" ; ")
    assert (number, colours) == ("4", "2")
    assert by_step.startswith("step 96|one 0.0")
    assert "|two 0.0" in by_step
    assert by_token.startswith("307,200 tokens|one 0.0")


def test_pointing_at_a_chart_shows_the_step_in_all_of_them(build_run: Build, tmp_path: Path) -> None:
    dom, console = dump_dom(with_script(write_report(build_run()), "pointed"), tmp_path / "profile")
    assert console == []
    title = re.findall(r"<title>(.*?)</title>", dom)[0]
    count, loss, memory, left, keyed = title.split(" ; ")
    assert re.fullmatch(r"step 80\|training loss 0\.0.*\|held-out loss 0\.0712", loss)
    assert re.fullmatch(r"step 80\|in use 9.*\|peak 1\.18 GB", memory)
    assert (count, left, keyed) == ("5", "0", "step 96")


def test_the_table_of_adapters_is_sorted_filtered_and_cut(build_run: Build, tmp_path: Path) -> None:
    info = many_info()
    after = {"loss": 1.75}
    info["adapters"] += [adapter_entry(f"customer {n}", f"c{n}", rows=5 + n, eval_after=after) for n in range(300)]
    report = write_report(build_run(info=info, train=many_rows(), evals=None))
    dom, console = dump_dom(with_script(report, "sorted_table"), tmp_path / "profile")
    assert console == []
    assert html.unescape(re.findall(r"<title>(.*?)</title>", dom)[0]).split("|") == [
        *("200", "200 of 304", "dan", "ascending", "Anna's Bakery", "descending", "Anna's Bakery"),
        *("304", "chloe, dan", "304 of 304", "Anna's Bakery", "1 of 1", "ben <b>, chloe, dan"),
    ]


def analyzed(build_run: Build, root: Path) -> Path:
    """The layers of a 70B."""
    (root / "analysis.html").write_text(analysis_page(analysis(80)))
    return root / "analysis.html"


PAGES: dict[str, Callable[[Build, Path], Path]] = {
    "report": lambda build_run, root: write_report(build_run(info=run_info() | {"plan": plan(1.0e9)})),
    "eval": answers,
    "compare": runs,
    "find-lr": ramp,
    "analyze": analyzed,
    "many": many,
    "adapter": lambda build_run, root: many(build_run, root).parent / "report" / "ben.html",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_its_width_and_can_be_read(build_run: Build, tmp_path: Path, scheme: str) -> None:
    """No sideways scrolling, every tick inside the window, and text at 4.5:1 or better (WCAG AA), at two widths."""
    # Chromium's own window is never narrower than 500 px, a frame is
    frames = ""
    for name, write in PAGES.items():
        (tmp_path / name).mkdir()
        source = html.escape(with_script(write(build_run, tmp_path / name), "fits").read_text(encoding="utf-8"))
        for width in (390, 1200):
            frames += f'<iframe id="{name}" style="border:0;width:{width}px" srcdoc="{source}"></iframe>'
    document = tmp_path / "frames.html"
    document.write_text(f'<!doctype html><meta charset="utf-8"><title></title>{frames}', encoding="utf-8")
    number = {"dark": 0, "light": 1}[scheme]
    flags = (f"--blink-settings=preferredColorScheme={number}", "--window-size=1300,1000")
    dom, console = dump_dom(document, tmp_path / "profile", *flags)
    assert console == []
    results = [line.split(" ") for line in re.findall(r"<title>(.*?);</title>", dom)[0].split(";")]
    both = [(page, width) for page in PAGES for width in ("390", "1200")]
    assert sorted((page, inner) for page, inner, *_ in results) == sorted(both)
    for page, inner, scroll, left, right, worst, drawn in results:
        assert (drawn, left, right) == (scheme, "true", "true"), page
        assert int(scroll) <= int(inner) and float(worst) >= 4.5, page
