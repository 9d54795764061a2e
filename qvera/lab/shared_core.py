"""ΔW = s B R A, with R [rank, rank] trained. A and B are VeRA's: random, frozen and shared.

Unlike LoRA-XS (arXiv 2405.17604), a file holds only R, and linears that read the same input share z.
"""

from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import LinearSpec, Method, Shapes, Tensors
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair, vera_scale
from qvera.lab.keys import Settings


class SharedCore(Method):
    """R [rank, rank] for each linear starts at 0."""

    name = "shared-core"
    usual = {"adapter.rank": 64, "training.learning_rate": 4e-3}

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        return {"qvera_R": (adapter.rank, adapter.rank)}

    def factors(self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        assert pair is not None
        return Factors(*pair, scale=vera_scale(adapter.rank, spec.in_features), R=at_least_fp32(tensors["qvera_R"]))
