"""The README.md of an adapter or an export: a model card (huggingface.co/docs/hub/model-cards) from the run's files.

Its text is in card.md. Unknown facts are left out, and no directory of this computer is named.
"""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import try_to_load_from_cache
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qvera.adapters.config import PEFT_TYPE
from qvera.adapters.methods import method_of, names
from qvera.adapters.methods.base import Change
from qvera.config import plugins
from qvera.config.schema import Recipe
from qvera.config.sections import AdapterSection, ModelSection
from qvera.data import NAMED_TEMPLATES
from qvera.evaluation.load import Artifact, adapter_sha256, find_target, template_beside, template_name
from qvera.evaluation.named_adapters import kind_of, no_adapter_in
from qvera.evaluation.report.read import entry_of, get, get_number, get_text, is_replaced
from qvera.evaluation.run_info import directory_facts, read_certificate
from qvera.exporting.compare import rows_name
from qvera.exporting.gguf_metadata import FAMILIES
from qvera.exporting.lora import VLLM_RANKS
from qvera.models.hub import is_hub_id, local_directory
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.tokenizer import ADDED_ROWS
from qvera.utils import formatting
from qvera.utils.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHAT_TEMPLATE,
    file_sha256,
    read_json,
    resolve_path,
    try_read_json,
)
from qvera.utils.safetensors_io import INDEX, SINGLE


class PublishedKind(NamedTuple):
    """A kind of thing to share: the hub's base_model_relation and library_name, and words for the adapter's form."""

    relation: str
    library: str
    form: str


_KINDS = {
    "adapter": PublishedKind("adapter", "peft", ""),
    "lora": PublishedKind("adapter", "peft", ", as a LoRA"),
    "gguf-lora": PublishedKind("adapter", "gguf", ", in a GGUF file as a LoRA"),
    "merged": PublishedKind("finetune", "transformers", ", merged into it"),
    "gguf": PublishedKind("finetune", "gguf", ", merged into it, as a GGUF file"),
}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}
"""Maps a class of transformers to the hub's pipeline_tag."""
_METRICS = {
    "exact_match": "exact_match",
    "bleu": "bleu",
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
"""Maps our name of a score to the hub's."""
_NO_SCORES = (
    "rows", "trained_tokens", "seconds", "scored_rows", "references", "tokens", "exact_match_rows",
    "commonest_reference",
)  # fmt: skip
_SETTINGS = (
    ADAPTER_CONFIG, "config.json", "generation_config.json", "*processor_config.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", CHAT_TEMPLATE,
)  # fmt: skip
_SHARED = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "Modelfile", "tokenizer*", "*.jinja", *_SETTINGS)
"""Only these files are shared."""
REPLACED = (ADAPTER_WEIGHTS, ADDED_ROWS, SINGLE, "model-*-of-*.safetensors", INDEX, *_SETTINGS)
"""Files of an earlier push that would be read as part of a new one. Others there may be their owner's."""


class CardSubject(NamedTuple):
    """The adapter or export that a card describes."""

    kind: str  # a key of `_KINDS`
    directory: Path  # has the files to share (`files_of`)
    adapter: dict[str, Any]  # `directory_facts`; {} where the adapter is gone
    base: ModelSection
    model_class: ModelClass
    recipe: Recipe | None
    run: dict[str, Any]  # run.json; for one of several adapters only what concerns it
    evaluation: dict[str, Any]  # from ``qvera eval --json``, if it is of this adapter
    chat_template: str | None  # where it is not the base's own
    certificate: dict[str, Any]  # of an export; {} for an adapter


