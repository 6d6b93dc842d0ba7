"""Step time and memory of approximated weight gradients: ``fxlocal bench-approximation``.

Each variant follows a schedule of the paper's (gradient approximation, section 3) with one method
for all its cells. All variants, plain training among them, take turns in one process, round after
round; a turn is the same number of steps for all, in which every schedule ends where it began.

A schedule that cycles hands out a network per *column*, which is a distinct Plan. Each column has a
variant of its own that stays with it, so that the cost of switching can be told apart::

    switching = ms per step of the cycling variant / mean of its columns over a period - 1

Ratios are medians over rounds of those of each round. As in the paper, speed-up is the share of
plain training's time that is saved.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ...compiler.analysis import Analysis
from ...compiler.resolve import resolve
from ...compiler.transform import rewrite
from ...errors import NoEffectWarning, nearest
from ...ir.network import Network
from ...ir.nodes import Origin
from ...plan import Plan, Random, TopK, WeightGrad, Zero
from ...schedules import NAMED, Approximation, Constant
from ...tracing.capture import capture
from ..cli.console import one_line_errors
from ..cli.options import check_file, expand_groups, write_file
from ..models.catalogue import MODELS
from ..report.tables import new_table
from ..training.measure import analyze_on, find_versions
from ..training.settings import Machine, SettingsError
from .turns import Mode, Variant, build_job, modes_of, refuse_no_repeats, take_turns

__all__ = [
    "METHODS",
    "approximation_table",
    "bench_approximations",
    "bench_approximations_command",
]

# By name, from TopK's k and whether it is forced.
METHODS: dict[str, Callable[[int, bool], WeightGrad]] = {
    "zero": lambda k, force: Zero(),
    "random": lambda k, force: Random(),
    "topk": lambda k, force: TopK(k, force=force),
}


def build_method(name: str, k: int = 1, force: bool = False) -> WeightGrad:
    """Return the method called ``name``, one of `METHODS`."""
    if name not in METHODS:
        raise SettingsError(f"unknown method {name!r}. Nearest: {nearest(name, METHODS)}")
    return METHODS[name](k, force)


@dataclass(frozen=True)
class _Cell:
    """One schedule with one method: a row of the table."""

    method: str
    table: str
    schedule: Approximation
    columns: tuple[Plan, ...]  # of one period
    exact: tuple[str, ...]  # layers that are left exact though a column names them

    @property
    def distinct(self) -> tuple[Plan, ...]:
        return tuple(dict.fromkeys(self.columns))

    @property
    def num_layers(self) -> int:
        """How many layers the table names."""
        return len({path for plan in self.columns for path in plan.weight_grads})


def bench_approximations(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    methods: Sequence[str],
    tables: Sequence[str],
    machine: Machine,
    *,
    k: int = 1,
    force: bool = False,
    repeats: int = 10,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure training steps by every method under every schedule.

    Args:
        name: the model's name, for the record.
        model: the network to train.
        x: one batch of images.
        y: their labels.
        methods: of `METHODS`.
        tables: of `fxlocal.schedules.NAMED`.
        machine: where and how; with ``compile`` and ``cudagraph``, such variants stand beside the
            eager ones.
        k: positions that TopK keeps.
        force: let TopK approximate even where that is predicted to be slower.
        repeats: rounds measured.
        on_step: called with the variant when its turn comes.

    Returns:
        What ran, where; "rows": one dict per mode, method and table; "columns": one per mode,
        method, table and distinct Plan of a table that has several. Ready for JSON.

    Raises:
        PlanError: if there is no such table, or it does not fit the model; like
        SettingsError: if there is no such method or nothing to repeat: before the measurement.
    """
    refuse_no_repeats(repeats)
    kinds = {method: build_method(method, k, force) for method in methods}
    schedules = {
        (method, table): Approximation.named(table, kinds[method])
        for table in tables
        for method in methods
    }
    model, x, y = machine.prepare(model), machine.place(x), y.to(machine.device)
    analysis = analyze_on(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # the table says what stays exact
        cells = _build_cells(schedules, model, x, machine)
        steps = math.lcm(*(len(cell.columns) for cell in cells))
        groups = [
            _Group(mode, cells, model, machine, analysis, steps) for mode in modes_of(machine)
        ]
        variants = [variant for group in groups for variant in group.variants]
        take_turns(variants, x, y, repeats, on_step)
    return {
        "model": name,
        "batch_size": len(x),
        "shape": list(x.shape[1:]),
        "k": k,
        "force": force,
        "steps": steps,
        "repeats": repeats,
        **asdict(machine),
        "device": machine.name,
        "versions": find_versions(),
        "rows": [row for group in groups for row in group.rows()],
        "columns": [row for group in groups for row in group.column_rows()],
    }


def _build_cells(
    schedules: Mapping[tuple[str, str], Approximation],
    model: nn.Module,
    x: Tensor,
    machine: Machine,
) -> list[_Cell]:
    """Find each table's columns, and what the cost model keeps exact; refuse what does not fit."""
    with machine.autocast():  # the shapes of the layers include their dtypes
        captured, analysis = capture(model, x), analyze_on(model, x)
    cells = []
    for (method, table), schedule in schedules.items():
        period = schedule.batches.step or 1
        columns = tuple(schedule.plan(analysis, epoch=0, step=step) for step in range(period))
        exact: dict[str, None] = {}
        for plan in dict.fromkeys(columns):
            exact |= dict.fromkeys(
                _exact_layers(rewrite(captured, resolve(plan, analysis), analysis), plan)
            )
        cells.append(_Cell(method, table, schedule, columns, tuple(exact)))
    return cells


def _exact_layers(network: Network, plan: Plan) -> list[str]:
    """Return the layers that ``plan`` names and ``network`` does not approximate."""
    origins = [node.meta.get("fxlocal") for node in network.graph.nodes]
    replaced = {origin.layer for origin in origins if isinstance(origin, Origin)}
    return [path for path in plan.weight_grads if path not in replaced]


class _Group:
    """All variants of one mode."""

    def __init__(
        self,
        mode: Mode,
        cells: Sequence[_Cell],
        model: nn.Module,
        machine: Machine,
        analysis: Analysis,
        steps: int,
    ) -> None:
        self.mode, self.cells = mode, cells

        def build(name: str, schedule: Approximation | Constant) -> Variant:
            return Variant(name, model, schedule, machine, mode, analysis, steps)

        self.plain = build("sgd", Constant(Plan()))
        self.cycling = [build(f"{cell.method} {cell.table}", cell.schedule) for cell in cells]
        self.constant = {Plan(): self.plain}  # variants that stay with one Plan
        for cell, variant in zip(cells, self.cycling, strict=True):
            for plan in cell.distinct:
                if len(cell.distinct) == 1:
                    self.constant.setdefault(plan, variant)
                elif plan not in self.constant:
                    name = f"{variant.strategy}, column {cell.columns.index(plan)}"
                    self.constant[plan] = build(name, Constant(plan))

    @property
    def variants(self) -> list[Variant]:
        return list(dict.fromkeys((self.plain, *self.cycling, *self.constant.values())))

    def rows(self) -> list[dict[str, Any]]:
        """Sum up plain training and each cell."""
        rows = [self._row(self.plain, "sgd", None)]
        for cell, variant in zip(self.cells, self.cycling, strict=True):
            rows.append(
                self._row(variant, cell.method, cell.table)
                | {
                    "switching_percent": self._switching_percent(cell, variant),
                    "num_layers": cell.num_layers,
                    "exact_layers": list(cell.exact),
                }
            )
        return rows

    def column_rows(self) -> list[dict[str, Any]]:
        """Sum up each column of a cell that has several."""
        return [
            self._row(self.constant[plan], cell.method, cell.table)
            | {"steps": [i for i, column in enumerate(cell.columns) if column == plan]}
            for cell in self.cells
            for plan in cell.distinct
            if len(cell.distinct) > 1
        ]

    def _row(self, variant: Variant, method: str, table: str | None) -> dict[str, Any]:
        pairs = zip(self.plain.seconds, variant.seconds, strict=True)
        # Captured activations are allocated before the peak is watched.
        is_counted = not variant.predicts_memory and self.mode != "cudagraph"
        return {
            "mode": self.mode,
            "method": method,
            "table": table,
            "milliseconds": 1000 * statistics.median(variant.seconds),
            "speedup_percent": 100 * (1 - statistics.median(own / plain for plain, own in pairs)),
            "switching_percent": None,
            "saved_bytes": variant.saved_bytes if is_counted else None,
            "first_turn_seconds": variant.first_turn_seconds,
            "num_layers": 0,
            "exact_layers": [],
        }

    def _switching_percent(self, cell: _Cell, variant: Variant) -> float | None:
        if len(cell.distinct) == 1:
            return None
        columns = [self.constant[plan].seconds for plan in cell.columns]
        means = map(statistics.fmean, zip(*columns, strict=True))
        pairs = zip(variant.seconds, means, strict=True)
        return 100 * (statistics.median(own / mean for own, mean in pairs) - 1)


def approximation_table(results: Mapping[str, Any]) -> Table:
    """Return the table of what `bench_approximations` measured."""
    on_gpu = results["device"].startswith("cuda")
    memory = "peak MiB" if on_gpu else "kept MiB"
    title = f"{results['model']}, batch of {results['batch_size']}, {results['device']}"
    headings = ("step ms", "saved %", "switching %", memory, "exact layers")
    table = new_table(title, "mode", "method", "table")
    table.padding = 0  # eight columns fit into 80 characters
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        table.add_row(
            row["mode"],
            row["method"],
            row["table"] or "-",
            f"{row['milliseconds']:.1f}",
            "-" if row["table"] is None else f"{row['speedup_percent']:+.1f}",
            "-" if row["switching_percent"] is None else f"{row['switching_percent']:+.1f}",
            "-" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 2**20:.1f}",
            "-" if row["table"] is None else f"{len(row['exact_layers'])} of {row['num_layers']}",
        )
    table.caption = (
        "saved: of SGD's time; switching: time added to the mean of the table's columns; "
        f"{memory}: {'peak of GPU memory' if on_gpu else 'for backward'}, in the step "
        "that takes most; exact: layers of the table left exact, because TopK is no faster there"
    )
    return table


