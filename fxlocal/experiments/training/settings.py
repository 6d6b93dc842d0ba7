"""What a run is: how it trains, where it computes, and all that its numbers depend on.

A field whose type carries a text is an option of the command line, and the text is its help.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, MultiStepLR

from ...schedules import Constant, Schedule
from ..data.catalogue import Data

if TYPE_CHECKING:
    from .specs import Spec

__all__ = [
    "Experiment",
    "Machine",
    "Settings",
    "SettingsError",
    "build_optimizer",
    "build_scheduler",
    "count_steps",
]


class SettingsError(ValueError):
    """The settings of a run are out of range, or do not fit this machine."""


@dataclass(frozen=True)
class Machine:
    """Where and how to compute; see `set_threads` for the usual number of threads."""

    device: Annotated[str, "cpu, cuda, cuda:1, ..."] = "cpu"
    compile: Annotated[bool, "Run through torch.compile"] = False
    cudagraph: Annotated[bool, "Replay CUDA graphs instead"] = False
    amp: Annotated[bool, "Autocast to bfloat16"] = False
    channels_last: Annotated[bool, "Keep images and weights channels-last"] = False
    threads: Annotated[int | None, "CPU threads; default: 1 for small images"] = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise SettingsError(f"threads={self.threads}: must be at least 1")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # unknown name; known, but not built in
            raise SettingsError(f"device {self.device!r} cannot be used here: {error}") from error
        if self.cudagraph and torch.device(self.device).type != "cuda":
            raise SettingsError(f"cudagraph needs a CUDA device, not {self.device!r}")

    @property
    def name(self) -> str:
        """The device, as a reader of the numbers knows it."""
        kind = torch.device(self.device).type
        if kind == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        return f"cpu ({torch.get_num_threads()} threads)" if kind == "cpu" else self.device

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def set_threads(self, shape: tuple[int, int, int]) -> None:
        """Tell torch, for the whole process, how many CPU threads to use on images of ``shape``.

        A layer on a few pixels is too little work to share: on two cores that others use as well,
        two threads waited for each other and took ten times as long as one on 8x8 images.
        """
        threads = self.threads
        if threads is None and shape[1] * shape[2] < 16 * 16:
            threads = 1
        if threads is not None:
            torch.set_num_threads(threads)

    def autocast(self) -> torch.autocast:
        """Return the context for a forward and its loss."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.amp)

    def place(self, images_BCHW: Tensor) -> Tensor:
        """Put a batch where the model is, in the model's layout."""
        return images_BCHW.to(self.device, memory_format=self.layout)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move ``model`` there, in place, and return it."""
        return model.to(self.device).to(memory_format=self.layout)


@dataclass(frozen=True)
class Settings:
    """How to train.

    ``lr_schedule`` lets the learning rate fall to a tenth after one and after two thirds of the
    epochs (step), to zero along a cosine, to a hundredth by the same factor in each epoch
    (exponential), or not at all. ``memory_budget``, for the batch to grow into, is in MiB; None is
    what the first epoch takes. ``grow_lr`` says how the learning rate follows a batch that grows.
    """

    epochs: Annotated[int, "Passes over the images"] = 12
    batch_size: Annotated[int, "Images per step"] = 64
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], "sgd, adam or adamw"] = "sgd"
    lr: Annotated[float, "Learning rate at the start"] = 0.05
    lr_schedule: Annotated[
        Literal["step", "cosine", "exponential", "constant"], "step, cosine, ..."
    ] = "step"
    momentum: Annotated[float, "Momentum, of sgd only"] = 0.9
    weight_decay: Annotated[float, "Weight decay"] = 5e-4
    evaluate_every: Annotated[int, "Epochs per evaluation"] = 1
    grow_batch: Annotated[bool, "Grow the batch as the boundary moves"] = False
    memory_budget: Annotated[float | None, "MiB to grow into; else the first epoch's"] = None
    grow_lr: Annotated[Literal["none", "linear", "sqrt"], "none, linear or sqrt"] = "linear"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("lr", "momentum", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingsError(f"{name}={getattr(self, name)}: must be finite, at least 0")
        if self.memory_budget is not None and not 0 < self.memory_budget < math.inf:
            raise SettingsError(f"memory_budget={self.memory_budget}: must be finite, above 0")
        if self.grow_lr != Settings.grow_lr and not self.grows:
            raise SettingsError("--grow-lr: no batch grows; add --grow-batch or --memory-budget")
        if self.momentum != Settings.momentum and self.optimizer != "sgd":
            raise SettingsError(f"--momentum: {self.optimizer} has none; leave it out")

    @property
    def grows(self) -> bool:
        """Whether the batch grows; a budget says so too."""
        return self.grow_batch or self.memory_budget is not None


@dataclass(frozen=True)
class Experiment:
    """All that a run depends on: equal experiments give equal numbers.

    Attributes:
        data: what the model learns from and is judged by.
        build: makes the model, from the seed; equal seeds must give equal weights.
        schedule: which layers learn how, epoch by epoch.
        settings: how long and how fast.
        machine: where and how to compute.
        model: the model's name, for the record.
        strategy: the schedule's, likewise.
        seed: fixes the weights, the order of the batches and the model's random operations.
    """

    data: Data
    build: Callable[[int], nn.Module]
    schedule: Schedule = field(default_factory=Constant)
    settings: Settings = Settings()
    machine: Machine = Machine()
    model: str = ""
    strategy: str = ""
    seed: int = 0

    def by(self, spec: "Spec") -> "Experiment":
        """Return the same by another strategy.

        Raises:
            StrategyError: if the spec makes no schedule.
        """
        schedule = spec.schedule(self.settings.epochs, self.data.goal)
        return replace(self, schedule=schedule, strategy=spec.text)

    @property
    def num_steps(self) -> int:
        """The number of steps in an epoch whose batch does not grow."""
        return count_steps(self.data, self.settings.batch_size)

    @property
    def example(self) -> Tensor:
        """A batch of nothing, on the machine."""
        return self.machine.place(torch.zeros(self.settings.batch_size, *self.data.shape))


def count_steps(data: Data, batch_size: int) -> int:
    """Return the number of steps in one epoch."""
    return len(data.train) // batch_size  # type: ignore[arg-type]  # ours have a length


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: Settings
) -> torch.optim.Optimizer:
    """Make the optimizer of every parameter, local layers' too: a checkpoint needs its state."""
    lr, weight_decay = settings.lr, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=settings.momentum, weight_decay=weight_decay
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=weight_decay)


def build_scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> LRScheduler:
    """Make what moves the learning rate; step it once an epoch."""
    if settings.lr_schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=settings.epochs)
    if settings.lr_schedule == "exponential":
        return ExponentialLR(optimizer, gamma=0.01 ** (1 / settings.epochs))
    thirds = [math.ceil(settings.epochs / 3), math.ceil(2 * settings.epochs / 3)]
    return MultiStepLR(optimizer, thirds if settings.lr_schedule == "step" else [])
