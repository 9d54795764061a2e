"""Preference tuning with TRL: DPOTrainer trains a qvera adapter on a 4-bit base model.

    pip install 'qvera[trl]'
    python examples/trl_dpo.py MODEL PAIRS.jsonl OUT         # rows with "prompt", "chosen" and "rejected"

The base model without the adapter is the reference, so no second model is loaded.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

import qvera  # PEFT and TRL know QveraConfig from here on

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()

four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
)
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bit),
    processing_class=AutoTokenizer.from_pretrained(args.model),
    train_dataset=load_dataset("json", data_files=args.pairs, split="train"),
    peft_config=qvera.QveraConfig(rank=256, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=DPOConfig(
        output_dir=args.out,
        beta=0.1,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=4,
        max_length=512,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    ),
)
trainer.train()
trainer.save_model(args.out)
