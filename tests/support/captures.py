"""A model for capture, whose body is a function; with ``by_shape`` only export can capture it."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlocal
from fxlocal import CaptureError
from support import laws

EXAMPLE = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
BOTH_WAYS = pytest.mark.parametrize("by_shape", [False, True], ids=["symbolic", "export"])


class ByShape(nn.Module):
    """A net of images, which symbolic tracing cannot follow; torch.export can."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x if x.dim() == 4 else x[None])


class Net(nn.Module):
    """Two layers; ``body`` computes what lies between. ``by_shape`` defeats symbolic tracing."""

    def __init__(self, body, by_shape=False):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.body, self.by_shape = body, by_shape

    def forward(self, x):
        if self.by_shape and x.shape[0] > 1:
            x = x * 2
        return self.second(self.body(self, x))


def build(body, by_shape=False):
    torch.manual_seed(0)
    return Net(body, by_shape)


def plain(net, x):
    return F.relu(net.norm(net.first(x)))


def assert_exact_or_refused(model, *inputs):
    """Bit for bit the source's over two steps, or a CaptureError: never something else."""
    eager = copy.deepcopy(model)
    try:
        captured = fxlocal.capture(model, *inputs)
    except CaptureError:
        return
    for _ in range(2):
        laws.assert_equal(laws.step(captured, inputs), laws.step(eager, inputs), "output")
    laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
    laws.assert_equal(model.state_dict(), eager.state_dict(), "state")


class Sampled(nn.Linear):
    """Leaves a part of the loss on itself."""

    def forward(self, x):
        mean = super().forward(x)
        self.penalty = mean.square().mean()
        return mean


class Assigning(nn.Module):
    """``body`` assigns; ``by_shape`` defeats symbolic tracing."""

    def __init__(self, body, by_shape):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.sampled, self.last = Sampled(4, 4), nn.Linear(4, 2)
        self.register_buffer("average", torch.rand(4))
        self.register_buffer("table", torch.zeros(0, 4))
        self.losses, self.cache, self.steps, self.first = [], {"of": {}}, 0, True
        self.loss = self.mask = self.size = None
        self.other = types.SimpleNamespace(loss=None)
        self.body, self.by_shape = body, by_shape

    def forward(self, x):
        if self.by_shape and x.shape[0] > 1:
            x = x * 2
        return self.last(self.body(self, x).relu())


def attempt(body, by_shape, *inputs):
    """Return a model and its capture; whatever comes of it, the model is as it was."""
    model = Assigning(body, by_shape)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    try:
        return model, fxlocal.capture(model, *inputs)
    finally:
        assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
        assert model.losses == [] and model.cache == {"of": {}}
        laws.assert_equal(model.state_dict(), state, "state")
        assert torch.equal(torch.get_rng_state(), drawn)
