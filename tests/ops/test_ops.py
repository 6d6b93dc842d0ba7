"""The equations of the local rule, against explicit sums and against autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from torch import nn

import fxlocal
from fxlocal import Hebbian, LocalPrefix, Plan
from fxlocal.ops.values import add_where_shapes_agree

ops = torch.ops.fxlocal


def rand(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def conv_delta(pre, post, kernel, stride, padding, dilation, groups=1, transposed=False):
    """The op, for a weight of the shape that these channels, kernel and groups mean."""
    inputs, outputs = (value.shape[-len(kernel) - 1] for value in (pre, post))
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    weight = pre.new_empty(first, second // groups, *kernel)
    return ops.conv_delta(pre, post, weight, stride, padding, dilation, transposed, groups)


# --- convolution: the sum, written out -----------------------------------------------------------


def test_conv_delta_is_the_sum_over_batch_and_positions():
    pre, post = rand(2, 2, 4, 3), rand(2, 3, 2, 1)
    ours = conv_delta(pre, post, (3, 3), (1, 1), (0, 0), (1, 1))
    theirs = torch.zeros(3, 2, 3, 3, dtype=torch.float64)
    for b, o, i in itertools.product(range(2), range(3), range(2)):
        for (row, column), (u, v) in itertools.product(
            itertools.product(range(2), range(1)), itertools.product(range(3), repeat=2)
        ):
            theirs[o, i, u, v] += post[b, o, row, column] * pre[b, i, row + u, column + v]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


SLIDES = [  # (kernel, stride, padding, dilation, groups)
    ((3,), (1,), (0,), (1,), 1),
    ((4,), (3,), (2,), (2,), 2),
    ((3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((3, 2), (2, 1), (0, 1), (1, 2), 2),
    ((3, 3), (1, 2), (2, 1), (2, 1), 4),  # depthwise
    ((2, 3, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1), 2),
]


@pytest.mark.parametrize("kernel,stride,padding,dilation,groups", SLIDES)
def test_conv_delta_is_the_explicit_sum(kernel, stride, padding, dilation, groups):
    pre = rand(2, 4, *(9, 8, 7)[: len(kernel)])
    weight = rand(8, 4 // groups, *kernel)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    post = conv(pre, weight, None, stride, padding, dilation, groups)
    ours = conv_delta(pre, post, kernel, stride, padding, dilation, groups)
    theirs = oracle.conv_delta(pre, post, kernel, stride, padding, dilation, groups)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel,stride,padding,dilation,groups", SLIDES)
def test_transposed_conv_delta_is_the_sum_with_the_roles_changed(
    kernel, stride, padding, dilation, groups
):
    pre = rand(2, 4, *(5, 4, 3)[: len(kernel)])
    weight = rand(4, 8 // groups, *kernel)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(kernel) - 1]
    extra = [s - 1 for s in stride]
    post = conv(pre, weight, None, stride, padding, extra, groups, dilation)
    ours = conv_delta(pre, post, kernel, stride, padding, dilation, groups, True)
    theirs = oracle.conv_delta(post, pre, kernel, stride, padding, dilation, groups)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_conv_delta_without_a_batch_dimension():
    pre, post = rand(2, 5, 5), rand(3, 3, 3)
    arguments = ((3, 3), (1, 1), (0, 0), (1, 1))
    batched = conv_delta(pre[None], post[None], *arguments)
    assert torch.equal(conv_delta(pre, post, *arguments), batched)


# --- convolution: what the pass makes of a module's own padding ----------------------------------

MODULES = {
    "same": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 5, 6)),
    "same, even kernel": (nn.Conv2d(3, 4, (3, 4), padding="same"), (2, 3, 5, 6)),
    "same, even kernel, dilation": (nn.Conv1d(3, 4, 4, padding="same", dilation=3), (2, 3, 12)),
    "same in 3d": (nn.Conv3d(2, 3, (2, 3, 4), padding="same"), (1, 2, 4, 4, 5)),
    "valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 5, 6)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 5, 6)),
    "circular": (nn.Conv2d(3, 4, 3, 2, (2, 1), padding_mode="circular"), (2, 3, 5, 6)),
    "replicate": (nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"), (1, 2, 3, 4, 3)),
    "reflect, same": (nn.Conv1d(3, 4, 4, padding="same", padding_mode="reflect"), (2, 3, 7)),
    "circular, same": (
        nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2), padding_mode="circular"),
        (2, 3, 6, 7),
    ),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 3, 4)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 4, 3, dilation=2), (2, 3, 4)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, 2), (1, 2, 2, 3, 2)),
    "unbatched": (nn.Conv2d(3, 4, 3, stride=2), (3, 7, 7)),
    "unbatched, transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 3, 3)),
    "linear": (nn.Linear(3, 4), (2, 3)),
    "linear, tokens": (nn.Linear(3, 4), (2, 5, 3)),
    "linear, images": (nn.Linear(3, 4), (2, 3, 2, 3)),
    "linear, one row": (nn.Linear(3, 4), (3,)),
}


class Behind(nn.Module):
    """The module, then a layer that back-propagation trains."""

    def __init__(self, module):
        super().__init__()
        self.module, self.last = module, nn.Linear(1, 1)

    def forward(self, x):
        return self.last(self.module(x).mean().reshape(1, 1))


@pytest.mark.parametrize("name", MODULES)
def test_weight_moves_along_the_gradient_of_half_the_squared_output(name):
    """post = z makes delta the gradient of ||z||^2 / 2 in W, whatever the module does to its x."""
    module, shape = MODULES[name]
    module, x = module.double(), rand(*shape)
    before = module.weight.detach().clone()
    (delta,) = torch.autograd.grad(module(x).square().sum() / 2, module.weight)
    model = Behind(module).double()
    fxlocal.transform(model, Plan(local=LocalPrefix(until=1, rule=Hebbian(0.5))))(x)
    moved = module.weight.detach() - before
    torch.testing.assert_close(moved, 0.5 * delta / delta.norm(), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        module.weight.copy_(before)  # MODULES is shared


# --- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 3)])
def test_linear_delta_is_the_sum_over_all_leading_positions(leading):
    pre, post = rand(*leading, 3), rand(*leading, 2)
    theirs = oracle.linear_delta(pre, post)
    weight = rand(2, 3)
    torch.testing.assert_close(ops.linear_delta(pre, post, weight), theirs, rtol=1e-12, atol=1e-12)


# --- a residual sum that broadcasts --------------------------------------------------------------


def test_larger_post_counts_at_each_position_that_it_broadcast_to():
    """The gradient of <z, post> in W, as autograd broadcasts z."""
    pre, weight = rand(2, 3, 1, 1), rand(4, 3, 1, 1).requires_grad_()
    post = rand(2, 4, 5, 6)
    (delta,) = torch.autograd.grad((F.conv2d(pre, weight) * post).sum(), weight)
    ours = conv_delta(pre, post, (1, 1), (1, 1), (0, 0), (1, 1))
    torch.testing.assert_close(ours, delta, rtol=1e-12, atol=1e-12)
    pre, weight, post = rand(2, 1, 3), rand(4, 3).requires_grad_(), rand(2, 7, 4)
    (delta,) = torch.autograd.grad((F.linear(pre, weight) * post).sum(), weight)
    torch.testing.assert_close(ops.linear_delta(pre, post, weight), delta, rtol=1e-12, atol=1e-12)


def test_oja_sums_a_larger_post_to_the_layers_own_size_first():
    pre, weight, post = rand(2, 3, 1, 2), rand(2, 3, 1, 1), rand(2, 2, 4, 2)
    theirs = torch.zeros(2, 3, dtype=torch.float64)
    for b, o, x in itertools.product(range(2), range(2), range(2)):
        own = sum(post[b, o, y, x] for y in range(4))
        theirs[o] += own * (pre[b, :, 0, x] - own * weight[o, :, 0, 0])
    ours = ops.conv_oja_delta(pre, post, weight, (1, 1), (0, 0), (1, 1), False, 1)
    torch.testing.assert_close(ours[..., 0, 0], theirs, rtol=1e-12, atol=1e-12)

    pre, weight, post = rand(2, 1, 3), rand(1, 3), rand(2, 7, 4)  # positions and channels
    theirs = torch.zeros(1, 3, dtype=torch.float64)
    for b in range(2):
        own = sum(post[b, t, o] for t in range(7) for o in range(4))
        theirs[0] += own * (pre[b, 0] - own * weight[0])
    ours = ops.linear_oja_delta(pre, post, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    images = (value.transpose(1, 2)[..., None] for value in (pre, post))
    ours = ops.conv_oja_delta(*images, weight[..., None, None], (1, 1), (0, 0), (1, 1), False, 1)
    torch.testing.assert_close(ours[..., 0, 0], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 1, 1), (4, 4, 4)])
def test_skip_of_another_shape_is_not_added(shape):
    post = rand(2, 4, 4, 4)
    assert torch.equal(add_where_shapes_agree(post, rand(*shape)), post)
    assert torch.equal(add_where_shapes_agree(post, post), 2 * post)


# --- the step ------------------------------------------------------------------------------------


@given(
    exponent=st.integers(-30, 30),
    rate=st.floats(1e-6, 10),
    sign=st.sampled_from([1, -1]),
    seed=st.integers(0, 99),
)
def test_step_has_exactly_the_length_of_the_rate(exponent, rate, sign, seed):
    torch.manual_seed(seed)
    delta, weight = rand(3, 2, 2) * 10.0**exponent, torch.zeros(3, 2, 2, dtype=torch.float64)
    ops.normalised_add_(weight, delta, torch.tensor(sign * rate, dtype=torch.float64))
    assert float(weight.norm()) == pytest.approx(rate, rel=1e-12)
    cosine = float((weight * delta).sum() / (weight.norm() * delta.norm()))
    assert cosine == pytest.approx(sign, rel=1e-12)


@pytest.mark.parametrize("delta,rate", [(0.0, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_delta_and_zero_rate_move_nothing(delta, rate, dtype):
    weight = rand(4, 3).to(dtype)
    before = weight.clone()
    ops.normalised_add_(weight, torch.full((4, 3), delta, dtype=dtype), torch.tensor(rate))
    assert torch.equal(weight, before)


def test_a_layer_that_sees_only_zeros_does_not_move():
    layer = nn.Conv2d(3, 4, 3, bias=False)
    before = layer.weight.detach().clone()
    plan = Plan(local=LocalPrefix(until=1, rule=Hebbian(1.0)))
    fxlocal.transform(Behind(layer), plan)(torch.zeros(2, 3, 5, 5))
    assert torch.equal(layer.weight, before)


def test_delta_of_another_shape_is_refused():
    weight = torch.zeros(2, 3)
    message = r"a delta of shape \(3, 2\) for a weight of shape \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        ops.normalised_add_(weight, torch.ones(3, 2), torch.tensor(1.0))
    assert torch.equal(weight, torch.zeros(2, 3))


def test_weight_that_requires_grad_moves_and_records_nothing():
    weight = nn.Parameter(torch.zeros(2, 2))
    ops.normalised_add_(weight, torch.ones(2, 2), torch.tensor(1.0))
    assert weight.grad_fn is None and weight.is_leaf
    assert torch.equal(weight, torch.full((2, 2), 0.5))


# --- precision and layout ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer,shape", [(nn.Conv2d(3, 4, 3), (4, 3, 6, 6)), (nn.Linear(3, 4), (4, 9, 3))]
)
def test_autocast_moves_a_float32_weight_by_the_bf16_activations(layer, shape):
    x, before = rand(*shape, dtype=torch.float32), layer.weight.detach().clone()
    plan = Plan(local=LocalPrefix(until=1, rule=Hebbian(0.5)))
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
        fxlocal.transform(Behind(layer), plan)(x)
    assert z.dtype is torch.bfloat16 and layer.weight.dtype is torch.float32
    again = before.clone().requires_grad_()
    pre = x.bfloat16().float()
    called = F.linear(pre, again) if pre.dim() == 3 else F.conv2d(pre, again)
    (delta,) = torch.autograd.grad((called * z.float()).sum(), again)
    moved = layer.weight.detach() - before
    # bf16 keeps 8 bits: each element of the delta is off by at most 2^-8 of the largest
    torch.testing.assert_close(moved, 0.5 * delta / delta.norm(), rtol=0, atol=0.5 * 2**-8)
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-5)


def test_fp16_activations_do_not_overflow():
    pre, post = (torch.full((64, 2, 4, 4), 200.0, dtype=torch.float16) for _ in range(2))
    delta = conv_delta(pre, post, (1, 1), (1, 1), (0, 0), (1, 1))
    assert torch.equal(delta, torch.full((2, 2, 1, 1), 64 * 16 * 200.0**2))
    rows = [value.movedim(1, -1) for value in (pre, post)]
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(ops.linear_delta(*rows, torch.empty(2, 2)), delta[:, :, 0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_oja_is_the_float32_delta_of_narrow_activations(kernel, dtype):
    """Near the fixed point, where the delta is a thousandth of its two terms."""
    pre, weight = rand(64, 4, *[3] * (2 * bool(kernel))).to(dtype), torch.eye(4)
    if kernel:
        weight = weight[..., None, None].repeat(1, 1, kernel, kernel)
        arguments = ([1, 1], [kernel // 2] * 2, [1, 1], False, 1)
    post = F.conv2d(pre.float(), weight, None, *arguments[:2]) if kernel else pre.float()
    post, op = post.to(dtype), ops.conv_oja_delta if kernel else ops.linear_oja_delta
    arguments = arguments if kernel else ()
    with torch.autocast("cpu", dtype):
        ours = op(pre, post, weight, *arguments)
    assert ours.dtype is torch.float32
    theirs = op(pre.double(), post.double(), weight.double(), *arguments)
    # 1e-5 of the larger term, in float32; its own rounding to bf16 would be 4e-3
    scale = float(post.double().square().sum())
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weight_keeps_its_dtype_and_takes_the_step(dtype):
    weight = torch.zeros(8, 8, dtype=dtype)
    delta = rand(8, 8).to(dtype) * 100  # its square leaves fp16
    ops.normalised_add_(weight, delta, torch.tensor(4.0))
    assert weight.dtype is dtype
    assert float(weight.double().norm()) == pytest.approx(4.0, rel=2**-8)


def test_channels_last_weight_stays_channels_last():
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(3, 4, 3)
    plain.load_state_dict(layer.state_dict())
    x = rand(2, 3, 6, 6, dtype=torch.float32)
    plan = Plan(local=LocalPrefix(until=1, rule=Hebbian(0.5)))
    storage = layer.weight.untyped_storage().data_ptr()
    fxlocal.transform(Behind(layer), plan)(x.to(memory_format=torch.channels_last))
    fxlocal.transform(Behind(plain), plan)(x)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.untyped_storage().data_ptr() == storage
    # 1e-6: float32, summed in another order
    torch.testing.assert_close(layer.weight, plain.weight, rtol=0, atol=1e-6)
