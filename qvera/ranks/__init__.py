"""Several processes as one run: who is which, what they tell each other, and that none waits for a dead one."""

from .group import ALONE, JSON, Group
from .join import in_group, launched_ranks, restarted

__all__ = ["ALONE", "JSON", "Group", "in_group", "launched_ranks", "restarted"]
