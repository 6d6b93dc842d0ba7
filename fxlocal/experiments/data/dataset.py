"""A data set, split, and all that there is to know of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .images import Augment, Images
from .task import Goal, Task

__all__ = ["Data"]


@dataclass(frozen=True)
class Data:
    """One data set, split and normalised.

    Attributes:
        name: the name that it was asked by.
        train: the training images, each (float32 of `shape`, label, or a label of each pixel).
        test: the test images, likewise.
        num_classes: labels run from 0 to `num_classes` - 1.
        shape: (channels, height, width) of each image.
        augment: disturbs a batch of training images, driven by a generator; None for nothing.
        task: what the labels are for; segmentation labels each pixel, 1 where the foreground is.
        statistics: mean and standard deviation of the channels that were taken out of them, on the
            scale 0 to 1; None if nothing says so.
        classes: their names, if they have any.
        notes: what the user should know, such as files that were left out.
    """

    name: str
    train: Images
    test: Images
    num_classes: int
    shape: tuple[int, int, int]
    augment: Augment | None = None
    task: Task = "classification"
    statistics: tuple[Sequence[float], Sequence[float]] | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def goal(self) -> Goal:
        """What there is to learn."""
        return Goal(self.num_classes, self.task)

    def of(self, images: Images) -> "Data":
        """Return the same with other images, to train and to test with, as they are."""
        return replace(self, train=images, test=images, augment=None)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or else their numbers."""
        return self.classes or tuple(map(str, range(self.num_classes)))

    @property
    def facts(self) -> dict[str, Any]:
        """What JSON can say of it: all that a trained model needs of the set that it learned."""
        hidden = ("train", "test", "augment", "notes")
        return {name: value for name, value in vars(self).items() if name not in hidden}
