"""``fxlocal predict``: the class of each image, and how probable it is."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...data.files import LEFT_OUT, Files, find_images
from ...data.images import batches
from ...training.objective import logits_of
from ...training.results import count_text
from ...training.settings import SettingsError
from ..console import one_line_errors
from ..options import OutFile, check_file, write_file
from .run import Device, RunFolder, SkipDamaged, Trained, open_run

__all__ = ["command"]


@one_line_errors
def command(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(help="Files or folders", metavar="IMAGES")],
    device: Device = None,
    skip_damaged: SkipDamaged = False,
    out: OutFile = None,
) -> None:
    """Say of image files, or of all in a folder, which class a trained model sees."""
    check_file(out)
    trained = open_run(run)
    if trained.data.task != "classification":
        raise SettingsError(f"{run} was to label pixels: there is no class of an image")
    paths = [path for given in images for path in find_images(given)]
    files = Files(list(zip(paths, range(len(paths)), strict=True)), trained.data, skip_damaged)
    rows = _predict(trained, files, device)
    if len(rows) < len(paths):
        typer.echo(f"note: {count_text(len(paths) - len(rows), 'damaged file')} left out", err=True)
    write_file(out, {"run": str(run), "weights": trained.source, "images": rows})


def _predict(trained: Trained, files: Files, device: str | None) -> list[dict[str, Any]]:
    """Print a line of each file, and return its probabilities."""
    names, rows = trained.data.names, []
    experiment = trained.experiment(trained.data.of(files), device)
    machine, settings = experiment.machine, experiment.settings
    for x, places in batches(files, settings.batch_size, workers=machine.workers):
        with torch.no_grad(), machine.autocast():
            scores = logits_of(trained.model(machine.place(x)), settings.output).float().cpu()
        likely = scores.softmax(1).flatten(2).mean(2) if scores.dim() > 2 else scores.softmax(1)
        for place, row in zip(places.tolist(), likely, strict=True):
            if place == LEFT_OUT:
                continue
            path, best = files.samples[place][0], int(row[: len(names)].argmax())
            typer.echo(f"{path}  {names[best]}  {100 * float(row[best]):.1f} %")
            probabilities = dict(zip(names, row.tolist(), strict=False))
            rows.append({"file": str(path), "class": names[best], "probabilities": probabilities})
    return rows
