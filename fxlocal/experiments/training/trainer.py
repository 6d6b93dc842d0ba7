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
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...plan import Plan
from ...runtime.driver import Driver
from ...schedules import Schedule
from ..data.catalogue import Data
from .checkpoint import build_fingerprint, load_checkpoint, save_checkpoint
from .epochs import MOST_SEEDS, describe_divergence, find_error_percent, training_batches
from .growth import Growth, find_footprint, scaled_rates
from .measure import EpochClock, analyze_on
from .settings import Machine, Settings, SettingsError, build_optimizer, build_scheduler
from .steps import Stepper

__all__ = ["DivergedError", "Run", "count_steps", "train_run"]


class DivergedError(RuntimeError):
    """The loss is no longer a number; ``run`` holds what came before."""

    def __init__(self, message: str, run: "Run"):
        super().__init__(message)
        self.run = run


@dataclass
class Run:
    """What one run showed.

    Lists have one entry per epoch; ``errors`` and ``error_epochs`` one per evaluation. ``seconds``
    counts training seconds from the start of the run, and ``images`` all that were learned from.
    ``reached`` is False of a baseline that is to have another run's error and has a higher one.
    """

    strategy: str
    seed: int
    error_percent: float | None = None
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    saved_bytes: list[int] = field(default_factory=list)
    boundary: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    error_epochs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    batch_size: list[int] = field(default_factory=list)
    predicted_bytes: list[int] = field(default_factory=list)
    images: int = 0
    reached: bool = True


def count_steps(data: Data, batch_size: int) -> int:
    """Return the number of steps in one epoch."""
    return len(data.train) // batch_size  # type: ignore[arg-type]  # ours have a length


