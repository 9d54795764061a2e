"""Memory, time and file sizes of a run, computed before it starts from the model's config alone.

Order of reading: `run` (what a plan is made for), `activations` (one decoder layer), `memory` (a whole run, and one
rank of several), `decisions` (the longest batch, what the recipe leaves open, and changes that make a run fit), `plan`
(all of it with its seconds, and as text).
"""

from qvera.training.plan.decisions import longest_rows
from qvera.training.plan.memory import plan_memory, plan_ways, right_way
from qvera.training.plan.plan import Plan, make_plan, time_step
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

__all__ = [
    "ALONE", "Batch", "Machine", "NotPlannable", "Plan", "PlannedRun", "Sharing", "gpu_machine", "longest_rows",
    "make_plan", "parse_size", "plan_memory", "plan_ways", "right_way", "shape_of", "this_machine", "time_step",
]  # fmt: skip
