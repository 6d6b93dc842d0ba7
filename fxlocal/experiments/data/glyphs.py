"""Glyphs: letters and digits, rendered and disturbed, as a small picture data set made in seconds.

Each image holds one of 36 characters (A to Z, 0 to 9) in one of the DejaVu fonts that matplotlib
ships, turned, scaled, sheared and shifted, in a random colour on a random coloured texture, over
parts of two other glyphs, under pixel noise. One number, the strength, sets how much of each:
0 is a clean, nearly upright glyph, 1 is about as hard as a person can still read.

An image set is fixed by its seed (for one release of torch, Pillow and matplotlib), and a larger
set begins with the images of a smaller one.

Shape suffixes: B batch, C channels (3), H height, W width.
"""

import functools
import math
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.nn import functional as F

from .drawing import draw_chunks, draw_uniform

__all__ = ["CHARACTERS", "render"]

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

_MAX_CANVAS = 96  # pixels; a glyph is drawn a little larger than needed, then sampled
_CHUNK = 256  # images drawn at once, always all of them: a set's images do not depend on its size
_NUM_CLUTTER = 2


class _Look:
    """How far an image may stray: angles in radians, lengths in half image widths."""

    def __init__(self, strength: float) -> None:
        self.rotation = 0.1 + 0.4 * strength
        self.shrink = 1.05 + 0.45 * strength
        self.shear = 0.05 + 0.35 * strength
        self.shift = 0.05 + 0.2 * strength
        self.contrast = 0.45 - 0.25 * strength
        self.texture = 0.6 * strength
        self.clutter = 0.9 * strength
        self.noise = 0.12 * strength


def render(
    num: int, *, size: int = 32, strength: float = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Render ``num`` glyphs.

    Args:
        num: number of images.
        size: height and width in pixels.
        strength: how hard they are to read, from 0 (clean) to 1.
        seed: fixes the images and labels, bit for bit.

    Returns:
        Images, uint8 of shape (num, 3, size, size), and labels, int64, indices of `CHARACTERS`.

    Example:
        >>> images, labels = render(4, seed=1)
        >>> images.shape, images.dtype
        (torch.Size([4, 3, 32, 32]), torch.uint8)
    """
    return draw_chunks(functools.partial(_render_chunk, size, _Look(strength)), num, _CHUNK, seed)


def _render_chunk(size: int, look: _Look, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw background, clutter, glyph and noise, in this order."""
    uniform = functools.partial(draw_uniform, generator=generator)
    labels = torch.randint(len(CHARACTERS), (_CHUNK,), generator=generator)
    back_BC11 = uniform(_CHUNK, 3, 1, 1, low=0, high=1)
    # Colours go round a circle, so that each channel differs by the contrast at least.
    contrast_BC11 = uniform(_CHUNK, 3, 1, 1, low=look.contrast, high=1 - look.contrast)
    glyph_BC11 = (back_BC11 + contrast_BC11) % 1

    image_BCHW = back_BC11 + look.texture * _texture(size, generator)
    for _ in range(_NUM_CLUTTER):
        others = torch.randint(len(CHARACTERS), (_CHUNK,), generator=generator)
        angle = uniform(_CHUNK, low=-math.pi, high=math.pi)
        distance = uniform(_CHUNK, low=0.75, high=1.2)
        place = torch.stack([distance * angle.cos(), distance * angle.sin()], 1)
        mask = look.clutter * _glyph_masks(others, place, size, look, generator)
        image_BCHW = torch.lerp(image_BCHW, uniform(_CHUNK, 3, 1, 1, low=0, high=1), mask)
    place = uniform(_CHUNK, 2, low=-look.shift, high=look.shift)
    mask = _glyph_masks(labels, place, size, look, generator)
    ink_BCHW = glyph_BC11 + 0.6 * look.texture * _texture(size, generator)
    image_BCHW = torch.lerp(image_BCHW, ink_BCHW, mask)
    noise_BCHW = torch.randn(_CHUNK, 3, size, size, generator=generator)
    image_BCHW = (image_BCHW + look.noise * noise_BCHW).clamp(0, 1)
    return (255 * image_BCHW).round().to(torch.uint8), labels


def _glyph_masks(
    labels: Tensor, place_B2: Tensor, size: int, look: _Look, generator: Generator
) -> Tensor:
    """Return the ink of each glyph, in a random font and pose, centred at its place."""
    uniform = functools.partial(draw_uniform, generator=generator)
    atlas = _atlas(min(3 * size // 2, _MAX_CANVAS))
    fonts = torch.randint(atlas.shape[1], labels.shape, generator=generator)
    angle = uniform(_CHUNK, low=-look.rotation, high=look.rotation)
    scale = uniform(_CHUNK, low=0.95, high=look.shrink)
    shear = uniform(_CHUNK, low=-look.shear, high=look.shear)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # From a pixel of the image to the point of the canvas that it shows.
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    x_BHW = axis[None, None, :] - place_B2[:, 0, None, None]
    y_BHW = axis[None, :, None] - place_B2[:, 1, None, None]
    cos, sin, shear = (value[:, None, None] for value in (cos, sin, shear))
    grid = torch.stack([cos * x_BHW + (shear - sin) * y_BHW, sin * x_BHW + cos * y_BHW], -1)
    return F.grid_sample(atlas[labels, fonts].unsqueeze(1), grid, align_corners=False)


def _texture(size: int, generator: Generator) -> Tensor:
    """Return smooth coloured spots between -0.5 and 0.5."""
    spots = draw_uniform(_CHUNK, 3, 6, 6, low=-0.5, high=0.5, generator=generator)
    return F.interpolate(spots, size, mode="bilinear")


@functools.cache
def _atlas(canvas: int) -> Tensor:
    """Return the ink of each character in each font, shape (36, fonts, canvas, canvas)."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # The Display fonts hold a few symbols only.
    files = sorted(file for file in folder.glob("DejaVu*.ttf") if "Display" not in file.name)
    # At this size the widest bold W just fits, and other capitals fill half of the canvas.
    fonts = [ImageFont.truetype(str(file), 2 * canvas // 3) for file in files]
    inks = [[_ink(character, font, canvas) for font in fonts] for character in CHARACTERS]
    return torch.stack([torch.stack(ink) for ink in inks])


def _ink(character: str, font: ImageFont.FreeTypeFont, canvas: int) -> Tensor:
    """Draw one character in the middle of its canvas."""
    image = Image.new("L", (canvas, canvas))
    left, top, right, bottom = font.getbbox(character)
    corner = ((canvas - left - right) / 2, (canvas - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(canvas, canvas) / 255
