"""`qvera init` writes a recipe that trains, `qvera doctor` says what would stop a run, `qvera schema` prints the schema."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from qvera.adapters.methods import measured_rate
from qvera.cli import doctor
from qvera.cli.main import main
from qvera.cli.recipes import recipe_text
from qvera.config.schema import json_schema, load_recipe
from qvera.config.sections import AdapterSection
from qvera.data import build_datasets
from qvera.models.tokenizer import load_tokenizer
from qvera.utils import accelerator
from qvera.utils.cores import Cores
from tests.helpers import Terminal
from tests.tasks.images import save_vit, write_folders

Capture = pytest.CaptureFixture[str]
SYSTEM = 'Say "it" 🙂: # \\ \u2028 \x85 \n.'


Init = Callable[..., str]


@pytest.fixture
def init(tiny_model_dir: Path, tmp_path: Path, capsys: Capture) -> Init:
    """Write `rows` into a file and run `qvera init new.yaml --model MODEL --data FILE OPTIONS`; what it said."""

    def run(rows: str | Path, *options: str, code: int = 0, file: str = "my rows.csv") -> str:
        data, out = tmp_path / file, tmp_path / "new.yaml"
        if isinstance(rows, Path):
            data = rows
        else:
            data.write_text(rows)
        if code == 0:
            out.unlink(missing_ok=True)
        capsys.readouterr()
        model = [] if "--model" in options else ["--model", str(tiny_model_dir)]
        assert main(["init", str(out), *model, "--data", str(data), *options]) == code
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new.yaml"


def test_the_new_recipe_knows_the_rows_and_passes_preview(
    init: Init, out: Path, tiny_model_dir: Path, tiny_rows: Path
) -> None:
    assert f"qvera preview {out}" in init(tiny_rows, "--system", SYSTEM)
    recipe = load_recipe(out)
    assert (recipe.model.path, recipe.data.path) == (str(tiny_model_dir), str(tiny_rows))
    assert (recipe.data.format, recipe.data.system) == ("prompt-completion", SYSTEM)
    assert (recipe.data.max_length, recipe.data.eval_fraction) == (64, 0.1)
    assert recipe.adapter.rank == 64  # the hidden size is small
    stats = build_datasets(recipe.data, load_tokenizer(recipe.model)).stats
    large = recipe_text(recipe, dataclasses.replace(stats, train_rows=20_000), 576, 2048)
    assert f"\n  rank: {AdapterSection().rank}\n" in large and "\n  # save_steps: 100\n" in large
    instructions = dataclasses.replace(stats, trained_tokens=100 * stats.train_rows)
    assert "\n  b_groups: 2\n  input_scale: true\n" in recipe_text(recipe, instructions, 576, 2048)
    assert "b_groups" not in large + recipe_text(recipe, instructions, 4096, 2048)  # where it was not measured
    assert main(["preview", str(out)]) == 0
    text = out.read_text()
    assert text.startswith("# yaml-language-server: $schema=")
    assert json.loads(Path(text.splitlines()[0].partition("=")[2]).read_text()) == json_schema()
    assert "exists; nothing is overwritten" in init(tiny_rows, code=2)
    assert out.read_text() == text


def test_rows_beyond_the_context_of_the_base_are_cut_by_a_new_recipe_and_told_with_an_old_one(
    init: Init, out: Path, tiny_model_dir: Path, capsys: Capture
) -> None:
    """The tiny model has 256 positions, which it computes: nothing fails beyond them."""
    said = init("".join(json.dumps({"text": f"say {n} " * 400}) + "\n" for n in range(8)), file="rows.jsonl")
    assert "are cut at 256 tokens, where the base's context ends" in said
    assert load_recipe(out).data.max_length == 256
    assert "; the base's context ends at 256" in out.read_text()
    told = "tokens, and the base's context ends at 256"
    for command in (["plan", "--no-timing"], ["preview"], ["train", "--dry-run"]):
        for length, count in ((256, 0), (600, 1)):
            assert main([*command, str(out), "--set", f"data.max_length={length}"]) == 0
            assert " ".join("".join(capsys.readouterr()).split()).count(told) == count, (command, length)


def test_options_of_init_that_say_too_little_or_too_much_are_told(init: Init, out: Path, capsys: Capture) -> None:
    rows = "mail,about\nhello,greeting\n"
    assert init(rows, "--prompt-column", "mail", code=2).endswith("Here: --answer-column NAME too.\n")
    assert init(rows, "--answer-column", "about", code=2).endswith("Here: --prompt-column NAME too.\n")
    assert "docs/rewards.md has such a recipe" in init(rows, "--objective", "grpo", code=2)
    assert main(["init", str(out.with_suffix(".json"))]) == 2
    assert "expected one that ends in .yaml" in capsys.readouterr().err
    assert "Columns found in the header, line 1: mail, about." in init(rows, code=2)


def test_the_new_recipe_learns_enough_from_few_rows_and_says_that_they_are_few(init: Init, out: Path) -> None:
    row = '{{"prompt": "say {}", "completion": "red"}}\n'
    rows = lambda count: "".join(row.format(i) for i in range(count))  # noqa: E731
    for count, epochs, step_rows, save_steps in ((60, 10, 8, 7), (300, 5, 8, 17), (3000, 1, 16, 17)):
        said = init(rows(count), file="rows.jsonl")
        training = load_recipe(out).training
        assert (training.num_train_epochs, training.global_batch_size) == (epochs, step_rows)
        assert training.save_steps == save_steps  # it saves ten times
        assert (f"a model learns little from {count}" in said) == (count == 60)
        assert training.exact_match_rows == min(50, count // 10)
        assert 8 < training.sample_max_new_tokens < 20  # the base goes on for long, and nothing of that counts
    assert training.learning_rate == 0.03  # that of the smallest base measured: the tiny model is smaller still
    assert "for a hidden size of" in out.read_text()
    init(rows(300).replace("red", "red " * 60), file="rows.jsonl")
    assert load_recipe(out).training.exact_match_rows == 0  # long answers are never the same word for word
    init("".join(f'{{"text": "say {i}"}}\n' for i in range(60)), file="rows.jsonl")
    assert "exact_match" not in out.read_text() and "answer" not in out.read_text(), "texts answer nothing"


def test_the_new_recipe_names_the_answers_where_they_are_labels(init: Init, out: Path) -> None:
    rows = "".join(f"mail {i},{label}\n" for i in range(20) for label in ("refund", "a new order"))
    assert "Answer with one of these: a new order, refund." in init(f"prompt,completion\n{rows}")
    assert load_recipe(out).data.system == "Answer with one of these: a new order, refund."
    alike = rows.replace("9,refund", "9,Refund").replace("8,refund", "8,Refund").replace("7,a new", "7,A new")
    said = init(f"prompt,completion\n{alike * 10}")
    assert "'Refund' (40 rows) and 'refund' (160 rows) differ only by case or spaces; is that meant?" in said
    assert "'A new order' (20 rows) and 'a new order' (180 rows) differ only" in said
    assert main(["preview", str(out)]) == 0
    long = "Sort the mail. " * 40  # longer than the name of any file
    init(f"prompt,completion\n{rows}", "--system", long)
    assert load_recipe(out).data.system == long
    init("prompt,completion\n" + "".join(rows.splitlines(keepends=True)[:19]))
    assert load_recipe(out).data.system is None


def test_the_new_recipe_has_the_system_prompt_that_all_rows_begin_with(init: Init, out: Path) -> None:
    said = init("prompt,completion,system\n" + "".join(f"mail {i},order,Sort it.\n" for i in range(20)))
    assert "system prompt     Sort it. (data.system in " in said
    assert load_recipe(out).data.system == "Sort it."  # for prompts that come without it
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for systems in (["Be brief.", "Be kind."], ["Be brief.", None]):
        begins = [[{"role": "system", "content": text}] if text else [] for text in systems]
        init("".join(json.dumps({"messages": [*begin, *turns]}) + "\n" for begin in begins), file="rows.jsonl")
        assert load_recipe(out).data.system is None


def test_a_rate_between_measured_sizes_lies_between_their_rates() -> None:
    assert [measured_rate("vera", size) for size in (64, 576, 1280, 4096, 8192)] == [0.03, 0.05, 0.02, 4e-3, 4e-3]
    assert 0.004 < (measured_rate("vera", 2048) or 0) < 0.02
    assert measured_rate("vera", round((576 * 1280) ** 0.5)) == pytest.approx((0.05 * 0.02) ** 0.5, rel=0.05)
    assert measured_rate("unknown", 4096) is None


def test_the_new_recipe_of_many_adapters_counts_steps_of_each(init: Init, out: Path) -> None:
    rows = "".join(f"{'anna' if number % 4 else 'ben'},say {number},{number}\n" for number in range(80))
    said = init(f"customer,prompt,completion\n{rows}", "--adapter-column", "customer")
    assert "adapters          2: ben (20), anna (60)" in said
    recipe = load_recipe(out)
    assert recipe.data.adapter_column == "customer" and recipe.data.eval_fraction == 0.1
    assert "# 50 steps of each adapter of 8 rows" in out.read_text()
    out.unlink()
    assert "no column 'owner'" in init(f"customer,prompt,completion\n{rows}", "--adapter-column", "owner", code=2)


def test_a_new_recipe_takes_a_file_of_held_out_rows(init: Init, out: Path, tiny_rows: Path, tmp_path: Path) -> None:
    lines = tiny_rows.read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(lines[:7]))
    init(tiny_rows, "--eval-data", str(tmp_path / "test.jsonl"))
    recipe = load_recipe(out)
    assert (recipe.data.eval_path, recipe.data.eval_fraction) == (str(tmp_path / "test.jsonl"), 0.0)
    assert recipe.training.exact_match_rows == 7
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "red"}]})
    )
    init(tiny_rows, "--eval-data", str(tmp_path / "test.jsonl"))
    assert load_recipe(out).data.format == "auto", "the two files have different formats"
    assert main(["preview", str(out)]) == 0
    out.unlink()
    assert "nowhere.jsonl: no such file" in init(tiny_rows, "--eval-data", "nowhere.jsonl", code=2)


def test_a_new_recipe_takes_the_configuration_and_the_split_of_a_hub_dataset(
    init: Init, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str, name: str | None, split: str, revision: str | None) -> datasets.Dataset:
        if (path, name, split) != ("owner/name", "main", "train_sft"):
            raise ValueError("Config name is missing. Please pick one: ['main', 'socratic']")
        return datasets.Dataset.from_list([{"prompt": f"say {i}", "completion": "red"} for i in range(9)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("qvera.data.readers.leave_silent_hub", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    said = init(Path("owner/name"), code=2)
    assert "pick one: ['main', 'socratic']" in said and "--config-name and --split of init" in said
    init(Path("owner/name"), "--config-name", "main", "--split", "train_sft")
    data = load_recipe(out).data
    assert (data.path, data.config_name, data.split) == ("owner/name", "main", "train_sft")


def test_columns_of_no_known_format_are_asked_for(
    init: Init, out: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    rows = "topic,label\n" + "".join(f"say red {i},red {i}\n" for i in range(30))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "--prompt-column NAME --answer-column NAME" in init(rows, code=2)
    line = ["init", str(out), "--data", str(tmp_path / "my rows.csv")]
    assert main(line) == 2
    assert "--model: is missing" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(sys, "stdin", Terminal(f"{tiny_model_dir}\ntopic\nlabel\n"))
    assert main(line) == 0
    assert load_recipe(out).data.columns == {"prompt": "topic", "completion": "label"}
    assert main(["preview", str(out)]) == 0
    asked = out.read_text()
    init(rows, "--prompt-column", "topic", "--answer-column", "label")
    assert out.read_text() == asked


def test_the_new_recipe_of_a_classifier_knows_its_classes(init: Init, out: Path) -> None:
    said = init("text,label\nwhere is it,shipping\nmoney back,refund\n")
    assert f"not read          label. To train on other columns, delete {out}, and give --prompt-column NAME" in said
    assert "To train a classifier of these labels, give --task sequence-classification" in said
    assert "--objective kto" not in said  # which reads no texts
    init("text,label\nwhere is it,shipping\nmoney back,refund\n", "--task", "sequence-classification")
    rows = "prompt,completion,label\n" + "say red,red,1\nsay blue,blue,0\n" * 6
    said = init(rows)
    for advice in re.findall(r": (--(?:task|objective) .*)", said):  # each works as it is said
        assert "not read          label" not in init(rows, *advice.replace("NAME", "prompt").split())
    out.unlink()
    rows, task = "mail,about\n" + "where is it,shipping\nmoney back,refund\n" * 6, "sequence-classification"
    said = init(rows, "--task", task, code=2)
    assert "needs the columns text, label" in said
    assert "Here: --prompt-column NAME --answer-column NAME" in said
    said = init(rows, "--task", task, "--prompt-column", "mail", "--answer-column", "about")
    assert "12 rows, format classification" in said
    assert "2 classes (refund: 6, shipping: 6)" in said and "a label has 6 of them" in said
    recipe = load_recipe(out)
    assert (recipe.task, recipe.data.columns) == (task, {"text": "mail", "label": "about"})
    assert main(["preview", str(out)]) == 0


def test_no_recipe_is_written_for_a_base_that_cannot_be_trained(
    init: Init, out: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model_dir, tmp_path / "t5")
    (base / "config.json").write_text(json.dumps({"model_type": "t5"}))
    said = init("prompt,completion\na,b\n", "--model", str(base), code=2)
    assert "can't be loaded as a causal language model" in said and not out.exists()


def test_the_new_recipe_of_preferences_has_their_objective(init: Init, out: Path) -> None:
    row = json.dumps({"prompt": "say", "chosen": "red", "rejected": "blue"}) + "\n"
    assert "Here: --objective dpo" in init(row, code=2, file="pairs.jsonl")
    assert "(the chosen one); rename others in the file; dpo and orpo take pairs" in init(
        '{"prompt": "a", "completion": "b"}\n', "--objective", "dpo", code=2, file="rows.jsonl"
    )
    asked = row.replace('"prompt"', '"question"')
    said = init(asked, "--objective", "dpo", code=2, file="pairs.jsonl")
    assert "needs the column prompt. Columns found: question, chosen" in said and "Here: --prompt-column NAME" in said
    init(asked, "--objective", "dpo", "--prompt-column", "question", file="pairs.jsonl")
    assert load_recipe(out).data.columns == {"prompt": "question"}
    init(row, "--objective", "orpo", file="pairs.jsonl")
    assert (load_recipe(out).training.objective, load_recipe(out).data.format) == ("orpo", "preference")
    row = json.dumps({"prompt": "say", "completion": "red", "label": True}) + "\n"
    init(row * 7, "--objective", "kto", file="pairs.jsonl")
    assert load_recipe(out).training.per_device_train_batch_size > 1
    few = "".join(json.dumps({"prompt": f"say {i}", "chosen": "red", "rejected": "blue"}) + "\n" for i in range(40))
    said = init(few, "--objective", "dpo", file="few.jsonl")
    assert load_recipe(out).training.num_train_epochs == 10 and "a model learns little from 40" in said


def test_the_new_recipe_of_a_classifier_of_images_has_no_lengths(init: Init, out: Path, tmp_path: Path) -> None:
    pictures, model = write_folders(tmp_path / "pictures"), ("--model", str(save_vit(tmp_path / "vit")))
    assert "task: should be 'causal-lm'" in init(pictures, *model, "--task", "images", code=2)
    init(pictures, *model, "--task", "image-classification")
    assert "max_length" not in out.read_text()
    assert load_recipe(out).task == "image-classification"
    assert main(["preview", str(out), "--rows", "0"]) == 0


def test_doctor_reports_a_working_machine(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure", lambda: Cores(8, 2.8))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for what in ("versions", "device", "compute dtype", "4-bit kernels", "C++ compiler", "disk here", "cache"):
        assert f"  {what}" in said
    assert "8 cores, 2.8 of them used by others" in said and "A run started now takes 5 threads" in said
    assert "A run can start" in said


def test_doctor_says_what_would_stop_a_run(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "! cache" in said
    assert "A run would fail: cache." in said
    assert "apt install g++" in said  # missed by NVMe offload alone, so it stops nothing


def test_doctor_finds_a_torch_that_cannot_be_imported_and_broken_kernels(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes
    import torch

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available\nfor this GPU")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    found = doctor.four_bit_kernels(torch.device("cpu"))
    assert (found.stops, found.found) == (True, "fail (no kernel image is available)")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 1
    assert "! torch             can't be imported" in capsys.readouterr().out


def test_schema_prints_the_recipes_schema(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_a_card_that_torch_cannot_use_is_named_by_doctor_by_the_plan_and_by_a_run(
    tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(accelerator, "NVIDIA_CARD", str(tmp_path / "nvidia0"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    recipe = {"model": str(tiny_model_dir), "data": str(tiny_rows), "training": {"learning_rate": 0.01}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    for command in (["doctor"], ["plan", "--no-timing"], ["train", "--dry-run"]):
        file = [] if command == ["doctor"] else [str(tmp_path / "r.yaml")]
        assert main([*command, *file]) == 0
        said = capsys.readouterr()
        assert "torch can't use it: this torch was built" in " ".join((said.out + said.err).split())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert main(["doctor"]) == 0
    assert "CUDA_VISIBLE_DEVICES begins with 7, and there is no" in " ".join(capsys.readouterr().out.split())


def test_labels_that_are_nearly_the_same_are_shown(init: Init) -> None:
    rows = "text,label\n" + "".join(f"mail {i},{label}\n" for i in range(12) for label in ("Refund", "refund"))
    said = init(rows, "--task", "sequence-classification")
    assert "differ only by case or spaces are classes of their own: 'Refund' and 'refund'. Is that meant?" in said
    numbers = "text,label\n" + "".join(f'mail {i},"{i % 3},5"\n' for i in range(36))
    said = init(numbers, "--task", "sequence-classification")
    assert "labels            Labels such as 0,5 are classes. For numbers write 2.5" in said
