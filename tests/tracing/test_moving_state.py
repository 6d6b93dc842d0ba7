"""What a forward moves and no tensor shows, random numbers, hooks of gradients: never lost."""

import copy
import itertools
import pickle
import random
import types
from collections import Counter, OrderedDict

import numpy
import pytest
import torch
from support.captures import BOTH_WAYS, EXAMPLE
from torch import nn

import fxlocal
from fxlocal import CaptureError


class Moving(nn.Module):
    """Asks ``body`` for a factor; ``by_shape`` defeats symbolic tracing."""

    def __init__(self, state, body, by_shape):
        super().__init__()
        self.first, self.state, self.body = nn.Linear(4, 4), state, body
        self.by_shape = by_shape

    def forward(self, x):
        if self.by_shape and x.shape[0] > 1:
            x = x * 2
        y = self.first(x)
        return y * self.body(self.state, y)


class Names(dict):
    """A dict of another class."""


def count(state, y):
    state.update("a")
    return state["a"]


def one_more(state, y):
    state["calls"] += 1
    return state["calls"]


def attribute(state, y):
    state.calls += 1
    return state.calls


def item(state, y):
    state[0] += 1
    return float(state[0])


def longer(state, y):
    state.extend(b"a")
    return len(state)


STATES = {
    "a counter": (Counter, count),
    "a dict of the user's": (lambda: Names(calls=0), one_more),
    "an ordered dict": (lambda: OrderedDict(calls=0), one_more),
    "an object": (lambda: types.SimpleNamespace(calls=0), attribute),
    "an array": (lambda: numpy.zeros(2), item),
    "bytes": (bytearray, longer),
    "an iterator": (lambda: itertools.count(1), lambda state, y: next(state)),
    "Python's generator": (lambda: random.Random(0), lambda state, y: state.random()),
    "numpy's": (lambda: numpy.random.default_rng(0), lambda state, y: float(state.random())),
    "numpy's older": (lambda: numpy.random.RandomState(0), lambda state, y: float(state.rand())),
}


@pytest.mark.sample(6)
@BOTH_WAYS
@pytest.mark.parametrize("name", STATES)
def test_what_counts_the_calls_is_refused_and_put_back(name, by_shape):
    make, body = STATES[name]
    model = Moving(make(), body, by_shape)
    before = pickle.dumps(model.state)
    with pytest.raises(CaptureError, match=r"forward assigns 'state(\.calls)?'"):
        fxlocal.capture(model, EXAMPLE)
    assert pickle.dumps(model.state) == before


def asks(state, y):
    return state["scale"] * y.shape[1]


READ = {
    "a dict of the user's": (lambda: Names(scale=3), asks),
    "an object": (lambda: types.SimpleNamespace(scale=2), lambda state, y: state.scale),
    "an array": (lambda: numpy.full(2, 0.5), lambda state, y: float(state[1])),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_only_read_is_captured(name):
    model = Moving(READ[name][0](), READ[name][1], False)
    assert torch.equal(fxlocal.capture(model)(EXAMPLE), model(EXAMPLE))


# --- random numbers -------------------------------------------------------------------------------

DRAWS = {
    "Python's": lambda state, y: random.random(),
    "numpy's": lambda state, y: float(numpy.random.beta(1, 1)),
    "of the model": lambda state, y: torch.rand(4, generator=state),
    "by the input": lambda state, y: torch.bernoulli(y.detach().sigmoid(), generator=state),
    "in place": lambda state, y: y.detach().clone().normal_(generator=state),
}


@BOTH_WAYS
@pytest.mark.parametrize("name", DRAWS)
def test_a_number_that_would_be_drawn_once_is_refused(name, by_shape):
    model = Moving(torch.Generator().manual_seed(3), DRAWS[name], by_shape)
    before = random.getstate(), pickle.dumps(numpy.random.get_state())
    drawn = model.state.get_state()
    with pytest.raises(CaptureError, match=r"drawn only once|draws from a generator of its own"):
        fxlocal.capture(model, EXAMPLE)
    assert before == (random.getstate(), pickle.dumps(numpy.random.get_state()))
    if name in ("Python's", "numpy's"):
        assert torch.equal(model.state.get_state(), drawn)


# --- hooks of gradients ---------------------------------------------------------------------------


def on_a_value(net, y):
    y.register_hook(lambda gradient: gradient * 2)
    return 1.0


def on_one_that_learns(net, y):
    z = y * 1.0
    if torch.is_grad_enabled():
        z.register_hook(torch.neg)
    return z


def on_a_weight(weight, y):
    weight.register_hook(lambda gradient: gradient * 3)
    return 1.0


def on_what_is_accumulated(weight, y):
    weight.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.zero_())
    return 1.0


HOOKS = [on_a_value, on_one_that_learns, on_a_weight, on_what_is_accumulated]


@BOTH_WAYS
@pytest.mark.parametrize("body", HOOKS, ids=lambda body: body.__name__)
@pytest.mark.parametrize("given", [True, False], ids=["inputs", "alone"])
def test_a_hook_of_a_gradient_is_refused_at_its_line(body, given, by_shape):
    model = Moving(None, body, by_shape)
    model.state = model.first.weight
    inputs = (EXAMPLE,) if given or by_shape else ()
    with pytest.raises(CaptureError, match=r"registers a hook .*register\w+hook\("):
        fxlocal.capture(model, *inputs)
    assert not model.first.weight._backward_hooks
    assert not model.first.weight._post_accumulate_grad_hooks


def test_a_hook_of_a_parameter_that_was_there_before_runs():
    model = Moving(None, lambda state, y: 1.0, False)
    model.first.weight.register_hook(lambda gradient: gradient * 3)
    eager = copy.deepcopy(model)
    eager.first.weight.register_hook(lambda gradient: gradient * 3)
    for one in (fxlocal.capture(model), eager):
        one(EXAMPLE).sum().backward()
    assert torch.equal(model.first.weight.grad, eager.first.weight.grad)
