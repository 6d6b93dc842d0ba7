"""``x += y`` changes a tensor in place: another name, a view, the caller or a buffer sees it."""

import copy

import pytest
import torch
from support import laws
from support.captures import BOTH_WAYS, EXAMPLE, Net, build
from torch import nn

import fxlocal
from fxlocal import CaptureError, Freeze, LocalPrefix, Plan


def another_name(net, x):
    y = net.first(x)
    z = y
    z *= 2
    return y + z


def a_view_taken_before(net, x):
    y = net.first(x)
    part = y[:, :2]
    y += 1
    return torch.cat([part, y[:, 2:]], 1)


def through_a_view(net, x):
    y = net.first(x)
    rows = y.flatten().view(y.shape)
    rows -= 3
    return y


def through_a_layer_that_does_nothing(net, x):
    y = net.first(x)
    z = nn.functional.dropout(y, 0.0)
    z += 1
    return y


def twice(net, x):
    y = net.first(x)
    z = y
    z += 1
    z *= 3
    return y


def one_after_the_other(net, x):
    y = net.first(x)
    y += 1
    z = y
    z *= 3
    return y + x


def the_input(net, x):
    x *= 2
    return net.first(x)


def a_part_of_the_input(net, x):
    x[:, 1:].data.mul_(0.5)
    part = x[:, :2]
    part += 1
    return net.first(x)


def a_buffer(net, x):
    mean = net.norm.running_mean
    mean += 1
    return net.first(x) - net.norm.running_mean


def a_buffer_by_attribute(net, x):
    net.norm.running_mean += 1
    net.norm.num_batches_tracked *= 2
    return net.first(x) - net.norm.running_mean


def a_weight(net, x):
    with torch.no_grad():
        weight = net.first.weight
        weight *= 0.5
    return net.first(x)


def made_in_the_forward(net, x):
    total = torch.zeros(1, 4)
    for _ in range(2):
        total += net.first(x).mean(0)
    return x + total


def a_view_of_what_was_made(net, x):
    total = torch.zeros(4)
    rows = total.expand_as(x[:1])
    rows += net.first(x).mean(0)
    return x + rows


def an_item_of_what_was_made(net, x):
    total = torch.zeros(4)
    total[1] += net.first(x).mean()
    return x + total


BODIES = [another_name, a_view_taken_before, through_a_view, through_a_layer_that_does_nothing]
BODIES += [twice, one_after_the_other, the_input, a_part_of_the_input, a_buffer]
BODIES += [a_buffer_by_attribute, a_weight, made_in_the_forward, a_view_of_what_was_made]
BODIES += [an_item_of_what_was_made]


@pytest.mark.sample(5)
@BOTH_WAYS
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_an_augmented_assignment_is_seen_by_all_that_shares_the_memory(body, by_shape):
    model = build(body, by_shape)
    eager = copy.deepcopy(model)
    try:
        captured = fxlocal.capture(model, EXAMPLE.clone())
    except CaptureError:
        assert by_shape and body is a_part_of_the_input
        return
    for _ in range(2):
        ours, theirs = EXAMPLE.clone(), EXAMPLE.clone()
        laws.assert_equal(captured(ours), eager(theirs), "output")
        laws.assert_equal(ours, theirs, "input")
        laws.assert_equal(laws.step(captured, (ours,)), laws.step(eager, (theirs,)), "output")
        laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
        laws.assert_equal(model.state_dict(), eager.state_dict(), "state")


@pytest.mark.parametrize("body", [another_name, through_a_view, a_buffer_by_attribute])
def test_it_is_seen_before_a_boundary_too(body):
    model = build(body)
    eager = copy.deepcopy(model)
    net = fxlocal.transform(model, Plan(local=LocalPrefix(until="second", rule=Freeze())))
    for _ in range(2):
        laws.assert_equal(net(EXAMPLE), eager(EXAMPLE), "output")
    laws.assert_equal(model.state_dict(), eager.state_dict(), "state")


def test_a_number_is_a_new_one():
    class Sized(Net):
        def forward(self, x):
            rows = size = x.shape[0]
            rows *= 4
            return self.second(self.first(x)).reshape(rows // 4, -1) + size

    model = Sized(None)
    assert torch.equal(fxlocal.transform(model, Plan())(EXAMPLE), model(EXAMPLE))
