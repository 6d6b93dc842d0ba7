"""What a step moves: copies from before it, how far it went, and the heads' reports."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .report import HeadReport
from .watch import Watch

__all__ = ["State", "distance", "head_report", "length"]


class State:
    """Copies of what a step may move, by the index of the layer."""

    def __init__(self, watch: Watch) -> None:
        self.weights = [[w.detach().clone() for w in weights] for weights in watch.weights]
        self.versions = [[w._version for w in weights] for weights in watch.weights]
        self.statistics = [[s.clone() for s in statistics] for statistics in watch.statistics]


def length(tensors: Sequence[Tensor]) -> float:
    """Return the L2 length of all together."""
    return math.hypot(*(float(torch.linalg.vector_norm(_wide(t))) for t in tensors))


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the length of ``b - a``, which is 0 where both are NaN or the same infinity."""
    changes = []
    for u, v in zip(map(_wide, a), map(_wide, b), strict=True):
        changes.append((v - u).masked_fill((u == v) | (u.isnan() & v.isnan()), 0))
    return length(changes)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def head_report(
    index: int, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
) -> HeadReport:
    """Return the report of the head of module ``index``, whose parameters were as ``before``."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    gradient = length(gradients) if gradients else None
    return HeadReport(index, gradient, distance(before, parameters))
