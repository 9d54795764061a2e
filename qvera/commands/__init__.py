"""What each command of the CLI does, in terms of the Python API. One function a command; `qvera.cli` parses and dispatches."""

from .answering import chat, generate
from .bases import cache, info, quantize
from .exporting import export, merge_adapters
from .reading import compare, eval, harness
from .training import launch, plan, preview, quickstart, train

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
