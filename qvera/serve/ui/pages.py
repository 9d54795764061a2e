"""The pages: those of the report, with what a server adds. Each is made once for all its readers."""

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from qvera.evaluation.report.compare import compare, require_comparable
from qvera.evaluation.report.pages import compare_page, render
from qvera.evaluation.report.read import RunFiles, get_number, read_many
from qvera.evaluation.report.run_page import adapter_page, many_page, run_page
from qvera.serve.ui.directories import MOST_RUNS, RunDirectories
from qvera.serve.ui.start import Starter
from qvera.serve.ui.views import NotFound, Progress, Summaries, Summary, View, Views, four_digits, left_seconds
from qvera.utils.errors import InputError
from qvera.utils.formatting import count, duration

MOST_PAGES = 64
PAGE_ROWS = 100
T = TypeVar("T")


def run_href(id: str) -> str:
    """The path of a run's page."""
    return f"/run/{quote(id)}"


@dataclass(frozen=True)
class Finder:
    """The form above a table, for the macro `finder` of templates/parts.html."""

    action: str  # the page's path
    text: str  # part of a name, to find rows
    flagged: bool  # only rows that need a look
    page: int  # from 0
    found: int = 0

    @property
    def shown(self) -> str:
        """The numbers of the rows that are shown, in words."""
        first, last = self.page * PAGE_ROWS, min(self.found, (self.page + 1) * PAGE_ROWS)
        return f"{first + 1:,} to {last:,} of {self.found:,}" if last else "none found"

    @property
    def links(self) -> list[tuple[str, str]]:
        """Links to the previous and next page, with their titles."""
        links = [("Previous", self.page - 1)] if self.page else []
        if (self.page + 1) * PAGE_ROWS < self.found:
            links.append(("Next", self.page + 1))
        kept = {"q": self.text, **({"flagged": "1"} if self.flagged else {})}
        return [(title, f"{self.action}?{urlencode({**kept, 'page': page})}") for title, page in links]


