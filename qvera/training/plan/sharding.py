"""One rank of several: bytes that each ZeRO stage leaves on it, bytes it receives in a step, and which stage to take.

The formulas follow `qvera.distributed` (what is sharded, and the limits that DeepSpeed is given), DeepSpeed 0.19's
optimizers and `qvera.training.engine`. tests/distributed/test_stages.py counts the same in live objects, and
bench/zero.py in whole processes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qvera.config.schema import Recipe
from qvera.distributed.zero_config import IN_RAM_BELOW_BYTES, ZeroConfig, nvme_buffers
from qvera.training.plan.activations import Batch
from qvera.training.plan.machine import Machine
from qvera.training.plan.memory import Component, Memory, numbers, plan_memory, trained_shapes, vector_shapes
from qvera.training.plan.shapes import Shape
from qvera.utils.formatting import duration, size

ETHERNET_BYTES_PER_SECOND = 117_000_000
"""What 1 Gbit/s carries of TCP's payload; to say what bytes mean in seconds."""

_FOUR_BIT = ("nf4", "fp4")


@dataclass(frozen=True)
class Sharing:
    """How the ranks of a run share its model.

    Attributes:
        stage: of ZeRO; 0: each rank has all of it, and gradients are added up.
        offload: where a rank's share of the base lies in stage 3: None (the device), ``cpu`` or ``nvme``.
        nodes, per_node: machines, and ranks on each (the most on one of them).
        ranks: in all, where not every machine has as many.
    """

    stage: int = 0
    offload: str | None = None
    nodes: int = 1
    per_node: int = 1
    ranks: int | None = None

    @classmethod
    def of(cls, zero: ZeroConfig | None, nodes: int = 1, per_node: int = 1, ranks: int | None = None) -> Sharing:
        """What a recipe's ``deepspeed`` key means on that many machines."""
        if zero is None:
            return cls(0, None, nodes, per_node, ranks)
        return cls(zero.stage, zero.offload_device, nodes, per_node, ranks)

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.ranks or self.nodes * self.per_node

    @property
    def word(self) -> str:
        """As the recipe's ``deepspeed`` key takes it; ``none`` where that is left out."""
        if self.stage == 0:
            return "none"
        return f"zero{self.stage}" + (f"-offload-{self.offload}" if self.offload else "")


ALONE = Sharing()
"""One process."""


@dataclass(frozen=True)
class Spread:
    """Stored bytes of the base by what becomes of them in stage 3."""

    packed: int
    """4-bit weights, in all layers."""
    largest: int
    """Packed, of one linear."""
    layer: int
    """Packed, of one decoder layer."""
    last: int
    """Packed, of the linears that end a decoder layer: their backward pass comes right behind their recomputation."""
    embedding: int
    head: int
    """Both 0 where the head is the embedding, which is not spread."""
    dense: int
    """Linears that are not quantized (a checkpoint may say so)."""
    weights: tuple[tuple[int, ...], ...]
    """Of each linear, packed or dense, by decoder layer."""

    @property
    def all(self) -> int:
        """Bytes that the ranks divide."""
        return self.packed + self.embedding + self.head + self.dense


