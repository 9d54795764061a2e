"""The pages of qvera: one HTML file each, which loads nothing from anywhere.

`read` reads a run directory; `run_page` and `pages` compute what each page shows; `charts` turns values into positions;
the templates draw both.
"""

from __future__ import annotations

from pathlib import Path

from qvera.evaluation.report.read import Run, read_run
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError, RunFailed

__all__ = ["Run", "read_run", "write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Reads recipe.yaml, metrics.jsonl and run.json. Each may be missing or cut off: a killed run has a report too, which
    says what could not be read. The page replaces an older one in one rename.

    Raises:
        InputError: The directory does not exist, holds none of the three files, or is not writable.
        RunFailed: The page could not be written for another reason (a full disk). The run's own files are untouched.
    """
    from qvera.evaluation.report.run_page import run_page  # here, so that reading runs loads no templates

    page = run_page(read_run(run_dir))
    target = Path(run_dir) / "report.html"
    try:
        replace_text(target, page)
    except PermissionError as error:
        raise InputError(
            f"{target}: no permission to write the report ({error.strerror}). Make the directory writable for you, or "
            "copy the run to a place that is."
        ) from None
    except OSError as error:
        raise RunFailed(
            f"{target}: the report could not be written ({error.strerror}). The run's own files are untouched; make "
            "room and write the report again."
        ) from None
    return target
