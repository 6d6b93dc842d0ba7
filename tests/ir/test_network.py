"""The network that users get: the source's state, its two modes, copies of it, and misuse."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.captures import BOTH_WAYS, EXAMPLE
from support.copies import COPIES, deep_copied, pickled
from support.nets import NETS
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan

RATE = 0.5
LOCAL = Plan(local=LocalPrefix(until=1, rule=Hebbian(RATE)))


class Net(nn.Module):
    """Tied, never-called and unsaved state; ``by_shape`` defeats symbolic tracing."""

    def __init__(self, by_shape=False):
        super().__init__()
        self.register_buffer("unused_buffer", torch.ones(3))
        self.first, self.unused = nn.Linear(4, 4), nn.Linear(7, 7)
        self.norm, self.second = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.unused.weight = nn.Parameter(torch.zeros(7, 7))
        self.again, self.third = self.first, nn.Linear(4, 4)
        self.third.weight = self.second.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5), persistent=False)
        self.by_shape = by_shape

    def forward(self, x):
        if self.by_shape and x.shape[0] > 1:
            x = x * 2
        x = F.dropout(F.relu(self.norm(self.again(x))), 0.5, self.training)
        return self.third(self.second(x)) * self.scale + self.shift


def build(by_shape=False):
    torch.manual_seed(0)
    return Net(by_shape)


def moved_by(net, *inputs):
    """How far each of two forwards moves the first layer's weight."""
    weight = net.first.weight
    lengths = []
    for _ in range(2):
        before = weight.detach().clone()
        net(*inputs)
        lengths.append(float((weight.detach() - before).norm()))
    return lengths


# --- state ----------------------------------------------------------------------------------------


@BOTH_WAYS
def test_the_state_is_the_sources_by_identity_and_in_its_order(by_shape):
    model = build(by_shape)
    laws.l7_state_is_shared(model, (EXAMPLE,), LOCAL)
    net = fxlocal.transform(model, LOCAL, EXAMPLE)
    assert [name for name in net.state_dict() if "unused" in name] == [
        "unused_buffer",
        "unused.weight",
        "unused.bias",
    ]
    for remove_duplicate in (False, True):
        ours = net.named_parameters(remove_duplicate=remove_duplicate)
        theirs = model.named_parameters(remove_duplicate=remove_duplicate)
        assert [(name, id(p)) for name, p in ours] == [(name, id(p)) for name, p in theirs]
    assert {id(p) for p in net.buffers()} == {id(p) for p in model.buffers()} | {
        id(t) for t in net.additions.values()
    }


def test_both_ways_name_the_layers_alike():
    paths = [[f.path for f in fxlocal.analyze(build(by), EXAMPLE).layers] for by in (False, True)]
    assert paths[0] == paths[1] == ["first", "second", "third"]


def test_each_loads_the_others_state():
    model, other = build(), build()
    net = fxlocal.transform(model, LOCAL)
    nn.init.ones_(other.first.weight)
    net.load_state_dict(other.state_dict())
    laws.assert_equal(model.state_dict(), other.state_dict(), "state")
    fresh = build()
    fresh.load_state_dict(net.state_dict())
    laws.assert_equal(fresh.state_dict(), other.state_dict(), "state")


@BOTH_WAYS
def test_conversion_of_the_network_reaches_the_source(by_shape):
    model = build(by_shape)
    net = fxlocal.transform(model, LOCAL, EXAMPLE)
    assert net.double() is net
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert {t.dtype for t in tensors} == {torch.float64}
    assert net.first.weight is model.first.weight
    assert moved_by(net, EXAMPLE.double()) == pytest.approx([RATE, RATE], rel=1e-12)
    model.to(torch.float32)
    assert net(EXAMPLE).dtype == torch.float32


# --- modes ----------------------------------------------------------------------------------------


@BOTH_WAYS
def test_evaluation_is_the_sources_and_moves_nothing(by_shape):
    model = build(by_shape)
    net = fxlocal.transform(model, LOCAL, EXAMPLE)
    before = copy.deepcopy(model.state_dict())
    first = net.eval()(EXAMPLE)
    assert not model.training and not model.norm.training
    assert torch.equal(first, net(EXAMPLE))
    assert torch.equal(first, model(EXAMPLE))
    assert net(EXAMPLE[:1]).shape == (1, 4)
    laws.assert_equal(model.state_dict(), before, "state")
    net.train()
    assert model.training and model.norm.training
    assert not torch.equal(net(EXAMPLE), net(EXAMPLE)), "no dropout"
    assert moved_by(net, EXAMPLE) == pytest.approx([RATE, RATE], rel=1e-5)


@BOTH_WAYS
def test_a_model_in_evaluation_mode_is_captured_as_it_trains_and_left_as_it_was(by_shape):
    model = build(by_shape).eval()
    model.unused.train()
    flags = [module.training for module in model.modules()]
    captured = fxlocal.capture(model, EXAMPLE)
    net = fxlocal.transform(model, LOCAL, EXAMPLE)
    assert [module.training for module in model.modules()] == flags
    for network in (captured, net):
        assert not network.training
        assert torch.equal(network(EXAMPLE), model(EXAMPLE))
    laws.assert_equal(
        laws.step(net.train(), (EXAMPLE,)), laws.step(build(by_shape), (EXAMPLE,)), ""
    )


