"""The recipe's ``deepspeed`` key: a word or a file in, DeepSpeed's configuration out.

A file says how ZeRO is done and nothing that the recipe also says: batch size, precision, accumulation, clipping, schedule and
optimizer come from the recipe, and a file with one of them is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

from qvera.config.schema import Recipe
from qvera.utils.errors import InputError

STAGES = ("zero1", "zero2", "zero3", "zero3-offload-cpu", "zero3-offload-nvme")

_IN_THE_RECIPE = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size (accumulation follows from it)",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optim, training.learning_rate and their neighbours",
    "scheduler": "training.lr_scheduler_type and training.warmup_ratio",
    "fp16": "model.compute_dtype: float16",
    "bf16": "model.compute_dtype: bfloat16",
    "bfloat16": "model.compute_dtype: bfloat16",
    "amp": "model.compute_dtype",
    "torch_autocast": "model.compute_dtype",
    "data_types": "nothing: vectors and their gradients are fp32",
    "communication_data_type": "nothing: vectors and their gradients are fp32",
    "seq_parallel_communication_data_type": "nothing: vectors and their gradients are fp32",
    "activation_checkpointing": "training.gradient_checkpointing",
    "steps_per_print": "nothing: every step is in metrics.jsonl",
    "tensorboard": "training.report_to",
    "wandb": "training.report_to",
    "comet": "training.report_to",
    "csv_monitor": "nothing: every step is in metrics.jsonl",
    "seed": "training.seed",
}
"""DeepSpeed's key → the recipe's."""

_NOT_HERE = {
    "pipeline": "pipeline parallelism",
    "tensor_parallel": "tensor parallelism",
    "sequence_parallel_size": "sequence parallelism",
    "data_parallel_size": "sequence parallelism",
    "hybrid_engine": "the hybrid engine",
    "compression_training": "compression",
    "quantize_training": "quantized training",
    "data_efficiency": "curricula",
    "curriculum_learning": "curricula",
    "elasticity": "DeepSpeed's elasticity (a checkpoint goes on with any number of processes)",
    "autotuning": "autotuning",
    "progressive_layer_drop": "layer drop",
    "sparse_attention": "sparse attention",
    "eigenvalue": "eigenvalues",
    "checkpoint": "DeepSpeed's checkpoints (qvera writes its own)",
    "zero_allow_untested_optimizer": "another optimizer",
    "managed_gradient_accumulation": "accumulation by DeepSpeed",
}


IN_RAM_BELOW_BYTES = 2**20
"""A rank's share of a weight that is smaller than this stays in RAM where the base goes to NVMe (DeepSpeed's ``MIN_AIO_BYTES``)."""

_SPARE_BUFFERS = 4
"""DeepSpeed ends the run with an assertion where no buffer is free, and one more costs a few MB."""


_NOT_FROM_NVME = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")
"""With gradient checkpointing a weight stands twice in DeepSpeed's queue; the buffers are counted for weights that go after use."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What DeepSpeed's limits and buffers are set by: elements, as stored. 0 where it is not known yet, or not needed.

    Attributes:
        layer: of the largest decoder layer.
        weight: of the largest weight in the layers.
        weights: a count: of the weights of one layer, where it has most.
        kept_whole: of the longest vector and of the largest norm, which stay whole on every rank.
        trained: trained numbers in all.
    """

    layer: int = 0
    weight: int = 0
    weights: int = 0
    kept_whole: int = 0
    trained: int = 0


def nvme_buffers(weight_numel: int, weights: int, world_size: int) -> tuple[int, int]:
    """Elements of one buffer that shares on NVMe are read into, and how many there are.

    Each holds a rank's share of one weight, from the moment it is gathered until it is released; those of a recomputed layer are
    all kept until its backward pass has begun.

    Args:
        weight_numel, weights: as in `Sizes`.
    """
    return -(-max(weight_numel, 1) // world_size), weights + _SPARE_BUFFERS


@dataclasses.dataclass(frozen=True)
class ZeroConfig:
    """What a recipe's ``deepspeed`` key came to."""

    source: str
    """The word, or the file."""
    tree: dict[str, Any]
    """The file's content."""

    @property
    def stage(self) -> int:
        return int(self.tree["zero_optimization"]["stage"])

    @property
    def shards_base(self) -> bool:
        """Whether the frozen base is spread over the ranks (stage 3)."""
        return self.stage == 3

    @property
    def offload_device(self) -> str | None:
        """Where a rank's share of the base is kept: None (the device itself), ``cpu`` or ``nvme``."""
        device = (self.tree["zero_optimization"].get("offload_param") or {}).get("device", "none")
        return None if device == "none" else str(device)

    def nvme_folder(self, scratch: Path | None) -> Path | None:
        """Where a base that is kept on NVMe goes: what the file names, else ``scratch``; None for another device."""
        if self.offload_device != "nvme":
            return None
        named = self.tree["zero_optimization"]["offload_param"].get("nvme_path")
        return scratch if named is None else Path(named)

    def complete(
        self, recipe: Recipe, world_size: int, sizes: Sizes | None = None, scratch: Path | None = None
    ) -> dict[str, Any]:
        """DeepSpeed's whole configuration: this file with what the recipe says.

        Args:
            sizes: of the base and of what is trained.
            scratch: a directory for parameters offloaded to NVMe, where the file names none.
        """
        sizes = sizes or Sizes()
        tree = copy.deepcopy(self.tree)
        tree |= {
            "train_micro_batch_size_per_gpu": recipe.training.per_device_train_batch_size,
            # our loop counts passes itself: the last batch of an epoch has fewer, and the mean is over tokens
            "gradient_accumulation_steps": 1,
            "train_batch_size": recipe.training.per_device_train_batch_size * world_size,
            "gradient_clipping": recipe.training.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**62,
        }
        zero = tree["zero_optimization"]
        if sizes.trained:
            # each stage makes its bucket of that size, whatever there is to reduce: DeepSpeed's 5e8 are 2 GB on a GPU
            zero.setdefault("reduce_bucket_size", sizes.trained)
        if self.shards_base:
            # DeepSpeed's own limits (1e9 elements) keep a small model whole and two thirds of a 7B in 4 bits
            zero.setdefault("stage3_max_live_parameters", max(2 * sizes.layer, 1))
            zero.setdefault("stage3_max_reuse_distance", 0)
            # fetching ahead takes two layers, a buffer of another and, with gloo, a copy of that; measured: as much as the model
            zero.setdefault("stage3_prefetch_bucket_size", 0)
            # vectors are read by name and not by calling the module that owns them, so no hook would gather them
            zero["stage3_param_persistence_threshold"] = max(
                sizes.kept_whole, int(zero.get("stage3_param_persistence_threshold", 0))
            )
        if self.offload_device is not None:
            offload = zero["offload_param"]
            offload.setdefault("pin_memory", _has_cuda())
            if self.offload_device == "nvme":
                offload["nvme_path"] = str(self.nvme_folder(scratch))
                # DeepSpeed's own are of 1e8 elements, 200 MB each, and are locked into RAM whether they are used or not
                size, count = nvme_buffers(sizes.weight, sizes.weights, world_size)
                offload.setdefault("buffer_size", size)
                offload.setdefault("buffer_count", count)
        return tree


