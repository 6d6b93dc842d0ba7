"""The forward and backward of one training step, whatever the strategy.

| the step's Plan | forward and loss |
|---|---|
| with local modules | the network takes the target too, and back-propagates all losses but one |
| of a `Recompute` | the captured network, in segments that are computed again in backward |
| any other | the network, and the task's loss |
"""

from torch import Tensor

from ...ir.nodes import unwrapped
from ...runtime.driver import Driver
from ..data.task import Task, loss_of
from .measure import count_saved_bytes
from .recompute import Recompute, Recomputed, modules_of, refuse_compiled
from .settings import Machine

__all__ = ["Stepper"]


class Stepper:
    """Takes the steps of a driver's model.

    Args:
        driver: hands out the network of each.
        machine: where and how to compute.
        task: what the network is to learn.

    Attributes:
        modules: the local modules or recomputed segments of the first step, if it has any.

    Raises:
        PlanError: if the model cannot be split as a `Recompute` asks.
        SettingsError: if such segments are to be compiled.
    """

    def __init__(self, driver: Driver, machine: Machine, task: Task = "classification") -> None:
        self.driver, self.machine, self.task = driver, machine, task
        self.recomputed: Recomputed | None = None
        self.modules = modules_of(driver.schedule, driver.analysis, driver.epoch)
        if isinstance(driver.schedule, Recompute):
            refuse_compiled(driver.schedule, machine)
            self.recomputed = Recomputed(driver.captured, driver.analysis, driver.schedule)

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the gradients of the loss on a batch to those of the parameters; return the loss."""
        loss = self._loss(x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def measure(self, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Do so; return the loss, and the most bytes that autograd held at a time."""
        heads = self.driver.heads
        there = (x, *heads.parameters(), *heads.buffers())
        with count_saved_bytes(self.driver.model, *there) as saved_bytes:
            loss = self.take(x, y)
        return loss, saved_bytes()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        network = self.driver.network()
        with self.machine.autocast():
            if unwrapped(network).meta["fxlocal"].plan.modules is not None:
                _, loss = network(x, target=y)  # a model may have more inputs, with defaults
                assert isinstance(loss, Tensor)
                return loss
            if self.recomputed is not None:
                network = self.recomputed
            return loss_of(network(x), y, self.task)
