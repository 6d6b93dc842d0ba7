"""One rank's share of a run on several processes; see `fxlocal.experiments.training.parallel`."""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ...ir.random_state import random_state, restore_random_state
from ...parallel import ModelParallel
from ...parallel.ranks import Group
from ...parallel.sharing import gather
from ...plan import Plan
from ..data.catalogue import Data
from .checkpoint import load_checkpoint, save_checkpoint
from .epochs import MOST_SEEDS, describe_divergence, find_error_percent, training_batches
from .measure import EpochClock, count_saved_bytes
from .processes import EVALUATION, join_group, pack, times_restarted, unpack
from .settings import Machine, Settings, build_optimizer, build_scheduler
from .trainer import Run

__all__ = ["Job", "run_rank"]

# A rank that is killed is noticed at once; this ends one that hangs. A step may take long.
TIMEOUT = 600.0


@dataclass(frozen=True)
class Job:
    """What a rank is told."""

    model: nn.Module
    data: Data | None
    shape: tuple[int, int, int]
    num_steps: int
    plan: Plan
    settings: Settings
    machine: Machine
    run: Run
    checkpoint: Path | None
    resume: bool
    fingerprint: dict[str, Any]
    num_threads: int
    size: int
    begun: float


def run_rank(rank: int, payload: bytes, pipe: Any) -> tuple[Any, ...]:
    """Train one module; return what comes of it.

    Started again, it goes on from the checkpoint, if this run has written one.
    """
    job: Job = unpack(payload)
    torch.set_num_threads(job.num_threads)
    path = job.checkpoint
    if times_restarted() and path and path.exists() and path.stat().st_mtime >= job.begun:
        job = replace(job, resume=True)
    trainer = _Trainer(job, join_group(job.machine), pipe)
    with trainer.part:
        return trainer.train()


