"""torch.compile takes the operators of approximated weight gradients whole, as eager runs them."""

import copy

import pytest
import torch
from support.nets import NETS
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxlocal
from fxlocal import Plan, Random, TopK, Zero

pytestmark = pytest.mark.usefixtures("fresh_compiler")

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 7, 7)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 4, 3, 1, 1, padding_mode="reflect"), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 3, 4)),
    "linear": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear, tokens": (lambda: nn.Linear(3, 4), (2, 5, 3)),
    "unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 7, 7)),
}
CASES = [
    *[("conv2d", m) for m in (Zero(), Zero(none=True), Random(0.5), TopK(1), TopK(3, 0.5))],
    *[("linear, tokens", m) for m in (Zero(), Random(0.5), TopK(2), TopK(2, None))],
    *[("conv1d", TopK(2)), ("conv3d", TopK(1)), ("linear", Zero()), ("unbatched", TopK(3))],
    *[("transposed", Zero()), ("transposed", Random(0.5)), ("conv2d, reflect", TopK(2))],
]


def step(net, model, x, dtype=None):
    """One seeded step; output, gradient of the input, and of the parameters."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = net(x)
    error = torch.linspace(-1, 2, output.numel()).view_as(output).sin().to(output.dtype)
    output.backward(error)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return output.detach(), x.grad, gradients


def compiled_and_eager(model, plan, backend="aot_eager", **options):
    """The compiled network and its model, the eager one and its model."""
    other = copy.deepcopy(model)
    net = torch.compile(fxlocal.transform(model, plan), backend=backend, fullgraph=True, **options)
    return (net, model), (fxlocal.transform(other, plan), other)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name,method", CASES, ids=str)
def test_a_compiled_layer_is_the_eager_one(name, method):
    make, shape = LAYERS[name]
    ours, theirs = compiled_and_eager(nn.Sequential(make()), Plan(weight_grads={"0": method}))
    x = torch.randn(shape)
    mine, expected = step(*ours, x), step(*theirs, x)
    torch.testing.assert_close(mine[:2], expected[:2], rtol=1e-5, atol=1e-5)
    weights = [gradients.pop("0.weight") for *_, gradients in (mine, expected)]
    torch.testing.assert_close(mine[2], expected[2], rtol=1e-5, atol=1e-5)
    if isinstance(method, Random):
        again = step(*ours, x)[2]["0.weight"]
        assert torch.equal(again, weights[0])  # of the same seed
        assert weights[0].shape == weights[1].shape
        assert 0.5 < float(weights[0].square().mean().sqrt()) / method.std < 1.6  # of 12 or more
    else:
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)


class Several(nn.Module):
    """A layer for each method."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.conv3 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2)
        self.up, self.fc = nn.Linear(9, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.norm(self.conv2(x)) + x)
        x = torch.relu(self.conv3(x)).flatten(2)
        return self.fc(torch.relu(self.up(x)))


IMAGES = torch.randn(3, 3, 10, 10, generator=torch.Generator().manual_seed(1))
SEVERAL = {"conv1": Random(), "conv2": TopK(3), "conv3": Zero(), "up": TopK(2)}
SEVERAL["fc"] = Zero(none=True)


@pytest.mark.parametrize("dtype", [None, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_network_of_several_methods_is_one_graph(dtype):
    counter = CompileCounterWithBackend("aot_eager")
    ours, theirs = compiled_and_eager(Several(), Plan(weight_grads=SEVERAL), counter)
    for _ in range(2):
        mine, expected = step(*ours, IMAGES, dtype), step(*theirs, IMAGES, dtype)
        drawn = [gradients.pop("conv1.weight") for *_, gradients in (mine, expected)]
        assert abs(float(drawn[0].std()) - 1 / 3) < 0.15
        tolerance = 2e-2 if dtype else 1e-5
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_takes_several_methods():
    ours, theirs = compiled_and_eager(Several(), Plan(weight_grads=SEVERAL), "inductor")
    for _ in range(2):
        mine, expected = step(*ours, IMAGES), step(*theirs, IMAGES)
        drawn = [gradients.pop("conv1.weight") for *_, gradients in (mine, expected)]
        assert abs(float(drawn[0].std()) - 1 / 3) < 0.15
        # 1e-4: its kernels round in another order
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name,method",
    [
        ("conv2d", Zero()),
        pytest.param("linear, tokens", TopK(2), marks=pytest.mark.slow),
        pytest.param("conv2d", TopK(2, None), marks=pytest.mark.slow),  # of many symbolic sizes
    ],
)
def test_another_batch_size_needs_no_other_graph(name, method):
    counter, (make, shape) = CompileCounterWithBackend("aot_eager"), LAYERS[name]
    plan = Plan(weight_grads={"0": method})
    ours, theirs = compiled_and_eager(nn.Sequential(make()), plan, counter, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, *shape[1:])
        torch.testing.assert_close(step(*ours, x), step(*theirs, x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_the_default_std_follows_the_batch_size():
    model = nn.Sequential(nn.Linear(64, 64))
    net = fxlocal.transform(model, Plan(weight_grads={"0": Random()}))
    net = torch.compile(net, backend="aot_eager", fullgraph=True)
    for batch in (2, 8, 5):
        *_, gradients = step(net, model, torch.randn(batch, 64))
        assert float(gradients["0.weight"].std()) * batch == pytest.approx(1, abs=0.06)


def test_a_k_larger_than_the_map_is_named_when_compiled():
    model = NETS["chain"].build()
    net = fxlocal.transform(model, Plan(weight_grads={"conv2": TopK(17)}))
    net = torch.compile(net, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"TopK\(k=17\) of a map of \(4, 4\).*make k smaller"):
        net(*NETS["chain"].inputs())
