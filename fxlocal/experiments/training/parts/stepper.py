"""The forward and backward of one step of a driver's model.

| the step's Plan | forward and loss |
|---|---|
| with local modules | the network takes the target too, and back-propagates all losses but one |
| any other | the network, and the task's loss |

By `Pruning`, whose Plan is plain training, a penalty is added, and channels are cut.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from ....compiler.resolve import boundary_of
from ....compiler.transform import set_rate
from ....ir.network import Network
from ....ir.nodes import unwrapped
from ....runtime.accumulate import accumulate
from ....runtime.driver import Driver
from ....runtime.prune_train import PruneTrain
from ...data.task import Task
from ..measure import count_saved_bytes
from ..objective import LOSSES, Pruning
from ..settings import Machine
from ..strategies import Modulation

__all__ = ["Stepper"]


class Stepper:
    """Takes the steps of a driver's model.

    Args:
        driver: hands out the network of each.
        machine: where and how to compute.
        task: what the network is to learn.
        modulation: what takes the steps of local layers in place of the rule itself.
        loss: what the network is to make small; None is the task's.
        parts: of a batch that are computed one after another, and add up to a step.

    Attributes:
        stages: the local modules or checkpointed stages of the first step, if it has any.
        sample_ids: of the batch to come, for a driver with a cache.
    """

    def __init__(
        self,
        driver: Driver,
        machine: Machine,
        task: Task = "classification",
        modulation: Modulation = None,
        loss: Callable[..., Tensor] | None = None,
        parts: int = 1,
    ) -> None:
        self.loss, self.parts = loss or LOSSES[task], parts
        self.local = _LocalOptimizer(driver, modulation) if modulation else None
        self.driver, self.machine, self.task = driver, machine, task
        plan = driver.schedule.plan(driver.analysis, driver.epoch)
        self.stages = plan.modules or plan.checkpoint
        self.prune: PruneTrain | None = None
        self.sample_ids: Tensor | None = None

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
        if self.parts == 1:
            return self._add(self._loss(x, y), len(x))
        network, total = self.driver.network(), torch.zeros((), device=x.device)
        parts = list(zip(x.chunk(self.parts), y.chunk(self.parts), strict=True))
        for index, (images, labels) in enumerate(parts):
            more = index + 1 < len(parts)
            with accumulate(network) if more else nullcontext():
                share = len(images) / len(x)
                loss = share * self._loss_by(network, images, labels)
                total += self._add(loss, len(images)).detach()
        return total

    def _add(self, loss: Tensor, num_images: int) -> Tensor:
        whole = loss if self.prune is None else loss + self.prune.penalty(loss, num_images)
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
        return self._loss_by(self.driver.network(), x, y)

    def _loss_by(self, network: Any, x: Tensor, y: Tensor) -> Tensor:
        local = self.local.steps(unwrapped(network)) if self.local else nullcontext()
        with local, self.machine.autocast():
            if unwrapped(network).history.plan.modules is not None:
                _, loss = network(x, target=y)  # a model may have more inputs, with defaults
                assert isinstance(loss, Tensor)
                return loss
            told = {} if self.sample_ids is None else {"sample_ids": self.sample_ids}
            return self.loss(network(x, **told), y)


class _LocalOptimizer:
    """Moves each local layer by an optimizer, of which its normalised delta is the gradient.

    Which LoCal+SGD, section 2.3, mentions and rejects. The rule makes steps of length 1, which are
    taken back: they are the normalised deltas, reversed where weak supervision says so.
    """

    def __init__(self, driver: Driver, modulation: Modulation) -> None:
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
