"""The weight gradient of the largest errors, against sums over sorted errors by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from torch import nn

from fxlocal import Plan, TopK, transform
from fxlocal.ops.topk import select

ops = torch.ops.fxlocal
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def conv_weight_grad(pre, weight, error_of, sliding, k, scale=1.0):
    """The operator's, of ``error_of`` the output; ``sliding`` ends with the number of groups."""
    *sliding, groups = sliding
    weight = weight.detach().requires_grad_()
    nothing = [0] * (weight.dim() - 2)
    sliding = [list(value) for value in sliding]
    args = (pre, weight, None, *sliding, False, nothing, groups)
    output = ops.conv_topk(*args, k=k, scale=scale)
    error = error_of(output)
    output.backward(error)
    return weight.grad, error


def linear_weight_grad(pre, error, k, scale=1.0):
    weight = torch.zeros(error.shape[-1], pre.shape[-1], dtype=pre.dtype, requires_grad=True)
    ops.linear_topk(pre, weight, None, k=k, scale=scale).backward(error)
    return weight.grad


def one_pixel(pre, error, k, scale=1.0):
    """One sample and channel, a kernel of one pixel: the gradient is a single number."""
    pre, error = (torch.tensor(v, dtype=torch.float64)[None, None] for v in (pre, error))
    sliding = ((1, 1), (0, 0), (1, 1), 1)
    gradient, _ = conv_weight_grad(pre, rand(1, 1, 1, 1), lambda _: error, sliding, k, scale)
    return float(gradient)


def seeded_errors(output):
    return torch.randn(output.shape, dtype=output.dtype)


def distinct_errors(output):
    """Of no two equal sizes in a map, and exact in every dtype."""
    sizes = torch.rand(output.shape).flatten(2).argsort(2).view(output.shape) + 1
    signs = torch.randint(0, 2, output.shape) * 2 - 1
    return (sizes * signs / 16).to(output.dtype)


# --- the sum, written out ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k,expected",
    [
        (1, 20 * 0.5),  # all of the channel's 0.5, where the error is -3
        (2, 20 * (-3 + 0.75) + 30 * (2 + 0.75)),
        (3, 20 * (-3 + 0.5 / 3) + 30 * (2 + 0.5 / 3) + 10 * (1 + 0.5 / 3)),
        (4, 10 * 1 - 20 * 3 + 30 * 2 + 40 * 0.5),  # the exact one
    ],
)
def test_a_gradient_in_numbers(k, expected):
    pre, error = [[10.0, 20.0], [30.0, 40.0]], [[1.0, -3.0], [2.0, 0.5]]
    assert one_pixel(pre, error, k) == pytest.approx(expected, rel=1e-12)
    assert one_pixel(pre, error, k, -0.25) == pytest.approx(-0.25 * expected, rel=1e-12)


