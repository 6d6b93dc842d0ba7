"""Tables 2 to 5 of the gradient approximation paper, run again: ``fxlocal table``.

Source: gradient approximation, sections 3 to 3.4. Theirs are CIFAR-10, Adam, an exponentially
decaying learning rate, batches of 128 (its section 2.2 draws with 1 / 128, "inverse of batch
size"), random crops and flips, and the epochs until the accuracy is stable. The paper leaves open
the learning rate (ours 1e-3, down to a hundredth) and the weight decay (ours none).

| | the paper | here |
|---|---|---|
| accuracy | the best of a run, every ten epochs | the last epoch's, mean over seeds |
| accuracy loss | points below full gradients | the same, each seed against its own |
| speed-up | time saved, in percent of full gradients' | the same, of the training seconds |
| top-1 | scaled by 1 / 128 | by 1: a constant factor means little to Adam |

That its speed-up is 1 - t / t_full and not t_full / t - 1 we read from two numbers: the second
cannot be below -100 % (Table 4), and a third of the time saved in a quarter of the cells is its
"theoretical maximum speedup of around 8 percent" (section 2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Annotated, Any

import typer

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

__all__ = ["TABLES", "PaperTable", "Row", "table_command", "tabulate"]


@dataclass(frozen=True)
class Row:
    """A row of the paper's, and the strategy that makes it; percent and points, None if not given.

    Attributes:
        strategy: or another model's name.
        schedule: what is approximated when.
        speedup: in percent; of a row that is ``slower``, an upper bound.
        loss: of accuracy, in points.
        accuracy: in percent.
    """

    strategy: str
    schedule: str | None = None
    speedup: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    slower: bool = False

    @property
    def name(self) -> str:
        """The name of its runs."""
        if self.schedule is None:
            return self.strategy
        return f"{self.strategy}, {self.schedule.replace('-', ' ')}"


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper's: its model, about how many epochs that trains, and the rows."""

    title: str
    model: str
    epochs: int
    rows: tuple[Row, ...]


_FULL = Row("sgd", speedup=0.0, loss=0.0)

TABLES = {
    2: PaperTable(
        *("2-layer CNN", "cnn2", 500),
        (
            _FULL,
            Row("zero", "cnn2", -5.7, 0.2),
            Row("random", "cnn2", -38.0, -0.8),
            Row("topk", "cnn2", -6.6, 1.0),
        ),
    ),
    3: PaperTable(
        *("ResNet-20", "resnet20", 250),
        (
            _FULL,
            Row("zero", "schedule-1", 7.1, 1.5),
            Row("random", "schedule-1", -1.4, 1.8),
            Row("topk", "schedule-1", 3.5, 0.75),
            Row("resnet14", None, 22.0, 1.0),
        ),
    ),
    4: PaperTable(
        *("VGG-19", "vgg19", 200),
        (
            _FULL,
            Row("zero", "schedule-1", 7.3, 1.0),
            Row("random", "schedule-1", -100.0, 0.1, slower=True),
            Row("topk", "schedule-1", 1.5, 0.7),
        ),
    ),
    5: PaperTable(
        *("ResNet-20, three schedules", "resnet20", 250),
        (
            Row("sgd", accuracy=91.8),
            Row("zero", "schedule-1", accuracy=90.3),
            Row("zero", "schedule-2", accuracy=91.6),
            Row("zero", "schedule-3", accuracy=91.1),
            Row("random", "schedule-1", accuracy=90.0),
            Row("random", "schedule-2", accuracy=88.8),
            Row("random", "schedule-3", accuracy=87.9),
            Row("topk", "schedule-1", accuracy=91.1),
            Row("topk", "schedule-2", accuracy=91.6),
            Row("topk", "schedule-3", accuracy=91.7),
            Row("resnet14", accuracy=90.8),
        ),
    ),
}

_IMAGES = ImageChoice(data="cifar10")
_SETTINGS = Settings(
    batch_size=128,
    optimizer="adam",
    lr=1e-3,
    lr_schedule="exponential",
    weight_decay=0.0,
    evaluate_every=10,
)


