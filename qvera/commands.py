"""What each command of the CLI does, in terms of the Python API. One function a command; `cli` parses and dispatches."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from . import cache as cache_of_bases
from . import evaluate
from . import launch as launcher
from .adapters import stacked_factors, union, weighted_sum, write_vectors
from .data import (
    NAMED_TEMPLATES,
    ChatTemplate,
    Encoder,
    Example,
    Turn,
    build_datasets,
    data_warnings,
    decode,
    print_preflight,
    read_prompts,
    resolve_template,
)
from .errors import InputError, Interrupted, RunFailed
from .export import export_merged
from .export.compare import measure_difference, too_little_memory
from .export.deltas import AdapterDeltas, read_deltas, skeleton
from .export.factors import Truncation, export_lora, export_stock_vera, lora_bytes, lora_factors, truncate_all
from .export.merged import CERTIFICATE
from .generate import generate as generate_texts
from .generate import generating
from .locations import resolve_path
from .metrics import memory_text
from .model import (
    ADAPTER_WEIGHTS,
    fingerprint_of,
    load_tokenizer,
    pick_device,
    read_config,
    require_base,
)
from .plan import Sharing, gpu_machine, make_plan, parse_size, time_step
from .plan import table as plan_table
from .plan.say import print_plan
from .prequantize import problem_of, read_record
from .recipe import DataSection, ExportSection, ModelSection, Recipe, load_recipe
from .report.preview import write_preview
from .run import OpenRun, describe, locate, open_run
from .rundir import run_directory
from .stop import StopRequests
from .stored import file_sha256, same_base
from .trainer import train as train_run
from .unfinished import replace_text
from .zero import read_config as read_deepspeed

_console = Console(stderr=True)


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries below would drown our own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _require_new_file(path: Path) -> None:
    """Raises InputError where an output file can't be made, before any work goes into it."""
    if path.exists():
        raise InputError(f"{path}: exists; nothing is overwritten, name another file.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: its directory does not exist.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path}: no permission to write into its directory.")


def train(args: argparse.Namespace) -> None:
    """qvera train"""
    recipe = load_recipe(args.recipe, args.overrides)
    _quiet_libraries()
    run_dir = run_directory(recipe, args.recipe)
    result = train_run(recipe, run_dir, resume=args.resume, dry_run=args.dry_run, console=_console)
    if result is not None:
        _say_result(result.run_dir, result.run)


def preview(args: argparse.Namespace) -> None:
    """qvera preview"""
    recipe = load_recipe(args.recipe, args.overrides)
    if args.html is not None:
        _require_new_file(args.html)
    _quiet_libraries()
    tokenizer = load_tokenizer(recipe.model)
    datasets = build_datasets(recipe.data, tokenizer, _console)
    shown = datasets.train[: args.rows]
    print_preflight(datasets, tokenizer, Console(), args.rows)
    if args.html is not None:
        warnings = data_warnings(datasets.stats)
        write_preview(
            args.html, args.recipe.stem, recipe.data.path, datasets.stats, warnings, shown, partial(decode, tokenizer)
        )
        print(f"{args.html}: the same as a page, all tokens of {len(shown)} rows")


def launch(args: argparse.Namespace) -> int:
    """qvera launch"""
    load_recipe(args.recipe, args.overrides)  # what is wrong with it is said once, before anything starts
    more = [part for override in args.overrides for part in ("--set", override)] + ["--resume"] * args.resume
    command = launcher.launch_command(
        args.recipe,
        gpus=args.gpus,
        hostfile=args.hostfile,
        node_rank=args.node_rank,
        nnodes=args.nnodes,
        rdzv=args.rdzv,
        max_restarts=args.max_restarts,
        train_arguments=more,
    )
    print(launcher.say(command), file=sys.stderr)
    return launcher.run(command)


