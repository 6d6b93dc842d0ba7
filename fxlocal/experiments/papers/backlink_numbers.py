"""What BackLink's Tables 1 and 2 say, and the strategies that make ours: no more than numbers.

Source: BackLink, section 3. Errors of local modules, over their number K and the link's length l,
with linear heads (Table 1) and convolutional ones (Table 2). Where a link would be longer than a
module, the paper has no number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["BACKLINK_TABLES", "COUNTS", "NETWORKS", "BackLinkTable", "Cell", "Errors", "find_cells"]

COUNTS = (2, 4, 8, 16)  # the columns: numbers of modules

# Error of back-propagation, and of each method over `COUNTS`.
Errors: TypeAlias = tuple[float, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Training:
    """How the paper trains a network."""

    title: str
    epochs: int
    lr: float
    weight_decay: float

    @property
    def settings(self) -> dict[str, Any]:
        """Those of `Settings` that are this network's."""
        return {"epochs": self.epochs, "lr": self.lr, "weight_decay": self.weight_decay}


@dataclass(frozen=True)
class BackLinkTable:
    """A table of the paper's: its heads, and errors in percent, by data and model."""

    title: str
    head: Literal["linear", "conv"]
    errors: Mapping[str, Mapping[str, Errors]]


@dataclass(frozen=True)
class Cell:
    """One of the paper's numbers, and the strategy that makes ours."""

    row: str
    strategy: str
    modules: int
    link: int
    paper: float

    @property
    def name(self) -> str:
        """The name of its runs."""
        return "sgd" if self.strategy == "sgd" else f"{self.row}, K={self.modules}"


NETWORKS = {
    "alexnet": Training("AlexNet", 100, 0.01, 1e-4),
    "vgg16-backlink": Training("VGG-16", 150, 0.01, 1e-4),
    "resnet32": Training("ResNet-32", 200, 0.5, 5e-4),
    "resnet110": Training("ResNet-110", 200, 0.3, 5e-4),
}

BACKLINK_TABLES = {
    "backlink-1": BackLinkTable(
        *("linear heads", "linear"),
        {
            "cifar10": {
                "alexnet": (
                    11.44,
                    {
                        "GLL": (12.43, 12.44, 13.89),
                        "l=1": (12.24, 12.43, 12.45),
                        "l=2": (11.93, 11.96),
                    },
                ),
                "vgg16-backlink": (
                    7.41,
                    {
                        "GLL": (10.93, 11.34, 13.65, 18.02),
                        "l=1": (10.68, 11.18, 11.74, 12.72),
                        "l=2": (10.54, 10.58, 10.82),
                    },
                ),
                "resnet32": (
                    7.51,
                    {
                        "GLL": (10.35, 15.02, 20.59, 24.21),
                        "l=1": (10.02, 14.27, 17.53, 20.21),
                        "l=2": (9.03, 12.92, 16.23),
                        "l=3": (9.22, 10.65),
                        "l=4": (9.18, 10.63),
                    },
                ),
                "resnet110": (
                    6.63,
                    {
                        "GLL": (8.55, 13.19, 14.97, 17.9),
                        "l=1": (8.34, 12.6, 14.92, 17.51),
                        "l=2": (7.99, 12.56, 14.64, 16.18),
                        "l=3": (7.96, 12.38, 14.38, 15.62),
                        "l=4": (8.25, 12.54, 13.62),
                    },
                ),
            },
            "cifar100": {
                "resnet32": (
                    29.68,
                    {
                        "GLL": (34.02, 42.44, 48.32, 51.75),
                        "l=1": (33.60, 41.92, 45.12, 46.76),
                        "l=2": (32.56, 38.95, 42.59),
                        "l=3": (32.64, 36.61),
                        "l=4": (32.47, 35.99),
                    },
                ),
                "resnet110": (
                    28.33,
                    {
                        "GLL": (31.37, 37.22, 41.73, 45.23),
                        "l=1": (30.85, 37.5, 41.49, 44.82),
                        "l=2": (30.95, 36.94, 41.34, 43.85),
                        "l=3": (30.54, 36.37, 41.05, 42.09),
                        "l=4": (30.28, 35.63, 38.88),
                    },
                ),
            },
        },
    ),
    "backlink-2": BackLinkTable(
        *("convolutional heads", "conv"),
        {
            "cifar10": {
                "resnet32": (
                    6.94,
                    {
                        "GLL": (7.96, 10.61, 13.61, 14.97),
                        "DGL": (8.69, 11.48, 14.17, 16.22),
                        "InfoPro": (8.13, 8.64, 11.4, 14.23),
                        "l=1": (7.44, 9.65, 11.7, 12.40),
                        "l=2": (7.17, 8.66, 10.60),
                        "l=3": (7.13, 7.95),
                        "l=4": (6.97, 7.55),
                    },
                ),
                "resnet110": (
                    6.27,
                    {
                        "GLL": (7.45, 10.07, 11.87, 12.99),
                        "DGL": (7.70, 10.50, 12.46, 13.80),
                        "InfoPro": (7.01, 7.96, 9.40, 10.78),
                        "l=1": (6.47, 8.65, 9.95, 10.77),
                        "l=2": (6.39, 7.96, 9.56, 10.61),
                        "l=3": (6.36, 7.92, 9.29, 9.75),
                        "l=4": (6.38, 7.79, 9.25),
                    },
                ),
            },
        },
    ),
}

_STRATEGIES = {"GLL": "greedy", "DGL": "dgl", "InfoPro": "infopro"}


def find_cells(errors: Errors, counts: Sequence[int], rows: Sequence[str] = ()) -> list[Cell]:
    """Return back-propagation's cell, and those of some rows for some numbers of modules."""
    plain, methods = errors
    cells = [Cell("BP", "sgd", 1, 0, plain)]
    for row, numbers in methods.items():
        if rows and row not in rows:
            continue
        link = int(row[2:]) if row.startswith("l=") else 0
        cells += [
            Cell(row, _STRATEGIES.get(row, "backlink"), count, link, paper)
            for count, paper in zip(COUNTS, numbers, strict=False)
            if count in counts
        ]
    return cells
