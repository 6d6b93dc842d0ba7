"""A folder of the user's images as a data set."""

from functools import partial
from pathlib import Path

import torch
from torchvision import transforms

from .dataset import Data
from .decode import ClassFolders
from .images import DataError, Images, choose, crop_and_flip

__all__ = ["load_folder"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation


def load_folder(
    name: str, path: Path, seed: int, size: int, split: float | None, skip_damaged: bool
) -> Data:
    """Load class folders: under train/ and val/ or test/, or a share of them held out.

    Raises:
        DataError: if they are not there, or not so.
    """
    splits = {split: path / split for split in ("train", "val", "test") if (path / split).is_dir()}
    if splits and "train" not in splits:
        raise DataError(f"cannot load {name!r}: found {', '.join(splits)} in it, but no train")
    train = _class_folders(name, splits.get("train", path), size, skip_damaged)
    found, classes = [train], train.classes
    if test_path := splits.get("val", splits.get("test")):
        if split is not None:
            raise DataError(
                f"split={split} does not apply to {name!r}, which has {test_path.name}/"
            )
        test = _class_folders(name, test_path, size, skip_damaged)
        found.append(test)
        if test.classes != classes:
            odd = ", ".join(sorted(set(classes) ^ set(test.classes)))
            raise DataError(
                f"cannot load {name!r}: train and {test_path.name} differ in the classes {odd}"
            )
        parts: tuple[Images, Images] = (train, test)
    else:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        num_held = int(len(order) * (0.2 if split is None else split) + 1e-9)
        held_out, rest = order.tensor_split([min(max(1, num_held), len(order) - 1)])
        parts = choose(train, rest), choose(train, held_out)
    augment = partial(crop_and_flip, padding=size // 8)
    return Data(
        *(name, *parts, len(classes), (3, size, size), augment),
        statistics=IMAGENET,
        classes=tuple(classes),
        notes=tuple(note for images in found for note in images.notes),
    )


def _class_folders(name: str, path: Path, size: int, skip_damaged: bool) -> ClassFolders:
    """Read a folder with one folder of images per class; images are decoded when asked for."""
    try:
        last = transforms.Normalize(*IMAGENET)
        images = ClassFolders(path, last, size, skip_damaged)
    except OSError as error:  # missing, not a folder, no class folders, or a class without images
        reason = str(error).rstrip(". ")
        raise DataError(
            f"cannot load {name!r}: {reason}. Expected {path}/CLASS/*.jpg (or .png ...), "
            "with at least two classes"
        ) from error
    if len(images.classes) < 2:
        raise DataError(
            f"cannot load {name!r}: {path} holds only one class folder, {images.classes[0]!r}; "
            "expected at least two"
        )
    return images
