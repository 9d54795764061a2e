"""Data sets of the Hugging Face hub, and what they say of their own labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.utils.errors import InputError, one_line

if TYPE_CHECKING:
    import datasets


def load_hub(path: str, split: str, config_name: str | None, revision: str | None) -> datasets.Dataset:
    """A hub dataset as `datasets` has it: Arrow files in its cache, memory-mapped. Images are not decoded.

    Raises:
        InputError: there is none of that name, or the hub can't be reached.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(path, name=config_name, split=split, revision=revision)
        images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        for name in images:  # rows get them as they are stored
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        return dataset
    except Exception as error:  # the hub's client raises many unrelated types, all of them about what was asked for
        hint = "Check data.path, data.config_name, data.split and data.revision."
        if isinstance(error, ConnectionError) or "offline" in str(error).lower():
            hint = "The hub can't be reached: connect, or set data.path to a local file."
        raise InputError(
            f"{path}: no file or directory of that name here, and as a hub dataset it can't be loaded "
            f"(split {split!r}{f', configuration {config_name!r}' if config_name else ''}): {one_line(error)}. {hint}"
        ) from None


def class_names(dataset: datasets.Dataset, column: str) -> list[str]:
    """The names of a column's integer labels, from 0; empty where the dataset has none for them."""
    import datasets

    feature = dataset.features.get(column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else []
