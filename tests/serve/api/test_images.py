"""Images in chat completions: answers are those of `generate`, beside requests of text, and what is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.config.sections import ModelSection
from qvera.data import Encoder, resolve_template
from qvera.data.conversations import read_messages
from qvera.evaluation.generate import PromptWriter, end_tokens, generate
from qvera.models.loader import load_base
from qvera.serve.api.access import DEFAULTS
from qvera.serve.api.app import create_app
from qvera.serve.api.schemas import ChatBody
from qvera.serve.api.service import Service
from qvera.utils.errors import InputError
from tests.image_text import IMAGE_FAMILIES, picture
from tests.serve.api.conftest import Served
from tests.serve.command import running
from tests.serve.helpers import engine_of, store_of

pytestmark = pytest.mark.process


def shown(*numbers: int) -> list[dict[str, Any]]:
    """A user's message of these pictures and a text."""
    urls = [f"data:image/png;base64,{base64.b64encode(picture(number)).decode()}" for number in numbers]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "say the word"}]}]


@pytest.mark.parametrize(
    "name", ["qwen3_vl", *(pytest.param(n, marks=pytest.mark.matrix) for n in IMAGE_FAMILIES if n != "qwen3_vl")]
)
def test_answers_to_images_and_texts_in_one_batch_are_those_of_generate(name: str, tmp_path: Path) -> None:
    for package in IMAGE_FAMILIES[name].needs:
        pytest.importorskip(package)
    directory = IMAGE_FAMILIES[name].write(tmp_path / "base")
    base = load_base(ModelSection(path=str(directory), compute_dtype="float32"))
    writer = PromptWriter(resolve_template("auto", base.tokenizer), Encoder(base.tokenizer))
    asked = [shown(1), shown(2, 3), [{"role": "user", "content": "say the word twice"}], shown(3)]
    turns = [read_messages(messages, "asked") for messages in asked]
    ids, images = [writer.ids(each) for each in turns], [writer.images(each) for each in turns]
    expected = generate(base.model, base.tokenizer, ids, images=images, max_new_tokens=8)
    assert len(set(expected)) > 1
    with engine_of(directory, "auto", base=base) as engine:
        assert engine.why_static is not None
        assert "takes images" in engine.why_static
        ends = frozenset(end_tokens(base.model, base.tokenizer))
        service = Service(engine, store_of(tmp_path), writer, ends, "base", DEFAULTS, None, None)
        with running(create_app(service)) as (_, url, _port), ThreadPoolExecutor(4) as threads:

            def answer(messages: Any) -> str:
                body = {"model": "base", "messages": messages, "max_tokens": 8, "temperature": 0}
                said = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
                assert said["usage"]["prompt_tokens"] == len(ids[asked.index(messages)])
                return str(said["choices"][0]["message"]["content"])

            assert list(threads.map(answer, asked)) == expected


BAD: dict[str, tuple[Any, str]] = {
    "an address": ({"type": "image_url", "image_url": {"url": "http://x.org/a.png"}}, "must be a data: URL"),
    "a path": ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "must be a data: URL"),
    "no base64": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}, "no base64"),
    "a base of text": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}, "taken for text"),
    "a sound": ({"type": "input_audio", "input_audio": {"data": ""}}, "content"),
}


@pytest.mark.parametrize(("part", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_no_image_is_a_clear_error(part: Any, message: str, served: Served) -> None:
    messages = [{"role": "user", "content": [part]}]
    said = served.post("/v1/chat/completions", {"model": "tiny", "messages": messages})
    assert said.status_code == 400
    assert message in said.json()["error"]["message"]


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"type": "text", "text": "a <|image_pad|>"}, r"has 2 places for images .*, and 1 images are given"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}, "the image is no base64"),
    ],
)
def test_a_fault_among_the_images_of_a_request_is_not_told_as_one_of_a_row(part: Any, why: str, tmp_path: Path) -> None:
    directory = IMAGE_FAMILIES["qwen3_vl"].write(tmp_path / "base")
    tokenizer = load_base(ModelSection(path=str(directory), compute_dtype="float32")).tokenizer
    writer = PromptWriter(resolve_template("auto", tokenizer), Encoder(tokenizer))
    asked = shown(1)
    asked[0]["content"].append(part)
    with pytest.raises(InputError, match=why) as refused:
        writer.ids(ChatBody(model="base", messages=asked).turns())
    assert "row" not in str(refused.value)


def test_a_body_beyond_the_limit_is_refused(start: Callable[..., Served]) -> None:
    small = start(body_bytes=1000)
    said = small.post("/v1/chat/completions", {"model": "tiny", "messages": shown(1)})
    assert said.status_code == 413
