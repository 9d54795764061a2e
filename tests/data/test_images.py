"""Images of every usual kind are read as a person sees them, and what is no image is refused by name."""

from __future__ import annotations

import importlib.util
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qvera.config.schema import parse_recipe
from qvera.data import build_datasets, cache, data_sha256
from qvera.data.images import Draw, ImageProcessor, crop_box, open_image, require_pillow
from qvera.data.rows import SCHEMA
from qvera.utils.errors import InputError
from tests.data.conftest import Write
from tests.tasks.images import SIZE, image_processor, picture, write_folders


def bytes_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def plain(mode: str, colour: Any, palette: Sequence[int] = (), **options: Any) -> bytes:
    image = Image.new(mode, (5, 4), colour)
    if palette:
        image.putpalette(palette)
    return bytes_of(image, "TIFF" if mode == "CMYK" else "PNG", **options)


def section_of(path: Path | str, **keys: Any) -> Any:
    return parse_recipe({"task": "image-classification", "model": "m", "data": {"path": str(path), **keys}}, "t").data


@pytest.fixture(scope="module")
def images() -> ImageProcessor:
    return ImageProcessor(image_processor(), (SIZE, SIZE), 17)


KINDS = {
    "grey": (plain("L", 40), (40, 40, 40)),
    "grey of 16 bits": (bytes_of(Image.fromarray(np.full((4, 5), 257 * 90, np.uint16))), (90, 90, 90)),
    "black and white": (plain("1", 1), (255, 255, 255)),
    "CMYK": (plain("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "half transparent": (plain("RGBA", (255, 0, 0, 0)), (255, 255, 255)),
    "a transparent palette": (plain("P", 0, [255, 0, 0, 0, 0, 255], transparency=0), (255, 255, 255)),
    "one pixel": (bytes_of(Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3)),
}


@pytest.mark.parametrize(("content", "colour"), KINDS.values(), ids=list(KINDS))
def test_an_image_becomes_rgb(content: bytes, colour: tuple[int, ...], images: ImageProcessor) -> None:
    found = open_image(content, "it")
    assert (found.mode, found.getpixel((0, 0))) == ("RGB", colour)
    assert images.pixels(found, "it").shape == (3, SIZE, SIZE)


def test_a_photo_is_turned_as_the_camera_was(tmp_path: Path) -> None:
    photo, exif = Image.new("RGB", (8, 4), "red"), Image.Exif()
    photo.paste((0, 0, 255), (0, 0, 4, 4))  # blue on the left
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    found = open_image(bytes_of(photo, "JPEG", exif=exif, quality=95), "it")
    assert found.size == (4, 8)
    blue = np.asarray(found)[:, :, 2]
    assert blue[:3].min() > 200 > 60 > blue[5:].max()


PNG = bytes_of(picture("red", 1))
NO_IMAGES = {
    "text": (b"hello", "is no image that Pillow can read"),
    "a file of no bytes": (b"", "is no image that Pillow can read"),
    "a JPEG that was cut": (bytes_of(picture("red", 1).resize((64, 64)), "JPEG")[:-200], "damaged"),
    "a PNG with changed bytes": (PNG[:60] + b"\0" * 40 + PNG[100:], "dam"),
    "fractions": (bytes_of(Image.fromarray(np.full((4, 5), 0.5, np.float32)), "TIFF"), "whose range is not known"),
}


@pytest.mark.parametrize(("content", "message"), NO_IMAGES.values(), ids=list(NO_IMAGES))
def test_what_is_no_image_is_named(
    content: bytes, message: str, tmp_path: Path, images: ImageProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(tmp_path / "rows", 2)
    (tmp_path / "rows" / "green" / "bad.png").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "rows", Path("rows")):
        with pytest.raises(InputError, match=rf"rows/green/bad\.png: .*{message}") as refused:
            build_datasets(section_of(path), images)
        assert str(refused.value).count("bad.png") == 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (11, 99):  # Pillow warns of the first, and refuses the second
        with pytest.raises(InputError, match="it: has more than 100 pixels"):
            open_image(bytes_of(Image.new("RGB", (side, side))), "it")


def test_folders_are_classes_and_images_stay_on_disk(tmp_path: Path, images: ImageProcessor) -> None:
    path = write_folders(tmp_path / "rows", 4)
    (path / "red" / "notes.txt").write_text("no image")
    (path / ".hidden").mkdir()
    found = build_datasets(section_of(path, eval_fraction=0.25), images)
    assert (len(found.train), len(found.eval), found.labels.names) == (9, 3, ("blue", "green", "red"))
    held_out = build_datasets(section_of(path, eval_path=str(write_folders(tmp_path / "eval", 5))), images)
    assert held_out.stats.repeated_rows == 12
    row = found.train[0]
    assert (row.reference, len(row.input_ids)) == (Path(row.source).parent.name, 17)
    assert row.image.pixels().dtype == np.float32
    Path(row.source).unlink()
    with pytest.raises(InputError, match="there is no image file"):  # it was not kept in memory
        row.image.pixels()


def test_data_files_hold_bytes_or_paths(tmp_path: Path, write: Write, images: ImageProcessor) -> None:
    files = sorted(write_folders(tmp_path / "rows", 2).rglob("*.png"))
    lines = [{"img": str(f.relative_to(tmp_path)), "label": f.parent.name} for f in files]
    write(lines, "paths.jsonl")
    names = ["blue", "green", "red"]
    stored = [{"bytes": f.read_bytes(), "path": f.name} for f in files]
    table = pa.table({"image": stored, "label": [names.index(f.parent.name) for f in files]})
    pq.write_table(table, tmp_path / "bytes.parquet")
    keys: dict[str, Any] = {"rows": {}, "paths.jsonl": {}, "bytes.parquet": {"label_names": names}}
    kinds = [build_datasets(section_of(tmp_path / name, **more), images) for name, more in keys.items()]
    assert len({data_sha256(kind) for kind in kinds}) == 1
    for kind in kinds:
        np.testing.assert_array_equal(kind.train[3].image.pixels(), kinds[0].train[3].image.pixels())
        assert kind.stats.label_rows == [2, 2, 2]
    column = SCHEMA.field("images").type.value_type.field("bytes").type
    assert pa.types.is_large_binary(column), "plain binary counts in 32 bits: a chunk of 256 images of 9 MiB is more"


def test_a_hub_dataset_gives_its_images_undecoded(monkeypatch: pytest.MonkeyPatch, images: ImageProcessor) -> None:
    rows = {"img": [picture("red", 1), picture("blue", 1)], "fine_label": [1, 0]}
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["blue", "red"])})
    hub = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kwargs: hub)
    section = section_of(Path("some/cifar"), columns={"label": "fine_label"})
    found = build_datasets(section, images, cached=False)
    assert [row.reference for row in found.train] == ["red", "blue"]
    assert found.train[0].image.open().size == picture("red", 1).size


