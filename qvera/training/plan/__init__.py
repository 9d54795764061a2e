"""Memory, time and file sizes of a run, computed before it starts from the model's config alone.

Order of reading: `shape`, `ranks` and `run` (what a plan is made for), `bank` (many adapters), `activations` (one
decoder layer), `memory` (a whole run), `sharding` (one rank of several), `checkpointing` (whether layers are
recomputed), `streaming` (whether they stay in RAM), `longest` (the longest batch), `changes` (that make a run fit),
`plan`, `timing`, `show`.
"""

from qvera.data import planned_steps
from qvera.training.plan.longest import longest_rows
from qvera.training.plan.memory import plan_memory
from qvera.training.plan.plan import Plan, make_plan
from qvera.training.plan.ranks import ALONE, Sharing
from qvera.training.plan.run import Batch, Machine, PlannedRun, gpu_machine, parse_size, this_machine
from qvera.training.plan.shape import shape_of
from qvera.training.plan.sharding import plan_ways, right_way
from qvera.training.plan.timing import time_step

__all__ = [
    "ALONE", "Batch", "Machine", "Plan", "PlannedRun", "Sharing", "gpu_machine", "longest_rows", "make_plan",
    "parse_size", "plan_memory", "plan_ways", "planned_steps", "right_way", "shape_of", "this_machine", "time_step",
]  # fmt: skip
