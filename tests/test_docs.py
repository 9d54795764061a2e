"""The documentation is true: examples run, commands run or are listed with a reason, links lead somewhere."""

from __future__ import annotations

import io
import json
import pkgutil
import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvera import __version__
from qvera.adapters import methods
from qvera.cli.main import main
from qvera.config.schema import parse_recipe
from tests.cli.helpers import parse
from tests.helpers import ROOT, commands, commands_of
from tests.many_adapters import write_customers, write_run

pytestmark = pytest.mark.process

OF_ALL_METHODS = [f"docs/methods/{name}.md" for name in ("index", "table", "adding")]
METHOD_PAGES = sorted({f"docs/methods/{p.name}" for p in (ROOT / "docs" / "methods").glob("*.md")} - {*OF_ALL_METHODS})
OTHER_PAGES = sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *OTHER_PAGES, *OF_ALL_METHODS, *METHOD_PAGES]

# Commands that the pages show and no test here runs. The first words of the command → why.
NOT_RUN = {
    "qvera quickstart": "downloads a model; `make quickstart` is run by hand before each release",
    "qvera init my.yaml --model": "measures the machine for seconds; tests/cli/test_init_and_doctor.py does",
    "qvera train recipes/quickstart.yaml": "needs the quickstart's model",
    "qvera export runs/quickstart": "needs the quickstart's run; bench/lora_cut.py does the same",
    "qvera train recipes/customers.yaml": "tests/test_readme_customers.py runs it on a small model",
    "qvera generate runs/customers --adapter chloe --adapter gina": "tests/test_readme_customers.py does",
    "qvera serve": "runs until it is stopped; tests/serve/api/test_command.py does",
    "qvera ui": "runs until it is stopped; tests/serve/ui/test_command.py does",
    "ssh": "needs another machine",
    "curl": "asks a server; tests/serve/api/test_command.py does",
    "qvera chat http://127.0.0.1:8000": "asks a server; tests/serve/api/test_client.py does",
    "qvera generate http://127.0.0.1:8000": "asks a server; tests/serve/api/test_client.py does",
    "qvera eval runs/my --judge": "asks a server; tests/evaluation/test_judge.py does",
    "qvera train preference.yaml": "needs TRL; tests/training/test_preference.py does",
    "qvera eval runs/preference": "needs TRL; tests/training/test_preference.py does",
    "qvera launch": "starts other processes; tests/distributed does",
    "qvera push": "needs a hub; tests/cli/test_hub.py does",
    "qvera chat anna/orders": "needs a hub; tests/cli/test_hub.py does the same with generate",
    "qvera generate anna/orders@v1.0": "needs a hub; tests/cli/test_hub.py does",
    "qvera export anna/orders": "needs a hub; tests/cli/test_hub.py does",
    "qvera harness": "needs lm-eval; tests/evaluation/test_lm_eval.py does",
    "qvera doctor": "tests/cli does; its exit code depends on the machine",
    "python -m bench.paper": "needs the hub; tests/test_paper.py runs it on tiny models",
    "python -m tinker_cookbook.recipes.chat_sl.train": "asks a server; `make test-tinker` does",
    "python -m tinker_cookbook.recipes.math_rl.train": "asks a server; `make test-tinker` does",
    "export": "sets variables of the shell",
    "torchrun": "starts other processes; tests/distributed does",
    "deepspeed": "needs other machines; tests/distributed does",
    "docker": "needs Docker; what comes after the image is parsed below",
    "sky": "needs SkyPilot and a cloud; tests/distributed/test_schedulers.py runs its script",
    "kubectl": "needs a cluster; tests/distributed/test_schedulers.py runs its script",
    "sbatch": "needs Slurm; tests/distributed/test_slurm.py does",
    "lm_eval": "needs lm-eval; tests/evaluation/test_lm_eval.py does",
    "git clone": "needs a network",
    "pip install": "needs a network; make targets do it",
    ".ci/run": "runs this suite",
    "make": "runs this suite, or builds; that the target exists is tested below",
}


def reason_not_run(command: str) -> str | None:
    return next((why for words, why in NOT_RUN.items() if f"{command} ".startswith(f"{words} ")), None)


