"""A directory with a folder of images for each class → its files, and a row for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qvera.data.images import IMAGE_EXTENSIONS
from qvera.utils.errors import InputError

_TRAIN = ("train", "training")
_HELD_OUT = ("test", "testing", "valid", "validation", "val", "eval", "dev")


def image_files(directory: Path) -> list[Path]:
    """The images of all classes, class by class in name order; none where the directory has no folders of images.

    Hidden entries and files of other kinds are left out.

    Raises:
        InputError: the folders are splits, not classes; an image stands beside the folders; or a folder has no image.
    """
    folders = [entry for entry in _entries(directory) if entry.is_dir()]
    names = {folder.name.lower(): folder for folder in folders}
    train = next((names[name] for name in _TRAIN if name in names), None)
    held_out = next((names[name] for name in _HELD_OUT if name in names), None)
    if train is not None and held_out is not None:
        raise InputError(
            f"{directory}: holds the splits {train.name} and {held_out.name}, not classes. Set data.path to {train} "
            f"and data.eval_path to {held_out}."
        )
    found = [[entry for entry in _entries(folder) if _is_image(entry)] for folder in folders]
    if not any(found):
        return []
    if beside := [entry for entry in _entries(directory) if _is_image(entry)]:
        raise InputError(
            f"{beside[0]}: stands beside the folders of {directory}, and an image's folder is its class. Move it into "
            "one, or remove it."
        )
    if empty := [folder for folder, images in zip(folders, found, strict=True) if not images]:
        raise InputError(
            f"{empty[0]}: holds no images, and each folder of {directory} is a class. Expected files that end in "
            f"{', '.join(IMAGE_EXTENSIONS)}; add some, or remove the folder."
        )
    return [image for images in found for image in images]


def image_row(file: Path) -> dict[str, Any]:
    """The columns of one image's row: its path, and its folder as the label."""
    return {"image": str(file.absolute()), "label": file.parent.name}


def _entries(directory: Path) -> Iterator[Path]:
    return (entry for entry in sorted(directory.iterdir()) if not entry.name.startswith("."))


def _is_image(entry: Path) -> bool:
    return entry.suffix.lower() in IMAGE_EXTENSIONS and entry.is_file()
