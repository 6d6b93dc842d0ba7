"""One run on several processes: ``fxlocal train --nproc``, and ranks that torchrun has started.

With local modules, each process trains one, and each replica's first rank reads the data. Without,
each has the whole network and takes its share of every batch: data parallel. Rank 0 judges the
whole model and writes the checkpoints. A run takes the steps of a run in one process, but for batch
norms, which see a share of the batch, and for random numbers in the model: with local modules each
rank draws for itself, without all draw alike. How the numbers of its `Run` are taken:

- training seconds: the clock of rank 0 over each epoch's steps, until all ranks have taken theirs.
- loss: of the last module; without modules, the mean over all samples.
- saved bytes: those of the rank that saves most; on a GPU, the highest peak of a rank's.
- wire bytes: without modules, what each rank hands to the process group in an epoch's steps.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from pickle import PicklingError
from typing import Any

import torch
from torch import nn

from ...compiler.debug import launched_ranks
from ...plan import Plan
from ...runtime.shrink import kept_channels, shrink
from ...schedules import Constant
from ..data.images import choose
from ..tracking import Reading, Tracker
from .parts.replica import Replica
from .parts.share import Share
from .processes import (
    EVALUATION,
    TIMEOUT,
    join_group,
    launch,
    naming_rank,
    pack,
    times_restarted,
    unpack,
)
from .recipe.fit import refuse_shared
from .results import DivergedError, Run
from .settings import Experiment, SettingsError
from .specs import Spec
from .trainer import Trainer

__all__ = ["check_shared", "find_world", "share_out", "train_parallel", "train_rank"]


@dataclass(frozen=True)
class _Job:
    """What a rank is told; its experiment has the images that it is to read."""

    experiment: Experiment
    count: int  # of local modules; 0 without
    num_steps: int
    checkpoint: Path | None
    resume: bool
    num_threads: int
    size: int
    tracker: Tracker | None
    timeout: float


def train_parallel(
    experiment: Experiment,
    nproc: int,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    max_restarts: int = 0,
    on_step: Callable[[Reading], object] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
    tracker: Tracker | None = None,
    timeout: float = TIMEOUT,
) -> Run:
    """Do as `train_run` does, on ``nproc`` processes that share the threads or GPUs of this one.

    Args:
        experiment: what to train how. With a device of cuda, rank r takes GPU r; the tensors
            between ranks go by nccl if there are as many GPUs as ranks, else by way of the CPU.
        nproc: number of processes, each of which takes its share of every batch; with local modules
            as many as those, or a multiple: then each batch is shared out to as many replicas.
        checkpoint: as of `train_run`.
        resume: likewise, but replay buffers begin empty. Without local modules, what a run on any
            number of processes wrote.
        max_restarts: how often to start all processes again when one fails, from the checkpoint.
        on_step: called after each step of rank 0 with how far the run is.
        on_epoch: called after each epoch with the run so far.
        tracker: told of each step and epoch, in the process of rank 0; of no loss of a step if
            another rank has it.
        timeout: seconds that ranks wait for one that does not answer.

    Raises:
        CheckpointError, DataError, DivergedError: as `train_run` does.
        ParallelError: if a rank fails once too often; the checkpoint is the previous epoch's.
        PlanError: if the local modules do not fit the model.
        SettingsError: if such a run cannot be shared out.
    """
    count = check_shared(experiment, nproc)
    model, data = experiment.build(experiment.seed), experiment.data
    job = _Job(
        replace(experiment, build=partial(_given, model)),
        count,
        experiment.num_steps,
        checkpoint,
        resume,
        num_threads=max(1, torch.get_num_threads() // nproc),
        size=nproc,
        tracker=tracker,
        timeout=timeout,
    )
    # As bytes: torch would send tensors through shared memory, of which there may be little.
    told = [_packed(job)] * nproc
    if count:
        none = torch.arange(0)
        unread = replace(data, train=choose(data.train, none), test=choose(data.test, none))
        rest = pack(replace(job, experiment=replace(job.experiment, data=unread)))
        told = [rest if rank % count else told[0] for rank in range(nproc)]
    events: dict[str, Callable[..., object]] = {
        "step": on_step or (lambda reading: None),
        "epoch": on_epoch or (lambda run: None),
    }
    kind, value, *state = launch(_run_rank, told, count, events, max_restarts=max_restarts)[0]
    if kind == "diverged":
        raise DivergedError(*value)
    kept, weights = unpack(*state)
    if kept:
        shrink(model, kept, experiment.example)
    model.load_state_dict(weights)
    assert isinstance(value, Run)
    return value


def _packed(job: _Job) -> bytes:
    try:
        return pack(job)
    except (AttributeError, PicklingError, TypeError) as error:  # something of the user's
        raise SettingsError(
            f"nproc={job.size}: cannot be sent to other processes: {error}. Define models, data "
            "and rules at the top of a module, or start the ranks by torchrun"
        ) from error


def find_world() -> int:
    """Return how many ranks torchrun, or another launcher, has started; 0 if none has.

    Raises:
        SettingsError: if it has not said how many, and which of them this is.
    """
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "")
    if rank is None:
        return 0
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise SettingsError(
            f"RANK={rank}, WORLD_SIZE={size}: no rank of so many, as torchrun has them; unset both"
        )
    return int(size)


def train_rank(
    experiment: Experiment,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_step: Callable[[Reading], object] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
    tracker: Tracker | None = None,
) -> Run:
    """Do as `train_parallel` does, on a rank that torchrun has started, on this or more hosts.

    Rank 0 alone has errors in its run, tells of steps and epochs, and writes and reads files. What
    torchrun starts again goes on from the checkpoint.
    """
    size, is_first = find_world(), launched_ranks()[0] == "0"
    job = _Job(
        experiment,
        check_shared(experiment, size),
        experiment.num_steps,
        checkpoint,
        resume,
        num_threads=torch.get_num_threads(),  # torchrun sets one for each, unless it is told
        size=size,
        tracker=tracker if is_first else None,
        timeout=TIMEOUT,
    )
    step, epoch = on_step or (lambda reading: None), on_epoch or (lambda run: None)
    run, _ = _take_part(job, step if is_first else lambda reading: None, epoch)
    if isinstance(run, DivergedError):
        raise run
    return run


def _given(model: nn.Module, seed: int) -> nn.Module:
    return model


def share_out(spec: Spec, nproc: int) -> Spec:
    """Return a spec whose local modules, if it does not say how many, are one for each process."""
    parts = spec.parts if nproc > 1 else ()
    if any("modules" in part.arguments.keys() - part.given for part in parts):
        return replace(spec.told(modules=nproc), text=spec.text)
    return spec


def check_shared(experiment: Experiment, nproc: int) -> int:
    """Return the number of local modules, 0 without; a SettingsError if ``nproc`` do not fit."""
    schedule, settings, machine = experiment.schedule, experiment.settings, experiment.machine
    plan = schedule.fixed if isinstance(schedule, Constant) else Plan()
    refuse_shared(experiment, nproc, plan.modules is not None)
    if machine.cudagraph:
        raise SettingsError(f"nproc={nproc}: ranks cannot be captured; leave out --cudagraph")
    if plan.modules is None:
        if nproc > settings.batch_size:
            raise SettingsError(
                f"nproc={nproc}: a batch of {settings.batch_size} images has none for some of the "
                "processes; give a larger --batch-size, or fewer"
            )
        return 0
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
    if machine.compile:
        raise SettingsError(f"nproc={nproc}: local modules are not compiled; leave out --compile")
    return count


def _run_rank(rank: int, payload: bytes, pipe: Any) -> tuple[Any, ...]:
    """Train a rank's part; return what comes of it."""

    def tell(reading: Reading) -> None:
        if rank == 0:
            pipe.send(("step", reading))

    job: _Job = unpack(payload)
    job = job if rank == 0 else replace(job, tracker=None)
    run, weights = _take_part(job, tell, lambda run: pipe.send(("epoch", run)))
    return ("diverged", run.args) if isinstance(run, DivergedError) else ("done", run, weights)