def to_run() -> list[str]:
    """The qvera commands of the pages that can run here, but those whose words another one has too; these only parse."""
    pages = [page for page in PAGES if page != "docs/tutorial.md"]  # tests/test_tutorial.py runs it, in its order
    shown = dict.fromkeys(command for page in pages for command in commands(page))
    can_run = [command for command in shown if command.startswith("qvera ") and reason_not_run(command) is None]
    words = {command: set(command.split()) for command in can_run}
    return [one for one in can_run if not any(words[one] < words[other] for other in can_run)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_rows: Path) -> Path:
    """A directory with what the pages talk about: my.yaml, rows, a run and its exports, from the tiny model."""
    here = tmp_path_factory.mktemp("workspace")
    rows = [yaml.safe_load(line) for line in tiny_rows.read_text(encoding="utf-8").splitlines()]
    shutil.copy(tiny_rows, here / "rows.jsonl")
    lines = ["prompt,completion", *(f"{row['prompt']},{row['completion']}" for row in rows)]
    (here / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    labelled = ["text,label", *(f"{row['prompt']},{'ab'[n % 2]}" for n, row in enumerate(rows))]
    (here / "reviews.csv").write_text("\n".join(labelled) + "\n", encoding="utf-8")
    (here / "prompts.txt").write_text("say red 1\nsay blue 2\n", encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
        "data": {"path": "rows.csv", "eval_fraction": 0.1, "max_length": 64},
        "adapter": {"rank": 8},
        "training": {
            "max_steps": 2, "global_batch_size": 4, "learning_rate": 2e-2, "sample_count": 1,
            "sample_max_new_tokens": 4, "report_to": [],
        },
    }  # fmt: skip
    (here / "my.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert main(["train", "my.yaml"]) == 0
        assert main(["export", "runs/my", "merged", "--no-compare"]) == 0
        assert main(["export", "runs/my", "lora", "--to", "lora"]) == 0
        assert main(["eval", "runs/my", "--json", "runs/my/eval.json"]) == 0
        shutil.copytree("runs/my", "runs/other")
        many = {**recipe, "data": {**recipe["data"], "path": "customers.csv", "adapter_column": "customer"}}
        names = ["anna", "ben"]
        write_customers(here / "customers.csv", names)
        write_run(here / "runs" / "customers", parse_recipe({**many, "training": {}}, "customers"), names)
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows]
    (here / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    preference = {"data": {**recipe["data"], "path": "pairs.jsonl"}, "training": {"objective": "dpo"}}
    (here / "preference.yaml").write_text(yaml.safe_dump({**recipe, **preference}), encoding="utf-8")
    (here / "questions.csv").write_text("customer,prompt\nben,say red 1\nanna,say blue 2\n", encoding="utf-8")
    return here


def outputs_of(words: list[str]) -> list[str]:
    """The files and directories that a command creates, and that must not exist before it."""
    found = [words[i + 1] for i, word in enumerate(words) if word in ("--html", "--out", "--predictions")]
    if words[0] == "eval" and "--json" in words:
        found.append(words[words.index("--json") + 1])
    positional = [word for word in words[1:] if not word.startswith("-")]
    if words[0] == "export" and "--compare-only" not in words:
        found.append(positional[1])
    if words[0] == "merge-adapters":
        found.append("out" if "--adapter" in words else positional[2])
    if words[0] == "quantize" and len(positional) > 1:
        found.append(positional[1])
    if words[0] == "init":
        found.append(positional[0])
    if words[0] == "train" and not {"--resume", "--find-lr"} & set(words):
        found.append("runs/my")
    return found


@pytest.mark.parametrize("command", to_run())
def test_commands_of_the_documents_run(
    command: str, workspace: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    here = tmp_path / "here"
    shutil.copytree(workspace, here)
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.stdin", io.StringIO("say red 1\n/quit\n"))
    words = [w.replace("HuggingFaceTB/SmolLM2-1.7B-Instruct", str(tiny_model_dir)) for w in shlex.split(command)[1:]]
    words = [word.replace("MODEL", str(tiny_model_dir)) for word in words]
    if words[0] in ("chat", "generate", "eval") and "--max-new-tokens" not in words:
        words += ["--max-new-tokens", "4"]
    for output in outputs_of([w for w in words if w != "--traceback"]):
        if (here / output).is_dir():
            shutil.rmtree(here / output)
        else:
            (here / output).unlink(missing_ok=True)
    code: object
    try:
        code = main(words)
    except SystemExit as ended:  # --help
        code = ended.code
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "qvera" and words[1] != "--traceback" and not {"--help", "--version"} & set(words):
            assert parse(words[1:])[0] == words[1]
        elif words[:2] == ["docker", "run"]:
            rest = words[next(i for i, word in enumerate(words) if word in ("qvera", "qvera:cuda")) + 1 :]
            assert parse(rest)[0] == rest[0]
            assert "--host" not in rest or "--keys" in rest, f"{page}: {command} is refused"
        elif words[0] == "make":
            assert set(words[1:]) <= targets, command
        elif words[0] == "sbatch":
            assert (ROOT / words[1]).is_file()
        elif words[0] != "qvera":
            assert words[0] in ("cd", "pre-commit") or reason_not_run(command), f"{page}: {command}"


def test_commands_in_the_comments_of_recipes_parse() -> None:
    texts = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "recipes").rglob("*.yaml"))]
    found = commands_of("\n".join(re.findall(r"^#\s*(qvera .*)", "\n".join(texts), re.MULTILINE)))
    assert len(found) > 20
    for command in found:
        words = shlex.split(command)
        assert parse(words[1:])[0] == words[1], command


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_of_many_adapters_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = python_blocks("docs/many-adapters.md")
    names: dict[str, Any] = {}
    monkeypatch.chdir(workspace)
    exec(compile(block, "docs/many-adapters.md", "exec"), names)
    assert len(set(names["answers"])) == 2


