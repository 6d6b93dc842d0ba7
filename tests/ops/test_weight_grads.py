"""Layers with an approximated weight gradient: what stays exact, and what zero and random are."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import laws
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxlocal import Plan, Random, TopK, Zero, transform

BF16 = torch.bfloat16


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def approximated(layer, method):
    return transform(nn.Sequential(layer), Plan(weight_grads={"0": method}))


def run(net, x, error=None, dtype=None):
    """Forward and backward; the output, x's gradient and the error."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        output = net(x)
    error = rand(*output.shape, dtype=output.dtype) if error is None else error
    output.backward(error)
    return output.detach(), x.grad, error


# --- forward, gradient of the input, gradient of the bias ----------------------------------------

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, 2, 1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (2, 3, 7, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), (1, 2, 1), (1, 0, 0)), (2, 2, 4, 5, 3)),
    "no bias": (lambda: nn.Conv2d(3, 4, 3, stride=2, bias=False), (2, 3, 9, 9)),
    "one pixel": (lambda: nn.Conv2d(3, 4, 1), (2, 3, 5, 5)),
    "map of one": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 3, 3)),
    "asymmetric": (lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), (0, 2), (1, 2)), (2, 3, 8, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 6, 6)),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 5, 6)),
    "same, even": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 6, 6)),
    "same, even, 1d": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=3), (2, 3, 12)),
    "valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 5, 6)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, 2, (1, 2), padding_mode="reflect"), (2, 3, 5, 6)),
    "circular": (lambda: nn.Conv3d(2, 4, 3, 1, 1, padding_mode="circular"), (2, 2, 3, 4, 5)),
    "reflect, same": (
        lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="reflect"),
        (2, 3, 7),
    ),
    "unbatched, 1d": (lambda: nn.Conv1d(3, 4, 3), (3, 9)),
    "unbatched, 2d": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 7, 6)),
    "unbatched, 3d": (lambda: nn.Conv3d(3, 4, 2), (3, 4, 4, 4)),
    "one channel": (lambda: nn.Conv2d(1, 16, 3), (2, 1, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 3, 4)),
    "transposed, 1d": (lambda: nn.ConvTranspose1d(3, 4, 4, 3, dilation=2), (2, 3, 4)),
    "transposed, 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, 2, bias=False), (1, 2, 2, 3, 2)),
    "transposed, unbatched": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 3, 3)),
    "linear, one row": (lambda: nn.Linear(3, 4), (3,)),
    "linear": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear, tokens": (lambda: nn.Linear(3, 4), (2, 5, 3)),
    "linear, no bias": (lambda: nn.Linear(3, 4, bias=False), (2, 5, 3)),
    "linear, images": (lambda: nn.Linear(3, 4), (2, 3, 2, 3)),
}
METHODS = [Zero(), Zero(none=True), Random(), TopK(1), TopK(2, 0.5)]
ONE_POSITION = ("map of one", "linear", "linear, one row")


def fits(name, method):
    if not isinstance(method, TopK):
        return method != Zero(none=True) or name in ("conv2d", "transposed", "linear, tokens")
    return "transposed" not in name and (method.k == 1 or name not in ONE_POSITION)


CASES = [
    pytest.param(name, method, id=f"{name}, {method}")
    for name in LAYERS
    for method in METHODS
    if fits(name, method)
]


def channels_last(x):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x.contiguous(memory_format=last) if last else x


def assert_all_but_the_weight_is_exact(layer, x, method, tolerance=1e-5):
    other = copy.deepcopy(layer)
    output, grad_input, error = run(other, x)
    ours, mine, _ = run(approximated(layer, method), x, error)
    assert torch.equal(ours, output) and ours.stride() == output.stride()
    assert torch.equal(mine, grad_input)
    if layer.bias is not None:  # summed in another order
        close = {"rtol": tolerance, "atol": 10 * tolerance}
        torch.testing.assert_close(layer.bias.grad, other.bias.grad, **close)
    if method == Zero(none=True):
        assert layer.weight.grad is None
    else:
        assert layer.weight.grad.dtype == layer.weight.dtype
        assert layer.weight.grad.stride() == layer.weight.stride()
    if method == Zero():
        assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


@pytest.mark.sample(14)
@pytest.mark.parametrize("name,method", CASES)
def test_forward_and_input_gradient_are_bit_equal(name, method):
    make, shape = LAYERS[name]
    assert_all_but_the_weight_is_exact(make(), rand(*shape), method)
    if len(shape) == make().weight.dim() > 3:
        layer, x = make(), channels_last(rand(*shape))
        assert_all_but_the_weight_is_exact(layer, x, method)
        layer.zero_grad()
        layer.weight.data = channels_last(layer.weight.data)
        assert_all_but_the_weight_is_exact(layer, x, method)


