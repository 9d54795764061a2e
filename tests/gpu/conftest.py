"""Kernels, bytes and waits are counted as torch 2.13 launches them: older releases have other kernels for some steps."""

import torch

collect_ignore_glob = [] if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else ["test_*.py"]
