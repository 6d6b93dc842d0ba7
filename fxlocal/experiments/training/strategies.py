"""Training strategies by name: each is a function that makes the schedule that a run follows.

| name | the layers before the boundary |
|---|---|
| ``sgd`` | there is no boundary: plain training |
| ``prune-train`` | nor is there here: the model itself becomes smaller, by `fxlocal.PruneTrain` |
| ``local-static`` | learn by the rule; the boundary follows a curve fixed beforehand |
| ``local-dynamic`` | learn by the rule; the boundary follows the transition layer's updates |
| ``freeze`` | stand still, with ``local-static``'s boundary: what a local rule has to beat |
| ``freeze-eval`` | stand still, their norms with running statistics |
| ``freeze-dynamic`` | stand still, with ``local-dynamic``'s boundary |
| ``refresh`` | as ``freeze-eval``, but every fourth step back-propagates through all layers |

``zero``, ``random`` and ``topk`` back-propagate through all layers; some convolutions' weight
gradient is zero, drawn from a normal distribution, or that of the largest errors.

``greedy``, ``dgl``, ``infopro`` and ``backlink`` split the network into local modules, each with a
loss of its own. What crosses a border are activations, by way of a replay buffer (``dgl``), from
which a decoder can reconstruct the image (``infopro``), or with errors over the last blocks of the
module before (``backlink``). ``checkpoint`` saves as much memory with exact gradients.

A function's keywords are the arguments of a spec (see `fxlocal.experiments.training.specs`):

- ``curve``, ``largest``, ``start``: how the boundary moves, up to which share of layers (0.6, of
  a window 0.75), after which of the epochs (behind the first fall of the learning rate: before it
  layers must not stop learning from errors); or, as the paper has them, ``c1`` and ``c2``.
- ``average``, ``alpha``, ``shift``: as in `fxlocal.schedules.Dynamic`; ``rate_decay``, ``norm``,
  ``weak_supervision``, ``update_every``, ``refresh_every``, ``align``: as in `Static` there.
- ``rule``, ``rate``, ``relative``: how local layers learn, or by which function of the user's
  (`fxlocal.Custom`); the length of a step, in weight units or of the weight. Large ones forget.
- ``modulation``: a `torch.optim` optimizer of that kind, whose learning rate is ``rate``, moves the
  local layers along their normalised deltas, which the papers reject. Of runs, not of schedules.
- ``cache``, ``augmentations``: bytes of a `fxlocal.ActivationCache`, such as 4GiB, and how many
  fixed draws there are to be of each image that is augmented, an approximation. Likewise of runs.
- ``approximate``, ``plateau``: as in `fxlocal.schedules.Approximation.named` and `Plateau` there.
- the others: those of `fxlocal.TopK`, `Random`, `StochasticDepth` and `LocalModules`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NewType, TypeAlias

from ...errors import PlanError
from ...plan import (
    Checkpoint,
    Custom,
    Freeze,
    Hebbian,
    LearningRule,
    Oja,
    Plan,
    Random,
    StochasticDepth,
    TopK,
    WeightGrad,
    Zero,
)
from ...runtime.cache.activation_cache import read_bytes
from ...schedules import Approximation, Constant, Dynamic, Plateau, Schedule, Static
from ..data.task import Goal
from ..own import import_own
from .objective import prune_train
from .recipe.modules import Balance, backlink, dgl, greedy, infopro

__all__ = ["APPROXIMATIONS", "MODULES", "PREFIXES", "STRATEGIES"]

Curve: TypeAlias = Literal["linear", "quadratic", "exponential", "step"]
Average: TypeAlias = Literal["exponential", "window"]
Shift: TypeAlias = float | Literal["block"] | None
Norm: TypeAlias = Literal["train", "eval"]
OwnRule = NewType("OwnRule", str)  # package.module:function
RuleName: TypeAlias = Literal["hebbian", "oja"] | OwnRule
Decay: TypeAlias = tuple[float, int] | None
Table: TypeAlias = Literal["schedule-1", "schedule-2", "schedule-3", "schedule-3-but-first", "cnn2"]
Modulation: TypeAlias = Literal["momentum", "adam"] | None
Cache: TypeAlias = str | int | None


def sgd(epochs: int, goal: Goal) -> Schedule:
    """Train every layer by back-propagation throughout."""
    return Constant(Plan())


def local_static(
    epochs: int,
    goal: Goal,
    *,
    curve: Curve = "quadratic",
    largest: float = 0.6,
    start: float = 0.35,
    c1: float | None = None,
    c2: float | None = None,
    rule: RuleName = "hebbian",
    rate: float = 1e-4,
    relative: bool = False,
    modulation: Modulation = None,
    rate_decay: Decay = None,
    weak_supervision: bool = True,
    update_every: int = 1,
    refresh_every: int | None = None,
    norm: Norm = "train",
    align: bool = True,
) -> Schedule:
    """Let a local rule train a prefix that grows along a fixed curve (LoCal+SGD)."""
    learning = _learning_rule(rule, rate, relative, modulation)
    times: dict[str, Any] = {"update_every": update_every, "refresh_every": refresh_every}
    others: dict[str, Any] = {"weak_supervision": weak_supervision, "norm": norm, "align": align}
    prefix = {"rule": learning, "rate_decay": rate_decay, **times, **others}
    return Static(epochs, curve, largest, start, c1, c2, **prefix)


def local_dynamic(
    epochs: int,
    goal: Goal,
    *,
    average: Average = "exponential",
    alpha: float | None = None,
    shift: Shift = None,
    largest: float | None = None,
    rule: RuleName = "hebbian",
    rate: float = 1e-4,
    relative: bool = False,
    modulation: Modulation = None,
    rate_decay: Decay = None,
    weak_supervision: bool = True,
    update_every: int = 1,
    refresh_every: int | None = None,
    norm: Norm = "train",
    align: bool = True,
) -> Schedule:
    """Let a local rule train a prefix that grows as the transition layer calms down (LoCal+SGD)."""
    learning, largest = _learning_rule(rule, rate, relative, modulation), _largest(average, largest)
    times: dict[str, Any] = {"update_every": update_every, "refresh_every": refresh_every}
    others: dict[str, Any] = {"weak_supervision": weak_supervision, "norm": norm, "align": align}
    prefix = {"rule": learning, "rate_decay": rate_decay, **times, **others}
    return Dynamic(epochs, average, alpha, shift, largest, **prefix)


def freeze(
    epochs: int,
    goal: Goal,
    *,
    curve: Curve = "quadratic",
    largest: float = 0.6,
    start: float = 0.35,
    c1: float | None = None,
    c2: float | None = None,
    refresh_every: int | None = None,
    norm: Norm = "train",
    align: bool = True,
    cache: Cache = None,
    augmentations: int | None = None,
) -> Schedule:
    """Freeze the prefix that ``local-static`` would train."""
    _check_cache(cache, augmentations)
    return Static(epochs, curve, largest, start, c1, c2, **_frozen(refresh_every, norm, align))


freeze_eval = partial(freeze, norm="eval")
refresh = partial(freeze, norm="eval", refresh_every=4)


def freeze_dynamic(
    epochs: int,
    goal: Goal,
    *,
    average: Average = "exponential",
    alpha: float | None = None,
    shift: Shift = None,
    largest: float | None = None,
    refresh_every: int | None = None,
    norm: Norm = "train",
    align: bool = True,
    cache: Cache = None,
    augmentations: int | None = None,
) -> Schedule:
    """Freeze the prefix that ``local-dynamic`` would train (the ICLR version's frozen layers)."""
    _check_cache(cache, augmentations)
    largest = _largest(average, largest)
    return Dynamic(epochs, average, alpha, shift, largest, **_frozen(refresh_every, norm, align))


def _check_cache(cache: Cache, augmentations: int | None) -> None:
    if cache is not None:
        read_bytes(cache)
    elif augmentations is not None:
        raise PlanError(f"augmentations={augmentations}: changes nothing without cache=4GiB, say")


def _largest(average: Average, told: float | None) -> float:
    return told if told is not None else 0.6 if average == "exponential" else Dynamic.largest


def _frozen(every: int | None, norm: Norm, align: bool) -> dict[str, Any]:
    rule = {"rule": Freeze(), "weak_supervision": False}
    return {**rule, "refresh_every": every, "norm": norm, "align": align}


def _learning_rule(rule: RuleName, rate: float, relative: bool, how: Modulation) -> LearningRule:
    if relative and how == "adam":
        raise PlanError("relative=True: changes nothing beside modulation='adam'; leave it out")
    if ":" in rule:
        return Custom(import_own(rule, "rule", PlanError), rate, relative)
    return (Oja if rule == "oja" else Hebbian)(rate, relative)


def zero(
    epochs: int, goal: Goal, *, approximate: Table = "schedule-1", plateau: int | None = None
) -> Schedule:
    """Compute no gradient of the approximated weights."""
    return _approximation(Zero(), approximate, plateau)


def random(
    epochs: int,
    goal: Goal,
    *,
    std: float | None = None,
    approximate: Table = "schedule-1",
    plateau: int | None = None,
) -> Schedule:
    """Draw the gradient of the approximated weights."""
    return _approximation(Random(std), approximate, plateau)


def topk(
    epochs: int,
    goal: Goal,
    *,
    k: int = 1,
    scale: float | None = 1.0,
    force: bool = False,
    approximate: Table = "schedule-1",
    plateau: int | None = None,
) -> Schedule:
    """Compute the gradient of the approximated weights from the largest errors."""
    return _approximation(TopK(k, scale, force), approximate, plateau)


def _approximation(method: WeightGrad, approximate: Table, plateau: int | None) -> Schedule:
    schedule = Approximation.named(approximate, method)
    return schedule if plateau is None else Plateau(schedule, patience=plateau)


def checkpoint(
    epochs: int, goal: Goal, *, modules: int = 4, balance: Balance = "memory"
) -> Schedule:
    """Train every layer by back-propagation, and compute the activations of stages again."""
    return Constant(Plan(checkpoint=Checkpoint(modules, balance)))


def stochastic_depth(
    epochs: int,
    goal: Goal,
    *,
    rate: float = 0.5,
    mode: Literal["row", "block"] = "row",
    curve: Literal["linear", "uniform"] = "linear",
    replace: bool = False,
) -> Schedule:
    """Train by back-propagation, and leave out residual blocks at random."""
    return Constant(Plan(drop=StochasticDepth(rate, mode, curve, replace)))


Strategies: TypeAlias = dict[str, Callable[..., Schedule]]  # of epochs, a goal, and keywords

PREFIXES: Strategies = {
    "local-static": local_static,
    "local-dynamic": local_dynamic,
    "freeze": freeze,
    "freeze-eval": freeze_eval,
    "refresh": refresh,
    "freeze-dynamic": freeze_dynamic,
}
APPROXIMATIONS: Strategies = {"zero": zero, "random": random, "topk": topk}
MODULES: Strategies = {"greedy": greedy, "dgl": dgl, "infopro": infopro, "backlink": backlink}
STRATEGIES = {"sgd": sgd, **PREFIXES, **APPROXIMATIONS, **MODULES, "checkpoint": checkpoint}
STRATEGIES |= {"stochastic-depth": stochastic_depth, "prune-train": prune_train}
