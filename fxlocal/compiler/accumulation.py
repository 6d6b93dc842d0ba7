"""Micro-batches that add up to one step: their deltas are summed, and applied with the last.

In all but the last a network runs a variant of its graph, see `fxlocal.passes.reduce_deltas`; who
says which is the last is `fxlocal.accumulate`, or ``no_sync()`` of `DistributedDataParallel`.
"""

from dataclasses import dataclass

import torch
from torch._compile import _disable_dynamo

from ..ir.network import Network
from ..passes import accumulate_deltas
from ..passes.reduce_deltas import find_moved
from .ranks import active_wrapper

__all__ = ["MicroBatches", "choose_micro_batch"]


@dataclass
class MicroBatches:
    """Of all networks of a model: whether more micro-batches of this step are to come."""

    more: bool = False


@_disable_dynamo  # it clones graphs, which Dynamo does not trace
def choose_micro_batch(network: Network) -> Network:
    """Return the network that runs in a call of ``network``: itself, unless deltas add up."""
    if not network.trains:
        return network
    wrapper = active_wrapper()
    more = wrapper is not None and not wrapper.require_backward_grad_sync
    if network.meta["micro_batches"].more or more:
        return _variants(network)[0]
    last: Network = network.meta.pop("last", network)
    return last


def _variants(network: Network) -> tuple[Network, Network]:
    """Return what adds up, and what ends that, and let the next call that ends it find it."""
    if "variants" not in network.meta:
        first, last = network.clone(), network.clone()
        for index, weight in enumerate(find_moved(network)):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            for one in (first, last):
                one.fxlocal.register_buffer(f"total_{index}", total, persistent=False)
        for one in (first, last):
            accumulate_deltas(one, last=one is last)
            one.graph.lint()
            one.generate_code()
        network.meta["variants"] = first, last
    network.meta["last"] = network.meta["variants"][1]
    variants: tuple[Network, Network] = network.meta["variants"]
    return variants
