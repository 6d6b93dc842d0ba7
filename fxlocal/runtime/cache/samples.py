"""Hand on which sample is which, and draw its augmentations from a fixed few."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from ...errors import PlanError
from ...ir.random_state import seeded

__all__ = ["WithIds"]


class WithIds(Dataset[Any]):
    """A data set whose samples end with their id, for ``driver.network()(x, sample_ids=ids)``.

    ``(x, y)`` becomes ``(x, y, id)``; a dict gets an entry ``"sample_ids"``.

    Args:
        dataset: with a length, and samples by index.
        augmentations: None where the same index always gives the same input. Where random
            transforms disturb it, how many draws of them there are to be for each sample, each with
            an id of its own. An approximation: the network sees only these in all epochs.

    Raises:
        PlanError: if the data set has no samples by index, or random transforms without a number
            of draws, as far as its ``transform`` attributes tell; they are named.

    Example:
        >>> data = WithIds([(torch.ones(3), 0), (torch.zeros(3), 1)])
        >>> data[1]
        (tensor([0., 0., 0.]), 1, 1)
    """

    def __init__(self, dataset: Any, augmentations: int | None = None) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise PlanError(
                f"WithIds({type(dataset).__name__}): its samples have no index, which could be "
                "their id. Give a data set with __getitem__ and __len__, or ids of your own"
            )
        if augmentations is not None and (isinstance(augmentations, bool) or augmentations < 1):
            raise PlanError(f"augmentations={augmentations!r}: give a whole number from 1, or None")
        if augmentations is None and (found := next(_random_transforms(dataset), None)):
            raise PlanError(
                f"WithIds: {found} draws anew in each epoch, so that the same sample is never the "
                "same input. Give augmentations=4, say, for so many fixed draws of each sample, or "
                "leave it out of the transforms"
            )
        self.dataset, self.augmentations = dataset, augmentations

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if self.augmentations is None:
            return _joined(self.dataset[index], index)
        draw = int(torch.randint(self.augmentations, ()))  # of this epoch
        own = index * self.augmentations + draw
        with seeded(own):
            sample = self.dataset[index]
        return _joined(sample, own)


def _joined(sample: Any, own: int) -> Any:
    if isinstance(sample, dict):
        return {**sample, "sample_ids": own}
    return (*sample, own) if isinstance(sample, (tuple, list)) else (sample, own)


def _random_transforms(dataset: Any) -> Iterator[str]:
    """Yield the names of transforms that draw, of a data set or one that it wraps."""
    seen: set[int] = set()
    waiting = [dataset]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen or isinstance(one, (str, bytes, torch.Tensor)):
            continue
        seen.add(id(one))
        name = type(one).__name__
        if (name.startswith("Random") or name in _DRAWING) and getattr(one, "p", 1) != 0:
            yield name
        if isinstance(one, (list, tuple)):
            waiting += one if len(one) < 100 else ()  # of samples there are more
            continue
        for attribute in ("dataset", "datasets", "transforms", "transform"):
            waiting.append(getattr(one, attribute, None))


_DRAWING = {"ColorJitter", "AutoAugment", "RandAugment", "TrivialAugmentWide", "AugMix"}
_DRAWING |= {"ElasticTransform", "GaussianBlur", "GaussianNoise", "ScaleJitter", "JPEG", "CutMix"}
_DRAWING |= {"MixUp"}
