"""What to do to a model in one training step: frozen, hashable, printable; imports no torch.

A Plan's ``repr`` can be pasted back into Python.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from .errors import PlanError

__all__ = ["Freeze", "Hebbian", "LocalPrefix", "Plan", "Rule"]


@dataclass(frozen=True)
class Hebbian:
    """Move each weight of the prefix one normalised Hebbian step per forward.

    Equation (LoCal+SGD, Figure 1, eq. 3 and 4): ``W += rate * delta / ||delta||`` with
    ``delta`` the product of the layer's input and pre-activation output; see `fxlocal.ops.hebbian`.

    Args:
        rate: the L2 length of one step, in weight units; finite, not negative.
    """

    rate: float = 1e-4

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)):
            raise PlanError(f"Hebbian(rate={self.rate!r}): the rate must be a number")
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise PlanError(f"Hebbian(rate={self.rate!r}): the rate must be finite and at least 0")


@dataclass(frozen=True)
class Freeze:
    """Leave each weight of the prefix as it is: the baseline that a local rule has to beat."""


Rule: TypeAlias = Hebbian | Freeze


@dataclass(frozen=True)
class LocalPrefix:
    """Train every layer before ``until`` by ``rule``; back-propagation stops at the cut.

    Args:
        until: the transition layer, the first one trained by back-propagation. A module path
            (a layer, or a block or stage, which means its first layer), an index into
            ``analysis.layers``, or a fraction in (0, 1) of the number of layers, snapped down to
            a block edge. 0 is plain training.
        rule: how the layers before it learn.
        norm: ``"train"`` lets batch norms before ``until`` use and update batch statistics as
            usual; ``"eval"`` makes them use, and keep, their running statistics.

    Raises:
        PlanError: if a value is of the wrong type or out of range.
    """

    until: str | int | float
    rule: Rule = Hebbian()
    norm: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        until = self.until
        if isinstance(until, bool) or not isinstance(until, (str, int, float)):
            raise PlanError(
                f"until={until!r}: give a module path, a layer index, or a fraction in (0, 1)"
            )
        if isinstance(until, float) and not 0 < until < 1:
            raise PlanError(
                f"until={until!r}: a fraction must lie in (0, 1); a layer index is an int"
            )
        if isinstance(until, int) and until < 0:
            raise PlanError(f"until={until!r}: a layer index counts from 0")
        if not isinstance(self.rule, (Hebbian, Freeze)):
            raise PlanError(f"rule={self.rule!r}: give Hebbian(rate=...) or Freeze()")
        if self.norm not in ("train", "eval"):
            raise PlanError(f"norm={self.norm!r}: give 'train' or 'eval'")


@dataclass(frozen=True)
class Plan:
    """What to do to a model in one training step. ``Plan()`` is plain training.

    Args:
        local: the layers that learn without back-propagation, if any.
    """

    local: LocalPrefix | None = None

    def __post_init__(self) -> None:
        if self.local is not None and not isinstance(self.local, LocalPrefix):
            raise PlanError(f"local={self.local!r}: give LocalPrefix(until=...) or None")

    @property
    def rate(self) -> float:
        """The rate of the local rule; 0 where nothing learns locally."""
        rule = self.local.rule if self.local else None
        return rule.rate if isinstance(rule, Hebbian) else 0.0

    def with_rate(self, rate: float) -> "Plan":
        """Return this plan with another rate: the same graph, another value in a buffer."""
        if self.local is None or not isinstance(self.local.rule, Hebbian):
            return self
        return Plan(local=replace(self.local, rule=Hebbian(rate=rate)))
