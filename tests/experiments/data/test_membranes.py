"""Generated micrographs: fixed by the seed, labelled as drawn, harder with strength."""

import pytest
import torch

from fxlocal.experiments.data.catalogue import DataError, load_data
from fxlocal.experiments.data.membranes import render


def best_threshold_dice(strength: float) -> float:
    """Dice of the cells by the best grey level, the same for all images."""
    images, labels = render(32, size=64, strength=strength, seed=3)
    cell = labels == 1
    scores = []
    for level in range(8, 248, 4):
        found = images[:, 0] > level
        scores.append(2 * (found & cell).sum().item() / (found.sum() + cell.sum()).item())
    return max(scores)


@pytest.mark.parametrize("size", [16, 48, 160])
def test_images_are_grey_bytes_and_each_pixel_has_a_label(size):
    images, labels = render(20, size=size)
    assert images.shape == (20, 1, size, size) and images.dtype == torch.uint8
    assert labels.shape == (20, size, size) and labels.dtype == torch.int64
    assert labels.unique().tolist() == [0, 1]
    assert 0.7 < labels.float().mean() < 0.85


def test_strength_changes_the_image_and_not_the_labels():
    (clean, labels), (hard, same) = (render(16, strength=s) for s in (0.0, 1.0))
    assert torch.equal(labels, same) and not torch.equal(clean, hard)


def test_membranes_are_thin_and_dark():
    images, labels = render(32, size=64, strength=0.5)
    grey = images[:, 0].float()
    assert grey[labels == 0].mean() < grey[labels == 1].mean() - 30
    # No square of 7x7 pixels lies in a membrane.
    thickest = torch.nn.functional.max_pool2d(labels[:, None].float(), 7, stride=1)
    assert (thickest == 0).float().mean() < 1e-3


def test_a_grey_level_tells_clean_cells_from_membranes_and_not_hard_ones():
    clean, usual, hard = map(best_threshold_dice, (0.0, 0.5, 1.0))
    assert clean > 0.97 > usual > 0.9 > hard


def test_the_data_set_is_a_segmentation_with_images_of_its_own_for_testing():
    data = load_data("membranes", num_train=40, num_test=20, size=48)
    assert (data.task, data.num_classes, data.shape) == ("segmentation", 2, (1, 48, 48))
    assert data.train.images.shape == (40, 1, 48, 48) and data.test.labels.shape == (20, 48, 48)
    assert abs(data.train.images.mean()) < 0.15 and abs(data.train.images.std() - 1) < 0.15
    image, label = data.train[3]
    assert image.shape == (1, 48, 48) and label.shape == (48, 48)
    assert (
        len({row.tobytes() for part in (data.train, data.test) for row in part.images.numpy()})
        == 60
    )


@pytest.mark.parametrize("name", ["membranes", "isbi2012"])
def test_sizes_that_unet_cannot_halve_are_refused(name):
    with pytest.raises(DataError, match=f"size of '{name}' must be a multiple of 16.*not 40"):
        load_data(name, size=40)
