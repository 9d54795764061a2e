"""Rows → tokens, labels, batches.

`build_datasets` reads the rows of a recipe, `Batches` puts them in order. Imports no torch.
"""

from qvera.data.chat_template import NAMED_TEMPLATES, ChatTemplate, resolve_template
from qvera.data.collate import IGNORED, collate, collate_prefix_once
from qvera.data.dataset import Datasets, build_datasets, data_sha256
from qvera.data.encoding import Encoder, decode
from qvera.data.formats import FORMATS, Conversation, Text, Turn
from qvera.data.preview import data_warnings, print_preflight
from qvera.data.rows import Example, Rows, lengths_of
from qvera.data.sampler import Batches, batches_of, grouped, microbatches, order, steps_per_epoch
from qvera.data.sources import read_prompts
from qvera.data.stats import DataStats

__all__ = [
    "FORMATS",
    "IGNORED",
    "NAMED_TEMPLATES",
    "Batches",
    "ChatTemplate",
    "Conversation",
    "DataStats",
    "Datasets",
    "Encoder",
    "Example",
    "Rows",
    "Text",
    "Turn",
    "batches_of",
    "build_datasets",
    "collate",
    "collate_prefix_once",
    "data_sha256",
    "data_warnings",
    "decode",
    "grouped",
    "lengths_of",
    "microbatches",
    "order",
    "print_preflight",
    "read_prompts",
    "resolve_template",
    "steps_per_epoch",
]
