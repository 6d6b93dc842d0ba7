"""What a model holds in lists, dicts and functions, or is asked for by a text, and then changes."""

import copy
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlocal
from fxlocal import Plan

X = torch.linspace(-1, 1, 12).view(3, 4)


class Mixin:
    """Behind `torch.nn.Module` in the order of bases, as in layers of PEFT."""

    @property
    def current(self):
        return self._current


class Holds(nn.Module, Mixin):
    def __init__(self, read, held, by_shape):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.read, self.held, self.by_shape = read, held, by_shape
        self._current, self.seen = "one", []

    def forward(self, x):
        if self.by_shape and x.shape[0] > 1:
            x = x * 1.0
        if not self.training:
            self.seen.append(x)
        scale = 1.0 if self.current == "one" else 3.0
        return self.last(self.layer(x) * self.read(self) * scale)


def by_text(net):
    return getattr(net, "held")  # noqa: B009


def set_to(value):
    return lambda net: setattr(net, "held", value)


CASES = {
    "dict": ({"p": 1.0}, lambda net: net.held["p"], lambda net: net.held.update(p=3.0)),
    "list": ([1.0], lambda net: net.held[0], lambda net: net.held.__setitem__(0, 3.0)),
    "longer": ([1.0], lambda net: sum(net.held), lambda net: net.held.append(2.0)),
    "tuple": ((1.0,), lambda net: net.held[0], set_to((3.0,))),
    "set": ({"on"}, lambda net: 1.0 if "on" in net.held else 3.0, lambda net: net.held.clear()),
    "nested": (
        {"p": [1.0]},
        lambda net: net.held["p"][0],
        lambda net: net.held["p"].__setitem__(0, 3.0),
    ),
    "function": (F.relu, lambda net: net.held(torch.ones(1)), set_to(torch.tanh)),
    "object": (
        types.SimpleNamespace(p=[1.0]),
        lambda net: net.held.p[0],
        lambda net: net.held.p.append(1.0),
    ),
    "by text": (1.0, by_text, set_to(3.0)),
    "numpy's": (np.float64(1.0), lambda net: net.held, set_to(np.float64(3.0))),
    "property": (None, lambda net: 1.0, lambda net: setattr(net, "_current", "two")),
}


@pytest.mark.parametrize("by_shape", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("name", CASES)
def test_a_change_is_told_of_once(name, by_shape):
    held, read, change = CASES[name]
    model = Holds(read, copy.deepcopy(held), by_shape)
    net = fxlocal.transform(model, Plan(), X)
    expected = net(X)
    change(model)
    with pytest.warns(UserWarning, match=r"made: (held|held\.p|_current) \(was") as told:
        assert torch.equal(net(X), expected)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


class Parent(nn.Module):
    """Reads the flag of a part that the graph takes apart, or calls whole."""

    def __init__(self, by_shape):
        super().__init__()
        self.layer, self.part, self.by_shape = nn.Linear(4, 4), Part(), by_shape

    def forward(self, x):
        if self.by_shape and x.shape[0] > 1:
            x = x * 1.0
        x = F.dropout(self.part(x), 0.5, self.part.training)
        return F.dropout(self.layer(x), 0.5, self.layer.training)


@pytest.mark.parametrize("by_shape", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("name", ["part", "layer"])
def test_a_training_flag_that_a_parent_reads_is_told_of(name, by_shape):
    model = Parent(by_shape)
    net = fxlocal.transform(model, Plan(), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X)
    model.get_submodule(name).eval()
    with pytest.warns(UserWarning, match=rf"made: {name}\.training \(was True\)"):
        net(X)


def test_tensors_that_evaluation_collects_are_not_told_of():
    model = Holds(lambda net: 1.0, None, False)
    net = fxlocal.transform(model, Plan(), X)
    net.eval()(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.train()(X)
    assert len(model.seen) == 1
