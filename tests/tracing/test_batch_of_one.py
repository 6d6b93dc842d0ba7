"""A batch of one is a size as any other: as an example, and as the last batch of an epoch."""

import pytest
import torch
from support import laws
from torch import nn

import fxlocal
from fxlocal import CaptureError, Freeze, LocalPrefix, Plan


class Checked(nn.Module):
    """Asks for the size of its images, which symbolic tracing cannot follow."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last, self.pooled = nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.body = body

    def forward(self, x, other=None):
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError("images of a multiple of 8")
        y = self.norm(self.conv(x)).relu()
        return self.last(self.body(self, y) if other is None else self.body(self, y, other))


def pooled(net, y):
    return y.mean((2, 3))


def by_size(net, y):
    return y.reshape(y.shape[0], 4, -1).amax(2)


def all_rows(net, y):
    return y.permute(0, 2, 3, 1).reshape(-1, 4)


def upsampled(net, y):
    return nn.functional.interpolate(y, scale_factor=2.0, mode="bilinear").mean((2, 3))


def attended(net, y):
    z = y.flatten(2).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(z, z, z)


def products(net, y):
    return torch.einsum("bchw,bdhw->bcd", y, y)


def squeezed(net, y):
    return y.mean((2, 3)).squeeze()


def moved(net, y):
    return y.permute(1, 0, 2, 3).contiguous().flatten(1).t()


def of_one(net, y):
    return y.mean((2, 3)) * (2 if y.shape[0] == 1 else 1)


def of_more(net, y):
    return y.mean((2, 3)) - y.mean() if y.shape[0] > 1 else y.mean((2, 3))


ANY = [pooled, by_size, all_rows, upsampled, attended, products, squeezed]
ASKING = [moved, of_one, of_more]


def images(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def steps_agree(network, model, eager, *inputs):
    laws.assert_equal(laws.step(network, inputs), laws.step(eager, inputs), "output")
    laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
    laws.assert_equal(model.state_dict(), eager.state_dict(), "state")


@pytest.mark.sample(3)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("body", ANY, ids=lambda body: body.__name__)
def test_it_is_an_example_and_a_batch(body, count):
    model, eager = Checked(body), Checked(body)
    network = fxlocal.transform(model, Plan(), images(count))
    for batch in (1, 4, 2, 1):
        steps_agree(network, model, eager, images(batch))


@pytest.mark.sample(3)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("body", ASKING, ids=lambda body: body.__name__)
def test_a_model_that_asks_for_it_is_right_or_refused(body, count):
    model, eager = Checked(body), Checked(body)
    network = fxlocal.transform(model, Plan(), images(count))
    steps_agree(network, model, eager, images(count))
    if body is moved and count == 3:  # where values lie is all that is asked, and by torch
        return steps_agree(network, model, eager, images(1))
    with pytest.raises(RuntimeError, match="Capture again with such an example"):
        network(images(4 - count))


@pytest.mark.parametrize("count", [1, 3])
def test_a_mask_of_one_row_stays_beside_a_batch(count):
    def masked(net, y, mask):
        return y.mean((2, 3)) * mask

    mask = torch.rand(1, 4)
    model, eager = Checked(masked), Checked(masked)
    network = fxlocal.transform(model, Plan(), images(count), mask)
    for batch in (count, 1, 2):
        steps_agree(network, model, eager, images(batch), mask)


def test_what_a_norm_cannot_take_is_refused_with_what_to_give():
    def normed(net, y):
        return net.pooled(y.mean((2, 3)))

    with pytest.raises(CaptureError, match="batch of two or more"):
        fxlocal.capture(Checked(normed), images(1))
    network = fxlocal.transform(Checked(normed), Plan(), images(2))
    with pytest.raises(RuntimeError, match="a size of 2 to any"):  # as the model's own ValueError
        network(images(1))


def test_costs_are_those_of_the_one_that_is_given():
    one, two = (fxlocal.analyze(Checked(pooled), images(n)).costs for n in (1, 2))
    assert [2 * cost.flops for cost in one] == [cost.flops for cost in two]


def test_a_prefix_is_cut_for_it_too():
    model = Checked(pooled)
    plan = Plan(local=LocalPrefix(until="last", rule=Freeze()))
    network = fxlocal.transform(model, plan, images(2))
    network(images(1)).sum().backward()
    assert model.conv.weight.grad is None and model.last.weight.grad is not None
