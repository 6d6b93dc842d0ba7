"""Memory and step time of local modules and their rivals: ``fxlocal bench --modules``.

| method | what it does |
|---|---|
| ``sgd`` | back-propagation |
| ``checkpoint`` | back-propagation that computes each segment again: exact gradients |
| ``greedy``, ``infopro``, ``backlink`` | strategies of the same name |
| ``summed`` | greedy's losses added up and back-propagated at the end, which saves nothing |

All run in one process, one batch after another, so that times show what local modules add in work.
What they gain where each has a device of its own, `fxlocal.experiments.training.parallel` shows.
Variants take turns, and ratios are medians over rounds, as in `fxlocal.experiments.bench.turns`.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn

from ...compiler.analysis import Analysis
from ...compiler.split import find_split, find_units
from ...errors import PlanError
from ...ir.nodes import unwrapped
from ...ir.stages import Stage, find_stages
from ...runtime.driver import Driver
from ...schedules import Schedule
from ..cli.options import check_folder, integers
from ..data.task import Goal
from ..report.tables import new_table
from ..training.measure import analyze_on, find_versions
from ..training.settings import Machine, SettingsError
from ..training.steps import Stepper
from ..training.strategies import Options, build_schedule
from .turns import Mode, Variant, modes_of, refuse_no_repeats, take_turns

__all__ = ["ModulesChoice", "Summed", "bench_modules", "modules_table", "row_name"]


class Summed(Stepper):
    """Adds up the losses of all local modules, and back-propagates once.

    Errors do not cross modules here either, so the gradients are greedy's; but every activation is
    kept until the end.
    """

    stages: tuple[Stage, ...] = ()  # of the one network that a constant Plan has

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        network = unwrapped(self.driver.network())
        self.stages = self.stages or find_stages(network)
        given = [node for node in network.graph.nodes if node.op == "placeholder"]
        values: dict[str, Any] = {str(node.target): node.args[0] for node in given if node.args}
        values |= {str(given[0].target): x, "target": y}
        losses = []
        with self.machine.autocast():
            for stage in self.stages:
                made, (_, loss) = stage(*(values[name] for name in stage.inputs))
                values.update(zip(stage.outputs, made, strict=True))
                losses += [] if loss is None else [loss]
            return torch.stack(losses).sum()


@dataclass(frozen=True)
class ModulesChoice:
    """Local modules in place of prefixes."""

    modules: Annotated[str, "Numbers of modules, separated by commas: 2,4,8,16"] = ""
    links: Annotated[str, "Blocks over which BackLink's errors flow back; 0 is greedy"] = "0,1,2"
    head: Annotated[Literal["linear", "conv"], "The auxiliary classifier"] = "conv"
    balance: Annotated[
        Literal["memory", "blocks", "time"], "What modules have an equal share of"
    ] = "memory"
    plots: Annotated[Path | None, "Folder for plots over the number of modules"] = None
    errors: Annotated[
        str, "results.json of comparisons or of table backlink-N, separated by commas, to plot too"
    ] = ""

    def refuse_idle(self, *, prefix: bool) -> None:
        """Raise SettingsError if something was given that changes nothing.

        Args:
            prefix: whether something was said of prefixes.
        """
        if self.modules and prefix:
            raise SettingsError("--boundaries, --norm: there are no prefixes with --modules")
        if not self.modules and self != ModulesChoice():
            given = [f"--{f.name}" for f in fields(self) if getattr(self, f.name) != f.default]
            raise SettingsError(f"{', '.join(given)}: changes nothing without --modules")
        if self.errors and not self.plots:
            raise SettingsError("--errors: changes nothing without --plots")

    def bench(
        self, name: str, model: nn.Module, x: Tensor, y: Tensor, machine: Machine, **others: Any
    ) -> dict[str, Any]:
        """Return what `bench_modules` does."""
        counts = sorted(set(integers("--modules", self.modules)))
        links = sorted(set(integers("--links", self.links)))
        others |= {"head": self.head, "balance": self.balance}
        if self.plots is not None:  # better refused now than after the measurement
            check_folder(self.plots)
            self._drops({"model": name, **others})
        return bench_modules(name, model, x, y, counts, links, machine, **others)

    def draw(self, results: Mapping[str, Any]) -> None:
        """Write the plots, if there is a folder for them."""
        if self.plots is not None:
            from ..report.modules_plots import plot_modules  # matplotlib is slow to import
            from ..report.page import write_plots

            write_plots(plot_modules(results, self._drops(results)), self.plots)

    def _drops(self, results: Mapping[str, Any]) -> dict[tuple[str, int, int], float]:
        from ..report.modules_plots import read_drops

        return read_drops([Path(path) for path in self.errors.split(",") if path], results)


@dataclass(frozen=True)
class _Cell:
    """A method with one number of modules; ``split`` counts the blocks of each."""

    method: str
    count: int
    link: int
    schedule: Schedule
    split: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        if self.method == "sgd":
            return "sgd"
        link = f", l={self.link}" if self.link else ""
        return f"{self.method}{link}, K={self.count}"

    def runs(self, mode: Mode) -> bool:
        """Whether it can: CUDA graphs hold no backward, and checkpointing is not compiled."""
        if mode == "cudagraph":
            return self.method == "sgd"
        return mode == "eager" or self.method not in ("checkpoint", "summed")


def bench_modules(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    counts: Sequence[int],
    links: Sequence[int],
    machine: Machine,
    *,
    num_classes: int,
    width: int | None = None,
    head: Literal["linear", "conv"] = "conv",
    balance: Literal["memory", "blocks", "time"] = "memory",
    repeats: int = 10,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure one training step of each method, over numbers of modules and lengths of links.

    Args:
        name: the model's name, for the record.
        model: the network to train.
        x: one batch of images.
        y: their labels.
        counts: numbers of modules.
        links: lengths of BackLink's link, in blocks; 0 is greedy. Where one is longer than a
            module, it is left out; but it must fit one count.
        machine: where and how; with ``compile`` and ``cudagraph``, such variants of the methods
            that can stand beside the eager ones.
        num_classes: outputs of the heads.
        width: the model's, for the record; None is its usual one.
        head: the auxiliary classifier.
        balance: what the modules have an equal share of.
        repeats: rounds measured.
        on_step: called with the variant when its turn comes.

    Returns:
        What ran, where, and "rows": one dict per mode, method, count and link; ready for JSON.

    Raises:
        PlanError: if the model cannot be split into so many modules, or a number is out of range;
        SettingsError: if there is nothing to repeat, or a link fits no count; both before anything
            is measured.
    """
    refuse_no_repeats(repeats)
    model, x, y = machine.prepare(model), machine.place(x), y.to(machine.device)
    analysis = analyze_on(model, x)
    options = Options(head=head, balance=balance)
    cells = [_Cell("sgd", 1, 0, build_schedule("sgd", 1, options))]
    cells += _cells(analysis, counts, links, options, Goal(num_classes))
    left_out = _left_out(cells, counts, links)
    pairs = [
        (cell, _variant(cell, model, machine, mode, analysis))
        for mode in modes_of(machine)
        for cell in cells
        if cell.runs(mode)
    ]
    take_turns([variant for _, variant in pairs], x, y, repeats, on_step)
    plain = {variant.mode: variant for cell, variant in pairs if cell.method == "sgd"}
    return {
        "model": name,
        "batch_size": len(x),
        "shape": list(x.shape[1:]),
        "width": width,
        "head": head,
        "balance": balance,
        "left_out": left_out,
        "repeats": repeats,
        **asdict(machine),
        "device": machine.name,
        "versions": find_versions(),
        "rows": [_row(cell, variant, plain[variant.mode]) for cell, variant in pairs],
    }


