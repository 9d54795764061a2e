"""Open several adapters of one base, for batches whose rows use different ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from qvera.adapters.files import adapter_file
from qvera.adapters.shared_model import load_adapters
from qvera.evaluation.load import OpenRun, find_target, open_target
from qvera.evaluation.named_adapters import require_all_named


@dataclasses.dataclass
class OpenAdapters:
    """A base with several adapters on it.

    Attributes:
        opened: ``opened.model`` has all of them.
        keys: name of an adapter → what `qvera.evaluation.generate.generate` calls it. Names can be anything, even what
            PEFT calls the base.
    """

    opened: OpenRun
    keys: dict[str, str]


def open_adapters(path: Path, names: Sequence[str], progress: Callable[[int], None] | None = None) -> OpenAdapters:
    """Load a base, and these adapters of a run that trained many or of a directory of adapters; no others are read.

    Args:
        names: as the data has them.
        progress: called with the number of adapters read.

    Raises:
        InputError: there is none of one of these names, one is damaged, or not all have this base.
    """
    directories = require_all_named(path, dict.fromkeys(names))
    configs = {name: adapter_file.read_config(directory) for name, directory in directories.items()}
    opened = open_target(find_target(path, needs_name=False), adapter=False)
    facts = opened.base.facts
    for name, config in configs.items():
        adapter_file.require_base(config, directories[name], facts["path"], facts.get("fingerprint"))
    keys = {name: str(number) for number, name in enumerate(directories)}
    opened.model = load_adapters(
        opened.base.model, {keys[name]: directory for name, directory in directories.items()}, progress
    )
    return OpenAdapters(opened, keys)
