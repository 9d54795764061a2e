"""Tiny random encoders and a GPT-2 on disk, as their pretrained checkpoints are stored."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForPreTraining,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.conftest import small_tokenizer
from tests.tasks.conftest import WORDS

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 120,
}
FAMILIES = ("bert", "roberta", "deberta-v2", "gpt2")


def word_tokenizer(pairs: str = "$A:0 [SEP]:0 $B:1 [SEP]:1") -> PreTrainedTokenizerFast:
    """Words and numbers, in BERT's template of [CLS] text [SEP], with token types."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "say",
        "again",
        *(word for words in WORDS.values() for word in words),
        *map(str, range(100)),
    ]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS]:0 $A:0 [SEP]:0", f"[CLS]:0 {pairs}", specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    )  # fmt: skip


def save_family(name: str, directory: Path) -> Path:
    """A checkpoint of the family as people publish it: with a language model's head, without a classifier's."""
    torch.manual_seed(0)
    wide = {**SIZES, "initializer_range": 0.1, "pad_token_id": 0}
    if name == "bert":
        model = BertForPreTraining(BertConfig(**wide, max_position_embeddings=64))
    elif name == "roberta":
        model = RobertaForMaskedLM(RobertaConfig(**wide, max_position_embeddings=66, type_vocab_size=2))
    elif name == "deberta-v2":
        model = DebertaV2ForMaskedLM(
            DebertaV2Config(**wide, max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"])
        )
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 304, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.1, bos_token_id=None, eos_token_id=2))
    model.to(torch.bfloat16).save_pretrained(directory)
    (small_tokenizer() if name == "gpt2" else word_tokenizer()).save_pretrained(directory)
    return directory
