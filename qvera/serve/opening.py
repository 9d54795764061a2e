"""Opens what is served: a base from the command line, and the adapters on it."""

import contextlib
import dataclasses
from pathlib import Path

from qvera.adapters.adapter_file import read_config
from qvera.config.sections import ModelSection
from qvera.evaluation.load import Artifact, OpenRun, find_target, open_target, require_adapter, require_answers
from qvera.evaluation.named_adapters import adapters_root, named_directories
from qvera.models.hub import is_adapter_of_hub, local_directory
from qvera.models.loader import load_base
from qvera.serve.engine import Engine
from qvera.serve.slots import require_served
from qvera.serve.store import AdapterStore
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_CONFIG, CERTIFICATE, RECIPE_FILE, no_directory, resolve_path

_TRIED = 8  # in turn, while they turn out to be damaged


@dataclasses.dataclass
class Served:
    """A loaded base without adapters, and the adapters that clients may ask for."""

    opened: OpenRun
    store: AdapterStore
    base_name: str  # how the base is listed
    own: str | None = None  # the adapter that the server was started for, if it is a single one


def open_served(path: str, adapters: Path | None = None) -> Served:
    """Load what `qvera serve` is given. Raises InputError if there is nothing to serve.

    Args:
        path: a run, an adapter directory or one's hub id, a directory of adapters, an exported checkpoint, or a base (a
            directory or hub id). A base is loaded as the adapters' run says, else in 4 bits; an exported checkpoint
            that way too, else as it is stored.
        adapters: a directory of adapters, or a run that trained many. None: those of ``path``, if it has any.
    """
    if adapters is not None and not adapters.is_dir():
        raise InputError(f"--adapters {no_directory(adapters)} Make one, or name a run that trained many adapters.")
    if adapters is not None and _is_run_or_adapter(adapters) and adapters_root(adapters) is None:
        raise InputError(
            f"--adapters {adapters}: has a single adapter. Expected a directory with an adapter in each of its "
            "directories: make one, and copy the adapter's directory into it."
        )
    single, directory = None, Path(resolve_path(path))
    own_name = directory.resolve().name
    if is_adapter_of_hub(path):  # its directory is called as its commit
        directory, own_name = local_directory(directory), Path(path.partition("@")[0]).name
    if _is_run_or_adapter(directory) or adapters_root(directory) is not None:
        target = find_target(directory, needs_name=False)
        require_answers(target, "qvera serve")
        if adapters_root(directory) is not None:
            adapters = adapters or directory
        else:
            single = require_adapter(target)
            if own_name == Path(resolve_path(target.section.path)).name:
                raise InputError(
                    f"{path}: clients would ask for the adapter by this directory's name, {own_name!r}, which is its "
                    f"base's too. Rename the directory, or give the adapter another name: `mkdir adapters; cp -r "
                    f"{single} adapters/NAME; qvera serve {target.section.path} --adapters adapters`."
                )
            if adapters is None:
                require_served(read_config(single), single)  # before a big model is loaded
            elif not named_directories(adapters).get(own_name, single).samefile(single):
                raise InputError(
                    f"{path}: {adapters} has an adapter {shown_name(own_name)} too. Name the base in place of the run: "
                    f"`qvera serve {target.section.path} --adapters {adapters}`."
                )
        opened = open_target(target, adapter=False)
    else:
        found = None
        if adapters is not None and adapters_root(adapters) is not None:
            found = find_target(adapters, needs_name=False)
        if (directory / CERTIFICATE).is_file() and (found is None or found.recipe is None):  # an exported checkpoint
            target = find_target(directory)
            require_answers(target, "qvera serve")
            opened = open_target(target)
        else:
            # a base, with the number format, dtype and tokens of the adapters' recipe
            section = ModelSection(path=path) if found is None else found.section.replace(path=path)
            base = load_base(section)
            recipe, run = (None, None) if found is None else (found.recipe, found.run)
            opened = OpenRun(Artifact(Path(path), "a base", section, recipe=recipe, run=run), base, base.model)
    section = opened.target.section
    name = Path(resolve_path(section.path)).name
    # the path of an adapter, or of a run, must not be taken for its base
    store = AdapterStore(adapters, {name, section.path} | ({path} if opened.target.adapter is None else set()))
    if single is not None:
        store.add(own_name, single)
    return Served(opened, store, name, own_name if single is not None and adapters is None else None)


def _is_run_or_adapter(directory: Path) -> bool:
    return any((directory / file).is_file() for file in (RECIPE_FILE, ADAPTER_CONFIG))


def warm_up(engine: Engine, store: AdapterStore, own: str | None = None) -> None:
    """Load an adapter now, so that the first request need not wait until the model has its layers.

    Adapters of other ranks or targets still need layers of their own. Raises InputError if ``own`` can't be served.
    """
    if own is not None:
        adapter = store.resolve(own)
        assert adapter is not None
        engine.load(adapter)
        return
    for name in store.names()[:_TRIED]:
        with contextlib.suppress(InputError):  # a damaged one is told to who asks for it
            if (adapter := store.resolve(name)) is not None:
                engine.load(adapter)
                return
