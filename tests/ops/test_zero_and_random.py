"""Weight gradients of zeros, of nothing and of random numbers: what is computed, kept and moved."""

import functools
import math
from collections import Counter
from itertools import product

import pytest
import torch
from functorch.compile import make_boxed_func
from support.nets import Written
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import fxlocal
from fxlocal import Plan, Random, TopK, Zero

aten = torch.ops.aten


def transform(model, **methods):
    return fxlocal.transform(model, Plan(weight_grads=methods))


def layers():
    """One of each kind; 4, 5 and 6 occur as nothing but channels and features."""
    return {
        "conv1d": (nn.Conv1d(5, 6, 3), (2, 5, 11)),
        "conv2d": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
        "conv3d": (nn.Conv3d(4, 5, 2), (2, 4, 3, 3, 3)),
        "transposed": (nn.ConvTranspose2d(4, 5, 3), (2, 4, 3, 3)),
        "linear": (nn.Linear(4, 5), (8, 4)),
        "linear, row": (nn.Linear(4, 5), (4,)),
        "linear, tokens": (nn.Linear(4, 5, bias=False), (2, 7, 4)),
    }


# --- what the optimizer makes of it --------------------------------------------------------------

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01


def train(method, name="conv2d"):
    """Three steps of SGD, the first one exact; the weight after each, and the first gradient."""
    layer, shape = layers()[name]
    model = nn.Sequential(layer.double())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    nets = [transform(model), *[transform(model, **{"0": method})] * 2]
    weights, gradients = [layer.weight.detach().clone()], []
    for net in nets:
        net(torch.ones(shape, dtype=torch.float64)).square().sum().backward()
        gradients.append(layer.weight.grad)
        optimizer.step()
        optimizer.zero_grad()
        weights.append(layer.weight.detach().clone())
    return weights, gradients


@pytest.mark.parametrize("name", ["conv2d", "transposed", "linear"])
def test_of_zeros_momentum_and_decay_go_on(name):
    weights, gradients = train(Zero(), name)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients[1:])
    weight, velocity = weights[0], 0.0
    for gradient, after in zip((gradients[0], 0.0, 0.0), weights[1:], strict=True):
        velocity = MOMENTUM * velocity + gradient + DECAY * weight
        weight = weight - LR * velocity
        torch.testing.assert_close(after, weight, rtol=1e-12, atol=1e-12)
    assert not torch.equal(weights[2], weights[1])


@pytest.mark.parametrize("name", ["conv2d", "transposed", "linear"])
def test_of_none_nothing_moves_the_weight(name):
    weights, gradients = train(Zero(none=True), name)
    assert gradients[1:] == [None, None]
    assert torch.equal(weights[2], weights[1]) and torch.equal(weights[3], weights[1])
    assert not torch.equal(weights[1], weights[0])


def test_a_gradient_that_is_there_already_stays():
    for method in (Zero(), Zero(none=True)):
        layer, shape = layers()["conv2d"]
        layer.weight.grad = torch.ones_like(layer.weight)
        transform(nn.Sequential(layer), **{"0": method})(torch.randn(shape)).sum().backward()
        assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))


# --- what runs -----------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The ATen calls, and which of them make a weight gradient of the given shape."""

    def __init__(self, weight):
        super().__init__()
        self.names, self.num_weight_grads = [], 0
        self.of_linear = set() if weight.dim() > 2 else {weight.shape, weight.shape[::-1]}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.names.append(func._schema.name.removeprefix("aten::"))
        self.num_weight_grads += makes_weight_grad(func, args, result, self.of_linear)
        return result


PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.mul.Tensor)


def makes_weight_grad(func, args, result, of_linear):
    of_product = func in PRODUCTS and result.shape in of_linear
    return bool(args[-1][1]) if func == aten.convolution_backward.default else of_product


def calls_of_backward(layer, x, method):
    net = transform(nn.Sequential(layer), **({"0": method} if method else {}))
    layer.zero_grad()
    loss = net(x.requires_grad_()).square().sum()
    with Calls(layer.weight) as calls:
        loss.backward()
    assert x.grad is not None
    return calls


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("method", [Zero(), Zero(none=True), Random(), Random(0.5)], ids=repr)
def test_the_weight_gradient_is_not_computed(name, method):
    layer, shape = layers()[name]
    exact = calls_of_backward(layer, torch.randn(shape), None)
    assert exact.num_weight_grads == 1  # the counter counts
    calls = calls_of_backward(layer, torch.randn(shape), method)
    assert calls.num_weight_grads == 0
    assert calls.names.count("normal_") == isinstance(method, Random)
    assert len(calls.names) <= len(exact.names) + 8