def _cells(
    analysis: Analysis, counts: Sequence[int], links: Sequence[int], options: Options, goal: Goal
) -> list[_Cell]:
    """Return all methods that there are for each count; refuse what cannot be split."""
    cells = []
    for count in counts:
        told: dict[str, Any] = {**asdict(options), "modules": count}
        linked = [("backlink" if link else "greedy", link) for link in links]
        for method, link in [("checkpoint", 0), ("summed", 0), ("infopro", 0), *linked]:
            strategy = "greedy" if method == "summed" else method
            schedule = build_schedule(strategy, 1, Options(**{**told, "link": link}), goal)
            modules = build_schedule("backlink", 1, Options(**{**told, "link": link}), goal)
            try:
                split = _lengths(analysis, modules)
            except PlanError:
                if not link:
                    raise
                continue  # the link is longer than a module
            cells.append(_Cell(method, count, link, schedule, split))
    return cells


def _left_out(
    cells: Sequence[_Cell], counts: Sequence[int], links: Sequence[int]
) -> list[dict[str, int]]:
    """Return the links that do not fit, by count; refuse one that fits none."""
    there = {(cell.count, cell.link) for cell in cells}
    for link in links:
        if not any((count, link) in there for count in counts):
            numbers = " or ".join(map(str, counts))
            raise SettingsError(f"--links {link}: longer than a module, of {numbers} modules")
    pairs = product(counts, links)
    return [{"modules": k, "link": link} for k, link in pairs if (k, link) not in there]


