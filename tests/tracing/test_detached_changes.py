"""Changes through ``.data`` where only `torch.export` can capture: exact, or refused."""

import copy

import pytest
import torch
from support.captures import EXAMPLE
from torch import nn

import fxlocal
from fxlocal import CaptureError


class Changing(nn.Module):
    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.body = nn.Linear(4, 4), nn.Linear(4, 4), body
        self.register_buffer("average", torch.ones(4))

    def forward(self, x):
        return self.body(self, x if x.shape[1] == 4 else x[:, :4])


def a_weight(net, x):
    x = net.first(x)
    net.first.weight.data.clamp_(-0.1, 0.1)
    return net.last(x)


def a_row_of_a_weight(net, x):
    x = net.first(x)
    net.first.weight.data[1:].mul_(0.5)
    return net.last(x)


def a_value(net, x):
    x = net.first(x)
    y = net.last(x)
    x.data.mul_(2)
    return y + x


def a_weight_before(net, x):
    net.first.weight.data.clamp_(-0.1, 0.1)
    return net.last(net.first(x))


def a_buffer(net, x):
    x = net.first(x) * net.average
    net.average.data.mul_(0.5)
    return net.last(x)


def a_buffer_before(net, x):
    net.average.data.mul_(0.5)
    return net.last(net.first(x) * net.average)


@pytest.mark.parametrize("body", [a_weight, a_row_of_a_weight, a_value, a_buffer])
def test_a_change_after_the_use_is_refused(body):
    with pytest.raises(CaptureError, match=r"through \.data or detach\(\) after it was used"):
        fxlocal.capture(Changing(body), EXAMPLE)


@pytest.mark.parametrize("body", [a_weight_before, a_buffer_before])
def test_other_changes_are_the_models(body):
    model = Changing(body)
    eager = copy.deepcopy(model)
    net = fxlocal.capture(model, EXAMPLE)
    for one in (net, eager):
        one(EXAMPLE).square().sum().backward()
    torch.testing.assert_close(dict(model.state_dict()), dict(eager.state_dict()))
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
