"""A trace that took another branch than the model, as a proxy is no tensor, is not handed out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.captures import EXAMPLE, build, plain
from torch import nn

import fxlocal
from fxlocal import CaptureError, Plan
from fxlocal.tracing.doubts import may_differ


def is_instance(net, x):
    y = net.first(x)
    return F.pad(y, (1, -1)) if isinstance(y, torch.Tensor) else y[:, :2]


def is_tensor(net, x):
    return net.first(x) if torch.is_tensor(x) else net.first(x)[:, :3]


def has_attribute(net, x):
    return net.first(x.feature) if hasattr(x, "feature") else net.first(x)


def of_type(net, x):
    return net.first(x) if issubclass(type(x), torch.Tensor) else net.first(x)[0]


def is_callable(net, x):
    return net.first(x)[:1] if callable(x) else net.first(x)


def is_sequence(value):
    return not torch.is_tensor(value)


def by_a_helper(net, x):
    return net.first(x).sum(0) if is_sequence(x) else net.first(x)


def by_a_lambda(net, x):
    shape = lambda value: value.shape if isinstance(value, torch.Tensor) else None  # noqa: E731
    return net.first(x)[0] if shape(x) is None else net.first(x)


def swallowed(net, x):
    try:
        rows = x.dim() == 2 and x.shape[1] > 2
        return net.first(x) if rows else net.first(x)[:, 0]
    except Exception:
        return net.first(x)[0]


def other_dtype(net, x):
    y = net.first(x)
    return y if isinstance(y, torch.Tensor) else y.double()


def same_shape(net, x):
    y = net.first(x)
    return net.norm(y) if isinstance(y, torch.Tensor) else y


DOUBTED = [is_instance, is_tensor, has_attribute, of_type, is_callable, by_a_helper, by_a_lambda]
DOUBTED += [swallowed, other_dtype, same_shape]


class Whole(nn.Module):
    """Returns what ``body`` computes."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.body = nn.Linear(4, 4), nn.BatchNorm1d(4), body

    def forward(self, x):
        return self.body(self, self.norm(x))


class Methods(Whole):
    """Asks in a method, and in a class of its own."""

    def as_list(self, x):
        return [x] if isinstance(x, torch.Tensor) else x

    def forward(self, x):
        return [self.first(part) for part in self.as_list(x)[:1]]


class Part(nn.Module):
    def forward(self, x):
        return {"out": x} if isinstance(x, torch.Tensor) else x


class Nested(Whole):
    def __init__(self, body):
        super().__init__(body)
        self.part = Part()

    def forward(self, x):
        return self.part(self.norm(self.first(x)))


MODELS = [*(lambda body=body: Whole(body) for body in DOUBTED)]
MODELS += [lambda: Methods(None), lambda: Nested(None)]


@pytest.mark.sample(5)
@pytest.mark.parametrize("make", MODELS)
def test_a_network_computes_what_the_model_does(make):
    model, eager = make(), make()
    before = copy.deepcopy(model.state_dict())
    assert may_differ(model)
    network = fxlocal.transform(model, Plan(), EXAMPLE)
    laws.assert_equal(model.state_dict(), before, "state")
    assert all(type(p) is nn.Parameter for p in model.parameters())
    for _ in range(2):
        ours, theirs = laws.step(network, (EXAMPLE,)), laws.step(eager, (EXAMPLE,))
        laws.assert_equal(ours, theirs, "output")
        laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
        laws.assert_equal(model.state_dict(), eager.state_dict(), "state")


def by_value(net, x):
    y = net.first(x)
    return y * 3 if isinstance(y, torch.Tensor) and float(y.sum()) else y[:, :3]


def test_where_export_fails_too_the_difference_is_told():
    with pytest.raises(CaptureError, match=r"symbolic trace differs from the model.*torch\.export"):
        fxlocal.capture(Whole(by_value), EXAMPLE)


def test_what_asks_and_gets_the_same_answer_stays_as_it_was_traced():
    def tuples(net, x):
        return net.first(x[0]) if isinstance(x, tuple) else net.first(x)

    model = Whole(tuples)
    assert may_differ(model)
    network = fxlocal.capture(model, EXAMPLE)
    assert [n.target for n in network.graph.find_nodes(op="call_module")] == ["norm", "first"]


def test_what_a_trace_holds_as_a_constant_is_no_difference():
    def with_table(net, x):
        y = net.first(x[0] if isinstance(x, tuple) else x)
        return y + torch.arange(4.0).square() * net.first.bias.detach().clone()

    network = fxlocal.capture(Whole(with_table), EXAMPLE)
    assert [n.target for n in network.graph.find_nodes(op="call_module")] == ["norm", "first"]


def test_what_asks_nothing_is_not_run():
    model = build(plain)
    assert not may_differ(model)
    assert not may_differ(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU())))


def test_what_cannot_run_on_fake_tensors_is_handed_out_as_before():
    class Drawn(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum() * 0 + 2)

    def asks(net, x):
        return net.drawn(x[0] if isinstance(x, tuple) else x)

    model = Whole(asks)
    model.drawn = Drawn(4, 2)
    network = fxlocal.capture(model, EXAMPLE, leaf_modules=(Drawn,))
    assert torch.equal(network(EXAMPLE), model(EXAMPLE))
