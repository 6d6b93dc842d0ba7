"""Run a network's forward and backward as CUDA graphs: no launch cost per kernel.

On a small model the GPU waits for Python to launch the next kernel, so that a cheaper step takes
no less time. Here the forward, its local updates included, and the backward are each captured once
and replayed as one launch (`torch.cuda.make_graphed_callables`); loss and optimizer stay the
user's own. A capture takes some tenths of a second, where compiling takes tens of seconds.

What a capture cannot hold runs as it is, with a warning that says why: a model that is not on a
CUDA device, an input that is no tensor, a forward that waits for the device.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .network import Network

__all__ = ["GraphedNetwork"]


class GraphedNetwork:
    """A network's callable: captures at the first call with inputs of a new shape, then replays.

    The output's memory is written again by the next call, and so are the gradients': call
    ``optimizer.zero_grad()`` (to None) between steps. A step that finds gradients to add to runs as
    it is. In evaluation mode and under ``no_grad`` the network runs as it is too.

    Args:
        network: what `transform` returned.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._captured: dict[Any, Callable[..., Any]] = {}
        self._warned: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's output."""
        if not self.network.training or not torch.is_grad_enabled():
            return self.network(*args, **kwargs)
        if reason := self._obstacle(args, kwargs):
            self._warn(reason)
            return self.network(*args, **kwargs)
        key = _signature(args)
        if key not in self._captured:
            self._captured[key] = self._capture(args)
        return self._captured[key](*args)

    def release(self) -> None:
        """Free the captured graphs and their memory; the next call captures again."""
        self._captured.clear()

    def _obstacle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Say what forbids replaying this call; nothing if nothing does."""
        parameters = list(self.network.parameters())
        if not all(p.is_cuda for p in parameters):
            return "the model is not on a CUDA device"
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            return "an input is no tensor, or is passed by keyword"
        if any(p.grad is not None for p in parameters):
            return "there are gradients to add to; call optimizer.zero_grad() before each step"
        return ""

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"compile='cudagraph' does not apply, the network runs as it is: {reason}",
                stacklevel=4,
            )

    def _capture(self, args: tuple[Tensor, ...]) -> Callable[..., Any]:
        """Capture the network for inputs like ``args``; nothing else changes by it."""
        samples = tuple(arg.detach().clone().requires_grad_(arg.requires_grad) for arg in args)
        try:
            with _unchanged(self.network):
                graphed: Callable[..., Any] = torch.cuda.make_graphed_callables(
                    _Region(self.network), samples, allow_unused_input=True
                )
        except RuntimeError as error:
            self._warn(f"capture failed: {str(error).strip().splitlines()[0]}")
            return self.network
        return graphed


class _Region(nn.Module):
    """A network in the autocast region that it is called in, without the cache of casts.

    A captured graph casts in each replay; a cached cast would be of the weights at capture.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        enabled = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda")
        self.region = torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)

    def forward(self, *args: Tensor) -> Any:
        with self.region:
            return self.network(*args)


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


def _signature(args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return what a capture depends on, beside the network."""
    return (
        *((a.shape, a.stride(), a.dtype, a.device, a.requires_grad) for a in args),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )
