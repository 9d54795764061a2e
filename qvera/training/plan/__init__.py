"""Memory, time and file sizes of a run, computed before it starts from the model's config alone.

Order of reading: `shapes` (config to shapes), `machine` (where the run takes place), `activations` (one decoder layer),
`memory` (a whole run), `sharding` (one rank of several), `plan` (the longest batch and the plan itself), `timing`,
`alternatives` (changes that make a run fit) and `show`.
"""

from qvera.training.plan.activations import Batch
from qvera.training.plan.alternatives import Change
from qvera.training.plan.machine import Machine, gpu_machine, parse_size, this_machine
from qvera.training.plan.memory import Memory, plan_memory
from qvera.training.plan.plan import Plan, longest_rows, make_plan, planned_steps, time_step
from qvera.training.plan.shapes import Shape, shape_of
from qvera.training.plan.sharding import ALONE, Sharing, Way, plan_ways, right_way

__all__ = [
    "ALONE", "Batch", "Change", "Machine", "Memory", "Plan", "Shape", "Sharing", "Way", "gpu_machine", "longest_rows",
    "make_plan",
    "parse_size", "plan_memory", "plan_ways", "planned_steps", "right_way", "shape_of", "this_machine", "time_step",
]  # fmt: skip
