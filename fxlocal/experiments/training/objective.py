"""What a network is to make small and is judged by, and what prunes it meanwhile."""

from collections.abc import Callable, Iterable, Mapping
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
from ..models.catalogue import ModelError

if TYPE_CHECKING:  # settings are read by specs, whose strategies' losses stand here
    from .settings import Experiment

__all__ = [
    "LOSSES",
    "MOST_SEEDS",
    "Loss",
    "Pruning",
    "classification_loss",
    "count_wrong",
    "find_error_percent",
    "find_loss",
    "find_predictions",
    "logits_of",
    "loss_of",
    "prune_train",
    "segmentation_loss",
    "trivial_percent",
]

MOST_SEEDS = 2**63  # that a generator takes
_FOREGROUND = 1


def logits_of(output: Any, part: str = "") -> Tensor:
    """Return the class scores in ``output``, leaving auxiliary heads aside.

    Args:
        output: of a model. A dict has the scores under "logits" (transformers' models) or "out"
            (torchvision's for segmentation), another object, as a named tuple (GoogLeNet and
            Inception while they train), in ``logits``.
        part: the key, attribute or index of another part.

    Raises:
        ModelError: if there are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output
    try:
        if isinstance(output, Mapping):
            found = output[part or next((n for n in ("logits", "out") if n in output), "logits")]
        elif part.isdigit():
            found = output[int(part)]
        else:
            found = getattr(output, part or "logits")
    except (AttributeError, IndexError, KeyError, TypeError):
        found = None
    if not isinstance(found, Tensor):
        asked = f"no tensor {part!r} in it; " if part else ""
        told = "name the part that has the logits, as in --output NAME"
        told = told if isinstance(output, (Mapping, tuple, list)) else "let it return logits"
        raise ModelError(f"the model returned {_describe(output)}: {asked}{told}")
    return found


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a dict of {', '.join(map(repr, output)) or 'nothing'}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}, from '0' on"
    return "None" if output is None else f"an object of {type(output).__name__}"


def classification_loss(
    output: Any, target: Tensor, *, label_smoothing: float = 0.0, part: str = ""
) -> Tensor:
    """Return the mean cross-entropy, over pixels too where each has scores of its own."""
    logits = logits_of(output, part)
    return F.cross_entropy(logits, _spread(logits, target), label_smoothing=label_smoothing)


def segmentation_loss(output: Any, target: Tensor, *, part: str = "") -> Tensor:
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
    logits, target = _pixels(logits_of(output, part), target)
    p_BHW = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)[:, _FOREGROUND]
    g_BHW = (target == _FOREGROUND).to(p_BHW.dtype)
    wrong = (p_BHW - g_BHW).square().sum()
    return wrong / (p_BHW.square().sum() + g_BHW.sum() + 1)


LOSSES: dict[Task, Callable[..., Tensor]] = {
    "classification": classification_loss,
    "segmentation": segmentation_loss,
}


@dataclass(frozen=True)
class Loss:
    """The loss of a goal that is not the usual one; of equal goals they are equal."""

    goal: Goal

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        """Return the loss of a batch."""
        goal = self.goal
        smoothing = {"label_smoothing": goal.label_smoothing} if goal.label_smoothing else {}
        return LOSSES[goal.task](output, target, part=goal.output, **smoothing)


def find_loss(goal: Goal) -> Callable[..., Tensor]:
    """Return what the network is to make small: (output, target) -> scalar."""
    return Loss(goal) if goal.label_smoothing or goal.output else LOSSES[goal.task]


def loss_of(output: Any, target: Tensor, task: Task = "classification") -> Tensor:
    """Return what the network is to make small: the task's, of `LOSSES`."""
    return LOSSES[task](output, target)


def count_wrong(
    output: Any, target: Tensor, task: Task = "classification", part: str = ""
) -> Tensor:
    """Return how much is wrong and out of how much, as one tensor of two (no host sync).

    Sums over batches make the ratio that of the whole set. Classification: wrong predictions, of
    all. Segmentation: with P the predicted and T the true foreground, in pixels,

        1 - Dice = 1 - 2 |P and T| / (|P| + |T|) = (pixels in one of P and T) / (|P| + |T|).
    """
    logits = logits_of(output, part)
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
    if logits.dim() == 4 and target.dim() < 3:  # of mixed images, a share of each class
        return target[..., None, None].expand(*target.shape, *logits.shape[2:])
    return target


def find_error_percent(
    model: nn.Module, experiment: "Experiment", on_batch: Callable[[], None] = lambda: None
) -> float:
    """Return the test error of ``model``, which is put into evaluation mode."""
    data, machine, part = experiment.data, experiment.machine, experiment.settings.output
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=machine.device)
    with torch.no_grad(), machine.autocast():
        size = experiment.settings.batch_size
        for x, y in batches(data.test, size, device=machine.device, workers=machine.workers):
            counts += count_wrong(model(machine.place(x)), y, data.task, part)
            on_batch()
    wrong, total = counts.tolist()
    return float(100.0 * wrong / max(total, 1))  # none: no foreground, none found


def find_predictions(model: nn.Module, experiment: "Experiment") -> tuple[Tensor, Tensor]:
    """Return the predicted and the true class of each test image, or of each of its pixels.

    Args:
        model: is put into evaluation mode.
        experiment: whose data, machine, batch size and part of the output count.
    """
    data, machine, settings = experiment.data, experiment.machine, experiment.settings
    found = []
    model.eval()
    with torch.no_grad(), machine.autocast():
        for x, y in batches(data.test, settings.batch_size, workers=machine.workers):
            logits = logits_of(model(machine.place(x)), settings.output).cpu()
            y = _pixels(logits, y)[1] if data.task == "segmentation" else _spread(logits, y)
            found.append((logits.argmax(1).flatten(), y.flatten()))
    predicted, true = map(torch.cat, zip(*found, strict=True))
    return predicted, true


@dataclass(frozen=True)
class Pruning(Constant):
    """Train every layer by back-propagation, and prune meanwhile, as `fxlocal.PruneTrain`."""

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
