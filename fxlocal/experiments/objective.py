"""What a network is trained for and judged by, whatever form its output has."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["count_wrong", "logits_of", "loss_of"]


def logits_of(output: Any) -> Tensor:
    """Return the class scores in ``output``, leaving auxiliary heads aside.

    A dict (torchvision's segmentation models) has them under "out"; a named tuple (GoogLeNet and
    Inception while they train) in ``logits``.
    """
    if isinstance(output, dict):
        output = output["out"]
    logits = getattr(output, "logits", output)
    assert isinstance(logits, Tensor)
    return logits


def _per_pixel(logits: Tensor, target: Tensor) -> Tensor:
    """Give every pixel of a segmentation its image's label, where there are no others."""
    if logits.dim() == 4 and target.dim() == 1:
        return target[:, None, None].expand(-1, *logits.shape[2:])
    return target


def loss_of(output: Any, target: Tensor) -> Tensor:
    """Return the mean cross-entropy, over pixels too where each has scores of its own."""
    logits = logits_of(output)
    return F.cross_entropy(logits, _per_pixel(logits, target))


def count_wrong(output: Any, target: Tensor) -> tuple[Tensor, int]:
    """Return how many predictions are wrong, as a tensor (no host sync), and how many there are."""
    logits = logits_of(output)
    target = _per_pixel(logits, target)
    return torch.sum(logits.argmax(1) != target), target.numel()