def _say_result(run_dir: Path, run: dict[str, Any]) -> None:
    """The end of a run in a few lines: scores, sizes, speed, where things are."""
    result, adapter = run["result"], run["adapter"]
    before, after = result.get("eval_before"), result.get("eval_after")
    lines = []
    if before and after:
        lines.append(f"held-out loss     {before['loss']:.4f} → {after['loss']:.4f}")
        if "exact_match" in after:
            share = f"{before['exact_match']:.1%} → {after['exact_match']:.1%}"
            lines.append(f"exact match       {share} of {after['exact_match_rows']} held-out rows")
    lines += [
        f"trained numbers   {adapter['trainable_parameters']:,} (LoRA r=64: {adapter['lora_r64_parameters']:,})",
        f"adapter           {memory_text(adapter['file_bytes'])} in {run_dir / 'adapter'}",
        f"peak memory       {memory_text(result['peak_bytes'])}"
        + (f", and {memory_text(result['mapped_bytes'])} of mapped weights" if result["mapped_bytes"] else ""),
    ]
    if result["tokens_per_second"]:
        lines.append(
            f"speed             {result['tokens_per_second']:,.0f} tokens/s, {result['seconds']:.0f} s of training"
        )
    lines.append(f"report            {run_dir / 'report.html'}")
    print("\n".join(lines))


def plan(args: argparse.Namespace) -> None:
    """qvera plan"""
    _quiet_libraries()
    if args.table:
        print(plan_table.markdown(), end="")
        if args.svg is not None:
            args.svg.write_text(plan_table.picture(), encoding="utf-8")
        return
    if args.recipe is None:
        raise InputError("takes a RECIPE (such as recipes/quickstart.yaml), or --table.")
    if args.svg is not None:
        raise InputError("--svg: goes with --table only.")
    recipe = load_recipe(args.recipe, args.overrides)
    device = pick_device()
    machine = None if args.gpu is None else gpu_machine(recipe.model, parse_size(args.gpu))
    several = args.nodes is not None or args.gpus is not None
    for name, value in (("--nodes", args.nodes), ("--gpus", args.gpus)):
        if value is not None and value < 1:
            raise InputError(f"{name}: takes a whole number >= 1, got {value}.")
    sharing = Sharing.of(read_deepspeed(recipe.deepspeed), args.nodes or 1, args.gpus or 1)
    made = make_plan(recipe, machine or device, _rows_at_hand(recipe), sharing, every_way=several)
    if machine is None and not args.no_timing:
        with _console.status("Timing this machine"):
            made = dataclasses.replace(made, seconds=time_step(made, recipe, device))
    if args.json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        print_plan(made, Console())


def _rows_at_hand(recipe: Recipe) -> list[Example] | None:
    """The training rows where they and the tokenizer are local, else None; a plan must not wait for a download."""
    if not Path(resolve_path(recipe.data.path)).exists() or not Path(resolve_path(recipe.model.path)).is_dir():
        return None
    try:
        tokenizer = load_tokenizer(recipe.model)
    except InputError:
        return None
    return build_datasets(recipe.data, tokenizer, _console).train


def quickstart(args: argparse.Namespace) -> None:
    """qvera quickstart"""
    from .quickstart import prepare

    _quiet_libraries()
    parts = prepare(say=_console.print)
    where = f"training.output_dir={json.dumps(args.output_dir)}"
    recipe = load_recipe(parts.recipe, [*parts.overrides(), where, *args.overrides])
    if args.fetch_only:
        print(
            f"base model   {parts.base}\ntraining     {parts.train}\nheld out     {parts.heldout}\nrecipe       {parts.recipe}"
        )
        return
    result = train_run(recipe, run_directory(recipe, parts.recipe), resume=args.resume, console=_console)
    if result is None:
        return  # one of several processes that is not the first
    for number, sample in enumerate(result.run["samples"], start=1):
        print(f"\n── held-out prompt {number} " + "─" * 60)
        print(sample["prompt"].strip())
        for label in ("before", "after", "reference"):
            print(f"{label + ':':<11}{sample[label]}")
    print("\n" + "─" * 80)
    _say_result(result.run_dir, result.run)
    print(f"talk to it        qvera chat {result.run_dir}")
    print(f"export it         qvera export {result.run_dir} OUT --to merged")


