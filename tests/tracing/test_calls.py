"""A network is called as its source is: positional, by name, nested, with defaults."""

import pytest
import torch
import torch.nn.functional as F
from support.captures import BOTH_WAYS, EXAMPLE
from torch import nn

import fxlocal
from fxlocal import Plan


class Call(nn.Linear):
    def __init__(self, by_shape):
        super().__init__(4, 4)
        self.by_shape = by_shape

    def between(self, x):
        x = F.linear(x, self.weight, self.bias)
        return x * 2 if self.by_shape and x.shape[0] > 1 else x


class Optional(Call):
    def forward(self, x, mask=None, *, scale=2.0):
        x = self.between(x) * scale
        return x if mask is None else x * mask


class Several(Call):
    def forward(self, *xs):
        return self.between(xs[0]) + xs[1]


class Nested(Call):
    def forward(self, batch):
        return self.between(batch["x"]) + batch["rest"][0]


class Repeated(Call):
    def forward(self, x, times):
        return self.between(x) * times


OTHER = EXAMPLE * 3
CALLS = {
    "default left out": (Optional, (EXAMPLE,), (OTHER,), {}),
    "default given": (Optional, (EXAMPLE, EXAMPLE.abs()), (OTHER, OTHER.exp()), {}),
    "any number": (Several, (EXAMPLE, EXAMPLE.abs()), (OTHER, OTHER.exp()), {}),
    "nested": (
        Nested,
        ({"x": EXAMPLE, "rest": [EXAMPLE.abs()]},),
        ({"x": OTHER, "rest": [OTHER.exp()]},),
        {},
    ),
    "a number": (Repeated, (EXAMPLE, 2), (OTHER, 3), {}),
    "by name": (Repeated, (EXAMPLE, 2), (OTHER,), {"times": 2}),
}


@pytest.mark.sample(6)
@BOTH_WAYS
@pytest.mark.parametrize("name", CALLS)
def test_a_network_is_called_as_its_source_is(name, by_shape):
    """With the example's inputs and with others; what it cannot take, it refuses."""
    kind, example, args, kwargs = CALLS[name]
    model = kind(by_shape)
    try:
        net = fxlocal.transform(model, Plan(), *example)
    except fxlocal.CaptureError:
        return
    for training in (True, False):
        model.train(training)
        assert torch.equal(net(*example), model(*example))
        try:
            ours = net(*args, **kwargs)
        except (RuntimeError, ValueError):
            continue
        assert torch.equal(ours, model(*args, **kwargs))


@pytest.mark.parametrize("default", [None, True, 2, 2.5, "mean", (2, 3), [2, 3]], ids=repr)
def test_a_default_of_any_type_is_kept(default):
    class Defaulted(nn.Linear):
        def forward(self, x, option=default):
            return super().forward(x) * (3 if option == default else 5)

    model = Defaulted(4, 4)
    net = fxlocal.transform(model, Plan())
    assert torch.equal(net(EXAMPLE), model(EXAMPLE))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        net(EXAMPLE, 7)  # the graph holds for the default alone
