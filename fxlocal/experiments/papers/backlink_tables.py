"""BackLink's Tables 1 and 2, run again: ``fxlocal table backlink-1`` and ``backlink-2``.

The paper's numbers are in `fxlocal.experiments.papers.backlink_numbers`; cells that it leaves empty
are empty here. K = 1 is back-propagation.

| | the paper | here |
|---|---|---|
| error | mean of 5 trials | the last epoch's, mean over the seeds |
| split | equal numbers of blocks | the same |
| alpha | the best of five values for each network | ``--alpha`` |
| learning rate | its fall "optimized in each network" | down to zero along a cosine |
| AlexNet's weight decay | not given | that of VGG-16 |
| DGL | modules on several GPUs, each at its own pace | one process: each module a batch behind |
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, stdev
from typing import Annotated, Any

import typer

from ...errors import nearest
from ..cli.console import one_line_errors, refuse_divergence
from ..cli.jobs import describe_job, refuse_idle, run_strategies
from ..cli.options import (
    ImageChoice,
    ModelChoice,
    Out,
    Overwrite,
    check_folder,
    expand_groups,
    free_folder,
    integers,
)
from ..data.catalogue import Data
from ..report.pages import find_table, publish_table
from ..training.compare import write_results
from ..training.results import count_text, finished_runs
from ..training.settings import Machine, Settings, SettingsError
from ..training.strategies import Options
from .backlink_numbers import BACKLINK_TABLES, COUNTS, NETWORKS, Cell, Errors, find_cells

__all__ = ["backlink_table_command", "tabulate"]

_IMAGES = ImageChoice(data="cifar10")
_SETTINGS = Settings(batch_size=512, lr_schedule="cosine", evaluate_every=10)


@one_line_errors
@expand_groups
def backlink_table_command(
    name: Annotated[str, typer.Argument(hidden=True)],
    models: Annotated[
        str, typer.Option(help=f"Separated by commas, of {', '.join(NETWORKS)}; default: all")
    ] = "",
    modules: Annotated[str, typer.Option(help="Columns, separated by commas")] = "2,4,8,16",
    rows: Annotated[
        str, typer.Option(help="Separated by commas, as in GLL,l=1; default: the paper's")
    ] = "",
    alpha: Annotated[float, typer.Option(help="Weight of the local error in linked blocks")] = 0.5,
    width: Annotated[
        int | None, typer.Option(help="Channels of the first stage; default: the model's usual")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images; default: the paper's")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate at the start; default: the paper's")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay; default: the paper's")
    ] = None,
    images: ImageChoice = _IMAGES,
    settings: Settings = _SETTINGS,
    machine: Machine = Machine(),  # noqa: B008  # frozen
    seeds: Annotated[str, typer.Option(help="Separated by commas")] = "0,1,2,3,4",
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a table of the BackLink paper again, and print ours beside theirs.

    Defaults are the paper's settings: days on a GPU. Writes results.json and backlink-N.md.
    """
    table = find_table(name, BACKLINK_TABLES)
    theirs = images.data if images.data in table.errors else "cifar10"
    errors = table.errors[theirs]
    chosen = _choose("models", models, errors)
    methods = _choose("rows", rows, [row for model in chosen for row in errors[model][1]])
    counts = integers("--modules", modules)
    if odd := sorted(set(counts) - set(COUNTS)):
        known = ", ".join(map(str, COUNTS))
        raise SettingsError(
            f"--modules {modules}: the table has no column K={odd[0]}; give some of {known}"
        )
    cells = {model: find_cells(errors[model], counts, methods) for model in chosen}
    _refuse_empty_rows(methods if rows else [], [errors[model] for model in chosen], counts)
    given = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay}
    told = {key: value for key, value in given.items() if value is not None}
    trainings = {
        model: replace(settings, **{**NETWORKS[model].settings, **told}) for model in chosen
    }
    options = Options(head=table.head, balance="blocks", alpha=alpha)
    strategies = [cell.strategy for own in cells.values() for cell in own]
    refuse_idle(list(dict.fromkeys(strategies)), options, trainings[chosen[0]])
    numbers = integers("--seeds", seeds)
    folder = free_folder(out, f"table-{name}-{images.data}", overwrite)
    data = images.load()
    if data.task != "classification":
        raise SettingsError(f"data {data.name!r} has no class per image to be right about")
    machine.set_threads(data.shape)
    check_folder(folder)
    networks: dict[str, dict[str, Any]] = {}

    def write(model: str, results: Mapping[str, Any]) -> None:
        networks[model] = {**results, **describe_job(trainings[model], options, width)}
        tabulated = [row for m, own in networks.items() for row in tabulate(m, cells[m], own)]
        write_results({"table": name, "networks": networks, "rows": tabulated}, folder)

    for model in chosen:
        contestants = {
            cell.name: (cell.strategy, replace(options, modules=cell.modules, link=cell.link))
            for cell in cells[model]
        }
        run_strategies(
            *(data, ModelChoice(model, width), contestants, numbers, trainings[model]),
            *(machine, options),
            on_seed=partial(write, model),
        )
    title = f"Table {name[-1]}: errors in percent with {table.title}, ours (the paper's)"
    header, lines = _lines(cells, networks, counts)
    caption = _caption(networks, data, width, theirs)
    publish_table(title, header, lines, caption, folder / f"{name}.md")
    for results in networks.values():
        refuse_divergence(results)


