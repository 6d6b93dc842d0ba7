"""The training data of the ISBI 2012 challenge: 30 micrographs of nerve cells, labelled by pixel.

Two stacks of 512x512 grey 8-bit pictures, as published: ``train-volume.tif``, slices 50 nm apart of
a fly larva's ventral nerve cord, and ``train-labels.tif``, 255 inside cells and 0 on the membranes
between them. Source: Arganda-Carreras et al., Frontiers in Neuroanatomy 2015.

The foreground is the cell, the challenge's white, as the LoCal+SGD paper's must have been: about a
fifth of the pixels is membrane, and of those a Dice of 0.948 (Table 7) would mean that some 2 % of
all pixels are wrong, where the original U-Net gave its pixel error as 6 %.

Labels of the challenge's test stack are not public. The last fifth of the slices, 6 of 30, is held
out in its place. They are neighbours, so only the first of them looks like a training slice; slices
drawn at random would each lie between two.

Shape suffixes: S slices, B tiles, C channels (1), H height, W width.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from PIL import TiffImagePlugin as tiff
from torch import Tensor

from .images import DataError, InMemory

__all__ = ["LABELS", "VOLUME", "load"]

VOLUME, LABELS = "train-volume.tif", "train-labels.tif"

_BLACK_IS_ZERO = 1


def load(root: Path, size: int) -> tuple[InMemory, InMemory]:
    """Read both stacks and cut each slice into tiles that do not overlap.

    Args:
        root: the folder that holds both files, or holds them in ``isbi2012``.
        size: height and width of a tile, in pixels; must divide those of a slice.

    Returns:
        Training and test tiles, normalised by the mean and deviation of the training slices.

    Raises:
        DataError: if a file is missing or damaged, the stacks differ, labels have other than two
            values, or the tiles do not fit.
    """
    folder = next((f for f in (root, root / "isbi2012") if (f / VOLUME).exists()), root)
    volume_SHW, labels_SHW = (_read_stack(folder / name) for name in (VOLUME, LABELS))
    if volume_SHW.shape != labels_SHW.shape:
        found = (" x ".join(map(str, stack.shape)) for stack in (volume_SHW, labels_SHW))
        raise _error(folder, "{} and {} (slices x height x width) differ".format(*found))
    num, height, width = volume_SHW.shape
    if num < 2:
        raise _error(folder, "one slice cannot be split into training and test")
    if height % size or width % size:
        raise DataError(
            f"size of 'isbi2012' must divide the slices' {height}x{width} pixels, not {size}"
        )
    values = labels_SHW.unique().tolist()  # type: ignore[no-untyped-call]
    if len(values) != 2:
        raise _error(folder, f"{LABELS} must have two values, membrane and cell, not {values[:9]}")

    num_train = num - max(1, num // 5)
    images_SHW = volume_SHW.float()
    deviation, mean = torch.std_mean(images_SHW[:num_train])
    images_SHW = (images_SHW - mean) / deviation
    classes_SHW = (labels_SHW == max(values)).long()
    train, test = (
        InMemory(_tiles(images_SHW[part], size)[:, None], _tiles(classes_SHW[part], size))
        for part in (slice(num_train), slice(num_train, None))
    )
    return train, test


def _read_stack(path: Path) -> Tensor:
    """Return the pages of a TIFF file as one tensor of bytes, (S, H, W)."""
    if not path.exists():
        raise _error(path.parent, f"there is no {path.name}")
    try:
        with Image.open(path) as file:
            pages = [page.copy() for page in ImageSequence.Iterator(file)]
            file.seek(0)
            tags = dict(getattr(file, "tag_v2", {}))
    except Exception as error:  # Pillow raises a different class for each kind of damage
        reason = " ".join(str(error).split())
        raise _error(path.parent, f"{path.name} is damaged or no TIFF file: {reason}") from error
    kinds = {(page.mode, page.size) for page in pages}
    if len(kinds) > 1 or pages[0].mode != "L":
        found = ", ".join(f"{mode} {width}x{height}" for mode, (width, height) in sorted(kinds))
        raise _error(
            path.parent, f"{path.name} must hold 8-bit grey pages of one size, not {found}"
        )
    num = _num_slices(tags)
    if num > len(pages):
        return _read_hidden(path, tags, num, len(pages))
    return torch.from_numpy(np.stack(pages))


def _num_slices(tags: Mapping[int, Any]) -> int:
    """Return how many slices ImageJ says there are, or 0 if it did not write the file."""
    text = str(tags.get(tiff.IMAGEDESCRIPTION, ""))
    found = re.search(r"^images=(\d+)", text, re.M) if text.startswith("ImageJ=") else None
    return int(found[1]) if found else 0


def _read_hidden(path: Path, tags: Mapping[int, Any], num: int, num_pages: int) -> Tensor:
    """Read the slices that ImageJ puts one behind the other, with an entry for the first alone."""
    width, height, starts = tags[tiff.IMAGEWIDTH], tags[tiff.IMAGELENGTH], tags[tiff.STRIPOFFSETS]
    is_plain = (
        tags.get(tiff.COMPRESSION, 1) == 1
        and tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == _BLACK_IS_ZERO
    )
    if num_pages > 1 or len(starts) > 1 or not is_plain:
        raise _error(
            path.parent,
            f"{path.name} holds {num} slices by ImageJ's header, but entries for {num_pages} only. "
            "Save it again with an entry for each",
        )
    with path.open("rb") as file:
        file.seek(starts[0])
        content = file.read(num * height * width)
    if len(content) < num * height * width:
        raise _error(
            path.parent, f"{path.name} is damaged: it ends before the last of ImageJ's {num} slices"
        )
    pixels = np.frombuffer(content, np.uint8).reshape(num, height, width)
    return torch.from_numpy(pixels.copy())


def _error(folder: Path, found: str) -> DataError:
    return DataError(
        f"cannot load 'isbi2012' from {folder}: {found}. Point --data-root at the folder that "
        f"holds the challenge's {VOLUME} and {LABELS}, or holds them in isbi2012; there is no "
        "--download for them"
    )


def _tiles(images_SHW: Tensor, size: int) -> Tensor:
    """Cut each slice into squares, row by row: (S, H, W) -> (B, size, size)."""
    rows = images_SHW.unfold(1, size, size).unfold(2, size, size)
    return rows.reshape(-1, size, size)
