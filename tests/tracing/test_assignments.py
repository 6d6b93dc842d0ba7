"""What a forward assigns is carried out, or refused at its line; never lost in silence."""

import contextlib
import copy
import re
import types

import pytest
import torch
from support import laws
from support.captures import BOTH_WAYS, EXAMPLE, Assigning, Sampled, attempt
from torch import nn

import fxlocal
from fxlocal import CaptureError, LocalPrefix, Plan

KEPT = {"values": [], "one": types.SimpleNamespace(value=None)}


# --- attributes of modules ------------------------------------------------------------------------


def on_the_model(net, x):
    net.loss = x.mean()
    return x @ net.weight


def on_a_child(net, x):
    return net.sampled(x)


def on_another(net, x):
    net.sampled.seen = x.detach()
    return x @ net.weight


def counted(net, x):
    net.steps += 1
    return x @ net.weight


def of_the_batch(net, x):
    net.size = x.shape[0]
    return x @ net.weight * net.size


def deleted(net, x):
    del net.first
    net.first = True
    return x @ net.weight


def swallowed(net, x):
    with contextlib.suppress(RuntimeError):
        net.loss = x.mean()
    return x @ net.weight


def a_buffer(net, x):
    net.average = 0.9 * net.average + 0.1 * x.detach().mean(0)
    return x * net.average


def a_parameter(net, x):
    net.weight = nn.Parameter(torch.eye(4))
    return x @ net.weight


ATTRIBUTES = [on_the_model, on_a_child, on_another, counted, of_the_batch, deleted, swallowed]
ATTRIBUTES += [a_buffer, a_parameter]


@pytest.mark.sample(5)
@BOTH_WAYS
@pytest.mark.parametrize("body", ATTRIBUTES, ids=lambda body: body.__name__)
def test_an_attribute_that_each_call_sets_is_refused_at_its_line(body, by_shape):
    with pytest.raises(CaptureError, match=r"forward assigns '[\w.]+' at") as refused:
        attempt(body, by_shape, EXAMPLE)
    line = re.search(r"tests/\w+/\w+\.py:\d+: `(.*?)`", str(refused.value))[1]
    assert line.startswith(("net.", "del net.", "self.penalty ="))


@pytest.mark.parametrize("body", [on_the_model, on_a_child, counted], ids=lambda b: b.__name__)
def test_it_is_refused_without_example_inputs_too(body):
    with pytest.raises(CaptureError, match="run the model once before"):
        attempt(body, False)


def test_a_loss_on_a_block_of_the_prefix_is_refused_by_transform():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Sampled(4, 4), nn.ReLU()), nn.Linear(4, 2))
    with pytest.raises(CaptureError, match=r"'1\.0\.penalty' at .*self\.penalty = "):
        fxlocal.transform(model, Plan(local=LocalPrefix(until="2")), EXAMPLE)
    whole = fxlocal.capture(model, leaf_modules=(Sampled,))
    whole(EXAMPLE)
    assert model[1][0].penalty.requires_grad  # kept whole, the module sets what it sets


# --- what is kept in containers, objects and globals ----------------------------------------------


def in_a_list(net, x):
    net.losses.append(x.mean())
    return x @ net.weight


def in_a_dict(net, x):
    net.cache["of"]["loss"] = x.mean()
    return x @ net.weight


def in_its_dict(net, x):
    vars(net)["loss"] = x.mean()
    return x @ net.weight


def in_an_object(net, x):
    net.other.loss = (x @ net.weight).mean()
    return x @ net.weight


def in_a_global(net, x):
    KEPT["values"].append((x @ net.weight).mean())
    return x @ net.weight


def on_a_global(net, x):
    KEPT["one"].value = x @ net.weight
    return x @ net.weight


KEEPING = [in_a_list, in_a_dict, in_its_dict, in_an_object, in_a_global, on_a_global]


@pytest.mark.sample(3)
@BOTH_WAYS
@pytest.mark.parametrize("body", KEEPING, ids=lambda body: body.__name__)
def test_a_value_that_is_kept_elsewhere_is_refused(body, by_shape):
    KEPT["values"].clear()
    KEPT["one"].value = None
    with pytest.raises(CaptureError, match=r"assigns .(losses|cache|loss)|keeps what it computes"):
        attempt(body, by_shape, EXAMPLE)


# --- attributes of tensors ------------------------------------------------------------------------


def masked(net, x):
    net.weight.data *= torch.ones(4, 4).triu()
    return x @ net.weight


def replaced(net, x):
    net.weight.data = net.weight.data.clamp(-1, 1)
    return x @ net.weight


def of_a_value(net, x):
    y = x @ net.weight
    y.data = y.data * 2
    return y


def asks_for_gradient(net, x):
    y = (x @ net.weight).detach()
    y.requires_grad = True
    return y


def drops_gradient(net, x):
    net.weight.grad = None
    return x @ net.weight


