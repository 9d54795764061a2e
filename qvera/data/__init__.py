"""Rows → tokens, labels, batches. See `build_datasets` for the way in and `batches` for the order of training."""

from .batches import IGNORED, Batches, batches_of, collate, grouped, microbatches, order, steps_per_epoch
from .build import Datasets, build_datasets, data_sha256
from .encode import Encoder
from .examples import Example
from .formats import FORMATS, Conversation, Text, Turn
from .named_templates import NAMED_TEMPLATES
from .prefix import collate_prefix_once
from .preflight import data_warnings, decode, print_preflight
from .prompts import read_prompts
from .rows import CutRows, Rows, lengths_of
from .stats import DataStats
from .templates import ChatTemplate, resolve_template

__all__ = [
    "FORMATS",
    "IGNORED",
    "NAMED_TEMPLATES",
    "Batches",
    "ChatTemplate",
    "CutRows",
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
