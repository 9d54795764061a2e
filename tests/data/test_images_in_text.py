"""Rows with images among text: which forms are read, what is refused, and the ids of the model's own processor."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from qvera.config.sections import DataSection, ModelSection
from qvera.data import Datasets, build_datasets, print_preflight
from qvera.data.images import images_of, text_only
from qvera.models.tokenizer import load_tokenizer
from qvera.utils.errors import InputError
from tests.conftest import small_tokenizer
from tests.families import FAMILIES
from tests.image_text import IMAGE_FAMILIES, given_by_processor, image_rows, picture

ANSWER = {"role": "assistant", "content": "a word"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Qwen3-VL's."""
    directory = IMAGE_FAMILIES["qwen3_vl"].write(tmp_path_factory.mktemp("qwen3_vl"))
    return load_tokenizer(ModelSection(path=str(directory)))


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Datasets]:
    def read_rows(*rows: dict[str, Any], by: Any = tokenizer, **keys: Any) -> Datasets:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / "cat.png").write_bytes(picture(0))
        return build_datasets(DataSection(path=str(file), **{"max_length": 512, **keys}), by)

    return read_rows


def asked(*parts: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts) or "say it"}, ANSWER], **columns}


@pytest.mark.parametrize("name", sorted(IMAGE_FAMILIES))
def test_the_ids_are_those_of_the_models_own_processor(name: str, tmp_path: Path) -> None:
    family = IMAGE_FAMILIES[name]
    for package in family.needs:
        pytest.importorskip(package)
    rows = image_rows(family.write(tmp_path))
    tokenizer = load_tokenizer(ModelSection(path=str(tmp_path)))
    found = build_datasets(DataSection(path=str(rows), max_length=512), tokenizer)
    images = images_of(tokenizer)
    assert images is not None
    for number, (given, example) in enumerate(
        zip(given_by_processor(images.processor, rows), found.train, strict=True)
    ):
        assert example.input_ids.tolist() == given["input_ids"][0].tolist()
        assert tokenizer.decode(example.input_ids[example.trained]).strip() == f"word {number} twice<|im_end|>"
        is_image = images.token_types(example.input_ids) == 1
        assert is_image.any() == bool(example.images)


def test_an_image_is_a_path_bytes_or_a_data_url(read: Callable[..., Datasets], tmp_path: Path) -> None:
    encoded = base64.b64encode(picture(0)).decode()
    url = f"data:image/png;base64,{encoded}"
    text = {"type": "text", "text": " what?"}
    forms = [
        {"type": "image", "image": "cat.png"}, {"type": "image", "path": str(tmp_path / "cat.png")},
        {"type": "image", "base64": encoded}, {"type": "image", "image": {"bytes": encoded, "path": None}},
        {"type": "image", "url": url}, {"type": "image_url", "image_url": {"url": url}},
    ]  # fmt: skip
    rows = [asked(form, text) for form in forms]
    rows += [
        asked({"type": "image"}, text, images=["cat.png"]),
        asked({"type": "image"}, text, images=[{"bytes": encoded}]),
    ]
    none = {"bytes": None, "path": None}  # as Arrow may write that there is none
    rows.append({"messages": [{"role": "user", "content": "<image> what?"}, ANSWER], "images": ["cat.png", none]})
    found = read(*rows)
    assert len({row.input_ids.tobytes() for row in found.train}) == 1
    assert len({row.images[0].read_bytes() for row in found.train}) == 1
    assert len(set(found.train.ids_hash.tolist())) == 1
    other = read({"prompt": "<image> what?", "completion": "a word", "image": "cat.png"})
    assert other.train[0].input_ids.tobytes() == found.train[0].input_ids.tobytes()


