"""The tables of every command, as the terminal shows them."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..bench.spread import explain_spread, spread_text
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
    FIRST,
    KEPT,
    OF_BYTES,
    OF_TIME,
    SPEEDUP,
    STEP,
    TRAIN,
    memory_heading,
    memory_name,
)

__all__ = [
    "class_table",
    "comparison_table",
    "decimal",
    "growth_table",
    "kernels_table",
    "new_table",
    "print_growth",
    "processes_table",
    "ranks_table",
    "steps_table",
    "summary_rows",
    "sweep_table",
]

Results: TypeAlias = Mapping[str, Any]


def summary_rows(results: Results) -> list[dict[str, str]]:
    """Return what is shown of each strategy, nothing where nothing is known.

    Numbers are means over the runs that came to their end.
    """
    all_runs, finished = runs_of(results), finished_runs(results)
    rows = []
    for row in results["summary"]:
        name = row["strategy"]
        runs = finished.get(name, [])
        first, last = (_mean([run["saved_bytes"][i] / 2**20 for run in runs]) for i in (0, -1))
        rows.append(
            {
                "strategy": name,
                "error": decimal(row["error_percent_mean"], 2),
                "spread": decimal(row["error_percent_std"], 2),
                "seconds": _mean([run["train_seconds"] for run in runs]),
                "speedup": decimal(row["speedup"], 2),
                "time": decimal(1 / row["speedup"], 2) if is_number(row["speedup"]) else "",
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
    return row["strategy"] + row["note"], error, row["seconds"], row["time"] or "-"


def comparison_table(results: Results, num_layers: int) -> Table:
    """Return the table of ``results.json``."""
    title = f"{results['model']} on {results['data']}, {count_text(results['epochs'], 'epoch')}"
    memory = memory_heading(results["device"])
    headings = (f"{results['metric']} %", TRAIN, OF_TIME, COMPILE, memory, "boundary")
    more = (f"cold {EPOCH}", f"warm {EPOCH}") if (epochs := epoch_columns(results)) else ()
    table = new_table(title, "strategy", right=[*headings, *more])
    for index in (1, 4, 5):  # in a narrow terminal the name folds, not what is set beside others
        table.columns[index].no_wrap = True
    for row in summary_rows(results):
        boundary = f"{row['boundary']} of {num_layers}" if row["boundary"] else "-"
        kept = f"{row['memory_first']} -> {row['memory_last']}"
        last: tuple[str, ...] = (row["compiling"], kept, boundary, *epochs.get(row["strategy"], ()))
        table.add_row(*_first_texts(row), *(last if row["error"] else ()))
    meaning = memory_name(results["device"], results["compile"])
    notes = [f"{memory}: {meaning}, first -> last epoch"]
    notes += ["cold, warm: at a new boundary, where a cache is filled, and later"] if epochs else []
    if lengths := other_lengths(results):
        notes.append("epochs of " + ", ".join(map(" ".join, lengths.items())))
    notes += [f"{strategy}: {text}" for strategy, text in results.get("modules", {}).items()]
    notes += [f"MFLOPs of {name}, forward: {text}" for name, text in _pruned(results).items()]
    notes += [f"MB that each rank sent an epoch, {n}: {t}" for n, t in _sent(results).items()]
    notes += [f"sgd on another model: {', '.join(m)}" for m in [other_models(results)] if m]
    table.caption = "\n".join(notes)
    return table


def _sent(results: Results) -> dict[str, str]:
    """Return what a rank sent in the first and the last epoch, in runs on several."""
    texts = {}
    for name, runs in finished_runs(results).items():
        if all(run.get("wire_bytes") for run in runs):
            first, last = (fmean(run["wire_bytes"][i] / 1e6 for run in runs) for i in (0, -1))
            texts[name] = f"{first:.1f} -> {last:.1f}"
    return texts


def _pruned(results: Results) -> dict[str, str]:
    """Return the FLOPs of an image in the first and the last epoch, of models that were pruned."""
    texts = {}
    for name, runs in finished_runs(results).items():
        counts = [run.get("flops") or [0] for run in runs]  # older results have none
        first, last = (fmean(count[i] / 1e6 for count in counts) for i in (0, -1))
        if first != last:
            texts[name] = f"{first:.1f} -> {last:.1f} ({last / first:.0%})"
    return texts


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
    return table


STEP_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "mode": lambda row: row["mode"],
    "strategy": lambda row: row["strategy"],
    "boundary": lambda row: f"{row['boundary']} of {row['of']}" if row["boundary"] else "",
    STEP: lambda row: spread_text(row, "milliseconds", ".1f"),
    OF_TIME: lambda row: spread_text(row, "time_ratio", ".2f", same=1),
    KEPT: lambda row: _shown(row["saved_bytes"], _mebibytes),
    OF_BYTES: lambda row: _shown(row["memory_ratio"], lambda ratio: f"{ratio:.2f}"),
    "switching %": lambda row: _switching(row),
    "exact": lambda row: f"{len(row['exact_layers'])} of {row['num_layers']}".removesuffix(
        "0 of 0"
    ),
    FIRST: lambda row: f"{row['first_turn_seconds']:.1f}",
}


def steps_table(results: Results) -> Table:
    """Return the table of what `bench_steps` measured; of the columns, those that say something."""
    rows = [{**row, "of": results["num_layers"]} for row in results["rows"]]
    columns = {name: [text(row) for row in rows] for name, text in STEP_COLUMNS.items()}
    columns = {name: texts for name, texts in columns.items() if any(texts)}
    if len(set(columns["mode"])) == 1:
        del columns["mode"]
    left = [name for name in columns if name in ("mode", "strategy")]
    title = f"{results['model']}, batch of {results['batch_size']}, {results['device']}"
    heading = {KEPT: memory_heading(results["device"])}
    right = [heading.get(name, name) for name in columns if name not in left]
    table = new_table(title, *left, right=right)
    for texts in zip(*columns.values(), strict=True):
        table.add_row(*(text or "-" for text in texts))
    notes = [explain_spread(results["repeats"]), f"MiB: {memory_name(results['device'])}"]
    if "switching %" in columns:
        notes.append("switching: time added to the mean of the columns")
    if "exact" in columns:
        notes.append("exact: layers left exact, because TopK is no faster there")
    if heads := {row["head"] for row in rows} - {None}:
        notes.append(f"K modules, l blocks linked, {' and '.join(sorted(heads))} heads")
    table.caption = "; ".join(notes)
    return table


def _switching(row: Mapping[str, Any]) -> str:
    known = row["switching_percent"] is not None
    return spread_text(row, "switching_percent", "+.1f", same=0) if known else ""


def processes_table(results: Results) -> Table:
    """Return the table of what `bench_processes` measured."""
    title = f"{results['model']}, batch of {results['batch_size']}, {results['device']}"
    headings = ("modules", "link", f"SGD's {STEP}", f"one process's {STEP}", f"parallel {STEP}")
    headings += (SPEEDUP, OF_TIME)
    table = new_table(title, "strategy", right=headings)
    for row in results["rows"]:
        table.add_row(
            row["strategy"],
            str(row["modules"]),
            str(row["link"]),
            *(
                spread_text(row, f"{side}_milliseconds", ".1f")
                for side in ("sgd", "single", "parallel")
            ),
            *(spread_text(row, key, ".2f", same=1) for key in ("speedup", "time_ratio")),
        )
    table.caption = (
        f"{SPEEDUP}: of parallel over one process; {OF_TIME}: parallel, of one process's\n"
        "back-propagation; one process has all threads, parallel ones share them;\n"
        + explain_spread(results["repeats"])
    )
    return table


def ranks_table(results: Results) -> Table:
    """Return the table of what `bench_ranks` measured."""
    nproc, batch = results["nproc"], results["batch_size"]
    title = f"{results['model']}, {nproc} ranks with {batch} images each, {results['device']}"
    headings = ("layer", "Mbit/s", "MB sent", f"alone {STEP}", STEP, "images/s")
    headings += (f"alone {OF_TIME}", OF_TIME, f"{SPEEDUP} kept")
    table = new_table(title, "strategy", right=headings)
    for row in results["rows"]:
        table.add_row(
            row["strategy"],
            str(row["boundary"]),
            decimal(row["wire_megabits"], 0) or "all",
            f"{row['wire_bytes'] / 1e6:.1f}",
            *(spread_text(row, key, ".1f") for key in ("alone_milliseconds", "milliseconds")),
            f"{row['images_per_second']:.0f}",
            *(
                spread_text(row, key, ".2f", 1)
                for key in ("time_ratio_alone", "time_ratio", "kept")
            ),
        )
    table.caption = (
        "alone: in one process with the threads of a rank; SGD of several ranks is under\n"
        f"DistributedDataParallel; {SPEEDUP} kept: the {SPEEDUP} on all ranks over that alone;\n"
        + explain_spread(results["repeats"])
    )
    return table


def kernels_table(results: Results, dtype: str) -> Table:
    """Return the table of what `bench_kernels` measured in one dtype."""
    title = (
        f"Weight gradient of 3x3 convolutions, TopK({results['k']}) against dense, ms: "
        f"batch of {results['batch_size']}, {dtype}, {results['device']}"
    )
    compiled = ["compiled"] if any(row["speedup_compiled"] for row in results["rows"]) else []
    headings = ["dense", "TopK", "stages", SPEEDUP, "copied", *compiled]
    headings += ["predicted", "chosen", "paper", "bar"]
    table = new_table(title, "C_i,C_o,H", right=headings)
    table.padding = 0  # the columns fit into 80 characters, but for the quartiles
    for row in results["rows"]:
        if row["dtype"] != dtype:
            continue
        ms, times = row["milliseconds"], row["predicted"]["channels_last"]
        stages = [ms[stage]["channels_last"] for stage in ("select", "accumulate") if stage in ms]
        table.add_row(
            f"{row['channels_in']},{row['channels_out']},{row['size']}",
            f"{ms['dense'][row['dense_layout']]:.3g}",
            f"{ms['topk']['channels_last']:.3g}",
            "+".join(f"{stage:.2g}" for stage in stages) or "-",
            *(
                spread_text(row, f"speedup{name}", ".1f", same=1)
                for name in ("", "_contiguous", *(f"_{name}" for name in compiled))
            ),
            _times(times["exact"] / times["topk"]),
            _times(row["speedup_chosen"]),
            _times(row["paper"]),
            _times(row["bar"]),
        )
    table.caption = (
        explain_spread(results["repeats"])
        + "; stages: selection + accumulation; copied: speed-up from contiguous tensors; "
        "compiled: by torch.compile; predicted: "
        "by the cost model; chosen: speed-up after its choice; bar: what is to be reached"
    )
    return table


def new_table(title: str, *left: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table: no frame, little padding; seven columns fit into 80 characters."""
    table = Table(
        title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for heading in (*left, *right):
        # A spec is long, and not to be cut off; a share's heading is wider than its numbers.
        told, side = heading.replace("SGD's ", "SGD's\n"), "right" if heading in right else "left"
        table.add_column(told, justify=side, overflow="fold")  # type: ignore[arg-type]
    return table


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


def _times(ratio: float | None) -> str:
    return _shown(ratio, lambda known: f"{known:.1f}x") or "-"


def _shown(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)
