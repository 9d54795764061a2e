"""Read an adapter (ours, or PEFT's own VeRA) as factors of ΔW, without the weights of the base."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from peft import VeraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.tuners.vera.model import _kaiming_init
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qvera import __version__
from qvera.adapters.adapter_file import read_adapter, require_places
from qvera.adapters.config import PREFIX, SHARED_PREFIX, QveraConfig
from qvera.adapters.factors import Factors
from qvera.adapters.layer import linear_specs
from qvera.adapters.methods import LinearSpec, Source, method_of
from qvera.adapters.methods.base import Change
from qvera.adapters.projection import Pair, pair_sha256, require_sha256, uniform_pair
from qvera.adapters.save_load import portable_name
from qvera.config.sections import ModelSection
from qvera.models.experts import expert_specs
from qvera.models.loader import load_base
from qvera.models.structure import head_size
from qvera.models.tokenizer import ADDED_ROWS, read_token_rows
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_WEIGHTS, file_sha256, versions


@dataclasses.dataclass
class Delta:
    """Factors of the ΔW of one weight; A and B may be views of a shared pair."""

    factors: Factors
    transposed: bool  # the weight is a Conv1D's, or of experts whose matrices are [in, out]
    experts: int = 0  # of a layer, for a weight [E, m, n]; 0: it is one matrix

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.factors.shape

    @property
    def magnitude(self) -> torch.Tensor | None:
        """The norms [m] to which the rows of W + ΔW are scaled; None if they are not scaled."""
        return getattr(self.factors, "magnitude", None)

    def lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A' [r, n] and B' [m, r] in fp32, with ΔW = B' A'. InputError: the weight is that of experts."""
        if self.experts:
            raise InputError(
                "this adapter changes experts (adapter.experts), each of which would be a LoRA of its own here. Export "
                "with --to merged, or --to lora for PEFT."
            )
        return self.factors.lora()

    def loras(self, name: str) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Yield (``name``, `lora`); for experts, (``name.i``, A' and B') of each one."""
        if not self.experts:
            yield name, self.lora()
        for number in range(self.experts):
            yield f"{name}.{number}", self.factors.expert(number).lora()

    def rows(self, first: int = 0, count: int | None = None, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return rows [first, first + count) of ΔW in fp32: [out, in], or [in, out] for a Conv1D. Default: all.

        For experts these are the matrices [k, m, n] of experts [first, first + count).

        A magnitude needs ``weight``, the same rows of W. InputError: a magnitude on a Conv1D.
        """
        if self.experts:
            last = self.experts if count is None else first + count
            each = (dataclasses.replace(self, factors=self.factors.expert(i), experts=0) for i in range(first, last))
            return torch.stack([delta.rows() for delta in each])
        part = slice(first, None if count is None else first + count)
        if self.magnitude is not None:
            if self.transposed or weight is None:
                raise InputError(
                    "adapter.magnitude: the rows of a Conv1D are merged by PEFT only: load the adapter and call "
                    "merge_and_unload()."
                )
            return self.factors.outputs(part).change(weight)
        if self.transposed:
            return self.factors.inputs(part).delta().t().contiguous()
        return self.factors.outputs(part).delta()


