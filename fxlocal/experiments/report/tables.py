"""The tables of every command, as the terminal shows them."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..training.baselines import other_lengths
from ..training.growth import growing_runs
from ..training.results import (
    boundary_text,
    count_text,
    finished_runs,
    note_of,
    other_models,
    runs_of,
)

__all__ = [
    "bench_table",
    "comparison_table",
    "growth_table",
    "new_table",
    "pca_table",
    "print_growth",
    "sweep_table",
]


def comparison_table(results: Mapping[str, Any], num_layers: int) -> Table:
    """Return the table of ``results.json``: means over the runs that came to their end."""
    title = f"{results['model']} on {results['data']}, {count_text(results['epochs'], 'epoch')}"
    table = new_table(title, "strategy")
    memory, meaning = _memory(results["device"], predicted=results["compile"])
    error = f"{results['metric']} %"
    for heading in (error, "train s", "speed-up", "compile s", memory, "boundary"):
        table.add_column(heading, justify="right")
    all_runs, finished = runs_of(results), finished_runs(results)
    for summary in results["summary"]:
        name, spread = summary["strategy"], summary["error_percent_std"]
        if name not in finished:
            table.add_row(name, "diverged")
            continue
        runs = finished[name]
        boundary = boundary_text(results, name, runs)
        table.add_row(
            name + note_of(all_runs[name]),
            f"{summary['error_percent_mean']:.2f}"
            + ("" if spread is None else f" +- {spread:.2f}"),
            f"{fmean(run['train_seconds'] for run in runs):.1f}",
            f"{summary['speedup']:.2f}x" if summary["speedup"] else "-",
            f"{fmean(run['compile_seconds'] for run in runs):.1f}",
            " -> ".join(_mebibytes(fmean(run["saved_bytes"][i] for run in runs)) for i in (0, -1)),
            f"{boundary} of {num_layers}" if boundary else "-",
        )
    table.caption = f"{memory}: {meaning}, first -> last epoch"
    if lengths := other_lengths(results):
        others = ", ".join(f"{name} {length}" for name, length in lengths.items())
        table.caption += f"\nepochs of {others}"
    for strategy, text in results.get("modules", {}).items():
        table.caption += f"\n{strategy}: {text}"
    if models := other_models(results):
        table.caption += f"\nsgd on another model: {', '.join(models)}"
    return table


def print_growth(results: Mapping[str, Any]) -> None:
    """Print how the batches grew, or that none did."""
    if growing_runs(results):
        Console().print(growth_table(results))
    else:
        print("no batch grew: no boundary freed enough memory; raise --memory-budget")


def growth_table(results: Mapping[str, Any]) -> Table:
    """Return the table of batches that grew; no rows if none did.

    The prediction is compared with the measurement from the second epoch on, as the first
    calibrates it; the share is that of the epoch where they differ most. Compiled networks on a CPU
    are not measured.
    """
    measured = not results["compile"] or str(results["device"]).startswith("cuda")
    table = new_table("Growing batches", "strategy")
    for heading in ("batch", "images/s", "predicted MiB", "measured MiB", "off by at most"):
        table.add_column(heading, justify="right")
    speeds = {row["strategy"]: row["images_per_second"] for row in results["summary"]}
    for name, runs in growing_runs(results).items():
        pairs = [
            pair
            for run in runs
            for pair in list(zip(run["predicted_bytes"], run["saved_bytes"], strict=True))[1:]
        ]
        table.add_row(
            name,
            f"{runs[0]['batch_size'][0]} -> {fmean(run['batch_size'][-1] for run in runs):.0f}",
            f"{speeds[name]:.0f}",
            _mebibytes(fmean(run["predicted_bytes"][-1] for run in runs)),
            _mebibytes(fmean(run["saved_bytes"][-1] for run in runs)) if measured else "-",
            f"{max((abs(p / m - 1) for p, m in pairs if m), default=0):.1%}" if measured else "-",
        )
    table.caption = "MiB: in the last epoch"
    return table


def sweep_table(results: Mapping[str, Any]) -> Table:
    """Return the table of ``sweep.json``; numbers are those in its plots."""
    title = f"{results['strategy']}, {results['model']} on {results['data']}"
    table = new_table(f"{title}, {count_text(results['epochs'], 'epoch')}", "#", "setting")
    for heading in (f"{results['metric']} %", "train s", "speed-up", "Pareto front"):
        table.add_column(heading, justify="right")
    all_runs = runs_of(results)
    for i, row in enumerate(results["summary"]):
        if row["error_percent_mean"] is None:
            table.add_row(str(i), row["strategy"], "diverged")
            continue
        spread = row["error_percent_std"]
        table.add_row(
            str(i),
            row["strategy"] + note_of(all_runs[row["strategy"]]),
            f"{row['error_percent_mean']:.2f}" + ("" if spread is None else f" +- {spread:.2f}"),
            f"{row['train_seconds_mean']:.1f}",
            f"{row['speedup']:.2f}x" if row["speedup"] else "-",
            "yes" if row["on_front"] else "-",
        )
    return table


def pca_table(results: Mapping[str, Any]) -> Table:
    """Return the table of ``pca.json``."""
    table = new_table(f"{results['layer']}, {results['model']} on {results['data']}", "strategy")
    for heading in ("error %", "1st %", "2nd %", "between, plane %", "all %"):
        table.add_column(heading, justify="right")
    for row in results["components"]:
        shares = (*row["explained"], row["separation_plane"], row["separation"])
        numbers = [f"{row['error_percent']:.2f}", *(f"{100 * share:.1f}" for share in shares)]
        table.add_row(row["strategy"], *numbers)
    table.caption = (
        "share of the variance: of the two components;\n"
        "between classes, in their plane and in all features"
    )
    return table


def bench_table(results: Mapping[str, Any]) -> Table:
    """Return the table of what `fxlocal bench` measured."""
    memory, meaning = _memory(results["device"])
    table = new_table(f"{results['model']}, batch of {results['batch_size']}", "mode", "strategy")
    for heading in ("boundary", "step ms", "SGD / own", memory, "first call s"):
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        table.add_row(
            row["mode"],
            row["strategy"],
            f"{row['boundary']} of {results['num_layers']}",
            f"{row['milliseconds']:.1f}",
            f"{row['speedup']:.2f}x",
            _mebibytes(row["saved_bytes"]),
            f"{row['first_call_seconds']:.1f}",
        )
    table.caption = f"{memory}: {meaning}"
    return table


def _memory(device: str, *, predicted: bool = False) -> tuple[str, str]:
    """Return the heading of the bytes of a step, and what they are."""
    if device.startswith("cuda"):
        return "peak MiB", "peak of GPU memory"
    return "saved MiB", "kept for backward" + (", as predicted" if predicted else "")


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table: no frame, little padding; seven columns fit into 80 characters."""
    table = Table(
        title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(column)
    return table


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f}"
