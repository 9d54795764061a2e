"""DeepSpeed ZeRO: the recipe's ``deepspeed`` key, a word or a file, and the parameters that ZeRO-3 shards over ranks.

Batch size, precision, accumulation, clipping, schedule and optimizer come from the recipe; a file that sets one of them
is refused. Only this module changes settings of other libraries, where they have no option for it: DeepSpeed's log
level and one of its switches, and how malloc returns memory on a CPU under ZeRO-3. Without ZeRO nothing here imports
DeepSpeed or does anything.
"""

import contextlib
import ctypes
import dataclasses
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field, Strict, ValidationError
from torch import nn

from qvera.config.fields import Section, key_problems
from qvera.config.schema import Recipe
from qvera.config.sections import TrainingSection
from qvera.utils import accelerator
from qvera.utils.errors import InputError, did_you_mean, first_line
from qvera.utils.files import read_json, resolve_path

STAGES = ("zero1", "zero2", "zero3", "zero3-offload-cpu", "zero3-offload-nvme")

_RECIPE_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size (accumulation follows from it)",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optim and training.learning_rate",
    "scheduler": "training.lr_scheduler_type and training.warmup_ratio",
    "fp16": "model.compute_dtype: float16",
    "bf16": "model.compute_dtype: bfloat16",
    "bfloat16": "model.compute_dtype: bfloat16",
    "amp": "model.compute_dtype",
    "torch_autocast": "model.compute_dtype",
    "activation_checkpointing": "training.gradient_checkpointing",
    "tensorboard": "training.report_to",
    "wandb": "training.report_to",
    "comet": "training.report_to",
    "seed": "training.seed",
}
"""DeepSpeed's key → what to set in the recipe instead."""

_UNSUPPORTED = (
    "pipeline", "tensor_parallel", "sequence_parallel_size", "data_parallel_size", "hybrid_engine",
    "compression_training", "quantize_training", "data_efficiency", "curriculum_learning", "elasticity",
    "autotuning", "progressive_layer_drop", "sparse_attention", "eigenvalue", "checkpoint", "steps_per_print",
    "csv_monitor", "data_types", "communication_data_type", "seq_parallel_communication_data_type",
    "zero_allow_untested_optimizer", "managed_gradient_accumulation",
)  # fmt: skip
"""DeepSpeed's keys for what this training loop does not do, or always does in one way."""

IN_RAM_BELOW_BYTES = 2**20
"""With the base on NVMe, smaller shards of weights stay in RAM (DeepSpeed's ``MIN_AIO_BYTES``)."""

_SPARE_BUFFERS = 4
"""DeepSpeed fails an assertion when no buffer is free, and one more costs a few MB."""

_NOT_WITH_NVME = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")
"""The buffers are counted for weights that go after use. With gradient checkpointing a weight is queued twice."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes behind DeepSpeed's limits and buffers, in elements of tensors as they are stored. 0: not known."""

    largest_layer: int = 0  # the largest decoder layer
    largest_weight: int = 0  # the largest weight in the layers
    weights_per_layer: int = 0  # how many weights the layer with the most of them has
    unsharded: int = 0  # the longest vector or norm: they stay whole on every rank
    trained: int = 0  # trained parameters in all


