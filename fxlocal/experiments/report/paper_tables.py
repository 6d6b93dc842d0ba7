"""A paper's table with ours beside it: on the console, and as a Markdown page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.catalogue import Data
from ..files import write_file
from ..papers.grids import choose_best, meet_budgets, setting_text, tune
from ..papers.tables import PaperTable
from ..training.results import count_text
from .tables import new_table
from .words import SPEEDUP

__all__ = ["publish_table"]

Rows = Sequence[Mapping[str, Any]]

HEADINGS = {
    "epochs": "epochs",
    "dice": "Dice",
    "error_percent": "error %",
    "best_accuracy_percent": "accuracy, best",
    "accuracy_percent": "accuracy, last",
    "best_accuracy_loss": "loss, best",
    "accuracy_loss": "loss, points",
    "speedup_percent": "time saved %",
    "speedup": SPEEDUP,
}


def publish_table(
    table: PaperTable,
    results: Mapping[str, Any],
    data: Data,
    folder: Path,
    width: int | None = None,
) -> Path:
    """Print ours beside theirs with what it was made from; write the same as a Markdown page.

    Args:
        table: whose results.
        results: what `reproduce` returned.
        data: what was learned.
        folder: for the page; the names of paper and table are its name.
        width: of the models; None is their usual one.

    Returns:
        The page's path.
    """
    title = f"Table {table.number}: {table.title}"
    make = _grid if table.columns else _budgets if table.budgets else _list
    header, lines = make(table, results["rows"])
    if table.columns:
        title += ", ours (the paper's)"
    caption = _caption(table, results, data, width)
    shown = new_table(title, *[h for h in header if not h], right=[h for h in header if h])
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)
    print("\n".join(caption))
    rule = ["---" if not heading else "---:" for heading in header]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
    page = folder / f"{table.paper}-{table.number}.md"
    write_file(page, f"# {title}\n\n{rows}\n\n" + "\n".join(caption) + "\n")
    return page


def _grid(table: PaperTable, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines: one per network and method, a column per K.

    Of a grid there is one with the best setting of the network, and one with each.
    """
    (measure,) = table.measures
    best = {network: next(iter(errors)) for network, errors in tune(rows).items()}
    named = [(row, row["row"]) for row in rows if not row["setting"]]
    of_grid = [row for row in rows if row["setting"]]
    named += [(row, row["row"]) for row in of_grid if setting_text(row) == best[row["network"]]]
    named += [(row, _label(row)) for row in of_grid]
    named.sort(key=lambda item: list(table.networks).index(item[0]["network"]))
    counts = [1, *sorted({row["modules"] for row in rows if row["modules"]})]
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row, name in named:
        found = lines.setdefault((row["network"], name), {})
        ours = _ours(row, measure, 2)
        found[row["modules"] or 1] = (
            ours if ours == "diverged" else f"{ours} ({row['paper'][measure]})"
        )
    texts = [
        [table.networks[model]["title"], name, *(found.get(count, "-") for count in counts)]
        for (model, name), found in lines.items()
    ]
    return ["", "", *(f"K={count}" for count in counts)], texts


