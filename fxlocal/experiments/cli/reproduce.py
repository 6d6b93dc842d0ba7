"""``fxlocal reproduce``: the papers' tables, by default with the papers' settings: hours on a GPU.

Writes results.json, a Markdown page, and each run that ends as a line of runs.jsonl.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..bench.kernels import bench_kernels
from ..papers.runner import choose_cells, reproduce, settings_of
from ..papers.tables import Cell, PaperTable, data_of, find_table, list_tables, shrink
from ..report.bench_tables import kernels_table
from ..report.paper_tables import publish_table
from ..report.tables import new_table
from ..training.baselines import BASELINES
from ..training.checkpoint import command_line
from ..training.results import RunLog, write_results
from ..training.settings import Experiment, Machine, Settings, SettingsError
from ..training.specs import is_model, parse_spec, read_value, split_list, value_text
from .console import compare_with_bars, one_line_errors, refuse_divergence
from .options import (
    ImageChoice,
    ModelChoice,
    Out,
    Overwrite,
    Quiet,
    check_folder,
    expand_groups,
    free_folder,
    integers,
    make_experiment,
    option,
    say_place,
)

__all__ = ["command"]

_IMAGES = ImageChoice(data="")  # the paper's


@one_line_errors
@expand_groups
def command(
    paper: Annotated[str, typer.Argument(help="Which; none lists them", metavar="[PAPER]")] = "",
    table: Annotated[str, typer.Argument(help="The table's number", metavar="[TABLE]")] = "",
    models: Annotated[str, option("Networks; else all of the table's", "Data and model")] = "",
    width: Annotated[int | None, option("Channels of the first stage", "Data and model")] = None,
    small: Annotated[
        bool, option("Narrow networks, generated data", "Data and model", "--small")
    ] = False,
    rows: Annotated[
        list[str] | None, option("Repeatable; else all of the table's", "Strategy")
    ] = None,
    modules: Annotated[str, option("Columns; else all of the table's", "Strategy")] = "",
    told: Annotated[
        list[str] | None, option("NAME=VALUE; the best of VALUE,VALUE", "Strategy", "--set")
    ] = None,
    images: ImageChoice = _IMAGES,
    epochs: Annotated[int | None, option("Passes; default: the paper's", "Training")] = None,
    batch_size: Annotated[int | None, option("Default: the paper's", "Training")] = None,
    lr: Annotated[float | None, option("Default: the paper's", "Training")] = None,
    lr_schedule: Annotated[str | None, option("Default: the paper's", "Training")] = None,
    weight_decay: Annotated[float | None, option("Default: the paper's", "Training")] = None,
    seeds: Annotated[str, option("Default: as many as the paper's", "Training")] = "",
    machine: Machine = Machine(),  # noqa: B008  # frozen
    dtypes: Annotated[str, option("For kernels", "Machine")] = "float32",
    repeats: Annotated[int, option("Likewise", "Machine")] = 20,
    quiet: Quiet = False,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, option("Keep the runs that ended there", "Output", "--resume")] = False,
) -> None:
    """Run a paper's table again, and print ours beside theirs; alone, list them."""
    if not table:
        _list_tables(paper)
        return
    chosen = find_table(paper, table)
    arguments, grids = _read_arguments(told or [])
    if small:
        chosen = shrink(chosen)
        images = _small_images(images, chosen.small["images"])
        width = width or chosen.small["width"]
    images = replace(images, data=data_of(chosen, images.data))
    folder = free_folder(out, f"{paper}-{table}-{images.data}", overwrite or resume)
    if chosen.kernels:
        check_folder(folder)
        _time_kernels(machine, dtypes.split(","), arguments | grids, repeats, folder)
        return
    cells = choose_cells(
        chosen,
        images.data,
        models=models.split(",") if models else (),
        rows=rows or (),
        counts=integers("--modules", modules) if modules else (),
        told=arguments,
        grids=grids,
    )
    for cell in (cell for own in cells.values() for cell in own):  # better refused before training
        if cell.strategy not in BASELINES and not is_model(cell.strategy):
            parse_spec(cell.strategy).told(**cell.arguments).schedule(1)
    given: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size}
    given |= {"weight_decay": weight_decay, "lr": lr, "lr_schedule": lr_schedule}
    own = {name: value for name, value in given.items() if value is not None}
    settings = {model: settings_of(chosen, model, images.data, own) for model in cells}
    numbers = integers("--seeds", seeds) if seeds else list(chosen.seeds)
    first = next(iter(cells))
    experiment = make_experiment(images, ModelChoice(first, width), settings[first], machine)
    if experiment.data.task != chosen.task:
        raise SettingsError(f"table {table} is of {chosen.task}; data {images.data!r} are not")
    check_folder(folder)
    log = RunLog(folder / "runs.jsonl", resume)

    results = reproduce(
        chosen,
        cells,
        settings,
        partial(_train, chosen, experiment, images, width, numbers, log),
        on_results=lambda results: write_results(results, folder),
        command=command_line(),
        **({} if width is None else {"width": width}),
    )
    page = publish_table(chosen, results, experiment.data, folder, width)
    say_place(page, f"table: {page}")
    for own_results in results["networks"].values():
        refuse_divergence(own_results)


