"""Tiny random encoders and a GPT-2 on disk, as their pretrained checkpoints are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.conftest import small_tokenizer
from tests.tasks.conftest import WORDS


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words and numbers, in BERT's template of [CLS] text [SEP], with token types."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "say", "again", *(word for words in WORDS.values() for word in words)]
    known = {word: number for number, word in enumerate([*words, *map(str, range(100))])}
    backend = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    )  # fmt: skip


def save_family(name: str, directory: Path) -> Path:
    """A checkpoint of the family as people publish it: with a language model's head, without a classifier's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    wide: dict[str, Any] = {**sizes, "vocab_size": 120, "initializer_range": 0.1, "pad_token_id": 0}
    model: Any
    if name == "bert":
        model = BertForPreTraining(BertConfig(**wide, max_position_embeddings=64))
    elif name == "roberta":
        model = RobertaForMaskedLM(RobertaConfig(**wide, max_position_embeddings=66, type_vocab_size=2))
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 304, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.1, bos_token_id=None, eos_token_id=2))
    model.to(torch.bfloat16).save_pretrained(directory)
    (small_tokenizer() if name == "gpt2" else word_tokenizer()).save_pretrained(directory)
    return directory
