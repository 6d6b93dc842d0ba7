"""One run: train one model by one schedule, and note what it cost.

How the numbers of a `Run` are taken:

- training seconds: the clock over each epoch's steps, their batches included; without evaluation,
  checkpoints, making the data set, and compiling.
- compile seconds: emitting the networks; with ``compile``, also the whole first step after each
  move of the boundary, which runs the compiler.
- saved bytes, per epoch: on a GPU the peak of allocated memory; on a CPU the bytes that autograd
  saves for backward in the epoch's first step, counted as it happens. Counting would disturb a
  compiled network, so with ``compile`` on a CPU it is what the analysis predicts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..driver import Driver
from ..schedules import Schedule
from .checkpoint import load_checkpoint, save_checkpoint
from .data import Data, batches
from .measure import analyze_on, clock, count_saved_bytes
from .objective import count_wrong, loss_of
from .settings import Machine, Settings, build_optimizer, build_scheduler

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
    counts training seconds from the start of the run.
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
        torch.manual_seed(run.seed)
        self.model = machine.prepare(model)
        self.optimizer = build_optimizer(model, settings)
        self.scheduler = build_scheduler(self.optimizer, settings)
        example = machine.place(torch.zeros(settings.batch_size, *data.shape))
        self.driver = Driver(
            model,
            schedule,
            optimizer=self.optimizer,
            compile=machine.compile,
            example_inputs=(example,),
        )
        self.analysis = analyze_on(self.driver.captured, example)
        self.compiled_for: int | None = None
        self.fingerprint = {
            "data": f"{data.name} {data.shape}, {data.num_classes} classes",
            "strategy": run.strategy,
            "schedule": repr(schedule),
            "seed": run.seed,
            **asdict(settings),
        }

    def train_epoch(self, on_step: Callable[[], None]) -> None:
        """Run one epoch's steps and add what they cost to the record."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.model.train()
        start = clock(self.device)
        self.driver.start_epoch()
        compile_seconds, saved_bytes = clock(self.device) - start, 0
        for step, (x, y) in enumerate(self._training_batches()):
            if step == 0:
                first_seconds, saved_bytes = self._first_step(x, y)
                compile_seconds += first_seconds
            else:
                self._update(self._loss(x, y))
            on_step()
        seconds = clock(self.device) - start - compile_seconds
        if self.device.type == "cuda":
            saved_bytes = torch.cuda.max_memory_allocated(self.device)
        self.driver.end_epoch()
        self.scheduler.step()
        run = self.run
        run.train_seconds += seconds
        run.seconds.append(run.train_seconds)
        run.compile_seconds += compile_seconds
        run.saved_bytes.append(saved_bytes)
        run.boundary.append(self.driver.history[-1])
        run.loss.append(self.driver.losses[-1])

    def _training_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Seeded by the epoch too, so that a resumed run draws what an unbroken one draws.
        seed = self.run.seed * 1_000_003 + self.driver.epoch
        for x, y in batches(
            self.data.train,
            self.settings.batch_size,
            generator=torch.Generator().manual_seed(seed),
            augment=self.data.augment,
            device=self.device,
            drop_last=True,  # one shape: one compilation, and no batch norm over a single image
        ):
            yield self.machine.place(x), y

    def _first_step(self, x: Tensor, y: Tensor) -> tuple[float, int]:
        """Take an epoch's first step; return its compile seconds and the bytes it saved."""
        if not self.machine.compile:
            with count_saved_bytes(self.model) as saved_bytes:
                loss = self._loss(x, y)
            self._update(loss)
            return 0.0, saved_bytes()
        start = clock(self.device)
        self._update(self._loss(x, y))
        boundary = self.driver.boundary
        seconds = 0.0 if boundary == self.compiled_for else clock(self.device) - start
        self.compiled_for = boundary
        return seconds, self.analysis.saved_bytes(boundary) or 0

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        with self.machine.autocast():
            return loss_of(self.driver.network()(x), y)

    def _update(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.driver.observe(loss)

    def evaluate(self) -> None:
        """Note the test error of the source model."""
        self.model.eval()
        wrong, total = torch.zeros((), dtype=torch.int64, device=self.device), 0
        with torch.no_grad(), self.machine.autocast():
            for x, y in batches(self.data.test, self.settings.batch_size, device=self.device):
                num_wrong, count = count_wrong(self.model(self.machine.place(x)), y)
                wrong, total = wrong + num_wrong, total + count
        self.run.error_percent = 100.0 * wrong.item() / total
        self.run.errors.append(self.run.error_percent)
        self.run.error_epochs.append(self.driver.epoch)

    def save(self, path: Path) -> None:
        """Write everything that the next epoch depends on."""
        state = {
            "driver": self.driver.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "run": asdict(self.run),
        }
        save_checkpoint(path, self.fingerprint, state)

    def load(self, path: Path) -> None:
        """Take up the run that `save` wrote."""
        state = load_checkpoint(path, self.fingerprint)
        self.driver.load_state_dict(state["driver"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.run = Run(**state["run"])

    def divergence(self, checkpoint: Path | None) -> str:
        """Say where the loss went out of bounds, and what is left."""
        kept = checkpoint and checkpoint.exists()
        return (
            f"the loss is {self.driver.losses[-1]} in epoch {self.driver.epoch} of "
            f"{self.run.strategy or 'the run'}, seed {self.run.seed}; try a smaller learning rate"
            + (f". The last good checkpoint is {checkpoint}" if kept else "")
        )
