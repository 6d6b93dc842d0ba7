"""What a network is to make small and is judged by, and what prunes it meanwhile."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ...runtime.prune_train import PruneTrain, check_options
from ...schedules import Constant, Schedule
from ..data.catalogue import batches
from ..data.images import DataError
from ..data.task import Goal, Task

if TYPE_CHECKING:  # settings are read by specs, whose strategies' losses stand here
    from .settings import Experiment

__all__ = [
    "LOSSES",
    "MOST_SEEDS",
    "Pruning",
    "classification_loss",
    "count_wrong",
    "find_error_percent",
    "logits_of",
    "loss_of",
    "prune_train",
    "segmentation_loss",
    "training_batches",
    "trivial_percent",
]

MOST_SEEDS = 2**63  # that a generator takes
_FOREGROUND = 1


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
    """Return the Dice loss of the foreground, over all pixels of the batch.

    Equation (Milletari et al., V-Net, 2016, section 3), with p the probability of the foreground at
    a pixel, by softmax, and g 1 where the foreground is:
        loss = 1 - 2 sum(p g) / (sum(p^2) + sum(g^2))

    Note: written as (p - g)^2 in the numerator, which is equal, and with one pixel added to the
    denominator, so that a batch without any foreground is no division by zero. Computed in float32
    at least: sums of so many pixels overflow float16 and lose all digits in bfloat16.

    Raises:
        DataError: if the model does not score each pixel.
    """
    logits, target = _pixels(logits_of(output), target)
    p_BHW = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)[:, _FOREGROUND]
    g_BHW = (target == _FOREGROUND).to(p_BHW.dtype)
    wrong = (p_BHW - g_BHW).square().sum()
    return wrong / (p_BHW.square().sum() + g_BHW.sum() + 1)


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


def training_batches(
    experiment: "Experiment", batch_size: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's batches: images (B, C, H, W) and labels, where and how the machine is.

    A smaller last batch is left out, so that there is one shape: one compilation, and no batch norm
    over a single image. The order depends on seed and epoch, so that a resumed run draws what an
    unbroken one draws.
    """
    data, machine = experiment.data, experiment.machine
    seed = (experiment.seed * 1_000_003 + epoch) % MOST_SEEDS
    drawn = batches(
        data.train,
        batch_size,
        generator=torch.Generator().manual_seed(seed),
        augment=data.augment,
        device=machine.device,
        drop_last=True,
    )
    return ((machine.place(x), y) for x, y in drawn)


def find_error_percent(model: nn.Module, experiment: "Experiment") -> float:
    """Return the test error of ``model``, which is put into evaluation mode."""
    data, machine = experiment.data, experiment.machine
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=machine.device)
    with torch.no_grad(), machine.autocast():
        for x, y in batches(data.test, experiment.settings.batch_size, device=machine.device):
            counts += count_wrong(model(machine.place(x)), y, data.task)
    wrong, total = counts.tolist()
    return float(100.0 * wrong / max(total, 1))  # none: no foreground, none found


@dataclass(frozen=True)
class Pruning(Constant):
    """Train every layer by back-propagation, and prune meanwhile: `fxlocal.PruneTrain`'s options.

    Raises:
        PlanError: if one is out of range.
    """

    share: float = 0.2
    every: int = 10
    threshold: float = 1e-4

    def __post_init__(self) -> None:
        check_options(self.share, self.every, self.threshold)

    def start(self, model: nn.Module, optimizer: Optimizer, example: Tensor) -> PruneTrain:
        """Return what prunes a model that takes batches like ``example``."""
        share, every, threshold = self.share, self.every, self.threshold
        told: dict[str, Any] = {"share": share, "every": every, "threshold": threshold}
        return PruneTrain(model, optimizer, example_inputs=(example,), **told)


def prune_train(
    epochs: int, goal: Goal, *, share: float = 0.2, every: int = 10, threshold: float = 1e-4
) -> Schedule:
    """Drive channels to zero by a penalty, and cut them away (PruneTrain)."""
    return Pruning(share=share, every=every, threshold=threshold)
