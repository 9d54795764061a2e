"""Write the pages of a run into its directory."""

from pathlib import Path

from qvera.evaluation.report.many_pages import PAGES, adapter_page, many_page, page_file
from qvera.evaluation.report.read import read_run
from qvera.evaluation.report.read_many import read_many, trained_many
from qvera.evaluation.report.run_page import run_page
from qvera.utils.atomic import disk_errors, replace_text
from qvera.utils.paths import ADAPTER_WEIGHTS, ADAPTERS

_ADVICE = "The run's own files are untouched; mend that and write the report again."


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Reads recipe.yaml, metrics.jsonl and run.json. Each may be missing or cut off: a killed run has a report too, which
    says what could not be read. The page replaces an older one in one rename. Where a run trained many adapters, there
    is also a page for each of them, in ``report/``.

    Raises:
        InputError: The directory does not exist, or holds none of the three files.
        RunFailed: A page could not be written (a full disk, no permission). The run's own files are untouched.
    """
    root = Path(run_dir)
    run, target = read_run(root, metrics=False), root / "report.html"
    with disk_errors(str(target), _ADVICE):
        if not trained_many(run.info, run.recipe):
            replace_text(target, run_page(read_run(root)))
            return target
        many = read_many(root)
        (root / PAGES).mkdir(exist_ok=True)
        for entry in many.entries:
            page = root / PAGES / page_file(entry)
            if page_file(entry) and not _is_newer(page, root / ADAPTERS / entry.directory / ADAPTER_WEIGHTS):
                page.write_text(adapter_page(many, entry), encoding="utf-8")  # not flushed: it can be made again
        replace_text(target, many_page(many))
    return target


def _is_newer(page: Path, weights: Path) -> bool:
    """Whether a page is of these vectors: then an interrupted run of ten thousand does not write it again."""
    try:
        return page.stat().st_mtime_ns > weights.stat().st_mtime_ns
    except OSError:
        return False
