"""An epoch's batches with the ids of their samples, for a cache of what a frozen prefix makes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from ...data.images import Augment
from ..objective import MOST_SEEDS
from .augment import parse_augment, training_batches
from .tuning import SettingsError

if TYPE_CHECKING:  # an experiment is made with this
    from ..settings import Experiment

__all__ = ["cached_batches", "refuse_cache"]


def refuse_cache(experiment: "Experiment") -> None:
    """Refuse a cache where images are disturbed anew in each epoch, unless by a few fixed draws."""
    data, draws = experiment.data, experiment.augmentations
    if experiment.cache is None:
        return
    names = [part.name for part in parse_augment(experiment.settings.augment)]
    usual = data.augment is not None and names[0] == "standard"
    others = [name for name in names if name not in ("none", "standard")]
    if draws is not None and draws < 1:
        raise SettingsError(f"augmentations={draws}: give 1 or more")
    if draws is not None and (not usual or data.task == "segmentation"):
        raise SettingsError(
            f"augmentations={draws}: {data.name} is not augmented, or labels pixels; leave it out"
        )
    if others or (usual and draws is None):
        usual_one: Any = getattr(data.augment, "func", data.augment)
        name = others[0] if others else usual_one.__name__
        raise SettingsError(
            f"cache: {data.name} is augmented by {name}, drawn anew in each epoch, so that no "
            "image is the same input again. Give --augment none, or, of the standard one, "
            "augmentations=4, say, beside cache: so many fixed draws of each image"
        )


def cached_batches(
    experiment: "Experiment", batch_size: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield an epoch's batches as `training_batches` does, and the ids of their samples.

    Of images that are augmented, a batch has one of the fixed draws of each, drawn anew.
    """
    data, count = experiment.data, experiment.augmentations
    plain = replace(
        experiment, settings=replace(experiment.settings, augment="none"), augmentations=None
    )
    seed = (experiment.seed * 1_000_003 + epoch) % MOST_SEEDS
    generator = Generator().manual_seed(seed)  # as there: what it draws first is the order
    order = torch.randperm(len(data.train), generator=generator)  # type: ignore[arg-type]
    drawn = zip(
        training_batches(plain, batch_size, epoch), torch.split(order, batch_size), strict=False
    )
    for (x, y), indices in drawn:
        if data.augment is None or count is None:
            yield x, y, indices
            continue
        ids = indices * count + torch.randint(count, indices.shape, generator=generator)
        yield experiment.machine.place(_augmented(x, ids, data.augment)), y, ids


def _augmented(images_BCHW: Tensor, ids: Tensor, augment: Augment) -> Tensor:
    """Augment each image by its own draw."""
    found = [
        augment(image[None], Generator().manual_seed(own))
        for image, own in zip(images_BCHW, ids.tolist(), strict=True)
    ]
    return torch.cat(found)
