"""`QVERA_TEST_DEVICE` puts the suite on a card; no card is needed to see what it would run there."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from tests import device
from tests.helpers import ROOT


def test_cuda_is_hidden_unless_the_variable_names_it() -> None:
    if device.NAME == "cpu":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_tensors_of_a_test_are_made_on_the_device_with_the_numbers_of_the_cpu() -> None:
    with device.MadeOn(torch.device("meta")):
        assert torch.randn(2).device.type == torch.tensor([1]).device.type == "meta"
        assert torch.randn(2, generator=torch.Generator().manual_seed(1)).device.type == "meta"
        assert torch.zeros(2, device="cpu").device.type == "cpu"
    with device.MadeOn(torch.device("cpu")):
        drawn = torch.randn(2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, torch.randn(2, generator=torch.Generator().manual_seed(1)))


def test_a_card_runs_its_own_rooms_without_the_interpreter() -> None:
    report = "import atexit, os; atexit.register(lambda: print('interpreter', os.environ.get('TRITON_INTERPRET')))"
    line = [sys.executable, "-c", f"{report}; import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"]
    line += ["--collect-only", "-qq", "-p", "no:cacheprovider"]
    line += ["tests/kernels/test_columns.py", "tests/utils/test_signals.py"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {device.VARIABLE: "cuda", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/kernels/" in done.stdout and "tests/utils/" not in done.stdout
    assert "interpreter None" in done.stdout