@pytest.mark.sample(6)
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-12), (BF16, 2e-2), (torch.float16, 2e-3)]
)
def test_so_they_are_in_every_dtype(dtype, tolerance, method):
    for name in ("conv2d", "linear, tokens"):
        make, shape = LAYERS[name]
        layer, x = make().to(dtype), rand(*shape, dtype=dtype)
        assert_all_but_the_weight_is_exact(layer, x, method, tolerance)


@st.composite
def convolutions(draw):
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    each = lambda low, high: st.lists(st.integers(low, high), min_size=dims, max_size=dims)  # noqa: E731
    kernel, dilation = draw(each(1, 3)), draw(each(1, 2))
    stride, padding = draw(each(1, 3)), draw(st.one_of(each(0, 2), st.sampled_from([0, 1, 2])))
    inputs = groups * draw(st.integers(1, 3))
    outputs = groups * draw(st.integers(1, 4))
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    options = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    layer = make(inputs, outputs, kernel, stride, padding, **options)
    return layer, (draw(st.integers(1, 3)), inputs, *draw(each(5, 8)))


@given(convolutions(), st.sampled_from(METHODS[:-1]), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=60)
def test_so_they_are_for_any_convolution(case, method, last, seed):
    torch.manual_seed(seed)
    layer, shape = case
    x = channels_last(rand(*shape)) if last else rand(*shape)
    other = copy.deepcopy(layer)
    output, grad_input, error = run(other, x)
    ours, mine, _ = run(approximated(layer, method), x, error)
    assert torch.equal(ours, output) and torch.equal(mine, grad_input)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_tokens_that_lie_in_memory_as_an_image(method):
    x = rand(2, 8, 4, 4).flatten(2).transpose(1, 2)  # as a patch embedding leaves them
    assert_all_but_the_weight_is_exact(nn.Linear(8, 5), x, method)


@pytest.mark.parametrize("method", [Zero(), Random(), TopK(1), TopK(35)], ids=repr)
@pytest.mark.parametrize("dtype", [None, BF16])
def test_the_gradient_lies_in_memory_as_the_weight(method, dtype):
    """Where autograd would not see to it: `torch.autograd.grad` copies nothing."""
    make, shape = LAYERS["conv2d"]
    layer = make().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        output = approximated(layer, method)(rand(*shape))
    (gradient,) = torch.autograd.grad(output.float().square().sum(), layer.weight)
    assert gradient.stride() == layer.weight.stride() and gradient.dtype == torch.float32


# --- a weight that the user froze; a gradient that is there already ------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ["conv2d", "linear, tokens"])
def test_a_weight_that_requires_no_gradient_gets_none(name, method):
    make, shape = LAYERS[name]
    layer, x = make(), rand(*shape)
    layer.weight.requires_grad_(False)
    other = copy.deepcopy(layer)
    output, grad_input, error = run(other, x)
    ours, mine, _ = run(approximated(layer, method), x, error)
    assert torch.equal(ours, output) and torch.equal(mine, grad_input)
    torch.testing.assert_close(layer.bias.grad, other.bias.grad)
    assert layer.weight.grad is None


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ["conv2d", "linear, tokens"])
def test_gradients_of_micro_batches_add_up(name, method):
    make, shape = LAYERS[name]
    layer, batches, parts = make(), [rand(*shape), rand(*shape)], []
    net = approximated(layer, method)
    torch.manual_seed(1)
    for x in batches:
        run(net, x)
        parts.append(layer.weight.grad)
        layer.weight.grad = None
    torch.manual_seed(1)
    layer.weight.grad = given = torch.ones_like(layer.weight)  # of a plain step, say
    for x in batches:
        run(net, x)
    if method == Zero(none=True):
        assert parts == [None, None] and layer.weight.grad is given
    else:
        assert torch.equal(layer.weight.grad, 1 + parts[0] + parts[1])


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_transforms_of_torch_func_are_refused_by_name(method):
    net = approximated(nn.Conv2d(3, 4, 3), method)
    state = {name: value.detach() for name, value in net.named_parameters()}
    loss = torch.func.grad(lambda state, x: torch.func.functional_call(net, state, (x,)).sum())
    with pytest.raises(RuntimeError, match=r"torch\.func \(grad.*torch\.autograd\.grad"):
        loss(state, rand(2, 3, 8, 8))
    assert torch.func.functional_call(net, state, (rand(2, 3, 8, 8),)).shape == (2, 4, 6, 6)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ["conv2d", "linear, tokens"])