def spread_of(shape: Shape) -> Spread:
    """What the ranks divide in stage 3 (`qvera.models.mmap`).

    Dense weights are in 16 bits; statistics are not divided.
    """
    packed = {x.name: -(-x.n * x.m // 2) for x in shape.linears if x.quantizable}
    layers = {x.layer: 0 for x in shape.linears}
    weights: dict[int | None, list[int]] = {x.layer: [] for x in shape.linears}
    for x in shape.linears:
        layers[x.layer] += packed.get(x.name, 0)
        weights[x.layer].append(packed.get(x.name, 2 * x.n * x.m))
    last = {x.layer: x.name for x in shape.linears if x.layer is not None}
    dense = sum(2 * x.n * x.m for x in shape.linears if not x.quantizable)
    table = 0 if shape.tied else 2 * shape.vocabulary * shape.hidden
    return Spread(
        sum(packed.values()),
        max(packed.values(), default=0),
        max(layers.values(), default=0),
        sum(packed.get(name, 0) for name in last.values()),
        table,
        table,
        dense,
        tuple(map(tuple, weights.values())),
    )


def plan_rank(shape: Shape, recipe: Recipe, batch: Batch, machine: Machine, sharing: Sharing = ALONE) -> Memory:
    """What one rank holds; `plan_memory` for a process on its own.

    Raises:
        InputError: a target matches no linear.
    """
    whole = plan_memory(shape, recipe, batch, machine)
    if sharing.stage == 0:
        return whole
    standing = _optimizer(whole.standing, shape, recipe, sharing)
    if sharing.stage < 3:
        return dataclasses.replace(whole, standing=standing)
    spread = spread_of(shape)
    standing = _base(standing, spread, shape, machine, sharing)
    moments = {
        name: (*parts, *_gathered(name, spread, recipe, machine, sharing.world_size))
        for name, parts in whole.moments.items()
    }
    return Memory(standing, moments)


def _optimizer(parts: tuple[Component, ...], shape: Shape, recipe: Recipe, sharing: Sharing) -> tuple[Component, ...]:
    """The optimizer's part. DeepSpeed keeps fp32 copies of what it steps, so two ranks save nothing by dividing it."""
    adapted = shape.adapted(recipe.adapter.targets)
    every = sum(numbers(vector_shapes(adapted, recipe.adapter)))
    trained = sum(numbers(trained_shapes(adapted, recipe.adapter)))
    world = sharing.world_size
    copies = 2 * 4 * _share(trained, world) + (4 * _share(every, world) if sharing.stage == 3 else 0)
    found = [dataclasses.replace(c, bytes=_share(c.bytes, world)) if c.zero_stage == 1 else c for c in parts]
    return (*found, Component("a share of vectors and gradients", "vectors", copies, zero_stage=1))


def _base(
    parts: tuple[Component, ...], spread: Spread, shape: Shape, machine: Machine, sharing: Sharing
) -> tuple[Component, ...]:
    """Shares are private; statistics stay in the mapped file, and so does an embedding that is the head."""
    if sharing.offload is None:
        shares = [Component("a share of the base", "base", _share(spread.all, sharing.world_size), zero_stage=3)]
    else:  # on a CPU the device is the RAM that it goes to
        shares = _offloaded(spread, sharing) if machine.device_type == "cpu" else []
    base = sum(c.bytes for c in parts if c.kind == "base")
    # 16 bits a number where it is stored as it lies; norms are cast, a few hundred kB
    left = base - spread.all if machine.itemsize == 2 or machine.mapped_base else None
    if left is None:
        left = base - spread.packed - (spread.all - spread.packed) * machine.itemsize // 2
    per = "node" if machine.mapped_base else "rank"
    others = tuple(c for c in parts if c.kind != "base")
    name = "statistics, embedding (the head too), norms" if shape.tied else "statistics, norms"
    stays = Component(name, "base", left, machine.mapped_base, per)  # type: ignore[arg-type]
    return tuple(c for c in (*shares, stays, *others) if c.bytes)


def _offloaded(spread: Spread, sharing: Sharing) -> list[Component]:
    """RAM of a rank's share of an offloaded base (`qvera.distributed.zero_params`)."""
    world = sharing.world_size
    share = _share(spread.all, world)
    if sharing.offload == "cpu":
        return [Component("a share of the base", "base", share, zero_stage=3)]
    shares = [[_share(weight, world) for weight in layer] for layer in spread.weights]
    largest = max((weight for layer in spread.weights for weight in layer), default=0)
    numel, count = nvme_buffers(largest // 2, max(map(len, shares), default=0), world)
    small = sum(one for layer in shares for one in layer if one < IN_RAM_BELOW_BYTES)
    return [
        Component(
            "its share of embedding and head", "base", _share(spread.embedding + spread.head, world), zero_stage=3
        ),
        Component("shares too small for NVMe", "base", small, zero_stage=3),
        Component("buffers between NVMe and RAM", "base", 2 * numel * count),
    ]


def _gathered(moment: str, spread: Spread, recipe: Recipe, machine: Machine, world_size: int) -> tuple[Component, ...]:
    """Weights that are whole on a rank while they are used, and what gathering them takes."""
    # a weight at a time, but DeepSpeed (after 0.19.1) keeps those of a recomputed layer until its backward pass has
    # begun
    whole = spread.layer if moment == "backward" and recipe.training.gradient_checkpointing else spread.largest
    largest = spread.largest
    if moment == "loss":
        whole = largest = spread.head
    # gloo gathers into a copy of its own
    gathering = largest if machine.device_type == "cpu" and world_size > 1 else 0
    found = (Component("gathered weights", "base", whole), Component("gloo's copy of one", "base", gathering))
    return tuple(c for c in found if c.bytes)


def _share(whole: int, world_size: int) -> int:
    return -(-whole // world_size)


@dataclass(frozen=True)
class Traffic:
    """Bytes that reach one rank in an optimizer step, between nodes or within one.

    Attributes:
        gradients: of the vectors, added up over the ranks (and, with ZeRO, the stepped vectors again).
        base: weights gathered in stage 3.
    """

    gradients: int
    base: int

    @property
    def total(self) -> int:
        """Bytes received in a step."""
        return self.gradients + self.base


def traffic(shape: Shape, recipe: Recipe, sharing: Sharing, packed_rows: int = 0) -> Traffic:
    """What a step of the recipe's global batch brings to each rank; ``packed_rows`` as in `Batch`."""
    world = sharing.world_size
    if world == 1:
        return Traffic(0, 0)
    trained = sum(numbers(trained_shapes(shape.adapted(recipe.adapter.targets), recipe.adapter)))
    # an all-reduce is a reduction and a gather; the optimizers of stages 1 and 2 do one, and gather the stepped vectors
    # after it
    times = 3 if sharing.stage in (1, 2) else 2
    gradients = times * 4 * trained * (world - 1) // world
    if sharing.stage < 3:
        return Traffic(gradients, 0)
    training, spread = recipe.training, spread_of(shape)
    uses = 3 if training.gradient_checkpointing else 2  # forward, recomputation, backward
    again = spread.last if training.gradient_checkpointing else 0
    a_pass = uses * (spread.packed + spread.dense) - again + spread.embedding + spread.head
    return Traffic(gradients, passes_of(recipe, world, packed_rows) * a_pass * (world - 1) // world)


def passes_of(recipe: Recipe, world_size: int, packed_rows: int = 0) -> int:
    """Forward passes of a rank in an optimizer step (`data.Batches.passes`); ``packed_rows`` as in `Batch`."""
    training = recipe.training
    return -(-_share(training.global_batch_size, world_size) // (packed_rows or training.per_device_train_batch_size))


@dataclass(frozen=True)
class Way:
    """One way of sharing the model, planned.

    Attributes:
        needed_bytes: of the device memory (GPU) or private RAM (CPU) of one rank.
        available_bytes: what one rank can have of that; on a CPU the ranks of a node divide its RAM.
        host_bytes: RAM that offloaded shares take on each node beside that.
    """

    sharing: Sharing
    memory: Memory
    needed_bytes: int
    available_bytes: int
    host_bytes: int
    traffic: Traffic

    @property
    def fits(self) -> bool:
        """Whether one rank has the memory."""
        return self.needed_bytes <= self.available_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for ``qvera plan --json``."""
        return {
            "deepspeed": self.sharing.word,
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "host_bytes": self.host_bytes,
            "fits": self.fits,
            "received_bytes_per_step": {"gradients": self.traffic.gradients, "base": self.traffic.base},
            "memory": self.memory.to_dict(),
        }


def plan_ways(shape: Shape, recipe: Recipe, batch: Batch, machine: Machine, nodes: int, per_node: int) -> list[Way]:
    """Every way of sharing that this base can be trained in, the simplest first."""
    stages: list[tuple[int, str | None]] = [(0, None), (1, None), (2, None)]
    if recipe.model.quantization in _FOUR_BIT:
        # on a CPU the device is the RAM that a share would be offloaded to
        stages += [(3, None), (3, "cpu"), (3, "nvme")] if machine.device_type == "cuda" else [(3, None), (3, "nvme")]
    found = []
    for stage, offload in stages:
        sharing = Sharing(stage, offload, nodes, per_node)
        memory = plan_rank(shape, recipe, batch, machine, sharing)
        on_gpu = machine.device_type == "cuda"
        needed = memory.total_bytes if on_gpu else memory.private_bytes
        available = machine.available_bytes if on_gpu else machine.available_bytes // per_node
        beside = _offloaded(spread_of(shape), sharing) if offload is not None and on_gpu else []
        host = per_node * sum(c.bytes for c in beside)
        found.append(Way(sharing, memory, needed, available, host, traffic(shape, recipe, sharing, batch.packed_rows)))
    return found


def right_way(ways: list[Way], machine: Machine) -> tuple[Way | None, str]:
    """The way to take, and why, in a sentence or two; None where none fits."""
    plain = ways[0]
    by_word = {way.sharing.word: way for way in ways}
    first = next((way for way in ways if way.fits), None)
    spread = by_word.get("zero3")
    if first is None:
        least = min(ways, key=lambda way: way.needed_bytes)
        return None, (
            f"None fits: even {least.sharing.word} needs {size(least.needed_bytes)} a rank, and there are "
            f"{size(least.available_bytes)}."
        )
    if first is plain:
        less = plain.needed_bytes - min(by_word[word].needed_bytes for word in ("zero1", "zero2"))
        saved = (
            f"zero1 and zero2 would save {size(less)} of {size(plain.needed_bytes)}"
            if less > 0
            else ("zero1 and zero2 would save nothing, since DeepSpeed keeps copies of what it steps")
        )
        why = f"Leave deepspeed out: the base fits on each rank, and {saved}."
        if spread is not None and spread.traffic.base:
            base_ends = (
                "" if machine.device_type == "cuda" else " and make private memory of pages that ranks share now"
            )
            slow = duration(spread.traffic.base / ETHERNET_BYTES_PER_SECOND)
            why += (
                f" zero3 would bring {size(spread.traffic.base)} of weights to each rank in every step ({slow} at 1 "
                f"Gbit/s)"
                f"{base_ends}."
            )
        return plain, why
    if first.sharing.stage < 3:
        return first, f"{first.sharing.word}: it fits by the few MB of the optimizer's state that ranks divide."
    slow = duration(first.traffic.base / ETHERNET_BYTES_PER_SECOND)
    why = (
        f"{first.sharing.word}: with the whole base a rank needs {size(plain.needed_bytes)} and has "
        f"{size(plain.available_bytes)}; spread, {size(first.needed_bytes)}. Each step brings "
        f"{size(first.traffic.base)} of "
        f"weights to each rank: {slow} at 1 Gbit/s"
    )
    why += (
        ", so the machines want a fast network." if first.sharing.nodes > 1 else ", but these ranks are on one machine."
    )
    if first.host_bytes:
        why += f" The shares take {size(first.host_bytes)} of RAM on each node."
    elif first.sharing.offload == "nvme":
        why += " They are read from a disk on every use, which takes libaio and a base stored as bfloat16."
    return first, why
