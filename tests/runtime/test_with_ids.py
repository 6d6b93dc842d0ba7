"""Samples that end with their id, and a few fixed draws of those that are disturbed at random."""

import pytest
import torch

from fxlocal import PlanError, WithIds


class Jittered(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.rand(2) + index, index


def test_ids_of_fixed_draws():
    data = WithIds(Jittered(), augmentations=2)
    torch.manual_seed(0)
    seen = {}
    for _ in range(12):
        for index in range(3):
            x, y, own = data[index]
            assert y == index and own // 2 == index
            assert torch.equal(seen.setdefault(own, x), x)
    assert sorted(seen) == list(range(6)) and not torch.equal(seen[0], seen[1])
    state = torch.get_rng_state()
    data[0]
    torch.randint(2, ())
    assert not torch.equal(torch.get_rng_state(), state)  # the draw itself is of the epoch


def test_samples_get_their_index():
    assert WithIds([(1, 2), (3, 4)])[1] == (3, 4, 1)
    assert WithIds([{"x": 1}])[0] == {"x": 1, "sample_ids": 0}
    assert WithIds([5])[0] == (5, 0)
    batch = next(iter(torch.utils.data.DataLoader(WithIds([(1, 2), (3, 4)]), batch_size=2)))
    assert batch[2].tolist() == [0, 1]


def test_random_transforms_are_named():
    transforms = pytest.importorskip("torchvision.transforms")
    data = Jittered()
    data.transform = transforms.Compose([transforms.ToTensor(), transforms.RandomCrop(4)])
    subset = torch.utils.data.Subset(data, [0, 2])
    with pytest.raises(PlanError, match=r"RandomCrop draws anew.*augmentations=4"):
        WithIds(subset)
    assert len(WithIds(subset, augmentations=3)) == 2


@pytest.mark.parametrize("given", [(iter([1]),), (range(3), 0), (range(3), True)])
def test_data_without_ids_are_refused(given):
    with pytest.raises(PlanError):
        WithIds(*given)
