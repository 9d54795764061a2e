"""One rank of several: bytes that each ZeRO stage leaves on it, bytes it receives in a step, and which stage to take.

The formulas follow `qvera.distributed` (what is sharded, and the limits that DeepSpeed is given), DeepSpeed 0.19's
optimizers and `qvera.training.engine`. tests/distributed/test_stages.py counts the same in live objects, and
bench/zero.py in whole processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qvera.distributed.zero_config import IN_RAM_BELOW_BYTES, nvme_buffers
from qvera.training.plan.memory import Component, Memory, plan_memory
from qvera.training.plan.ranks import Sharing, share
from qvera.training.plan.run import Machine, PlannedRun
from qvera.training.plan.shape import Shape
from qvera.utils.formatting import duration, size

ETHERNET_BYTES_PER_SECOND = 117_000_000
"""What 1 Gbit/s carries of TCP's payload; to say what bytes mean in seconds."""


@dataclass(frozen=True)
class Spread:
    """Bytes of the base that the ranks divide in stage 3 (`qvera.models.mmap`); statistics are not among them."""

    packed: int  # 4-bit weights of all layers
    largest: int  # of those, one linear's at most
    layer: int  # of those, one decoder layer's at most
    last: int  # of those, linears that end a layer: their backward pass comes right behind their recomputation
    table: int  # the embedding, and the head as much again; 0 where they are one, which is not spread
    dense: int  # linears that are not quantized (a checkpoint may say so), in 16 bits
    weights: list[list[int]]  # of each linear, packed or dense, by decoder layer

    @property
    def all(self) -> int:
        """Bytes that the ranks divide."""
        return self.packed + 2 * self.table + self.dense