class _Trainer:
    """One rank's share of a run between epochs; rank 0 also keeps its record."""

    def __init__(self, job: Job, machine: Machine, pipe: Any) -> None:
        assert job.plan.modules is not None
        self.job, self.pipe, self.run, self.epoch = job, pipe, job.run, 0
        self.rank, count = distributed.get_rank(), job.plan.modules.count
        self.replica, self.num_replicas = self.rank // count, job.size // count
        self.last_ranks = range(count - 1, job.size, count)
        self.machine = machine
        torch.manual_seed(self.run.seed % MOST_SEEDS)
        model = self.machine.prepare(job.model)
        self.judged = copy.deepcopy(model) if self.rank == 0 else None
        size = job.settings.batch_size // self.num_replicas
        example = self.machine.place(torch.zeros(size, *job.shape))
        self.part = ModelParallel(model, job.plan, example, timeout=TIMEOUT)
        self.optimizer = build_optimizer(self.part.parameters(), job.settings)
        self.scheduler = build_scheduler(self.optimizer, job.settings)
        self.control: Group = distributed.new_group(backend="gloo", timeout=EVALUATION)

    def train(self) -> tuple[Any, ...]:
        """Train to the end; return what the starter is to be told."""
        job, settings = self.job, self.job.settings
        if job.resume:
            self._load()
        while self.epoch < settings.epochs:
            state = self._train_epoch()
            notes = gather(self._notes() if job.checkpoint else None, self.part.ranks, self.control)
            diverged = False
            if self.rank == 0:
                assert state is not None
                diverged = not math.isfinite(self.run.loss[-1])
                if not diverged:
                    self._end_epoch(state, notes)
            if self._from_first(diverged):
                return "diverged", self._divergence(), self.run
        whole = self.part.gather_state()
        return "done", self.run, pack(whole and self._of_model(whole))

    def _train_epoch(self) -> dict[str, Tensor] | None:
        """Take an epoch's steps and record what they cost; return the state on rank 0."""
        device, num_steps = torch.device(self.machine.device), self.job.num_steps
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timer = EpochClock(device)
        total, saved_bytes = torch.zeros((), device=device), 0
        for step, batch in enumerate(self._batches()):
            if step == 0 and device.type == "cpu":
                with count_saved_bytes(self.part.network, *batch) as count:
                    loss = self._step(batch)
                saved_bytes = count()
            else:
                loss = self._step(batch)
            total += loss
        self.part.synchronize()
        seconds, _ = timer.stop(num_steps)
        if device.type == "cuda":
            saved_bytes = torch.cuda.max_memory_allocated(device)
        self.scheduler.step()
        self.epoch += 1
        costs = gather(
            (float(total) / max(num_steps, 1), saved_bytes), self.part.ranks, self.control
        )
        if self.rank == 0:
            run, batch_size = self.run, self.job.settings.batch_size
            run.train_seconds += seconds
            run.seconds.append(run.train_seconds)
            run.loss.append(sum(costs[r][0] for r in self.last_ranks) / self.num_replicas)
            run.saved_bytes.append(max(bytes for _, bytes in costs))
            run.boundary.append(0)
            run.batch_size.append(batch_size)
            run.images += batch_size * num_steps
        return self.part.gather_state()

    def _step(self, batch: tuple[Tensor, ...]) -> Tensor | float:
        with self.machine.autocast():
            loss = self.part.step(*batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.rank == 0:
            self.pipe.send(("step",))
        return 0.0 if loss is None else loss

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield this replica's share of each batch in module 0, and nothing so often elsewhere."""
        data = self.job.data
        if data is None:
            yield from [()] * self.job.num_steps
            return
        size, device = self.job.settings.batch_size, self.machine.device
        for x, y in training_batches(data, size, device, seed=self.run.seed, epoch=self.epoch):
            mine = slice(self.replica, None, self.num_replicas)
            yield self.machine.place(x[mine]), y[mine]

    def _end_epoch(self, state: dict[str, Tensor], notes: list[Any]) -> None:
        """Judge the model and write the checkpoint, which is rank 0's task."""
        job, run = self.job, self.run
        if self.epoch % job.settings.evaluate_every == 0 or self.epoch == job.settings.epochs:
            run.error_percent = self._error_percent(state)
            run.errors.append(run.error_percent)
            run.error_epochs.append(self.epoch)
        if job.checkpoint:
            content = {"model": state, "ranks": notes, "epoch": self.epoch, "run": asdict(run)}
            save_checkpoint(job.checkpoint, job.fingerprint, content)
        self.pipe.send(("epoch", run))

    def _error_percent(self, state: dict[str, Tensor]) -> float:
        assert self.judged is not None and self.job.data is not None
        self.judged.load_state_dict(self._of_model(state))
        size = self.job.settings.batch_size
        return find_error_percent(self.judged, self.job.data, size, self.machine)

    def _of_model(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave the heads out of a network's state."""
        return {name: state[name] for name in self.part.network.source_model.state_dict()}

    def _notes(self) -> dict[str, Any]:
        """Return what this rank needs to go on exactly, but for the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(),
        }

    def _load(self) -> None:
        """Take up what `_end_epoch` wrote."""
        job, packed, state = self.job, b"", None
        if self.rank == 0:
            assert job.checkpoint is not None
            content = load_checkpoint(job.checkpoint, job.fingerprint)
            state = content.pop("model")
            packed = pack(content)
        self.part.load_state_dict(state)
        content = unpack(self._from_first(packed))
        mine = content["ranks"][self.rank]
        self.optimizer.load_state_dict(mine["optimizer"])
        self.scheduler.load_state_dict(mine["scheduler"])
        restore_random_state(mine["random"])
        self.epoch, self.run = content["epoch"], Run(**content["run"])

    def _from_first(self, value: Any) -> Any:
        """Return the value of rank 0."""
        values = [value]
        with self.part.ranks.talking_to(self.part.ranks.others):
            distributed.broadcast_object_list(values, 0, group=self.control)
        return values[0]

    def _divergence(self) -> str:
        last = self.run.loss[-1] if self.run.loss else math.nan
        told = (self.run.strategy, self.run.seed, last, self.epoch)
        return describe_divergence(*told, self.job.checkpoint)