def _small_images(images: ImageChoice, usual: Mapping[str, Any]) -> ImageChoice:
    """Return the choice with the usual one where the user made none."""
    if images.data not in ("", usual["data"]):
        return images
    told = {name: value for name, value in vars(images).items() if value not in (None, "")}
    return replace(images, **{**usual, **told})


def _train(
    table: PaperTable,
    experiment: Experiment,
    images: ImageChoice,
    width: int | None,
    seeds: Sequence[int],
    log: RunLog,
    name: str,
    cells: Sequence[Cell],
    settings: Settings,
    on_seed: Callable[[Any], object],
) -> Mapping[str, Any]:
    """Compare the cells of one model."""
    data = experiment.data
    model = ModelChoice(table.model_of(name, data.name, width), width)
    strategies = {
        cell.name: cell.strategy
        if cell.strategy in BASELINES
        else parse_spec(cell.strategy).told(**cell.arguments)
        for cell in cells
        if not is_model(cell.strategy)
    }
    others = {
        cell.name: build for cell in cells for build in model.others([cell.strategy], data).values()
    }
    own = {cell.name: replace(settings, **cell.settings) for cell in cells if cell.settings}
    machine = replace(experiment.machine, threads=None)
    shared: Any = {"images": replace(images, download=False), "machine": machine, "model": model}
    jobs = {
        cell.name: _job(cell, settings=own.get(cell.name, settings), **shared)
        for cell in cells
        if cell.strategy not in BASELINES
    }
    done = {key: run for n, job in jobs.items() for key, run in log.find(job, n, seeds).items()}
    if done:
        print(f"{name}: {len(done)} runs are kept")
    return compare_with_bars(
        replace(experiment, build=partial(model.build, data), settings=settings, model=name),
        strategies,
        seeds,
        others=others,
        settings=own,
        done=done,
        on_model=lambda run, _: log.add(jobs.get(run.strategy), run),
        on_seed=lambda results: on_seed(results.to_json()),
    ).to_json()


def _job(cell: Cell, **parts: Any) -> dict[str, Any]:
    """Return all that the numbers of a cell's runs depend on, but for the speed of a machine."""
    own = {"strategy": cell.strategy, "arguments": dict(cell.arguments)}
    return own | {name: asdict(part) for name, part in parts.items()}


def _read_arguments(texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return arguments of the strategies, and apart from them those with several values."""
    told: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise SettingsError(f"--set {text!r}: give NAME=VALUE, as in k=2")
        values = [read_value(part) for part in split_list(value)]
        if name in told or any(values.count(one) > 1 for one in values):
            raise SettingsError(f"--set {text!r}: give nothing twice")
        told[name] = values
    grids = {name: values for name, values in told.items() if len(values) > 1}
    return {name: values[0] for name, values in told.items() if name not in grids}, grids


def _list_tables(paper: str) -> None:
    table = new_table("", "paper", "table", "what")
    found = [one for one in list_tables() if paper in ("", one.paper)]
    if not found:
        find_table(paper, "")  # says which papers there are
    for one in found:
        table.add_row(one.paper, one.number, one.title)
    Console().print(table)


def _time_kernels(
    machine: Machine, dtypes: Sequence[str], told: Mapping[str, Any], repeats: int, folder: Path
) -> None:
    """Run the table that times kernels and trains nothing."""
    if odd := told.keys() - {"k"}:
        raise SettingsError(f"--set {min(odd)}: the table takes k alone")
    if not isinstance(k := told.get("k", 1), int):
        raise SettingsError(f"--set k={value_text(k)}: give one whole number")
    with Console().status("") as status:
        results = bench_kernels(
            machine, dtypes=dtypes, repeats=repeats, on_row=status.update, **told
        )
    for dtype in dtypes:
        Console().print(kernels_table(results, dtype))
    write_results(results, folder)
    say_place(folder)