def chat(args: argparse.Namespace) -> None:
    """qvera chat"""
    _quiet_libraries()
    with _console.status(f"Loading {args.run}"):
        opened = open_run(args.run, adapter=not args.base)
    template, encoder = _template(opened)
    system = args.system if args.system is not None else (opened.recipe.data.system if opened.recipe else None)
    _console.print("Type a message; /reset forgets the conversation, /quit ends it.")
    with generating(opened.model):  # once for all messages
        _converse(args, opened, template, encoder, system)


def _converse(
    args: argparse.Namespace, opened: OpenRun, template: ChatTemplate, encoder: Encoder, system: str | None
) -> None:
    turns: list[Turn] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.strip() in ("/quit", "/exit"):
            return
        if text.strip() == "/reset":
            turns.clear()
            continue
        if not text.strip():
            continue
        turns.append(Turn("user", text))
        ids = _prompt_ids(template, encoder, _with_system(turns, system))
        streamer = transformers.TextStreamer(opened.base.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (answer,) = generate_texts(
            opened.model,
            opened.base.tokenizer,
            [ids],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed + len(turns),
            streamer=streamer,
        )
        turns.append(Turn("assistant", answer))


def _with_system(turns: list[Turn], system: str | None) -> list[Turn]:
    return [Turn("system", system), *turns] if system else turns


def _template(opened: OpenRun) -> tuple[ChatTemplate, Encoder]:
    """The template that the run was trained with (run.json says which one ``auto`` was), and the tokenizer's encoder."""
    name = opened.recipe.data.template if opened.recipe is not None else "auto"
    summary = opened.path / "run.json"
    if name == "auto" and summary.is_file():
        used = json.loads(summary.read_text(encoding="utf-8")).get("data", {}).get("template")
        name = used if used in NAMED_TEMPLATES else name
    return resolve_template(name, opened.base.tokenizer), Encoder(opened.base.tokenizer)


def _prompt_ids(template: ChatTemplate, encoder: Encoder, turns: list[Turn], tools: Any = None) -> list[int]:
    text, starts = template.prompt(turns, tools)
    return encoder.encode_prompt(text, starts)


def generate(args: argparse.Namespace) -> None:
    """qvera generate"""
    _quiet_libraries()
    _require_new_file(args.out)
    recipe, _, _ = locate(args.run)
    data = recipe.data if recipe is not None else DataSection(path=str(args.prompts))
    rows = read_prompts(args.prompts, data)
    with _console.status(f"Loading {args.run}"):
        opened = open_run(args.run, adapter=not args.base)
    template, encoder = _template(opened)
    prompts = [_prompt_ids(template, encoder, row.turns, row.tools) for row in rows]
    with _console.status("Answering") as status:
        answers = generate_texts(
            opened.model,
            opened.base.tokenizer,
            prompts,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            progress=lambda done: status.update(f"Answering: {done} of {len(prompts)}"),
        )
    unfinished = args.out.with_name(f".{args.out.name}.partial")
    with open(unfinished, "w", encoding="utf-8") as handle:
        for row, answer in zip(rows, answers, strict=True):
            line = {"source": row.source, "prompt": row.turns[-1].content, "answer": answer}
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished.replace(args.out)
    print(f"{len(answers)} answers in {args.out}")


def eval(args: argparse.Namespace) -> None:  # noqa: A001  # the command's name
    """qvera eval"""
    _quiet_libraries()
    recipe, _, _ = locate(args.run)
    if recipe is None:
        raise InputError(f"{args.run}: is an adapter directory; `qvera eval` needs a run, whose recipe names the data.")
    if args.json is not None:
        _require_new_file(args.json)
    section = recipe.data
    if args.data is not None:
        section = dataclasses.replace(section, path=args.data, eval_path=None, eval_fraction=0.0, limit=args.rows)
    elif not (section.eval_path or section.eval_fraction):
        raise InputError(f"{args.run}: its recipe holds out no rows; name a file with --data.")
    with _console.status(f"Loading {args.run}"):
        opened = open_run(args.run, adapter=not args.base)
    datasets = build_datasets(section, opened.base.tokenizer, _console)
    rows = (datasets.train if args.data is not None else datasets.eval)[: args.rows]
    with _console.status("Held-out loss") as status:
        scores = evaluate.held_out_loss(
            opened.model,
            rows,
            pad_id=datasets.pad_id,
            batch_size=recipe.training.per_device_eval_batch_size,
            chunk_tokens=recipe.training.loss_chunk_tokens,
            progress=lambda done: status.update(f"Held-out loss: {done} of {len(rows)} rows"),
        )
    answers: list[dict[str, Any]] = []
    if not args.no_generation:
        with _console.status("Answering") as status:
            answers = evaluate.answer_rows(
                opened.model,
                opened.base.tokenizer,
                rows,
                max_new_tokens=args.max_new_tokens or recipe.training.sample_max_new_tokens,
                progress=lambda done: status.update(f"Answering: {done} of {len(rows)} rows"),
            )
        judged = [a for a in answers if a["exact"] is not None]
        if judged:
            scores["exact_match"] = sum(a["exact"] for a in judged) / len(judged)
            scores["exact_match_rows"] = len(judged)
    if args.json is not None:
        args.json.write_text(
            json.dumps({"scores": scores, "answers": answers}, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    for name, value in scores.items():
        print(f"{name:<17}{value:.4f}" if isinstance(value, float) else f"{name:<17}{value:,}")


def export(args: argparse.Namespace) -> None:
    """qvera export"""
    _quiet_libraries()
    recipe, section, adapter_dir = locate(args.run)
    options = recipe.export if recipe is not None else ExportSection()
    changes = {"dtype": args.dtype, "base": args.weights}
    options = dataclasses.replace(options, **{k: v for k, v in changes.items() if v is not None})
    if args.rank is not None and args.to != "lora":
        raise InputError("--rank: goes with --to lora only.")
    if args.to != "merged":
        if args.compare_only:
            raise InputError("--compare-only: goes with --to merged only.")
        require_base(read_config(adapter_dir), adapter_dir, section.path, fingerprint_of(section))
        _export_adapter(args, section, adapter_dir, getattr(torch, options.dtype))
        return
    if args.compare_only:
        _compare_only(args, recipe, section, adapter_dir, options)
        return
    template = None
    if recipe is not None:
        template = resolve_template(recipe.data.template, load_tokenizer(section)).jinja
    with _console.status("Merging") as status:
        certificate = export_merged(
            adapter_dir,
            section,
            args.out,
            options,
            chat_template=template,
            progress=lambda done, total, name: status.update(f"Merging: {done} of {total} tensors ({name})"),
        )
    size = sum((args.out / name).stat().st_size for name in certificate["files"])
    print(
        f"{memory_text(size)} in {len(certificate['files'])} file(s) in {args.out}, {len(certificate['delta'])} weights changed"
    )
    if recipe is None or args.no_compare or not options.certificate_rows:
        certificate["difference"] = None
    else:
        certificate["difference"] = _difference(recipe, args.run, args.out, options)
    replace_text(args.out / CERTIFICATE, json.dumps(certificate, indent=1))
    _say_difference(certificate["difference"])


def _say_difference(difference: dict[str, Any] | None) -> None:
    if difference and "kl_mean" in difference:
        print(
            f"trained vs exported on {difference['rows']} rows: loss {difference['loss_trained']:.4f} vs "
            f"{difference['loss_exported']:.4f}, KL {difference['kl_mean']:.2e} a token, same first choice "
            f"{difference['top1_agreement']:.1%}"
        )
    elif difference:
        print(f"not measured: {difference['not_measured']}")


def _compare_only(
    args: argparse.Namespace, recipe: Recipe | None, section: ModelSection, adapter_dir: Path, options: ExportSection
) -> None:
    """--compare-only: measure the difference of an export that is there, and put it into its certificate."""
    try:
        certificate = json.loads((args.out / CERTIFICATE).read_text(encoding="utf-8"))
        merged = certificate["adapter"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{args.out}: --compare-only takes a finished merged export, with its {CERTIFICATE} ({type(error).__name__}: {error})."
        ) from None
    if recipe is None:
        raise InputError(f"{args.run}: --compare-only takes a run; an adapter alone has no rows to compare on.")
    if merged != file_sha256(adapter_dir / ADAPTER_WEIGHTS):
        raise InputError(
            f"{args.out}: is the export of another adapter than that of {args.run} ({CERTIFICATE}, adapter.sha256)."
        )
    certificate["difference"] = _difference(recipe, args.run, args.out, options)
    replace_text(args.out / CERTIFICATE, json.dumps(certificate, indent=1))
    _say_difference(certificate["difference"])


def _export_adapter(args: argparse.Namespace, section: ModelSection, adapter_dir: Path, dtype: torch.dtype) -> None:
    """--to lora and --to peft"""
    adapter = read_deltas(adapter_dir, skeleton(section))
    if args.to == "peft":
        size = export_stock_vera(adapter, args.out)
        print(f"{memory_text(size)} in {args.out}: PEFT's VeRA of rank {adapter.A.shape[0]}, projections included")
        return
    _write_lora(adapter, args.out, dtype, adapter.A.shape[0], args.rank, None)


def _write_lora(
    adapter: AdapterDeltas,
    out: Path,
    dtype: torch.dtype,
    own: int,
    cut: int | None,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] | None,
) -> None:
    """Say errors, rank and size, then write."""
    if cut is not None:
        print(f"{'layer':<44}{'Frobenius':>11}{'spectral':>11}   relative error of rank {cut}")

        def say(_: int, name: str, error: Truncation) -> None:
            print(f"{name:<44}{error.frobenius:11.2e}{error.spectral:11.2e}")

        factors = truncate_all(factors.items() if factors else lora_factors(adapter), own, cut, dtype, say)
    rank = cut or own
    expected = lora_bytes(adapter, rank, dtype)
    print(f"LoRA of rank {rank} on {len(adapter.layers)} linears: {memory_text(expected)} in {out}")
    size = export_lora(adapter, out, dtype, factors)
    print(f"written: {size:,} bytes; stock PEFT loads it")


def merge_adapters(args: argparse.Namespace) -> None:
    """qvera merge-adapters"""
    _quiet_libraries()
    found = [locate(path) for path in args.adapters]
    _require_one_base(found)
    model = skeleton(found[0][1])
    adapters = [read_deltas(directory, model) for _, _, directory in found]
    weights = args.weights or [1.0 / len(adapters)] * len(adapters)
    if args.to == "qvera":
        write_vectors(found[0][2], weighted_sum(adapters, weights), args.out)
        print(f"{len(adapters)} adapters, weights {', '.join(f'{w:g}' for w in weights)}: exact, in {args.out}")
        return
    factors = stacked_factors(adapters, weights)
    own = sum(adapter.A.shape[0] for adapter in adapters)
    _write_lora(union(adapters), args.out, getattr(torch, args.dtype), own, args.rank, factors)


def _require_one_base(found: list[tuple[Recipe | None, ModelSection, Path]]) -> None:
    """All adapters of one base: by content where they all say it, else by name."""
    prints = {path: getattr(read_config(path), "base_fingerprint", None) for _, _, path in found}
    names = {path: section.path for _, section, path in found}
    known = [p for p in prints.values() if p is not None]
    if len(known) == len(prints):
        different = any(not same_base(known[0], other) for other in known)
    else:
        different = len(set(names.values())) > 1
    if different:
        bases = ", ".join(f"{names[p]} (fingerprint {(prints[p] or 'unknown')[:16]})" for p in names)
        raise InputError(f"these adapters were trained on different base models: {bases}.")


def _difference(recipe: Recipe, run: Path, out: Path, options: ExportSection) -> dict[str, Any]:
    """The certificate's measured part; data that has gone since, or too little memory, is said and costs the export nothing."""
    again = f"`qvera export {run} {out} --compare-only` measures it later, or on a larger machine."
    try:
        reason = too_little_memory(out, _trained_bytes(run))
        if reason is not None:
            return {"not_measured": f"{reason}. {again}"}
        with _console.status("Comparing the trained with the exported model"):
            opened = open_run(run)
            datasets = build_datasets(recipe.data, opened.base.tokenizer, _console)
            rows = (datasets.eval or datasets.train)[: options.certificate_rows]
            return measure_difference(opened.model, out, rows, datasets.pad_id)
    except (InputError, OSError, ValueError) as error:
        return {"not_measured": f"{error} {again}"}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        return {"not_measured": f"the memory gave out. {again}"}


def _trained_bytes(run: Path) -> int:
    """What the base took when it was trained on, as the run measured it; 0 where it does not say."""
    try:
        return int(json.loads((run / "run.json").read_text(encoding="utf-8"))["model"]["base_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def quantize(args: argparse.Namespace) -> None:
    """qvera quantize"""
    _quiet_libraries()
    given = {
        key: getattr(args, key)
        for key in ("quantization", "double_quant", "quant_storage", "revision", "trust_remote_code")
    }
    section = ModelSection(path=args.model, **{key: value for key, value in given.items() if value is not None})
    began = time.perf_counter()
    with StopRequests() as stop, _byte_progress() as show:

        def progress(stage: str, done: int, total: int, what: str) -> None:
            show(stage, done, total, what)
            if stop.asked:
                raise Interrupted(
                    f"{stop.asked}: stopped; finished shards are kept, the same command goes on from them."
                )

        options: dict[str, Any] = {"device": pick_device(), "verify": args.verify, "progress": progress}
        if args.out is None:
            out = cache_of_bases.cached_base(section, **options)
            record = read_record(out)
            assert record is not None  # cached_base has looked at it
        else:
            out, record = args.out, cache_of_bases.quantized_copy(section, args.out, **options)
    size = sum(file["bytes"] for file in record["files"].values())
    source = sum(file["bytes"] for file in record["source"]["files"].values())
    print(f"{memory_text(source)} → {memory_text(size)} in {out}, {time.perf_counter() - began:.0f} s")


@contextlib.contextmanager
def _byte_progress() -> Iterator[cache_of_bases.Progress]:
    """A bar in bytes for each stage, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=_console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, what: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(
                    stage.capitalize() if stage != "waiting" else f"Waiting: {what}", total=total
                )
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def cache(args: argparse.Namespace) -> None:
    """qvera cache"""
    if args.action == "ls":
        _cache_ls(args)
        return
    entries = cache_of_bases.listed()
    names = list(args.names)
    if args.action == "verify":
        chosen = [e for e in entries if e.finished and (not names or any(e.name.startswith(n) for n in names))]
        if names and not chosen:
            raise InputError(f"{', '.join(names)}: no such quantized base; `qvera cache ls` shows them.")
        for entry in chosen:
            problem = problem_of(entry.directory, verify=True)
            if problem is not None:
                raise RunFailed(f"{problem}. `qvera cache rm {entry.name}` removes it; the next use makes it again.")
            print(f"{entry.name}  as written")
        return
    names += [e.name for e in entries if args.all or (args.unfinished and not e.finished)]
    if not (names or args.all or args.unfinished):
        raise InputError(
            "qvera cache rm: name a quantized base, or say --unfinished or --all; `qvera cache ls` shows them."
        )
    for name in dict.fromkeys(names):
        try:
            print(f"{name}  removed, {memory_text(cache_of_bases.remove(name))}")
        except InputError as error:
            if name in args.names:
                raise
            print(f"{name}  kept: {error}")  # being made right now


def _cache_ls(args: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for entry in cache_of_bases.listed():
        source = entry.record["source"] if entry.record else {}
        settings = entry.record["settings"] if entry.record else {}
        rows.append(
            {
                "name": entry.name, "finished": entry.finished, "size_bytes": entry.size_bytes, "source": source.get("path"),
                "revision": source.get("revision"), "settings": settings, "directory": str(entry.directory),
            }
        )  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']:<32}{memory_text(row['size_bytes']):>10}  {row['source'] or 'unfinished'}")
    total = sum(row["size_bytes"] for row in rows)
    print(f"{len(rows)} in {cache_of_bases.bases_root()}, {memory_text(total)}")


def info(args: argparse.Namespace) -> None:
    """qvera info"""
    facts = describe(args.path)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif name.endswith("_bytes"):
            value = f"{value:,} ({memory_text(value)})"
        elif isinstance(value, int):
            value = f"{value:,}"
        print(f"{name:<22}{value}")