def find_subject(path: Path, name: str | None = None) -> CardSubject:
    """Find out what a directory to share is: a run, an adapter, or an export. InputError: it is none of these."""
    path = local_directory(path)
    kind = kind_of(path)
    if kind in ("many", "run", "adapter", "checkpoint"):
        target, run = _find(path, name)
        if target.adapter is None:
            raise no_adapter_in(path)
        about = directory_facts(target.adapter), target.section, target.model_class, target.recipe, run
        return CardSubject("adapter", target.adapter, *about, *_outcome(target), {})
    certificate = read_certificate(path)
    weights = Path(certificate["adapter"]["path"]) / ADAPTER_WEIGHTS
    base = ModelSection(path=certificate["base"]["path"], revision=certificate["base"].get("revision"))
    facts, recipe, run = dict(certificate["adapter"]), None, dict[str, Any]()
    outcome: tuple[dict[str, Any], str | None] = {}, None
    # The run tells more than the certificate, but it may have trained on since the export.
    if weights.is_file() and file_sha256(weights) == certificate["adapter"].get("sha256"):
        target, run = _find(weights.parent)
        facts, recipe, outcome = directory_facts(weights.parent), target.recipe, _outcome(target)
    model_class = CAUSAL_LM
    if "gguf" not in kind:
        exported = find_target(path)
        model_class = exported.model_class
        base = exported.section if kind == "lora" else base  # how it is quantized too
    return CardSubject(kind, path, facts, base, model_class, recipe, run, *outcome, certificate)


def _find(path: Path, name: str | None = None) -> tuple[Artifact, dict[str, Any]]:
    """Do what `find_target` does, and read run.json; for one of many, only its part.

    An adapter that its run has not trained gets no recipe and {}. It may be a server's job's, or one that was put in
    the place of the run's.
    """
    target = find_target(path, name=name)
    if target.run is None or target.adapter is None:
        return target, {}
    summary = try_read_json(target.run / "run.json") or {}
    own = summary.get("adapter") if target.name is None else entry_of(summary, target.name)
    if (target.name is not None and not own) or is_replaced(get(own, "sha256"), target.adapter / ADAPTER_WEIGHTS):
        return dataclasses.replace(target, recipe=None, run=None), {}
    if target.name is not None:
        data = {**(summary.get("data") or {}), "train_rows": get(own, "rows")}
        summary = {**summary, "data": data, "result": own}
    return target, summary


def _outcome(target: Artifact) -> tuple[dict[str, Any], str | None]:
    """Read eval.json (if it is of this adapter) and the chat template."""
    if target.run is None or target.adapter is None or target.recipe is None:
        return {}, template_beside(target)
    place = target.run if target.name is None else target.adapter
    found, sha256 = try_read_json(place / "eval.json") or {}, adapter_sha256(target)
    about = found.get("subject") if sha256 is not None and isinstance(found.get("scores"), dict) else None
    # An evaluation of the base, or of an earlier state of the adapter, is not about what is shared.
    if not isinstance(about, dict) or (about.get("column"), about.get("adapter_sha256")) != ("Adapter", sha256):
        found = {}
    beside = target.adapter / CHAT_TEMPLATE
    named = NAMED_TEMPLATES.get(template_name(target.recipe, target.run))
    return found, beside.read_text(encoding="utf-8") if beside.is_file() else named