def nvme_buffers(largest_weight: int, weights_per_layer: int, world_size: int) -> tuple[int, int]:
    """Return the elements of one buffer for shards from NVMe, and the number of buffers. Arguments as in `Sizes`."""
    # the shards of a recomputed layer are all held until its backward pass has begun
    return -(-max(largest_weight, 1) // world_size), weights_per_layer + _SPARE_BUFFERS


class _DeepSpeedKeys(Section):
    model_config = ConfigDict(extra="allow")


class _OffloadParam(_DeepSpeedKeys):
    device: Literal["cpu", "nvme", "none"]
    nvme_path: str | None = None


class _ZeroOptimization(_DeepSpeedKeys):
    stage: Annotated[int, Strict(), Field(ge=1, le=3)]
    offload_param: _OffloadParam | None = None


class ZeroConfig(_DeepSpeedKeys):
    """The DeepSpeed configuration of a recipe's ``deepspeed`` key."""

    zero_optimization: _ZeroOptimization

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for keys that the recipe sets, that are not supported, or that do not fit the stage."""
        for name in self.model_extra or {}:
            if name in _RECIPE_KEYS:
                yield name, f"belongs to the recipe: remove it there and set {_RECIPE_KEYS[name]}."
            elif name in _UNSUPPORTED:
                yield name, "is not supported by this training loop. Remove it."
        zero, others = self.zero_optimization, self.zero_optimization.model_extra or {}
        found: dict[str, str] = {}
        if self.offload_device == "nvme":
            text = "is not possible for weights on NVMe: DeepSpeed would run out of buffers. Remove it."
            found |= {name: text for name in _NOT_WITH_NVME if others.get(name)}
        if others.get("offload_optimizer") is not None:
            found["offload_optimizer"] = (
                "the optimizer's state of VeRA's vectors is a few MB and stays on the device. Remove it."
            )
        if zero.offload_param is not None and self.stage != 3:
            found["offload_param"] = (
                f"offloads parameters in stage {self.stage}; only stage 3 shards them. Set stage 3."
            )
        text = "is 'auto', which transformers' Trainer would fill in. Remove it: qvera computes what it needs."
        found |= {name: text for name in others if others[name] == "auto"}
        yield from ((f"zero_optimization.{name}", text) for name, text in found.items())

    @property
    def stage(self) -> int:
        """The stage of ZeRO: 1 and 2 shard the optimizer's state, 3 shards the frozen base too."""
        return self.zero_optimization.stage

    @property
    def shards_base(self) -> bool:
        """Whether each rank holds only a shard of the frozen base (stage 3)."""
        return self.stage == 3

    @property
    def offload_device(self) -> str | None:
        """The place of a rank's shard of the base: ``cpu``, ``nvme``, or None for the device itself."""
        offload = self.zero_optimization.offload_param
        return None if offload is None or offload.device == "none" else offload.device

    def nvme_folder(self, scratch: Path) -> Path | None:
        """Return the folder of a base on NVMe: the file's own, else ``scratch``. None if it is not on NVMe."""
        offload = self.zero_optimization.offload_param
        if offload is None or offload.device != "nvme":
            return None
        return Path(offload.nvme_path or scratch)

    def complete(self, training: TrainingSection, world_size: int, sizes: Sizes, scratch: Path) -> dict[str, dict]:
        """Return DeepSpeed's whole configuration: this file, and the recipe's batch size and clipping."""
        tree = self.model_dump(exclude_unset=True) | {
            "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
            # our loop counts passes itself: the last batch of an epoch has fewer, and the mean is over tokens
            "gradient_accumulation_steps": 1,
            "train_batch_size": training.per_device_train_batch_size * world_size,
            "gradient_clipping": training.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**62,
        }
        zero = tree["zero_optimization"]
        if sizes.trained:
            # each stage makes its bucket of that size, whatever there is to reduce: DeepSpeed's 5e8 are 2 GB on a GPU
            zero.setdefault("reduce_bucket_size", sizes.trained)
        if self.shards_base:
            # DeepSpeed's own are the blocks of some mixtures, which it would gather whole, with all of their experts
            zero.setdefault("leaf_module", {"classes": []})
            # An accelerator gathers the next layer while one computes. On a CPU that hides nothing, and takes two
            # layers, a buffer of another and gloo's copy of that: as much as a small model.
            ahead = accelerator.is_available() and self.offload_device != "nvme"
            zero.setdefault("stage3_prefetch_bucket_size", sizes.largest_layer if ahead else 0)
            # DeepSpeed's own limits (1e9 elements) keep a small model whole and two thirds of a 7B in 4 bits
            zero.setdefault("stage3_max_live_parameters", max((3 if ahead else 2) * sizes.largest_layer, 1))
            zero.setdefault("stage3_max_reuse_distance", 0)
            # vectors are read by name and not by calling the module that owns them, so no hook would gather them
            key = "stage3_param_persistence_threshold"
            zero[key] = max(sizes.unsharded, int(zero.get(key, 0)))
        if self.offload_device is not None:
            offload = zero["offload_param"]
            offload.setdefault("pin_memory", accelerator.is_available())
            if self.offload_device == "nvme":
                offload["nvme_path"] = str(self.nvme_folder(scratch))
                # DeepSpeed's own are of 1e8 elements, 200 MB each, and are locked into RAM whether they are used or not
                size, count = nvme_buffers(sizes.largest_weight, sizes.weights_per_layer, world_size)
                offload.setdefault("buffer_size", size)
                offload.setdefault("buffer_count", count)
        return tree


def zero_config_of(recipe: Recipe) -> ZeroConfig | None:
    """Return the settings of a recipe's ``deepspeed`` key, or None. Raises InputError if other keys exclude them."""
    config = None if recipe.deepspeed is None else load_zero_config(recipe.deepspeed)
    if config is None or not config.shards_base:
        return config
    if recipe.model.resident is True:
        raise InputError("model.resident: ZeRO-3 shards the weights that this keeps copies of; remove one of the two.")
    if recipe.model.stream is True:
        raise InputError("model.stream: ZeRO-3 brings the layers to the GPU itself; remove one of the two.")
    if recipe.model.added_tokens:
        raise InputError(
            "model.added_tokens: ZeRO-3 divides the embedding among the ranks while it is read, and can't give it more "
            "rows. Use tokens that the model has, or deepspeed: zero1 or zero2, or none."
        )
    if recipe.training.torch_compile:
        raise InputError(
            "training.torch_compile: ZeRO-3 gathers weights between a layer's parts; remove one of the two."
        )
    if (objective := recipe.training.objective) != "sft":
        raise InputError(
            f"deepspeed: {recipe.deepspeed} shards the base (ZeRO-3), which is not built for training.objective: "
            f"{objective}; use zero1, zero2 or none."
        )
    return config


def load_zero_config(key: str) -> ZeroConfig:
    """Return the settings that ``deepspeed: KEY`` stands for. Raises InputError for a wrong key, file or machine."""
    places = [Path(resolve_path(key))]
    if key in STAGES:  # in the installed package, or in the checkout
        package = Path(__file__).resolve().parents[1]
        places = [folder / "ds_configs" / f"{key}.json" for folder in (package, package.parent)]
    path = next(filter(Path.is_file, places), None)
    if path is None:
        hint = did_you_mean(key, STAGES)
        raise InputError(f"deepspeed: takes one of {', '.join(STAGES)}, or a JSON file, and {key!r} is neither{hint}")
    tree = read_json(path, "the DeepSpeed configuration of the recipe's deepspeed key")
    try:
        config = ZeroConfig.model_validate(tree)
    except ValidationError as error:
        found = " ".join(f"{name}: {sentence}" for name, sentence in key_problems(error, ZeroConfig))
        hint = "Without ZeRO leave the recipe's deepspeed key out." if "zero_optimization.stage" in found else ""
        raise InputError(f"deepspeed: {path}: {found} {hint}".rstrip()) from None
    if config.offload_device == "nvme":
        require_deepspeed(key)
        if (problem := nvme_problem()) is not None:
            raise InputError(
                f"deepspeed: {key} keeps parameters on NVMe, which needs DeepSpeed's async_io: {problem}. Install "
                "libaio (Debian and Ubuntu: libaio-dev) with a C++ compiler and ninja, or use zero3 or "
                "zero3-offload-cpu."
            )
    return config


_M_MMAP_THRESHOLD = -3  # of malloc.h
_LONGEST_BUILD_SECONDS = 1800  # async_io took 4 minutes of one core, 8 on a busy machine


def deepspeed_module() -> ModuleType:
    """Return DeepSpeed, set up in the process group of this run. A process on its own gets a group of one."""
    os.environ.setdefault("LOCAL_RANK", "0")  # zero.Init reads it, and a process on its own may have none
    if not dist.is_initialized():
        # It stays: DeepSpeed keeps its groups for as long as the process lives, and a second run must find them.
        dist.init_process_group(accelerator.collective_backend(), store=dist.HashStore(), rank=0, world_size=1)
    deepspeed = _imported()
    if not deepspeed.comm.is_initialized():  # else its configuration counts one process, whatever torch says
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def require_deepspeed(word: str) -> None:
    """Raise InputError if DeepSpeed can't be imported. ``word`` is the recipe's ``deepspeed`` key."""
    try:
        _imported()
    except Exception as error:  # it probes compilers and CUDA when it is imported, and what fails there is up to them
        advice = (
            "DeepSpeed before 0.19.5 needs CUDA's compiler nvcc where there is a GPU: install a newer one, or set "
            "CUDA_HOME to a CUDA toolkit"
        )
        if isinstance(error, ModuleNotFoundError):
            advice = "Install it with `pip install deepspeed`"
        raise InputError(
            f"deepspeed: {word} needs DeepSpeed, which can't be imported: {first_line(error)} {advice}, or leave the "
            "key out: without it several processes share the gradients only."
        ) from None


def _imported() -> ModuleType:
    import deepspeed

    # it calls torch's collectives by names that torch 2.13 warns about, at every layer
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its progress notes would drown ours
    # A shared-memory all-reduce for CPU inference is compiled (20 s) whenever DeepSpeed meets a process group, and
    # without a compiler that is fatal; training does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def return_buffers_at_once() -> None:
    """Let malloc take each buffer of 1 MB or more from the system, and return it when it is freed.

    glibc's own threshold rises to 32 MB. Weights that ZeRO-3 gathers on a CPU come from gloo's threads, each with a
    heap of its own, and pile up there: 0.8 GB of a 7B after two steps.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 2**20)


def nvme_problem() -> str | None:
    """Return why DeepSpeed can't keep parameters on NVMe here; None if it can."""
    deepspeed = _imported()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        return "it can't be built here, since libaio is missing"
    compilers = ("c++", "g++", "clang++")
    can_build = shutil.which("ninja") is not None and any(map(shutil.which, compilers))
    if not can_build and not deepspeed.ops.__installed_ops__.get("async_io", False):
        return "it has to be built first, and there is no compiler or no ninja"
    lock = abandoned_build("async_io")
    if lock is not None:
        return f"a build of it was killed and left {lock}, for which every later one would wait; remove that file"
    return None


def abandoned_build(name: str) -> Path | None:
    """Return the lock of an extension whose build was killed: torch waits for it without end."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    # the lock names no process: one that is older than any build takes counts as abandoned
    for lock in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")):
        with contextlib.suppress(OSError):  # it has been removed meanwhile
            if time.time() - lock.stat().st_mtime > _LONGEST_BUILD_SECONDS:
                return lock
    return None


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a rank holds only its shard of this parameter. It is gathered while its module is called."""
    return hasattr(parameter, "ds_id")


def any_sharded(model: nn.Module) -> bool:
    """Whether all ranks have to run this model together."""
    return any(is_sharded(p) for p in model.parameters())


def whole_numel(parameter: torch.Tensor) -> int:
    """Return the elements of the whole parameter, over all ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make these parameters whole on every rank inside the block. All ranks have to come here."""
    # DeepSpeed gathers by itself what a module reads of another one, such as the device of Llama 4's embedding
    sharded = [p for p in parameters if is_sharded(p) and p.ds_status.name == "NOT_AVAILABLE"]  # type: ignore[attr-defined]
    if not sharded:
        yield
        return
    with deepspeed_module().zero.GatheredParameters(sharded):
        yield


def gather_at_call(module: nn.Module) -> None:
    """Let a module outside the DeepSpeed engine, such as the output head, gather its own weights when it is called."""
    blocks: list[contextlib.AbstractContextManager[None]] = []

    def before(*_: object) -> None:
        blocks.append(gathered(module.parameters(recurse=False)))
        blocks[-1].__enter__()

    def after(*_: object) -> None:
        blocks.pop().__exit__(None, None, None)

    if any(is_sharded(p) for p in module.parameters(recurse=False)):
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)


