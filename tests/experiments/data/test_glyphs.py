import pytest
import torch
from torch import Tensor

from fxlocal.experiments.data import glyphs
from fxlocal.experiments.data.glyphs import CHARACTERS, render


def corners(images: Tensor) -> Tensor:
    return images[:, :, :: images.shape[2] - 1, :: images.shape[3] - 1].flatten(2)


def ink(images: Tensor) -> Tensor:
    """Distance of each pixel from the colour of the first corner, scaled to 1, one row an image."""
    far = (images.float() - images[:, :, :1, :1].float()).abs().mean(1).flatten(1)
    return far / far.amax(1, keepdim=True)


def neighbour_error(strength: float) -> float:
    """Error of the nearest of 1500 images, by ink."""
    images, labels = render(1600, size=16, strength=strength, seed=3)
    nearest = torch.cdist(ink(images[1500:]), ink(images[:1500])).argmin(1)
    return (labels[:1500][nearest] != labels[1500:]).float().mean().item()


@pytest.mark.parametrize("size", [8, 32, 45])
def test_images_are_bytes_and_labels_are_indices_of_characters(size):
    images, labels = render(300, size=size)
    assert images.shape == (300, 3, size, size) and images.dtype == torch.uint8
    assert labels.shape == (300,) and labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(len(CHARACTERS)))


def test_a_clean_image_is_a_glyph_inside_a_flat_border():
    images, _ = render(300, strength=0.0)
    border = torch.cat([images[:, :, (0, -1)].flatten(2), images[..., (0, -1)].flatten(2)], 2)
    assert torch.equal(border.amin(2), border.amax(2))
    differs = (images != images[:, :, :1, :1]).any(1).flatten(1).float().mean(1)
    assert differs.min() > 0.03 and differs.max() < 0.4


def test_a_hard_image_has_texture_clutter_and_noise_everywhere():
    corner = corners(render(300, strength=1.0)[0])
    assert (corner.amin(2) < corner.amax(2)).float().mean() > 0.95


def test_every_font_draws_every_character_differently():
    atlas = glyphs._atlas(48)
    assert atlas.shape[:2] == (36, 12)
    for font in atlas.unbind(1):
        apart = torch.cdist(font.flatten(1), font.flatten(1)) + 1e6 * torch.eye(36)
        assert apart.min() > 2


def test_labels_say_what_is_drawn_and_strength_makes_it_harder_to_see():
    easy, hard = neighbour_error(0.0), neighbour_error(1.0)
    assert easy < 0.35 < 0.8 < hard < 1.0
