"""Class folders of image files, decoded so that grey keeps its depth and damage its file's name."""

from pathlib import Path

import numpy as np
from PIL import Image
from PIL import TiffImagePlugin as tiff
from torch import Tensor
from torchvision import datasets, transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

from .images import FileError

__all__ = ["ClassFolders", "read_image"]

_WHITE_IS_ZERO = 0


class ClassFolders(datasets.ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """One folder of images per class; hidden files and folders are neither classes nor images.

    Args:
        path: the folder of the class folders.
        last: what to do with each image at last, (3, size, size) from 0 to 1.
        size: height and width of what is cut from the middle of each image, in pixels.
    """

    def __init__(self, path: Path, last: transforms.Normalize, size: int) -> None:
        resize = transforms.Resize(size * 8 // 7)  # 256 for 224, as is usual for ImageNet
        # Pillow knows deep grey in one channel only: it gets the others as a tensor.
        steps = [resize, transforms.CenterCrop(size), transforms.ToTensor(), _in_colour, last]

        def is_image(file: str) -> bool:
            seen = not any(part.startswith(".") for part in Path(file).relative_to(path).parts)
            return seen and file.lower().endswith(IMG_EXTENSIONS)

        super().__init__(
            str(path), transforms.Compose(steps), loader=read_image, is_valid_file=is_image
        )

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the folders that are not hidden, sorted, and their labels."""
        found, _ = super().find_classes(directory)
        names = [name for name in found if not name.startswith(".")]
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: label for label, name in enumerate(names)}


def read_image(path: str) -> Image.Image:
    """Decode a file to colours of 8 bits (mode RGB), or deep grey from 0 to 1 (mode F).

    Raises:
        FileError: if the file is damaged, or its pixels do not say what is white.
    """
    try:
        with Image.open(path) as image:
            white = _white(image)
            if white is None:
                return image.convert("RGB")  # type: ignore[no-any-return]
            grey_HW = np.asarray(image, dtype=np.float32) / white
            tags = getattr(image, "tag_v2", {})
    except FileError:
        raise
    except Exception as error:  # Pillow raises a different class for each kind of damage
        reason = " ".join(str(error).split())
        raise FileError(f"cannot read {path}: {reason}. Replace or remove the file") from error
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


def _in_colour(image_CHW: Tensor) -> Tensor:
    """Give a grey image three equal channels."""
    return image_CHW.expand(3, -1, -1)