def test_a_copy_of_the_images_in_another_place_is_read_from_there(
    tmp_path: Path, images: ImageProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WORTH_BYTES", 0)
    for place in ("one", "other"):
        write_folders(tmp_path / place / "rows", 2)
        monkeypatch.chdir(tmp_path / place)
        build_datasets(section_of(Path("rows")), images)
        again = build_datasets(section_of(Path("rows")), images)
        assert again.stats.cache_entries
        assert again.train[0].image.content == str(tmp_path / place / "rows" / "blue" / "00.png")
        shutil.rmtree(tmp_path / "one", ignore_errors=True)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_image_that_changed_or_went_is_seen_though_its_data_file_is_the_same(
    suffix: str, tmp_path: Path, write: Write, images: ImageProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WORTH_BYTES", 0)
    files = sorted(write_folders(tmp_path / "rows", 2).rglob("*.png"))
    lines = [{"image": str(f.relative_to(tmp_path)), "label": f.parent.name} for f in files]
    data = write(lines, "paths.jsonl")
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(lines), data := str(tmp_path / "paths.parquet"))
    section = section_of(data)
    before = data_sha256(build_datasets(section, images))
    shutil.copy(files[-1], files[0])
    assert data_sha256(build_datasets(section, images)) != before
    files[0].unlink()
    with pytest.raises(InputError, match=r"paths.*1.*00.png"):
        build_datasets(section, images)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an image beside the folders": (
        lambda root: picture("red", 1).save(root / "beside.png"), r"beside\.png: stands beside the folders",
    ),
    "a picture that Pillow can't read": (
        lambda root: next(root.iterdir()).joinpath("phone.HEIC").touch(), r"phone\.HEIC: \.HEIC is not read\. Convert it",
    ),
    "a class without images": (lambda root: (root / "yellow").mkdir(), "yellow: holds no images"),
    "splits": (
        lambda root: [write_folders(root / split, 1) for split in ("train", "val")],
        "Set data.path to .*/train and data.eval_path to .*/val",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD_FOLDERS.values(), ids=list(BAD_FOLDERS))
