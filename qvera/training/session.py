"""The rows, plan, base and adapter of a training, as loaded before its first step (`loop`, `bank_loop`).

The ranks of a run check that they agree in versions, recipe, base and data, and have the memory and disk they need.
"""

import contextlib
import functools
import heapq
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qvera.adapters import hold_training_weights
from qvera.adapters.methods import check_recipe
from qvera.adapters.products.fused import BUILDS_UNHELD
from qvera.adapters.projection import forget_inputs
from qvera.adapters.save_load import attach, check_start
from qvera.config import plugins
from qvera.config.schema import Recipe
from qvera.data import Datasets, Example, build_datasets, data_sha256, data_warnings, lengths_of, print_preflight
from qvera.distributed.group import Group, for_all
from qvera.distributed.processes import Processes
from qvera.distributed.zero import BaseSharder, ZeroConfig, require_deepspeed, zero_config_of
from qvera.evaluation.held_out import longer_references
from qvera.models import quantization
from qvera.models.attention import require_packing
from qvera.models.checkpointing import Mode, compile_layers, enable_checkpointing
from qvera.models.hub import fingerprint_of
from qvera.models.loader import Base, load_base, notes, pick_compute_dtype
from qvera.models.model_class import ModelClass
from qvera.models.structure import require_positions
from qvera.models.tokenizer import load_processor, require_embedded
from qvera.tasks import task_of
from qvera.training.failures import longest_batch_error
from qvera.training.optim import build_scaler
from qvera.training.plan import Plan, Sharing, make_plan
from qvera.training.plan.decisions import mode_word
from qvera.training.plan.memory import spread_of
from qvera.training.plan.plan import REFUSED_ABOVE, change_lines, run_lines
from qvera.training.plan.run import NotPlannable, changed
from qvera.utils import accelerator, memory
from qvera.utils.errors import InputError
from qvera.utils.files import RUN_PROGRESS, existing_parent, versions
from qvera.utils.formatting import size
from qvera.utils.memory import Shortage, or_shortage
from qvera.utils.progress import Phase
from qvera.utils.signals import StopRequests


