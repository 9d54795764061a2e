"""The README.md of an adapter or an export: a model card (huggingface.co/docs/hub/model-cards) from the run's files.

Unknown facts are left out, and no directory of this computer is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import try_to_load_from_cache

from qvera.adapters.methods import Method, method_of, names
from qvera.adapters.methods.base import Change
from qvera.config import plugins
from qvera.config.schema import AdapterSection, ModelSection, Recipe
from qvera.data import NAMED_TEMPLATES
from qvera.evaluation.load import Artifact, adapter_sha256, find_target, template_beside, template_of
from qvera.evaluation.run_info import directory_facts
from qvera.exporting.compare import rows_name
from qvera.exporting.gguf.architecture import FAMILIES
from qvera.exporting.lora import VLLM_RANKS
from qvera.models.hub import is_hub_id
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.utils import formatting
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256, read_json, try_read_json
from qvera.utils.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CERTIFICATE, CHAT_TEMPLATE, resolve_path

_RELATIONS = {"adapter": "adapter", "lora": "adapter", "gguf-lora": "adapter", "merged": "finetune", "gguf": "finetune"}
"""Kind → the hub's base_model_relation."""
_LICENSE_KEYS = ("license", "license_name", "license_link")
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}
"""transformers' class → the hub's pipeline_tag."""
_SHARED = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "Modelfile", ADAPTER_CONFIG, "config.json",
    "generation_config.json", "preprocessor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja",
)  # fmt: skip
"""Only these files are shared."""
_FORMS = {
    "adapter": "",
    "lora": ", as a LoRA",
    "gguf-lora": ", as a LoRA in a GGUF file",
    "merged": ", merged into it",
    "gguf": ", merged into it, as a GGUF file",
}
"""Kind → what became of the adapter."""


class CardSubject(NamedTuple):
    """What a card describes.

    Attributes:
        kind: a key of `_RELATIONS`.
        directory: has the files to share (`files_of`).
        adapter: `directory_facts`; {} where the adapter is gone.
        run: run.json; for one of several adapters only what concerns it.
        evaluation: from ``qvera eval --json``, if it is of this adapter.
        chat_template: where it is not the base's own.
        certificate: of an export; {} for an adapter.
    """

    kind: str
    directory: Path
    adapter: dict[str, Any]
    base: ModelSection
    model_class: ModelClass
    recipe: Recipe | None
    run: dict[str, Any]
    evaluation: dict[str, Any]
    chat_template: str | None
    certificate: dict[str, Any]


def find_subject(path: Path, name: str | None = None) -> CardSubject:
    """What is to be shared: a run, an adapter directory, or an export. InputError: it is none of these."""
    certificate = try_read_json(path / CERTIFICATE) or {}
    kind = certificate.get("kind", "adapter")
    if kind not in _RELATIONS or not isinstance(certificate.get("adapter"), dict):
        kind = "adapter"
    if kind == "adapter":
        target = find_target(path, name=name)
        if target.adapter is None:
            raise InputError(f"{path}: is a checkpoint that no adapter was merged into. Expected a run, or an export.")
        facts, outcome = directory_facts(target.adapter), _outcome(target)
        return CardSubject(kind, target.adapter, facts, target.section, target.model_class, target.recipe, *outcome, {})
    weights = Path(certificate["adapter"]["path"]) / ADAPTER_WEIGHTS
    base = ModelSection(path=certificate["base"]["path"], revision=certificate["base"].get("revision"))
    facts, recipe, outcome = dict(certificate["adapter"]), None, ({}, {}, None)
    if weights.is_file() and file_sha256(weights) == certificate["adapter"].get("sha256"):
        target = find_target(weights.parent)
        facts, recipe, outcome = directory_facts(weights.parent), target.recipe, _outcome(target)
    if kind in ("lora", "gguf-lora"):
        facts["rank"] = certificate["rank"]
    model_class = CAUSAL_LM if "gguf" in kind else find_target(path).model_class
    return CardSubject(kind, path, facts, base, model_class, recipe, *outcome, certificate)


