"""A Plan, and the local prefix of one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from ..errors import PlanError
from .checkpoint import Checkpoint
from .checks import changed, is_number
from .drop import StochasticDepth
from .modules import LocalModules
from .rules import Hebbian, LearningRule, Oja, Rule
from .weight_grads import WeightGrad, WeightGrads

__all__ = ["LocalPrefix", "Plan"]


@dataclass(frozen=True, repr=False)
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
        rates: a rate for each layer before ``until``, in execution order, in place of the rule's
            (LoCal+SGD, Algorithm 2: lr_L); none for the rule's own in all.

    Raises:
        PlanError: if a value is of the wrong type or out of range.
    """

    until: str | int | float
    rule: Rule = Hebbian()
    norm: Literal["train", "eval"] = "train"
    rates: tuple[float, ...] = ()

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
        if not isinstance(self.rule, Rule):
            raise PlanError(
                f"rule={self.rule!r}: give Hebbian(), Oja(), Freeze(), or Custom(function) for a "
                "rule of your own"
            )
        if isinstance(self.rule, (Hebbian, Oja)) and type(self.rule) not in (Hebbian, Oja):
            raise PlanError(
                f"rule={self.rule!r}: what a subclass of Hebbian or Oja adds would do nothing. "
                "Give one of these, or Custom(function) for a rule of your own"
            )
        if self.norm not in ("train", "eval"):
            raise PlanError(f"norm={self.norm!r}: give 'train' or 'eval'")
        if isinstance(self.rates, list):
            object.__setattr__(self, "rates", tuple(self.rates))
        listed = self.rates if isinstance(self.rates, tuple) else (None,)
        if not all(is_number(rate) and rate >= 0 for rate in listed):
            raise PlanError(
                f"rates={self.rates!r}: give a tuple of numbers, finite and at least 0, one for "
                "each layer before the boundary"
            )
        if self.rates and not isinstance(self.rule, LearningRule):
            raise PlanError(f"rates={self.rates!r}: {self.rule!r} has no rate. Leave them out")

    def __repr__(self) -> str:  # of the rates, which most do without, those that are given
        rates = f", rates={self.rates!r}" if self.rates else ""
        return f"LocalPrefix(until={self.until!r}, rule={self.rule!r}, norm={self.norm!r}{rates})"


@dataclass(frozen=True, repr=False)
class Plan:
    """What to do to a model in one training step. ``Plan()`` is plain training.

    Args:
        local: the layers that learn without back-propagation, if any.
        weight_grads: how the weight gradients of layers are computed, by module path; a layer that
            is not named has its exact one. A module that is called more than once is named once.
        modules: local modules with losses of their own, if any; the network then takes a target
            and returns its output and loss.
        checkpoint: activation checkpointing, if any; it keeps less memory, and gradients exact.
        drop: stochastic depth, if any: residual blocks are computed for a part of the batch, or
            of the steps, alone.

    Raises:
        PlanError: if a part is of the wrong type, or local modules are to be checkpointed, or to
            leave out whole blocks.
    """

    local: LocalPrefix | None = None
    weight_grads: Mapping[str, WeightGrad] = WeightGrads()
    modules: LocalModules | None = None
    checkpoint: Checkpoint | None = None
    drop: StochasticDepth | None = None

    def __post_init__(self) -> None:
        if self.local is not None and not isinstance(self.local, LocalPrefix):
            raise PlanError(f"local={self.local!r}: give LocalPrefix(until=...) or None")
        if self.modules is not None and not isinstance(self.modules, LocalModules):
            raise PlanError(f"modules={self.modules!r}: give LocalModules(count=...) or None")
        if self.checkpoint is not None and not isinstance(self.checkpoint, Checkpoint):
            raise PlanError(f"checkpoint={self.checkpoint!r}: give Checkpoint(count=...) or None")
        if self.drop is not None and not isinstance(self.drop, StochasticDepth):
            raise PlanError(f"drop={self.drop!r}: give StochasticDepth(rate=...) or None")
        if self.drop and self.drop.mode == "block" and self.modules:
            raise PlanError(
                f"{self.drop!r} contradicts {self.modules!r}: a module is run as a whole. Give "
                "mode='row', or leave out one"
            )
        if self.checkpoint and self.modules:
            raise PlanError(
                f"{self.checkpoint!r} contradicts {self.modules!r}: a module's activations are "
                "freed by its own backward, so there is nothing to compute again. Leave out one"
            )
        if not isinstance(self.weight_grads, WeightGrads):
            object.__setattr__(self, "weight_grads", WeightGrads(self.weight_grads))

    def __repr__(self) -> str:  # the parts that ask for something
        return f"Plan({', '.join(f'{n}={part!r}' for n, part in vars(self).items() if part)})"

    @property
    def rate(self) -> float:
        """The rate of the local rule, the least of its layers'; 0 where nothing learns locally."""
        rule = self.local.rule if self.local else None
        return min(self.rates, default=rule.rate) if isinstance(rule, LearningRule) else 0.0

    @property
    def rates(self) -> tuple[float, ...]:
        """The rate of each layer before the boundary, where the Plan names them."""
        return self.local.rates if self.local else ()

    def with_rate(self, rate: float) -> "Plan":
        """Return this plan with another rate: the same graph, another value in a buffer."""
        if self.local is None or not isinstance(self.local.rule, LearningRule):
            return self
        return _with_rate(self, self.local, self.local.rule, rate)


@lru_cache(maxsize=64)  # asked in each step
def _with_rate(plan: Plan, local: LocalPrefix, rule: LearningRule, rate: float) -> Plan:
    rates = (rate,) * len(local.rates)
    return replace(plan, local=replace(local, rule=changed(rule, rate=rate), rates=rates))
