"""A plan as text: the table of `qvera plan`, and the lines before a run."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table

from qvera.training.plan import Plan
from qvera.training.plan.activations import offloaded_bytes
from qvera.training.plan.bank import slot_bytes
from qvera.training.plan.sharding import ETHERNET_BYTES_PER_SECOND, right_way
from qvera.utils.formatting import count, duration, size

_STYLE: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "bold"}
_MOMENTS = {"backward": "backward pass", "loss": "loss", "answers": "answers"}


def print_plan(plan: Plan, console: Console) -> None:
    """The whole plan: a table of components, files, time, and one sentence whether it fits."""
    trained = f"{plan.trained_parameters:,} trained"
    trained += f" and a head of {plan.shape.head_numbers:,}" if plan.shape.head else ""
    console.print(
        f"{plan.shape.model_type}, {count(plan.shape.parameters)} parameters; {trained}; "
        f"computes in {str(plan.machine.dtype).removeprefix('torch.')}; planned for {plan.batch.source}"
    )
    table = Table("At the peak", "where", Column("bytes", justify="right"), **_STYLE)
    for part in plan.memory.peak:
        where = "GPU" if plan.machine.on_gpu else "mapped file" if part.mapped else "private"
        table.add_row(part.name, where, size(part.bytes))
    table.add_row("total", "", size(plan.memory.total_bytes), style="bold")
    console.print(table)
    if plan.shape.expert_numbers:
        console.print(
            f"{count(plan.shape.expert_numbers)} of the parameters are experts. They are neither adapted nor "
            "quantized: they are no linears."
        )
    others = [
        f"{_MOMENTS[name]} {size(sum(c.bytes for c in plan.memory.at(name)))}"
        for name in plan.memory.moments
        if name != plan.memory.peak_moment
    ]
    console.print(f"The peak is in the {_MOMENTS[plan.memory.peak_moment]}; {', '.join(others)}.")
    console.print(str(plan.decided), markup=False)
    if plan.streams:
        console.print(str(plan.streaming), markup=False)
    if pinned := offloaded_bytes(plan):
        console.print(f"Layer inputs take {size(pinned)} of pinned RAM.")
    if plan.slots:
        each = f"each of them {size(slot_bytes(plan))}"
        console.print(f"At most {plan.slots:,} adapters are trained at the same time, {each} with AdamW's moments.")
    for note in plan.notes:
        console.print(note)
    console.print(f"Files: adapter {size(plan.adapter_bytes)}, a checkpoint {size(plan.checkpoint_bytes)}.")
    if plan.seconds is not None:
        parts = ", ".join(f"{name} {duration(s)}" for name, s in plan.seconds.items() if s > 0)
        several = plan.sharing.world_size > 1
        ranks = f" for one of {plan.sharing.world_size} ranks, without the network" if several else ""
        step = "A round of steps, one of each adapter," if plan.slots else "A step"
        console.print(f"{step} takes about {duration(sum(plan.seconds.values()))} here{ranks} ({parts}).")
    if plan.machine.on_gpu:
        console.print("GPU figures are computed from shapes; no GPU has confirmed them yet.")
    if plan.ways:
        _print_ways(plan, console)
    for line in change_lines(plan):
        console.print(line, markup=False)
    console.print(verdict(plan), style="bold")


def _print_ways(plan: Plan, console: Console) -> None:
    """Each ZeRO stage on as many ranks, what travels, and which one to take."""
    sharing, machine = plan.sharing, plan.machine
    nodes = f"{sharing.nodes} node{'s' if sharing.nodes > 1 else ''}"
    console.print(
        f"\n{sharing.world_size} ranks, {sharing.per_node} on each of {nodes}. What one rank holds at its peak:"
    )
    titles = ("base", "vectors, optimizer", "activations", "others", "total", "received a step", "at 1 Gbit/s")
    columns = [Column(title, justify="right") for title in titles]
    table = Table("deepspeed", *columns, **_STYLE)
    for way in plan.ways:
        parts = {"base": 0, "vectors": 0, "activations": 0, "others": 0}
        for part in way.memory.peak:
            if not part.mapped:
                parts[_COLUMN.get(part.kind, "others")] += part.bytes
        base = size(parts.pop("base"))
        if way.memory.mapped_bytes:
            base += f" + {size(way.memory.mapped_bytes)} mapped"
        table.add_row(
            way.sharing.word,
            base,
            *map(size, parts.values()),
            size(way.needed_bytes) + ("" if way.fits else " (too much)"),
            size(sum(way.traffic)),
            duration(sum(way.traffic) / ETHERNET_BYTES_PER_SECOND),
        )
    console.print(table)
    console.print(right_way(plan.ways, machine)[1], style="bold")


_COLUMN = {"base": "base", "vectors": "vectors", **dict.fromkeys(("checkpoints", "transient", "loss"), "activations")}
"""Kind of a component → its column; projections, answers and the runtime are the others."""


def verdict(plan: Plan) -> str:
    """One sentence: fits, or does not."""
    memory, machine = plan.memory, plan.machine
    needed = plan.needed_bytes
    have = f"{size(machine.available_bytes)} of {'memory' if machine.on_gpu else 'free RAM'}"
    if plan.is_tight:
        word = "Fits, barely" if plan.fits else "Does not fit by the plan"
        return (
            f"{word}: needs {size(needed)}, and {machine.name} has {have}. That is too near to tell: "
            "`qvera train` tries the longest batch before the first step."
        )
    if not plan.fits:
        return f"Does not fit: needs {size(needed)}, and {machine.name} has {have}."
    if memory.total_bytes > machine.available_bytes:
        return (
            f"Fits, slowly: {size(needed)} private of {have} on {machine.name}; the mapped base "
            f"({size(memory.mapped_bytes)}) does not stay in memory beside it and is read from disk in every step."
        )
    mapped = f" and {size(memory.mapped_bytes)} mapped" if memory.mapped_bytes else ""
    return f"Fits: {size(needed)}{mapped} of {have} on {machine.name}."


def change_lines(plan: Plan) -> list[str]:
    """What would make it fit, one ``--set`` a line."""
    if plan.fits or not plan.changes:
        return []
    way = right_way(plan.ways, plan.machine)[0] if plan.ways else None
    if way is not None and way.sharing.word != plan.sharing.word:
        return [f"--set deepspeed={way.sharing.word} makes it fit: {size(way.needed_bytes)} a rank."]
    if not any(change.fits for change in plan.changes):
        least = plan.changes[-1]
        return [f"No change makes it fit; at the least ({least}) it takes {size(least.total_bytes)}."]
    lines = ["Any one of these makes it fit:"] if len(plan.changes) > 1 else ["This makes it fit:"]
    return lines + [f"  {change}   {size(change.total_bytes)}" for change in plan.changes]


def run_lines(plan: Plan) -> list[str]:
    """The plan before a run, in two to four lines."""
    memory = plan.memory
    mapped = f" + {size(memory.mapped_bytes)} of mapped weights" if memory.mapped_bytes else ""
    rank = f" of each of {plan.sharing.world_size} ranks" if plan.sharing.world_size > 1 else ""
    peak = f"{size(memory.private_bytes)}{mapped}, in the {_MOMENTS[memory.peak_moment]}"
    return [
        f"Plan: peak{rank} {peak}; {plan.batch.source}.",
        *([str(plan.decided)] if plan.decided.asked != plan.decided.mode else []),
        *([str(plan.streaming)] if plan.streams else []),
        verdict(plan),
        *change_lines(plan),
    ]