def _outcome(target: Artifact) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """run.json, eval.json and chat template of the run; for one of several adapters only what concerns it."""
    if target.run is None or target.adapter is None or target.recipe is None:
        return {}, {}, template_beside(target)
    summary, place = try_read_json(target.run / "run.json") or {}, target.run
    if target.name is not None:
        place = target.adapter
        entries = summary.get("adapters") or ()
        own: dict[str, Any] = next((one for one in entries if one.get("name") == target.name), {})
        data = {**(summary.get("data") or {}), "train_rows": own.get("rows")}
        summary = {**summary, "data": data, "result": own}
    template = NAMED_TEMPLATES.get(template_of(target.recipe, target.run))
    return summary, read_evaluation(place / "eval.json", adapter_sha256(target)), template


def model_card(subject: CardSubject, repo: str | None = None) -> str:
    """The text of README.md. ``repo`` is ``user/name``; without it the commands have a placeholder."""
    title = repo or "USER/NAME"
    before = (subject.run.get("result") or {}).get("eval_before") or {}
    difference = subject.certificate.get("difference") or {}
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(subject), sort_keys=False, allow_unicode=True)}---\n",
        f"# {title.rpartition('/')[2]}\n" if repo else f"# {_base_name(subject.base)}, {subject.adapter['method']}\n",
        _summary(subject),
        "## How to use it\n\n" + _usage(subject, title),
        scores_text(before, _after(subject), subject.evaluation, difference, subject.kind != "adapter"),
        _training(subject),
        _license_text(subject),
    ]
    return "\n".join(part for part in parts if part)


def _base_name(base: ModelSection) -> str:
    return hub_name(base) or Path(resolve_path(base.path)).name


def hub_name(base: ModelSection) -> str | None:
    """The hub id of the base; None for a directory, whose origin is not known."""
    return base.path if is_hub_id(base.path) else None


def _license(base: ModelSection) -> dict[str, str]:
    """The license in the base's own card, from its directory or the hub's cache."""
    found: Any = Path(resolve_path(base.path)) / "README.md"
    if hub_name(base) is not None:
        found = try_to_load_from_cache(base.path, "README.md", revision=base.revision)
    if not isinstance(found, (str, Path)) or not Path(found).is_file():
        return {}
    _, _, rest = Path(found).read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        tree = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return {key: tree[key] for key in _LICENSE_KEYS if isinstance(tree.get(key), str)} if isinstance(tree, dict) else {}


def _front_matter(subject: CardSubject) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    if (name := hub_name(subject.base)) is not None:
        tree |= {"base_model": name, "base_model_relation": _RELATIONS[subject.kind]}
    tree["library_name"] = "transformers" if subject.kind == "merged" else "peft"
    if "gguf" in subject.kind:
        tree["library_name"] = "gguf"
    recipe = subject.recipe
    tree["pipeline_tag"] = _PIPELINES[subject.model_class.auto]
    tree["tags"] = ["qvera", str(subject.adapter["method"])]
    tree |= _license(subject.base)
    if recipe is not None:
        sources = [source.path for source in (recipe.data.mixture or [recipe.data])]
        if datasets := [path for path in sources if path and is_hub_id(path)]:
            tree["datasets"] = datasets
    if metrics := metrics_of(_after(subject), subject.evaluation.get("scores") or {}):
        tree["metrics"] = metrics
    return tree


def _method(facts: dict[str, Any]) -> Method:
    options = {key: facts[key] for key in ("magnitude", *plugins.facts()) if key in facts}
    return method_of(AdapterSection.model_construct(method=str(facts["method"]), **options))


def _title(facts: dict[str, Any]) -> str:
    name = str(facts["method"])
    if name not in names():
        return name
    return _method(facts).title or name


