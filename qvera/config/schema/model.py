"""The sections ``model`` and ``export`` of a recipe."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Strict

from qvera.config.fields import Bool, NonEmpty, NonNegative, OnlyWith, Section

_OF_TEXTS = OnlyWith("task: causal-lm", "task: sequence-classification")


class ModelSection(Section):
    """The frozen base model. ``model: some/path`` alone is short for ``model: {path: some/path}``."""

    path: NonEmpty
    """A local directory with safetensors files, or a hub id such as ``meta-llama/Llama-2-7b-hf``."""
    revision: str | None = None
    """The branch, tag or commit of a hub id. Default: the main branch."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """The number format of the frozen linear layers. ``nf4`` and ``fp4`` take 4 bits a weight, ``int8`` takes 8 bits,
    and ``none`` keeps the weights in ``compute_dtype``."""
    double_quant: Bool = True
    """Quantize the scales of the 4-bit weights too (QLoRA, section 3). Saves 0.37 bits a weight."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The dtype of matrix products and activations. ``auto``: bfloat16 where the device supports it, else float16 on a
    GPU and float32 on a CPU."""
    quant_storage: Annotated[
        Literal["uint8", "bfloat16", "float16", "float32"],
        OnlyWith("model.quantization: nf4", "model.quantization: fp4"),
    ] = "bfloat16"
    """The dtype that the packed 4-bit weights are declared as; their bytes are the same. bfloat16 lets ZeRO-3 shard
    them."""
    stream: Literal["auto"] | Bool = "auto"
    """Keep the 4-bit decoder layers in RAM and bring each to the GPU right before it is used, so that only two of them
    take memory there. For a base that is larger than the GPU; the results are the same. Slower where a batch computes
    for less time than its layers travel. ``auto``: where the base does not fit otherwise. Not with ZeRO-3."""
    resident: Annotated[Literal["auto"] | Bool, OnlyWith("model.quantization: nf4", "model.quantization: fp4")] = "auto"
    """Keep a copy of each 4-bit linear in the 16-bit compute dtype while training, 2 bytes a weight, so that products
    need not dequantize it; the results are the same. ``auto``: on a GPU where the plan has room for it."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention code. ``auto``: what transformers picks, usually ``sdpa``. On an accelerator ``sdpa`` also takes
    torch's variable-length attention where that runs (``docs/memory.md``). ``flash_attention_2`` needs the flash-attn
    package."""
    trust_remote_code: Bool = False
    """Run Python code that comes with the model. Only for a model whose authors you trust."""
    tokenizer: Annotated[str | None, _OF_TEXTS] = None
    """The directory or hub id of another tokenizer. Default: the model's own."""
    added_tokens: Annotated[list[NonEmpty], OnlyWith("task: causal-lm")] = []
    """New tokens, such as ``["<|tool|>"]``. The embedding and the head are frozen, so each new token keeps an initial
    row that is drawn from the mean and spread of the other rows, seeded by the token's text. The adapter and a merged
    export carry the rows and ids. Not supported under ZeRO-3."""
    pad_token: Annotated[str | None, _OF_TEXTS] = None
    """The token that pads batches: one of the model's or of ``added_tokens``. Default: the tokenizer's own, else its
    eos token. No row looks at padding, so it may be a token that is used elsewhere."""
    eos_token: Annotated[str | None, _OF_TEXTS] = None
    """The token that ends an answer, in place of the tokenizer's (ChatML's ``<|im_end|>``, say): one of the model's or
    of ``added_tokens``."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict each other."""
        if self.quantization == "int8" and self.compute_dtype == "float32":
            yield "compute_dtype", "int8 linears compute in 16 bits; use auto, bfloat16 or float16."
        if self.stream is True and self.quantization not in ("nf4", "fp4"):
            yield "stream", f"only 4-bit layers are streamed, and model.quantization is {self.quantization}."
        if self.resident is True and self.stream is True:
            yield "resident", "streamed layers are not kept on the device; remove model.stream or model.resident."
        if self.resident is True and self.compute_dtype == "float32":
            yield "resident", "the copies are in 16 bits, and model.compute_dtype is float32."


class ExportSection(Section):
    """The defaults of ``qvera export``; its flags override them."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The dtype of the exported weights."""
    base: Literal["original", "dequantized"] = "dequantized"
    """Merge into the dequantized weights that the vectors were trained with, so that the export answers as the run
    does, or into the original 16-bit ones."""
    max_shard_size_bytes: Annotated[int, Strict(), Field(ge=1, le=2**50)] = 5_000_000_000
    """The largest safetensors file, in bytes."""
    certificate_rows: NonNegative = 16
    """Held-out rows on which the trained and the exported model are compared; training rows where none are held out."""
