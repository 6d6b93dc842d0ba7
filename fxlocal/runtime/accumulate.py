"""Micro-batches of a user's own loop that add up to one step of the optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..compiler.accumulation import MicroBatches
from ..errors import PlanError
from ..ir.nodes import graph_module
from .cudagraph import GraphedNetwork
from .driver import Driver

__all__ = ["accumulate"]


@contextmanager
def accumulate(network_or_driver: Any) -> Iterator[None]:
    """Let the micro-batches in this context add up to a step that ends with one behind it.

    Their gradients add up in ``.grad`` as ever; so do the deltas of a prefix, which moves once,
    with the last micro-batch. In a data parallel run nothing is sent before that, as under
    ``no_sync()`` of `DistributedDataParallel`, which does the same for what it wraps.

    Args:
        network_or_driver: what `fxlocal.transform` returned, or a `Driver`.

    Raises:
        PlanError: if the driver makes CUDA graphs, or weights are in shards.
        TypeError: if it is neither.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from contextlib import nullcontext
        >>> from fxlocal import LocalPrefix, Plan, transform
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> net = transform(model, Plan(local=LocalPrefix(1)))
        >>> for i, x in enumerate(torch.randn(3, 5, 4)):
        ...     with accumulate(net) if i < 2 else nullcontext():
        ...         (net(x).square().mean() / 3).backward()
    """
    given = network_or_driver
    is_driver = isinstance(given, Driver)
    if isinstance(given, GraphedNetwork) or (is_driver and given.how == "cudagraph"):
        raise PlanError(
            "accumulate: micro-batches run other graphs than the step's last, and a CUDA graph "
            "holds one: give compile=True or False"
        )
    network = given.captured if is_driver else graph_module(given, "accumulate")
    if "shard" in network.meta:
        raise PlanError(
            "accumulate: a prefix in shards applies what it learns with each micro-batch. Give "
            "whole batches, or use fxlocal.replicate"
        )
    batches: MicroBatches = network.meta.setdefault("micro_batches", MicroBatches())
    before, batches.more = batches.more, True
    try:
        yield
    finally:
        batches.more = before