def test_a_directory_that_is_no_set_of_classes_is_refused(
    make: Any, message: str, tmp_path: Path, images: ImageProcessor
) -> None:
    write_folders(tmp_path, 1)
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        build_datasets(section_of(tmp_path), images)


BAD_VALUES = {
    "no image": ({"image": None, "label": "a"}, r"rows\.jsonl:2: image must be an image.*got null"),
    "a number": ({"image": 3, "label": "a"}, "image must be an image.*a number"),
    "no label": ({"image": "0.png", "label": None}, "label is empty"),
    "a missing file": ({"image": "9.png", "label": "a"}, r"rows\.jsonl:2: there is no image file .*/9\.png"),
}


@pytest.mark.parametrize(("row", "message"), BAD_VALUES.values(), ids=list(BAD_VALUES))
def test_a_bad_row_is_named(row: Any, message: str, tmp_path: Path, write: Write, images: ImageProcessor) -> None:
    picture("red", 0).save(tmp_path / "0.png")
    path = write([{"image": "0.png", "label": "b"}, row], "rows.jsonl")
    with pytest.raises(InputError, match=message):
        build_datasets(section_of(path), images)


def test_crops_lie_in_the_image_and_depend_on_seed_step_and_row_alone() -> None:
    draws = [Draw(7, step, row) for step in range(20) for row in range(20)]
    found = [crop_box(50, 40, draw) for draw in draws]
    assert found == [crop_box(50, 40, draw) for draw in draws]
    assert len(set(found)) > 390
    assert crop_box(50, 40, Draw(8, 0, 0)) != found[0]
    boxes = np.array([box for box, _ in found])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [50, 40]).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(axis=1) / 2000
    assert 0.07 < areas.min() < 0.15
    assert 0.85 < areas.max() <= 1
    assert np.abs(np.log(sides[:, 0] / sides[:, 1])).max() < np.log(4 / 3) + 0.1
    assert 0.4 < np.mean([flipped for _, flipped in found]) < 0.6
    assert crop_box(1, 1, Draw(0, 0, 0))[0] == (0, 0, 1, 1)
    assert crop_box(1000, 1, Draw(0, 0, 0))[0][3] == 1


def test_a_missing_pillow_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'qvera\[vision\]'"):
        require_pillow()


def test_a_processor_that_makes_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"it: the image processor .* \[3, 16, 16\].*takes \[3, 32, 32\]"):
        ImageProcessor(image_processor(), (32, 32), 65).pixels(picture("red", 1), "it")


def test_tasks_are_values_of_a_column(images: ImageProcessor, tmp_path: Path, write: Write) -> None:
    files = sorted(write_folders(tmp_path / "pictures", 4).rglob("*.png"))
    rows = [{"image": str(f), "label": f.parent.name, "site": f"site {f.stem[-1]}"} for f in files]
    path = write(rows, "rows.jsonl")
    found = build_datasets(section_of(path, sampling="task", task_column="site"), images)
    assert found.part_names == ["site 0", "site 1", "site 2", "site 3"]
    assert found.train.part_of is not None
    assert [found.part_names[number] for number in found.train.part_of] == [row["site"] for row in rows]
    assert found.stats.unused_columns == []
