"""`qvera preview`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qvera.cli.common import Overrides, RecipePath, console, quiet_libraries, require_new_file
from qvera.utils.atomic import replace_text


def preview(
    recipe: RecipePath,
    overrides: Overrides,
    rows: Annotated[int, typer.Option(min=0, metavar="N", help="Rows shown in full.")] = 4,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page for a browser.")] = None,
) -> None:
    """Show the rows of a recipe, trained tokens marked.

    Prints counts, lengths and the first rows. Reads the data and the tokenizer, no weights.

    Example:
        qvera preview recipes/quickstart.yaml --rows 2
    """
    from rich.console import Console

    from qvera.config.load import load_recipe
    from qvera.data import build_datasets, data_warnings, decode, print_preflight
    from qvera.evaluation.report.pages import preview_page
    from qvera.models.tokenizer import load_processor
    from qvera.tasks import task_of

    loaded = load_recipe(recipe, overrides)
    if html is not None:
        require_new_file(html)
    quiet_libraries()
    tokenizer = load_processor(loaded.model, task_of(loaded).exported_class)
    datasets = build_datasets(loaded.data, tokenizer, console)
    shown = datasets.first_rows(rows)
    print_preflight(datasets, tokenizer, Console(), rows)
    if html is not None:
        warnings = data_warnings(datasets.stats)
        show = partial(decode, tokenizer)
        replace_text(html, preview_page(recipe.stem, loaded.data.path, datasets.stats, warnings, shown, show))
        print(f"{html}: the same as a page, all tokens of {len(shown)} rows")
