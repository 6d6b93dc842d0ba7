"""What a driver's optimizer has to be, and what it may not move."""

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import PlanError

__all__ = [
    "after_step",
    "check_optimizer",
    "keep_off",
    "nested",
    "refuse_other_models",
    "refuse_without_heads",
    "take_without",
]


def check_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer that cannot train any of ``parameters``, if there are any."""
    refuse_other_models(optimizer, parameters)
    for one in nested(optimizer):  # nor any whose step calls the forward as often as it likes
        closure = inspect.signature(one.step).parameters.get("closure")
        if isinstance(one, LBFGS) or (closure and closure.default is inspect.Parameter.empty):
            raise PlanError(
                f"{type(one).__name__} calls the forward several times in a step: each call would "
                "move a local prefix, and its history moves layers that have no gradient. Give "
                "the driver an optimizer of one forward per step, such as SGD or Adam"
            )


def refuse_without_heads(optimizer: Optimizer | None, heads: nn.Module) -> None:
    """Refuse an optimizer that would leave trainable parameters of ``heads`` as they were drawn."""
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


def refuse_other_models(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse what is no optimizer, or holds none of ``parameters``, if there are any."""
    if not isinstance(optimizer, Optimizer):
        name = getattr(optimizer, "__name__", f"a {type(optimizer).__name__}")
        raise PlanError(
            f"the optimizer is {name}: "
            "give a torch.optim.Optimizer, such as torch.optim.SGD(driver.parameters(), lr=0.1)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in parameters}
    if own and not own & held:
        raise PlanError(
            f"the {type(optimizer).__name__} is of another model: it holds {len(held)} parameters, "
            f"and none of the {len(own)} of this one. Make it of driver.parameters()"
        )


_HOOKS: WeakKeyDictionary[Optimizer, dict[int, RemovableHandle]] = WeakKeyDictionary()


def keep_off(
    optimizer: Optimizer, prefix: list[nn.Parameter], model: nn.Module, while_alive: object
) -> None:
    """Drop the gradients of what the list ``prefix`` holds before each step.

    In place of others of the same ``model``: a run that was broken off has no say in the next. It
    ends when ``while_alive`` does.
    """
    alive = weakref.ref(while_alive)

    def drop_gradients(*_: Any) -> None:
        if alive() is not None:
            for parameter in prefix:
                parameter.grad = None

    for one in nested(optimizer):
        of_models = _HOOKS.setdefault(one, {})
        if (earlier := of_models.pop(id(model), None)) is not None:
            earlier.remove()
        if hasattr(one, "_optimizer_step_pre_hooks"):  # a wrapper need not have been set up
            of_models[id(model)] = one.register_step_pre_hook(drop_gradients)


def after_step(optimizer: Optimizer, function: Callable[[], None]) -> list[RemovableHandle]:
    """Call ``function`` after each step of the optimizer; return what ends that."""
    own = [one for one in nested(optimizer) if hasattr(one, "_optimizer_step_post_hooks")]
    return [one.register_step_post_hook(lambda *_: function()) for one in own]


def take_without(optimizer: Optimizer, heads: nn.Module) -> None:
    """Let the optimizer load states of before ``heads`` were among its parameters, with a warning.

    What it has learned of the others is placed as it was; of the heads there is none.
    """
    if not list(heads.parameters()):
        return

    def fill_up(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        new = {id(p) for p in heads.parameters()}
        saved, groups = state["param_groups"], optimizer.param_groups
        is_new = [[id(p) in new for p in group["params"]] for group in groups]
        kept = [len(flags) - sum(flags) for flags in is_new]
        same = [len(group["params"]) for group in saved] == [size for size in kept if size]
        if not any(map(any, is_new)) or not same:
            return None  # torch says what is wrong, if something is
        warnings.warn(
            "the optimizer's state was saved without the heads of local modules, which begin anew",
            stacklevel=4,
        )
        unused = count(1 + max((n for group in saved for n in group["params"]), default=0))
        rest, filled = iter(saved), []
        for own, flags, size in zip(groups, is_new, kept, strict=True):
            group = next(rest) if size else own | {"params": ()}
            numbers = iter(group["params"])
            filled.append(group | {"params": [next(unused if f else numbers) for f in flags]})
            filled[-1].update((key, own[key]) for key in own.keys() & {"param_names"})
        return state | {"param_groups": filled}

    for one in nested(optimizer):
        if hasattr(one, "_optimizer_load_state_dict_pre_hooks"):  # a wrapper need not have any
            one.register_load_state_dict_pre_hook(fill_up)


def nested(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizer and those that it wraps (a launcher's, sharpness-aware minimisation)."""
    inside = (value for value in vars(optimizer).values() if isinstance(value, Optimizer))
    return [optimizer, *(one for inner in inside for one in nested(inner))]
