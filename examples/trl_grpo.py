"""Reinforcement learning with TRL: GRPOTrainer trains a qvera adapter on a 4-bit base model by a reward of your own.

pip install 'qvera[trl]'
python examples/trl_grpo.py MODEL ROWS.jsonl OUT         # rows with "prompt" and "completion", the right answer
"""

import argparse
from difflib import SequenceMatcher

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

import qvera  # PEFT and TRL know QveraConfig from here on

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("rows")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--learning-rate", type=float, default=4e-3, help="small models need more: 3e-2 for 135M")
parser.add_argument("--answer-tokens", type=int, default=64)
args = parser.parse_args()


def likeness(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """The reward: how much an answer has in common with the right one, from 0 to 1."""
    pairs = zip(completions, answer, strict=True)
    return [SequenceMatcher(None, ours.strip(), right.strip()).ratio() for ours, right in pairs]


four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
)
rows = load_dataset("json", data_files=args.rows, split="train")
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bit),
    processing_class=AutoTokenizer.from_pretrained(args.model),
    train_dataset=rows.rename_column("completion", "answer"),
    reward_funcs=likeness,
    peft_config=qvera.QveraConfig(rank=256, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=8,
        num_generations=8,  # answers to a prompt, which are compared with each other
        max_completion_length=args.answer_tokens,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    ),
)
trainer.train()
trainer.save_model(args.out)  # adapter_config.json and adapter_model.safetensors; `qvera chat OUT` opens them
