"""What each command of the CLI does, in terms of the Python API. One function a command; `qvera.cli.main` parses and dispatches."""

from qvera.cli.commands.answering import chat, generate
from qvera.cli.commands.bases import cache, info, quantize
from qvera.cli.commands.exporting import export, merge_adapters
from qvera.cli.commands.reading import compare, eval, harness
from qvera.cli.commands.training import launch, plan, preview, quickstart, train

__all__ = [
    "cache",
    "chat",
    "compare",
    "eval",
    "export",
    "generate",
    "harness",
    "info",
    "launch",
    "merge_adapters",
    "plan",
    "preview",
    "quantize",
    "quickstart",
    "train",
]
