"""One update of a weight that several calls use, in whatever order their posts are made."""

import pytest
import torch
from support import laws
from torch import nn

from fxlocal import Hebbian, LocalPrefix, Plan


class Net(nn.Module):
    """Both calls of ``one`` feed residual sums, which ``order`` makes in some order."""

    def __init__(self, one, order):
        super().__init__()
        self.first, self.one, self.order = nn.Conv2d(4, 4, 1), one, order
        self.other, self.last = one, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(self.order(x, self.one, self.other))


def second_sum_first(x, one, other):
    a, b = one(x), other(torch.relu(x))
    later = torch.relu(x) + b
    return (x + a) * later.sigmoid()


def sum_over_the_other(x, one, other):
    a = one(x)
    return (a + x) + other(x)


def nested_sums(x, one, other):
    a, b, c = one(x), other(x * 0.5), one(x * x)
    inner = c + x * x
    middle = b + x * 0.5
    return a + x + inner + middle


def first_sum_first(x, one, other):
    a, b = one(x), other(torch.relu(x))
    return (x + a).sigmoid() * (torch.relu(x) + b)


ORDERS = [second_sum_first, sum_over_the_other, nested_sums, first_sum_first]
LAYERS = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
    "linear": lambda: nn.Linear(6, 6),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_update_follows_the_last_of_its_deltas(layer, order):
    torch.manual_seed(0)
    model = Net(LAYERS[layer](), order)
    inputs = (torch.randn(3, 4, 6, 6),)
    laws.check_training(model, inputs, Plan(local=LocalPrefix(until="last", rule=Hebbian(0.125))))
