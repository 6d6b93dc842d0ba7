"""Options of the command line that several verbs share, each declared once.

A verb takes a whole dataclass (`Settings`, say); `expand_groups` gives it one option per field
whose type carries a help text, in a panel of its own, and puts the dataclass together again.
"""

import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ...errors import nearest
from .. import tracking
from ..data.catalogue import Data, load_data
from ..files import write_file as write_file_whole
from ..models.catalogue import MODELS, build_model
from ..models.weights import load_weights
from ..papers.runner import settings_of
from ..papers.tables import find_table
from ..tracking import JsonLines, Tracker
from ..training.baselines import BASELINES
from ..training.checkpoint import command_line
from ..training.compare import Build, Contestants
from ..training.measure import find_commit
from ..training.ranks import find_world
from ..training.recipe.tuning import Tuning, freeze
from ..training.results import count_text
from ..training.settings import Experiment, Machine, Settings, SettingsError
from ..training.specs import Spec, is_model, parse_spec
from .groups import expand_groups, option
from .progress import Quiet, say_place

__all__ = [
    "Board",
    "Cache",
    "Classes",
    "ImageChoice",
    "InputSize",
    "ModelChoice",
    "ModelName",
    "Nproc",
    "Out",
    "OutFile",
    "Overwrite",
    "Preset",
    "Quiet",
    "Seeds",
    "check_file",
    "check_folder",
    "check_nproc",
    "describe_job",
    "expand_groups",
    "free_folder",
    "integers",
    "keep_prefixes",
    "make_experiment",
    "make_tracker",
    "option",
    "say_place",
    "until",
    "write_file",
]


Out = Annotated[Path | None, option("Folder to write; default: under runs/", "Output")]
OutFile = Annotated[Path | None, option("JSON file to write", "Output")]
Overwrite = Annotated[
    bool, option("Write into a folder that is not empty", "Output", "--overwrite")
]
Board = Annotated[bool, option("metrics.jsonl for TensorBoard too", "Output", "--tensorboard")]
Seeds = Annotated[str, option("One run for each", "Training")]
ModelName = Annotated[str, typer.Argument(help=", ".join(MODELS), metavar="MODEL")]
InputSize = Annotated[str, option("Side of an image, or 3x32x32", "Data and model")]
Classes = Annotated[int, option("Number of classes", "Data and model", min=1)]


@dataclass(frozen=True)
class ImageChoice:
    """Data and model."""

    data: Annotated[str, "digits, cifar10, folder:PATH (of class folders)"] = "digits"
    data_root: Annotated[Path | None, "Folder of CIFAR or ISBI 2012"] = None
    download: Annotated[bool, "Download CIFAR if it is not there", "rare"] = False
    num_train: Annotated[int | None, "Training images, of generated data", "rare"] = None
    num_test: Annotated[int | None, "Test images, of generated data", "rare"] = None
    size: Annotated[int | None, "Height and width, but of digits, CIFAR"] = None
    strength: Annotated[float | None, "How hard generated data are, 0 to 1", "rare"] = None
    split: Annotated[float | None, "Share to test with, of a folder without val/"] = None
    skip_damaged: Annotated[bool, "Leave unreadable files of a folder out", "rare"] = False

    def load(self) -> Data:
        """Load the images; which they are does not depend on the seed of a run."""
        others = {n: v for n, v in vars(self).items() if n not in ("data", "data_root")}
        return load_data(self.data, root=self.data_root, **others)


@dataclass(frozen=True)
class ModelChoice:
    """Data and model."""

    model: Annotated[str, "See fxlocal show --help"] = "resnet14"
    width: Annotated[int | None, "Channels of the first stage; else the usual"] = None

    def build(self, data: Data, seed: int, tuning: Tuning = Tuning()) -> nn.Module:  # noqa: B008
        """Build the model for ``data``, with the weights that it begins with."""
        model = build_model(
            self.model,
            num_classes=data.num_classes,
            in_channels=data.shape[0],
            width=self.width,
            seed=seed,
        )
        if tuning.weights:
            load_weights(model, tuning.weights)
        return freeze(model, tuning)

    def others(
        self,
        names: Iterable[str],
        data: Data,
        tuning: Tuning = Tuning(),  # noqa: B008
    ) -> dict[str, Build]:
        """Return what builds each other model among ``names``, as wide as this one."""
        models = {name: replace(self, model=name) for name in names if is_model(name)}
        if self.model in models:
            raise SettingsError(
                f"{self.model} among --strategies is the --model itself: give sgd for it"
            )
        own = {"weights": tuning.weights, "freeze": tuning.freeze, "lr-of": tuning.lr_of}
        for told in (name for name, value in own.items() if value and models):
            raise SettingsError(f"--{told}: is of {self.model}; leave {min(models)} out")
        return {name: partial(model.build, data) for name, model in models.items()}


_PRESETS = {  # by paper, table, network and data
    "cifar10": ("local-sgd", "2", "resnet18", "cifar10"),
    "cifar100": ("local-sgd", "2", "resnet18", "cifar100"),
    "imagenet": ("local-sgd", "1", "resnet50", "imagenet"),
    "mobilenetv2": ("local-sgd", "1", "mobilenetv2", "imagenet"),
    "backlink-alexnet": ("backlink", "1", "alexnet", "cifar10"),
    "backlink-vgg16": ("backlink", "1", "vgg16-backlink", "cifar10"),
    "backlink-resnet32": ("backlink", "1", "resnet32", "cifar10"),
    "backlink-resnet110": ("backlink", "1", "resnet110", "cifar10"),
}


