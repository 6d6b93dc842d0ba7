"""The weight gradient of the largest errors, in each dtype and memory format."""

import itertools

import pytest
import torch
from support import oracle
from support.topk import DTYPES, conv_weight_grad, distinct_errors, formatted, ops, rand
from torch import nn

from fxlocal import Plan, TopK, transform


@pytest.mark.parametrize("scale", [1.0, None])
@pytest.mark.parametrize("k", [1, 2, 36])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_has_the_weights_dtype_and_one_rounding(dtype, k, scale):
    pre, weight = rand(4, 3, 8, 8, dtype=dtype), rand(4, 3, 3, 3, dtype=dtype)
    sliding = ((3, 3), (1, 1), (0, 0), (1, 1), 1)
    gradient, error = conv_weight_grad(pre, weight, distinct_errors, sliding[1:], k, scale)
    assert gradient.dtype == dtype
    scale = scale or 1 / 4  # of the batch: an exact factor
    expected = oracle.conv_topk(pre.double(), error.double(), *sliding, k=k, scale=scale)
    largest = float(expected.abs().max())
    # All are rounded once, from float32 sums at worst; k = 36 is torch's own kernel.
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": max(1e-6, torch.finfo(dtype).eps / 64)}
    close["atol"] *= largest if k < 36 else 64 * largest
    torch.testing.assert_close(gradient.double(), expected, **close)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_are_added_up_in_float32(dtype, k):
    """Under autocast, against the float64 sum: 1e-6, where their own dtype keeps 1e-3 or less."""
    pre, weight = rand(96, 3, 8, 8, dtype=torch.float32), torch.zeros(4, 3, 3, 3)
    sliding = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    with torch.autocast("cpu", dtype):
        gradient, error = conv_weight_grad(pre, weight, distinct_errors, sliding[1:], k)
    assert error.dtype == dtype and gradient.dtype == torch.float32
    expected = oracle.conv_topk(pre.to(dtype).double(), error.double(), *sliding, k=k)
    scale = float(expected.abs().max())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-6 * scale)

    pre = rand(96, 9, 5, dtype=torch.float32)
    weight = torch.zeros(4, 5, requires_grad=True)
    with torch.autocast("cpu", dtype):
        output = ops.linear_topk(pre, weight, None, k=k, scale=1.0)
    error = distinct_errors(output.transpose(1, 2)).transpose(1, 2)
    output.backward(error)
    expected = oracle.linear_topk(pre.to(dtype).double(), error.double(), k)
    scale = float(expected.abs().max())
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_sum_does_not_stall(dtype):
    """600 times 9 ones: a running sum in bfloat16 ends at 256, in float16 at 2048."""
    pre, weight = torch.ones(600, 1, 3, 3, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    sliding = ((1, 1), (0, 0), (1, 1), 1)
    for k in (1, 2, 3):
        gradient, _ = conv_weight_grad(pre, weight, torch.ones_like, sliding, k)
        assert float(gradient) == float(torch.tensor(5400.0).to(dtype))


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9), 9),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2), (2, 4, 8, 8), 16),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4), 27),
    "linear": (lambda: nn.Linear(3, 4), (2, 5, 2, 3), 10),
    "linear, rows": (lambda: nn.Linear(3, 4), (5, 3), 1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale", [1.0, 0.25, None])
def test_all_positions_are_the_exact_gradient_bit_for_bit(name, scale):
    make, shape, positions = LAYERS[name]
    layer, x = make(), rand(*shape, dtype=torch.float32)
    output = layer(x)
    error = torch.randn_like(output)
    output.backward(error)
    exact, layer.weight.grad = layer.weight.grad, None
    transform(nn.Sequential(layer), Plan(weight_grads={"0": TopK(positions, scale)}))(x).backward(
        error
    )
    assert torch.equal(layer.weight.grad, exact * scale if scale else exact / len(x))


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", ["conv2d", "conv3d"])
def test_both_memory_formats_give_the_same(name, k):
    make, shape, _ = LAYERS[name]
    layer, x = make().double(), rand(*shape)
    net, seen = transform(nn.Sequential(layer), Plan(weight_grads={"0": TopK(k)})), []
    error = torch.randn_like(net(x))
    for last, error_last in itertools.product([False, True], repeat=2):
        layer.weight.grad = None
        net(formatted(x, last)).backward(formatted(error, error_last))
        seen.append(layer.weight.grad)
        torch.testing.assert_close(seen[-1], seen[0], rtol=1e-12, atol=1e-12)
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    layer.weight.grad = None
    layer.to(memory_format=last)
    net(x.contiguous(memory_format=last)).backward(error)
    assert layer.weight.grad.is_contiguous(memory_format=last)
    torch.testing.assert_close(layer.weight.grad, seen[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_errors_that_lie_in_memory_as_a_mean_leaves_them(k):
    """Of one element, expanded: all are equal, so that the sum over positions is what counts."""
    pre = torch.ones(2, 3, 6, 6, dtype=torch.float64)
    weight = rand(4, 3, 1, 1).requires_grad_()
    args = (pre, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    ops.conv_topk(*args, k=k, scale=1.0).mean().backward()
    expected = torch.full((4, 3, 1, 1), 2 * 36 / (2 * 4 * 36), dtype=torch.float64)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)
