"""Questions that a proxy answers without a word, and otherwise than the value would."""

import contextlib
import copy
import dataclasses
from collections import namedtuple

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import CaptureError, Plan

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.attention, self.body = nn.MultiheadAttention(8, 2, batch_first=True), body

    def forward(self, x):
        return self.body(self, x)


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    mask: torch.Tensor | None = None


Pair = namedtuple("Pair", "x mask")


def without_mask(net, batch):
    hidden = net.a(batch.x)
    return net.b(hidden if batch.mask is None else hidden * 0.5)


def second(net, pair):
    hidden = net.a(pair[0])
    return net.b(hidden if pair[1] is None else hidden * 0.5)


def in_a_helper(net, batch):
    return net.b(masked(net.a(batch.x), batch.mask))


def masked(hidden, mask):
    return hidden if mask is None else hidden * 0.5


def by_get(net, batch):
    hidden = net.a(batch["x"])
    return net.b(hidden if batch.get("mask") is None else hidden * 0.5)


def no_weights(net, x):
    hidden = net.a(x)[None]
    hidden, weights = net.attention(hidden, hidden, hidden, need_weights=False)
    return net.b(hidden if weights is None else hidden * 0.5)


def in_a_set(net, x):
    hidden = net.a(x)
    return net.b(hidden if hidden.dim() in {2, 3} else hidden * 0.5)


def as_a_key(net, x):
    hidden = net.a(x)
    return net.b(hidden * {torch.float32: 2.0}.get(hidden.dtype, 1.0))


def is_a_dtype(net, x):
    hidden = net.a(x)
    return net.b(hidden * 2 if hidden.dtype is torch.float32 else hidden)


def is_true(net, x):
    hidden = net.a(x)
    return net.b(hidden * 2 if (hidden.dim() == 2) is True else hidden)


def as_text(net, x):
    hidden = net.a(x)
    return net.b(hidden * 2 if "float32" in str(hidden.dtype) else hidden)


def by_f_string(net, x):
    hidden = net.a(x)
    return net.b(hidden * 2 if f"{hidden.shape[1]}" == "8" else hidden)


def by_percent(net, x):
    hidden = net.a(x)
    return net.b(hidden * len("%s" % hidden.shape[1]))  # noqa: UP031


def by_format(net, x):
    hidden = net.a(x)
    return net.b(hidden * len("{}".format(hidden.dtype)))  # noqa: UP032


def by_repr(net, x):
    hidden = net.a(x)
    return net.b(hidden * len(f"{hidden.dtype!r} {[hidden.shape[1]]}"))


def has_gradient(net, x):
    hidden = net.a(x)
    return net.b(hidden * 2 if net.b.weight.grad is not None else hidden)


def matched(net, x):
    hidden = net.a(x)
    match hidden:
        case torch.Tensor():
            return net.b(hidden * 2)
    return net.b(hidden)


def suppressed(net, x):
    hidden = net.a(x)
    with contextlib.suppress(Exception):
        if hidden.shape[0] > 2:
            hidden = hidden * 2
    return net.b(hidden)


ASKED = [no_weights, in_a_set, as_a_key, is_a_dtype, is_true, as_text, has_gradient, matched]
ASKED += [suppressed, by_f_string, by_percent, by_format, by_repr]
TEXTS = [by_f_string, by_format, as_text]
BATCHES = {
    "dataclass": (without_mask, Batch(X)),
    "helper": (in_a_helper, Batch(X)),
    "tuple": (second, (X, None)),
    "namedtuple": (second, Pair(X, None)),
    "get": (by_get, {"x": X}),
}


@pytest.mark.parametrize("body", ASKED, ids=lambda body: body.__name__)
def test_the_branch_is_the_models(body):
    model = Net(body)
    net = fxlocal.transform(model, Plan(), X)
    torch.testing.assert_close(net(X), copy.deepcopy(model)(X), rtol=0, atol=0)


@pytest.mark.parametrize("body", TEXTS, ids=lambda body: body.__name__)
def test_text_of_a_value_is_told_of_without_example_inputs(body):
    with pytest.warns(UserWarning, match=r"makes text of a value at .*hidden\..*give example"):
        fxlocal.transform(Net(body), Plan())


