"""One way to train a copy of a model: takes its turns, and is measured in bytes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import stochastic_depth

from ...ir.nodes import unwrapped
from ...ir.source import arguments
from ...ir.stages import Stage, find_stages
from ...ops.drop import add_rows, take_rows
from ...runtime.driver import Driver
from ...schedules import Schedule
from ..training.measure import clock
from ..training.objective import loss_of
from ..training.parts.stepper import Stepper
from ..training.settings import Machine
from .turns import WARM_UP_TURNS, Job, Mode, time_call

__all__ = ["Noised", "Summed", "Variant", "small_steps"]


class Summed(Stepper):
    """Adds up the losses of all local modules, and back-propagates once.

    Errors do not cross modules here either, so the gradients are greedy's; but every activation is
    kept until the end.
    """

    _parts: tuple[Stage, ...] = ()  # of the one network that a constant Plan has

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        network = unwrapped(self.driver.network())
        self._parts = self._parts or find_stages(network)
        values = arguments(network.graph, (x,), {"target": y})
        losses = []
        with self.machine.autocast():
            for stage in self._parts:
                made, (_, loss) = stage(*(values[name] for name in stage.inputs))
                values.update(zip(stage.outputs, made, strict=True))
                losses += [] if loss is None else [loss]
            return torch.stack(losses).sum()


class Noised(Stepper):
    """Computes all rows and multiplies those that are left out by zero, as torchvision does.

    The network's draws are taken for the noise; nothing is skipped.
    """

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        network = unwrapped(self.driver.network())
        for node in network.graph.find_nodes(op="call_function", target=take_rows):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
        for node in network.graph.find_nodes(op="call_function", target=add_rows):
            shortcut, branch, rows = node.args[:3]
            node.target, node.args = _add_noised, (shortcut, branch, rows.args[1])
            network.graph.erase_node(rows)
            network.recompile()
        with self.machine.autocast():
            return loss_of(network(x), y, self.task)


def _add_noised(shortcut: Tensor, branch: Tensor, survival: float) -> Tensor:
    noised: Tensor = stochastic_depth(branch, 1 - survival, "row")
    return shortcut + noised


class Variant:
    """One way to train, with its own copy of the model.

    Args:
        name: what it is called.
        job: what to train, on what.
        schedule: says which Plan holds in each step.
        mode: how its networks run.
        steps: that make a turn, which is measured as one.
        stepper: makes what takes them.

    Attributes:
        seconds: of one step, the mean of its turn; one entry per turn.
        first_turn_seconds: of the first turn and all that is made for it.
        saved_bytes: the most that any step of a turn keeps for backward; on a GPU, the peak during
            one, with the variant's own parameters and optimizer state; None if not known.
    """

    def __init__(
        self,
        name: str,
        job: Job,
        schedule: Schedule,
        mode: Mode,
        steps: int = 1,
        stepper: Callable[[Driver, Machine], Stepper] = Stepper,
    ):
        self.name, self.job, self.schedule = name, job, schedule
        self.mode, self.steps, self.build_stepper = mode, steps, stepper
        eager = replace(job.machine, compile=False, cudagraph=False)
        self.machine = eager if mode == "eager" else job.machine
        self.device = torch.device(job.machine.device)
        self.model = copy.deepcopy(job.model)
        self.seconds: list[float] = []

    def prepare(self) -> None:
        """Emit the networks, time the first turn, warm up and measure memory."""
        start = clock(self.device)
        with self.machine.autocast():  # the shapes of the layers include their dtypes
            compiled: Any = "cudagraph" if self.mode == "cudagraph" else self.mode == "compiled"
            shown = (self.job.x,)
            self.driver = Driver(self.model, self.schedule, compile=compiled, example_inputs=shown)
        self.optimizer = small_steps(self.driver.parameters())
        self.stepper = self.build_stepper(self.driver, self.machine)
        self.stepper.use(self.optimizer, self.job.x)
        self.driver.start_epoch()
        self._turn()
        self.first_turn_seconds = clock(self.device) - start
        for _ in range(WARM_UP_TURNS):
            self._turn()
        self.saved_bytes = self._measure_memory()

    def _measure_memory(self) -> int | None:
        if self.mode == "cudagraph":
            return None  # captured activations were allocated before the peak can be watched
        if self.device.type == "cuda":
            # Other variants' weights are on the GPU too; they are not this one's memory.
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._turn()
            peak = torch.cuda.max_memory_allocated(self.device)
            momenta = [v for state in self.optimizer.state.values() for v in state.values()]
            own = [*self.driver.parameters(), *self.model.buffers(), *momenta]
            return peak - before + sum(t.nbytes for t in own if isinstance(t, Tensor))
        if self.mode == "compiled":
            return None  # autograd's hooks see nothing of what a compiled network keeps
        kept = []
        for _ in range(self.steps):
            loss, saved_bytes = self.stepper.measure(self.job.x, self.job.y)
            self._update(loss)
            kept.append(saved_bytes)
        return max(kept)

    def _update(self, loss: Tensor) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.driver.observe(loss)

    def _turn(self) -> None:
        for _ in range(self.steps):
            self._update(self.stepper.take(self.job.x, self.job.y))

    def time_turn(self) -> float:
        """Take one turn; note and return the seconds of a step."""
        seconds = time_call(self._turn, self.device) / self.steps
        self.seconds.append(seconds)
        return seconds


def small_steps(parameters: Any) -> torch.optim.Optimizer:
    """Return an optimizer at a rate so small that weights, and so a CPU's speed, stay ordinary."""
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