def train_run(
    model: nn.Module,
    data: Data,
    schedule: Schedule,
    settings: Settings,
    machine: Machine,
    *,
    strategy: str = "",
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
) -> Run:
    """Train ``model`` on ``data`` by ``schedule``; equal arguments give equal numbers.

    Args:
        model: moved to the machine's device and trained in place.
        data: what it learns from and is judged by.
        schedule: which layers learn how, epoch by epoch.
        settings: how long and how fast.
        machine: where and how to compute.
        strategy: the schedule's name, for the record.
        seed: fixes the order of the batches and the model's random operations.
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
    trainer = _Trainer(model, data, schedule, settings, machine, Run(strategy, seed))
    if resume and checkpoint:
        trainer.load(checkpoint)
    for epoch in range(trainer.driver.epoch + 1, settings.epochs + 1):
        trainer.train_epoch(on_step or (lambda: None))
        if not math.isfinite(trainer.driver.losses[-1]):
            raise DivergedError(trainer.divergence(checkpoint), trainer.run)
        if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
            trainer.evaluate()
        if checkpoint:
            trainer.save(checkpoint)
        if on_epoch:
            on_epoch(trainer.run)
    return trainer.run


def _compile_option(machine: Machine, settings: Settings) -> Any:
    """Return what `Driver` calls ``compile``."""
    if machine.cudagraph:
        return "cudagraph"
    # Else the second batch size would compile a network for any, which is slower.
    return {"dynamic": False} if machine.compile and settings.grows else machine.compile


class _Trainer:
    """The state of one run between epochs."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        schedule: Schedule,
        settings: Settings,
        machine: Machine,
        run: Run,
    ):
        self.data, self.settings, self.machine, self.run = data, settings, machine, run
        self.device = torch.device(machine.device)
        torch.manual_seed(run.seed % MOST_SEEDS)
        self.model = machine.prepare(model)
        example = machine.place(torch.zeros(settings.batch_size, *data.shape))
        compile = _compile_option(machine, settings)
        self.driver = Driver(model, schedule, compile=compile, example_inputs=(example,))
        self.stepper = Stepper(self.driver, machine, data.task)
        self.optimizer = build_optimizer(self.driver.parameters(), settings)  # the heads' too
        self.driver.optimizer = self.optimizer
        self.scheduler = build_scheduler(self.optimizer, settings)
        self.growth = self._build_growth(example)
        self.compiled: set[tuple[Plan, int]] = set()
        self.fingerprint = build_fingerprint(data, schedule, settings, run.strategy, run.seed)

    def _build_growth(self, example: Tensor) -> Growth:
        settings, on_gpu = self.settings, self.device.type == "cuda"
        if on_gpu and settings.memory_budget is not None:
            self._refuse_large_budget(settings.memory_budget)
        with self.machine.autocast():  # what is kept has the dtypes of training
            analysis = analyze_on(self.driver.captured, example)
            twice = torch.cat([example, example]) if settings.grows else None
            doubled = None if twice is None else analyze_on(self.driver.captured, twice)
        budget = settings.memory_budget
        return Growth(
            find_footprint(
                *(analysis, doubled, settings.batch_size),
                gradients=on_gpu,
                modules=self.stepper.modules,
            ),
            settings.batch_size,
            len(self.data.train),  # type: ignore[arg-type]  # ours have a length
            grows=settings.grows,
            budget=None if budget is None else round(budget * 2**20),
            held=torch.cuda.memory_allocated(self.device) if on_gpu else 0,
        )

    def _refuse_large_budget(self, budget: float) -> None:
        total = torch.cuda.mem_get_info(self.device)[1] / 2**20
        if budget > total:
            raise SettingsError(
                f"memory_budget={budget:g}: {self.machine.name} has {total:.0f} MiB in all"
            )

    def train_epoch(self, on_step: Callable[[], None]) -> None:
        """Run one epoch's steps and add what they cost to the record."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.model.train()
        plans, boundaries = self._plans()
        batch_size = self.growth.start_epoch(min(boundaries))
        steps = range(count_steps(self.data, batch_size))
        most = min(steps, key=lambda i: (boundaries[i], len(plans[i].weight_grads)), default=0)
        boundary = boundaries[most]
        predicted = self.growth.predict(boundary, batch_size)
        timer = EpochClock(self.device)
        with timer.compiling():
            self.driver.start_epoch()
        with scaled_rates(self.optimizer, self.growth.rate_factor(self.settings.grow_lr)):
            saved_bytes = self._run_steps(plans, most, predicted, timer, on_step)
        seconds, compile_seconds = timer.stop(len(steps))
        held = 0
        if self.device.type == "cuda":
            saved_bytes = torch.cuda.max_memory_allocated(self.device)
            held = torch.cuda.memory_allocated(self.device)
        self.growth.end_epoch(boundary, saved_bytes, held)
        self.driver.end_epoch()
        self.scheduler.step()
        run = self.run
        run.train_seconds += seconds
        run.seconds.append(run.train_seconds)
        run.compile_seconds += compile_seconds
        run.saved_bytes.append(saved_bytes)
        run.boundary.append(self.driver.history[-1])
        run.loss.append(self.driver.losses[-1])
        run.batch_size.append(batch_size)
        run.predicted_bytes.append(predicted)
        run.images += batch_size * len(steps)

    def _plans(self) -> tuple[list[Plan], list[int]]:
        """Return the Plan and the boundary of each step that the epoch may have."""
        driver, steps = self.driver, count_steps(self.data, self.settings.batch_size)
        plans = [
            driver.schedule.plan(driver.analysis, driver.epoch, step).with_rate(0.0)
            for step in range(max(steps, 1))
        ]
        return plans, [driver.analysis.boundary(p.local.until) if p.local else 0 for p in plans]

    def _run_steps(
        self,
        plans: list[Plan],
        widest: int,
        predicted: int,
        timer: EpochClock,
        on_step: Callable[[], None],
    ) -> int:
        """Take the epoch's steps; return the bytes of step ``widest``, but for a GPU's."""
        saved_bytes = 0
        drawn = training_batches(
            *(self.data, self.growth.batch_size, self.device),
            seed=self.run.seed,
            epoch=self.driver.epoch,
        )
        for step, (x, y) in enumerate(drawn):
            x = self.machine.place(x)
            network = plans[step], len(x)
            prepares = self.machine.compile or self.machine.cudagraph
            compiles = prepares and network not in self.compiled
            with timer.compiling(steps=1) if compiles else nullcontext():
                if step == widest:
                    loss, saved_bytes = self._measured_step(x, y, predicted)
                    self.growth.refuse_small_budget(saved_bytes)
                else:
                    loss = self.stepper.take(x, y)
                self._update(loss)
            if compiles:
                self.compiled.add(network)
            if step == widest and self.device.type == "cuda":  # whose backward takes the most
                self.growth.refuse_small_budget(torch.cuda.max_memory_allocated(self.device))
            on_step()
        return saved_bytes

    def _measured_step(self, x: Tensor, y: Tensor, predicted: int) -> tuple[Tensor, int]:
        """Return a step's loss and the bytes that it keeps; 0 on a GPU, which tells in the end."""
        if self.device.type == "cuda":
            return self.stepper.take(x, y), 0
        if self.machine.compile:
            return self.stepper.take(x, y), predicted
        return self.stepper.measure(x, y)

    def _update(self, loss: Tensor) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.driver.observe(loss)

    def evaluate(self) -> None:
        """Note the test error of the source model."""
        size = self.settings.batch_size
        self.run.error_percent = find_error_percent(self.model, self.data, size, self.machine)
        self.run.errors.append(self.run.error_percent)
        self.run.error_epochs.append(self.driver.epoch)

    def save(self, path: Path) -> None:
        """Write everything that the next epoch depends on."""
        state = {
            "driver": self.driver.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "growth": self.growth.state_dict(),
            "run": asdict(self.run),
        }
        save_checkpoint(path, self.fingerprint, state)

    def load(self, path: Path) -> None:
        """Take up the run that `save` wrote."""
        state = load_checkpoint(path, self.fingerprint)
        self.driver.load_state_dict(state["driver"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.growth.load_state_dict(state["growth"])
        self.run = Run(**state["run"])

    def divergence(self, checkpoint: Path | None) -> str:
        """Say where the loss went out of bounds, and what is left."""
        told = (self.run.strategy, self.run.seed, self.driver.losses[-1], self.driver.epoch)
        return describe_divergence(*told, checkpoint)
