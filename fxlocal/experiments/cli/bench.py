"""``fxlocal bench``: step time and memory of strategies, in one process or in several."""

from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

from ...plan import Freeze, LocalPrefix
from ..bench.cached import bench_cache
from ..bench.processes import bench_processes
from ..bench.ranks import bench_ranks
from ..bench.steps import Entry, bench_steps, prefixes
from ..bench.turns import Job, build_job
from ..data.task import Goal
from ..report.bench_tables import cached_table, processes_table, ranks_table, steps_table
from ..training.settings import Machine, SettingsError
from ..training.specs import parse_spec, split_list
from .console import one_line_errors
from .options import (
    Classes,
    InputSize,
    ModelName,
    OutFile,
    Quiet,
    check_file,
    check_folder,
    expand_groups,
    integers,
    option,
    until,
    write_file,
)

__all__ = ["command"]

BOUNDARIES = "0.25,0.5,0.75"


@one_line_errors
@expand_groups
def command(
    model: ModelName,
    machine: Machine,
    strategies: Annotated[str, option("Specs; also summed(...), noised(...)", "Strategy")] = "",
    boundaries: Annotated[str, option("Else prefixes up to these", "Strategy")] = BOUNDARIES,
    norm: Annotated[
        Literal["train", "eval"], option("train or eval, of those", "Strategy", metavar="WORD")
    ] = "train",
    batch: Annotated[int, option("Images per step", "Data and model", min=1)] = 16,
    input_size: InputSize = "",
    classes: Classes = 10,
    width: Annotated[int | None, option("Channels of the first stage", "Data and model")] = None,
    nproc: Annotated[int, option("Ranks, or local modules", "Machine", min=1, max=64)] = 1,
    wires: Annotated[str, option("Slow the wire to such Mbit/s", "Machine")] = "",
    auto: Annotated[str, option("Plans for a budget, 2GiB or 0.5", "Strategy")] = "",
    cache: Annotated[str, option("Epochs with a cache of prefixes, 4GiB", "Strategy")] = "",
    folder: Annotated[
        Path | None, option("For what its memory does not hold", "Strategy", hidden=True)
    ] = None,
    repeats: Annotated[int, option("Rounds to take the median of", "Machine")] = 10,
    quiet: Quiet = False,
    out: OutFile = None,
    plots: Annotated[
        Path | None, option("Folder for plots over local modules, or the wire", "Output")
    ] = None,
    errors: Annotated[
        str, option("results.json of comparisons to plot too", "Output", hidden=True)
    ] = "",
) -> None:
    """Time a training step of each strategy, and what it keeps, in turns.

    --compile, --cudagraph: such networks too; --nproc: modules or ranks; --cache:
    whole epochs; --auto: memory against time.
    """
    check_file(out)
    if quiet and out is None:
        raise SettingsError("--quiet: prints no table, and nothing else is written; give --out")
    if strategies and (boundaries, norm) != (BOUNDARIES, "train"):
        raise SettingsError("--boundaries, --norm: there are no prefixes with --strategies")
    if auto and (strategies or cache or nproc > 1 or boundaries != BOUNDARIES):
        raise SettingsError("--auto: finds plans of its own; leave out other ones, and --nproc")
    if plots and not (strategies or auto) and nproc == 1:
        raise SettingsError("--plots: are of local modules; give --strategies, or --nproc")
    if wires and nproc == 1:
        raise SettingsError("--wires: there are none without --nproc")
    if errors and not plots:
        raise SettingsError("--errors: changes nothing without --plots")
    for path in filter(None, errors.split(",")):
        if not Path(path).is_file():
            raise SettingsError(f"--errors {path}: there is no such file")
    if (cache and (strategies or nproc > 1 or plots)) or (folder and not cache):
        raise SettingsError("--cache, --folder: are of prefixes, up to --boundaries")
    entries = [_read_entry(text, classes, nproc) for text in split_list(strategies) if strategies]
    job = build_job(
        model, machine, input_size=input_size, batch=batch, classes=classes, width=width
    )
    if plots is not None:  # better refused now than after the measurement
        check_folder(plots)
    if auto:
        _bench_auto(job, auto, repeats, out, plots)
        return
    if cache:
        edges = _read_boundaries(boundaries)
        with Console().status("") as status:
            told: dict[str, Any] = {"repeats": repeats, "on_turn": status.update}
            cached = bench_cache(job, edges, cache, folder=folder, **told)
        Console().print(cached_table(cached))
        write_file(out, cached)
        return
    if not entries:
        entries = prefixes(job, _read_boundaries(boundaries), norm)
    has_modules = any(e.schedule.plan(job.analysis, 0).modules is not None for e in entries)
    if nproc > 1 and has_modules and (plots or wires):
        raise SettingsError("--plots, --wires: with --nproc they are of data parallel training")
    with Console().status("") as status:
        shared: dict[str, Any] = {"repeats": repeats, "on_turn": status.update}
        if nproc == 1:
            facts: dict[str, Any] = {} if strategies else {"norm": norm}
            results = bench_steps(job, entries, **shared, **facts)
        elif has_modules:
            results = bench_processes(job, entries, **shared)
        else:
            speeds = [float(n) for n in integers("--wires", wires)] if wires else ()
            results = bench_ranks(job, entries, nproc, wires=speeds, **shared)
    make_table = steps_table if nproc == 1 else processes_table if has_modules else ranks_table
    Console().print(make_table(results))
    write_file(out, results)
    if plots is not None:
        from ..report.plots import write_plots  # matplotlib is slow to import
        from ..report.step_plots import plot_modules, plot_wires, read_drops

        if nproc == 1:
            drops = read_drops([Path(path) for path in errors.split(",") if path], results)
            write_plots(plot_modules(results, drops), plots)
        else:
            write_plots(plot_wires(results), plots)


def _bench_auto(job: Job, auto: str, repeats: int, out: Path | None, plots: Path | None) -> None:
    from ..bench.front import bench_front
    from ..report.front import front_table, plot_front  # matplotlib is slow to import
    from ..report.plots import write_plots

    try:
        memory: str | float = float(auto) if float(auto) <= 1 else auto
    except ValueError:
        memory = auto
    with Console().status("") as status:
        results = bench_front(job, memory, repeats=repeats, on_turn=status.update)
    Console().print(front_table(results))
    write_file(out, results)
    if plots is not None:
        write_plots(plot_front(results), plots)


def _read_boundaries(text: str) -> list[str | int | float]:
    """Return what a prefix takes; PlanError if one is none."""
    return [LocalPrefix(until(part), Freeze()).until for part in text.split(",")]


def _read_entry(text: str, classes: int, nproc: int) -> Entry:
    name = text.partition("(")[0]
    others = {"summed": "greedy", "noised": "stochastic-depth"}
    spec = parse_spec(text.replace(name, others.get(name, name), 1))
    for argument in ("cache", "augmentations", "modulation"):
        if spec.of_run(argument) is not None:
            advice = "give --cache, which times epochs" if argument == "cache" else "leave it out"
            raise SettingsError(f"{argument}= in {text!r}: a step that is timed has none; {advice}")
    if nproc > 1 and any("modules" in part.arguments.keys() - part.given for part in spec.parts):
        spec = spec.told(modules=nproc)
    schedule = spec.schedule(1, Goal(classes))
    return Entry(text, schedule, name == "summed", name == "noised")