def _choose(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Return what ``text`` lists, of what there is; all of it if it says nothing."""
    known = list(dict.fromkeys(known))
    chosen = list(dict.fromkeys(text.split(","))) if text else known
    for name in chosen:
        if name not in known:
            raise SettingsError(
                f"--{option} {text}: the table has no {name!r}. Nearest: {nearest(name, known)}"
            )
    return chosen


def _refuse_empty_rows(
    rows: Sequence[str], networks: Sequence[Errors], counts: Sequence[int]
) -> None:
    """Refuse ``rows`` without a number in the columns, and columns in which no row has any."""
    numbers: dict[str, int] = {}  # of the paper's, from the first column on
    for _, methods in networks:
        for row, own in methods.items():
            numbers[row] = max(numbers.get(row, 0), len(own))
    empty = [row for row, num in numbers.items() if not set(COUNTS[:num]) & set(counts)]
    for row in empty:
        if row in rows or len(empty) == len(numbers):
            asked = ", ".join(f"K={count}" for count in counts)
            there = ", ".join(map(str, COUNTS[: numbers[row]]))
            raise SettingsError(f"row {row} has no column {asked}; it has K={there}")


def tabulate(model: str, cells: Sequence[Cell], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return our numbers and the paper's for each cell; None of what diverged."""
    finished = finished_runs(results)
    plain = {run["seed"]: run["error_percent"] for run in finished.get("sgd", ())}
    summary = {row["strategy"]: row for row in results["summary"]}
    rows = []
    for cell in cells:
        runs = finished.get(cell.name, [])
        losses = [r["error_percent"] - plain[r["seed"]] for r in runs if r["seed"] in plain]
        rows.append(
            {
                "network": model,
                "row": cell.row,
                "method": cell.strategy,
                "modules": cell.modules,
                "link": cell.link,
                "error_percent_mean": summary[cell.name]["error_percent_mean"],
                "error_percent_std": summary[cell.name]["error_percent_std"],
                "error_loss_mean": fmean(losses) if losses else None,
                "error_loss_std": stdev(losses) if len(losses) > 1 else None,
                "saved_bytes": max((run["saved_bytes"][-1] for run in runs), default=None),
                "train_seconds_mean": fmean(r["train_seconds"] for r in runs) if runs else None,
                "paper": {"error_percent": cell.paper},
            }
        )
    return rows


def _lines(
    cells: Mapping[str, Sequence[Cell]],
    networks: Mapping[str, Mapping[str, Any]],
    counts: Sequence[int],
) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines: one per network and method, a column per K."""
    columns = (1, *sorted(counts))
    lines = []
    for model, own in cells.items():
        texts: dict[str, dict[int, str]] = {}
        for cell, row in zip(own, tabulate(model, own, networks[model]), strict=True):
            texts.setdefault(cell.row, {})[cell.modules] = _text(row)
        for row_name, found in texts.items():
            lines.append(
                [NETWORKS[model].title, row_name, *(found.get(count, "-") for count in columns)]
            )
    return ["", "", *(f"K={count}" for count in columns)], lines


def _text(row: Mapping[str, Any]) -> str:
    mean, spread = row["error_percent_mean"], row["error_percent_std"]
    if mean is None:
        return "diverged"
    ours = f"{mean:.2f}" if spread is None else f"{mean:.2f} +- {spread:.2f}"
    return f"{ours} ({row['paper']['error_percent']})"


def _caption(
    networks: Mapping[str, Mapping[str, Any]], data: Data, width: int | None, theirs: str
) -> list[str]:
    """Say what ours were run on, and theirs."""
    first = next(iter(networks.values()))
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run["seed"] for run in first["runs"]))
    shape, num = "x".join(map(str, data.shape)), len(data.train)  # type: ignore[arg-type]
    lines = [
        f"ours: {data.name}, {num} images of {shape}; seeds {seeds}; alpha "
        f"{first['options']['alpha']:g}; last epoch, mean +- std;",
        f"  {first['device']}{', compiled' if first['compile'] else ''}, "
        f"torch {first['versions']['torch']};",
    ]
    shown_width = "" if width is None else f" (width {width})"
    for model, results in networks.items():
        settings = results["settings"]
        lines.append(
            f"  {model}{shown_width}: {count_text(settings['epochs'], 'epoch')}, "
            f"{settings['optimizer']}, learning rate {settings['lr']:g} "
            f"({settings['lr_schedule']}), batch of {settings['batch_size']}"
        )
    lines.append(f"paper: {theirs}, best alpha and learning rate of each network, 5 trials")
    lines.append("K modules, errors back over l blocks; K=1 is back-propagation")
    return lines
