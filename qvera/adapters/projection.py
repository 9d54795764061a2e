"""Seed → A, B: the frozen random pair that all layers of a model share (VeRA, arXiv 2310.11454, section 3.1).

Its numbers come from numpy's Philox 4x64-10, a counter-based generator whose integer stream numpy promises to keep.
Element (i, j) of a matrix (key ``[seed, stream]``; A is stream 0, B is stream 1) is word ``j mod 4`` of the block with
counter ``[j // 4 + 1, i, 0, 0]``, mapped to [-1, 1) by ``u = (w >> 40) * 2**-23 - 1``, which is exact in fp32. Hence a
seed gives the same values on every machine, and a pair for a smaller rank or layer is a prefix of a larger one.

The paper's Kaiming bounds, sqrt(6 / in_features) for A and sqrt(6 / rank) for B, are not in these values. Each layer
multiplies them into its d (`vera_scale`), so one pair serves layers of every shape.
"""

import functools
import hashlib
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qvera.adapters.products import functional
from qvera.utils.errors import InputError

GENERATOR = "philox4x64-10/u24"
"""The name of the rule above, in every adapter file. A changed rule needs a new name."""

Seeds: TypeAlias = int | tuple[int, ...]
"""One seed, or one for each phase of a run that draws its pairs anew."""

_STREAM_A, _STREAM_B = 0, 1
_STREAM_CHECKS = 4  # 2 and 3 are taken by plug-ins

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]
"""A [r, n] and B [m, r] of one linear."""


def vera_scale(rank: int, in_features: int) -> float:
    """sqrt(6 / in_features) * sqrt(6 / rank), the Kaiming-uniform bounds of A and B (VeRA, section 3.2) in one."""
    return math.sqrt(6.0 / in_features) * math.sqrt(6.0 / rank)


def uniform_matrix(rows: int, columns: int, seed: int, stream: int) -> np.ndarray:
    """The [rows, columns] fp32 matrix of a seed, uniform on [-1, 1).

    Args:
        stream: which of the seed's matrices: 0 and 1 are a pair's A and B, plug-ins have 2 and 3, checks 4.
    """
    out = np.empty((rows, columns), dtype=np.float32)
    # as uint64, since numpy would make float64 of a list in which one number needs the 64th bit, and round the seed
    key = np.array([seed, stream], dtype=np.uint64)
    for i in range(rows):
        words = np.random.Philox(counter=np.array([0, i, 0, 0], dtype=np.uint64), key=key).random_raw(columns)
        # 24 bits times 2**-23 minus 1 is exact in fp32, so no rounding mode can change a value
        out[i] = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return out


