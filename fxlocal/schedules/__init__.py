"""Which Plan holds for each epoch and step; imports no torch.

A schedule is anything with ``plan(analysis, epoch, step=0, rank=0) -> Plan`` and a ``repr`` that
tells it from another.
"""

from .base import Constant, Facts, LearningSchedule, Schedule
from .dynamic import Dynamic
from .static import Static

__all__ = ["Constant", "Dynamic", "Facts", "LearningSchedule", "Schedule", "Static"]
