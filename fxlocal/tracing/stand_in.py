"""A forward that is set on one model, in place of that of its class, and how to look behind it.

It is a bound method, as those who wrap a forward expect. A copy of the model runs its own forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from inspect import signature, unwrap
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame

from ..ir.additions import UnsavedHeads

__all__ = ["StandIn", "own_forwards"]

_OWN = ContextVar("own", default=False)  # whether each model runs its own forward


class StandIn:
    """Puts ``run`` in the place of the forward of ``model`` while that trains.

    In evaluation mode and without gradients the model runs its own, as inside `own_forwards`, and
    while it is ``paused``.
    """

    paused = False

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        self.model = model
        self._run: Callable[..., Any] | None = run
        self.earlier = vars(model).get("forward")

        @wraps(type(model).forward)
        def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            dynamo = torch.compiler.is_dynamo_compiling()  # which knows no ContextVar
            looked_behind = not dynamo and _OWN.get()
            compiles = torch.compiler.is_compiling() or eval_frame.get_eval_frame_callback()
            if dynamo or (compiles and not looked_behind):
                raise RuntimeError(
                    f"torch.compile around a {type(model).__name__} that fxlocal.attach was given: "
                    "it would follow one Plan only. Give compile=True to attach instead, or "
                    "detach() the driver first"
                )
            run = None if self.paused or looked_behind else self._run
            training = module.training and torch.is_grad_enabled()
            if run is not None and training and module is model:
                return run(*args, **kwargs)
            heads = module._modules.pop(UnsavedHeads.NAME, None)  # forwards may call all children
            try:
                return self._own(module)(*args, **kwargs)
            finally:
                if heads is not None:
                    module._modules[UnsavedHeads.NAME] = heads

        # Who takes off wrappers, as accelerate does by __wrapped__, is to end here.
        forward.__signature__ = signature(forward)  # type: ignore[attr-defined]
        del forward.__wrapped__
        forward.__name__ = "forward"  # by which the bound method is pickled: as that of the class
        self.forward = forward
        forward.fxlocal = self  # type: ignore[attr-defined]
        vars(model)["forward"] = MethodType(forward, model)

    def _own(self, module: nn.Module) -> Callable[..., Any]:
        """Return the own forward of the model, or of a copy of it."""
        earlier = self.earlier
        if earlier is None or module is self.model:
            return earlier or MethodType(type(module).forward, module)
        function = getattr(earlier, "__func__", None)
        return earlier if function is None else MethodType(function, module)

    def remove(self) -> None:
        """Put back what was there; a wrapper that was put around since then calls that."""
        self._run = None
        if _stand_in_of(self.model) is self:
            self.put_back(self.model)

    @property
    def runs(self) -> bool:
        """Whether it was not removed yet."""
        return self._run is not None

    def put_back(self, module: nn.Module) -> None:
        """Give the model, or a copy of it, the forward that it had before."""
        del vars(module)["forward"]
        if self.earlier is not None:
            vars(module)["forward"] = self._own(module)


def _stand_in_of(model: nn.Module) -> StandIn | None:
    """Return what stands in for the forward of ``model``, also within a wrapper of later.

    Of a copy, and of a driver that was detached, the wrapper is a part of the forward.
    """
    forward: Any = vars(model).get("forward")
    found = getattr(unwrap(forward, stop=lambda f: hasattr(f, "fxlocal")), "fxlocal", None)
    if not isinstance(found, StandIn):
        return None
    attached = found.model is model and found.runs
    return found if attached or getattr(forward, "__func__", None) is found.forward else None


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Let ``model`` and its modules run their own forwards, as if nothing stood in for them."""
    token, changed = _OWN.set(True), []
    for module in list(model.modules()):
        forward, found = vars(module).get("forward"), _stand_in_of(module)
        if found or getattr(forward, "__func__", None) is type(module).forward:  # as pickle sets it
            changed.append((module, forward, module._modules.pop(UnsavedHeads.NAME, None)))
            found.put_back(module) if found else vars(module).pop("forward")
    try:
        yield
    finally:
        _OWN.reset(token)
        for module, forward, heads in changed:
            vars(module)["forward"] = forward
            if heads is not None:
                module._modules[UnsavedHeads.NAME] = heads
