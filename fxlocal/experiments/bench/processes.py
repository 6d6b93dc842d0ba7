"""Steps per second of local modules on as many processes, against one process: ``bench-parallel``.

Both sides are measured in one run and take turns: the ranks together, each with its share of the
CPU's threads or a GPU of its own, then rank 0 alone with all threads or its GPU, while the others
wait. A turn is several steps, so that a rank may run ahead as in training, and ends when all ranks
have taken theirs. Ratios are medians over rounds (BackLink, section 4.2 and Figure 4).
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn

from ...compiler.split import find_split
from ...compiler.transform import transform
from ...parallel import ModelParallel
from ...plan import ConvHead, LinearHead, LocalModules, Plan
from ..cli.console import one_line_errors
from ..cli.options import check_file, expand_groups, integers, write_file
from ..models.catalogue import MODELS
from ..report.tables import new_table
from ..training.measure import analyze_on, clock, find_versions
from ..training.processes import join_group, launch, pack, unpack
from ..training.settings import Machine, SettingsError
from .turns import build_job, refuse_no_repeats

__all__ = ["bench_parallel", "bench_parallel_command", "parallel_table"]

WARM_UP_TURNS = 1


@dataclass(frozen=True)
class _Job:
    """What each rank is told."""

    model: nn.Module
    x: Tensor
    y: Tensor
    modules: LocalModules
    machine: Machine
    steps: int
    repeats: int
    threads: int


def bench_parallel(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    modules: LocalModules,
    machine: Machine,
    *,
    steps: int = 8,
    repeats: int = 5,
) -> dict[str, Any]:
    """Measure training on one process per module, and on one for all.

    Args:
        model: the network to train; each side has copies.
        x: one batch of images.
        y: their labels.
        modules: as many as there are to be processes.
        machine: where and how; on a GPU machine rank r takes GPU r.
        steps: that make a turn.
        repeats: rounds measured.

    Returns:
        The milliseconds of a step of back-propagation, of local modules in one process and of
        local modules in parallel, and the speed-ups of the last; ready for JSON.

    Raises:
        ParallelError: if a rank fails.
        PlanError: if the modules do not fit the model.
        SettingsError: if there is nothing to repeat or to run in parallel, or too few GPUs or
            threads.
    """
    _refuse_repeats(steps, repeats)
    _refuse_count(modules.count, machine)
    count, threads = modules.count, torch.get_num_threads()
    transform(copy.deepcopy(model), Plan(modules=modules), x)  # refused here rather than there
    job = _Job(model, x, y, modules, machine, steps, repeats, threads)
    seconds = launch(_run_rank, [pack(job)] * count, count)[0]
    parallel, single, plain = (seconds[side] for side in ("parallel", "single", "sgd"))
    return {
        "modules": count,
        "link": modules.link,
        "batch_size": len(x),
        "shape": list(x.shape[1:]),
        "steps": steps,
        "repeats": repeats,
        "threads": threads,
        "sgd_milliseconds": 1000 * statistics.median(plain),
        "single_milliseconds": 1000 * statistics.median(single),
        "parallel_milliseconds": 1000 * statistics.median(parallel),
        "speedup": statistics.median(map(_ratio, single, parallel)),
        "speedup_over_sgd": statistics.median(map(_ratio, plain, parallel)),
    }


def _refuse_repeats(steps: int, repeats: int) -> None:
    if steps < 1:
        raise SettingsError(f"steps={steps}: must be at least 1")
    refuse_no_repeats(repeats)


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


def _ratio(a: float, b: float) -> float:
    return a / b


def _run_rank(rank: int, payload: bytes, pipe: Any) -> dict[str, list[float]]:
    """Return the seconds of a step in each turn, by side; of rank 0 all sides."""
    job: _Job = unpack(payload)
    machine = join_group(job.machine)
    device = torch.device(machine.device)
    model, x, y = machine.prepare(job.model), machine.place(job.x), job.y.to(device)
    plan = Plan(modules=job.modules)
    sides: dict[str, Callable[[], None]] = {}
    if rank == 0:
        sides = {
            "single": _own_steps(copy.deepcopy(model), x, y, plan, job, machine),
            "sgd": _own_steps(copy.deepcopy(model), x, y, Plan(), job, machine),
        }
    part = ModelParallel(model, plan, x)
    together = partial(_steps_together, part, x, y, job, machine)
    seconds: dict[str, list[float]] = {"parallel": [], **{name: [] for name in sides}}
    for turn in range(-WARM_UP_TURNS, job.repeats):
        torch.set_num_threads(max(1, job.threads // job.modules.count))
        distributed.barrier()
        seconds["parallel"].append(_time(together, device, job.steps))
        torch.set_num_threads(job.threads)
        for name, call in sides.items():
            seconds[name].append(_time(call, device, job.steps))
        if turn < 0:
            for values in seconds.values():
                values.clear()
        distributed.barrier()
    part.close()
    return seconds


def _time(call: Callable[[], None], device: torch.device, steps: int) -> float:
    start = clock(device)
    call()
    return (clock(device) - start) / steps


def _steps_together(part: ModelParallel, x: Tensor, y: Tensor, job: _Job, machine: Machine) -> None:
    optimizer = _optimizer(part.parameters())
    for _ in range(job.steps):
        with machine.autocast():
            part.step(x, y)
        optimizer.step()
        optimizer.zero_grad()
    part.synchronize()


def _own_steps(
    model: nn.Module, x: Tensor, y: Tensor, plan: Plan, job: _Job, machine: Machine
) -> Callable[[], None]:
    network = transform(model, plan, x)
    optimizer = _optimizer(network.parameters())

    def run() -> None:
        for _ in range(job.steps):
            with machine.autocast():
                if plan.modules is None:
                    loss = F.cross_entropy(network(x), y)
                else:
                    _, loss = network(x, y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    return run


def _optimizer(parameters: Any) -> torch.optim.Optimizer:
    # A rate this small keeps weights, and so the speed of a CPU's arithmetic, ordinary.
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)


def parallel_table(results: dict[str, Any]) -> Table:
    """Return the table of what `bench_parallel` measured, a row per number of modules and link."""
    table = new_table(
        f"{results['model']}, batch of {results['batch_size']}, {results['device']}",
    )
    headings = ("modules", "link", "SGD ms", "one process ms", "parallel ms", "speed-up", "vs SGD")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        table.add_row(
            str(row["modules"]),
            str(row["link"]),
            *(f"{row[f'{side}_milliseconds']:.1f}" for side in ("sgd", "single", "parallel")),
            f"{row['speedup']:.2f}x",
            f"{row['speedup_over_sgd']:.2f}x",
        )
    table.caption = (
        "ms of one step; speed-up: of parallel over one process;\n"
        "vs SGD: over back-propagation in one process;\n"
        "one process has all threads, parallel ones share them"
    )
    return table


@one_line_errors
@expand_groups
def bench_parallel_command(
    model: Annotated[str, typer.Argument(help=", ".join(MODELS))],
    machine: Machine,
    modules: Annotated[str, typer.Option(help="Numbers of modules, each with a process")] = "2",
    links: Annotated[str, typer.Option(help="Blocks over which errors flow back")] = "0,1",
    head: Annotated[
        Literal["linear", "conv"], typer.Option(help="The auxiliary classifier")
    ] = "conv",
    balance: Annotated[
        Literal["memory", "blocks", "time"],
        typer.Option(help="What modules have an equal share of"),
    ] = "time",
    batch: Annotated[int, typer.Option(min=1, help="Images per step")] = 64,
    input_size: Annotated[
        str, typer.Option(help="One image: its height and width (32), or 3x32x32")
    ] = "",
    classes: Annotated[int, typer.Option(min=1, help="Number of classes")] = 10,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage")] = None,
    steps: Annotated[int, typer.Option(help="Steps that make a turn")] = 8,
    repeats: Annotated[int, typer.Option(help="Rounds to take the median of")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Time local modules on as many processes against one process, in turns."""
    if machine.compile or machine.cudagraph:
        raise SettingsError("bench-parallel runs eagerly; leave out --compile and --cudagraph")
    _refuse_repeats(steps, repeats)
    check_file(out)
    net, x, y = build_job(
        model, machine, input_size=input_size, batch=batch, classes=classes, width=width
    )
    analysis = analyze_on(net, x)
    kind = ConvHead() if head == "conv" else LinearHead()
    cells = [
        LocalModules(*(count, link), head=kind, num_classes=classes, balance=balance)
        for count in integers("--modules", modules)
        for link in integers("--links", links)
    ]
    for cell in cells:  # all before the first is measured
        _refuse_count(cell.count, machine)
        find_split(analysis, cell)
    rows = []
    with Console().status("") as status:
        for cell in cells:
            status.update(f"{cell.count} modules, link {cell.link}")
            rows.append(bench_parallel(net, x, y, cell, machine, steps=steps, repeats=repeats))
    results: dict[str, Any] = {"model": model, "batch_size": batch, **asdict(machine)}
    results |= {"device": machine.name, "versions": find_versions(), "rows": rows}
    Console().print(parallel_table(results))
    write_file(out, results)
