"""Tiny models of the families that take images among text, with their own processors, and rows for them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForImageTextToText, ProcessorMixin
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.conftest import small_tokenizer

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}PLACE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA3 = (
    "{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] | trim }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_SMOLVLM = (  # as published: it writes only contents in parts
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
_SIGLIP: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
_QWEN: dict[str, Any] = {
    "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303,
    "vision_config": {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "window_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1],
    },
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_NEXT = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0},
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _qwen_images() -> Any:
    size = {"shortest_edge": 16 * 16, "longest_edge": 40 * 40}
    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)


def _lfm2_images() -> Any:
    from transformers import Lfm2VlImageProcessor

    return Lfm2VlImageProcessor(
        encoder_patch_size=4, tile_size=16, min_image_tokens=2, max_image_tokens=8, max_tiles=4, downsample_factor=2
    )


@dataclasses.dataclass(frozen=True)
class ImageFamily:
    """``tokens`` get the ids from 300 on. ``needs``: packages that its processor asks for."""

    model_type: str
    processor: str
    config: dict[str, Any]
    image_processor: Any
    tokens: list[str]
    template: str
    named: dict[str, str] = dataclasses.field(default_factory=dict)  # special tokens of the tokenizer by name
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the processor
    needs: tuple[str, ...] = ()

    def write(self, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
        """A random checkpoint with its processor, as it is published."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **self.config, eos_token_id=2, pad_token_id=0)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1 or not parameter.any():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        model.to(dtype).save_pretrained(directory)
        tokenizer = small_tokenizer()
        tokenizer.add_tokens([f"<unused{number}>" for number in range(300 - len(tokenizer))])
        added = [AddedToken(token, special=True, normalized=False) for token in self.tokens]
        tokenizer.add_tokens(added, special_tokens=True)
        assert tokenizer.convert_tokens_to_ids(self.tokens[0]) == 300
        tokenizer.chat_template = self.template
        tokenizer.save_pretrained(directory)
        file = directory / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "extra_special_tokens": self.named}))
        self.image_processor().save_pretrained(directory)
        about = {"processor_class": self.processor, **self.settings}
        (directory / "processor_config.json").write_text(json.dumps(about))
        return directory


def _qwen(model_type: str, processor: str, text: dict[str, Any]) -> ImageFamily:
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    config = {**_QWEN, "text_config": {**_TEXT, **text}}
    return ImageFamily(model_type, processor, config, _qwen_images, _QWEN_TOKENS, _CHATML.replace("PLACE", place))


def _idefics(model_type: str, processor: str, images: Any, *needs: str) -> ImageFamily:
    text = {**_TEXT, "model_type": "llama"}
    return ImageFamily(
        model_type, processor, {"text_config": text, "vision_config": _SIGLIP, "image_token_id": 300, "scale_factor": 2},
        lambda: images(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        ["<image>", "<fake_token_around_image>", "<global-img>"], _SMOLVLM, {}, {"image_seq_len": 1}, needs,
    )  # fmt: skip


IMAGE_FAMILIES = {
    "gemma3": ImageFamily(
        "gemma3", "Gemma3Processor",
        {
            "text_config": {
                **_TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302,
            "tie_word_embeddings": False,
        },
        lambda: Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        ["<image_soft_token>", "<start_of_image>", "<end_of_image>"], _GEMMA3,
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        {"image_seq_length": 4},
    ),
    "gemma4": ImageFamily(
        "gemma4", "Gemma4Processor",
        {
            "text_config": {
                **_TEXT, "sliding_window": 8, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0,
                "global_head_dim": 8, "use_bidirectional_attention": "vision", "vocab_size_per_layer_input": 320,
            },
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 256,
            },
            "audio_config": None, "image_token_id": 300, "boi_token_id": 301, "eoi_token_id": 302,
            "video_token_id": 303, "audio_token_id": 304,
        },
        lambda: Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70),
        ["<|image|>", "<|image>", "<image|>", "<|video|>", "<|audio|>", "<|audio>", "<audio|>"],
        _CHATML.replace("PLACE", "<|image|>"),
        {
            "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
            "boa_token": "<|audio>", "eoa_token": "<audio|>",
        },
    ),
    "qwen2_5_vl": _qwen("qwen2_5_vl", "Qwen2_5_VLProcessor", {"rope_parameters": _ROPE}),
    "qwen3_vl": _qwen("qwen3_vl", "Qwen3VLProcessor", {"rope_parameters": _ROPE}),
    "qwen3_vl_moe": _qwen("qwen3_vl_moe", "Qwen3VLProcessor", {"rope_parameters": _ROPE, **_EXPERTS}),
    "qwen3_5": _qwen("qwen3_5", "Qwen3VLProcessor", _NEXT),
    "qwen3_5_moe": _qwen(
        "qwen3_5_moe", "Qwen3VLProcessor", {**_NEXT, **_EXPERTS, "shared_expert_intermediate_size": 32}
    ),
    "idefics3": _idefics("idefics3", "Idefics3Processor", Idefics3ImageProcessorPil),
    "smolvlm": _idefics("smolvlm", "SmolVLMProcessor", SmolVLMImageProcessorPil, "num2words"),
    "lfm2_vl": ImageFamily(
        "lfm2_vl", "Lfm2VlProcessor",
        {
            "text_config": {
                **_TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"],
                "block_auto_adjust_ff_dim": False,
            },
            "vision_config": {**_SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 4},
            "image_token_id": 300, "projector_hidden_size": 32,
        },
        _lfm2_images, ["<image>", "<|image_start|>", "<|image_end|>"], _CHATML.replace("PLACE", "<image>"),
        needs=("torchvision",),
    ),
}  # fmt: skip


def picture(number: int, width: int = 24, height: int = 16) -> bytes:
    """A PNG of random pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


SIZES = ((24, 16), (40, 8), (16, 33), (20, 20))


def image_rows(directory: Path, count: int = 4) -> Path:
    """Rows of one image, of two, of none, of one again, and so on, of several sizes, and their file."""
    rows = []
    for number in range(count):
        parts: list[dict[str, Any]] = []
        for place in range((1, 2, 0)[number % 3]):
            file = directory / f"{number}-{place}.png"
            file.write_bytes(picture(10 * number + place, *SIZES[(number + place) % 4]))
            parts += [{"type": "image", "image": file.name}, {"type": "text", "text": f"and {number}"[: 3 + place]}]
        asked = [*parts, {"type": "text", "text": " say the word"}]
        answer = {"role": "assistant", "content": f"word {number} twice"}
        rows.append({"messages": [{"role": "user", "content": asked}, answer]})
    path = directory / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def given_by_processor(processor: Any, file: Path) -> list[dict[str, Any]]:
    """What the processor itself makes of each row of a file, each alone."""
    found = []
    for line in file.read_text().splitlines():
        messages = json.loads(line)["messages"]
        messages[1]["content"] = [{"type": "text", "text": messages[1]["content"]}]
        for part in messages[0]["content"]:
            if part["type"] == "image":
                part["image"] = Image.open(file.parent / part["image"])
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        # not SmolVLM's own, which asks its part for videos
        found.append(dict(ProcessorMixin.apply_chat_template(processor, messages, **options)))
    return found
