"""Training strategies by name: each makes the schedule that a run follows.

| name | the layers before the boundary |
|---|---|
| ``sgd`` | there is no boundary: plain training |
| ``local-static`` | learn by the Hebbian rule; the boundary follows a curve fixed beforehand |
| ``freeze`` | stand still, at the same boundary: what a local rule has to beat |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import PlanError, nearest
from ..plan import Freeze, Hebbian, Plan, Rule
from ..schedules import Constant, Schedule, Static

__all__ = ["STRATEGIES", "Options", "StrategyError", "build_schedule"]


class StrategyError(ValueError):
    """There is no such strategy, or its options make no schedule."""


@dataclass(frozen=True)
class Options:
    """How strategies go about it; each takes what concerns it.

    The default start lies behind the first fall of the learning rate: layers that stop learning
    from errors before it cost accuracy. At larger rates a Hebbian prefix forgets what it knew.
    """

    curve: Annotated[
        Literal["linear", "quadratic", "exponential"], "How the boundary moves over the epochs"
    ] = "quadratic"
    largest: Annotated[float, "Fraction of the layers before the boundary in the end"] = 0.6
    start: Annotated[float, "Fraction of the epochs after which the boundary moves"] = 0.35
    rate: Annotated[float, "Length of one Hebbian step, in weight units"] = 1e-4
    rate_decay: Annotated[
        tuple[float, int] | None, "Multiply the rate by the first number every so many epochs"
    ] = None
    norm: Annotated[
        Literal["train", "eval"], "Batch norms before the boundary: batch or running statistics"
    ] = "train"
    align: Annotated[bool, "Move the boundary to edges of blocks only"] = True


def _static(epochs: int, options: Options, rule: Rule) -> Schedule:
    return Static(
        epochs,
        curve=options.curve,
        largest=options.largest,
        start=options.start,
        rule=rule,
        norm=options.norm,
        rate_decay=options.rate_decay if isinstance(rule, Hebbian) else None,
        align=options.align,
    )


def sgd(epochs: int, options: Options) -> Schedule:
    """Train every layer by back-propagation throughout."""
    return Constant(Plan())


def local_static(epochs: int, options: Options) -> Schedule:
    """Let the Hebbian rule train a prefix that grows along a fixed curve (LoCal+SGD)."""
    return _static(epochs, options, Hebbian(options.rate))


def freeze(epochs: int, options: Options) -> Schedule:
    """Freeze the prefix that ``local-static`` would train."""
    return _static(epochs, options, Freeze())


STRATEGIES: dict[str, Callable[[int, Options], Schedule]] = {
    "sgd": sgd,
    "local-static": local_static,
    "freeze": freeze,
}


def build_schedule(name: str, epochs: int, options: Options) -> Schedule:
    """Make the schedule of the strategy called ``name`` for a run of ``epochs``.

    Raises:
        StrategyError: if there is no such strategy, or its options are out of range.
    """
    if name not in STRATEGIES:
        raise StrategyError(f"unknown strategy {name!r}. Nearest: {nearest(name, STRATEGIES)}")
    try:
        return STRATEGIES[name](epochs, options)
    except PlanError as error:
        raise StrategyError(f"strategy {name!r}: {error}") from error
