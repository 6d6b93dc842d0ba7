"""Keep nothing of a function for its backward, which computes it again."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "State",
    "checkpointed",
    "observe_second_forwards",
    "refuse_checkpointing",
    "refuse_reentrant",
]

State: TypeAlias = tuple[Sequence[nn.Module], Sequence[Tensor]]
_Context: TypeAlias = Callable[[], AbstractContextManager[None]]

_observers: list[_Context] = []


def checkpointed(
    function: Callable[..., Any], values: Sequence[Any], find_state: Callable[[], State]
) -> Any:
    """Return ``function(*values)``, computed once more in the backward, bit for bit.

    The second forward draws the same random numbers, and leaves all state as the first left it.
    Under `torch.compile` the partitioner decides instead what is computed again, and no Python
    runs twice.

    Args:
        function: from values to values.
        values: what it takes; they are kept.
        find_state: returns what else it reads and moves: the modules with running statistics that
            training never reads, and all other buffers.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *values, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        norms, buffers = find_state()
        moved: list[tuple[Tensor, Tensor]] = []
        again = _EachTime(lambda: _second_forward(norms, buffers, moved))
        return _first_forward(buffers, moved), again

    return checkpoint(function, *values, use_reentrant=False, context_fn=contexts)


@contextmanager
def observe_second_forwards(context: _Context) -> Iterator[None]:
    """Let second forwards in the ``with`` block run under what ``context()`` returns."""
    _observers.append(context)
    try:
        yield
    finally:
        _observers.remove(context)


class _EachTime(AbstractContextManager[None]):
    """Enters a new context each time: a retained graph runs its forward in each backward."""

    def __init__(self, context: _Context) -> None:
        self.context, self.entered = context, list[AbstractContextManager[None]]()

    def __enter__(self) -> None:
        self.entered.append(self.context())
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.pop().__exit__(*error)


@contextmanager
def _first_forward(buffers: Sequence[Tensor], moved: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Note each buffer that moves, as it was before: the power iterations of a spectral norm."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in buffers]
    yield
    moved += [(buffer, value) for buffer, version, value in before if buffer._version != version]


@contextmanager
def _second_forward(
    norms: Sequence[nn.Module], buffers: Sequence[Tensor], moved: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Give buffers the values that the first forward met, and then those of now again."""
    now = [buffer.clone() for buffer in buffers]
    statistics = {norm: dict(norm._buffers) for norm in norms if norm.training}
    for norm, kept in statistics.items():
        for name, value in kept.items():
            if value is not None:
                norm._buffers[name] = torch.empty_like(value)  # written and never read
        norm._buffers["num_batches_tracked"] = None  # nothing is counted
    for buffer, value in moved:
        buffer.data.copy_(value)  # .data: as a norm's own update, unseen by autograd
    try:
        with ExitStack() as observing:
            for context in _observers:
                observing.enter_context(context())
            yield
    finally:  # checkpointing leaves by an exception once it has what it needs
        for norm, kept in statistics.items():
            norm._buffers.update(kept)
        for buffer, value in zip(buffers, now, strict=True):
            buffer.data.copy_(value)


def refuse_checkpointing() -> None:
    """Refuse a forward that is another one the second time, where checkpointing runs it."""
    if _is_checkpointed():
        raise RuntimeError(
            "activation checkpointing around a network that learns in its forward, or draws the "
            "blocks that it computes: the second forward would apply each local update, or each "
            "local module's gradient, again, or draw other blocks. Call the network outside "
            "checkpoint(); what learns locally keeps no activations anyway"
        )


def refuse_reentrant() -> None:
    """Refuse a forward without gradients that is only the first of two, the next with them."""
    if _is_checkpointed():
        raise RuntimeError(
            "checkpoint(use_reentrant=True) around a network runs it without gradients first, "
            "where it is its model, with other norms or all branches: give use_reentrant=False"
        )


def _is_checkpointed() -> bool:
    """Tell whether this is a forward of activation checkpointing: the first or the second."""
    if torch._C._current_graph_task_id() != -1:  # inside a backward
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if torch.is_grad_enabled():
        return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")
    frame: FrameType | None = sys._getframe()  # the reentrant form runs its first without gradient
    while frame is not None and not frame.f_code.co_filename.endswith("utils/checkpoint.py"):
        frame = frame.f_back
    return frame is not None
