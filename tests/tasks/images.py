"""A tiny random ViT on disk, and pictures it can learn to tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 70), "red": (210, 40, 50)}
SIZE = 16


def small_vit(seed: int = 0, **changes: Any) -> ViTForImageClassification:
    """A random ViT of two layers: 16 patches of 4 x 4 pixels."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 4,
        "initializer_range": 0.1,
    }
    return ViTForImageClassification(ViTConfig(**{**settings, **changes}))


def save_vit(directory: Path, **changes: Any) -> Path:
    """The same as a checkpoint without a classification head, as a pretrained backbone is published."""
    small_vit(**changes).vit.save_pretrained(directory)
    image_processor().save_pretrained(directory)
    return directory


def image_processor(side: int = SIZE) -> ViTImageProcessorPil:
    """That of a ViT for square images."""
    return ViTImageProcessorPil(size={"height": side, "width": side})


def picture(label: str, number: int) -> Image.Image:
    """A noisy picture of one colour, of a size of its own."""
    draw = np.random.default_rng([number, sorted(COLOURS).index(label)])
    shape = 12 + number % 9, 12 + number % 7, 3
    noise = draw.integers(-30, 31, shape)
    return Image.fromarray(np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8))


def write_folders(directory: Path, count: int = 20) -> Path:
    """``count`` pictures of each colour, a folder for each."""
    for label in COLOURS:
        (directory / label).mkdir(parents=True)
        for number in range(count):
            picture(label, number).save(directory / label / f"{number:02}.png")
    return directory
