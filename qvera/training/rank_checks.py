"""Checks that the ranks of a run agree in versions, recipe, base and data, and have the memory and disk they need."""

from __future__ import annotations

import hashlib
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from qvera.config.schema import Recipe
from qvera.data import Datasets, data_sha256
from qvera.distributed.group import Group, for_all
from qvera.distributed.processes import Processes
from qvera.models.hub import fingerprint_of
from qvera.training.plan import Plan
from qvera.training.plan.plan import REFUSED_ABOVE, change_lines
from qvera.utils import memory
from qvera.utils.errors import InputError
from qvera.utils.files import existing_parent
from qvera.utils.formatting import size

if TYPE_CHECKING:
    from rich.console import Console


def check_same_setup(recipe: Recipe, group: Processes, console: Console) -> None:
    """Raise InputError where ranks differ in versions, recipe or base model; time a small all-reduce."""

    def look() -> dict[str, str]:
        versions = memory.versions()
        if recipe.deepspeed is not None:
            versions["deepspeed"] = metadata.version("deepspeed")
        return {
            **{f"the version of {name}": version for name, version in versions.items()},
            "the recipe's SHA-256": hashlib.sha256(recipe.to_yaml().encode()).hexdigest(),
            "the base's fingerprint (model.path)": str(fingerprint_of(recipe.model)),
        }

    nodes = sorted(set(_require_same(group.agree(look), group, "Make them the same on every node.")))
    latency_seconds, bytes_per_second = group.measure_network()
    console.print(
        f"{group.world_size} processes on {len(nodes)} node{'s' if len(nodes) > 1 else ''} ({', '.join(nodes)}) with "
        f"the same versions, recipe and base model; an all-reduce takes {1e3 * latency_seconds:.2f} ms, and 4 MB of it "
        f"pass at {bytes_per_second / 1e6:,.0f} MB/s.",
        highlight=False,
        soft_wrap=True,
    )


def count_nodes(group: Group) -> tuple[int, int]:
    """The number of machines, and the most ranks on one of them."""
    hosts = group.gather(group.host)
    return len(set(hosts)), max(hosts.count(host) for host in set(hosts))


def check_disk_space(folder: Path, share_bytes: int, group: Group) -> None:
    """Raise InputError where a node's disk has no room for its ranks' shares of the base."""
    free = shutil.disk_usage(existing_parent(folder)).free
    of_ranks = group.gather([group.host, free])
    for host in dict.fromkeys(host for host, _ in of_ranks):
        there = [facts[1] for facts in of_ranks if facts[0] == host]
        needed = share_bytes * len(there)
        if min(there) < needed:
            raise for_all(
                InputError(
                    f"deepspeed: {size(needed)} of the base go to {folder} on {host}, where {size(min(there))} are "
                    "free. Make room, or name another disk as offload_param.nvme_path in a copy of the configuration."
                )
            )


def check_memory(plan: Plan, group: Group, console: Console) -> None:
    """Check that the plan fits on every node. A GPU is one rank's; the RAM of a node is shared by its ranks.

    What does not fit is a warning on CPUs, and on GPUs up to `REFUSED_ABOVE`. Beyond that it is an InputError.
    """
    if group.world_size == 1:
        return
    on_gpu = plan.machine.on_gpu
    # Both numbers count the memory that this process holds already. For another rank of the node it is not free.
    held = 0 if on_gpu else plan.machine.runtime_bytes
    of_ranks = group.gather([group.host, plan.needed_bytes - held, plan.machine.available_bytes - held])
    by_host = {host: [rank for rank, facts in enumerate(of_ranks) if facts[0] == host] for host, *_ in of_ranks}
    short, refused = [], False
    # each GPU by itself, and all ranks of a node together in its RAM
    for ranks in [[rank] for rank in range(len(of_ranks))] if on_gpu else by_host.values():
        needed, free = sum(of_ranks[rank][1] for rank in ranks), min(of_ranks[rank][2] for rank in ranks)
        refused = refused or (on_gpu and needed > REFUSED_ABOVE * free)
        if needed > free:
            named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} on {of_ranks[ranks[0]][0]}"
            short.append(
                f"{named} needs {size(needed)}, and its GPU has {size(free)}"
                if on_gpu
                else f"{named} will need {size(needed)} more, and {size(free)} of RAM are free there"
            )
    if not short:
        return
    text = f"the plan does not fit everywhere: {'; '.join(short)}."
    if refused:
        nodes, per_node = plan.sharing.nodes, plan.sharing.per_node
        hint = f"`qvera plan RECIPE --nodes {nodes} --gpus {per_node}` says what each ZeRO stage would take."
        raise for_all(InputError("\n".join([f"{text} {hint}", *change_lines(plan)])))
    console.print(f"[yellow]{text[0].upper()}{text[1:]}", highlight=False)


def check_same_data(datasets: Datasets, path: str, group: Group) -> None:
    """Raise InputError where the ranks' copies of the data have different rows."""
    if group.world_size == 1:
        return
    fix = f"{path} holds other rows there, or is tokenized differently. Put the same files on every node."
    _require_same({"the data's SHA-256 (data.path)": data_sha256(datasets)}, group, fix)


def _require_same(mine: dict[str, str], group: Group, fix: str) -> list[str]:
    """Raise InputError that names all differences from rank 0; return the host of each rank."""
    of_ranks = group.gather([group.host, mine])
    host, first = of_ranks[0]
    wrong = [
        f"{what} is {other.get(what)} on rank {rank} ({there}) and {first[what]} on rank 0 ({host})"
        for rank, (there, other) in enumerate(of_ranks)
        for what in first
        if other.get(what) != first[what]
    ]
    if wrong:
        raise for_all(InputError(f"the processes of this run differ: {'; '.join(wrong)}. {fix}"))
    return [there for there, _ in of_ranks]
