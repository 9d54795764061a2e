"""`qvera generate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qvera.cli.chat import prompt_ids, template_and_encoder
from qvera.cli.common import EvalPath, Seed, Temperature, TopP, progress, quiet_libraries, require_new_file
from qvera.utils.atomic import replace_text


def generate(
    run: EvalPath,
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="A file of rows, or .txt: one prompt a line.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSONL file to write; must not exist.")],
    base: Annotated[bool, typer.Option("--base", help="Answer with the base model, without the adapter.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    static_cache: Annotated[
        bool,
        typer.Option("--static-cache", help="Compile a step and record it as a CUDA graph: for many long answers."),
    ] = False,
) -> None:
    """Answer the prompts of a file in batches.

    PROMPTS: .jsonl, .json, .csv or .parquet rows as for training (a last assistant turn is ignored), or .txt. Each
    output line has source, prompt, answer.

    Example:
        qvera generate runs/quickstart prompts.txt --out answers.jsonl
    """
    quiet_libraries()
    require_new_file(out)

    from qvera.config.schema import DataSection
    from qvera.data import read_prompts
    from qvera.evaluation.generate import generate as generate_texts
    from qvera.evaluation.load import find_target, open_target

    target = find_target(run)
    rows = read_prompts(prompts, target.recipe.data if target.recipe is not None else DataSection(path=str(prompts)))
    with progress(f"Loading {run}"):
        opened = open_target(target, adapter=not base)
    template, encoder = template_and_encoder(opened)
    encoded = [prompt_ids(template, encoder, row.turns, row.tools) for row in rows]
    with progress("Answering") as show:
        answers = generate_texts(
            opened.model,
            opened.base.tokenizer,
            encoded,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            static_cache=static_cache,
            progress=lambda done: show(f"Answering: {done} of {len(encoded)}"),
        )
    answered = [
        {"source": row.source, "prompt": row.turns[-1].content, "answer": answer}
        for row, answer in zip(rows, answers, strict=True)
    ]
    replace_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answered))
    print(f"{len(answers)} answers in {out}")