OF_TENSORS = [masked, replaced, of_a_value, asks_for_gradient, drops_gradient]


@BOTH_WAYS
@pytest.mark.parametrize("body", OF_TENSORS, ids=lambda body: body.__name__)
def test_an_attribute_of_a_tensor_that_is_assigned_is_refused_at_its_line(body, by_shape):
    with pytest.raises(CaptureError, match=r"assigns '(data|grad|requires_grad)' of a tensor at"):
        attempt(body, by_shape, EXAMPLE)


# --- what is carried out --------------------------------------------------------------------------


def buffer_in_place(net, x):
    net.average += 1
    return x * net.average


def data_in_place(net, x):
    net.weight.data.mul_(0.5)
    return x @ net.weight


def without_gradient(net, x):
    with torch.no_grad():
        net.weight.mul_(0.5)
    return x @ net.weight


def nothing_new(net, x):
    net.steps, net.size, net.first = 0, None, True
    return x @ net.weight


def mask(net, x):
    if net.mask is None:
        net.mask = torch.ones(4, 4).triu()
    return x @ (net.weight * net.mask)


def lazy_buffer(net, x):
    if not hasattr(net, "positions"):
        net.register_buffer("positions", torch.arange(4.0), persistent=False)
    return x @ net.weight + net.positions


def position_table(net, x):
    if net.table.shape[0] < x.shape[1]:
        net.table = torch.arange(16.0).reshape(4, 4)
    return x @ net.weight + net.table[: x.shape[1]].sum(0)


def by_size(net, x):
    size = x.shape[1]
    if size not in net.cache["of"]:
        net.cache["of"][size] = torch.arange(float(size))
    return x @ net.weight + net.cache["of"][size]


def sizes(net, x):
    net.size = x.shape[1:]
    return x @ net.weight * net.size[0]


def on_a_child_once(net, x):
    if not hasattr(net.sampled, "scale"):
        net.sampled.scale = torch.full((4,), 2.0)
    return x @ net.weight * net.sampled.scale


EXACT = [data_in_place, without_gradient, nothing_new, buffer_in_place]
FILLED_ONCE = [mask, lazy_buffer, position_table, by_size, sizes, on_a_child_once]


@pytest.mark.sample(5)
@BOTH_WAYS
@pytest.mark.parametrize("body", [*EXACT, *FILLED_ONCE], ids=lambda body: body.__name__)
def test_what_a_second_call_does_is_captured(body, by_shape):
    eager = Assigning(body, by_shape)
    model, captured = attempt(body, by_shape, EXAMPLE)
    for batch in (EXAMPLE, EXAMPLE.flip(1), EXAMPLE.repeat(2, 1)):
        laws.assert_equal(laws.step(captured, (batch,)), laws.step(eager, (batch,)), "output")
        laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
        laws.assert_equal(list(model.parameters()), list(eager.parameters()), "weights")
        if body in EXACT:
            laws.assert_equal(model.state_dict(), eager.state_dict(), "state")
    network = copy.deepcopy(captured)
    assert torch.equal(network.eval()(EXAMPLE), eager.eval()(EXAMPLE))


# --- a first call that does more than fill caches -------------------------------------------------


def weight_of_the_first_batch(net, x):
    if net.first:
        net.weight.data.copy_(x.mean() * torch.ones(4, 4))
        net.first = False
    return x @ net.weight


def buffer_of_the_first_batch(net, x):
    if net.first:
        net.average.copy_(x.detach().mean(0))
        net.first = False
    return x * net.average


def mean_of_the_first_batch(net, x):
    if net.loss is None:
        net.loss = x.detach().mean(0)
    return x @ net.weight + net.loss


def drawn_once(net, x):
    if net.mask is None:
        net.mask = torch.randn(4, 4)
    return x @ (net.weight * net.mask)


def layer_made_once(net, x):
    if net.mask is None:
        net.mask = nn.Linear(4, 4)
    return net.mask(x)


ONCE = [weight_of_the_first_batch, buffer_of_the_first_batch, mean_of_the_first_batch]
ONCE += [drawn_once, layer_made_once]


@pytest.mark.sample(4)
@BOTH_WAYS
@pytest.mark.parametrize("body", ONCE, ids=lambda body: body.__name__)
def test_what_hangs_on_the_first_batch_is_refused_until_the_model_has_run(body, by_shape):
    with pytest.raises(CaptureError, match=r"run the model once before|register it"):
        attempt(body, by_shape, EXAMPLE)
    model = Assigning(body, by_shape)
    model(EXAMPLE)
    captured = fxlocal.capture(model, EXAMPLE)
    assert torch.equal(captured(EXAMPLE.neg()), model(EXAMPLE.neg()))


def test_a_network_of_a_second_call_is_not_pickled():
    _, captured = attempt(mask, False, EXAMPLE)
    network = fxlocal.transform(captured, Plan())
    with pytest.raises(TypeError, match="by its second call"):
        network.__reduce__()
