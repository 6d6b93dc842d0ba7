"""Run a network's forward and backward as CUDA graphs: no launch cost per kernel.

On a small model the GPU waits for Python to launch the next kernel, so that a cheaper step takes
no less time. Here the forward, its local updates included, and the backward are each captured once
and replayed as one launch (`torch.cuda.make_graphed_callables`); loss and optimizer stay the
user's own. Nothing is compiled.

What a capture cannot hold runs as it is, with a warning that says why: a model that is not on a
CUDA device, an input or output that is no tensor, a forward that waits for the device.
"""

import contextlib
import gc
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import PlanError
from ..ir.network import Network
from ..ir.nodes import FIXED
from ..ir.source import arguments
from ..plan import Plan

__all__ = ["GraphedNetwork", "refuse_graphed"]


class GraphedNetwork:
    """A network's callable: captures at the first call with inputs of a new shape, then replays.

    A replay writes over the last one's output and gradients. So call ``optimizer.zero_grad()``
    before each forward (a call that finds gradients runs as it is, to add to them), and one
    backward per forward. In evaluation mode and under ``no_grad`` the network runs as it is too.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._modules = list(network.modules())
        self._state: Any = None  # what all captures were made with
        self._captured: dict[Any, Callable[..., Any]] = {}
        self._replays = 0
        self._warned: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's output, with a backward until another call writes over it."""
        if not self.network.training or not torch.is_grad_enabled():
            return self.network(*args, **kwargs)
        self.network.prepare_call(*args, **kwargs)
        parameters = [p for m in self._modules for p in m._parameters.values() if p is not None]
        named = _given(self.network.graph, args, kwargs)
        if reason := _obstacle(parameters, named.values()):
            self._warn(reason)
            return self.network(*args, **kwargs)
        state = (
            [(p.data_ptr(), p.requires_grad) for p in parameters],
            [module.training for module in self._modules],
        )
        if state != self._state:  # moved to other memory, say, or partly frozen by the user
            self.release()
            self._state = state
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        inputs = tuple(named.values())
        looks = ((a.shape, a.stride(), a.dtype, a.device, a.requires_grad) for a in inputs)
        key = *looks, tuple(named), autocast
        if key not in self._captured:
            self._captured[key] = self._capture(named)
        return self.network.finish_call(self._captured[key](*inputs))

    def release(self) -> None:
        """Free the captured graphs and their memory; the next call captures again."""
        if self._captured:
            self._captured.clear()
            gc.collect()  # captures lie in reference cycles; freeing one must not meet a capture

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"compile='cudagraph' does not apply, the network runs as it is: {reason}",
                stacklevel=3,
            )

    def _capture(self, given: dict[str, Tensor]) -> Callable[..., Any]:
        """Capture the network for inputs like those ``given``; nothing else changes by it."""
        names, parameters = zip(*self.network.named_parameters(), strict=True)
        # Leaves of their own over the same memory: what accumulates into the parameters may be
        # alive in the last step's loss, on a stream that a capture must not touch.
        aliases = tuple(p.detach().requires_grad_(p.requires_grad) for p in parameters)
        samples = tuple(
            arg.detach().clone().requires_grad_(arg.requires_grad) for arg in given.values()
        )
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

        def forward(*values: Tensor) -> Any:
            inputs, weights = values[: len(given)], values[len(given) :]
            # A graph casts in each replay; a cached cast would be of the weights at capture.
            with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
                named = dict(zip(names, weights, strict=True))
                by_name = dict(zip(given, inputs, strict=True))
                return torch.func.functional_call(self.network, named, (), by_name)

        try:
            with _unchanged(self.network):
                graphed = _make_graphed(forward, (*samples, *aliases))
        except RuntimeError as error:
            cause = str(error.__context__ or error).strip() or type(error).__name__
            self._warn(f"capture failed: {cause.splitlines()[0]}")
            return self.network
        return lambda *inputs: self._guard(graphed(*inputs, *parameters))

    def _guard(self, output: Any) -> Any:
        """Refuse a backward of ``output`` after the next call, or a second one."""
        self._replays += 1
        mine, done = self._replays, set()

        def check(index: int, gradient: Tensor) -> None:
            if mine != self._replays or index in done:
                raise RuntimeError(
                    "a backward through CUDA graphs whose activations are gone: with "
                    "compile='cudagraph', call backward once after each forward and before the "
                    "next; else use compile=False"
                )
            done.add(index)

        for index, leaf in enumerate(pytree.tree_leaves(output)):
            if leaf.requires_grad:
                leaf.register_hook(lambda gradient, index=index: check(index, gradient))
        return output


def _given(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs by name, but for those that are fixed."""
    fixed = {str(n.target) for n in graph.find_nodes(op="placeholder") if FIXED in n.meta}
    return {n: v for n, v in arguments(graph, args, kwargs).items() if n not in fixed}


def _obstacle(parameters: list[Any], inputs: Collection[Any]) -> str:
    """Say what forbids replaying this call; nothing if nothing does."""
    if not parameters or not all(p.is_cuda for p in parameters):
        return "the model is not on a CUDA device"
    if not all(isinstance(value, Tensor) for value in inputs):
        return "an input is no tensor"
    if any(p.grad is not None for p in parameters):
        return (
            "there are gradients to add to; call optimizer.zero_grad(), which sets them to None, "
            "before each forward"
        )
    return ""


def _make_graphed(forward: Callable[..., Any], samples: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Capture ``forward`` and its backward; a RuntimeError if they cannot be."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # found during a capture, a wait leaves a broken state
    try:
        leaves = pytree.tree_leaves(forward(*samples))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise RuntimeError("an output is no tensor")
    del leaves
    make = torch.cuda.make_graphed_callables
    options: dict[str, Any] = {"allow_unused_input": True}  # the prefix has no gradient
    if "capture_error_mode" in inspect.signature(make).parameters:  # from torch 2.12 on
        options["capture_error_mode"] = "thread_local"  # a data loader may pin memory meanwhile
    with torch.cuda.stream(torch.cuda.current_stream()):  # which a failed capture may not restore
        graphed: Callable[..., Any] = make(forward, samples, **options)
    return graphed


@contextlib.contextmanager
def _unchanged(network: Network) -> Iterator[None]:
    """Put back weights, buffers and random state: capture runs the network several times."""
    state = [*network.parameters(), *network.buffers()]
    before = [tensor.detach().clone() for tensor in state]
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.random.fork_rng(devices=sorted({t.device.index for t in state if t.is_cuda})):
            yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)


def refuse_graphed(plan: Plan) -> None:
    """Refuse a Plan whose networks run a backward, or a second forward, by themselves."""
    if plan.modules or plan.checkpoint:
        raise PlanError(
            f"{plan.modules or plan.checkpoint!r}: a CUDA graph of the forward cannot hold the "
            "backward of local modules, nor the second forward of checkpointing; give "
            "compile=True or False"
        )
