"""Print a pip constraint file that pins every dependency of pyproject.toml to its lower bound.

pip has no option for this. `make test-lowest` installs with the result, so that each `>=` is a tested claim.

    python tests/lowest.py pyproject.toml > constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?\s*([>=]=\s*(?P<lower>[0-9][^\s,;]*))?")


def lowest_constraints(pyproject: str) -> list[str]:
    """The lines of the constraint file, sorted by name.

    Args:
        pyproject: the text of a pyproject.toml.

    Raises:
        ValueError: a dependency of the package has no lower bound, or two places give different ones.
    """
    project = tomllib.loads(pyproject)["project"]
    lines: dict[str, str] = {}
    groups = {"dependencies": project["dependencies"], **project.get("optional-dependencies", {})}
    for group, requirements in groups.items():
        for requirement in requirements:
            found = _REQUIREMENT.match(requirement)
            if found is None:
                raise ValueError(f"{group}: {requirement!r} is not understood")
            name, lower = found["name"].lower(), found["lower"]
            if name == project["name"] or group == "dev":
                continue  # the tools of `dev` take no part in the suite
            if lower is None:
                raise ValueError(f"{group}: {requirement!r} has no lower bound")
            _, _, marker = requirement.partition(";")
            line = f"{name}=={lower}" + (f"; {marker.strip()}" if marker else "")
            if lines.setdefault(name, line) != line:
                raise ValueError(f"{name}: two lower bounds, {lines[name]!r} and {line!r}")
    return [lines[name] for name in sorted(lines)]


if __name__ == "__main__":
    print("\n".join(lowest_constraints(Path(sys.argv[1]).read_text(encoding="utf-8"))))
