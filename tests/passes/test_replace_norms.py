"""Batch norms of a prefix that use, and keep, their running statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from fxlocal.passes import replace_norms
from support import laws
from support.captures import ByShape
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, NoEffectWarning, Plan, PlanError, diff_graphs


def replaced(model, start):
    captured = fxlocal.capture(model)
    network = captured.clone()
    replace_norms(network, start=start)
    return captured, network


def plan(until, rule=None):
    return Plan(local=LocalPrefix(until=until, rule=rule or Freeze(), norm="eval"))


# --- golden --------------------------------------------------------------------------------------


def test_norm_becomes_a_function_of_its_statistics():
    assert_expected_inline(
        diff_graphs(*replaced(NETS["chain"].build(), "conv2")),
        """\
-%bn1 = call_module bn1(%conv1)
-%relu = call_module relu(%bn1)
+%bn1_running_mean = get_attr bn1.running_mean  # replace_norms @bn1
+%bn1_running_var = get_attr bn1.running_var  # replace_norms @bn1
+%bn1_weight = get_attr bn1.weight  # replace_norms @bn1
+%bn1_bias = get_attr bn1.bias  # replace_norms @bn1
+%batch_norm = call_function batch_norm(%conv1, %bn1_running_mean, %bn1_running_var, %bn1_weight, %bn1_bias, False, 0.1, 1e-05)  # replace_norms @bn1
+%relu = call_module relu(%batch_norm)""",  # noqa: E501
    )


# --- oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Freeze(), Hebbian(0.125)])
@pytest.mark.parametrize("name,until", [("chain", 2), ("residual", 5), ("unet", 5)])
def test_training_is_the_oracles(trained_twice, name, until, rule):
    (ours, trace), (theirs, expected) = trained_twice(name, until, rule, "eval")
    # 1e-9: the norm by hand divides by a square root where torch multiplies by its inverse
    for mine, other in zip(trace, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name,until,fixed",
    [
        ("residual", 4, ("stem.1", "block1.bn1", "block1.bn2", "block2.bn1")),
        ("preactivation", 3, ("norms.0", "norms.1")),  # the cut lies before norms.2
    ],
)
def test_statistics_stay_before_the_boundary_and_move_after_it(name, until, fixed):
    model = NETS[name].build()
    laws.step(model, NETS[name].inputs())  # so that they are not those of a fresh model
    before = copy.deepcopy(dict(model.named_buffers()))
    laws.step(fxlocal.transform(model, plan(until)), NETS[name].inputs())
    for path, buffer in model.named_buffers():
        assert torch.equal(buffer, before[path]) == path.startswith(fixed), path


def test_exported_norm_is_fixed_too():
    model, (x,) = ByShape(NETS["chain"].build()), NETS["chain"].inputs()
    network = fxlocal.transform(model, plan(1), x)
    before = copy.deepcopy(dict(model.named_buffers()))
    network(x)
    moved = [n for n, b in model.named_buffers() if not torch.equal(b, before[n])]
    assert moved == [f"net.bn2.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")]


class Functional(nn.Module):
    """A norm as many write their own: the function, over buffers, and an activation."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return self.call(x, self.running_mean, self.running_var, self.training).relu()