def _budgets(table: PaperTable, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of the one network: a line per budget of lost accuracy."""
    theirs = {row["row"]: row["paper"]["accuracy_loss"] for row in rows if row["paper"]}
    header, lines = ["", "budget"], []
    for name in theirs:
        header += [name, "loss", HEADINGS["speedup"], "paper"]
    for i, met in enumerate(meet_budgets(rows, table.budgets)):
        line = ["", f"{met['budget']:g}"]
        for row, numbers in zip((met["local"], met["frozen"]), theirs.values(), strict=True):
            setting = "/".join(map(str, row["setting"].values())) if row else "none"
            means = [f"{row[key]:.2f}" if row else "-" for key in ("error_loss_mean", "speedup")]
            line += [setting, *means, str(numbers[i])]
        lines.append(line)
    return header, lines


def _label(row: Mapping[str, Any]) -> str:
    """Return the row's name, with the setting of a grid that it is."""
    setting = setting_text(row)
    label = f"{row['row']} ({setting})" if setting else str(row["row"])
    return label if row["reached"] else f"{label}, not reached"


def _list(table: PaperTable, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines; a column of the paper's where it has numbers."""
    rows = choose_best(rows)
    columns = [["", *map(_label, rows)]]
    if len({row["network"] for row in rows}) > 1:
        columns.insert(0, ["", *(table.networks[row["network"]]["title"] for row in rows)])
    for measure in table.measures:
        columns.append([HEADINGS[measure], *(_ours(row, measure) for row in rows)])
        if any(measure in row["paper"] for row in rows):
            columns.append(["paper", *(_theirs(row["paper"], measure) for row in rows)])
    header, *lines = (list(line) for line in zip(*columns, strict=True))
    return header, lines


def _ours(row: Mapping[str, Any], measure: str, digits: int = 1) -> str:
    error, speedup = row["error_percent_mean"], row["speedup"]
    if error is None:
        diverged = measure.endswith(("accuracy_percent", "error_percent", "dice"))
        return "diverged" if diverged else "-"
    if measure == "dice":
        return f"{1 - error / 100:.3f}"
    best = row["best_error_percent_mean"]
    mean, spread = {
        "error_percent": (error, row["error_percent_std"]),
        "accuracy_percent": (100.0 - error, row["error_percent_std"]),
        "best_accuracy_percent": (100.0 - best, row["best_error_percent_std"]),
        "best_accuracy_loss": (row["best_error_loss_mean"], row["best_error_loss_std"]),
        "accuracy_loss": (row["error_loss_mean"], row["error_loss_std"]),
        "speedup_percent": (100.0 * (1.0 - 1.0 / speedup) if speedup else None, None),
        "speedup": (speedup, None),
        "epochs": (row["epochs"], None),
    }[measure]
    if mean is None:
        return "-"
    digits = 2 if measure in ("error_percent", "speedup") else digits
    return f"{mean:.{digits}f}" if spread is None else f"{mean:.{digits}f} +- {spread:.{digits}f}"


def _theirs(paper: Mapping[str, Any], measure: str) -> str:
    if measure not in paper:
        return "-"
    is_bound = measure == "speedup_percent" and paper.get("slower")
    return f"below {paper[measure]}" if is_bound else str(paper[measure])


def _caption(
    table: PaperTable, results: Mapping[str, Any], data: Data, width: int | None
) -> list[str]:
    """Say what ours were run on, and theirs."""
    networks, first = results["networks"], next(iter(results["networks"].values()))
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run["seed"] for run in first["runs"]))
    when = "at equal error" if table.equal_error else "last epoch"
    shape, num = "x".join(map(str, data.shape)), len(data.train)  # type: ignore[arg-type]
    told = [(name, value) for row in results["rows"] for name, value in row["arguments"].items()]
    shared = {n: v for n, v in told if n != "modules" and all(w == v for m, w in told if m == n)}
    lines = [
        f"ours: {data.name}, {num} images of {shape}; seeds {seeds}; {when}, mean +- std;",
        *([f"  {', '.join(f'{n} {v}' for n, v in shared.items())};"] if shared else []),
        f"  {first['device']}{', compiled' if first['compile'] else ''}, "
        f"torch {first['versions']['torch']};",
    ]
    shown_width = "" if width is None else f" (width {width})"
    for model, own in networks.items():
        settings = own["settings"]
        lines.append(
            f"  {model}{shown_width}: {count_text(settings['epochs'], 'epoch')}, "
            f"{settings['optimizer']}, learning rate {settings['lr']:g} "
            f"({settings['lr_schedule']}), batch of {settings['batch_size']}"
        )
    if any(measure.startswith("best") for measure in table.measures):
        every = table.settings["evaluate_every"]
        lines.append(f"best: of the evaluations every {every} epochs and of the last, as theirs")
    for network, errors in tune(results["rows"]).items() if table.columns else ():
        means = (f"{t} {'diverged' if e is None else f'{e:.2f}'}" for t, e in errors.items())
        title = table.networks[network]["title"]
        lines.append(f"{title} has the first of, by the rows' mean error: {', '.join(means)}")
    lines.append(f"paper: {table.theirs_on(data.name)}, {table.theirs}")
    return [*lines, table.note]
