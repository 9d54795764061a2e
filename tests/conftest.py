"""A tiny random Llama on disk, with a byte-level ChatML tokenizer, and rows it can learn: shared by the whole suite."""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import device  # first: it says where kernels run, before anything imports triton

# isort: split
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qvera.config.schema import Recipe, parse_recipe

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_LONGEST = (
    "distributed/",
    "test_bench",
    "serve/tinker/",
    "gpu/",
    "stress/",
    "training/",
    "serve/",
    "exporting/",
    "models/",
    "tasks/",
)
"""Rooms whose modules take longest. They begin first, so that at the end no worker waits for a long one alone."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order in which `make test` hands modules to its workers; on a card, the rooms that run there."""

    def place(item: pytest.Item) -> int:
        return next((i for i, room in enumerate(_LONGEST) if f"/tests/{room}" in str(item.path)), len(_LONGEST))

    items.sort(key=place)
    if device.NAME != "cpu":
        config.hook.pytest_deselected(items=[item for item in items if _room(item.path) not in device.ROOMS])
        items[:] = [item for item in items if _room(item.path) in device.ROOMS]


def _room(path: Path) -> str:
    return path.relative_to(Path(__file__).parent).parts[0]


@pytest.fixture(autouse=True)
def _made_on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a card, tensors of a test are made there."""
    if device.NAME == "cpu" or _room(request.path) not in device.DRAWN_THERE:
        yield
        return
    with device.MadeOn(device.DEVICE):
        yield


@pytest.fixture(autouse=True, scope="session")
def _surroundings() -> None:
    """One thread, on which products of tiny models are faster, and a terminal. The commands that tests start inherit both."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TERM"] = "xterm"  # with "dumb", rich shows no progress


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Later collections leave out what is there by now: all that is imported would take each of them a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Else libraries tell of what is frozen as leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _no_flush() -> Iterator[None]:
    """No file of a test has to outlive a power cut, and a run of a second flushes thirty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_tls_context() -> Iterator[None]:
    """Each call of httpx would read all certificates anew, though the servers of the tests have none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Quantized bases of the tests, and of the commands they start, are not left in the user's cache."""
    os.environ["QVERA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML markers: 300 tokens or so."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["system user assistant say the word twice"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None, unk_token=None
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def small_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention whose every linear has a different shape pattern than its neighbours."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 304,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "bos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a bf16 checkpoint directory, tokenizer and generation config included."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    small_llama().to(torch.bfloat16).save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows of a copying task in prompt-completion form."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    chooser = random.Random(0)
    words = ["red", "blue", "green", "grey", "gold"]
    with open(path, "w", encoding="utf-8") as handle:
        for _ in range(40):
            word = chooser.choice(words)
            handle.write(
                json.dumps({"prompt": f"say {word} {chooser.randint(0, 99)}", "completion": f"{word} {word}"}) + "\n"
            )
    return path


@pytest.fixture(scope="session")
def make_recipe(tiny_model_dir: Path, tiny_rows: Path) -> Any:
    """A small, fast recipe as an object; keyword sections override: ``make_recipe(training={"max_steps": 3})``."""

    def make(**sections: dict[str, Any]) -> Recipe:
        tree: dict[str, Any] = {
            "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
            "adapter": {"rank": 8},
            "data": {"path": str(tiny_rows), "eval_fraction": 0.2, "max_length": 64},
            "training": {
                "max_steps": 6,
                "global_batch_size": 8,
                "per_device_train_batch_size": 4,
                "learning_rate": 2e-2,
                "save_steps": 3,
                "sample_count": 1,
                "sample_max_new_tokens": 4,
                "report_to": [],
            },
        }
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
        return parse_recipe(tree, "test recipe")

    return make


@pytest.fixture(scope="session")
def trained_run(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of three steps. Read it, never change it."""
    from qvera.training.trainer import train

    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train(make_recipe(training={"output_dir": str(run_dir), "max_steps": 3}), run_dir)
    return run_dir


@pytest.fixture
def write_recipe(make_recipe: Any, tmp_path: Path) -> Any:
    """The same as a file, for the command line."""

    def write(name: str = "recipe.yaml", **sections: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(make_recipe(**sections).to_dict()), encoding="utf-8")
        return path

    return write
