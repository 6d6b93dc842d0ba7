"""One run on several processes, each of which trains one local module: ``fxlocal train --nproc``.

Rank 0 reads the data (with replicas, each one's first rank does), judges the whole model and writes
the checkpoints. A run without replicas takes the steps of a run in one process, but for random
numbers in the model, which each rank draws for itself. How the numbers of its `Run` are taken:

- training seconds: the clock of rank 0 over each epoch's steps, until all ranks have taken theirs.
- loss: of the last module.
- saved bytes: those of the rank that saves most; on a GPU, the highest peak of a rank's.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ...compiler.analysis import Analysis
from ...ir.random_state import random_state, restore_random_state
from ...parallel import ModelParallel
from ...parallel.ranks import Group
from ...parallel.sharing import gather
from ...plan import Plan
from ...schedules import Constant
from ..data.images import choose
from ..tracking import Step, Tracker
from .measure import Cost, EpochClock, analyze_on, count_saved_bytes
from .objective import training_batches
from .processes import EVALUATION, join_group, launch, pack, times_restarted, unpack
from .results import DivergedError, Run
from .settings import Experiment, SettingsError
from .trainer import OnStep, Trainer

__all__ = ["train_parallel"]

# A rank that is killed is noticed at once; this ends one that hangs. A step may take long.
TIMEOUT = 600.0


@dataclass(frozen=True)
class _Job:
    """What a rank is told; its experiment has the images that it is to read."""

    experiment: Experiment
    num_steps: int
    checkpoint: Path | None
    resume: bool
    num_threads: int
    size: int
    begun: float
    tracker: Tracker | None


def train_parallel(
    experiment: Experiment,
    nproc: int,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    max_restarts: int = 0,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
    tracker: Tracker | None = None,
) -> Run:
    """Do as `train_run` does, on ``nproc`` processes that share the threads or GPUs of this one.

    Args:
        experiment: what to train how, with the same local modules throughout. With a device of
            cuda, rank r takes GPU r; the tensors between ranks go by nccl if there are as many GPUs
            as ranks, else by way of the CPU.
        nproc: number of processes: of local modules, or a multiple. Then each batch is shared out
            to as many replicas.
        checkpoint: as of `train_run`.
        resume: likewise, but replay buffers begin empty.
        max_restarts: how often to start all processes again when one fails, from the checkpoint.
        on_step: called after each step of rank 0.
        on_epoch: called after each epoch with the run so far.
        tracker: told of each step and epoch, in the process of rank 0; of no loss of a step if
            another rank has it.

    Raises:
        CheckpointError, DataError, DivergedError: as `train_run` does.
        ParallelError: if a rank fails once too often; the checkpoint is the previous epoch's.
        PlanError: if the local modules do not fit the model.
        SettingsError: if such a run cannot be shared out.
    """
    count = _check(experiment, nproc)
    model, data = experiment.build(experiment.seed), experiment.data
    job = _Job(
        replace(experiment, build=partial(_given, model)),
        experiment.num_steps,
        checkpoint,
        resume,
        num_threads=max(1, torch.get_num_threads() // nproc),
        size=nproc,
        begun=time.time(),
        tracker=tracker,
    )
    none = torch.arange(0)
    unread = replace(data, train=choose(data.train, none), test=choose(data.test, none))
    # As bytes: torch would send tensors through shared memory, of which there may be little.
    whole = pack(job)
    rest = pack(replace(job, experiment=replace(job.experiment, data=unread)))
    events: dict[str, Callable[..., object]] = {
        "step": on_step or (lambda: None),
        "epoch": on_epoch or (lambda run: None),
    }
    told = [rest if rank % count else whole for rank in range(nproc)]
    kind, value, *state = launch(_run_rank, told, count, events, max_restarts=max_restarts)[0]
    if kind == "diverged":
        raise DivergedError(*value)
    model.load_state_dict(unpack(*state))
    assert isinstance(value, Run)
    return value


def _given(model: nn.Module, seed: int) -> nn.Module:
    return model


def _check(experiment: Experiment, nproc: int) -> int:
    """Return the number of modules, if ``nproc`` processes can take them."""
    schedule, settings, machine = experiment.schedule, experiment.settings, experiment.machine
    plan = schedule.fixed if isinstance(schedule, Constant) else Plan()
    if plan.modules is None:
        raise SettingsError(
            f"nproc={nproc}: {experiment.strategy or 'the schedule'} cannot be shared out to "
            "processes; take greedy, dgl, infopro or backlink alone"
        )
    count = plan.modules.count
    if nproc < 2 or nproc % count:
        raise SettingsError(
            f"nproc={nproc}: {count} local modules need {max(count, 2)} processes or a multiple"
        )
    if settings.batch_size % (nproc // count):
        raise SettingsError(
            f"batch_size={settings.batch_size}: cannot be shared out to {nproc // count} replicas"
        )
    if settings.grows:
        raise SettingsError(f"nproc={nproc}: the batch cannot grow; leave out --grow-batch")
    if machine.compile or machine.cudagraph:
        raise SettingsError(f"nproc={nproc}: cannot be compiled; leave out --compile, --cudagraph")
    return count


def _run_rank(rank: int, payload: bytes, pipe: Any) -> tuple[Any, ...]:
    """Train one module; return what comes of it.

    Started again, it goes on from the checkpoint, if this run has written one.
    """
    job: _Job = unpack(payload)
    torch.set_num_threads(job.num_threads)
    path, resume = job.checkpoint, job.resume
    if times_restarted() and path and path.exists() and path.stat().st_mtime >= job.begun:
        resume = True
    experiment = replace(job.experiment, machine=join_group(job.experiment.machine))
    tell = (lambda: pipe.send(("step",))) if rank == 0 else (lambda: None)
    tracker = job.tracker if rank == 0 else None
    trainer = Trainer(experiment, partial(_Share, job), tell, tracker, nproc=job.size)
    part = trainer.part
    assert isinstance(part, _Share)
    with part.network:
        try:
            run = trainer.train(path, resume, lambda run: pipe.send(("epoch", run)))
        except DivergedError as error:
            return "diverged", error.args
        part.collect(checkpoint=False)
        return "done", run, pack(part.weights())


class _Share:
    """One local module of the network, on a rank of its own."""

    def __init__(
        self, job: _Job, experiment: Experiment, model: nn.Module, on_step: OnStep
    ) -> None:
        plan = experiment.schedule.fixed  # type: ignore[attr-defined]  # checked
        self.experiment, self.num_steps, self.on_step = experiment, job.num_steps, on_step
        self.rank, count = distributed.get_rank(), plan.modules.count
        self.is_first, self.epoch = self.rank == 0, 0
        self.replica, self.num_replicas = self.rank // count, job.size // count
        self.reads = self.rank % count == 0
        self.last_ranks = range(count - 1, job.size, count)
        self._judged = copy.deepcopy(model) if self.is_first else None
        size = experiment.settings.batch_size // self.num_replicas
        self.network = ModelParallel(model, plan, experiment.example[:size], timeout=TIMEOUT)
        self.control: Group = distributed.new_group(backend="gloo", timeout=EVALUATION)
        self.state: dict[str, Tensor] | None = None
        self.notes: list[Any] | None = None

    def analyze(self) -> Analysis:
        assert self._judged is not None
        return analyze_on(self._judged, self.experiment.example)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def train_epoch(self) -> Cost:
        """Take an epoch's steps; sum up on rank 0."""
        device, num_steps = torch.device(self.experiment.machine.device), self.num_steps
        timer = EpochClock(device)
        total, saved_bytes = torch.zeros((), device=device), 0
        for step, batch in enumerate(self._batches()):
            if step == 0 and device.type == "cpu":
                with count_saved_bytes(self.network.network, *batch) as count:
                    total += self._step(batch)
                saved_bytes = count()
            else:
                total += self._step(batch)
        self.network.synchronize()
        seconds, _ = timer.stop(num_steps)
        saved_bytes = timer.peak_bytes() or saved_bytes
        self.epoch += 1
        loss = float(total) / max(num_steps, 1)
        costs = gather((loss, saved_bytes), self.network.ranks, self.control)
        if self.is_first:
            loss = sum(costs[r][0] for r in self.last_ranks) / self.num_replicas
            saved_bytes = max(count for _, count in costs)
        return Cost(loss, saved_bytes, seconds, self.experiment.settings.batch_size, num_steps)

    def _step(self, batch: tuple[Tensor, ...]) -> Tensor | float:
        with self.experiment.machine.autocast():
            loss = self.network.step(*batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        rate, size = self.optimizer.param_groups[0]["lr"], self.experiment.settings.batch_size
        known = loss if self.rank in self.last_ranks and self.num_replicas == 1 else None
        self.on_step(Step(self.epoch, known, rate, 0, size))
        return 0.0 if loss is None else loss

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield this replica's share of each batch in module 0, and nothing so often elsewhere."""
        if not self.reads:
            yield from [()] * self.num_steps
            return
        mine = slice(self.replica, None, self.num_replicas)
        size = self.experiment.settings.batch_size
        for x, y in training_batches(self.experiment, size, self.epoch):
            yield self.experiment.machine.place(x[mine]), y[mine]

    def collect(self, checkpoint: bool) -> None:
        """Bring the weights, and what each rank needs to go on exactly, to rank 0."""
        own = None
        if checkpoint:
            own = {"optimizer": self.optimizer.state_dict(), "random": random_state()}
        self.notes = gather(own, self.network.ranks, self.control)
        self.state = self.network.gather_state()

    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state, without the heads', on rank 0."""
        names = self.network.network.source_model.state_dict()
        return self.state and {name: self.state[name] for name in names}

    def judged(self) -> nn.Module:
        assert self._judged is not None
        self._judged.load_state_dict(self.weights() or {})
        return self._judged

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.state, "ranks": self.notes, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> Mapping[str, Any]:
        given = dict(state or {})
        self.network.load_state_dict(given.pop("model", None))
        content: dict[str, Any] = unpack(self.from_first(pack(given)))
        mine = content["ranks"][self.rank]
        self.optimizer.load_state_dict(mine["optimizer"])
        restore_random_state(mine["random"])
        self.epoch = content["epoch"]
        return content

    def from_first(self, value: Any) -> Any:
        values, ranks = [value], self.network.ranks
        with ranks.talking_to(ranks.others):
            distributed.broadcast_object_list(values, 0, group=self.control)
        return values[0]
