"""The top of the page: what was trained, how well it went, and what it cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath

from qvera.evaluation.report import curves
from qvera.evaluation.report.markup import esc
from qvera.evaluation.report.read import Run, number, pick, words
from qvera.utils.formatting import count, duration, moment, percent, significant, size


def model_name(run: Run) -> str:
    path = words(run.info, "model", "path") or words(run.recipe, "model", "path")
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return name or words(run.info, "model", "architecture") or "A run"


def head(run: Run) -> str:
    status = words(run.info, "status")
    when = words(run.info, "finished") or words(run.info, "started")
    state = {"done": "finished", "interrupted": "interrupted", "failed": "failed"}.get(status, "unfinished")
    stamp = f" · {state}{' ' + esc(moment(when)) if when else ''}"
    return (
        f'<header>\n<p class="eyebrow">qvera run <b>{esc(run.name)}</b>{stamp}</p>\n<h1>{esc(model_name(run))}</h1>\n'
        f'<p class="soft">{_adapter_sentence(run)}</p>\n{_notices(run, status)}{_outcome(run)}</header>\n'
    )


def _adapter_sentence(run: Run) -> str:
    rank = number(run.info, "adapter", "rank") or number(run.recipe, "adapter", "rank")
    parts = [f"VeRA of rank {count(rank)}" if rank else "A VeRA adapter"]
    groups = number(run.info, "adapter", "b_groups") or number(run.recipe, "adapter", "b_groups") or 1
    more = [f"{count(groups)} b"] if groups > 1 else []
    sections = [tree.get("adapter") for tree in (run.info, run.recipe)]
    scaled = any(isinstance(section, dict) and section.get("input_scale") is True for section in sections)
    more += ["an a"] if scaled else []
    if more:
        parts.append(f"with {' and '.join(more)} per layer")
    modules = number(run.info, "adapter", "adapted_modules")
    if modules:
        parts.append(f"on {count(modules)} linear layers")
    quantization = words(run.info, "model", "quantization") or words(run.recipe, "model", "quantization")
    if quantization == "none":
        parts.append("over an unquantized base")
    elif quantization:
        parts.append(f"over {'an' if quantization[0] in 'aefin' else 'a'} {esc(quantization.upper())} base")
    data = words(run.recipe, "data", "path")
    trained_on = f", trained on {esc(PurePosixPath(data).name or data)}" if data else ""
    return " ".join(parts) + trained_on + "."


def _notices(run: Run, status: str) -> str:
    steps = _result(run, "steps", _last_step(run))
    after = f" after step {count(steps)}" if steps else ""
    sentences = {
        "done": [],
        "interrupted": [f"Interrupted{after}, and saved. <code>qvera train RECIPE --resume</code> goes on from there."],
        "failed": [f"This run failed{after}. Its last good checkpoint is kept in checkpoints/."],
    }.get(status, [f"This run has not finished: it was killed or is still going{after}."])
    sentences += [esc(note) for note in run.notes]
    return f'<div class="notice">{"".join(f"<p>{s}</p>" for s in sentences)}</div>\n' if sentences else ""


def _score(run: Run) -> tuple[str, str, str] | None:
    """What the headline compares: (what, before, after); "" for a side that is not known."""
    before, after = pick(run.info, "result", "eval_before"), pick(run.info, "result", "eval_after")
    measures: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("exact_match", "Exact match", percent),
        ("loss", "Loss", significant),
    )
    for key, name, say in measures:
        first, last = number(before, key), number(after, key)
        if last is not None:
            # answers are slow to write: exact match may be over fewer rows than the loss
            rows = number(after, f"{key}_rows") or number(after, "rows") or number(before, "rows")
            on = f" on {count(rows)} held-out rows" if rows else " on held-out rows"
            return name + on, say(first) if first is not None else "", say(last)
    points = [(step, loss) for step, loss in curves.held_out_curve(run) if loss is not None]
    if points and points[-1][0] > 0:
        (start, first_loss), (end, last_loss) = points[0], points[-1]
        if len(points) == 1:
            return f"Held-out loss at step {end:,.0f}", "", significant(last_loss)
        return f"Held-out loss, step {start:,.0f} to step {end:,.0f}", significant(first_loss), significant(last_loss)
    first = _result(run, "train_loss_first", _loss(run, 0))
    last = _result(run, "train_loss_last", _loss(run, -1))
    if last is not None:
        one_step = _result(run, "steps", _last_step(run)) == 1
        what = f"Training loss, {'one step' if one_step else 'first and last step'} (no held-out score)"
        return what, significant(first) if first is not None and not one_step else "", significant(last)
    if points:
        return "Held-out loss before training", "", significant(points[0][1])
    return None


def _outcome(run: Run) -> str:
    score = _score(run)
    if score is None:
        return '<p class="outcome soft">No step has been recorded.</p>\n'
    what, before, after = score
    old = (
        f'<span class="from"><span class="aloud">before </span>{esc(before)}</span>'
        '<span class="arrow" aria-hidden="true">→</span><span class="aloud">, after </span>'
        if before
        else ""
    )
    return (
        f'<div class="outcome"><div><p class="caption">{esc(what)}</p>'
        f'<p class="score">{old}<span class="to">{esc(after)}</span></p></div>{_before_after(run)}</div>\n'
    )


def _before_after(run: Run) -> str:
    before, after = pick(run.info, "result", "eval_before"), pick(run.info, "result", "eval_after")
    body = ""
    measures: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("exact_match", "Exact match", percent),
        ("loss", "Loss", significant),
        ("perplexity", "Perplexity", significant),
    )
    for key, name, say in measures:
        values = number(before, key), number(after, key)
        if any(value is not None for value in values):
            cells = "".join(f"<td>{say(value) if value is not None else '–'}</td>" for value in values)
            body += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    if not body:
        return ""
    best = number(run.info, "result", "best_step")
    caption = f'<p class="caption">Lowest held-out loss at step {count(best)}.</p>' if best else ""
    return (
        '<div><table><thead><tr><th scope="col">Held-out rows</th><th scope="col">Before</th><th scope="col">After</th>'
        f"</tr></thead><tbody>{body}</tbody></table>{caption}</div>"
    )


def _last_step(run: Run) -> float | None:
    return float(run.train[-1]["step"]) if run.train else None


def _loss(run: Run, index: int) -> float | None:
    losses = [loss for _, loss in curves.series(run.train, "loss") if loss is not None]
    return losses[index] if losses else None


def _result(run: Run, key: str, otherwise: float | None) -> float | None:
    """A figure of run.json's result; where that has none (a killed run), what metrics.jsonl adds up to."""
    value = number(run.info, "result", key)
    return value if value is not None else otherwise


