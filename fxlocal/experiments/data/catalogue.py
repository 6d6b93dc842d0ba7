"""Image data sets by name: small and real, generated, CIFAR, or a folder of the user's."""

import functools
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from ...errors import nearest
from . import glyphs, isbi2012, membranes
from .dataset import Data
from .folder import load_folder
from .images import DataError, FileError, InMemory, batches, choose, crop_and_flip, turn_and_flip
from .own import load_own

__all__ = ["DATA", "Data", "DataError", "FileError", "batches", "load_data"]

DATA = {
    "digits": "handwritten digits of scikit-learn: 1797 real images, 8x8, grey",
    "glyphs": "rendered letters and digits: any number, size and difficulty, 36 classes",
    "membranes": "generated micrographs of cells: each pixel is cell or membrane",
    "isbi2012": "ISBI 2012 challenge: 30 micrographs of nerve cells, each pixel cell or membrane",
    "cifar10": "CIFAR-10: 60000 photographs, 32x32, 10 classes",
    "cifar100": "CIFAR-100: 60000 photographs, 32x32, 100 classes",
    "folder:PATH": "class folders of images, under train/ and val/ or test/, or to be split",
    "fake": "random images and labels, 10 classes, for speed runs",
}

# Mean and standard deviation of each channel of the training images, on the scale 0 to 1.
_STATISTICS = {
    "digits": ((0.305,), (0.376,)),
    "glyphs": ((0.5, 0.5, 0.5), (0.285, 0.285, 0.285)),
    "membranes": ((0.56,), (0.13,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# The options that a set takes, with their defaults.
_OPTIONS: dict[str, dict[str, Any]] = {
    "glyphs": {"num_train": 10_000, "num_test": 2_000, "size": 32, "strength": 0.5},
    "membranes": {"num_train": 512, "num_test": 128, "size": 32, "strength": 0.5},
    "isbi2012": {"size": 128},
    "folder:PATH": {"size": 224, "split": None, "skip_damaged": False},
    "fake": {"num_train": 1024, "num_test": 256, "size": 32},
}
_NUM_DIGITS_TEST = 500
_MIN_GLYPH_SIZE = 8  # pixels; nobody reads smaller ones


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    num_train: int | None = None,
    num_test: int | None = None,
    size: int | None = None,
    strength: float | None = None,
    split: float | None = None,
    skip_damaged: bool = False,
    seed: int = 0,
) -> Data:
    """Load a data set by name; see `DATA`.

    Args:
        name: one of `DATA`, "folder:" and a path, or "package.module:function".
        root: where CIFAR or ISBI 2012 is, or CIFAR is downloaded to; None means "data".
        download: fetch CIFAR if it is not there.
        num_train: number of training images, of glyphs (default 10000), membranes (512) and
            fake (1024).
        num_test: number of test images, of glyphs (default 2000), membranes (128) and fake (256).
        size: height and width in pixels, of glyphs, membranes and fake (default 32), a
            folder (224), and the tiles that isbi2012 is cut into (128).
        strength: how hard glyphs or membranes are to see, from 0 to 1 (default 0.5).
        split: share of a folder's images to test with, where it has no val/ or test/ (default 0.2).
        skip_damaged: leave those out that cannot be read; all files are read for that.
        seed: fixes the generated images, and the split where the data set comes with none.

    Raises:
        DataError: if there is no such data set, its files are missing or unusable, or an option is
            out of range or not one of this data set's.

    Example:
        >>> digits = load_data("digits")
        >>> digits.shape, digits.num_classes, len(digits.train), len(digits.test)
        ((1, 8, 8), 10, 1297, 500)
    """
    path = name.removeprefix("folder:")
    kind = "folder:PATH" if path and path != name else name
    asked = {"num_train": num_train, "num_test": num_test, "size": size, "strength": strength}
    asked |= {"split": split, "skip_damaged": skip_damaged or None}
    if kind not in DATA and re.fullmatch(r"[\w.]+:\w+", name):
        return load_own(name, {key: value for key, value in asked.items() if value is not None})
    if kind not in DATA and name and Path(name).is_dir():
        raise DataError(f"{name!r} is a folder: give folder:{name}")
    if kind not in DATA:
        near = nearest(name, DATA)
        raise DataError(
            f"unknown data {name!r}. Nearest: {near}; or give 'package.module:function'"
        )
    if download and kind not in ("cifar10", "cifar100", "isbi2012"):
        raise DataError(f"download does not apply to {name!r}: there is nothing to fetch")
    options = _OPTIONS.get(kind, {}) | _checked(name, kind, asked)
    match kind:
        case "digits":
            return _digits(seed)
        case "glyphs" | "membranes":
            return _rendered(kind, seed, **options)
        case "isbi2012":
            return _isbi2012(Path(root or "data"), download, **options)
        case "fake":
            return _fake(seed, **options)
        case "folder:PATH":
            return load_folder(name, Path(path).expanduser(), seed, **options)
    return _cifar(name, Path(root or "data"), download)


def _checked(name: str, kind: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are given; DataError if one is out of range or not of this set."""
    given = {option: value for option, value in asked.items() if value is not None}
    takes = _OPTIONS.get(kind, {})
    for option, value in given.items():
        if option not in ("strength", "split", "skip_damaged") and value < 1:
            raise DataError(f"{option} of {name!r} must be 1 or more, not {value}")
        if option not in takes:
            known = ", ".join(takes) or "none of " + ", ".join(asked)
            raise DataError(f"{option}={value} does not apply to {name!r}, which takes {known}")
        if option == "split" and not 0 < value < 1:
            raise DataError(f"split of {name!r} must be between 0 and 1, not {value}")
        if option == "strength" and not 0 <= value <= 1:
            raise DataError(f"strength of {name!r} must be between 0 and 1, not {value}")
    if kind in ("membranes", "isbi2012") and given.get("size", 0) % 16:
        raise DataError(
            f"size of {name!r} must be a multiple of 16, as U-Net asks, not {given['size']}"
        )
    return given


def _normalised(pixels: Tensor, statistics: str, levels: int = 255) -> Tensor:
    """Return values from 0 to ``levels`` as floats, normalised channel by channel."""
    mean, std = (torch.tensor(values)[:, None, None] for values in _STATISTICS[statistics])
    return pixels.float().div_(levels).sub_(mean).div_(std)


@functools.cache
def _read_digits() -> Any:
    from sklearn.datasets import load_digits  # slow to import, and nothing else needs it

    return load_digits()  # half a second of reading text


def _digits(seed: int) -> Data:
    bunch = _read_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    everything = InMemory(_normalised(images, "digits", 16), torch.tensor(bunch.target))
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    test, train = (choose(everything, part) for part in order.tensor_split([_NUM_DIGITS_TEST]))
    return Data(
        *("digits", train, test), num_classes=10, shape=(1, 8, 8), statistics=_STATISTICS["digits"]
    )


def _rendered(
    name: str, seed: int, num_train: int, num_test: int, size: int, strength: float
) -> Data:
    if name == "glyphs" and size < _MIN_GLYPH_SIZE:
        raise DataError(f"size of 'glyphs' must be {_MIN_GLYPH_SIZE} or more, not {size}")
    render = glyphs.render if name == "glyphs" else membranes.render
    # Seeds of their own, so that no test image is a training image of this or another seed.
    drawn = [
        render(num, size=size, strength=strength, seed=2 * seed + part)
        for part, num in enumerate((num_train, num_test))
    ]
    train, test = (InMemory(_normalised(images, name), labels) for images, labels in drawn)
    if name == "membranes":
        return _segmentation(name, train, test, size)
    shape, statistics = (3, size, size), _STATISTICS[name]
    return Data(name, train, test, len(glyphs.CHARACTERS), shape, statistics=statistics)


def _isbi2012(root: Path, download: bool, size: int) -> Data:
    if download:
        raise DataError(
            "cannot download 'isbi2012': the challenge hands its files out on its site only. Put "
            f"{isbi2012.VOLUME} and {isbi2012.LABELS} into a folder and point --data-root at it"
        )
    return _segmentation("isbi2012", *isbi2012.load(root, size), size)


def _segmentation(name: str, train: InMemory, test: InMemory, size: int) -> Data:
    """Make a set of square grey images, whose pixels are membrane (0) or cell (1)."""
    classes = len(membranes.CLASSES)
    return Data(name, train, test, classes, (1, size, size), turn_and_flip, "segmentation")


def _fake(seed: int, num_train: int, num_test: int, size: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    train, test = (
        InMemory(
            torch.randn(num, 3, size, size, generator=generator),
            torch.randint(10, (num,), generator=generator),
        )
        for num in (num_train, num_test)
    )
    return Data("fake", train, test, num_classes=10, shape=(3, size, size))


def _cifar(name: str, root: Path, download: bool) -> Data:
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / source.base_folder
    try:
        parts = [source(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:  # what torchvision raises for files and for downloads
        if download:
            raise DataError(f"cannot download {name!r} to {folder}: {error}") from error
        found = "it is incomplete or damaged" if folder.exists() else "there is no such folder"
        raise DataError(
            f"cannot load {name!r} from {folder}: {found}. Point --data-root at the folder that "
            f"holds {source.base_folder}, or add --download"
        ) from error
    train, test = (
        InMemory(
            _normalised(torch.from_numpy(part.data).permute(0, 3, 1, 2), name),
            torch.tensor(part.targets),
        )
        for part in parts
    )
    classes, augment = tuple(parts[0].classes), partial(crop_and_flip, padding=4)
    own: Any = {"statistics": _STATISTICS[name], "classes": classes}
    return Data(name, train, test, len(classes), (3, 32, 32), augment, **own)
