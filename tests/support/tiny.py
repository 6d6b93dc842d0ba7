"""Data, a model and settings small enough that a run takes a second."""

import io

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fxlocal.experiments.data.catalogue import Data, load_data
from fxlocal.experiments.data.task import Goal
from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.training.compare import Events, compare, read_contestants
from fxlocal.experiments.training.results import Results, Run
from fxlocal.experiments.training.settings import Experiment, Machine, Settings
from fxlocal.experiments.training.specs import parse_spec
from fxlocal.experiments.training.trainer import train_run
from fxlocal.schedules import Schedule

SETTINGS = Settings(epochs=4, batch_size=16)
BATCH = (16, 3, 8, 8)


class DropoutNet(nn.Module):
    """Convolutions, batch norm, and both kinds of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout2d(0.3)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.conv1(x))))
        x = torch.relu(self.conv3(torch.relu(self.conv2(x))))
        return self.fc(nn.functional.dropout(x.mean((2, 3)), 0.2, self.training))


def fake_data(num_train: int = 64) -> Data:
    return load_data("fake", num_train=num_train, num_test=20, size=8)


def dropout_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return DropoutNet()


def resnet(seed: int = 0) -> nn.Module:
    # 4 channels would do, but a 1x1 stride-2 convolution from 4 channels in channels-last layout,
    # which inductor chooses too, writes past its memory on a CPU (torch 2.15, with no fxlocal).
    return build_model("resnet8", num_classes=10, in_channels=3, width=8, seed=seed)


def experiment(
    model: nn.Module,
    schedule: Schedule,
    settings: Settings = SETTINGS,
    machine: Machine = Machine(),  # noqa: B008  # frozen
    data: Data | None = None,
    **names: object,
) -> Experiment:
    """What trains this very model."""
    data = fake_data() if data is None else data
    return Experiment(data, lambda seed: model, schedule, settings, machine, **names)  # type: ignore[arg-type]


def run(
    *what: object,
    checkpoint=None,
    resume=False,
    on_step=None,
    on_epoch=None,
    tracker=None,
    **others: object,
) -> Run:
    """Train an `experiment`."""
    how = {"checkpoint": checkpoint, "resume": resume, "on_step": on_step, "on_epoch": on_epoch}
    how["tracker"] = tracker
    return train_run(experiment(*what, **others), **how)  # type: ignore[arg-type]


def schedule_of(spec: str, epochs: int = SETTINGS.epochs, goal: Goal = Goal()) -> Schedule:  # noqa: B008
    return parse_spec(spec).schedule(epochs, goal)


START = "start=0.25,largest=0.8"
LOCAL = schedule_of(f"local-static({START})")


def small_comparison(
    strategies,
    seeds=(0,),
    *,
    data=None,
    build=dropout_net,
    settings=SETTINGS,
    others=None,
    warm_up=lambda *_: None,
    **on,
) -> Results:
    """Compare on `fake_data`, cold; prefixes grow early and far, under their plain names."""
    job = Experiment(data or fake_data(), build, settings=settings, model="tiny")
    named = {
        name: spec.told(start=0.25, largest=0.8)
        if any("start" in part.arguments for part in getattr(spec, "parts", ()))
        else spec
        for name, spec in read_contestants(strategies).items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxlocal.experiments.training.compare._warm_up", warm_up)
        return compare(job, named, seeds, others=others or {}, events=Events(**on))


def text_of(table, width: int = 100) -> str:
    """Return what a terminal shows of a table of rich."""
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def same_state(a, b):
    """Whether two nested states agree to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


class Interrupt(Exception):
    pass


def interrupted(path, epochs, model, schedule=LOCAL, **options):
    """Train into ``path`` and break off after ``epochs``."""

    def stop(record):
        if len(record.loss) == epochs:
            raise Interrupt

    with pytest.raises(Interrupt):
        run(model, schedule, checkpoint=path, on_epoch=stop, **options)
