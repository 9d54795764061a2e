"""The hub: directories behind ``model.path`` or behind the id of an adapter, and files to send."""

import io
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm  # type: ignore[import-untyped]  # what huggingface_hub has

from qvera.config.sections import ModelSection
from qvera.utils.cache_dir import StageProgress
from qvera.utils.errors import InputError, did_you_mean, did_you_mean_path, first_line
from qvera.utils.files import ADAPTER_CONFIG, resolve_path, try_read_json
from qvera.utils.formatting import first_of
from qvera.utils.hub import hub_hint, leave_silent_hub
from qvera.utils.safetensors_io import INDEX, base_fingerprint, weight_map

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.md")
"""The files that are read of a repository: nothing that Python would run or unpickle."""
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


def is_hub_id(name: str | Path) -> bool:
    """Whether this is ``user/name`` or ``user/name@revision``. If path or parent exists here, it is a path."""
    return _hub_id(name) is not None


def _hub_id(name: str | Path) -> re.Match[str] | None:
    path = Path(name)
    return None if path.exists() or path.parent.exists() else _HUB_ID.fullmatch(str(name))


def local_directory(path: Path) -> Path:
    """The directory ``path``, or the hub's snapshot of an id. Raises InputError if that can't be downloaded."""
    if (found := _hub_id(path)) is None:
        return path
    leave_silent_hub(found[1])
    try:
        return Path(snapshot_download(found[1], revision=found[2], allow_patterns=list(FILES), ignore_patterns="*/*"))
    except Exception as error:  # huggingface_hub raises httpx's, OSError's and its own
        near = did_you_mean(path, Path().glob("*/*/"))
        raise InputError(f"{path}: no such directory here{near} Nor has the hub given it: {_reason(error)}") from None


def is_adapter_of_hub(name: str) -> bool:
    """Whether a repository of the hub has an adapter. False for any other name, or if the hub does not answer."""
    if (found := _hub_id(name)) is None:
        return False
    leave_silent_hub(found[1])
    try:
        hf_hub_download(found[1], ADAPTER_CONFIG, revision=found[2])
    except Exception:  # no such file or repository, or no network: whoever loads it next gets the error
        return False
    return True


def require_repository_name(repo: str) -> None:
    """Raise InputError unless this is USER/NAME."""
    found = _HUB_ID.fullmatch(repo)
    if found is None or found[2]:
        raise InputError(f"{repo}: is no name of a repository of the hub. Expected USER/NAME.")


def send_files(
    files: Mapping[str, Path | bytes], repo: str, *, private: bool, message: str, replaced: Sequence[str]
) -> tuple[str, list[str]]:
    """Make the repository ``user/name`` if there is none, and commit these files.

    ``files``: name in the repository → a file, or its bytes. The same commit deletes the others there whose names
    match a pattern of ``replaced``. Returns the address, and the names of these. Raises InputError if the name is
    wrong, the repository is public and should be ``private``, or the hub refuses the token or can't be reached.
    """
    require_repository_name(repo)
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        there = api.model_info(repo)
        if private and not there.private:
            raise InputError(
                f"{repo}: nothing was sent to the hub: this repository is public, and --private makes only a new one "
                f"private. Make it private on {address}/settings, name another one, or leave out --private."
            )
        others = {file.rfilename for file in there.siblings or ()} - files.keys()
        deleted = sorted(n for n in others if "/" not in n and any(fnmatch(n, pattern) for pattern in replaced))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=what) for name, what in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in deleted),
        ]
        api.create_commit(repo, operations, commit_message=message)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{repo}: nothing was sent to the hub: {_reason(error)}") from None
    return str(address), deleted


def _reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):  # with any status
        return "access to it has to be asked for on its page. Then run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision."
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        if isinstance(error, RepositoryNotFoundError):
            return "there is no such repository, or it is private. If so, run `hf auth login` or set HF_TOKEN."
        return "it wants a token. Run `hf auth login`, or set HF_TOKEN to one that may write to this repository."
    if status == 403:
        return "this token may not do that. Set HF_TOKEN to one that may write to this repository."
    is_offline = isinstance(error, LocalEntryNotFoundError)
    if isinstance(error, (RepositoryNotFoundError, EntryNotFoundError)) and not is_offline:
        return f"there is no such repository or revision ({first_line(error)})."
    if isinstance(error, HfHubHTTPError):
        return f"it answered {status}: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error)} {hub_hint()}"


