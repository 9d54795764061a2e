"""ΔW = B R A, with only R [rank, rank] trained: LoRA-XS (arXiv 2405.17604), and SharedCore.

LoRA-XS takes A = Σ Vᵀ and B = U from the weight's SVD; SharedCore takes VeRA's A and B: random, frozen and shared.

The weight is taken as the base holds it, quantized or not (`qvera.lab.svd`). A and B are never in the adapter's file.
`FactorCache` keeps them by the base's fingerprint, the linear's name, how it is stored, and the rank.
"""

import contextlib
import glob
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qvera.adapters.config import QveraConfig
from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import LinearSpec, Method, Shapes, Source, Tensors
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair, pair_number, same_pair, vera_scale
from qvera.distributed.zero import gathered
from qvera.lab import svd
from qvera.lab.factor_record import FACTORS, PREFIX, RECORD, SHA256, is_whole, tensors_sha256
from qvera.lab.keys import Settings
from qvera.models import quantization
from qvera.utils.errors import InputError
from qvera.utils.files import replace_text, replacing


def require_rank(rank: int, spec: LinearSpec) -> None:
    """Raise InputError where a linear has fewer singular values than the rank."""
    most = min(spec.in_features, spec.out_features)
    if rank > most:
        raise InputError(
            f"adapter.rank: {spec.name} [{spec.out_features}, {spec.in_features}] has {most} singular values, and "
            f"the rank is {rank}. Lower the rank, or name other layers in adapter.targets."
        )


def svd_pair(adapter: QveraConfig, spec: LinearSpec, base_layer: nn.Module | None, rank: int) -> Pair | None:
    """Return A and B of a linear in fp32, cached or computed now. Without ``base_layer``, None if not cached."""
    if base_layer is None:
        return FactorCache.of(adapter).find(spec.name, rank, (adapter.pair_numbers or {}).get(spec.name))
    require_rank(rank, spec)
    weight = base_layer.weight
    assert isinstance(weight, nn.Parameter)
    if weight.is_meta:
        return weight.new_empty(rank, spec.in_features), weight.new_empty(spec.out_features, rank)
    cache = FactorCache.of(adapter)
    with gathered([weight]):
        return cache.pair(spec.name, base_layer, rank)


