"""Weights that a local update cannot take its step back from are refused, and why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.computed import Masked, Net
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxlocal
from fxlocal import Custom, Hebbian, LocalPrefix, Oja, Plan, PlanError

RULE = Hebbian(computed=True)


def plan(rule=RULE, until=1):
    return Plan(local=LocalPrefix(until=until, rule=rule))


class Dropped(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, 0.5, True), self.bias)


class Noisy(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight + torch.randn_like(self.weight), self.bias)


class SideView(nn.Linear):
    """The weight changes through a view, in a node that it is not computed from."""

    def forward(self, x):
        weight = self.weight * 2
        weight.view(-1).mul_(0.5)
        return F.linear(x, weight, self.bias)


class FromInput(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * x.mean(), self.bias)


class Activated(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.act = nn.Tanh()

    def forward(self, x):
        return F.linear(x, self.act(self.weight), self.bias)


class Guarded(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            weight = self.weight * 2
        return F.linear(x, weight, self.bias)


class Same(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2, None, padding="same")


class Iterated(nn.Module):
    """Each call makes another weight of the same parameter."""

    def __init__(self):
        super().__init__()
        self.a = parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.a(torch.relu(self.a(x)))


class Made(nn.Linear):
    """A layer makes the weight of the next."""

    def __init__(self):
        super().__init__(4, 4, bias=False)
        self.make = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.make(self.weight))


class Shared(nn.Module):
    """Two weights have one gain."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        x = torch.relu(F.linear(x, self.a.weight * self.gain))
        return F.linear(x, self.b.weight * self.gain)


class AlsoPlain(nn.Module):
    """One weight serves as it is and doubled."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(torch.relu(self.a(x)), self.a.weight * 2)


class Random(nn.Module):
    def forward(self, weight):
        return F.dropout(weight, 0.5, self.training)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls += 1
        return weight * 2


def parametrised(how):
    return lambda: parametrize.register_parametrization(nn.Linear(4, 4), "weight", how())


def hooked():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


def pruned():
    layer = nn.Linear(4, 4)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


REFUSED = {
    "dropout": (lambda: Dropped(4, 4), "draws random numbers"),
    "noise": (lambda: Noisy(4, 4), "draws random numbers"),
    "through a view": (lambda: SideView(4, 4), "'mul_' changes it.*in place"),
    "of the input": (lambda: FromInput(4, 4), "depends on the input 'x'"),
    "a module": (Activated, "'layer.act' is a module"),
    "no_grad": (lambda: Guarded(4, 4), r"'mul' runs under torch.no_grad\(\)"),
    "called twice": (Iterated, "called twice, and comes out otherwise each time"),
    "by a layer": (Made, "'layer.make' is a module"),
    "same": (lambda: Same(4, 4, 3), "padding='same'"),
    "a shared gain": (Shared, "'layer.gain' is part of two weights"),
    "used as it is": (AlsoPlain, "'layer.a.weight' is part of two weights"),
    "a random parametrisation": (parametrised(Random), "comes out otherwise|random numbers"),
    "one that counts": (parametrised(Counting), "in place"),
    "an old hook": (hooked, "a hook makes it.*parametrizations has the same"),
    "pruned": (pruned, "a hook makes it.*register one of your own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_back_is_refused_before_any_edit(name):
    build, message = REFUSED[name]
    model = Net(build())
    layers = fxlocal.analyze(model).layers
    before = copy.deepcopy({n: p.detach().clone() for n, p in model.named_parameters()})
    with pytest.raises(PlanError, match=f"(?s){message}.*use Freeze"):
        fxlocal.transform(model, plan(until=len(layers) - 1))
    laws.assert_equal({n: p.detach() for n, p in model.named_parameters()}, before, "parameters")


def test_without_the_option_the_refusal_names_it():
    for rule in (Hebbian(), Oja(), Custom(torch.add)):
        said = rf"computes its weight.*{type(rule).__name__}\(\.\.\., computed=True\)"
        with pytest.raises(PlanError, match=said):
            fxlocal.transform(Net(Masked(4, 4)), plan(rule))
        assert "computed=" not in repr(rule)


def test_the_option_changes_nothing_where_no_weight_is_computed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    texts = {
        fxlocal.format_graph(fxlocal.transform(model, plan(Hebbian(computed=switch))))
        for switch in (False, True)
    }
    assert len(texts) == 1


def test_the_option_has_to_be_a_switch():
    with pytest.raises(PlanError, match=r"Hebbian\(computed=1\): give True or False"):
        Hebbian(computed=1)
    assert repr(Oja(computed=True)) == "Oja(rate=0.0001, relative=False, computed=True)"
