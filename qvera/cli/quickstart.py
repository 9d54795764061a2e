"""`qvera quickstart`: a small real Llama, a task with held-out rows, and the recipe that joins them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from qvera.cli.common import Overrides, console, quiet_libraries
from qvera.cli.train import print_result
from qvera.utils.errors import InputError
from qvera.utils.paths import cache_root


def quickstart(
    overrides: Overrides,
    fetch_only: Annotated[bool, typer.Option("--fetch-only", help="Fetch base model and data, then stop.")] = False,
    output_dir: Annotated[str, typer.Option(metavar="RUN", help="Where the run goes.")] = "runs/quickstart",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted quickstart.")] = False,
) -> None:
    """Fetch a small Llama, train it, show before and after.

    The task ships with qvera: an order in free text becomes a line of JSON. 3 to 6 minutes on 2 CPU cores.

    Example:
        qvera quickstart
    """
    from qvera.config.load import load_recipe, yaml_text

    quiet_libraries()
    files = prepare(report=console.print)
    where = f"training.output_dir={yaml_text(output_dir)}"
    recipe = load_recipe(files.recipe, [*files.overrides(), where, *overrides])
    if fetch_only:
        for what, path in zip(("base model", "training", "held out", "recipe"), files, strict=True):
            print(f"{what:<13}{path}")
        return

    from qvera.training.run_dir import run_directory
    from qvera.training.trainer import train

    result = train(recipe, run_directory(recipe, files.recipe), resume=resume, console=console)
    if result is None:
        return  # one of several processes that is not the first
    for number, sample in enumerate(result.run["samples"], start=1):
        print(f"\n── held-out prompt {number} " + "─" * 60)
        print(sample["prompt"].strip())
        for label in ("before", "after", "reference"):
            print(f"{label + ':':<11}{sample[label]}")
    print("\n" + "─" * 80)
    print_result(result.run_dir, result.run)
    print(f"talk to it        qvera chat {result.run_dir}")
    print(f"export it         qvera export {result.run_dir} OUT --to merged")


class QuickstartFiles(NamedTuple):
    """Where the base model, the rows and the recipe are."""

    base: Path
    train: Path
    heldout: Path
    recipe: Path

    def overrides(self) -> list[str]:
        """``--set`` values that point the recipe at these files."""
        from qvera.config.load import yaml_text

        paths = {"model.path": self.base, "data.path": self.train, "data.eval_path": self.heldout}
        return [f"{key}={yaml_text(str(path))}" for key, path in paths.items()]


def recipe_path(name: str = "quickstart.yaml") -> Path:
    """A shipped recipe: from the installed package, or from recipes/ of the checkout it was installed from.

    Raises:
        InputError: there is no recipe of that name.
    """
    package = Path(__file__).resolve().parents[1]
    folders = [package / "recipes", package.parent / "recipes"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    shipped = sorted({path.relative_to(folder).as_posix() for folder in folders for path in folder.rglob("*.yaml")})
    raise InputError(f"{name}: not one of the recipes that come with qvera ({', '.join(shipped) or 'none found'}).")


def prepare(cache_dir: Path | None = None, report: Callable[[str], None] = print) -> QuickstartFiles:
    """Fetch the base model if it is not in the cache, copy the rows there, and find the recipe.

    Args:
        cache_dir: instead of `cache_root()`.
        report: takes each progress line.

    Raises:
        QveraError: as `fetch_quickstart_base`.
    """
    from qvera.cli.quickstart_base import fetch_quickstart_base

    root = cache_dir or cache_root()
    base = fetch_quickstart_base(root, report=report)
    rows = root / "quickstart" / "orders"
    rows.mkdir(parents=True, exist_ok=True)
    train, heldout = (
        Path(shutil.copyfile(recipe_path(f"quickstart/{name}"), rows / name))
        for name in ("train.jsonl", "heldout.jsonl")
    )
    return QuickstartFiles(base, train, heldout, recipe_path())
