"""What a function of the user's returns, as a data set."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..own import RAISED, import_own
from .dataset import Data
from .images import DataError, Images, InMemory

__all__ = ["load_own"]


def load_own(name: str, asked: Mapping[str, Any]) -> Data:
    """Call a function, and take what it returns as a data set.

    Args:
        name: "package.module:function". It returns a `Data`, or a pair of map-style data sets,
            train and test, of pairs (normalised float image of shape (C, H, W), class index). The
            number of classes is the length of the train set's ``classes``; of a `TensorDataset`
            the largest label's successor.
        asked: options that are passed on to a function that names them.

    Raises:
        DataError: if it raises, or returns something else.
    """
    function = import_own(name, "data", DataError)
    if not callable(function):
        raise DataError(
            f"{name!r} is a {type(function).__name__}, not a function that returns data"
        )
    takes = inspect.signature(function).parameters
    if odd := next((option for option in asked if option not in takes), None):
        raise DataError(f"{odd}={asked[odd]} does not apply to {name!r}, which takes no {odd}")
    try:
        made = function(**asked)
    except RAISED as error:
        raise DataError(f"{name!r} raises {type(error).__name__}: {error}") from error
    if isinstance(made, Data):
        return made
    if not (isinstance(made, (tuple, list)) and len(made) == 2 and all(map(_has_length, made))):
        raise DataError(
            f"{name!r} returned {type(made).__name__}: give (train, test), two data sets with a "
            "length, or a Data of fxlocal.experiments.data.catalogue"
        )
    train, test = (_in_memory(name, part) for part in made)
    shape, _ = _check_sample(name, train), _check_sample(name, test)
    classes = tuple(map(str, getattr(made[0], "classes", ())))
    if not classes and not isinstance(train, InMemory):
        raise DataError(
            f"{name!r}: give its train set an attribute classes, the list of their names"
        )
    num = len(classes) or 1 + int(train.labels.max())
    if num < 2:
        raise DataError(f"{name!r} has labels of fewer than two classes")
    train, test = (_checked(name, part, num) for part in (train, test))
    return Data(name, train, test, num, shape, classes=classes)


class _Checked(Images):
    """Samples of the user's: a `DataError` names one that is none."""

    def __init__(self, name: str, part: Any, num_classes: int) -> None:
        self.name, self.part, self.num_classes = name, part, num_classes
        self.shape = part[0][0].shape
        # What tells one set from another, if they are files.
        self.samples, self.root = getattr(part, "samples", None), getattr(part, "root", "")

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.part[index]
            shape, label = image.shape, int(label)
        except DataError:
            raise
        except RAISED as error:
            raise DataError(
                f"{self.name!r}: sample {index} raises {type(error).__name__}: {error}"
            ) from error
        if shape != self.shape:
            shapes = f"{tuple(shape)}, the first of {tuple(self.shape)}"
            raise DataError(f"{self.name!r}: sample {index} is an image of {shapes}")
        _refuse_label(self.name, label, self.num_classes)
        return image, label


def _checked(name: str, part: Any, num_classes: int) -> Images:
    if not isinstance(part, InMemory):
        return _Checked(name, part, num_classes)
    for label in (part.labels.min(), part.labels.max()):
        _refuse_label(name, int(label), num_classes)
    return part


def _refuse_label(name: str, label: int, num_classes: int) -> None:
    if not 0 <= label < num_classes:
        raise DataError(
            f"{name!r}: a label is {label}: give 0 to {num_classes - 1}, of its classes"
        )


def _has_length(part: Any) -> bool:
    return hasattr(part, "__len__") and hasattr(part, "__getitem__") and len(part) > 0


def _in_memory(name: str, part: Any) -> Any:
    if not isinstance(part, TensorDataset) or len(part.tensors) != 2:
        return part
    images, labels = part.tensors
    if labels.is_floating_point() or labels.dim() != 1:
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise DataError(f"{name!r}: its labels are {found}: give integers of shape (number,)")
    return InMemory(images, labels.long())


def _check_sample(name: str, part: Any) -> tuple[int, int, int]:
    """Return the shape of an image; refuse what is no sample."""
    try:
        image, label = part[0]
        label = int(label)
    except RAISED as error:
        raise DataError(
            f"{name!r}: its first sample is no pair (image, class): {type(error).__name__}: {error}"
        ) from error
    if not isinstance(image, Tensor) or image.dim() != 3 or image.dtype != torch.float32:
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image)
        raise DataError(
            f"{name!r}: its first image is {found}: give float32 tensors of (channels, height, "
            "width), by v2.ToImage(), v2.ToDtype(torch.float32, scale=True) and v2.Normalize"
        )
    if not image.isfinite().all():
        raise DataError(f"{name!r}: its first image has values that are no numbers")
    return image.shape[0], image.shape[1], image.shape[2]