def _take_part(
    job: _Job, on_step: Callable[[Reading], object], on_epoch: Callable[[Run], None]
) -> tuple[Run | DivergedError, bytes]:
    """Train a rank's part; return the run, and on rank 0 the weights.

    Started again, it goes on from the checkpoint, if this run has written one.
    """
    torch.set_num_threads(job.num_threads)
    timeout = EVALUATION if job.count else timedelta(seconds=job.timeout)
    machine = join_group(job.experiment.machine, timeout)
    with naming_rank():
        made: Any = partial(Replica, job.timeout)
        if job.count:
            made = partial(Share, job.num_steps, job.size, job.timeout)
        options = {"nproc": job.size} if job.count else {}  # who may go on with the checkpoint
        experiment = replace(job.experiment, machine=machine)
        trainer = Trainer(experiment, made, on_step, job.tracker, **options)
        part: Any = trainer.part
        with part.network if job.count else nullcontext():
            try:
                run = trainer.train(job.checkpoint, _resumes(job, part), on_epoch)
            except DivergedError as error:
                return error, b""
            part.collect(checkpoint=False)
            kept = {} if job.count else kept_channels(part.model)
            return run, pack((kept, part.weights()))


def _resumes(job: _Job, part: Any) -> bool:
    """Tell whether to go on from the checkpoint, by what rank 0 finds; an older run's goes."""
    path, resume = job.checkpoint, job.resume
    if part.is_first and path and not resume:
        if times_restarted():
            resume = path.exists()
        else:
            path.unlink(missing_ok=True)
    return bool(part.from_first(resume))