@dataclasses.dataclass
class AdapterDeltas:
    """A whole adapter: config, the shared pair at full size if any, and module name → `Delta`.

    ``head``: tensors of a classification head. ``sha256``: of the adapter's file; None for a sum.
    """

    config: Any
    pair: Pair | None
    layers: dict[str, Delta]
    sha256: str | None = None
    head: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        self.ours: QveraConfig | None = config if isinstance(config, QveraConfig) else None
        """None for an adapter of PEFT's own VeRA."""
        self.rank = max((delta.factors.rank for delta in self.layers.values()), default=0)
        """The largest rank of a layer."""
        self.magnitude = any(delta.magnitude is not None for delta in self.layers.values())
        """Whether rows of W + ΔW are scaled to trained norms."""
        self.method: str = getattr(config, "method", "vera")
        self.seed: int | None = getattr(config, "projection_seed", getattr(config, "projection_prng_key", None))
        self.groups: int = getattr(config, "b_groups", 1)
        self.input_scale: bool = getattr(config, "input_scale", False)

    @property
    def is_low_rank(self) -> bool:
        """Whether ΔW has factors of low rank (`Delta.lora`)."""
        return self.ours is None or method_of(self.ours).change is Change.LOW_RANK

    def on(self, device: torch.device) -> Self:
        """A copy with its factors on a device; tensors that layers share are moved once."""
        if device.type == "cpu":
            return self
        moved: dict[int, torch.Tensor] = {}

        def move(part: Any) -> Any:
            if not isinstance(part, torch.Tensor):
                return part
            # A and B of a layer may be views of the shared pair: the pair is moved once, and viewed again there.
            whole = part if part._base is None else part._base
            if id(whole) not in moved:
                moved[id(whole)] = whole.to(device)
            return moved[id(whole)].as_strided(part.shape, part.stride(), part.storage_offset())

        layers = {
            name: dataclasses.replace(delta, factors=type(delta.factors)(*map(move, delta.factors)))
            for name, delta in self.layers.items()
        }
        pair = None if self.pair is None else (move(self.pair[0]), move(self.pair[1]))
        return dataclasses.replace(self, pair=pair, layers=layers)

    def certificate(self, kind: str, section: ModelSection, adapter_dir: Path, **more: Any) -> dict[str, Any]:
        """Return the certificate of an export; ``more`` is what its kind has besides.

        Its paths are whole, so that run and base are found from any directory.
        """
        return {
            "format": 1,
            "kind": kind,
            "base": {"path": portable_name(section.path), "revision": section.revision},
            "adapter": {
                "path": str(adapter_dir.absolute()),
                "sha256": self.sha256,
                "kind": str(getattr(self.config.peft_type, "value", self.config.peft_type)),
                "method": self.method,
                "rank": self.rank,
                "b_groups": self.groups,
                "input_scale": self.input_scale,
                "magnitude": self.magnitude,
                "seed": self.seed,
            },
            **more,
            "versions": versions(),
        }

    def header(self, base: str | None = None) -> dict[str, str]:
        """Return the header of a safetensors file made from the adapter. It names no directories: files are shared."""
        name = base or self.config.base_model_name_or_path or ""
        found = {
            "qvera_version": __version__,
            "base": Path(name).name if Path(name).is_dir() else name,
            "base_fingerprint": getattr(self.config, "base_fingerprint", None),
            "adapter_sha256": self.sha256,
        }
        return {key: value for key, value in found.items() if value}


