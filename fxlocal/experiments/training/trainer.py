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
- predicted bytes, per epoch: the same, as `fxlocal.experiments.training.growth` predicted them.

With several processes, `fxlocal.experiments.training.ranks` says what differs.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ...compiler.analysis import Analysis
from ...errors import CheckpointError
from ...ir.random_state import seed_all
from ...plan import Rule
from ..stopping import StoppedError, is_asked, while_steps_run
from ..tracking import Reading, RunStart, Step, Tracker
from .checkpoint import build_fingerprint, load_checkpoint, save_checkpoint, save_file
from .measure import Cost, EpochClock
from .objective import find_error_percent
from .parts.whole import OnStep, Whole
from .results import DivergedError, Run
from .settings import Experiment, build_optimizer, build_scheduler, count_steps

__all__ = ["Cost", "DivergedError", "Part", "Trainer", "train_run"]

_READING = 1.0  # seconds between two looks at the loss, for which the device is waited


def train_run(
    experiment: Experiment,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    on_step: Callable[[Reading], object] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
    tracker: Tracker | None = None,
) -> Run:
    """Train the experiment's model, as its ``build`` returns it, in place.

    Args:
        experiment: what to train how.
        checkpoint: file to write at the end of each epoch's steps, before the model is judged, and
            when a signal stops the run; see `fxlocal.experiments.stopping`.
        save_every: write it every so many steps of an epoch, too.
        resume: go on from ``checkpoint``, exactly as if there had been no break.
        on_step: called after each step with how far the run is.
        on_epoch: called after each epoch with the run so far.
        tracker: told of each step and epoch.

    Raises:
        CheckpointError: if ``checkpoint`` is of another run; nothing is changed then.
        DataError: if one batch needs more images than there are.
        DivergedError: at the end of an epoch whose loss is not finite. The checkpoint is the
            previous epoch's.
        StoppedError: if a signal stopped it, and the caller let it.
        SettingsError: if the memory budget is below what the first batch takes: before any weight
            has moved, but on a GPU after the first step. At once if a GPU has no such memory.
    """
    trainer = Trainer(experiment, Whole, on_step or (lambda reading: None), tracker)
    return trainer.train(checkpoint, resume, on_epoch or (lambda run: None), save_every)


class Part(Protocol):
    """What a process trains: the whole network, or its rank's share.

    Attributes:
        is_first: whether this process judges the model and keeps the record.
        keeps_steps: whether its state can be kept between the steps of an epoch.
        clock: measures the epoch.
    """

    is_first: bool
    keeps_steps: bool
    clock: EpochClock

    @property
    def epoch(self) -> int:
        """How many epochs it has trained."""

    @property
    def step(self) -> int:
        """How many steps it has taken of the next one; always 0 if it cannot be kept there."""

    def analyze(self) -> Analysis:
        """Return the facts of the whole model, with its costs, on the first rank."""

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

    def heartbeat(self) -> None:
        """Let ranks that wait in `from_first` know that this one goes on."""

    def from_first(self, value: Any) -> Any:
        """Return the first rank's value, once it is there."""