def uniform_pair(rank: int, in_features: int, out_features: int, seeds: Seeds) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, in_features] and B [out_features, rank] in fp32; several seeds share the rank equally."""
    chain = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    each = rank // len(chain)
    A = np.concatenate([uniform_matrix(each, in_features, seed, _STREAM_A) for seed in chain])
    return A, np.concatenate([uniform_matrix(out_features, each, seed, _STREAM_B) for seed in chain], axis=1)


@functools.lru_cache(maxsize=64)  # a thousand adapters on one base have only a few pairs among them
def projection_sha256(rank: int, in_features: int, out_features: int, seed: Seeds) -> str:
    """SHA-256 over the little-endian fp32 bytes of A [rank, in_features] and then B [out_features, rank]."""
    return pair_sha256(*uniform_pair(rank, in_features, out_features, seed))


def pair_sha256(A: np.ndarray, B: np.ndarray) -> str:
    """`projection_sha256` of an existing pair."""
    digest = hashlib.sha256()
    for matrix in (A, B):
        digest.update(np.ascontiguousarray(matrix, dtype="<f4").tobytes())
    return digest.hexdigest()


def require_sha256(wanted: str | None, found: str, seeds: Seeds) -> None:
    """Raise InputError if projections differ from those of training. ``wanted`` None: the config has no hash."""
    if wanted is not None and wanted != found:
        raise InputError(
            f"the projections of seed {seeds} have SHA-256 {found[:16]}… here and {wanted[:16]}… in the adapter: the "
            "file was changed, or made by another generator."
        )


class LastInput:
    """Remembers what was made of the last input x, for the layers that read the very same x (q, k, v; gate, up)."""

    def __init__(self) -> None:
        self._recent: tuple[weakref.ref[Tensor], object, Any] | None = None

    def get(self, x: Tensor, key: object, make: Callable[[], T]) -> T:
        """Return the value of ``make()`` for this x and ``key``, made anew unless the last call was for the same.

        The same means: this very tensor, unchanged, and the same backward pass or none.
        """
        # the number of the backward pass we are in, -1 outside: checkpointing itself tells its phases apart by it; a
        # checkpoint's recomputation must build its own
        key = key, x._version, torch._C._current_graph_task_id()
        recent = self._recent
        if recent is None or recent[0]() is not x or recent[1] != key:
            recent = self._recent = weakref.ref(x, self._forget_dead), key, make()
        return recent[2]

    def forget(self, *_: object) -> None:
        """Drop what was made."""
        self._recent = None

    def _forget_dead(self, dead: weakref.ref[Tensor]) -> None:
        if self._recent is not None and self._recent[0] is dead:
            self._recent = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_recent": None}  # a weak reference can't be copied to another process


class SharedInput(LastInput):
    """Shares z = x Aᵀ: autograd then adds up the ∂z of all layers before the one product of backward."""

    def project(self, x: Tensor, A: Tensor, dtype: torch.dtype, key: object = None) -> Tensor:
        """z = x Aᵀ [..., rank] in ``dtype``; ``key`` tells apart matrices A of one shape that may meet the same x."""
        # tensors of inference mode have no version, by which a change in place would show
        if torch.compiler.is_compiling() or x.is_inference():
            return functional.project(x.to(dtype), A.to(dtype))

        def make() -> Tensor:
            # once backward has come through, z's graph is spent: the next forward needs a new one
            return functional.project(x.to(dtype), A.to(dtype), self.forget)

        return self.get(x, (A.shape, key, dtype, x.requires_grad, torch.is_grad_enabled()), make)


class SharedProjection(nn.Module):
    """A [rank, in_features] and B [out_features, rank], of which every adapted layer reads a prefix.

    They are non-persistent buffers in the compute dtype, never trained. If the model is cast to another dtype, or
    leaves the meta device, they are drawn again, so they are always the seed's fp32 values, rounded once.
    """

    A: Tensor
    B: Tensor

    def __init__(self, seed: Seeds, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.seed = seed
        self.inputs = SharedInput()
        self._grams: dict[tuple[int, int], Tensor] = {}
        self._slices: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.register_buffer("A", torch.empty(0, 0, device=device, dtype=dtype), persistent=False)
        self.register_buffer("B", torch.empty(0, 0, device=device, dtype=dtype), persistent=False)

    def ensure(self, rank: int, in_features: int, out_features: int) -> None:
        """Grow the pair if it is too small for this rank and these layer sizes."""
        held = len(self.A), self.A.shape[1], len(self.B)
        wanted = max(rank, held[0]), max(in_features, held[1]), max(out_features, held[2])
        if wanted != held:
            self._draw(*wanted)

    def _draw(self, rank: int, in_features: int, out_features: int) -> None:
        self.inputs.forget()
        self._grams.clear()
        self._slices.clear()
        if self.A.is_meta:
            self.A, self.B = self.A.new_empty(rank, in_features), self.A.new_empty(out_features, rank)
        else:
            pair = uniform_pair(rank, in_features, out_features, self.seed)
            self.A, self.B = (torch.from_numpy(matrix).to(self.A) for matrix in pair)

    def slices(self, rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        """Views A [rank, in_features] and B [out_features, rank] for one layer."""
        tensors: Any = self._buffers  # to ask the module for them takes three times as long
        sizes, A, B = (rank, in_features, out_features), tensors["A"], tensors["B"]
        if torch.compiler.is_compiling():
            return A[:rank, :in_features], B[:out_features, :rank]
        held = self._slices.get(sizes)  # a view takes 2 µs
        # a move or a cast replaces the buffers, and the old views would go on reading the old ones
        if held is None or held[0] is not A or held[1] is not B:
            held = self._slices[sizes] = A, B, A[:rank, :in_features], B[:out_features, :rank]
        return held[2:]

    def project(self, x: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        """z = x Aᵀ [..., rank] in ``dtype``; layers that read the same x get the same tensor."""
        return self.inputs.project(x, self.slices(rank, x.shape[-1], 0)[0], dtype)

    def gram(self, rank: int, in_features: int) -> Tensor:
        """A Aᵀ [rank, rank] in fp32 or wider, cached for each rank and in_features."""
        key = rank, in_features
        if key not in self._grams:
            A = functional.at_least_fp32(self.A[:rank, :in_features])
            self._grams[key] = A @ A.t()
        return self._grams[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype, was_meta = self.A.dtype, self.A.is_meta
        self._grams.clear()
        self._slices.clear()

        def moved(tensor: Tensor) -> Tensor:
            # every layer names this module, so `to_empty` comes once a layer, and would empty what is drawn here
            found = fn(tensor)
            return found if tensor.is_meta else tensor.to(found)

        super()._apply(moved, recurse)
        if self.A.dtype != dtype or (was_meta and not self.A.is_meta):
            self._draw(len(self.A), self.A.shape[1], len(self.B))
        return self


def moved_weight_factor(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn`` of a tensor that was made from a base's weight. On the meta device there was none to make it from."""
    found = fn(tensor)
    if tensor.is_meta and not found.is_meta:
        raise RuntimeError("this adapter is made from its base's weights: load them before you add it")
    return found


class OwnProjection(nn.Module):
    """A frozen pair of one linear, in the compute dtype, as non-persistent buffers."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def slices(self, rank: int, in_features: int, out_features: int) -> Pair:
        """A [rank, in_features] and B [out_features, rank]."""
        return self.A[:rank, :in_features], self.B[:out_features, :rank]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(functools.partial(moved_weight_factor, fn), recurse)


def pair_number(B: Tensor) -> float:
    """p·B q with fixed random p and q, which identifies a linear's own pair. Rounding changes it by less than 0.01."""
    left, right = (torch.from_numpy(uniform_matrix(1, size, 0, _STREAM_CHECKS))[0].double() for size in B.shape)
    return round(float(left @ B.cpu().double() @ right), 6)


def same_pair(one: float, other: float) -> bool:
    """Whether two `pair_number` values mean the same pair, allowing for machines that round differently."""
    return abs(one - other) < 0.02


def require_same_pairs(found: Mapping[str, float], known: Mapping[str, float]) -> None:
    """Raise InputError if `pair_number` of a linear differs between the two; linears in only one are skipped."""
    for name in sorted(found.keys() & known.keys()):
        if not same_pair(found[name], known[name]):
            raise InputError(
                f"{name}: the A and B of this base's weight are not those that the adapter was trained with (their "
                f"number is {found[name]:.4f}, and was {known[name]:.4f}). Load the base as in training: the same "
                "weights, and the same model.quantization, model.double_quant and model.compute_dtype."
            )


def forget_inputs(model: nn.Module) -> None:
    """Drop each shared z of a forward pass, such as one that ended in an error."""
    for module in model.modules():
        if isinstance(module, SharedProjection):
            module.inputs.forget()
