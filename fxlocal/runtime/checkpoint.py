"""What a driver's checkpoint has to fit: model, heads, optimizer and schedule."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.analysis import Analysis
from ..errors import CheckpointError
from ..schedules import LearningSchedule, Schedule

__all__ = ["all_or_nothing", "find_fingerprint", "learned_schedule", "refuse_foreign"]

_STATE = ["fingerprint", "epoch", "history", "losses", "schedule", "model", "optimizer", "random"]


def find_fingerprint(
    model: nn.Module,
    heads: nn.Module,
    analysis: Analysis,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, Any]:
    """Return what tells one run from another; plain values only."""
    state = model.state_dict() | heads.state_dict(prefix="heads.")
    shapes = {
        name: list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for name, value in state.items()
    }
    groups = [len(group["params"]) for group in optimizer.param_groups] if optimizer else []
    return {
        "state": shapes,
        "layers": [layer.path for layer in analysis.layers],
        "schedule": repr(schedule),
        "optimizer": [type(optimizer).__name__, *groups],
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
    }


def refuse_foreign(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a driver's state that is not whole, or of another fingerprint than ``mine``.

    Raises:
        CheckpointError: saying what is missing or differs.
    """
    if missing := [name for name in _STATE if name not in state]:
        raise CheckpointError(
            f"not a whole Driver's state: it has no {', '.join(map(repr, missing))}. Nothing was "
            "loaded"
        )
    for part, own in mine.items():
        theirs = state["fingerprint"].get(part, own)  # older ones lack some
        if theirs != own:
            what = "model" if part in ("state", "layers") else part
            raise CheckpointError(
                f"the checkpoint was made with another {what}: {_difference(theirs, own)}. Nothing "
                f"was loaded; resume with the {what} that it was saved with"
            )


def learned_schedule(schedule: Schedule, state: Mapping[str, Any]) -> Schedule:
    """Return a copy of ``schedule`` that has taken up what it had learned.

    Raises:
        CheckpointError: if it cannot.
    """
    schedule = copy.deepcopy(schedule)
    if isinstance(schedule, LearningSchedule):
        try:
            schedule.load_state_dict(state)
        except Exception as error:  # of whatever kind: the schedule may be the user's
            raise CheckpointError(
                f"the schedule {schedule!r} cannot take up its state in the checkpoint: "
                f"{type(error).__name__}: {error}. Nothing was loaded"
            ) from error
    return schedule


@contextmanager
def all_or_nothing(*parts: nn.Module | torch.optim.Optimizer | None) -> Iterator[None]:
    """Give each of ``parts`` its state back if the ``with`` block raises.

    Raises:
        CheckpointError: in place of what the block raised.
    """
    own = [part for part in parts if part is not None]
    before = [copy.deepcopy(part.state_dict()) for part in own]
    try:
        yield
    except Exception as error:  # of whatever kind: hooks may be the user's
        for part, state in zip(own, before, strict=True):
            part.load_state_dict(state)
        raise CheckpointError(
            f"the checkpoint cannot be taken up: {type(error).__name__}: {error}. Nothing was "
            "loaded"
        ) from error


def _difference(theirs: Any, mine: Any) -> str:
    """Say how two parts of a fingerprint differ, by the first entry that does."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        name = next(n for n in (*mine, *theirs) if theirs.get(n) != mine.get(n))
        return f"{name!r} is {theirs.get(name)} there and {mine.get(name)} here"
    return f"{theirs!r} there, {mine!r} here"
