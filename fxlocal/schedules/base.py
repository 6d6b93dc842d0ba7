"""What a schedule is, and the simplest one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..plan import Plan

__all__ = ["Constant", "Facts", "LearningSchedule", "Schedule"]


class Facts(Protocol):
    """What a schedule reads of an `fxlocal.Analysis`."""

    @property
    def layers(self) -> tuple[object, ...]:
        """The model's layers."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The indices at which a block begins."""


class Schedule(Protocol):
    """Anything that says which Plan holds when.

    It may also have an attribute ``weak_supervision``: where that is true, a `Driver` reverses the
    local updates in each epoch that follows a rise of the mean loss (LoCal+SGD, Algorithm 2).
    """

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of one step; epochs, steps and ranks count from 0."""


@runtime_checkable
class LearningSchedule(Schedule, Protocol):
    """A schedule that learns from the run; a `Driver` works on a copy and saves its state."""

    def end_epoch(self, analysis: Facts, update_norm: float) -> None:
        """Learn from an epoch: the L2 norm of the transition layer's weight change over it."""

    def state_dict(self) -> dict[str, Any]:
        """Return what it has learned."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""


@dataclass(frozen=True)
class Constant:
    """The same Plan in every step."""

    fixed: Plan = Plan()

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan."""
        return self.fixed
