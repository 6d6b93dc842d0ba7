"""Data parallel training against one process, also where the wire is slow: weak scaling.

Each rank has a batch as large as that of one process, and as many threads. SGD is what
`DistributedDataParallel` makes of it, all else what `fxlocal.replicate` does. All are measured in
one run and take turns: rank 0 alone while the others wait, then all ranks, at each speed of the
wire. Ratios are of one round's two::

    gain alone = seconds of SGD in one process / of the entry in one process
    gain       = seconds of SGD under DDP / of the entry on all ranks
    kept       = gain / gain alone

The wire is the loopback, which all ranks share, slowed by ``tc``; this needs a network of its own,
in which the machine's is not seen: ``unshare --map-root-user --net fxlocal bench ...``.
"""

import copy
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from ...ops.ranks import Group
from ...parallel import replicate
from ...plan import Plan
from ...runtime.driver import Driver
from ...schedules import Constant
from ..training.measure import clock, count_wire_bytes
from ..training.objective import loss_of
from ..training.processes import join_group, launch, pack, unpack
from ..training.settings import SettingsError
from .spread import find_spread, ratios
from .steps import Entry
from .turns import WARM_UP_TURNS, Job, place_job, refuse_none, take_turns
from .variants import small_steps

__all__ = ["bench_ranks"]

SGD = "sgd"
Key = tuple[int, int, float]  # which entry, on how many ranks, at which speed in Mbit/s or 0


@dataclass(frozen=True)
class _Task:
    """What each rank is told."""

    job: Job
    entries: tuple[Entry, ...]
    wires: tuple[float, ...]
    steps: int
    repeats: int
    threads: int