def model_card(subject: CardSubject, repo: str | None = None) -> str:
    """The text of README.md. ``repo`` is ``user/name``; without it the commands have a placeholder."""
    kind, facts, run, base = subject.kind, subject.adapter, subject.run, subject.base
    model_class, recipe = subject.model_class, subject.recipe
    hub_id = base.path if is_hub_id(base.path) else None
    base_name, place = hub_id or Path(resolve_path(base.path)).name, repo or "USER/NAME"
    sources = [source.path for source in (recipe.data.mixture or [recipe.data])] if recipe is not None else []
    result = run.get("result") or {}
    before, after = (result.get(f"eval_{when}") or {} for when in ("before", "after"))
    license_of_base = _license(base, hub_id)
    config = subject.directory / "config.json"  # of a merged export
    config = config if config.is_file() else _file_of_base(base, hub_id, "config.json")
    stored = (try_read_json(config) or {}).get("architectures") or [""]
    architecture = get_text(run, "model", "architecture") or str(stored[0])
    auto = model_class.of_published([architecture]).auto
    compute_dtype = (base if recipe is None else recipe.model).compute_dtype  # no file of an export has it

    front: dict[str, Any] = {}
    if hub_id is not None:
        front = {"base_model": hub_id, "base_model_relation": _KINDS[kind].relation}
    front["library_name"] = _KINDS[kind].library
    front["pipeline_tag"] = _PIPELINES[auto]
    front["tags"] = ["qvera", str(facts["method"])]
    front |= license_of_base
    if datasets := [path for path in sources if path and is_hub_id(path)]:
        front["datasets"] = datasets
    measured = [(after, key) for key in _METRICS] + [(subject.evaluation.get("scores") or {}, key) for key in _METRICS]
    if metrics := sorted({_METRICS[key] for scores, key in measured if formatting.is_number(scores.get(key))}):
        front["metrics"] = metrics

    method, changes_weights, is_low_rank = str(facts["method"]), True, True
    if method in names():
        options = {key: facts[key] for key in ("magnitude", *plugins.facts()) if key in facts}
        known = method_of(AdapterSection.model_construct(method=method, **options))
        # a change that differs by token is no change of weights
        changes_weights, is_low_rank = known.change is not Change.PER_TOKEN, known.change is Change.LOW_RANK
        method = known.title or method
    has_answers, labels = not model_class.has_own_head, model_class.labels
    is_lora = facts.get("peft_type") == "LORA" or kind == "lora"
    own = try_read_json(subject.directory / ADAPTER_CONFIG) or {}
    has_experts = own.get("experts", "none") != "none" or own.get("target_parameters")
    exported_rank = subject.certificate.get("rank")  # of a LoRA, which a cut one has below the adapter's
    served = has_answers and is_low_rank and not any((facts.get("magnitude"), facts.get("added_tokens"), has_experts))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"repr": repr, "quote": shlex.quote}
    return environment.get_template("card.md").render(
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=place.rpartition("/")[2] if repo else f"{base_name}, {facts['method']}",
        method=method,
        rank=facts.get("rank"),
        trained=facts.get("trained_parameters"),
        version=(run.get("versions") or {}).get("qvera"),
        form=_KINDS[kind].form + (f" of rank {exported_rank}" if exported_rank else ""),
        rank_to_serve=exported_rank or facts.get("rank") or 0,
        quantized=(subject.certificate.get("quantized") or {}).get("quantization"),
        kind=kind,
        repo=place,
        base=base_name,
        auto=auto,
        # nothing is said of how an adapter of other tools wants its base
        base_quantization=base.quantization if "quantization" in base.model_fields_set else "none",
        double_quant=base.double_quant,
        compute_dtype="bfloat16" if compute_dtype == "auto" else compute_dtype,
        # a trained head, which transformers would quantize too where it is not the model's last parameter
        dense=own.get("modules_to_save"),
        dense_experts=get(run, "model", "expert_bytes"),
        gguf=next((file.name for file in sorted(subject.directory.glob("*.gguf"))), "model.gguf"),
        is_lora=is_lora,
        is_ours=kind == "adapter" and facts.get("peft_type") == PEFT_TYPE,
        base_options=(f", revision={base.revision!r}" if base.revision else "")
        # these make the base a classifier with the adapter's head
        + (f", num_labels={len(labels)}, ignore_mismatched_sizes=True" if labels else ""),
        has_answers=has_answers,
        chat_template_file="" if subject.chat_template is None else CHAT_TEMPLATE,
        rows="pictures/" if model_class.reads_images else "rows.csv",
        changes_weights=changes_weights,
        served=served,
        vllm_ranks=VLLM_RANKS,
        has_gguf=has_answers and architecture in ("", *FAMILIES),
        scores=list(_score_tables(subject, before, after)),
        training={} if recipe is None else _training(subject, recipe, sources),
        license=license_of_base.get("license_name") or license_of_base.get("license"),
    )


def _file_of_base(base: ModelSection, hub_id: str | None, name: str) -> Path:
    """A file of the base, in its directory or the hub's cache, whether it exists or not."""
    if hub_id is None:
        return Path(resolve_path(base.path)) / name
    found = try_to_load_from_cache(hub_id, name, revision=base.revision)
    return Path(found) if isinstance(found, str) else Path(hub_id, name)