def test_a_gradient_of_the_gradient_is_refused(name, method):
    """It would be one of the exact gradient, and wrong without a word."""
    make, shape = LAYERS[name]
    x = rand(*shape).requires_grad_()
    output = approximated(make(), method)(x)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_weight_that_was_overwritten_before_its_backward_is_noticed(method):
    layer = nn.Linear(3, 4)
    loss = approximated(layer, method)(rand(2, 5, 3).requires_grad_()).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, Random)], ids=repr)
def test_activation_checkpointing_is_exact(method, reentrant):
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(2))
    source.append(nn.Linear(16, 5))
    models, x, seen = [source, copy.deepcopy(source)], rand(2, 3, 8, 8), []
    for model in models:
        net = transform(model, Plan(weight_grads=dict.fromkeys(("0", "2", "4"), method)))
        around = (lambda v, n=net: checkpoint(n, v, use_reentrant=reentrant)) if seen else net
        seen.append(run(around, x, rand(2, 4, 5).fill_(0.5)))
    laws.assert_equal(seen[0], seen[1], "output, gradient")
    laws.assert_equal(laws.gradients(models[0]), laws.gradients(models[1]), "gradient")


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.sample(12)
@pytest.mark.parametrize("method", [*METHODS, TopK(35), TopK(10)], ids=repr)
@pytest.mark.parametrize("name", ["conv2d", "same, even", "reflect", "linear, images"])
def test_autocast_is_the_layers_own(name, method):
    make, shape = LAYERS[name]
    layer, x = make(), rand(*shape)
    other = copy.deepcopy(layer)
    output, grad_input, error = run(other, x, dtype=BF16)
    positions = math.prod(output.shape[1:-1] if name.startswith("l") else output.shape[2:])
    k = min(getattr(method, "k", 1), positions)
    method = TopK(k, method.scale) if isinstance(method, TopK) else method
    ours, mine, _ = run(approximated(layer, method), x, error, dtype=BF16)
    assert ours.dtype == BF16 and torch.equal(ours, output) and torch.equal(mine, grad_input)
    assert layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(layer.bias.grad, other.bias.grad, rtol=2e-2, atol=0.1)
    if layer.weight.grad is not None:
        assert layer.weight.grad.dtype == torch.float32
    if isinstance(method, TopK) and k == positions:
        close = {"rtol": 2e-2, "atol": 0.1}
        torch.testing.assert_close(layer.weight.grad, method.scale * other.weight.grad, **close)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ["conv2d", "linear, tokens"])
def test_autocast_leaves_float64_alone(name, method):
    make, shape = LAYERS[name]
    layer, x = make().double(), rand(*shape, dtype=torch.float64)
    other = copy.deepcopy(layer)
    output, grad_input, error = run(other, x, dtype=BF16)
    ours, mine, _ = run(approximated(layer, method), x, error, dtype=BF16)
    assert ours.dtype == torch.float64
    assert torch.equal(ours, output) and torch.equal(mine, grad_input)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ["conv2d", "linear, tokens"])
def test_a_backward_under_autocast_is_the_layers_own(name, method):
    make, shape = LAYERS[name]
    layer, x = make(), rand(*shape)
    other, seen = copy.deepcopy(layer), []
    for net in (approximated(layer, method), other):
        with torch.autocast("cpu", BF16):
            given = x.detach().requires_grad_()
            net(given).float().sin().sum().backward()
        seen.append(given.grad)
    assert torch.equal(*seen)
    assert layer.weight.grad is None or layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_scaled_loss_is_unscaled_and_an_infinite_one_skips_the_step(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(36, 5))
    plain, x = copy.deepcopy(model), rand(4, 3, 8, 8)
    plan = Plan(weight_grads=dict.fromkeys(("0", "2"), method))
    for net, scale in ((transform(plain, plan), None), (transform(model, plan), 2.0**12)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        torch.manual_seed(1)
        with torch.autocast("cpu", BF16):
            loss = net(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
    if not isinstance(method, Random):  # whose numbers know of no scale
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    scaler.update()
    scaler.scale(net(x).square().mean() * math.inf).backward()
    scaler.step(optimizer)
    laws.assert_equal(model.state_dict(), before, "state")
