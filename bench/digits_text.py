"""A small model of images and text, trained from scratch to name scikit-learn's digits 0 to 6 in words, learns 7 to 9.

    pip install 'qvera[vision]'
    python bench/digits_text.py    # appends a line to bench/results/digits_text.jsonl; some CPU minutes

The base is a tiny Gemma 3 (a vision tower and a text model of 3 layers) trained by plain torch, all of it. It then is
what a published checkpoint is: weights, tokenizer with chat template, processor. `qvera train` adapts its 4-bit copy
with VeRA (the tower stays frozen) to name 7 to 9, a word each that the base has never written. Scores are the exact
match of greedy answers to held-out pictures, before and after, by `qvera.evaluate`.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import qvera
from bench.common import RESULTS, header
from qvera.config.schema import parse_recipe
from qvera.config.sections import DataSection, ModelSection
from qvera.data import build_datasets
from qvera.models import forward
from qvera.models.tokenizer import load_tokenizer
from qvera.training.trainer import train
from qvera.utils.files import read_json

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit?"
SIDE, PATCHES = 8, 16
BASE_STEPS, BASE_ROWS, BASE_RATE = 350, 32, 3e-3
STEPS, ROWS = 200, 16
SPECIAL = ["<pad>", "<turn>", "<end>", "<image>", "<start_of_image>", "<end_of_image>"]
TEMPLATE = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<start_of_image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def write_rows(path: Path, digits: range, held_out: bool, seed: int) -> Path:
    """Rows of a picture each, as JSON Lines with paths; a fifth of each digit is held out."""
    data, lines = load_digits(), []
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in np.random.default_rng(seed).permutation(len(data.target)):
        label = int(data.target[number])
        if label not in digits or (number % 5 == 0) != held_out:
            continue
        file = path.parent / f"{number}.png"
        stream = io.BytesIO()
        Image.fromarray(np.round(data.images[number] * 255 / 16).astype(np.uint8)).save(stream, "PNG")
        file.write_bytes(stream.getvalue())
        asked = [{"type": "image", "image": file.name}, {"type": "text", "text": QUESTION}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": WORDS[label]}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_base(directory: Path, rows: Path, seed: int) -> None:
    """The model, its tokenizer of letters and its processor; then all of it is trained on ``rows``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.chat_template = "<pad>", "<end>", TEMPLATE
    tokenizer.save_pretrained(directory)
    named = {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "extra_special_tokens": named}))
    Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(directory)
    about = {"processor_class": "Gemma3Processor", "image_seq_length": PATCHES}
    (directory / "processor_config.json").write_text(json.dumps(about))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = AutoConfig.for_model(
        "gemma3", mm_tokens_per_image=PATCHES, image_token_index=ids["<image>"], eos_token_id=ids["<end>"],
        boi_token_index=ids["<start_of_image>"], eoi_token_index=ids["<end_of_image>"], pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
            "sliding_window": 128, "max_position_embeddings": 128, "pad_token_id": ids["<pad>"],
            "bos_token_id": None, "eos_token_id": ids["<end>"],
        },
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": SIDE, "patch_size": 2,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # zeros at first
    model.save_pretrained(directory)
    datasets = build_datasets(DataSection(path=str(rows)), load_tokenizer(ModelSection(path=str(directory))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE_RATE, BASE_STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(BASE_STEPS):
        chosen = torch.randint(len(datasets.train), (BASE_ROWS,), generator=generator).tolist()
        batch = forward.make_batch(model, [datasets.train[i] for i in chosen], datasets.pad_id)
        inputs = {name: value for name, value in batch.items() if name != "trained"}
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"base, step {step}: loss {loss:.3f}", flush=True)
    model.save_pretrained(directory)


def measure(seed: int, rate: float, rank: int) -> dict[str, Any]:
    """Train the base, adapt it, and score both."""
    with tempfile.TemporaryDirectory() as temporary:
        place, began = Path(temporary), time.perf_counter()
        known = {held: write_rows(place / "known" / f"{held}.jsonl", range(7), held, seed) for held in (False, True)}
        new = {held: write_rows(place / "new" / f"{held}.jsonl", range(7, 10), held, seed) for held in (False, True)}
        write_base(place / "base", known[False], seed)
        base_seconds = time.perf_counter() - began
        tree = {
            "model": {"path": str(place / "base"), "compute_dtype": "float32"},
            "adapter": {"rank": rank, "seed": seed},
            "data": {"path": str(new[False]), "eval_path": str(new[True]), "seed": seed},
            "training": {
                "max_steps": STEPS, "global_batch_size": ROWS, "per_device_train_batch_size": ROWS, "seed": seed,
                "learning_rate": rate, "save_steps": STEPS, "sample_max_new_tokens": 8, "report_to": [],
            },
        }  # fmt: skip
        began = time.perf_counter()
        train(parse_recipe(tree, "digits in words"), place / "run")
        train_seconds = time.perf_counter() - began
        run = read_json(place / "run" / "run.json", "a run")
        options: dict[str, Any] = {"with_base": True, "max_new_tokens": 8}
        scored = qvera.evaluate(place / "run", new[True], **options)
        before, after = scored["base_scores"], scored["scores"]
        old = qvera.evaluate(place / "run", known[True], **options)
        answers = [(row["references"][0], row["base_answer"], row["answer"]) for row in scored["answers"][:6]]
        return {
            "seed": seed, "learning_rate": rate, "rank": rank, "steps": STEPS, "batch_rows": ROWS,
            "parameters": run["adapter"]["trainable_parameters"], "held_out_rows": after["scored_rows"],
            "before": {"exact_match": before["exact_match"], "loss": before["loss"]},
            "after": {"exact_match": after["exact_match"], "loss": after["loss"]},
            "digits_0_to_6": {"base": old["base_scores"]["exact_match"], "adapted": old["scores"]["exact_match"]},
            "answers": answers, "base_seconds": round(base_seconds), "train_seconds": round(train_seconds),
        }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--rank", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.seed, given.learning_rate, given.rank)
    print(json.dumps(found, indent=1))
    with open(RESULTS / "digits_text.jsonl", "a", encoding="utf-8") as lines:
        lines.write(json.dumps({**found, "versions": header()["versions"]}) + "\n")