def _total(run: Run, key: str) -> float | None:
    values = [value for _, value in curves.series(run.train, key) if value is not None]
    return sum(values) if values else None


def tiles(run: Run) -> str:
    tiles: list[tuple[str, str, str]] = []
    trainable, lora = (
        number(run.info, "adapter", "trainable_parameters"),
        number(run.info, "adapter", "lora_r64_parameters"),
    )
    if trainable is not None:
        beside = f"exactly {trainable:,.0f}" if trainable >= 10_000 else ""
        if lora and trainable:
            times = count(lora / trainable)
            beside = f"{trainable:,.0f}. LoRA r=64 on the same layers: {count(lora)}, {times} times as many"
        tiles.append(("Trainable parameters", count(trainable), beside))
    weights = number(run.info, "adapter", "file_bytes") or run.adapter_bytes
    if weights is not None:
        base = number(run.info, "model", "base_bytes")
        tiles.append(("Adapter file", size(weights), f"beside a base of {size(base)}" if base else ""))
    peaks = [value for _, value in curves.series(run.train, "peak_bytes") if value is not None]
    peak = _result(run, "peak_bytes", max(peaks, default=None))
    if peak is not None:
        tiles.append(("Peak memory", size(peak), words(run.info, "device").partition(":")[0].upper()))
    seconds, tokens = _total(run, "step_seconds"), _total(run, "input_tokens")
    speed = _result(run, "tokens_per_second", tokens / seconds if tokens and seconds else None)
    if speed is not None:
        tiles.append(("Tokens per second", count(speed), "in training: forward, backward, update"))
    spent = _result(run, "seconds", seconds)
    if spent is not None:
        steps, epochs = _result(run, "steps", _last_step(run)), number(run.info, "result", "epochs")
        epoch_text = f", {epochs:.3g} epoch{'' if epochs == 1 else 's'}" if epochs is not None else ""
        tiles.append(
            ("Time", duration(spent), f"{count(steps)} step{'' if steps == 1 else 's'}{epoch_text}" if steps else "")
        )
    cells = "".join(
        f'<div><dt>{esc(name)}</dt><dd><span class="num">{esc(value)}</span><small>{esc(note)}</small></dd></div>'
        for name, value, note in tiles
    )
    return f'<section aria-label="Cost"><dl class="tiles">{cells}</dl></section>\n' if cells else ""
