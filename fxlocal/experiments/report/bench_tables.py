"""The tables of what was measured in turns, but for `fxlocal.experiments.report.front`."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from rich.table import Table

from ..bench.cached import COMPARED
from ..bench.spread import explain_spread
from .tables import decimal, new_table, spread_cell
from .words import EPOCH, FIRST, KEPT, OF_BYTES, OF_TIME, SPEEDUP, STEP, memory_heading, memory_name

__all__ = ["cached_table", "kernels_table", "processes_table", "ranks_table", "steps_table"]

Results: TypeAlias = Mapping[str, Any]

_ROWS = {
    "sgd": "SGD",
    "uncached": "frozen prefix",
    "cold": "cold cache",
    "warm": "warm cache",
    "limit": "rest alone",
}


def cached_table(results: Results) -> Table:
    """Return the table of what `bench_cache` measured."""
    title = f"{results['model']}, batch of {results['batch_size']}, {results['device']}"
    headings = ("boundary", EPOCH, OF_TIME, "of frozen", "of rest")
    table = new_table(title, "epoch with", right=headings)
    for row in results["rows"]:
        ratios = [spread_cell(row, f"of_{other}", ".2f", same=1) for other in COMPARED]
        edge = f"{row['boundary']} of {results['num_layers']}" if row["boundary"] else "-"
        table.add_row(_ROWS[row["name"]], edge, spread_cell(row, "seconds", ".3f"), *ratios)
    notes = [f"{results['num_images']} images an epoch", explain_spread(results["repeats"])]
    notes.append("cold: fills the cache; warm: reads it; rest alone: on values in memory")
    table.caption = "\n".join([*notes, *results["cache"]])
    return table


STEP_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "mode": lambda row: row["mode"],
    "strategy": lambda row: row["strategy"],
    "boundary": lambda row: f"{row['boundary']} of {row['of']}" if row["boundary"] else "",
    STEP: lambda row: spread_cell(row, "milliseconds", ".1f"),
    OF_TIME: lambda row: spread_cell(row, "time_ratio", ".2f", same=1),
    KEPT: lambda row: _shown(row["saved_bytes"], lambda bytes: f"{bytes / 2**20:.1f}"),
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
    return spread_cell(row, "switching_percent", "+.1f", same=0) if known else ""


def processes_table(results: Results) -> Table:
    """Return the table of what `bench_processes` measured."""
    title = f"{results['model']}, batch of {results['batch_size']}, {results['device']}"
    steps = f"one process\n{STEP}", f"parallel\n{STEP}"
    headings = ["K", "l", *steps, SPEEDUP, OF_TIME]
    table = new_table(title, "strategy", right=headings)
    for row in results["rows"]:
        table.add_row(
            row["strategy"],
            str(row["modules"]),
            str(row["link"]),
            *(spread_cell(row, f"{side}_milliseconds", ".1f") for side in ("single", "parallel")),
            *(spread_cell(row, key, ".2f", same=1) for key in ("speedup", "time_ratio")),
        )
    table.caption = (
        f"K modules, l blocks linked; {SPEEDUP}: of parallel over one process;\n"
        "one process has all threads, parallel ones share them;\n"
        + explain_spread(results["repeats"])
    )
    return table


def ranks_table(results: Results) -> Table:
    """Return the table of what `bench_ranks` measured."""
    nproc, batch = results["nproc"], results["batch_size"]
    title = f"{results['model']}, {nproc} ranks with {batch} images each, {results['device']}"
    wires = ["Mbit/s"] if any(row["wire_megabits"] for row in results["rows"]) else []
    headings = ["layer", *wires, "MB\nsent", STEP, f"alone\n{OF_TIME}", OF_TIME]
    headings.append(f"{SPEEDUP}\nkept")
    table = new_table(title, "strategy", right=headings)
    for row in results["rows"]:
        table.add_row(
            row["strategy"],
            str(row["boundary"]),
            *(decimal(row["wire_megabits"], 0) or "all" for _ in wires),
            f"{row['wire_bytes'] / 1e6:.1f}",
            spread_cell(row, "milliseconds", ".1f"),
            *(spread_cell(row, key, ".2f", 1) for key in ("time_ratio_alone", "time_ratio")),
            f"{row['kept']:.2f}",
        )
    table.caption = (
        "alone: in one process with a rank's threads; SGD on several ranks is DDP;\n"
        f"{SPEEDUP} kept: the {SPEEDUP} on all ranks over that alone;\n"
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
                spread_cell(row, f"speedup{name}", ".1f", same=1)
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


def _times(ratio: float | None) -> str:
    return _shown(ratio, lambda known: f"{known:.1f}x") or "-"


def _shown(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)
