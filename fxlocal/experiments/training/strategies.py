"""Training strategies by name: each makes the schedule that a run follows.

| name | the layers before the boundary |
|---|---|
| ``sgd`` | there is no boundary: plain training |
| ``local-static`` | learn by the rule; the boundary follows a curve fixed beforehand |
| ``local-dynamic`` | learn by the rule; the boundary follows the transition layer's updates |
| ``freeze`` | stand still, with ``local-static``'s boundary: what a local rule has to beat |
| ``freeze-eval`` | stand still, their norms with running statistics |
| ``refresh`` | as ``freeze-eval``, but every fourth step back-propagates through all layers |

Others back-propagate through all layers and approximate the weight gradients of some convolutions:

| name | the approximated weight gradient |
|---|---|
| ``zero`` | is zero |
| ``random`` | is drawn from a normal distribution |
| ``topk`` | is that of the largest errors |

Others split the network into local modules, each with a loss of its own:

| name | what crosses the border of two modules |
|---|---|
| ``greedy`` | activations alone |
| ``dgl`` | activations, by way of a replay buffer |
| ``infopro`` | activations, from which a decoder can reconstruct the image |
| ``backlink`` | activations, and errors over the last blocks of the module before |

At most one of each kind, joined by pluses, is a strategy too: ``freeze-eval+topk``. What saves the
same memory as local modules with exact gradients is one as well: ``checkpoint``, which computes
their activations twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, Literal, TypeAlias

from ...errors import PlanError, nearest
from ...plan import (
    ConvHead,
    Freeze,
    Head,
    Hebbian,
    InfoProHead,
    LearningRule,
    LinearHead,
    LocalModules,
    Oja,
    Plan,
    Random,
    Rule,
    TopK,
    WeightGrad,
    Zero,
)
from ...schedules import Approximation, Constant, Dynamic, Plateau, Schedule, Static, combine
from ..data.task import LOSSES, Goal
from ..models.catalogue import MODELS
from .recompute import Recompute

__all__ = [
    "APPROXIMATIONS",
    "MODULES",
    "PREFIXES",
    "STRATEGIES",
    "Options",
    "StrategyError",
    "build_schedule",
    "is_model",
]


class StrategyError(ValueError):
    """There is no such strategy, or its options make no schedule."""


@dataclass(frozen=True)
class Options:
    """How strategies go about it; each takes what concerns it.

    The default start lies behind the first fall of the learning rate: layers that stop learning
    from errors before it cost accuracy. At larger rates a Hebbian prefix forgets what it knew.
    """

    curve: Annotated[
        Literal["linear", "quadratic", "exponential", "step"],
        "How the boundary moves over the epochs",
    ] = "quadratic"
    largest: Annotated[float, "Fraction of the layers before the boundary in the end"] = 0.6
    start: Annotated[float, "Fraction of the epochs after which the boundary moves"] = 0.35
    c1: Annotated[float | None, "The curve's own parameters, as the paper has them,"] = None
    c2: Annotated[float | None, "in place of largest and start"] = None
    average: Annotated[
        Literal["exponential", "window"], "What the dynamic rule compares an update's norm with"
    ] = "exponential"
    alpha: Annotated[
        float,
        "Fraction of that average at which the boundary moves; of backlink, the weight of the "
        "local error in linked blocks, where the next module's has the rest",
    ] = 0.5
    shift: Annotated[float, "Fraction of the layers by which it then moves"] = 0.12
    rule: Annotated[Literal["hebbian", "oja"], "How local layers learn"] = "hebbian"
    rate: Annotated[float, "Length of one local step, in weight units"] = 1e-4
    relative: Annotated[bool, "Count the rate in lengths of the weight"] = False
    rate_decay: Annotated[
        tuple[float, int] | None, "Multiply the rate by the first number every so many epochs"
    ] = None
    weak_supervision: Annotated[
        bool, "Reverse the local steps in an epoch that follows a rise of the loss"
    ] = True
    update_every: Annotated[int, "Local steps in the first of every so many steps only"] = 1
    refresh_every: Annotated[
        int | None, "Back-propagate through all layers in the last of every so many steps"
    ] = None
    norm: Annotated[
        Literal["train", "eval"], "Batch norms before the boundary: batch or running statistics"
    ] = "train"
    align: Annotated[bool, "Move the boundary to edges of blocks only"] = True
    approximate: Annotated[
        Literal["schedule-1", "schedule-2", "schedule-3", "cnn2"],
        "Weight gradients of every fourth convolution; of every other one in every other step; "
        "of all in every fourth step; of the second in every other step",
    ] = "schedule-1"
    k: Annotated[int, "Errors that topk keeps per image and channel"] = 1
    scale: Annotated[float, "Factor of topk's weight gradient"] = 1.0
    force: Annotated[bool, "Let topk approximate even where that is predicted to be slower"] = False
    std: Annotated[
        float | None, "Standard deviation of random's weight gradient; default: one by the batch"
    ] = None
    plateau: Annotated[
        int | None, "Compute full weight gradients once the loss has not fallen for so many epochs"
    ] = None
    modules: Annotated[
        int | None, "Number of local modules, or of checkpoint's segments; default: 4, or --nproc"
    ] = None
    balance: Annotated[Literal["memory", "blocks", "time"], "What these have an equal share of"] = (
        "memory"
    )
    head: Annotated[
        Literal["linear", "conv"], "The auxiliary classifier of greedy, dgl and backlink"
    ] = "conv"
    link: Annotated[int, "Blocks over which backlink's errors flow back into a module"] = 1
    replay: Annotated[int, "Batches that dgl keeps between two modules"] = 4

    @property
    def num_modules(self) -> int:
        """The number of local modules."""
        return 4 if self.modules is None else self.modules

    @property
    def learning_rule(self) -> LearningRule:
        """The rule by which local layers learn."""
        kind = Oja if self.rule == "oja" else Hebbian
        return kind(self.rate, self.relative)

    def prefix(self, rule: Rule) -> dict[str, Any]:
        """Return the arguments that all schedules of a moving boundary share."""
        learns = not isinstance(rule, Freeze)
        return {
            "rule": rule,
            "norm": self.norm,
            "rate_decay": self.rate_decay if learns else None,
            "align": self.align,
            "update_every": self.update_every if learns else 1,
            "refresh_every": self.refresh_every,
            "weak_supervision": self.weak_supervision and learns,
        }


def _static(epochs: int, options: Options, rule: Rule, **others: Any) -> Schedule:
    prefix = {**options.prefix(rule), **others}
    curve = (options.curve, options.largest, options.start, options.c1, options.c2)
    return Static(epochs, *curve, **prefix)


def sgd(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Train every layer by back-propagation throughout."""
    return Constant(Plan())


