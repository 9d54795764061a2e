"""VeRA (arXiv 2310.11454): ΔW = s diag(b) B diag(d) A diag(a), A and B random, frozen and shared by all linears.

b_groups and input_scale go beyond the paper. With ``magnitude`` it is DVoRA: the rows of the weight have trained norms
(DoRA, arXiv 2402.09353, equation 5), W' = diag(m / ‖W + ΔW‖) (W + ΔW). ‖W + ΔW‖ is a constant for the gradient (section
4.3). With a frozen A and ΔW = C A, C = diag(b) B diag(s d), it needs no weight:

    ‖w_i + δ_i‖² = ‖w_i‖² + 2 (W Aᵀ)_i · C_i + C_i (A Aᵀ) C_iᵀ
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.factors import Factors, no_zeros
from qvera.adapters.methods.base import Change, LinearSpec, Method, Shapes, Tensors, Traits
from qvera.adapters.products import functional
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair, moved_weight_factor, vera_scale
from qvera.distributed.zero import gathered
from qvera.kernels.low_rank import row_blocks, times_b
from qvera.models.linear import BLOCK_WEIGHTS, WeightBlocks

if TYPE_CHECKING:
    from qvera.adapters.methods.base import AdapterSettings


class Vera(Method):
    """d [rank], b [out_features] or [b_groups, out_features], and with input_scale a [in_features] for each linear."""

    # init_weights False starts b at 1 and d at random, as in PEFT's VeRA

    name = "vera"
    title = "VeRA"
    keys = {
        "b_groups": True, "input_scale": True, "magnitude": True, "d_initial": False, "train_d": False,
        "experts": True,
    }  # fmt: skip
    usual = {"adapter.rank": 256, "training.learning_rate": 4e-3}
    peft_type: ClassVar[str | None] = "VERA"

    def variant(self, adapter: AdapterSettings) -> Method:
        return _WITH_MAGNITUDE if adapter.magnitude else self

    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> Shapes:
        m, groups = spec.out_features, adapter.b_groups
        shapes: Shapes = {"qvera_b": (m,) if groups == 1 else (groups, m), "qvera_d": (adapter.rank,)}
        shapes |= {"qvera_a": (spec.in_features,)} if adapter.input_scale else {}
        if spec.experts and adapter.experts == "each":
            return {kind: (spec.experts, *shape) for kind, shape in shapes.items()}
        return shapes

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> Tensor:
        init = getattr(adapter, "init_weights", True)
        if name == "qvera_d" and not init:
            return torch.randn(shape)
        starts = {"qvera_b": 0.0 if init else 1.0, "qvera_d": adapter.d_initial}
        return torch.full(shape, starts.get(name, 1.0))

    def factors(self, adapter: AdapterSettings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        assert pair is not None
        d, b = at_least_fp32(tensors["qvera_d"]), at_least_fp32(tensors["qvera_b"])
        a, m = (at_least_fp32(tensors[name]) if name in tensors else None for name in ("qvera_a", "qvera_m"))
        return Factors(*pair, d, b, self.scale(adapter, spec), a, magnitude=m)

    def scale(self, adapter: AdapterSettings, spec: LinearSpec) -> float:
        """s in ΔW."""
        return vera_scale(adapter.rank, spec.in_features)

    def traits(self, name: str, adapter: AdapterSettings) -> Traits:
        return Traits(is_trained=name != "qvera_d" or adapter.train_d)


class _WithMagnitude(Vera):
    """Adds m [out_features]: the row norms of W + ΔW, which start at those of W."""

    title = "DVoRA"
    change = Change.SCALED
    peft_type = None

    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> Shapes:
        return {**super().tensors(adapter, spec), "qvera_m": (spec.out_features,)}

    def add(self, layer: Any, adapter_name: str, x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
        """bias + f ⊙ (W x + ΔW x) with f = m / ‖W + ΔW‖, which is 1 for a fresh adapter."""
        if layer.mixed is None and len(layer.active_names()) > 1:
            raise ValueError(f"{adapter_name} scales the rows of W + ΔW and can't be active together with others.")
        factors = layer.parts(adapter_name)
        gram = layer.qvera_projection[adapter_name].gram(factors.rank, layer.in_features)
        factor = factors.magnitude / layer.qvera_frozen[adapter_name].of_sum(factors, gram)
        scaled = functional.scale_input(layer.add_low_rank(adapter_name, x, y, overwrite), factor)
        bias = layer.base_layer.bias  # it is in y, and so was scaled too
        return scaled if bias is None else scaled + (bias - bias * factor).to(scaled.dtype)


_WITH_MAGNITUDE = _WithMagnitude()


class RowNorms(nn.Module):
    """The constants in the norms of W + ΔW: ‖w_i‖² [m] in fp32 or wider, and W Aᵀ [m, r] in the compute dtype.

    They are non-persistent buffers, made once from the weight that the layer computes with.
    """

    squares: Tensor
    products: Tensor

    def __init__(self, base_layer: nn.Module, A: Tensor, out_features: int) -> None:
        super().__init__()
        wide = at_least_fp32(A)
        squares = torch.empty(out_features, device=A.device, dtype=wide.dtype)
        products = A.new_empty(out_features, A.shape[0])
        weight = base_layer.weight
        assert isinstance(weight, nn.Parameter)
        if not weight.is_meta:
            # by blocks of rows, so that the whole weight is never in fp32
            with torch.no_grad(), gathered([weight]):
                if isinstance(base_layer, Conv1D):
                    turned = weight.t()
                    blocks: Any = ((rows, turned[rows].to(A.dtype)) for rows in row_blocks(turned))
                else:
                    blocks = WeightBlocks(base_layer, A.dtype, BLOCK_WEIGHTS)  # type: ignore[arg-type]
                for rows, block in blocks:
                    block = block.to(wide.dtype)
                    squares[rows] = block.square().sum(1)
                    products[rows] = (block @ wide.t()).to(products.dtype)
        self.register_buffer("squares", squares, persistent=False)
        self.register_buffer("products", products, persistent=False)
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None

    def of_sum(self, factors: Factors, gram: Tensor) -> Tensor:
        """Return the row norms ‖w_i + δ_i‖ [m] in fp32 or wider, without a graph. ``gram`` is A Aᵀ.

        A row of zeros, such as a pruned one, has the norm 1 here: it is divided by.
        """
        # cached until d or b changes in value, but only on a CPU: elsewhere the comparison waits for the device
        assert factors.vectors is not None
        d, b = (vector.detach() for vector in factors.vectors)
        holds = self.squares.device.type == "cpu" and not torch.compiler.is_compiling()
        if holds and self._latest is not None:
            last_d, last_b, norms = self._latest
            if torch.equal(last_d, d) and torch.equal(last_b, b):
                return norms
        with torch.no_grad():
            total, middle, rank = torch.empty_like(self.squares), d.to(self.squares) * factors.scale, d.shape[0]
            for rows in row_blocks(factors.B):
                C = times_b(factors.B[rows].to(total), b[..., rows].to(total)) * middle
                crossed = (self.products[rows, :rank].to(total) * C).sum(1)
                total[rows] = self.squares[rows] + 2 * crossed + ((C @ gram) * C).sum(1)
            norms = no_zeros(total.clamp_min_(0).sqrt_())  # the formula's sum may round to a little below 0
        if holds:
            self._latest = d.clone(), b.clone(), norms
        return norms

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RowNorms:
        self._latest = None

        def moved(tensor: Tensor) -> Tensor:
            # casting a model does not change packed weights, nor may it round these
            found = moved_weight_factor(fn, tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)


def held_bytes(rank: int, sizes: Sequence[tuple[int, int]], itemsize: int) -> int:
    """Return the bytes of `RowNorms` and of A Aᵀ for linears of these (in_features, out_features)."""
    rows, inputs = sum(m for _, m in sizes), {n for n, _ in sizes}
    return rows * (rank * itemsize + 4) + 4 * rank**2 * len(inputs)
