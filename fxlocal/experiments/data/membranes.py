"""Membranes: generated electron micrographs of cells, to be told from the membranes between them.

A stand-in for the challenge data that `fxlocal.experiments.data.isbi2012` reads, made in seconds.
Cells are those of a Voronoi diagram of jittered lattice points on bent and stretched coordinates;
the borders between them are dark membranes of changing width. Cells differ in brightness, some hold
a dark organelle, and all lies under texture, blur and noise. One number, the strength, sets how
much of each: 0 is a clean drawing, 1 hides parts of the membranes.

Lengths are in pixels: a larger image shows more cells, not larger ones. A set is fixed by its seed
(for one release of torch), and a larger set begins with the images of a smaller one.

Shape suffixes: B batch, C channels (1), H height, W width, N lattice points, K nearby points.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .drawing import draw_chunks, draw_uniform

__all__ = ["CLASSES", "render"]

CLASSES = ("membrane", "cell")  # black and white in the labels of ISBI 2012

_CHUNK = 16  # images drawn at once, always all of them: a set's images do not depend on its size
_LATTICE = 32  # points each way before their pattern repeats
_REACH = 1  # lattice steps to the points looked at: the two nearest, but for one pixel in 50000


class _Look:
    """How an image is disturbed; grey levels run from 0 to 1, lengths are in pixels."""

    def __init__(self, strength: float) -> None:
        self.contrast = 0.5 - 0.15 * strength
        self.fading = 0.6 * strength
        self.texture = 0.05 + 0.15 * strength
        self.organelles = 0.6 * strength
        self.noise = 0.02 + 0.06 * strength


def render(
    num: int, *, size: int = 32, strength: float = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Render ``num`` micrographs; arguments as of `fxlocal.experiments.data.glyphs.render`.

    Returns:
        Images, uint8 of shape (num, 1, size, size), and the label of each pixel, int64 of shape
        (num, size, size), indices of `CLASSES`. About four fifths of the pixels are cell.

    Example:
        >>> images, labels = render(4, seed=1)
        >>> images.shape, labels.shape
        (torch.Size([4, 1, 32, 32]), torch.Size([4, 32, 32]))
    """
    return draw_chunks(functools.partial(_render_chunk, size, _Look(strength)), num, _CHUNK, seed)


