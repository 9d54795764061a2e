"""The command line: parse, dispatch, and turn errors into messages and exit codes. Nothing else lives here."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

from qvera.config.schema import RangeTest
from qvera.utils.errors import EXIT_DONE, EXIT_FAILED, QveraError

_EPILOG = """\
A run, from recipe to a checkpoint that any tool loads:
  qvera plan recipes/quickstart.yaml                what it will take: memory, seconds, files
  qvera train recipes/quickstart.yaml --dry-run     what would be trained: rows, tokens, marked
  qvera train recipes/quickstart.yaml               writes runs/quickstart/
  qvera train recipes/quickstart.yaml --find-lr     no run: which learning rate to set
  qvera eval runs/quickstart --html page.html       held-out loss, metrics, answers beside the base's
  qvera compare runs/quickstart runs/other          two runs side by side
  qvera chat runs/quickstart                        talk to it
  qvera export runs/quickstart --to merged out/     a fp16 checkpoint for plain transformers

Exit codes: 0 done; 2 the input was wrong (nothing written); 75 interrupted, saved, go on with --resume; 1 it failed.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qvera",
        description="Fine-tune a Llama in 4-bit with VeRA on the machine you have; keep the result in a file small enough to mail.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    parser.add_argument(
        "--traceback", action="store_true", help="show the Python traceback of an error (for bug reports)"
    )
    # DeepSpeed's launcher puts it before everything else; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, summary: str, detail: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=summary + detail, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    p = command(
        "train",
        "Train an adapter as a recipe says.",
        "\n\nWrites adapter/, checkpoints/, recipe.yaml, metrics.jsonl, run.json and report.html into training.output_dir\n"
        "(default: runs/<recipe name>). Ctrl-C saves at the next step boundary; --resume goes on from there.",
    )
    p.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, see recipes/ and docs/recipe.md")
    _for_training(p)
    p.add_argument(
        "--dry-run", action="store_true", help="check everything, show the data, train nothing, write nothing"
    )
    p = command(
        "preview",
        "Show what a recipe would train on: counts, lengths, and rows with the trained tokens marked.",
        "\n\nReads the data and the tokenizer, no weights. --html writes the same as one page for a browser.",
    )
    p.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, as for train")
    p.add_argument("--rows", type=int, default=4, metavar="N", help="rows shown in full (default: %(default)s)")
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page there")
    _for_a_recipe(p)

    p = command(
        "launch",
        "Train with several processes, on one machine or many.",
        "\n\nOn one machine: --gpus N. From one machine on all that a host file names, by ssh: --hostfile FILE. Under a\n"
        "scheduler, on each machine: --node-rank K --nnodes N --rdzv HOST:PORT. It prints and runs torchrun, or deepspeed for a\n"
        "host file; both also work by themselves: torchrun ... -m qvera train RECIPE. How the processes share the model is said\n"
        "by the recipe's deepspeed key.",
    )
    p.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, as for train")
    p.add_argument("--gpus", type=int, metavar="N", help="processes on each machine (default: one for each GPU)")
    p.add_argument("--hostfile", type=Path, metavar="FILE", help="a line `HOST slots=N` for each machine")
    p.add_argument("--node-rank", type=int, metavar="K", help="this machine's number, from 0")
    p.add_argument("--nnodes", type=int, metavar="N", help="how many machines there are")
    p.add_argument("--rdzv", metavar="HOST:PORT", help="where machine 0 is reached")
    p.add_argument(
        "--max-restarts", type=int, default=0, metavar="N",
        help="after a process has failed start all again, up to N times, from the last checkpoint (default: 0, end)",
    )  # fmt: skip
    _for_training(p)

    p = command(
        "plan",
        "What a recipe will take, before it is run: bytes, seconds, files, and whether it fits.",
        "\n\nFrom the model's config alone; no weights are read. The longest batch is that of the data where it is at hand, else\n"
        "data.max_length. Without --gpu it is planned for this machine and a step is timed (a few seconds). Where it does not\n"
        "fit, the nearest changes that make it fit are named. --nodes and --gpus: one rank of many, under each ZeRO stage, what\n"
        "travels in a step, and which stage is right. --table: what fits on which card, as Markdown.",
    )
    p.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE", help="a YAML file, as for train")
    p.add_argument("--gpu", metavar="SIZE", help="plan for a GPU of that size, here or not: 24GB, 24GiB")
    p.add_argument("--nodes", type=int, metavar="N", help="plan for that many machines alike (default: 1)")
    p.add_argument("--gpus", type=int, metavar="M", help="and for so many processes on each (default: 1)")
    _for_a_recipe(p)
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--no-timing", action="store_true", help="do not time a step")
    p.add_argument("--table", action="store_true", help="print what fits on cards of 6 to 80 GB for 7B to 70B")
    p.add_argument("--svg", type=Path, metavar="FILE", help="with --table: write the picture there")

    p = command(
        "quickstart", "Fetch a small real Llama, train it on a task that ships with qvera, show before and after."
    )
    p.add_argument("--fetch-only", action="store_true", help="make base model and data, print where they are, and stop")
    p.add_argument(
        "--output-dir", default="runs/quickstart", metavar="RUN", help="where the run goes (default: %(default)s)"
    )
    _for_a_recipe(p)
    p.add_argument("--resume", action="store_true", help="go on with an interrupted quickstart")

    p = command("chat", "Talk to a trained run.", "\n\n/reset forgets the conversation, /quit (or Ctrl-D) ends it.")
    p.add_argument("run", type=Path, metavar="RUN", help="a run directory or an adapter directory")
    p.add_argument("--system", help="a system prompt (default: the recipe's)")
    p.add_argument("--base", action="store_true", help="talk to the base model without the adapter")
    _add_sampling(p, max_new_tokens=512)

    p = command(
        "generate",
        "Answer prompts from a file, batched, into a JSONL file.",
        "\n\nPROMPTS: .jsonl, .json, .csv or .parquet rows as for training (a last assistant turn is ignored), or .txt with one\n"
        "prompt a line. Each output line has source, prompt, answer.",
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run directory or an adapter directory")
    p.add_argument("prompts", type=Path, metavar="PROMPTS")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL to write; must not exist")
    p.add_argument("--base", action="store_true", help="answer with the base model, without the adapter")
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at a time (default: %(default)s)")
    _add_sampling(p, max_new_tokens=256)

    p = command(
        "eval",
        "Held-out loss, perplexity and answers of a run, an adapter, or an exported checkpoint.",
        "\n\nRUN: a run directory; an adapter directory whose config names its base (QVERA, or what PEFT can load, such as the\n"
        "LoRA of `qvera export --to lora`); or a checkpoint that `qvera export --to merged` wrote. A merged export that still\n"
        "finds its run is evaluated on that run's held-out rows; otherwise say --recipe or --data.\n\n"
        "Metrics: exact, and with `pip install 'qvera[metrics]'` bleu, bleu-lowercase, chrf, chrf++, ter (sacrebleu) and rouge1,\n"
        "rouge2, rougeL (rouge-score). BLEU, chrF and TER go from 0 to 100, the others from 0 to 1.\n\n"
        "`--json RUN/eval.json` puts the scores where `qvera compare` finds them.",
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run, an adapter directory or an exported checkpoint")
    p.add_argument("--recipe", type=Path, metavar="PATH", help="a recipe, or a run, whose rows and settings are used")
    p.add_argument("--data", metavar="FILE", help="rows to evaluate on (default: the recipe's held-out rows)")
    p.add_argument("--rows", type=int, metavar="N", help="use only the first N rows")
    p.add_argument(
        "--metrics",
        default="exact",
        metavar="NAME,NAME",
        help="how answers are held against references (default: %(default)s)",
    )
    p.add_argument(
        "--group-prompts", action="store_true", help="rows with the same prompt are one, with all their references"
    )
    p.add_argument("--base", action="store_true", help="evaluate the base model without the adapter")
    p.add_argument("--with-base", action="store_true", help="evaluate the base model too, beside it")
    p.add_argument("--no-generation", action="store_true", help="loss only: no answers, no metrics")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens per answer (default: the recipe's)")
    p.add_argument("--predictions", type=Path, metavar="FILE", help="write a line of JSON for each prompt")
    p.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page: base, adapter and reference side by side (asks the base too)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write scores and every answer as JSON")

    p = command(
        "compare",
        "Several runs side by side: scores, cost, curves, and the recipe keys in which they differ.",
        "\n\nReads recipe.yaml, metrics.jsonl and run.json of each run, no model; and eval.json, where `qvera eval RUN --json\n"
        "RUN/eval.json` wrote one, for BLEU, ROUGE and the like. What is missing, and what can't be compared (another base,\n"
        "other held-out rows, another machine, an evaluation of another adapter), is said.",
    )
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="two to eight run directories")
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page with the curves there")
    p.add_argument("--json", action="store_true", help="as JSON")

    p = command(
        "harness",
        "lm-evaluation-harness on a run, an adapter, or an exported checkpoint.",
        "\n\nNeeds `pip install 'qvera[harness]'` (lm-eval). A run is asked as it was trained, on its quantized base.\n"
        "--include DIR adds tasks of your own, which need no network. A merged export is also what lm-eval loads by itself:\n"
        "`lm_eval run --model hf --model_args pretrained=DIR --tasks ...`.",
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run, an adapter directory or an exported checkpoint")
    p.add_argument("--tasks", required=True, metavar="NAME,NAME", help="lm-eval's names of tasks, groups or tags")
    p.add_argument("--include", type=Path, metavar="DIR", help="a directory with task files (YAML) of your own")
    p.add_argument(
        "--recipe", type=Path, metavar="PATH", help="a recipe or run that says how an adapter's base is loaded"
    )
    p.add_argument("--base", action="store_true", help="the base model without the adapter")
    p.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    p.add_argument("--few-shot", type=int, metavar="N", help="examples before each question (default: the task's)")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)")
    p.add_argument("--chat", action="store_true", help="put prompts through the tokenizer's chat template")
    p.add_argument("--json", type=Path, metavar="FILE", help="write lm-eval's results and every document as JSON")

    p = command(
        "export",
        "Write the trained model in a form that other tools load.",
        "\n\n--to merged: W + dW for every adapted weight in 16 bits; plain transformers loads it. The run trained on a quantized\n"
        "base; --base original merges into the 16-bit weights, --base dequantized into what the vectors saw. The difference\n"
        "between trained and exported model is measured and written to OUT/qvera_export.json. Interrupted (or out of disk): the\n"
        "same command goes on from the finished shards.\n\n"
        "--to lora: the same change of the weights as an adapter of stock PEFT's LoRA; exact at the adapter's own rank, or cut to\n"
        "the best --rank K, with the error of each layer. --to peft: an adapter of PEFT's own VeRA, projections in the file.",
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run directory or an adapter directory")
    p.add_argument(
        "out", type=Path, metavar="OUT", help="a directory that is new or empty, or holds this export unfinished"
    )
    p.add_argument(
        "--to", choices=["merged", "lora", "peft"], default="merged", help="what to write (default: %(default)s)"
    )
    p.add_argument("--rank", type=int, metavar="K", help="--to lora: keep the best K directions of each layer only")
    p.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="default: the recipe's, float16")
    p.add_argument(
        "--base", choices=["original", "dequantized"], dest="weights", help="default: the recipe's, original"
    )
    p.add_argument(
        "--no-compare", action="store_true", help="do not measure the difference (saves loading both models)"
    )

    p.add_argument(
        "--compare-only",
        action="store_true",
        help="measure the difference of the export that is in OUT, write nothing else",
    )

    p = command(
        "merge-adapters",
        "Scale, add, average or interpolate adapters of one base model.",
        "\n\nThe default is their average; --weights 1 -1 subtracts, --weights 0.3 0.7 interpolates, one with --weights 0.5\n"
        "is scaled. Where seed, rank, b_groups, targets, d and a agree (adapter.train_d: false) the result is again a QVERA\n"
        "adapter, exactly. Any others add up exactly to a LoRA of their ranks' sum: --to lora, cut with --rank K.",
    )
    p.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="run or adapter directories")
    p.add_argument("out", type=Path, metavar="OUT", help="a directory that is new or empty")
    p.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each (default: their average)")
    p.add_argument("--to", choices=["qvera", "lora"], default="qvera", help="what to write (default: %(default)s)")
    p.add_argument("--rank", type=int, metavar="K", help="--to lora: keep the best K directions of each layer only")
    p.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        default="float32",
        help="of a LoRA (default: %(default)s)",
    )

    p = command(
        "quantize",
        "Write the 4-bit copy of a 16-bit model, once.",
        "\n\nOUT is a checkpoint in bitsandbytes' own serialized format; stock transformers loads it. Without OUT it goes into\n"
        "the cache, where `qvera train` would make it on first use. Killed or stopped, the same command goes on from its\n"
        "finished shards.",
    )
    p.add_argument("model", metavar="MODEL", help="a directory with safetensors, or a hub id")
    p.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="a directory that is new or empty (default: the cache)"
    )
    p.add_argument("--quantization", choices=["nf4", "fp4"], help="default: as in a recipe, nf4")
    p.add_argument(
        "--no-double-quant", action="store_false", default=None, dest="double_quant", help="keep the scales in fp32"
    )
    p.add_argument(
        "--quant-storage", choices=["uint8", "bfloat16", "float16", "float32"], help="default: as in a recipe, bfloat16"
    )
    p.add_argument("--revision", help="branch, tag or commit of a hub id")
    p.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run Python code that comes with the model"
    )
    p.add_argument(
        "--verify", action="store_true", help="hash source and copy again, instead of believing sizes and times"
    )

    p = command("cache", "The 4-bit copies of models and the tokenized rows: list, remove, verify.")
    actions = p.add_subparsers(dest="action", metavar="ACTION", required=True)
    a = actions.add_parser("ls", help="what is there, and how large")
    a.add_argument("--json", action="store_true", help="as JSON")
    a = actions.add_parser("rm", help="delete some of it")
    a.add_argument("names", nargs="*", metavar="NAME", help="as ls shows them, or the beginning of one")
    a.add_argument("--all", action="store_true", help="everything")
    a.add_argument("--unfinished", action="store_true", help="what was interrupted and is not being made now")
    a = actions.add_parser("verify", help="hash again and compare")
    a.add_argument("names", nargs="*", metavar="NAME", help="default: all")

    p = command("info", "What is this directory: base, rank, targets, counts, hashes, versions.")
    p.add_argument("path", type=Path, metavar="DIR", help="a run or adapter directory")
    p.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _for_a_recipe(parser: argparse.ArgumentParser) -> None:
    """What every command that reads a recipe takes."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override one key of the recipe (repeatable), e.g. --set training.max_steps=100",
    )  # fmt: skip


def _for_training(parser: argparse.ArgumentParser) -> None:
    """What `qvera train` takes and `qvera launch` hands on to it (`commands.training.handed_on`)."""
    _for_a_recipe(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint that verifies")
    parser.add_argument(
        "--find-lr", action="store_true",
        help="no run: let the learning rate grow each step until the loss diverges, draw the curve, suggest a rate",
    )  # fmt: skip
    for name, metavar, kind, what, default in (
        ("--lr-from", "R", float, "first rate", f"{RangeTest.start:g}"),
        ("--lr-to", "R", float, "last rate", f"{RangeTest.end:g}"),
        ("--lr-steps", "N", int, "steps", str(RangeTest.steps)),
    ):
        parser.add_argument(name, type=kind, metavar=metavar, help=f"with --find-lr: {what} (default: {default})")


def _add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: %(default)s)")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    code = _run(arguments)
    if "RANK" in os.environ:  # one of several processes
        from qvera.distributed.launch import leave_exit_code

        leave_exit_code(code)
    return code


def _run(arguments: list[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.version:
        from qvera.utils.memory import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        return EXIT_DONE
    if args.command is None:
        parser.print_help()
        return EXIT_DONE
    _quiet_imports()
    try:
        from qvera.cli import commands

        return int(getattr(commands, args.command.replace("-", "_"))(args) or EXIT_DONE)
    except QveraError as error:
        if args.traceback:
            raise
        if not error.shared or os.environ.get("RANK", "0") == "0":
            print(f"qvera {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if args.traceback:
            raise
        print(f"qvera {args.command}: interrupted before there was anything to save.", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        return EXIT_FAILED
    except OSError as error:
        if args.traceback:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"qvera {args.command}: {where}{error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED


def _quiet_imports() -> None:
    """Keep advice of the libraries below, which nobody can follow here, out of a command's output."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT uses a renamed attribute