def local_static(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Let a local rule train a prefix that grows along a fixed curve (LoCal+SGD)."""
    return _static(epochs, options, options.learning_rule)


def local_dynamic(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Let a local rule train a prefix that grows as the transition layer calms down (LoCal+SGD)."""
    prefix = options.prefix(options.learning_rule)
    average, alpha, shift = options.average, options.alpha, options.shift
    return Dynamic(epochs, average, alpha, shift, options.largest, **prefix)


def freeze(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Freeze the prefix that ``local-static`` would train."""
    return _static(epochs, options, Freeze())


def freeze_eval(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Freeze it with its norms, which is the cheapest that a prefix can be."""
    return _static(epochs, options, Freeze(), norm="eval")


def refresh(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Freeze the prefix but for an occasional step of plain training (ours, not a paper's)."""
    every = options.refresh_every or 4
    return _static(epochs, options, Freeze(), norm="eval", refresh_every=every)


def _approximation(options: Options, method: WeightGrad) -> Schedule:
    schedule = Approximation.named(options.approximate, method)
    return schedule if options.plateau is None else Plateau(schedule, patience=options.plateau)


def zero(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Compute no gradient of the approximated weights."""
    return _approximation(options, Zero())


def random(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Draw the gradient of the approximated weights."""
    return _approximation(options, Random(options.std))


def topk(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Compute the gradient of the approximated weights from the largest errors."""
    return _approximation(options, TopK(options.k, options.scale, options.force))


def _local_modules(
    options: Options, goal: Goal, head: Head | None = None, **others: Any
) -> Schedule:
    chosen: Head = LinearHead() if options.head == "linear" else ConvHead()
    modules = LocalModules(
        options.num_modules,
        head=chosen if head is None else head,
        num_classes=goal.num_classes,
        loss=LOSSES[goal.task],
        balance=options.balance,
        **others,
    )
    return Constant(Plan(modules=modules))


def greedy(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Let each module learn from its own loss alone."""
    return _local_modules(options, goal)


def dgl(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Let modules learn so from the batches that a replay buffer keeps (decoupled greedy)."""
    if options.replay < 1:
        raise PlanError(f"replay={options.replay}: give 1 or more batches, or take greedy")
    return _local_modules(options, goal, replay=options.replay)


def infopro(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Let each module's features also be what the image can be reconstructed from."""
    return _local_modules(options, goal, InfoProHead())


def backlink(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Let a module's error flow back over the last blocks of the one before."""
    return _local_modules(options, goal, link=options.link, alpha=options.alpha)


def checkpoint(epochs: int, options: Options, goal: Goal) -> Schedule:
    """Train every layer by back-propagation, and compute the activations of segments again."""
    return Recompute(options.num_modules, options.balance)


Strategy: TypeAlias = Callable[[int, Options, Goal], Schedule]

PREFIXES: dict[str, Strategy] = {
    "local-static": local_static,
    "local-dynamic": local_dynamic,
    "freeze": freeze,
    "freeze-eval": freeze_eval,
    "refresh": refresh,
}
APPROXIMATIONS: dict[str, Strategy] = {"zero": zero, "random": random, "topk": topk}
MODULES: dict[str, Strategy] = {
    "greedy": greedy,
    "dgl": dgl,
    "infopro": infopro,
    "backlink": backlink,
}
_KINDS = (PREFIXES, MODULES, APPROXIMATIONS)
STRATEGIES: dict[str, Strategy] = {
    "sgd": sgd,
    **PREFIXES,
    **APPROXIMATIONS,
    **MODULES,
    "checkpoint": checkpoint,
}


def is_model(name: str) -> bool:
    """Tell whether ``name`` is a model's and no strategy's."""
    return name in MODELS or ":" in name


def build_schedule(
    name: str,
    epochs: int,
    options: Options,
    goal: Goal = Goal(),  # noqa: B008  # frozen
) -> Schedule:
    """Make the schedule of the strategy called ``name`` for a run of ``epochs``.

    Args:
        name: the strategy, or several joined by pluses.
        epochs: how long the run is.
        options: what the strategies may be told.
        goal: what there is to learn, which local modules' heads and losses depend on.

    Raises:
        StrategyError: if there is no such strategy, its parts contradict each other, or its options
            are out of range.
    """
    parts = name.split("+")
    _check_parts(name, parts)
    try:
        schedules = [STRATEGIES[part](epochs, options, goal) for part in parts]
        return reduce(combine, schedules)
    except PlanError as error:
        raise StrategyError(f"strategy {name!r}: {error}") from error


def _check_parts(name: str, parts: Sequence[str]) -> None:
    if is_model(name):
        raise StrategyError(
            f"{name!r} is a model: fxlocal compare sets it beside strategies, nothing else does; "
            f"give one of {', '.join(STRATEGIES)}"
        )
    for part in parts:
        if part not in STRATEGIES:
            within = "" if part == name else f" in {name!r}"
            raise StrategyError(
                f"unknown strategy {part!r}{within}. Nearest: {nearest(part, STRATEGIES)}"
            )
    kinds = [sum(part in kind for part in parts) for kind in _KINDS]
    if len(parts) > 1 and (sum(kinds) < len(parts) or max(kinds) > 1):
        *others, last = (", ".join(kind) for kind in _KINDS)
        raise StrategyError(
            f"strategy {name!r}: its parts contradict each other or change nothing; join one of "
            f"{', one of '.join(others)} and one of {last}, or of two of these kinds"
        )