class TrainingSession:
    """The rows, plan, base and adapter of a training. All ranks call its methods together, in the order given here."""

    def __init__(self, recipe: Recipe, run_dir: Path, group: Group, console: Console | None = None) -> None:
        """Check the recipe with all packages, compare the ranks and seed them; nothing is loaded yet."""
        self.recipe, self.run_dir, self.group = recipe, run_dir, group
        self.console = (console or Console(stderr=True)) if group.first else Console(quiet=True)
        self.resources = contextlib.ExitStack()
        self.signals = StopRequests(first=None, quiet=not group.first)
        self.task = task_of(recipe)

        def check() -> ZeroConfig | None:
            zero = zero_config_of(recipe)
            if recipe.deepspeed is not None:
                require_deepspeed(recipe.deepspeed)
            check_recipe(recipe)
            # on a GPU transformers takes kernels of the hub where the package `kernels` is there
            packages = ("flash_attn", "kernels") if accelerator.is_available() else ("flash_attn",)
            if recipe.model.attn_implementation == "flash_attention_2" and not any(map(find_spec, packages)):
                raise InputError(
                    "model.attn_implementation: flash_attention_2 needs the package flash-attn, which is not installed "
                    "here. Install it, or remove the key: auto takes the fastest attention that is there."
                )
            self.task.check()
            return zero

        self.zero = group.agree(check)
        if isinstance(group, Processes):
            check_same_setup(recipe, group, self.console)
        self.sharder: BaseSharder | None = None
        if (problem := accelerator.unusable_card()) is not None:
            self.warn(f"{problem} This run takes the CPU.")
        asked = recipe.training.gradient_checkpointing
        self.checkpointing: Mode = True if asked == "auto" else asked  # unless a plan decides (`_plan_memory`)
        self.device = accelerator.current_device()
        torch.manual_seed((recipe.training.seed + group.rank) % 2**64)  # ranks drop out different elements
        if recipe.training.full_determinism:
            # with its default workspace cuBLAS is not deterministic, and torch refuses its products
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            settings: Any = torch.utils.deterministic
            self.resources.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
            filled = "fill_uninitialized_memory", settings.fill_uninitialized_memory
            self.resources.callback(setattr, settings, *filled)
            torch.use_deterministic_algorithms(True)
            # no kernel of ours reads memory that it has not written, and filling every new tensor takes time
            settings.fill_uninitialized_memory = False

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """The inputs of a step besides the recipe: SHA-256 of the rows, fingerprint of the base, and which loss."""
        return {
            "rows": data_sha256(self.datasets),
            "base": self.base.facts.get("fingerprint"),
            "loss": self.task.own.get("loss", "the objective's"),
        }

    def say(self, text: str, style: str | None = None) -> None:
        """Print a sentence on rank 0."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a sentence in yellow."""
        self.say(text, "yellow")

    def phase(self, name: str, total: int | None = None, **how: Any) -> Phase:
        """Show a phase on the console of rank 0, and in the run's directory."""
        return Phase(self.console, name, total, file=self.progress_file, **how)

    @property
    def progress_file(self) -> Path | None:
        """The file in which `qvera ui` reads how far the run is; None on other ranks than the first."""
        return self.run_dir / RUN_PROGRESS if self.group.first else None

    def load_data(self, preview: bool = False) -> None:
        """Read and tokenize the rows before the model is loaded, so that a wrong row is found soon (InputError)."""
        recipe, console = self.recipe, self.console

        def read() -> Datasets:
            tokenizer = load_processor(recipe.model, self.task.exported_class)
            datasets = build_datasets(recipe.data, tokenizer, console, progress_file=self.progress_file)
            if not datasets.train:
                raise InputError(f"{recipe.data.path}: no row is left to train on. Raise data.max_length.")
            if self.zero is not None and self.zero.shards_base and datasets.train.has_images:
                raise InputError("deepspeed: ZeRO-3 takes no rows with images. Use zero1, zero2 or none.")
            if preview:
                print_preflight(datasets, tokenizer, console)
                return datasets
            stats = datasets.stats
            self.say(
                f"Data: {stats.train_rows:,} rows to train on, {stats.eval_rows:,} held out; "
                f"{stats.targets_text}. `qvera preview` shows the rows."
            )
            for line in data_warnings(stats):
                self.warn(line)
            return datasets

        self.datasets = self.group.agree(read)
        self.task.prepare_rows(self.datasets)
        shortest = heapq.nsmallest(2, lengths_of(self.datasets.train)) if recipe.data.packing else []
        if len(shortest) == 2 and sum(shortest) > recipe.data.max_length:
            self.warn(
                f"data.packing: no two rows fit into data.max_length ({recipe.data.max_length:,} tokens), so a pass "
                f"has one row. Raise data.max_length (the two shortest rows have {sum(shortest):,} tokens together), "
                "or remove data.packing."
            )
        compared = self.datasets.eval[: recipe.training.exact_match_rows]
        limit, key = recipe.training.sample_max_new_tokens, "training.sample_max_new_tokens"
        if not preview and compared and (note := longer_references(compared, limit, key)) is not None:
            self.warn(note)
        check_same_data(self.datasets, recipe.data.path, self.group)

    def check_model(self) -> None:
        """Plan the memory; check targets and ``adapter.init_from``, without weights of the base (InputError)."""
        self.group.agree(lambda: check_start(self.recipe.adapter, self.recipe.model))
        self.plan = self._plan_memory()

    def load_model(self) -> None:
        """Plan the memory, load the base and put a fresh adapter on it."""
        recipe, group = self.recipe, self.group
        dtype = pick_compute_dtype(recipe.model.compute_dtype, self.device)
        self.scaler = build_scaler(recipe.training, dtype, self.device)
        self.watch = self.resources.enter_context(memory.PeakWatch(self.device))
        if self.zero is not None and self.zero.shards_base:
            self.sharder = BaseSharder(self.zero, recipe, group.rank, group.world_size, self.run_dir / "offload")
            self.resources.callback(self.sharder.discard)
        self.check_model()  # first: loading a large base takes minutes
        # How often a pass makes W + ΔW. Layers choose their path by it, so a resumed run keeps the number of its
        # checkpoint, whatever memory allows now.
        self.builds_per_pass = BUILDS_UNHELD if self.plan is None else self.plan.builds_per_pass
        model_class = self.task.model_class(self.datasets)
        self.base = self._load_base(model_class)
        if (recipe if self.plan is None else self.plan.recipe).model.resident is True:  # a plan has decided on auto
            quantization.hold_resident(self.base.model)
        facts = self.base.facts
        for note in notes(facts):
            self.warn(note)
        identity = facts.get("fingerprint"), facts.get("added_tokens")
        count = len(self.datasets.train)
        # what a schedule of the recipe changes in the adapter's config
        schedules = plugins.schedules_of(training=recipe.training)
        changes = {k: v for each in schedules for k, v in each.config(recipe, count).items()}
        with self.phase("putting the adapter on") as show:
            self.model = attach(
                self.base.model,
                recipe.adapter,
                recipe.model.path,
                *identity,
                recipe.model,
                changes,
                progress=lambda name: show(0, facts=f"decomposing {name}"),
                model_class=model_class,
            )
        for rows in (self.datasets.train, self.datasets.eval):
            require_positions(self.model, lengths_of(rows))
            require_embedded(self.base.tokenizer, self.base.model, rows)
        if recipe.data.packing:
            require_packing(self.model)
        self.task.prepare(self.model, self.base.tokenizer, self.datasets)

    @property
    def chat_template(self) -> str | None:
        """The chat template to save beside an adapter of this run."""
        return self.datasets.template_beside(self.recipe.data.system) if self.task.has_answers else None

    def prepare_model(self, alone: bool = True, start: Callable[[], object] = lambda: None) -> None:
        """Set gradient checkpointing, compilation and held weights before the first pass, as recipe and plan say.

        ``alone``: every pass has the rows of one adapter. Otherwise no W + ΔW can be held, and MLPs can't go by tiles.
        ``start`` may set the vectors. It is called while layers are not compiled and hold no weights yet.
        """
        enable_checkpointing(self.model, self.checkpointing, by_tiles=alone)
        start()
        if self.recipe.training.torch_compile:
            compile_layers(self.model)
        holds = alone and self.plan is not None and self.plan.holds_weights
        hold_training_weights(self.model, holds, self.builds_per_pass)

    def try_longest_batch(self, examples: list[Example], do: Callable[[list[Example]], object]) -> None:
        """Let ``do`` take forward and backward over the longest batch of the run. It leaves no trace.

        ``do`` drops the gradients, so that neither the vectors nor DeepSpeed's buffers hold them; random state and mode
        are restored. Under ZeRO-3 all ranks call this together, once the engine's hooks gather the weights. Memory that
        runs out is an InputError that says what would help; with ``training.on_oom: halve`` and several rows it is a
        warning.
        """
        recipe, model = self.recipe, self.model
        was_training = model.training
        with self.phase("trying the longest batch"), accelerator.forked_random_state():
            model.train()
            try:
                shortage = or_shortage(lambda: do(examples), self.device)
            finally:
                model.train(was_training)
                forget_inputs(model)
        if isinstance(shortage, Shortage):
            if recipe.training.on_oom == "save" or len(examples) == 1:
                raise longest_batch_error(shortage, self.plan, recipe.data.path, examples)
            self.warn(f"The longest batch does not fit into memory ({shortage}). A step with it is halved.")

    def _load_base(self, model_class: ModelClass) -> Base:
        section = self.recipe.model
        if self.plan is not None:
            section = section.replace(stream=self.plan.streaming.streams)  # what auto comes to
        with self.phase(f"loading {section.path}", text=size) as show:

            def progress(stage: str, done: int, total: int, _: str) -> None:
                show(done, total, f"{stage} {section.path}")
                if self.signals.asked:  # the threads of a download end by it
                    raise KeyboardInterrupt(self.signals.asked)

            read = functools.partial(load_base, section, self.device, progress, self.sharder, model_class)
            return self.group.agree(read) if self.sharder is None else read()  # ranks meet while they shard it

    def _plan_memory(self) -> Plan | None:
        """Make and print the plan of this rank; None where none can be made. Sets ``checkpointing`` for all ranks.

        A plan that does not fit a GPU is an InputError. It is a warning on a CPU, where swap may make room, and where
        it is near what a GPU has (`Plan.is_refused`).
        """
        recipe, group, data = self.recipe, self.group, self.datasets
        sharing = Sharing.of(self.zero, *count_nodes(group), group.world_size)
        about: dict[str, Any] = {"adapter_rows": [len(adapter.train) for adapter in data.adapters], "datasets": data}
        try:
            plan = make_plan(recipe, self.device, data.train, sharing, **about)
            # the rank with the least memory decides for all
            self.checkpointing = max(group.gather(plan.checkpointing), key=[False, True, "offload"].index)
            if self.checkpointing != plan.checkpointing:
                recipe = changed(recipe, {"training.gradient_checkpointing": self.checkpointing})
                plan = make_plan(recipe, self.device, data.train, sharing, **about)
        except NotPlannable as error:
            self.warn(f"No plan: {error}")
            return None
        if plan.is_refused and group.world_size == 1:
            raise InputError("\n".join(run_lines(plan)))
        for line in run_lines(plan):
            (self.say if plan.fits and not plan.is_tight else self.warn)(line)
        for text in plan.warnings:
            self.warn(text)
        check_memory(plan, group, self.console)
        if self.sharder is not None and self.sharder.folder is not None:
            check_disk_space(self.sharder.folder, -(-spread_of(plan.shape).packed // group.world_size), group)
        return plan

    def keep_checkpointing(self, recorded: Mode, group: Group) -> None:
        """Keep the ``recorded`` mode of a run that goes on with `gradient_checkpointing: auto`, where it still fits.

        Another mode may give other bits: recomputed layers may take their MLPs by tiles. The ranks of ``group`` decide
        together.
        """
        if self.recipe.training.gradient_checkpointing != "auto" or recorded == self.checkpointing:
            return
        if all(group.gather(self.plan is None or self.plan.decided.fits(recorded))):
            self.say(f"Gradient checkpointing stays {mode_word(recorded)}, as the run began.")
            self.checkpointing = recorded
            return
        self.warn(
            f"Gradient checkpointing was {mode_word(recorded)} when the run began, which does not fit into memory now; "
            f"it goes on with {mode_word(self.checkpointing)}, and its numbers may differ in the last bits."
        )


def check_same_setup(recipe: Recipe, group: Processes, console: Console) -> None:
    """Raise InputError where ranks differ in versions, recipe or base model; time a small all-reduce."""

    def look() -> dict[str, str]:
        found = versions()
        if recipe.deepspeed is not None:
            found["deepspeed"] = metadata.version("deepspeed")
        sections = {name: value if isinstance(value, dict) else {"": value} for name, value in recipe.to_dict().items()}
        of_recipe = {
            f"{name}.{key}".rstrip("."): str(one) for name, keys in sections.items() for key, one in keys.items()
        }
        return {
            **{f"the version of {name}": version for name, version in found.items()},
            **of_recipe,
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
