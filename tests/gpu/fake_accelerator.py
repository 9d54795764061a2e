"""A GPU that is not there: the real code on tensors without data, with every kernel, byte and host sync recorded.

Tensors say that they are on ``fakegpu:0``, `torch.accelerator` finds it, and autograd runs. So a training step of a 70B
takes seconds and no memory, and it takes the path that a card would take. A tensor that was left on the CPU raises; what
makes the host wait for the device is recorded by the name of the function that asked for it.

The backend can't be unregistered, so it has to be used in a process of its own. A test calls `measured`, which starts
one; a script needs no more than the context::

    with FakeAccelerator() as fake:
        session = fake.session("8b", rows=[2048, 2048], rank=256, layers=2, gradient_checkpointing=True)
        session.train_step()  # the first one makes the optimizer's state
        with fake.record() as seen:
            session.train_step()
    seen.kernels        # name → launches: views, empty tensors and questions about a tensor do not count
    seen.syncs          # "training.engine.step: float" → how often the host waited
    seen.peak_bytes     # of tensors on the device at one time, with all that was there before
    seen.timeline       # every `Moment`, in order
    seen.peaks          # the `Moment` with the most bytes in each part of a step

Kernels of one layer: forward is `qvera.models.forward.batch_nll`, backward ``session.engine.backward``; what one
layer takes is the difference between a model of two layers and one of one (`per_layer`). A custom operator counts as one
launch, unless `LAUNCHES` says otherwise. Bytes against a plan: ``seen.timeline`` and ``seen.peak_bytes`` of a whole model
(a 70B takes some 20 s of one core), or of few layers where a figure is linear; ``session.base_bytes`` is what is alive once the base
and the adapter are loaded. For anything but a training step, call the real functions with ``session.model``, or with
`FakeAccelerator.model` (a base without an adapter), inside `record`.

What it can't show: the allocator's rounding and fragmentation, memory that a kernel takes for itself (but for those in
tests/live_bytes.py), values, and time.
Every number that the host reads is 1, and True (`FakeAccelerator.answer`). Attention is the one that CUDA would choose: flash where there is no
mask, else the memory-efficient one. The optimizer's and clipping's passes over all vectors are launched vector by vector
here, in groups on a card.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple, Self
from unittest import mock

import bitsandbytes as bnb
import numpy as np
import safetensors.numpy
import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import qvera
from qvera.adapters import adapter_file, projection
from qvera.config.schema import Recipe, parse_recipe
from qvera.data import Example
from qvera.distributed.group import ALONE
from qvera.kernels import choice
from qvera.models import attention, forward, linear, loss
from qvera.models.loader import Base
from qvera.training.loop import AloneLoop
from qvera.training.session import TrainingSession
from tests.live_bytes import LiveBytes

TYPE = "fakegpu"
aten = torch.ops.aten

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "34b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64,
            "num_key_value_heads": 8},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
}  # fmt: skip
"""Llama 2 7B, 13B and 70B, Llama 3 8B, Code Llama 34B."""

_NO_KERNEL = {
    "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided", "aten.detach",
    "aten.lift_fresh", "aten._unsafe_view", "aten.is_pinned", "aten._local_scalar_dense", "aten.set_", "aten.alias",
}  # fmt: skip

LAUNCHES = {"qvera.vector_gradients": 2, "qvera.scaled_columns_backward": 2}
"""Our operators that start more than one kernel."""


class Moment(NamedTuple):
    """A kernel, and the bytes of tensors on the device while it runs."""

    kernel: str
    alive_bytes: int
    part: str  # forward, loss or backward


@dataclasses.dataclass
class Seen:
    """What happened on the device within a `FakeAccelerator.record`."""

    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    copies: Counter[str] = dataclasses.field(default_factory=Counter)
    """``to device`` and ``to host`` → how often."""
    syncs: Counter[str] = dataclasses.field(default_factory=Counter)
    timeline: list[Moment] = dataclasses.field(default_factory=list)
    start_bytes: int = 0
    end_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes of tensors at one time."""
        return max((moment.alive_bytes for moment in self.timeline), default=self.start_bytes)

    @property
    def peaks(self) -> dict[str, Moment]:
        """The moment with the most bytes in each part of the step."""
        found: dict[str, Moment] = {}
        for moment in self.timeline:
            if moment.part not in found or moment.alive_bytes > found[moment.part].alive_bytes:
                found[moment.part] = moment
        return found

    @property
    def launches(self) -> int:
        """How many kernels were launched."""
        return self.kernels.total()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the timeline."""
        counts = {"kernels": dict(self.kernels), "copies": dict(self.copies), "syncs": dict(self.syncs)}
        return {**counts, "launches": self.launches, "peak_bytes": self.peak_bytes, "end_bytes": self.end_bytes}


def per_layer(two: Seen, one: Seen) -> Counter[str]:
    """Kernels that one layer adds: those of a model of two layers less those of one layer."""
    return two.kernels - one.kernels


def _no_values(rows: int, columns: int, seed: int, stream: int) -> np.ndarray:
    return np.zeros((rows, columns), dtype=np.float32)


_torch_attention = nn.functional.scaled_dot_product_attention


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that CUDA chooses; left alone torch takes the mathematical form on a backend it does not know."""
    if query.device.type != TYPE:
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    is_ampere = torch.bfloat16 in torch.get_device_module(TYPE).get_amp_supported_dtype()  # or newer
    if attn_mask is None and query.dtype.itemsize == 2 and is_ampere:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is None and enable_gqa:  # no fast kernel has groups in fp32
        return aten._scaled_dot_product_attention_math(
            query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
    if enable_gqa:  # the memory-efficient kernel has no groups
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    mask = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], key.shape[-2])
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    needs_sum = torch.is_grad_enabled() and query.requires_grad
    found = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, needs_sum, dropout_p, is_causal, scale=scale
    )
    return found[0]


