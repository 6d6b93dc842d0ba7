import itertools
from functools import partial

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from fxlocal.experiments.data.images import DataError, InMemory, batches, crop_and_flip


def numbered(num: int) -> InMemory:
    """Image i is filled with i, and so is its label."""
    labels = torch.arange(num)
    return InMemory(labels.float()[:, None, None, None].expand(num, 1, 2, 3).clone(), labels)


class Decoded(Dataset):
    """The same images, one at a time, as from a folder."""

    def __init__(self, num: int) -> None:
        self.images = numbered(num)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def labels_of(drawn) -> list[list[int]]:
    return [labels.tolist() for _, labels in drawn]


def test_an_item_is_an_image_and_a_plain_label():
    image, label = numbered(4)[3]
    assert torch.equal(image, torch.full((1, 2, 3), 3.0))
    assert type(label) is int and label == 3


@pytest.mark.parametrize("kind", [numbered, Decoded])
def test_without_a_generator_the_order_is_the_data_sets(kind):
    assert labels_of(batches(kind(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert labels_of(batches(kind(7), 3, drop_last=True)) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("kind", [numbered, Decoded])
def test_a_generator_shuffles_and_its_seed_fixes_the_epoch(kind):
    order = labels_of(batches(kind(50), 8, generator=seeded(1)))
    assert sorted(itertools.chain(*order)) == list(range(50))
    assert order == labels_of(batches(numbered(50), 8, generator=seeded(1)))
    assert order != labels_of(batches(kind(50), 8, generator=seeded(2)))


@pytest.mark.parametrize("kind", [numbered, Decoded])
def test_labels_stay_with_their_images(kind):
    for images, labels in batches(kind(20), 6, generator=seeded(1)):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert torch.equal(images, labels.float()[:, None, None, None].expand_as(images))


@pytest.mark.parametrize("kind", [numbered, Decoded])
def test_the_global_random_state_is_left_alone(kind):
    before = torch.get_rng_state()
    list(batches(kind(20), 6, generator=seeded(1), augment=partial(crop_and_flip, padding=1)))
    list(batches(kind(20), 6))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_is_driven_by_the_same_generator():
    def shift(images: Tensor, generator: Generator) -> Tensor:
        return images + torch.rand(1, generator=generator)

    first, again, other = (
        torch.cat([x for x, _ in batches(numbered(9), 4, generator=seeded(s), augment=shift)])
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first.sort(0)[0] % 1, other.sort(0)[0] % 1)
    assert len((first % 1).unique()) >= 3  # a draw of its own for each of the three batches


def test_batches_are_moved():
    images, labels = next(batches(numbered(4), 2, device="meta"))
    assert images.device.type == labels.device.type == "meta"


@pytest.mark.parametrize(
    ("num", "batch_size", "drop_last"), [(0, 1, False), (4, 0, False), (4, -1, False), (4, 5, True)]
)
def test_an_epoch_without_a_batch_is_refused_at_once(num, batch_size, drop_last):
    message = f"cannot draw a batch of {batch_size} from {num} images; change its size"
    with pytest.raises(DataError, match=message):
        batches(numbered(num), batch_size, drop_last=drop_last)


def test_augmentation_without_a_generator_is_refused():
    with pytest.raises(ValueError, match="augment is random: pass a generator too"):
        batches(numbered(4), 2, augment=partial(crop_and_flip, padding=1))


def test_each_image_is_shifted_and_mirrored_on_its_own():
    num, padding, height, width = 400, 1, 4, 5
    image = torch.rand(2, height, width) + 1
    batch = image.expand(num, -1, -1, -1).clone()
    padded = F.pad(image, (padding,) * 4)
    possible = [
        padded[:, down : down + height, right : right + width].flip(-1 if mirror else ())
        for down in range(3)
        for right in range(3)
        for mirror in (False, True)
    ]
    out = crop_and_flip(batch, seeded(1), padding=padding)
    counts = [(out == option).flatten(1).all(1).sum().item() for option in possible]
    assert sum(counts) == num  # each is one of the possible ones
    assert min(counts) > 5 and max(counts) < 50  # and all are about as likely: 22 of each
    assert torch.equal(batch, image.expand_as(batch))


def test_the_seed_fixes_the_augmentation():
    batch = torch.rand(8, 3, 6, 6)
    first, again, other = (crop_and_flip(batch, seeded(s), padding=2) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
