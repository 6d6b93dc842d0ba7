"""Options of the command line that several commands share, each declared once.

A command takes a whole dataclass (`Settings`, say); `expand_groups` gives it one option per field
whose type carries a help text, and puts the dataclass together again.
"""

import functools
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from torch import nn

from ..data.catalogue import DATA, Data, load_data
from ..models.catalogue import MODELS, build_model
from ..training.settings import SettingsError

__all__ = [
    "ImageChoice",
    "ModelChoice",
    "Out",
    "Overwrite",
    "check_file",
    "check_folder",
    "expand_groups",
    "free_folder",
    "integers",
    "write_file",
]

Out = Annotated[Path | None, typer.Option(help="Folder to write; default: under runs/")]
Overwrite = Annotated[bool, typer.Option(help="Write into a folder that is not empty")]


@dataclass(frozen=True)
class ImageChoice:
    """What to learn from."""

    data: Annotated[str, ", ".join(DATA)] = "digits"
    data_root: Annotated[Path | None, "Folder that holds (or will hold) CIFAR or ISBI 2012"] = None
    download: Annotated[bool, "Download CIFAR if it is not there"] = False
    num_train: Annotated[int | None, "Training images, of glyphs, membranes and fake"] = None
    num_test: Annotated[int | None, "Test images, of glyphs, membranes and fake"] = None
    size: Annotated[int | None, "Height and width, of all but digits and CIFAR"] = None
    strength: Annotated[float | None, "How hard glyphs or membranes are to see, 0 to 1"] = None

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
    """Replace each dataclass among the parameters of ``command`` by one option per field.

    Where such a parameter has a default, its fields are the options' defaults. A field whose name
    is another parameter's gets no option: the command fills it in.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    own = inspect.signature(command).parameters
    others = own.keys() - groups.keys()
    options = {
        name: [o for o in _field_options(group, own[name].default) if o.name not in others]
        for name, group in groups.items()
    }
    parameters: list[Parameter] = []
    for name, parameter in own.items():
        if name in groups:
            parameters += options[name]
        else:
            kind = Parameter.KEYWORD_ONLY  # no order in which defaults must come
            parameters.append(parameter.replace(annotation=hints[name], kind=kind))

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{one.name: values.pop(one.name) for one in options[name]})
        command(**values)

    # typer reads these two, not the source.
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return expanded


def _field_options(group: Any, defaults: object) -> Iterator[Parameter]:
    panel = inspect.cleandoc(group.__doc__).splitlines()[0].rstrip(".")
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if get_origin(hints[field.name]) is Annotated:
            kind, text = get_args(hints[field.name])
            option = typer.Option(help=text, rich_help_panel=panel)
            yield Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=getattr(defaults, field.name, field.default),
                annotation=Annotated[kind, option],
            )


def free_folder(out: Path | None, name: str, overwrite: bool) -> Path:
    """Return the folder to write; what a stranger keeps there is not ours to mix with."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    folder = out or Path("runs") / safe
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder; give another --out")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise SettingsError(f"{folder} is not empty; give another --out, or --overwrite")
    return folder


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, before there is something to lose; make nothing."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise SettingsError(
            f"cannot write into {folder}: {error.strerror}; give another folder"
        ) from error


def check_file(out: Path | None) -> None:
    """Refuse a file that cannot be written, if there is to be one."""
    if out is not None and out.is_dir():
        raise SettingsError(f"--out {out} is a folder; give a file")
    if out is not None:
        check_folder(out.parent)


def write_file(out: Path | None, results: Mapping[str, Any]) -> None:
    """Write what a benchmark measured, if there is to be a file; its folder is made."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def integers(option: str, text: str) -> list[int]:
    """Read the integers of a list separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"{option} {text!r}: give integers separated by commas") from None
