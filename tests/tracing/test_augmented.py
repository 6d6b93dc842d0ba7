"""``x += y`` changes the tensor itself, and each other name and view of it; of a number, none."""

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.captures import build

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))


def another_name(net, x):
    y = net.first(x)
    kept = y
    y += x.mean()
    return kept * y


def view_before(net, x):
    y = net.first(x)
    part = y[:, :2]
    y *= 2
    return torch.cat([part, part], 1) + y


def through_a_view(net, x):
    y = net.first(x)
    part = y[:, 1:3]
    part -= 0.5
    return torch.tanh(y)


def without_gradient(net, x):
    y = net.first(x)
    with torch.no_grad():
        y *= 0.5  # the gradient does not know
    return y


def of_the_data(net, x):
    y = net.first(x)
    values = y.data
    values /= 2
    return y * 1.0


def of_an_argument(net, x):
    def scale(value):
        value **= 2

    y = net.first(x)
    scale(y)
    return y


def shortcut(net, x):
    y = net.norm(net.first(x))
    y += x
    return F.relu(y)


def sizes(net, x):
    y = net.first(x)
    width = y.shape[1]
    more = width
    more += 1
    more *= 2
    return y * (more - width)


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    "body",
    [
        another_name,
        view_before,
        through_a_view,
        without_gradient,
        of_the_data,
        of_an_argument,
        shortcut,
        sizes,
    ],
)
@pytest.mark.parametrize("until", [0, 1])
def test_training_is_the_models(body, until):
    eager, ours = build(body), build(body)
    net = fxlocal.transform(ours, Plan(local=LocalPrefix(until=until, rule=Freeze())))
    assert "captured_with" not in net.meta  # symbolically
    for _ in range(2):
        laws.assert_equal(laws.step(net, (X,)), laws.step(eager, (X,)), "output")
    mine, theirs = laws.gradients(ours), laws.gradients(eager)
    for name in mine if until == 0 else ("second.weight", "second.bias"):
        laws.assert_equal(mine[name], theirs[name], f"gradient of {name}")


def test_an_input_is_changed_for_the_caller_too():
    def body(net, x):
        x += 1
        return net.first(x)

    mine, theirs = X.clone(), X.clone()
    laws.assert_equal(fxlocal.capture(build(body))(mine), build(body)(theirs), "output")
    laws.assert_equal(mine, theirs, "input")
    assert not torch.equal(mine, X)


def test_mixed_dtypes_keep_that_of_the_tensor_changed():
    def body(net, x):
        y = net.first(x).bfloat16()
        y += x
        return y.float()

    laws.assert_equal(fxlocal.capture(build(body))(X), build(body)(X), "output")


@pytest.mark.parametrize("kind", ["item", "size"])
def test_another_name_of_a_number_keeps_it(kind):
    def body(net, x):
        y = net.first(x)
        number = y.detach().sum().item() if kind == "item" else y.size(0)
        other = number
        other += 1
        return y * number + other

    laws.assert_equal(fxlocal.capture(build(body))(X), build(body)(X), "output")
