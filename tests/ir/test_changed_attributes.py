"""Attributes, forwards and buffers that a model gets after `transform`: told of, or refused."""

import copy
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlocal
from fxlocal import Driver, Freeze, LocalPrefix, Plan
from fxlocal.schedules import Static

X = torch.linspace(-1, 1, 12).view(3, 4)
PLANS = {"plain": Plan(), "prefix": Plan(local=LocalPrefix(until=1, rule=Freeze()))}


class Block(nn.Module):
    """Burns in a number, a flag, a text, one of its class and one of an object."""

    offset = 0.0

    def __init__(self):
        super().__init__()
        self.layer, self.rate, self.kind, self.unread = nn.Linear(4, 4), 0.0, "relu", 1
        self.config = types.SimpleNamespace(factor=1.0, other=1)
        self.register_buffer("mask", None)

    def forward(self, x):
        y = self.layer(x) + self.offset
        if self.mask is not None:
            y = y * self.mask
        y = F.dropout(y, self.rate, self.training)
        return getattr(F, self.kind)(y) * self.config.factor


def nested(by_shape=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block()), nn.Linear(4, 2))
    if by_shape:
        model.insert(0, ByShape())
    return model


class ByShape(nn.Module):
    def forward(self, x):
        return x if x.shape[0] > 1 else x * 1


def block_of(model):
    return next(module for module in model.modules() if isinstance(module, Block))


CHANGES = {"rate": 0.5, "kind": "tanh", "offset": 1.0, "training": False, "config.factor": 2.0}
CHANGES |= {"mask": torch.ones(4)}


@pytest.mark.parametrize("by_shape", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CHANGES)
def test_an_attribute_that_the_graph_has_burned_in_is_told_of_once(name, plan, by_shape):
    model = nested(by_shape)
    net = fxlocal.transform(model, PLANS[plan], X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = net(X)
        net.eval()(X)
        net.train()(X)
    block, (*inside, last) = block_of(model), name.split(".")
    setattr(getattr(block, *inside) if inside else block, last, CHANGES[name])
    with pytest.warns(UserWarning, match=rf"\d\.0\.{name} \(was .*transform the model") as told:
        found = net(X)
    assert torch.equal(found, expected)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X)
        copy.deepcopy(net)(X)


class Remembers(nn.Module):
    """Fills a buffer by its first call, and keeps what it saw in evaluation."""

    def __init__(self):
        super().__init__()
        self.layer, self.last, self.seen = nn.Linear(4, 2), 0, 0
        self.register_buffer("table", None)

    def forward(self, x):
        if self.table is None or self.table.shape[0] < x.shape[0]:
            self.table = torch.arange(float(x.shape[0]))[:, None]
        if not self.training:
            self.last, self.seen = x, self.seen + 1
        return self.layer(x) + self.table[: x.shape[0]]


def test_what_evaluation_fills_does_not_stop_training():
    model = Remembers()
    net = fxlocal.transform(model, Plan(), X)
    expected = net(X)
    net.eval()(X)
    net.train()
    with pytest.warns(UserWarning, match=r"made: last \(was 0\), seen \(was 0\)") as told:
        assert torch.equal(net(X), expected)
    assert len(told) == 1 and "table" not in str(told[0].message)
    del model.last
    model.seen = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X)


def test_nothing_is_told_where_the_model_itself_runs():
    model = nested()
    net = fxlocal.transform(model, Plan(), X)
    block_of(model).rate = 0.5
    block_of(model).offset = float("nan")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        net(X)
    block_of(model).offset = float("nan")
    with pytest.warns(UserWarning, match=r"made: 1\.0\.offset .*, 1\.0\.rate"):
        net(X)


def test_what_the_forward_does_not_read_is_nobodys_business():
    model = nested()
    net = fxlocal.transform(model, Plan(), X)
    block_of(model).unread = 2
    block_of(model).later = 3
    block_of(model).config.other = 2
    model[0].in_features = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X)


def test_a_norm_of_an_exported_model_that_is_put_in_evaluation_mode():
    model = nn.Sequential(ByShape(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    net = fxlocal.transform(model, Plan(), X)
    model[2].eval()
    model[3].p = 0.1
    with pytest.warns(UserWarning) as told:
        net(X)
    assert len(told) == 1 and "2.training (was True), 3.p (was 0.5)" in str(told[0].message)


def test_a_driver_tells_of_what_was_changed_between_epochs():
    model = nested()
    driver = Driver(model, Static(epochs=4), torch.optim.SGD(model.parameters(), 0.1))
    block_of(model).rate = 0.5
    with pytest.warns(UserWarning, match=r"1\.0\.rate \(was 0\.0\)"):
        driver.start_epoch()
        driver.network()(X)


class Other(Block):
    def forward(self, x):
        return super().forward(x) * 2


def set_forward(block):
    block.forward = lambda x: x


def set_method(block):
    block.forward = types.MethodType(lambda self, x: self.layer(x), block)


def set_class(block):
    block.__class__ = Other


def set_forward_of_class(block):
    block.__class__ = type("Made", (Block,), {"forward": lambda self, x: x})


REFUSED = [set_forward, set_method, set_class, set_forward_of_class]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("change", REFUSED)
def test_another_forward_is_refused(change, plan):
    model = nested()
    net = fxlocal.transform(model, PLANS[plan], X)
    change(block_of(model))
    with pytest.raises(RuntimeError, match=r"'1\.0\.forward' is another function.*Transform again"):
        net(X)
    again = fxlocal.transform(model, PLANS[plan], X)
    torch.manual_seed(1)
    found = again(X)
    torch.manual_seed(1)
    assert torch.equal(found, model(X))


def test_the_models_own_forward_too():
    model = nested()
    net = fxlocal.transform(model, Plan(), X)
    model.forward = lambda x: x
    with pytest.raises(RuntimeError, match="'forward' is another function"):
        net(X)


def test_a_copy_of_a_network_watches_the_copy_of_the_model():
    model = nested()
    twin = copy.deepcopy(fxlocal.transform(model, Plan(), X))
    set_class(block_of(model))
    block_of(model).rate = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin(X)
    block_of(twin.source_model).rate = 0.5
    with pytest.warns(UserWarning, match="rate"):
        twin(X)


class Called(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x) * 2


def test_a_call_that_the_class_overrides_is_told_of():
    model = Called(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="the __call__ of Called will not run in training"):
        net = fxlocal.transform(model, Plan(), X)
    assert torch.equal(net.eval()(X), model(X))
    inside = nn.Sequential(Called(nn.Linear(4, 4)), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fxlocal.transform(inside, Plan(), X)(X), inside(X))
        plain = nested()
        driver = fxlocal.attach(model, Static(epochs=2))  # it does: the model is called
        driver.detach()
        fxlocal.transform(torch.fx.symbolic_trace(plain), Plan(), X)
