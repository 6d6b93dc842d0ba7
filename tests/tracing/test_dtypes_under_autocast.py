"""Dtypes that torch.export takes of a capture without autocast: told where they are others."""

import warnings

import pytest
import torch
from support.captures import EXAMPLE, build, plain

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan


def to_a_values(net, x):
    hidden = net.first(x)
    return net.norm(hidden + torch.ones(4).to(hidden.dtype).tanh())


def type_of(net, x):
    hidden = net.first(x)
    return net.norm(hidden * torch.full((1, 4), 1.1).type(hidden.dtype))


def by_branch(net, x):
    hidden = net.first(x)
    return (hidden.float() if hidden.dtype == torch.bfloat16 else hidden) * 1.1


def to_a_parameters(net, x):
    return plain(net, x.to(net.first.weight.dtype))


def only_asked(net, x):
    hidden = net.first(x)
    assert hidden.dtype.is_floating_point
    return net.norm(hidden)


def asks_for_autocast(net, x):
    hidden = net.first(x)
    return net.norm((hidden.float() if torch.is_autocast_enabled("cpu") else hidden) * 1.1)


def number_of_a_dtype(net, x):
    hidden = net.first(x)
    return net.norm(hidden.clamp(min=torch.finfo(hidden.dtype).eps))


TENSORS = {torch.Tensor, torch.nn.Parameter}
PLANS = (Plan(), Plan(local=LocalPrefix(until=1, rule=Freeze())))


def under_autocast(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net(EXAMPLE)


@pytest.mark.parametrize("plan", PLANS, ids=["plain", "prefix"])
@pytest.mark.parametrize("body", [to_a_values, type_of, by_branch, number_of_a_dtype])
def test_other_casts_are_told_of_once(body, plan):
    net = fxlocal.transform(build(body, by_shape=True), plan, EXAMPLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(EXAMPLE)
    state, drawn = {n: t.clone() for n, t in net.state_dict().items()}, torch.get_rng_state()
    with pytest.warns(
        UserWarning, match=r"asks for such, first at .*dtype.*under autocast"
    ) as told:
        net.meta["dtypes"].warn(net, (EXAMPLE,), {})  # no autocast: nothing
        under_autocast(net.eval())
        assert not told.list
        under_autocast(net.train())
    assert len(told) == 1 and told[0].filename == __file__
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(state[n], t) for n, t in net.state_dict().items() if "norm" not in n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        under_autocast(net)


def test_a_trace_of_what_asks_for_autocast_is_told_of():
    net = fxlocal.transform(build(asks_for_autocast), Plan())
    with pytest.warns(UserWarning, match="first at .*def asks_for_autocast.*under autocast"):
        under_autocast(net)


@pytest.mark.parametrize("body", [to_a_parameters, only_asked])
def test_casts_that_are_the_same_are_not(body):
    model = build(body, by_shape=True)
    net = fxlocal.transform(model, Plan(), EXAMPLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(under_autocast(net), under_autocast(model))


@pytest.mark.parametrize("body", [to_a_values, type_of, number_of_a_dtype, to_a_parameters])
def test_weights_of_another_dtype_are_refused_until_they_are_as_they_were(body):
    model = build(body, by_shape=True)
    net = fxlocal.transform(model, Plan(), EXAMPLE)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"is in torch\.bfloat16, and was in .*float32.*dtype"):
        net(EXAMPLE.bfloat16())
    assert torch.equal(net.eval()(EXAMPLE.bfloat16()), model(EXAMPLE.bfloat16()))
    model.float().train()
    assert torch.equal(net.train()(EXAMPLE), model(EXAMPLE))


def test_the_look_at_dtypes_saves_nothing_of_its_own():
    """As whole-model checkpointing counts what is saved in a forward, and in the next one."""
    net, saved = fxlocal.transform(build(asks_for_autocast), Plan()), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda kept: kept):
        with pytest.warns(UserWarning, match="under autocast"):
            under_autocast(net)
        first = len(saved)
        under_autocast(net)
    assert len(saved) == 2 * first > 0 and {type(value) for value in saved} <= TENSORS
