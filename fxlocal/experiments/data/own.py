"""What a function of the user's returns, as a data set."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..own import RAISED, import_own
from .dataset import Data
from .images import DataError, InMemory

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
    train, test = map(_in_memory, made)
    shape = _check_sample(name, train)
    classes = tuple(map(str, getattr(made[0], "classes", ())))
    if not classes and not isinstance(train, InMemory):
        raise DataError(
            f"{name!r}: give its train set an attribute classes, the list of their names"
        )
    num = len(classes) or 1 + int(train.labels.max())
    return Data(name, train, test, num, shape, classes=classes)


def _has_length(part: Any) -> bool:
    return hasattr(part, "__len__") and hasattr(part, "__getitem__") and len(part) > 0


def _in_memory(part: Any) -> Any:
    if isinstance(part, TensorDataset) and len(part.tensors) == 2:
        return InMemory(*part.tensors)
    return part


def _check_sample(name: str, train: Any) -> tuple[int, int, int]:
    """Return the shape of an image; refuse what is no sample."""
    try:
        image, label = train[0]
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
    return image.shape[0], image.shape[1], image.shape[2]
