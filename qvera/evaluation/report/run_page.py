"""The page, section by section in the order that a reader wants. Every text from outside goes through `esc`."""

from __future__ import annotations

from typing import Any

import yaml

from qvera.evaluation.report import curves
from qvera.evaluation.report.changed_settings import changed_settings
from qvera.evaluation.report.charts import length_figure
from qvera.evaluation.report.headline import head, model_name, tiles
from qvera.evaluation.report.markup import document, esc, fact_list, section
from qvera.evaluation.report.memory_section import memory_section
from qvera.evaluation.report.read import Run, number, pick, words
from qvera.evaluation.report.samples import LEGEND, sample_article
from qvera.utils.formatting import count, moment, percent, size


def render(run: Run) -> str:
    """The whole page as HTML."""
    parts = (head, tiles, _curves, memory_section, _samples, _data, _recipe, _machine)
    footer = (
        f"Written by qvera {esc(words(run.info, 'versions', 'qvera'))} from recipe.yaml, metrics.jsonl and run.json. "
        "Sizes are decimal: 1 MB is 1,000,000 bytes."
    )
    return document(f"{model_name(run)} · {run.name} · qvera", "".join(part(run) for part in parts), footer)


def _curves(run: Run) -> str:
    loss, small = curves.loss_figure(run), curves.small_figures(run)
    grid = f'<div class="grid2">{"".join(small)}</div>' if small else ""
    return section("Training", loss, curves.eval_table(run), grid)


def _samples(run: Run) -> str:
    listed = pick(run.info, "samples")
    samples = [sample for sample in listed if isinstance(sample, dict)] if isinstance(listed, list) else []
    if not samples:
        return ""
    legend = f'<p class="caption">Answered before and after training. {LEGEND}</p>'
    return section("Held-out prompts", legend, *(_sample(sample) for sample in samples))


def _sample(sample: dict[str, Any]) -> str:
    reference = words(sample, "reference")
    answers = [("Before", words(sample, "before"), ""), ("After", words(sample, "after"), "")]
    return sample_article("Prompt", words(sample, "prompt"), answers, [reference] if reference else [])


def _count_of(run: Run, section: str, key: str, alarm: bool = False) -> str:
    value = number(run.info, section, key)
    if value is None:
        return ""
    return f"<b>{count(value)}</b>" if alarm and value > 0 else count(value)


def _rows_split(run: Run) -> str:
    if not number(run.info, "data", "split_rows"):
        return ""
    rows, parts = (_count_of(run, "data", key) for key in ("split_rows", "split_parts"))
    return f"{rows} into {parts}" if parts else rows


def _data(run: Run) -> str:
    tokens, trained = number(run.info, "data", "tokens"), number(run.info, "data", "trained_tokens")
    share = f" ({percent(trained / tokens)})" if trained is not None and tokens else ""
    facts = fact_list(
        [
            ("Source", esc(words(run.recipe, "data", "path"))),
            ("Rows to train on", _count_of(run, "data", "train_rows")),
            ("Rows held out", _count_of(run, "data", "eval_rows")),
            ("Of these also trained on", _count_of(run, "data", "repeated_rows", alarm=True)),
            ("Tokens", _count_of(run, "data", "tokens")),
            ("Tokens trained", _count_of(run, "data", "trained_tokens") + share),
            ("Rows cut to length", _count_of(run, "data", "truncated_rows", alarm=True)),
            ("Rows split", _rows_split(run)),
            ("Rows dropped", _count_of(run, "data", "dropped_rows", alarm=True)),
            ("Format", esc(words(run.info, "data", "format"))),
            ("Template", esc(words(run.info, "data", "template"))),
        ]
    )
    edges, counts = (_numbers(pick(run.info, "data", "length_histogram", key)) for key in ("edges", "counts"))
    figure = length_figure(edges, counts)
    return section("Data", f'<div class="columns"><div>{facts}</div>{figure}</div>' if facts or figure else "")


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list):
        return []
    found = [number({"value": value}, "value") for value in values]
    kept = [value for value in found if value is not None]
    return kept if len(kept) == len(values) else []


def _recipe(run: Run) -> str:
    if not run.recipe_text:
        return ""
    changed = changed_settings(run.recipe)
    facts = fact_list([(key, f"<code>{esc(_yaml_value(value))}</code>") for key, value in changed])
    intro = '<p class="caption intro">What it sets beyond the defaults:</p>' if facts else ""
    whole = (
        "<details><summary>The whole effective recipe, every default filled in</summary>"
        f"<pre>{esc(run.recipe_text)}</pre></details>"
    )
    return section("Recipe", intro, facts, whole)


def _yaml_value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _machine(run: Run) -> str:
    parameters = number(run.info, "model", "parameters")
    base = number(run.info, "model", "base_bytes")
    targets = pick(run.info, "adapter", "targets")
    model = [
        ("Model", esc(words(run.info, "model", "path"))),
        ("Architecture", esc(words(run.info, "model", "architecture"))),
        ("Parameters", count(parameters) if parameters is not None else ""),
        ("Quantization", esc(words(run.info, "model", "quantization"))),
        ("4-bit layers", _count_of(run, "model", "four_bit_modules")),
        ("Compute dtype", esc(words(run.info, "model", "compute_dtype"))),
        ("Storage dtype", esc(words(run.info, "model", "quant_storage"))),
        ("Base in memory", size(base) if base is not None else ""),
        ("Adapted", esc(", ".join(map(str, targets)) if isinstance(targets, list) else targets or "")),
        ("Projection seed", _count_of(run, "adapter", "seed")),
    ]
    versions = pick(run.info, "versions")
    versions = versions if isinstance(versions, dict) else {}
    machine = [("Device", esc(words(run.info, "device")))]
    machine += [
        ("Started", esc(moment(words(run.info, "started")))),
        ("Finished", esc(moment(words(run.info, "finished")))),
    ]
    machine += [(str(name), esc(version)) for name, version in versions.items()]
    left, right = fact_list(model), fact_list(machine)
    return section(
        "Model and machine", f'<div class="columns"><div>{left}</div><div>{right}</div></div>' if left or right else ""
    )
