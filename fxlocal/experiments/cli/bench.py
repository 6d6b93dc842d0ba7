"""``fxlocal bench``: step time and memory of strategies, in one process or in several."""

from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

from ..bench.processes import bench_processes
from ..bench.steps import Entry, bench_steps, prefixes
from ..bench.turns import build_job
from ..data.task import Goal
from ..report.tables import processes_table, steps_table
from ..training.settings import Machine, SettingsError
from ..training.specs import parse_spec, split_list
from .console import one_line_errors
from .options import (
    Classes,
    InputSize,
    ModelName,
    OutFile,
    check_file,
    check_folder,
    expand_groups,
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
    nproc: Annotated[int, option("One process per local module", "Machine", min=1)] = 1,
    repeats: Annotated[int, option("Rounds to take the median of", "Machine")] = 10,
    out: OutFile = None,
    plots: Annotated[Path | None, option("Folder for plots over local modules", "Output")] = None,
    errors: Annotated[str, option("results.json of comparisons to plot too", "Output")] = "",
) -> None:
    """Time a training step of each strategy, and what it keeps, in turns.

    With --compile and --cudagraph, such networks are measured beside the eager ones.
    """
    check_file(out)
    if strategies and (boundaries, norm) != (BOUNDARIES, "train"):
        raise SettingsError("--boundaries, --norm: there are no prefixes with --strategies")
    if (nproc > 1 or plots) and not strategies:
        raise SettingsError("--nproc, --plots: are of local modules; give --strategies")
    if errors and not plots:
        raise SettingsError("--errors: changes nothing without --plots")
    entries = [_read_entry(text, classes, nproc) for text in split_list(strategies) if text]
    job = build_job(
        model, machine, input_size=input_size, batch=batch, classes=classes, width=width
    )
    if plots is not None:  # better refused now than after the measurement
        check_folder(plots)
    with Console().status("") as status:
        if nproc > 1:
            results = bench_processes(job, entries, repeats=repeats, on_turn=status.update)
        else:
            if not entries:
                entries = prefixes(job, [until(text) for text in boundaries.split(",")], norm)
            facts: dict[str, Any] = {} if strategies else {"norm": norm}
            results = bench_steps(job, entries, repeats=repeats, on_turn=status.update, **facts)
    Console().print((processes_table if nproc > 1 else steps_table)(results))
    write_file(out, results)
    if plots is not None:
        from ..report.page import write_plots  # matplotlib is slow to import
        from ..report.step_plots import plot_modules, read_drops

        drops = read_drops([Path(path) for path in errors.split(",") if path], results)
        write_plots(plot_modules(results, drops), plots)


def _read_entry(text: str, classes: int, nproc: int) -> Entry:
    name = text.partition("(")[0]
    others = {"summed": "greedy", "noised": "stochastic-depth"}
    spec = parse_spec(text.replace(name, others.get(name, name), 1))
    if nproc > 1 and any("modules" in part.arguments.keys() - part.given for part in spec.parts):
        spec = spec.told(modules=nproc)
    schedule = spec.schedule(1, Goal(classes))
    return Entry(text, schedule, name == "summed", name == "noised")