def _render_chunk(size: int, look: _Look, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw cytoplasm, organelles, membranes, blur and noise, in this order."""
    smooth = functools.partial(_smooth, size=size, generator=generator)
    tissue = _tissue(size, look, generator)
    half_width_BHW = 1.1 + 0.5 * smooth(period=24)
    labels_BHW = (tissue.to_border_BHW > half_width_BHW).long()

    cytoplasm_BHW = 0.65 + look.texture * (tissue.shade_BHW + smooth(period=4))
    dark_BHW = cytoplasm_BHW - look.contrast
    organelle_BHW = torch.sigmoid(2 * (tissue.radius_BHW - tissue.to_point_BHW))
    image_BHW = torch.lerp(cytoplasm_BHW, dark_BHW, 0.8 * organelle_BHW)
    fading_BHW = look.fading * (0.5 + smooth(period=16))
    membrane_BHW = torch.sigmoid(3 * (half_width_BHW - tissue.to_border_BHW)) * (1 - fading_BHW)
    image_BHW = torch.lerp(image_BHW, dark_BHW, membrane_BHW)

    image_BCHW = _blur(image_BHW[:, None])
    noise_BCHW = torch.randn(image_BCHW.shape, generator=generator)
    image_BCHW = (image_BCHW + look.noise * noise_BCHW).clamp(0, 1)
    return (255 * image_BCHW).round().to(torch.uint8), labels_BHW


@dataclass(frozen=True)
class _Tissue:
    """Of each pixel: how far its cell's border and lattice point are, and what the cell is like."""

    to_border_BHW: Tensor
    to_point_BHW: Tensor
    shade_BHW: Tensor
    radius_BHW: Tensor


def _tissue(size: int, look: _Look, generator: Generator) -> _Tissue:
    """Draw a Voronoi diagram on bent coordinates, in which lattice points are 1 apart."""
    uniform = functools.partial(draw_uniform, generator=generator)
    spacing_B111 = uniform(_CHUNK, 1, 1, 1, low=14, high=20)
    point_2BN = uniform(2, _CHUNK, _LATTICE**2, low=0, high=1)
    shade_BN = uniform(_CHUNK, _LATTICE**2, low=-0.5, high=0.5)
    has_organelle_BN = uniform(_CHUNK, _LATTICE**2, low=0, high=1) < look.organelles
    radius_BN = uniform(_CHUNK, _LATTICE**2, low=2, high=4).where(has_organelle_BN, -9.0)

    place_2BHW = _places(size, generator) / spacing_B111.squeeze(3)
    cell_2BHW = place_2BHW.floor()
    steps = torch.arange(-_REACH, _REACH + 1)
    step_2K = torch.cartesian_prod(steps, steps).T
    x_BHWK, y_BHWK = (cell_2BHW.long()[..., None] + step_2K[:, None, None, None]) % _LATTICE
    index_BHWK = _LATTICE * x_BHWK + y_BHWK

    # Vectors from each pixel to the points nearby.
    from_cell_2BHW = cell_2BHW - place_2BHW
    vector_2BHWK = torch.stack(
        [
            point_BN.gather(1, index_BHWK.flatten(1)).view(index_BHWK.shape)
            + (from_cell_BHW[..., None] + step_K)
            for point_BN, from_cell_BHW, step_K in zip(
                point_2BN, from_cell_2BHW, step_2K, strict=True
            )
        ]
    )
    square_BHWK = vector_2BHWK[0] ** 2 + vector_2BHWK[1] ** 2
    square_BHW2, nearest_BHW2 = square_BHWK.topk(2, largest=False)
    first_2BHW, second_2BHW = vector_2BHWK.take_along_dim(nearest_BHW2[None], 4).unbind(4)
    # To the line halfway between the two nearest points.
    apart_BHW = (first_2BHW - second_2BHW).square().sum(0).sqrt()
    to_border_BHW = (square_BHW2[..., 1] - square_BHW2[..., 0]) / (2 * apart_BHW)
    own_BP = index_BHWK.take_along_dim(nearest_BHW2[..., :1], 3).flatten(1)
    spacing_B11 = spacing_B111.squeeze(3)
    return _Tissue(
        to_border_BHW=to_border_BHW * spacing_B11,
        to_point_BHW=square_BHW2[..., 0].sqrt() * spacing_B11,
        shade_BHW=shade_BN.gather(1, own_BP).view(to_border_BHW.shape),
        radius_BHW=radius_BN.gather(1, own_BP).view(to_border_BHW.shape),
    )


def _places(size: int, generator: Generator) -> Tensor:
    """Return the place of each pixel in the tissue, (2, B, H, W): turned, stretched and bent."""
    uniform = functools.partial(draw_uniform, generator=generator)
    axis = torch.arange(size) - (size - 1) / 2
    x_BHW, y_BHW = (
        axis_HW + 6 * _smooth(size=size, period=20, generator=generator)
        for axis_HW in (axis[None, :], axis[:, None])
    )
    angle, stretch = (
        uniform(_CHUNK, 1, 1, low=low, high=high) for low, high in ((0, math.pi), (1, 1.5))
    )
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([(cos * x_BHW - sin * y_BHW) / stretch, sin * x_BHW + cos * y_BHW])


def _smooth(*, size: int, period: int, generator: Generator) -> Tensor:
    """Return values from -0.5 to 0.5, (B, H, W), that change over about ``period`` pixels."""
    coarse = math.ceil(size / period) + 2
    spots = draw_uniform(_CHUNK, 1, coarse, coarse, low=-0.5, high=0.5, generator=generator)
    fine = F.interpolate(spots, scale_factor=period, mode="bilinear")
    return fine[:, 0, period : period + size, period : period + size]


def _blur(image_BCHW: Tensor) -> Tensor:
    """Average each pixel with its neighbours, weighted 1, 2, 1 each way."""
    kernel_3 = torch.tensor([0.25, 0.5, 0.25])
    padded = F.pad(image_BCHW, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, torch.outer(kernel_3, kernel_3)[None, None])
