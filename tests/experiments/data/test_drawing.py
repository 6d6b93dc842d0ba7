"""What holds of all generated images: they are fixed by their seed alone."""

import pytest
import torch

from fxlocal.experiments.data import glyphs, membranes

pytestmark = pytest.mark.parametrize(
    ("render", "chunk"), [(glyphs.render, 256), (membranes.render, 16)], ids=["glyphs", "membranes"]
)


def test_the_seed_fixes_every_bit_and_leaves_the_global_random_state_alone(render, chunk):
    images, labels = render(20, seed=5)
    torch.rand(1)
    before = torch.get_rng_state()
    again, labels_again = render(20, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, render(20, seed=6)[0])


def test_the_number_of_threads_changes_nothing(render, chunk):
    images, _ = render(chunk + 44, seed=5)
    torch.set_num_threads(2)
    assert torch.equal(images, render(chunk + 44, seed=5)[0])


def test_a_larger_set_begins_with_a_smaller_one(render, chunk):
    images, labels = render(2 * chunk + 8, seed=5)
    for num in (1, chunk, chunk + 1):
        fewer, fewer_labels = render(num, seed=5)
        assert torch.equal(fewer, images[:num]) and torch.equal(fewer_labels, labels[:num])