def find(
    rows: Sequence[T], asked: Finder, name: Callable[[T], str], is_flagged: Callable[[T], bool] = lambda row: True
) -> tuple[list[T], Finder]:
    """Return the rows that a form asks for, and the form with their number."""
    wanted = asked.text.strip().lower()
    fitting = [row for row in rows if wanted in name(row).lower() and (not asked.flagged or is_flagged(row))]
    page = min(asked.page, max(0, (len(fitting) - 1) // PAGE_ROWS))
    shown = fitting[page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
    return shown, dataclasses.replace(asked, page=page, found=len(fitting))


class Pages:
    """Every page as HTML. Methods may be called from any thread, and raise what `Views` raises."""

    def __init__(self, place: str, directories: RunDirectories, summaries: Summaries) -> None:
        """``place``: what the command line names, for the list's heading."""
        self._place, self._directories, self._summaries, self._views = place, directories, summaries, Views(directories)
        self.starter: Starter | None = None  # with --train
        self._made: OrderedDict[object, tuple[object, str]] = OrderedDict()
        self._lock = threading.Lock()

    def runs(self, asked: Finder) -> str:
        """The list of all runs."""
        runs = self._summaries.list()
        shown, finder = find(runs, asked, lambda run: run.id)

        def make() -> str:
            cut = f"There are more runs than the {MOST_RUNS:,} that are looked at." if self._directories.is_cut else ""
            return render(
                "runs.html",
                place=self._place,
                notices=[cut] if cut else [],
                empty_text=f"No run of this name is in {self._place}."
                if runs
                else "No run is here yet; the next one shows up.",
                runs=[(run, run_href(run.id), run.cells) for run in shown],
                served=_served([], f"/events/runs?{urlencode({'seen': list_signature(runs)})}", finder=finder)
                | ({} if self.starter is None else {"form": ("New run", "/new")}),
            )

        return self._once(("runs", asked), (shown, finder, bool(runs), self._directories.is_cut), make)

    def run(self, id: str, asked: Finder) -> str:
        """A run's page."""
        view = self._views.get(id)

        def make() -> str:
            events = f"/events/run/{quote(id)}?{urlencode({'from': view.read.position, 'seen': view.signature})}"
            served = _served([(id, "")], events, id=id, state=view.state, recipe=f"{view.directory}/recipe.yaml")
            served |= _now(view)
            name, starter = view.directory.name, self.starter
            if starter is not None and (starter.place / f"{name}.yaml").is_file() and starter.id_of(name) == id:
                served["form"] = ("Recipe, stop, chat", f"/recipe/{quote(name)}")
            if view.many is None:
                return run_page(view.run, served=served)
            shown, finder = find(view.many.entries, asked, lambda entry: entry.name, lambda entry: bool(entry.remarks))
            served["finder"] = finder
            return many_page(view.many, shown, lambda entry: adapter_href(id, entry.name), served=served)

        entries = view.many and view.many.entries  # which other processes may have added to
        return self._once(("run", id, asked), (view.signature, view.read.position, entries), make)

    def adapter(self, id: str, name: str) -> str:
        """The page of one adapter of a run of many."""
        view, entry = self._views.adapter(id, name)

        def make() -> str:
            many = dataclasses.replace(read_many(view.directory, only=name), entries=[entry])
            many = dataclasses.replace(many, run=dataclasses.replace(many.run, name=id))
            trail = [(id, run_href(id)), (name, "")]
            return adapter_page(many, entry, run_href(id), served=_served(trail))

        return self._once(("adapter", id, name), (view.signature, view.read.position, entry), make)

    def compare(self, ids: Sequence[str], adapters: Sequence[str]) -> str:
        """Two to eight runs side by side, or adapters of one run."""
        ids, adapters = list(dict.fromkeys(ids)), list(dict.fromkeys(adapters))
        require_comparable(len(ids) * max(1, len(adapters)))
        views = self._views
        if adapters and len(ids) != 1:
            raise InputError("adapters are compared within one run; choose them on its page.")
        signatures = [(one.signature, one.read.position) for one in map(views.get, ids)]
        scored = [views.stamps_of_scores(ids[0], name) for name in adapters]

        def make() -> str:
            runs: dict[str, RunFiles] = (
                {name: views.adapter_with_scores(ids[0], name) for name in adapters}
                if adapters
                else {id: views.with_scores(id) for id in ids}
            )
            trail = [(ids[0], run_href(ids[0]))] if adapters else []
            return compare_page(compare(runs), served=_served([*trail, ("compare", "")]))

        return self._once(("compare", tuple(ids), tuple(adapters)), (signatures, scored), make)

    def refused(self, title: str, reasons: Sequence[str], id: str = "") -> str:
        """A page that says what can't be shown. ``id``: of a run, whose training may have ended before it began."""
        name = id.rpartition("/")[2]
        recipe = f"/recipe/{quote(name)}" if self.starter is not None and self.starter.has_trained(name) else ""
        return render("refused.html", title=title, reasons=reasons, recipe=recipe, served=_served([(title, "")]))

    def form(self, template: str, title: str, parts: Mapping[str, object], events: str = "") -> str:
        """A page of `qvera ui --train`."""
        return render(template, title=title, served=_served([(title, "")], events), starter=self.starter, **parts)

    def recipe(self, name: str) -> str:
        """The page of a recipe: its plan, its training, its server. It hears of news of the list."""
        assert self.starter is not None
        file, runs, id = self.starter.recipe(name), self._summaries.list(), self.starter.id_of(name)
        if not file.is_file():
            raise NotFound(f"There is no recipe {file}.")
        state = next((run.state for run in runs if run.id == id), "")
        if state not in ("", "running"):
            self.starter.await_end(name)
        parts = {"text": file.read_text("utf-8", "replace"), "state": state, "run": id and run_href(id)}
        return self.form("recipe.html", name, parts, f"/events/runs?{urlencode({'seen': list_signature(runs)})}")

    def _once(self, key: object, signature: object, make: Callable[[], str]) -> str:
        """Return the page that was made before if key and signature are the same, else a new one."""
        with self._lock:
            known = self._made.get(key)
        if known is not None and known[0] == signature:
            return known[1]
        page = make()
        with self._lock:
            self._made[key] = signature, page
            self._made.move_to_end(key)
            while len(self._made) > MOST_PAGES:
                self._made.popitem(last=False)
        return page


def adapter_href(id: str, name: str) -> str:
    """The path of an adapter's page."""
    return f"/adapter/{quote(id)}?{urlencode({'name': name})}"


def list_signature(runs: Sequence[Summary]) -> str:
    """Return a short hash of a list of runs. It differs between lists that differ."""
    return hashlib.sha256(repr(runs).encode(errors="replace")).hexdigest()[:16]


def _served(trail: Sequence[tuple[str, str]], events: str = "", **more: Any) -> dict[str, Any]:
    """Return the values that templates get from the server: the page's place, and where its events come from."""
    return {"trail": trail, "events": events, "now": [], "planned_steps": None, "form": None, **more}


def _now(view: View) -> dict[str, Any]:
    """Return the figures of a running run: key, title, value and note of each."""
    if view.state != "running":
        return {}
    last, phase = view.read.train.last, Progress.of(view.directory)
    left = phase.left_seconds
    shown_phase = [("phase", "Now", phase.name, phase.counted)] if phase.name not in ("", "training") else []
    if last is None:
        return {"now": shown_phase + ([] if left is None else [("left", "Left", duration(left), "of this phase")])}
    step, is_many = get_number(last, "step") or 0.0, view.many is not None
    planned, many_steps = view.run.number("planned_steps"), view.read.adapter_steps
    if is_many and (view.read.sampled_bytes or (view.run.number("processes", "count") or 1) > 1):
        planned = None  # not all steps of the adapters are known
    done = many_steps if is_many else step
    if left is None or shown_phase:
        left = None if planned is None else left_seconds(view.read.train.rows(), planned - done)
        if is_many and left is not None:
            left /= max(1.0, many_steps / max(1.0, step))  # a round is a step of several adapters
    held_out = view.read.evals.last
    of = "" if planned is None else f"{done:,.0f} of {planned:,.0f} steps" if is_many else f"of {planned:,.0f}"

    def text(record: dict[str, Any] | None, key: str, format: Callable[[float], str]) -> str:
        return "" if (value := get_number(record, key)) is None else format(value)

    figures = [
        *shown_phase,
        ("step", "Round" if is_many else "Step", f"{step:,.0f}", of),
        ("left", "Left", "" if left is None else duration(left), "at the pace of the last steps"),
        ("loss", "Training loss", text(last, "loss", four_digits), "of the last step"),
        (
            "held-out",
            "Held-out loss",
            text(held_out, "loss", four_digits),
            "" if held_out is None else f"at step {get_number(held_out, 'step'):,.0f}",
        ),
        ("speed", "Tokens per second", text(last, "tokens_per_second", count), "in the last step"),
    ]
    shown = [figure for figure in figures if figure[2]]
    return {"now": shown, "planned_steps": planned, "step": done}
