"""Sets of labelled images, and the batches of one epoch.

All randomness of an epoch, its order and its augmentation, comes from the one generator that
`batches` is given. Images in memory are indexed batch by batch; others are decoded by workers.

Shape suffixes: B batch, C channels, H height, W width.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

__all__ = [
    "Augment",
    "DataError",
    "FileError",
    "Images",
    "InMemory",
    "batches",
    "choose",
    "crop_and_flip",
    "turn_and_flip",
]

Images: TypeAlias = Dataset[tuple[Tensor, int | Tensor]]
# Labels of pixels pass through it as one more channel: with those, it may move pixels only.
Augment: TypeAlias = Callable[[Tensor, Generator], Tensor]

_MAX_WORKERS = 8  # processes that decode images


class DataError(ValueError):
    """The data set is unknown, missing or malformed, or a size does not fit it."""


class FileError(DataError, OSError):
    """One file of the data set is damaged or of a kind that cannot be read; it is named."""


class InMemory(Images):
    """Images and labels held as two tensors.

    Attributes:
        images: float32, shape (number, channels, height, width), normalised.
        labels: int64, shape (number,), or (number, height, width) for a label of each pixel.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        label = self.labels[index]
        return self.images[index], label if label.dim() else int(label)


def choose(dataset: Images, indices: Tensor) -> Images:
    """Return the images at ``indices`` as a data set."""
    if isinstance(dataset, InMemory):
        return InMemory(dataset.images[indices], dataset.labels[indices])
    return Subset(dataset, indices.tolist())


def batches(
    dataset: Images,
    batch_size: int,
    *,
    generator: Generator | None = None,
    augment: Augment | None = None,
    device: str | torch.device = "cpu",
    drop_last: bool = False,
    workers: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return one epoch's batches, each (images, labels).

    Args:
        dataset: what to draw from.
        batch_size: images per batch; the last batch may be smaller.
        generator: a CPU generator that shuffles and drives `augment`: its state alone fixes the
            epoch. None keeps the order of the data set.
        augment: disturbs each batch, on the device; needs a generator.
        device: where the batches go.
        drop_last: leave a smaller last batch out.
        workers: processes that decode images which are not in memory; None is one for each core, 8
            at most.

    Raises:
        DataError: if there is no batch to draw; FileError, when drawn, if an image is damaged.
        ValueError: if `augment` is given without a generator.
    """
    num = len(dataset)  # type: ignore[arg-type]  # Dataset promises no length; ours have one
    if batch_size < 1 or num < (batch_size if drop_last else 1):
        raise DataError(f"cannot draw a batch of {batch_size} from {num} images; change its size")
    if augment is not None and generator is None:
        raise ValueError("augment is random: pass a generator too")
    order = torch.arange(num) if generator is None else torch.randperm(num, generator=generator)
    stop = num - num % batch_size if drop_last else num
    chunks = [order[start : start + batch_size] for start in range(0, stop, batch_size)]
    return _moved(
        _drawn(dataset, chunks, workers, generator), torch.device(device), generator, augment
    )


def _moved(
    drawn: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    generator: Generator | None,
    augment: Augment | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Move first and augment then: the draws are on the CPU, the work on the device."""
    for images, labels in drawn:
        images, labels = images.to(device), labels.to(device)
        if augment is None or generator is None:
            yield images, labels
        elif labels.dim() == 1:
            yield augment(images, generator), labels
        else:  # labels of pixels move with their pixels
            both = augment(torch.cat([images, labels[:, None]], 1), generator)
            yield both[:, :-1].contiguous(), both[:, -1].long()


def _drawn(
    dataset: Images, chunks: Sequence[Tensor], workers: int | None, generator: Generator | None
) -> Iterable[tuple[Tensor, Tensor]]:
    if isinstance(dataset, InMemory):
        return ((dataset.images[chunk], dataset.labels[chunk]) for chunk in chunks)
    return _decoded(dataset, chunks, workers, generator)


def _decoded(
    dataset: Images, chunks: Sequence[Tensor], workers: int | None, generator: Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    # Without a generator of its own it would draw from the global one, and an evaluation would
    # change the dropout of the training after it. Data that draw in a worker do so by the epoch.
    own = Generator().manual_seed(generator.initial_seed() if generator else 0)
    loader = DataLoader(
        _Caught(dataset),
        batch_sampler=[chunk.tolist() for chunk in chunks],
        num_workers=min(_MAX_WORKERS, os.cpu_count() or 1) if workers is None else workers,
        generator=own,
        collate_fn=_collated,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


class _Caught(Dataset[Any]):
    """Returns what is wrong with an image: raised in a worker, it would hold its traceback."""

    def __init__(self, dataset: Images) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor] | DataError:
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _collated(samples: list[Any]) -> Any:
    errors = (sample for sample in samples if isinstance(sample, DataError))
    return next(errors, None) or default_collate(samples)


def crop_and_flip(images_BCHW: Tensor, generator: Generator, *, padding: int) -> Tensor:
    """Shift each image by up to ``padding`` pixels each way, and mirror half of the images.

    What moves in from outside is 0, the mean colour of normalised images.

    Args:
        images_BCHW: a batch, on any device; not changed.
        generator: a CPU generator, so that the draws are the same for every device.
        padding: the largest shift, in pixels.
    """
    num, channels, height, width = images_BCHW.shape
    down, right = torch.randint(2 * padding + 1, (2, num, 1), generator=generator)
    flip = torch.randint(2, (num, 1), generator=generator) == 1
    columns = torch.arange(width)
    rows_BH = (down + torch.arange(height)).to(images_BCHW.device)
    columns_BW = (right + torch.where(flip, columns.flip(0), columns)).to(images_BCHW.device)
    padded = F.pad(images_BCHW, (padding,) * 4)
    rows = rows_BH[:, None, :, None].expand(num, channels, height, width + 2 * padding)
    columns = columns_BW[:, None, None, :].expand(num, channels, height, width)
    return padded.gather(2, rows).gather(3, columns)


def turn_and_flip(images_BCHW: Tensor, generator: Generator) -> Tensor:
    """Turn each image by a multiple of 90 degrees, and mirror half of the images.

    Two mirrorings and an exchange of rows and columns, each by the toss of a coin, make each of the
    square's eight symmetries equally likely.

    Args:
        images_BCHW: a batch of square images, on any device; not changed.
        generator: a CPU generator, so that the draws are the same for every device.
    """
    coins = torch.randint(2, (3, len(images_BCHW), 1, 1, 1), generator=generator) == 1
    left_right, up_down, across = coins.to(images_BCHW.device)
    images_BCHW = torch.where(left_right, images_BCHW.flip(3), images_BCHW)
    images_BCHW = torch.where(up_down, images_BCHW.flip(2), images_BCHW)
    return torch.where(across, images_BCHW.transpose(2, 3), images_BCHW)