def asserted(net, x):
    torch._assert(x.shape[1] == 4, f"{x.shape[1]} features")
    return net.b(net.a(x))


def test_the_text_of_an_assertion_asks_nothing(no_warnings):
    model = Net(asserted)
    assert torch.equal(fxlocal.transform(model, Plan())(X), model(X))


@pytest.mark.parametrize("kind", BATCHES)
def test_what_a_container_lacks_is_none_or_refused(kind):
    body, batch = BATCHES[kind]
    model = Net(body)
    if kind in ("dataclass", "helper"):  # which torch.export does not know
        with pytest.raises(CaptureError, match="differs from the model"):
            fxlocal.transform(model, Plan(), batch)
        return
    net = fxlocal.transform(model, Plan(), batch)
    torch.testing.assert_close(net(batch), copy.deepcopy(model)(batch), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dataclass", "namedtuple"])
def test_what_a_container_has_stays_an_input(kind):
    body = without_mask if kind == "dataclass" else second
    batch = Batch(X, X) if kind == "dataclass" else Pair(X, X)
    model = Net(body)
    net = fxlocal.transform(model, Plan(), batch)
    torch.testing.assert_close(net(batch), model(batch), rtol=0, atol=0)


# Containers under torch.export, which takes them apart.


def by_names(net, batch):
    first, second = batch["first"], batch["second"]
    if first.shape[0] > 100:  # no symbolic trace
        first = first * 2
    return net.b(net.a(first) - 2 * net.a(second))


def test_members_are_found_by_their_names_in_any_order():
    model = Net(by_names)
    batch = {"first": X, "second": X + 1}
    net = fxlocal.transform(model, Plan(), batch)
    turned = dict(reversed(batch.items()))
    torch.testing.assert_close(net(turned), model(turned), rtol=0, atol=0)


@pytest.mark.parametrize("names", [("first",), ("first", "second", "third"), ("first", "third")])
def test_other_members_than_the_example_had_are_refused(names):
    net = fxlocal.transform(Net(by_names), Plan(), {"first": X, "second": X})
    message = r"the input 'x' has .*; the captured graph holds for \['first'\], \['second'\]"
    with pytest.raises(RuntimeError, match=message):
        net(dict.fromkeys(names, X))


@pytest.mark.parametrize("shapes_known", [True, False])
def test_one_tensor_may_be_the_example_of_two_inputs(shapes_known):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x, y):
            if not shapes_known and x.shape[0] > 100:
                x = x * 2
            return self.a(x - 2 * y)

    model = Two()
    net = fxlocal.transform(model, Plan(), X, X)
    torch.testing.assert_close(net(X, X + 1), model(X, X + 1), rtol=0, atol=0)


def listed(net, rows):
    if rows[0].shape[0] > 100:
        rows = rows[:1]
    return net.b(net.a(sum(rows)))


def test_a_longer_list_is_refused():
    model = Net(listed)
    net = fxlocal.transform(model, Plan(), [X, X])
    torch.testing.assert_close(net([X, 2 * X]), model([X, 2 * X]))
    with pytest.raises(RuntimeError, match=r"the input 'x' has \[0\], \[1\], \[2\]"):
        net([X, X, X])


# The mode that gradients are in.


def learns_if_it_may(net, x):
    with torch.set_grad_enabled(net.a.weight.requires_grad):
        hidden = net.a(x)
    return net.b(hidden)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_grad_mode_of_a_traced_value_is_that_value(frozen):
    model = Net(learns_if_it_may)
    model.a.requires_grad_(not frozen)
    net = fxlocal.transform(model, Plan(), X)
    net(X).sum().backward()
    assert torch.is_grad_enabled()
    assert (net.a.weight.grad is None) == frozen and net.b.weight.grad is not None


def test_a_grad_mode_of_an_argument_is_fixed():
    def switched(net, given):
        with torch.set_grad_enabled(given["learns"]):
            hidden = net.a(given["x"])
        return net.b(hidden)

    model = Net(switched)
    net = fxlocal.transform(model, Plan(), {"x": X, "learns": False})
    net({"x": X, "learns": False}).sum().backward()
    assert torch.is_grad_enabled() and net.a.weight.grad is None
    with pytest.raises(RuntimeError, match="captured with False"):
        net({"x": X, "learns": True})