def bench_ranks(
    job: Job,
    entries: Sequence[Entry],
    nproc: int,
    *,
    wires: Sequence[float] = (),
    steps: int = 2,
    repeats: int = 10,
    on_turn: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Measure data parallel steps of each entry, and of SGD.

    Args:
        job: what to train, where, with a rank's batch; on a GPU machine rank r takes GPU r.
        entries: names and schedules; SGD comes first without being named.
        nproc: how many ranks.
        wires: speeds in Mbit/s that the loopback is slowed to, beside its own.
        steps: that make a turn.
        repeats: rounds measured.
        on_turn: told what goes on.

    Returns:
        What ran, where; "rows": one per entry and speed, with the milliseconds of a step alone and
        together, the gains, what is kept of them, and the bytes that a rank sends. Ready for JSON.

    Raises:
        ParallelError: if a rank fails.
        PlanError: if a Plan does not fit the model; like
        SettingsError: if the machine is too small, runs compiled, or has no wire to slow.
    """
    machine, threads = job.machine, max(1, torch.get_num_threads() // nproc)
    if machine.compile or machine.cudagraph:
        raise SettingsError("ranks are measured eagerly: leave out --compile and --cudagraph")
    if machine.device.startswith("cuda") and torch.cuda.device_count() < nproc:
        raise SettingsError(f"nproc={nproc}: this machine has {torch.cuda.device_count()} GPUs")
    refuse_none(steps=steps, repeats=repeats)
    if wires:
        _refuse_shared_network()
    chosen = (Entry(SGD, Constant(Plan())), *(entry for entry in entries if entry.name != SGD))
    boundaries = [_driver(entry, job).boundary for entry in chosen]  # refused here, not there
    sent = replace(job, model=copy.deepcopy(job.model).cpu(), x=job.x.cpu(), y=job.y.cpu())
    task = _Task(sent, chosen, (0.0, *wires), steps, repeats, threads)
    seconds, sent = launch(_run_rank, [pack(task)] * nproc, 0, {"turn": on_turn})[0]
    rows = [
        {
            "strategy": chosen[i].name,
            "boundary": boundaries[i],
            "wire_megabits": wire or None,
            "wire_bytes": sent[i],
            **_row(seconds, (i, nproc, wire), len(job.x)),
        }
        for i in range(len(chosen))
        for wire in task.wires
    ]
    about = {"nproc": nproc, "threads": threads, "steps": steps, "repeats": repeats}
    return {**job.describe(), **about, "rows": rows}


def _refuse_shared_network() -> None:
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"]:
        raise SettingsError(
            f"wires: would slow the loopback for all that run here, beside {', '.join(names[1:])}; "
            "give the command a network of its own: unshare --map-root-user --net fxlocal bench ..."
        )
    _run("ip", "link", "set", "lo", "up")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SettingsError(f"{' '.join(command)}: {done.stderr.strip()}")


def _slow_wire(megabits: float) -> None:
    """Let the loopback carry so many megabits a second; 0 for all that it can."""
    root = "dev", "lo", "root"
    if megabits:
        rate = "rate", f"{megabits:g}mbit", "burst", "512kb", "limit", "256mb"
        _run("tc", "qdisc", "replace", *root, "tbf", *rate)
    else:
        _run("tc", "qdisc", "replace", *root, "pfifo", "limit", "10000")


def _row(seconds: dict[Key, list[float]], key: Key, batch_size: int) -> dict[str, Any]:
    """Sum up an entry at one speed of the wire, against SGD there."""
    entry, nproc, wire = key
    alone, together = seconds[entry, 1, 0.0], seconds[key]
    gain_alone = ratios(seconds[0, 1, 0.0], alone)
    gain = ratios(seconds[0, nproc, wire], together)
    row = find_spread(
        alone_milliseconds=[1000 * own for own in alone],
        milliseconds=[1000 * own for own in together],
        gain_alone=gain_alone,
        gain=gain,
        time_ratio_alone=ratios(alone, seconds[0, 1, 0.0]),
        time_ratio=ratios(together, seconds[0, nproc, wire]),
    )
    return row | {
        "images_per_second": 1000 * nproc * batch_size / row["milliseconds"],
        "kept": row["gain"] / row["gain_alone"],
    }


def _driver(entry: Entry, job: Job, group: Group = None) -> Driver:
    model = copy.deepcopy(job.model)
    return Driver(model, entry.schedule, example_inputs=(job.x,), process_group=group)


class _Side:
    """One way to train, with its own copy of the model: alone, or with all ranks."""

    def __init__(self, entry: Entry, job: Job, group: Group, steps: int) -> None:
        self.job, self.steps, self.device = job, steps, torch.device(job.machine.device)
        driver, together = _driver(entry, job, group), group is distributed.group.WORLD
        self.network: Callable[[], Any] = driver.network
        if together and entry.name == SGD:
            wrapped = DistributedDataParallel(driver.model)
            self.network = lambda: wrapped
        elif together:
            replicate(driver)
        driver.start_epoch()
        parameters = driver.parameters()
        self.optimizer = small_steps(parameters)

    def take(self) -> None:
        """Take the steps of a turn."""
        for _ in range(self.steps):
            with self.job.machine.autocast():
                loss = loss_of(self.network()(self.job.x), self.job.y)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()

    def time(self) -> float:
        """Return the seconds of a step of one turn."""
        start = clock(self.device)
        self.take()
        return (clock(self.device) - start) / self.steps


def _run_rank(rank: int, payload: bytes, pipe: Any) -> tuple[Any, list[int]]:
    """Return the seconds of a step in each turn, and the bytes that one sends; of rank 0 all."""
    task: _Task = unpack(payload)
    torch.set_num_threads(task.threads)
    given = task.job
    job = place_job(given.name, given.model, given.x, given.y, join_group(given.machine))
    alone = distributed.new_group([0])
    turns: dict[Key, Callable[[], float]] = {}
    sent = []
    for index, entry in enumerate(task.entries):
        if rank == 0:
            side = _Side(entry, job, alone, task.steps)
            side.take()
            turns[index, 1, 0.0] = side.time
        side = _Side(entry, job, distributed.group.WORLD, task.steps)
        for _ in range(WARM_UP_TURNS):
            side.take()
        with count_wire_bytes() as count:
            side.take()
        sent.append(count() // task.steps)
        for wire in task.wires:
            speed = wire if len(task.wires) > 1 else None
            key = index, distributed.get_world_size(), wire
            turns[key] = partial(_time_together, side, speed)

    def tell(key: Key) -> None:
        if rank == 0:
            pipe.send(("turn", f"{task.entries[key[0]].name}, {key[1]} ranks, {key[2]:g} Mbit/s"))

    return take_turns(turns, task.repeats, tell), sent


def _time_together(side: _Side, wire: float | None) -> float:
    """Return the seconds of a step until all ranks have taken the turn's; None leaves the wire."""
    if wire is not None and distributed.get_rank() == 0:
        _slow_wire(wire)
    distributed.barrier()  # here the others wait for what rank 0 does alone
    start = clock(side.device)
    side.take()
    distributed.barrier()
    return (clock(side.device) - start) / side.steps
