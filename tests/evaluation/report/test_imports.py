"""Reading and comparing runs is light."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def test_reading_comparing_and_showing_runs_imports_no_torch(build_run: Callable[..., Path]) -> None:
    """`qvera compare` and the pages of finished runs answer at once, on machines without a working torch too."""
    script = """
        import sys
        from pathlib import Path
        from qvera.evaluation.report.compare import compare_runs
        found = compare_runs([Path(name) for name in sys.argv[1:]])
        assert not {"jinja2", "numpy"} & set(sys.modules), "a table needs no page"
        from qvera.evaluation.report.pages import compare_page
        from qvera.evaluation.report.run_page import write_report
        assert "1.18 GB" in compare_page(found)
        write_report(sys.argv[1])
        heavy = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate"} & set(sys.modules)
        print(len(sys.modules), *sorted(heavy))
    """
    places = [build_run(name="one"), build_run(name="two")]
    source = "\n".join(line.strip() for line in script.splitlines())
    done = subprocess.run([sys.executable, "-c", source, *map(str, places)], capture_output=True, text=True, check=True)
    modules, *heavy = done.stdout.split()
    assert heavy == []
    assert int(modules) < 1500  # torch alone brings 1,500
