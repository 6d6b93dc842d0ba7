"""What a schedule is, and the simplest one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..errors import PlanError
from ..facts import Layer
from ..plan import Plan

__all__ = ["Constant", "Facts", "LearningSchedule", "Schedule", "check_schedule"]


class Facts(Protocol):
    """What a schedule reads of an `fxlocal.Analysis`."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The model's layers, in execution order."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The indices at which a block begins."""

    def boundary(self, until: str | int | float) -> int:
        """Return the index of the transition layer that ``until`` of a `LocalPrefix` means."""


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

    def end_epoch(self, analysis: Facts, update_norm: float, loss: float) -> None:
        """Learn from an epoch.

        Args:
            analysis: the model.
            update_norm: the L2 norm of the transition layer's weight change over the epoch.
            loss: its mean observed loss; NaN if none was observed.
        """

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


def check_schedule(name: str, schedule: Schedule) -> None:
    """Raise a PlanError unless ``schedule`` is one."""
    if isinstance(schedule, type) or not callable(getattr(schedule, "plan", None)):
        raise PlanError(f"{name}={schedule!r}: give a schedule, such as Constant(Plan())")
