"""Class folders of image files, decoded so that grey keeps its depth and damage its file's name."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from PIL import TiffImagePlugin as tiff
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

from .images import FileError

__all__ = ["ClassFolders", "build_preparation", "read_image"]

_WHITE_IS_ZERO = 0


class ClassFolders(datasets.ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """One folder of images per class; hidden files and folders are neither classes nor images.

    Args:
        path: the folder of the class folders.
        last: what to do with each image at last, (3, size, size) from 0 to 1.
        size: height and width of what is cut from the middle of each image, in pixels.
        skip_damaged: read all files now, and leave those out that cannot be read.

    Attributes:
        notes: how many files are no images, or damaged.
    """

    samples: list[tuple[str, int]]

    def __init__(
        self, path: Path, last: transforms.Normalize, size: int, skip_damaged: bool = False
    ) -> None:
        side = size * 8 // 7  # 256 for 224, as is usual for ImageNet

        def is_image(file: str) -> bool:
            seen = not any(part.startswith(".") for part in Path(file).relative_to(path).parts)
            is_one = seen and file.lower().endswith(IMG_EXTENSIONS)
            if seen and not is_one:
                ignored[Path(file).suffix or "no suffix"] += 1
            return is_one

        ignored = Counter[str]()
        read = partial(read_image, side=side)
        prepare = build_preparation(side, size, 3, last)
        super().__init__(str(path), prepare, loader=read, is_valid_file=is_image)
        beside = (file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
        ignored += Counter(file.suffix or "no suffix" for file in beside)
        self.notes: list[str] = []
        if ignored:
            kinds = ", ".join(f"{num} {suffix}" for suffix, num in ignored.most_common(5))
            self.notes.append(f"{path}: {ignored.total()} other files are ignored ({kinds})")
        if skip_damaged:
            self._skip_damaged(path)

    def _skip_damaged(self, path: Path) -> None:
        good = list(
            DataLoader(
                _Readable(self),
                batch_size=None,
                num_workers=min(8, os.cpu_count() or 1) if len(self.samples) > 64 else 0,
                generator=Generator(),  # else it would draw from the global one
            )
        )
        names = [
            Path(file).name
            for (file, _), reads in zip(self.samples, good, strict=True)
            if not reads
        ]
        self.samples = self.imgs = [
            one for one, reads in zip(self.samples, good, strict=True) if reads
        ]
        self.targets = [label for _, label in self.samples]
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            self.notes.append(f"{path}: {len(names)} damaged files are left out ({shown})")
        if empty := {*self.class_to_idx.values()} - {*self.targets}:
            raise FileError(f"cannot read any image of {path / self.classes[min(empty)]}")

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the folders that are not hidden, sorted, and their labels."""
        found, _ = super().find_classes(directory)
        names = [name for name in found if not name.startswith(".")]
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: label for label, name in enumerate(names)}


class _Readable(Dataset[bool]):
    """Tells of each image whether it can be read."""

    def __init__(self, images: ClassFolders) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.samples)

    def __getitem__(self, index: int) -> bool:
        try:
            self.images.loader(self.images.samples[index][0])
        except FileError:
            return False
        return True


def read_image(path: str, side: int = 0) -> Image.Image:
    """Decode a file to colours of 8 bits (mode RGB), or deep grey from 0 to 1 (mode F).

    Args:
        path: the file.
        side: what its shorter side is to be resized to.

    Raises:
        FileError: if the file is damaged, so large that Pillow warns of it, or would be once
            resized, or its pixels do not say what is white.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as image:
            short, long = sorted(image.size)
            if side * side * long > short * (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"{long} by {short} pixels are too narrow to be resized")
            white = _white(image)
            if white is None:
                return image.convert("RGB")  # type: ignore[no-any-return]
            grey_HW = np.asarray(image, dtype=np.float32) / white
            tags = getattr(image, "tag_v2", {})
    except FileError:
        raise
    except Exception as error:  # Pillow raises a different class for each kind of damage
        reason = " ".join(str(error).split())
        raise FileError(
            f"cannot read {path}: {reason}. --skip-damaged leaves it out. "
            "Replace or remove the file"
        ) from error
    return Image.fromarray(
        1 - grey_HW if tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO else grey_HW
    )


def _white(image: Image.Image) -> int | None:
    """Return the value of white in deep grey, which Pillow would cut off at 255; else None."""
    if image.mode.startswith("I;16"):  # also 12 bits
        (bits,) = getattr(image, "tag_v2", {}).get(tiff.BITSPERSAMPLE, (16,))
        return 2**bits - 1  # type: ignore[no-any-return]
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, whatever the file's scale
        return 2**16 - 1
    if image.mode in ("I", "F"):
        raise FileError(
            f"cannot read {image.filename}: pixels of mode {image.mode} (32-bit "  # type: ignore[attr-defined]
            f"{'integer' if image.mode == 'I' else 'float'}) do not say what is white. Save it "
            "with 8 or 16 bits"
        )
    return None


def build_preparation(
    side: int, size: int | Sequence[int], channels: int, last: transforms.Normalize
) -> transforms.Compose:
    """Return what makes a tensor (channels, height, width) of what `read_image` returns.

    Args:
        side: what the shorter side is resized to.
        size: height and width of what is then cut from the middle.
        channels: 3, or 1 for grey.
        last: what to do with the tensor, from 0 to 1.
    """
    # Pillow knows deep grey in one channel only: it gets the others as a tensor.
    colour = _in_colour if channels == 3 else transforms.functional.rgb_to_grayscale
    shape = [transforms.Resize(side), transforms.CenterCrop(size)]
    return transforms.Compose([*shape, transforms.ToTensor(), colour, last])


def _in_colour(image_CHW: Tensor) -> Tensor:
    """Give a grey image three equal channels."""
    return image_CHW.expand(3, -1, -1)
