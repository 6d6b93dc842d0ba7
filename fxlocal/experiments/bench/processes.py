"""Steps per second of local modules on as many processes, against one process.

Both sides are measured in one run and take turns: the ranks together, each with its share of the
CPU's threads or a GPU of its own, then rank 0 alone with all threads or its GPU, while the others
wait. A turn is several steps, so that a rank may run ahead as in training, and ends when all ranks
have taken theirs. Ratios are of one round's two (BackLink, section 4.2 and Figure 4).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed

from ...compiler.split import find_split
from ...compiler.transform import transform
from ...parallel import ModelParallel
from ...plan import LocalModules, Plan
from ...schedules import Constant
from ..training.measure import clock
from ..training.processes import join_group, launch, pack, unpack
from ..training.settings import Machine, SettingsError
from .spread import find_spread, ratios
from .steps import Entry
from .turns import Job, place_job, refuse_none, take_turns
from .variants import Variant, small_steps

__all__ = ["bench_processes"]


@dataclass(frozen=True)
class _Task:
    """What each rank is told."""

    job: Job
    modules: LocalModules
    steps: int
    repeats: int
    threads: int


def bench_processes(
    job: Job,
    entries: Sequence[Entry],
    *,
    steps: int = 8,
    repeats: int = 5,
    on_turn: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Measure training on one process per module, and on one for all.

    Args:
        job: what to train, where; on a GPU machine rank r takes GPU r.
        entries: each with local modules, as many as there are to be processes.
        steps: that make a turn.
        repeats: rounds measured.
        on_turn: called with an entry's name before it is measured.

    Returns:
        What ran, where; "rows": one per entry, with the milliseconds of a step of back-propagation,
        of local modules in one process and of local modules in parallel, and the speed-ups of the
        last. Ready for JSON.

    Raises:
        ParallelError: if a rank fails.
        PlanError: if the modules do not fit the model; like
        SettingsError: if there is nothing to repeat or to run in parallel, or too few GPUs or
            threads; both before anything is measured.
    """
    machine = job.machine
    if machine.compile or machine.cudagraph:
        raise SettingsError("processes run eagerly: leave out --compile and --cudagraph")
    refuse_none(steps=steps, repeats=repeats)
    chosen = {entry.name: _modules_of(entry, job) for entry in entries}
    for modules in chosen.values():  # all before the first is measured
        _refuse_count(modules.count, machine)
        find_split(job.analysis, modules)
    rows = []
    for name, modules in chosen.items():
        on_turn(name)
        rows.append({"strategy": name, **_bench(job, modules, steps, repeats)})
    return {**job.describe(), "steps": steps, "repeats": repeats, "rows": rows}


def _modules_of(entry: Entry, job: Job) -> LocalModules:
    modules = entry.schedule.plan(job.analysis, 0).modules
    if modules is None:
        raise SettingsError(f"{entry.name} has no local modules to run in processes of their own")
    return modules


def _refuse_count(count: int, machine: Machine) -> None:
    """Refuse one module, and more than the machine has a share of its devices for."""
    if count < 2:
        raise SettingsError(f"modules={count}: runs in one process; give 2 or more")
    threads, gpus = torch.get_num_threads(), torch.cuda.device_count()
    if machine.device.startswith("cuda") and gpus < count:
        raise SettingsError(f"{count} modules need a GPU each, and this machine has {gpus}")
    if machine.device.startswith("cpu") and threads < count:
        raise SettingsError(
            f"threads={threads}: {count} modules take one each, and one process would have fewer; "
            f"give --threads {count} or fewer modules"
        )


def _bench(job: Job, modules: LocalModules, steps: int, repeats: int) -> dict[str, Any]:
    """Return one row."""
    threads = torch.get_num_threads()
    model = copy.deepcopy(job.model)
    transform(model, Plan(modules=modules), job.x)  # refused here rather than there
    sent = replace(job, model=model.cpu(), x=job.x.cpu(), y=job.y.cpu())
    task = _Task(sent, modules, steps, repeats, threads)
    seconds = launch(_run_rank, [pack(task)] * modules.count, modules.count)[0]
    return {
        "modules": modules.count,
        "link": modules.link,
        "batch_size": len(job.x),
        "shape": list(job.x.shape[1:]),
        "steps": steps,
        "repeats": repeats,
        "threads": threads,
        **find_spread(
            **{f"{side}_milliseconds": [1000 * s for s in own] for side, own in seconds.items()},
            speedup=ratios(seconds["single"], seconds["parallel"]),
            speedup_over_sgd=ratios(seconds["sgd"], seconds["parallel"]),
            time_ratio=ratios(seconds["parallel"], seconds["sgd"]),
        ),
    }


def _run_rank(rank: int, payload: bytes, pipe: Any) -> dict[str, list[float]]:
    """Return the seconds of a step in each turn, by side; of rank 0 all sides."""
    task: _Task = unpack(payload)
    machine = join_group(task.job.machine)
    device, sent = torch.device(machine.device), task.job
    job = place_job(sent.name, sent.model, sent.x, sent.y, machine)
    torch.set_num_threads(task.threads)
    own: dict[str, Variant] = {}
    if rank == 0:  # of copies that are made before ModelParallel takes the model
        plans = {"sgd": Plan(), "single": Plan(modules=task.modules)}
        for side, plan in plans.items():
            own[side] = Variant(side, job, Constant(plan), "eager", task.steps)
            own[side].prepare()
    part = ModelParallel(job.model, Plan(modules=task.modules), job.x)

    def turn_together() -> float:
        torch.set_num_threads(max(1, task.threads // task.modules.count))
        distributed.barrier()  # here the others wait for rank 0's own sides
        start = clock(device)
        _steps_together(part, job, task.steps)
        seconds = (clock(device) - start) / task.steps
        torch.set_num_threads(task.threads)
        return seconds

    turns = {"parallel": turn_together, **{side: one.time_turn for side, one in own.items()}}
    take_turns(turns, 1)  # to warm up
    seconds = take_turns(turns, task.repeats)
    distributed.barrier()
    part.close()
    return seconds


def _steps_together(part: ModelParallel, job: Job, steps: int) -> None:
    optimizer = small_steps(part.parameters())
    for _ in range(steps):
        with job.machine.autocast():
            part.step(job.x, job.y)
        optimizer.step()
        optimizer.zero_grad()
    part.synchronize()
