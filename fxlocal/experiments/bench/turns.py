"""The engine of every benchmark: those compared take turns, and ratios are of one round's two.

One turn each, round after round, so that a machine that grows slower or warmer slows them all.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ...compiler.analysis import Analysis
from ...ir.network import Network
from ...tracing.capture import capture
from ..data.dataset import Data
from ..data.images import InMemory
from ..models.catalogue import build_model
from ..training.measure import analyze_on, clock, find_versions
from ..training.recipe.dry_run import check_model
from ..training.settings import Experiment, Machine, Settings, SettingsError

__all__ = [
    "WARM_UP_TURNS",
    "Job",
    "Mode",
    "build_job",
    "image_shape",
    "place_job",
    "refuse_none",
    "take_turns",
    "time_call",
]

Mode: TypeAlias = Literal["eager", "compiled", "cudagraph"]
Name = TypeVar("Name", bound=Hashable)
WARM_UP_TURNS = 2  # after the first one, which compiles: allocators and autotuning settle


@dataclass(frozen=True)
class Job:
    """What is to be trained, on one batch of random images.

    Attributes:
        name: the model's, for the record.
        model: where and how ``machine`` has it, like the batch.
        x: images.
        y: their labels.
        machine: where and how to compute.
        width: the model's, for the record; None is its usual one.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    machine: Machine
    width: int | None = None

    @cached_property
    def analysis(self) -> Analysis:
        """The model's, with its costs and the dtypes that the machine computes in."""
        with self.machine.autocast():
            return analyze_on(self.model, self.x)

    @cached_property
    def captured(self) -> Network:
        """The model's graph."""
        with self.machine.autocast():
            return capture(self.model, self.x)

    def describe(self) -> dict[str, Any]:
        """Say what ran, and where."""
        return {
            "model": self.name,
            "num_layers": len(self.analysis.layers),
            "batch_size": len(self.x),
            "shape": list(self.x.shape[1:]),
            "width": self.width,
            **asdict(self.machine),
            "device": self.machine.name,
            "versions": find_versions(),
        }


def place_job(
    name: str, model: nn.Module, x: Tensor, y: Tensor, machine: Machine, width: int | None = None
) -> Job:
    """Return a Job; ``model`` is moved to the machine in place."""
    placed = machine.prepare(model), machine.place(x), y.to(machine.device)
    return Job(name, *placed, machine, width)


def build_job(
    name: str,
    machine: Machine,
    *,
    input_size: str,
    batch: int,
    classes: int,
    width: int | None = None,
) -> Job:
    """Return a Job with a model of the catalogue and random images; the same in every call.

    Raises:
        ModelError: if there is no such model, or it cannot learn to tell classes.
        SettingsError: if ``input_size`` is no size.
    """
    shape = image_shape(input_size, name)
    machine.set_threads(shape)
    model = build_model(name, num_classes=classes, in_channels=shape[0], width=width, seed=0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, generator=generator)
    y = torch.randint(classes, (batch,), generator=generator)
    if ":" in name:  # of the user's, or of a package
        images = InMemory(x, y)
        data = Data("random images", images, images, classes, shape)
        settings = Settings(batch_size=batch)
        check_model(model, Experiment(data, lambda seed: model, settings=settings))
    return place_job(name, model, x, y, machine, width)


def image_shape(text: str, model: str) -> tuple[int, int, int]:
    """Read channels, height and width of one image.

    Args:
        text: a side ("224"), all three ("3x32x32"), or nothing for what suits the model.
        model: its name.

    Raises:
        SettingsError: if the text is neither.
    """
    text = text or ("224" if model.startswith("torchvision:") else "32")
    numbers = text.split("x")
    if len(numbers) not in (1, 3) or not all(n.isdecimal() and int(n) for n in numbers):
        raise SettingsError(f"--input-size {text!r}: give a side (224) or 3x32x32")
    channels, height, width = map(int, ("3", text, text) if len(numbers) == 1 else numbers)
    return channels, height, width


def refuse_none(**counts: int) -> None:
    """Refuse a measurement that has none of something, such as rounds."""
    for name, count in counts.items():
        if count < 1:
            raise SettingsError(f"{name}={count}: must be at least 1")


def take_turns(
    turns: Mapping[Name, Callable[[], float]],
    repeats: int,
    on_turn: Callable[[Name], object] = lambda name: None,
) -> dict[Name, list[float]]:
    """Let each take a turn, round after round.

    Args:
        turns: each takes one turn and returns its seconds.
        repeats: how many rounds.
        on_turn: called with the name whose turn comes.

    Returns:
        The seconds of each, one per round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in turns}
    for _ in range(repeats):
        for name, turn in turns.items():
            on_turn(name)
            seconds[name].append(turn())
    return seconds


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: on a GPU the device's, between two events."""
    if device.type != "cuda":
        start = clock(device)
        call()
        return clock(device) - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
