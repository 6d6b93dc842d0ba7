"""One run on several processes, each of which trains one local module: ``fxlocal train --nproc``.

Rank 0 reads the data (with replicas, each one's first rank does), judges the whole model and writes
the checkpoints. A run without replicas takes the steps of
`fxlocal.experiments.training.trainer.train_run`,
but for random numbers in the model, which each rank draws for itself. How the numbers of its `Run`
are taken:

- training seconds: the clock of rank 0 over each epoch's steps, until all ranks have taken theirs.
- loss: of the last module.
- saved bytes: those of the rank that saves most; on a GPU, the highest peak of a rank's.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ...plan import Plan
from ...schedules import Constant, Schedule
from ..data.catalogue import Data
from .checkpoint import build_fingerprint
from .processes import launch, pack, unpack
from .rank import Job, run_rank
from .settings import Machine, Settings, SettingsError
from .trainer import DivergedError, Run, count_steps

__all__ = ["train_parallel"]


def train_parallel(
    model: nn.Module,
    data: Data,
    schedule: Schedule,
    settings: Settings,
    machine: Machine,
    *,
    nproc: int,
    strategy: str = "",
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    max_restarts: int = 0,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
) -> Run:
    """Do as `train_run` does, on ``nproc`` processes that share the threads or GPUs of this one.

    Args:
        model: trained in place.
        data: what it learns from and is judged by.
        schedule: the same local modules throughout.
        settings: how long and how fast.
        machine: where and how to compute. With a device of cuda, rank r takes GPU r; the tensors
            between ranks go by nccl if there are as many GPUs as ranks, else by way of the CPU.
        nproc: number of processes: of local modules, or a multiple. Then each batch is shared out
            to as many replicas.
        strategy: the schedule's name, for the record.
        seed: fixes the order of the batches and the model's random operations.
        checkpoint: file to write at the end of each epoch.
        resume: go on from ``checkpoint``, exactly as if there had been no break; but replay buffers
            begin empty.
        max_restarts: how often to start all processes again when one fails, from the checkpoint.
        on_step: called after each step of rank 0.
        on_epoch: called after each epoch with the run so far.

    Raises:
        CheckpointError: if ``checkpoint`` is of another run; nothing is changed then.
        DataError: if one batch needs more images than there are.
        DivergedError: at the end of an epoch whose loss is not finite. The checkpoint is the
            previous epoch's.
        ParallelError: if a rank fails once too often; the checkpoint is the previous epoch's.
        PlanError: if the local modules do not fit the model.
        SettingsError: if such a run cannot be shared out.
    """
    plan = _checked(schedule, settings, machine, nproc, strategy)
    fingerprint = build_fingerprint(data, schedule, settings, strategy, seed)
    job = Job(
        *(model, data, data.shape, count_steps(data, settings.batch_size), plan, settings),
        *(machine, Run(strategy, seed), checkpoint, resume, {**fingerprint, "nproc": nproc}),
        *(max(1, torch.get_num_threads() // nproc), nproc, time.time()),
    )
    assert plan.modules is not None
    # As bytes: torch would send tensors through shared memory, of which there may be little.
    whole, none = (pack(replace(job, data=some)) for some in (data, None))
    told = [none if rank % plan.modules.count else whole for rank in range(nproc)]
    events: dict[str, Callable[..., object]] = {
        "step": on_step or (lambda: None),
        "epoch": on_epoch or (lambda run: None),
    }
    count = plan.modules.count
    kind, *values = launch(run_rank, told, count, events, max_restarts=max_restarts)[0]
    if kind == "diverged":
        raise DivergedError(*values)
    run, state = values
    model.load_state_dict(unpack(state))
    assert isinstance(run, Run)
    return run


def _checked(
    schedule: Schedule, settings: Settings, machine: Machine, nproc: int, strategy: str
) -> Plan:
    """Return the Plan of all steps, if ``nproc`` processes can take them."""
    plan = schedule.fixed if isinstance(schedule, Constant) else Plan()
    if plan.modules is None:
        raise SettingsError(
            f"nproc={nproc}: {strategy or 'the schedule'} cannot be shared out to processes; take "
            "greedy, dgl, infopro or backlink alone"
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
    return plan
