"""Rows → tokens, labels, batches. See `build_datasets` for the way in and `batches` for the order of training."""

from .batches import IGNORED, collate, global_batch, microbatches, order, rank_passes, steps_per_epoch
from .encode import Encoder
from .examples import DataStats, Example
from .formats import FORMATS, Conversation, Text, Turn
from .named_templates import NAMED_TEMPLATES
from .prefix import collate_prefix_once
from .preflight import print_preflight
from .prompts import read_prompts
from .templates import ChatTemplate, resolve_template
from .tokenize import Datasets, build_datasets, data_sha256

__all__ = [
    "FORMATS",
    "IGNORED",
    "NAMED_TEMPLATES",
    "ChatTemplate",
    "Conversation",
    "DataStats",
    "Datasets",
    "Encoder",
    "Example",
    "Text",
    "Turn",
    "build_datasets",
    "collate",
    "collate_prefix_once",
    "data_sha256",
    "global_batch",
    "microbatches",
    "order",
    "print_preflight",
    "rank_passes",
    "read_prompts",
    "resolve_template",
    "steps_per_epoch",
]