def spread_of(shape: Shape) -> Spread:
    """What the ranks divide in stage 3."""
    packed = {x: -(-x.n * x.m // 2) for x in shape.linears if x.quantizable}
    layers: dict[int | None, int] = defaultdict(int)
    weights: dict[int | None, list[int]] = defaultdict(list)
    for x in shape.linears:
        layers[x.layer] += packed.get(x, 0)
        weights[x.layer].append(packed.get(x, 2 * x.n * x.m))
    last = {x.layer: packed.get(x, 0) for x in shape.linears if x.layer is not None}
    return Spread(
        packed=sum(packed.values()),
        largest=max(packed.values(), default=0),
        layer=max(layers.values(), default=0),
        last=sum(last.values()),
        table=0 if shape.tied else 2 * shape.vocabulary * shape.hidden,
        dense=sum(2 * x.n * x.m for x in shape.linears if not x.quantizable),
        weights=list(weights.values()),
    )


def plan_rank(run: PlannedRun) -> Memory:
    """What one rank holds; `plan_memory` for a process on its own."""
    sharing = run.sharing
    if sharing.stage == 3:  # which brings the layers to the device itself
        run = run.with_stream(False)
    whole = plan_memory(run)
    if sharing.stage == 0:
        return whole
    standing = _optimizer(whole.standing, run, sharing)
    if sharing.stage < 3:
        return replace(whole, standing=standing)
    spread = spread_of(run.shape)
    moments = {name: (*parts, *_gathered(name, spread, run, sharing)) for name, parts in whole.moments.items()}
    return Memory(_base(standing, spread, run, sharing), moments)


def _optimizer(parts: tuple[Component, ...], run: PlannedRun, sharing: Sharing) -> tuple[Component, ...]:
    """The optimizer's part. DeepSpeed keeps fp32 copies of what it steps, so two ranks save nothing by dividing it."""
    every, world = sum(run.vector_sizes()), sharing.world_size
    trained = sum(run.vector_sizes(trained_only=True))
    copies = 2 * 4 * share(trained, world) + (4 * share(every, world) if sharing.stage == 3 else 0)
    found = [replace(c, bytes=share(c.bytes, world)) if c.zero_stage == 1 else c for c in parts]
    return (*found, Component("a share of vectors and gradients", "vectors", copies, zero_stage=1))


def _base(parts: tuple[Component, ...], spread: Spread, run: PlannedRun, sharing: Sharing) -> tuple[Component, ...]:
    """Shares are private; statistics stay in the mapped file, and so does an embedding that is the head."""
    machine = run.machine
    if sharing.offload is None:
        shares = [Component("a share of the base", "base", share(spread.all, sharing.world_size), zero_stage=3)]
    else:  # on a CPU the device is the RAM that it goes to
        shares = [] if machine.on_gpu else _offloaded(spread, sharing)
    left = sum(c.bytes for c in parts if c.kind == "base") - spread.all
    if run.itemsize != 2 and not machine.mapped_base:  # 16-bit weights are cast; so are norms, a few hundred kB
        left -= (spread.all - spread.packed) * (run.itemsize - 2) // 2
    name = "statistics, embedding (the head too), norms" if run.shape.tied else "statistics, norms"
    stays = Component(name, "base", left, machine.mapped_base)
    return tuple(c for c in (*shares, stays, *(c for c in parts if c.kind != "base")) if c.bytes)


def _offloaded(spread: Spread, sharing: Sharing) -> list[Component]:
    """RAM of a rank's share of an offloaded base (`qvera.distributed.zero_params`)."""
    world = sharing.world_size
    if sharing.offload == "cpu":
        return [Component("a share of the base", "base", share(spread.all, world), zero_stage=3)]
    shares = [[share(weight, world) for weight in layer] for layer in spread.weights]
    largest = max((weight for layer in spread.weights for weight in layer), default=0)
    numel, count = nvme_buffers(largest // 2, max(map(len, shares), default=0), world)
    small = sum(one for layer in shares for one in layer if one < IN_RAM_BELOW_BYTES)
    return [
        Component("its share of embedding and head", "base", share(2 * spread.table, world), zero_stage=3),
        Component("shares too small for NVMe", "base", small, zero_stage=3),
        Component("buffers between NVMe and RAM", "base", 2 * numel * count),
    ]


def _gathered(moment: str, spread: Spread, run: PlannedRun, sharing: Sharing) -> tuple[Component, ...]:
    """Weights that are whole on a rank while they are used, and what gathering them takes."""
    whole = largest = spread.table if moment == "loss" else spread.largest
    if moment == "backward" and run.checkpointing:
        # DeepSpeed keeps those of a recomputed layer until its backward pass has begun
        whole = spread.layer
    gathering = 0 if run.machine.on_gpu or sharing.world_size == 1 else largest  # gloo gathers into a copy of its own
    # on an accelerator the next layer is gathered while one computes (`ZeroConfig.complete`)
    ahead = spread.layer if run.machine.on_gpu and sharing.offload != "nvme" and moment != "loss" else 0
    found = (
        Component("gathered weights", "base", whole),
        Component("the next layer's", "base", ahead),
        Component("gloo's copy of one", "base", gathering),
    )
    return tuple(c for c in found if c.bytes)


class Traffic(NamedTuple):
    """Bytes that reach one rank in an optimizer step; their sum is all of them."""

    gradients: int  # of the vectors, added up over the ranks (and, with ZeRO, the stepped vectors again)
    base: int  # weights gathered in stage 3


def traffic(run: PlannedRun) -> Traffic:
    """What a step of the recipe's global batch brings to each rank."""
    sharing, world = run.sharing, run.sharing.world_size
    if world == 1:
        return Traffic(0, 0)
    trained = sum(run.vector_sizes(trained_only=True))
    # an all-reduce is a reduction and a gather; the optimizers of stages 1 and 2 do one, and gather the stepped vectors
    # after it
    times = 3 if sharing.stage in (1, 2) else 2
    gradients = times * 4 * trained * (world - 1) // world
    if sharing.stage < 3:
        return Traffic(gradients, 0)
    spread, checkpointing = spread_of(run.shape), run.checkpointing
    uses = 3 if checkpointing else 2  # forward, recomputation, backward
    a_pass = uses * (spread.packed + spread.dense) - (spread.last if checkpointing else 0) + 2 * spread.table
    return Traffic(gradients, run.passes * a_pass * (world - 1) // world)


@dataclass(frozen=True)
class Way:
    """One way of sharing the model, planned."""

    sharing: Sharing
    memory: Memory
    needed_bytes: int  # device memory (GPU) or private RAM (CPU) of one rank
    available_bytes: int  # what one rank can have of that; on a CPU the ranks of a node divide its RAM
    host_bytes: int  # RAM that offloaded shares take on each node beside that
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
            "received_bytes_per_step": self.traffic._asdict(),
            "memory": self.memory.to_dict(),
        }


def plan_ways(run: PlannedRun, nodes: int, per_node: int) -> list[Way]:
    """Every way of sharing that this base can be trained in, the simplest first."""
    on_gpu = run.machine.on_gpu
    available = run.machine.available_bytes // (1 if on_gpu else per_node)
    stages: list[tuple[int, str | None]] = [(0, None), (1, None), (2, None)]
    if run.recipe.model.quantization in ("nf4", "fp4"):
        # on a CPU the device is the RAM that a share would be offloaded to
        stages += [(3, None), (3, "cpu"), (3, "nvme")] if on_gpu else [(3, None), (3, "nvme")]
    found = []
    for stage, offload in stages:
        sharing = Sharing(stage, offload, nodes, per_node)
        one = replace(run, sharing=sharing)
        memory, received = plan_rank(one), traffic(one)
        beside = _offloaded(spread_of(run.shape), sharing) if offload is not None and on_gpu else []
        host = per_node * sum(c.bytes for c in beside)
        found.append(Way(sharing, memory, memory.needed_bytes(run.machine), available, host, received))
    return found


def right_way(ways: Sequence[Way], machine: Machine) -> tuple[Way | None, str]:
    """The way to take, and why, in a sentence or two; None where none fits."""
    plain = ways[0]
    first = next((way for way in ways if way.fits), None)
    if first is None:
        least = min(ways, key=lambda way: way.needed_bytes)
        return None, (
            f"None fits: even {least.sharing.word} needs {size(least.needed_bytes)} a rank, and there are "
            f"{size(least.available_bytes)}."
        )
    if first is plain:
        less = plain.needed_bytes - min(way.needed_bytes for way in ways if way.sharing.stage in (1, 2))
        saved = f"{size(less)} of {size(plain.needed_bytes)}" if less > 0 else "nothing"
        why = f"Leave deepspeed out: the base fits on each rank, and zero1 and zero2 would save {saved}."
        sharded = next((way for way in ways if way.sharing.word == "zero3"), None)
        if sharded is not None and sharded.traffic.base:
            pages = "" if machine.on_gpu else " and make private memory of pages that ranks share now"
            why += f" zero3 would bring {_travel(sharded.traffic.base)}{pages}."
        return plain, why
    if first.sharing.stage < 3:
        return first, f"{first.sharing.word}: it fits by the few MB of the optimizer's state that ranks divide."
    network = "so the machines want a fast network" if first.sharing.nodes > 1 else "but these ranks are on one machine"
    why = (
        f"{first.sharing.word}: with the whole base a rank needs {size(plain.needed_bytes)} and has "
        f"{size(plain.available_bytes)}; spread, {size(first.needed_bytes)}. It brings "
        f"{_travel(first.traffic.base)}, {network}."
    )
    if first.host_bytes:
        why += f" The shares take {size(first.host_bytes)} of RAM on each node."
    elif first.sharing.offload == "nvme":
        why += " They are read from a disk on every use, which takes libaio and a base stored as bfloat16."
    return first, why


def _travel(base_bytes: int) -> str:
    seconds = duration(base_bytes / ETHERNET_BYTES_PER_SECOND)
    return f"{size(base_bytes)} of weights to each rank in every step ({seconds} at 1 Gbit/s)"