def _load_file(path: Path) -> dict[str, torch.Tensor]:
    """As safetensors', which builds tensors in a way that the fake mode does not know."""
    return {name: torch.from_numpy(array) for name, array in safetensors.numpy.load_file(path).items()}


def _on_device(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor` and its like for a device that has no memory: made on the CPU, then copied, as elsewhere."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != TYPE:
            return make(data, *args, device=device, **kwargs)
        return make(data, *args, **kwargs).to(device)

    return made


def _is_not_fake(_: object) -> bool:
    """In the place of transformers' own: a MagicMock would remember tensors, and keep them alive."""
    return False


class _Recorder(TorchDispatchMode):
    """Sees every operator before the fake mode does."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = LiveBytes()
        self.seen: Seen | None = None
        self._pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._last_list: tuple[int, int, int] | None = None
        self.in_loss = False
        self.answers: list[bool] = []
        self.numbers: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func is aten.is_pinned.default:
            return args[0].untyped_storage() in self._pinned
        if func is aten._pin_memory.default:
            pinned = torch.empty_like(args[0])
            self._pinned.add(pinned.untyped_storage())
            return pinned
        name = str(func.overloadpacket)
        if name == "aten.empty" and kwargs.get("pin_memory"):
            pinned = func(*args, **{**kwargs, "pin_memory": False})
            self._pinned.add(pinned.untyped_storage())
            return pinned
        if name == "aten.nonzero":
            self._sync("nonzero")
            out = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
            self._count(name, self.alive.now)
            return out
        moved = self._moves(name, func, args, kwargs)
        out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for tensor in outputs:
            if tensor.device.type == TYPE:
                self.alive.add(tensor)
        if kwargs.get("pin_memory"):
            self._pinned.update(t.untyped_storage() for t in outputs)
        on_device = any(t.device.type == TYPE for t in outputs) or any(
            isinstance(t, torch.Tensor) and t.device.type == TYPE for t in tree_leaves((args, kwargs))
        )
        if on_device and moved is None and name not in _NO_KERNEL and not func.is_view:
            self._count(name, self.alive.while_running(func, args, out))
        return out

    def _count(self, name: str, alive_bytes: int) -> None:
        if self.seen is not None:
            self.seen.kernels[name] += LAUNCHES.get(name, 1)
            self.seen.timeline.append(Moment(name, alive_bytes, self._part()))

    def _part(self) -> str:
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        return "loss" if self.in_loss else "forward"

    def _moves(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """``to device``, ``to host`` or None; a copy that the host waits for is a sync."""
        if name == "aten._to_copy":
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            waits = not kwargs.get("non_blocking", False)
        elif name == "aten.copy_":
            source, target = args[1], args[0].device
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            return None
        if source.device.type == target.type:
            return None
        direction = "to device" if target.type == TYPE else "to host"
        source.constant = None  # else the fake mode computes with what it knows of small tensors
        if not source.numel():  # nothing to copy
            return direction
        if direction == "to device" and source.untyped_storage() not in self._pinned:
            waits = True  # pageable memory is copied while the host waits
        if self.seen is not None:
            self.seen.copies[direction] += 1
        if waits:
            self._sync(f"copy {direction}")
        return direction

    def _number(self, tensor: torch.Tensor) -> Any:
        """The one number of a tensor: on the CPU as far as it is known, on the device a sync and any number, or a given one."""
        if tensor.device.type == TYPE:
            self._sync("number", tensor)
        constant = getattr(tensor, "constant", None)
        if constant is not None:
            with torch._C._DisableTorchDispatch():
                return constant.item()
        if tensor.dtype == torch.bool:
            return self.answers.pop(0) if self.answers else True
        if tensor.dtype.is_floating_point:
            return 1.0
        return self.numbers.pop(0) if self.numbers else 1

    def _sync(self, what: str, tensor: torch.Tensor | None = None) -> None:
        if self.seen is None:
            return
        frame: FrameType | None = sys._getframe(1)
        named = asks = None
        while frame is not None and named is None:
            if frame.f_code.co_name == "tolist" and "fake_tensor" in frame.f_code.co_filename:
                asks = frame  # of several dimensions: the outermost
            if str(_PACKAGE) in frame.f_code.co_filename:
                named = frame
            frame = frame.f_back
        found = None
        if asks is not None and tensor is not None:  # no frame is kept: it would keep tensors alive
            what, found = "list", (id(asks), int(tensor.untyped_storage()._cdata), int(tensor.storage_offset()))
            # One list is one copy, however many numbers. A later list may have the same addresses, and begins anew.
            if self._last_list is not None and found[:2] == self._last_list[:2] and found[2] > self._last_list[2]:
                self._last_list = found
                return
        self._last_list = found
        if named is None:
            self.seen.syncs[f"outside of qvera: {what}"] += 1
            return
        module = ".".join(Path(named.f_code.co_filename).relative_to(_PACKAGE).with_suffix("").parts)
        self.seen.syncs[f"{module}.{named.f_code.co_name}: {what}"] += 1


_PACKAGE = Path(qvera.__file__).parent


class FakeAccelerator:
    """A context in which `torch.accelerator` finds ``fakegpu`` and tensors have no data. One for a process."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(TYPE)
        # left alone torch takes this operator apart on a backend it does not know; it never runs
        self._kernels = torch.library.Library("aten", "IMPL")
        self._kernels.impl("silu_backward", lambda grad, x: torch.empty_like(x), "PrivateUse1")
        self.device = torch.device(TYPE, 0)
        module: Any = torch.get_device_module(TYPE)
        module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
        self._stack.enter_context(mock.patch.object(choice, "switch", "on"))  # triton finds no card here
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        self._recorder = self._stack.enter_context(_Recorder())
        self._stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention))
        self._stack.enter_context(mock.patch.object(forward, "target_loss", self._loss))
        # A and B have no values here, and drawing them takes seconds
        self._stack.enter_context(mock.patch.object(projection, "uniform_matrix", _no_values))
        self._stack.enter_context(mock.patch.object(adapter_file, "load_file", _load_file))
        for name in ("tensor", "as_tensor"):
            self._stack.enter_context(mock.patch.object(torch, name, _on_device(getattr(torch, name))))
        # else transformers takes another path, as when it exports a model
        self._stack.enter_context(mock.patch("transformers.utils.import_utils.is_fake_tensor", _is_not_fake))
        self.scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        gc.freeze()  # what is imported by now: each `record` collects, and a collection of all takes a second
        self._stack.callback(gc.unfreeze)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _loss(self, *arguments: Any, **named: Any) -> Any:
        self._recorder.in_loss = True
        try:
            return loss.target_loss(*arguments, **named)
        finally:
            self._recorder.in_loss = False

    def answer(self, *answers: bool) -> None:
        """Let the device give these answers to the next questions of yes or no; to all others it says yes."""
        self._recorder.answers = list(answers)

    def count(self, *numbers: int) -> None:
        """Let these be the next whole numbers that the host reads of the device; all others are 1."""
        self._recorder.numbers = list(numbers)

    @property
    def alive_bytes(self) -> int:
        """Bytes of all tensors on the device now."""
        return self._recorder.alive.now

    @contextlib.contextmanager
    def record(self) -> Iterator[Seen]:
        """A context whose kernels, copies, syncs and bytes are recorded; not nested."""
        gc.collect()  # what is freed in the middle of the record would seem to have made room
        seen = self._recorder.seen = Seen(start_bytes=self.alive_bytes)
        try:
            yield seen
        finally:
            self._recorder.seen = None
            seen.end_bytes = self.alive_bytes

    def model(self, shape: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
        """The base of a shape as `qvera.models.loader.load_base` leaves it: NF4 with double quantization, frozen.

        Embedding, head and norms are in ``dtype``, which is the compute dtype. ``layers``: so many, not all.
        """
        settings = {**SHAPES[shape], **({} if layers is None else {"num_hidden_layers": layers})}
        config = LlamaConfig(**settings, max_position_embeddings=131072, attn_implementation="sdpa")
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        head = model.get_output_embeddings()
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and child is not head:
                    setattr(module, name, self._four_bit(child, dtype))
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(self._empty(parameter.shape, parameter.dtype), requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                moved = self._empty(buffer.shape, buffer.dtype)
                for held in [k for k, value in vars(module).items() if value is buffer]:
                    setattr(module, held, moved)  # rotary embeddings keep a second name
                setattr(module, name, moved)
        model.eval()
        linear.freeze_linears(model)
        model.set_attn_implementation(attention.VARLEN)  # the loader tries the kernel first, which needs values
        return model

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def _four_bit(self, dense: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """A `bitsandbytes.nn.Linear4bit` made by hand: its own weight class can't wrap a fake tensor."""
        blocks = math.ceil(dense.weight.numel() / 64)
        float32 = torch.float32
        nested = bnb.functional.QuantState(
            absmax=self._empty([math.ceil(blocks / 256)], float32), code=self._empty([256], float32), blocksize=256,
            dtype=float32,
        )  # fmt: skip
        state = bnb.functional.QuantState(
            absmax=self._empty([blocks], torch.uint8), shape=dense.weight.shape, code=self._empty([16], float32),
            blocksize=64, quant_type="nf4", dtype=dtype, offset=self._empty([], float32), state2=nested,
        )  # fmt: skip
        layer = bnb.nn.Linear4bit.__new__(bnb.nn.Linear4bit)
        nn.Module.__init__(layer)
        packed: Any = nn.Parameter(self._empty([dense.weight.numel() // 2, 1], torch.uint8), requires_grad=False)
        packed.quant_state, packed.bnb_quantized = state, True
        packed.blocksize, packed.quant_type, packed.compress_statistics = 64, "nf4", True
        packed.quant_storage, packed.module = torch.uint8, layer
        layer.in_features, layer.out_features = dense.in_features, dense.out_features
        layer.weight, layer.bias = packed, None
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        layer.quant_state, layer.quant_storage = state, torch.uint8
        layer.support_avx512bf16_for_cpu = layer.enable_optimized_cpu = False
        return layer

    def session(
        self,
        shape: str,
        rows: Sequence[int],
        *,
        rank: int = 256,
        layers: int | None = None,
        prompt_tokens: int = 0,
        adapter: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        **training: Any,
    ) -> FakeSession:
        """A training of that shape with the rows of one step, ready for `AloneLoop.train_step`.

        Args:
            rows: the tokens of each row of the step's global batch; one forward pass takes all of them.
            prompt_tokens: so many at the start of each row are not trained.
            adapter, data, training: keys of those sections of the recipe.
        """
        sections = {
            "model": {"path": str(self.scratch / "base"), "compute_dtype": "bfloat16"},
            "adapter": {"rank": rank, **(adapter or {})},
            "data": {"path": str(self.scratch / "rows.jsonl"), "max_length": max(rows), "prefix_once": False,
                     "shuffle": False, **(data or {})},
            "training": {"max_steps": 10, "global_batch_size": len(rows), "per_device_train_batch_size": len(rows),
                         "report_to": [], **training},
        }  # fmt: skip
        base = self.scratch / "base"
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text("{}")
        for file in (base / "model.safetensors", self.scratch / "rows.jsonl"):
            file.touch()  # a run looks for its files before anything else; nobody reads these
        return FakeSession(self, parse_recipe(sections, "fake recipe"), shape, layers, make_rows(rows, prompt_tokens))


def make_rows(lengths: Sequence[int], prompt_tokens: int = 0) -> list[Example]:
    """Rows of so many tokens; the first token of a row is never trained, nor are those of its prompt."""
    examples = []
    for number, tokens in enumerate(lengths):
        ids = (np.arange(tokens, dtype=np.int32) * 7 + number) % 1000 + 3
        trained = np.arange(tokens) >= max(prompt_tokens, 1)
        examples.append(Example(ids, trained, f"row {number}", ids[:prompt_tokens], "", "right"))
    return examples


class FakeTokenizer:
    """What generation asks of a tokenizer."""

    pad_token_id, eos_token_id, unk_token_id, chat_template = 0, 2, None, None

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[None]:
        return [None] * len(tokens)

    def batch_decode(self, ids: list[list[int]], **_: object) -> list[str]:
        return [""] * len(ids)


class FakeSession(TrainingSession):
    """`TrainingSession` on a fake base: all but reading rows, planning memory and loading weights is the real thing."""

    def __init__(
        self, fake: FakeAccelerator, recipe: Recipe, shape: str, layers: int | None, rows: list[Example]
    ) -> None:
        super().__init__(recipe, fake.scratch, ALONE, Console(quiet=True))
        self._fake, self._wanted = fake, (shape, layers)
        datasets: Any = SimpleNamespace(train=rows, eval=rows, pad_id=0)
        self.datasets = datasets
        self.load_model()
        self.base_bytes = fake.alive_bytes
        self.loop = AloneLoop(self)
        self.loop.start()
        self.engine, self.optimizer, self.nll = self.loop.engine, self.loop.optimizer, self.loop.nll
        self.train_step = self.loop.train_step
        self.model.train()  # as the trainer does; layers recompute only in this mode

    def _load_base(self, *_: object) -> Base:
        tokenizer: Any = FakeTokenizer()
        return Base(self._fake.model(*self._wanted), tokenizer, {"dense_matrices": {}})

    def _plan_memory(self) -> None:
        """No plan: memory has no end here, and ``gradient_checkpointing: auto`` is true."""
        asked = self.recipe.training.gradient_checkpointing
        self.checkpointing = True if asked == "auto" else asked
