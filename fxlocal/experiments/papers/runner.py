"""The tables of the papers, run again: what they say, and ours beside it.

A paper's numbers are a JSON file of this folder: by table, data, model and row; of a table with
columns, a row is a list over them, as far as the paper has numbers. ``methods`` says by which
strategy a row is made, and its arguments.

Where ours differ from the papers' (GA: gradient approximation):

| | theirs | here |
|---|---|---|
| error | of the best of every tenth epoch (GA) | the same and the last epoch's, mean over seeds |
| accuracy loss | points below full gradients | the same, each seed against its own |
| GA's speed-up | time saved, in percent of full gradients' | the same, of training seconds |
| learning rate | left open (GA) | 1e-3 down to a hundredth |
| | its fall "optimized in each network" (BackLink) | to zero along a cosine |
| weight decay | left open (GA; AlexNet of BackLink) | none; that of VGG-16 |
| DGL | modules on several GPUs, each at its own pace | one process, each a batch behind |

That the speed-up of GA is 1 - t / t_full and not t_full / t - 1 we read from
two numbers: the second cannot be below -100 % (Table 4), and a third of the time saved in a quarter
of the cells is its "theoretical maximum speedup of around 8 percent" (section 2).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean, stdev
from typing import Any, TypeAlias

from ...errors import nearest
from ..training.baselines import at_equal_error
from ..training.results import finished_runs
from ..training.settings import Settings, SettingsError
from .tables import Cell, PaperTable, find_table

__all__ = ["KERNELS", "choose_cells", "reproduce", "settings_of", "tabulate"]

Results: TypeAlias = Mapping[str, Any]
Train: TypeAlias = Callable[[str, "Sequence[Cell]", Settings, Callable[[Results], object]], Results]

KERNELS = {
    (int(given), int(made), int(size)): numbers
    for shape, numbers in find_table("gradient-approximation", "1").kernels.items()
    for given, made, size in [shape.split(",")]
}


def choose_cells(
    table: PaperTable,
    data: str,
    *,
    models: Sequence[str] = (),
    rows: Sequence[str] = (),
    counts: Sequence[int] = (),
    told: Mapping[str, Any] | None = None,
    grids: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, list[Cell]]:
    """Return the cells to run, by model; each has the plain one, made by sgd, first.

    Args:
        table: which.
        data: what is to be learned; the numbers are the paper's on the same, if it has them.
        models: of the table's; none means all.
        rows: likewise.
        counts: columns, likewise.
        told: arguments of the strategies in place of the table's.
        grids: those of which each value makes a cell of its own.

    Raises:
        SettingsError: if something is not in the table, a row has no number in the columns, an
            argument changes nothing about the strategies, or rows stand together.
    """
    if table.budgets and rows:
        raise SettingsError(f"--rows {','.join(rows)}: each line needs all rows; leave it out")
    told, grids, numbers = told or {}, grids or {}, table.numbers[table.theirs_on(data)]
    _refuse_unknown("models", models, numbers)
    every = [cell for model in models or numbers for cell in table.cells(model, data, told, grids)]
    _refuse_unknown("rows", rows, [cell.row for cell in every if cell.strategy != "sgd"])
    columns = [f"K={cell.modules}" for cell in every if cell.modules]
    _refuse_unknown("modules", [f"K={count}" for count in counts], columns)
    chosen = [
        cell
        for cell in every
        if cell.strategy == "sgd"
        or ((not rows or cell.row in rows) and (not counts or cell.modules in counts))
    ]
    for row in rows:
        if not any(cell.row == row for cell in chosen):
            asked = ", ".join(f"K={count}" for count in counts)
            there = dict.fromkeys(str(cell.modules) for cell in every if cell.row == row)
            raise SettingsError(f"row {row} has no column {asked}; it has K={', '.join(there)}")
    for option in [*told, *grids]:
        if not any(option in cell.arguments for cell in chosen):
            names = ", ".join(dict.fromkeys(cell.strategy for cell in chosen))
            raise SettingsError(f"--set {option}: changes nothing about {names}; leave it out")
    return {model: [c for c in chosen if c.model == model] for model in models or numbers}


def _refuse_unknown(option: str, asked: Sequence[str], known: Iterable[str]) -> None:
    for name in asked:
        if name not in known:
            near = nearest(name, dict.fromkeys(known))
            raise SettingsError(
                f"--{option} {','.join(asked)}: the table has no {name!r}. Nearest: {near}"
            )


def settings_of(
    table: PaperTable, model: str, data: str, told: Mapping[str, Any] | None = None
) -> Settings:
    """Return how the paper trains ``model``, but for what a user told."""
    own = {"title", "large", "arguments"}
    network = {name: value for name, value in table.networks[model].items() if name not in own}
    on_data = table.settings_on.get(data, {})
    return Settings(**{**table.settings, **network, **on_data, **(told or {})})


def reproduce(
    table: PaperTable,
    cells: Mapping[str, Sequence[Cell]],
    settings: Mapping[str, Settings],
    train: Train,
    on_results: Callable[[dict[str, Any]], object] = lambda results: None,
    **facts: Any,
) -> dict[str, Any]:
    """Run the cells, and set ours beside theirs.

    Args:
        table: which.
        cells: as `choose_cells` returned them.
        settings: how to train each model.
        train: is given a model, its cells, its settings and what to call with the results after
            each seed; returns the results of a comparison in which each cell's runs have its name.
        on_results: called with all results so far after each seed.
        facts: what more to record of each network, such as its width.

    Returns:
        What the paper is, "networks": the results by model, and "rows": one dict per cell. Ready
        for JSON.
    """
    networks: dict[str, Results] = {}
    whole: dict[str, Any] = {"paper": table.paper, "table": table.number}

    def keep(model: str, results: Results) -> None:
        networks[model] = {**results, "settings": asdict(settings[model]), **facts}
        rows = [
            row
            for name, own in networks.items()
            for row in tabulate(cells[name], at_equal_error(own) if table.equal_error else own)
        ]
        whole.update(networks=dict(networks), rows=rows)
        on_results(dict(whole))

    for model, own in cells.items():
        keep(model, train(model, own, settings[model], partial(keep, model)))
    return whole


_SUMMARISED = ("error_percent_mean", "error_percent_std", "speedup")


def tabulate(cells: Sequence[Cell], results: Results) -> list[dict[str, Any]]:
    """Return our numbers and the paper's for each cell; None of what diverged or is not given."""
    finished = finished_runs(results)
    plain = {run["seed"]: run for run in finished.get("sgd", ())}
    summary = {row["strategy"]: row for row in results["summary"]}
    rows = []
    for cell in cells:
        # Of a baseline there is nothing if its reference diverged.
        runs, own = finished.get(cell.name, []), summary.get(cell.name, {})
        pairs = [(r, plain[r["seed"]]) for r in runs if r["seed"] in plain]
        losses = [r["error_percent"] - sgd["error_percent"] for r, sgd in pairs]
        best_losses = [min(r["errors"]) - min(sgd["errors"]) for r, sgd in pairs]
        rows.append(
            {
                "network": cell.model,
                "row": cell.row,
                "method": cell.strategy,
                "modules": cell.modules,
                "link": cell.arguments.get("link", 0),
                "arguments": dict(cell.arguments),
                "setting": dict(cell.setting),
                "epochs": fmean(len(run["loss"]) for run in runs) if runs else None,
                "reached": all(run.get("reached", True) for run in runs),
                **{key: own.get(key) for key in _SUMMARISED},
                **_spread("error_loss", losses),
                **_spread("best_error_percent", [min(run["errors"]) for run in runs]),
                **_spread("best_error_loss", best_losses),
                "saved_bytes": max((run["saved_bytes"][-1] for run in runs), default=None),
                "train_seconds_mean": fmean(r["train_seconds"] for r in runs) if runs else None,
                "paper": dict(cell.paper),
            }
        )
    return rows


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard deviation over seeds; None of too few."""
    mean, several = fmean(values) if values else None, len(values) > 1
    return {f"{name}_mean": mean, f"{name}_std": stdev(values) if several else None}
