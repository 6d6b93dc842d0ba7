"""What a command says before it trains: the data, the model, where it computes and writes."""

from pathlib import Path

import typer
from torch import nn

from ..models.weights import load_weights
from ..training.results import count_text
from ..training.settings import Experiment

__all__ = ["describe_start"]

_LARGE = 64  # pixels, from which on a network for 32 of them wastes most of its time
# What torchvision has for large images in place of ours.
_FOR_LARGE = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "vgg13": "vgg13_bn",
    "vgg16": "vgg16_bn",
    "vgg19": "vgg19_bn",
    "mobilenetv2": "mobilenet_v2",
    "alexnet": "alexnet",
}


def describe_start(
    experiment: Experiment, model: nn.Module, num_layers: int, notes: list[str], folder: Path | None
) -> None:
    """Print it, with what the model's user may want to know."""
    data, machine = experiment.data, experiment.machine
    num_train, num_test = len(data.train), len(data.test)  # type: ignore[arg-type]
    shape = "x".join(map(str, data.shape))
    shown = ", ".join(data.classes[:6]) + (", ..." if len(data.classes) > 6 else "")
    typer.echo(
        f"data: {data.name}, {count_text(num_train, 'image')} to train and {num_test} to test, "
        f"{shape}, {data.num_classes} classes{f' ({shown})' if shown else ''}"
    )
    for note in data.notes:
        typer.echo(f"note: {note}")
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    typer.echo(
        f"model: {experiment.model}, {num_layers} layers, {total:,} parameters"
        f"{f', {frozen:,} of them frozen' if frozen else ''}; on {machine.name}"
    )
    if source := experiment.settings.weights:
        notes = [load_weights(model, source), *notes]
    for note in [*notes, *_notes_on_size(experiment.model, data.shape[1])]:
        typer.echo(note)
    if folder is not None:
        typer.echo(f"out: {folder}")


def _notes_on_size(name: str, size: int) -> list[str]:
    if size < _LARGE or name not in _FOR_LARGE:
        return []
    return [
        f"note: {name} is the variant for images of 32 pixels, slow and weak at {size}: take "
        f"--model torchvision:{_FOR_LARGE[name]}, or --size 32"
    ]