def test_the_api_examples_run(tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path, workspace: Path) -> None:
    """On one name: qvera itself, torch, PEFT and transformers are all that they import."""
    blocks = python_blocks("docs/api.md")
    assert len(blocks) == 8
    imported = re.findall(r"^(?:import|from) (\S+)", "\n".join(blocks), re.MULTILINE)
    assert set(imported) == {"qvera", "torch", "peft", "transformers"}
    names: dict[str, Any] = {"MODEL": str(tiny_model_dir), "ROWS": str(tiny_rows)}
    names |= {"CUSTOMERS": str(workspace / "customers.csv"), "WHERE": str(tmp_path)}
    for block in blocks:
        shorter = block.replace('"max_steps": 4,', '"max_steps": 4, "sample_max_new_tokens": 4,')
        exec(compile(shorter, "docs/api.md", "exec"), names)
    assert len(names["answers"]) == 2
    assert names["steps"] == [1, 2]
    assert names["reopened"] == pytest.approx(names["after"], rel=1e-5)
    assert names["after"] < names["before"] - 0.2
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "followed" / "checkpoints" / "step-00000003").is_dir()
    assert json.loads((tmp_path / "stopped" / "run.json").read_text(encoding="utf-8"))["status"] == "done"


def test_the_recipes_on_the_pages_are_accepted(tmp_path: Path, tiny_model_dir: Path) -> None:
    found = 0
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
            tree = yaml.safe_load(block)
            if not {"model", "data", "adapter", "training"} & set(tree):
                continue  # a task of lm-eval
            tree.setdefault("model", {"path": "x"})
            tree["data"] = {"path": "rows.csv", **tree.get("data", {})}
            parse_recipe(tree, page)
            found += 1
    assert found >= 4


def test_the_recipe_reference_is_current() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == made["reference"]()
    assert (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8") == made["schema_file"]()


def test_names_of_the_reference_exist() -> None:
    """So that a renamed function is noticed here, and not first by `make docs`."""
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    names = re.findall(r"^\.\. auto(?:function|class):: (\S+)$", page, re.MULTILINE)
    assert len(names) > 20
    for name in names:
        assert pkgutil.resolve_name(name), name


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_lead_to_files_and_headings(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:qvera|tests|bench|recipes|docs|examples|ds_configs)/[\w./*-]*)`", text):
        assert page == "docs/changelog.md" or list(ROOT.glob(path.rstrip("/"))), path
    for target in re.findall(r"\]\(([^):]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file.read_text(encoding="utf-8")), target


def test_error_messages_of_the_troubleshooting_page_exist() -> None:
    """A message in a heading is one that the code has; `…` stands for what differs."""
    source = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "qvera").rglob("*.py")))
    source = re.sub(r"[\"']\s*\n\s*f?[\"']", "", source)  # strings that continue on the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in source, message


def test_every_method_has_a_page_of_a_screen_with_its_equation_use_and_cost() -> None:
    pages = {Path(page).stem: (ROOT / page).read_text(encoding="utf-8") for page in METHOD_PAGES}
    assert set(methods.names()) <= pages.keys()
    for name, text in pages.items():
        assert len(text.splitlines()) <= 50, name
        for part in (r"(ΔW|y|W') = ", r"\*\*Choose it\*\*", r"\*\*(Cost|Memory)\b"):
            assert re.search(part, text), f"{name}: {part}"
        assert "arXiv" in text or "arxiv.org" in text, name


def test_workflows_call_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    called = set()
    for job in jobs.values():
        called |= {word for step in job["steps"] for word in step.get("run", "").split()[1:] if not {*"{}"} & {*word}}
        called |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
    called -= {"matrix.target"}
    assert {"lint", "test", "docs"} <= called <= set(targets)


def test_the_package_says_what_it_is() -> None:
    """The README is short, the citation has the package's version, and type checkers see the package as typed."""
    assert len((ROOT / "README.md").read_bytes()) <= 8192
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "Typing :: Typed" in project["classifiers"]
    assert (ROOT / "qvera" / "py.typed").is_file()
    for reference in re.findall(r"qvera\[([a-z]+)\]", " ".join((ROOT / p).read_text(encoding="utf-8") for p in PAGES)):
        assert reference in project["optional-dependencies"]
