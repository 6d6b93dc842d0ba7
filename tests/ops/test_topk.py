"""The weight gradient of the largest errors, against sums over sorted errors by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.topk import (
    DTYPES,
    conv_weight_grad,
    formatted,
    linear_weight_grad,
    rand,
    seeded_errors,
)
from torch import nn

from fxlocal import Plan, TopK, transform
from fxlocal.ops.topk import select


def one_pixel(pre, error, k, scale=1.0):
    """One sample and channel, a kernel of one pixel: the gradient is a single number."""
    pre, error = (torch.tensor(v, dtype=torch.float64)[None, None] for v in (pre, error))
    sliding = ((1, 1), (0, 0), (1, 1), 1)
    gradient, _ = conv_weight_grad(pre, rand(1, 1, 1, 1), lambda _: error, sliding, k, scale)
    return float(gradient)


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


@pytest.mark.sample(20)
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


@pytest.mark.parametrize("k", [1, 2, 12])
def test_without_a_scale_it_is_one_by_the_batch(k):
    conv, exact = nn.Conv2d(2, 4, 3).double(), {"rtol": 1e-10, "atol": 1e-10}
    for batch in (5, 3, None):  # the last one of an epoch is smaller; then one sample, unbatched
        shape = () if batch is None else (batch,)
        maps, tokens = rand(*shape, 2, 5, 6), rand(batch or 1, 12, 3)
        net = transform(nn.Sequential(conv), Plan(weight_grads={"0": TopK(k, None)}))
        conv.weight.grad = None
        error = torch.randn_like(output := net(maps))
        output.backward(error)
        maps, error = (value.view(-1, *value.shape[-3:]) for value in (maps, error))
        sliding = ((3, 3), (1, 1), (0, 0), (1, 1), 1)
        expected = oracle.conv_topk(maps, error, *sliding, k=k) / (batch or 1)
        torch.testing.assert_close(conv.weight.grad, expected, **exact)

        error = rand(batch or 1, 12, 4)
        expected = oracle.linear_topk(tokens, error, k) / (batch or 1)
        torch.testing.assert_close(linear_weight_grad(tokens, error, k, None), expected, **exact)


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
