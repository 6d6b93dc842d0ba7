"""A weight that the forward itself changes: its update comes behind the last change."""

import copy

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import Hebbian, LocalPrefix, Plan

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Changing(nn.Module):
    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.body = nn.Linear(4, 4), nn.Linear(4, 2), body
        self.double()

    def forward(self, x):
        return self.last(self.body(self.first, x))


def clipped(layer, x):
    x = layer(x)
    layer.weight.data.clamp_(-0.2, 0.2)
    return x


def decayed_twice(layer, x):
    x = layer(x)
    layer.weight.data.mul_(0.5)
    layer.weight.data[:2].mul_(0.5)
    return x


def decayed_under_no_grad(layer, x):
    x = layer(x)
    with torch.no_grad():
        layer.weight.detach().view(-1).mul_(0.5)
    return x


def before_and_used_twice(layer, x):
    layer.weight.data.mul_(0.5)
    return layer(layer(x).tanh())


def between(layer, x):
    x = layer(x)
    layer.weight.data.mul_(0.5)
    return layer(x)


BODIES = [clipped, decayed_twice, decayed_under_no_grad, before_and_used_twice, between]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_update_is_added_to_what_the_forward_leaves(body):
    model = Changing(body)
    eager, met = copy.deepcopy(model), []
    eager.first.register_forward_hook(lambda layer, args, output: met.append((*args, output)))
    with torch.no_grad():
        expected = eager(X)
        delta = sum(output.t() @ given for given, output in met)
        weight = eager.first.weight + 0.1 * delta / delta.norm()
    net = fxlocal.transform(model, Plan(local=LocalPrefix(until="last", rule=Hebbian(0.1))))
    torch.testing.assert_close(net(X), expected)
    torch.testing.assert_close(model.first.weight.detach(), weight)