SLIDES = {  # channels in and out, size, kernel, stride, padding, dilation, groups
    "1d": (3, 4, (11,), (3,), (1,), (0,), (1,), 1),
    "1d, all": (4, 6, (17,), (4,), (3,), (2,), (2,), 2),
    "2d": (3, 5, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d, 5 by 3": (2, 3, (5, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "2d, prime": (2, 3, (13, 11), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d, strides": (3, 4, (9, 8), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "2d, all": (4, 8, (9, 8), (3, 2), (2, 1), (0, 1), (1, 2), 2),
    "2d, beyond the border": (2, 4, (4, 4), (3, 3), (2, 2), (4, 3), (1, 1), 1),
    "2d, depthwise": (4, 8, (9, 8), (3, 3), (1, 2), (2, 1), (2, 1), 4),
    "2d, many channels": (2, 40, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3d": (2, 3, (4, 3, 5), (2, 2, 2), (1, 1, 1), (1, 0, 1), (1, 1, 1), 1),
    "3d, all": (4, 4, (9, 8, 7), (2, 3, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1), 2),
}


@pytest.mark.parametrize("k", [1, 2, 5, "all"])
@pytest.mark.parametrize("name", SLIDES)
def test_a_convolution_is_the_oracles(name, k):
    inputs, outputs, size, *sliding = SLIDES[name]
    pre, weight = rand(2, inputs, *size), rand(outputs, inputs // sliding[-1], *sliding[0])
    if k == "all":
        (_, *rest, groups) = sliding
        conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(size) - 1]
        k = conv(pre, weight, None, *rest, groups)[0, 0].numel()
    gradient, error = conv_weight_grad(pre, weight, seeded_errors, sliding[1:], k, 0.5)
    expected = oracle.conv_topk(pre, error, *sliding, k=k, scale=0.5)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    if k == error[0, 0].numel():
        exact = oracle.conv_delta(pre, error, *sliding)
        torch.testing.assert_close(gradient, 0.5 * exact, rtol=1e-10, atol=1e-10)


LINEAR = [((), 1), ((4,), 1), ((1, 131), 40)]
LINEAR += [
    (leading, k) for leading in ((2, 7), (3, 5, 2)) for k in (1, 2, 5, math.prod(leading[1:]))
]


@pytest.mark.parametrize("leading,k", LINEAR)
def test_a_linear_layer_is_the_oracles(leading, k):
    pre, error = rand(*leading, 3), rand(*leading, 6)
    expected = oracle.linear_topk(pre, error, k, 0.5)
    gradient = linear_weight_grad(pre, error, k, 0.5)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    if k == math.prod(leading[1:]):
        exact = oracle.linear_delta(pre, error)
        torch.testing.assert_close(gradient, 0.5 * exact, rtol=1e-10, atol=1e-10)


def formatted(value, channels_last):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    return value.contiguous(memory_format=last) if channels_last and last else value


@st.composite
def slides(draw):
    """A convolution that fits its input, a k that fits its map."""
    dims = draw(st.integers(1, 3))
    each = st.lists(st.integers(1, 3), min_size=dims, max_size=dims).map(tuple)
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    padding = draw(st.lists(st.integers(0, 3), min_size=dims, max_size=dims).map(tuple))
    groups = draw(st.sampled_from([1, 2, 3]))
    size, output = [], []
    for n, s, p, d in zip(kernel, stride, padding, dilation, strict=True):
        least = max(1, d * (n - 1) + 1 - 2 * p)
        size.append(draw(st.integers(least, least + (14, 9, 4)[dims - 1])))
        output.append((size[-1] + 2 * p - d * (n - 1) - 1) // s + 1)
    k = draw(st.integers(1, min(9, math.prod(output))))
    channels = [groups * draw(st.integers(1, 3)), groups * draw(st.sampled_from([1, 2, 12]))]
    return channels, size, (kernel, stride, padding, dilation, groups), k


@given(slides(), st.booleans(), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=60)
def test_any_convolution_is_the_oracles(slide, pre_last, error_last, seed):
    (inputs, outputs), size, sliding, k = slide
    torch.manual_seed(seed)
    pre = formatted(rand(2, inputs, *size), pre_last)
    weight = rand(outputs, inputs // sliding[-1], *sliding[0])
    errors = lambda output: formatted(seeded_errors(output), error_last)  # noqa: E731
    gradient, error = conv_weight_grad(pre, weight, errors, sliding[1:], k)
    expected = oracle.conv_topk(pre, error, *sliding, k=k)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


# --- selection -----------------------------------------------------------------------------------


@given(
    size=st.sampled_from([(7, 7), (5, 3), (13,), (101,), (16, 12), (3, 5, 7), (32, 48), (2, 1)]),
    channels=st.sampled_from([1, 3, 32, 40]),
    k=st.integers(1, 20),
    distinct=st.sampled_from([1, 2, 5, 10**6]),  # few: ties everywhere
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=200)
def test_the_largest_are_kept_and_the_sum_stays(
    size, channels, k, distinct, channels_last, dtype, seed
):
    torch.manual_seed(seed)
    k = min(k, math.prod(size))
    limit = min(distinct, 2000)  # integers that all dtypes hold
    errors = torch.randint(-limit, limit + 1, (2, channels, *size)).to(dtype)
    errors = formatted(errors, channels_last)
    position, value = select(errors, k, 0.5)
    maps = errors.flatten(2).transpose(0, 1)  # as the result: channel, sample, position
    assert position.shape == value.shape == (channels, 2, k)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for at in position.flatten(0, 1).tolist():
        assert len(set(at)) == k
    kept = maps.gather(2, position).double()
    largest = maps.double().abs().sort(2, descending=True).values[..., :k]
    assert torch.equal(kept.abs().sort(2, descending=True).values, largest)
    total = maps.double().sum(2, keepdim=True)
    share = (total - kept.sum(2, keepdim=True)) / k
    torch.testing.assert_close(value.double(), 0.5 * (kept + share), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        value.double().sum(2, keepdim=True), 0.5 * total, rtol=1e-5, atol=0.1
    )


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_of_equal_errors_any_are_kept(k):
    pre = [[1.0, 10.0], [100.0, 1000.0]]
    gradients = [
        sum(chosen) * 3.0 * 4 / k for chosen in itertools.combinations([1.0, 10.0, 100.0, 1e3], k)
    ]
    gradient = one_pixel(pre, [[3.0, 3.0], [3.0, 3.0]], k)
    assert min(abs(gradient - g) for g in gradients) < 1e-9
    gradient = one_pixel(pre, [[3.0, -3.0], [-3.0, 3.0]], k)  # of alternating ones the sum is none
    assert (gradient == 0) == (k == 1)


@pytest.mark.parametrize("k", [1, 2, 36])
def test_errors_of_zero_make_a_gradient_of_zero(k):
    arguments = (rand(2, 3, 8, 8), rand(4, 3, 3, 3), torch.zeros_like)
    gradient, _ = conv_weight_grad(*arguments, ((1, 1), (0, 0), (1, 1), 1), k)
    assert torch.equal(gradient, torch.zeros(4, 3, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_error_that_is_not_finite_shows(broken, k):
    """A GradScaler looks for it in the gradients."""

    def errors(output):
        error = seeded_errors(output)
        error[1, 2, 3, 0] = broken
        return error

    arguments = (rand(2, 3, 8, 8), rand(4, 3, 3, 3), errors, ((1, 1), (0, 0), (1, 1), 1))
    gradient, _ = conv_weight_grad(*arguments, k)
    assert not torch.isfinite(gradient[2]).any()
    assert torch.isfinite(gradient[[0, 1, 3]]).all()


# --- dtypes and layouts --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 36])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_has_the_weights_dtype_and_one_rounding(dtype, k):
    pre, weight = rand(4, 3, 8, 8, dtype=dtype), rand(4, 3, 3, 3, dtype=dtype)
    sliding = ((3, 3), (1, 1), (0, 0), (1, 1), 1)
    gradient, error = conv_weight_grad(pre, weight, distinct_errors, sliding[1:], k)
    assert gradient.dtype == dtype
    expected = oracle.conv_topk(pre.double(), error.double(), *sliding, k=k)
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
@pytest.mark.parametrize("scale", [1.0, 0.25])
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
    assert torch.equal(layer.weight.grad, exact * scale)


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


# --- sizes that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer,shape,k,said",
    [
        (nn.Conv2d(3, 4, 3), (2, 3, 5, 4), 7, r"TopK\(k=7\) of a map of \(3, 2\), that is 6 "),
        (nn.Conv2d(3, 4, 3), (3, 5, 4), 7, r"TopK\(k=7\) of a map of \(3, 2\), that is 6 "),
        (nn.Conv1d(3, 4, 3), (2, 3, 5), 4, r"map of \(3,\), that is 3 positions: make k smaller"),
        (nn.Linear(3, 4), (2, 5, 3), 6, r"map of \(5,\), that is 5 positions"),
        (nn.Linear(3, 4), (2, 3), 2, r"map of \(\), that is 1 positions"),
        (nn.Linear(3, 4), (3,), 2, r"map of \(\), that is 1 positions"),
    ],
)
def test_more_positions_than_the_map_has_are_refused_at_run_time(layer, shape, k, said):
    net = transform(nn.Sequential(layer), Plan(weight_grads={"0": TopK(k)}))
    with pytest.raises(ValueError, match=said):
        net(rand(*shape, dtype=torch.float32))
    assert layer.weight.grad is None


@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_an_empty_batch_has_a_gradient_of_zero(name, k):
    layer = nn.Conv2d(3, 4, 3) if name == "conv" else nn.Linear(3, 4)
    x = torch.zeros(0, 3, 5, 5) if name == "conv" else torch.zeros(0, 9, 3)
    transform(nn.Sequential(layer), Plan(weight_grads={"0": TopK(k)}))(x).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))