class LoraXs(Method):
    """R [rank, rank] for each linear starts at 0. The authors start it at random numbers of size 1e-5."""

    name = "lora-xs"
    title = "LoRA-XS"
    usual = {"adapter.rank": 64, "training.learning_rate": 4e-3}
    source = Source.OWN

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        require_rank(adapter.rank, spec)
        return {"qvera_R": (adapter.rank, adapter.rank)}

    def own_pair(self, adapter: QveraConfig, spec: LinearSpec, base_layer: nn.Module | None) -> Pair | None:
        return svd_pair(adapter, spec, base_layer, adapter.rank)

    def factors(self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        assert pair is not None
        return Factors(*pair, R=at_least_fp32(tensors["qvera_R"]))


class SharedCore(Method):
    """R [rank, rank] for each linear starts at 0. A file holds only R; linears that read the same input share z."""

    name = "shared-core"
    usual = {"adapter.rank": 64, "training.learning_rate": 4e-3}

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        return {"qvera_R": (adapter.rank, adapter.rank)}

    def factors(self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        assert pair is not None
        return Factors(*pair, scale=vera_scale(adapter.rank, spec.in_features), R=at_least_fp32(tensors["qvera_R"]))


_WAY = ["block krylov", 1, svd.BLOCKS, svd.OVERSAMPLING]
"""The way to decompose weights. It is a part of the cache's key, so a change here makes all old entries useless."""
_SAMPLE = "sample"
"""The key of the weight's first row. It shows that a model was changed in memory, as its fingerprint does not."""


@dataclass(frozen=True)
class FactorCache:
    """The decompositions of one base's weights. Nothing is cached if ``fingerprint`` is None.

    ``source`` is the base's name in `qvera cache ls`. ``progress`` is called with each linear that is decomposed.
    """

    fingerprint: str | None
    source: str | None = None
    progress: Callable[[str], None] | None = None

    @classmethod
    def of(cls, adapter: QveraConfig) -> Self:
        return cls(adapter.base_fingerprint, adapter.base_model_name_or_path, adapter.progress)

    @property
    def directory(self) -> Path:
        key = hashlib.sha256(json.dumps([_WAY, self.fingerprint]).encode()).hexdigest()[:24]
        return FACTORS.root / f"{PREFIX}{key}"

    def pair(self, name: str, layer: nn.Module, rank: int) -> Pair:
        """Return A = Σ Vᵀ [rank, n] and B = U [m, rank] of a linear, fp32, on the layer's device or the CPU."""

        def compute() -> dict[str, Tensor]:
            A, B = svd.truncated_svd(svd.rows_of(layer), rank).pair()
            # laid out as a file gives them back: products with a transposed matrix round otherwise on some CPUs
            return {"A": A.float().contiguous(), "B": B.float().contiguous()}

        found = self._cached(name, layer, f"rank{rank}", compute)
        return found["A"], found["B"]

    def find(self, name: str, rank: int, number: float | None) -> Pair | None:
        """Find A and B of a linear by their `pair_number`, without its weight; None where they are not cached."""
        if self.fingerprint is None or number is None:
            return None
        files = sorted(self.directory.glob(f"{glob.escape(name)}.*.rank{rank}.safetensors"))
        pairs = [(found["A"], found["B"]) for file in files if (found := _read(file)) is not None]
        # the same weight is there in several number formats, and their pairs may be near to each other
        nearest = min(pairs, key=lambda pair: abs(pair_number(pair[1]) - number), default=None)
        return nearest if nearest is not None and same_pair(pair_number(nearest[1]), number) else None

    def singular_values(self, name: str, layer: nn.Module) -> Tensor:
        """Return all singular values of a linear, fp64, falling."""
        values = self._cached(name, layer, "values", lambda: {"S": svd.singular_values(svd.rows_of(layer))})
        return values["S"]

    def _cached(
        self, name: str, layer: nn.Module, what: str, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        def made() -> dict[str, Tensor]:
            if self.progress is not None:
                self.progress(name)
            return compute()

        if self.fingerprint is None or not name:
            return made()
        directory = self.directory
        with contextlib.ExitStack() as stack:
            try:
                directory.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FACTORS.locked(directory.name.removeprefix(PREFIX)))
                directory.mkdir(exist_ok=True)
                if not (directory / RECORD).is_file():
                    record = {"source": self.source, "fingerprint": self.fingerprint, "way": _WAY}
                    replace_text(directory / RECORD, json.dumps(record, indent=1))
            except OSError:  # it can't be written
                return made()
            file = directory / f"{name}.{_storage(layer)}.{what}.safetensors"
            sample = next(svd.rows_of(layer, step=1).read())[0].float().cpu()
            found = _read(file)
            if found is None:
                found = made()
                with contextlib.suppress(OSError):
                    _write(file, {**found, _SAMPLE: sample})
            # The entry is of the model on disk, and this one was changed since it was loaded.
            elif not torch.allclose(found[_SAMPLE], sample, rtol=1e-4, atol=1e-6):
                return made()
            return found


def _storage(layer: nn.Module) -> str:
    """Name the number format of a weight, as far as its values depend on it."""
    if isinstance(layer, quantization.Linear4bit):
        facts = quantization.four_bit_facts(layer)
        return f"{facts.quant_type}{'-double' if facts.double_quant else ''}-{facts.blocksize}"
    if isinstance(layer, quantization.Linear8bit):
        return "int8"
    assert isinstance(layer.weight, Tensor)
    return str(layer.weight.dtype).removeprefix("torch.")


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(file) if is_whole(file) else None
    except (SafetensorError, OSError):
        return None


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    content = save(tensors, {SHA256: tensors_sha256(save(tensors))})
    with replacing(file) as partial:
        partial.write_bytes(content)
