"""Hand a network to `torch.compile` or to CUDA graphs, whole, and never fall back in silence."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch

from .cudagraph import GraphedNetwork
from .network import Network

__all__ = ["compile_network", "compiler"]


def compiler(
    how: bool | Literal["cudagraph"] | Mapping[str, Any],
) -> Callable[[Network], Callable[..., Any]]:
    """Return what makes a network's callable: itself, its compiled form or its CUDA graphs.

    Args:
        how: False, True, keyword arguments of `torch.compile`, or "cudagraph".

    Raises:
        ValueError: if it is something else.
    """
    if how == "cudagraph":
        return GraphedNetwork
    if isinstance(how, Mapping):
        return partial(compile_network, options=how)
    if not isinstance(how, bool):
        raise ValueError(
            f"compile={how!r}: give True, a dict of torch.compile's keyword arguments, or "
            "'cudagraph'"
        )
    return partial(compile_network, options={}) if how else lambda network: network


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
