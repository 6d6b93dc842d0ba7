"""What the schedules of a moving boundary share: the Plan of one step, given the boundary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..errors import PlanError
from ..plan import Freeze, Hebbian, LearningRule, LocalPrefix, Plan, Rule
from ..plan.checks import is_number
from .base import Facts

__all__ = ["MovingPrefix", "check_fraction", "check_whole"]


@dataclass(frozen=True, kw_only=True)
class MovingPrefix:
    """How the layers before a moving boundary learn.

    Args:
        rule: how the layers before the boundary learn.
        norm: the prefix's norms, as in `LocalPrefix`.
        rate_decay: (factor, every): a layer's rate is multiplied by factor every so many epochs,
            counted from the first in which it learns by the rule.
        align: snap the boundary to block edges.
        update_every: the local update runs in the first of every so many steps; between them the
            prefix is frozen.
        refresh_every: the last of every so many steps back-propagates through the whole network
            (ours, not the paper's); None for never.
        weak_supervision: reverse the local updates in each epoch that follows a rise of the mean
            loss (LoCal+SGD, Frontiers, Algorithm 2).

    Raises:
        PlanError: if a value is of the wrong type or out of range.
    """

    rule: Rule = Hebbian()
    norm: Literal["train", "eval"] = "train"
    rate_decay: tuple[float, int] | None = None
    align: bool = True
    update_every: int = 1
    refresh_every: int | None = None
    weak_supervision: bool = True

    def __post_init__(self) -> None:
        if self.rate_decay is not None:
            _check_decay(self.rate_decay)
        for name, switch in (("align", self.align), ("weak_supervision", self.weak_supervision)):
            if not isinstance(switch, bool):
                raise PlanError(f"{name}={switch!r}: give True or False")
        check_whole("update_every", self.update_every, " of steps")
        if self.refresh_every is not None:
            check_whole("refresh_every", self.refresh_every, " of steps")
            if self.refresh_every == 1:
                raise PlanError(
                    "refresh_every=1: every step would back-propagate through all layers, and "
                    "none would be local. Give 2 or more, or None"
                )
        LocalPrefix(until=0, rule=self.rule, norm=self.norm)  # checks these two

    @property
    def period(self) -> int:
        """After how many steps the Plans of an epoch repeat."""
        return math.lcm(self.update_every, self.refresh_every or 1)

    def edges(self, analysis: Facts) -> tuple[int, ...]:
        """Return the block edges that the boundary may move to.

        Raises:
            PlanError: if there are none but the first layer, where it would stay for ever.
        """
        if not any(analysis.boundaries):
            raise PlanError(
                f"{self!r}: the boundary moves by legal block edges, and this model has none "
                "behind the first layer: branches, or a tied weight, span it all. Freeze "
                "(requires_grad_(False)) or untie such a weight. To cut through branches give "
                "align=False"
            )
        return analysis.boundaries

    def plan_at(self, history: Sequence[int], step: int) -> Plan:
        """Return the Plan of one step, given the boundary of each epoch so far.

        Where no rate decays, that of this epoch will do.
        """
        boundary = history[-1]
        refreshed = self.refresh_every is not None and (step + 1) % self.refresh_every == 0
        if boundary == 0 or refreshed:
            return _PLAIN
        rule = self.rule if step % self.update_every == 0 else Freeze()
        rates = self._rates(rule.rate, history) if isinstance(rule, LearningRule) else ()
        return _plan(boundary, rule, self.norm, rates)

    def _rates(self, rate: float, history: Sequence[int]) -> tuple[float, ...]:
        """Return the rate of each layer before the boundary; none where no rate decays."""
        rates: list[float] = []
        if self.rate_decay is not None:
            factor, every = self.rate_decay
            for begun, boundary in enumerate(history):
                age = len(history) - 1 - begun
                rates += [rate * factor ** (age // every)] * (boundary - len(rates))
        return tuple(rates)


_PLAIN = Plan()


@lru_cache(maxsize=64)  # asked in each step
def _plan(until: int, rule: Rule, norm: Literal["train", "eval"], rates: tuple[float, ...]) -> Plan:
    return Plan(local=LocalPrefix(until, rule, norm, rates=rates))


def check_whole(name: str, value: int, of: str = "") -> None:
    """Raise a PlanError unless ``value`` is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{name}={value!r}: give a whole number{of} from 1")


def check_fraction(name: str, value: float, of: str, *, zero: bool = False) -> None:
    """Raise a PlanError unless ``value`` is a fraction in (0, 1), or in [0, 1) with ``zero``."""
    if not is_number(value) or not (value >= 0 if zero else value > 0) or not value < 1:
        interval = "[0, 1)" if zero else "(0, 1)"
        raise PlanError(f"{name}={value!r}: a fraction of the {of}, in {interval}")


def _check_decay(decay: tuple[float, int]) -> None:
    pair = isinstance(decay, (tuple, list)) and len(decay) == 2 and all(map(is_number, decay))
    if not pair or not 0 < decay[0] <= 1 or decay[1] < 1 or decay[1] != int(decay[1]):
        raise PlanError(f"rate_decay={decay!r}: give (factor in (0, 1], every so many epochs >= 1)")