def _use_preset(context: typer.Context, name: str) -> str:
    """Let a paper's settings stand for the options that are not given."""
    if not name or context.resilient_parsing:
        return name
    if name not in _PRESETS:  # no command has begun that would say so in a line
        near = nearest(name, _PRESETS)
        typer.echo(f"error: unknown --preset {name!r}. Nearest: {near}", err=True)
        raise typer.Exit(2)
    paper, number, network, data = _PRESETS[name]
    context.default_map = asdict(settings_of(find_table(paper, number), network, data))
    return name


Cache = Annotated[
    str, option("Keep what prefixes of freeze-eval make, 4GiB", "Training", show_default=False)
]
Nproc = Annotated[int, option("Processes that share a batch", "Machine")]
Preset = Annotated[
    str,
    option(
        "A paper's settings: cifar10, ...",
        "Training",
        callback=_use_preset,
        is_eager=True,
        show_default=False,
    ),
]


def keep_prefixes(strategies: Sequence[str], cache: str) -> list[str]:
    """Return the specs, those of frozen prefixes whose norms stand with ``cache`` as an argument.

    Raises:
        SettingsError: if there is none.
        StrategyError: if one of them is no spec, or the cache none.
    """
    if not cache:
        return list(strategies)
    texts = []
    for text in strategies:
        told = None if text in BASELINES or is_model(text) else parse_spec(text)
        parts = [part.arguments for part in told.parts] if told else []
        mine = [part for part in parts if "cache" in part and part.get("norm") == "eval"]
        keeps = told and any(part.get("refresh_every") is None for part in mine)
        texts.append(told.told(cache=cache).text if told and keeps else text)
    if texts == list(strategies):
        raise SettingsError(
            f"--cache {cache}: none of {', '.join(strategies)} has a prefix that could be kept; "
            "give freeze-eval, or leave it out"
        )
    return texts


def make_experiment(
    images: ImageChoice, model: ModelChoice, settings: Settings, machine: Machine
) -> Experiment:
    """Load the data and set the threads; schedule and seed are still open."""
    data = images.load()
    machine.set_threads(data.shape)
    build = partial(model.build, data, tuning=settings)
    return Experiment(data, build, settings=settings, machine=machine, model=model.model)


def make_tracker(folder: Path, tensorboard: bool, keep: bool = False) -> Tracker:
    """Write ``metrics.jsonl`` into the folder, and what TensorBoard shows; nothing is written yet.

    Of ``metrics.jsonl``, lines of other runs may be kept.

    Raises:
        SettingsError: if TensorBoard is not installed.
    """
    if not tensorboard:
        return Tracker(JsonLines(folder, keep))
    from ..report.picture import block_pixels  # matplotlib is slow to import

    try:
        return Tracker(JsonLines(folder, keep), tracking.Board(folder, block_pixels))
    except ImportError as error:
        raise SettingsError(
            f"--tensorboard: {error}; pip install 'fxlocal[tensorboard]', or leave it out"
        ) from error


def free_folder(out: Path | None, name: str, overwrite: bool) -> Path:
    """Return the folder to write; what a stranger keeps there is not ours to mix with."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    folder = out or Path("runs") / safe
    if os.path.lexists(folder) and not folder.is_dir():  # also a link to nothing
        raise SettingsError(f"{folder} is not a folder; give another --out")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise SettingsError(f"{folder} is not empty; give another --out, or --overwrite")
    return folder


def check_nproc(nproc: int, machine: Machine) -> None:
    """Refuse more processes than there are cores, and others than torchrun has started."""
    world, cores = find_world(), os.cpu_count() or 1
    if world and nproc not in (1, world):
        raise SettingsError(
            f"--nproc {nproc}: this is one of {world} ranks that torchrun has started; leave it out"
        )
    if nproc < 1:
        raise SettingsError(f"--nproc {nproc}: give 1 or more")
    if machine.device == "cpu" and nproc > cores:
        raise SettingsError(f"--nproc {nproc}: this machine has {cores} CPU cores; give fewer")


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
        write_file_whole(out, json.dumps(results, indent=2) + "\n")
        say_place(out)


def describe_job(
    settings: Settings, strategies: Contestants, width: int | None = None
) -> dict[str, Any]:
    """Return what a report says of the command; a width only if it is not the model's usual."""
    specs = {name: spec for name, spec in strategies.items() if isinstance(spec, Spec)}
    job = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": find_commit(),
        "host": f"{platform.node()}, {count_text(os.cpu_count() or 1, 'core')}",
        "command": command_line(),
        "settings": asdict(settings),
        "options": {name: spec.arguments for name, spec in specs.items()},
    }
    return job if width is None else {**job, "width": width}


def integers(name: str, text: str) -> list[int]:
    """Read the integers of a list separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"{name} {text!r}: give integers separated by commas") from None


def until(text: str) -> str | int | float:
    """Read a path, an index or a fraction, whichever the text is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
