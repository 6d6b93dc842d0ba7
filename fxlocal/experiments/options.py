"""Options of the command line that several commands share, each declared once.

A command takes a whole dataclass (`Settings`, say); `expand_groups` gives it one option per field
whose type carries a help text, and puts the dataclass together again.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from torch import nn

from .data import DATA, Data, load_data
from .models import MODELS, build_model

__all__ = ["ImageChoice", "ModelChoice", "expand_groups"]


@dataclass(frozen=True)
class ImageChoice:
    """What to learn from."""

    data: Annotated[str, ", ".join(DATA)] = "digits"
    data_root: Annotated[Path | None, "Folder that holds, or will hold, CIFAR"] = None
    download: Annotated[bool, "Download CIFAR if it is not there"] = False
    num_train: Annotated[int | None, "Number of training images, of glyphs and fake"] = None
    num_test: Annotated[int | None, "Number of test images, of glyphs and fake"] = None
    size: Annotated[int | None, "Height and width, of glyphs, fake and a folder"] = None
    strength: Annotated[float | None, "How hard glyphs are to read, from 0 to 1"] = None

    def load(self) -> Data:
        """Load the images; which they are does not depend on the seed of a run."""
        return load_data(
            self.data,
            root=self.data_root,
            download=self.download,
            num_train=self.num_train,
            num_test=self.num_test,
            size=self.size,
            strength=self.strength,
        )


@dataclass(frozen=True)
class ModelChoice:
    """What to train."""

    model: Annotated[str, ", ".join(MODELS)] = "resnet14"
    width: Annotated[int | None, "Channels of the first stage; default: the model's usual"] = None

    def build(self, data: Data, seed: int) -> nn.Module:
        """Build the model for ``data``."""
        return build_model(
            self.model,
            num_classes=data.num_classes,
            in_channels=data.shape[0],
            width=self.width,
            seed=seed,
        )


def expand_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each dataclass among the parameters of ``command`` by one option per field."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _field_options(groups[name])
        else:
            kind = Parameter.KEYWORD_ONLY  # no order in which defaults must come
            parameters.append(parameter.replace(annotation=hints[name], kind=kind))

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            options = [option.name for option in _field_options(group)]
            values[name] = group(**{option: values.pop(option) for option in options})
        command(**values)

    # typer reads these two, not the source.
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return expanded


def _field_options(group: Any) -> Iterator[Parameter]:
    panel = inspect.cleandoc(group.__doc__).splitlines()[0].rstrip(".")
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if get_origin(hints[field.name]) is Annotated:
            kind, text = get_args(hints[field.name])
            option = typer.Option(help=text, rich_help_panel=panel)
            yield Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[kind, option],
            )