@one_line_errors
@expand_groups
def table_command(
    name: Annotated[str, typer.Argument(hidden=True)],
    width: Annotated[
        int | None, typer.Option(help="Channels of the first stage; default: the model's usual")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images; default: the paper's")
    ] = None,
    k: Annotated[int, typer.Option(help="Errors that topk keeps per image and channel")] = 1,
    force: Annotated[
        bool, typer.Option(help="Let topk approximate even where that is predicted to be slower")
    ] = True,
    images: ImageChoice = _IMAGES,
    settings: Settings = _SETTINGS,
    machine: Machine = Machine(),  # noqa: B008  # frozen
    seeds: Annotated[str, typer.Option(help="Separated by commas")] = "0,1",
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a table of the gradient approximation paper again, and print ours beside theirs.

    Defaults are the paper's settings: hours on a GPU. Writes results.json and table-N.md.
    """
    if name == "1":
        raise SettingsError("table 1 times a kernel and trains nothing: run fxlocal kernels")
    number = find_table(name, {str(number): number for number in TABLES})
    table = TABLES[number]
    settings = replace(settings, epochs=table.epochs if epochs is None else epochs)
    options, seed_numbers = Options(k=k, force=force), integers("--seeds", seeds)
    refuse_idle([row.strategy for row in table.rows if row.schedule], options, settings)
    folder = free_folder(out, f"table-{number}-{images.data}", overwrite)
    data = images.load()
    if data.task != "classification":
        raise SettingsError(f"data {data.name!r} has no class per image to be right about")
    machine.set_threads(data.shape)
    check_folder(folder)

    def write(results: Mapping[str, Any]) -> dict[str, Any]:
        rows = {"table": number, "rows": tabulate(table, results)}
        whole = {**results, **rows, **describe_job(settings, options)}
        write_results(whole, folder)
        return whole

    model = ModelChoice(table.model, width)
    contestants = {}
    for row in table.rows:
        told: dict[str, Any] = {"approximate": row.schedule} if row.schedule else {}
        contestants[row.name] = (row.strategy, replace(options, **told))
    job = (data, model, contestants, seed_numbers, settings, machine, options)
    results = write(run_strategies(*job, on_seed=write))
    caption = _caption(table, results, data, model)
    title = f"Table {number}: {table.title}"
    header, lines = _cells(table, results["rows"])
    publish_table(title, header, lines, caption, folder / f"table-{number}.md")
    refuse_divergence(results)


def tabulate(table: PaperTable, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return our numbers and the paper's for each row; None of what diverged or is not given."""
    summary = {row["strategy"]: row for row in results["summary"]}
    finished = finished_runs(results)
    full = {run["seed"]: run["error_percent"] for run in finished.get("sgd", ())}
    rows = []
    for row in table.rows:
        own = summary[row.name]
        losses = [
            run["error_percent"] - full[run["seed"]]
            for run in finished.get(row.name, ())
            if run["seed"] in full
        ]
        error, speedup = own["error_percent_mean"], own["speedup"]
        rows.append(
            {
                "row": row.name,
                "accuracy_percent_mean": None if error is None else 100.0 - error,
                "accuracy_percent_std": own["error_percent_std"],
                "accuracy_loss_mean": fmean(losses) if losses else None,
                "accuracy_loss_std": stdev(losses) if len(losses) > 1 else None,
                "speedup_percent": 100.0 * (1.0 - 1.0 / speedup) if speedup else None,
                "paper": {
                    "accuracy_percent": row.accuracy,
                    "accuracy_loss": row.loss,
                    "speedup_percent": row.speedup,
                    "slower": row.slower,
                },
            }
        )
    return rows


def _cells(
    table: PaperTable, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines; a column of the paper's where it has numbers."""
    columns = [["", *("full" if row.name == "sgd" else row.name for row in table.rows)]]
    for heading, own, theirs in (
        ("accuracy %", "accuracy_percent", "accuracy_percent"),
        ("loss, points", "accuracy_loss", "accuracy_loss"),
        ("speed-up %", "speedup_percent", "speedup_percent"),
    ):
        columns.append([heading, *(_own_cell(row, own) for row in rows)])
        if any(row["paper"][theirs] is not None for row in rows):
            columns.append(["paper", *(_paper_cell(row["paper"], theirs) for row in rows)])
    header, *lines = (list(line) for line in zip(*columns, strict=True))
    return header, lines


def _own_cell(row: Mapping[str, Any], key: str) -> str:
    mean, spread = row.get(key, row.get(f"{key}_mean")), row.get(f"{key}_std")
    if row["accuracy_percent_mean"] is None:
        return "diverged" if key == "accuracy_percent" else "-"
    if mean is None:
        return "-"
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} +- {spread:.1f}"


def _paper_cell(paper: Mapping[str, Any], key: str) -> str:
    value = paper[key]
    if value is None:
        return "-"
    return f"below {value}" if paper["slower"] and key == "speedup_percent" else str(value)


def _caption(
    table: PaperTable, results: Mapping[str, Any], data: Data, model: ModelChoice
) -> list[str]:
    """Say what ours were run on, and theirs."""
    settings, options = results["settings"], results["options"]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run["seed"] for run in results["runs"]))
    width = "" if model.width is None else f" (width {model.width})"
    shape = "x".join(map(str, data.shape))
    num = len(data.train)  # type: ignore[arg-type]  # ours have a length
    kept = "" if options["force"] else ", where predicted to be faster"
    return [
        f"ours: {model.model}{width} on {data.name}, {num} images of {shape}; "
        f"{count_text(settings['epochs'], 'epoch')}, seeds {seeds};",
        f"  {settings['optimizer']}, learning rate {settings['lr']:g} ({settings['lr_schedule']}), "
        f"batch of {settings['batch_size']}; topk of {options['k']}{kept};",
        f"  {results['device']}{', compiled' if results['compile'] else ''}, "
        f"torch {results['versions']['torch']}; last epoch, mean +- std",
        f"paper: CIFAR-10, about {table.epochs} epochs, TensorFlow 1.13, Titan Xp; best epoch",
        "speed-up: training time saved, in percent of full gradients'",
    ]