def base_directory(section: ModelSection, progress: StageProgress | None = None) -> Path:
    """The directory of the base's weights: the local one, or the hub's snapshot. Raises InputError if there is none."""
    name = resolve_path(section.path)
    require_model_files(name)
    if Path(name).is_dir():
        return Path(name)
    patterns = [*FILES, *(["*.py"] if section.trust_remote_code else [])]
    # the same weights in another format, and those of checkpoints: weights are read beside the config only
    again = ["original/*", "consolidated*.safetensors", "*/*.safetensors"]
    try:
        return Path(
            snapshot_download(
                name,
                revision=section.revision,
                allow_patterns=patterns,
                ignore_patterns=again,
                tqdm_class=None if progress is None else _bar_for(progress),
            )
        )
    except Exception as error:
        raise not_on_hub("model.path", name, error) from None


def _bar_for(progress: StageProgress) -> type:
    """A bar of huggingface_hub that draws nothing, and tells ``progress`` how many bytes have come."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **{**options, "disable": False, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            if self.unit == "B":
                progress("fetching", int(self.n), int(self.total or 0), "")
            return shown

    return Bar


def fingerprint_of(section: ModelSection) -> str | None:
    """`base_fingerprint` of a base in a directory or in the hub's cache; None if it is not here."""
    name = resolve_path(section.path)
    directory: Path | None = Path(name)
    if not Path(name).is_dir():
        try:
            found = try_to_load_from_cache(name, "config.json", revision=section.revision)
        except HFValidationError:
            return None
        directory = Path(found).parent if isinstance(found, str) else None
    return base_fingerprint(directory) if directory and any(directory.glob("*.safetensors")) else None


def require_model_files(name: str) -> None:
    """Raise InputError for a local path that is no directory with a config and safetensors weights."""
    path = Path(name)
    if "://" in name or name.startswith("hf.co/"):
        raise InputError(f"model.path: {name!r} is an address; of a model on the hub write owner/name alone.")
    if not path.is_dir():
        if "$" in name:
            raise InputError(f"model.path: {name!r}: variables such as $HOME are not filled in; write ~ for it.")
        # runs/none is a path where runs/ is a directory; an id such as gpt2 has no parent
        if name.startswith((".", "/", "~")) or path.exists() or ("/" in name and path.parent.is_dir()):
            fetch = " `qvera quickstart --fetch-only` fetches it." if path.parent.name == "quickstart" else ""
            near = _near_model(path)
            raise InputError(
                f"model.path: {name!r} is not a directory{near} Expected one with config.json and *.safetensors.{fetch}"
            )
        leave_silent_hub(name)
        cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
        if constants.HF_HUB_OFFLINE and not cached.is_dir():
            raise not_on_hub("model.path", name, "nothing of it was fetched before")
        return
    if not (path / "config.json").is_file():
        hint = f" It holds {first_of(sorted(other.name for other in path.iterdir()), 4) or 'nothing'}."
        if snapshots := sorted(path.glob("snapshots/*/config.json")):  # a model's directory in the hub's cache
            hint = f" Name the directory in it: {snapshots[-1].parent}."
        for adapter, what in ((path, "an adapter"), (path / "adapter", "a run")):
            # not the recipe's, which may be relative to where the run was started
            base = (try_read_json(adapter / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
            if base is not None:
                hint = f" It is {what}: name its base, {base}. To go on from its adapter: adapter.init_from: {adapter}."
        raise InputError(f"model.path: {name!r} has no config.json, so it is not a model directory.{hint}")
    if (path / INDEX).is_file():
        weight_map(path / INDEX)  # transformers would follow its names anywhere
    if not any(path.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        found = f"; it has {', '.join(pickles[:3])}, which are pickles and are not read" if pickles else ""
        raise InputError(
            f"model.path: {name!r} has no *.safetensors weights{found}. Convert the weights to safetensors."
        )


def _near_model(path: Path) -> str:
    """End a sentence about an unknown directory: a model beside it may be meant."""
    return did_you_mean_path(path, (file.parent for file in path.parent.glob("*/config.json")))


def not_on_hub(key: str, name: str, why: Exception | str) -> InputError:
    """Make the error to raise for a model that is no directory here, and that the hub has not given.

    Where the hub's own answer is the cause of ``why``, it is told in place of the network.
    """
    near = _near_model(Path(name))
    cause: BaseException | None = why if isinstance(why, Exception) else None
    while cause is not None and not isinstance(cause, (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return InputError(f"{key}: {name!r} is no directory here{near} Nor has the hub given it: {_reason(cause)}")
    why = why if isinstance(why, str) else first_line(why).rstrip(".")
    owner = "" if "/" in name else " An id on the hub is OWNER/NAME."
    return InputError(
        f"{key}: {name!r} is no directory here{near} Nor can it be read from the hub ({why}).{owner} {hub_hint()}"
    )