def read_config(key: str | None) -> ZeroConfig | None:
    """What ``deepspeed: KEY`` means; None for None.

    Raises:
        InputError: no such word or file, not JSON, a key that the recipe has too, or what it needs is not installed.
    """
    if key is None:
        return None
    path = _shipped(key) if key in STAGES else Path(key).expanduser()
    if path is None or not path.is_file():
        near = difflib.get_close_matches(key, STAGES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(f"deepspeed: takes one of {', '.join(STAGES)}, or a JSON file; {key!r} is neither.{hint}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"deepspeed: {path} can't be read as JSON: {error}.") from None
    config = _checked(tree, path, key)
    _check_installed(config)
    return config


def _shipped(word: str) -> Path | None:
    """A file of ds_configs/: from the installed package, or from the checkout."""
    package = Path(__file__).resolve().parent.parent
    found = (folder / "ds_configs" / f"{word}.json" for folder in (package, package.parent))
    return next((path for path in found if path.is_file()), None)


def _checked(tree: Any, path: Path, key: str) -> ZeroConfig:
    if not isinstance(tree, dict):
        raise InputError(
            f"deepspeed: {path} holds a {type(tree).__name__}; a DeepSpeed configuration is a JSON object."
        )
    for name in tree:
        if name in _IN_THE_RECIPE:
            raise InputError(
                f"deepspeed: {path} sets {name}, which belongs to the recipe: remove it there and set {_IN_THE_RECIPE[name]}."
            )
        if name in _NOT_HERE:
            raise InputError(
                f"deepspeed: {path} sets {name}; {_NOT_HERE[name]} is not something this loop does. Remove it."
            )
    zero: Any = tree.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise InputError(
            f"deepspeed: {path} has zero_optimization.stage {stage!r}, expected 1, 2 or 3. Without ZeRO leave the recipe's "
            "deepspeed key out: several processes then add up their gradients by themselves."
        )
    if zero.get("offload_optimizer") is not None:
        raise InputError(
            f"deepspeed: {path} sets zero_optimization.offload_optimizer; the optimizer's state of VeRA's vectors is a few MB, and "
            "its place is the device. Remove it."
        )
    parameters = zero.get("offload_param")
    if parameters is not None and (
        not isinstance(parameters, dict) or parameters.get("device") not in ("cpu", "nvme", "none")
    ):
        raise InputError(
            f"deepspeed: {path} has zero_optimization.offload_param {parameters!r}, expected an object with device cpu or nvme."
        )
    if parameters is not None and stage != 3:
        raise InputError(
            f"deepspeed: {path} offloads parameters in stage {stage}; only stage 3 shards them. Set stage 3."
        )
    for name in _NOT_FROM_NVME if parameters is not None and parameters["device"] == "nvme" else ():
        if zero.get(name):
            raise InputError(
                f"deepspeed: {path} sets zero_optimization.{name} for weights on NVMe. DeepSpeed would read a weight into two "
                "buffers, or keep more weights than there are buffers, and end with an assertion. Remove it."
            )
    return ZeroConfig(key, tree)


def _check_installed(config: ZeroConfig) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"deepspeed: {config.source} needs DeepSpeed, which is not installed (it is a dependency on Linux only). "
            "pip install deepspeed, or leave the key out."
        )
    if config.offload_device == "nvme":
        from qvera.distributed.zero_settings import nvme_problem

        problem = nvme_problem()
        if problem is not None:
            raise InputError(
                f"deepspeed: {config.source} keeps parameters on NVMe, which needs DeepSpeed's async_io: {problem}. Install libaio "
                "(Debian and Ubuntu: libaio-dev) with a C++ compiler and ninja, or use zero3 or zero3-offload-cpu."
            )


def check_optimizer(recipe: Recipe) -> None:
    """Raise InputError where the recipe's optimizer can't run under ZeRO."""
    if recipe.training.optim != "adamw":
        raise InputError(
            f"training.optim: {recipe.training.optim} keeps its state in blocks that ZeRO would cut elsewhere with every other "
            "number of processes. With a deepspeed key use adamw; VeRA's whole optimizer state is a few MB."
        )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
