"""Strategies that split the network into local modules; their keywords are arguments of a spec."""

from typing import Any, Literal, TypeAlias

from ....errors import PlanError
from ....plan import ConvHead, Head, InfoProHead, LinearHead, LocalModules, Plan
from ....schedules import Constant, Schedule
from ...data.task import Goal
from ..objective import find_loss

__all__ = ["Balance", "backlink", "dgl", "greedy", "infopro"]

Balance: TypeAlias = Literal["memory", "blocks", "time"]
HeadName: TypeAlias = Literal["linear", "conv"]
Weighting: TypeAlias = Literal["once", "compound"]


def greedy(
    epochs: int,
    goal: Goal,
    *,
    modules: int = 4,
    balance: Balance = "memory",
    head: HeadName = "conv",
) -> Schedule:
    """Let each module learn from its own loss alone."""
    return _local_modules(goal, modules, balance, head)


def dgl(
    epochs: int,
    goal: Goal,
    *,
    modules: int = 4,
    balance: Balance = "memory",
    head: HeadName = "conv",
    replay: int = 4,
) -> Schedule:
    """Let modules learn so from the batches that a replay buffer keeps (decoupled greedy)."""
    if replay < 1:
        raise PlanError(f"replay={replay}: give 1 or more batches, or take greedy")
    return _local_modules(goal, modules, balance, head, replay=replay)


def infopro(epochs: int, goal: Goal, *, modules: int = 4, balance: Balance = "memory") -> Schedule:
    """Let each module's features also be what the image can be reconstructed from."""
    return _local_modules(goal, modules, balance, InfoProHead())


def backlink(
    epochs: int,
    goal: Goal,
    *,
    modules: int = 4,
    balance: Balance = "memory",
    head: HeadName = "conv",
    link: int = 1,
    alpha: float = 0.5,
    weighting: Weighting = "once",
) -> Schedule:
    """Let a module's error flow back over the last blocks of the one before."""
    options = {"alpha": alpha, "weighting": weighting}
    for name, value in options.items():
        if link == 0 and value != getattr(LocalModules, name):
            raise PlanError(f"{name}={value}: changes nothing where link=0; leave it out")
    return _local_modules(goal, modules, balance, head, link=link, **options)


def _local_modules(goal: Goal, count: int, balance: Balance, head: Any, **others: Any) -> Schedule:
    heads: dict[str, Head] = {"linear": LinearHead(), "conv": ConvHead()}
    modules = LocalModules(
        count,
        output=goal.part,
        head=heads[head] if isinstance(head, str) else head,
        num_classes=goal.num_classes,
        loss=find_loss(goal),
        balance=balance,
        **others,
    )
    return Constant(Plan(modules=modules))
