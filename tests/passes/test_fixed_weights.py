"""Layers whose weight is no parameter, as blurs and cosine transforms: they stay as they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Oja, Plan, PlanError


class Blur(nn.Module):
    """A filter in a buffer, one for all channels."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.tensor([1.0, 2.0, 1.0]).outer(torch.ones(3)) / 12)

    def forward(self, x):
        kernel = self.kernel.expand(x.shape[1], 1, 3, 3)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


class Transform(nn.Module):
    """A matrix in a buffer, fetched as it is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(6, 6))

    def forward(self, x):
        return F.linear(x, weight=self.matrix)


class Constant(nn.Module):
    """A filter that the forward makes."""

    def forward(self, x):
        return F.conv2d(x, torch.ones(4, 1, 1, 1) / 2, groups=4)


def buffered():
    """A module whose weight was made a buffer."""
    conv = nn.Conv2d(4, 4, 1, bias=False)
    weight = conv.weight.detach()
    del conv.weight
    conv.register_buffer("weight", weight)
    return conv


def frozen():
    """A parametrised module that the user froze."""
    return parametrizations.weight_norm(nn.Conv2d(4, 4, 1)).requires_grad_(False)


FIXED = {f.__name__: f for f in (Blur, Transform, Constant, buffered, frozen)}


def around(fixed):
    parts = (nn.Conv2d(3, 4, 3, padding=1), fixed, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(4 * 36, 2))


@pytest.mark.parametrize("rule", [Hebbian(0.1), Oja(0.1), Hebbian(0.1, computed=True)], ids=repr)
@pytest.mark.parametrize("name", FIXED)
def test_fixed_weight_stays_and_the_layers_around_it_learn(name, rule):
    torch.manual_seed(0)
    model, x = around(FIXED[name]()), torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(model)
    net = fxlocal.transform(model, Plan(local=LocalPrefix(until="5", rule=rule)), x)
    torch.testing.assert_close(net(x), before(x), rtol=0, atol=0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved == {"0.weight", "3.weight"}
    assert all(torch.equal(b, before.get_buffer(n)) for n, b in model.named_buffers())


class FromModule(nn.Module):
    """A filter that another module of the network makes."""

    def __init__(self):
        super().__init__()
        self.maker = nn.Embedding(4, 9)
        self.register_buffer("index", torch.arange(4))

    def forward(self, x):
        kernel = self.maker(self.index).view(4, 1, 3, 3)
        return F.conv2d(x, kernel, padding=1, groups=4)


class Shared(nn.Module):
    """A filter that is a parameter times a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(4, 4, 1, 1))
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask)


@pytest.mark.parametrize("computed", [FromModule, Shared])
def test_weight_made_of_a_parameter_is_refused(computed):
    model, x = around(computed()), torch.randn(2, 3, 6, 6)
    with pytest.raises(PlanError, match="computes its weight"):
        fxlocal.transform(model, Plan(local=LocalPrefix(until="5", rule=Hebbian())), x)
    fxlocal.transform(model, Plan(local=LocalPrefix(until="5", rule=Freeze())), x)


def test_weight_that_a_module_makes_is_refused_on_request_too():
    model, x = around(FromModule()), torch.randn(2, 3, 6, 6)
    with pytest.raises(PlanError, match=r"'1\.maker' is a module"):
        fxlocal.transform(model, Plan(local=LocalPrefix(until="5", rule=Hebbian(computed=True))), x)