def _license(base: ModelSection, hub_id: str | None) -> dict[str, str]:
    """Read the license from the base's own card; {} if there is none."""
    card = _file_of_base(base, hub_id, "README.md")
    if not card.is_file():
        return {}
    _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        tree = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    keys = ("license", "license_name", "license_link") if isinstance(tree, dict) else ()
    return {key: tree[key] for key in keys if isinstance(tree.get(key), str)}


def _training(subject: CardSubject, recipe: Recipe, sources: Sequence[str | None]) -> dict[str, object]:
    run, facts, training = subject.run, subject.adapter, recipe.training
    data, result, targets = run.get("data") or {}, run.get("result") or {}, facts.get("targets")
    rows = {
        "data": ", ".join(path if is_hub_id(path) else Path(path).name for path in sources if path),
        "rows": data.get("train_rows"),
        "template": None if subject.model_class.has_own_head else data.get("template"),
        "objective": None if training.objective == "sft" else training.objective,
        "method": facts["method"],
        "rank": facts.get("rank"),
        # a model that takes images has the whole name of each linear, for its tower has linears of the same names
        "adapted linears": ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
        if isinstance(targets, list)
        else targets,
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
    return {name: value for name, value in rows.items() if value not in (None, "")}


Scores = Mapping[str, Any]


def _score_tables(
    subject: CardSubject, before: Scores, after: Scores
) -> Iterator[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """Yield tables as (sentence, columns, rows of name and cells), from run.json, eval.json and the certificate."""
    of_run = " They are those of the adapter before it was exported." if subject.kind != "adapter" else ""
    sides: dict[str, Scores] = {"before training": before, "after": after}
    found = [(f"{_on(after, 'held-out rows')}.{of_run}", sides)]
    if evaluation := subject.evaluation:
        scores, of_base = evaluation["scores"], evaluation.get("base_scores")
        data = str(evaluation["subject"].get("data") or "")
        if data:  # without its directory
            data = f" of {data if is_hub_id(data.partition(',')[0]) else Path(data).name}"
        sides = {"base": of_base, "trained": scores} if isinstance(of_base, dict) else {"trained": scores}
        found.append((f"{_on(scores, 'rows')}{data}, by `qvera eval`.{of_run}", sides))
    difference = subject.certificate.get("difference") or {}
    trained, exported = difference.get("trained"), difference.get("exported")
    if "loss_trained" in difference:
        trained, exported = ({"loss": difference[f"loss_{side}"]} for side in ("trained", "exported"))
    if isinstance(trained, dict) and isinstance(exported, dict):
        on = _on(difference if "rows" in difference else exported, rows_name(difference))
        found.append((f"{on}, this export beside its run.", {"run": trained, "export": exported}))
    for sentence, sides in found:
        last = list(sides.values())[-1]
        if known := [name for name, value in last.items() if name not in _NO_SCORES and formatting.is_number(value)]:
            rows = []
            for name in known:
                values = [scores.get(name) for scores in sides.values()]
                cells = [formatting.significant(value, 4) if formatting.is_number(value) else "–" for value in values]
                # answers are slow to write: exact match may be over fewer rows than the loss
                counted = get_number(last, f"{name}_rows")
                rows.append((name.replace("_", " ") + (f", {counted:,.0f} rows" if counted else ""), cells))
            yield sentence, list(sides), rows


def _on(scores: Scores, what: str) -> str:
    rows = scores.get("rows", scores.get("scored_rows"))
    return f"On {rows:,} {what}" if formatting.is_number(rows) else f"On {what}"


def files_of(subject: CardSubject) -> list[Path]:
    """List the files to share: weights, settings, tokenizer. Others may hold rows or answers, so they stay here."""
    found = sorted(subject.directory.iterdir())
    return [file for file in found if file.is_file() and any(fnmatch(file.name, name) for name in _SHARED)]


def contents_of(subject: CardSubject, repo: str) -> dict[str, Path | bytes]:
    """Map each name to a file or bytes: `files_of`, the card, and the chat template that an adapter needs."""
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
