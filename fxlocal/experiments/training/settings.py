"""What a run is: how it trains, where it computes, and all that its numbers depend on.

A field whose type carries a text is an option of the command line, and the text is its help.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
    StepLR,
)

from ...schedules import Constant, Schedule
from ..data.catalogue import Data
from ..data.task import Goal
from .recipe.augment import parse_augment
from .recipe.fit import refuse_unfit
from .recipe.tuning import SettingsError, Tuning, group_parameters
from .specs import Part, Spec, StrategyError, parse_parts, value_text
from .strategies import Modulation

__all__ = [
    "Experiment",
    "Machine",
    "Settings",
    "SettingsError",
    "build_optimizer",
    "build_scheduler",
    "count_steps",
]


def _step(
    optimizer: Optimizer, length: int, *, factor: float = 0.1, every: int | None = None
) -> LRScheduler:
    if every is not None:
        return StepLR(optimizer, every, factor)
    return MultiStepLR(optimizer, [math.ceil(length / 3), math.ceil(2 * length / 3)], factor)


def _exponential(optimizer: Optimizer, length: int, *, factor: float | None = None) -> LRScheduler:
    return ExponentialLR(optimizer, 0.01 ** (1 / length) if factor is None else factor)


def _warmup(
    optimizer: Optimizer, length: int, *, epochs: int = 5, start: float = 0.1
) -> LRScheduler:
    return LinearLR(optimizer, start, total_iters=epochs)


_LR_SCHEDULES: dict[str, Callable[..., LRScheduler]] = {
    "step": _step,
    "cosine": lambda optimizer, length: CosineAnnealingLR(optimizer, T_max=length),
    "exponential": _exponential,
    "constant": lambda optimizer, length: MultiStepLR(optimizer, []),
    "warmup": _warmup,
}


def _read_lr_schedule(text: str) -> tuple[Part, ...]:
    """Return the warm-up, if there is one, and the schedule behind it; or a SettingsError."""
    told = f"lr_schedule={text!r}"
    try:
        parts = parse_parts(text, _LR_SCHEDULES, "learning-rate schedule")
    except StrategyError as error:
        raise SettingsError(f"{told}: {error}") from error
    if parts[-1].name == "warmup":
        raise SettingsError(f"{told}: give what follows it too, as in warmup(epochs=5)+cosine")
    if any(part.name != "warmup" for part in parts[:-1]) or len(parts) > 2:
        raise SettingsError(f"{told}: give one schedule, behind one warm-up at most")
    for part in parts:
        for name, value in part.given.items():
            if isinstance(value, float) and not 0 < value <= 1:
                wanted = "a fraction above 0, at most 1"
            elif isinstance(value, int) and value < 1:
                wanted = "a whole number from 1"
            else:
                continue
            raise SettingsError(f"{told}: {name}={value_text(value)}: give {wanted}")
    return parts


def _warm_epochs(warmup: Part) -> int:
    return int(warmup.given.get("epochs", 5))


@dataclass(frozen=True)
class Machine:
    """Where and how to compute; see `set_threads` for the usual number of threads."""

    device: Annotated[str, "cpu, cuda, cuda:1, ..."] = "cpu"
    compile: Annotated[bool, "Run through torch.compile"] = False
    cudagraph: Annotated[bool, "Replay CUDA graphs instead", "rare"] = False
    amp: Annotated[bool, "Autocast to bfloat16"] = False
    channels_last: Annotated[bool, "Keep images and weights channels-last", "rare"] = False
    threads: Annotated[int | None, "CPU threads; default: 1 for small images"] = None
    workers: Annotated[int | None, "Processes that decode files; default: 8", "rare"] = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise SettingsError(f"workers={self.workers}: must be at least 0")
        if self.threads is not None and self.threads < 1:
            raise SettingsError(f"threads={self.threads}: must be at least 1")
        try:
            torch.empty(0, device=self.device)
            self.autocast()  # which devices without data have not
        except (RuntimeError, AssertionError) as error:  # unknown name; known, but not built in
            reason = str(error).split(". ")[0].splitlines()[0]
            raise SettingsError(f"device {self.device!r} cannot be used here: {reason}") from error
        if self.cudagraph and torch.device(self.device).type != "cuda":
            raise SettingsError(f"cudagraph needs a CUDA device, not {self.device!r}")

    @property
    def name(self) -> str:
        """The device, as a reader of the numbers knows it."""
        kind = torch.device(self.device).type
        if kind == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' * (threads > 1)})" if kind == "cpu" else self.device

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
class Settings(Tuning):
    """How to train.

    ``lr_schedule`` is one of these, in the language of `fxlocal.experiments.training.specs`, behind
    a ``warmup(epochs=5,start=0.1)+`` if it is to rise from a fraction first; the schedule then has
    the epochs that are left.

    | schedule | how the learning rate falls |
    |---|---|
    | ``step(factor=0.1,every=none)`` | by a factor every so many epochs; of none, at their thirds |
    | ``cosine`` | to zero along a cosine |
    | ``exponential(factor=none)`` | by a factor in each epoch; of none, to a hundredth in all |
    | ``constant`` | not at all |

    ``memory_budget``, for the batch to grow into, is in MiB; None is what the first epoch takes.
    ``grow_lr`` says how the learning rate follows a batch that grows.
    """

    epochs: Annotated[int, "Passes over the images"] = 12
    batch_size: Annotated[int, "Images per step"] = 64
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], "sgd, adam or adamw"] = "sgd"
    lr: Annotated[float, "Learning rate at the start"] = 0.05
    lr_schedule: Annotated[str, "step, cosine, ..."] = "step"
    momentum: Annotated[float, "Momentum, of sgd only"] = 0.9
    weight_decay: Annotated[float, "Weight decay"] = 5e-4
    evaluate_every: Annotated[int, "Epochs per evaluation", "rare"] = 1
    grow_batch: Annotated[bool, "Grow the batch as the boundary moves"] = False
    memory_budget: Annotated[float | None, "MiB to grow into; else the first epoch's", "rare"] = (
        None
    )
    grow_lr: Annotated[Literal["none", "linear", "sqrt"], "none, linear or sqrt", "rare"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_augment(self.augment)
        for name in ("epochs", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("lr", "momentum", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingsError(f"{name}={getattr(self, name)}: must be finite, at least 0")
        *warmup, _ = _read_lr_schedule(self.lr_schedule)
        if warmup and (warm := _warm_epochs(warmup[0])) >= self.epochs > 1:
            raise SettingsError(
                f"lr_schedule={self.lr_schedule!r}: of {self.epochs} epochs none is left behind a "
                f"warm-up of {warm}; give more --epochs, or a shorter one"
            )
        if self.memory_budget is not None and not 0 < self.memory_budget < math.inf:
            raise SettingsError(f"memory_budget={self.memory_budget}: must be finite, above 0")
        if self.grow_lr != Settings.grow_lr and not self.grows:
            raise SettingsError("--grow-lr: no batch grows; add --grow-batch or --memory-budget")
        if self.batch_size % self.accumulate:
            raise SettingsError(
                f"accumulate={self.accumulate}: a batch of {self.batch_size} images has no so many "
                "equal parts"
            )
        if self.accumulate > 1 and self.grows:
            raise SettingsError("--accumulate: a batch that grows fills the memory; leave one out")
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
        modulation: what takes the steps of local layers in place of the rule itself.
        cache: bytes in which to keep what a frozen prefix makes; None keeps nothing.
        augmentations: how many fixed draws there are of an image then, where they are augmented.
    """

    data: Data
    build: Callable[[int], nn.Module]
    schedule: Schedule = field(default_factory=Constant)
    settings: Settings = Settings()
    machine: Machine = Machine()
    model: str = ""
    strategy: str = ""
    seed: int = 0
    modulation: Modulation = None
    cache: str | int | None = None
    augmentations: int | None = None

    def __post_init__(self) -> None:
        refuse_unfit(self)

    @property
    def goal(self) -> Goal:
        """What there is to learn, and how it is read."""
        smoothing, output = self.settings.label_smoothing, self.settings.output
        return replace(self.data.goal, label_smoothing=smoothing, output=output)

    def by(self, spec: Spec) -> "Experiment":
        """Return the same by another strategy; a StrategyError if the spec makes no schedule."""
        schedule = spec.schedule(self.settings.epochs, self.goal)
        told: dict[str, Any] = {"schedule": schedule, "strategy": spec.text}
        of_run = ("modulation", "cache", "augmentations")
        return replace(self, **told, **{name: spec.of_run(name) for name in of_run})

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
    model: nn.Module, parameters: Iterable[nn.Parameter], settings: Settings
) -> Optimizer:
    """Make the optimizer of every parameter, local layers' too: a checkpoint needs its state."""
    lr, weight_decay = settings.lr, settings.weight_decay
    groups = group_parameters(model, parameters, settings)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, weight_decay=weight_decay)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, weight_decay=weight_decay)


def build_scheduler(optimizer: Optimizer, settings: Settings) -> LRScheduler:
    """Make what moves the learning rate; step it once an epoch."""
    *warmup, last = _read_lr_schedule(settings.lr_schedule)
    warm = _warm_epochs(warmup[0]) if warmup else 0
    parts = [*((part, warm) for part in warmup), (last, max(settings.epochs - warm, 1))]
    made = [_LR_SCHEDULES[part.name](optimizer, epochs, **part.given) for part, epochs in parts]
    return SequentialLR(optimizer, made, [warm]) if warmup else made[0]
