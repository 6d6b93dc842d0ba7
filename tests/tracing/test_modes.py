"""A forward that switches a part to evaluation, or back, has a network that does so too."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support.captures import BOTH_WAYS
from torch import nn

import fxlocal
from fxlocal import CaptureError, LocalPrefix, Plan

EXAMPLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


def part():
    norm = nn.BatchNorm1d(4)
    norm.running_mean.uniform_(-1, 1)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(), nn.Dropout(0.4))


class Taught(nn.Module):
    """A student and a teacher; ``body`` says how the teacher is called."""

    def __init__(self, body, by_shape=False):
        super().__init__()
        torch.manual_seed(0)
        self.teacher, self.student, self.last = part(), part()[:3], nn.Linear(4, 2)
        self.body, self.by_shape = body, by_shape

    def forward(self, x):
        if self.by_shape and x.shape[0] > 1:
            x = x * 2
        return self.last(self.body(self, x) + self.student(x))


def frozen(net, x):
    net.teacher.eval()
    with torch.no_grad():
        return net.teacher(x)


def by_flag(net, x):
    net.teacher[1].training = net.teacher[3].training = False
    return net.teacher(x)


def and_back(net, x):
    net.teacher.train(False)
    y = net.teacher(x)
    net.teacher.train()
    return y + net.teacher[1](x)


@contextlib.contextmanager
def evaluating(module):
    mode = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(mode)


def in_a_context(net, x):
    with evaluating(net.teacher):
        return F.relu(net.teacher(x))


def one_norm(net, x):
    return net.teacher[1].eval()(x)


def of_each(net, x):
    net.teacher.apply(lambda module: module.eval())
    return net.teacher(x).detach()


def asks(net, x):
    y = net.teacher.eval()(x)
    return y if net.teacher.training else y * 2


BODIES = [frozen, by_flag, and_back, in_a_context, one_norm, of_each, asks]


def assert_same_steps(network, model, eager):
    for seed in range(3):
        torch.manual_seed(seed)
        ours = laws.step(network, (EXAMPLE,))
        torch.manual_seed(seed)
        laws.assert_equal(ours, laws.step(eager.train(), (EXAMPLE,)), "output")
        laws.assert_equal(laws.gradients(model), laws.gradients(eager), "gradient")
        laws.assert_equal(model.state_dict(), eager.state_dict(), "state")


@pytest.mark.sample(3)
@BOTH_WAYS
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_a_part_that_the_forward_switches_computes_in_that_mode(body, by_shape):
    model, eager = Taught(body, by_shape), Taught(body, by_shape)
    network = fxlocal.transform(model, Plan(), *([EXAMPLE] if by_shape else []))
    assert all(module.training for module in model.modules())
    assert_same_steps(network, model, eager)
    laws.assert_equal(network.eval()(EXAMPLE), eager.eval()(EXAMPLE), "evaluation")


def test_it_stays_in_evaluation_in_a_prefix_that_learns():
    model = Taught(frozen)
    before = {name: value.clone() for name, value in model.teacher.named_buffers()}
    network = fxlocal.transform(model, Plan(local=LocalPrefix(until="last")))
    network(EXAMPLE).sum().backward()
    laws.assert_equal(dict(model.teacher.named_buffers()), before, "statistics")


def test_a_part_that_a_forward_puts_in_training_trains():
    def fixed_before(net, x):
        return net.teacher[1].train()(x)

    model, eager = Taught(fixed_before), Taught(fixed_before)
    for net in (model, eager):
        net.teacher.eval()
    network = fxlocal.transform(model, Plan())
    assert not model.teacher[1].training
    for _ in range(2):
        laws.assert_equal(laws.step(network, (EXAMPLE,)), laws.step(eager, (EXAMPLE,)), "output")
        laws.assert_equal(model.state_dict(), eager.state_dict(), "state")


def test_a_part_that_is_kept_whole_is_refused_by_its_line():
    with pytest.raises(CaptureError, match=r"switches 'teacher'.*`net\.teacher\.eval\(\)`"):
        fxlocal.capture(Taught(frozen), leaf_modules=(nn.Sequential,))


def unswitched(net, x):
    return net.teacher(x)


class Overriding(Taught):
    """Keeps its teacher in evaluation whatever it is told, as frozen backbones do."""

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_part_that_train_leaves_in_evaluation_stays_there(mode):
    model, eager = Overriding(unswitched).train(mode), Overriding(unswitched).train()
    network = fxlocal.transform(model, Plan())
    assert [model.training, model.teacher[1].training] == [mode, False]
    network.train()
    assert_same_steps(network, model, eager)
    network.eval()
    assert_same_steps(network.train(), model, eager)


@BOTH_WAYS
def test_a_part_that_the_user_put_in_evaluation_before_stays_there(by_shape):
    model, eager = Taught(unswitched, by_shape), Taught(unswitched, by_shape)
    for net in (model, eager):
        net.train().teacher.eval()
    network = fxlocal.transform(model, Plan(), EXAMPLE)
    for _ in range(2):
        laws.assert_equal(laws.step(network, (EXAMPLE,)), laws.step(eager, (EXAMPLE,)), "output")
        laws.assert_equal(model.state_dict(), eager.state_dict(), "state")


class Converting(nn.Module):
    """Converts what it computes; an exported graph asserts the dtypes that it met."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        if x.shape[0] > 100:  # symbolic tracing stops here
            x = x * 2
        hidden = self.first(x).float().softmax(-1)
        return self.last(hidden.to(torch.float32)).double()


def test_conversions_of_an_exported_graph_follow_autocast():
    torch.manual_seed(0)
    model = Converting()
    network = fxlocal.transform(model, Plan(), EXAMPLE)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found, expected = network(EXAMPLE), model(EXAMPLE)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
