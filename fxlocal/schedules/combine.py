"""Two schedules in one run: the parts of both their Plans."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PlanError
from ..plan import Plan
from .base import (
    Facts,
    Horizon,
    LearningSchedule,
    Schedule,
    check_schedule,
    find_asked,
    horizon_of,
    length_of,
    possible_plans,
)

__all__ = ["combine"]


def combine(first: Schedule, second: Schedule) -> Schedule:
    """Return a schedule whose Plans have the parts of both.

    Layers before the boundary have no weight gradient: the methods that either schedule has for
    them are dropped. A module that is called on both sides of the boundary keeps its method.

    It learns from the run if either does, and reverses local updates (see `Schedule`) if either
    asks for that.

    Args:
        first: a schedule.
        second: another; which one comes first makes no difference to the Plans.

    Raises:
        PlanError: if one is no schedule; from ``plan``, if both ask for a local prefix, for
            different methods for the same layer, or for different local modules.

    Example:
        >>> import fxlocal
        >>> from fxlocal import schedules
        >>> from torch import nn
        >>> analysis = fxlocal.analyze(nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(6))))
        >>> prefix = schedules.Static(epochs=2, largest=0.5, start=0, rule=fxlocal.Freeze())
        >>> both = combine(prefix, schedules.Approximation.named("schedule-1", fxlocal.Zero()))
        >>> plan = both.plan(analysis, epoch=1)
        >>> plan.local.until, plan.weight_grads
        (3, {'5': Zero(none=False)})
    """
    check_schedule("combine's first", first)
    check_schedule("combine's second", second)
    learns = isinstance(first, LearningSchedule) or isinstance(second, LearningSchedule)
    return _Learning(first, second) if learns else _Combined(first, second)


@dataclass(frozen=True, repr=False)
class _Combined:
    first: Schedule
    second: Schedule

    def __repr__(self) -> str:
        return f"combine({self.first!r}, {self.second!r})"

    @property
    def weak_supervision(self) -> bool:
        """Whether either reverses its local updates after a rise of the loss."""
        return any(getattr(one, "weak_supervision", False) for one in (self.first, self.second))

    @property
    def epochs(self) -> int | None:
        """The length of the run, as the shorter of the two knows it."""
        return min(filter(None, map(length_of, (self.first, self.second))), default=None)

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of both."""
        first = self.first.plan(analysis, epoch, step, rank)
        return self._joined(analysis, first, self.second.plan(analysis, epoch, step, rank))

    def horizon(self) -> Horizon:
        """Return how far the schedule has to be followed until no new Plan comes."""
        return horizon_of(self.first).joined(horizon_of(self.second))

    def possible_plans(
        self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0
    ) -> Iterator[Plan]:
        """Yield each pair of Plans that the two may come to, joined."""
        seconds = tuple(possible_plans(self.second, analysis, epoch, step, rank))
        for first in possible_plans(self.first, analysis, epoch, step, rank):
            for second in seconds:
                yield self._joined(analysis, first, second)

    def asked(self, analysis: Facts) -> Iterator[tuple[float, int]]:
        """Yield what either asks for, and gets."""
        yield from find_asked(self.first, analysis)
        yield from find_asked(self.second, analysis)

    def _joined(self, analysis: Facts, first: Plan, second: Plan) -> Plan:
        self._refuse_contradictions(first, second)
        local = first.local or second.local
        methods = {**first.weight_grads, **second.weight_grads}
        if local is not None and methods:
            boundary = analysis.boundary(local.until)
            before = {layer.path for layer in analysis.layers[:boundary]}
            before -= {layer.path for layer in analysis.layers[boundary:]}
            methods = {path: method for path, method in methods.items() if path not in before}
        names = ("modules", "checkpoint", "drop")
        others = {name: getattr(first, name) or getattr(second, name) for name in names}
        return Plan(local, methods, **others)

    def _refuse_contradictions(self, first: Plan, second: Plan) -> None:
        if first.local and second.local:
            raise PlanError(
                f"{self!r}: both ask for a local prefix, the first for {first.local}, the second "
                f"for {second.local}. A model has one boundary: leave the prefix to one of them"
            )
        for part in ("modules", "checkpoint", "drop"):
            one, other = getattr(first, part), getattr(second, part)
            if one and other and one != other:
                done = "leaves out blocks" if part == "drop" else "is split"
                raise PlanError(
                    f"{self!r}: the first asks for {one}, the second for {other}. A model {done} "
                    "in one way: leave it to one of them"
                )
        for path, method in first.weight_grads.items():
            if (rival := second.weight_grads.get(path, method)) != method:
                raise PlanError(
                    f"{self!r}: the first asks for {method} in layer {path!r}, the second for "
                    f"{rival}. A weight gradient is computed in one way: let them select other "
                    "layers, steps or ranks"
                )


@dataclass(frozen=True, repr=False)
class _Learning(_Combined):
    def end_epoch(self, analysis: Facts, update_norm: float, loss: float) -> None:
        """Let those that learn do so."""
        for schedule in self._learners().values():
            schedule.end_epoch(analysis, update_norm, loss)

    def state_dict(self) -> dict[str, Any]:
        """Return what they have learned, by "first" and "second"."""
        return {name: schedule.state_dict() for name, schedule in self._learners().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for name, schedule in self._learners().items():
            schedule.load_state_dict(state[name])

    def _learners(self) -> dict[str, LearningSchedule]:
        both = {"first": self.first, "second": self.second}
        return {name: one for name, one in both.items() if isinstance(one, LearningSchedule)}