def _summary(subject: CardSubject) -> str:
    facts = subject.adapter
    method = _title(facts)
    article = "An" if method[0].lower() in "aeiou" else "A"
    rank = f" of rank {facts['rank']}" if facts.get("rank") else ""
    trained = facts.get("trained_parameters")
    size = "" if trained is None else f" with {trained:,} trained parameters"
    version = (subject.run.get("versions") or {}).get("qvera")
    trained_with = "qvera" if version is None else f"qvera {version}"
    quantized = (subject.certificate.get("quantized") or {}).get("quantization")
    form = _FORMS[subject.kind] + (f", in 4 bits ({quantized})" if quantized else "")
    name = _base_name(subject.base)
    return f"{article} {method} adapter{rank}{size}, for {name}{form}. It was trained with {trained_with}.\n"


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```\n"


def _usage(subject: CardSubject, repo: str) -> str:
    base, kind, auto = _base_name(subject.base), subject.kind, subject.model_class.auto
    if kind in ("gguf", "gguf-lora"):
        found = sorted(subject.directory.glob("*.gguf"))
        file = found[0].name if found else "model.gguf"
        if kind == "gguf-lora":
            return (
                "llama.cpp, with a GGUF file of the base:\n\n"
                + _block("bash", f"hf download {repo} --local-dir here\nllama-cli -m BASE.gguf --lora here/{file}")
                + "\nOllama: put the base's file into the Modelfile.\n\n"
                + _block("bash", "ollama create NAME -f here/Modelfile")
            )
        text = f"hf download {repo} --local-dir here\nllama-cli -m here/{file}\nollama create NAME -f here/Modelfile"
        return "llama.cpp and Ollama:\n\n" + _block("bash", text)
    if kind == "merged":
        return (
            "transformers:\n\n"
            + _block(
                "python",
                f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({repo!r})",
            )
            + "\nqvera:\n\n"
            + _block("bash", f"qvera eval {repo} --data rows.jsonl")
        )
    is_lora = subject.adapter.get("peft_type") == "LORA" or kind == "lora"
    before = "" if is_lora else "import qvera  # PEFT knows the adapter's type from here on\n"
    parts = [
        "PEFT:\n",
        _block(
            "python",
            f"{before}from peft import PeftModel\nfrom transformers import {auto}\n\n"
            f"base = {auto}.from_pretrained({base!r}{_head_options(subject)})\n"
            f"model = PeftModel.from_pretrained(base, {repo!r})",
        ),
    ]
    answers = not subject.model_class.has_own_head
    rows = "pictures/" if subject.model_class.reads_images else "rows.csv"
    lines = [f"qvera generate {repo} --prompt 'Hello'"] if answers else [f"qvera eval {repo} --data {rows}"]
    if answers:
        lines.append(f"qvera chat {repo}")
    if subject.chat_template is not None and answers:
        parts.append(f"Prompts have the chat template in {CHAT_TEMPLATE}.\n")
    parts += ["qvera:\n", _block("bash", "\n".join(lines))]
    known = str(subject.adapter["method"]) in names()
    if known and _method(subject.adapter).change is Change.PER_TOKEN:  # it is no change of weights
        return "\n".join(parts)
    parts += ["Merged, for transformers alone:\n", _block("bash", f"qvera export {repo} merged/ --to merged")]
    if answers and _has_lora(subject) and (served := _vllm(subject, base, repo, is_lora)):
        parts += ["vLLM:\n", _block("bash", served)]
    if answers and (subject.run.get("model") or {}).get("architecture") in (None, *FAMILIES):
        text = f"qvera export {repo} gguf/ --to gguf\nollama create NAME -f gguf/Modelfile"
        parts += ["Ollama:\n", _block("bash", text)]
    return "\n".join(parts)


def _has_lora(subject: CardSubject) -> bool:
    """Whether the adapter equals a LoRA that vLLM takes."""
    if subject.adapter.get("magnitude") or subject.adapter.get("added_tokens"):
        return False
    return str(subject.adapter["method"]) not in names() or _method(subject.adapter).change is Change.LOW_RANK


def _vllm(subject: CardSubject, base: str, repo: str, is_lora: bool) -> str:
    """How vLLM serves it; "" for a LoRA of a rank that vLLM does not take."""
    own = int(subject.adapter.get("rank") or 0)
    place = next((rank for rank in VLLM_RANKS if rank >= own), None)
    if place is None and is_lora:
        return ""
    lora = repo if is_lora else "lora/"
    served = f"vllm serve {base} --enable-lora --max-lora-rank {place or VLLM_RANKS[-1]} --lora-modules name={lora}"
    cut = f" --rank {VLLM_RANKS[-1]}" if place is None else ""
    return served if is_lora else f"qvera export {repo} lora/ --to lora{cut}\n{served}"


def _head_options(subject: CardSubject) -> str:
    """Arguments that make the base a classifier with the adapter's head."""
    labels = subject.model_class.labels
    return f", num_labels={len(labels)}, ignore_mismatched_sizes=True" if labels else ""


def _after(subject: CardSubject) -> dict[str, Any]:
    return dict((subject.run.get("result") or {}).get("eval_after") or {})


def _training(subject: CardSubject) -> str:
    recipe, run, facts = subject.recipe, subject.run, subject.adapter
    if recipe is None:
        return ""
    data, result, training = run.get("data") or {}, run.get("result") or {}, recipe.training
    sources = [source.path for source in (recipe.data.mixture or [recipe.data])]
    targets = facts.get("targets")
    rows = {
        "data": ", ".join(path if is_hub_id(path) else Path(path).name for path in sources if path),
        "rows": data.get("train_rows"),
        "template": None if subject.model_class.has_own_head else data.get("template"),
        "method": facts["method"],
        "rank": facts.get("rank"),
        "adapted linears": ", ".join(targets) if isinstance(targets, list) else targets,
        "base held in": recipe.model.quantization,
        "learning rate": training.learning_rate,
        "schedule": training.lr_scheduler_type,
        "steps": result.get("steps"),
        "rows of a step": training.global_batch_size,
        "epochs": None if result.get("epochs") is None else round(result["epochs"], 2),
        "seed": facts.get("projection_seed"),
        "time": None if result.get("seconds") is None else formatting.duration(result["seconds"]),
        "device": run.get("device"),
        "versions": ", ".join(f"{name} {number}" for name, number in (run.get("versions") or {}).items()),
        "SHA-256 of the adapter": facts.get("adapter_sha256") or facts.get("sha256"),
        "fingerprint of the base": facts.get("base_fingerprint"),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["## Training\n", "| | |", "|---|---|", *lines, ""])


def _license_text(subject: CardSubject) -> str:
    found = _license(subject.base)
    if not found:
        return "## License\n\nThe license of the base model applies. Its files on this machine do not name it.\n"
    return f"## License\n\nThat of the base: {found.get('license_name') or found['license']}.\n"


def files_of(subject: CardSubject) -> list[Path]:
    """Weights, settings and tokenizer. Other files may hold rows or answers, so they are not shared."""
    found = sorted(subject.directory.iterdir())
    return [file for file in found if file.is_file() and any(fnmatch(file.name, name) for name in _SHARED)]


def contents_of(subject: CardSubject, repo: str) -> dict[str, Path | bytes]:
    """Name → file or bytes: `files_of`, the card, and the chat template that an adapter needs."""
    contents: dict[str, Path | bytes] = {}
    if subject.kind in ("adapter", "lora") and subject.chat_template is not None:
        contents[CHAT_TEMPLATE] = subject.chat_template.encode()
    own = subject.directory / "README.md"  # else the card
    readme = own.read_bytes() if own.is_file() else model_card(subject, repo).encode()
    return contents | {file.name: file for file in files_of(subject)} | {"README.md": readme}


def local_base(subject: CardSubject) -> str | None:
    """The base's directory, as an adapter's config names it; None for a hub id or no base."""
    config = subject.directory / ADAPTER_CONFIG
    if not config.is_file():
        return None
    name = read_json(config, "the config of a PEFT adapter", keys=("peft_type",)).get("base_model_name_or_path")
    return None if not isinstance(name, str) or is_hub_id(name) else name


_NO_SCORES = ("rows", "trained_tokens", "seconds", "scored_rows", "references", "tokens")
_METRICS = {
    "exact_match": "exact_match",
    "bleu": "bleu",
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
"""Our name of a score → the hub's."""

Scores = Mapping[str, Any]


def read_evaluation(file: Path, adapter_sha256: str | None) -> dict[str, Any]:
    """What ``qvera eval RUN --json`` wrote; {} where the file is missing or of another adapter."""
    tree = try_read_json(file) or {}
    about = tree.get("subject")
    if not isinstance(about, dict) or not isinstance(tree.get("scores"), dict) or adapter_sha256 is None:
        return {}
    return tree if (about.get("column"), about.get("adapter_sha256")) == ("Adapter", adapter_sha256) else {}


def metrics_of(*measured: Scores) -> list[str]:
    """The hub's names of what was measured."""
    found = {
        _METRICS[key] for scores in measured for key, value in scores.items() if key in _METRICS and is_number(value)
    }
    return sorted(found)


def scores_text(
    before: Scores, after: Scores, evaluation: Mapping[str, Any], difference: Mapping[str, Any], is_export: bool
) -> str:
    """The section of a card; "" where nothing was measured. The card of an export shows its adapter's scores too.

    Args:
        before, after: scores of held-out rows in run.json.
        evaluation: from `read_evaluation`.
        difference: from an export's certificate.
    """
    of_run = " They are those of the adapter before it was exported." if is_export else ""
    parts = [_table(f"{_on(after, 'held-out rows')}.{of_run}", {"before training": before, "after": after})]
    if evaluation:
        scores, of_base = evaluation["scores"], evaluation.get("base_scores")
        sides = {"base": of_base, "trained": scores} if isinstance(of_base, dict) else {"trained": scores}
        where = _source(str(evaluation["subject"].get("data") or ""))
        parts.append(_table(f"{_on(scores, 'rows')}{where}, by `qvera eval`.{of_run}", sides))
    trained, exported = difference.get("trained"), difference.get("exported")
    if "loss_trained" in difference:
        trained, exported = ({"loss": difference[f"loss_{side}"]} for side in ("trained", "exported"))
    if isinstance(trained, dict) and isinstance(exported, dict):
        rows = difference if "rows" in difference else exported
        parts.append(
            _table(
                f"{_on(rows, rows_name(difference))}, this export beside its run.", {"run": trained, "export": exported}
            )
        )
    if not any(parts):
        return ""
    return "## Scores\n\n" + "\n".join(filter(None, parts))


def is_number(value: object) -> bool:
    """Whether it is a number and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _on(scores: Scores, what: str) -> str:
    rows = scores.get("rows", scores.get("scored_rows"))
    return f"On {rows:,} {what}" if is_number(rows) else f"On {what}"


def _source(data: str) -> str:
    """Without the directory of the data."""
    if not data:
        return ""
    return f" of {data if is_hub_id(data.partition(',')[0]) else Path(data).name}"


def _table(text: str, sides: Mapping[str, Scores]) -> str:
    """The scores of the last side in a table under a sentence; "" where it has none."""
    last = list(sides.values())[-1]
    names = [name for name, value in last.items() if name not in _NO_SCORES and is_number(value)]
    if not names:
        return ""
    rows = [
        f"| {name.replace('_', ' ')} | {' | '.join(_cell(scores.get(name)) for scores in sides.values())} |"
        for name in names
    ]
    return "\n".join([f"{text}\n", f"| | {' | '.join(sides)} |", "|---" * (len(sides) + 1) + "|", *rows, ""])


def _cell(value: Any) -> str:
    return formatting.significant(value, 4) if is_number(value) else "–"
