"""The export opens in a plain transformers that has never heard of qvera, peft or bitsandbytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from qvera.config.sections import ExportSection
from qvera.exporting.merged import export_merged
from tests.exporting.helpers import trained_adapter

_CODE = """
import importlib.util, json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(importlib.util.find_spec(name) for name in ("qvera", "peft", "bitsandbytes"))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer.apply_chat_template([{"role": "user", "content": "say red 1"}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)["input_ids"]
out = model.float().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
print(json.dumps({"dtype": str(model.config.dtype), "new": out[0, ids.shape[1]:].tolist()}))
"""


@pytest.mark.slow
def test_plain_transformers_opens_it_where_qvera_is_not_installed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A directory of links to the installed packages stands in for another environment, and lacks these three."""
    _, section, adapter = trained_adapter(tiny_model_dir, tmp_path / "adapter")
    export_merged(adapter, section, tmp_path / "merged", ExportSection())
    packages = tmp_path / "packages"
    packages.mkdir()
    transformers = find_spec("transformers")
    assert transformers is not None and transformers.origin is not None
    for path in Path(transformers.origin).parents[1].iterdir():
        if not any(name in path.name for name in ("qvera", "peft", "bitsandbytes")) and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(packages)}
    done = subprocess.run(  # -S: without the site-packages of this interpreter
        [sys.executable, "-S", "-c", _CODE, str(tmp_path / "merged")],
        check=True, capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["dtype"] == "torch.float16"
    assert len(said["new"]) in range(1, 5)
