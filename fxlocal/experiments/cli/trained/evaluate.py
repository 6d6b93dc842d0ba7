"""``fxlocal evaluate``: how good a trained model is, class by class."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...data.files import LEFT_OUT, Files, find_labelled
from ...data.images import DataError
from ...data.task import METRICS, SCORES
from ...report.tables import class_table
from ...training.objective import find_predictions
from ...training.results import count_text
from ..console import one_line_errors
from ..options import OutFile, check_file, write_file
from .run import Device, RunFolder, SkipDamaged, open_run

__all__ = ["command"]


@one_line_errors
def command(
    run: RunFolder,
    folder: Annotated[
        Path | None, typer.Argument(help="Class folders; else its test images", metavar="FOLDER")
    ] = None,
    device: Device = None,
    skip_damaged: SkipDamaged = False,
    out: OutFile = None,
) -> None:
    """Judge a trained model by its test images, or by a folder, class by class."""
    check_file(out)
    trained = open_run(run)
    if folder is None:
        images = trained.images
        data = replace(images, skip_damaged=skip_damaged or images.skip_damaged).load()
    else:
        labelled = find_labelled(folder, trained.data.names)
        files = Files(labelled, trained.data, skip_damaged)
        data = trained.data.of(files)
    predicted, true = find_predictions(trained.model, trained.experiment(data, device))
    known = true != LEFT_OUT
    counted = "images" if len(predicted) == len(data.test) else "pixels"  # type: ignore[arg-type]
    if not known.any():
        raise DataError(f"{folder or data.name}: no file of it can be read")
    rows = _judge(predicted[known], true[known], trained.data.names, counted)
    if data.task == "segmentation":
        score = rows[1]["f1"]  # of the foreground, which is its Dice coefficient
    else:
        score = 100.0 * float((predicted == true)[known].double().mean())
    name = SCORES[METRICS[data.task]]
    Console().print(class_table(rows, f"{trained.name} on {folder or data.name}"))
    left_out = f", {int((~known).sum())} damaged files left out" if not known.all() else ""
    typer.echo(
        f"{name} {score:.2f} % of {count_text(len(data.test), 'image')}{left_out}; "  # type: ignore[arg-type]
        f"{trained.source}"
    )
    content = {"run": str(run), "weights": trained.source, name: score, "classes": rows}
    write_file(out, content)


def _judge(predicted: Any, true: Any, names: tuple[str, ...], counted: str) -> list[dict[str, Any]]:
    """Return a row of each class: precision, recall and f1 in percent, None of nothing."""
    from sklearn import metrics  # slow to import

    labels = list(range(len(names)))
    found = metrics.precision_recall_fscore_support(
        true.numpy(), predicted.numpy(), labels=labels, zero_division=float("nan")
    )
    rows = zip(names, *(column.tolist() for column in found), strict=True)
    keys = ("precision", "recall", "f1")
    told = []
    for name, *values, count in rows:
        percent = [None if value != value else 100.0 * value for value in values]
        told.append({"class": name, **dict(zip(keys, percent, strict=True)), counted: int(count)})
    return told