def test_the_network_is_in_the_mode_of_its_source():
    model = build()
    net = fxlocal.transform(model.eval(), LOCAL)
    model.train()
    assert net.training
    assert moved_by(net, EXAMPLE) == pytest.approx([RATE, RATE], rel=1e-5)
    model.eval()
    assert not net.training
    assert moved_by(net, EXAMPLE) == [0, 0]


def test_a_norm_that_the_user_keeps_in_evaluation_mode_stays_so():
    model = build()
    model.norm.eval()
    mean = model.norm.running_mean.clone()
    net = fxlocal.transform(model, LOCAL)
    net(EXAMPLE)
    assert not model.norm.training
    assert torch.equal(model.norm.running_mean, mean)


def test_the_users_own_no_grad_around_the_network_holds():
    net = fxlocal.transform(build(), LOCAL)
    with torch.no_grad():
        assert not net(EXAMPLE).requires_grad
        assert not torch.is_grad_enabled()
    assert net(EXAMPLE).requires_grad


def test_an_exception_in_the_prefix_restores_the_grad_mode():
    net = fxlocal.transform(NETS["chain"].build(), Plan(local=LocalPrefix("fc", rule=Freeze())))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            with pytest.raises(RuntimeError, match="channels"):
                net(torch.randn(2, 5, 8, 8))
            assert torch.is_grad_enabled() == enabled


# --- copies ---------------------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_computes_the_same_over_state_of_its_own(copied, by_shape):
    net = fxlocal.transform(build(by_shape), LOCAL, EXAMPLE)
    if by_shape and copied is not deep_copied:
        with pytest.raises(TypeError, match=r"captured by torch\.export cannot be pickled"):
            copied(net)
        return
    other = copied(net)
    assert fxlocal.format_graph(other) == fxlocal.format_graph(net)
    assert fxlocal.explain(other) == fxlocal.explain(net)
    assert not {id(t) for t in other.state_dict(keep_vars=True).values()} & {
        id(t) for t in net.state_dict(keep_vars=True).values()
    }
    laws.assert_equal(laws.step(other, (EXAMPLE,)), laws.step(net, (EXAMPLE,)), "output")
    laws.assert_equal(laws.gradients(other), laws.gradients(net), "gradient")
    laws.assert_equal(other.state_dict(), net.state_dict(), "state")
    laws.assert_equal(laws.step(other.eval(), (EXAMPLE,)), laws.step(net.eval(), (EXAMPLE,)), "")


class ByValue(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_a_network_with_leaves_is_copied_or_refused_before_it_is_saved():
    model = nn.Sequential(nn.Linear(4, 4), ByValue(4, 4), nn.Linear(4, 2))
    net = fxlocal.transform(fxlocal.capture(model, leaf_modules=(ByValue,)), LOCAL)
    laws.assert_equal(laws.step(deep_copied(net), (EXAMPLE,)), laws.step(net, (EXAMPLE,)), "output")
    try:
        text = pickle.dumps(net)
    except TypeError:
        return
    assert fxlocal.format_graph(pickle.loads(text)) == fxlocal.format_graph(net)


def test_a_copy_keeps_its_mode_and_what_is_tied():
    net = fxlocal.transform(build(), LOCAL).eval()
    for other in (deep_copied(net), pickled(net)):
        assert not other.training and not other.norm.training
        assert other.third.weight is other.second.weight
        assert other.train().norm.training and not net.norm.training


def test_an_averaged_model_follows_the_network():
    net = fxlocal.transform(build(), LOCAL)
    average = AveragedModel(net)
    start = net.first.weight.detach().clone()
    average.update_parameters(net)
    net(EXAMPLE)
    average.update_parameters(net)
    expected = (start + net.first.weight.detach()) / 2
    torch.testing.assert_close(average.module.first.weight.detach(), expected)
    assert average.eval()(EXAMPLE).shape == (3, 4)


# --- one network of another -----------------------------------------------------------------------


def test_a_network_is_rewritten_from_its_pristine_capture():
    net = fxlocal.transform(build(), LOCAL)
    again = fxlocal.transform(net, LOCAL)
    assert fxlocal.format_graph(again) == fxlocal.format_graph(net)
    assert moved_by(again, EXAMPLE) == pytest.approx([RATE, RATE], rel=1e-5)
    plain = fxlocal.transform(net, Plan())
    assert moved_by(plain, EXAMPLE) == [0, 0]


# --- recomputation --------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_local_updates_is_refused_with_nothing_applied(reentrant):
    model = build()
    net = fxlocal.transform(model, LOCAL)
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="Call the network outside"):
        x = EXAMPLE.clone().requires_grad_()
        checkpoint(net, x, use_reentrant=reentrant).sum().backward()
    laws.assert_equal(dict(model.named_parameters()), before, "parameter")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rule", [Freeze(), None])
def test_checkpointing_around_a_network_without_updates_is_exact(reentrant, rule):
    plan = Plan(local=LocalPrefix(1, rule)) if rule else Plan()
    models = [build(), build()]
    for model, checkpointed in zip(models, (True, False), strict=True):
        net = fxlocal.transform(model, plan)
        torch.manual_seed(1)
        x = EXAMPLE.clone().requires_grad_()
        out = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
        out.sum().backward()
    laws.assert_equal(laws.gradients(models[0]), laws.gradients(models[1]), "gradient")


def test_a_network_of_a_model_without_data_keeps_its_rate():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net = fxlocal.transform(model, LOCAL).to_empty(device="cpu")
    assert net.additions["rate"] == RATE
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    before = model[0].weight.detach().clone()
    net(torch.ones(3, 4))
    assert not torch.equal(model[0].weight, before)
