"""The page that a run leaves behind: one report.html, nothing loaded from anywhere, made from three files.

Order of reading: `read` (files → numbers), `numbers` (numbers → words), `charts` (numbers → SVG), `compare` (where two
answers differ), `page` (all of it → HTML). Other pages of the same look: `preview`, `answers` (eval), `runs` (compare), `ramp`
(find-lr).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from qvera.evaluation.report.read import Run, read_run
from qvera.evaluation.report.run_page import render
from qvera.utils.errors import InputError, RunFailed

__all__ = ["Run", "read_run", "render", "write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Reads recipe.yaml, metrics.jsonl and run.json. Each may be missing or cut off: a killed run has a report too, and
    it says what it could not read. The page replaces an older one in one rename.

    Raises:
        InputError: the directory does not exist, holds none of the three files, or can't be written to.
        RunFailed: the page could not be written for another reason (a full disk). The run's own files are untouched.
    """
    run = read_run(run_dir)
    target = Path(run_dir) / "report.html"
    part = target.with_name(f".report.html.{os.getpid()}")
    try:
        part.write_bytes(render(run).encode("utf-8", errors="replace"))
        os.replace(part, target)
    except PermissionError as error:
        raise InputError(
            f"{target}: no permission to write the report ({error.strerror}). Make the directory writable for you, or "
            "copy the run to a place that is."
        ) from None
    except OSError as error:
        raise RunFailed(
            f"{target}: the report could not be written ({error.strerror}). The run's own files are untouched; free "
            "the cause and write the report again."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return target