class Halves(nn.Module):
    """Mean and variance lie in one buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("statistics", torch.cat([torch.zeros(4), torch.ones(4)]))
        self.running_mean, self.running_var = self.statistics.split(4)

    def forward(self, x):
        return F.batch_norm(x, *self.statistics.split(4), training=self.training).relu()


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def half(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


TRACED = {
    "keyword": lambda: Functional(lambda x, m, v, t: F.batch_norm(x, m, v, training=t)),
    "in order": lambda: Functional(lambda x, m, v, t: F.batch_norm(x, m, v, None, None, t)),
    "of torch": lambda: Functional(
        lambda x, m, v, t: torch.batch_norm(x, None, None, m, v, t, 0.1, 1e-5, False)
    ),
    "native": lambda: Functional(
        lambda x, m, v, t: torch.native_batch_norm(x, None, None, m, v, t, 0.1, 1e-5)[0]
    ),
    "over parts of one buffer": lambda: Halves(),
    "instance norm": lambda: Functional(
        lambda x, m, v, t: F.instance_norm(x, m, v, use_input_stats=t)
    ),
    "instance norm, by default": lambda: Functional(lambda x, m, v, t: F.instance_norm(x, m, v)),
    "subclass with an activation": lambda: NormAndActivation(4),
    "module of instance norm": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("name", TRACED)
def test_norms_of_every_form_use_and_keep_their_statistics(name):
    model = half(TRACED[name]())
    model[1].running_mean.fill_(0.5)
    x = torch.randn(2, 3, 8, 8)
    network = fxlocal.transform(model, plan(1), x)
    before = copy.deepcopy(dict(model[1].named_buffers()))
    found = network(x)
    assert all(torch.equal(b, before[n]) for n, b in model[1].named_buffers())
    y = (model[0](x) - 0.5) / (model[1].running_var.view(-1, 1, 1) + 1e-5).sqrt()
    activated = y if isinstance(model[1], nn.InstanceNorm2d) else y.relu()
    torch.testing.assert_close(found, model[3](model[2](activated)))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, 3])
def test_an_instance_norm_takes_a_sample_alone(num):
    norm = getattr(nn, f"InstanceNorm{num}d")(3, affine=True, track_running_stats=True)
    norm.running_mean.copy_(torch.arange(3.0))
    convolution = getattr(nn, f"Conv{num}d")
    model = nn.Sequential(convolution(3, 3, 1), norm, convolution(3, 3, 1))
    network, x = fxlocal.transform(model, plan("2")), torch.randn(3, *(3,) * num)
    torch.testing.assert_close(network(x), model[2](norm.eval()(model[0](x))))


class Block(nn.Sequential):
    pass


class OwnStatistics(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.view = view
        self.register_buffer("mean", torch.zeros(4, 1, 1))

    def forward(self, x):
        self.view(self.mean).lerp_(x.detach().mean((0, 2, 3)).view(4, 1, 1), 0.1)
        return x - self.mean


def test_a_norm_inside_a_module_that_is_kept_whole_is_refused():
    captured = fxlocal.capture(half(Block(nn.BatchNorm2d(4))), leaf_modules=(Block,))
    with pytest.raises(PlanError, match=r"'1\.0': '1' is kept whole"):
        fxlocal.transform(captured, plan("2"))


def test_a_norm_with_a_forward_of_its_own_that_is_kept_whole_is_refused():
    captured = fxlocal.capture(half(NormAndActivation(4)), leaf_modules=(NormAndActivation,))
    with pytest.raises(PlanError, match="'1': NormAndActivation has a forward of its own"):
        fxlocal.transform(captured, plan("2"))


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)]
)
def test_a_norm_with_hooks_that_would_not_run_is_refused(kind, norm):
    handle = getattr(norm, f"register_{kind}")(lambda module, args, *output: None)
    with pytest.raises(PlanError, match="'1': it has forward hooks, which would not run"):
        fxlocal.transform(half(norm), plan("2"))
    handle.remove()
    fxlocal.transform(half(norm), plan("2"))


VIEWS = {"itself": lambda b: b, "data": lambda b: b.data, "slice": lambda b: b[:]}


@pytest.mark.parametrize("name", VIEWS)
def test_a_statistic_that_the_forward_changes_in_place_is_refused(name):
    with pytest.raises(PlanError, match=r"whether the buffer '1\.mean'"):
        fxlocal.transform(half(OwnStatistics(VIEWS[name])), plan("2"))


def test_unknown_node_is_refused():
    with pytest.raises(PlanError, match="no node 'nowhere' in the graph"):
        replaced(NETS["chain"].build(), "nowhere")


# --- does nothing when it should -----------------------------------------------------------------


def test_norm_without_running_statistics_is_left_alone():
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        *(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1)),
    )
    assert diff_graphs(*replaced(model, "_4")) == ""


def test_norms_after_the_boundary_are_left_alone():
    assert diff_graphs(*replaced(NETS["chain"].build(), "bn1")) == ""


def test_a_model_without_norms_warns():
    with pytest.warns(NoEffectWarning, match=r"the pass replace_norms\(.*\) changed nothing"):
        fxlocal.transform(NETS["shared"].build(), plan(1))


class Relu(nn.BatchNorm2d):
    """Looked into: its counter and its norm are nodes of the graph."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Behind(nn.Module):
    """The boundary at ``b`` lies before ``norm``, whose counter moves first of all."""

    def __init__(self, norm, by_shape):
        super().__init__()
        self.a, self.inner, self.b = nn.Conv2d(4, 4, 1), Relu(4), nn.Conv2d(4, 4, 1)
        self.norm, self.by_shape = norm, by_shape

    def forward(self, x):
        if self.by_shape and x.shape[0] > 1:
            x = x * 2
        x = self.a(self.inner(x))
        y = self.norm(x)
        return self.b(x) * y


NORMS_BEHIND = {
    "a subclass": (lambda: Relu(4), False),
    "two of them": (lambda: nn.Sequential(Relu(4), Relu(4)), False),
    "exported": (lambda: nn.BatchNorm2d(4), True),
    "exported, without affine": (lambda: nn.BatchNorm2d(4, affine=False), True),
    "exported instance norm": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), True),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("how", NORMS_BEHIND)
def test_a_norm_just_behind_the_boundary_counts_its_batches(how):
    make, by_shape = NORMS_BEHIND[how]
    model, x = Behind(make(), by_shape), torch.randn(3, 4, 5, 5)
    laws.step(fxlocal.transform(model, plan("b"), x), (x,))
    before = {n for n in dict(model.named_buffers()) if n.startswith("inner.")}
    eager = Behind(make(), by_shape)
    laws.step(eager, (x,))
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            expected = 0 if name in before else eager.get_buffer(name)
            assert buffer == expected, name
