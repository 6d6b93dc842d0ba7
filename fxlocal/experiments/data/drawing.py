"""What generated image sets share: images that do not depend on the number of them."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

__all__ = ["draw_chunks", "draw_uniform"]


def draw_chunks(
    draw: Callable[[Generator], tuple[Tensor, Tensor]], num: int, chunk: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the first ``num`` images and labels of as many whole chunks as hold them."""
    generator = Generator().manual_seed(seed)
    chunks = [draw(generator) for _ in range(math.ceil(num / chunk))]
    images, labels = zip(*chunks, strict=True)
    return torch.cat(images)[:num].clone(), torch.cat(labels)[:num].clone()


def draw_uniform(*shape: int, low: float, high: float, generator: Generator) -> Tensor:
    """Return values of ``shape`` from ``low`` to ``high``."""
    return low + (high - low) * torch.rand(shape, generator=generator)