def read_deltas(adapter_dir: Path, base: torch.nn.Module, section: ModelSection | None = None) -> AdapterDeltas:
    """Read an adapter for the model ``base``, which needs no weights. InputError: some shape does not fit.

    ``section`` loads the base where A and B are made from its weights and are not in the cache.
    """
    config, tensors = read_adapter(adapter_dir)
    own = config if isinstance(config, QveraConfig) else None
    has_head = own is not None and own.model_class.has_own_head
    if (config.modules_to_save and not has_head) or config.bias != "none":
        raise InputError(
            f"{adapter_dir}: has trained parameters beside its vectors (modules_to_save {config.modules_to_save}, bias "
            f"{config.bias}), which an export of ΔW would lose. Use PEFT's merge_and_unload() on the loaded model."
        )
    modules, stacks = dict(base.named_modules()), expert_specs(base)
    linears = linear_specs(base)
    shapes = {name: (spec.in_features, spec.out_features) for name, spec in linears.items()}
    head: dict[str, torch.Tensor] = {}
    if has_head:
        starts = tuple(f"{name}." for name in config.modules_to_save or ())
        named = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        head = {name: tensor.float() for name, tensor in named.items() if name.startswith(starts)}
        wanted = {name: tuple(t.shape) for name, t in base.named_parameters() if name.startswith(starts)}
        _require_shapes(adapter_dir, "a head of", wanted, head)
    # The trained tensors by linear: name → kind → tensor. Those of a classification head are not of a linear.
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(key for key in tensors if key.startswith(PREFIX)):
        name, _, kind = key.removeprefix(PREFIX).rpartition(".")
        if f"{name}.{kind}" not in head:
            found.setdefault(name, {})[kind] = tensors[key]
    shared = {key.removeprefix(SHARED_PREFIX): t.float() for key, t in tensors.items() if key.startswith(SHARED_PREFIX)}
    # Where A and B come from: the file or the seed of PEFT's VeRA, our seed, or the weights of the base.
    pair: Pair | None = None
    own_pairs: dict[str, Pair] = {}
    if own is None:
        pair = _stock_pair(config, tensors, [shapes[name] for name in found if name in shapes])
    else:
        if shared:  # linears without tensors of their own have these
            specs = [spec for name, spec in linears.items() if check_target_module_exists(own, name)]
            wanted = method_of(own).shared_tensors(own, specs, head_size(base)) if specs else {}
            _require_shapes(adapter_dir, "the shared tensors", wanted, shared)
            found |= {spec.name: found.get(spec.name, {}) for spec in specs}
        if method_of(own).source is Source.SEEDED:
            pair = _seeded_pair(own)
        elif method_of(own).source is Source.OWN:
            own_pairs = _pairs_of_weights(own, [linears[name] for name in found if name in linears], section)
    layers: dict[str, Delta] = {}
    for name, vectors in found.items():
        spec = linears.get(name)
        if spec is None:
            raise InputError(
                f"{adapter_dir}: changes {name}, which the base model does not have as a linear layer: it is another "
                "model's adapter."
            )
        n, m = shapes[name]
        if own is None:
            rank = config.r
            expected: dict[str, tuple[int, ...]] = {"vera_lambda_b": (m,), "vera_lambda_d": (rank,)}
        else:
            rank, expected = method_of(own).rank_at(own, spec), method_of(own).tensors(own, spec)
        # The base decides each shape, so an adapter of another model is found here.
        given = {kind: tuple(vector.shape) for kind, vector in vectors.items()}
        if given != expected or (pair is not None and (n > pair[0].shape[1] or m > pair[1].shape[0])):
            held = "" if pair is None else f" and a pair of {list(pair[0].shape)} and {list(pair[1].shape)}"
            raise InputError(
                f"{adapter_dir}: {name} has shape {[m, n]} in the base, which with its config asks for the vectors "
                f"{expected}, but the adapter has {given} for it{held}: the file is damaged, or another model's "
                "adapter."
            )
        views = own_pairs.get(name) if pair is None else (pair[0][:rank, :n], pair[1][:m, :rank])
        vectors = {kind: v.float() if v.is_floating_point() else v for kind, v in vectors.items()}
        if own is None:
            assert views is not None
            factors = Factors(*views, vectors["vera_lambda_d"], vectors["vera_lambda_b"])
        else:
            try:
                require_places(spec, vectors)
            except InputError as error:
                raise InputError(f"{adapter_dir}: {error}") from None
            factors = method_of(own).factors(own, spec, {**shared, **vectors}, views)
        stack = stacks.get(name)
        turned = isinstance(modules.get(name), Conv1D) if stack is None else stack.is_transposed
        layers[name] = Delta(factors, turned, 0 if stack is None else stack.experts)
    if not layers:
        raise InputError(f"{adapter_dir}: has no vectors in it.")
    return AdapterDeltas(config, pair, layers, file_sha256(adapter_dir / ADAPTER_WEIGHTS), head)


def _require_shapes(
    adapter_dir: Path, what: str, wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, torch.Tensor]
) -> None:
    if (has := {name: tuple(tensor.shape) for name, tensor in given.items()}) != wanted:
        raise InputError(
            f"{adapter_dir}: the base with its config asks for {what} {wanted}, but the adapter has {has}: the file is "
            "damaged, or another model's adapter."
        )


