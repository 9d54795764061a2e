"""The pages of qvera: one HTML file each, which loads nothing from anywhere.

`read` reads a run directory; `run_page` and `pages` compute what each page shows; `charts` turns values into positions;
the templates draw both.
"""

from __future__ import annotations

from pathlib import Path

from qvera.evaluation.report.read import Run, read_run
from qvera.utils.atomic import disk_errors, replace_text

__all__ = ["Run", "read_run", "write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Reads recipe.yaml, metrics.jsonl and run.json. Each may be missing or cut off: a killed run has a report too, which
    says what could not be read. The page replaces an older one in one rename.

    Raises:
        InputError: The directory does not exist, or holds none of the three files.
        RunFailed: The page could not be written (a full disk, no permission). The run's own files are untouched.
    """
    from qvera.evaluation.report.run_page import run_page  # here, so that reading runs loads no templates

    page, target = run_page(read_run(run_dir)), Path(run_dir) / "report.html"
    with disk_errors(str(target), "The run's own files are untouched; mend that and write the report again."):
        replace_text(target, page)
    return target