def _lengths(analysis: Analysis, schedule: Schedule) -> tuple[int, ...]:
    modules = schedule.plan(analysis, 0).modules
    assert modules is not None
    starts = find_split(analysis, modules)
    return tuple(b - a for a, b in pairwise((*starts, len(find_units(analysis)))))


def _variant(
    cell: _Cell, model: nn.Module, machine: Machine, mode: Mode, analysis: Analysis
) -> Variant:
    stepper: Callable[[Driver, Machine], Stepper] = Summed if cell.method == "summed" else Stepper
    if mode == "eager":
        machine = replace(machine, compile=False, cudagraph=False)
    return Variant(cell.name, model, cell.schedule, machine, mode, analysis, stepper=stepper)


def _row(cell: _Cell, variant: Variant, plain: Variant) -> dict[str, Any]:
    ratios = [own / base for base, own in zip(plain.seconds, variant.seconds, strict=True)]
    # The analysis predicts what back-propagation keeps.
    counted = not variant.predicts_memory or cell.method == "sgd"
    return {
        "mode": variant.mode,
        "method": cell.method,
        "modules": cell.count,
        "link": cell.link,
        "split": list(cell.split),
        "milliseconds": 1000 * statistics.median(variant.seconds),
        "time_ratio": statistics.median(ratios),
        "saved_bytes": variant.saved_bytes if counted else None,
        "memory_ratio": variant.saved_bytes / plain.saved_bytes if counted else None,
        "first_turn_seconds": variant.first_turn_seconds,
    }


def row_name(row: Mapping[str, Any]) -> str:
    """Return the method of a row, with its link."""
    return f"{row['method']}, l={row['link']}" if row["link"] else str(row["method"])


def modules_table(results: Mapping[str, Any]) -> Table:
    """Return the table of what `bench_modules` measured."""
    on_gpu = results["device"].startswith("cuda")
    memory = "peak MiB" if on_gpu else "kept MiB"
    title = f"{results['model']}, batch of {results['batch_size']}, {results['device']}"
    table = new_table(title, "mode", "K", "method")
    for heading in (memory, "of SGD's", "step ms", "of SGD's"):
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        known = row["memory_ratio"] is not None
        table.add_row(
            row["mode"],
            "-" if row["method"] == "sgd" else str(row["modules"]),
            row_name(row),
            f"{row['saved_bytes'] / 2**20:.1f}" if known else "-",
            f"{100 * row['memory_ratio']:.0f} %" if known else "-",
            f"{row['milliseconds']:.1f}",
            f"{100 * row['time_ratio']:.0f} %",
        )
    meaning = "peak of GPU memory" if on_gpu else "the most kept for backward at a time"
    table.caption = f"{memory}: {meaning}; K modules, l blocks linked; {results['head']} heads"
    if results["left_out"]:
        pairs = (f"l={pair['link']} of K={pair['modules']}" for pair in results["left_out"])
        table.caption += f"\nleft out, as longer than a module: {', '.join(pairs)}"
    return table
