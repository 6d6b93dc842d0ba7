"""Hand a network to `torch.compile`, whole, and never fall back to eager in silence."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .network import Network

__all__ = ["compile_network"]


def compile_network(network: Network, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile ``network`` as one graph.

    Each network has code of its own, so each Plan is compiled once and shares no recompile limit
    with another. A graph break is an error, as `torch.compile` would then run parts in eager.

    Args:
        network: what `transform` returned.
        options: keyword arguments of `torch.compile`; ``fullgraph`` is True unless given.
    """
    compiled: Callable[..., Any] = torch.compile(network, **{"fullgraph": True, **options})
    return compiled
