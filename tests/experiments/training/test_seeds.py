"""A run's seed fixes all that draws: torch's generators, Python's and numpy's."""

import random
from dataclasses import replace

import numpy
import pytest
import torch
from support.tiny import LOCAL, SETTINGS, DropoutNet, fake_data, interrupted, run, same_state
from torch import Tensor, nn
from torch.utils.data import Dataset

from fxlocal.experiments.models.catalogue import build_model
from fxlocal.experiments.training.settings import Machine


@torch.library.custom_op("fxlocal_tests::drawn", mutates_args=())
def drawn(x: Tensor) -> Tensor:
    """Noise as large as x, which numpy and Python draw."""
    return torch.from_numpy(numpy.random.standard_normal(x.shape)).to(x) + random.random()


drawn.register_fake(torch.empty_like)


class DrawingNet(DropoutNet):
    def forward(self, x):
        return super().forward(x + 0.1 * drawn(x) if self.training else x)


class DrawingData(Dataset):
    """Images that are disturbed as they are read."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image * random.random() + float(numpy.random.standard_normal()), label


def drawing_net():
    torch.manual_seed(0)
    return DrawingNet()


SHORT = replace(SETTINGS, epochs=2)
PLAIN = fake_data()
DRAWING = replace(PLAIN, train=DrawingData(PLAIN.train))
WHO = {"model": {"data": PLAIN}, "data": {"data": DRAWING, "machine": Machine(workers=0)}}


@pytest.mark.parametrize("who", WHO)
def test_a_run_whose_model_or_data_draw_repeats_and_goes_on_to_the_bit(who, tmp_path):
    nets, how = [drawing_net() for _ in range(3)], WHO[who] | {"settings": SHORT}
    whole = run(nets[0], LOCAL, **how)
    interrupted(tmp_path / "c.pt", 1, nets[1], **how)
    random.seed(2)
    numpy.random.seed(2)
    again = run(nets[2], LOCAL, checkpoint=tmp_path / "c.pt", resume=True, **how)
    assert again.loss == whole.loss and again.errors == whole.errors
    assert same_state(nets[2].state_dict(), nets[0].state_dict())


def make_drawn():
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, random.random() + float(numpy.random.standard_normal()))
    return model


def test_a_model_is_built_by_its_seed_which_leaves_the_callers_draws_alone():
    before = random.getstate(), numpy.random.get_state()[1].tolist()
    one, same, other = (
        build_model(f"{__name__}:make_drawn", num_classes=2, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert before == (random.getstate(), numpy.random.get_state()[1].tolist())


@pytest.mark.slow
def test_data_that_draw_in_a_worker_do_not_draw_the_same_in_each_epoch():
    from fxlocal.experiments.data.catalogue import batches

    def images(seed):
        generator, told = torch.Generator().manual_seed(seed), {"workers": 1}
        drawn = batches(DRAWING.train, 64, generator=generator, **told)
        return torch.cat([x for x, _ in drawn]).flatten(1).mean(1).sort().values

    one, same, other = map(images, (3, 3, 4))
    assert torch.equal(one, same) and not torch.allclose(one, other)
