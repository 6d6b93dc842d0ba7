"""What a network is to make small and is judged by, and the forward and backward of one step.

| the step's Plan | forward and loss |
|---|---|
| with local modules | the network takes the target too, and back-propagates all losses but one |
| any other | the network, and the task's loss |

By `Pruning`, whose Plan is plain training, a penalty is added, and channels are cut.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from ...compiler.resolve import boundary_of
from ...compiler.transform import set_rate
from ...ir.network import Network
from ...ir.nodes import unwrapped
from ...runtime.driver import Driver
from ...runtime.prune_train import PruneTrain, check_options
from ...schedules import Constant, Schedule
from ..data.catalogue import batches
from ..data.images import DataError
from ..data.task import Goal, Task
from .measure import count_saved_bytes

if TYPE_CHECKING:  # settings are read by specs, whose strategies' losses stand here
    from .settings import Experiment, Machine
    from .strategies import Modulation

__all__ = [
    "LOSSES",
    "MOST_SEEDS",
    "Pruning",
    "Stepper",
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


class Stepper:
    """Takes the steps of a driver's model.

    Args:
        driver: hands out the network of each.
        machine: where and how to compute.
        task: what the network is to learn.
        modulation: what takes the steps of local layers in place of the rule itself.

    Attributes:
        stages: the local modules or checkpointed stages of the first step, if it has any.
    """

    def __init__(
        self,
        driver: Driver,
        machine: "Machine",
        task: Task = "classification",
        modulation: "Modulation" = None,
    ) -> None:
        self.local = _LocalOptimizer(driver, modulation) if modulation else None
        self.driver, self.machine, self.task = driver, machine, task
        plan = driver.schedule.plan(driver.analysis, driver.epoch)
        self.stages = plan.modules or plan.checkpoint
        self.prune: PruneTrain | None = None

    def use(self, optimizer: Optimizer, example: Tensor) -> None:
        """Let the steps be an optimizer's, and prune if the schedule says so."""
        if isinstance(schedule := self.driver.schedule, Pruning):
            self.prune = schedule.start(self.driver.model, optimizer, example)

    def end_epoch(self) -> bool:
        """End an epoch, the driver's having ended; tell whether channels were cut."""
        before = self.driver.captured
        if self.prune is not None:
            self.prune.end_epoch()
            self.driver.follow_cuts()
        return self.driver.captured is not before

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the gradients of the loss on a batch to those of the parameters; return the loss."""
        loss = self._loss(x, y)
        whole = loss if self.prune is None else loss + self.prune.penalty(loss)
        whole.backward()  # type: ignore[no-untyped-call]
        return loss

    def state_dict(self) -> list[dict[str, Any]]:
        """Return what the next step depends on beside the driver."""
        return [one.state_dict() for one in self._learning()]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Take up what `state_dict` returned, in a model that the driver has cut."""
        for one, own in zip(self._learning(), state, strict=True):
            one.load_state_dict(own)

    def _learning(self) -> list[Any]:
        local = self.local.optimizers.values() if self.local else ()
        return [*local, *filter(None, [self.prune])]

    def measure_or(self, predicted: int, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Do as `measure`, but on a GPU, which tells in the end, or of what is compiled."""
        if x.device.type == "cuda" or self.machine.compile:
            return self.take(x, y), 0 if x.device.type == "cuda" else predicted
        return self.measure(x, y)

    def measure(self, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Do so; return the loss, and the most bytes that autograd held at a time."""
        heads = self.driver.heads
        there = (x, *heads.parameters(), *heads.buffers())
        with count_saved_bytes(self.driver.model, *there) as saved_bytes:
            loss = self.take(x, y)
        return loss, saved_bytes()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        network = self.driver.network()
        local = self.local.steps(unwrapped(network)) if self.local else nullcontext()
        with local, self.machine.autocast():
            if unwrapped(network).history.plan.modules is not None:
                _, loss = network(x, target=y)  # a model may have more inputs, with defaults
                assert isinstance(loss, Tensor)
                return loss
            return loss_of(network(x), y, self.task)


class _LocalOptimizer:
    """Moves each local layer by an optimizer, of which its normalised delta is the gradient.

    Which LoCal+SGD, section 2.3, mentions and rejects. The rule makes steps of length 1, which are
    taken back: they are the normalised deltas, reversed where weak supervision says so.
    """

    def __init__(self, driver: Driver, modulation: "Modulation") -> None:
        self.driver = driver
        named = (layer.weight for layer in driver.analysis.layers)
        self.weights = {name: driver.model.get_parameter(name) for name in named if name}
        make = Adam if modulation == "adam" else partial(SGD, momentum=0.9)
        self.optimizers: dict[nn.Parameter, Optimizer] = {
            weight: make([weight], lr=1.0) for weight in self.weights.values()
        }

    @contextmanager
    def steps(self, network: Network) -> Iterator[None]:
        """Let the optimizers take the local steps of the forward that runs meanwhile."""
        driver, rates = self.driver, dict[nn.Parameter, float]()
        analysis, sign = driver.analysis, float(driver.sign)
        plan = driver.schedule.plan(analysis, driver.epoch, driver.step - 1)
        set_rate(network, sign, [sign] * len(plan.rates))
        local = analysis.layers[: boundary_of(plan, analysis)]
        for layer, rate in zip(local, plan.rates or [plan.rate] * len(local), strict=True):
            if rate and layer.weight:
                rates.setdefault(self.weights[layer.weight], rate)
        before = {weight: weight.detach().clone() for weight in rates}
        yield
        for weight, rate in rates.items():
            weight.grad = before[weight] - weight.detach()
            weight.detach().copy_(before[weight])
            self.optimizers[weight].param_groups[0]["lr"] = rate
            self.optimizers[weight].step()
            weight.grad = None
