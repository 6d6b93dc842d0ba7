"""A boundary that moves along a curve, the same for every run."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import PlanError
from ..plan import Plan
from ..plan.checks import changed
from .base import Facts, Horizon
from .prefix import MovingPrefix, check_fraction, check_whole

__all__ = ["Static"]

Curve = Literal["linear", "quadratic", "exponential", "step"]


@dataclass(frozen=True)
class Static(MovingPrefix):
    """A boundary that moves right along a curve, the same for every run.

    Equations (LoCal+SGD, Frontiers, eq. 2 to 4), N the index of the transition layer in epoch E of
    Emax, E counting from 1, L the number of layers::

        linear       N = floor(max(c1 * Emax + c2 * E, 0))
        quadratic    N = floor(max(c1 - c2 * (E - Emax)^2, 0))
        exponential  N = floor(max(exp(c2 * E) - c1 * Emax, 0))
        step         N = floor(c1) where E > c2, else 0           (ours: all at once)

    c1 and c2 are derived from ``largest`` and ``start``, such that N is 0 up to E = start * Emax
    and largest * L in the last epoch, or given as they are.

    Args:
        epochs: Emax, the length of the run.
        curve: "linear", "quadratic", "exponential" or "step".
        largest: the fraction of layers before the boundary in the last epoch, in (0, 1).
        start: the fraction of the epochs before the boundary leaves 0, in [0, 1).
        c1: the paper's parameter, in layers (an epoch, for linear and exponential); with c2, in
            place of ``largest`` and ``start``.
        c2: the paper's other parameter; not negative, else the boundary would move left.
        rule, norm, rate_decay, align, update_every, refresh_every, weak_supervision: by keyword,
            as in `MovingPrefix`; align snaps the boundary down.

    Raises:
        PlanError: if a value is out of range, only one of c1 and c2 is given, or ``largest`` or
            ``start`` beside them.

    Example:
        >>> class Facts:
        ...     layers, boundaries = tuple(range(20)), tuple(range(0, 20, 4))
        >>> schedule = Static(epochs=10, largest=0.5, start=0.2)
        >>> [schedule.boundary(Facts, epoch) for epoch in range(10)]
        [0, 0, 0, 4, 4, 4, 8, 8, 8, 8]
    """

    epochs: int
    curve: Curve = "quadratic"
    largest: float = 0.6
    start: float = 0.35
    c1: float | None = None
    c2: float | None = None
    _known: dict[Any, list[int]] = field(  # the boundary of each epoch, by model
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.curve not in _CURVES:
            raise PlanError(f"curve={self.curve!r}: give one of {', '.join(_CURVES)}")
        check_whole("epochs", self.epochs)
        check_fraction("largest", self.largest, "layers")
        check_fraction("start", self.start, "epochs", zero=True)
        if (self.c1 is None) != (self.c2 is None):
            raise PlanError(f"c1={self.c1!r}, c2={self.c2!r}: give both or neither")
        for name, value in (("c1", self.c1), ("c2", self.c2)):
            if value is not None and not math.isfinite(value):
                raise PlanError(f"{name}={value!r}: give a finite number")
        if self.c2 is not None and self.c2 < 0:
            raise PlanError(f"c2={self.c2!r}: at least 0, else the boundary would move left")
        for name in ("largest", "start") if self.c1 is not None else ():
            if (value := getattr(self, name)) != getattr(Static, name):
                raise PlanError(f"{name}={value!r}: changes nothing beside c1 and c2. Leave it out")
        super().__post_init__()

    def boundary(self, analysis: Facts, epoch: int) -> int:
        """Return the index of the transition layer in ``epoch``, from 0.

        Epochs past the last one keep its boundary.
        """
        num_layers, epoch = len(analysis.layers), min(epoch, self.epochs - 1)
        c1, c2 = self.c1, self.c2
        if c1 is None or c2 is None:
            c1, c2 = self._derive(num_layers)
        value = _CURVES[self.curve](c1, c2, epoch + 1, self.epochs)
        layers = math.floor(max(min(value, float(num_layers)), 0) + 1e-9)  # 0.6 * 20 is 12
        boundary = min(layers, max(num_layers - 1, 0))
        if not self.align or not boundary:
            return boundary
        return max((edge for edge in self.edges(analysis) if edge <= boundary), default=0)

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of ``epoch``."""
        if self.rate_decay is None:
            return self.plan_at([self.boundary(analysis, epoch)], step)
        known = self._known.setdefault((len(analysis.layers), analysis.boundaries), [])
        known += [self.boundary(analysis, later) for later in range(len(known), epoch + 1)]
        return self.plan_at(known[: epoch + 1], step)

    def horizon(self) -> Horizon:
        """Return how far the schedule has to be followed until no new Plan comes."""
        return Horizon(self.epochs, period=self.period)

    def asked(self, analysis: Facts) -> Iterator[tuple[float, int]]:
        """Yield the boundary of each epoch as it would be without edges, and as it is."""
        free = changed(self, align=False)
        for epoch in range(self.epochs):
            yield free.boundary(analysis, epoch), self.boundary(analysis, epoch)

    def _derive(self, num_layers: int) -> tuple[float, float]:
        """Return the (c1, c2) that ``largest`` and ``start`` mean."""
        most, last = self.largest * num_layers, float(self.epochs)
        first = self.start * last
        if self.curve == "step":
            return most, first
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


def _exponential(c1: float, c2: float, epoch: float, last: float) -> float:
    return math.exp(min(c2 * epoch, 700.0)) - c1 * last


_CURVES: dict[str, Callable[[float, float, float, float], float]] = {
    "linear": lambda c1, c2, epoch, last: c1 * last + c2 * epoch,
    "quadratic": lambda c1, c2, epoch, last: c1 - c2 * (epoch - last) ** 2,
    "exponential": _exponential,
    "step": lambda c1, c2, epoch, last: c1 if epoch > c2 + 1e-9 else 0.0,
}
