"""One run: train one model by one schedule, and note what it cost.

How the numbers of a `Run` are taken:

- training seconds: the clock over each epoch's steps, their batches included; without evaluation,
  checkpoints, making the data set, and compiling.
- compile seconds: emitting the networks; with ``compile`` or ``cudagraph``, also the first step of
  each network at each batch size, which compiles or captures, less what the epoch's other steps
  took on average.
- saved bytes, per epoch: on a GPU the peak of allocated memory; on a CPU the most bytes that
  autograd holds for backward at a time, counted as it happens, in the first of those steps that
  back-propagate furthest and approximate the fewest weight gradients. Counting would disturb a
  compiled network, so with ``compile`` on a CPU it is what the analysis predicts.
- predicted bytes, per epoch: the same, as predicted before the epoch from the cost analysis and,
  from the second epoch on, the measurement before (see `fxlocal.experiments.training.growth`).

With several processes, `fxlocal.experiments.training.ranks` says what differs.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...compiler.resolve import boundary_of
from ...plan import Plan
from ...runtime.driver import Driver
from .checkpoint import build_fingerprint, load_checkpoint, save_checkpoint
from .growth import build_growth, scaled_rates
from .measure import EpochClock
from .objective import MOST_SEEDS, Stepper, find_error_percent, training_batches
from .results import Run
from .settings import Experiment, build_optimizer, build_scheduler, count_steps

__all__ = ["Cost", "DivergedError", "Part", "Trainer", "train_run"]


class DivergedError(RuntimeError):
    """The loss is no longer a number; ``run`` holds what came before."""

    def __init__(self, message: str, run: Run):
        super().__init__(message, run)  # both, to be sent from process to process
        self.run = run

    def __str__(self) -> str:
        return str(self.args[0])


def train_run(
    experiment: Experiment,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
) -> Run:
    """Train the experiment's model, as its ``build`` returns it, in place.

    Args:
        experiment: what to train how.
        checkpoint: file to write at the end of each epoch.
        resume: go on from ``checkpoint``, exactly as if there had been no break.
        on_step: called after each step.
        on_epoch: called after each epoch with the run so far.

    Raises:
        CheckpointError: if ``checkpoint`` is of another run; nothing is changed then.
        DataError: if one batch needs more images than there are.
        DivergedError: at the end of an epoch whose loss is not finite. The checkpoint is the
            previous epoch's.
        SettingsError: if the memory budget is below what the first batch takes: before any weight
            has moved, but on a GPU after the first step. At once if a GPU has no such memory.
    """
    trainer = Trainer(experiment, _Whole, on_step or (lambda: None))
    return trainer.train(checkpoint, resume, on_epoch or (lambda run: None))


@dataclass(frozen=True)
class Cost:
    """What the steps of one epoch came to."""

    loss: float
    saved_bytes: int
    seconds: float
    batch_size: int
    num_steps: int
    compile_seconds: float = 0.0
    boundary: int = 0
    predicted_bytes: int | None = None


class Part(Protocol):
    """What a process trains: the whole network, or its rank's share.

    Attributes:
        is_first: whether this process judges the model and keeps the record.
    """

    is_first: bool

    @property
    def epoch(self) -> int:
        """How many epochs it has trained."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return all that the optimizer is to move."""

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """Train with an optimizer of `parameters`."""

    def train_epoch(self) -> Cost:
        """Take an epoch's steps; the costs of all ranks, together, on the first one."""

    def collect(self, checkpoint: bool) -> None:
        """Bring here, on the first rank, what `judged` and `state_dict` are made of."""

    def judged(self) -> nn.Module:
        """Return the whole model, on the first rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next epoch depends on, on the first rank."""

    def load_state_dict(self, state: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Take up what `state_dict` returned, given on the first rank; return it on all."""

    def from_first(self, value: Any) -> Any:
        """Return the first rank's value, once it is there."""


class Trainer:
    """Takes a run, or a rank's share of one, from epoch to epoch.

    Args:
        experiment: what to train how.
        part: makes what this process trains, of the experiment, the model and ``on_step``.
        on_step: called after each step.
        extra: what else tells this run from another.
    """

    def __init__(
        self,
        experiment: Experiment,
        part: Callable[[Experiment, nn.Module, Callable[[], None]], Part],
        on_step: Callable[[], None],
        **extra: Any,
    ) -> None:
        self.experiment = experiment
        self.run = Run(experiment.strategy, experiment.seed)
        model = experiment.machine.prepare(experiment.build(experiment.seed))
        torch.manual_seed(experiment.seed % MOST_SEEDS)
        self.part = part(experiment, model, on_step)
        optimizer = build_optimizer(self.part.parameters(), experiment.settings)
        self.part.use(optimizer)
        self.scheduler = build_scheduler(optimizer, experiment.settings)
        self.fingerprint = build_fingerprint(experiment) | extra

    def train(self, checkpoint: Path | None, resume: bool, on_epoch: Callable[[Run], None]) -> Run:
        """Train to the end, as `train_run` says."""
        part, settings = self.part, self.experiment.settings
        if resume and checkpoint:
            self._load(checkpoint)
        while part.epoch < settings.epochs:
            cost = part.train_epoch()
            self.scheduler.step()
            self._note(cost)
            part.collect(checkpoint is not None)
            diverged = part.is_first and not math.isfinite(cost.loss)
            if part.is_first and not diverged:
                self._end_epoch(checkpoint)
                on_epoch(self.run)
            if part.from_first(diverged):
                raise DivergedError(self._divergence(checkpoint), self.run)
        return self.run

    def _note(self, cost: Cost) -> None:
        run = self.run
        run.train_seconds += cost.seconds
        run.compile_seconds += cost.compile_seconds
        run.seconds.append(run.train_seconds)
        run.saved_bytes.append(cost.saved_bytes)
        run.boundary.append(cost.boundary)
        run.loss.append(cost.loss)
        run.batch_size.append(cost.batch_size)
        run.images += cost.batch_size * cost.num_steps
        if cost.predicted_bytes is not None:
            run.predicted_bytes.append(cost.predicted_bytes)

    def _end_epoch(self, checkpoint: Path | None) -> None:
        """Judge the model and write everything that the next epoch depends on."""
        experiment, run, epoch = self.experiment, self.run, self.part.epoch
        settings = experiment.settings
        if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
            run.error_percent = find_error_percent(self.part.judged(), experiment)
            run.errors.append(run.error_percent)
            run.error_epochs.append(epoch)
        if checkpoint:
            own = {"scheduler": self.scheduler.state_dict(), "run": asdict(run)}
            save_checkpoint(checkpoint, self.fingerprint, self.part.state_dict() | own)

    def _load(self, checkpoint: Path) -> None:
        """Take up the run that `_end_epoch` wrote."""
        first = load_checkpoint(checkpoint, self.fingerprint) if self.part.is_first else None
        state = self.part.load_state_dict(first)
        self.scheduler.load_state_dict(state["scheduler"])
        self.run = Run(**state["run"])

    def _divergence(self, checkpoint: Path | None) -> str:
        """Say where the loss went out of bounds, and what is left."""
        run, kept = self.run, checkpoint and checkpoint.exists()
        return (
            f"the loss is {run.loss[-1]} in epoch {self.part.epoch} of "
            f"{run.strategy or 'the run'}, seed {run.seed}; try a smaller learning rate"
            + (f". The last good checkpoint is {checkpoint}" if kept else "")
        )


class _Whole:
    """The whole network in one process, by any schedule."""

    is_first = True

    def __init__(
        self, experiment: Experiment, model: nn.Module, on_step: Callable[[], None]
    ) -> None:
        self.experiment, self.model, self.on_step = experiment, model, on_step
        machine, settings, example = experiment.machine, experiment.settings, experiment.example
        self.device = torch.device(machine.device)
        compile: Any = machine.compile
        if machine.cudagraph:
            compile = "cudagraph"
        elif machine.compile and settings.grows:
            # Else the second batch size would compile a network for any, which is slower.
            compile = {"dynamic": False}
        self.driver = Driver(model, experiment.schedule, compile=compile, example_inputs=(example,))
        self.stepper = Stepper(self.driver, machine, experiment.data.task)
        self.growth = build_growth(self.driver.captured, experiment, self.stepper.stages)
        self.compiled: set[tuple[Plan, int]] = set()

    @property
    def epoch(self) -> int:
        return self.driver.epoch

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """Train with it; the driver keeps its state."""
        self.optimizer = self.driver.optimizer = optimizer

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.driver.parameters()

    def train_epoch(self) -> Cost:
        driver, growth = self.driver, self.growth
        self.model.train()
        plans, boundaries = self._plans()
        steps = range(count_steps(self.experiment.data, growth.start_epoch(min(boundaries))))
        most = min(steps, key=lambda i: (boundaries[i], len(plans[i].weight_grads)), default=0)
        predicted = growth.predict(boundaries[most], growth.batch_size)
        timer = EpochClock(self.device)
        with timer.compiling():
            driver.start_epoch()
        with scaled_rates(self.optimizer, growth.rate_factor(self.experiment.settings.grow_lr)):
            saved_bytes = self._run_steps(plans, most, predicted, timer)
        seconds, compile_seconds = timer.stop(len(steps))
        saved_bytes = timer.peak_bytes() or saved_bytes
        held = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        growth.end_epoch(boundaries[most], saved_bytes, held)
        driver.end_epoch()
        return Cost(
            *(driver.losses[-1], saved_bytes, seconds, growth.batch_size, len(steps)),
            *(compile_seconds, driver.history[-1], predicted),
        )

    def _plans(self) -> tuple[list[Plan], list[int]]:
        """Return the Plan and the boundary of each step that the epoch may have."""
        driver, analysis = self.driver, self.driver.analysis
        plans = [
            driver.schedule.plan(analysis, driver.epoch, step).with_rate(0.0)
            for step in range(max(self.experiment.num_steps, 1))
        ]
        return plans, [boundary_of(plan, analysis) for plan in plans]

    def _run_steps(self, plans: list[Plan], widest: int, predicted: int, timer: EpochClock) -> int:
        """Take the epoch's steps; return the bytes of step ``widest``, but for a GPU's."""
        saved_bytes, machine = 0, self.experiment.machine
        drawn = training_batches(self.experiment, self.growth.batch_size, self.driver.epoch)
        for step, (x, y) in enumerate(drawn):
            network = plans[step], len(x)
            compiles = (machine.compile or machine.cudagraph) and network not in self.compiled
            with timer.compiling(steps=1) if compiles else nullcontext():
                if step == widest:
                    loss, saved_bytes = self._measured_step(x, y, predicted)
                    self.growth.refuse_small_budget(saved_bytes)
                else:
                    loss = self.stepper.take(x, y)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.driver.observe(loss)
            if compiles:
                self.compiled.add(network)
            if step == widest:
                self.growth.refuse_small_budget(timer.peak_bytes())  # backward takes the most
            self.on_step()
        return saved_bytes

    def _measured_step(self, x: Tensor, y: Tensor, predicted: int) -> tuple[Tensor, int]:
        """Return a step's loss and the bytes that it keeps; 0 on a GPU, which tells in the end."""
        if self.device.type == "cuda":
            return self.stepper.take(x, y), 0
        if self.experiment.machine.compile:
            return self.stepper.take(x, y), predicted
        return self.stepper.measure(x, y)

    def collect(self, checkpoint: bool) -> None:
        """Do nothing: all is here."""

    def judged(self) -> nn.Module:
        return self.model

    def state_dict(self) -> dict[str, Any]:
        return {"driver": self.driver.state_dict(), "growth": self.growth.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> Mapping[str, Any]:
        assert state is not None
        self.driver.load_state_dict(state["driver"])
        self.growth.load_state_dict(state["growth"])
        return state

    def from_first(self, value: Any) -> Any:
        """Return the value: there is one process."""
        return value
