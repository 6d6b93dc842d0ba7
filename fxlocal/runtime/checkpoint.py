"""What a driver's checkpoint has to fit: model, heads, optimizer and schedule."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.nn.modules.dropout import _DropoutNd

from ..compiler.analysis import Analysis
from ..errors import CheckpointError, PlanError
from ..ir.network import Network
from ..ir.source import train_mode
from ..plan.rules import name_of
from ..schedules import LearningSchedule, Schedule

__all__ = ["all_or_nothing", "find_fingerprint", "identify", "learned_schedule", "refuse_foreign"]

_ADDRESS = re.compile(" at 0x[0-9a-f]+")
_STATE = ["fingerprint", "epoch", "history", "losses", "schedule", "model", "optimizer", "random"]


def find_fingerprint(
    model: nn.Module,
    heads: nn.Module,
    analysis: Analysis,
    captured: Network,
    schedule: str,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, Any]:
    """Return what tells one run from another; plain values only."""
    state = model.state_dict() | heads.state_dict(prefix="heads.")
    shapes = {
        name: list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for name, value in state.items()
    }
    groups = [len(group["params"]) for group in optimizer.param_groups] if optimizer else []
    with train_mode(captured):  # nodes by place: names may differ
        place = {node: f"%{i}" for i, node in enumerate(captured.graph.nodes)}
        graph = [_ADDRESS.sub("", _node_line(captured, place, node)) for node in place]
    return {
        "state": shapes,
        "layers": [layer.path for layer in analysis.layers],
        "graph": graph,
        "schedule": schedule,
        "optimizer": [type(optimizer).__name__, *groups],
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
    }


def _node_line(captured: Network, place: Mapping[Any, str], node: Any) -> str:
    target = node.target if isinstance(node.target, str) else name_of(node.target)
    if node.op == "placeholder":
        return f"input {target}"
    if node.op == "call_module":
        module = captured.get_submodule(target)
        drops = isinstance(module, _DropoutNd)  # whose p may be moved as training goes
        target += f": {type(module).__name__}({'' if drops else module.extra_repr()})"
    args, kwargs = map_arg((node.args, node.kwargs), place.__getitem__)
    return f"{target} of {args}{kwargs or ''}"


def identify(value: Any) -> str:
    """Return a text that tells a schedule, or a part of one, from others: its class and fields.

    Raises:
        PlanError: if it holds something that no text tells from others.
    """
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = sorted(map(identify, value)) if isinstance(value, set) else map(identify, value)
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, Mapping):
        pairs = (f"{identify(key)}: {identify(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, Tensor):
        return f"tensor({value.tolist()})"
    if isinstance(value, partial) or hasattr(value, "__qualname__"):
        return name_of(value)
    text, kind = repr(value), type(value)
    if not _ADDRESS.search(text):
        return text
    if not hasattr(value, "__dict__") or kind.__module__.partition(".")[0] in ("torch", "_thread"):
        raise PlanError(
            f"the schedule holds {text}, by which a checkpoint's could not be told from another: "
            "give its class a __repr__ of what it depends on"
        )
    fields = (f"{name}={identify(item)}" for name, item in vars(value).items())
    return f"{kind.__module__}.{kind.__qualname__}({', '.join(fields)})"


def refuse_foreign(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a driver's state that is not whole, or of another fingerprint than ``mine``."""
    if missing := [name for name in _STATE if name not in state]:
        raise CheckpointError(
            f"not a whole Driver's state: it has no {', '.join(map(repr, missing))}. Nothing was "
            "loaded"
        )
    told, epoch = state["fingerprint"], state["epoch"]
    if not isinstance(told, Mapping) or not told or not isinstance(epoch, int) or epoch < 0:
        raise CheckpointError(
            f"a damaged Driver's state: its fingerprint is {told!r:.40}, its epoch "
            f"{epoch!r}. Nothing was loaded"
        )
    for part, own in mine.items():
        theirs = told.get(part, own)  # older ones lack some
        if theirs != own:
            what = "model" if part in ("state", "layers", "graph") else part
            raise CheckpointError(
                f"the checkpoint was made with another {what}: {_difference(theirs, own)}. Nothing "
                f"was loaded; resume with the {what} that it was saved with"
            )


def learned_schedule(schedule: Schedule, state: Mapping[str, Any]) -> Schedule:
    """Return a copy of ``schedule`` that has taken up what it had learned; or a CheckpointError."""
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
    """Give each of ``parts`` its state back if the ``with`` block raises, and a CheckpointError."""
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
    if isinstance(theirs, list) and isinstance(mine, list) and len(theirs) == len(mine):
        return next(f"{a} there, {b} here" for a, b in zip(theirs, mine, strict=True) if a != b)
    if isinstance(theirs, dict) and isinstance(mine, dict):
        name = next(n for n in (*mine, *theirs) if theirs.get(n) != mine.get(n))
        return f"{name!r} is {theirs.get(name)} there and {mine.get(name)} here"
    return f"{theirs!r} there, {mine!r} here"