def test_parquet_holds_an_images_bytes_as_hub_datasets_do(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, read: Callable[..., Datasets]
) -> None:
    said = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "n"}]}]
    said.append({"role": "assistant", "content": [{"type": "text", "text": "yes"}]})
    rows = [{"messages": said, "images": [{"bytes": picture(number), "path": None}]} for number in (0, 1)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = build_datasets(DataSection(path=str(tmp_path / "rows.parquet")), tokenizer)
    assert [row.images[0].read_bytes() for row in found.train] == [picture(0), picture(1)]
    assert found.train[0].input_ids.tolist() == found.train[1].input_ids.tolist()
    assert found.train.ids_hash[0] != found.train.ids_hash[1], "another picture is another row"


def test_a_hub_dataset_gives_its_lists_of_images_undecoded(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    said = [{"role": "user", "content": "<image> and <image>"}, {"role": "assistant", "content": "yes"}]
    held = [{"bytes": picture(number), "path": None} for number in (0, 1)]
    hub = datasets.Dataset.from_list([{"messages": said, "images": held}])
    hub = hub.cast_column("images", datasets.List(datasets.Image()))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kwargs: hub)
    found = build_datasets(DataSection(path="some/pictures"), tokenizer, cached=False)
    assert [image.read_bytes() for image in found.train[0].images] == [picture(0), picture(1)]


BAD = {
    "an address": (asked({"type": "image", "url": "http://x.org/cat.png"}), {}, "http://x.org/cat.png is an address"),
    "no file": (asked({"type": "image", "image": "dog.png"}), {}, r"rows.jsonl:1: there is no image file .*dog\.png"),
    "a directory": (asked({"type": "image", "image": "."}), {}, r"rows.jsonl:1: there is no image file /.*\. Fix"),
    "no picture": (asked({"type": "image", "image": "rows.jsonl"}), {}, r"rows.jsonl:1: .*/rows.jsonl: is no image that"),
    "no base64": (asked({"type": "image", "base64": "%%%"}), {}, "the image is no base64"),
    "no ASCII": (asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,é"}}), {}, "the image is no base64"),
    "of no user": (asked({"type": "image", "image": "~no-such-user/cat.png"}), {}, r"rows.jsonl:1: there is no image file .*/~no-such-user/cat\.png"),
    "no image": (asked({"type": "image"}), {}, "the image of a part is missing"),
    "too few": (
        {"messages": [{"role": "user", "content": "<image>"}, ANSWER, {"role": "user", "content": "<image>?"}, ANSWER], "images": ["cat.png"]},
        {}, r"messages\[2\]\.content: the image of a part is missing.* and each <image>, in order",
    ),
    "too many": (asked({"type": "text", "text": "x"}, images=["cat.png"]), {}, "images has more images than places"),
    "a video": (asked({"type": "video", "video": "x.mp4"}), {}, "a part of it is 'video'; only texts and images"),
    "an answer": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image", "image": "cat.png"}]}]},
        {}, "a model answers with text only",
    ),
    "a place in the text": (
        asked({"type": "image", "image": "cat.png"}, {"type": "text", "text": "<|image_pad|>"}), {},
        r"has 2 places for images \(<\|image_pad\|>\), and 1 images are given",
    ),
    "a place without an image": (asked({"type": "text", "text": "<|image_pad|>"}), {}, "has 1 places .* 0 images are given"),
    "a template of text": (asked({"type": "image", "image": "cat.png"}), {"template": "chatml"}, r"the chat template \(chatml\) refuses the row"),
    "a base of text": (asked({"type": "image", "image": "cat.png"}), {"by": small_tokenizer()}, "this base is taken for text"),
    "too long": (asked({"type": "image", "image": "cat.png"}), {"max_length": 14}, "no row is left"),
    "a pair": (
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"format": "preference"}, "preferences are read as text only",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "keys", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named(
    row: dict[str, Any], keys: dict[str, Any], message: str, read: Callable[..., Datasets]
) -> None:
    with pytest.raises(InputError, match=message):
        read(row, **keys)


def test_somebody_elses_rows_open_no_file(read: Callable[..., Datasets], tokenizer: PreTrainedTokenizerBase) -> None:
    row = asked({"type": "image", "image": "/etc/passwd"})
    with pytest.raises(InputError, match="this base is taken for text"):
        read(row, by=text_only(tokenizer))
    assert images_of(tokenizer) is not None


def test_an_image_is_never_cut_and_a_row_that_is_too_long_is_counted(read: Callable[..., Datasets]) -> None:
    long = asked({"type": "image", "image": "cat.png"}, {"type": "text", "text": "say it twice " * 20})
    found = read(long, asked({"type": "image", "image": "cat.png"}), max_length=64)
    assert len(found.train) == 1
    assert found.stats.dropped == {
        "longer than data.max_length (64), and images are not cut": [f"{found.stats.sources[0].path}:1"]
    }
    with pytest.raises(InputError, match=r"longer than data\.max_source_length or .*, and images are not cut \(1\)"):
        read(long, max_source_length=8)


def test_the_preview_says_how_large_the_images_are(
    read: Callable[..., Datasets], tokenizer: PreTrainedTokenizerBase
) -> None:
    with (console := Console(width=100)).capture() as shown:
        print_preflight(read(asked({"type": "image", "image": "cat.png"})), tokenizer, console)
    assert "image of 24 x 16 pixels" in shown.get()
    assert "<|image_pad|> (x 6)" in shown.get()
    assert "⟦a word<|im_end|>⟧" in shown.get()


def test_several_processes_read_images_too(read: Callable[..., Datasets]) -> None:
    image, text = asked({"type": "image", "image": "cat.png"}), asked({"type": "text", "text": "no image"})
    rows = [image, *[text] * 298, image]  # one for each process
    alone, both = (read(*rows, tokenize_processes=processes) for processes in (1, 2))
    np.testing.assert_array_equal(both.train.ids_hash, alone.train.ids_hash)


def test_a_copy_of_a_tokenizer_without_a_processor_reads_text_and_refuses_images(tmp_path: Path) -> None:
    """Such as what several processes read rows with, or TRL."""
    FAMILIES["gemma3"].write(tmp_path)
    images = images_of(pickle.loads(pickle.dumps(load_tokenizer(ModelSection(path=str(tmp_path))))))
    assert images is not None and images.expand("a word", [], "row 1") == ("a word", [])
    with pytest.raises(InputError, match="the processor of .* can't be loaded"):
        images.inputs([])