def _pairs_of_weights(
    config: QveraConfig, specs: Sequence[LinearSpec], section: ModelSection | None
) -> dict[str, Pair]:
    """Return each linear's own A and B, from the cache, else from the weights of the base."""
    method, model, pairs = method_of(config), None, {}
    for spec in specs:
        pair = method.own_pair(config, spec, None)
        if pair is None:
            if section is None:
                raise InputError(
                    f"{spec.name}: A and B are not in the cache. Open the run once, as with qvera eval, on this "
                    "machine; then they are."
                )
            if model is None:
                model = load_base(section, torch.device("cpu"), model_class=config.model_class).model
            pair = method.own_pair(config, spec, model.get_submodule(spec.name))
            assert pair is not None
            config.check_pair(spec.name, pair)
        pairs[spec.name] = pair
    return pairs


def _seeded_pair(config: QveraConfig) -> Pair:
    largest = config.projection_shapes
    if not largest:
        raise InputError("the adapter's config has no projection_shapes: it was not written by qvera's save.")
    A, B = uniform_pair(config.rank, largest["A"][1], largest["B"][0], config.seeds)
    require_sha256(config.projection_sha256, pair_sha256(A, B), config.seeds)
    return torch.from_numpy(A), torch.from_numpy(B)


def _stock_pair(config: VeraConfig, tensors: Mapping[str, torch.Tensor], shapes: Sequence[tuple[int, int]]) -> Pair:
    """Return the pair of PEFT's VeRA: from the file, else drawn in PEFT's order (first A, then B)."""
    if "base_model.vera_A" in tensors:
        return tensors["base_model.vera_A"].float(), tensors["base_model.vera_B"].float()
    if not shapes:
        raise InputError("the adapter changes no linear layer of this base: it is another model's adapter.")
    generator = torch.Generator(device="cpu").manual_seed(config.projection_prng_key)
    A = _kaiming_init((config.r, max(n for n, _ in shapes)), generator=generator)
    return A, _kaiming_init((max(m for _, m in shapes), config.r), generator=generator)


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Embedding or head with rows for added tokens (id → row); ``shape`` is that of the result."""

    rows: dict[int, torch.Tensor]
    shape: tuple[int, ...]

    def put(self, weight: torch.Tensor, first: int, last: bool) -> torch.Tensor:
        """Put the added tokens' rows into the base's from ``first`` on. Rows beyond the base's follow the ``last``."""
        stop = self.shape[0] if last else first + len(weight)
        dtype = torch.promote_types(weight.dtype, next(iter(self.rows.values())).dtype)  # fp32 where trained so
        out = weight.new_zeros(stop - first, *weight.shape[1:], dtype=dtype)
        out[: len(weight)] = weight
        for place, row in self.rows.items():
            if first <= place < stop:
                out[place - first] = row.to(dtype)
        return out


def token_tables(
    model: PreTrainedModel,
    ids: dict[str, int],
    adapter_dir: Path,
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[str, str],
) -> dict[str, TokenTable]:
    """Map the names of embedding and head in the checkpoint to tables; ``shapes`` are those of the base's tensors.

    ``files``: the model's name of a tensor → its name in the checkpoint. InputError: the adapter's rows have another
    shape.
    """
    rows = read_token_rows(adapter_dir)
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    tables = {}
    for end, module in (("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        name = files.get(names[module], "")
        if name not in shapes:  # a tied head is in few files
            continue
        new, shape = rows.get(end, rows["embedding"]), shapes[name]
        if tuple(new.shape) != (len(ids), *shape[1:]):
            raise InputError(
                f"{adapter_dir / ADDED_ROWS}: holds rows of shape {list(new.shape)}, expected "
                f"{[len(ids), *shape[1:]]} for {name}. It is another model's."
            )
        placed = dict(zip(ids.values(), new, strict=True))
        tables[name] = TokenTable(placed, (max(shape[0], *(i + 1 for i in placed)), *shape[1:]))
    return tables