class BaseSharder:
    """Shards each big weight of the base as soon as it is read (`deepspeed.zero.Init`).

    A rank never holds more of the base than its shard and one whole tensor. DeepSpeed shards rank 0's bytes and sends
    them to the others, whose own copies only give the size. ``scratch`` is a directory of this run.
    """

    def __init__(self, config: ZeroConfig, recipe: Recipe, rank: int, world_size: int, scratch: Path) -> None:
        self.config, self.recipe, self.rank, self.world_size = config, recipe, rank, world_size
        self.scratch = Path(os.path.abspath(scratch))
        self.sizes = Sizes()
        self._first: dict[bool, nn.Parameter] = {}
        self.folder = config.nvme_folder(self.scratch)  # None: not on NVMe
        self.discard()  # removes the files of a run that was killed
        if not accelerator.is_available():
            return_buffers_at_once()

    def expect(self, largest_weight: int, weights_per_layer: int) -> None:
        """Set the sizes of the layers, as in `Sizes`, before the first weight comes."""
        self.sizes = Sizes(largest_weight=largest_weight, weights_per_layer=weights_per_layer)

    def __call__(self, weight: nn.Parameter, table: bool) -> None:
        """Replace a whole weight by this rank's shard, in place. All ranks have to come with the same one.

        ``table``: it is the input embedding or the head. Its shard stays in RAM when the layers go to NVMe: every
        buffer is as large as the largest weight there, and a table is twelve times the largest linear of a 7B. Raises
        InputError for a weight that goes to NVMe and is not bfloat16.
        """
        on_nvme = self.folder is not None
        table = table and on_nvme
        if on_nvme and not table and weight.dtype != torch.bfloat16:
            raise InputError(
                f"deepspeed: {self.recipe.deepspeed} reads weights through buffers of bfloat16, and "
                f"those of {self.recipe.model.path} are {str(weight.dtype).removeprefix('torch.')}. Set "
                "model.quant_storage: bfloat16, with a model.path that is stored in 16 bits, or use zero3-offload-cpu."
            )
        if table in self._first:
            # as one more of the weights that Init was given
            self._first[table].convert_to_zero_parameters(param_list=[weight])  # type: ignore[attr-defined]
            return
        holder = nn.Module()
        holder.weight = weight
        # the first weight of its kind: Init takes a module, so it gets one that holds this weight alone
        tree = self.config.complete(self.recipe.training, self.world_size, self.sizes, self.scratch)
        if table:
            offload = tree["zero_optimization"]["offload_param"]
            tree["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": offload["pin_memory"]}
        elif self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        deepspeed_module().zero.Init(
            module=holder,
            config_dict_or_path=tree,
            mem_efficient_linear=False,
            dtype=torch.bfloat16,  # of the buffers that a base on NVMe goes through; nothing is cast
        )
        self._first[table] = weight

    def discard(self) -> None:
        """Remove this rank's files on NVMe. The base can't be used after that."""
        if self.folder is None:
            return
        own = self.folder / "zero_stage_3" / "bfloat16params" / f"rank{self.rank}"  # as DeepSpeed's swapper names it
        shutil.rmtree(own, ignore_errors=True)
        with contextlib.suppress(OSError):  # another rank has files there, or has been faster
            for folder in own.parents[:2]:
                folder.rmdir()
            if self.folder == self.scratch:  # else it is the user's
                self.folder.rmdir()
                self.folder.parent.rmdir()  # of a run that has written nothing else
