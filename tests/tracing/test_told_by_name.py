"""What a refusal of capture names: the field, the line that draws, the module that is replaced."""

import random
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import CaptureError, Plan

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Asking(nn.Module):
    """Asks for a size, so that torch.export captures it; ``body`` says what follows."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.body = nn.Linear(8, 8), nn.Linear(8, 3), body

    def forward(self, x):
        if x.shape[1] != 8:
            raise ValueError("size")
        return self.body(self, self.a(x))


@dataclass
class Out(dict):
    """As transformers' outputs: an item for each field that is not None."""

    first: torch.Tensor = None
    second: torch.Tensor = None

    def __post_init__(self):
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                dict.__setitem__(self, field.name, value)


def set_later(net, h):
    out = Out(first=h)
    out.second = net.b(h)
    return out


def set_more(net, h):
    out = Out(first=h)
    out.third = net.b(h)
    return out


def test_a_field_that_is_set_later_is_set_later():
    model = Asking(set_later)
    network = fxlocal.transform(model, Plan(), X)
    found, wanted = network(X), model(X)
    assert type(found) is Out and list(found) == list(wanted) == ["first"]
    assert torch.equal(found.second, wanted.second) and torch.equal(found["first"], wanted.first)


@dataclass
class OutByItems(Out):
    """As transformers' outputs: a field that is set is an item too, the last one."""

    third: torch.Tensor = None

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if self:
            self[name] = value


def set_before(net, h):
    out = OutByItems(third=h)
    out.first = net.b(h)
    return out


def set_between(net, h):
    out = OutByItems(first=h, third=2 * h)
    out.second = net.b(h)
    return out


def set_both(net, h):
    out = OutByItems(third=h)
    out.second = net.b(h)
    out.first = h + 1
    return out


@pytest.mark.parametrize("body", [set_before, set_between, set_both])
def test_fields_that_are_set_later_are_items_in_their_order(body):
    model = Asking(body)
    network = fxlocal.transform(model, Plan(), X)
    found, wanted = network(X), model(X)
    assert type(found) is OutByItems and list(found) == list(wanted) != sorted(wanted)
    assert all(torch.equal(found[name], getattr(wanted, name)) for name in wanted)


def test_what_an_output_holds_besides_is_named():
    with pytest.raises(CaptureError, match=r"another attribute 'third'") as caught:
        fxlocal.capture(Asking(set_more), X)
    assert "Make the module that does so a leaf" in str(caught.value)  # there is no line


def by_python(net, h):
    return net.b(h * 2 if random.random() < 0.5 else h)


def by_numpy(net, h):
    return net.b(h * float(np.random.uniform()))


@pytest.mark.parametrize(
    "body,told", [(by_python, r"random\.random"), (by_numpy, r"numpy\.random")]
)
def test_the_line_that_draws_is_named(body, told):
    state = random.getstate()
    with pytest.raises(
        CaptureError, match=rf"by {told}.* at \S*test_told_by_name\.py:\d+: `return"
    ):
        fxlocal.capture(Asking(body), X)
    assert random.getstate() == state and random.random.__self__ is random._inst


class Replacing(nn.Module):
    """Takes another activation for short texts, as BigBird does another attention."""

    def __init__(self):
        super().__init__()
        self.a, self.act = nn.Linear(8, 8), nn.ReLU()

    def forward(self, x):
        if isinstance(self.act, nn.ReLU):
            self.act = nn.Tanh()
        return self.act(self.a(x))


def test_a_module_that_the_forward_replaces_is_named():
    with pytest.raises(CaptureError, match=r"puts another module in the place of 'act'"):
        fxlocal.capture(Replacing(), X)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, labels=None):
        y = self.a(x)
        if labels is not None and labels.max() >= 8:
            raise ValueError("labels")
        return y if labels is None else nn.functional.cross_entropy(y, labels)


def test_labels_whose_values_are_asked_for_are_left_out():
    with pytest.raises(CaptureError, match=r"leave 'labels' out, and compute the loss from the"):
        fxlocal.capture(Labelled(), X, torch.tensor([1, 2]))
    model = Labelled()
    assert torch.equal(fxlocal.transform(model, Plan(), X)(X), model(X))
