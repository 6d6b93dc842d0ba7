"""What the papers' files say: tables, their rows, and the strategies that make ours."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from ...errors import nearest
from ..data.task import Task
from ..training.settings import SettingsError

__all__ = ["PAPERS", "Cell", "PaperTable", "data_of", "find_table", "list_tables", "shrink"]

PAPERS = ("local-sgd", "local-sgd-iclr", "gradient-approximation", "backlink")


@dataclass(frozen=True)
class Cell:
    """One of the paper's results, and the strategy that makes ours.

    Attributes:
        model: whose results.
        row: the row's name in the paper.
        modules: the column of a table over numbers of modules; None of back-propagation.
        strategy: or another model's name.
        arguments: of the strategy.
        paper: the numbers, by what they measure.
        settings: that the row has and no other, such as a batch that grows.
        setting: the arguments that are one of a grid.
    """

    model: str
    row: str
    modules: int | None
    strategy: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its runs."""
        if self.strategy == "sgd":
            return "sgd"
        columns = {} if self.modules is None else {"K": self.modules}
        return ", ".join([self.row, *(f"{k}={v}" for k, v in {**columns, **self.setting}.items())])


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper; the attributes not listed are as in its file.

    Attributes:
        paper: its name, of `PAPERS`.
        number: the table's there.
        settings: for `Settings`, but for what the networks say.
        networks: the title of each, what more it sets, the "large" model for a folder of images,
            and "arguments" of the strategies that are its own.
        methods: how rows are made: a strategy, its arguments, "settings" of the row's own, and a
            "grid" of arguments, whose best is shown.
        small: what ``--small`` changes; nothing of a paper that has none.
        budgets: losses of accuracy, in points, of a table that has a line for each.
        equal_error: whether runs are compared where they have the same error.
        seeds: the usual ones.
        columns: numbers of modules; none of a table of rows alone.
        kernels: speed-ups by input channels, output channels and size of the map, of a table that
            times kernels and trains nothing.
    """

    paper: str
    number: str
    title: str
    source: str
    theirs: str
    note: str
    settings: Mapping[str, Any]
    seeds: Sequence[int]
    measures: Sequence[str]
    networks: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    settings_on: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    columns: Sequence[int] = ()
    kernels: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    budgets: Sequence[float] = ()
    equal_error: bool = False

    @property
    def task(self) -> Task:
        """What its networks are to learn."""
        return "segmentation" if "dice" in self.measures else "classification"

    def theirs_on(self, data: str) -> str:
        """Return the data whose numbers stand beside ours on ``data``."""
        name = "imagenet" if data.startswith("folder:") else data
        return name if name in self.numbers else next(iter(self.numbers))

    def model_of(self, network: str, data: str, width: int | None) -> str:
        """Return the name of the model to train: of a folder's images the one for large images."""
        is_large = data.startswith("folder:") and width is None
        return str(self.networks[network].get("large", network)) if is_large else network

    def cells(
        self, model: str, data: str, told: Mapping[str, Any], grids: Mapping[str, Sequence[Any]]
    ) -> list[Cell]:
        """Return all cells of a model; `choose_cells` explains the arguments."""
        cells = []
        for row, numbers in self.numbers[self.theirs_on(data)][model].items():
            arguments = {**self.methods[row]}
            strategy, settings = arguments.pop("strategy"), arguments.pop("settings", {})
            grid = {n: v for n, v in arguments.pop("grid", {}).items() if n not in told}
            open_ = [*arguments, *self.methods[row].get("grid", ())]
            grid |= {name: values for name, values in grids.items() if name in open_}
            changes = {**self.networks[model].get("arguments", {}), **told}
            arguments |= {name: value for name, value in changes.items() if name in open_}
            columns: Sequence[int | None] = [None] if strategy == "sgd" else self.columns
            listed: list[tuple[int | None, Any]] = [(None, numbers)]
            if self.columns:
                measured = [{self.measures[0]: number} for number in numbers]
                listed = list(zip(columns, measured, strict=False))
            for values in itertools.product(*grid.values()):
                setting = dict(zip(grid, values, strict=True))
                for count, found in listed:
                    own = arguments | setting | ({} if count is None else {"modules": count})
                    cells.append(Cell(model, row, count, strategy, own, found, settings, setting))
        return cells


@cache
def _load(paper: str) -> dict[str, PaperTable]:
    content = json.loads((files(__package__) / f"{paper}.json").read_text(encoding="utf-8"))
    tables, shared = content.pop("tables"), {k: v for k, v in content.items() if k != "title"}
    return {n: PaperTable(paper, n, **{**shared, **own}) for n, own in tables.items()}


def list_tables() -> list[PaperTable]:
    """Return all tables that there are."""
    return [table for paper in PAPERS for table in _load(paper).values()]


def find_table(paper: str, number: str) -> PaperTable:
    """Return a paper's table; a SettingsError if there is none."""
    if paper not in PAPERS:
        raise SettingsError(f"unknown paper {paper!r}. Nearest: {nearest(paper, PAPERS)}")
    if number not in _load(paper):
        there = ", ".join(_load(paper))
        raise SettingsError(f"{paper} has no table {number!r}; it has {there}")
    return _load(paper)[number]


def data_of(table: PaperTable, asked: str) -> str:
    """Return the name of the data to train on: those asked for, or the paper's.

    Raises:
        SettingsError: if nobody else knows where the paper's are.
    """
    usual = next(iter(table.numbers), "")
    if not asked and usual == "imagenet":
        raise SettingsError(
            f"table {table.number} is of ImageNet: give --data folder:PATH with its train and val "
            "folders, --small, or other --data"
        )
    return asked or usual


def shrink(table: PaperTable) -> PaperTable:
    """Return the table for a small machine: the same rows by other settings; or a SettingsError."""
    if not table.small:
        raise SettingsError(f"--small: {table.paper} has no small tables; give --data and --epochs")
    settings, arguments = table.small["settings"], table.small["arguments"]
    networks = {
        name: {**own, **settings, "arguments": {**own.get("arguments", {}), **arguments}}
        for name, own in table.networks.items()
    }
    return replace(table, networks=networks, settings_on={}, seeds=table.small["seeds"])
