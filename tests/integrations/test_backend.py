"""`fxlocal.backend`: a model compiled by it learns as `transform` has it learn."""

import copy

import pytest
import torch
from support import laws
from support.nets import NETS, Written
from torch import nn

import fxlocal
from fxlocal import Freeze, Full, Hebbian, LocalPrefix, Oja, Plan, PlanError, Random, TopK, Zero

pytestmark = pytest.mark.usefixtures("fresh_compiler")

HEBBIAN = Hebbian(rate=0.05)
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}


def trained(model, net, inputs, steps=3):
    """Outputs, gradients and state after each step, by an optimizer that decays all weights."""
    optimizer, seen = torch.optim.SGD(model.parameters(), **SGD), []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = laws.step(net, inputs)
        seen.append(copy.deepcopy([outputs, laws.gradients(model), model.state_dict()]))
        optimizer.step()
    return [*seen, copy.deepcopy(model.state_dict())]


def assert_trains_as_transform(model, inputs, plan, inner="eager", tolerance=1e-5):
    """Compiled by the backend a model trains as its network does; return it compiled."""
    other = copy.deepcopy(model)
    net = torch.compile(model, backend=fxlocal.backend(plan, inner=inner), fullgraph=True)
    ours = trained(model, net, inputs)
    theirs = trained(other, fxlocal.transform(other, plan), inputs)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    return net


def middle(name):
    """The path of a net's layer in the middle, and that of its last."""
    layers = fxlocal.analyze(NETS[name].build()).layers
    return layers[max(len(layers) // 2, 1)].path, layers[-1].path


def test_each_layer_has_its_rate():
    (x,), model = NETS["chain"].inputs(), NETS["chain"].build()
    plan = Plan(local=LocalPrefix("conv3", HEBBIAN, rates=(0.05, 0.02)))
    assert_trains_as_transform(model, (x,), plan)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", NETS)
def test_a_net_trains_as_its_network_does(name):
    until, last = middle(name)
    plan = Plan(local=LocalPrefix(until, HEBBIAN), weight_grads={last: Zero()})
    assert_trains_as_transform(NETS[name].build(), NETS[name].inputs(), plan)


COVARIANCE = fxlocal.Custom(lambda weight, pre, post, product: product(pre, post - post.mean()))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "prefix", "inner"),
    [
        ("residual", LocalPrefix("block2", Freeze()), "eager"),
        ("residual", LocalPrefix("block2.conv2", HEBBIAN, norm="eval"), "aot_eager"),
        ("chain", LocalPrefix("conv2", Freeze(), norm="eval"), "aot_eager"),
        ("chain", LocalPrefix("conv3", Oja(rate=0.05, relative=True)), "aot_eager"),
        ("chain", LocalPrefix("fc", COVARIANCE), "aot_eager"),
        ("chain", LocalPrefix("conv2", HEBBIAN), "aot_eager"),
    ],
    ids=str,
)
def test_a_prefix_learns_by_any_rule(name, prefix, inner):
    net = NETS[name]
    assert_trains_as_transform(net.build(), net.inputs(), Plan(local=prefix), inner)


def test_weight_gradients_are_approximated_without_a_prefix():
    grads = {
        "stem.0": TopK(2),
        "block1.conv1": Random(0.0),
        "fc": Zero(none=True),
        "block2": Full(),
    }
    grads["block2.conv1"] = grads.pop("block2")
    net = NETS["residual"]
    assert_trains_as_transform(net.build(), net.inputs(), Plan(weight_grads=grads), "aot_eager")


class Attention(nn.Module):
    """Attention by torch's own module, and activations in place, given by their places."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU6(inplace=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.drop, self.fc = nn.Dropout(0.2, inplace=True), nn.Linear(4, 5)

    def forward(self, x):
        x = self.act(self.conv(x)).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(x + self.down(self.drop(self.act(self.up(x)))))


def summed_twice(net, x):
    """A layer behind whose call an activation changes the input in place."""
    x = net.first(x)
    a = net.second(x)
    return net.head(net.act(x) + a)


def under_autocast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = net.second(net.first(x).relu())
    return net.head(x.float())


def conv(inputs=3):
    return nn.Conv2d(inputs, 3, 3, padding=1)


def written(body):
    torch.manual_seed(0)
    parts = {"first": conv(), "second": conv(), "head": conv(), "act": nn.Hardtanh(inplace=True)}
    return Written(body, **parts)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("until", "inner"),
    [("attention", "eager"), ("up", "eager"), *((u, "aot_eager") for u in ("up", "down", "fc"))],
)
def test_what_torch_keeps_whole_is_computation_between_layers(until, inner):
    torch.manual_seed(0)
    model, inputs = Attention(), NETS["chain"].inputs()
    plan = Plan(local=LocalPrefix(until, HEBBIAN))
    if until == "attention":
        with pytest.raises(PlanError, match="'attention' is not in the first graph"):
            torch.compile(model, backend=fxlocal.backend(plan, inner))(*inputs)
    else:
        assert_trains_as_transform(model, inputs, plan, inner)


@pytest.mark.sample(1)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("body", [summed_twice, under_autocast], ids=lambda body: body.__name__)
def test_a_forward_trains_as_its_network_does(body, inner):
    model, plan = written(body), Plan(local=LocalPrefix("head", HEBBIAN))
    assert_trains_as_transform(model, NETS["chain"].inputs(), plan, inner, tolerance=1e-2)


def test_a_network_that_carries_out_a_plan_is_refused_in_training():
    plan = Plan(local=LocalPrefix(until="1", rule=Freeze()))
    net = fxlocal.transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), plan)
    compiled = torch.compile(net, backend=fxlocal.backend(plan, inner="eager"))
    with pytest.raises(PlanError, match="already carries out its Plan: compile it with"):
        compiled(torch.ones(3, 4))
    net.eval()
    assert torch.equal(compiled(torch.ones(3, 4)), net(torch.ones(3, 4)))
