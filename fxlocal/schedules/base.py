"""What a schedule is, what it can still produce, and the simplest one."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..errors import PlanError
from ..facts import Layer
from ..plan import Plan

__all__ = [
    "Constant",
    "Facts",
    "Horizon",
    "LearningSchedule",
    "Schedule",
    "check_plan",
    "check_schedule",
    "find_asked",
    "find_plans",
    "horizon_of",
    "length_of",
    "possible_plans",
]


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

    With a method ``horizon() -> Horizon``, a `Driver` refuses a Plan to come that does not fit the
    model when it is made, else when it comes. A schedule whose Plans depend on the run says by
    ``possible_plans(analysis, epoch, step, rank)`` which there may be from that epoch on.
    """

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of one step; epochs, steps and ranks count from 0.

        It is asked for the epoch behind the last one too, when that ends.
        """


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
class Horizon:
    """How far a schedule has to be followed until no new Plan comes.

    Attributes:
        epochs: no later epoch has a Plan that none of the first ``epochs`` had.
        start: the step of an epoch from which on its Plans repeat.
        period: after how many steps they do.
    """

    epochs: int = 1
    start: int = 0
    period: int = 1

    def joined(self, other: "Horizon") -> "Horizon":
        """Return how far two schedules have to be followed together."""
        epochs, start = max(self.epochs, other.epochs), max(self.start, other.start)
        return Horizon(epochs, start, math.lcm(self.period, other.period))


def horizon_of(schedule: Schedule) -> Horizon:
    """Return how far ``schedule`` has to be followed: one step, if it does not say."""
    horizon: Horizon = getattr(schedule, "horizon", Horizon)()
    return horizon


def length_of(schedule: Schedule) -> int | None:
    """Return for how many epochs ``schedule`` was made, if it says so by its ``epochs``."""
    epochs = getattr(schedule, "epochs", None)
    return epochs if isinstance(epochs, int) else None


def possible_plans(
    schedule: Schedule, analysis: Facts, epoch: int, step: int = 0, rank: int = 0
) -> Iterable[Plan]:
    """Return the Plans of one step: one, or what a learning schedule may come to from there on."""
    told = getattr(schedule, "possible_plans", None)
    if callable(told):
        plans: Iterable[Plan] = told(analysis, epoch, step, rank)
        return plans
    return (schedule.plan(analysis, epoch, step, rank),)


def find_plans(
    schedule: Schedule, analysis: Facts, epoch: int = 0, rank: int = 0
) -> tuple[Plan, ...]:
    """Return every distinct Plan, rates aside, that ``schedule`` can produce from ``epoch`` on.

    Of those that differ by rate, it is that of the smallest, whose steps rounding loses first.

    Raises:
        PlanError: as the schedule raises it, for a step to come.
    """
    horizon, found = horizon_of(schedule), dict[Plan, Plan]()
    for later in range(epoch, max(horizon.epochs, epoch + 1)):
        for step in range(horizon.start + horizon.period):
            for plan in possible_plans(schedule, analysis, later, step, rank):
                check_plan(plan, f"the schedule {schedule!r} returned for epoch {later}")
                kept = found.setdefault(key := plan.with_rate(0.0), plan)
                if 0 < plan.rate < kept.rate:
                    found[key] = plan
    return tuple(found.values())


def find_asked(
    schedule: Schedule, analysis: Facts, plans: Iterable[Plan] = ()
) -> Iterator[tuple[float, int]]:
    """Yield how many layers ``schedule`` wants local, and how many it gets, as edges are few.

    Of those of its ``plans`` that ask by a fraction, and of what its method ``asked(analysis)``
    tells, if it has one.
    """
    for plan in plans:
        if plan.local is not None and isinstance(until := plan.local.until, float):
            yield until * len(analysis.layers), analysis.boundary(until)
    if callable(told := getattr(schedule, "asked", None)):
        yield from told(analysis)


@dataclass(frozen=True)
class Constant:
    """The same Plan in every step."""

    fixed: Plan = Plan()

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan."""
        return self.fixed


def check_plan(plan: object, where: str) -> None:
    """Raise a PlanError unless ``plan``, which came from ``where``, is one."""
    if not isinstance(plan, Plan):
        raise PlanError(f"{where} {plan!r}: give a Plan, as in Plan(local=LocalPrefix(until=...))")


def check_schedule(name: str, schedule: Schedule) -> None:
    """Raise a PlanError unless ``schedule`` is one, and learns with all methods or none."""
    if isinstance(schedule, type) or not callable(getattr(schedule, "plan", None)):
        raise PlanError(f"{name}={schedule!r}: give a schedule, such as Constant(Plan())")
    if hasattr(schedule, "end_epoch") and not isinstance(schedule, LearningSchedule):
        raise PlanError(
            f"{name}={type(schedule).__name__}: it has end_epoch, and not both state_dict and "
            "load_state_dict, by which a resumed run knows what it has learned: add them"
        )