@pytest.mark.parametrize("name", ["conv2d", "linear, tokens"])
def test_random_numbers_are_one_kernel(name):
    layer, shape = layers()[name]
    runs = (calls_of_backward(layer, torch.randn(shape), m).names for m in (Zero(), Random()))
    zero, random = map(Counter, runs)
    del random["promote_types"]  # computes nothing
    assert random - zero == {"empty_like": 1, "normal_": 1} and zero - random == {"zeros_like": 1}


@functools.cache
def count_compiled(name, method):
    """Return how many weight gradients and inputs of the layer a compiled backward has."""
    layer, shape = layers()[name]
    of_linear = set() if layer.weight.dim() > 2 else {layer.weight.shape}
    graphs = []

    def record(gm, example_inputs):
        graphs.append(gm)
        return make_boxed_func(gm)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm), bw_compiler=record)
    net = transform(nn.Sequential(layer), **({"0": method} if method else {}))
    x = torch.randn(shape, requires_grad=True)
    torch.compile(net, backend=backend, fullgraph=True)(x).square().sum().backward()
    (backward,) = graphs
    made = [
        makes_weight_grad(n.target, n.args, n.meta["val"], of_linear)
        for n in backward.graph.nodes
        if n.op == "call_function" and "val" in n.meta
    ]
    kept = [n.meta["val"].numel() for n in backward.graph.nodes if n.op == "placeholder"]
    return sum(made), kept.count(math.prod(shape))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, Zero()) for name in ("conv1d", "conv2d", "transposed", "linear, tokens")),
        *product(("conv2d", "linear"), (Zero(none=True), Random())),
    ],
    ids=repr,
)
def test_nor_in_the_compiled_backward(name, method):
    assert count_compiled(name, None) == (1, 1)
    assert count_compiled(name, method) == (0, 0)  # the layer's input is no input of its backward


@pytest.mark.parametrize("method", [Zero(), Random(), TopK(1), TopK(2)], ids=repr)
@pytest.mark.parametrize("name", ["conv2d", "linear, tokens"])
def test_for_a_weight_without_gradient_nothing_is_computed(name, method):
    layer, shape = layers()[name]
    layer.weight.requires_grad_(False)
    names, allowed = (calls_of_backward(layer, torch.randn(shape), m).names for m in (method, None))
    others = ["empty_strided", "sum", "view", "mm", "t", "view", "_unsafe_view"]
    assert not Counter(names) - Counter([*allowed, *others])


# --- what is kept --------------------------------------------------------------------------------


def kept_for_backward(net, x):
    """The storages that autograd saves, by their address, and their bytes."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = net(x)
    return sum(num_bytes for num_bytes, _ in kept.values()), output


class Pooled(nn.Module):
    """A layer behind a max-pool, which needs its own output for nothing."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x = nn.functional.max_pool2d(x, 2)
        return self.layer(x.flatten(2) if isinstance(self.layer, nn.Linear) else x)


@pytest.mark.parametrize("method", [Zero(), Zero(none=True), Random(), TopK(1)], ids=repr)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_layers_input_is_kept_only_where_the_method_needs_it(method, dtype):
    for layer in (nn.Conv2d(4, 6, 3, padding=1), nn.Linear(36, 5)):
        x = torch.randn(2, 4, 12, 12, requires_grad=True)
        model = Pooled(layer)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            exact, _ = kept_for_backward(transform(model), x)
            ours, _ = kept_for_backward(transform(model, layer=method), x)
        of_input = 2 * 4 * 6 * 6 * (2 if dtype else 4)
        assert ours == exact - (0 if isinstance(method, TopK) else of_input)


def test_for_a_weight_without_gradient_no_input_is_kept():
    model, x = Pooled(nn.Linear(36, 5)), torch.randn(2, 4, 12, 12, requires_grad=True)
    model.layer.weight.requires_grad_(False)
    exact, _ = kept_for_backward(transform(model), x)
    assert kept_for_backward(transform(model, layer=TopK(1)), x)[0] == exact


