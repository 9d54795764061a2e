"""Memory, time and file sizes of a run, computed before it starts from the model's config alone.

Order of reading: `run` (what a plan is made for), `longest` (the longest batch), `activations` (one decoder layer),
`memory` (a whole run, and one rank of several), `decisions` (what the recipe leaves open, and changes that make a run
fit), `plan` (all of it, and as text), `timing`.
"""

from qvera.data import planned_steps
from qvera.training.plan.longest import longest_rows
from qvera.training.plan.memory import plan_memory, plan_ways, right_way
from qvera.training.plan.plan import Plan, make_plan
from qvera.training.plan.run import (
    ALONE,
    Batch,
    Machine,
    NotPlannable,
    PlannedRun,
    Sharing,
    gpu_machine,
    parse_size,
    shape_of,
    this_machine,
)
from qvera.training.plan.timing import time_step

__all__ = [
    "ALONE", "Batch", "Machine", "NotPlannable", "Plan", "PlannedRun", "Sharing", "gpu_machine", "longest_rows",
    "make_plan", "parse_size", "plan_memory", "plan_ways", "planned_steps", "right_way", "shape_of", "this_machine",
    "time_step",
]  # fmt: skip