@one_line_errors
@expand_groups
def bench_approximations_command(
    model: Annotated[str, typer.Argument(help=", ".join(MODELS))],
    machine: Machine,
    methods: Annotated[
        str, typer.Option(help=f"Separated by commas, of {', '.join(METHODS)}")
    ] = "zero,random,topk",
    tables: Annotated[
        str, typer.Option(help=f"Separated by commas, of {', '.join(NAMED)}")
    ] = "schedule-1,schedule-2,schedule-3",
    k: Annotated[int, typer.Option(help="Positions that topk keeps")] = 1,
    force: Annotated[
        bool, typer.Option(help="Let topk approximate layers where it is predicted to be slower")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images per step")] = 128,
    input_size: Annotated[
        str, typer.Option(help="One image: its height and width (32), or 3x32x32")
    ] = "",
    classes: Annotated[int, typer.Option(min=1, help="Number of classes")] = 10,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds to take the median of")] = 10,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Time training steps with approximated weight gradients, schedule by schedule, in turns.

    With --compile and --cudagraph, such networks are measured beside the eager ones.
    """
    check_file(out)
    net, x, y = build_job(
        model, machine, input_size=input_size, batch=batch, classes=classes, width=width
    )
    with Console().status("") as status:
        results = bench_approximations(
            *(model, net, x, y, methods.split(","), tables.split(","), machine),
            k=k,
            force=force,
            repeats=repeats,
            on_step=status.update,
        )
    Console().print(approximation_table(results))
    write_file(out, results)
