"""Which Plan holds for each epoch and step; imports no torch.

A schedule is anything with ``plan(analysis, epoch, step=0, rank=0) -> Plan`` and a ``repr`` that
tells it from another.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from .errors import PlanError
from .plan import Freeze, Hebbian, LocalPrefix, Plan, Rule

__all__ = ["Constant", "Facts", "Schedule", "Static"]


class Facts(Protocol):
    """What a schedule reads of an `fxlocal.Analysis`."""

    @property
    def layers(self) -> tuple[object, ...]:
        """The model's layers."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The indices at which a block begins."""


class Schedule(Protocol):
    """Anything that says which Plan holds when."""

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of one step; epochs, steps and ranks count from 0."""


@dataclass(frozen=True)
class Constant:
    """The same Plan in every step."""

    fixed: Plan = Plan()

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan."""
        return self.fixed


Curve = Literal["linear", "quadratic", "exponential"]


@dataclass(frozen=True)
class Static:
    """A boundary that moves right along a curve, the same for every run.

    Equations (LoCal+SGD, Frontiers, eq. 2 to 4), N the index of the transition layer in epoch E of
    Emax, E counting from 1, L the number of layers::

        linear       N = floor(max(c1 * Emax + c2 * E, 0))
        quadratic    N = floor(max(c1 - c2 * (E - Emax)^2, 0))
        exponential  N = floor(max(exp(c2 * E) - c1 * Emax, 0))

    c1 and c2 are derived from ``largest`` and ``start``, such that N is 0 up to E = start * Emax
    and largest * L in the last epoch, or given as they are.

    Args:
        epochs: Emax, the length of the run.
        curve: "linear", "quadratic" or "exponential".
        largest: the fraction of layers before the boundary in the last epoch, in (0, 1).
        start: the fraction of the epochs before the boundary leaves 0, in [0, 1).
        rule: how the layers before the boundary learn.
        norm: the prefix's norms, as in `LocalPrefix`.
        rate_decay: (factor, every): the rule's rate is multiplied by factor every so many epochs.
        align: snap the boundary down to a block edge.
        update_every: the local update runs in the first of every so many steps; between them the
            prefix is frozen.
        refresh_every: the last of every so many steps back-propagates through the whole network
            (ours, not the paper's); None for never.
        c1: the paper's parameter, in layers (an epoch, for linear and exponential); with c2, in
            place of ``largest`` and ``start``.
        c2: the paper's other parameter; not negative, else the boundary would move left.

    Raises:
        PlanError: if a value is out of range, or only one of c1 and c2 is given.

    Example:
        >>> schedule = Static(epochs=10, largest=0.5, start=0.2, align=False)
        >>> [schedule.boundary(20, epoch) for epoch in range(10)]
        [0, 0, 2, 4, 6, 7, 8, 9, 9, 10]
    """

    epochs: int
    curve: Curve = "quadratic"
    largest: float = 0.6
    start: float = 0.35
    rule: Rule = Hebbian()
    norm: Literal["train", "eval"] = "train"
    rate_decay: tuple[float, int] | None = None
    align: bool = True
    c1: float | None = None
    c2: float | None = None
    update_every: int = 1
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        if self.curve not in _CURVES:
            raise PlanError(f"curve={self.curve!r}: give one of {', '.join(_CURVES)}")
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise PlanError(f"epochs={self.epochs!r}: give a whole number from 1")
        if not 0 < self.largest < 1:
            raise PlanError(f"largest={self.largest!r}: a fraction of the layers, in (0, 1)")
        if not 0 <= self.start < 1:
            raise PlanError(f"start={self.start!r}: a fraction of the epochs, in [0, 1)")
        if (self.c1 is None) != (self.c2 is None):
            raise PlanError(f"c1={self.c1!r}, c2={self.c2!r}: give both or neither")
        for name, value in (("c1", self.c1), ("c2", self.c2)):
            if value is not None and not math.isfinite(value):
                raise PlanError(f"{name}={value!r}: give a finite number")
        if self.c2 is not None and self.c2 < 0:
            raise PlanError(f"c2={self.c2!r}: at least 0, else the boundary would move left")
        if self.rate_decay is not None:
            _check_decay(self.rate_decay)
        for name, every in (
            ("update_every", self.update_every),
            ("refresh_every", 2 if self.refresh_every is None else self.refresh_every),
        ):
            if isinstance(every, bool) or not isinstance(every, int) or every < 1:
                raise PlanError(f"{name}={every!r}: give a whole number of steps from 1")
        LocalPrefix(until=0, rule=self.rule, norm=self.norm)  # checks these two

    def boundary(self, num_layers: int, epoch: int) -> int:
        """Return the index of the transition layer in ``epoch``, from 0, before snapping."""
        c1, c2 = self.c1, self.c2
        if c1 is None or c2 is None:
            c1, c2 = self._derive(num_layers)
        value = _CURVES[self.curve](c1, c2, epoch + 1, self.epochs)
        layers = math.floor(max(min(value, float(num_layers)), 0) + 1e-9)  # 0.6 * 20 is 12
        return min(layers, max(num_layers - 1, 0))

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of ``epoch``; epochs past the last one keep the last boundary."""
        boundary = self.boundary(len(analysis.layers), min(epoch, self.epochs - 1))
        if self.align:
            boundary = max((edge for edge in analysis.boundaries if edge <= boundary), default=0)
        refreshed = self.refresh_every is not None and (step + 1) % self.refresh_every == 0
        if boundary == 0 or refreshed:
            return Plan()
        rule = self.rule if step % self.update_every == 0 else Freeze()
        plan = Plan(local=LocalPrefix(until=boundary, rule=rule, norm=self.norm))
        if self.rate_decay is None:
            return plan
        factor, every = self.rate_decay
        return plan.with_rate(plan.rate * factor ** (epoch // every))

    def _derive(self, num_layers: int) -> tuple[float, float]:
        """Return the (c1, c2) that ``largest`` and ``start`` mean."""
        most, last = self.largest * num_layers, float(self.epochs)
        first = self.start * last
        if self.curve == "quadratic":
            return most, most / (last - first) ** 2
        if self.curve == "linear":
            slope = most / (last - first)
            return -slope * self.start, slope
        # exp(c2 * last) - exp(c2 * first) rises with c2: bisect for the value ``most``.
        low, high = 0.0, 1 / last
        while _rise(high, first, last) < most:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _rise(middle, first, last) < most else (low, middle)
        return math.exp(high * first) / last, high


def _rise(c2: float, first: float, last: float) -> float:
    return math.exp(c2 * last) - math.exp(c2 * first)


def _check_decay(decay: tuple[float, int]) -> None:
    pair = isinstance(decay, (tuple, list)) and len(decay) == 2
    if not pair or not 0 < decay[0] <= 1 or decay[1] < 1 or decay[1] != int(decay[1]):
        raise PlanError(f"rate_decay={decay!r}: give (factor in (0, 1], every so many epochs >= 1)")


def _exponential(c1: float, c2: float, epoch: float, last: float) -> float:
    return math.exp(min(c2 * epoch, 700.0)) - c1 * last


_CURVES: dict[str, Callable[[float, float, float, float], float]] = {
    "linear": lambda c1, c2, epoch, last: c1 * last + c2 * epoch,
    "quadratic": lambda c1, c2, epoch, last: c1 - c2 * (epoch - last) ** 2,
    "exponential": _exponential,
}
