"""What a driver's optimizer has to be, and what it may not move."""

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import PlanError

__all__ = ["call_before_steps", "refuse_many_forwards", "refuse_without_heads"]


def refuse_many_forwards(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step calls the forward as often as it likes.

    Raises:
        PlanError: naming the optimizer.
    """
    for one in _nested(optimizer):
        closure = inspect.signature(one.step).parameters.get("closure")
        if isinstance(one, LBFGS) or (closure and closure.default is inspect.Parameter.empty):
            raise PlanError(
                f"{type(one).__name__} calls the forward several times in a step: each call would "
                "move a local prefix, and its history moves layers that have no gradient. Give "
                "the driver an optimizer of one forward per step, such as SGD or Adam"
            )


def refuse_without_heads(optimizer: Optimizer | None, heads: nn.Module) -> None:
    """Refuse an optimizer that would leave trainable parameters of ``heads`` as they were drawn.

    Raises:
        PlanError: naming the first of them.
    """
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = (
        name for name, p in heads.named_parameters() if p.requires_grad and id(p) not in held
    )
    if name := next(trained, None):
        raise PlanError(
            f"the optimizer does not hold {name!r} of the local modules' heads, which would never "
            "learn: make it of driver.parameters() and set driver.optimizer = ..."
        )


_HOOKS: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()


def call_before_steps(optimizer: Optimizer, method: Callable[[], None]) -> None:
    """Call a driver's ``method`` before each step, in place of that of an earlier driver.

    The optimizer does not keep the driver alive.
    """
    optimizer, weak = _nested(optimizer)[-1], WeakMethod(method)
    if (earlier := _HOOKS.pop(optimizer, None)) is not None:
        earlier.remove()

    def before_step(*_: Any) -> None:
        if (method := weak()) is not None:
            method()

    _HOOKS[optimizer] = optimizer.register_step_pre_hook(before_step)


def _nested(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizer and what it wraps (a launcher's, sharpness-aware minimisation)."""
    for name in ("optimizer", "base_optimizer"):
        if isinstance(inner := getattr(optimizer, name, None), Optimizer):
            return [optimizer, *_nested(inner)]
    return [optimizer]
