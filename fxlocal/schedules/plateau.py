"""Approximate early, and compute full gradients once the loss stops falling."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..plan import Plan
from .base import (
    Facts,
    Horizon,
    LearningSchedule,
    Schedule,
    check_schedule,
    find_asked,
    horizon_of,
    possible_plans,
)
from .prefix import check_fraction, check_whole

__all__ = ["Plateau"]


@dataclass(frozen=True)
class Plateau:
    """Another schedule's Plans until the loss stops falling, then without ``weight_grads``.

    Source: gradient approximation, section 3.2: "use approximations early on in training and
    switch to full gradient computation when a validation accuracy plateau has been reached". Ours
    goes by the mean training loss, which costs nothing to have. After epoch E::

        best = min of loss[e] over e <= E - patience
        switch after E  if  loss[e] >= (1 - threshold) * best  for each e in E - patience + 1 .. E

    From the epoch after the first such E on, all weight gradients are exact. There is no way back.
    (Where best is negative, ``1 + threshold`` stands in the place of ``1 - threshold``.)

    A loss that is NaN has not fallen, be it that the run diverged or that none was observed: if
    nobody calls `fxlocal.Driver.observe`, the gradients are exact after patience + 1 epochs.

    The state is ``losses``, one per finished epoch, and what the other schedule has learned.

    Args:
        schedule: the schedule to begin with; a local prefix in its Plans stays.
        patience: epochs without a fall.
        threshold: the fraction of the best loss that a fall has to be larger than, in [0, 1).

    Raises:
        PlanError: if a value is of the wrong type or out of range.

    Example:
        >>> import fxlocal
        >>> from fxlocal.schedules import Constant
        >>> schedule = Plateau(Constant(Plan(weight_grads={"conv2": fxlocal.Zero()})), patience=2)
        >>> for loss in (2.0, 1.0, 1.1, 0.995):
        ...     schedule.end_epoch(None, update_norm=0.0, loss=loss)
        >>> schedule.switch, schedule.plan(None, epoch=3), schedule.plan(None, epoch=4)
        (4, Plan(weight_grads={'conv2': Zero(none=False)}), Plan())
    """

    schedule: Schedule
    patience: int = 3
    threshold: float = 0.01
    losses: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_schedule("schedule", self.schedule)
        check_whole("patience", self.patience, " of epochs")
        check_fraction("threshold", self.threshold, "best loss", zero=True)

    @cached_property  # asked for in every step
    def switch(self) -> int | None:
        """The first epoch of full gradients; None while the losses do not tell it."""
        best = math.inf
        for epoch in range(self.patience + 1, len(self.losses) + 1):
            best = min(best, self.losses[epoch - self.patience - 1])  # best first: NaN is no less
            bound = (1 - math.copysign(self.threshold, best)) * best
            if not any(loss < bound for loss in self.losses[epoch - self.patience : epoch]):
                return epoch
        return None

    def asked(self, analysis: Facts) -> Iterator[tuple[float, int]]:
        """Yield what the schedule asks for, and gets."""
        return find_asked(self.schedule, analysis)

    @property
    def weak_supervision(self) -> bool:
        """Whether the schedule reverses its local updates after a rise of the loss."""
        return getattr(self.schedule, "weak_supervision", False)

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the schedule's Plan, after the switch without ``weight_grads``."""
        plan = self.schedule.plan(analysis, epoch, step, rank)
        switch = self.switch
        return plan if switch is None or epoch < switch else replace(plan, weight_grads={})

    def horizon(self) -> Horizon:
        """Return how far the schedule has to be followed until no new Plan comes."""
        return horizon_of(self.schedule)

    def possible_plans(
        self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0
    ) -> Iterator[Plan]:
        """Yield the schedule's Plans with ``weight_grads`` and without: the switch may come."""
        for plan in possible_plans(self.schedule, analysis, epoch, step, rank):
            if self.switch is None or epoch < self.switch:
                yield plan
            yield replace(plan, weight_grads={})

    def end_epoch(self, analysis: Facts, update_norm: float, loss: float) -> None:
        """Note the loss of the epoch that ends, and let the schedule learn from it."""
        self.losses.append(loss)
        vars(self).pop("switch", None)
        if isinstance(self.schedule, LearningSchedule):
            self.schedule.end_epoch(analysis, update_norm, loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses and what the schedule has learned."""
        learned = self.schedule.state_dict() if isinstance(self.schedule, LearningSchedule) else {}
        return {"losses": list(self.losses), "schedule": learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.losses[:] = state["losses"]
        vars(self).pop("switch", None)
        if isinstance(self.schedule, LearningSchedule):
            self.schedule.load_state_dict(state["schedule"])