class Trainer:
    """Takes a run, or a rank's share of one, from epoch to epoch.

    Args:
        experiment: what to train how.
        part: makes what this process trains, of the experiment, the model and whom to tell of steps
        on_step: called after each step with how far the run is.
        tracker: told of each step and epoch.
        extra: what else tells this run from another.
    """

    def __init__(
        self,
        experiment: Experiment,
        part: Callable[[Experiment, nn.Module, OnStep], Part],
        on_step: Callable[[Reading], object],
        tracker: Tracker | None = None,
        **extra: Any,
    ) -> None:
        self.experiment = experiment
        self.run = Run(experiment.strategy, experiment.seed)
        model = experiment.machine.prepare(experiment.build(experiment.seed))
        seed_all(experiment.seed)
        self.on_step, self.tracker = on_step, tracker or Tracker()
        self._next_reading = 0.0  # of a loss, in seconds
        self.best: Path | None = None  # where the weights of least error go
        self.checkpoint: Path | None = None
        self.save_every: int | None = None
        self._kept = "before its first checkpoint"
        self.part = part(experiment, model, self._take)
        optimizer = build_optimizer(model, self.part.parameters(), experiment.settings)
        self.part.use(optimizer)
        self.scheduler = build_scheduler(optimizer, experiment.settings)
        self.fingerprint = build_fingerprint(experiment) | extra

    def train(
        self,
        checkpoint: Path | None,
        resume: bool,
        on_epoch: Callable[[Run], None],
        save_every: int | None = None,
    ) -> Run:
        """Train to the end, as `train_run` says."""
        self.checkpoint, self.save_every = checkpoint, save_every
        part, settings = self.part, self.experiment.settings
        if checkpoint and settings.keep_best:
            self.best = checkpoint.with_name("best.pt")
        numbers = self._load(checkpoint) if resume and checkpoint else {}
        self._start_tracking()
        if numbers:  # the checkpoint is from before the model was judged
            part.collect(checkpoint=False)
            if part.is_first:
                self._evaluate()
                self._track(numbers, None)
        try:
            while part.epoch < settings.epochs and not self._is_stalled():
                self._train_epoch(on_epoch)
        except StoppedError as stop:
            raise StoppedError(stop.number, stop.where or self._kept) from None
        except Exception as error:  # such as of workers that Ctrl-C has ended too
            if number := is_asked():
                raise StoppedError(number, self._kept) from error
            raise
        return self.run

    def _train_epoch(self, on_epoch: Callable[[Run], None]) -> None:
        part, checkpoint = self.part, self.checkpoint
        self.tracker.start_epoch()
        with while_steps_run() if checkpoint and part.keeps_steps else nullcontext():
            cost = part.train_epoch()
            self.scheduler.step()
            self._note(cost)
            part.collect(checkpoint is not None)
            diverged = part.is_first and not math.isfinite(cost.loss)
            self.tracker.flush()
            if checkpoint and part.is_first and not diverged:
                self._save(checkpoint, cost.numbers)
        if number := is_asked():
            raise StoppedError(number)
        if part.is_first and not diverged:
            self._evaluate()
        self._track(cost.numbers, cost.rule)
        if part.is_first and not diverged:
            on_epoch(self.run)
        if part.from_first(diverged):
            raise DivergedError(self._divergence(checkpoint), self.run)

    def _note(self, cost: Cost) -> None:
        run = self.run
        run.train_seconds += cost.seconds
        run.compile_seconds += cost.compile_seconds
        run.seconds.append(run.train_seconds)
        run.saved_bytes.append(cost.saved_bytes)
        run.boundary.append(cost.boundary)
        run.loss.append(cost.loss)
        run.batch_size.append(cost.batch_size)
        run.flops.append(cost.flops)
        run.work.append(cost.work)
        run.images += cost.batch_size * cost.num_steps
        if cost.predicted_bytes is not None:
            run.predicted_bytes.append(cost.predicted_bytes)
        if cost.wire_bytes is not None:
            run.wire_bytes.append(cost.wire_bytes)

    def _take(self, step: Step) -> None:
        self.tracker.step(step)
        self.on_step(self._read(step))
        if not self.checkpoint or not (taken := self.part.step):
            return
        number = is_asked()
        if number or (self.save_every and taken % self.save_every == 0):
            start = time.perf_counter()
            self.tracker.flush()
            self._save(self.checkpoint, {})
            self.part.clock.leave_out(time.perf_counter() - start)
        if number:
            raise StoppedError(number, f"in epoch {self.part.epoch + 1}, step {taken}")

    def _read(self, step: Step) -> Reading:
        """Return how far the run is, once in a second with the loss."""
        now, loss = time.monotonic(), None
        if step.loss is not None and now >= self._next_reading:
            loss, self._next_reading = float(step.loss.detach()), now + _READING
        num_epochs, taken = self.experiment.settings.epochs, step.index + 1
        return Reading(step.epoch, num_epochs, taken, step.num_steps, step.batch_size, loss)

    def _start_tracking(self) -> None:
        job, run = self.experiment, self.run
        names = {"strategy": run.strategy, "seed": run.seed, "epochs": job.settings.epochs}
        num_steps = sum(count_steps(job.data, batch_size) for batch_size in run.batch_size)
        num_steps += self.part.step
        where = self.part.epoch, num_steps, torch.device(job.machine.device)
        self.tracker.start_run(RunStart(names, *where, self.part.analyze))

    def _track(self, numbers: Mapping[str, Any], rule: Rule | None) -> None:
        """Write an epoch's line; its steps' are written before the checkpoint."""
        run, epoch = self.run, self.part.epoch
        error = run.error_percent if run.error_epochs[-1:] == [epoch] else None
        self.tracker.end_epoch(epoch - 1, {**numbers, "error_percent": error}, rule)

    def _evaluate(self) -> None:
        experiment, run, epoch = self.experiment, self.run, self.part.epoch
        settings = experiment.settings
        if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
            run.error_percent = find_error_percent(
                self.part.judged(), experiment, self.part.heartbeat
            )
            run.errors.append(run.error_percent)
            run.error_epochs.append(epoch)
            if self.best and run.error_percent < min(run.errors[:-1], default=math.inf):
                save_file(self.best, self.part.judged().state_dict())

    def _is_stalled(self) -> bool:
        """Tell whether so many evaluations brought no better error that the run is to end."""
        patience, errors = self.experiment.settings.patience, self.run.errors
        if patience is None:
            return False
        since = len(errors) - errors.index(min(errors)) - 1 if errors else 0
        return bool(self.part.from_first(since >= patience))

    def _save(self, checkpoint: Path, numbers: Mapping[str, Any]) -> None:
        """Write everything that the next step depends on, and an epoch's numbers at its end."""
        own = {"scheduler": self.scheduler.state_dict(), "run": asdict(self.run)}
        state = self.part.state_dict() | own | {"numbers": dict(numbers)}
        save_checkpoint(checkpoint, self.fingerprint, state)
        self._kept = f"after epoch {self.part.epoch}"

    def _load(self, checkpoint: Path) -> Mapping[str, Any]:
        """Take up the run that `_save` wrote; return the numbers of the epoch that has ended."""
        first = load_checkpoint(checkpoint, self.fingerprint) if self.part.is_first else None
        if first is not None and (missing := {"scheduler", "run", "numbers"} - first.keys()):
            raise CheckpointError(f"{checkpoint} has no {', '.join(sorted(missing))}")
        try:
            Run(**(first or {"run": {"strategy": "", "seed": 0}})["run"])
        except TypeError as error:
            raise CheckpointError(f"{checkpoint} holds another kind of run: {error}") from error
        state = self.part.load_state_dict(first)
        self.scheduler.load_state_dict(state["scheduler"])
        self.run = Run(**state["run"])
        self._kept = f"after epoch {self.part.epoch}"
        numbers: Mapping[str, Any] = state["numbers"]
        return numbers

    def _divergence(self, checkpoint: Path | None) -> str:
        """Say where the loss went out of bounds, and what is left."""
        run, kept = self.run, checkpoint and checkpoint.exists()
        return (
            f"the loss is {run.loss[-1]} in epoch {self.part.epoch} of "
            f"{run.strategy or 'the run'}, seed {run.seed}; try a smaller learning rate"
            + (f". The last good checkpoint is {checkpoint}" if kept else "")
        )
