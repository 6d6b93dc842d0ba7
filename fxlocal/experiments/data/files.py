"""Image files for a model that has been trained, prepared as the images that it learned from."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

from ...errors import nearest
from .dataset import Data
from .decode import build_preparation, read_image
from .images import DataError, FileError, Images

__all__ = ["LEFT_OUT", "Files", "find_images", "find_labelled"]

LEFT_OUT = -1  # the label of a file that could not be read, if that is no error


class Files(Images):
    """Image files with a label each.

    Args:
        samples: a file and its label.
        data: what the model learned from.
        skip_damaged: give files that cannot be read the label `LEFT_OUT`, and no image.

    Raises:
        DataError: if it is not known how the images that the model learned from were normalised.
    """

    def __init__(
        self, samples: Sequence[tuple[Path, int]], data: Data, skip_damaged: bool = False
    ) -> None:
        if data.statistics is None or data.shape[0] not in (1, 3):
            raise DataError(
                f"it is not known how {data.name} makes its images {data.shape} of files: let it "
                "return a Data of fxlocal.experiments.data.catalogue, with statistics"
            )
        channels, *size = data.shape
        # As ClassFolders does; other sets are cut to their size already.
        self.side = max(size) * 8 // 7 if data.name.startswith("folder:") else max(size)
        last = transforms.Normalize(*data.statistics)
        self.prepare = build_preparation(self.side, size, channels, last)
        self.samples, self.shape, self.skip_damaged = samples, data.shape, skip_damaged

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            return self.prepare(read_image(str(path), self.side)), label
        except FileError:
            if not self.skip_damaged:
                raise
            return torch.zeros(self.shape), LEFT_OUT


def find_images(path: Path) -> list[Path]:
    """Return an image file, or those in a folder and below, but for hidden ones; or a DataError."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        near = nearest(str(path), map(str, path.parent.glob("*")))
        raise DataError(f"{path}: there is no such file or folder. Nearest: {near}")
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMG_EXTENSIONS]
    seen = [f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts)]
    if not seen:
        raise DataError(f"{path} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return seen


def find_labelled(path: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the images of class folders, each with its place among the ``names`` of classes.

    Raises:
        DataError: if there are none, or one is of another class.
    """
    folders = [one for one in sorted(path.glob("*")) if one.is_dir() and one.name[0] != "."]
    if not folders:
        raise DataError(f"{path} has no class folders: give {path}/CLASS/*.jpg (or .png ...)")
    for folder in folders:
        if folder.name not in names:
            near = nearest(folder.name, names)
            raise DataError(f"{folder} is of no class that the model has learned. Nearest: {near}")
    return [(file, names.index(one.name)) for one in folders for file in find_images(one)]
