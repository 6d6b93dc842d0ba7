"""``fxlocal export``: a trained model for other programs."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ...files import write_file
from ...models.export import FORMATS, find_format, pack_model
from ...training.settings import SettingsError
from ..console import one_line_errors
from ..options import check_folder, option
from .run import RunFolder, open_run

__all__ = ["command"]


@one_line_errors
def command(
    run: RunFolder,
    file: Annotated[
        Path, typer.Argument(help="To write: .safetensors, .onnx, .pt2", metavar="FILE")
    ],
    format: Annotated[
        str, option(f"If the file's suffix does not say it: {', '.join(FORMATS)}", "Output")
    ] = "",
    overwrite: Annotated[bool, option("Replace the file", "Output", "--overwrite")] = False,
) -> None:
    """Write a trained model as safetensors, ONNX or torch.export's .pt2."""
    kind = find_format(file, format)
    if file.is_dir():
        raise SettingsError(f"{file} is a folder; give a file")
    if file.exists() and not overwrite:
        raise SettingsError(f"{file} is there already; give another file, or --overwrite")
    check_folder(file.parent)
    trained = open_run(run)
    facts = {"model": trained.name, **trained.data.facts}
    packed, note = pack_model(trained.model, torch.zeros(2, *trained.data.shape), kind, facts)
    write_file(file, packed)
    typer.echo(f"{file}: {trained.name}, {trained.source}{note}, {len(packed) / 2**20:.1f} MiB")