# --- random numbers ------------------------------------------------------------------------------


def drawn(method, batch=4, dtype=torch.float32, seed=0):
    """36864 numbers of a convolution."""
    layer = nn.Conv2d(64, 64, 3, dtype=dtype)
    net = transform(nn.Sequential(layer), **{"0": method})
    torch.manual_seed(seed)
    net(torch.ones(batch, 64, 3, 3, dtype=dtype)).sum().backward()
    return layer.weight.grad


def assert_normal(numbers, std):
    """Mean, spread and tails within 5 standard errors, and no two neighbours alike."""
    z, count = numbers.double().flatten() / std, numbers.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert float(z.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / count))
    assert float(z.pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / count))
    assert abs(float((z[1:] * z[:-1]).mean())) < 5 / math.sqrt(count)


@pytest.mark.parametrize("method,batch,std", [
    (Random(), 1, 1.0),
    (Random(), 4, 1 / 4),
    (Random(), 7, 1 / 7),
    (Random(0.125), 4, 0.125),
    (Random(3), 4, 3.0),
])  # fmt: skip
def test_numbers_are_normal_of_the_methods_std(method, batch, std):
    assert_normal(drawn(method, batch), std)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_numbers_have_the_weights_dtype(dtype):
    numbers = drawn(Random(), dtype=dtype)
    assert numbers.dtype == dtype
    assert_normal(numbers, 1 / 4)


@pytest.mark.parametrize("std", [0, 0.0])
def test_a_std_of_zero_draws_zeros(std):
    numbers = drawn(Random(std))
    assert torch.equal(numbers, torch.zeros_like(numbers))


@pytest.mark.parametrize(
    "layer,shape,samples",
    [
        (nn.Linear(100, 90), (100,), 1),
        (nn.Linear(100, 90), (5, 100), 5),
        (nn.Linear(100, 90), (3, 8, 100), 3),  # samples, not tokens
        (nn.Conv2d(50, 60, 2), (50, 4, 4), 1),
        (nn.ConvTranspose2d(50, 60, 2), (6, 50, 4, 4), 6),
    ],
)
def test_the_default_std_is_one_by_the_number_of_samples(layer, shape, samples):
    transform(nn.Sequential(layer), **{"0": Random()})(torch.ones(shape)).sum().backward()
    assert_normal(layer.weight.grad, 1 / samples)


def test_the_seed_fixes_them_and_each_backward_draws_anew():
    assert torch.equal(drawn(Random(), seed=1), drawn(Random(), seed=1))
    assert not torch.equal(drawn(Random(), seed=1), drawn(Random(), seed=2))
    layer = nn.Linear(8, 8)
    net, seen = transform(nn.Sequential(layer), **{"0": Random()}), []
    loss = net(torch.ones(2, 8)).sum()
    for _ in range(2):  # of one forward
        layer.weight.grad = None
        loss.backward(retain_graph=True)
        seen.append(layer.weight.grad)
    layer.weight.grad = None
    net(torch.ones(2, 8)).sum().backward()
    seen.append(layer.weight.grad)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_they_know_nothing_of_the_errors_and_the_forward_draws_none():
    layer = nn.Linear(8, 8)
    net, seen = transform(nn.Sequential(layer), **{"0": Random(0.5)}), []
    for x, scale in ((torch.ones(2, 8), 1.0), (torch.randn(2, 8), 1e6)):
        state = torch.get_rng_state()
        loss = net(x).sum() * scale
        assert torch.equal(torch.get_rng_state(), state)
        layer.weight.grad = None
        torch.manual_seed(3)
        loss.backward()
        seen.append(layer.weight.grad)
    assert torch.equal(seen[0], seen[1])


def test_a_module_that_is_called_twice_draws_for_each_call():
    def twice(net, x):
        return net.fc(net.fc(x))

    model = Written(twice, fc=nn.Linear(128, 128))
    transform(model, fc=Random(0.5))(torch.ones(2, 128)).sum().backward()
    assert_normal(model.fc.weight.grad, 0.5 * math.sqrt(2))


@pytest.mark.parametrize("method", [Random(0.5), Random()], ids=repr)
def test_an_empty_batch_draws_too(method):
    layer = nn.Linear(100, 100)
    transform(nn.Sequential(layer), **{"0": method})(torch.ones(0, 100)).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
