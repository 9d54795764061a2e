"""The export in a virtual environment that has never heard of qvera, peft or bitsandbytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qvera.cli.main import main

_CODE = """
import importlib.util, json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(importlib.util.find_spec(name) for name in ("qvera", "peft", "bitsandbytes"))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer.apply_chat_template([{"role": "user", "content": "say red 1"}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)["input_ids"]
out = model.float().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
print(json.dumps({"dtype": str(model.config.dtype), "ids": ids.tolist(), "new": out[0, ids.shape[1]:].tolist()}))
"""


@pytest.mark.slow
def test_plain_transformers_in_another_virtualenv(write_recipe: Any, tmp_path: Path) -> None:
    recipe = write_recipe(training={"output_dir": str(tmp_path / "run"), "max_steps": 30})
    assert main(["train", str(recipe)]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--to", "merged"]) == 0
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "torch", "transformers"], check=True)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [python, "-c", _CODE, str(tmp_path / "merged")],
        check=True, capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["dtype"] == "torch.float16"
    assert len(said["new"]) in range(1, 5)
