"""What a network is trained for and judged by, whatever form its output has.

Two tasks: in *classification* each image has one label (a segmentation model then learns it at
every pixel); in *segmentation* each pixel has a label of its own, 1 where the foreground is, and
foreground and prediction are compared by the Dice coefficient.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import DataError

__all__ = [
    "LOSSES",
    "METRICS",
    "SCORES",
    "Goal",
    "Task",
    "count_wrong",
    "logits_of",
    "loss_of",
    "trivial_percent",
]

Task: TypeAlias = Literal["classification", "segmentation"]

# What the error of a run is called, and what 100 % less the error is.
METRICS: dict[Task, str] = {"classification": "error", "segmentation": "1 - Dice"}
SCORES = {"error": "accuracy", "1 - Dice": "Dice"}

_FOREGROUND = 1


@dataclass(frozen=True)
class Goal:
    """What there is to learn: how many classes, and what the labels are for."""

    num_classes: int = 10
    task: Task = "classification"


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


def classification_loss(output: Any, target: Tensor) -> Tensor:
    """Return the mean cross-entropy, over pixels too where each has scores of its own."""
    logits = logits_of(output)
    return F.cross_entropy(logits, _spread(logits, target))


def segmentation_loss(output: Any, target: Tensor) -> Tensor:
    """Return the Dice loss.

    Raises:
        DataError: if the model does not score each pixel.
    """
    return _dice_loss(*_pixels(logits_of(output), target))


LOSSES: dict[Task, Callable[[Any, Tensor], Tensor]] = {
    "classification": classification_loss,
    "segmentation": segmentation_loss,
}


def loss_of(output: Any, target: Tensor, task: Task = "classification") -> Tensor:
    """Return what the network is to make small: the task's, of `LOSSES`."""
    return LOSSES[task](output, target)


def count_wrong(output: Any, target: Tensor, task: Task = "classification") -> Tensor:
    """Return how much is wrong and out of how much, as one tensor of two (no host sync).

    Sums over batches make the ratio that of the whole set. Classification: wrong predictions, of
    all. Segmentation: with P the predicted and T the true foreground, in pixels,

        1 - Dice = 1 - 2 |P and T| / (|P| + |T|) = (pixels in one of P and T) / (|P| + |T|).
    """
    logits = logits_of(output)
    if task == "segmentation":
        logits, target = _pixels(logits, target)
        predicted, true = logits.argmax(1) == _FOREGROUND, target == _FOREGROUND
        return torch.stack([(predicted != true).sum(), predicted.sum() + true.sum()])
    target = _spread(logits, target)
    wrong = torch.sum(logits.argmax(1) != target)
    return torch.stack([wrong, torch.full_like(wrong, target.numel())])


def trivial_percent(targets: Iterable[Tensor]) -> float:
    """Return 1 - Dice, in percent, of calling every pixel foreground: what a network has to beat.

    Args:
        targets: the labels of each pixel, batch by batch.
    """
    true, total = 0, 0
    for target in targets:
        true += int((target == _FOREGROUND).sum())
        total += target.numel()
    return 100.0 * (total - true) / (total + true)


def _dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the Dice loss of the foreground, over all pixels of the batch.

    Equation (Milletari et al., V-Net, 2016, section 3), with p the probability of the foreground at
    a pixel, by softmax, and g 1 where the foreground is:
        loss = 1 - 2 sum(p g) / (sum(p^2) + sum(g^2))

    Note: written as (p - g)^2 in the numerator, which is equal, and with one pixel added to the
    denominator, so that a batch without any foreground is no division by zero. Computed in float32
    at least: sums of so many pixels overflow float16 and lose all digits in bfloat16.
    """
    p_BHW = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)[:, _FOREGROUND]
    g_BHW = (target == _FOREGROUND).to(p_BHW.dtype)
    wrong = (p_BHW - g_BHW).square().sum()
    return wrong / (p_BHW.square().sum() + g_BHW.sum() + 1)


def _pixels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as they are, if there are scores for each labelled pixel."""
    if logits.dim() != 4 or logits.shape[2:] != target.shape[1:]:
        raise DataError(
            f"the data label each pixel, {tuple(target.shape)}, but the model's output has the "
            f"shape {tuple(logits.shape)}; take a model that scores each pixel, such as unet"
        )
    return logits, target


def _spread(logits: Tensor, target: Tensor) -> Tensor:
    """Give every pixel of a segmentation its image's label, where there are no others."""
    if logits.dim() == 4 and target.dim() == 1:
        return target[:, None, None].expand(-1, *logits.shape[2:])
    return target
