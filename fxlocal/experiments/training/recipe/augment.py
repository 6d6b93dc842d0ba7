"""What disturbs a batch of training images, by name, in the language of specs.

| name | what it does |
|---|---|
| ``none`` | nothing, and stands alone |
| ``standard`` | what the data set comes with: photographs are shifted and mirrored |
| ``randaugment(num_ops=2,magnitude=9)`` | `torchvision.transforms.v2.RandAugment`, of 8 bits |
| ``mixup(alpha=0.2)`` | `torchvision.transforms.v2.MixUp`: targets are shares of classes |
| ``cutmix(alpha=1)`` | `torchvision.transforms.v2.CutMix`, likewise |

Joined by ``+`` they are applied one after another: ``standard+randaugment+mixup``.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from ...data.catalogue import Data, batches
from ...data.images import Augment
from ..objective import MOST_SEEDS
from ..specs import Part, StrategyError, parse_parts
from .tuning import SettingsError

if TYPE_CHECKING:  # settings are read with this
    from ..settings import Experiment

__all__ = ["parse_augment", "refuse_augment", "training_batches"]


def _usual(data: Data, size: int) -> None:
    """Stand for what `_usual_augment` returns."""


def _randaugment(data: Data, size: int, *, num_ops: int = 2, magnitude: int = 9) -> Any:
    from torchvision.transforms import v2  # slow to import, and nothing else needs it

    change = v2.RandAugment(num_ops, magnitude)
    mean, std = (torch.tensor(values)[:, None, None] for values in data.statistics or ())

    def apply(images_BCHW: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = (one.to(images_BCHW.device) for one in (mean, std))
        pixels = (images_BCHW * scale + shift).clamp(0, 1).mul(255).round().byte()
        changed = torch.stack([change(image) for image in pixels])  # each by its own draws
        return changed.float().div_(255).sub_(shift).div_(scale), labels

    return apply


def _mixup(data: Data, size: int, *, alpha: float = 0.2) -> Any:
    from torchvision.transforms import v2  # likewise

    return v2.MixUp(alpha=alpha, num_classes=data.num_classes)


def _cutmix(data: Data, size: int, *, alpha: float = 1.0) -> Any:
    from torchvision.transforms import v2  # likewise

    return v2.CutMix(alpha=alpha, num_classes=data.num_classes)


_KINDS: dict[str, Callable[..., Any]] = {
    "none": _usual,
    "standard": _usual,
    "randaugment": _randaugment,
    "mixup": _mixup,
    "cutmix": _cutmix,
}
_LIMITS = {"num_ops": (1, 14), "magnitude": (0, 30), "alpha": (1e-3, math.inf)}


def parse_augment(text: str) -> tuple[Part, ...]:
    """Read what ``--augment`` says; a SettingsError if it is none of these."""
    try:
        parts = parse_parts(text, _KINDS, "augmentation")
    except StrategyError as error:
        raise SettingsError(f"augment={text!r}: {error}") from error
    names = [part.name for part in parts]
    if len({*names}) < len(names) or ("none" in names and len(names) > 1):
        raise SettingsError(f"augment={text!r}: give each once, and none alone")
    if {"mixup", "cutmix"} <= {*names}:
        raise SettingsError(f"augment={text!r}: give one of mixup and cutmix")
    if "standard" in names[1:]:
        raise SettingsError(f"augment={text!r}: standard comes first")
    for part in parts:
        for name, value in part.given.items():
            low, high = _LIMITS[name]
            if not low <= value <= high or value == math.inf:
                wanted = f"from {low} to {high}" if high < math.inf else f"finite, from {low}"
                raise SettingsError(f"augment={text!r}: {name}={value}: give a number {wanted}")
    return parts


def refuse_augment(text: str, data: Data) -> None:
    """Refuse what cannot be done to these images."""
    names = {part.name for part in parse_augment(text)}
    if odd := names - {"none", "standard"}:
        if data.task == "segmentation":
            raise SettingsError(
                f"augment={text!r}: {data.name} labels each pixel, which {min(odd)} does not move; "
                "give standard or none"
            )
        if "randaugment" in odd and data.statistics is None:
            raise SettingsError(
                f"augment={text!r}: nothing says which values of {data.name} are black and white, "
                "as randaugment asks; leave it out"
            )


def _usual_augment(text: str, data: Data) -> Augment | None:
    """Return what the data set comes with, if it is asked for."""
    return data.augment if parse_augment(text)[0].name == "standard" else None


def _augmented(
    drawn: Iterator[tuple[Tensor, Tensor]], text: str, data: Data, generator: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch, disturbed by all but what the data set comes with.

    The generator's state alone fixes the epoch; torchvision draws from the global one, which is as
    it was afterwards.
    """
    parts = [part for part in parse_augment(text) if part.name not in ("none", "standard")]
    made = [_KINDS[part.name](data, 0, **part.given) for part in parts]
    if not made:
        yield from drawn
        return
    for images, labels in drawn:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for change in made:
                images, labels = change(images, labels)
        yield images, labels


def training_batches(
    experiment: "Experiment", batch_size: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's batches: images (B, C, H, W) and labels, where and how the machine is.

    A smaller last batch is left out, so that there is one shape: one compilation, and no batch norm
    over a single image. The order depends on seed and epoch, so that a resumed run draws what an
    unbroken one draws.
    """
    data, machine, augment = experiment.data, experiment.machine, experiment.settings.augment
    seed = (experiment.seed * 1_000_003 + epoch) % MOST_SEEDS
    generator = torch.Generator().manual_seed(seed)
    drawn = batches(
        data.train,
        batch_size,
        generator=generator,
        augment=_usual_augment(augment, data),
        device=machine.device,
        drop_last=True,
        workers=machine.workers,
    )
    return ((machine.place(x), y) for x, y in _augmented(drawn, augment, data, generator))
