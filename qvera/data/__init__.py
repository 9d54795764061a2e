"""Rows → tokens, labels, batches.

`build_datasets` reads the rows of a recipe, `Batches` puts them in order. Imports no torch.
"""

from qvera.data.chat_template import NAMED_TEMPLATES, ChatTemplate, resolve_template
from qvera.data.conversations import Turn
from qvera.data.dataset import (
    AdapterRows,
    Datasets,
    DataStats,
    build_datasets,
    data_sha256,
    data_warnings,
    print_preflight,
)
from qvera.data.labelled import Labels
from qvera.data.rows import IGNORED, Example, Rows, collate, collate_prefix_once, lengths_of
from qvera.data.sampler import Batches, batches_of, microbatches, planned_steps, steps_per_epoch
from qvera.data.source import read_prompts
from qvera.data.tokenization import Encoder, decode

__all__ = [
    "IGNORED",
    "NAMED_TEMPLATES",
    "AdapterRows",
    "Batches",
    "ChatTemplate",
    "DataStats",
    "Datasets",
    "Encoder",
    "Example",
    "Labels",
    "Rows",
    "Turn",
    "batches_of",
    "build_datasets",
    "collate",
    "collate_prefix_once",
    "data_sha256",
    "data_warnings",
    "decode",
    "lengths_of",
    "microbatches",
    "planned_steps",
    "print_preflight",
    "read_prompts",
    "resolve_template",
    "steps_per_epoch",
]
