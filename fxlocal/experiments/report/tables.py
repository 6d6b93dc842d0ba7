"""The tables of runs, as the terminal shows them; and what every table is made of."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..bench.spread import spread_text
from ..training.baselines import other_lengths
from ..training.growth import growing_runs
from ..training.results import (
    boundary_text,
    count_text,
    end_of,
    epoch_columns,
    finished_runs,
    is_number,
    note_of,
    other_models,
    range_text,
    runs_of,
)
from .words import (
    COMPILE,
    EPOCH,
    OF_TIME,
    TRAIN,
    differ_when_equal,
    explain_noise,
    memory_heading,
    memory_name,
    time_ratios,
    time_text,
)

__all__ = [
    "class_table",
    "comparison_table",
    "decimal",
    "growth_table",
    "new_table",
    "print_growth",
    "spread_cell",
    "summary_rows",
    "sweep_table",
]

Results: TypeAlias = Mapping[str, Any]


def summary_rows(results: Results) -> list[dict[str, str]]:
    """Return what is shown of each strategy, nothing where nothing is known.

    Numbers are means over the runs that came to their end.
    """
    all_runs, finished = runs_of(results), finished_runs(results)
    apart, rows = differ_when_equal(results), list[dict[str, str]]()
    for row in results["summary"]:
        name = row["strategy"]
        runs = finished.get(name, [])
        time, between = "", ""
        if is_number(row["speedup"]):
            time, between = time_text(1 / row["speedup"], time_ratios(results, name), apart)
        first, last = (_mean([run["saved_bytes"][i] / 2**20 for run in runs]) for i in (0, -1))
        rows.append(
            {
                "strategy": name,
                "error": decimal(row["error_percent_mean"], 2),
                "spread": decimal(row["error_percent_std"], 2),
                "seconds": _mean([run["train_seconds"] for run in runs]),
                "time": time,
                "time_range": between,
                "compiling": _mean([run["compile_seconds"] for run in runs]),
                "memory_first": first,
                "memory_last": last,
                "boundary": boundary_text(results, name, runs),
                "batch": range_text(n for run in runs for n in run["batch_size"]),
                "images": decimal(row.get("images_per_second"), 0),
                "seeds": str(len(all_runs[name])),
                "note": note_of(all_runs[name], results["epochs"]),
                "end": end_of(all_runs[name][-1], results["epochs"]),
            }
        )
    return rows


def _first_texts(row: Mapping[str, str]) -> tuple[str, ...]:
    """Return what a table of strategies begins with; of those without an error it is all."""
    if not row["error"]:
        return row["strategy"], row["end"]
    error = row["error"] + (f" +- {row['spread']}" if row["spread"] else "")
    return (
        row["strategy"] + row["note"],
        error,
        row["seconds"],
        f"{row['time'] or '-'}\n{row['time_range'].strip('()')}".strip(),
    )


def comparison_table(results: Results, num_layers: int) -> Table:
    """Return the table of ``results.json``."""
    title = f"{results['model']} on {results['data']}, {count_text(results['epochs'], 'epoch')}"
    memory = memory_heading(results["device"])
    headings = (f"{results['metric']} %", TRAIN, OF_TIME, COMPILE, memory, "boundary")
    more = (f"cold {EPOCH}", f"warm {EPOCH}") if (epochs := epoch_columns(results)) else ()
    table = new_table(title, "strategy", right=[*headings, *more])
    table.padding = 0  # else names fold where seeds have a range
    for row in summary_rows(results):
        boundary = f"{row['boundary']} of {num_layers}" if row["boundary"] else "-"
        kept = f"{row['memory_first']} -> {row['memory_last']}"
        last: tuple[str, ...] = (row["compiling"], kept, boundary, *epochs.get(row["strategy"], ()))
        table.add_row(*_first_texts(row), *(last if row["error"] else ()))
    meaning = memory_name(results["device"], results["compile"])
    notes = [f"{memory}: {meaning}, first -> last epoch", explain_noise(results)]
    notes += ["cold, warm: at a new boundary, where a cache is filled, and later"] if epochs else []
    if lengths := other_lengths(results):
        notes.append("epochs of " + ", ".join(map(" ".join, lengths.items())))
    notes += [f"{strategy}: {text}" for strategy, text in results.get("modules", {}).items()]
    for name, a, b in _ends(results, "flops"):
        if a != b:
            notes.append(f"MFLOPs of {name}, forward: {a:.1f} -> {b:.1f} ({b / a:.0%})")
    for name, a, b in _ends(results, "wire_bytes"):
        notes.append(f"MB that each rank sent an epoch, {name}: {a:.1f} -> {b:.1f}")
    notes += [f"sgd on another model: {', '.join(m)}" for m in [other_models(results)] if m]
    table.caption = "\n".join(notes)
    return table


def _ends(results: Results, key: str) -> Iterator[tuple[str, float, float]]:
    """Yield strategies, and millions in the first and the last epoch, where all runs have some."""
    for name, runs in finished_runs(results).items():
        if all(run.get(key) for run in runs):
            first, last = (fmean(run[key][i] / 1e6 for run in runs) for i in (0, -1))
            yield name, first, last


def print_growth(results: Results) -> None:
    """Print how the batches grew, or that none did."""
    if growing_runs(results):
        Console().print(growth_table(results))
    else:
        print("no batch grew: no boundary freed enough memory; raise --memory-budget")


def growth_table(results: Results) -> Table:
    """Return the table of batches that grew; no rows if none did.

    The prediction is compared with the measurement from the second epoch on, as the first
    calibrates it; the share is that of the epoch where they differ most. Compiled networks on a CPU
    are not measured.
    """
    measured = not results["compile"] or str(results["device"]).startswith("cuda")
    headings = ("batch", "images/s", "predicted MiB", "measured MiB", "off by at most")
    table = new_table("Growing batches", "strategy", right=headings)
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


def sweep_table(results: Results) -> Table:
    """Return the table of ``sweep.json``; numbers are those in its plots."""
    title = f"{results['strategy']}, {results['model']} on {results['data']}"
    headings = (f"{results['metric']} %", TRAIN, OF_TIME, "Pareto front")
    title += f", {count_text(results['epochs'], 'epoch')}"
    table = new_table(title, "#", "setting", right=headings)
    for i, (row, entry) in enumerate(zip(summary_rows(results), results["summary"], strict=True)):
        front = ("yes" if entry["on_front"] else "-",) if row["error"] else ()
        table.add_row(str(i), *_first_texts(row), *front)
    table.caption = explain_noise(results)
    return table


def new_table(title: str, *left: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table: no frame, little padding; seven columns fit into 80 characters."""
    table = Table(
        title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for heading in (*left, *right):
        # A spec is long, and not to be cut off: in a narrow terminal it folds, and no number does.
        table.add_column(
            # These are wider than the numbers below them.
            heading.replace("SGD's ", "SGD's\n").replace("compile ", "compile\n"),
            justify="right" if heading in right else "left",
            no_wrap=heading in right,
            overflow="fold",
        )
    return table


def spread_cell(row: Results, name: str, form: str, same: float | None = None) -> str:
    """Return `spread_text` with the quartiles on a line of their own: columns are narrow."""
    return spread_text(row, name, form, same).replace(" ", "\n")


def class_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Return the table of ``fxlocal evaluate``: each class in percent, and how often it is."""
    shares = ("precision", "recall", "f1")
    *_, counted = rows[0]  # images or pixels
    table = new_table(title, "class", right=[*(f"{name} %" for name in shares), counted])
    for row in rows:
        shown = (decimal(row[name], 1) or "-" for name in shares)
        table.add_row(row["class"], *shown, str(row[counted]))
    return table


def decimal(value: object, digits: int) -> str:
    """Return a number with so many digits behind the point; nothing of what is no number."""
    return f"{value:.{digits}f}" if is_number(value) else ""


def _mean(values: Sequence[float]) -> str:
    return decimal(fmean(values), 1) if values else ""


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f}"
